"""Batch normalisation with statistics of several processes, over the operators and with its gradient.

The operators find statistics and use them in one call. Here other processes have their say in between, so each way
takes two calls: forward has the statistics found by a call in training mode, whose output is thrown away, and
normalises by one in evaluation mode. Backward finds the sums, and the gradient that would hold for constant statistics,
by one call in evaluation mode; the rest of the input's gradient is an affine function of the input, added by another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlayers import backends, collectives, masks, reference
from fastlayers.activations import IDENTITY, Activation
from fastlayers.collectives import Gathered, Others

_FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]

# Added to the variance where that is wanted alone: it only keeps the inverse finite.
_TINY = 1e-300


class Moments(NamedTuple):
    """Mean and biased variance (C,) and the number of values per channel (1,), in float64."""

    mean: Tensor
    var: Tensor
    values: Tensor


class Call(NamedTuple):
    """What of a call is not a tensor."""

    eps: float
    activation: Activation
    drop_p: float
    backend: str
    group_name: str
    others: Others


class _Saved(NamedTuple):
    """The tensors that backward needs of a call."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    flat_bits: Tensor | None
    mask: Tensor | None
    mean: Tensor
    invstd: Tensor
    values: Tensor  # per channel on all ranks, how many


class _LocalGradients(NamedTuple):
    """What a rank finds by itself, ``dz`` being the gradient before the normalisation's ``weight`` and ``bias``."""

    scaled: Tensor  # dz * weight * invstd: the input's gradient if the statistics were constants
    sum_normalised: Tensor  # of dz * (input - mean) * invstd, (C,) in float64
    sum: Tensor  # of dz, (C,) in float64
    residual: Tensor  # dz


def local_moments(input: Tensor, backend: str) -> Tensor:
    """Means, then sums of squared deviations from them, of `input` (N, C, ...): (2C,) in float64; 0 if it is empty."""
    channels = input.shape[1]
    if input.numel() == 0:
        return input.new_zeros(2 * channels, dtype=torch.float64)
    count = input.numel() // channels
    if backend == "reference":
        mean, var = (s.double() for s in reference.batch_statistics(input))
    else:
        _, mean, invstd, _ = backends.op_set(backend).batch_norm_act_fwd(
            input, None, None, None, None, None, None, None, True, None, _TINY,
            IDENTITY.code, IDENTITY.params, 1.0, False,
        )  # fmt: skip
        var = invstd**-2
    return torch.cat((mean, var * count))


def merge(gathered: Gathered) -> Moments:
    """The moments of all ranks' values together.

    By Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances",
    equations 1.5, for any number of parts.
    """
    values = gathered.values.sum()
    mean = (gathered.mean * (gathered.values / values)).sum(0)
    squares = (gathered.squares + gathered.values * (gathered.mean - mean).square()).sum(0)
    return Moments(mean, squares / values, values.view(1))


def normalize_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Moments,
    call: Call,
) -> Tensor:
    """``dropout(act(batch_norm(input) + residual))`` by the statistics of all ranks, which depend on `input`."""
    tensors = (input, weight, bias, residual, mask, *moments)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        output: Tensor = _NormalizeAct.apply(*tensors, call)
        return output
    return _forward(tensors, call, save_flat_bits=False)[0]


class _NormalizeAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        input, weight, bias, residual, mask = tensors[:5]
        # One bit per element stands for the residual where that is all that backward needs of it.
        save_flat_bits = (
            residual is not None and call.activation.derivatives is not None and call.backend != "reference"
        )
        output, mean, invstd, flat_bits = _forward(tensors, call, save_flat_bits)
        needs_residual = not save_flat_bits and call.activation.code != IDENTITY.code
        ctx.call = call
        ctx.save_for_backward(
            input, weight, bias, residual if needs_residual else None, flat_bits if save_flat_bits else None, mask,
            mean, invstd, tensors[7],
        )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        wanted, saved = ctx.needs_input_grad[:4], _Saved(*ctx.saved_tensors)
        with torch.no_grad():
            grads = _backward(grad_outputs[0], saved, ctx.call, wanted)
        if torch.is_grad_enabled():
            sources = (grad_outputs[0], saved.input, saved.weight, saved.bias)
            grads = tuple(None if g is None else _Once.apply(g, *sources) for g in grads)
        return (*grads, *(None,) * 5)


class _Once(torch.autograd.Function):
    """A gradient that says so when it is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "SyncBatchNorm: trying to differentiate twice, which is not supported with more than one process (in one "
            "process, in evaluation mode and when frozen, it is)"
        )


def _forward(tensors: Any, call: Call, save_flat_bits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    input, weight, bias, residual, mask, mean, var, _ = tensors
    if call.backend == "reference":
        output = reference.batch_norm_act_masked(
            input, weight, bias, residual, mask, mean, var, None,
            training=False, momentum=None, eps=call.eps, activation=call.activation, drop_p=call.drop_p,
        )  # fmt: skip
        return output, mean, torch.rsqrt(var + call.eps), None
    result: _FourTensors = backends.op_set(call.backend).batch_norm_act_fwd(
        input, weight, bias, residual, mask, mean, var, None, False, None, call.eps,
        call.activation.code, call.activation.params, masks.scale(call.drop_p), save_flat_bits,
    )  # fmt: skip
    return result


def _backward(grad_output: Tensor, saved: _Saved, call: Call, wanted: Any) -> tuple[Tensor | None, ...]:
    others = call.others
    if others.sums and others.absent:
        raise RuntimeError(
            "SyncBatchNorm: the gradient of the input takes sums over all ranks, but rank "
            f"{', '.join(map(str, others.absent))} ran forward without recording a graph and has no backward"
        )
    find = _reference_gradients if call.backend == "reference" else _gradients
    local = find(grad_output, saved, call, wanted)
    grad_input = None
    if others.sums:
        sums = collectives.total(torch.cat((local.sum, local.sum_normalised)), call.group_name)
        if wanted[0]:
            grad_input = _input_gradient(local.scaled, sums, saved, call)
    # As in torch, of this rank's values only: DistributedDataParallel averages over the ranks.
    grad_weight = _in_dtype_of(saved.weight, local.sum_normalised) if wanted[1] else None
    grad_bias = _in_dtype_of(saved.bias, local.sum) if wanted[2] else None
    return grad_input, grad_weight, grad_bias, local.residual if wanted[3] else None


def _in_dtype_of(parameter: Tensor | None, sums: Tensor) -> Tensor | None:
    return None if parameter is None else sums.to(parameter.dtype)


def _affine(saved: _Saved) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, in which the sums over them then come out."""
    weight = torch.ones_like(saved.mean) if saved.weight is None else saved.weight.double()
    return weight, torch.zeros_like(saved.mean) if saved.bias is None else saved.bias.double()


def _gradients(grad_output: Tensor, saved: _Saved, call: Call, wanted: Any) -> _LocalGradients:
    activation = call.activation
    found: _FourTensors = backends.op_set(call.backend).batch_norm_act_bwd(
        grad_output, saved.input, *_affine(saved), saved.residual, saved.flat_bits, saved.mask,
        saved.mean, saved.invstd, False, activation.code, activation.params, masks.scale(call.drop_p),
        wanted[0], True, wanted[3],
    )  # fmt: skip
    return _LocalGradients(*found)


def _reference_gradients(grad_output: Tensor, saved: _Saved, call: Call, wanted: Any) -> _LocalGradients:
    with torch.enable_grad():
        input, weight, bias = (t.detach().requires_grad_() for t in (saved.input, *_affine(saved)))
        z = reference.normalize(input, saved.mean, saved.invstd, weight, bias)
        y = call.activation.apply(z if saved.residual is None else z + saved.residual.to(z.dtype))
        output = reference.apply_mask(y, saved.mask, call.drop_p).to(input.dtype)
        scaled, sum_normalised, sum, grad_z = torch.autograd.grad(output, (input, weight, bias, z), grad_output)
    return _LocalGradients(scaled, sum_normalised, sum, grad_z.to(input.dtype))


def _input_gradient(scaled: Tensor, sums: Tensor, saved: _Saved, call: Call) -> Tensor:
    """``weight * invstd * (dz - mean(dz) - x̂ * mean(dz * x̂))``, x̂ the normalised input, means over all ranks.

    Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167), section 3.
    """
    by_constant, by_normalised = (sums.view(2, -1) * (-_affine(saved)[0] * saved.invstd / saved.values)).unbind()
    if call.backend == "reference":
        rest = reference.normalize(saved.input, saved.mean, saved.invstd, by_normalised, by_constant)
        return (scaled.to(rest.dtype) + rest).to(scaled.dtype)
    gradient: Tensor = backends.op_set(call.backend).batch_norm_act_fwd(
        saved.input, by_normalised, by_constant, scaled, None, saved.mean, saved.invstd**-2, None, False, None, 0.0,
        IDENTITY.code, IDENTITY.params, 1.0, False,
    )[0]  # fmt: skip
    return gradient
