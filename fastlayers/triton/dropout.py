"""Dropout alone, and the mask that a seed stands for."""

import triton
import triton.language as tl

from fastlayers.triton.forward import SIZES
from fastlayers.triton.tiles import accumulator, offsets, part_of, whereabouts


@triton.jit(do_not_specialize=SIZES)
def drop(
    X, Y, MASK,
    drop_scale: tl.float64, last_kept,
    n_outer, n_inner, channels, spatial, tiles_inner, tiles, tiles_per_part, x_outer, x_channel, y_outer, y_channel,
    KEEP: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Zeros where dropout does not keep, X times the scale elsewhere; without X, whether it keeps."""
    ACC: tl.constexpr = accumulator(DOUBLE)
    block, part = tl.program_id(0), tl.program_id(1)
    first, last = part_of(part, tiles_per_part, tiles)
    for step in range(last - first):
        tile = first + step
        outer, inner, valid, kept, needed = whereabouts(
            MASK, drop_scale, last_kept, y_outer, y_channel, tile, block, n_outer, n_inner, channels, spatial,
            tiles_inner, KEEP, B0, B1, VEC, ROWS, WIDE,
        )  # fmt: skip
        at = offsets(outer, inner, block, y_outer, y_channel, VEC, ROWS, WIDE)
        if X is not None:
            x_at = offsets(outer, inner, block, x_outer, x_channel, VEC, ROWS, WIDE)
            x = tl.load(X + x_at, mask=needed, other=0).to(ACC)
            y = tl.where(kept, x * tl.full((1, 1), drop_scale, ACC), 0.0).to(Y.dtype.element_ty)
        else:
            y = kept.to(Y.dtype.element_ty)
        tl.store(Y + at, y, mask=valid)
