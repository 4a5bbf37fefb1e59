"""What the kernels share: where the elements of a tile are, which of them dropout keeps, bits, and statistics.

A tile is a block [B0, B1] of one channel's planes, or of rows of adjacent channels (ROWS):

           axis 0 (outer)  axis 1 (inner)  channels
  planes   samples n       places s        one, and per-channel values have the shape [1]
  rows     (n, s)          channels        those of axis 1, and per-channel values have the shape [B1]

so that in both a value per channel broadcasts along axis 0, and sums over all axes but the channels give one. A program
serves one block of channels, and of its `tiles` those of its part. Strides, and the extent of axis 1, come in units of
VEC, so that the compiler knows a divisor of them and can move 16 bytes at once. WIDE asks for 64-bit offsets.
"""

import triton
import triton.language as tl

# How a dropout mask comes (KEEP).
ALL = tl.constexpr(0)
PLANES = tl.constexpr(1)  # a value per sample and channel, (N, C): what is not zero is kept
ELEMENTS = tl.constexpr(2)  # a seed


@triton.constexpr_function
def accumulator(DOUBLE):
    """What is computed with."""
    return tl.float64 if DOUBLE else tl.float32


@triton.jit
def channels_of(block, B1: tl.constexpr, ROWS: tl.constexpr):
    """The channels of a block."""
    if ROWS:
        return block * B1 + tl.arange(0, B1)
    else:
        return block + tl.arange(0, 1)


@triton.jit
def in_reverse():
    """A program's block and part, in the opposite order of another pass."""
    return tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def part_of(part, tiles_per_part, tiles):
    """The first tile of a part, and the one after its last."""
    first = part * tiles_per_part
    return first, tl.minimum(first + tiles_per_part, tiles)


@triton.jit
def places(tile, block, tiles_inner, B0: tl.constexpr, B1: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The indices of a tile along both axes. With B1 / k, axis 1 counts groups of k elements."""
    if WIDE:
        tile = tile.to(tl.int64)
    if ROWS:
        outer = tile * B0 + tl.arange(0, B0)
        inner = block * B1 + tl.arange(0, B1)
    else:
        outer = tile // tiles_inner * B0 + tl.arange(0, B0)
        inner = tile % tiles_inner * B1 + tl.arange(0, B1)
    return outer, inner


@triton.jit
def offsets(
    outer, inner, block, stride_outer, stride_channel, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """Where the elements at `outer` and `inner` are in a tensor."""
    if WIDE:
        block = block.to(tl.int64)
    start = outer * stride_outer * VEC
    if not ROWS:
        start += block * stride_channel * VEC
    return start[:, None] + inner[None, :]


@triton.jit
def exists(outer, inner, n_outer, n_inner, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Which elements of a tile there are."""
    if WIDE:
        n_inner = n_inner.to(tl.int64)
    return (outer < n_outer)[:, None] & (inner < n_inner * VEC)[None, :]


@triton.jit
def keep_planes(
    MASK, outer, inner, block, n_outer, channels, spatial, valid, VEC: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile are in planes that are kept. `channels` comes in units of VEC if ROWS."""
    # Values in float32 whatever they are: the interpreter knows nothing of bfloat16.
    if ROWS:
        place = (outer // spatial * channels * VEC)[:, None] + inner[None, :]
        return tl.load(MASK + place, mask=valid, other=0).to(tl.float32) != 0
    else:
        if WIDE:
            block = block.to(tl.int64)
        # One value for all of axis 1, so that loads that depend on it stay whole.
        place = (outer * channels + block)[:, None]
        return (tl.load(MASK + place, mask=(outer < n_outer)[:, None], other=0).to(tl.float32) != 0) & valid


@triton.jit
def keep_elements(
    SEED, drop_scale, last_kept, tile, block, tiles_inner, stride_outer, stride_channel,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile dropout keeps, by their offset in the dense output: see reference.element_mask.

    `last_kept` is the largest word that is kept, minus 2**31.
    """
    seed = tl.load(SEED)
    if VEC >= 4:
        # The four words of one counter are for four neighbours.
        outer, group = places(tile, block, tiles_inner, B0, B1 // 4, ROWS, WIDE)
        counter = offsets(outer, group, block, stride_outer, stride_channel, VEC // 4, ROWS, WIDE)
        w0, w1, w2, w3 = tl.randint4x(seed, counter)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (B0, B1))
    else:
        outer, inner = places(tile, block, tiles_inner, B0, B1, ROWS, WIDE)
        at = offsets(outer, inner, block, stride_outer, stride_channel, VEC, ROWS, WIDE)
        w0, w1, w2, w3 = tl.randint4x(seed, at // 4)
        word = at % 4
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    # The order of unsigned words, in signed numbers.
    ordered = (words.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.int32, bitcast=True)
    return (ordered <= last_kept) & (drop_scale > 0)


@triton.jit
def whereabouts(
    MASK, drop_scale, last_kept, y_outer, y_channel,
    tile, block, n_outer, n_inner, channels, spatial, tiles_inner, KEEP: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile's indices; which of its elements there are, which dropout keeps, and which are read for that."""
    outer, inner = places(tile, block, tiles_inner, B0, B1, ROWS, WIDE)
    valid = exists(outer, inner, n_outer, n_inner, VEC, WIDE)
    if KEEP == PLANES:
        if ROWS:
            # What lies between kept elements comes along with them.
            kept = keep_planes(MASK, outer, inner, block, n_outer, n_inner, spatial, valid, VEC, ROWS, WIDE)
            return outer, inner, valid, kept, valid
        kept = keep_planes(MASK, outer, inner, block, n_outer, channels, spatial, valid, VEC, ROWS, WIDE)
        return outer, inner, valid, kept, kept
    elif KEEP == ELEMENTS:
        kept = keep_elements(
            MASK, drop_scale, last_kept, tile, block, tiles_inner, y_outer, y_channel, B0, B1, VEC, ROWS, WIDE
        )
        return outer, inner, valid, kept & valid, valid
    else:
        return outer, inner, valid, valid, valid


@triton.jit
def byte_places(
    tile, block, tiles_inner, n_outer, channels, bytes_inner,
    B0: tl.constexpr, B1: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the bits of a tile are, eight to a byte along axis 1; and which of these bytes there are.

    Each plane or row of bits starts at a byte of its own.
    """
    outer, byte = places(tile, block, tiles_inner, B0, B1 // 8, ROWS, WIDE)
    if ROWS:
        at = offsets(outer, byte, block, bytes_inner, 0, 1, ROWS, WIDE)
    else:
        at = offsets(outer, byte, block, bytes_inner * channels, bytes_inner, 1, ROWS, WIDE)
    return at, (outer < n_outer)[:, None] & (byte < bytes_inner)[None, :]


@triton.jit
def store_bits(BITS, bits, at, valid, B0: tl.constexpr, B1: tl.constexpr):
    """Packs the truth values of a tile into the bytes at `at`."""
    groups = tl.reshape(bits.to(tl.int32), (B0, B1 // 8, 8))
    packed = tl.sum(groups << tl.arange(0, 8)[None, None, :], 2)
    tl.store(BITS + at, packed.to(tl.uint8), mask=valid)


@triton.jit
def load_bits(BITS, at, valid, B0: tl.constexpr, B1: tl.constexpr):
    """The truth values of a tile from the bytes at `at`."""
    packed = tl.load(BITS + at, mask=valid, other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (B0, B1)) != 0


@triton.jit
def sum_over_tile(x, ROWS: tl.constexpr):
    """A sum per channel."""
    if ROWS:
        return tl.sum(x, 0)
    else:
        return tl.sum(tl.sum(x, 1), 0) + tl.zeros((1,), x.dtype)


@triton.jit
def load_channels(POINTER, channel, channels, missing: tl.constexpr, DTYPE: tl.constexpr):
    """Values of channels; `missing` where there is no tensor of them."""
    if POINTER is None:
        return tl.full(channel.shape, missing, DTYPE)
    else:
        return tl.load(POINTER + channel, mask=channel < channels, other=missing).to(DTYPE)


@triton.jit
def split(mean, ACC: tl.constexpr):
    """A float64 value as the sum of two of ACC."""
    if tl.float64 == ACC:
        return mean, tl.zeros_like(mean)
    else:
        high = mean.to(ACC)
        # An infinite one has no rest.
        return high, tl.where(tl.abs(high) < float("inf"), mean - high.to(tl.float64), 0.0).to(ACC)


@triton.jit
def centred(x, high, low):
    """x less the mean of its channel, which is the sum of two values: exact to the last digits of x."""
    return (x - high[None, :]) - low[None, :]
