"""What csrc/torch makes of the CUDA kernels, from Python down: the operators as they are, over emulated kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlayers as fl
from fastlayers import autograd, masks, reference
from fastlayers.activations import resolve
from tests.cases import Case, case_of, pairwise
from tests.layouts import LAYOUTS
from tests.oracle import check

pytestmark = pytest.mark.usefixtures("emulated_backend", "one_thread")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


def _cases() -> list[Case]:
    factors: dict[str, list[Any]] = {
        "shape": [
            (7, 5),
            (16, 40),
            (2, 3, 5, 7),
            (3, 8, 4, 8),
            (3, 5, 1, 1),
            (2, 3, 2, 3, 4),
            (1, 3, 2),
            (5, 16, 24, 25),
        ],
        "act": ["identity", "relu", "leaky_relu", "gelu", "hardsigmoid", "softplus"],
        "dtypes": [(f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)],
        "layout": list(LAYOUTS),
        "grad_layout": list(LAYOUTS),
        "residual": [None, *LAYOUTS],
        "affine": ["both", "none", "no bias", "frozen weight"],
        "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
        "dropout": [(0.0, "channel"), (0.3, "channel"), (1.0, "channel"), (1.0, "element")],
    }
    return [case_of(row) for row in pairwise(factors)]


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_operators_emulated(case: Case) -> None:
    check(case, CPU)


def _inputs(dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    x = LAYOUTS[layout](torch.randn(3, 5, 4, 6, dtype=dtype))
    return (
        x.requires_grad_(),
        torch.rand(5, dtype=dtype, requires_grad=True),
        torch.randn(5, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_element_dropout_emulated(act: str, layout: str, with_residual: bool) -> None:
    x, weight, bias = _inputs(f64, layout)
    residual = LAYOUTS[layout](torch.randn(3, 5, 4, 6, dtype=f64)).requires_grad_() if with_residual else None
    sources = [t for t in (x, weight, bias, residual) if t is not None]
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    mask = torch.ops.fastlayers_emulated.element_mask(seed, x, masks.scale(0.3))
    assert torch.equal(mask, reference.element_mask(seed, x, masks.scale(0.3)))
    options: dict[str, Any] = {
        "training": True, "momentum": 0.1, "eps": 1e-5, "activation": resolve(act), "drop_p": 0.3,
    }  # fmt: skip
    got = autograd.batch_norm_act(x, weight, bias, residual, seed, None, None, None, backend="emulated", **options)
    expected = reference.batch_norm_act_masked(x, weight, bias, residual, mask, None, None, None, **options)
    grad_output = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, sources, grad_output), torch.autograd.grad(expected, sources, grad_output)
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mode", ["channel", "element"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_dropout_with_running_statistics_emulated(mode: str, layout: str, with_residual: bool) -> None:
    """As in frozen layers."""
    x, weight, bias = _inputs(f64, layout)
    residual = LAYOUTS[layout](torch.randn(3, 5, 4, 6, dtype=f64)).requires_grad_() if with_residual else None
    sources = [t for t in (x, weight, bias, residual) if t is not None]
    torch.manual_seed(2)
    drawn = masks.draw_for_gpu_kernels(x, 0.3, mode, True)
    assert drawn is not None
    mask = drawn if mode == "channel" else reference.element_mask(drawn, x, masks.scale(0.3))
    running = (torch.randn(5, dtype=f64), torch.rand(5, dtype=f64) + 0.5, None)
    options: dict[str, Any] = {
        "training": False, "momentum": 0.1, "eps": 1e-5, "activation": resolve("relu"), "drop_p": 0.3,
    }  # fmt: skip
    got = autograd.batch_norm_act(x, weight, bias, residual, drawn, *running, backend="emulated", **options)
    expected = reference.batch_norm_act_masked(x, weight, bias, residual, mask, *running, **options)
    grad_output = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, sources, grad_output), torch.autograd.grad(expected, sources, grad_output)
    )


@pytest.mark.parametrize("mode", ["channel", "element"])
@pytest.mark.parametrize("act", ["relu", "tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_second_order_gradients_emulated(act: str, mode: str, with_residual: bool) -> None:
    x, weight, bias = _inputs(f64)
    residual = torch.randn(3, 5, 4, 6, dtype=f64, requires_grad=True) if with_residual else None

    def operator(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        torch.manual_seed(3)
        return fl.functional.batch_norm_act(
            x, None, None, weight, bias, training=True, residual=residual, act=act, drop_p=0.3, drop_mode=mode
        )

    inputs = tuple(t for t in (x, weight, bias, residual) if t is not None)
    assert torch.autograd.gradcheck(operator, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_of_channels_emulated(dtype: torch.dtype, layout: str, p: float) -> None:
    x = LAYOUTS[layout](torch.randn(4, 6, 3, 5).to(dtype))
    torch.manual_seed(5)
    expected = F.dropout2d(x, p)
    torch.manual_seed(5)
    got = fl.functional.dropout2d(x, p)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_dropout_of_elements_emulated(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(4, 6, 3, 5)).requires_grad_()
    torch.manual_seed(5)
    got = fl.functional.dropout(x, 0.4)
    torch.manual_seed(5)
    seed = masks.draw_for_gpu_kernels(x, 0.4, "element", True)
    assert seed is not None
    expected = reference.apply_mask(x, torch.ops.fastlayers_emulated.element_mask(seed, x, masks.scale(0.4)), 0.4)
    torch.testing.assert_close(got, expected)
    assert 0 < (got == 0).float().mean() < 1
    (grad,) = torch.autograd.grad(got, x, torch.ones_like(got))
    assert torch.equal(grad != 0, got != 0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batch_emulated(momentum: float | None) -> None:
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    running_mean, running_var, count = torch.zeros(4), torch.ones(4), torch.tensor(3)
    weight = torch.ones(4, requires_grad=True)
    y = fl.functional.batch_norm_act(
        x, running_mean, running_var, weight, training=True, momentum=momentum, num_batches_tracked=count
    )
    assert y.shape == x.shape
    assert count == 4
    assert torch.equal(running_mean, torch.zeros(4))
    y.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(4))


WRONG = {
    "weight should contain 4 elements": {"weight": torch.ones(3)},
    "mask should have an element for each": {"mask": torch.ones(3, dtype=torch.bool)},
    "mask should be bool or of the dtype": {"mask": torch.ones(2, 4, dtype=f64)},
    "a mask of elements should be a seed": {"mask": torch.ones(8, dtype=torch.int64)},
    "residual should have the shape": {"residual": torch.ones(2, 4, 3)},
    "activation should be in": {"activation": 99},
    "num_batches_tracked should be one int64": {"num_batches_tracked": torch.ones(1)},
    "momentum should be a number": {"momentum": None},
}


@pytest.mark.parametrize(("message", "wrong"), WRONG.items(), ids=str)
def test_wrong_arguments_emulated(message: str, wrong: dict[str, Any], emulated_ops: Any) -> None:
    arguments: dict[str, Any] = {
        "input": torch.randn(2, 4, 5), "weight": None, "bias": None, "residual": None, "mask": None,
        "running_mean": torch.zeros(4), "running_var": torch.ones(4), "num_batches_tracked": None,
        "training": True, "momentum": 0.1, "eps": 1e-5, "activation": 0, "activation_params": [0.0] * 3,
        "drop_scale": 2.0, "save_flat_bits": False,
    }  # fmt: skip
    emulated_ops.batch_norm_act_fwd(**arguments)
    with pytest.raises(RuntimeError, match=message):
        emulated_ops.batch_norm_act_fwd(**arguments | wrong)
