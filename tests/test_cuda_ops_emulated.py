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
from fastlayers.autograd import Call
from tests.cases import POOLS, Case, case_of, pairwise, pool_layer
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


def _pooled_cases() -> list[Case]:
    factors: dict[str, list[Any]] = {
        "shape": [(6, 1, 9), (3, 20, 17), (2, 3, 9, 7), (3, 8, 8, 8), (2, 40, 5, 6), (5, 16, 24, 25)],
        "pool": [name for name in POOLS if name not in ("16/16", "all")],
        "act": ["identity", "relu", "leaky_relu(-0.5)", "gelu", "hardsigmoid"],
        "dtypes": [(f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)],
        "layout": list(LAYOUTS),
        "grad_layout": list(LAYOUTS),
        "affine": ["both", "none", "no bias", "frozen weight"],
        "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
        "drop_p": [0.0, 0.3, 1.0],
    }
    return [case_of(row) for row in pairwise(factors)]


@pytest.mark.parametrize("case", _pooled_cases(), ids=str)
def test_pooling_operators_emulated(case: Case) -> None:
    check(case, CPU)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_value_of_each_plane_emulated(layout: str) -> None:
    """Contiguous and channels_last are one memory then; the strides are still those of the input's format."""
    check(Case((4, 5, 9, 7), pool="all", act="relu", layout=layout, drop_p=0.3), CPU)


def _inputs(dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    x = LAYOUTS[layout](torch.randn(3, 5, 4, 6, dtype=dtype))
    return (
        x.requires_grad_(),
        torch.rand(5, dtype=dtype, requires_grad=True),
        torch.randn(5, dtype=dtype, requires_grad=True),
    )


def _residual(layout: str) -> Tensor:
    return LAYOUTS[layout](torch.randn(3, 5, 4, 6, dtype=f64)).requires_grad_()


def _check_masked(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    drawn: Tensor,
    mask: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    call: Call,
) -> None:
    """Results and gradients of `tensors` for the mask that was `drawn` for kernels, and is `mask` to the reference."""
    options = {name: value for name, value in call._asdict().items() if name not in ("backend", "pool")}
    got = autograd.batch_norm_act(*tensors, drawn, *running, call)
    expected = reference.batch_norm_act_masked(*tensors, mask, *running, **options)
    sources, grad_output = [t for t in tensors if t is not None], torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, sources, grad_output), torch.autograd.grad(expected, sources, grad_output)
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_element_dropout_emulated(act: str, layout: str, with_residual: bool) -> None:
    tensors = _inputs(f64, layout)
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    mask = torch.ops.fastlayers_emulated.element_mask(seed, tensors[0], masks.scale(0.3))
    assert torch.equal(mask, reference.element_mask(seed, tensors[0], masks.scale(0.3)))
    call = Call(True, 0.1, 1e-5, resolve(act), 0.3, "emulated")
    _check_masked((*tensors, _residual(layout) if with_residual else None), seed, mask, (None, None, None), call)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mode", ["channel", "element"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_dropout_with_running_statistics_emulated(mode: str, layout: str, with_residual: bool) -> None:
    """As in frozen layers."""
    tensors = _inputs(f64, layout)
    torch.manual_seed(2)
    drawn = masks.draw_for_gpu_kernels(tensors[0], 0.3, mode, True)
    assert drawn is not None
    mask = drawn if mode == "channel" else reference.element_mask(drawn, tensors[0], masks.scale(0.3))
    running = (torch.randn(5, dtype=f64), torch.rand(5, dtype=f64) + 0.5, None)
    call = Call(False, 0.1, 1e-5, resolve("relu"), 0.3, "emulated")
    _check_masked((*tensors, _residual(layout) if with_residual else None), drawn, mask, running, call)


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


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_order_gradients_of_pooling_emulated(layout: str, training: bool, act: str) -> None:
    x, weight, bias = _inputs(f64, layout)
    running = (torch.randn(5, dtype=f64), torch.rand(5, dtype=f64) + 0.5)

    def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fl.functional.batch_norm_act(
            x, *running, weight, bias, training=training, momentum=0.0, act=act, drop_p=0.3, pool=pool_layer("3/1/1", 2)
        )

    assert torch.autograd.gradcheck(operator, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, (x, weight, bias), fast_mode=True)


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


@pytest.mark.parametrize("pool", [None, "5/3/2"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batch_emulated(momentum: float | None, pool: str | None) -> None:
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    running_mean, running_var, count = torch.zeros(4), torch.ones(4), torch.tensor(3)
    weight = torch.ones(4, requires_grad=True)
    y = fl.functional.batch_norm_act(
        x, running_mean, running_var, weight, training=True, momentum=momentum, num_batches_tracked=count,
        pool=None if pool is None else pool_layer(pool, 2),
    )  # fmt: skip
    assert y.shape == (x.shape if pool is None else (0, 4, 2, 2))
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


POOL_WRONG: dict[str, dict[str, Any]] = {
    "window should have 8 numbers": {"window": [2, 2]},
    "window should have a kernel, a stride": {"window": [2, 2, 0, 2, 0, 0, 1, 1]},
    "window should have a padding": {"window": [2, 2, 2, 2, 2, 0, 1, 1]},
    "window should have at most 256 elements": {"window": [1, 300, 1, 1, 0, 150, 1, 1]},
    "window should fit into the input": {"window": [7, 2, 2, 2, 0, 0, 1, 1]},
    "window should leave no output without elements": {"window": [2, 2, 1, 1, 1, 0, 6, 1]},
    "window and input should be less than": {"window": [2, 2, 2**31, 2, 0, 0, 1, 1]},
    r"input should be \(N, C, L\) or": {"input": torch.ones(2, 4)},
    "mask should have an element for each": {"mask": torch.ones(3, dtype=torch.bool)},
    "not be a seed": {"mask": torch.ones(1, dtype=torch.int64)},
    "activation should be in": {"activation": 99},
    "weight should contain 4 elements": {"weight": torch.ones(3)},
}


@pytest.mark.parametrize(("message", "wrong"), POOL_WRONG.items(), ids=str)
def test_wrong_arguments_of_pooling_emulated(message: str, wrong: dict[str, Any], emulated_ops: Any) -> None:
    common: dict[str, Any] = {
        "input": torch.randn(2, 4, 5, 6), "weight": None, "bias": None, "mask": None, "training": True,
        "activation": 0, "activation_params": [0.0] * 3, "drop_scale": 2.0, "window": [2, 2, 2, 2, 0, 0, 1, 1],
        "ceil_mode": False,
    }  # fmt: skip
    of_forward: dict[str, Any] = {
        "running_mean": None, "running_var": None, "num_batches_tracked": None, "momentum": 0.1, "eps": 1e-5,
        "monotone": True, "save": True,
    }  # fmt: skip
    forward, backward = emulated_ops.batch_norm_act_pool_fwd, emulated_ops.batch_norm_act_pool_bwd
    output, mean, invstd, selected, positions = forward(**common | of_forward)
    of_backward = {
        "grad_output": torch.ones_like(output), "selected": selected, "positions": positions, "mean": mean,
        "invstd": invstd, "input_grad": True, "affine_grad": True,
    }  # fmt: skip
    backward(**common | of_backward)
    for operator, own in ((forward, of_forward), (backward, of_backward)):
        with pytest.raises(RuntimeError, match=message):
            operator(**common | own | wrong)


@pytest.mark.parametrize("name", ["grad_output", "selected", "positions"])
@pytest.mark.parametrize("change", [lambda t: t[..., 1:], lambda t: t.double()], ids=["shape", "dtype"])
def test_wrong_saved_tensors_of_pooling_emulated(name: str, change: Any, emulated_ops: Any) -> None:
    x, window = torch.randn(2, 4, 5, 6), [2, 2, 2, 2, 0, 0, 1, 1]
    output, mean, invstd, selected, positions = emulated_ops.batch_norm_act_pool_fwd(
        x, None, None, None, None, None, None, True, 0.1, 1e-5, 0, [0.0] * 3, True, 1.0, window, False, True
    )
    saved = {"grad_output": torch.ones_like(output), "selected": selected, "positions": positions}
    saved[name] = change(saved[name])
    with pytest.raises(RuntimeError, match=f"{name} should have the"):
        emulated_ops.batch_norm_act_pool_bwd(
            saved["grad_output"], x, saved["selected"], saved["positions"], None, None, None, mean, invstd, True, 0,
            [0.0] * 3, 1.0, window, False, True, True,
        )  # fmt: skip
