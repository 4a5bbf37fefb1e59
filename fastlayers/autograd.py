"""The operators with their gradients, as `torch.autograd.Function`s.

Backward runs the compiled kernel. Only where it is itself to be differentiated (``create_graph=True``) does it go
through a second Function, whose own backward is written in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlayers import backends, masks, reference
from fastlayers.activations import IDENTITY, Activation
from fastlayers.pooling import Pool

_Grads = tuple[Tensor | None, ...]
_FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


class Call(NamedTuple):
    """What of a call is not a tensor."""

    training: bool
    momentum: float | None
    eps: float
    activation: Activation
    drop_p: float
    backend: str  # backward's too, whatever is set by then: what forward saves has a format of its own
    pool: Pool | None = None  # for `pooled`


class _Saved(NamedTuple):
    """The tensors that backward needs of a call."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None  # where its values are needed
    flat_bits: Tensor | None  # where instead one bit per element is enough
    mask: Tensor | None
    mean: Tensor
    invstd: Tensor


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    call: Call,
) -> Tensor:
    """The fused operator. `mask` is drawn for the kernels of ``call.backend``, by `masks`."""
    tensors = (input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        output: Tensor = _BatchNormAct.apply(*tensors, call)
        return output
    return _forward(tensors, call, save_flat_bits=False)[0]


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        input, weight, bias, residual, mask = tensors[:5]
        # One bit per element stands for the residual where that is all that backward needs of it.
        save_flat_bits = residual is not None and call.activation.derivatives is not None
        output, mean, invstd, flat_bits = _forward(tensors, call, save_flat_bits)
        needs_residual = not save_flat_bits and call.activation.code != IDENTITY.code
        ctx.call = call
        ctx.save_for_backward(
            input, weight, bias, residual if needs_residual else None, flat_bits if save_flat_bits else None, mask,
            mean, invstd,
        )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _Grads:
        return run_backward(ctx, grad_outputs[0], _backward, _differentiable_gradients, 4)


def _forward(tensors: Any, call: Call, save_flat_bits: bool) -> _FourTensors:
    if call.training:
        mark_written(tensors[5:])
    result: _FourTensors = backends.op_set(call.backend).batch_norm_act_fwd(
        *tensors, call.training, call.momentum, call.eps,
        call.activation.code, call.activation.params, masks.scale(call.drop_p), save_flat_bits,
    )  # fmt: skip
    return result


def mark_written(tensors: Sequence[Tensor | None]) -> None:
    """Tells autograd of what an operator writes to behind its back: whoever saved one for backward shall hear of it."""
    if not torch.compiler.is_compiling():
        written = [t for t in tensors if t is not None and not t.is_inference()]
        if written:
            torch.autograd.graph.increment_version(written)


def _backward(saved: Sequence[Any], call: Call, wanted: Sequence[bool]) -> _FourTensors:
    result: _FourTensors = backends.op_set(call.backend).batch_norm_act_bwd(
        *saved, call.training, call.activation.code, call.activation.params, masks.scale(call.drop_p),
        wanted[0], wanted[1] or wanted[2], wanted[3],
    )  # fmt: skip
    return result


def run_backward(
    ctx: Any,
    grad_output: Tensor,
    kernel: Callable[[Sequence[Any], Call, Sequence[bool]], tuple[Tensor, ...]],
    graph: Callable[[Sequence[Any], Call], _Grads],
    count: int,
) -> _Grads:
    """Backward of a Function of tensors and, behind them, a `Call`, which forward left in ``ctx.call``.

    Args:
        ctx: of the Function.
        grad_output: the gradient that came in.
        kernel: finds the gradients, of that and what forward saved.
        graph: the same as plain PyTorch, to differentiate again; None for what needs no gradient.
        count: how many of the Function's arguments, from the first, have gradients.
    """
    wanted, saved = ctx.needs_input_grad[:count], (grad_output, *ctx.saved_tensors)
    if torch.is_grad_enabled():
        grads = _DifferentiableBackward.apply(kernel, graph, ctx.call, wanted, *saved)
    else:
        grads = kernel(saved, ctx.call, wanted)
    nothing = (None,) * (len(ctx.needs_input_grad) - count)
    return (*[g if want else None for g, want in zip(grads, wanted, strict=True)], *nothing)


class _DifferentiableBackward(torch.autograd.Function):
    """First-order gradients that can be differentiated again, any number of times."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, graph: Any, call: Call, wanted: Any, *saved: Tensor | None) -> Any:
        ctx.graph, ctx.call, ctx.wanted = graph, call, wanted
        ctx.save_for_backward(*saved)
        return kernel(saved, call, wanted)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> _Grads:
        saved, wanted = ctx.saved_tensors, ctx.wanted
        with torch.enable_grad():
            # Views: graphs of what follows end at these, and through them reach the originals.
            views = [None if t is None else t.view_as(t) for t in saved]
            grads = ctx.graph(views, ctx.call)
        pairs = [
            (grad, grad_grad)
            for grad, grad_grad, want in zip(grads, grad_grads, wanted, strict=True)
            if want and grad is not None and grad.requires_grad
        ]
        # The gradient that came in, and what has gradients.
        inputs = tuple(views[: 1 + len(wanted)])
        found = gradients([g for g, _ in pairs], inputs, [gg for _, gg in pairs], torch.is_grad_enabled())
        return (*(None,) * 4, *found, *(None,) * (len(saved) - len(found)))


def gradients(
    outputs: list[Tensor], inputs: tuple[Tensor | None, ...], grad_outputs: list[Tensor], create_graph: bool
) -> _Grads:
    """`torch.autograd.grad`, with None for the inputs that need no gradient or have none."""
    sources = [t for t in inputs if t is not None and t.requires_grad]
    if not sources or not outputs:
        return (None,) * len(inputs)
    found = iter(torch.autograd.grad(outputs, sources, grad_outputs, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def _differentiable_gradients(tensors: Sequence[Any], call: Call) -> _Grads:
    """What the backward kernel computes, as a graph of plain PyTorch operations; None for what needs no gradient."""
    grad_output, saved = tensors[0], _Saved(*tensors[1:])
    input, activation, ops = saved.input, call.activation, backends.op_set(call.backend)
    mean, invstd = saved.mean, saved.invstd
    if call.training:
        mean, var = reference.batch_statistics(input)
        invstd = torch.rsqrt(var + call.eps)
    z = reference.normalize(input, mean, invstd, saved.weight, saved.bias)
    mask = saved.mask
    if mask is not None and mask.dtype == torch.uint8:
        mask = ops.unpack_mask(mask, input, False)
    elif mask is not None and mask.dtype == torch.int64:
        mask = ops.element_mask(mask, input, masks.scale(call.drop_p))
    grad = reference.apply_mask(grad_output.to(z.dtype), mask, call.drop_p)
    if saved.flat_bits is not None and activation.derivatives is not None:
        flat, elsewhere = activation.derivatives
        grad = torch.where(ops.unpack_mask(saved.flat_bits, input, False), grad * flat, grad * elsewhere)
    else:
        before = z if saved.residual is None else z + saved.residual.to(z.dtype)
        grad = through_activation(grad, before, activation)
    return (*gradients([z], (input, saved.weight, saved.bias), [grad], True), grad.to(input.dtype))


def through_activation(grad: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """The gradient with respect to `z` for `grad`, that of ``activation(z)``, as a graph."""
    if activation.code == IDENTITY.code:
        return grad
    z = z if z.requires_grad else z.requires_grad_()
    (before,) = torch.autograd.grad(activation.apply(z), z, grad, create_graph=True)
    return before


def dropout(input: Tensor, mask: Tensor, p: float, backend: str) -> Tensor:
    """`input` times `mask` / (1 - p), zero where the mask is, by the kernels of `backend`.

    `mask` is drawn for them, by `masks`; if it is one of bits, flat.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        output: Tensor = _Dropout.apply(input, mask, masks.scale(p), backend)
    else:
        output = backends.op_set(backend).dropout(input, mask, masks.scale(p))
    return output


class _Dropout(torch.autograd.Function):
    """Linear, so that its gradient is itself: backward applies the Function once more, any number of times."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mask: Tensor, scale: float, backend: str) -> Tensor:
        ctx.scale, ctx.backend = scale, backend
        ctx.save_for_backward(mask)
        output: Tensor = backends.op_set(backend).dropout(input, mask, scale)
        # An element-wise mask, which has one dimension, is by the order of memory.
        ctx.strides = output.stride() if mask.dim() == 1 else None
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _Grads:
        (mask,), (grad,) = ctx.saved_tensors, grad_outputs
        if ctx.strides is not None and grad.stride() != ctx.strides:
            grad = grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)
        if torch.is_grad_enabled():
            return _Dropout.apply(grad, mask, ctx.scale, ctx.backend), None, None, None
        return backends.op_set(ctx.backend).dropout(grad, mask, ctx.scale), None, None, None
