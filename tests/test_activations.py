"""Activations: how names, classes and modules are read, and how exactly the kernels compute each."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import activations
from tests.cases import ACTIVATIONS
from tests.oracle import kinds

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (
    "identity", "relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "silu", "mish", "gelu", "gelu_tanh",
    "sigmoid", "tanh", "hardswish", "hardsigmoid", "softplus",
)  # fmt: skip


def test_names() -> None:
    assert activations.NAMES == NAMES


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((name, name) for name in NAMES),
        *((name.upper(), name) for name in NAMES),
        ("swish", "silu"), ("hard_swish", "hardswish"), ("hard_sigmoid", "hardsigmoid"), ("none", "identity"),
        (None, "identity"), (nn.Identity, "identity"), (nn.ReLU(inplace=True), "relu"), (nn.RReLU, "rrelu"),
        (nn.GELU("tanh"), "gelu"),
    ],
    ids=str,
)  # fmt: skip
def test_resolve(given: Any, name: str) -> None:
    activation = activations.resolve(given)
    assert activation.name == name
    assert activations.resolve(activation) is activation
    assert activation == copy.deepcopy(activation) == pickle.loads(pickle.dumps(activation))


def test_parameters_are_told_apart() -> None:
    assert activations.resolve(nn.LeakyReLU(0.2)) != activations.resolve(nn.LeakyReLU(0.3))
    assert activations.resolve("elu", {"alpha": 1.0}).params == activations.resolve("elu").params
    assert activations.resolve(nn.GELU("tanh")).code == activations.resolve("gelu_tanh").code


MONOTONE = [
    *(activations.resolve(name) for name in NAMES),
    *(activations.resolve(act) for act in ACTIVATIONS.values()),
    activations.resolve(nn.ELU(-0.5)),
    activations.resolve(nn.CELU(-2.0)),
    activations.resolve(nn.RReLU(-0.5, 0.2)),
    activations.resolve(nn.RReLU(-0.2, 0.5)),
    *(
        activations.resolve(nn.Softplus(*arguments))
        for arguments in ((0.5, -3.0), (1.0, 0.0), (1.0, 10.0), (2.0, 20.0))
    ),
]


@pytest.mark.parametrize("activation", MONOTONE, ids=lambda a: f"{a.name} {dict(a.kwargs)}")
def test_monotone(activation: activations.Activation) -> None:
    """The largest of several values, as float32 sees them, is that of the largest argument, or `monotone` denies it."""
    z = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    if activation.name == "softplus":  # falls at one point
        beta, threshold, _ = activation.params
        z = torch.cat((z, torch.tensor([-1e-12, 1e-12], dtype=torch.float64) + threshold / beta)).sort().values
    y = activation.in_evaluation().apply(z)
    assert activation.monotone == bool((y.diff() > -1e-8 * y[1:].abs().clamp_min(1)).all())


@pytest.mark.parametrize("name", [n for n in NAMES if activations.resolve(n).derivatives is not None])
def test_two_valued_derivatives(name: str) -> None:
    """What `derivatives` says they are."""
    activation = activations.resolve(name)
    z = torch.linspace(-10, 10, 1001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(activation.apply(z).sum(), z)
    assert sorted(set(slope.tolist())) == sorted(set(activation.derivatives or ()))


def _through_the_kernel(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative at `x` by the fused kernels, set up so that x is what goes into the activation."""
    column = x.view(-1, 1).clone().requires_grad_()
    mean, var = torch.zeros(1, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
    y = fl.functional.batch_norm_act(column, mean, var, eps=0.0, act=activation)
    (slope,) = torch.autograd.grad(y, column, torch.ones_like(y))
    return y.detach().view(-1), slope.view(-1)


def _by_torch(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = activation(leaf)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


def _grid() -> Tensor:
    """Floats of all magnitudes, subnormal ones too, and densely those where activations bend; sorted."""
    bits = torch.arange(0, 0x7F800000, 0x7F800000 // 20_000, dtype=torch.int32)
    magnitudes = bits.view(torch.float32)
    dense = torch.linspace(-25, 25, 60_001)
    return torch.cat((-magnitudes, magnitudes, dense)).sort().values


@functools.lru_cache(maxsize=1)
def _expected_on_the_grid(name: str) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The grid, and torch's values and slopes there in float64 and float32; kept for the next instruction set."""
    x = _grid()
    return x, _by_torch(ACTIVATIONS[name], x.double()), _by_torch(ACTIVATIONS[name], x)


# Units in the last place of the larger of 1 and the result.
VALUE_ULPS = 1.5
SLOPE_ULPS = 4.0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_accuracy_in_float32(name: str, capability: str, device: torch.device) -> None:
    """Against torch in float64; in the tails, where results are tiny, against torch's own error there too."""
    if device.type != "cpu":
        pytest.skip("the compiled kernels serve the CPU")
    x, exact, theirs = _expected_on_the_grid(name)
    eps = torch.finfo(torch.float32).eps
    ours = _through_the_kernel(ACTIVATIONS[name], x)
    for got, torchs, right, ulps in zip(ours, theirs, exact, (VALUE_ULPS, SLOPE_ULPS), strict=True):
        # Where torch's float32 overflows within the formula, so may ours.
        valid = torchs.isfinite() & right.float().isfinite()
        assert got[valid].isfinite().all()
        error, their_error = ((r.double() - right).abs() for r in (got, torchs))
        assert (error[valid] <= ulps * eps * right[valid].abs().clamp_min(1)).all()
        bins = torch.where(valid, torch.stack((error, their_error, right.abs(), x.double().abs())), 0)
        bins = bins[:, : bins.shape[1] // 64 * 64].view(4, -1, 64).amax(2)
        # What is subnormal may as well be zero; and torch's formulas cancel in float64 too.
        rounding = torch.finfo(torch.float32).smallest_normal + 4 * torch.finfo(torch.float64).eps * bins[3].clamp_min(
            1
        )
        assert (bins[0] <= 2 * bins[1] + 4 * eps * bins[2] + rounding).all()


SPECIAL = [0.0, 1e-45, 1e-38, 3.0, 6.0, 20.0, 5.0, 90.0, 1e19, 3e38, float("inf")]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_special_values(name: str, dtype: torch.dtype, capability: str, device: torch.device) -> None:
    """At kinks, zeros and infinities: what torch gives in this dtype, or what is right where torch is not."""
    if device.type != "cpu":
        pytest.skip("the compiled kernels serve the CPU")
    x = torch.tensor([*SPECIAL, *(-s for s in SPECIAL)], dtype=torch.float64).to(dtype)
    activation, exactly = ACTIVATIONS[name], x.double()
    # Torch's, the definition, and for infinities also the limits of the value and of the slope.
    limits = (exactly.clamp(-1e300, 1e300), exactly.clamp(-1e6, 1e6))
    accepted = [_by_torch(activation, t) for t in (x, exactly, *limits)]
    for got, *candidates in zip(_through_the_kernel(activation, x), *accepted, strict=True):
        like = [c.to(dtype) for c in candidates]
        wrong = ~torch.stack([(kinds(got) == kinds(c)) & _close(got, c) for c in like]).any(0)
        assert not wrong.any(), f"x, result, accepted: {torch.stack((x, got, *like))[:, wrong]}"


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan(name: str, dtype: torch.dtype, capability: str, device: torch.device) -> None:
    """The value is NaN. The slope there is nothing fixed: torch's own differs between its vector and scalar code."""
    if device.type != "cpu":
        pytest.skip("the compiled kernels serve the CPU")
    value, _ = _through_the_kernel(ACTIVATIONS[name], torch.full((20,), float("nan"), dtype=dtype))
    assert value.isnan().all()


def _close(a: Tensor, b: Tensor) -> Tensor:
    tolerance = max(torch.finfo(a.dtype).eps * 8, 1e-6)  # torch's hardsigmoid is float32's in float64
    return torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_accuracy_in_float64(name: str, capability: str, device: torch.device) -> None:
    """The double kernels, which check gradients, against torch's."""
    if device.type != "cpu":
        pytest.skip("the compiled kernels serve the CPU")
    x = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    for got, theirs in zip(_through_the_kernel(ACTIVATIONS[name], x), _by_torch(ACTIVATIONS[name], x), strict=True):
        tolerance = 1e-6 if name == "hardsigmoid" else 1e-13  # torch's is 1 / 6 in float32
        torch.testing.assert_close(got, theirs, rtol=tolerance, atol=tolerance)
