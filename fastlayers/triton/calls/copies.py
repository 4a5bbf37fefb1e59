"""Which tensors the kernels walk as they lie, and which by copies: planned by shapes and strides, made and copied back.

Kernels take planes or rows that are regular (layouts.py). What is not is copied before, or written to a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlayers.triton.layouts import Layout, dense_strides, is_rows, layout_of, strides_in
from fastlayers.triton.plans import Frame, frame_of


class Plan(NamedTuple):
    """Launches for tensors of given strides.

    Attributes:
        strides: of the dense result as the kernels write it, or of a tensor that is copied over it afterwards.
        copied: the arguments that do not lie regularly and are copied to these strides.
        irregular: whether the result is such a copy.
    """

    frame: Frame
    strides: tuple[int, ...]
    copied: frozenset[str]
    irregular: bool

    def source(self, name: str, t: Tensor) -> Tensor:
        """An argument as the kernels walk it."""
        return copy_of(t, self.strides) if name in self.copied else t

    def target(self, result: Tensor) -> Tensor:
        """Where the kernels write a result of full size."""
        return result.new_empty_strided(result.shape, self.strides) if self.irregular else result


@functools.lru_cache(maxsize=4096)
def plan_of(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dense: tuple[int, ...],
    tensors: tuple[tuple[str, tuple[int, ...] | None], ...],
) -> Plan:
    """For a dense result of these strides, and arguments of full size given by theirs."""
    layout, written = _as_written(shape, dense)
    copied = frozenset(
        name for name, strides in tensors if strides is not None and strides_in(layout, shape, strides) is None
    )
    walked: dict[str, Sequence[int] | None] = {
        name: written if name in copied else strides for name, strides in tensors
    }
    return Plan(frame_of(shape, dtype, layout.rows, {**walked, "y": written}), written, copied, written != dense)


def plan_for(output: Tensor, **tensors: Tensor | None) -> Plan:
    """`plan_of` a dense result and its arguments."""
    named = tuple((name, None if t is None else t.stride()) for name, t in tensors.items())
    return plan_of(tuple(output.shape), output.dtype, output.stride(), named)


def _as_written(shape: tuple[int, ...], dense: tuple[int, ...]) -> tuple[Layout, tuple[int, ...]]:
    """The layout and strides of a dense result, or of the copy of it that the kernels write."""
    layout = layout_of(shape, is_rows(shape, dense))
    if strides_in(layout, shape, dense) is None:
        dense = dense_strides(shape, False)
        layout = layout_of(shape, is_rows(shape, dense))
    return layout, dense


def layout_as_written(dense: Tensor) -> Layout:
    """That of a dense result, or of its copy."""
    return _as_written(tuple(dense.shape), dense.stride())[0]


def bytes_of_bits(dense: Tensor) -> int:
    """Size of one bit per element: each plane or row of the result that the kernels write starts at a byte."""
    return layout_as_written(dense).bytes_of_bits


def copy_of(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides."""
    return t.new_empty_strided(t.shape, strides).copy_(t)


def in_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`t`, or a copy with these strides."""
    return t if t.stride() == strides else copy_of(t, strides)


def contiguous(t: Tensor | None) -> Tensor | None:
    """`t`, or a contiguous copy; None stays None."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def copy_back(originals: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """To those of which the kernels wrote copies."""
    for original, copy in zip(originals, written, strict=True):
        if original is not None and copy is not None and original is not copy:
            original.copy_(copy)
