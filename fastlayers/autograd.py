"""The operators with their gradients, as `torch.autograd.Function`s.

Backward runs the compiled kernel. Only where it is itself to be differentiated (``create_graph=True``) does it go
through a second Function, whose own backward is written in plain PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlayers import activations, masks, ops, reference
from fastlayers.activations import Activation

_Grads = tuple[Tensor | None, ...]


class _Call(NamedTuple):
    """What of a call is not a tensor."""

    training: bool
    momentum: float | None
    eps: float
    activation: Activation
    drop_p: float


class _Tensors(NamedTuple):
    """The tensors of a call, in the order of the operator's arguments."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: Activation,
    drop_p: float,
) -> Tensor:
    """The fused operator. `mask` is bool, (N, C) or of the shape of `input`."""
    if mask is not None and mask.dim() == input.dim() and input.dim() > 2:
        mask = ops.pack_mask(mask, False)
    tensors = _Tensors(input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked)
    call = _Call(training, momentum, eps, activation, drop_p)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        output: Tensor = _BatchNormAct.apply(*tensors, call)
        return output
    return _forward(tensors, call, save_flat_bits=False)[0]


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *given, call = args
        tensors = _Tensors(*given)
        residual, activation = tensors.residual, call.activation
        # One bit per element stands for the residual where that is all that backward needs of it.
        save_flat_bits = residual is not None and activation.derivatives is not None
        output, mean, invstd, flat_bits = _forward(tensors, call, save_flat_bits)
        if save_flat_bits or activation.code == activations.IDENTITY.code:
            residual = None
        ctx.call = call
        ctx.save_for_backward(
            tensors.input, tensors.weight, tensors.bias, residual, flat_bits if save_flat_bits else None,
            tensors.mask, mean, invstd,
        )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _Grads:
        wanted = ctx.needs_input_grad[:4]
        run = _BatchNormActBackward.apply if torch.is_grad_enabled() else _backward
        grads = run(grad_outputs[0], *ctx.saved_tensors, ctx.call, wanted)
        return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 5)


def _forward(tensors: _Tensors, call: _Call, save_flat_bits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor, Tensor] = ops.batch_norm_act_fwd(
        *tensors, call.training, call.momentum, call.eps,
        call.activation.code, call.activation.params, masks.scale(call.drop_p), save_flat_bits,
    )  # fmt: skip
    return result


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    flat_bits: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    call: _Call,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor, Tensor] = ops.batch_norm_act_bwd(
        grad_output, input, weight, bias, residual, flat_bits, mask, mean, invstd, call.training,
        call.activation.code, call.activation.params, masks.scale(call.drop_p), wanted[0], wanted[1] or wanted[2], wanted[3],
    )  # fmt: skip
    return result


class _BatchNormActBackward(torch.autograd.Function):
    """First-order gradients that can be differentiated again, any number of times."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tensors, call, wanted = args
        ctx.call, ctx.wanted = call, wanted
        ctx.save_for_backward(*tensors)
        return _backward(*tensors, call, wanted)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> _Grads:
        with torch.enable_grad():
            # Views: graphs of what follows end at these, and through them reach the originals.
            leaves = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            grads = _differentiable_gradients(*leaves, ctx.call)
        pairs = [
            (grad, grad_grad)
            for grad, grad_grad, wanted in zip(grads, grad_grads, ctx.wanted, strict=True)
            if wanted and grad is not None and grad.requires_grad
        ]
        sources = [t for t in leaves[:5] if t is not None and t.requires_grad]
        if not pairs or not sources:
            return (None,) * 11
        outputs, grad_of_outputs = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(
                outputs, sources, grad_of_outputs, create_graph=torch.is_grad_enabled(), allow_unused=True
            )
        )
        return (*(next(found) if t is not None and t.requires_grad else None for t in leaves[:5]), *(None,) * 6)


def _differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    flat_bits: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    call: _Call,
) -> tuple[Tensor | None, ...]:
    """What the backward kernel computes, as a graph of plain PyTorch operations; None for what needs no gradient."""
    if call.training:
        mean, var = reference.batch_statistics(input)
        invstd = torch.rsqrt(var + call.eps)
    z = reference.normalize(input, mean, invstd, weight, bias)
    if mask is not None and mask.dtype == torch.uint8:
        mask = ops.unpack_mask(mask, input, False)
    grad = reference.apply_mask(grad_output.to(z.dtype), mask, call.drop_p)
    if flat_bits is not None and call.activation.derivatives is not None:
        flat, elsewhere = call.activation.derivatives
        grad = torch.where(ops.unpack_mask(flat_bits, input, False), grad * flat, grad * elsewhere)
    elif call.activation.code != activations.IDENTITY.code:
        before = z if residual is None else z + residual.to(z.dtype)
        before = before if before.requires_grad else before.requires_grad_()
        (grad,) = torch.autograd.grad(call.activation.apply(before), before, grad, create_graph=True)
    parameters = (input, weight, bias)
    sources = [t for t in parameters if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(z, sources, grad, create_graph=True) if sources else ())
    return (*(next(found) if t is not None and t.requires_grad else None for t in parameters), grad.to(input.dtype))


def dropout(input: Tensor, mask: Tensor, p: float) -> Tensor:
    """`input` times `mask` / (1 - p), zero where the mask is. `mask` is bool, (N, C) or of the shape of `input`."""
    if mask.shape != input.shape[:2] or input.dim() < 3:
        mask = ops.pack_mask(mask, True)
    if torch.is_grad_enabled() and input.requires_grad:
        output: Tensor = _Dropout.apply(input, mask, masks.scale(p))
    else:
        output = ops.dropout(input, mask, masks.scale(p))
    return output


class _Dropout(torch.autograd.Function):
    """Linear, so that its gradient is itself: backward applies the Function once more, any number of times."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mask: Tensor, scale: float) -> Tensor:  # type: ignore[override]  # torch: *args
        ctx.scale = scale
        ctx.save_for_backward(mask)
        output: Tensor = ops.dropout(input, mask, scale)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _Grads:
        (mask,) = ctx.saved_tensors
        run = _Dropout.apply if torch.is_grad_enabled() else ops.dropout
        return run(grad_outputs[0], mask, ctx.scale), None, None
