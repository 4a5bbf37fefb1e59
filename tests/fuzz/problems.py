"""A call of `batch_norm_act`, as hypothesis draws it and as tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import fastlayers as fl
from fastlayers import masks
from tests.conftest import CAPABILITIES
from tests.fuzz import memory, values
from tests.fuzz.activations import Act, acts
from tests.fuzz.memory import Memory, Place
from tests.fuzz.pools import Pool, pools
from tests.fuzz.values import Values

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

#: What may have a gradient.
SOURCES = ("input", "residual", "weight", "bias")


ORDINARY, IDENTITY = Values(), Act()


@dataclass(frozen=True)
class Spec:
    """What a tensor holds, and where."""

    values: Values = ORDINARY
    place: Place | None = None

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Memory:
        place = memory.contiguous(shape) if self.place is None else self.place
        return Memory(self.values.fill(shape), place, dtype)


@dataclass(frozen=True)
class Problem:
    """A call of ``batch_norm_act``, without its tensors. Its representation can be put into a test.

    Attributes:
        running: mean and variance, or None.
        wanted: of SOURCES, what needs a gradient.
        same: pairs of names that are one tensor.
        from_views: whether sources are results of an operation, not leaves.
        seed: of the generator before the call.
        past_the_caches: results are written as those are that the caches cannot hold.
        surroundings: of SURROUNDINGS, those that the call is made in.
    """

    shape: tuple[int, ...] = (4, 5, 6, 7)
    dtype: torch.dtype = f32
    param_dtype: torch.dtype = f32
    input: Spec = Spec()
    grad_output: Spec = Spec(Values(1))
    residual: Spec | None = None
    weight: Spec | None = Spec(Values(2, ((1.0, 0.3),)), Place((1,)))
    bias: Spec | None = Spec(Values(3), Place((1,)))
    running: tuple[Spec, Spec] | None = (
        Spec(Values(4), Place((1,))),
        Spec(Values(5, ((2.0, 0.5),), (), True), Place((1,))),
    )
    batches: int | None = 3
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    act: Act = IDENTITY
    drop_p: float = 0.0
    drop_mode: str = "channel"
    pool: Pool | None = None
    stochastic: bool | None = None
    wanted: frozenset[str] = frozenset(SOURCES)
    same: frozenset[tuple[str, str]] = frozenset()
    from_views: bool = False
    seed: int = 0
    capability: str = "avx512"
    past_the_caches: bool = False
    threads: int = 1
    surroundings: frozenset[str] = frozenset()

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.shape if self.pool is None else self.pool.shape(self.shape)

    @property
    def drops(self) -> bool:
        return self.training if self.stochastic is None else self.stochastic

    @property
    def has_kernel_that_pools(self) -> bool:
        """Whether there is one for the call with its pool."""
        if self.pool is None:
            return False
        drops_elements = self.drops and self.drop_p > 0 and self.drop_mode == "element"
        few = math.prod(self.pool.kernel_size) <= 256 and len(self.pool.kernel_size) < 3
        return few and self.residual is None and not drops_elements


@dataclass
class Tensors:
    """The tensors of a problem, for one run.

    Attributes:
        taken: of each window of the pool, the index of the element that exact arithmetic takes, if it is known.
        special: the channels in which that does not count (C,).
    """

    problem: Problem
    input: Tensor
    grad_output: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    mask: Tensor | None
    memories: dict[str, Memory] = field(default_factory=dict)
    taken: Tensor | None = None
    special: Tensor | None = None

    def sources(self) -> dict[str, Tensor]:
        """What has a gradient."""
        return {name: t for name in SOURCES if (t := getattr(self, name)) is not None and t.requires_grad}

    def fresh(self, dtype: torch.dtype | None = None) -> Tensors:
        """Tensors of their own with the same values, in `dtype` if it is given; what was one tensor is two.

        Full-size ones keep their layout as far as it is dense: torch has other kernels for channels_last. Per-channel
        ones are contiguous, which torch's kernels take for granted.
        """

        def copy(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            new = t.detach().resolve_neg().clone(memory_format=torch.preserve_format)
            new = new.to(dtype) if dtype is not None and t.is_floating_point() else new
            return new.requires_grad_(t.requires_grad)

        kept = ("problem", "mask", "memories", "taken", "special")
        copies: dict[str, Any] = {
            f.name: copy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in kept
        }
        fresh = dataclasses.replace(self, memories={}, **copies)
        if self.problem.pool is None:
            # In the input's layout: in others torch's backward is at times wrong.
            fresh.grad_output = torch.empty_like(fresh.input).copy_(fresh.grad_output)
        return fresh


def make(problem: Problem, gpu: bool = False) -> Tensors:
    """The tensors of `problem`; always the same values for the same problem.

    Args:
        problem: the call.
        gpu: whether kernels for GPUs drop elements, by numbers of their own.
    """
    p, channels = problem, (problem.shape[1],)
    memories: dict[str, Memory] = {
        "input": p.input.make(p.shape, p.dtype),
        "grad_output": p.grad_output.make(p.output_shape, p.dtype),
    }
    vectors = {"weight": p.weight, "bias": p.bias}
    if p.running is not None:
        vectors |= zip(("running_mean", "running_var"), p.running, strict=True)
    if p.residual is not None:
        memories["residual"] = p.residual.make(p.shape, p.dtype)
    memories |= {name: spec.make(channels, p.param_dtype) for name, spec in vectors.items() if spec is not None}
    for name, other in p.same:
        if name in memories and other in memories:
            memories[name] = memories[other]
    tensors = {name: m.tensor for name, m in memories.items()}
    leaves: dict[int, Tensor] = {}
    for name in SOURCES:
        if name in tensors:
            t = tensors[name]
            if id(t) not in leaves:
                leaf = t.detach().requires_grad_(name in p.wanted)
                leaves[id(t)] = leaf.view_as(leaf) if p.from_views else leaf
            tensors[name] = leaves[id(t)]
    optional = {name: tensors.get(name) for name in (*SOURCES[1:], "running_mean", "running_var")}
    batches = None if p.batches is None or p.running is None else torch.tensor(p.batches)
    return Tensors(
        problem, tensors["input"], tensors["grad_output"], **optional,
        num_batches_tracked=batches, mask=_mask(p, tensors["input"], gpu), memories=memories,
    )  # fmt: skip


def _mask(p: Problem, input: Tensor, gpu: bool) -> Tensor | None:
    """Which elements torch's dropout keeps, of the shape of the input; or that of the kernels for GPUs."""
    if not p.drops or p.drop_p == 0 or input.numel() == 0:
        return None
    torch.manual_seed(p.seed)
    if gpu and p.drop_mode == "element":
        seed = masks.draw_for_gpu_kernels(input.detach(), p.drop_p, p.drop_mode, True)
        assert seed is not None
        return fl.reference.element_mask(seed, input.detach(), masks.scale(p.drop_p))
    ones = torch.ones_like(input.detach())
    drop = torch.dropout if p.drop_mode == "element" else torch.feature_dropout
    return drop(ones, p.drop_p, True) != 0


#: "filled" has torch fill new memory with NaN.
SURROUNDINGS = ("no_grad", "inference_mode", "autocast", "float64 by default", "filled")

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 129)


@st.composite
def shapes(draw: st.DrawFn, most: int = 3000, ranks: tuple[int, int] = (2, 6)) -> tuple[int, ...]:
    """(N, C, ...) with up to `most` elements, at times none."""
    rank = draw(st.integers(*ranks))
    if draw(st.integers(0, 2)):
        sizes = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    else:
        sizes = draw(st.lists(st.sampled_from(SIZES), min_size=rank, max_size=rank))
    if draw(st.integers(0, 49)) == 49:
        sizes[draw(st.integers(0, rank - 1))] = 0
    left, limited = most, []
    for size in sizes:
        limited.append(min(size, max(left, 1)))
        left //= max(limited[-1], 1)
    return tuple(limited)


@st.composite
def specs(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    content: st.SearchStrategy[Values],
    negated: bool = True,
    overlapping: bool = True,
) -> Spec:
    """A tensor of full size; `negated`, and with elements that share memory (`overlapping`), at times."""
    return Spec(draw(content), draw(memory.places(shape, negated, overlapping)))


@st.composite
def vectors(draw: st.DrawFn, mean: float, std: float, positive: bool = False, overlapping: bool = True) -> Spec:
    return Spec(draw(values.per_channel((mean, std), positive)), draw(memory.vector_places(overlapping)))


def dtypes() -> st.SearchStrategy[tuple[torch.dtype, torch.dtype]]:
    """Of full-size tensors, and of parameters and statistics."""
    return st.sampled_from(((f32, f32), (f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)))


def available(name: str) -> bool:
    before = fl.ops.cpu_capability()
    try:
        fl.ops.set_cpu_capability(name)
    except RuntimeError:
        return False
    fl.ops.set_cpu_capability(before)
    return True


@functools.cache
def _torch_refuses_zero_eps() -> bool:
    """Also in evaluation, as 2.11 does."""
    try:
        F.batch_norm(torch.ones(1, 1), torch.zeros(1), torch.ones(1), eps=0.0)
    except ValueError:
        return True
    return False


@st.composite
def problems(
    draw: st.DrawFn,
    most: int = 3000,
    probabilities: tuple[float, ...] = (0.0, 0.3, 0.5, 1.0, 0.9999),
    pooled: bool = False,
) -> Problem:
    """Every valid call there is, as far as its tensors have at most `most` elements; `pooled` ones have a pool."""
    dtype, param_dtype = draw(dtypes())
    training = draw(st.booleans())
    stochastic = draw(st.sampled_from((None, None, None, True, False)))
    ranks = (3, 5) if pooled else (2, 6)
    shape = draw(shapes(most, ranks).filter(lambda s: s[1] != 0 and (not training or math.prod(s) != s[1])))
    pool = draw(pools(shape)) if pooled else None
    act = draw(acts)
    drops = training if stochastic is None else stochastic
    if act.name == "RReLU" and drops:
        stochastic = drops = False

    def vector(mean: float, std: float) -> Spec | None:
        return draw(st.none() | vectors(mean, std))

    tracks = not training or draw(st.booleans())
    running = (
        draw(vectors(0.0, 1.0, overlapping=not training)),
        draw(vectors(2.0, 0.5, True, overlapping=not training)),
    )
    batches = draw(st.none() | st.integers(0, 3))
    momenta = (0.1, 0.1, 0.0, 1.0, 0.37, -0.5, 3) + ((None,) if batches is not None or not training else ())
    epsilons = (1e-5, 1e-5, 1e-3, 1.0, 1e-12, 1e-38, 1e-60, 1e6) + (
        () if training or _torch_refuses_zero_eps() else (0.0,)
    )
    # With a pool most calls are to be those that are fused.
    residual = (
        None
        if pool is not None and draw(st.integers(0, 4))
        else draw(st.none() | specs(shape, values.full_size(dtype)))
    )
    pairs = st.sampled_from(_PAIRS[:2] if pool is not None else _PAIRS)
    same = frozenset({draw(pairs)}) if draw(st.integers(0, 4)) == 4 else frozenset()
    outputs = shape if pool is None else pool.shape(shape)
    return Problem(
        shape=shape,
        dtype=dtype,
        param_dtype=param_dtype,
        input=draw(specs(shape, values.full_size(dtype))),
        # Where a window has two largest elements its gradient has to be made zero, without touching others.
        grad_output=draw(specs(outputs, values.gradients(dtype), overlapping=pool is None)),
        residual=residual,
        weight=vector(1.0, 0.3),
        bias=vector(0.0, 1.0),
        running=running if tracks else None,
        batches=batches,
        training=training,
        momentum=draw(st.sampled_from(momenta)),
        eps=draw(st.sampled_from(epsilons)),
        act=act,
        drop_p=draw(st.sampled_from(probabilities)),
        drop_mode=draw(st.sampled_from(("channel", "element"))),
        pool=pool,
        stochastic=stochastic,
        wanted=draw(st.frozensets(st.sampled_from(SOURCES))) if draw(st.booleans()) else frozenset(SOURCES),
        same=same,
        from_views=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
        capability=draw(st.sampled_from([c for c in CAPABILITIES if available(c)])),
        past_the_caches=draw(st.booleans()),
        threads=draw(st.sampled_from((1, 1, 1, 2, 3))),
        surroundings=draw(st.frozensets(st.sampled_from(SURROUNDINGS), max_size=2))
        if draw(st.booleans())
        else frozenset(),
    )


#: What may be one tensor.
_PAIRS = (("residual", "input"), ("bias", "weight"), ("grad_output", "input"))
