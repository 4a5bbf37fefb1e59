"""What the functions accept. Errors have the type and begin with the text of torch's own for the same mistake."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlayers import masks
from fastlayers.dtypes import SUPPORTED


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def dropout_probability(p: float, name: str = "p") -> None:
    """Raises ValueError for a probability outside [0, 1], or none at all."""
    if not isinstance(p, (int, float)):
        raise TypeError(
            f"dropout probability has to be between 0 and 1, but got {p!r} "
            f"({name}: should be a float, not {type(p).__name__})"
        )
    if not 0 <= p <= 1:  # also false for NaN
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p} ({name})")


def drop_mode(mode: str) -> None:
    """Raises ValueError for an unknown mode."""
    if mode not in masks.MODES:
        raise ValueError(f"drop_mode: should be one of {', '.join(masks.MODES)}, but got {mode!r}")


def dropout_input(input: Tensor) -> None:
    """Raises what torch's dropout raises for an input that it cannot draw for or scale."""
    if input.dtype in SUPPORTED:
        return
    allowed = f"input: dtype {input.dtype}; allowed: {_names(SUPPORTED)}"
    if input.is_complex():
        raise NotImplementedError(f"\"bernoulli_scalar_cpu_\" not implemented for '{input.dtype}' ({allowed})")
    raise RuntimeError(f"result type Float can't be cast to the desired output type {input.dtype} ({allowed})")


def batch_norm_input(input: Tensor, training: bool, eps: float) -> None:
    """Raises what torch raises for an input that cannot be normalised."""
    if input.layout != torch.strided or input.dtype not in SUPPORTED:
        raise NotImplementedError(
            f"\"batch_norm\" not implemented for '{input.dtype}' "
            f"(input: layout {input.layout}, dtype {input.dtype}; allowed: torch.strided and {_names(SUPPORTED)})"
        )
    if input.dim() < 2:
        raise IndexError(
            f"Dimension out of range (input: expected at least 2 dimensions (N, C, ...), but got {input.dim()})"
        )
    if not training:
        return
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    channels = input.shape[1]
    if channels and input.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape} "
            "(input: N * spatial size is 1; allowed: 0, or 2 and more)"
        )


def running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
) -> None:
    """Raises what torch raises for statistics that are missing."""
    if not training and running_mean is None:
        raise RuntimeError(
            "running_mean must be defined in evaluation mode (running_mean: None; allowed: a tensor (C,))"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise TypeError(
            "batch_norm(): argument 'momentum' must be float, not NoneType (momentum: None averages over all batches "
            "and needs num_batches_tracked)"
        )


def channel_vector(name: str, values: Tensor | None, input: Tensor) -> None:
    """Raises what torch raises for a parameter or running statistic that does not fit `input`."""
    if values is None:
        return
    channels = input.shape[1]
    if values.dim() != 1 or values.shape[0] != channels:
        raise RuntimeError(
            f"{name} should contain {channels} elements not {values.numel()} "
            f"({name}: shape {tuple(values.shape)}; allowed: ({channels},))"
        )
    if values.device != input.device:
        raise RuntimeError(
            f"Tensor on device {values.device} is not on the expected device {input.device}! "
            f"({name}: should be on the device of input)"
        )
    if values.dtype == input.dtype or (values.dtype == torch.float32 and input.dtype != torch.float64):
        return
    allowed = {torch.float64: (torch.float64,), torch.float32: (torch.float32,)}.get(
        input.dtype, (torch.float32, input.dtype)
    )
    expected = (
        "all inputs must share same datatype."
        if input.dtype == torch.float64
        else "expect parameter to have scalar type of Float"
    )
    raise RuntimeError(
        f"mixed dtype ({input.device.type.upper()}): {expected} "
        f"({name}: dtype {values.dtype} with an input of {input.dtype}; allowed: {_names(allowed)})"
    )


def residual(residual: Tensor | None, input: Tensor) -> None:
    """Raises what adding `residual` to `input` would raise, and where it would broadcast or promote."""
    if residual is None:
        return
    if residual.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got residual on {residual.device} and input on "
            f"{input.device} (residual: should be on the device of input)"
        )
    if residual.shape != input.shape:
        raise RuntimeError(
            f"The size of tensor a {tuple(input.shape)} must match the size of tensor b {tuple(residual.shape)} "
            f"(residual: should have the shape of input; it is not broadcast)"
        )
    if residual.dtype != input.dtype:
        raise RuntimeError(
            f"expected scalar type {input.dtype} but found {residual.dtype} "
            f"(residual: should have the dtype of input; it is not promoted)"
        )
