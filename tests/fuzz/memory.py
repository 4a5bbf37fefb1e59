"""Where a tensor lies: any strides, also of 0 and overlapping ones, any offset; and that nobody writes around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

#: Elements behind the last one of a tensor.
_TAIL = 3


@dataclass(frozen=True)
class Place:
    """Strides and storage offset.

    A `negated` tensor holds negated values and a flag that says so, as `z.conj().imag`.
    """

    strides: tuple[int, ...]
    offset: int = 0
    negated: bool = False


class Memory:
    """A tensor at a place, amid elements that are NaN."""

    def __init__(self, values: Tensor, place: Place, dtype: torch.dtype) -> None:
        size = extent(values.shape, place.strides)
        canary = math.nan if dtype.is_floating_point else -7
        self.storage = torch.full((place.offset + size + _TAIL,), canary, dtype=dtype)
        self.tensor = self.storage.as_strided(values.shape, place.strides, place.offset)
        # By position in memory, which several elements of an expanded or overlapping tensor share.
        self.positions = torch.arange(place.offset, place.offset + size).as_strided(values.shape, place.strides)
        self.storage[self.positions] = (-values if place.negated else values).to(dtype)
        if place.negated:
            self.tensor = torch._neg_view(self.tensor)
        self._before = self.storage.clone()

    def zero(self, where: Tensor) -> None:
        """Makes elements zero, unless some share their memory."""
        if self.positions.unique().numel() == self.positions.numel():
            self.storage[self.positions[where]] = 0
            self._before = self.storage.clone()

    def is_untouched(self) -> bool:
        """Whether every element of the memory is what it was at first."""
        return _same_bytes(self.storage, self._before)

    def is_untouched_around(self) -> bool:
        """The same, but for the tensor's own elements."""
        expected = self._before.clone()
        expected[self.positions] = self.storage[self.positions]
        return _same_bytes(self.storage, expected)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def extent(shape: torch.Size | tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of memory lie from the first to the last element of a tensor."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def dense_strides(shape: tuple[int, ...], order: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, ...]:
    """Strides for dimensions in `order`, the innermost last, each `steps` times as far apart as it has to be."""
    strides, stride = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = stride * steps[dim]
        stride = strides[dim] * max(shape[dim], 1)
    return tuple(strides)


def contiguous(shape: tuple[int, ...]) -> Place:
    """The place of an ordinary tensor."""
    return Place(dense_strides(shape, tuple(range(len(shape))), (1,) * len(shape)))


@st.composite
def places(draw: st.DrawFn, shape: tuple[int, ...], negated: bool = True, overlapping: bool = True) -> Place:
    """Every second one is contiguous or channels_last, the others are permuted, sliced, expanded or overlapping."""
    dims = tuple(range(len(shape)))
    kinds = ("contiguous", "channels_last", "permuted", "sliced", "expanded", "overlapping")
    kind = draw(st.sampled_from(kinds if overlapping else kinds[:4]))
    offset = draw(st.sampled_from((0, 0, 0, 1, 3, 8)))
    negated = negated and draw(st.integers(0, 19)) == 19
    order, steps = dims, (1,) * len(shape)
    if kind == "channels_last" and len(shape) > 2:
        order = (0, *dims[2:], 1)
    elif kind != "contiguous":
        order = tuple(draw(st.permutations(dims)))
    if kind == "sliced":
        steps = tuple(draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=len(shape), max_size=len(shape))))
    strides = dense_strides(shape, order, steps)
    if kind == "expanded":
        kept = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        strides = tuple(stride if keep else 0 for stride, keep in zip(strides, kept, strict=True))
    if kind == "overlapping":
        strides = tuple(draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape))))
    return Place(strides, offset, negated)


@st.composite
def vector_places(draw: st.DrawFn, overlapping: bool = True) -> Place:
    """Strides and offset for one value per channel."""
    strides = (1, 1, 1, 2, 5, 0) if overlapping else (1, 1, 2, 5)
    return Place((draw(st.sampled_from(strides)),), draw(st.sampled_from((0, 0, 1, 3))))
