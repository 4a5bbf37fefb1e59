"""The fused operator: batch normalisation, residual, activation and dropout, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlayers.triton import backward, forward, launches
from fastlayers.triton.calls import refusals, sizes
from fastlayers.triton.calls.channel_tensors import (
    BackwardTensors,
    ForwardChannels,
    ParameterGradients,
    gradient_sums,
)
from fastlayers.triton.calls.copies import bytes_of_bits, contiguous, copy_back, plan_for
from fastlayers.triton.calls.masks import dropout
from fastlayers.triton.calls.settings import Call, is_seed
from fastlayers.triton.plans import Frame

_FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


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
    refusals.check(
        input,
        mask,
        {"residual": residual},
        {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var},
    )
    refusals.check_statistics(training, running_mean, running_var)
    output = torch.empty_like(input)
    channels = ForwardChannels.of(input, weight, bias, running_mean, running_var, num_batches_tracked, training)
    if input.numel() == 0:
        channels.of_nothing()
        return output, channels.mean, channels.invstd, _bits(bytes_of_bits(output) if save_flat_bits else 0, input)
    plan = plan_for(output, x=input, r=residual)
    if plan.irregular and mask is not None and is_seed(mask):
        # Which elements it drops is by their place in the output; the kernels see those of its copy.
        kept, *others = batch_norm_act_fwd(
            input, weight, bias, residual, None, running_mean, running_var, num_batches_tracked, training, momentum,
            eps, activation, activation_params, 1.0, save_flat_bits,
        )  # fmt: skip
        return dropout(kept, mask, drop_scale), others[0], others[1], others[2]
    call = Call.of(mask, drop_scale, (activation, *activation_params), eps, momentum)
    bits = _bits(plan.frame.layout.bytes_of_bits if save_flat_bits else 0, input)
    channels.start(call)
    target = plan.target(output)
    tensors = _Forward(
        plan.source("x", input), None if residual is None else plan.source("r", residual), target,
        bits if save_flat_bits else None, contiguous(mask),
    )  # fmt: skip
    with launches.on_device_of(input):
        (_train if training else _normalise)(plan.frame, tensors, channels, call)
    if training:
        channels.finish(running_mean, running_var)
    copy_back([output], [target])
    return output, channels.mean, channels.invstd, bits


def _bits(size: int, input: Tensor) -> Tensor:
    return input.new_empty(size, dtype=torch.uint8)


class _Forward(NamedTuple):
    """The tensors of forward that kernels take before those of one number per channel."""

    x: Tensor
    residual: Tensor | None
    y: Tensor
    bits: Tensor | None
    mask: Tensor | None


def _train(frame: Frame, tensors: _Forward, channels: ForwardChannels, call: Call) -> None:
    if frame.whole is not None:
        launches.launch(
            forward.whole_forward, frame.whole, (*tensors, *channels), (call.eps, call.momentum, *call.dropping),
            frame.pick(sizes.WHOLE_FORWARD),
            (*channels.updating(call), *call.constants, *frame.whole.tile, *frame.constants),
        )  # fmt: skip
        return
    channels.fill(frame, tensors.x, call)
    _normalise(frame, tensors, channels.without_running(), call)


def _normalise(frame: Frame, tensors: _Forward, channels: ForwardChannels, call: Call) -> None:
    launches.launch(
        forward.normalise, frame.passes, (*tensors, *channels[:-1]), (call.eps, *call.dropping),
        frame.pick(sizes.NORMALISE), (*call.constants, *frame.passes.tile, *frame.constants),
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
    refusals.check(
        input,
        mask,
        {"grad_output": grad_output, "residual": residual},
        {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd},
    )
    # Its strides decide the layout even where the gradient itself is not wanted.
    dense = torch.empty_like(input)
    if flat_bits is not None and flat_bits.numel() != bytes_of_bits(dense):
        raise RuntimeError("flat_bits should be what batch_norm_act_fwd returned")
    grad_input = dense if input_grad else input.new_empty(0)
    grad_residual = torch.empty_like(input) if residual_grad else input.new_empty(0)
    parameters = ParameterGradients.of(mean, weight, bias, affine_grad)
    if input.numel() == 0:
        parameters.of_nothing()
        return grad_input, *parameters, grad_residual
    plan = plan_for(dense, g=grad_output, x=input, r=residual)
    if plan.irregular and mask is not None and is_seed(mask):
        # As forward: by the place in the dense output.
        grad_output, mask, drop_scale = dropout(torch.empty_like(input).copy_(grad_output), mask, drop_scale), None, 1.0
        plan = plan_for(dense, g=grad_output, x=input, r=residual)
    results = (grad_input, grad_residual)
    targets = [plan.target(t) if t.numel() else None for t in results]
    tensors = BackwardTensors(
        plan.source("g", grad_output), plan.source("x", input),
        None if residual is None else plan.source("r", residual), flat_bits, contiguous(mask),
        contiguous(weight), contiguous(bias), mean, invstd, *targets,
    )  # fmt: skip
    call = Call.of(mask, drop_scale, (activation, *activation_params))
    with launches.on_device_of(input):
        (_train_backward if training else gradient_sums)(plan.frame, tensors, parameters, parameters.wanted, call)
    copy_back(results, targets)
    return grad_input, *parameters, grad_residual


def _train_backward(
    frame: Frame, tensors: BackwardTensors, parameters: ParameterGradients, sums_wanted: bool, call: Call
) -> None:
    if frame.whole is not None:
        launches.launch(
            backward.whole_backward, frame.whole, (*tensors, *parameters.pointers), call.dropping,
            frame.pick(sizes.WHOLE_BACKWARD),
            (*call.constants, *frame.whole.tile, *frame.constants),
        )  # fmt: skip
        return
    sums = None
    if sums_wanted or tensors.grad_input is not None:
        sums = gradient_sums(frame, tensors._replace(grad_input=None, grad_residual=None), parameters, True, call)
    if tensors.grad_input is not None or tensors.grad_residual is not None:
        launches.launch(
            backward.input_gradient, frame.passes, (*tensors, sums), call.dropping,
            frame.pick(sizes.INPUT_GRADIENT),
            (*call.constants, *frame.passes.tile, *frame.constants),
        )  # fmt: skip
