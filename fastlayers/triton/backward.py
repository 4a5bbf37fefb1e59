"""Backward kernels: sums over each channel, and the gradients of full size.

With g the gradient after dropout and activation, and x^ the normalised input, the gradient of a batch's input is
weight * invstd * (g - mean(g) - x^ mean(g x^)); that of the residual is g, of the bias sum(g), of the weight sum(g x^).

A channel that one program can hold is read once (`whole_backward`). Others are read twice: `gradient_sums` leaves sums
of parts, which `merge_sums` puts together where there is more than one part; then `input_gradient` goes through the
tensors in the opposite order. In evaluation the statistics are constants and one pass is enough. Of dropped planes
gradients are not read, and their input only where it has a gradient of its own.
"""

import triton
import triton.language as tl

from fastlayers.triton import activations
from fastlayers.triton.forward import SIZES as FORWARD_SIZES
from fastlayers.triton.tiles import (
    ALL,
    accumulator,
    byte_places,
    centred,
    channels_of,
    in_reverse,
    load_bits,
    load_channels,
    offsets,
    part_of,
    split,
    sum_over_tile,
    whereabouts,
)

SIZES = (*FORWARD_SIZES, "g_outer", "g_channel")


@triton.jit
def _of_channels(MEAN, INVSTD, WEIGHT, BIAS, channel, channels, ACC: tl.constexpr):
    """The mean, as the sum of two values; the inverse standard deviation, weight and bias."""
    high, low = split(load_channels(MEAN, channel, channels, 0.0, tl.float64), ACC)
    invstd = load_channels(INVSTD, channel, channels, 0.0, ACC)
    weight = load_channels(WEIGHT, channel, channels, 1.0, ACC)
    return high, low, invstd, weight, load_channels(BIAS, channel, channels, 0.0, ACC)


@triton.jit
def _read_tile(
    GRAD, X, RESIDUAL, BITS, MASK, high, low, invstd, weight, bias, drop_scale, last_kept,
    g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
    tile, block, n_outer, n_inner, channels, spatial, tiles_inner, bytes_inner,
    X_IF_DROPPED: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A tile's indices; which of its elements there are, and which dropout keeps; the normalised input, and g.

    Without X_IF_DROPPED the input is not read where nothing is kept. There g is 0, whatever arrives.
    """
    outer, inner, valid, kept, needed = whereabouts(
        MASK, drop_scale, last_kept, y_outer, y_channel, tile, block, n_outer, n_inner, channels, spatial,
        tiles_inner, KEEP, B0, B1, VEC, ROWS, WIDE,
    )  # fmt: skip
    x_needed = valid if X_IF_DROPPED else needed
    at = offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE)
    normalised = centred(tl.load(X + at, mask=x_needed, other=0).to(ACC), high, low) * invstd[None, :]
    at = offsets(outer, inner, block, g_outer, g_channel, VEC, ROWS, WIDE)
    g = tl.load(GRAD + at, mask=needed, other=0).to(ACC)
    if KEEP != ALL:
        g = g * tl.full((1, 1), drop_scale, ACC)
    if BITS is not None:
        byte_at, byte_valid = byte_places(tile, block, tiles_inner, n_outer, channels, bytes_inner, B0, B1, ROWS, WIDE)
        g = activations.gradient_if(g, load_bits(BITS, byte_at, byte_valid, B0, B1), ACT, A)
    else:
        z = normalised * weight[None, :] + bias[None, :]
        if RESIDUAL is not None:
            at = offsets(outer, inner, block, r_outer, r_channel, VEC, ROWS, WIDE)
            z += tl.load(RESIDUAL + at, mask=needed, other=0).to(ACC)
        g = activations.gradient(g, z, ACT, A, B, C)
    return outer, inner, valid, kept, normalised, tl.where(kept, g, 0.0)


@triton.jit
def _store(
    TO, value, outer, inner, block, stride_outer, stride_channel, valid,
    VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if TO is not None:
        at = offsets(outer, inner, block, stride_outer, stride_channel, VEC, ROWS, WIDE)
        tl.store(TO + at, value.to(TO.dtype.element_ty), mask=valid)


@triton.jit
def _store_sums(SUMS, GRAD_WEIGHT, GRAD_BIAS, sum_g, sum_gx, channel, channels):
    there = channel < channels
    if SUMS is not None:
        tl.store(SUMS + channel, sum_g, mask=there)
        tl.store(SUMS + channels + channel, sum_gx, mask=there)
    if GRAD_BIAS is not None:
        tl.store(GRAD_BIAS + channel, sum_g.to(GRAD_BIAS.dtype.element_ty), mask=there)
    if GRAD_WEIGHT is not None:
        tl.store(GRAD_WEIGHT + channel, sum_gx.to(GRAD_WEIGHT.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def gradient_sums(
    GRAD, X, RESIDUAL, BITS, MASK, WEIGHT, BIAS, MEAN, INVSTD, DX, DR, PARTIALS, SUMS, GRAD_WEIGHT, GRAD_BIAS,
    drop_scale: tl.float64, last_kept,
    n_outer, n_inner, channels, spatial, tiles_inner, tiles, tiles_per_part, bytes_inner,
    g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Sums of g and g x^ over a part of a block of channels, to PARTIALS (2, parts, C) or, if that is all, to SUMS.

    In evaluation DX and DR are given and the gradients of full size go there.
    """
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, part = tl.program_id(0), tl.program_id(1)
    channel = channels_of(block, B1, ROWS)
    high, low, invstd, weight, bias = _of_channels(MEAN, INVSTD, WEIGHT, BIAS, channel, channels, ACC)
    sum_g = tl.zeros((B0, B1), ACC)
    sum_gx = tl.zeros((B0, B1), ACC)
    first, last = part_of(part, tiles_per_part, tiles)
    for step in range(last - first):
        tile = first + step
        outer, inner, valid, kept, normalised, g = _read_tile(
            GRAD, X, RESIDUAL, BITS, MASK, high, low, invstd, weight, bias, drop_scale, last_kept,
            g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
            tile, block, n_outer, n_inner, channels, spatial, tiles_inner, bytes_inner,
            False, KEEP, ACT, A, B, C, B0, B1, VEC, ROWS, WIDE, ACC,
        )  # fmt: skip
        if SUMS is not None:
            sum_g += g
            # What is not kept counts for nothing, even where a channel is poisoned.
            sum_gx += tl.where(kept, g * normalised, 0.0)
        dx = g * (weight * invstd)[None, :]
        _store(DX, dx, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)
        _store(DR, g, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)
    if SUMS is not None:
        all_g = sum_over_tile(sum_g, ROWS).to(tl.float64)
        all_gx = sum_over_tile(sum_gx, ROWS).to(tl.float64)
        if PARTIALS is None:
            _store_sums(SUMS, GRAD_WEIGHT, GRAD_BIAS, all_g, all_gx, channel, channels)
        else:
            there = channel < channels
            tl.store(PARTIALS + part * channels + channel, all_g, mask=there)
            tl.store(PARTIALS + (tl.num_programs(1) + part) * channels + channel, all_gx, mask=there)


@triton.jit(do_not_specialize=SIZES)
def merge_sums(PARTIALS, SUMS, GRAD_WEIGHT, GRAD_BIAS, channels, parts, B0: tl.constexpr, B1: tl.constexpr):
    """The sums of B1 channels from those of their parts, B0 at a time."""
    channel = tl.program_id(0) * B1 + tl.arange(0, B1)
    sum_g = tl.zeros((B1,), tl.float64)
    sum_gx = tl.zeros((B1,), tl.float64)
    for start in range(0, parts, B0):
        part = start + tl.arange(0, B0)
        valid = (part < parts)[:, None] & (channel < channels)[None, :]
        at = part[:, None] * channels + channel[None, :]
        sum_g += tl.sum(tl.load(PARTIALS + at, mask=valid, other=0.0), 0)
        sum_gx += tl.sum(tl.load(PARTIALS + parts * channels + at, mask=valid, other=0.0), 0)
    _store_sums(SUMS, GRAD_WEIGHT, GRAD_BIAS, sum_g, sum_gx, channel, channels)


@triton.jit
def _mean_of(total, count, ACC: tl.constexpr):
    """The mean of `count` values from their sum."""
    return (total / count.to(tl.float64)).to(ACC)


@triton.jit
def means_of(SUMS, channel, channels, count, ACC: tl.constexpr):
    """The means of g and g x^ over a batch."""
    sum_g = load_channels(SUMS, channel, channels, 0.0, tl.float64)
    sum_gx = load_channels(SUMS + channels, channel, channels, 0.0, tl.float64)
    return _mean_of(sum_g, count, ACC), _mean_of(sum_gx, count, ACC)


@triton.jit
def batch_gradient(g, normalised, mean_g, mean_gx, factor):
    """The gradient of a batch's input, by the formula of this file's first lines."""
    return (g - mean_g[None, :] - normalised * mean_gx[None, :]) * factor[None, :]


@triton.jit(do_not_specialize=SIZES)
def input_gradient(
    GRAD, X, RESIDUAL, BITS, MASK, WEIGHT, BIAS, MEAN, INVSTD, DX, DR, SUMS,
    drop_scale: tl.float64, last_kept,
    n_outer, n_inner, channels, spatial, count, tiles_inner, tiles, tiles_per_part, bytes_inner,
    g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The gradients of full size in training, for one part of a block of channels. SUMS is None if DX is."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, part = in_reverse()  # gradient_sums left its last tiles in the cache
    channel = channels_of(block, B1, ROWS)
    high, low, invstd, weight, bias = _of_channels(MEAN, INVSTD, WEIGHT, BIAS, channel, channels, ACC)
    if DX is not None:
        mean_g, mean_gx = means_of(SUMS, channel, channels, count, ACC)
    first, last = part_of(part, tiles_per_part, tiles)
    for step in range(last - first):
        tile = last - 1 - step
        outer, inner, valid, _, normalised, g = _read_tile(
            GRAD, X, RESIDUAL, BITS, MASK, high, low, invstd, weight, bias, drop_scale, last_kept,
            g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
            tile, block, n_outer, n_inner, channels, spatial, tiles_inner, bytes_inner,
            True, KEEP, ACT, A, B, C, B0, B1, VEC, ROWS, WIDE, ACC,
        )  # fmt: skip
        _store(DR, g, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)
        if DX is not None:
            dx = batch_gradient(g, normalised, mean_g, mean_gx, weight * invstd)
            _store(DX, dx, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)


@triton.jit(do_not_specialize=SIZES)
def whole_backward(
    GRAD, X, RESIDUAL, BITS, MASK, WEIGHT, BIAS, MEAN, INVSTD, DX, DR, GRAD_WEIGHT, GRAD_BIAS,
    drop_scale: tl.float64, last_kept,
    n_outer, n_inner, channels, spatial, count, bytes_inner,
    g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """All gradients in training in one launch, for a block of channels that is one tile."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, tile = tl.program_id(0), tl.program_id(1)  # the only tile
    channel = channels_of(block, B1, ROWS)
    high, low, invstd, weight, bias = _of_channels(MEAN, INVSTD, WEIGHT, BIAS, channel, channels, ACC)
    outer, inner, valid, kept, normalised, g = _read_tile(
        GRAD, X, RESIDUAL, BITS, MASK, high, low, invstd, weight, bias, drop_scale, last_kept,
        g_outer, g_channel, x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
        tile, block, n_outer, n_inner, channels, spatial, 1, bytes_inner,
        True, KEEP, ACT, A, B, C, B0, B1, VEC, ROWS, WIDE, ACC,
    )  # fmt: skip
    sum_g = sum_over_tile(g, ROWS).to(tl.float64)
    # What is not kept counts for nothing, even where a channel is poisoned.
    sum_gx = sum_over_tile(tl.where(kept, g * normalised, 0.0), ROWS).to(tl.float64)
    _store_sums(None, GRAD_WEIGHT, GRAD_BIAS, sum_g, sum_gx, channel, channels)
    _store(DR, g, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)
    if DX is not None:
        mean_g, mean_gx = _mean_of(sum_g, count, ACC), _mean_of(sum_gx, count, ACC)
        dx = batch_gradient(g, normalised, mean_g, mean_gx, weight * invstd)
        _store(DX, dx, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)
