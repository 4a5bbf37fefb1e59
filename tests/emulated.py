"""Calls the emulated CUDA kernels on tensors: buffers stand between canaries, and what is to be written is NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlayers import activations, masks, pooling
from tests import oracle, philox
from tests.cases import ACTIVATIONS, Case, Sample, make_sample
from tests.layouts import LAYOUTS
from tests.oracle import Results

_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}

#: GPUs by what they make the plan choose: processors, shared memory of a block and of a processor, blocks of a cluster.
GPUS = {
    # The emulator runs at most 64 blocks of a cooperative grid.
    "hopper": (16, 232448, 233472, 8),
    "turing": (4, 65536, 65536, 1),
    "one processor": (1, 232448, 233472, 1),
    # So little memory that small planes need a cluster, or two kernels. Rows need more.
    "little memory": (4, 5200, 12800, 8),
    "least memory": (4, 1024, 4096, 1),
}

#: Multiples of 16 bytes. A sanitizer sees what is next to a buffer, so there it has none.
_GUARD_BYTES = 64
_CANARY, _POISON = 0xA5, 0xFF
#: What is spread over more memory than this is not copied, and has no canaries.
_TOO_LARGE_TO_COPY = 2**30


class Memory:
    """The buffers of one call."""

    def __init__(self, guarded: bool) -> None:
        self._guard = _GUARD_BYTES if guarded else 0
        self._all: list[tuple[Tensor, Tensor | None]] = []

    def _bytes(self, count: int) -> Tensor:
        """`count` bytes, poisoned, at a multiple of 16 bytes."""
        whole = torch.full((count + 2 * self._guard,), _CANARY, dtype=torch.uint8)
        inner = whole[self._guard : self._guard + count].fill_(_POISON)
        self._all.append((whole, None))
        return inner

    def empty(self, size: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """For a result. A floating one that nobody writes stays NaN."""
        count = torch.Size(size).numel() * dtype.itemsize
        return self._bytes(count).view(dtype).view(size)

    def copy(self, t: Tensor) -> Tensor:
        """With the same values, strides and offset."""
        storage = t.untyped_storage()
        inner = self._bytes(len(storage)).copy_(torch.tensor([], dtype=torch.uint8).set_(storage))
        whole = inner.view(t.dtype)
        return whole.as_strided(t.shape, t.stride(), whole.storage_offset() + t.storage_offset())

    def constant(self, t: Tensor) -> Tensor:
        """The same, for what only is read."""
        if len(t.untyped_storage()) > _TOO_LARGE_TO_COPY:
            return t
        copy = self.copy(t)
        whole = self._all[-1][0]
        self._all[-1] = (whole, whole.clone())
        return copy

    def check(self) -> None:
        """No canary was touched, and nothing that only is read."""
        for whole, before in self._all:
            end = len(whole) - self._guard
            assert (whole[: self._guard] == _CANARY).all(), "written before a buffer"
            assert (whole[end:] == _CANARY).all(), "written behind a buffer"
            assert before is None or torch.equal(whole, before), "written to what only is read"


@dataclass(frozen=True)
class Emulation:
    """The emulated kernels, on one of GPUS, in one order of threads."""

    module: ModuleType
    gpu: str = "hopper"
    order: str = "up"
    guarded: bool = True
    #: The plans of the calls so far.
    plans: list[Any] = field(default_factory=list)

    def device(self, rows: bool) -> Any:
        """What the plan knows of the GPU."""
        processors, shared_bytes, per_processor, cluster = GPUS[self.gpu]
        enough = GPUS["turing"][1]
        return self.module.Device(
            processors, max(shared_bytes, enough) if rows else shared_bytes, max(per_processor, shared_bytes), cluster
        )

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """For the duration of a block, threads take turns in the order of this emulation."""
        self.module.set_order(getattr(self.module.Order, self.order), seed=7)
        try:
            yield
        finally:
            self.module.set_order(self.module.Order.up)

    def memory(self) -> Memory:
        """For one call."""
        return Memory(self.guarded)


def dtype_of(module: ModuleType, dtype: torch.dtype) -> Any:
    """The kernels' name of a dtype."""
    return getattr(module.Dtype, _DTYPES[dtype])


def is_rows(t: Tensor) -> bool:
    """Whether a result in the layout of `t` has the channels of one position adjacent."""
    dense = torch.empty_like(t)
    return t.dim() == 2 or t.numel() == t.shape[0] * t.shape[1] or (dense.stride(1) == 1 and t.shape[1] > 1)


def shape_of(module: ModuleType, t: Tensor) -> Any:
    """What the kernels are told of the layout of a result like `t`."""
    return module.Shape(is_rows(t), t.shape[0], t.shape[1], t.numel() // (t.shape[0] * t.shape[1]))


def in_memory_order(t: Tensor, rows: bool) -> Tensor:
    """The elements in the order in which a dense result holds them."""
    return t.movedim(1, -1).flatten() if rows else t.flatten()


def from_memory_order(flat: Tensor, like: Tensor, rows: bool) -> Tensor:
    """The inverse: elements in the shape of `like`."""
    if not rows:
        return flat.view(like.shape)
    sizes = (like.shape[0], *like.shape[2:], like.shape[1])
    return flat.view(sizes).movedim(-1, 1)


def _view(t: Tensor, rows: bool) -> Tensor:
    """`t` as (rows, C) or (N, C, S), the last dimension adjacent; a copy where its strides do not allow it."""
    n, c = t.shape[:2]
    try:
        view = t.movedim(1, -1).view(-1, c) if rows else t.view(n, c, -1)
    except RuntimeError:
        return _view(LAYOUTS["channels_last" if rows else "contiguous"](t), rows)
    if view.stride(-1) == 1 or view.shape[-1] == 1:
        return view
    return _view(LAYOUTS["channels_last" if rows else "contiguous"](t), rows)


class Call:
    """The arguments of one call of a kernel: keeps the memory alive to which they point."""

    def __init__(self, emulation: Emulation, like: Tensor) -> None:
        self.emulation, self.module = emulation, emulation.module
        self.like, self.rows = like, is_rows(like)
        self.memory = emulation.memory()
        self._alive: list[Tensor] = []

    def source(self, t: Tensor | None) -> Any:
        """A full-size tensor that is read."""
        if t is None:
            return self.module.Source(0, 0, 0)
        view = self.memory.constant(_view(t.detach(), self.rows))
        return self.module.Source(*self._place(view))

    def result(self, dtype: torch.dtype, like: Tensor | None = None) -> tuple[Tensor, Any]:
        """A tensor to be written, full-size or of the shape of `like`, and the target that says so."""
        like = self.like if like is None else like
        flat = self.memory.empty((like.numel(),), dtype)
        result = from_memory_order(flat, like, self.rows)
        return result, self.module.Target(*self._place(_view(result, self.rows)))

    def _place(self, view: Tensor) -> tuple[int, int, int]:
        inner = 0 if self.rows else view.stride(1)
        return view.data_ptr(), view.stride(0), inner

    def channels(self, t: Tensor | None) -> Any:
        """A parameter or statistic that is read."""
        if t is None:
            return self.module.ChannelSource(0, self.module.Dtype.f32, 1)
        copy = self.memory.constant(t.detach())
        return self.module.ChannelSource(copy.data_ptr(), dtype_of(self.module, t.dtype), t.stride(0))

    def channel_target(self, t: Tensor | None) -> Any:
        """One of this call's memory that is written."""
        if t is None:
            return self.module.ChannelTarget(0, self.module.Dtype.f32, 1)
        return self.module.ChannelTarget(t.data_ptr(), dtype_of(self.module, t.dtype), t.stride(0))

    def keep(self, mask: MaskArgument | None, p: float) -> Any:
        """What dropout keeps."""
        keep = self.module.Keep()
        if mask is None:
            return keep
        keep.scale = masks.scale(p)
        if mask.planes is not None:
            planes = self.memory.constant(mask.planes)
            keep.planes, keep.plane_bytes = planes.data_ptr(), planes.element_size()
        else:
            keep.seed = self.memory.constant(torch.tensor([mask.seed])).data_ptr()
        return keep

    def workspace(self, plan: Any) -> int:
        """The address of what the plan asks for, poisoned."""
        return self.memory.empty((plan.workspace_bytes,), torch.uint8).data_ptr()


@dataclass(frozen=True)
class MaskArgument:
    """What kernels are given for a mask: one value per plane, of any dtype, or a seed."""

    planes: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class EmulatedSample:
    """A sample whose mask the kernels know, too."""

    sample: Sample
    mask: MaskArgument | None


def make_emulated_sample(
    case: Case, mask_dtype: torch.dtype = torch.bool, seed: int = -(2**62) + 12345
) -> EmulatedSample:
    """The tensors of `case`; an element-wise mask is that of `seed`."""
    sample = make_sample(case, torch.device("cpu"))
    if sample.mask is None:
        return EmulatedSample(sample, None)
    if case.drop_mode == "channel":
        return EmulatedSample(sample, MaskArgument(planes=sample.mask.to(mask_dtype)))
    flat = philox.kept(seed, sample.input.numel(), case.drop_p)
    mask = from_memory_order(flat, sample.input, is_rows(sample.input))
    return EmulatedSample(dataclasses.replace(sample, mask=mask), MaskArgument(seed=seed))


@dataclass(frozen=True)
class Wanted:
    """Which gradients backward is asked for."""

    input: bool = True
    parameters: bool = True
    residual: bool = True


def run(emulation: Emulation, emulated: EmulatedSample, wanted: Wanted = Wanted()) -> Results:
    """What `tests.oracle.run` finds of the sample, by the emulated kernels; of gradients, those that are wanted."""
    sample, case = emulated.sample, emulated.sample.case
    activation = activations.resolve(ACTIVATIONS[case.act])
    with emulation.in_order():
        if case.pool is not None:
            pooled = PooledForward(emulation, emulated, activation)
            return pooled.results | _PooledBackward(emulation, emulated, activation, pooled, wanted).results
        save_bits = sample.residual is not None and activation.derivatives is not None
        forward = Forward(emulation, emulated, activation, save_bits)
        return forward.results | _Backward(emulation, emulated, activation, forward, wanted).results


def check(emulation: Emulation, case: Case, mask_dtype: torch.dtype = torch.bool) -> list[Any]:
    """Compares all results of a case with the oracle; the plans of forward and backward."""
    given = make_emulated_sample(case, mask_dtype)
    sample = given.sample
    results = run(emulation, given)
    exact = oracle.run(oracle.exact, sample.fresh(torch.float64))
    oracle.compare(results, sample, exact, oracle.run(oracle.eager, sample.fresh()))
    return emulation.plans[-2:]


def with_options(emulation: Emulation, **options: Any) -> Emulation:
    """The same kernels on another of GPUS, or in another order."""
    return dataclasses.replace(emulation, **options, plans=[])


def with_gaps(t: Tensor) -> Tensor:
    """The same values, with NaN between each two in memory."""
    return torch.stack((t, torch.full_like(t, float("nan"))), 1)[:, 0]


def far_apart(t: Tensor) -> Tensor:
    """The same values, with more than 2^31 elements between samples; memory that nobody touches takes none."""
    distance = 2**31 + 24
    elements = (t.shape[0] - 1) * distance + t[0].numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    flat = torch.frombuffer(mmap.mmap(-1, elements * t.element_size(), flags=flags), dtype=t.dtype)
    return flat.as_strided(t.shape, (distance, *t.stride()[1:])).copy_(t)


class _AnyCall:
    """One call of the kernels, forward or backward, pooling or not: its arguments and results."""

    def __init__(
        self, args: Any, emulation: Emulation, emulated: EmulatedSample, activation: activations.Activation
    ) -> None:
        sample, case, module = emulated.sample, emulated.sample.case, emulation.module
        self.args, self.call = args, (call := Call(emulation, sample.input))
        args.shape, args.dtype = shape_of(module, sample.input), dtype_of(module, case.dtype)
        args.activation = module.ActivationCall(activation.code, activation.params)
        args.keep = call.keep(emulated.mask, case.drop_p)
        args.weight, args.bias = call.channels(sample.weight), call.channels(sample.bias)
        args.training = case.training
        self.results: Results = {}

    def finish(self, plan: Any, kernels: Any) -> None:
        """Runs the kernels as planned."""
        self.call.emulation.plans.append(plan)
        kernels(self.args, plan, self.call.workspace(plan))
        self.call.memory.check()


class _AnyForward(_AnyCall):
    """What one call of forward is given, whether it pools or not, and what it saves for backward."""

    def __init__(
        self, args: Any, emulation: Emulation, emulated: EmulatedSample, activation: activations.Activation
    ) -> None:
        super().__init__(args, emulation, emulated, activation)
        sample, case, call = emulated.sample, emulated.sample.case, self.call
        args.input, args.residual = call.source(sample.input), call.source(sample.residual)
        state = {
            name: call.memory.copy(t)
            for name in ("running_mean", "running_var", "num_batches_tracked")
            if (t := getattr(sample, name)) is not None
        }
        args.running_mean = call.channel_target(state.get("running_mean"))
        args.running_var = call.channel_target(state.get("running_var"))
        if case.training and "num_batches_tracked" in state:
            args.num_batches_tracked = state["num_batches_tracked"].data_ptr()
        args.eps, args.momentum, args.cumulative = case.eps, case.momentum or 0.0, case.momentum is None
        self.mean, self.invstd = (call.memory.empty((case.shape[1],), torch.float64) for _ in range(2))
        args.mean, args.invstd = self.mean.data_ptr(), self.invstd.data_ptr()
        self.results |= state


class Forward(_AnyForward):
    """One call of forward: its results, and what it saves for backward."""

    def __init__(
        self, emulation: Emulation, emulated: EmulatedSample, activation: activations.Activation, save_bits: bool
    ) -> None:
        module = emulation.module
        super().__init__(module.ForwardArgs(), emulation, emulated, activation)
        args, call = self.args, self.call
        self.results["output"], args.output = call.result(emulated.sample.case.dtype)
        self.flat_bits = call.memory.empty((module.flat_bits_bytes(args.shape),), torch.uint8) if save_bits else None
        args.flat_bits = 0 if self.flat_bits is None else self.flat_bits.data_ptr()
        self.finish(module.plan_forward(args, emulation.device(call.rows)), module.batch_norm_act_forward)


def _pool_of(module: ModuleType, sample: Sample) -> tuple[Any, Tensor]:
    """What the kernels are told of the pool, and a tensor of the shape of what comes out."""
    pool = pooling.resolve(sample.case.pool_layer, sample.input.dim() - 2)
    assert pool is not None
    *_, height, width = (1, *sample.input.shape[2:])
    sizes = pool.output_size(sample.input.shape[2:])
    return module.Pool(height, width, pool.window, pool.ceil_mode), sample.input.new_empty(
        sample.input.shape[:2] + sizes
    )


class PooledForward(_AnyForward):
    """The same with the pool of the case: `selected` and `positions` are None where they are not saved."""

    def __init__(
        self,
        emulation: Emulation,
        emulated: EmulatedSample,
        activation: activations.Activation,
        save: bool = True,
    ) -> None:
        module, case = emulation.module, emulated.sample.case
        super().__init__(module.PooledForwardArgs(), emulation, emulated, activation)
        args, call = self.args, self.call
        args.pool, like = _pool_of(module, emulated.sample)
        args.monotone = activation.monotone
        self.results["output"], args.output = call.result(case.dtype, like)
        self.selected: Tensor | None = None
        self.positions: Tensor | None = None
        if save:
            self.selected, selected = call.result(case.dtype, like)
            self.positions, positions = call.result(torch.uint8, like)
            args.selected, args.positions = selected.data, positions.data
        self.finish(module.plan_pooled_forward(args, emulation.device(call.rows)), module.batch_norm_act_pool_forward)


class _AnyBackward(_AnyCall):
    def __init__(
        self,
        args: Any,
        emulation: Emulation,
        emulated: EmulatedSample,
        activation: activations.Activation,
        forward: _AnyForward,
        wanted: Wanted,
    ) -> None:
        super().__init__(args, emulation, emulated, activation)
        sample, case, call = emulated.sample, emulated.sample.case, self.call
        args.grad_output = call.source(sample.grad_output)
        if wanted.input:
            self.results["gradient of input"], args.grad_input = call.result(case.dtype)
        for name, parameter in (("weight", sample.weight), ("bias", sample.bias)):
            if parameter is None or not wanted.parameters or (name == "weight" and case.affine == "frozen weight"):
                continue
            gradient = call.memory.empty(parameter.shape, parameter.dtype)
            self.results[f"gradient of {name}"] = gradient
            setattr(args, f"grad_{name}", call.channel_target(gradient))
        args.mean = call.memory.constant(forward.mean).data_ptr()
        args.invstd = call.memory.constant(forward.invstd).data_ptr()


class _Backward(_AnyBackward):
    def __init__(
        self,
        emulation: Emulation,
        emulated: EmulatedSample,
        activation: activations.Activation,
        forward: Forward,
        wanted: Wanted,
    ) -> None:
        sample, module = emulated.sample, emulation.module
        super().__init__(module.BackwardArgs(), emulation, emulated, activation, forward, wanted)
        args, call = self.args, self.call
        args.input = call.source(sample.input)
        if forward.flat_bits is not None:
            args.flat_bits = call.memory.constant(forward.flat_bits).data_ptr()
        elif activation.code != activations.IDENTITY.code:
            args.residual = call.source(sample.residual)
        if wanted.residual and sample.residual is not None:
            self.results["gradient of residual"], args.grad_residual = call.result(sample.case.dtype)
        self.finish(module.plan_backward(args, emulation.device(call.rows)), module.batch_norm_act_backward)


class _PooledBackward(_AnyBackward):
    def __init__(
        self,
        emulation: Emulation,
        emulated: EmulatedSample,
        activation: activations.Activation,
        forward: PooledForward,
        wanted: Wanted,
    ) -> None:
        sample, module = emulated.sample, emulation.module
        super().__init__(module.PooledBackwardArgs(), emulation, emulated, activation, forward, wanted)
        args, call = self.args, self.call
        args.pool, _ = _pool_of(module, sample)
        if sample.case.training:  # read in training only
            args.whole_input = call.source(sample.input)
        args.input, args.positions = call.source(forward.selected), call.source(forward.positions).data
        self.finish(module.plan_pooled_backward(args, emulation.device(call.rows)), module.batch_norm_act_pool_backward)


def check_unwanted(emulation: Emulation, given: EmulatedSample, wanted: Wanted) -> None:
    """Gradients that nobody wants are not computed, and the others are the same."""
    everything, some = run(emulation, given), run(emulation, given, wanted)
    assert 0 < len(some) < len(everything)
    for name, got in some.items():
        torch.testing.assert_close(got, everything[name], msg=name)


def check_same(emulation: Emulation, given: EmulatedSample, **tensors: Any) -> None:
    """The same bits with other `tensors` of the same values in the sample."""
    other = dataclasses.replace(given, sample=dataclasses.replace(given.sample, **tensors))
    expected = run(emulation, given)
    for name, got in run(emulation, other).items():
        assert torch.equal(got, expected[name]), name


def gaps_of(sample: Sample) -> dict[str, Any]:
    """Parameters and statistics with gaps."""
    return {name: with_gaps(getattr(sample, name)) for name in ("weight", "bias", "running_mean", "running_var")}
