"""Max-pools that are drawn, and the elements of their windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

_MODULES = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


@dataclass(frozen=True)
class Pool:
    """The arguments of torch's modules, a number for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    def module(self, **options: Any) -> Any:
        """Torch's module."""
        cls = _MODULES[len(self.kernel_size)]
        return cls(self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode, **options)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what comes out."""
        return tuple(self.module()(torch.empty(shape, device="meta")).shape)

    def windows(self, values: Tensor, missing: float) -> Tensor:
        """The elements of each window, in a last dimension of their own; `missing` where a window leaves the input."""
        pooled = self.shape(tuple(values.shape))
        per_dim = zip(
            range(2, values.dim()), pooled[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        )
        for dim, count, kernel, stride, padding, dilation in per_dim:
            at = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
            inside = (at >= 0) & (at < values.shape[dim])
            taken = values.index_select(dim, at.clamp(0, values.shape[dim] - 1).flatten())
            taken = taken.unflatten(dim, at.shape).movedim(dim + 1, -1)
            shape = [1] * taken.dim()
            shape[dim], shape[-1] = at.shape
            values = torch.where(inside.view(shape), taken, missing)
        # The kernel's dimensions, which have gone to the end one by one.
        return values.flatten(len(pooled))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether torch takes it for this shape, and every window has an element."""
        try:
            self.shape(shape)
        except (RuntimeError, ValueError):
            return False
        return bool(self.windows(torch.zeros(1, 1, *shape[2:]), -math.inf).amax(-1).isfinite().all())


def take(values: Tensor, indices: Tensor) -> Tensor:
    """The elements of `values` (N, C, ...) at `indices`, as torch's pools return them."""
    return values.flatten(2).gather(2, indices.flatten(2)).view_as(indices)


def put(values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Zeros of the shape of `like`, with `values` added at `indices`."""
    flat = torch.zeros_like(like, memory_format=torch.contiguous_format).flatten(2)
    return flat.scatter_add_(2, indices.flatten(2), values.flatten(2)).view(like.shape)


@st.composite
def pools(draw: st.DrawFn, shape: tuple[int, ...]) -> Pool | None:
    """One for tensors of this shape, or None where there is none."""
    if not 3 <= len(shape) <= 5 or 0 in shape[1:]:
        return None

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in shape[2:])

    kernel = numbers(1, 4) if draw(st.integers(0, 9)) else numbers(5, 17)
    padding = tuple(draw(st.integers(0, min(size // 2, 2))) for size in kernel)
    dilation = numbers(1, 1) if draw(st.booleans()) else numbers(1, 3)
    pool = Pool(kernel, numbers(1, 4), padding, dilation, draw(st.booleans()))
    return pool if pool.fits(shape) else None
