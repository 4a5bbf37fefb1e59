"""What the operators of every backend return, in shapes and strides: what torch.compile needs to know of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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

    def dropout(input: Tensor, mask: Tensor, scale: float) -> Tensor:
        return torch.empty_like(input)

    def unpack_mask(bits: Tensor, like: Tensor, flat: bool) -> Tensor:
        return torch.empty_like(like, dtype=torch.bool)

    def element_mask(seed: Tensor, like: Tensor, drop_scale: float) -> Tensor:
        return torch.empty_like(like, dtype=torch.bool)

    for fake in (batch_norm_act_fwd, batch_norm_act_bwd, dropout, unpack_mask, element_mask):
        torch.library.register_fake(f"{namespace}::{fake.__name__}", fake)
