"""Launches of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlayers.triton.plans import Grid

def launch(
    kernel: Any,
    grid: Grid,
    pointers: Sequence[Tensor | None],
    numbers: Sequence[float],
    sizes: Sequence[int],
    constants: Sequence[object],
) -> None:
    """Runs a kernel, whose parameters come in this order, on the current stream."""
    kernel[grid.blocks, grid.parts](*pointers, *numbers, *sizes, *constants, num_warps=grid.warps)
