"""How the kernels are launched for a shape: tiles, warps, parts, and the sizes and constants they are called with.

Plans depend on shapes, strides and dtypes only, and are kept: a second call finds its own by a look into a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastlayers.triton.layouts import Layout, Strides, common_divisor, extent, layout_of, strides_in

# Elements of a tile and channels side by side in rows, by bytes per element. Four warps hold a tile of a pass over
# memory, each thread 16 elements: two or four loads of 16 bytes. Rows are taken 256 bytes wide: two cache lines.
# float64 takes twice the registers.
TILE = {2: 2048, 4: 2048, 8: 512}
ROW_CHANNELS = {2: 128, 4: 64, 8: 32}

# Of a channel, or some, that one program holds as a whole: elements with their padding, and channels side by side, of
# which there are fewer, 64 bytes, for more programs.
WHOLE = {2: 8192, 4: 8192, 8: 2048}
WHOLE_ROW_CHANNELS = {2: 32, 4: 16, 8: 8}

ELEMENTS_PER_THREAD = {2: 16, 4: 16, 8: 4}

# Programs that a pass is to have at least, if there is work for them: some for each processor of a large GPU.
PROGRAMS = 1024

# Offsets from here on take 64 bits.
WIDE_FROM = 2**31

# Parts and channels that are merged at a time.
MERGED = (32, 32)


class Grid(NamedTuple):
    """Tiles, and how programs share them.

    Attributes:
        blocks: of channels, the first axis of the grid.
        parts: how many programs share a block's tiles, the second axis.
        wide: whether offsets take 64 bits.
    """

    tile: tuple[int, int]
    warps: int
    blocks: int
    parts: int
    tiles_inner: int
    tiles: int
    tiles_per_part: int
    wide: bool = False


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int, itemsize: int) -> int:
    return min(max(elements // (32 * ELEMENTS_PER_THREAD[itemsize]), 1), 16)


def _blocks(layout: Layout, tile: tuple[int, int]) -> int:
    return _ceil(layout.channels, tile[1]) if layout.rows else layout.channels


def grid_of_passes(layout: Layout, itemsize: int) -> Grid:
    """For kernels that go through a tensor tile by tile."""
    elements = TILE[itemsize]
    widest = ROW_CHANNELS[itemsize] if layout.rows else elements
    # Eight at least, for the bits of a byte.
    inner = min(max(_power_of_two(layout.n_inner), 8), widest)
    outer = min(_power_of_two(layout.n_outer), elements // inner)
    blocks = _blocks(layout, (outer, inner))
    tiles_inner = 1 if layout.rows else _ceil(layout.n_inner, inner)
    tiles = _ceil(layout.n_outer, outer) * tiles_inner
    tiles_per_part = _ceil(tiles, min(tiles, _ceil(PROGRAMS, blocks)))
    return Grid(
        (outer, inner),
        _warps(outer * inner, itemsize),
        blocks,
        _ceil(tiles, tiles_per_part),
        tiles_inner,
        tiles,
        tiles_per_part,
    )


def grid_of_whole(layout: Layout, itemsize: int) -> Grid | None:
    """For kernels of which one program holds all values of its channels; None where these are too many."""
    inner = max(_power_of_two(layout.n_inner), 8)
    if layout.rows:
        inner = min(inner, WHOLE_ROW_CHANNELS[itemsize])
    outer = _power_of_two(layout.n_outer)
    if outer * inner > WHOLE[itemsize]:
        return None
    return Grid((outer, inner), _warps(outer * inner, itemsize), _blocks(layout, (outer, inner)), 1, 1, 1, 1)


@dataclass(frozen=True)
class Frame:
    """A layout with the strides of the tensors that a kernel takes, ready to be passed on.

    Attributes:
        passes, whole, merge: grids of the kernels that go through a tensor tile by tile, that hold all of a channel,
            and that merge the results of parts.
        sizes: the sizes that kernels take, by name.
        constants: VEC, ROWS, WIDE, DOUBLE.
    """

    layout: Layout
    passes: Grid
    whole: Grid | None
    merge: Grid
    sizes: dict[str, int]
    constants: tuple[object, ...]
    _picked: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)

    def pick(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The sizes of these names."""
        found = self._picked.get(names)
        if found is None:
            found = self._picked[names] = tuple(self.sizes[name] for name in names)
        return found


def frame_of(shape: Sequence[int], dtype: torch.dtype, rows: bool, tensors: dict[str, Sequence[int] | None]) -> Frame:
    """For full-size tensors, given by their strides; those that are None are not there.

    Raises:
        ValueError: one does not lie regularly.
    """
    layout = layout_of(shape, rows)
    found: dict[str, Strides] = {}
    for name, strides in tensors.items():
        regular = Strides(0, 0) if strides is None else strides_in(layout, shape, strides)
        if regular is None:
            raise ValueError(f"{name}: strides {tuple(strides or ())} of shape {tuple(shape)} are not regular")
        found[name] = regular
    numbers = [number for strides in found.values() for number in strides]
    # 16 bytes; and the four random words of a counter.
    unit = common_divisor([layout.n_inner, *numbers], max(16 // dtype.itemsize, 4))
    wide = max(extent(shape, strides) for strides in tensors.values() if strides is not None) >= WIDE_FROM
    grid = grid_of_passes(layout, dtype.itemsize)._replace(wide=wide)
    whole = grid_of_whole(layout, dtype.itemsize)
    sizes = {
        "n_outer": layout.n_outer,
        "n_inner": layout.n_inner // unit,
        "channels": layout.channels,
        "spatial": layout.spatial,
        "count": layout.values_per_channel,
        "bytes_inner": layout.bytes_inner,
        "tiles_inner": grid.tiles_inner,
        "tiles": grid.tiles,
        "tiles_per_part": grid.tiles_per_part,
        "parts": grid.parts,
    }
    for name, strides in found.items():
        sizes[f"{name}_outer"], sizes[f"{name}_channel"] = strides.outer // unit, strides.channel // unit
    constants = (unit, rows, wide, dtype == torch.float64)
    merge = Grid(MERGED, 4, _ceil(layout.channels, MERGED[1]), 1, 1, 1, 1)
    return Frame(layout, grid, whole and whole._replace(wide=wide), merge, sizes, constants)
