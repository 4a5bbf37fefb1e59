"""Gradients: checked by differences to second order, against fl.reference to third, and what is kept for them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastlayers as fl
from tests.cases import ACTIVATIONS, SEED, Case, Sample, make_sample
from tests.oracle import exact, fused, run

Function = Callable[..., Tensor]


def _as_function(
    case: Case, device: torch.device, operator: Callable[[Sample], Tensor] = fused
) -> tuple[Function, list[Tensor]]:
    """`operator` as a function of the tensors of `case` that have gradients, and these tensors."""
    sample = make_sample(case, device).fresh()
    names = [name for name in ("input", "residual", "weight", "bias") if getattr(sample, name) is not None]

    def function(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return operator(dataclasses.replace(sample.fresh(), **given))

    return function, [getattr(sample, name) for name in names]


def _small(**options: Any) -> Case:
    return Case(dtype=torch.float64, param_dtype=torch.float64, **options)


SMALL = [
    *(_small(shape=(3, 2, 2, 2), act=act) for act in ACTIVATIONS),
    *(_small(shape=(3, 2, 2), act=act, residual="contiguous") for act in ACTIVATIONS),
    *(_small(shape=(2, 3, 2, 2), act=act, training=False, residual="channels_last") for act in ("relu", "gelu")),
    *(
        _small(shape=(3, 2, 2, 2), layout=layout, act=act, residual="contiguous", drop_p=0.3, drop_mode=mode)
        for layout, act, mode in itertools.product(
            ("channels_last", "channels_first"), ("relu", "mish"), ("channel", "element")
        )
    ),
    _small(shape=(5, 3), act="silu", drop_p=0.3, drop_mode="element"),
    _small(shape=(5, 3), act="relu", residual="channels_first", affine="none"),
    _small(shape=(3, 2, 3), act="tanh", affine="no bias", track=False),
    _small(shape=(2, 2, 2, 1, 2), act="elu", drop_p=0.3),
    _small(shape=(3, 2, 2), act="sigmoid", drop_p=1.0),
    *(_small(shape=(2, 2, 4, 4), act=act, pool="2/1/1 dilated") for act in ("identity", "silu")),
    *(
        _small(shape=shape, layout=layout, act=act, pool=pool, drop_p=0.3)
        for (shape, pool), layout, act in itertools.product(
            (((3, 2, 5), "3/1/1"), ((3, 2, 4, 3), "2/2")), ("contiguous", "channels_last"), ("relu", "gelu")
        )
    ),
    *(_small(shape=(2, 3, 3, 4), act=act, pool="3/2 ceil", training=False) for act in ("elu", "mish")),
    _small(shape=(2, 2, 3, 3), act="tanh", pool="5/3/2", affine="no bias", track=False),
    _small(shape=(2, 2, 3, 3), act="softplus", pool="2/2", affine="none"),
    # By torch's pool, behind.
    _small(shape=(3, 2, 4, 3), act="gelu", pool="2/2", residual="contiguous"),
    _small(shape=(2, 2, 3, 2, 2), act="relu", pool="2/2", drop_p=0.3),
    _small(shape=(2, 2, 4, 4), act="relu", pool="3/1/1", drop_p=0.3, drop_mode="element"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_first_and_second_order(case: Case, device: torch.device) -> None:
    function, tensors = _as_function(case, device)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", [c for c in SMALL if c.act in ("gelu", "mish", "silu", "relu", "elu(0.5)")], ids=str)
def test_third_order(case: Case, device: torch.device) -> None:
    """Gradients of gradients of gradients are those of the definition."""

    def third_order(operator: Callable[[Sample], Tensor]) -> Sequence[Tensor]:
        function, tensors = _as_function(case, device, operator)
        value = function(*tensors).sin().sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum((g.sin().sum() for g in gradients), torch.zeros((), dtype=torch.float64, device=device))
        return gradients

    for got, expected in zip(third_order(fused), third_order(exact), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", ["dropout", "dropout2d"])
def test_dropout_any_order(mode: str, device: torch.device) -> None:
    def function(x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return getattr(fl.functional, mode)(x, 0.4)  # type: ignore[no-any-return]

    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(function, x)
    assert gradgradcheck(lambda x: function(x).square(), x)


def test_second_order_where_planes_are_dropped(device: torch.device) -> None:
    """Positions there are of nothing: neither what is beyond the input is read, nor what is NaN."""
    torch.manual_seed(SEED)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, device=device)
    weight, bias = (torch.rand(4, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    statistics = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
    pool = nn.MaxPool2d(5, 3, 2)

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return fl.functional.batch_norm_act(
            x, *statistics, weight, bias, False, act="gelu", drop_p=0.5, stochastic=True, pool=pool
        )

    dropped = (function(x) == 0).all(3).all(2)
    assert dropped.any()
    x[dropped] = float("nan")
    x.requires_grad_()
    gradients = torch.autograd.grad(function(x).sin().sum(), [x, weight, bias], create_graph=True)
    again = torch.autograd.grad(torch.stack([g.sin().sum() for g in gradients]).sum(), [x, weight, bias])
    assert all(g.isfinite().all() for g in (*gradients, *again))
    assert not again[0][dropped].any()


@pytest.mark.parametrize("wanted", ["input", "residual", "weight", "bias"])
@pytest.mark.parametrize("act", ["identity", "gelu"])
@pytest.mark.parametrize("power", [1, 2])
def test_second_order_of_one_argument(power: int, act: str, wanted: str, device: torch.device) -> None:
    """Where the others have no gradient; of what is linear it is zero, and no gradient depends on anything."""
    case = _small(shape=(3, 2, 2), residual="contiguous", act=act, training=False)
    results = []
    for operator in (fused, exact):
        sample = make_sample(case, device).fresh()
        for name in ("input", "residual", "weight", "bias"):
            getattr(sample, name).requires_grad_(name == wanted)
        leaf = getattr(sample, wanted)
        (first,) = torch.autograd.grad(operator(sample).pow(power).sum(), leaf, create_graph=True)
        second = torch.zeros_like(leaf)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), leaf, allow_unused=True, materialize_grads=True)
        results.append((first.detach(), second))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
    assert (results[0][1] == 0).all() == (power == 1 and act == "identity")


ALL = ("input", "residual", "weight", "bias")
POOLED = ("input", "weight", "bias")  # a residual is not fused with a pool


@pytest.mark.parametrize("wanted", [c for n in range(1, 5) for c in itertools.combinations(ALL, n)], ids=" ".join)
@pytest.mark.parametrize("act", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_only_where_needed(
    training: bool, act: str, wanted: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as when all are needed, and nothing computed for the rest."""
    sample = make_sample(Case(act=act, training=training, residual="contiguous"), device)
    every = run(fused, sample.fresh())
    some = sample.fresh()
    for name in ALL:
        getattr(some, name).requires_grad_(name in wanted)
    kernel = Mock(wraps=fl.ops.batch_norm_act_bwd)
    monkeypatch.setattr(fl.ops, "batch_norm_act_bwd", kernel)
    results = run(fused, some)
    for name in wanted:
        assert torch.equal(results[f"gradient of {name}"], every[f"gradient of {name}"])
    if device.type == "cpu":
        # Weight and bias come from one pass.
        flags = ["input" in wanted, bool({"weight", "bias"} & set(wanted)), "residual" in wanted]
        assert list(kernel.call_args.args[-3:]) == flags
        computed = kernel(*kernel.call_args.args)
        assert [t.numel() > 0 for t in computed] == [flags[0], flags[1], flags[1], flags[2]]


@pytest.mark.parametrize("wanted", [c for n in range(1, 4) for c in itertools.combinations(POOLED, n)], ids=" ".join)
@pytest.mark.parametrize("training", [True, False])
def test_pooled_gradients_only_where_needed(
    training: bool, wanted: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as when all are needed, and nothing computed for the rest."""
    sample = make_sample(Case(act="gelu", training=training, pool="5/3/2", drop_p=0.3), device)
    every = run(fused, sample.fresh())
    some = sample.fresh()
    for name in POOLED:
        getattr(some, name).requires_grad_(name in wanted)
    kernel = Mock(wraps=fl.ops.batch_norm_act_pool_bwd)
    monkeypatch.setattr(fl.ops, "batch_norm_act_pool_bwd", kernel)
    results = run(fused, some)
    for name in wanted:
        assert torch.equal(results[f"gradient of {name}"], every[f"gradient of {name}"])
    if device.type == "cpu":
        flags = ["input" in wanted, bool({"weight", "bias"} & set(wanted))]
        assert list(kernel.call_args.args[-2:]) == flags
        computed = kernel(*kernel.call_args.args)
        assert [t.numel() > 0 for t in computed] == [flags[0], flags[1], flags[1]]


@pytest.mark.parametrize("wanted", [(), ("input",), ("bias",), ("weight", "residual")], ids=str)
def test_output_needs_a_gradient_where_an_argument_does(wanted: tuple[str, ...], device: torch.device) -> None:
    sample = make_sample(Case(residual="contiguous"), device).fresh()
    for name in ALL:
        getattr(sample, name).requires_grad_(name in wanted)
    assert fused(sample).requires_grad == bool(wanted)
    with torch.no_grad():
        assert not fused(sample).requires_grad


@pytest.mark.parametrize("pool", [None, "5/3/2"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_a_broadcast_output(training: bool, pool: str | None, device: torch.device) -> None:
    """The gradient of a sum is one expanded number, that of a mean of planes a tensor with strides of zero."""
    sample = make_sample(Case(training=training, act="gelu", pool=pool), device)
    for reduce in (Tensor.sum, lambda y: y.mean((2, 3)).square().sum()):
        gradients = []
        for operator, dtype in ((fused, torch.float32), (exact, torch.float64)):
            leaves = sample.fresh(dtype)
            gradients.append(torch.autograd.grad(reduce(operator(leaves)), leaves.input)[0])
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-5)


def _block(device: torch.device, **options: Any) -> fl.BatchNormAct2d:
    torch.manual_seed(SEED)
    layer = fl.BatchNormAct2d(5, act_layer="gelu", device=device, **options)
    nn.init.normal_(layer.weight)
    return layer


def _images(device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2, 1)], ids=str)
def test_two_forwards_before_one_backward(pool: nn.MaxPool2d | None, device: torch.device) -> None:
    """Nothing of a call is kept on the module."""
    layer, x, y = _block(device, pool=pool), _images(device, 1), _images(device, 2)
    apart = [torch.autograd.grad(layer(t).square().sum(), [t, layer.weight]) for t in (x, y)]
    out_x, out_y = layer(x), layer(y)
    together = torch.autograd.grad(out_x.square().sum() + out_y.square().sum(), [x, y, layer.weight])
    assert torch.equal(together[0], apart[0][0])
    assert torch.equal(together[1], apart[1][0])
    torch.testing.assert_close(together[2], apart[0][1] + apart[1][1])


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2, 1)], ids=str)
def test_used_twice_in_one_network(pool: nn.MaxPool2d | None, device: torch.device) -> None:
    """As torch's layers used twice."""
    ours = _block(device, pool=pool)
    theirs = nn.Sequential(nn.BatchNorm2d(5), nn.GELU(), pool or nn.Identity()).to(device)
    theirs[0].load_state_dict(ours.state_dict())
    x = _images(device)
    got, expected = (
        torch.autograd.grad(layer(layer(x) * 2).square().sum(), [x, *layer.parameters()]) for layer in (ours, theirs)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs[0].state_dict())


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2, 1)], ids=str)
def test_backward_twice(pool: nn.MaxPool2d | None, device: torch.device) -> None:
    """With retain_graph the same gradient again; without it torch's own error."""
    layer, x = _block(device, pool=pool), _images(device)
    loss = layer(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        *((name, {"residual": "contiguous"}) for name in ("input", "weight", "residual")),
        *((name, {"pool": "2/2"}) for name in ("input", "weight")),
    ],
)
def test_what_was_saved_may_not_be_overwritten(changed: str, options: dict[str, Any], device: torch.device) -> None:
    sample = make_sample(Case(act="gelu", **options), device).fresh()
    loss = fused(sample).sum()
    with torch.no_grad():
        getattr(sample, changed).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("preserve_rng_state", [True, False])
@pytest.mark.parametrize("options", [{}, {"drop_mode": "element"}, {"pool": nn.MaxPool2d(2, 1)}], ids=str)
def test_checkpoint(
    options: dict[str, Any], preserve_rng_state: bool, use_reentrant: bool, device: torch.device
) -> None:
    """Recomputed with the same random numbers, the gradient is the same; with others, the mask is another.

    The running statistics are updated twice, as torch's layers' are.
    """
    gradients = []
    for recompute in (False, True):
        layer, x = _block(device, drop_p=0.5, **options), _images(device)
        torch.manual_seed(SEED)
        if recompute:
            y = checkpoint(layer, x, use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state)
        else:
            y = layer(x)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0] if not use_reentrant else _backward(y, x))
        assert layer.num_batches_tracked == 1 + recompute
    assert torch.equal(*gradients) == preserve_rng_state


def _backward(y: Tensor, x: Tensor) -> Tensor:
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


def _saved_bytes(forward: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """What a graph keeps alive beyond the tensors that were given to it."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    for t in given:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


N, C, H, W = 4, 16, 12, 12
ELEMENTS = N * C * H * W
PER_CHANNEL = 16 * C  # two statistics in double precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"act": "relu"}, PER_CHANNEL),
        ({"act": "gelu"}, PER_CHANNEL),
        ({"act": "relu", "training": False}, PER_CHANNEL),
        ({"act": "relu", "drop_p": 0.3}, PER_CHANNEL + N * C),
        ({"act": "gelu", "drop_p": 0.3}, PER_CHANNEL + N * C),
        ({"act": "relu", "drop_p": 0.3, "drop_mode": "element"}, PER_CHANNEL + ELEMENTS // 8),
        # The residual itself is the caller's; one bit per element is all that is new.
        ({"act": "relu", "residual": "contiguous"}, PER_CHANNEL + ELEMENTS // 8),
        ({"act": "gelu", "residual": "contiguous"}, PER_CHANNEL),
        ({"act": "identity", "residual": "contiguous"}, PER_CHANNEL),
    ],
    ids=str,
)
def test_saved_for_backward(
    options: dict[str, Any], allowed: int, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    """Of full size only the input, and the residual where its values are needed."""
    if device.type != "cpu":
        pytest.skip("the reference, which serves other devices, keeps what autograd keeps")
    sample = make_sample(Case((N, C, H, W), dtype, layout=layout, **options), device).fresh()
    needs_residual = options["act"] == "gelu"
    given = [sample.input, sample.weight, sample.bias, sample.residual if needs_residual else None]
    assert _saved_bytes(lambda: fused(sample), [t for t in given if t is not None]) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("act", "drop_p"), [("relu", 0.0), ("gelu", 0.3)])
def test_saved_with_a_pool(act: str, drop_p: float, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Of full size only the input; of each window the value that was taken, and a byte."""
    if device.type != "cpu":
        pytest.skip("the reference, which serves other devices, keeps what autograd keeps")
    sample = make_sample(Case((N, C, H, W), dtype, layout=layout, act=act, drop_p=drop_p, pool="2/2"), device).fresh()
    windows, mask = ELEMENTS // 4, N * C if drop_p else 0
    assert sample.weight is not None
    assert sample.bias is not None
    given = [sample.input, sample.weight, sample.bias]
    assert _saved_bytes(lambda: fused(sample), given) <= PER_CHANNEL + mask + windows * (dtype.itemsize + 1)
    with torch.no_grad():
        assert _saved_bytes(lambda: fused(sample), given) == 0


@pytest.mark.parametrize(("mode", "allowed"), [("dropout", ELEMENTS // 8), ("dropout2d", N * C)])
def test_saved_by_dropout(mode: str, allowed: int, layout: str, device: torch.device) -> None:
    """The mask alone, a bit per element or a byte per plane."""
    if device.type != "cpu":
        pytest.skip("the reference, which serves other devices, keeps what autograd keeps")
    x = make_sample(Case((N, C, H, W), layout=layout), device).input.requires_grad_()
    assert 0 < _saved_bytes(lambda: getattr(fl.functional, mode)(x, 0.5), []) <= allowed


@pytest.fixture(params=["contiguous", "channels_last"])
def layout(request: pytest.FixtureRequest) -> str:
    """One of the two layouts that networks have."""
    name: str = request.param
    return name
