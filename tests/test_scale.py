"""Extremes of size: more than 2^31 elements, one channel and a hundred thousand, 1000 layers, 100 000 steps.

What takes long or much memory is marked ``long``; the rest is the same in small.
"""

from __future__ import annotations

import copy
import io
import linecache
import math
import mmap
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import activations, fusion, masks
from tests.cases import Case
from tests.oracle import check
from tests.resources import Held, available_bytes, growth

GIB = 1 << 30

# Channels and positions


@pytest.mark.parametrize(
    "case",
    [
        Case(shape, layout=layout, act=act, drop_p=drop_p, drop_mode=drop_mode)
        for shape, layout in (
            ((3, 1, 70, 70), "contiguous"),
            ((200_000, 1), "contiguous"),
            ((2, 100_000), "contiguous"),
            ((2, 100_000, 2, 1), "contiguous"),
            ((2, 100_000, 2, 1), "channels_last"),
        )
        for act, drop_p, drop_mode in (("silu", 0.0, "channel"), ("relu", 0.4, "element"))
    ],
    ids=str,
)
def test_one_channel_and_a_hundred_thousand(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1), (1, 100_000)])
def test_one_position(shape: tuple[int, ...]) -> None:
    """In evaluation it is like any other; in training torch refuses it, and so do we."""
    layer = fl.BatchNormAct2d(shape[1], act_layer="relu") if len(shape) == 4 else fl.BatchNormAct1d(shape[1])
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x)
    layer.eval()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def _of_a_repeated_sample(samples: int, positions: int, dtype: torch.dtype) -> None:
    """A sample expanded over a batch is read in place, and has its own moments."""
    sample = torch.randn(1, 1, positions).to(dtype)
    x = sample.expand(samples, 1, positions)
    var = torch.zeros(1)
    mean = torch.zeros(1)
    with torch.no_grad():
        y = fl.functional.batch_norm_act(x, mean, var, training=True, momentum=1.0, act="relu")
    count = samples * positions
    exact = sample.double()
    assert mean.item() == pytest.approx(exact.mean().item(), rel=1e-6, abs=1e-7)
    assert var.item() == pytest.approx(exact.var(correction=0).item() * count / (count - 1), rel=1e-5)
    expected = ((exact - exact.mean()) * exact.var(correction=0).add(1e-5).rsqrt()).relu()[0, 0]
    for n in (0, samples // 2, samples - 1):
        torch.testing.assert_close(
            y[n, 0].double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_input(dtype: torch.dtype) -> None:
    _of_a_repeated_sample(1000, 1001, dtype)


@pytest.mark.long
def test_a_thousand_million_positions_of_one_channel() -> None:
    _need(3 * GIB)
    _of_a_repeated_sample(1000, 1_000_003, torch.bfloat16)


# More elements than an int32 counts


def _need(size: int) -> None:
    available = available_bytes()
    if available < size + GIB:
        pytest.skip(f"needs {size / GIB:.0f} GiB of memory and one to spare, {available / GIB:.1f} are available")


@dataclass(frozen=True)
class Huge:
    """A call on bfloat16 tensors; `residual`: the input is added once more, and has the gradient of that alone."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    act: str = "silu"
    residual: bool = False
    drop_p: float = 0.0
    drop_mode: str = "channel"

    def __str__(self) -> str:
        what = [self.layout, self.act, *(["residual"] * self.residual), f"{self.drop_mode} {self.drop_p}"]
        return " ".join(["x".join(map(str, self.shape)), *what])

    @property
    def bytes(self) -> int:
        """Input, output, gradient, and a few slabs in float64."""
        return 3 * 2 * math.prod(self.shape) + GIB


# Each way through the CPU kernels: few channels in spans, channel by channel, small planes, rows in tiles wide and
# narrow.
HUGE = (
    Huge((3, 15, 6912, 6912), drop_p=0.4),
    Huge((2, 32, 5800, 5800), act="leaky_relu", residual=True),
    Huge((2, 32, 5800, 5800), act="gelu", drop_p=0.4, drop_mode="element"),
    Huge((525_000, 64, 8, 8), drop_p=0.4),
    Huge((40, 64, 917, 917), "channels_last", act="leaky_relu", residual=True),
    Huge((2_100_000, 1024), drop_p=0.4, drop_mode="element"),
    Huge((46, 3, 3968, 3968), "channels_last", drop_p=0.4),
)


@pytest.mark.long
@pytest.mark.parametrize("huge", HUGE, ids=str)
def test_more_than_two_to_the_31_elements(huge: Huge) -> None:
    assert math.prod(huge.shape) > 2**31
    _need(huge.bytes)
    _as_in_float64(huge)


@pytest.mark.parametrize(
    "huge",
    [
        Huge((3, 5, 90, 90), drop_p=0.4),
        Huge((2, 32, 40, 40), act="leaky_relu", residual=True),
        Huge((40, 8, 33, 31), "channels_last", drop_p=0.4, drop_mode="element"),
    ],
    ids=str,
)
def test_the_check_of_huge_tensors_on_small_ones(huge: Huge) -> None:
    _as_in_float64(huge)


def _filled(huge: Huge) -> Tensor:
    """Random numbers, a block of them over and over. Its length, a prime, divides no offset that could overflow."""
    sizes = huge.shape if huge.layout == "contiguous" else [huge.shape[i] for i in (0, 2, 3, 1)]
    x = torch.empty(sizes, dtype=torch.bfloat16)
    block = (torch.randn(4_194_301) + 0.5).bfloat16()
    for part in x.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
    return x if huge.layout == "contiguous" else x.permute(0, 3, 1, 2)


def _slabs(huge: Huge, channel: int) -> Iterator[tuple[slice | int, ...]]:
    """Indices of a channel's elements, some millions at a time."""
    most, (samples, _, *sizes) = 1 << 23, huge.shape
    spatial = math.prod(sizes)
    at_once, rows = max(1, most // spatial), max(1, most // math.prod(sizes[1:])) if sizes else 1
    for n in range(0, samples, at_once):
        for row in range(0, sizes[0] if sizes else 1, rows):
            yield (slice(n, n + at_once), channel, *([slice(row, row + rows)] if sizes else []))


def _as_in_float64(huge: Huge) -> None:
    """The last channel, whose elements lie farthest from the start, forward and backward."""
    x = _filled(huge)
    channels = huge.shape[1]
    weight, bias = torch.linspace(0.5, 1.5, channels).requires_grad_(), torch.linspace(-1, 1, channels).requires_grad_()
    mean, var = torch.zeros(channels), torch.ones(channels)
    leaf = x.detach().requires_grad_()
    y = fl.functional.batch_norm_act(
        x if huge.residual else leaf, mean, var, weight, bias, training=True, momentum=1.0,
        residual=leaf if huge.residual else None, act=huge.act, drop_p=huge.drop_p, drop_mode=huge.drop_mode,
    )  # fmt: skip
    y.backward(y.detach())
    assert leaf.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    c = channels - 1
    slabs = list(_slabs(huge, c))
    count = math.prod(huge.shape) // channels
    # In float64 throughout.
    exact_mean = torch.stack([x[slab].double().sum() for slab in slabs]).sum() / count
    exact_var = torch.stack([(x[slab].double() - exact_mean).square().sum() for slab in slabs]).sum() / count
    invstd = (exact_var + 1e-5).rsqrt()
    torch.testing.assert_close(mean[c].double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var[c].double(), exact_var * count / (count - 1), rtol=1e-5, atol=0)

    activation, scale = activations.resolve(huge.act), masks.scale(huge.drop_p)
    weight_c, bias_c = weight[c].detach().double(), bias[c].detach().double()
    kept_share: list[float] = []

    def backward_of(slab: tuple[slice | int, ...]) -> tuple[Tensor, Tensor]:
        """The normalised input and the gradient before the activation; compares the output on the way."""
        normalised = (x[slab].double() - exact_mean) * invstd
        z = normalised * weight_c + bias_c
        z = (z + x[slab].double() if huge.residual else z).requires_grad_()
        got = y.detach()[slab].double()
        kept = (got != 0).double() if huge.drop_p else torch.ones_like(got)
        kept_share.append(kept.mean().item())
        expected = activation.apply(z)
        torch.testing.assert_close(got, expected.detach() * kept * scale, rtol=2e-2, atol=1e-2)
        (gradient,) = torch.autograd.grad(expected, z, got * kept * scale)
        return normalised, gradient

    sum_gradient = sum_product = torch.zeros((), dtype=torch.float64)
    for slab in slabs:
        normalised, gradient = backward_of(slab)
        sum_gradient, sum_product = sum_gradient + gradient.sum(), sum_product + (gradient * normalised).sum()
    torch.testing.assert_close(bias.grad[c].double(), sum_gradient, rtol=1e-3, atol=1e-4 * count)
    torch.testing.assert_close(weight.grad[c].double(), sum_product, rtol=1e-3, atol=1e-4 * count)
    for slab in (slabs[0], slabs[len(slabs) // 2], slabs[-1]):
        normalised, gradient = backward_of(slab)
        expected = weight_c * invstd * (gradient - sum_gradient / count - normalised * sum_product / count)
        expected = gradient if huge.residual else expected
        torch.testing.assert_close(leaf.grad[slab].double(), expected, rtol=2e-2, atol=2e-2)
    share = sum(kept_share) / len(kept_share)
    planes = huge.shape[0] if huge.drop_mode == "channel" else count
    assert abs(share - (1 - huge.drop_p)) <= 5 * math.sqrt(0.25 / planes) * (huge.drop_p > 0)


def _drawn_as_bernoulli(count: int) -> None:
    """An element mask is the one that torch draws, to its last bit, and so is the generator's state behind it."""
    like = torch.empty(count, dtype=torch.bfloat16)
    state = torch.random.get_rng_state()
    bits = masks.draw_for_kernels(like, 0.3, "element", True, flat=True)
    assert bits is not None
    after = torch.random.get_rng_state()
    del like
    torch.random.set_rng_state(state)
    expected = torch.empty(count, dtype=torch.bool).bernoulli_(0.7)
    assert torch.equal(torch.random.get_rng_state(), after)
    assert bits.numel() == (count + 7) // 8
    for begin in (0, count // 16 * 8, count - count % 8 - 8_000):
        end = min(begin + 8_000 + count % 8, count)
        unpacked = (bits[begin // 8 : (end + 7) // 8, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        assert torch.equal(unpacked.view(-1)[: end - begin].bool(), expected[begin:end])


def test_element_mask() -> None:
    _drawn_as_bernoulli(100_003)


@pytest.mark.long
def test_element_mask_of_more_than_two_to_the_31_elements() -> None:
    _need(4 * GIB)
    _drawn_as_bernoulli(2**31 + 12_347)


# Many layers


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(x))
        return y


def test_a_thousand_layers() -> None:
    """In one model: forward, backward, state, copies; and as many chains fused."""
    model = nn.Sequential(*(fl.BatchNormAct2d(4, act_layer="gelu") for _ in range(1000)))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    again = copy.deepcopy(model)
    again.load_state_dict(torch.load(stored, weights_only=True))
    unpickled = pickle.loads(pickle.dumps(model))
    expected = model.eval()(x)
    assert torch.equal(again.eval()(x), expected)
    assert torch.equal(unpickled.eval()(x), expected)


@pytest.mark.parametrize("chains", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_many_fused_chains(chains: int) -> None:
    model = nn.Sequential(*(_Block() for _ in range(chains))).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    fl.fuse(model)
    assert len(fl.fusion_report(model).fused) == chains
    torch.testing.assert_close(model(x), expected)
    assert type(next(fl.unfuse(model).children())) is _Block


# Many steps

#: Of a process that does nothing but steps; what a leak of one float per step would exceed in the long version.
ROOM = 4 << 20


def _tiny_steps(kind: str) -> nn.Module:
    return {
        "torch's kernels": lambda: fl.BatchNormAct2d(4, act_layer="relu"),
        "torch's kernels, dropout": lambda: fl.BatchNormAct2d(4, act_layer="relu", drop_p=0.5),
        "own kernels": lambda: fl.BatchNormAct2d(4, act_layer="gelu", drop_p=0.5, drop_mode="element"),
        "dropout": lambda: fl.Dropout(0.5),
        "fused": lambda: fl.fuse(_Block()),
    }[kind]()


KINDS = ("torch's kernels", "torch's kernels, dropout", "own kernels", "dropout", "fused")


def _holds_nothing(kind: str, steps: int) -> None:
    layer = _tiny_steps(kind)
    size = 24 if kind == "own kernels" else 6
    x = torch.randn(4, 4, size, size, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    grown, more = growth(step, steps)
    assert not more
    assert grown <= ROOM, f"{grown} bytes more after {steps} steps"


@pytest.mark.parametrize("kind", KINDS)
def test_steps_hold_nothing(kind: str) -> None:
    """No tensor, thread or file; memory in so few steps is the allocator's own noise, for which there is room."""
    _holds_nothing(kind, steps=1000)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_steps_hold_nothing(kind: str) -> None:
    _holds_nothing(kind, steps=100_000)


def _written(size: int) -> mmap.mmap:
    """Memory of its own: malloc would give what others have freed."""
    memory = mmap.mmap(-1, size)
    memory.write(bytes(size))
    return memory


@pytest.mark.parametrize("what", ["tensors", "threads", "files", "memory"])
def test_what_steps_hold_is_told(what: str) -> None:
    """Else the tests above could not fail."""
    kept: list[object] = []
    stop = threading.Event()

    def thread() -> threading.Thread:
        started = threading.Thread(target=stop.wait)
        started.start()
        return started

    keep: dict[str, Callable[[], object]] = {
        "tensors": lambda: torch.ones(1), "threads": thread, "files": Path(os.devnull).open,
        "memory": lambda: _written(1 << 20),
    }  # fmt: skip
    others = [torch.ones(1) for _ in range(100)]

    def step() -> None:
        kept.append(keep[what]())
        others.pop()  # what went meanwhile hides nothing

    grown, more = growth(step, 20)
    stop.set()
    assert more == ({what: 20} if what != "memory" else {})
    assert (grown > ROOM) == (what == "memory")


def test_fusing_again_and_again_holds_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), _Block())

    def step() -> None:
        fl.fuse(model)
        model(torch.randn(1, 3, 5, 5))

    step()
    programs = len(linecache.cache)
    _, more = growth(step, 20)
    assert not more
    assert len(linecache.cache) == programs
    fused = Held.now()
    fl.unfuse(model)
    assert not Held.now().beyond(fused)
    assert not any("fastlayers.fuse" in name for name in linecache.cache)
    assert not [cls for cls in fusion.install._classes if cls is _Block]
