"""Launches of kernels, with little time in Python.

Triton's own way to a launch binds and specialises some forty arguments each time (docs/triton.md has the figures). Here
what it compiled for arguments of the same kind is looked up and handed to its driver as Triton itself would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from fastlayers.triton.plans import Grid

# Whose internals the short way follows. Other versions, other GPUs (AMD's compiler also looks at sizes of storages),
# profilers and the interpreter take the long one.
_KNOWN_VERSION = (3, 7)
_IS_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) == _KNOWN_VERSION and torch.version.hip is None

_compiled: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any,
    grid: Grid,
    pointers: Sequence[Tensor | None],
    numbers: Sequence[float],
    sizes: Sequence[int],
    constants: Sequence[object],
) -> None:
    """Runs a kernel, whose parameters come in this order, on the current device and stream.

    Triton must not specialise `numbers` and `sizes`: see forward.SIZES.
    """
    if not _IS_KNOWN or grid.wide or isinstance(kernel, InterpretedFunction) or knobs.runtime.launch_enter_hook.calls:
        kernel[grid.blocks, grid.parts](*pointers, *numbers, *sizes, *constants, num_warps=grid.warps)
        return
    device = driver.active.get_current_device()
    # All that Triton distinguishes: see JITFunction.run.
    key = (
        id(kernel), device, grid.warps, *constants,
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in pointers],
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid.blocks, grid.parts](*pointers, *numbers, *sizes, *constants, num_warps=grid.warps)
        return
    compiled.run(
        grid.blocks, grid.parts, 1, driver.active.get_current_stream(device), compiled.function,
        compiled.packed_metadata, None, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook,
        *pointers, *numbers, *sizes, *constants,
    )  # fmt: skip
