"""Which CUDA kernels serve a tensor, and why: what the table of csrc/kernels/cuda/plan.cpp says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlayers import activations, ops

LAYOUTS = ("contiguous", "channels_last")


class Gpu(NamedTuple):
    """What planning has to know of a GPU."""

    name: str
    processors: int  # streaming multiprocessors
    shared_bytes: int  # of shared memory, that one block may use
    shared_bytes_per_processor: int
    max_cluster: int  # blocks of one cluster


#: What is planned for where there is no GPU.
H200 = Gpu("an H200", 132, 232448, 233472, 8)


class Explanation(NamedTuple):
    """The kernels that one pass runs."""

    direction: str
    kernels: str


def current_gpu() -> Gpu:
    """The current CUDA device, or an H200 where there is none, or no CUDA kernels for it."""
    if not torch.cuda.is_available() or not ops.build_info()["cuda"]:
        return H200
    index = torch.cuda.current_device()
    return Gpu(torch.cuda.get_device_name(index), *ops.cuda_device(index))


def explain(
    shape: Sequence[int], dtype: torch.dtype, layout: str, act: str = "relu", gpu: Gpu | None = None
) -> list[Explanation]:
    """Which CUDA kernels a layer runs on a tensor of this shape (N, C, ...).

    Args:
        shape: at least two sizes, none of them 0.
        dtype: float32, float64, bfloat16 or float16.
        layout: "contiguous" or "channels_last".
        act: a name of `activations.NAMES`.
        gpu: `current_gpu` by default.

    Raises:
        ValueError: another shape, layout or activation.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape should be at least two positive sizes (N, C, ...), not {tuple(shape)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout should be one of {', '.join(LAYOUTS)}, not {layout!r}")
    sizes = [shape[0], shape[1], math.prod(shape[2:])]
    rows = sizes[2] == 1 or (layout == "channels_last" and sizes[1] > 1)
    code = activations.resolve(act).code
    numbers = list((gpu or current_gpu())[1:])
    passes = (("forward", True, False), ("backward", True, True), ("evaluation", False, False))
    return [
        Explanation(name, ops.cuda_plan(sizes, rows, dtype, code, training, backward, numbers))
        for name, training, backward in passes
    ]
