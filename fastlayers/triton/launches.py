"""Launches of kernels, with little time in Python.

Triton's own way to a launch binds and specialises some forty arguments each time (docs/triton.md has the figures). Here
what it compiled for arguments of the same kind is looked up and handed to its driver as Triton itself would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from fastlayers.triton.plans import Grid

# Whose internals the short way follows: JITFunction.run distinguishes no more than the key below, and returns what it
# compiled, whose `run` takes the arguments below. tests/test_triton_compiled.py holds each to that. Other versions,
# other GPUs (AMD's compiler also looks at sizes of storages), profilers and the interpreter take the long one.
_KNOWN_VERSIONS = {(3, 6), (3, 7), (3, 9)}
_IS_KNOWN = (
    tuple(map(int, triton.__version__.split(".")[:2])) in _KNOWN_VERSIONS
    and torch.version.hip is None
    and torch.version.xpu is None
)

_compiled: dict[tuple[object, ...], Any] = {}


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which may be another."""
    if t.device.type == "cpu":
        return contextlib.nullcontext()
    module = getattr(torch, t.device.type)
    return contextlib.nullcontext() if t.device.index == module.current_device() else module.device(t.device)


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
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    watched = hooks[0].calls or hooks[1].calls
    if not _IS_KNOWN or grid.wide or isinstance(kernel, InterpretedFunction) or watched:
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
        compiled.packed_metadata, None, *hooks, *pointers, *numbers, *sizes, *constants,
    )  # fmt: skip
