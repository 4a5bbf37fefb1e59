"""Max-pooling behind the fused operator: forward, which writes pooled tensors only, and the gradient of the input.

Forward goes over tiles of windows and, in each window, over its elements: `pool` after the statistics' kernels of
forward.py, or `whole_pool` where one program can hold a channel. Where the activation is monotone, elements are
compared before it, by the sign of the channel's scale, and only what is taken is normalised and activated.

Backward sums over pooled tensors by the kernels of backward.py, which leave the gradient of each element that was
taken; `pool_gradient` then goes over the input, and each element adds those of the windows that took it. Nothing is
added atomically.

Tiles are those of tiles.py, but that in planes axis 0 has the samples' rows (n, h) and axis 1 the columns, so that a
thread finds most of where it is once for several elements. In rows axis 0 has (n, h, w), as ever.

A window is eight constants: KH and KW, SH and SW, PH and PW, DH and DW are the height and width of kernel, stride,
padding and dilation. Its elements are numbered row by row. EDGES says that windows reach beyond the input. Pooled
tensors are dense, in the layout of the tiles; their strides come in units of VEC in rows and of 1 in planes, in which
windows may begin anywhere.
"""

import triton
import triton.language as tl

from fastlayers.triton import activations
from fastlayers.triton.backward import batch_gradient, means_of
from fastlayers.triton.forward import SIZES as FORWARD_SIZES
from fastlayers.triton.forward import affine, known_statistics, whole_affine
from fastlayers.triton.tiles import (
    ALL,
    accumulator,
    centred,
    channels_of,
    exists,
    in_reverse,
    keep_planes,
    load_channels,
    offsets,
    part_of,
    places,
    split,
)

SIZES = (
    *FORWARD_SIZES, "height", "width", "pooled_height", "pooled_width", "pooled_outer", "pooled_inner",
    "pooled_tiles_inner", "pooled_tiles", "pooled_tiles_per_part", "p_outer", "p_channel",
)  # fmt: skip

# Loops over up to so many elements of a row, or windows, are unrolled, so that loads do not wait for each other.
UNROLLED = tl.constexpr(9)

# What no element has for a number.
NOWHERE = tl.constexpr(256)


@triton.constexpr_function
def _pooled_unit(VEC, ROWS):
    return VEC if ROWS else 1


@triton.constexpr_function
def _reach(KERNEL, STRIDE, DILATION):
    """How many windows reach over an element, along one axis."""
    return (KERNEL - 1) * DILATION // STRIDE + 1


@triton.constexpr_function
def _windows(KERNEL, STRIDE, DILATION):
    """How many of them may have it: not more than elements of a window."""
    return min(_reach(KERNEL, STRIDE, DILATION), KERNEL)


@triton.jit
def _coordinates(outer, inner, height, width, ROWS: tl.constexpr):
    """Samples and rows, along axis 0 of a tile; and columns, along axis 1 of planes."""
    if ROWS:
        line = outer // width
        sample = line // height
        return sample, line - sample * height, outer - line * width
    else:
        sample = outer // height
        return sample, outer - sample * height, inner


@triton.jit
def _along_columns(values, ROWS: tl.constexpr):
    """Values of columns, to broadcast over a tile."""
    if ROWS:
        return values[:, None]
    else:
        return values[None, :]


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
        start = sample * stride_outer * UNIT + block * stride_channel * UNIT + row * width
        return start[:, None] + column[None, :]


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
    X, start, best, best_key, position, down, right, top, left, height, width, step, needed,
    high, low, scale, bias, sign, absent,
    MONOTONE: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The better of the best so far and an element of each window: of equal ones the first, of NaN the last.

    So torch has it. `best` itself is kept only where it does not follow from its key.
    """
    if EDGES:
        row, column = top + down * DH, left + right * DW
        rows = ((row >= 0) & (row < height))[:, None]
        needed = needed & rows & _along_columns((column >= 0) & (column < width), ROWS)
    x = tl.load(X + start + (down * DH * width + right * DW) * step, mask=needed, other=absent).to(ACC)
    key = _key(x, high, low, scale, bias, sign, MONOTONE, ACT, A, B, C)
    if EDGES and not MONOTONE:
        key = tl.where(needed, key, float("-inf"))
    better = (key > best_key) | (key != key)
    if not MONOTONE:
        best = tl.where(better, x, best)
    return best, tl.where(better, key, best_key), tl.where(better, down * KW + right, position)


@triton.jit
def _first(begin, DILATION: tl.constexpr):
    """The number, along one axis, of a window's first element that is in the input."""
    return tl.where(begin < 0, (DILATION - 1 - begin) // DILATION, 0)


@triton.jit
def _last(begin, size, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """The number, along one axis, of a window's last element that is in the input."""
    return tl.minimum((size - 1 - begin) // DILATION, KERNEL - 1)


@triton.jit
def _best(
    X, sample, row, column, inner, block, needed, high, low, scale, bias,
    height, width, x_outer, x_channel,
    MONOTONE: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of each window the element that is taken, its activation, and its position."""
    top, left = row * SH - PH, column * SW - PW
    start = _offsets_at(sample, top, left, inner, block, height, width, x_outer, x_channel, VEC, ROWS, WIDE)
    if ROWS:
        step = x_outer * VEC
    else:
        step = 1
    # The first element stands where no key is better than what is begun with, which is that of absent ones.
    first = (_first(top, DH) * KW)[:, None] + _along_columns(_first(left, DW), ROWS)
    position = tl.broadcast_to(first, (B0, B1)).to(tl.int32)
    # 1, 0 or -1; and what stands for elements that are absent: its key is -inf, or 0 where all are.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0)).to(ACC)
    if MONOTONE:
        best = tl.zeros((B0, B1), ACC)
        best_key = tl.broadcast_to(tl.where(sign == 0, 0.0, float("-inf")).to(ACC)[None, :], (B0, B1))
        absent = tl.where(scale > 0, float("-inf"), tl.where(scale < 0, float("inf"), 0.0))
        absent = tl.broadcast_to(absent[None, :], (B0, B1)).to(X.dtype.element_ty)
    else:
        at = start + (position // KW * DH * width + position % KW * DW) * step
        absent = tl.zeros((B0, B1), X.dtype.element_ty)
        best = tl.load(X + at, mask=needed, other=absent).to(ACC)
        best_key = _key(best, high, low, scale, bias, sign, MONOTONE, ACT, A, B, C)
    for down in range(KH):
        if KW <= UNROLLED:
            for right in tl.static_range(KW):
                best, best_key, position = _compare(
                    X, start, best, best_key, position, down, right, top, left, height, width, step, needed,
                    high, low, scale, bias, sign, absent, MONOTONE, ACT, A, B, C, KW, DH, DW, EDGES, ROWS, ACC,
                )  # fmt: skip
        else:
            for right in range(KW):
                best, best_key, position = _compare(
                    X, start, best, best_key, position, down, right, top, left, height, width, step, needed,
                    high, low, scale, bias, sign, absent, MONOTONE, ACT, A, B, C, KW, DH, DW, EDGES, ROWS, ACC,
                )  # fmt: skip
    if not MONOTONE:
        return best, best_key, position
    # All keys of a channel whose scale is NaN were to be NaN, of which the last is taken.
    last = (_last(top, height, KH, DH) * KW)[:, None] + _along_columns(_last(left, width, KW, DW), ROWS)
    position = tl.where((scale != scale)[None, :], last.to(tl.int32), position)
    # A key without sign does not tell its element.
    unsigned = needed & (sign == 0)[None, :]
    at = start + (position // KW * DH * width + position % KW * DW) * step
    x = tl.load(X + at, mask=unsigned, other=0).to(ACC)
    best = tl.where(unsigned, x, best_key * sign[None, :])
    y = activations.value(centred(best, high, low) * scale[None, :] + bias[None, :], ACT, A, B, C)
    return best, y, position


@triton.jit
def _pool_tile(
    X, Y, SELECTED, POSITIONS, MASK, high, low, scale, bias, drop_scale,
    tile, block, pooled_outer, pooled_inner, channels, tiles_inner, height, width, pooled_height, pooled_width,
    x_outer, x_channel, p_outer, p_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MONOTONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pools, normalises, activates, drops and stores a tile of windows."""
    UNIT: tl.constexpr = _pooled_unit(VEC, ROWS)
    outer, inner = places(tile, block, tiles_inner, B0, B1, ROWS, WIDE)
    valid = exists(outer, inner, pooled_outer, pooled_inner, UNIT, WIDE)
    sample, row, column = _coordinates(outer, inner, pooled_height, pooled_width, ROWS)
    kept, needed = valid, valid
    if KEEP != ALL:
        if ROWS:
            # What lies between kept elements comes along with them.
            kept = keep_planes(MASK, sample, inner, block, 0, pooled_inner, 1, valid, UNIT, ROWS, WIDE)
        else:
            samples = pooled_outer // pooled_height
            kept = keep_planes(MASK, sample, inner, block, samples, channels, 1, valid, UNIT, ROWS, WIDE)
            needed = kept
    x, y, position = _best(
        X, sample, row, column, inner, block, needed, high, low, scale, bias, height, width, x_outer, x_channel,
        MONOTONE, ACT, A, B, C, KH, KW, SH, SW, PH, PW, DH, DW, EDGES, B0, B1, VEC, ROWS, WIDE, ACC,
    )  # fmt: skip
    if KEEP != ALL:
        y = tl.where(kept, y * tl.full((1, 1), drop_scale, ACC), 0.0)
    at = _offsets_at(
        sample, row, column, inner, block, pooled_height, pooled_width, p_outer, p_channel, UNIT, ROWS, WIDE
    )
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=valid)
    if SELECTED is not None:
        tl.store(SELECTED + at, tl.where(kept, x, 0.0).to(SELECTED.dtype.element_ty), mask=valid)
        tl.store(POSITIONS + at, tl.where(kept, position, 0).to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def pool(
    X, Y, SELECTED, POSITIONS, MASK, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR,
    eps: tl.float64, drop_scale: tl.float64,
    pooled_outer, pooled_inner, channels, pooled_tiles_inner, pooled_tiles, pooled_tiles_per_part,
    height, width, pooled_height, pooled_width, x_outer, x_channel, p_outer, p_channel,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MONOTONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Everything after the statistics, for one part of a block of channels."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, part = in_reverse()  # batch_statistics left its last tiles in the cache
    channel = channels_of(block, B1, ROWS)
    mean, invstd = known_statistics(MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, eps, part, channel, channels)
    high, low, scale, bias = affine(WEIGHT, BIAS, mean, invstd, channel, channels, ACC)
    first, last = part_of(part, pooled_tiles_per_part, pooled_tiles)
    for step in range(last - first):
        _pool_tile(
            X, Y, SELECTED, POSITIONS, MASK, high, low, scale, bias, drop_scale,
            last - 1 - step, block, pooled_outer, pooled_inner, channels, pooled_tiles_inner,
            height, width, pooled_height, pooled_width, x_outer, x_channel, p_outer, p_channel,
            KEEP, ACT, A, B, C, MONOTONE, KH, KW, SH, SW, PH, PW, DH, DW, EDGES, B0, B1, VEC, ROWS, WIDE, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def whole_pool(
    X, Y, SELECTED, POSITIONS, MASK, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES,
    eps: tl.float64, momentum: tl.float64, drop_scale: tl.float64,
    n_outer, n_inner, channels, count, pooled_outer, pooled_inner,
    height, width, pooled_height, pooled_width, x_outer, x_channel, p_outer, p_channel,
    COUNT_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr,
    KEEP: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MONOTONE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr, POOLED_B0: tl.constexpr, POOLED_B1: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Training in one launch, for a block of channels that is one tile; windows then read it from the cache."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, tile = tl.program_id(0), tl.program_id(1)  # the only tile
    outer, inner = places(tile, block, 1, B0, B1, ROWS, WIDE)
    valid = exists(outer, inner, n_outer, n_inner, VEC, WIDE)
    x = tl.load(X + offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE), mask=valid, other=0).to(ACC)
    high, low, scale, bias = whole_affine(
        x, valid, WEIGHT, BIAS, MEAN, INVSTD, RUNNING_MEAN, RUNNING_VAR, BATCHES, block, channels, count, eps, momentum,
        COUNT_BATCHES, CUMULATIVE, ROWS, ACC,
    )  # fmt: skip
    tiles_inner = 1
    if not ROWS:
        tiles_inner = tl.cdiv(pooled_inner, POOLED_B1)
    # From the only tile's number, 0, on: Triton 3.9's interpreter counts in numbers of Python's, which have no dtype.
    for pooled_tile in range(tl.cdiv(pooled_outer, POOLED_B0) * tiles_inner):
        _pool_tile(
            X, Y, SELECTED, POSITIONS, MASK, high, low, scale, bias, drop_scale,
            tile + pooled_tile, block, pooled_outer, pooled_inner, channels, tiles_inner,
            height, width, pooled_height, pooled_width, x_outer, x_channel, p_outer, p_channel,
            KEEP, ACT, A, B, C, MONOTONE, KH, KW, SH, SW, PH, PW, DH, DW, EDGES, POOLED_B0, POOLED_B1, VEC, ROWS, WIDE,
            ACC,
        )  # fmt: skip


@triton.jit
def _window(
    i, back, count, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr
):  # fmt: skip
    """Along one axis, of the windows that may have element i the one number `back` from behind.

    Its index, or another's that exists if there is none; and the element's number in it, or NOWHERE.
    """
    if _reach(KERNEL, STRIDE, DILATION) <= KERNEL:
        last = (i + PADDING) // STRIDE
        window, apart = last - back, i + PADDING - last * STRIDE + back * STRIDE
        number = apart // DILATION
        has = (window >= 0) & (apart <= (KERNEL - 1) * DILATION)
        if DILATION > 1:
            has = has & (number * DILATION == apart)
    else:
        # By the numbers that the element may have.
        number, begin = back, i + PADDING - back * DILATION
        window = begin // STRIDE
        has = (begin >= 0) & (window * STRIDE == begin)
    has = has & (window < count)
    return tl.minimum(tl.maximum(window, 0), count - 1), tl.where(has, number, NOWHERE)


@triton.jit
def _add(
    total, G, POSITIONS, this, sample, row, column, inner, block, there,
    pooled_height, pooled_width, p_outer, p_channel,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`total` and the gradients of window `this` of those that may have each element, if it took the element."""
    # In the order of windows: the first is the farthest back.
    COLUMNS: tl.constexpr = _windows(KW, SW, DW)
    back = _windows(KH, SH, DH) * COLUMNS - 1 - this
    row, down = _window(row, back // COLUMNS, pooled_height, KH, SH, PH, DH)
    column, right = _window(column, back % COLUMNS, pooled_width, KW, SW, PW, DW)
    at = _offsets_at(
        sample, row, column, inner, block, pooled_height, pooled_width, p_outer, p_channel, UNIT, ROWS, WIDE
    )
    number = (down * KW)[:, None] + _along_columns(right, ROWS)
    if ROWS:
        # Channels come 16 bytes at a time, whether or not they were taken.
        taken = tl.load(POSITIONS + at, mask=there, other=0).to(tl.int32) == number
        return total + tl.where(taken, tl.load(G + at, mask=there, other=0), 0.0)
    else:
        taken = tl.load(POSITIONS + at).to(tl.int32) == number
        return total + tl.load(G + at, mask=taken, other=0)


@triton.jit(do_not_specialize=SIZES)
def pool_gradient(
    G, POSITIONS, X, WEIGHT, MEAN, INVSTD, SUMS, DX,
    n_outer, n_inner, channels, count, tiles_inner, tiles, tiles_per_part,
    height, width, pooled_height, pooled_width, x_outer, x_channel, y_outer, y_channel, p_outer, p_channel,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, for one part of a block of channels; in evaluation without X and SUMS.

    G has the gradients of what windows took, zeros in dropped planes.
    """
    ACC: tl.constexpr = accumulator(DOUBLE)
    UNIT: tl.constexpr = _pooled_unit(VEC, ROWS)
    WINDOWS: tl.constexpr = _windows(KH, SH, DH) * _windows(KW, SW, DW)
    block, part = tl.program_id(0), tl.program_id(1)
    channel = channels_of(block, B1, ROWS)
    invstd = load_channels(INVSTD, channel, channels, 0.0, ACC)
    factor = load_channels(WEIGHT, channel, channels, 1.0, ACC) * invstd
    if X is not None:
        high, low = split(load_channels(MEAN, channel, channels, 0.0, tl.float64), ACC)
        mean_g, mean_gx = means_of(SUMS, channel, channels, count, ACC)
    if not ROWS:
        # The same, with a divisor that the compiler knows.
        width = n_inner * VEC
    first, last = part_of(part, tiles_per_part, tiles)
    for step in range(last - first):
        outer, inner = places(first + step, block, tiles_inner, B0, B1, ROWS, WIDE)
        valid = exists(outer, inner, n_outer, n_inner, VEC, WIDE)
        sample, row, column = _coordinates(outer, inner, height, width, ROWS)
        # Beyond the last of these, its windows: their loads then need no mask but that of channels.
        at_most = tl.minimum(outer, n_outer - 1)
        in_sample, in_row, in_column = _coordinates(at_most, inner, height, width, ROWS)
        there = exists(at_most, inner, n_outer, n_inner, VEC, WIDE)
        dx = tl.zeros((B0, B1), ACC)
        if WINDOWS <= UNROLLED:
            for this in tl.static_range(WINDOWS):
                dx = _add(
                    dx, G, POSITIONS, this, in_sample, in_row, in_column, inner, block, there, pooled_height,
                    pooled_width, p_outer, p_channel, KH, KW, SH, SW, PH, PW, DH, DW, UNIT, ROWS, WIDE,
                )  # fmt: skip
        else:
            for this in range(WINDOWS):
                dx = _add(
                    dx, G, POSITIONS, this, in_sample, in_row, in_column, inner, block, there, pooled_height,
                    pooled_width, p_outer, p_channel, KH, KW, SH, SW, PH, PW, DH, DW, UNIT, ROWS, WIDE,
                )  # fmt: skip
        if X is not None:
            at = _offsets_at(sample, row, column, inner, block, height, width, x_outer, x_channel, VEC, ROWS, WIDE)
            normalised = centred(tl.load(X + at, mask=valid, other=0).to(ACC), high, low) * invstd[None, :]
            dx = batch_gradient(dx, normalised, mean_g, mean_gx, factor)
        else:
            dx = dx * factor[None, :]
        at = _offsets_at(sample, row, column, inner, block, height, width, y_outer, y_channel, VEC, ROWS, WIDE)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=valid)
