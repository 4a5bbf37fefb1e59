"""Accuracy and IEEE behaviour where batch norm goes wrong easily: large means, extreme magnitudes, NaN, infinity."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.cases import Case, make_sample
from tests.oracle import check, eager, fused, kinds, run

pytestmark = pytest.mark.usefixtures("one_thread")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Planes and rows, whole and split: see PlaneSplit and RowSplit in csrc/kernels/cpu.
PATHS = [
    Case((8, 5, 9, 7)),
    Case((8, 70, 9, 7), layout="channels_last"),
    Case((2, 3, 129, 131)),
    Case((44001, 3)),
]


def _paths(**changes: object) -> list[Case]:
    return [dataclasses.replace(path, **changes) for path in PATHS]  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        *_paths(mean=1e4, std=1.0),
        *_paths(mean=-1e4, std=1.0, act="gelu", residual="contiguous"),
        *_paths(mean=1e4, std=1.0, act="relu", drop_p=0.3),
        *_paths(mean=1e8, std=1e4, dtype=f64, param_dtype=f64),
        *_paths(mean=1e30, std=1e30),
        *_paths(mean=1e30, std=1e26),
        *_paths(mean=1e30, std=1e30, dtype=bf16),
        *_paths(mean=1e-30, std=1e-30),
        *_paths(mean=0.0, std=1e-30, eps=1e-38),
        *_paths(mean=1e-30, std=1e-30, dtype=bf16, param_dtype=bf16),
        *_paths(mean=1.0, std=1e-3, eps=1e-12),
        *_paths(mean=100.0, std=1.0, dtype=f16, eps=1e-12),
        *_paths(mean=2e4, std=5e3, dtype=f16),
        *_paths(mean=1.0, std=0.0),
    ],
    ids=str,
)
def test_hard_values(case: Case, training: bool, device: torch.device, capability: str) -> None:
    """Errors stay within what eager's own allow."""
    check(dataclasses.replace(case, training=training), device)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("case", [*_paths(), *_paths(training=False), *_paths(dtype=bf16)], ids=str)
def test_nan_and_infinity(case: Case, place: int, value: float, device: torch.device, capability: str) -> None:
    """They come out where torch lets them out: of one channel, and as the same kind."""
    sample = make_sample(case, device)
    plane = sample.input[place, 1]
    plane[(place,) * plane.dim()] = value
    fused_results, eager_results = (run(operator, sample.fresh()) for operator in (fused, eager))
    for name, got in fused_results.items():
        assert torch.equal(kinds(got), kinds(eager_results[name])), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropped_planes_hold_no_nan(
    p: float, dtype: torch.dtype, layout: str, device: torch.device, capability: str
) -> None:
    """A poisoned channel's dropped planes are zeros, and NaN gradients that arrive there are ignored."""
    sample = make_sample(
        Case((8, 20, 5, 3), dtype, dtype, layout, drop_p=p, training=True, residual=layout, act="gelu"), device
    )
    assert sample.mask is not None
    dropped = ~sample.mask[:, :, None, None].expand_as(sample.input)
    sample.input[0, 1, 0, 0] = float("nan")
    sample.grad_output[dropped] = float("nan")
    results = run(fused, sample.fresh())
    assert not results["output"][dropped].any()
    assert not results["gradient of residual"][dropped].any()
    healthy = torch.arange(20, device=device) != 1
    assert results["gradient of input"][:, healthy].isfinite().all()
    assert results["gradient of weight"][healthy].isfinite().all()
    assert results["gradient of bias"][healthy].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 1), (1, 100, 1, 1)])
def test_one_value_per_channel_in_evaluation(shape: tuple[int, ...], device: torch.device) -> None:
    check(Case(shape, training=False, act="silu", residual="contiguous"), device)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"drop_p": 0.3, "residual": "contiguous", "act": "relu"}, {"drop_p": 0.3, "drop_mode": "element"}]
)
def test_no_values(shape: tuple[int, ...], training: bool, options: dict[str, Any], device: torch.device) -> None:
    """As eager: statistics stay as they are, gradients of parameters are zeros."""
    sample = make_sample(Case(shape, training=training, **options), device)
    results, eager_results = (run(operator, sample.fresh()) for operator in (fused, eager))
    for name, got in results.items():
        torch.testing.assert_close(got, eager_results[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_no_channels(training: bool, device: torch.device) -> None:
    """Torch raises an IndexError from its insides; here the result is as empty as the input."""
    sample = make_sample(Case((2, 0, 3, 3), training=training, act="relu"), device)
    assert fused(sample).shape == (2, 0, 3, 3)
