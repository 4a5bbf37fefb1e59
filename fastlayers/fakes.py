"""What the operators of every backend return, in shapes and strides: what torch.compile needs to know of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlayers.pooling import Pool


def register(namespace: str, bytes_of_bits: Callable[[Tensor], int]) -> None:
    """Registers the fakes of a set of operators.

    Args:
        namespace: of the operators in `torch.ops`.
        bytes_of_bits: the size of the ``flat_bits`` that the set saves for a dense output.
    """

    def batch_norm_act_fwd(
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
        flat_bits = input.new_empty(bytes_of_bits(output) if save_flat_bits else 0, dtype=torch.uint8)
        return output, mean, torch.empty_like(mean), flat_bits

    def batch_norm_act_bwd(
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

    def batch_norm_act_pool_fwd(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        activation: int,
        activation_params: list[float],
        monotone: bool,
        drop_scale: float,
        window: list[int],
        ceil_mode: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        pool = Pool.of_window(window, ceil_mode, input.dim() - 2)
        mean = input.new_empty(input.shape[1], dtype=torch.float64)
        output = _pooled(input, pool)
        selected, positions = (
            torch.empty_like(output, dtype=dtype) if save else input.new_empty(0, dtype=dtype)
            for dtype in (input.dtype, torch.uint8)
        )
        return output, mean, torch.empty_like(mean), selected, positions

    def batch_norm_act_pool_bwd(
        grad_output: Tensor,
        input: Tensor,
        selected: Tensor,
        positions: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool,
        activation: int,
        activation_params: list[float],
        drop_scale: float,
        window: list[int],
        ceil_mode: bool,
        input_grad: bool,
        affine_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = batch_norm_act_bwd(
            grad_output, input, weight, bias, None, None, mask, mean, invstd, training, activation,
            activation_params, drop_scale, input_grad, affine_grad, False,
        )  # fmt: skip
        return found[:3]

    def dropout(input: Tensor, mask: Tensor, scale: float) -> Tensor:
        return torch.empty_like(input)

    def unpack_mask(bits: Tensor, like: Tensor, flat: bool) -> Tensor:
        return torch.empty_like(like, dtype=torch.bool)

    def element_mask(seed: Tensor, like: Tensor, drop_scale: float) -> Tensor:
        return torch.empty_like(like, dtype=torch.bool)

    pooling = (batch_norm_act_pool_fwd, batch_norm_act_pool_bwd)
    for fake in (batch_norm_act_fwd, batch_norm_act_bwd, *pooling, dropout, unpack_mask, element_mask):
        torch.library.register_fake(f"{namespace}::{fake.__name__}", fake)


def _pooled(input: Tensor, pool: Pool) -> Tensor:
    """The pooled output of `input`: channels adjacent where those of ``empty_like(input)`` are, else contiguous.

    Its other definition is in csrc/torch/tensors.cpp, shape_of.
    """
    batch, channels, *spatial = input.shape
    sizes = pool.output_size(spatial)
    elements = 1
    for size in spatial:
        elements = elements * size
    rows = elements == 1 or (channels > 1 and torch.empty_like(input).stride(1) == 1)
    if not rows:
        return input.new_empty(batch, channels, *sizes)
    strides, step = [], channels
    for size in reversed(sizes):
        strides.append(step)
        step = step * size
    return input.new_empty_strided((batch, channels, *sizes), (step, 1, *reversed(strides)))
