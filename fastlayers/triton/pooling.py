"""Max-pooling behind the fused operator: forward, which writes pooled tensors only, and the gradient of the input.

Forward goes over tiles of pooled places and, for each place, over the elements of its window: `pool` after the
statistics' kernels of forward.py, or `whole_pool` where one program can hold a channel. Where the activation is
monotone, elements are compared before it, by the sign of the channel's scale, and only what is taken is normalised and
activated.

Backward sums over pooled tensors by the kernels of backward.py, which leave the gradient of each element that was
taken; `pool_gradient` then goes over the input, and each element adds those of the windows that took it. Nothing is
added atomically.

A window is eight constants: KH and KW, SH and SW, PH and PW, DH and DW are the height and width of kernel, stride,
padding and dilation. Its elements are numbered row by row. EDGES says that windows reach beyond the input. Pooled
tensors are dense, in the layout of the tiles; their strides come in units of VEC in rows and of 1 in planes, in which
windows may begin anywhere.
"""

import triton
import triton.language as tl

from fastlayers.triton import activations
from fastlayers.triton.backward import batch_gradient, mean_of, store
from fastlayers.triton.forward import SIZES as FORWARD_SIZES
from fastlayers.triton.forward import finish_statistics, known_statistics, merged_tile, scale_and_bias
from fastlayers.triton.tiles import (
    ALL,
    accumulator,
    centred,
    channels_of,
    exists,
    load_channels,
    offsets,
    part_of,
    places,
    split,
    whereabouts,
)

SIZES = (
    *FORWARD_SIZES, "height", "width", "pooled_height", "pooled_width", "pooled_spatial", "pooled_outer",
    "pooled_inner", "pooled_tiles_inner", "pooled_tiles", "pooled_tiles_per_part", "p_outer", "p_channel",
)  # fmt: skip

# Loops over up to so many elements or windows are unrolled, so that loads do not wait for each other. More would take
# long to compile; so would more evaluations of an activation.
UNROLLED = tl.constexpr(25)
UNROLLED_ACTIVATIONS = tl.constexpr(4)


@triton.constexpr_function
def _pooled_unit(VEC, ROWS):
    return VEC if ROWS else 1


@triton.constexpr_function
def _windows(KERNEL, STRIDE, DILATION):
    """How many windows may have an element, along one axis."""
    return (KERNEL - 1) * DILATION // STRIDE + 1


@triton.jit
def _along(per_place, ROWS: tl.constexpr):
    """A value per place, to broadcast over a tile: places lie along axis 0 of rows and axis 1 of planes."""
    if ROWS:
        return per_place[:, None]
    else:
        return per_place[None, :]


@triton.jit
def _coordinates(outer, inner, spatial, width, ROWS: tl.constexpr):
    """Sample, row and column of a tile's places."""
    if ROWS:
        sample = outer // spatial
        place = outer - sample * spatial
    else:
        sample = outer
        place = inner
    row = place // width
    return sample, row, place - row * width


@triton.jit
def _offsets_at(
    sample, row, column, inner, block, height, width, stride_outer, stride_channel,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the elements at rows and columns of a tensor (height, width) are, if they are in it."""
    if ROWS:
        at = (sample * height + row) * width + column
        return (at * stride_outer * UNIT)[:, None] + inner[None, :]
    else:
        if WIDE:
            block = block.to(tl.int64)
        start = sample * stride_outer * UNIT + block * stride_channel * UNIT
        return start[:, None] + (row * width + column)[None, :]


@triton.jit
def _key(
    x, high, low, scale, bias, sign, MONOTONE: tl.constexpr,
    ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """By what elements are compared."""
    if MONOTONE:
        return x * sign[None, :]
    else:
        return activations.value(centred(x, high, low) * scale[None, :] + bias[None, :], ACT, A, B, C)


@triton.jit
def _compare(
    X, start, best, best_key, position, this, top, left, height, width, step, needed, high, low, scale, bias, sign,
    MONOTONE: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The better of the best so far and element `this` of each window, as torch has it.

    Of equal ones that is the first, of NaN the last.
    """
    down, right = this // KW * DH, this % KW * DW
    if EDGES:
        row, column = top + down, left + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        needed = needed & _along(inside, ROWS)
    x = tl.load(X + start + (down * width + right) * step, mask=needed, other=0).to(ACC)
    key = _key(x, high, low, scale, bias, sign, MONOTONE, ACT, A, B, C)
    better = (key > best_key) | (key != key)
    if EDGES:
        better = better & needed
    return tl.where(better, x, best), tl.where(better, key, best_key), tl.where(better, this, position)


@triton.jit
def _first(begin, DILATION: tl.constexpr):
    """The number of the first element, along one axis, that is in the input."""
    return tl.where(begin < 0, (DILATION - 1 - begin) // DILATION, 0)


@triton.jit
def _pool_tile(
    X, Y, SELECTED, POSITIONS, high, low, scale, bias, drop_scale,
    outer, inner, valid, kept, needed, block, height, width, pooled_width, pooled_spatial,
    x_outer, x_channel, p_outer, p_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MONOTONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pools, normalises, activates, drops and stores a tile of places."""
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, scale))  # of 0 and NaN these
    sample, row, column = _coordinates(outer, inner, pooled_spatial, pooled_width, ROWS)
    top, left = row * SH - PH, column * SW - PW
    if ROWS:
        step = x_outer * VEC
    else:
        step = 1
    # The first element that there is stands, even where none is above -inf.
    if EDGES:
        down, right = _first(top, DH), _first(left, DW)
        position = down * KW + right
        at = _offsets_at(
            sample, top + down * DH, left + right * DW, inner, block, height, width, x_outer, x_channel, VEC, ROWS, WIDE
        )
    else:
        position = tl.zeros_like(row).to(tl.int32)
        at = _offsets_at(sample, top, left, inner, block, height, width, x_outer, x_channel, VEC, ROWS, WIDE)
    best = tl.load(X + at, mask=needed, other=0).to(ACC)
    best_key = _key(best, high, low, scale, bias, sign, MONOTONE, ACT, A, B, C)
    position = tl.broadcast_to(_along(position.to(tl.int32), ROWS), (B0, B1))
    start = _offsets_at(sample, top, left, inner, block, height, width, x_outer, x_channel, VEC, ROWS, WIDE)
    if KH * KW <= UNROLLED and (MONOTONE or KH * KW <= UNROLLED_ACTIVATIONS):
        for this in tl.static_range(KH * KW):
            if EDGES or this > 0:
                best, best_key, position = _compare(
                    X, start, best, best_key, position, this, top, left, height, width, step, needed,
                    high, low, scale, bias, sign, MONOTONE, ACT, A, B, C, KW, DH, DW, EDGES, ROWS, ACC,
                )  # fmt: skip
    else:
        for this in range(KH * KW):
            best, best_key, position = _compare(
                X, start, best, best_key, position, this, top, left, height, width, step, needed,
                high, low, scale, bias, sign, MONOTONE, ACT, A, B, C, KW, DH, DW, EDGES, ROWS, ACC,
            )  # fmt: skip
    if MONOTONE:
        y = activations.value(centred(best, high, low) * scale[None, :] + bias[None, :], ACT, A, B, C)
    else:
        y = best_key
    if KEEP != ALL:
        y = tl.where(kept, y * tl.full((1, 1), drop_scale, ACC), 0.0)
    UNIT: tl.constexpr = _pooled_unit(VEC, ROWS)
    store(Y, y, outer, inner, block, p_outer, p_channel, valid, UNIT, ROWS, WIDE)
    store(SELECTED, tl.where(kept, best, 0.0), outer, inner, block, p_outer, p_channel, valid, UNIT, ROWS, WIDE)
    store(POSITIONS, tl.where(kept, position, 0), outer, inner, block, p_outer, p_channel, valid, UNIT, ROWS, WIDE)


@triton.jit(do_not_specialize=SIZES)
def pool(
    X, Y, SELECTED, POSITIONS, MASK, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR,
    eps: tl.float64, drop_scale: tl.float64,
    pooled_outer, pooled_inner, channels, pooled_spatial, pooled_tiles_inner, pooled_tiles, pooled_tiles_per_part,
    height, width, pooled_width, x_outer, x_channel, p_outer, p_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MONOTONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Everything after the statistics, for one part of a block of channels."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    # The opposite order of batch_statistics, which left its last tiles in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    channel = channels_of(block, B1, ROWS)
    mean, invstd = known_statistics(MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, eps, part, channel, channels)
    high, low = split(mean, ACC)
    scale, bias = scale_and_bias(WEIGHT, BIAS, invstd, channel, channels, ACC)
    first, last = part_of(part, pooled_tiles_per_part, pooled_tiles)
    for step in range(last - first):
        outer, inner, valid, kept, needed = whereabouts(
            MASK, drop_scale, 0, 0, 0, last - 1 - step, block, pooled_outer, pooled_inner, channels, pooled_spatial,
            pooled_tiles_inner, KEEP, B0, B1, _pooled_unit(VEC, ROWS), ROWS, WIDE,
        )  # fmt: skip
        _pool_tile(
            X, Y, SELECTED, POSITIONS, high, low, scale, bias, drop_scale,
            outer, inner, valid, kept, needed, block, height, width, pooled_width, pooled_spatial,
            x_outer, x_channel, p_outer, p_channel,
            KEEP, ACT, A, B, C, MONOTONE, KH, KW, SH, SW, PH, PW, DH, DW, EDGES, B0, B1, VEC, ROWS, WIDE, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def whole_pool(
    X, Y, SELECTED, POSITIONS, MASK, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES,
    eps: tl.float64, momentum: tl.float64, drop_scale: tl.float64,
    n_outer, n_inner, channels, count, pooled_outer, pooled_inner, pooled_spatial,
    height, width, pooled_width, x_outer, x_channel, p_outer, p_channel,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MONOTONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr, POOLED_B0: tl.constexpr, POOLED_B1: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Training in one launch, for a block of channels that is one tile; its elements are then read from the cache."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    UNIT: tl.constexpr = _pooled_unit(VEC, ROWS)
    block, tile = tl.program_id(0), tl.program_id(1)  # the only tile
    outer, inner = places(tile, block, 1, B0, B1, ROWS, WIDE)
    valid = exists(outer, inner, n_outer, n_inner, VEC, WIDE)
    x = tl.load(X + offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE), mask=valid, other=0).to(ACC)
    mean, m2, _ = merged_tile(x, tl.zeros((B0, B1), ACC), valid.to(ACC), ROWS)
    channel = channels_of(block, B1, ROWS)
    invstd = finish_statistics(
        MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, mean, m2, channel, channels, count, eps, momentum,
        COUNT_BATCHES, CUMULATIVE,
    )  # fmt: skip
    high, low = split(mean, ACC)
    scale, bias = scale_and_bias(WEIGHT, BIAS, invstd, channel, channels, ACC)
    tiles_inner = 1
    if not ROWS:
        tiles_inner = tl.cdiv(pooled_inner, POOLED_B1)
    for pooled_tile in range(tl.cdiv(pooled_outer, POOLED_B0) * tiles_inner):
        outer, inner, valid, kept, needed = whereabouts(
            MASK, drop_scale, 0, 0, 0, pooled_tile, block, pooled_outer, pooled_inner, channels, pooled_spatial,
            tiles_inner, KEEP, POOLED_B0, POOLED_B1, UNIT, ROWS, WIDE,
        )  # fmt: skip
        _pool_tile(
            X, Y, SELECTED, POSITIONS, high, low, scale, bias, drop_scale,
            outer, inner, valid, kept, needed, block, height, width, pooled_width, pooled_spatial,
            x_outer, x_channel, p_outer, p_channel,
            KEEP, ACT, A, B, C, MONOTONE, KH, KW, SH, SW, PH, PW, DH, DW, EDGES, POOLED_B0, POOLED_B1, VEC, ROWS, WIDE,
            ACC,
        )  # fmt: skip


@triton.jit
def _window(last, rest, back, count, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """Along one axis, the window that is `back` before the last one that may have an element, which is `rest` into it.

    Its index, the element's number in it, and whether there is such a window and it has the element.
    """
    window, apart = last - back, rest + back * STRIDE
    there = (window >= 0) & (window < count) & (apart <= (KERNEL - 1) * DILATION)
    if DILATION > 1:
        there = there & (apart % DILATION == 0)
    return window, apart // DILATION, there


@triton.jit
def _add(
    total, G, POSITIONS, this, sample, last_row, rest_row, last_column, rest_column, inner, block, needed,
    pooled_height, pooled_width, p_outer, p_channel,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`total` and the gradients of window `this` of those that may have each element, if it took the element."""
    # In the order of windows: the first is the farthest back.
    COLUMNS: tl.constexpr = _windows(KW, SW, DW)
    back = _windows(KH, SH, DH) * COLUMNS - 1 - this
    row, down, row_there = _window(last_row, rest_row, back // COLUMNS, pooled_height, KH, SH, DH)
    column, right, column_there = _window(last_column, rest_column, back % COLUMNS, pooled_width, KW, SW, DW)
    there = needed & _along(row_there & column_there, ROWS)
    at = _offsets_at(
        sample, row, column, inner, block, pooled_height, pooled_width, p_outer, p_channel, UNIT, ROWS, WIDE
    )
    taken = tl.load(POSITIONS + at, mask=there, other=0).to(tl.int32) == _along(down * KW + right, ROWS)
    taken = taken & there
    if ROWS:
        # Channels come 16 bytes at a time.
        g = tl.load(G + at, mask=there, other=0)
    else:
        g = tl.load(G + at, mask=taken, other=0)
    return total + tl.where(taken, g, 0.0)


@triton.jit(do_not_specialize=SIZES)
def pool_gradient(
    G, POSITIONS, X, MASK, WEIGHT, MEAN, INVSTD, SUMS, DX,
    n_outer, n_inner, channels, spatial, count, tiles_inner, tiles, tiles_per_part,
    width, pooled_height, pooled_width, x_outer, x_channel, y_outer, y_channel, p_outer, p_channel,
    KEEP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, for one part of a block of channels; in evaluation without X and SUMS.

    G has the gradients of what windows took: zeros in dropped planes.
    """
    ACC: tl.constexpr = accumulator(DOUBLE)
    WINDOWS: tl.constexpr = _windows(KH, SH, DH) * _windows(KW, SW, DW)
    UNIT: tl.constexpr = _pooled_unit(VEC, ROWS)
    block, part = tl.program_id(0), tl.program_id(1)
    channel = channels_of(block, B1, ROWS)
    invstd = load_channels(INVSTD, channel, channels, 0.0, ACC)
    factor = load_channels(WEIGHT, channel, channels, 1.0, ACC) * invstd
    if X is not None:
        high, low = split(load_channels(MEAN, channel, channels, 0.0, tl.float64), ACC)
        mean_g = mean_of(load_channels(SUMS, channel, channels, 0.0, tl.float64), count, ACC)
        mean_gx = mean_of(load_channels(SUMS + channels, channel, channels, 0.0, tl.float64), count, ACC)
    first, last = part_of(part, tiles_per_part, tiles)
    for step in range(last - first):
        outer, inner, valid, _, needed = whereabouts(
            MASK, 1.0, 0, 0, 0, first + step, block, n_outer, n_inner, channels, spatial, tiles_inner,
            KEEP, B0, B1, VEC, ROWS, WIDE,
        )  # fmt: skip
        sample, row, column = _coordinates(outer, inner, spatial, width, ROWS)
        last_row, last_column = (row + PH) // SH, (column + PW) // SW
        rest_row, rest_column = row + PH - last_row * SH, column + PW - last_column * SW
        dx = tl.zeros((B0, B1), ACC)
        if WINDOWS <= UNROLLED:
            for this in tl.static_range(WINDOWS):
                dx = _add(
                    dx, G, POSITIONS, this, sample, last_row, rest_row, last_column, rest_column, inner, block, needed,
                    pooled_height, pooled_width, p_outer, p_channel, KH, KW, SH, SW, DH, DW, UNIT, ROWS, WIDE,
                )  # fmt: skip
        else:
            for this in range(WINDOWS):
                dx = _add(
                    dx, G, POSITIONS, this, sample, last_row, rest_row, last_column, rest_column, inner, block, needed,
                    pooled_height, pooled_width, p_outer, p_channel, KH, KW, SH, SW, DH, DW, UNIT, ROWS, WIDE,
                )  # fmt: skip
        if X is not None:
            at = offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE)
            normalised = centred(tl.load(X + at, mask=valid, other=0).to(ACC), high, low) * invstd[None, :]
            dx = batch_gradient(dx, normalised, mean_g, mean_gx, factor)
        else:
            dx = dx * factor[None, :]
        store(DX, dx, outer, inner, block, y_outer, y_channel, valid, VEC, ROWS, WIDE)
