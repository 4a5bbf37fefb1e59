"""What every operation means, as plain PyTorch: the definition that all backends are tested against.

Differentiable any number of times by autograd, on any device that torch knows. Signatures are those of
`fastlayers.functional`; nothing here is fused or fast.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlayers import activations, masks, pooling
from fastlayers.activations import ActLayer
from fastlayers.dtypes import statistics_dtype
from fastlayers.pooling import Pool, PoolLayer


def per_channel(values: Tensor, input: Tensor) -> Tensor:
    """`values` (C,) shaped to broadcast over `input` (N, C, ...)."""
    return values.reshape((1, -1) + (1,) * (input.dim() - 2))


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of `input` (N, C, ...) over all dimensions but the channels."""
    x = input.to(statistics_dtype(input))
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    return mean, (x - per_channel(mean, x)).square().mean(dims)


def normalize(input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(input - mean) * invstd * weight + bias`` per channel, in the dtype of the statistics."""
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    z = (input.to(invstd.dtype) - per_channel(mean, input)) * per_channel(scale, input)
    return z if bias is None else z + per_channel(bias.to(z.dtype), input)


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    var: Tensor,
    count: int,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance.

    ``momentum=None`` averages over all batches. `count` is the number of values per channel; with none, only the batch
    is counted.
    """
    if running_mean is None:
        return
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if count == 0:
        return
    blend_running_statistics(
        running_mean, running_var, num_batches_tracked, momentum, mean, var * (count / (count - 1))
    )


def blend_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    unbiased_var: Tensor,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``; for None, the weight is 1 / `num_batches_tracked`."""
    weight: float | Tensor
    if momentum is not None:
        weight = momentum
    else:
        assert num_batches_tracked is not None
        weight = 1.0 / num_batches_tracked.to(mean.dtype)
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, unbiased_var)):
            if running is not None:
                running.copy_(running.to(batch.dtype) * (1 - weight) + batch * weight)


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
    """See `fastlayers.functional.batch_norm_act`."""
    stochastic = training if stochastic is None else stochastic
    activation = activations.resolve(act, act_kwargs)
    resolved = pooling.resolve(pool, input.dim() - 2)
    if activation.random is not None and stochastic:
        # The slopes are drawn before the mask, as by torch's layers one after the other.
        z = batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        y = activation.random(z)
        y = apply_mask(y, masks.draw(y, drop_p, drop_mode, True), drop_p)
        return y if resolved is None else resolved.apply(y)
    mask = masks.draw(input, drop_p, drop_mode, stochastic)
    activation = activation.in_evaluation()
    return batch_norm_act_masked(
        input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked,
        training=training, momentum=momentum, eps=eps, activation=activation, drop_p=drop_p, pool=resolved,
    )  # fmt: skip


def batch_norm_act_masked(
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
    activation: activations.Activation,
    drop_p: float,
    pool: Pool | None = None,
) -> Tensor:
    """`batch_norm_act` with the dropout mask given: bool, (N, C) or of the shape of `input`."""
    if training:
        mean, var = batch_statistics(input)
        count = input.numel() // max(input.shape[1], 1)
        update_running_statistics(
            running_mean, running_var, num_batches_tracked, momentum, mean.detach(), var.detach(), count
        )
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = (s.to(statistics_dtype(input)) for s in (running_mean, running_var))
    z = normalize(input, mean, torch.rsqrt(var + eps), weight, bias)
    if residual is not None:
        z = z + residual.to(z.dtype)
    y = activation.random(z) if training and activation.random else activation.apply(z)
    dropped = apply_mask(y, mask, drop_p)
    return (dropped if pool is None else pool.apply(dropped)).to(input.dtype)


def apply_mask(input: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Zeros where `mask`, (N, C) or of the shape of `input`, is false or zero, elsewhere `input` / (1 - p).

    Zeros replace NaN and infinity too.
    """
    if mask is None:
        return input
    mask = mask.to(torch.bool)
    if mask.dim() < input.dim():
        mask = mask.reshape(mask.shape + (1,) * (input.dim() - 2))
    # In place on the product, which has the layout of `input`; a new tensor would be contiguous.
    return (input * masks.scale(p)).masked_fill_(~mask, 0)


def element_mask(seed: Tensor, like: Tensor, drop_scale: float) -> Tensor:
    """The mask (bool, like ``empty_like(like)``) of element-wise dropout on a GPU: one random word per element.

    Words are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4) with
    the key `seed` (one int64) and the counter i // 4, where i is the element's position in the memory of
    ``empty_like(like)``; its word is number i % 4 of the four. An element is kept if its word is less than
    (1 - p) * 2**32, for ``drop_scale = 1 / (1 - p)``; with 0 for p = 1, none is.
    """
    blocks = torch.arange((like.numel() + 3) // 4, device=like.device)
    words = torch.stack(_philox(seed, blocks), 1).flatten()[: like.numel()]
    mask = torch.empty_like(like, dtype=torch.bool)
    in_memory = mask.as_strided((like.numel(),), (1,))
    in_memory.copy_(words < (round(2**32 / drop_scale) if drop_scale else 0))
    return mask


def _philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of each element of `counter` (int64, its upper words 0): four words, in int64."""
    key = [seed & _LOW_WORD, seed >> 32 & _LOW_WORD]
    words = [counter & _LOW_WORD, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    for _ in range(10):
        high_0, low_0 = _multiply(words[0], 0xD2511F53)
        high_1, low_1 = _multiply(words[2], 0xCD9E8D57)
        words = [high_1 ^ words[1] ^ key[0], low_1, high_0 ^ words[3] ^ key[1], low_0]
        key = [key[0] + 0x9E3779B9 & _LOW_WORD, key[1] + 0xBB67AE85 & _LOW_WORD]
    return words[0], words[1], words[2], words[3]


_LOW_WORD = 0xFFFFFFFF


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower half of 64-bit products, by way of 48 bits: int64 has no room for all 64."""
    middle = words * (factor & 0xFFFF)
    high = words * (factor >> 16) + (middle >> 16) >> 16
    return high, ((words * (factor >> 16) << 16) + middle) & _LOW_WORD


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
    """See `fastlayers.functional.batch_norm`."""
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """See `fastlayers.functional.dropout`."""
    return F.dropout(input, p, training, inplace)


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """See `fastlayers.functional.dropout1d`."""
    return F.dropout1d(input, p, training, inplace)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """See `fastlayers.functional.dropout2d`."""
    return F.dropout2d(input, p, training, inplace)


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """See `fastlayers.functional.dropout3d`."""
    return F.dropout3d(input, p, training, inplace)
