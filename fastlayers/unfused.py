"""The fused operations as torch's own, one after the other: for tiny tensors, and for what looks into a computation."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlayers import backends, checks, masks, reference
from fastlayers.activations import RELU, Activation
from fastlayers.pooling import Pool

# Given a number, torch makes such a tensor at each call. One without dimensions has no part in the dtype of the result.
_ZERO = torch.zeros((), dtype=torch.float32, device="cpu")


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    drop_p: float,
    drop_mode: str,
    pool: Pool | None = None,
) -> Tensor:
    """`functional.batch_norm_act`, its arguments checked, as the operators that torch's layers call.

    Exporters, tracers and the transforms of `torch.func` know what these mean, and torch.compile makes one kernel of
    them. `momentum` is a number: torch's operator has no other.
    """
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    weight, bias = _contiguous(weight), _contiguous(bias)
    if not training:
        running_mean, running_var = _contiguous(running_mean), _contiguous(running_var)
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    z = activation.apply(z if residual is None else z + residual)
    if drop_p:
        z = dropout(z, drop_p, drop_mode)
    return z if pool is None else pool.apply(z)


def _contiguous(values: Tensor | None) -> Tensor | None:
    """`values`, of each channel, as torch's backward takes them to be on a CPU where channels are adjacent."""
    return values if values is None or values.is_contiguous() else values.contiguous()


def dropout(input: Tensor, p: float, mode: str) -> Tensor:
    """Dropout of elements or, for mode "channel", of channels, of (N, C, ...).

    For observers it is torch's node, which multiplies by zero, so that NaN stays NaN; else what is dropped is zero.
    """
    if backends.observer() is None:
        return reference.apply_mask(input, masks.draw(input, p, mode, True), p)
    return F.dropout(input, p) if mode == "element" else torch.feature_dropout(input, p, True)


def tiny_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    drop_p: float,
    drop_mode: str,
    pool: Pool | None = None,
) -> Tensor | None:
    """The same in the fewest steps in Python, unchecked, and with zeros for all that is dropped.

    `drop_p` is 0, or `masks.draw_tiny` draws for it. None for calls that the checks of `functional.batch_norm_act`
    refuse, with nothing changed: they raise what torch raises, and say more.
    """
    # What torch checks in Python. Nothing is refused after the running statistics were written to.
    if eps < 0.0 or (batch_statistics and (input.numel() <= input.shape[1] or eps == 0.0)):
        return None
    # Where channels are adjacent, torch's backward reads other elements than these tensors have if they have strides.
    for values in (weight, bias, running_mean, running_var):
        if values is not None and not values.is_contiguous():
            return None
    if residual is not None and not (
        residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device
    ):
        return None
    if pool is not None:
        if pool.dims != input.dim() - 2:
            return None
        checks.pool(pool, input)
    try:
        z = torch.batch_norm(
            input, weight, bias, running_mean, running_var, batch_statistics, momentum, eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
    except (ValueError, RuntimeError, TypeError, NotImplementedError, IndexError):
        return None
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if residual is not None:
        z = z + residual
    y = activation.apply(z) if not drop_p else _tiny_dropout(z, activation, drop_p, drop_mode)
    return y if pool is None else pool.apply(y)


def _tiny_dropout(z: Tensor, activation: Activation, drop_p: float, drop_mode: str) -> Tensor:
    mask = masks.draw_tiny(z, drop_p, drop_mode)
    if activation.code == RELU.code:
        # One node of autograd for both: kept is what is in the mask and not z <= 0, so that NaN is.
        return torch.where(mask.gt(z.le(_ZERO)), z * _scale(drop_p), _ZERO)
    return torch.where(mask, activation.apply(z) * _scale(drop_p), _ZERO)


@functools.lru_cache
def _scale(p: float) -> Tensor:
    """`masks.scale` as a tensor of no dimensions."""
    with torch.inference_mode(False):  # else no backward could ever use it
        return torch.full((), masks.scale(p), dtype=torch.float64, device="cpu")
