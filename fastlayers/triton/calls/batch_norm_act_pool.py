"""The fused operator with max-pooling behind it, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlayers import checks
from fastlayers.pooling import Pool
from fastlayers.triton import launches, pooling
from fastlayers.triton.calls import refusals, sizes
from fastlayers.triton.calls.channel_tensors import (
    BackwardTensors,
    ForwardChannels,
    ParameterGradients,
    gradient_sums,
)
from fastlayers.triton.calls.copies import contiguous, copy_back, copy_of, in_strides, plan_of
from fastlayers.triton.calls.settings import Call
from fastlayers.triton.layouts import dense_strides, is_rows, layout_of, strides_in
from fastlayers.triton.plans import PoolFrame, pool_frame_of


class PoolPlan(NamedTuple):
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
        return copy_of(input, self.dense) if self.copied else input

    def target(self, grad_input: Tensor) -> Tensor:
        """Where the kernels write it."""
        return grad_input.new_empty_strided(grad_input.shape, self.dense) if self.irregular else grad_input


def plan_for(input: Tensor, window: Sequence[int], ceil_mode: bool) -> PoolPlan:
    """`pool_plan_of` an input."""
    return pool_plan_of(tuple(input.shape), input.dtype, input.stride(), tuple(window), ceil_mode)


@functools.lru_cache(maxsize=4096)
def pool_plan_of(
    shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...], window: tuple[int, ...], ceil_mode: bool
) -> PoolPlan:
    """For an input of this shape and these strides."""
    refusals.check_window(window, len(shape) - 2)
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
    return PoolPlan(frame, pooled, dense_strides(pooled, rows), dense, copied, irregular)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See csrc/torch/schemas.h."""
    refusals.check(
        input, mask, {}, {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    )
    refusals.check_channel_mask(mask)
    refusals.check_statistics(training, running_mean, running_var)
    plan = plan_for(input, window, ceil_mode)
    output = plan.empty(input, input.dtype)
    selected, positions = (
        plan.empty(input, dtype) if save else input.new_empty(0, dtype=dtype) for dtype in (input.dtype, torch.uint8)
    )
    channels = ForwardChannels.of(input, weight, bias, running_mean, running_var, num_batches_tracked, training)
    if plan.frame is None:
        channels.of_nothing()
        return output, channels.mean, channels.invstd, selected, positions
    call = Call.of(mask, drop_scale, (activation, *activation_params), eps, momentum)
    channels.start(call)
    tensors = _Forward(
        plan.source(input), output, selected if save else None, positions if save else None, contiguous(mask)
    )
    with launches.on_device_of(input):
        _pool(plan.frame, tensors, channels, call, training, monotone)
    if training:
        channels.finish(running_mean, running_var)
    return output, channels.mean, channels.invstd, selected, positions


class _Forward(NamedTuple):
    """The tensors of forward that kernels take before those of one number per channel."""

    x: Tensor
    y: Tensor
    selected: Tensor | None
    positions: Tensor | None
    mask: Tensor | None


def _pool(
    frame: PoolFrame, tensors: _Forward, channels: ForwardChannels, call: Call, training: bool, monotone: bool
) -> None:
    full, windows = frame.full, frame.windows
    constants = (*call.constants, monotone, *frame.window, frame.edges)
    if training and full.whole is not None and frame.whole_windows is not None:
        launches.launch(
            pooling.whole_pool, full.whole, (*tensors, *channels), (call.eps, call.momentum, call.drop_scale),
            windows.pick(sizes.WHOLE_POOL),
            (*channels.updating(call), *constants, *frame.whole_windows, *full.whole.tile, *full.constants),
        )  # fmt: skip
        return
    if training:
        channels.fill(full, tensors.x, call)
        channels = channels.without_running()
    launches.launch(
        pooling.pool, windows.passes, (*tensors, *channels[:-1]), (call.eps, call.drop_scale),
        windows.pick(sizes.POOL),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/torch/schemas.h."""
    refusals.check(input, mask, {}, {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd})
    refusals.check_channel_mask(mask)
    plan = plan_for(input, window, ceil_mode)
    refusals.check_pooled(input, plan.shape, {"grad_output": grad_output, "selected": selected, "positions": positions})
    grad_input = torch.empty_like(input) if input_grad else input.new_empty(0)
    parameters = ParameterGradients.of(mean, weight, bias, affine_grad)
    if plan.frame is None:
        parameters.of_nothing()
        return grad_input, *parameters
    sums_wanted = (training and input_grad) or parameters.wanted
    if not (input_grad or sums_wanted):
        return grad_input, *parameters
    taken = plan.empty(mean, torch.float64 if input.dtype == torch.float64 else torch.float32) if input_grad else None
    pooled = plan_of(
        plan.shape, input.dtype, plan.strides, (("g", grad_output.stride()), ("x", plan.strides), ("r", None))
    )
    tensors = BackwardTensors(
        pooled.source("g", grad_output), in_strides(selected, plan.strides), None, None, contiguous(mask),
        contiguous(weight), contiguous(bias), mean, invstd, None, taken,
    )  # fmt: skip
    call = Call.of(mask, drop_scale, (activation, *activation_params))
    with launches.on_device_of(input):
        sums = gradient_sums(pooled.frame, tensors, parameters, sums_wanted, call)
        if taken is not None:
            x = plan.source(input) if training else None
            statistics = (tensors.weight, mean, invstd, sums if training else None)
            target = plan.target(grad_input)
            _spread(plan.frame, (taken, in_strides(positions, plan.strides), x, *statistics, target))
            copy_back([grad_input], [target])
    return grad_input, *parameters


def _spread(frame: PoolFrame, tensors: Sequence[Tensor | None]) -> None:
    """Gives each element of the input the gradients of the windows that took it."""
    elements = frame.elements
    launches.launch(
        pooling.pool_gradient, elements.passes, tensors, (), elements.pick(sizes.POOL_GRADIENT),
        (*frame.window, *elements.passes.tile, *elements.constants),
    )  # fmt: skip
