"""Dropout masks: the same bits as torch's for the same seed, the same generator state afterwards, exact zeros."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import fastlayers as fl
from fastlayers import masks, ops
from tests.cases import pairwise
from tests.layouts import LAYOUTS, in_layout
from tests.oracle import assert_close

SHAPES = [(9, 7), (5, 20, 9), (4, 6, 5, 3), (2, 9, 3, 2, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
P = [0.0, 0.3, 1.0]
SEED = 7
_Drawn = TypeVar("_Drawn")


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _seeded(draw: Callable[[], _Drawn], device: torch.device) -> tuple[_Drawn, Tensor]:
    """What `draw` returns from a fixed seed, and the generator's state after it."""
    torch.manual_seed(SEED)
    return draw(), _generator_state(device)


WAYS = ("computed", "bernoulli_")


@contextlib.contextmanager
def _drawn(way: str, device: torch.device) -> Iterator[None]:
    """Has masks for the kernels drawn this way, whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "bernoulli_":
            patch.setattr(masks, "predicts_bernoulli", lambda: False)
        elif device.type == "cpu" and masks.predicts_bernoulli():
            patch.setattr(masks, "_VALUES_WORTH_IT", 1)
        else:
            pytest.skip("bernoulli_ draws other numbers than MT19937 here")
        yield


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    with _drawn(request.param, device):
        yield request.param


@pytest.fixture
def computed(device: torch.device) -> Iterator[None]:
    with _drawn("computed", device):
        yield


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
def test_channel_mask(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, p: float, device: torch.device, way: str
) -> None:
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
def test_element_mask(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, p: float, device: torch.device, way: str
) -> None:
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
            "way": list(WAYS),
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

    with fl.use_backend(row["backend"]), _drawn(row["way"], device):
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


# Numbers drawn before a mask: none, one, two words of a block; so many that few are left of it; what randn keeps.
BEFORE: list[tuple[str, Callable[[], object]]] = [
    ("a new seed", lambda: None),
    ("a word", lambda: torch.randint(9, (1,))),
    ("a float64", lambda: torch.rand(1, dtype=torch.float64)),
    ("621 words", lambda: torch.randint(9, (621,))),
    ("622 words", lambda: torch.randint(9, (622,))),
    ("623 words", lambda: torch.randint(9, (623,))),
    ("a block", lambda: torch.randint(9, (624,))),
    ("one randn", lambda: torch.randn(1)),
    ("one randn in float64", lambda: torch.randn(3, dtype=torch.float64)),
]
PROBABILITIES = [1e-300, 1e-9, 0.1, 0.5, 0.7, 1 - 1e-9, math.nextafter(1, 0)]


def _next_numbers() -> list[Tensor]:
    """Some of every kind."""
    wide = torch.float64
    return [torch.randn(1), torch.randn(1, dtype=wide), torch.rand(3), torch.rand(3, dtype=wide), torch.randperm(9)]


@pytest.mark.parametrize(("before", "draw"), BEFORE, ids=[name for name, _ in BEFORE])
def test_computed_channel_masks(before: str, draw: Callable[[], object], computed: None, capability: str) -> None:
    """Of sizes that end anywhere in a vector or in a block of 624 words: torch's mask, and its numbers after that."""
    sizes = [*range(1, 40), 155, 156, 157, *range(309, 317), 623, 624, 625, 1000, 65536]
    for size, p in zip(sizes, itertools.cycle(PROBABILITIES), strict=False):
        results = []
        for mask in (
            lambda x, p=p: masks.draw_for_kernels(x, p, "channel", True),
            lambda x, p=p: F.dropout2d(x, p)[..., 0, 0] != 0,
        ):
            torch.manual_seed(size)
            draw()
            results.append([mask(torch.ones(1, size, 1, 1)), torch.get_rng_state(), *_next_numbers()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (size, p)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_computed_element_masks(layout: str, flat: bool, computed: None, capability: str) -> None:
    """Bits of planes and rows of any length, whole bytes or not: those of torch's mask."""
    lengths = [(1, 1), (1, 7), (3, 3), (7, 7), (8, 4), (1, 13), (5, 13), (6, 20), (25, 25)]
    for (height, width), channels, p in zip(
        lengths, itertools.cycle([1, 2, 7, 8, 16, 33, 65]), itertools.cycle(PROBABILITIES), strict=False
    ):
        x = in_layout(torch.ones(3, channels, height, width), layout)
        torch.manual_seed(SEED)
        bits = masks.draw_for_kernels(x, p, "element", True, flat)
        state = torch.get_rng_state()
        torch.manual_seed(SEED)
        kept = F.dropout(x, p) != 0
        assert bits is not None
        assert torch.equal(bits, ops.pack_mask(kept, flat)), (x.shape, p)
        assert torch.equal(state, torch.get_rng_state())


def test_probability_is_compared_exactly(computed: None, capability: str) -> None:
    """A value is dropped where it equals the probability of keeping, and kept where that is the least bit larger."""
    state = torch.get_rng_state()
    values = torch.rand(100, dtype=torch.float64).tolist()
    torch.set_rng_state(state)
    like = torch.empty(1, 100)
    for i, value in enumerate(values):
        for keep_probability, kept in ((value, False), (math.nextafter(value, 1), True)):
            assert bool(ops.draw_channel_mask(state, like, keep_probability)[0][0, i]) is kept


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("mode", masks.MODES)
def test_certainty_draws_nothing(mode: str, p: float, way: str) -> None:
    x, state = torch.ones(4, 5, 3), torch.get_rng_state()
    mask = masks.draw_for_kernels(x, p, mode, True)
    assert mask is None if p == 0 else mask is not None and not mask.any()
    assert torch.equal(torch.get_rng_state(), state)


# The others' memory has gaps, or planes and rows that are not in the order of the samples.
SIMPLE_LAYOUTS = ("contiguous", "channels_last", "offset")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_element_masks(layout: str, computed: None) -> None:
    """The bits alone; a byte per element for the less simple layouts."""
    x = in_layout(torch.ones(16, 24, 32, 32), layout)
    with profile(profile_memory=True) as run:
        masks.draw_for_kernels(x, 0.5, "element", True)
    allocated = max(event.cpu_memory_usage for event in run.events())
    states = 4 * torch.get_rng_state().nbytes
    assert allocated <= x.numel() / 8 + states + (0 if layout in SIMPLE_LAYOUTS else x.numel())


@pytest.mark.parametrize("size", [600, 5000])
def test_threads_draw_what_one_would(size: int, way: str) -> None:
    """Every mask once, and the generator where it would be."""
    x, threads = torch.ones(1, size), 3

    def draw_some(_: int) -> list[list[bool]]:
        drawn = (masks.draw_for_kernels(x, 0.5, "channel", True) for _ in range(150))
        return [mask[0].tolist() for mask in drawn if mask is not None]

    torch.manual_seed(SEED)
    one_by_one = sorted(mask for i in range(threads) for mask in draw_some(i))
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    with ThreadPoolExecutor(threads) as pool:
        at_once = sorted(mask for drawn in pool.map(draw_some, range(threads)) for mask in drawn)
    assert at_once == one_by_one
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("times", [1, 2, 100])
@pytest.mark.parametrize("mode", masks.MODES)
def test_draws_of_others_meanwhile(mode: str, times: int, computed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch draws in another thread while a mask is computed, the mask is that of the numbers after those."""
    name = f"draw_{mode}_mask"
    operator, remaining = getattr(ops, name), times

    def interrupted(*args: Any) -> Any:
        nonlocal remaining
        if remaining > 0:
            remaining -= 1
            other = threading.Thread(target=torch.rand, args=(5,))
            other.start()
            other.join()
        return operator(*args)

    monkeypatch.setattr(ops, name, interrupted)
    x = torch.ones(7, 11, 3, 5)
    torch.manual_seed(SEED)
    mask = masks.draw_for_kernels(x, 0.5, mode, True)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    torch.rand(5 * (times - remaining))
    expected = masks.draw(x, 0.5, mode, True)
    assert mask is not None
    assert expected is not None
    assert torch.equal(mask, expected if mode == "channel" else ops.pack_mask(expected, False))
    assert torch.equal(torch.get_rng_state(), state)


FORK = """
import os, threading, torch, fastlayers as fl
x = torch.ones(64, 64, 1, 1)
stop = threading.Event()
def draw():
    while not stop.is_set():
        fl.masks.draw_for_kernels(x, 0.5, "channel", True)
thread = threading.Thread(target=draw)
thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        fl.masks.draw_for_kernels(x, 0.5, "channel", True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""


def test_processes_forked_while_a_thread_draws() -> None:
    """They draw, and do not wait for ever for a thread that they do not have."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=False, timeout=120)
    assert done.returncode == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
def test_tracers_and_transforms_see_torchs_own_draw(name: str, computed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them could see a mask that was computed from the state: it would be the same at every call."""

    def forbidden(*args: object) -> None:
        raise AssertionError("computed from the state")

    monkeypatch.setattr(masks, "_from_state", forbidden)
    dropout, x = getattr(fl.functional, name), torch.ones(8, 64, 3, 3)
    for run in (
        torch.compile(lambda x: dropout(x, 0.5), fullgraph=True, backend="aot_eager"),
        make_fx(lambda x: dropout(x, 0.5))(x),
        torch.jit.trace(lambda x: dropout(x, 0.5), x, check_trace=False),
        lambda x: torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(torch.stack([x, x])),
    ):
        assert not torch.equal(run(x), run(x))
    with pytest.raises(AssertionError, match="computed from the state"):
        dropout(x, 0.5)


class TestWhetherBernoulliIsPredicted:
    @pytest.fixture(autouse=True)
    def _try_again(self) -> Iterator[None]:
        masks.predicts_bernoulli.cache_clear()
        yield
        masks.predicts_bernoulli.cache_clear()

    def test_leaves_the_generator_alone(self) -> None:
        state = torch.get_rng_state()
        masks.predicts_bernoulli()
        assert torch.equal(torch.get_rng_state(), state)

    def test_sees_other_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such as MKL's, which depend on one number of the generator."""

        def bernoulli(self: Tensor, p: float, generator: torch.Generator) -> Tensor:
            seed = int(torch.randint(2**31, (1,), generator=generator))
            return self.copy_(torch.rand(self.shape, generator=torch.Generator().manual_seed(seed)) < p)

        monkeypatch.setattr(Tensor, "bernoulli_", bernoulli)
        assert not masks.predicts_bernoulli()

    def test_sees_another_state(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mask that is right is not enough."""
        operator = ops.draw_channel_mask

        def forgetful(state: Tensor, like: Tensor, keep_probability: float) -> tuple[Tensor, Tensor]:
            return operator(state, like, keep_probability)[0], state

        monkeypatch.setattr(ops, "draw_channel_mask", forgetful)
        assert not masks.predicts_bernoulli()

    def test_sees_a_state_of_another_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        operator = ops.draw_channel_mask
        monkeypatch.setattr(ops, "draw_channel_mask", lambda state, *args: operator(state[:-8], *args))
        assert not masks.predicts_bernoulli()


class TestMasksOfGpus:
    """Drawn on the CPU here, where torch draws the same numbers for every dtype."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("p", P)
    def test_channels_are_those_of_dropout2d(self, p: float, dtype: torch.dtype, device: torch.device) -> None:
        x = torch.ones(4, 6, 5, 3, dtype=dtype, device=device)
        mask, state = _seeded(lambda: masks.draw_for_gpu_kernels(x, p, "channel", True), device)
        expected, expected_state = _seeded(lambda: F.dropout2d(x, p), device)
        assert torch.equal(state, expected_state)
        if p == 0:
            assert mask is None
        else:
            assert mask is not None
            assert mask.dtype == dtype
            assert torch.equal(mask.bool(), expected[:, :, 0, 0] != 0)

    def test_elements_are_a_seed(self, device: torch.device) -> None:
        """One number of torch's generator, another at each draw; none is drawn to drop everything."""
        x = torch.ones(4, 6, device=device)
        seeds = [masks.draw_for_gpu_kernels(x, 0.5, "element", True) for _ in range(2)]
        torch.manual_seed(0)
        again = masks.draw_for_gpu_kernels(x, 0.5, "element", True)
        assert all(s is not None and s.dtype == torch.int64 and s.shape == (1,) for s in seeds)
        assert seeds[0] != seeds[1]
        assert seeds[0] == again
        state = _generator_state(device)
        assert masks.draw_for_gpu_kernels(x, 1.0, "element", True) == torch.zeros(1, device=device)
        assert torch.equal(_generator_state(device), state)

    def test_elements_are_those_of_philox(self) -> None:
        """The known answer of Random123's kat_vectors, and Philox in Python's own whole numbers."""
        words = torch.cat(fl.reference._philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)))
        assert words.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        for seed, counter in ((1, 0), (-1, 2**40 + 3), (2**62 + 12345, 2**32 - 1)):
            words = torch.cat(fl.reference._philox(torch.tensor([seed]), torch.tensor([counter])))
            assert words.tolist() == _philox(seed % 2**64, counter)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("p", [1e-12, 0.25, 1.0])
    def test_element_mask(self, p: float, layout: str) -> None:
        """By the order of memory of the dense output; the last words are of a block that is cut off."""
        x = in_layout(torch.zeros(3, 5, 3, 3), layout)
        mask = fl.reference.element_mask(torch.tensor([77]), x, masks.scale(p))
        assert mask.stride() == torch.empty_like(x).stride()
        kept = [word < round((1 - p) * 2**32) for block in range(34) for word in _philox(77, block)]
        assert mask.as_strided((mask.numel(),), (1,)).tolist() == kept[: mask.numel()]

    def test_the_reference_takes_masks_of_any_dtype(self) -> None:
        x, mask = torch.randn(4, 6, 2, 2), torch.rand(4, 6) > 0.5
        expected = fl.reference.apply_mask(x, mask, 0.5)
        assert torch.equal(fl.reference.apply_mask(x, mask.bfloat16(), 0.5), expected)


def _philox(seed: int, counter: int) -> list[int]:
    key = [seed % 2**32, seed // 2**32]
    c = [counter % 2**32, counter // 2**32, 0, 0]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b // 2**32 ^ c[1] ^ key[0], b % 2**32, a // 2**32 ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("mode", ["dropout", "dropout2d"])
@pytest.mark.parametrize("layout", ["channels_last", "reversed", "expanded"])
def test_gradients_in_another_layout(mode: str, layout: str, device: torch.device) -> None:
    """What was dropped is known by its place in memory; the gradient's may be another."""
    x = torch.randn(4, 6, 5, 3, device=device, requires_grad=True)
    y = getattr(fl.functional, mode)(x, 0.5)
    grad_output = in_layout(torch.rand(x.shape, device=device), layout)
    (gradient,) = torch.autograd.grad(y, x, grad_output)
    torch.testing.assert_close(gradient, torch.where(y == 0, 0, 2 * grad_output))


@pytest.mark.parametrize(
    ("shape", "layout", "size"),
    [
        ((3, 5, 4, 4), "contiguous", 3 * 5 * 2),
        ((3, 5, 3, 3), "contiguous", 3 * 5 * 2),
        ((3, 5, 5, 2), "contiguous", 3 * 5 * 3),
        ((3, 5, 3, 3), "channels_last", 17),
        ((3, 5), "contiguous", 2),
        ((3, 5, 1, 1), "contiguous", 2),
    ],
)
def test_bits_that_the_cuda_kernels_save(shape: tuple[int, ...], layout: str, size: int) -> None:
    """A bit per element; every plane whose size is no multiple of 8 may start within a byte."""
    x = in_layout(torch.empty(shape), layout).to("meta")
    arguments = (x, None, None, x, *(None,) * 4, True, 0.1, 1e-5, 1, [0.0, 0.0, 0.0], 1.0, True)
    assert fl.ops.batch_norm_act_fwd(*arguments)[3].shape == (size,)
