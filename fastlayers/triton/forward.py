"""Forward kernels: statistics of a batch, and normalise, add, activate, drop in one pass.

A channel that one program can hold is read once (`whole_forward`). Others are read twice: `batch_statistics` leaves
moments of parts, which `merge_statistics` puts together where there is more than one part; then `normalise` goes
through the tensor in the opposite order, so that what is left in the cache is read first.

Moments are those of Welford 1962 in each lane of a tile, merged as in Chan, Golub and LeVeque 1979. Nothing is added
atomically: results do not depend on the order in which programs run.
"""

import triton
import triton.language as tl

from fastlayers.triton import activations
from fastlayers.triton.tiles import (
    ALL,
    accumulator,
    byte_places,
    centred,
    channels_of,
    exists,
    in_reverse,
    load_channels,
    offsets,
    part_of,
    places,
    split,
    store_bits,
    sum_over_tile,
    whereabouts,
)

# Sizes and strides differ between batches and layers; one compiled kernel serves all.
SIZES = (
    "n_outer", "n_inner", "channels", "spatial", "tiles_inner", "tiles", "tiles_per_part", "parts", "count",
    "x_outer", "x_channel", "r_outer", "r_channel", "y_outer", "y_channel", "bytes_inner", "last_kept",
)  # fmt: skip


@triton.jit
def _merged(means, m2s, counts, axis: tl.constexpr):
    """Moments of all from moments of some: mean, sum of squared deviations and count, along `axis`.

    The mean comes out in float64: next to the first guess, what is left to add is small.
    """
    count = tl.sum(counts, axis)
    share = counts / tl.expand_dims(tl.where(count > 0, count, 1.0), axis)
    guess = tl.sum(means * share, axis)
    apart = means - tl.expand_dims(guess, axis)
    # Lanes without elements hold 0, which may be far from the mean.
    rest = tl.sum(apart * share, axis)
    m2 = tl.sum(m2s + apart * apart * counts, axis) - rest * rest * count
    return guess.to(tl.float64) + rest.to(tl.float64), tl.where(m2 < 0, 0.0, m2).to(tl.float64), count


@triton.jit
def merged_tile(means, m2s, counts, ROWS: tl.constexpr):
    """`_merged` of all lanes of a tile that belong to a channel: vectors in float64."""
    if ROWS:
        mean, m2, count = _merged(means, m2s, counts, 0)
    else:
        # In one dimension: a column of them Triton 3.6 lays out so that each thread holds all, on its stack.
        mean, m2, count = _merged(tl.ravel(means), tl.ravel(m2s), tl.ravel(counts), 0)
        mean, m2, count = tl.expand_dims(mean, 0), tl.expand_dims(m2, 0), tl.expand_dims(count, 0)
    return mean, m2, count.to(tl.float64)


@triton.jit
def finish_statistics(
    MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, mean, m2, channel, channels, count, eps, momentum,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Stores the statistics of channels and updates the running ones; returns the inverse standard deviation."""
    there = channel < channels
    values = count.to(tl.float64)
    variance = m2 / values
    invstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(MEAN + channel, mean, mask=there)
    tl.store(INVSTD + channel, invstd, mask=there)
    if CUMULATIVE:
        weight = 1.0 / tl.load(BATCHES).to(tl.float64)
    else:
        weight = tl.full((1,), momentum, tl.float64)
    if RUNNING_MEAN is not None:
        old = tl.load(RUNNING_MEAN + channel, mask=there).to(tl.float64)
        tl.store(
            RUNNING_MEAN + channel, (old * (1.0 - weight) + mean * weight).to(RUNNING_MEAN.dtype.element_ty), there
        )
    if RUNNING_VAR is not None:
        old = tl.load(RUNNING_VAR + channel, mask=there).to(tl.float64)
        new = old * (1.0 - weight) + variance * (values / (values - 1.0)) * weight
        tl.store(RUNNING_VAR + channel, new.to(RUNNING_VAR.dtype.element_ty), mask=there)
    if COUNT_BATCHES and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(BATCHES, tl.load(BATCHES) + 1)
    return invstd


@triton.jit(do_not_specialize=SIZES)
def batch_statistics(
    X, PARTIALS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES,
    eps: tl.float64, momentum: tl.float64,
    n_outer, n_inner, channels, tiles_inner, tiles, tiles_per_part, count, x_outer, x_channel,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Moments of one part of a block of channels, to PARTIALS (3, parts, C); or, if that is all, the statistics."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, part = tl.program_id(0), tl.program_id(1)
    first, last = part_of(part, tiles_per_part, tiles)
    outer, inner = places(first, block, tiles_inner, B0, B1, ROWS, WIDE)
    valid = exists(outer, inner, n_outer, n_inner, VEC, WIDE)
    x = tl.load(X + offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE), mask=valid, other=0).to(ACC)
    # Lanes count from the mean of the first tile, so that a large mean takes no digits of theirs.
    seen = valid.to(ACC)
    origin = sum_over_tile(x / tl.where(valid, sum_over_tile(seen, ROWS)[None, :], 1.0), ROWS)
    mean = tl.where(valid, x - origin[None, :], 0.0)
    m2 = tl.zeros((B0, B1), ACC)
    for step in range(1, last - first):
        outer, inner = places(first + step, block, tiles_inner, B0, B1, ROWS, WIDE)
        valid = exists(outer, inner, n_outer, n_inner, VEC, WIDE)
        at = offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE)
        x = tl.load(X + at, mask=valid, other=0).to(ACC) - origin[None, :]
        seen += valid.to(ACC)
        apart = tl.where(valid, x - mean, 0.0)
        mean += apart / tl.where(seen > 0, seen, 1.0)
        m2 += tl.where(valid, apart * (x - mean), 0.0)
    all_mean, all_m2, all_seen = merged_tile(mean, m2, seen, ROWS)
    all_mean += origin.to(tl.float64)
    channel = channels_of(block, B1, ROWS)
    if PARTIALS is None:
        finish_statistics(
            MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, all_mean, all_m2, channel, channels, count, eps, momentum,
            COUNT_BATCHES, CUMULATIVE,
        )  # fmt: skip
    else:
        there = channel < channels
        parts = tl.num_programs(1)
        tl.store(PARTIALS + part * channels + channel, all_mean, mask=there)
        tl.store(PARTIALS + (parts + part) * channels + channel, all_m2, mask=there)
        tl.store(PARTIALS + (2 * parts + part) * channels + channel, all_seen, mask=there)


@triton.jit(do_not_specialize=SIZES)
def merge_statistics(
    PARTIALS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES,
    eps: tl.float64, momentum: tl.float64,
    channels, parts, count,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Statistics of B1 channels from those of their parts, B0 at a time."""
    channel = tl.program_id(0) * B1 + tl.arange(0, B1)
    mean = tl.zeros((B1,), tl.float64)
    m2 = tl.zeros((B1,), tl.float64)
    seen = tl.zeros((B1,), tl.float64)
    for start in range(0, parts, B0):
        part = start + tl.arange(0, B0)
        valid = (part < parts)[:, None] & (channel < channels)[None, :]
        at = part[:, None] * channels + channel[None, :]
        means = tl.load(PARTIALS + at, mask=valid, other=0.0)
        m2s = tl.load(PARTIALS + parts * channels + at, mask=valid, other=0.0)
        counts = tl.load(PARTIALS + 2 * parts * channels + at, mask=valid, other=0.0)
        new_mean, new_m2, new_seen = _merged(means, m2s, counts, 0)
        both = seen + new_seen
        share = tl.where(both > 0, new_seen / tl.where(both > 0, both, 1.0), 0.0)
        apart = new_mean - mean
        mean += apart * share
        m2 += new_m2 + apart * apart * seen * share
        seen = both
    finish_statistics(
        MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, mean, m2, channel, channels, count, eps, momentum,
        COUNT_BATCHES, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def _finish_tile(
    x, RESIDUAL, r_outer, r_channel, Y, y_outer, y_channel, BITS, bytes_inner,
    high, low, scale, bias, kept, needed, valid, drop_scale,
    outer, inner, tile, block, n_outer, channels, tiles_inner,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Normalises, adds, activates, drops and stores a tile that is loaded."""
    z = centred(x, high, low) * scale[None, :] + bias[None, :]
    if RESIDUAL is not None:
        at = offsets(outer, inner, block, r_outer, r_channel, VEC, ROWS, WIDE)
        z += tl.load(RESIDUAL + at, mask=needed, other=0).to(ACC)
    if BITS is not None:
        byte_at, byte_valid = byte_places(tile, block, tiles_inner, n_outer, channels, bytes_inner, B0, B1, ROWS, WIDE)
        store_bits(BITS, activations.flat(z, ACT), byte_at, byte_valid, B0, B1)
    y = activations.value(z, ACT, A, B, C)
    if KEEP != ALL:
        y = tl.where(kept, y * tl.full((1, 1), drop_scale, ACC), 0.0)
    at = offsets(outer, inner, block, y_outer, y_channel, VEC, ROWS, WIDE)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=valid)


@triton.jit
def known_statistics(MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, eps, part, channel, channels):
    """Those in MEAN and INVSTD, or, in evaluation, the running ones, which the first part then stores there."""
    if RUNNING_MEAN is not None:
        mean = load_channels(RUNNING_MEAN, channel, channels, 0.0, tl.float64)
        invstd = 1.0 / tl.sqrt(load_channels(RUNNING_VAR, channel, channels, 1.0, tl.float64) + eps)
        if part == 0:
            tl.store(MEAN + channel, mean, mask=channel < channels)
            tl.store(INVSTD + channel, invstd, mask=channel < channels)
    else:
        mean = load_channels(MEAN, channel, channels, 0.0, tl.float64)
        invstd = load_channels(INVSTD, channel, channels, 0.0, tl.float64)
    return mean, invstd


@triton.jit
def affine(WEIGHT, BIAS, mean, invstd, channel, channels, ACC: tl.constexpr):
    """What values are centred by, as the sum of two; what they are multiplied by then, and what is added."""
    high, low = split(mean, ACC)
    weight = load_channels(WEIGHT, channel, channels, 1.0, tl.float64)
    return high, low, (invstd * weight).to(ACC), load_channels(BIAS, channel, channels, 0.0, ACC)


@triton.jit
def whole_affine(
    x, valid, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES,
    block, channels, count, eps, momentum,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`affine` by the statistics of channels of which `x` is all, which are stored."""
    mean, m2, _ = merged_tile(x, tl.zeros(x.shape, ACC), valid.to(ACC), ROWS)
    channel = channels_of(block, x.shape[1], ROWS)
    invstd = finish_statistics(
        MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, mean, m2, channel, channels, count, eps, momentum,
        COUNT_BATCHES, CUMULATIVE,
    )  # fmt: skip
    return affine(WEIGHT, BIAS, mean, invstd, channel, channels, ACC)


@triton.jit(do_not_specialize=SIZES)
def normalise(
    X, RESIDUAL, Y, BITS, MASK, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR,
    eps: tl.float64, drop_scale: tl.float64, last_kept,
    n_outer, n_inner, channels, spatial, tiles_inner, tiles, tiles_per_part, bytes_inner,
    x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Everything after the statistics, for one part of a block of channels."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, part = in_reverse()  # batch_statistics left its last tiles in the cache
    channel = channels_of(block, B1, ROWS)
    mean, invstd = known_statistics(MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, eps, part, channel, channels)
    high, low, scale, bias = affine(WEIGHT, BIAS, mean, invstd, channel, channels, ACC)
    first, last = part_of(part, tiles_per_part, tiles)
    for step in range(last - first):
        tile = last - 1 - step
        outer, inner, valid, kept, needed = whereabouts(
            MASK, drop_scale, last_kept, y_outer, y_channel, tile, block, n_outer, n_inner, channels, spatial,
            tiles_inner, KEEP, B0, B1, VEC, ROWS, WIDE,
        )  # fmt: skip
        at = offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE)
        x = tl.load(X + at, mask=needed, other=0).to(ACC)
        _finish_tile(
            x, RESIDUAL, r_outer, r_channel, Y, y_outer, y_channel, BITS, bytes_inner,
            high, low, scale, bias, kept, needed, valid, drop_scale,
            outer, inner, tile, block, n_outer, channels, tiles_inner,
            KEEP, ACT, A, B, C, B0, B1, VEC, ROWS, WIDE, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def whole_forward(
    X, RESIDUAL, Y, BITS, MASK, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES,
    eps: tl.float64, momentum: tl.float64, drop_scale: tl.float64, last_kept,
    n_outer, n_inner, channels, spatial, count, bytes_inner,
    x_outer, x_channel, r_outer, r_channel, y_outer, y_channel,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Training in one launch, for a block of channels that is one tile."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, tile = tl.program_id(0), tl.program_id(1)  # the only tile
    outer, inner, valid, kept, needed = whereabouts(
        MASK, drop_scale, last_kept, y_outer, y_channel, tile, block, n_outer, n_inner, channels, spatial,
        1, KEEP, B0, B1, VEC, ROWS, WIDE,
    )  # fmt: skip
    at = offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE)
    x = tl.load(X + at, mask=valid, other=0).to(ACC)
    high, low, scale, bias = whole_affine(
        x, valid, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, block, channels, count, eps, momentum,
        COUNT_BATCHES, CUMULATIVE, ROWS, ACC,
    )  # fmt: skip
    _finish_tile(
        x, RESIDUAL, r_outer, r_channel, Y, y_outer, y_channel, BITS, bytes_inner,
        high, low, scale, bias, kept, needed, valid, drop_scale,
        outer, inner, tile, block, n_outer, channels, 1,
        KEEP, ACT, A, B, C, B0, B1, VEC, ROWS, WIDE, ACC,
    )  # fmt: skip
