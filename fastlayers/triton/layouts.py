"""How tensors lie in memory: as planes or as rows, with which strides, and what divides them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

Sizes = Sequence[int]


class Layout(NamedTuple):
    """What (N, C, ...) is to the kernels: see tiles.py.

    Attributes:
        n_outer, n_inner: the extents of both axes of tiles.
        spatial: elements of a plane.
    """

    rows: bool
    n_outer: int
    n_inner: int
    channels: int
    spatial: int

    @property
    def values_per_channel(self) -> int:
        """N times the spatial size."""
        return self.n_outer if self.rows else self.n_outer * self.n_inner

    @property
    def bytes_inner(self) -> int:
        """Bytes of the bits of one plane or row."""
        return (self.n_inner + 7) // 8

    @property
    def bytes_of_bits(self) -> int:
        """Bytes of one bit per element."""
        return self.bytes_inner * self.n_outer * (1 if self.rows else self.channels)


class Strides(NamedTuple):
    """Of a tensor along the outer axis; and between channels, if it is planes."""

    outer: int
    channel: int


def is_rows(shape: Sizes, strides: Sizes) -> bool:
    """Whether a dense tensor is taken as rows: its channels are adjacent."""
    return math.prod(shape[2:]) == 1 or (shape[1] > 1 and strides[1] == 1)


def layout_of(shape: Sizes, rows: bool) -> Layout:
    """The layout of a tensor of this shape."""
    batch, channels, spatial = shape[0], shape[1], math.prod(shape[2:])
    if rows:
        return Layout(True, batch * spatial, channels, channels, spatial)
    return Layout(False, batch, spatial, channels, spatial)


def dense_strides(shape: Sizes, rows: bool) -> tuple[int, ...]:
    """Those of a dense tensor that is contiguous or, in rows, channels_last."""
    if not rows:
        return torch.empty(shape, device="meta").stride()
    batch, channels, *spatial = shape
    batch_stride, *strides, channel_stride = dense_strides((batch, *spatial, channels), False)
    return batch_stride, channel_stride, *strides


def strides_in(layout: Layout, shape: Sizes, strides: Sizes) -> Strides | None:
    """How a tensor is walked in `layout`; None if it cannot be, because its planes or rows are not regular."""
    if layout.rows:
        outer = _merged([shape[0], *shape[2:]], [strides[0], *strides[2:]])
        return Strides(outer, 0) if outer is not None and (shape[1] == 1 or strides[1] == 1) else None
    inner = _merged(shape[2:], strides[2:])
    return Strides(strides[0], strides[1]) if inner == 1 else None


def _merged(sizes: Sizes, strides: Sizes) -> int | None:
    """The stride with which these dimensions are walked as one; None if they cannot be; 1 for one element."""
    stride, extent = 1, 1
    for d in reversed(range(len(sizes))):
        if sizes[d] == 1:
            continue
        if extent == 1:
            stride = strides[d]
        elif strides[d] != stride * extent:
            return None
        extent *= sizes[d]
    return stride


def common_divisor(numbers: Iterable[int], limit: int) -> int:
    """The largest power of two, up to `limit`, that divides all."""
    return math.gcd(limit, *numbers)


def extent(shape: Sizes, strides: Sizes) -> int:
    """One more than the largest offset of an element."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
