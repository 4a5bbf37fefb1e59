"""The fused operator that pools too, with its gradients: as `autograd` has them for the one that does not.

Forward keeps of each window the value that was taken and its position, so that of backward's sums over elements all
are over the pooled ones, and only the gradient of the input is of its full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlayers import autograd, backends, masks, pooling, reference
from fastlayers.autograd import Call
from fastlayers.pooling import Pool

_Grads = tuple[Tensor | None, ...]
_ThreeTensors = tuple[Tensor, Tensor, Tensor]
_FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Saved(NamedTuple):
    """The tensors that backward needs of a call."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    selected: Tensor  # of each window, the input that was taken
    positions: Tensor  # and where in the window it is
    mask: Tensor | None
    mean: Tensor
    invstd: Tensor


def batch_norm_act_pool(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    call: Call,
) -> Tensor:
    """The fused operator with ``call.pool``. `mask` is one of channels, drawn for the kernels of ``call.backend``."""
    tensors = (input, weight, bias, mask, running_mean, running_var, num_batches_tracked)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3]):
        output: Tensor = _BatchNormActPool.apply(*tensors, call)
        return output
    return _forward(tensors, call, save=False)[0]


class _BatchNormActPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        input, weight, bias, mask = tensors[:4]
        output, mean, invstd, selected, positions = _forward(tensors, call, save=True)
        ctx.call = call
        ctx.save_for_backward(input, weight, bias, selected, positions, mask, mean, invstd)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _Grads:
        return autograd.run_backward(ctx, grad_outputs[0], _backward, _differentiable_gradients, 3)


def _pool_of(call: Call) -> Pool:
    assert call.pool is not None
    return call.pool


def _forward(tensors: Any, call: Call, save: bool) -> _FiveTensors:
    pool = _pool_of(call)
    if call.training:
        autograd.mark_written(tensors[4:])
    result: _FiveTensors = backends.op_set(call.backend).batch_norm_act_pool_fwd(
        *tensors, call.training, call.momentum, call.eps,
        call.activation.code, call.activation.params, call.activation.monotone, masks.scale(call.drop_p),
        pool.window, pool.ceil_mode, save,
    )  # fmt: skip
    return result


def _backward(tensors: Sequence[Any], call: Call, wanted: Sequence[bool]) -> _ThreeTensors:
    grad_output, saved, pool = tensors[0], _Saved(*tensors[1:]), _pool_of(call)
    result: _ThreeTensors = backends.op_set(call.backend).batch_norm_act_pool_bwd(
        grad_output, saved.input, saved.selected, saved.positions, saved.weight, saved.bias, saved.mask,
        saved.mean, saved.invstd, call.training, call.activation.code, call.activation.params,
        masks.scale(call.drop_p), pool.window, pool.ceil_mode, wanted[0], wanted[1] or wanted[2],
    )  # fmt: skip
    return result


def _differentiable_gradients(tensors: Sequence[Any], call: Call) -> _Grads:
    """What the backward kernel computes, as a graph of plain PyTorch operations; None for what needs no gradient.

    Where the windows' elements are is constant: the function is not differentiable where that changes.
    """
    grad_output, saved = tensors[0], _Saved(*tensors[1:])
    input, mean, invstd = saved.input, saved.mean, saved.invstd
    if call.training:
        mean, var = reference.batch_statistics(input)
        invstd = torch.rsqrt(var + call.eps)
    # Positions in dropped planes are 0, which may be in the padding.
    indices = pooling.indices(_pool_of(call), saved.positions, input.shape[2:]).clamp(min=0)
    taken = reference.apply_mask(pooling.take(input, indices), saved.mask, 0.0)
    z = reference.normalize(taken, mean, invstd, saved.weight, saved.bias)
    grad = reference.apply_mask(grad_output.to(z.dtype), saved.mask, call.drop_p)
    grad = autograd.through_activation(grad, z, call.activation)
    return autograd.gradients([z], (input, saved.weight, saved.bias), [grad], True)
