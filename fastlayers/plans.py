"""Which CUDA kernels serve a tensor, and why: what the table of csrc/kernels/cuda/plan.cpp says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlayers import activations, ops, pooling
from fastlayers.pooling import PoolLayer

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
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str,
    act: str = "relu",
    gpu: Gpu | None = None,
    pool: PoolLayer = None,
) -> list[Explanation]:
    """Which CUDA kernels a layer runs on a tensor of this shape (N, C, ...).

    Args:
        shape: at least two sizes, none of them 0.
        dtype: float32, float64, bfloat16 or float16.
        layout: "contiguous" or "channels_last".
        act: a name of `activations.NAMES`.
        gpu: `current_gpu` by default.
        pool: of one or two dimensions, behind the layer.

    Raises:
        ValueError: another shape, layout, activation or pool.
        RuntimeError: a pool that leaves nothing of such a tensor.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape should be at least two positive sizes (N, C, ...), not {tuple(shape)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout should be one of {', '.join(LAYOUTS)}, not {layout!r}")
    resolved = pooling.resolve(pool, len(shape) - 2)
    if resolved is not None and not resolved.is_fusible:
        raise ValueError(f"pool: {resolved} has no kernels; allowed: 1 or 2 dimensions, windows of up to 256 elements")
    rows = math.prod(shape[2:]) == 1 or (layout == "channels_last" and shape[1] > 1)
    code = activations.resolve(act).code
    numbers = list((gpu or current_gpu())[1:])
    passes = (("forward", True, False), ("backward", True, True), ("evaluation", False, False))
    return [
        Explanation(name, ops.cuda_plan(list(shape), rows, dtype, code, training, backward, resolved, numbers))
        for name, training, backward in passes
    ]
