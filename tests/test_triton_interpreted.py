"""The Triton kernels: in Triton's interpreter, or with ``--device cuda`` on a GPU.

In an ordinary run test_triton.py starts these in a process of their own, since the interpreter has to be chosen before
Triton is imported. Small tables of tiles make small tensors take every way that large ones take.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import fastlayers as fl
from fastlayers import activations, masks
from tests.cases import ACTIVATIONS, SEED, Case, make_sample, pairwise
from tests.layouts import LAYOUTS, in_layout
from tests.oracle import check, eager, exact, fused, kinds, run
from tests.test_compile import LAYERS

pytest.importorskip("triton")

from fastlayers.triton import ops, plans
from fastlayers.triton.calls import copies
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

# Each with what it is there for; few channels, since each takes programs of its own.
SHAPES = [
    (2, 5),  # two values per channel
    (33, 20),  # rows of whole groups of four; several blocks of channels
    (6, 1, 9),  # one channel
    (4, 3, 5, 7),  # odd planes
    (4, 2, 4, 8),  # whole bytes and groups of random words
    (3, 2, 2, 133),  # several tiles along a plane
    (3, 5, 1, 1),  # planes of one value, which are rows
    (2, 3, 2, 3, 2),
]
_DTYPES = [(f32, f32), (bf16, f32), (bf16, bf16), (f16, f32), (f64, f64)]
_TOGETHER = {
    "dtypes": ("dtype", "param_dtype"),
    "mode": ("training", "track", "momentum"),
    "dropout": ("drop_p", "drop_mode"),
}
FACTORS: dict[str, list[Any]] = {
    "way": list(WAYS),
    "shape": SHAPES,
    # Of each kind; all of them are for test_triton_activations_at_hard_points.
    "act": ["identity", "relu", "leaky_relu", "elu(0.5)", "gelu", "hardsigmoid"],
    "dtypes": _DTYPES,
    "layout": list(LAYOUTS),
    "grad_layout": ["contiguous", "channels_last", "reversed", "expanded"],
    "residual": [None, "contiguous", "channels_last", "every_second", "offset"],
    "affine": ["both", "none", "no bias", "frozen weight"],
    "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
    "dropout": [(0.0, "channel"), (0.3, "channel"), (1.0, "channel"), (0.3, "element"), (1.0, "element")],
}


def _matrix() -> list[Any]:
    rows = pairwise(FACTORS)
    for row in rows:
        for factor, names in _TOGETHER.items():
            row |= zip(names, row.pop(factor), strict=True)
    return [pytest.param(row.pop("way"), Case(**row)) for row in rows]


@pytest.mark.parametrize(("way", "case"), _matrix(), indirect=["way"], ids=str)
@pytest.mark.usefixtures("torch_fills_with_nan")
def test_triton_every_pair_of_choices(way: str, case: Case, device: torch.device) -> None:
    check(case, device)


PATHS = [Case((6, 2, 5, 7)), Case((8, 8, 3, 2), layout="channels_last")]


def _paths(**changes: object) -> list[Case]:
    return [dataclasses.replace(path, **changes) for path in PATHS]  # type: ignore[arg-type]


@every_way
@pytest.mark.parametrize(
    "case",
    [
        *_paths(mean=1e4, std=1.0),
        *_paths(mean=-1e4, std=1.0, act="gelu", residual="contiguous"),
        *_paths(mean=1e8, std=1e4, dtype=f64, param_dtype=f64),
        *_paths(mean=1e-30, std=1e-30),
        *_paths(mean=1.0, std=1e-3, eps=1e-12),
        *_paths(mean=2e4, std=5e3, dtype=f16),
        *_paths(mean=1.0, std=0.0),
        *_paths(mean=1e4, std=1.0, training=False),
    ],
    ids=str,
)
def test_triton_hard_values(way: str, case: Case, device: torch.device) -> None:
    """Errors stay within what eager's own allow, also where the mean is 10,000 standard deviations."""
    check(case, device)


@every_way
@pytest.mark.parametrize("rows", [False, True])
def test_triton_statistics_of_large_means(way: str, rows: bool, device: torch.device) -> None:
    """The saved statistics themselves, where a sum of squares would have no digit left."""
    x = torch.randn(64, 2, 6, 2, device=device) + 1e4
    x = x.contiguous(memory_format=torch.channels_last) if rows else x
    _, mean, invstd, _ = ops.batch_norm_act_fwd(x, *(None,) * 7, True, 0.1, 1e-5, 0, [0.0, 0.0, 0.0], 1.0, False)
    expected, variance = fl.reference.batch_statistics(x.double())
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(invstd, torch.rsqrt(variance + 1e-5), rtol=1e-5, atol=0)


@every_way
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", [*_paths(), *_paths(training=False, dtype=bf16)], ids=str)
def test_triton_nan_and_infinity(way: str, case: Case, value: float, device: torch.device) -> None:
    """They come out where torch lets them out: of one channel, and in full-size results as the same kind."""
    sample = make_sample(case, device)
    plane = sample.input[-1, 1]
    plane[(-1,) * plane.dim()] = value
    fused_results, eager_results = (run(operator, sample.fresh()) for operator in (fused, eager))
    for name, got in fused_results.items():
        # The mean of a channel with an infinity is infinite or NaN, as the sums are taken.
        as_kinds = Tensor.isfinite if name == "running_mean" else kinds
        assert torch.equal(as_kinds(got), as_kinds(eager_results[name])), name


@every_way
@pytest.mark.parametrize("mode", ["channel", "element"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_triton_dropped_elements_hold_no_nan(way: str, p: float, layout: str, mode: str, device: torch.device) -> None:
    """A poisoned channel's dropped elements are zeros, and NaN gradients that arrive there are ignored."""
    case = Case((6, 8, 3, 2), layout=layout, drop_p=p, drop_mode=mode, residual=layout, act="gelu")
    sample = make_sample(case, device)
    assert sample.mask is not None
    dropped = ~(sample.mask if mode == "element" else sample.mask[:, :, None, None].expand_as(sample.input))
    sample.input[0, 1, 0, 0] = float("nan")
    sample.grad_output[dropped] = float("nan")
    results = run(fused, sample.fresh())
    assert not results["output"][dropped].any()
    assert not results["gradient of residual"][dropped].any()
    healthy = torch.arange(8, device=device) != 1
    assert results["gradient of input"][:, healthy].isfinite().all()
    assert results["gradient of weight"][healthy].isfinite().all()
    assert results["gradient of bias"][healthy].isfinite().all()


def test_triton_does_not_read_dropped_planes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither their input in evaluation's pass, nor their gradients: a read of NaN would show in the sums."""
    use("one part", monkeypatch)
    x = torch.randn(4, 3, 4, 4, device=device)
    mask = (torch.arange(12, device=device).view(4, 3) % 2).float()
    poisoned = torch.where(mask[:, :, None, None] != 0, x, float("nan"))
    statistics = [torch.zeros(3, device=device), torch.ones(3, device=device)]
    y, mean, invstd, _ = ops.batch_norm_act_fwd(
        poisoned, None, None, None, mask, *statistics, None, False, 0.1, 1e-5, 1, [0.0] * 3, 2.0, False
    )
    assert y.isfinite().all()
    found = ops.batch_norm_act_bwd(
        poisoned, poisoned, statistics[1], None, None, None, mask, mean, invstd, False, 1, [0.0] * 3, 2.0,
        True, True, False,
    )  # fmt: skip
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 1)])
def test_triton_one_value_per_channel_in_evaluation(shape: tuple[int, ...], device: torch.device) -> None:
    check(Case(shape, training=False, act="silu", residual="contiguous"), device)


@pytest.mark.parametrize("shape", [(0, 5), (2, 3, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop_mode", ["channel", "element"])
def test_triton_no_values(shape: tuple[int, ...], training: bool, drop_mode: str, device: torch.device) -> None:
    case = Case(shape, training=training, drop_p=0.3, residual="contiguous", act="relu", drop_mode=drop_mode)
    sample = make_sample(case, device)
    results, eager_results = (run(operator, sample.fresh()) for operator in (fused, eager))
    for name, got in results.items():
        torch.testing.assert_close(got, eager_results[name], rtol=0, atol=0, msg=name)


def test_triton_dropout_and_masks_of_no_values(device: torch.device) -> None:
    """No kernel is launched, and shapes are kept."""
    x = torch.empty(2, 3, 0, 4, device=device)
    for mask in (torch.ones(2, 3, device=device), torch.zeros(1, dtype=torch.int64, device=device)):
        assert ops.dropout(x, mask, 2.0).shape == x.shape
    unpacked = ops.unpack_mask(torch.empty(0, dtype=torch.uint8, device=device), x, False)
    assert (unpacked.shape, unpacked.dtype) == (x.shape, torch.bool)


@pytest.mark.parametrize("act", ["softplus", "tanh", "mish"])
def test_triton_series_are_for_float32_alone(act: str, device: torch.device) -> None:
    """In float64 they would be far less exact than the functions."""
    check(Case((4, 2, 4, 8), f64, f64, act=act, residual="contiguous"), device)


# Several blocks of channels, and several tiles of each.
_SPLIT = {"contiguous": (5, 2, 3, 32), "channels_last": (5, 20, 3, 2)}


@every_way
@pytest.mark.parametrize("drop_mode", ["channel", "element"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_same_bits_whatever_the_order_of_programs(
    way: str, layout: str, drop_mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(_SPLIT[layout], layout=layout, act="silu", residual="contiguous", drop_p=0.3, drop_mode=drop_mode)
    check_same_again(make_sample(case, device), lambda: turn_around_the_order(monkeypatch))


@every_way
@pytest.mark.parametrize("drop_mode", ["channel", "element"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_offsets_of_64_bits(
    way: str, layout: str, drop_mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tensors of more than 2**31 elements take gives the same bits."""
    case = Case(_SPLIT[layout], layout=layout, act="relu", residual="contiguous", drop_p=0.3, drop_mode=drop_mode)
    check_same_again(make_sample(case, device), lambda: widen_offsets(monkeypatch))


@pytest.mark.parametrize("way", ["parts"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [1e-12, 0.3, 1.0])
def test_triton_element_masks(way: str, p: float, layout: str, device: torch.device) -> None:
    """Those of the definition; of dropout alone, and of any dtype."""
    for shape, dtype in (((3, 5, 2, 3), f32), ((3, 2, 4, 8), bf16)):
        x = in_layout(torch.rand(shape, device=device).to(dtype) + 1, layout)
        seed = torch.tensor([-(2**40) + 77], device=device)
        expected = fl.reference.element_mask(seed, x, masks.scale(p))
        mask = ops.element_mask(seed, x, masks.scale(p))
        assert torch.equal(mask, expected)
        assert mask.stride() == expected.stride()
        y = ops.dropout(x, seed, masks.scale(p))
        assert torch.equal(y, fl.reference.apply_mask(x, expected, p))
        assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("way", ["parts"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_dtype", [torch.bool, f32])
def test_triton_channel_dropout(way: str, mask_dtype: torch.dtype, layout: str, device: torch.device) -> None:
    x = in_layout(torch.randn(3, 5, 2, 3, device=device), layout)
    mask = (torch.rand(3, 5, device=device) > 0.5).to(mask_dtype)
    assert torch.equal(ops.dropout(x, mask, 2.0), fl.reference.apply_mask(x, mask, 0.5))


@pytest.mark.parametrize("layer", [fl.Dropout(0.4), fl.Dropout2d(0.4)], ids=str)
def test_triton_dropout_layers(layer: nn.Module, device: torch.device) -> None:
    """Gradients go where values went; Dropout2d drops what torch's layer drops."""
    x = torch.rand(4, 6, 3, 5, device=device).requires_grad_()
    torch.manual_seed(SEED)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (y != 0) / 0.6)
    assert 0.2 < (y != 0).float().mean() < 0.95
    if isinstance(layer, fl.Dropout2d):
        torch.manual_seed(SEED)
        assert torch.equal(nn.Dropout2d(0.4)(x) != 0, y != 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_bits(layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for a residual, unpacked as for double backward: where ReLU is flat."""
    use("parts", monkeypatch)
    for shape in ((3, 3, 2, 3), (2, 2, 4, 8), (7, 13)):
        x = in_layout(torch.randn(shape, device=device), layout)
        y, *_, bits = ops.batch_norm_act_fwd(x, None, None, x, *(None,) * 4, True, 0.1, 1e-5, 1, [0.0] * 3, 1.0, True)
        assert bits.numel() <= x.numel() // 8 + max(x.shape[0] * x.shape[1], x.numel() // x.shape[1])
        assert torch.equal(ops.unpack_mask(bits, x, False), y == 0)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 2, 2, 2), act="gelu"),
        Case((3, 2, 2, 2), act="relu", residual="contiguous", drop_p=0.3),
        Case((4, 3), act="silu", residual="contiguous", drop_p=0.3, drop_mode="element"),
        Case((2, 3, 2, 2), act="mish", layout="channels_last", training=False, drop_p=0.3, drop_mode="element"),
        Case((2, 3, 2, 2), act="leaky_relu", layout="reversed", residual="contiguous", drop_p=0.3, drop_mode="element"),
    ],
    ids=str,
)
def test_triton_double_backward(case: Case, device: torch.device) -> None:
    """Second-order gradients are those of the definition."""
    case = dataclasses.replace(case, dtype=f64, param_dtype=f64)
    sample = make_sample(case, device)

    def second_order(operator: Callable[[Any], Tensor]) -> Sequence[Tensor]:
        leaves = sample.fresh()
        tensors = [t for t in (leaves.input, leaves.residual, leaves.weight, leaves.bias) if t is not None]
        first = torch.autograd.grad(operator(leaves).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(torch.stack([g.sin().sum() for g in first]).sum(), tensors, materialize_grads=True)

    for got, expected in zip(second_order(fused), second_order(exact), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("layout", "mask"),
    [("contiguous", ""), ("channels_last", "channel"), ("reversed", "element"), ("some_channels", "element")],
)
def test_triton_operators_pass_opcheck(layout: str, mask: str, device: torch.device) -> None:
    """Schema, fakes and their strides, dynamic shapes."""
    registered = torch.ops.fastlayers_triton
    x = in_layout(torch.randn(4, 10, 3, 5, device=device), layout)
    channels = [torch.rand(10, device=device) for _ in range(3)]
    drawn = masks.draw_for_gpu_kernels(x, 0.5, mask, True) if mask else None
    relu: dict[str, Any] = {"activation": 1, "activation_params": [0.0, 0.0, 0.0], "drop_scale": 2.0, "training": True}
    common = relu | {"input": x, "weight": channels[0], "bias": None, "mask": drawn}
    forward = common | {
        "residual": torch.randn_like(x), "running_mean": channels[1], "running_var": channels[2],
        "num_batches_tracked": torch.tensor(2, device=device), "momentum": 0.1, "eps": 1e-5, "save_flat_bits": True,
    }  # fmt: skip
    opcheck(registered.batch_norm_act_fwd.default, (), forward)
    _, mean, invstd, bits = registered.batch_norm_act_fwd(**forward)
    grads = {"input_grad": True, "affine_grad": True, "residual_grad": True}
    opcheck(
        registered.batch_norm_act_bwd.default, (),
        common | grads | {"grad_output": torch.randn_like(x), "residual": None, "flat_bits": bits, "mean": mean,
                          "invstd": invstd},
    )  # fmt: skip
    opcheck(registered.unpack_mask.default, (bits, x, False))
    if drawn is not None:
        opcheck(registered.dropout.default, (x, drawn, 2.0))
    if mask == "element":
        opcheck(registered.element_mask.default, (drawn, x, 2.0))


def _step(layer: Callable[..., Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(SEED)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    gradients = torch.autograd.grad(y.pow(2).sum(), [leaf, *module.parameters()])
    return [y.detach(), *gradients, *(t.clone() for t in module.state_dict().values())]


@pytest.mark.parametrize(
    "name",
    ["BatchNorm1d", "BatchNorm2d cumulative", "BatchNormAct2d", "BatchNormAct2d element", "Dropout", "Dropout3d"],
)
def test_triton_layers_in_one_graph(name: str, device: torch.device) -> None:
    """torch.compile without graph breaks, training and evaluation, with other batch sizes: the layer's own numbers."""
    torch._dynamo.reset()
    make, shape = LAYERS[name]
    plain, compiled = make().to(device), make().to(device)
    compiled.load_state_dict(plain.state_dict())
    run_compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for training, batch in ((True, shape[0]), (True, shape[0] + 1), (False, shape[0] + 1)):
        x = torch.randn(batch, *shape[1:], device=device)
        expected = _step(plain.train(training), plain, x)
        compiled.train(training)
        for a, b in zip(_step(run_compiled, compiled, x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_triton_runs_on_regular_strides_without_copies(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of channels, of samples, of both layouts, transposed batches: their planes or rows are regular."""
    x = torch.randn(6, 8, 4, 6, device=device)
    rows = x.contiguous(memory_format=torch.channels_last)
    regular = [x, rows, x[:, 2:5], x[::2], rows[:, 2:5], rows[1:3], x.transpose(0, 1), x.flatten(2)[:, :, 3:9]]
    for t in regular:
        assert not copies.plan_for(torch.empty_like(t), x=t).copied
    for t in (x[..., ::2], x[:, :, 1:3, 1:3], x.permute(3, 2, 1, 0)[:, :, ::2]):
        assert copies.plan_for(torch.empty_like(t), x=t).copied


def test_triton_operators_say_what_is_wrong(device: torch.device) -> None:
    """Called directly, with what the layers would never pass."""
    x = torch.randn(4, 3, 2, 2, device=device)
    rest = (True, 0.1, 1e-5, 1, [0.0] * 3, 2.0, False)
    for arguments, message in (
        ((x[0, 0, 0], *(None,) * 7), "at least 2 dimensions"),
        ((x, x[0, :2, 0, 0], *(None,) * 6), "weight should be of shape"),
        ((x, None, None, x[:2], *(None,) * 4), "residual should have the shape"),
        ((x, None, None, None, torch.ones(3, 4, device=device), *(None,) * 3), "mask should be a seed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.batch_norm_act_fwd(*arguments, *rest)
    with pytest.raises(RuntimeError, match="in evaluation mode"):
        ops.batch_norm_act_fwd(x, *(None,) * 7, False, *rest[1:])
    with pytest.raises(RuntimeError, match="flat should be False"):
        ops.unpack_mask(torch.zeros(12, dtype=torch.uint8, device=device), x, True)
    statistics = torch.ones(2, 3, device=device)
    for bits in (5, 7):  # 48 elements have 6 bytes
        saved = torch.zeros(bits, dtype=torch.uint8, device=device)
        with pytest.raises(RuntimeError, match="flat_bits should be what batch_norm_act_fwd returned"):
            ops.batch_norm_act_bwd(
                x, x, None, None, None, saved, None, *statistics, True, 1, [0.0] * 3, 2.0, *(True,) * 3
            )
    with pytest.raises(ValueError, match=r"x: strides \(12, 4, 2, 3\) of shape \(4, 3, 2, 2\) are not regular"):
        plans.frame_of(x.shape, f32, False, {"y": x.stride(), "x": (12, 4, 2, 3)})


def test_triton_batch_sizes_share_kernels() -> None:
    """Sizes are no part of what is compiled: all batches of large tensors, and few steps for those of small ones."""
    for shape, most in (((64, 32, 32), 2), ((1024,), 9)):
        kinds_of_launches = set()
        for batch in range(2, 400):
            full = (batch, *shape)
            frame = plans.frame_of(full, f32, len(shape) == 1, {"y": torch.empty(full, device="meta").stride()})
            grid = frame.whole or frame.passes
            kinds_of_launches.add((frame.constants, grid.tile, grid.warps, frame.whole is None))
        # Of the largest, and one for each power of two below.
        assert len({k for k in kinds_of_launches if k[-1]}) <= 2
        assert len(kinds_of_launches) <= most + 6


def test_triton_wide_offsets_only_for_large_tensors() -> None:
    sizes = ((2, 2**15, 2**15 - 1), False), ((2, 2**15, 2**15), True)
    for shape, wide in sizes:
        for rows in (False, True):
            strides = (shape[1] * shape[2], 1, shape[1]) if rows else (shape[1] * shape[2], shape[2], 1)
            assert (plans.frame_of(shape, f32, rows, {"y": strides}).constants[2]) == wide


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_triton_activations_at_hard_points(act: str, device: torch.device) -> None:
    """Values and gradients of the identity's batch: kinks, both tails, tiny and huge numbers, NaN and infinities."""
    points = [0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 0.3, -0.3, 0.7, -0.7, 3.0, -3.0, 6.0, 5.0, 20.0, 20.5, 40.0, -40.0,
              88.0, -88.0, 100.0, -100.0, 1e4, -1e4, float("nan"), float("inf"), float("-inf"), 2.0, -2.0, 10.0, -10.0,
              -15.0]  # fmt: skip
    activation = activations.resolve(ACTIVATIONS[act])
    z = torch.tensor(points, device=device).view(-1, 1).expand(-1, 8).contiguous()
    constants = [torch.zeros(8, device=device), torch.ones(8, device=device)]
    y, mean, invstd, _ = ops.batch_norm_act_fwd(
        z, None, None, None, None, *constants, None, False, 0.1, 0.0, activation.code, activation.params, 1.0, False
    )
    leaf = z.clone().requires_grad_()
    expected = ACTIVATIONS[act](leaf)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    grad, *_ = ops.batch_norm_act_bwd(
        torch.ones_like(z), z, None, None, None, None, None, mean, invstd, False, activation.code, activation.params,
        1.0, True, False, False,
    )  # fmt: skip
    finite = z.isfinite()
    torch.testing.assert_close(y[~z.isinf()], expected[~z.isinf()].detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad[finite], expected_grad[finite], rtol=1e-5, atol=1e-6)
    # torch's own functions differ at infinity from one processor's vectors to another's.
    assert torch.equal(y[z == float("inf")].isinf(), expected[z == float("inf")].isinf()) or act == "gelu"


def test_triton_covers_every_pair_of_modes() -> None:
    """That the matrix above has what it claims: each way with each dtype, activation and mode of dropout."""
    rows = _matrix()
    seen = {(p.values[0], p.values[1].dtype, p.values[1].drop_mode) for p in rows}
    assert {(way, mode) for way, _, mode in seen} == set(itertools.product(WAYS, ("channel", "element")))
