"""The fused operations as functions. Names and argument order are those of `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from fastlayers import activations, autograd, backends, checks, masks, reference, unfused
from fastlayers.activations import ActLayer


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: ActLayer = "identity",
    act_kwargs: Mapping[str, object] | None = None,
    drop_p: float = 0.0,
    drop_mode: str = "channel",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``dropout(act(batch_norm(input) + residual))`` in one pass forward and one backward.

    Batch normalisation is that of Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167, Algorithm 1); dropout with
    ``drop_mode="channel"`` that of Tompson et al. 2015 (https://arxiv.org/abs/1411.4280, section 3.2).

    Args:
        input: (N, C, ...), float32, float64, bfloat16 or float16, in any layout.
        running_mean, running_var: (C,), or both None. Updated in place when `training`, used otherwise.
        weight, bias: (C,), each may be None; float32 or the dtype of `input` (float64 for float64).
        training: use the statistics of the batch, and drop.
        momentum: the weight of the newest batch in the running statistics; None averages over all batches, which needs
            `num_batches_tracked`.
        eps: added to the variance.
        residual: of the shape and dtype of `input`, added before the activation; or None.
        act, act_kwargs: the activation, see `fastlayers.activations.resolve`.
        drop_p: the probability of dropping, in [0, 1]; what is kept is divided by 1 - drop_p.
        drop_mode: "channel" drops whole (n, c) planes, as `F.dropout2d`; "element" single elements, as `F.dropout`.
            For the same state of the generator the mask is theirs. What is dropped is exactly zero, even where it
            was NaN.
        num_batches_tracked: an int64 scalar, incremented when `training`; or None.

    Returns:
        A tensor of the shape, dtype and memory layout of `input`.

    Raises:
        ValueError, RuntimeError, TypeError, NotImplementedError, IndexError: as `F.batch_norm` and `F.dropout2d` for
            the same mistakes; ValueError for an unknown activation or mode.
    """
    activation = activations.resolve(act, act_kwargs)
    vectors = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    checks.running_statistics(running_mean, running_var, num_batches_tracked, training, momentum)
    checks.channel_sizes(input, vectors)
    checks.batch_norm_input(input, training, eps)
    checks.channel_dtypes(input, vectors[::-1])
    checks.residual(residual, input)
    checks.dropout_probability(drop_p, "drop_p")
    checks.drop_mode(drop_mode)
    if training and activation.random is not None:
        z = batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        return _drop(activation.random(z), drop_p, drop_mode, training)
    backend = backends.serving(input)
    if backend == "torch" and (momentum is not None or not training):
        return unfused.batch_norm_act(
            input, running_mean, running_var, weight, bias, residual, num_batches_tracked,
            training=training, momentum=0.0 if momentum is None else momentum, eps=eps, activation=activation,
            drop_p=drop_p, drop_mode=drop_mode,
        )  # fmt: skip
    if backend in ("reference", "torch"):
        return reference.batch_norm_act_masked(
            input, weight, bias, residual, masks.draw(input, drop_p, drop_mode, training),
            running_mean, running_var, num_batches_tracked,
            training=training, momentum=momentum, eps=eps, activation=activation, drop_p=drop_p,
        )  # fmt: skip
    draw = masks.draw_for_kernels if backend == "cpp" else masks.draw_for_gpu_kernels
    return autograd.batch_norm_act(
        input, weight, bias, residual, draw(input, drop_p, drop_mode, training),
        running_mean, running_var, num_batches_tracked,
        training=training, momentum=momentum, eps=eps, activation=activation, drop_p=drop_p, backend=backend,
    )  # fmt: skip


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, with the same arguments and errors; see `batch_norm_act`."""
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`: zeroes single elements of `input`, of any shape, with probability `p`.

    The rest is divided by 1 - p. The mask is torch's for the same state of the generator; backward keeps one bit per
    element of it.

    Where ``inplace`` is true, torch's own kernel does it: writing over the input leaves nothing to fuse.
    """
    return _dropout(F.dropout, input, p, training, inplace, "element")


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout1d`: zeroes whole channels of (N, C, L), or of (C, L). See `dropout`."""
    if input.dim() not in (2, 3):
        return F.dropout1d(input, p, training, inplace)  # raises
    return _dropout(F.dropout1d, input, p, training, inplace, "channel", batched=input.dim() == 3)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout2d`: zeroes whole channels of (N, C, H, W). See `dropout`.

    As in torch, three dimensions are taken as (N, C, L), with a warning, and other numbers of dimensions warn too.
    """
    if input.dim() != 4:
        return F.dropout2d(input, p, training, inplace)
    return _dropout(F.dropout2d, input, p, training, inplace, "channel")


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout3d`: zeroes whole channels of (N, C, D, H, W), or of (C, D, H, W). See `dropout`."""
    if input.dim() not in (4, 5):
        return F.dropout3d(input, p, training, inplace)
    return _dropout(F.dropout3d, input, p, training, inplace, "channel", batched=input.dim() == 5)


def _dropout(
    torch_version: Callable[[Tensor, float, bool, bool], Tensor],
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    mode: str,
    batched: bool = True,
) -> Tensor:
    checks.dropout_probability(p)
    if inplace:
        return torch_version(input, p, training, True)
    if not batched:
        return _drop(input.unsqueeze(0), p, mode, training).squeeze(0)
    return _drop(input, p, mode, training)


def _drop(input: Tensor, p: float, mode: str, training: bool) -> Tensor:
    if training and p > 0:
        checks.dropout_input(input)
    backend = backends.serving(input)
    if backend == "torch":
        return unfused.dropout(input, p, mode) if training and p else input
    if backend == "reference":
        return reference.apply_mask(input, masks.draw(input, p, mode, training), p)
    if backend == "cpp":
        mask = masks.draw_for_kernels(input, p, mode, training, flat=True)
    else:
        mask = masks.draw_for_gpu_kernels(input, p, mode, training)
    return input if mask is None else autograd.dropout(input, mask, p, backend)
