"""Accuracy and IEEE behaviour where batch norm goes wrong easily: large means, extreme magnitudes, NaN, infinity."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from tests.cases import ACTIVATIONS, Case, make_sample, take
from tests.layouts import in_layout
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
POOLED_PATHS = [
    Case((8, 5, 9, 7), pool="3/2/1 dilated ceil"),
    Case((8, 70, 9, 7), layout="channels_last", pool="5/3/2"),
    Case((2, 3, 129, 131), pool="5/3/2"),
]


def _changed(cases: list[Case], changes: dict[str, Any]) -> list[Case]:
    return [dataclasses.replace(case, **changes) for case in cases]


def _paths(**changes: Any) -> list[Case]:
    return _changed(PATHS, changes)


def _pooled(**changes: Any) -> list[Case]:
    return _changed(POOLED_PATHS, changes)


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
        *_pooled(mean=1e4, std=1.0, act="relu", drop_p=0.3),
        *_pooled(mean=-1e4, std=1.0, act="gelu"),
        *_pooled(mean=1e8, std=1e4, dtype=f64, param_dtype=f64),
        *_pooled(mean=1e30, std=1e30),
        *_pooled(mean=1e30, std=1e26),
        *_pooled(mean=1e30, std=1e30, dtype=bf16),
        # Beside a bias, values as small as these are all equal.
        *_pooled(mean=1e-30, std=1e-30, affine="no bias"),
        *_pooled(mean=1e-30, std=1e-30, dtype=bf16, param_dtype=bf16, affine="no bias"),
        *_pooled(mean=0.0, std=1e-30, eps=1e-38),
        *_pooled(mean=1.0, std=1e-3, eps=1e-12),
        *_pooled(mean=100.0, std=1.0, dtype=f16, eps=1e-12),
        *_pooled(mean=2e4, std=5e3, dtype=f16),
        *_pooled(mean=1.0, std=0.0),
    ],
    ids=str,
)
def test_hard_values(case: Case, training: bool, device: torch.device, capability: str) -> None:
    """Errors stay within what eager's own allow."""
    check(dataclasses.replace(case, training=training), device)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize(
    "case", [*_paths(), *_paths(training=False), *_paths(dtype=bf16), *_pooled(), *_pooled(dtype=bf16)], ids=str
)
def test_nan_and_infinity(case: Case, place: int, value: float, device: torch.device, capability: str) -> None:
    """They come out where torch lets them out: of one channel, and as the same kind."""
    sample = dataclasses.replace(make_sample(case, device), taken=None)  # which is of the values before
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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_dropped_planes_hold_no_nan_behind_a_pool(act: str, layout: str, backend: str, capability: str) -> None:
    """Neither of the input, which is not read there, nor of the gradient."""
    x = in_layout(torch.randn(8, 20, 5, 7), layout)
    x[0, 1, 0, 0] = float("nan")
    x.requires_grad_()
    weight, bias = (torch.rand(20).requires_grad_() for _ in range(2))
    with fl.use_backend(backend):
        y = fl.functional.batch_norm_act(x, None, None, weight, bias, True, act=act, drop_p=0.5, pool=nn.MaxPool2d(2))
        dropped = y.flatten(2).eq(0).all(2)
        assert 0.3 < dropped.float().mean() < 0.7
        grad_output = torch.ones_like(y)
        grad_output[dropped] = float("nan")
        gradients = torch.autograd.grad(y, [x, weight, bias], grad_output)
    assert y[:, 1][~dropped[:, 1]].isnan().all()
    healthy = torch.arange(20) != 1
    assert y[:, healthy].isfinite().all()
    assert gradients[0][:, healthy].isfinite().all()
    if backend == "cpp":  # the definition multiplies the gradient's NaN by zero
        assert all(g[healthy].isfinite().all() for g in gradients[1:])


def _few_values(shape: tuple[int, ...], layout: str) -> Tensor:
    """Of which many are equal."""
    generator = torch.Generator().manual_seed(4)
    return in_layout(torch.randint(-2, 3, shape, generator=generator).double(), layout).requires_grad_()


# In turn falling, flat and rising in the input.
_SLOPES = (-1.5, 0.0, 2.0, 0.5)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, dilation=2)], ids=str)
def test_equal_values_in_a_window(
    pool: nn.MaxPool2d, act: str, layout: str, training: bool, backend: str, capability: str
) -> None:
    """The first of them is taken, as by torch, by each gradient: where the input is negated and where it is nothing."""
    x = _few_values((4, 20, 7, 6), layout)
    weight = torch.tensor(_SLOPES, dtype=torch.float64).repeat(5).requires_grad_()
    bias = torch.linspace(-1, 1, 20, dtype=torch.float64).requires_grad_()
    statistics = torch.zeros(20, dtype=torch.float64), torch.full((20,), 0.7, dtype=torch.float64)
    mean, var = (s.clone() for s in statistics)
    z = F.batch_norm(x, mean, var, weight, bias, training)
    expected = pool(ACTIVATIONS[act](z))
    with fl.use_backend(backend):
        got = fl.functional.batch_norm_act(x, *statistics, weight, bias, training, act=ACTIVATIONS[act], pool=pool)
    torch.testing.assert_close(got, expected)
    grad_output = torch.randn(expected.shape, dtype=torch.float64)
    for mine, theirs in zip(
        *(torch.autograd.grad(y, [x, weight, bias], grad_output) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize(("act", "bias"), [("relu", -9.0), ("relu6", 9.0), ("relu6", -9.0), ("hardsigmoid", 9.0)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_plateaus(act: str, bias: float, layout: str, capability: str) -> None:
    """There all activated values are equal: another one may be taken than by torch, of the same gradient, zero."""
    x = in_layout(torch.randn(4, 20, 7, 6), layout).clamp(-3, 3).requires_grad_()
    weight, shift = torch.ones(20, requires_grad=True), torch.full((20,), bias, requires_grad=True)
    statistics, pool = (torch.zeros(20), torch.ones(20)), nn.MaxPool2d(3, 2, 1)
    with fl.use_backend("cpp"):
        got = fl.functional.batch_norm_act(x, *statistics, weight, shift, act=act, pool=pool)
    expected = pool(ACTIVATIONS[act](F.batch_norm(x, *statistics, weight, shift)))
    assert torch.equal(got, expected)
    for y in (got, expected):
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), [x, weight, shift]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("act", ["identity", "relu", "gelu", "sigmoid"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_in_windows(layout: str, act: str, value: float, backend: str, capability: str) -> None:
    """Several in one window, and windows of nothing else, in rising, falling and flat channels: what torch takes.

    Gradients are those of what is taken: of torch's layers one by one, NaN reaches those of the rest, times zero.
    """
    x = torch.randn(3, 20, 8, 8, dtype=torch.float64)
    x[torch.rand(x.shape) < 0.2] = value
    x[0, :, :4, :4] = value
    x = in_layout(x, layout).requires_grad_()
    weight = torch.tensor(_SLOPES, dtype=torch.float64).repeat(5).requires_grad_()
    bias = torch.randn(20, dtype=torch.float64).requires_grad_()
    statistics = torch.zeros(20, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    pool = nn.MaxPool2d(3, 2, 1)
    with fl.use_backend(backend):
        got = fl.functional.batch_norm_act(x, *statistics, weight, bias, act=act, pool=pool)
    pool.return_indices = True
    values, indices = pool(ACTIVATIONS[act](F.batch_norm(x, *statistics, weight, bias)))
    torch.testing.assert_close(got, values, equal_nan=True)
    if backend == "reference":
        return
    taken = ACTIVATIONS[act](F.batch_norm(take(x, indices), *statistics, weight, bias))
    gradients = [torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y)) for y in (got, taken)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 1), (1, 100, 1, 1)])
def test_one_value_per_channel_in_evaluation(shape: tuple[int, ...], device: torch.device) -> None:
    check(Case(shape, training=False, act="silu", residual="contiguous"), device)
    if len(shape) > 2:
        check(Case(shape, training=False, act="silu", pool="1/1"), device)


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
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_images_to_pool(layout: str, training: bool, device: torch.device) -> None:
    sample = make_sample(
        Case((0, 3, 6, 5), layout=layout, training=training, act="relu", pool="2/2", drop_p=0.3), device
    )
    results, eager_results = (run(operator, sample.fresh()) for operator in (fused, eager))
    assert results["output"].shape == (0, 3, 3, 2)
    for name, got in results.items():
        torch.testing.assert_close(got, eager_results[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_no_channels(training: bool, device: torch.device) -> None:
    """Torch raises an IndexError from its insides; here the result is as empty as the input."""
    sample = make_sample(Case((2, 0, 3, 3), training=training, act="relu"), device)
    assert fused(sample).shape == (2, 0, 3, 3)
