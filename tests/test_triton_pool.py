"""The Triton kernels with max-pooling: in Triton's interpreter, or with ``--device cuda`` on a GPU.

As test_triton_interpreted.py, and started by test_triton.py as that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import fastlayers as fl
from fastlayers import activations, pooling
from fastlayers.pooling import Pool
from tests.cases import ACTIVATIONS, POOLS, Case, case_of, make_sample, pairwise, pool_layer
from tests.layouts import LAYOUTS, in_layout
from tests.oracle import check, eager, exact, fused, kinds, run

pytest.importorskip("triton")

from fastlayers.triton import launches, ops, plans
from fastlayers.triton.calls import batch_norm_act_pool
from tests.interpreted import (
    WAYS,
    check_same_again,
    every_way,
    turn_around_the_order,
    use,
    widen_offsets,
)

pytestmark = pytest.mark.usefixtures("triton_kernels")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

FACTORS: dict[str, list[Any]] = {
    "way": list(WAYS),
    # One channel; odd planes; whole groups of 16 bytes; several tiles along a row. Few channels: each takes programs.
    "shape": [(6, 1, 9), (4, 3, 9, 7), (3, 2, 8, 8), (2, 2, 5, 24)],
    # One of each kind; all of them are for test_triton_activations_at_hard_points.
    "act": ["identity", "relu", "leaky_relu(-0.5)", "elu(0.5)", "gelu", "hardsigmoid"],
    "pool": [name for name in POOLS if name not in ("16/16", "all")],
    "dtypes": [(f32, f32), (bf16, f32), (bf16, bf16), (f16, f32), (f64, f64)],
    "layout": list(LAYOUTS),
    "grad_layout": ["contiguous", "channels_last", "reversed", "expanded"],
    "affine": ["both", "none", "no bias", "frozen weight"],
    "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
    "dropout": [(0.0, "channel"), (0.3, "channel"), (1.0, "channel")],
}


def _matrix() -> list[Any]:
    return [pytest.param(row.pop("way"), case_of(row)) for row in pairwise(FACTORS)]


@pytest.mark.parametrize(("way", "case"), _matrix(), indirect=["way"], ids=str)
@pytest.mark.usefixtures("torch_fills_with_nan")
def test_triton_pool_every_pair_of_choices(way: str, case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 2, 18, 33), pool="16/16", drop_p=0.3),
        Case((2, 3, 17, 16), pool="16/16", act="gelu", layout="channels_last", dtype=bf16),
        Case((3, 3, 9, 7), pool="all", act="gelu", training=False),
        Case((3, 5, 9, 7), pool="all", act="relu", layout="channels_last"),
    ],
    ids=str,
)
def test_triton_pool_large_windows(case: Case, device: torch.device) -> None:
    """As many positions as there can be; and the whole input, of which one element is left."""
    check(case, device)


class _Call:
    """The operators with all that they take, on one input."""

    def __init__(self, x: Tensor, act: str, pool: Any, weight: Tensor, mask: Tensor | None = None) -> None:
        self.x, self.weight, self.mask = x, weight, mask
        self.activation = activations.resolve(ACTIVATIONS[act] if act in ACTIVATIONS else nn.Softplus(-1.0))
        pool = pooling.resolve(pool, x.dim() - 2)
        assert pool is not None
        self.pool: Pool = pool
        self.statistics = [torch.zeros_like(weight), torch.ones_like(weight)]
        self.bias = torch.zeros_like(weight)

    def forward(self, training: bool = False, save: bool = True) -> Sequence[Tensor]:
        """Output, mean, invstd, selected, positions. In evaluation z is x times the weight."""
        activation = self.activation
        result: Sequence[Tensor] = ops.batch_norm_act_pool_fwd(
            self.x, self.weight, self.bias, self.mask, *self.statistics, None, training, 0.1, 0.0, activation.code,
            activation.params, activation.monotone, 2.0, self.pool.window, self.pool.ceil_mode, save,
        )  # fmt: skip
        return result

    def backward(
        self, grad: Tensor, forward: Sequence[Tensor], training: bool = False, wanted: tuple[bool, bool] = (True, True)
    ) -> Sequence[Tensor]:
        """Gradients of input, weight and bias."""
        _, mean, invstd, selected, positions = forward
        result: Sequence[Tensor] = ops.batch_norm_act_pool_bwd(
            grad, self.x, selected, positions, self.weight, self.bias, self.mask, mean, invstd, training,
            self.activation.code, self.activation.params, 2.0, self.pool.window, self.pool.ceil_mode, *wanted,
        )  # fmt: skip
        return result

    def key(self) -> Tensor:
        """By what elements are to be compared, in float64: the input by the scale's sign, or its activation."""
        scale = fl.reference.per_channel(self.weight.double(), self.x)
        if self.activation.monotone:
            return self.x.double() * torch.sign(scale).masked_fill(scale.isnan(), float("nan"))
        return self.activation.apply(self.x.double() * scale)

    def expected_indices(self) -> Tensor:
        """Those that torch's pooling gives for the key."""
        pool = self.pool
        _, indices = F.max_pool2d(
            self.key(), pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
        )
        return indices


_BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# Evaluation takes the same way whatever programs hold.
_IN_PARTS = pytest.mark.parametrize("way", ["parts"], indirect=True)
_NAN, _INF = float("nan"), float("inf")


@_IN_PARTS
@_BOTH
@pytest.mark.parametrize("pool", ["3/2 ceil", "oblong"])
@pytest.mark.parametrize(("act", "dtype"), [("relu", f32), ("identity", bf16), ("gelu", f32)])
def test_triton_pool_takes_what_torch_takes(
    way: str, layout: str, pool: str, act: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Of equal elements the first, of NaN the last; with scales of both signs, 0 and NaN, and infinite elements."""
    for values in ([0.0, 1.0, 2.0], [-1.0, 1.0, _NAN, -2.0, 0.5], [-_INF, _INF, 1.0], [-_INF, _NAN]):
        choice = torch.randint(len(values), (2, 5, 6, 7), device=device)
        x = in_layout(torch.tensor(values, dtype=dtype, device=device)[choice], layout)
        weight = torch.tensor([1.0, -2.0, 0.0, _NAN, -0.0], device=device)
        call = _Call(x, act, pool_layer(pool, 2), weight)
        output, _, _, selected, positions = call.forward()
        expected = call.expected_indices()
        assert torch.equal(pooling.indices(call.pool, positions, x.shape[2:]), expected)
        taken = pooling.take(x, expected)
        assert torch.equal(torch.nan_to_num(selected, nan=7), torch.nan_to_num(taken, nan=7))
        mean, invstd = (s.double() for s in call.statistics)
        z = fl.reference.normalize(taken.double(), mean, invstd, weight.double(), None)
        assert torch.equal(kinds(output), kinds(call.activation.apply(z).to(dtype)))


@_IN_PARTS
@_BOTH
@pytest.mark.parametrize(("act", "scale"), [("identity", 1.0), ("relu", -1.0), ("softplus(-1)", 1.0)])
def test_triton_pool_takes_the_first_of_windows_without_any_more(
    way: str, act: str, scale: float, layout: str, device: torch.device
) -> None:
    """Where all keys are -inf, as torch does: the first element that there is."""
    x = in_layout(torch.full((2, 3, 6, 5), -_INF * scale, device=device), layout)
    call = _Call(x, act, pool_layer("5/3/2", 2), torch.full((3,), scale, device=device))
    assert call.key().max() == -_INF
    _, _, _, selected, positions = call.forward()
    assert torch.equal(pooling.indices(call.pool, positions, x.shape[2:]), call.expected_indices())
    assert (selected == x[0, 0, 0, 0]).all()


@_IN_PARTS
@_BOTH
def test_triton_pool_gradients_of_ties_and_plateaus(way: str, layout: str, device: torch.device) -> None:
    """Those of torch, whatever was taken: where elements are equal, and where ReLU or a scale of 0 makes them so."""
    x = in_layout(torch.randint(-2, 3, (2, 4, 5, 6), device=device).float(), layout)
    for act in ("relu", "relu6", "identity"):
        call = _Call(x, act, nn.MaxPool2d(4, 1, 2), torch.tensor([1.0, -3.0, 0.0, 2.0], device=device))
        leaves = [t.clone().requires_grad_() for t in (x, call.weight, call.bias)]
        mean, var = call.statistics
        z = F.batch_norm(leaves[0], mean, var, leaves[1], leaves[2], eps=1e-30)  # 0 is not for torch 2.11
        expected = call.pool.apply(ACTIVATIONS[act](z))
        forward = call.forward()
        assert torch.equal(forward[0], expected)
        grad = torch.randn_like(expected)
        for got, right in zip(call.backward(grad, forward), torch.autograd.grad(expected, leaves, grad), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@_IN_PARTS
@_BOTH
@pytest.mark.parametrize("mask_dtype", [torch.bool, f32])
def test_triton_pool_dropped_planes(way: str, layout: str, mask_dtype: torch.dtype, device: torch.device) -> None:
    """Zeros come out of them and nothing of them goes in, be it NaN; the other planes are as without them."""
    x = in_layout(torch.randn(4, 3, 6, 8, device=device), layout)
    kept = (torch.arange(12, device=device) % 3 != 1).view(4, 3)[:, :, None, None]
    call = _Call(torch.where(kept, x, _NAN), "gelu", pool_layer("3/2 ceil", 2), torch.rand(3, device=device) + 1)
    call.mask = kept[:, :, 0, 0].to(mask_dtype)
    forward = call.forward()
    output, _, _, selected, positions = forward
    dropped = ~kept.expand_as(output)
    assert output.isfinite().all()
    assert not any(t[dropped].any() for t in (output, selected, positions))
    grad = torch.randn_like(output)
    gradients = call.backward(grad.masked_fill(dropped, _NAN), forward)
    assert not gradients[0][~kept.expand_as(x)].any()
    call.x = x
    expected = call.backward(grad, call.forward())
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@every_way
def test_triton_pool_in_training_does_not_read_gradients_of_dropped_planes(way: str, device: torch.device) -> None:
    x, mask = torch.randn(4, 3, 6, 8, device=device), torch.eye(4, 3, device=device)
    call = _Call(x, "relu", pool_layer("2/2", 2), torch.ones(3, device=device), mask)
    forward = call.forward(training=True)
    grad = torch.randn_like(forward[0])
    poisoned = grad.masked_fill(mask[:, :, None, None] == 0, _NAN)
    for got, expected in zip(call.backward(poisoned, forward, True), call.backward(grad, forward, True), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("way", ["whole", "parts"], indirect=True)
@_BOTH
@pytest.mark.parametrize("value", [_NAN, _INF, -_INF])
@pytest.mark.parametrize("training", [True, False])
def test_triton_pool_nan_and_infinity(
    way: str, layout: str, value: float, training: bool, device: torch.device
) -> None:
    """They come out where torch lets them out."""
    case = Case((3, 2, 6, 7), layout=layout, training=training, pool="3/2 ceil")
    sample = make_sample(case, device)
    sample.input[-1, 1, 2, 3] = value
    sample = dataclasses.replace(sample, taken=None)
    assert sample.weight is not None
    is_least = value * float(sample.weight[1]) == -_INF  # of its windows

    fused_results, eager_results = (run(operator, sample.fresh()) for operator in (fused, eager))
    for name, got in fused_results.items():
        # The mean of a channel with an infinity is infinite or NaN, as the sums are taken. An infinity that no window
        # took is in eager's gradient of the weight as 0 times infinity.
        if name == "gradient of weight" and is_least and not training:
            assert got.isfinite().all()
            continue
        # Two windows that took an infinity add their parts, of either sign; eager adds their gradients first.
        by_window = name == "gradient of weight" and value == _INF and not training
        as_kinds = Tensor.isfinite if name == "running_mean" or by_window else kinds
        assert torch.equal(as_kinds(got), as_kinds(eager_results[name])), name


@every_way
@_BOTH
def test_triton_pool_saves_and_computes_what_is_asked_for(way: str, layout: str, device: torch.device) -> None:
    x = in_layout(torch.randn(3, 4, 5, 6, device=device), layout)
    call = _Call(x, "gelu", pool_layer("2/2", 2), torch.rand(4, device=device))
    saved, bare = call.forward(training=True), call.forward(training=True, save=False)
    assert all(torch.equal(a, b) for a, b in zip(saved[:3], bare[:3], strict=True))
    assert [t.shape for t in bare[3:]] == [(0,), (0,)]
    assert [t.dtype for t in bare[3:]] == [f32, torch.uint8]
    assert saved[0].stride() == saved[3].stride() == saved[4].stride()
    grad = torch.randn_like(saved[0])
    for training in (True, False):
        everything = call.backward(grad, saved, training)
        for wanted in ((True, False), (False, True), (False, False)):
            found = call.backward(grad, saved, training, wanted)
            for got, expected, want in zip(found, everything, (wanted[0], wanted[1], wanted[1]), strict=True):
                assert torch.equal(got, expected) if want else got.shape == (0,)


# Several blocks of channels, and several tiles of each.
_SPLIT = {"contiguous": (5, 2, 4, 20), "channels_last": (5, 18, 4, 3)}


@every_way
@_BOTH
def test_triton_pool_same_bits_whatever_the_order_of_programs(
    way: str, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(_SPLIT[layout], layout=layout, act="silu", drop_p=0.3, pool="3/2 ceil")
    check_same_again(make_sample(case, device), lambda: turn_around_the_order(monkeypatch))


@every_way
@_BOTH
def test_triton_pool_offsets_of_64_bits(
    way: str, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tensors of more than 2**31 elements take gives the same bits."""
    sample = make_sample(Case(_SPLIT[layout], layout=layout, act="relu", drop_p=0.3, pool="3/1/1"), device)
    check_same_again(sample, lambda: widen_offsets(monkeypatch))


@pytest.mark.parametrize("training", [True, False])
def test_triton_pool_no_values(training: bool, device: torch.device) -> None:
    call = _Call(torch.empty(0, 3, 6, 4, device=device), "relu", pool_layer("2/2", 2), torch.ones(3, device=device))
    forward = call.forward(training)
    assert [t.shape for t in forward] == [(0, 3, 3, 2), (3,), (3,), (0, 3, 3, 2), (0, 3, 3, 2)]
    assert not any(t.any() for t in forward)
    gradients = call.backward(torch.empty_like(forward[0]), forward, training)
    assert [t.shape for t in gradients] == [(0, 3, 6, 4), (3,), (3,)]
    assert not any(t.any() for t in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_pool_walks_regular_strides_without_copies(layout: str, device: torch.device) -> None:
    """But for those of which planes or rows are not regular."""
    x = in_layout(torch.randn(4, 6, 4, 6, device=device), layout)
    pool = pooling.resolve(pool_layer("2/2", 2), 2)
    assert pool is not None
    plan = batch_norm_act_pool.plan_for(x, pool.window, False)
    assert plan.copied == (layout in ("reversed", "every_second"))
    assert plan.irregular == (layout == "reversed")


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 2, 4, 5), act="gelu", pool="3/1/1"),
        Case((4, 2, 4, 4), act="relu", pool="2/2", drop_p=0.3),
        Case((2, 3, 7), act="mish", layout="channels_last", pool="5/3/2", training=False, drop_p=0.3),
    ],
    ids=str,
)
def test_triton_pool_double_backward(case: Case, device: torch.device) -> None:
    """Second-order gradients are those of the definition."""
    sample = make_sample(dataclasses.replace(case, dtype=f64, param_dtype=f64), device)

    def second_order(operator: Callable[[Any], Tensor]) -> Sequence[Tensor]:
        leaves = sample.fresh()
        tensors = [t for t in (leaves.input, leaves.weight, leaves.bias) if t is not None]
        first = torch.autograd.grad(operator(leaves).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(torch.stack([g.sin().sum() for g in first]).sum(), tensors, materialize_grads=True)

    for got, expected in zip(second_order(fused), second_order(exact), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed", "some_channels"])
def test_triton_pool_operators_pass_opcheck(layout: str, dims: int, device: torch.device) -> None:
    """Schema, fakes and their strides, dynamic shapes."""
    registered = torch.ops.fastlayers_triton
    x = in_layout(torch.randn(4, 10, *(3, 5)[-dims:], device=device), layout)
    channels = [torch.rand(10, device=device) for _ in range(3)]
    pool = pooling.resolve(pool_layer("3/2 ceil", dims), dims)
    assert pool is not None
    common = {
        "activation": 1, "activation_params": [0.0, 0.0, 0.0], "drop_scale": 2.0, "training": True, "input": x,
        "weight": channels[0], "bias": None, "mask": torch.ones(4, 10, device=device), "window": pool.window,
        "ceil_mode": pool.ceil_mode,
    }  # fmt: skip
    forward = common | {
        "running_mean": channels[1], "running_var": channels[2], "num_batches_tracked": torch.tensor(2, device=device),
        "momentum": 0.1, "eps": 1e-5, "monotone": True, "save": True,
    }  # fmt: skip
    opcheck(registered.batch_norm_act_pool_fwd.default, (), forward)
    opcheck(registered.batch_norm_act_pool_fwd.default, (), forward | {"save": False})
    output, mean, invstd, selected, positions = registered.batch_norm_act_pool_fwd(**forward)
    opcheck(
        registered.batch_norm_act_pool_bwd.default, (),
        common | {"grad_output": torch.randn_like(output), "selected": selected, "positions": positions, "mean": mean,
                  "invstd": invstd, "input_grad": True, "affine_grad": True},
    )  # fmt: skip


def test_triton_pool_is_fused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's step takes one launch forward and two backward where programs hold channels, five where not."""
    launched = []
    launch = launches.launch

    def watched(kernel: Any, *rest: Any) -> None:
        launched.append(_name(kernel))
        launch(kernel, *rest)

    monkeypatch.setattr(launches, "launch", watched)
    layer = fl.BatchNormAct2d(3, act_layer="relu", drop_p=0.5, pool=nn.MaxPool2d(2)).to(device)
    x = torch.randn(4, 3, 8, 8, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert launched == ["whole_pool", "gradient_sums", "pool_gradient"]
    use("parts", monkeypatch)
    launched.clear()
    layer(x).sum().backward()
    assert launched == [
        "batch_statistics", "merge_statistics", "pool", "gradient_sums", "pool_gradient",
    ]  # fmt: skip
    launched.clear()
    layer.eval()(x.detach())
    assert launched == ["pool"]


def _name(kernel: Any) -> str:
    name: str = kernel.fn.__name__
    return name


def test_triton_pool_operators_say_what_is_wrong(device: torch.device) -> None:
    """Called directly, with what the layers would never pass."""
    x = torch.randn(2, 3, 6, 6, device=device)
    mask, seed = torch.ones(2, 3, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    square = [2, 2, 2, 2, 0, 0, 1, 1]

    def forward(x: Tensor, mask: Tensor | None = None, window: Sequence[int] = square, training: bool = True) -> object:
        return ops.batch_norm_act_pool_fwd(
            x, None, None, mask, None, None, None, training, 0.1, 1e-5, 1, [0.0] * 3, True, 2.0, window, False, True
        )

    for arguments, message in (
        ((x[0, 0],), "input should be of shape"),
        ((x, seed), "mask should be of channels"),
        ((x, mask.t()), "mask should be"),
        ((x, None, square[:7]), "window should have 8 numbers"),
        ((x, None, [17, 16, *square[2:]]), "kernel of 1 to 256"),
        ((x, None, [2, 2, 0, 2, *square[4:]]), "strides and dilations of at least 1"),
        ((x, None, [2, 2, 2, 2, 2, 0, 1, 1]), "padding of 0 to half"),
        ((x, None, [7, 7, *square[2:]]), "Output size is too small"),
        ((x[0], None, square), "window should have height 1"),
        ((x, None, square, False), "in evaluation mode"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    with pytest.raises(ValueError, match="windows without a single element"):
        forward(x, None, [2, 2, 1, 1, 1, 1, 7, 7])
    call = _Call(x, "relu", nn.MaxPool2d(2), torch.ones(3, device=device))
    output, *rest = call.forward()
    for name, grad, saved in (
        ("grad_output", output[:, :, :2], rest),
        ("selected", output, [*rest[:2], rest[2][:1], rest[3]]),
        ("positions", output, [*rest[:3], rest[3][:1]]),
    ):
        with pytest.raises(RuntimeError, match=f"{name} should be of shape"):
            call.backward(grad, [output, *saved])


def test_triton_pool_columns_of_tiles_fit_planes() -> None:
    """Tiles reach little beyond narrow planes, and what is written is written in runs."""
    for width, windows, elements in ((1, 8, 16), (11, 16, 16), (20, 8, 32), (28, 32, 32), (112, 16, 16)):
        assert plans._columns(width, *plans.COLUMNS_OF_WINDOWS) == windows
        assert plans._columns(width, *plans.COLUMNS_OF_ELEMENTS) == elements
