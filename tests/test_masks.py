"""Dropout masks: the same bits as torch's for the same seed, the same generator state afterwards, exact zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from tests.cases import pairwise
from tests.layouts import LAYOUTS, in_layout
from tests.oracle import assert_close

SHAPES = [(9, 7), (5, 20, 9), (4, 6, 5, 3), (2, 9, 3, 2, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
P = [0.0, 0.3, 1.0]
SEED = 7


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _seeded(draw: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """What `draw` returns from a fixed seed, and the generator's state after it."""
    torch.manual_seed(SEED)
    return draw(), _generator_state(device)


def _only_on_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("F.dropout draws its mask within its kernel there; only on the CPU is it promised to be the same")


def _kept(x: Tensor, p: float, mode: str) -> Tensor:
    """Which elements the fused operator keeps: the sigmoid leaves no other zeros."""
    y = fl.functional.batch_norm_act(x, None, None, training=True, act="sigmoid", drop_p=p, drop_mode=mode)
    return y != 0


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_mask(shape: tuple[int, ...], layout: str, dtype: torch.dtype, p: float, device: torch.device) -> None:
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    ones = torch.ones(*shape[:2], 1, 1, dtype=dtype, device=device)
    kept, state = _seeded(lambda: _kept(x, p, "channel"), device)
    theirs, their_state = _seeded(lambda: F.dropout2d(ones, p) != 0, device)
    assert torch.equal(kept, theirs.view(shape[:2] + (1,) * (len(shape) - 2)).expand(shape))
    assert torch.equal(state, their_state)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_element_mask(shape: tuple[int, ...], layout: str, dtype: torch.dtype, p: float, device: torch.device) -> None:
    _only_on_cpu(device)
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    kept, state = _seeded(lambda: _kept(x, p, "element"), device)
    theirs, their_state = _seeded(lambda: F.dropout(torch.ones_like(x), p) != 0, device)
    assert torch.equal(kept, theirs)
    assert torch.equal(state, their_state)


# Each with the ranks that torch takes without a warning.
DROPOUTS: list[tuple[str, list[int]]] = [
    ("dropout", [0, 1, 2, 3, 4, 5]),
    ("dropout1d", [2, 3]),
    ("dropout2d", [4]),
    ("dropout3d", [4, 5]),
]


@pytest.mark.parametrize(
    "row",
    pairwise(
        {
            "function": [(name, rank) for name, ranks in DROPOUTS for rank in ranks],
            "layout": list(LAYOUTS),
            "dtype": DTYPES,
            "p": [0.0, 0.1, 0.5, 1.0],
            "backend": ["auto", "reference"],
        }
    ),
    ids=lambda row: " ".join(map(str, row.values())),
)
def test_dropout_functions(row: dict[str, Any], device: torch.device) -> None:
    """Values and gradients as torch's, to twice its rounding; the mask bit by bit; strides; generator."""
    (name, rank), layout, dtype, p = row["function"], row["layout"], row["dtype"], row["p"]
    if name == "dropout":
        _only_on_cpu(device)
    shape = (6, 5, 4, 3, 7)[:rank]
    x = torch.randn(shape, device=device).to(dtype)
    x = in_layout(x, layout) if rank >= 2 else x
    ours, theirs = getattr(fl.functional, name), getattr(F, name)

    def run(dropout: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y, state = _seeded(lambda: dropout(leaf, p), device)
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y) * 3)
        return y.detach(), gradient, state

    with fl.use_backend(row["backend"]):
        y, gradient, state = run(ours, dtype)
    exact = run(theirs, torch.float64)
    eager = run(theirs, dtype)
    assert_close("output", y, exact[0], eager[0])
    assert_close("gradient", gradient, exact[1], eager[1])
    assert torch.equal(y == 0, eager[0] == 0)
    assert torch.equal(gradient == 0, eager[1] == 0)
    assert torch.equal(state, eager[2])
    assert y.stride() == eager[0].stride()


def test_dropout_of_nan_is_zero(device: torch.device, capability: str) -> None:
    """Also the gradient's; torch multiplies by zero."""
    x = torch.full((8, 16, 3, 5), float("nan"), device=device, requires_grad=True)
    for dropout in (fl.functional.dropout, fl.functional.dropout2d):
        y = dropout(x, 0.5)
        (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
        assert (y == 0).any()
        assert torch.equal(y == 0, gradient == 0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drop_layer", [nn.Dropout2d(0.4), nn.Dropout(0.4)], ids=str)
def test_layers_draw_what_the_layers_they_replace_draw(
    drop_layer: nn.Module, memory_format: torch.memory_format, device: torch.device
) -> None:
    """The zeros of several steps are those of BatchNorm2d, Sigmoid, Dropout; so is the next random number."""
    if type(drop_layer) is nn.Dropout:
        _only_on_cpu(device)
    composed = nn.Sequential(nn.BatchNorm2d(6), nn.Sigmoid(), drop_layer).to(device)
    fused = fl.BatchNormAct2d(6, act_layer="sigmoid", drop_layer=drop_layer).to(device)
    x = torch.randn(4, 6, 5, 3, device=device).to(memory_format=memory_format)

    def zeros(layer: nn.Module) -> Tensor:
        return torch.stack([layer(x) == 0 for _ in range(3)])

    ours, state = _seeded(lambda: zeros(fused), device)
    theirs, their_state = _seeded(lambda: zeros(composed), device)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours[0], ours[1])
    assert torch.equal(state, their_state)


def test_forked_generator(device: torch.device) -> None:
    """fork_rng shields what is outside from the layer's draws."""
    layer = fl.Dropout2d(0.5)
    x = torch.ones(8, 8, 2, 2, device=device)
    torch.manual_seed(SEED)
    first = layer(x)
    torch.manual_seed(SEED)
    with torch.random.fork_rng():
        layer(x)
    assert torch.equal(layer(x), first)


def test_evaluation_draws_nothing(device: torch.device) -> None:
    layer = fl.BatchNormAct2d(6, drop_p=0.5, device=device).eval()
    state = _generator_state(device)
    layer(torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(device))
    assert torch.equal(_generator_state(device), state)
