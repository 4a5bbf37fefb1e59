"""The CUDA kernels with max-pooling, emulated on the CPU, against their definition in float64."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch

from fastlayers import activations
from tests import emulated, oracle
from tests.cases import ACTIVATIONS, POOLS, Case, case_of, pairwise
from tests.emulated import GPUS, Emulation, PooledForward, Wanted, make_emulated_sample

pytestmark = pytest.mark.usefixtures("one_thread")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [f32, f64, bf16, f16]


@pytest.fixture
def emulation(cuda_emulated: ModuleType, pytestconfig: pytest.Config) -> Emulation:
    return Emulation(cuda_emulated, guarded=pytestconfig.getoption("--sanitizer") != "address")


def check(emulation: Emulation, case: Case, mask_dtype: torch.dtype = torch.bool) -> list[Any]:
    """Compares all results of a case; the plans of forward and backward."""
    given = make_emulated_sample(case, mask_dtype)
    results = emulated.run(emulation, given)
    exact = oracle.run(oracle.exact, given.sample.fresh(f64))
    oracle.compare(results, given.sample, exact, oracle.run(oracle.eager, given.sample.fresh()))
    return emulation.plans[-2:]


def with_options(emulation: Emulation, **options: Any) -> Emulation:
    return dataclasses.replace(emulation, **options, plans=[])


# Sizes that every pool but the largest takes, each with what it is there for.
SHAPES = [
    (6, 1, 9),  # one channel, one row
    (3, 20, 17),
    (1, 2, 6000),  # a row is more than a tile
    (4, 3, 9, 7),  # odd planes
    (3, 8, 8, 8),  # planes of whole groups, whole groups of channels
    (9, 21, 6, 8),
    (2, 520, 5, 6),  # several blocks of channels
    (2, 5, 33, 70),  # a plane is several tiles
]
_FACTORS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "pool": [name for name in POOLS if name not in ("16/16", "all")],
    "act": list(ACTIVATIONS),
    "dtypes": [(f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)],
    "layout": ["contiguous", "channels_last", "channels_first", "some_channels", "some_channels_last", "offset"],
    "grad_layout": ["contiguous", "channels_last", "offset", "expanded"],
    "affine": ["both", "none", "no bias", "frozen weight"],
    "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
    "drop_p": [0.0, 0.3, 1.0],
    "gpu": list(GPUS),
    "order": ["up", "random"],
    "mask_dtype": [torch.bool, f32, f64, bf16],
}


def _matrix() -> list[Any]:
    parameters = []
    for row in pairwise(_FACTORS):
        options = {name: row.pop(name) for name in ("gpu", "order")}
        mask_dtype = row.pop("mask_dtype")
        case = case_of(row)
        parameters.append(pytest.param(case, mask_dtype, options, id=f"{case} {options} {mask_dtype}"))
    return parameters


@pytest.mark.parametrize(("case", "mask_dtype", "options"), _matrix())
def test_every_pair_of_choices(
    case: Case, mask_dtype: torch.dtype, options: dict[str, str], emulation: Emulation
) -> None:
    check(with_options(emulation, **options), case, mask_dtype)


# What each path is for, with the GPU on which a small tensor takes it forward and backward.
PATHS = [
    (Case((5, 12, 8, 8), pool="5/3/2"), "hopper", "planes_on_chip", "planes_split"),
    (Case((5, 12, 9, 7), pool="5/3/2", dtype=bf16), "hopper", "planes_on_chip", "planes_split"),
    (Case((5, 3, 20, 17), pool="2/2"), "little memory", "planes_on_chip", "planes_split"),  # clusters
    (Case((3, 3, 40, 33), pool="3/1/1"), "least memory", "planes_split", "planes_split"),
    (Case((9, 20, 9, 7), pool="5/3/2", layout="channels_last"), "hopper", "rows_split", "rows_split"),
    (Case((5, 16, 9, 8), pool="2/2", layout="channels_last", dtype=bf16), "turing", "rows_split", "rows_split"),
    (Case((3, 5, 9, 7), pool="2/2", training=False, affine="none"), "hopper", "planes_pointwise", "planes_pointwise"),
    (
        Case((3, 12, 9, 7), pool="5/3/2", training=False, affine="none", layout="channels_last"),
        "hopper",
        "rows_pointwise",
        "rows_pointwise",
    ),
]
SUMMED = [path[:2] for path in PATHS if path[0].training]


@pytest.mark.parametrize("order", ["up", "down", "random"])
@pytest.mark.parametrize("options", [{}, {"act": "relu", "drop_p": 0.4}, {"act": "gelu", "drop_p": 0.4}], ids=str)
@pytest.mark.parametrize(("case", "gpu", "forward", "backward"), PATHS, ids=str)
def test_each_path(
    case: Case, gpu: str, forward: str, backward: str, options: dict[str, Any], order: str, emulation: Emulation
) -> None:
    plans = check(with_options(emulation, gpu=gpu, order=order), dataclasses.replace(case, **options))
    assert [plan.last.path for plan in plans] == [forward, backward]


@pytest.mark.parametrize("order", ["up", "random"])
@pytest.mark.parametrize("shape", [(9, 3, 20, 20), (7, 3, 19, 21)], ids=str)
def test_each_size_of_a_cluster(
    shape: tuple[int, ...], order: str, emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a cluster share a channel's planes: the less memory each has, the more there are."""
    seen: set[int] = set()
    for shared_kilobytes in (40, 16, 10, 6, 4):
        shared_bytes = shared_kilobytes * 1024
        monkeypatch.setitem(GPUS, "this one", (4, shared_bytes, 2 * shared_bytes + 2048, 8))
        forward, _ = check(with_options(emulation, gpu="this one", order=order), Case(shape, pool="5/3/2", drop_p=0.3))
        if forward.last.path == "planes_on_chip":
            seen.add(forward.last.cluster)
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "pool"), [((4, 5, 9, 7), "all"), ((2, 10, 33, 40), "16/16")], ids=str)
def test_large_windows(shape: tuple[int, ...], pool: str, layout: str, act: str, emulation: Emulation) -> None:
    """The whole input, of which one element is left; and as many positions as there can be."""
    check(emulation, Case(shape, pool=pool, layout=layout, act=act, drop_p=0.3))
