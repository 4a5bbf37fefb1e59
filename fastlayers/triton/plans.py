"""How the kernels are launched for a shape: tiles, warps, parts, and the sizes and constants they are called with.

Plans depend on shapes, strides and dtypes only, and are kept: a second call finds its own by a look into a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fastlayers.triton.layouts import (
    Layout,
    Strides,
    common_divisor,
    dense_strides,
    extent,
    layout_of,
    strides_in,
)

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

# Windows, or elements and the windows that have them, in a tile and per thread, by bytes per element: each holds more
# than an element of other passes. And the columns of such tiles in planes: elements are written 64 bytes at least.
WINDOWS = {2: 1024, 4: 1024, 8: 512}
WINDOWS_PER_THREAD = {2: 8, 4: 8, 8: 4}
COLUMNS_OF_WINDOWS = (8, 128)
COLUMNS_OF_ELEMENTS = (16, 128)

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


def _warps(elements: int, per_thread: int) -> int:
    return min(max(elements // (32 * per_thread), 1), 16)


def _blocks(layout: Layout, tile: tuple[int, int]) -> int:
    return _ceil(layout.channels, tile[1]) if layout.rows else layout.channels


def grid_of_passes(layout: Layout, itemsize: int) -> Grid:
    """For kernels that go through a tensor tile by tile."""
    elements = TILE[itemsize]
    widest = ROW_CHANNELS[itemsize] if layout.rows else elements
    # Eight at least, for the bits of a byte.
    inner = min(max(_power_of_two(layout.n_inner), 8), widest)
    return _grid(layout, inner, elements, ELEMENTS_PER_THREAD[itemsize])


def grid_of_windows(layout: Layout, itemsize: int, columns: tuple[int, int]) -> Grid:
    """For kernels that go through windows, or through elements and the windows that have them, by rows of planes.

    Args:
        columns: the fewest and the most of a tile in planes.
    """
    elements = WINDOWS[itemsize]
    if layout.rows:
        inner = min(_power_of_two(layout.n_inner), ROW_CHANNELS[itemsize])
    else:
        inner = _columns(layout.n_inner, *columns)
    return _grid(layout, inner, elements, WINDOWS_PER_THREAD[itemsize])


def _grid(layout: Layout, inner: int, elements: int, per_thread: int) -> Grid:
    outer = min(_power_of_two(layout.n_outer), elements // inner)
    blocks = _blocks(layout, (outer, inner))
    tiles_inner = 1 if layout.rows else _ceil(layout.n_inner, inner)
    tiles = _ceil(layout.n_outer, outer) * tiles_inner
    tiles_per_part = _ceil(tiles, min(tiles, _ceil(PROGRAMS, blocks)))
    return Grid(
        (outer, inner),
        _warps(outer * inner, per_thread),
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
    warps = _warps(outer * inner, ELEMENTS_PER_THREAD[itemsize])
    return Grid((outer, inner), warps, _blocks(layout, (outer, inner)), 1, 1, 1, 1)


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

    @property
    def unit(self) -> int:
        """The divisor in whose multiples strides come."""
        unit: int = self.constants[0]  # type: ignore[assignment]
        return unit

    def pick(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The sizes of these names."""
        found = self._picked.get(names)
        if found is None:
            found = self._picked[names] = tuple(self.sizes[name] for name in names)
        return found


class PoolFrame(NamedTuple):
    """Frames of the kernels of a pool, all of the same layout: see pooling.py.

    Attributes:
        full: of the input, for its statistics.
        windows: its passes go over the windows.
        elements: its passes go over the elements of the input, row by row of its planes.
        whole_windows: the tile of windows of a program that holds all of a channel, if one can.
        window: KH, KW, SH, SW, PH, PW, DH, DW.
        edges: whether windows reach beyond the input.
    """

    full: Frame
    windows: Frame
    elements: Frame
    whole_windows: tuple[int, int] | None
    window: tuple[int, ...]
    edges: bool


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


def pool_frame_of(
    shape: Sequence[int],
    dtype: torch.dtype,
    rows: bool,
    tensors: dict[str, Sequence[int] | None],
    window: tuple[int, ...],
    pooled_shape: Sequence[int],
) -> PoolFrame:
    """As `frame_of`, with dense pooled tensors of the same layout.

    Args:
        window: kernel, stride, padding and dilation, each of height and width.
        pooled_shape: (N, C, L) or (N, C, H, W), as `shape`.
    """
    full = frame_of(shape, dtype, rows, tensors)
    windows = _frame_of_windows(full, shape, pooled_shape, dtype.itemsize)
    per_axis = zip(_plane(shape), _plane(pooled_shape), *(window[i : i + 2] for i in range(0, 8, 2)), strict=True)
    edges = any(
        padding > 0 or (count - 1) * stride + (kernel - 1) * dilation >= size
        for size, count, kernel, stride, padding, dilation in per_axis
    )
    whole = full.whole and _whole_windows(_by_rows(pooled_shape, rows), dtype.itemsize, full.whole)
    return PoolFrame(full, windows, _frame_of_elements(windows, shape, dtype.itemsize), whole, window, edges)


def _frame_of_windows(full: Frame, shape: Sequence[int], pooled_shape: Sequence[int], itemsize: int) -> Frame:
    layout, unit = _by_rows(pooled_shape, full.layout.rows), full.unit if full.layout.rows else 1
    (height, width), (pooled_height, pooled_width) = _plane(shape), _plane(pooled_shape)
    grid = grid_of_windows(layout, itemsize, COLUMNS_OF_WINDOWS)._replace(wide=full.passes.wide)
    strides = strides_in(full.layout, pooled_shape, dense_strides(pooled_shape, full.layout.rows))
    assert strides is not None
    sizes = full.sizes | {
        "height": height,
        "width": width,
        "pooled_height": pooled_height,
        "pooled_width": pooled_width,
        "pooled_outer": layout.n_outer,
        "pooled_inner": layout.n_inner // unit,
        "pooled_tiles_inner": grid.tiles_inner,
        "pooled_tiles": grid.tiles,
        "pooled_tiles_per_part": grid.tiles_per_part,
        "p_outer": strides.outer // unit,
        "p_channel": strides.channel // unit,
    }
    return replace(full, passes=grid, sizes=sizes, _picked={})


def _frame_of_elements(windows: Frame, shape: Sequence[int], itemsize: int) -> Frame:
    layout, unit = _by_rows(shape, windows.layout.rows), windows.unit
    grid = grid_of_windows(layout, itemsize, COLUMNS_OF_ELEMENTS)._replace(wide=windows.passes.wide)
    # In planes a row of each begins where 16 bytes do only if rows are whole multiples of that.
    new_unit = common_divisor([layout.n_inner], unit)
    strides = {
        name: windows.sizes[name] * unit // new_unit for name in ("x_outer", "x_channel", "y_outer", "y_channel")
    }
    sizes = (
        windows.sizes
        | strides
        | {
            "n_outer": layout.n_outer,
            "n_inner": layout.n_inner // new_unit,
            "tiles_inner": grid.tiles_inner,
            "tiles": grid.tiles,
            "tiles_per_part": grid.tiles_per_part,
        }
    )
    return replace(windows, passes=grid, sizes=sizes, constants=(new_unit, *windows.constants[1:]), _picked={})


def _plane(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width; a sequence is a plane of height 1."""
    height, width = (1, *shape[2:])[-2:]
    return height, width


def _by_rows(shape: Sequence[int], rows: bool) -> Layout:
    """A layout in which axis 1 of a tile in planes has a plane's columns, and axis 0 the samples' rows."""
    layout, (height, width) = layout_of(shape, rows), _plane(shape)
    return layout if rows else layout._replace(n_outer=layout.n_outer * height, n_inner=width, spatial=height)


def _whole_windows(layout: Layout, itemsize: int, whole: Grid) -> tuple[int, int]:
    """The tile of windows of a program that holds whole channels: of as many channels, and of as many warps."""
    elements = 32 * whole.warps * WINDOWS_PER_THREAD[itemsize]
    inner = whole.tile[1] if layout.rows else _columns(layout.n_inner, *COLUMNS_OF_WINDOWS)
    return max(min(_power_of_two(layout.n_outer), elements // inner), 1), inner


def _columns(width: int, least: int, most: int) -> int:
    """The power of two of which tiles cover a width with the fewest lanes beyond it; the largest such."""
    candidates = [most >> k for k in range((most // least).bit_length())]
    return min(candidates, key=lambda columns: _ceil(width, columns) * columns)
