"""The fused operator against its definition in float64, over shapes, layouts, dtypes and every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import ACTIVATIONS, POOLS, Case, case_of, pairwise
from tests.layouts import LAYOUTS
from tests.oracle import check

pytestmark = pytest.mark.usefixtures("one_thread")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Each with what it is there for.
SHAPES = [
    (2, 64),  # two values per channel
    (7, 5),
    (16, 100),
    (5, 2048),  # several blocks of channels
    (1, 3, 2),  # two values per channel, in planes
    (6, 1, 9),  # one channel
    (3, 100, 17),
    (4, 3, 5, 7),  # odd planes
    (8, 64, 8, 8),  # small planes, all of a sample in one run
    (9, 21, 5, 7),  # the same, odd
    (8, 40, 11, 11),  # in several blocks
    (3, 7, 4, 8),  # sixteen narrow rows in one run
    (3, 5, 1, 1),  # planes of one value, which are rows
    (2, 2048, 3, 2),
    (2, 5, 3, 4, 5),
    (2, 64, 2, 3, 1),
]
# Large enough for the kernels to split a channel. See PlaneSplit and RowSplit in csrc/kernels/cpu.
LARGE_SHAPES = [
    (260, 600),  # tiles of rows, and blocks of channels with a remainder
    (44001, 3),  # tiles of narrow rows
    (1, 2, 33001),  # spans within one plane
    (2, 3, 129, 131),  # spans that end inside a plane
    (65, 1, 23, 1, 23),  # spans of several planes, one channel
    (200, 20, 7, 7),  # tiles of runs of small planes
    (9, 3, 128, 130),  # tiles of runs of narrow rows
]
_DTYPES = [(f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)]
_OPTIONS: dict[str, list[Any]] = {
    "affine": ["both", "none", "no bias", "frozen weight"],
    "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
    "dropout": [(0.0, "channel"), (0.3, "channel"), (1.0, "channel"), (0.3, "element"), (1.0, "element")],
}


def _cases(**factors: list[Any]) -> list[Case]:
    return [case_of(row) for row in pairwise(factors | _OPTIONS | factors)]


@pytest.mark.parametrize(
    "case",
    _cases(
        shape=SHAPES,
        act=list(ACTIVATIONS),
        dtypes=_DTYPES,
        layout=list(LAYOUTS),
        grad_layout=list(LAYOUTS),
        residual=[None, *LAYOUTS],
    ),
    ids=str,
)
def test_every_pair_of_choices(case: Case, device: torch.device, capability: str) -> None:
    check(case, device)


@pytest.mark.parametrize(
    "case",
    _cases(
        shape=LARGE_SHAPES,
        act=["identity", "relu", "gelu"],
        dtypes=_DTYPES,
        layout=["contiguous", "channels_last", "channels_first", "some_channels", "some_channels_last"],
        grad_layout=["contiguous", "channels_last"],
        residual=[None, "contiguous"],
    ),
    ids=str,
)
def test_channels_that_are_split(case: Case, device: torch.device, capability: str) -> None:
    check(case, device)


# Spatial sizes that every pool but the largest takes.
POOLED_SHAPES = [
    (6, 1, 9),  # one channel
    (3, 100, 17),
    (4, 3, 9, 7),  # odd planes
    (8, 64, 8, 8),  # several samples in a block
    (9, 21, 11, 13),
    (3, 7, 12, 8),  # narrow rows
    (2, 300, 5, 6),  # several blocks of channels
    (7, 2, 5, 40),
]
# What is fused; the rest is for test_modules.py.
_POOLED: dict[str, list[Any]] = {"dropout": [(0.0, "channel"), (0.3, "channel"), (1.0, "channel")]}
_SMALL_POOLS = [name for name in POOLS if name not in ("16/16", "all")]


@pytest.mark.parametrize(
    "case",
    _cases(
        shape=POOLED_SHAPES,
        act=list(ACTIVATIONS),
        pool=_SMALL_POOLS,
        dtypes=_DTYPES,
        layout=list(LAYOUTS),
        grad_layout=list(LAYOUTS),
        **_POOLED,
    ),
    ids=str,
)
def test_max_pool(case: Case, device: torch.device, capability: str) -> None:
    check(case, device)


@pytest.mark.parametrize(
    "case",
    _cases(
        shape=[(1, 2, 33001), (2, 3, 129, 131), (100, 20, 9, 7), (9, 3, 64, 130), (5, 70, 33, 34)],
        act=["identity", "relu", "gelu"],
        pool=["2/2", "5/3/2", "3/2/1 dilated ceil"],
        dtypes=_DTYPES,
        layout=["contiguous", "channels_last", "channels_first", "some_channels_last"],
        grad_layout=["contiguous", "channels_last"],
        **_POOLED,
    ),
    ids=str,
)
def test_max_pool_of_channels_that_are_split(case: Case, device: torch.device, capability: str) -> None:
    check(case, device)


_FORMATS = ["contiguous", "channels_last"]
_LARGE_WINDOWS = {"act": ["relu", "gelu"], "layout": _FORMATS} | _POOLED


@pytest.mark.parametrize(
    "case",
    _cases(shape=[(4, 5, 9, 7), (3, 40, 9, 7)], pool=["all"], **_LARGE_WINDOWS)
    + _cases(shape=[(2, 5, 40, 33), (3, 20, 16, 16)], pool=["16/16"], **_LARGE_WINDOWS),
    ids=str,
)
def test_large_windows(case: Case, device: torch.device, capability: str) -> None:
    """The whole input, of which one element is left; and as many positions as there can be."""
    check(case, device)


@pytest.mark.parametrize(
    "case",
    _cases(
        # Runs whose vectors are aligned, and some that are not.
        shape=[(16, 64), (3, 32, 16, 16), (9, 20, 7, 7), (8, 64, 8, 8), (2, 3, 129, 131), (5, 17, 3, 16, 4)],
        act=["identity", "relu", "gelu"],
        dtypes=_DTYPES,
        layout=["contiguous", "channels_last", "some_channels"],
        residual=[None, "contiguous"],
    ),
    ids=str,
)
@pytest.mark.usefixtures("results_written_past_the_caches")
def test_results_beyond_the_caches(case: Case, device: torch.device, capability: str) -> None:
    check(case, device)


@pytest.mark.parametrize(
    "case",
    _cases(
        shape=[(3, 32, 16, 16), (9, 20, 7, 7), (2, 3, 129, 131)],
        act=["relu", "silu"],
        pool=["2/2", "5/3/2"],
        dtypes=_DTYPES,
        layout=["contiguous", "channels_last", "some_channels"],
        **_POOLED,
    ),
    ids=str,
)
@pytest.mark.usefixtures("results_written_past_the_caches")
def test_max_pool_beyond_the_caches(case: Case, device: torch.device, capability: str) -> None:
    check(case, device)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 64, 26, 24), (90, 40, 9, 10)], ids=str)
def test_max_pool_of_what_is_fetched_ahead(
    shape: tuple[int, ...], memory: str, act: str, device: torch.device, capability: str
) -> None:
    """From 1 MiB on, the next tile or planes while one is pooled."""
    check(Case(shape, act=act, pool="5/3/2", layout=memory, drop_p=0.3), device)
