"""The fused operations as functions. Names and argument order are those of `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlayers import (
    activations,
    autograd,
    backends,
    checks,
    collectives,
    masks,
    pooled,
    pooling,
    reference,
    synchronised,
    unfused,
)
from fastlayers.activations import ActLayer
from fastlayers.collectives import Status
from fastlayers.dtypes import SUPPORTED
from fastlayers.pooling import Pool, PoolLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    stochastic: bool | None = None,
    pool: PoolLayer = None,
) -> Tensor:
    """``max_pool(dropout(act(batch_norm(input) + residual)))`` in one pass forward and one backward.

    Batch normalisation is that of Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167, Algorithm 1); dropout with
    ``drop_mode="channel"`` that of Tompson et al. 2015 (https://arxiv.org/abs/1411.4280, section 3.2).

    Args:
        input: (N, C, ...), float32, float64, bfloat16 or float16, in any layout.
        running_mean, running_var: (C,), or both None. Updated in place when `training`, used otherwise.
        weight, bias: (C,), each may be None; float32 or the dtype of `input` (float64 for float64).
        training: use the statistics of the batch, and update the running ones.
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
        stochastic: drop, and have RReLU draw its slopes; None is as `training`.
        pool: max-pooling of what comes out: `nn.MaxPool1d` for (N, C, L), `nn.MaxPool2d` for (N, C, H, W),
            `nn.MaxPool3d`, or else see `fastlayers.pooling.resolve`. Dropping channels before or after it is the same
            function of the same mask. Pooling is a pass of its own, by torch, behind: a `residual`, ``drop_mode=
            "element"`` where it drops, RReLU where it draws, three dimensions, windows of more than 256 elements.

    Returns:
        A tensor of the shape, dtype and memory layout of `input`; with `pool`, of the sizes that it leaves.

    Raises:
        ValueError, RuntimeError, TypeError, NotImplementedError, IndexError: as `F.batch_norm`, `F.dropout2d` and
            `F.max_pool2d` for the same mistakes; ValueError for an unknown activation or mode, and for windows of
            `pool` without any element, which a dilation beyond the input makes.
    """
    activation = activations.resolve(act, act_kwargs)
    stochastic = training if stochastic is None else stochastic
    vectors = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    checks.tensors(input, (*vectors, ("residual", residual), ("num_batches_tracked", num_batches_tracked)))
    behind = None if pool is None else pooling.resolve(pool, input.dim() - 2)
    checks.running_statistics(running_mean, running_var, num_batches_tracked, training, momentum)
    checks.channel_sizes(input, vectors)
    checks.batch_norm_input(input, training, eps)
    checks.channel_dtypes(input, vectors[::-1])
    checks.residual(residual, input)
    checks.dropout_probability(drop_p, "drop_p")
    checks.drop_mode(drop_mode)
    if behind is not None:
        checks.pool(behind, input)
    if activation.random is not None:
        if stochastic:
            z = batch_norm_act(
                input, running_mean, running_var, weight, bias, training, momentum, eps,
                residual=residual, num_batches_tracked=num_batches_tracked,
            )  # fmt: skip
            y = _drop(activation.random(z), drop_p, drop_mode, True)
            return y if behind is None else behind.apply(y)
        activation = activation.in_evaluation()
    if behind is not None and not _fuses(behind, residual, drop_p if stochastic else 0.0, drop_mode):
        y = batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, act=activation, drop_p=drop_p, drop_mode=drop_mode,
            num_batches_tracked=num_batches_tracked, stochastic=stochastic,
        )  # fmt: skip
        return behind.apply(y)
    backend = backends.serving(input)
    if backend == "torch" and (momentum is not None or not training):
        return unfused.batch_norm_act(
            input, running_mean, running_var, weight, bias, residual, num_batches_tracked,
            training=training, momentum=0.0 if momentum is None else momentum, eps=eps, activation=activation,
            drop_p=drop_p if stochastic else 0.0, drop_mode=drop_mode, pool=behind,
        )  # fmt: skip
    mask = _draw(backend)(input, drop_p, drop_mode, stochastic)
    if backend in ("reference", "torch"):
        return reference.batch_norm_act_masked(
            input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked,
            training=training, momentum=momentum, eps=eps, activation=activation, drop_p=drop_p, pool=behind,
        )  # fmt: skip
    call = autograd.Call(training, momentum, eps, activation, drop_p, backend, behind)
    if behind is not None:
        return pooled.batch_norm_act_pool(
            input, weight, bias, mask, running_mean, running_var, num_batches_tracked, call
        )
    return autograd.batch_norm_act(
        input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked, call
    )


def _fuses(pool: Pool, residual: Tensor | None, drop_p: float, drop_mode: str) -> bool:
    """Whether the operators pool too; else torch does, behind them."""
    return pool.is_fusible and residual is None and (drop_mode == "channel" or drop_p == 0)


def _draw(backend: str) -> Callable[[Tensor, float, str, bool], Tensor | None]:
    """What draws masks in the form that `backend` takes."""
    if backend in ("reference", "torch"):
        return masks.draw
    return masks.draw_for_kernels if backend == "cpp" else masks.draw_for_gpu_kernels


def sync_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroup,
    num_features: int,
    residual: Tensor | None = None,
    act: ActLayer = "identity",
    act_kwargs: Mapping[str, object] | None = None,
    drop_p: float = 0.0,
    drop_mode: str = "channel",
    num_batches_tracked: Tensor | None = None,
    pool: PoolLayer = None,
) -> Tensor:
    """`batch_norm_act` in training, with the statistics of the batches of all ranks together.

    One gather forward and, if a rank needs the gradient of its input, one sum backward. Gradients of `weight` and
    `bias` are of this rank's values only, as in `torch.nn.SyncBatchNorm`. Not differentiable twice. `pool` is a pass of
    its own behind, by torch. Other arguments and errors are those of `batch_norm_act`.

    Args:
        input: (N, C, ...); N and sizes may differ between ranks, and be 0 on some.
        process_group: of two ranks or more, each of which calls this.
        num_features: C, which is the same on all ranks.

    Raises:
        RuntimeError: this function failed on another rank, whose own error says why; or, in backward, the gradient of
            the input needs a sum over ranks, some of which recorded no graph.
        ValueError: the ranks have fewer than two values per channel together.
    """
    try:
        activation = activations.resolve(act, act_kwargs)
        vectors = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
        checks.tensors(input, (*vectors, ("residual", residual), ("num_batches_tracked", num_batches_tracked)))
        behind = None if pool is None else pooling.resolve(pool, input.dim() - 2)
        checks.running_statistics(running_mean, running_var, num_batches_tracked, True, momentum)
        checks.sync_batch_norm_shape(input)
        checks.channel_sizes(input, vectors)
        checks.num_features(input, num_features)
        checks.batch_norm_input(input, False, eps)
        checks.positive_eps(eps)
        checks.channel_dtypes(input, vectors[::-1])
        checks.residual(residual, input)
        checks.dropout_probability(drop_p, "drop_p")
        checks.drop_mode(drop_mode)
        if behind is not None:
            checks.pool(behind, input)
        backend = backends.serving(input, leaves_tiny=False)
        if backend == "torch":  # its operators find no statistics apart
            backend = "reference"
        fused, fused_p = (activation, drop_p) if activation.random is None else (activations.IDENTITY, 0.0)
        mask = _draw(backend)(input, fused_p, drop_mode, True)
        with torch.no_grad():
            local = synchronised.local_moments(input, backend)
    except Exception:
        # The others wait for this rank's statistics.
        collectives.tell_failure(num_features, _device_of(weight, running_mean, input), process_group)
        raise
    status = _status(input, weight, bias, residual)
    with torch.no_grad():
        gathered, others = collectives.gather(local, input.numel() // num_features, status, process_group)
        moments = synchronised.merge(gathered)
        if running_mean is not None:
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            reference.blend_running_statistics(
                running_mean, running_var, num_batches_tracked, momentum,
                moments.mean, moments.var * (moments.values / (moments.values - 1)),
            )  # fmt: skip
    call = synchronised.Call(eps, fused, fused_p, backend, process_group.group_name, others)
    output = synchronised.normalize_act(input, weight, bias, residual, mask, moments, call)
    if activation.random is not None:
        output = _drop(activation.random(output), drop_p, drop_mode, True)
    return output if behind is None else behind.apply(output)


def _device_of(*values: object) -> torch.device:
    return next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))


def _status(input: Tensor, *others: Tensor | None) -> Status:
    if not torch.is_grad_enabled():
        return Status.NO_GRAPH
    if input.requires_grad:
        return Status.INPUT_GRADIENT
    return Status.GRAPH if any(t is not None and t.requires_grad for t in others) else Status.NO_GRAPH


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
    checks.tensors(input, (), "dropout")
    checks.dropout_probability(p)
    if inplace or (p == 1 and input.dtype not in SUPPORTED):  # of which torch makes zeros
        return torch_version(input, p, training, inplace)
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
