"""The compiled operators, with the shapes that torch.compile needs of them.

The schemas are in csrc/torch/library.cpp. None has autograd: `fastlayers.autograd` wraps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlayers import _library

_library.load()

_ops = torch.ops.fastlayers
batch_norm_act_fwd = _ops.batch_norm_act_fwd.default
batch_norm_act_bwd = _ops.batch_norm_act_bwd.default
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


def cuda_plan(
    sizes: list[int],
    rows: bool,
    dtype: torch.dtype,
    activation: int,
    training: bool,
    backward: bool,
    gpu: list[int],
) -> str:
    """Which CUDA kernels would run on (N, C, S) elements, in words: see `plans.explain`."""
    plan: str = _ops.cuda_plan(sizes, rows, dtype, activation, training, backward, gpu)
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


@torch.library.register_fake("fastlayers::batch_norm_act_fwd")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    activation_params: list[float],
    drop_scale: float,
    save_flat_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = torch.empty_like(input)
    mean = input.new_empty(input.shape[1], dtype=torch.float64)
    flat_bits = input.new_empty(_mask_bytes(output) if save_flat_bits else 0, dtype=torch.uint8)
    return output, mean, torch.empty_like(mean), flat_bits


@torch.library.register_fake("fastlayers::batch_norm_act_bwd")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    flat_bits: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: int,
    activation_params: list[float],
    drop_scale: float,
    input_grad: bool,
    affine_grad: bool,
    residual_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def full_size(wanted: bool) -> Tensor:
        return torch.empty_like(input) if wanted else input.new_empty(0)

    def per_channel(parameter: Tensor | None) -> Tensor:
        if affine_grad and parameter is not None:
            return torch.empty_like(parameter, memory_format=torch.contiguous_format)
        return mean.new_empty(0)

    return full_size(input_grad), per_channel(weight), per_channel(bias), full_size(residual_grad)


@torch.library.register_fake("fastlayers::dropout")
def _(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("fastlayers::pack_mask")
def _(mask: Tensor, flat: bool) -> Tensor:
    return mask.new_empty((mask.numel() + 7) // 8 if flat else _mask_bytes(torch.empty_like(mask)), dtype=torch.uint8)


@torch.library.register_fake("fastlayers::unpack_mask")
def _(bits: Tensor, like: Tensor, flat: bool) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool)


@torch.library.register_fake("fastlayers::element_mask")
def _(seed: Tensor, like: Tensor, drop_scale: float) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool)


@torch.library.register_fake("fastlayers::draw_channel_mask")
def _(state: Tensor, like: Tensor, keep_probability: float) -> tuple[Tensor, Tensor]:
    return like.new_empty(like.shape[:2], dtype=torch.bool), torch.empty_like(state)


@torch.library.register_fake("fastlayers::draw_element_mask")
def _(state: Tensor, like: Tensor, keep_probability: float, flat: bool) -> tuple[Tensor, Tensor]:
    size = (like.numel() + 7) // 8 if flat else _mask_bytes(torch.empty_like(like))
    return like.new_empty(size, dtype=torch.uint8), torch.empty_like(state)
