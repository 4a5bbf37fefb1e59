"""What each operator does on the host: allocates results, plans launches and launches kernels.

Arguments are those of the schemas in csrc/torch/schemas.h. A first call compiles; what it compiled serves every batch
size. Nothing is kept between calls but plans of launches.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastlayers import checks
from fastlayers.pooling import MOST_POSITIONS, Pool
from fastlayers.triton import backward, forward, pooling
from fastlayers.triton import dropout as dropping
from fastlayers.triton.launches import launch
from fastlayers.triton.layouts import Layout, dense_strides, is_rows, layout_of, strides_in
from fastlayers.triton.plans import Frame, PoolFrame, frame_of, pool_frame_of
from fastlayers.triton.tiles import ALL, ELEMENTS, PLANES

#: Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when they were defined.
INTERPRETED = isinstance(forward.normalise, InterpretedFunction)

_ThreeTensors = tuple[Tensor, Tensor, Tensor]
_FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]
_FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# The sizes that each kernel takes, in its order.
_AXES = ("n_outer", "n_inner", "channels", "spatial")
_TILES = ("tiles_inner", "tiles", "tiles_per_part")
_X, _R, _Y, _G, _P = ((f"{name}_outer", f"{name}_channel") for name in "xrygp")
_STATISTICS = ("n_outer", "n_inner", "channels", *_TILES, "count", *_X)
_MERGE_STATISTICS = ("channels", "parts", "count")
_NORMALISE = (*_AXES, *_TILES, "bytes_inner", *_X, *_R, *_Y)
_WHOLE_FORWARD = (*_AXES, "count", "bytes_inner", *_X, *_R, *_Y)
_SUMS = (*_AXES, *_TILES, "bytes_inner", *_G, *_X, *_R, *_Y)
_MERGE_SUMS = ("channels", "parts")
_INPUT_GRADIENT = (*_AXES, "count", *_TILES, "bytes_inner", *_G, *_X, *_R, *_Y)
_WHOLE_BACKWARD = (*_AXES, "count", "bytes_inner", *_G, *_X, *_R, *_Y)
_DROP = (*_AXES, *_TILES, *_X, *_Y)
_PLANES = ("height", "width", "pooled_height", "pooled_width")
_POOL = (
    "pooled_outer", "pooled_inner", "channels", *(f"pooled_{name}" for name in _TILES), *_PLANES, *_X, *_P,
)  # fmt: skip
_WHOLE_POOL = ("n_outer", "n_inner", "channels", "count", "pooled_outer", "pooled_inner", *_PLANES, *_X, *_P)
_POOL_GRADIENT = ("n_outer", "n_inner", "channels", "count", *_TILES, *_PLANES, *_X, *_Y, *_P)


class _Plan(NamedTuple):
    """Launches for tensors of given strides.

    Attributes:
        strides: of the dense result as the kernels write it, or of a tensor that is copied over it afterwards.
        copied: the arguments that do not lie regularly and are copied to these strides.
        irregular: whether the result is such a copy.
    """

    frame: Frame
    strides: tuple[int, ...]
    copied: frozenset[str]
    irregular: bool


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dense: tuple[int, ...],
    tensors: tuple[tuple[str, tuple[int, ...] | None], ...],
) -> _Plan:
    """For a dense result of these strides, and arguments of full size given by theirs."""
    layout = layout_of(shape, is_rows(shape, dense))
    irregular = strides_in(layout, shape, dense) is None
    if irregular:
        dense = torch.empty(shape, device="meta").stride()
        layout = layout_of(shape, is_rows(shape, dense))
    copied = frozenset(
        name for name, strides in tensors if strides is not None and strides_in(layout, shape, strides) is None
    )
    walked: dict[str, Sequence[int] | None] = {name: dense if name in copied else strides for name, strides in tensors}
    return _Plan(frame_of(shape, dtype, layout.rows, {**walked, "y": dense}), dense, copied, irregular)


def _plan_for(output: Tensor, **tensors: Tensor | None) -> _Plan:
    named = tuple((name, None if t is None else t.stride()) for name, t in tensors.items())
    return _plan(tuple(output.shape), output.dtype, output.stride(), named)


def _source(plan: _Plan, name: str, t: Tensor) -> Tensor:
    """An argument as the kernels walk it."""
    return t.new_empty_strided(t.shape, plan.strides).copy_(t) if name in plan.copied else t


def _target(plan: _Plan, result: Tensor) -> Tensor:
    """Where the kernels write a result of full size."""
    return result.new_empty_strided(result.shape, plan.strides) if plan.irregular else result


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


class _Call(NamedTuple):
    """What the kernels are told besides tensors and sizes."""

    keep: int
    drop_scale: float
    activation: tuple[object, ...] = ()  # its number and three parameters
    # For forward.
    eps: float = 0.0
    momentum: float = 0.0
    cumulative: bool = False

    @property
    def dropping(self) -> tuple[float, int]:
        """The scale of what is kept, and the largest random word that keeps an element, minus 2**31."""
        if self.keep != ELEMENTS.value:
            return self.drop_scale, 0
        threshold = round(2**32 / self.drop_scale) if self.drop_scale else 0
        return self.drop_scale, max(threshold - 1, 0) - 2**31

    @property
    def constants(self) -> tuple[object, ...]:
        """KEEP, ACT, A, B, C."""
        return (self.keep, *self.activation)


def _keep(mask: Tensor | None) -> int:
    """How dropout is told to the kernels: see tiles.py."""
    mode: int = (ALL if mask is None else ELEMENTS if _is_seed(mask) else PLANES).value
    return mode


def _is_seed(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int64


def _on_device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which may be another."""
    if t.device.type == "cpu":
        return contextlib.nullcontext()
    module = getattr(torch, t.device.type)
    return contextlib.nullcontext() if t.device.index == module.current_device() else module.device(t.device)


def _check(
    input: Tensor, mask: Tensor | None, full_size: dict[str, Tensor | None], per_channel: dict[str, Tensor | None]
) -> None:
    shape, device = input.shape, input.device
    if len(shape) < 2:
        raise RuntimeError(f"input should have at least 2 dimensions (N, C, ...), not {len(shape)}")
    for name, t in full_size.items():
        if t is not None and (t.shape != shape or t.device != device):
            raise RuntimeError(f"{name} should have the shape and device of input")
    channels = shape[1]
    for name, t in per_channel.items():
        if t is not None and (t.dim() != 1 or t.shape[0] != channels or t.device != device):
            raise RuntimeError(f"{name} should be of shape ({channels},) and on the device of input")
    _check_mask(input, mask)


def _check_statistics(training: bool, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("running_mean and running_var must be defined in evaluation mode")


def _check_mask(input: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    expected = (1,) if _is_seed(mask) else input.shape[:2]
    if mask.shape != expected or mask.device != input.device:
        raise RuntimeError(
            f"mask should be a seed, one int64, or of shape {tuple(input.shape[:2])}, and on the device of input, but "
            f"has dtype {mask.dtype} and shape {tuple(mask.shape)}"
        )


def batch_norm_act_fwd(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    activation_params: Sequence[float],
    drop_scale: float,
    save_flat_bits: bool,
) -> _FourTensors:
    """See csrc/torch/schemas.h."""
    _check(
        input,
        mask,
        {"residual": residual},
        {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var},
    )
    _check_statistics(training, running_mean, running_var)
    output = torch.empty_like(input)
    channels = input.shape[1]
    mean = input.new_empty(channels, dtype=torch.float64)
    invstd = torch.empty_like(mean)
    batches = num_batches_tracked if training and running_mean is not None else None
    if input.numel() == 0:
        if batches is not None:
            batches.add_(1)
        bits = input.new_empty(bytes_of_bits(output) if save_flat_bits else 0, dtype=torch.uint8)
        return output, mean.zero_(), invstd.zero_(), bits
    plan = _plan_for(output, x=input, r=residual)
    if plan.irregular and mask is not None and _is_seed(mask):
        # Which elements it drops is by their place in the output; the kernels see those of its copy.
        kept, *others = batch_norm_act_fwd(
            input, weight, bias, residual, None, running_mean, running_var, num_batches_tracked, training, momentum,
            eps, activation, activation_params, 1.0, save_flat_bits,
        )  # fmt: skip
        return dropout(kept, mask, drop_scale), others[0], others[1], others[2]
    bits = input.new_empty(plan.frame.layout.bytes_of_bits if save_flat_bits else 0, dtype=torch.uint8)
    _count_first(batches, momentum)
    states = (_contiguous(running_mean), _contiguous(running_var))
    target = _target(plan, output)
    tensors = _Forward(
        _source(plan, "x", input), None if residual is None else _source(plan, "r", residual), target,
        bits if save_flat_bits else None, _contiguous(mask), _contiguous(weight), _contiguous(bias), mean, invstd,
        *states, batches,
    )  # fmt: skip
    call = _Call(
        _keep(mask), drop_scale, (activation, *activation_params), float(eps), float(momentum or 0), momentum is None
    )
    with _on_device_of(input):
        (_train if training else _normalise)(plan.frame, tensors, call)
    if training:
        _copy_back((running_mean, running_var), states)
    if target is not output:
        output.copy_(target)
    return output, mean, invstd, bits


def _count_first(batches: Tensor | None, momentum: float | None) -> None:
    """A cumulative average divides by the new count, which no program may then be writing."""
    if batches is not None and momentum is None:
        batches.add_(1)


def _copy_back(originals: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """To those of which the kernels wrote copies."""
    for original, copy in zip(originals, written, strict=True):
        if original is not None and copy is not None and original is not copy:
            original.copy_(copy)


class _Forward(NamedTuple):
    """The tensors of forward, in the order in which kernels take them."""

    x: Tensor
    residual: Tensor | None
    y: Tensor
    bits: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None


def _updating(batches: Tensor | None, call: _Call) -> tuple[bool, bool]:
    """Whether kernels count the batch; and how they weigh it. Without running statistics they do neither."""
    return batches is not None and not call.cumulative, batches is not None and call.cumulative


def _train(frame: Frame, tensors: _Forward, call: _Call) -> None:
    if frame.whole is not None:
        launch(
            forward.whole_forward, frame.whole, tensors, (call.eps, call.momentum, *call.dropping),
            frame.pick(_WHOLE_FORWARD),
            (*_updating(tensors.batches, call), *call.constants, *frame.whole.tile, *frame.constants),
        )  # fmt: skip
        return
    _batch_statistics(frame, tensors.x, tensors[7:], call)
    _normalise(frame, tensors._replace(running_mean=None, running_var=None), call)


def _batch_statistics(frame: Frame, x: Tensor, statistics: Sequence[Tensor | None], call: _Call) -> None:
    """Fills `statistics`: mean and invstd; and updates the running ones and the count of batches."""
    grid, mean = frame.passes, statistics[0]
    assert mean is not None
    updating = _updating(statistics[-1], call)
    partials = mean.new_empty(3, grid.parts, frame.layout.channels) if grid.parts > 1 else None
    launch(
        forward.batch_statistics, grid, (x, partials, *statistics), (call.eps, call.momentum),
        frame.pick(_STATISTICS),
        (*updating, *grid.tile, *frame.constants),
    )  # fmt: skip
    if partials is not None:
        launch(
            forward.merge_statistics, frame.merge, (partials, *statistics), (call.eps, call.momentum),
            frame.pick(_MERGE_STATISTICS), (*updating, *frame.merge.tile),
        )  # fmt: skip


def _normalise(frame: Frame, tensors: _Forward, call: _Call) -> None:
    launch(
        forward.normalise, frame.passes, tensors[:11], (call.eps, *call.dropping),
        frame.pick(_NORMALISE), (*call.constants, *frame.passes.tile, *frame.constants),
    )  # fmt: skip


def batch_norm_act_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    flat_bits: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: int,
    activation_params: Sequence[float],
    drop_scale: float,
    input_grad: bool,
    affine_grad: bool,
    residual_grad: bool,
) -> _FourTensors:
    """See csrc/torch/schemas.h."""
    _check(
        input,
        mask,
        {"grad_output": grad_output, "residual": residual},
        {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd},
    )
    # Its strides decide the layout even where the gradient itself is not wanted.
    grad_input = torch.empty_like(input)
    if flat_bits is not None and flat_bits.numel() != bytes_of_bits(grad_input):
        raise RuntimeError("flat_bits should be what batch_norm_act_fwd returned")
    grad_residual = torch.empty_like(input) if residual_grad else input.new_empty(0)
    sums_wanted = affine_grad and (weight is not None or bias is not None)
    grad_weight, grad_bias = _parameter_gradients(mean, weight, bias, affine_grad)
    grads = (grad_input if input_grad else input.new_empty(0), grad_weight, grad_bias, grad_residual)
    if input.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
        return grads
    plan = _plan_for(grad_input, g=grad_output, x=input, r=residual)
    if plan.irregular and mask is not None and _is_seed(mask):
        # As forward: by the place in the dense output.
        grad_output, mask, drop_scale = dropout(torch.empty_like(input).copy_(grad_output), mask, drop_scale), None, 1.0
        plan = _plan_for(grad_input, g=grad_output, x=input, r=residual)
    targets = [_target(plan, t) if t.numel() else None for t in (grads[0], grad_residual)]
    tensors = _Backward(
        _source(plan, "g", grad_output), _source(plan, "x", input),
        None if residual is None else _source(plan, "r", residual), flat_bits, _contiguous(mask),
        _contiguous(weight), _contiguous(bias), mean, invstd, targets[0], targets[1],
    )  # fmt: skip
    parameters = tuple(t if t.numel() else None for t in (grad_weight, grad_bias))
    call = _Call(_keep(mask), drop_scale, (activation, *activation_params))
    with _on_device_of(input):
        (_train_backward if training else _sums)(plan.frame, tensors, parameters, sums_wanted, call)
    for result, target in zip((grads[0], grad_residual), targets, strict=True):
        if target is not None and target is not result:
            result.copy_(target)
    return grads


def _parameter_gradients(
    mean: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Where they go; empty for those that are not wanted."""
    grad_weight, grad_bias = (
        mean.new_empty(0) if p is None or not wanted else p.new_empty(p.shape) for p in (weight, bias)
    )
    return grad_weight, grad_bias


class _Backward(NamedTuple):
    """The tensors of backward, in the order in which kernels take them."""

    grad_output: Tensor
    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    grad_input: Tensor | None
    grad_residual: Tensor | None


_Parameters = tuple[Tensor | None, ...]  # where the gradients of weight and bias go


def _train_backward(frame: Frame, tensors: _Backward, parameters: _Parameters, sums_wanted: bool, call: _Call) -> None:
    if frame.whole is not None:
        launch(
            backward.whole_backward, frame.whole, (*tensors, *parameters), call.dropping,
            frame.pick(_WHOLE_BACKWARD),
            (*call.constants, *frame.whole.tile, *frame.constants),
        )  # fmt: skip
        return
    sums = None
    if sums_wanted or tensors.grad_input is not None:
        sums = _sums(frame, tensors._replace(grad_input=None, grad_residual=None), parameters, True, call)
    if tensors.grad_input is not None or tensors.grad_residual is not None:
        launch(
            backward.input_gradient, frame.passes, (*tensors, sums), call.dropping,
            frame.pick(_INPUT_GRADIENT),
            (*call.constants, *frame.passes.tile, *frame.constants),
        )  # fmt: skip


def _sums(frame: Frame, tensors: _Backward, parameters: _Parameters, wanted: bool, call: _Call) -> Tensor | None:
    """Sums of g and g x^ per channel, (2, C); and what gradients of full size `tensors` asks for, as in evaluation.

    So this is all of backward in evaluation.
    """
    grid, channels = frame.passes, frame.layout.channels
    sums = tensors.mean.new_empty(2, channels) if wanted else None
    partials = tensors.mean.new_empty(2, grid.parts, channels) if wanted and grid.parts > 1 else None
    launch(
        backward.gradient_sums, grid, (*tensors, partials, sums, *parameters), call.dropping,
        frame.pick(_SUMS), (*call.constants, *grid.tile, *frame.constants),
    )  # fmt: skip
    if partials is not None:
        launch(
            backward.merge_sums, frame.merge, (partials, sums, *parameters), (), frame.pick(_MERGE_SUMS),
            frame.merge.tile,
        )  # fmt: skip
    return sums


class _PoolPlan(NamedTuple):
    """Launches for an input of given strides.

    Attributes:
        frame: None for an input without elements.
        shape, strides: of the pooled tensors.
        dense: the strides of copies of what is of full size and does not lie regularly.
        copied: whether that is the input.
        irregular: whether it is the input's gradient.
    """

    frame: PoolFrame | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dense: tuple[int, ...]
    copied: bool
    irregular: bool

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A pooled tensor."""
        return like.new_empty_strided(self.shape, self.strides, dtype=dtype)

    def source(self, input: Tensor) -> Tensor:
        """`input` as the kernels walk it."""
        return input.new_empty_strided(input.shape, self.dense).copy_(input) if self.copied else input


@functools.lru_cache(maxsize=4096)
def _pool_plan(
    shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...], window: tuple[int, ...], ceil_mode: bool
) -> _PoolPlan:
    """For an input of this shape and these strides."""
    _check_window(window, len(shape) - 2)
    like = torch.empty_strided(shape, strides, device="meta")
    pool = Pool.of_window(window, ceil_mode, like.dim() - 2)
    checks.pool(pool, like)
    gradient = torch.empty_like(like).stride()
    rows = is_rows(shape, gradient)
    layout, dense = layout_of(shape, rows), dense_strides(shape, rows)
    copied, irregular = (strides_in(layout, shape, each) is None for each in (strides, gradient))
    pooled = (*shape[:2], *pool.output_size(shape[2:]))
    frame = None
    if shape[0] > 0:
        walked: dict[str, Sequence[int] | None] = {
            "x": dense if copied else strides,
            "y": dense if irregular else gradient,
        }
        frame = pool_frame_of(shape, dtype, rows, walked, window, pooled)
    return _PoolPlan(frame, pooled, dense_strides(pooled, rows), dense, copied, irregular)


def _check_window(window: tuple[int, ...], dims: int) -> None:
    if dims not in (1, 2):
        raise RuntimeError(f"input should be of shape (N, C, L) or (N, C, H, W), but has {dims + 2} dimensions")
    if len(window) != 8:
        raise RuntimeError(f"window should have 8 numbers, but is {window}")
    kernel, stride, padding, dilation = (window[i : i + 2] for i in range(0, 8, 2))
    if min(kernel + stride + dilation) < 1 or math.prod(kernel) > MOST_POSITIONS:
        raise RuntimeError(
            f"window should have a kernel of 1 to {MOST_POSITIONS} elements, and strides and dilations of at least 1, "
            f"but is {window}"
        )
    if any(not 0 <= 2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        raise RuntimeError(f"window should have a padding of 0 to half of the kernel's size, but is {window}")
    if dims == 1 and (kernel[0], padding[0]) != (1, 0):
        raise RuntimeError(f"window should have height 1 for an input of 3 dimensions, but is {window}")


def _check_channel_mask(mask: Tensor | None) -> None:
    if mask is not None and _is_seed(mask):
        raise RuntimeError("mask should be of channels, (N, C), but is a seed for one of elements")


def batch_norm_act_pool_fwd(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    activation_params: Sequence[float],
    monotone: bool,
    drop_scale: float,
    window: Sequence[int],
    ceil_mode: bool,
    save: bool,
) -> _FiveTensors:
    """See csrc/torch/schemas.h."""
    states: dict[str, Tensor | None] = {"running_mean": running_mean, "running_var": running_var}
    _check(input, mask, {}, {"weight": weight, "bias": bias, **states})
    _check_channel_mask(mask)
    _check_statistics(training, running_mean, running_var)
    plan = _pool_plan(tuple(input.shape), input.dtype, input.stride(), tuple(window), ceil_mode)
    output = plan.empty(input, input.dtype)
    selected, positions = (
        plan.empty(input, dtype) if save else input.new_empty(0, dtype=dtype) for dtype in (input.dtype, torch.uint8)
    )
    mean = input.new_empty(input.shape[1], dtype=torch.float64)
    invstd = torch.empty_like(mean)
    batches = num_batches_tracked if training and running_mean is not None else None
    if plan.frame is None:
        if batches is not None:
            batches.add_(1)
        return output, mean.zero_(), invstd.zero_(), selected, positions
    _count_first(batches, momentum)
    written_mean, written_var = (_contiguous(state) for state in states.values())
    tensors = _PoolForward(
        plan.source(input), output, selected if save else None, positions if save else None, _contiguous(mask),
        _contiguous(weight), _contiguous(bias), mean, invstd, written_mean, written_var, batches,
    )  # fmt: skip
    call = _Call(
        _keep(mask), drop_scale, (activation, *activation_params), float(eps), float(momentum or 0), momentum is None
    )
    with _on_device_of(input):
        _pool(plan.frame, tensors, call, training, monotone)
    if training:
        _copy_back(list(states.values()), (written_mean, written_var))
    return output, mean, invstd, selected, positions


class _PoolForward(NamedTuple):
    """The tensors of forward with max-pooling, in the order in which kernels take them."""

    x: Tensor
    y: Tensor
    selected: Tensor | None
    positions: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None


def _pool(frame: PoolFrame, tensors: _PoolForward, call: _Call, training: bool, monotone: bool) -> None:
    full, windows = frame.full, frame.windows
    constants = (*call.constants, monotone, *frame.window, frame.edges)
    if training and full.whole is not None and frame.whole_windows is not None:
        launch(
            pooling.whole_pool, full.whole, tensors, (call.eps, call.momentum, call.drop_scale),
            windows.pick(_WHOLE_POOL),
            (*_updating(tensors.batches, call), *constants, *frame.whole_windows, *full.whole.tile, *full.constants),
        )  # fmt: skip
        return
    if training:
        _batch_statistics(full, tensors.x, tensors[7:], call)
        tensors = tensors._replace(running_mean=None, running_var=None)
    launch(
        pooling.pool, windows.passes, tensors[:11], (call.eps, call.drop_scale), windows.pick(_POOL),
        (*constants, *windows.passes.tile, *windows.constants),
    )  # fmt: skip


def batch_norm_act_pool_bwd(
    grad_output: Tensor,
    input: Tensor,
    selected: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: int,
    activation_params: Sequence[float],
    drop_scale: float,
    window: Sequence[int],
    ceil_mode: bool,
    input_grad: bool,
    affine_grad: bool,
) -> _ThreeTensors:
    """See csrc/torch/schemas.h."""
    _check(input, mask, {}, {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd})
    _check_channel_mask(mask)
    plan = _pool_plan(tuple(input.shape), input.dtype, input.stride(), tuple(window), ceil_mode)
    for name, t in (("grad_output", grad_output), ("selected", selected), ("positions", positions)):
        if t.shape != plan.shape or t.device != input.device:
            raise RuntimeError(
                f"{name} should be of shape {plan.shape} and on the device of input, but is of shape {tuple(t.shape)}"
            )
    grad_input = torch.empty_like(input) if input_grad else input.new_empty(0)
    grad_weight, grad_bias = _parameter_gradients(mean, weight, bias, affine_grad)
    if plan.frame is None:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    sums_wanted = (training and input_grad) or (affine_grad and (weight is not None or bias is not None))
    if not (input_grad or sums_wanted):
        return grad_input, grad_weight, grad_bias
    taken = plan.empty(mean, torch.float64 if input.dtype == torch.float64 else torch.float32) if input_grad else None
    pooled = _plan(
        plan.shape, input.dtype, plan.strides, (("g", grad_output.stride()), ("x", plan.strides), ("r", None))
    )
    tensors = _Backward(
        _source(pooled, "g", grad_output), _in_strides(selected, plan.strides), None, None, _contiguous(mask),
        _contiguous(weight), _contiguous(bias), mean, invstd, None, taken,
    )  # fmt: skip
    parameters = tuple(t if t.numel() else None for t in (grad_weight, grad_bias))
    call = _Call(_keep(mask), drop_scale, (activation, *activation_params))
    with _on_device_of(input):
        sums = _sums(pooled.frame, tensors, parameters, sums_wanted, call)
        if taken is not None:
            x = plan.source(input) if training else None
            target = input.new_empty_strided(input.shape, plan.dense) if plan.irregular else grad_input
            elements = plan.frame.elements
            launch(
                pooling.pool_gradient, elements.passes,
                (
                    taken, _in_strides(positions, plan.strides), x, tensors.weight, mean, invstd,
                    sums if training else None, target,
                ),
                (), elements.pick(_POOL_GRADIENT),
                (*plan.frame.window, *elements.passes.tile, *elements.constants),
            )  # fmt: skip
            if target is not grad_input:
                grad_input.copy_(target)
    return grad_input, grad_weight, grad_bias


def _in_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`t`, or a copy with these strides."""
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


def dropout(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    """See csrc/torch/schemas.h. A seed's elements are by the order of memory of a dense input."""
    _check_mask(input, mask)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    if _is_seed(mask):
        source = input if input.stride() == output.stride() else torch.empty_like(input).copy_(input)
        _drop_elements(source, output, mask, scale)
        return output
    plan = _plan_for(output, x=input)
    target = _target(plan, output)
    _drop(plan.frame, _source(plan, "x", input), target, mask.contiguous(), scale)
    if target is not output:
        output.copy_(target)
    return output


def element_mask(seed: Tensor, like: Tensor, drop_scale: float) -> Tensor:
    """See csrc/torch/schemas.h and fastlayers.reference."""
    mask = torch.empty_like(like, dtype=torch.bool)
    if like.numel():
        _drop_elements(None, mask.view(torch.uint8), seed, drop_scale)
    return mask


def _drop_elements(source: Tensor | None, target: Tensor, seed: Tensor, scale: float) -> None:
    # Shapes do not matter, only the order in memory: one long plane.
    count = target.numel()
    line = ((count, count, 1),)
    dtype = torch.float32 if source is None else source.dtype
    plan = _plan((1, 1, count), dtype, *line, (("x", None if source is None else line[0]),))
    _drop(plan.frame, source, target, seed, scale)


def _drop(frame: Frame, source: Tensor | None, target: Tensor, mask: Tensor, scale: float) -> None:
    call = _Call(_keep(mask), scale)
    with _on_device_of(target):
        launch(
            dropping.drop, frame.passes, (source, target, mask), call.dropping, frame.pick(_DROP),
            (*call.constants, *frame.passes.tile, *frame.constants),
        )  # fmt: skip


def unpack_mask(bits: Tensor, like: Tensor, flat: bool) -> Tensor:
    """See csrc/torch/schemas.h. For double backward only, hence in plain PyTorch.

    Raises:
        RuntimeError: `flat`, of which this set of operators has no masks.
    """
    if flat:
        raise RuntimeError("flat should be False: the Triton operators take seeds for masks without shape")
    mask = torch.empty_like(like, dtype=torch.bool)
    if not mask.numel():
        return mask
    layout = _layout_as_written(mask)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    runs = (bits.view(-1, layout.bytes_inner, 1) >> places & 1).flatten(1)[:, : layout.n_inner]
    batch, channels, *spatial = like.shape
    if layout.rows:
        return mask.copy_(runs.reshape(batch, *spatial, channels).movedim(-1, 1))
    return mask.copy_(runs.reshape(like.shape))


def _layout_as_written(dense: Tensor) -> Layout:
    """The layout of a dense result, or of the copy of it that the kernels write."""
    shape, strides = dense.shape, dense.stride()
    layout = layout_of(shape, is_rows(shape, strides))
    if strides_in(layout, shape, strides) is not None:
        return layout
    return layout_of(shape, is_rows(shape, torch.empty(shape, device="meta").stride()))


def bytes_of_bits(dense: Tensor) -> int:
    """Size of one bit per element: each plane or row of the result that the kernels write starts at a byte."""
    return _layout_as_written(dense).bytes_of_bits
