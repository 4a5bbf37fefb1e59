"""The compiled operators, with the shapes that torch.compile needs of them.

The schemas are in csrc/torch/schemas.h. None has autograd: `fastlayers.autograd` wraps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlayers import _library, fakes
from fastlayers.pooling import Pool

_library.load()

_ops = torch.ops.fastlayers
batch_norm_act_fwd = _ops.batch_norm_act_fwd.default
batch_norm_act_bwd = _ops.batch_norm_act_bwd.default
batch_norm_act_pool_fwd = _ops.batch_norm_act_pool_fwd.default
batch_norm_act_pool_bwd = _ops.batch_norm_act_pool_bwd.default
dropout = _ops.dropout.default
pack_mask = _ops.pack_mask.default
unpack_mask = _ops.unpack_mask.default
element_mask = _ops.element_mask.default
draw_channel_mask = _ops.draw_channel_mask.default
draw_element_mask = _ops.draw_element_mask.default


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: "avx512", "avx2" or "baseline".

    The environment variable FASTLAYERS_CPU_CAPABILITY, read at the first use, lowers it.
    """
    capability: str = _ops.cpu_capability()
    return capability


def set_cpu_capability(name: str) -> None:
    """Changes `cpu_capability`, for tests. Raises RuntimeError where the processor does not offer it."""
    _ops.set_cpu_capability(name)


def set_last_level_cache_bytes(size: int) -> int:
    """Changes the cache size beyond which results are written past the cache, for tests; returns the old one."""
    before: int = _ops.set_last_level_cache_bytes(size)
    return before


def cuda_device(index: int) -> list[int]:
    """Streaming multiprocessors of a GPU, bytes of shared memory of a block and of a processor, blocks of a cluster.

    Raises RuntimeError where no CUDA kernels were compiled.
    """
    sizes: list[int] = _ops.cuda_device(index)
    return sizes


def cuda_plan(
    sizes: list[int],
    rows: bool,
    dtype: torch.dtype,
    activation: int,
    training: bool,
    backward: bool,
    pool: Pool | None,
    gpu: list[int],
) -> str:
    """Which CUDA kernels would run on a tensor of these sizes (N, C, ...), in words: see `plans.explain`."""
    window, ceil_mode = ((), False) if pool is None else (pool.window, pool.ceil_mode)
    plan: str = _ops.cuda_plan(sizes, rows, dtype, activation, training, backward, window, ceil_mode, gpu)
    return plan


def build_info() -> dict[str, Any]:
    """What was compiled, how, and against which torch."""
    return _library.build_info()


def _mask_bytes(dense: Tensor) -> int:
    """Size of a mask of one bit per element: each run of elements starts at a byte of its own.

    What is a run on the CPU has its other definition in csrc/kernels/cpu/kernels.h, Geometry; the layout in
    csrc/torch/tensors.cpp, geometry_of.
    """
    batch, channels = dense.shape[:2]
    spatial = 1
    for size in dense.shape[2:]:
        spatial = spatial * size
    rows = spatial == 1 or (channels > 1 and dense.stride(1) == 1)
    if dense.device.type != "cpu":
        # A plane whose size is no multiple of 8 has room for up to 7 bits before its first byte of 8.
        return (dense.numel() + 7) // 8 if rows else batch * channels * _plane_bytes(spatial)
    if rows:
        positions = 16 if channels < 32 and spatial % 16 == 0 else 1
        runs, length = batch * spatial // positions, channels * positions
    elif spatial <= 128:
        runs, length = batch, channels * spatial
    else:
        runs, length = batch * channels, spatial
    return runs * ((length + 7) // 8)


def _plane_bytes(spatial: int) -> int:
    return spatial // 8 if spatial % 8 == 0 else (spatial + 14) // 8


fakes.register("fastlayers", _mask_bytes)


@torch.library.register_fake("fastlayers::pack_mask")
def _(mask: Tensor, flat: bool) -> Tensor:
    return mask.new_empty((mask.numel() + 7) // 8 if flat else _mask_bytes(torch.empty_like(mask)), dtype=torch.uint8)


@torch.library.register_fake("fastlayers::draw_channel_mask")
def _(state: Tensor, like: Tensor, keep_probability: float) -> tuple[Tensor, Tensor]:
    return like.new_empty(like.shape[:2], dtype=torch.bool), torch.empty_like(state)


@torch.library.register_fake("fastlayers::draw_element_mask")
def _(state: Tensor, like: Tensor, keep_probability: float, flat: bool) -> tuple[Tensor, Tensor]:
    size = (like.numel() + 7) // 8 if flat else _mask_bytes(torch.empty_like(like))
    return like.new_empty(size, dtype=torch.uint8), torch.empty_like(state)
