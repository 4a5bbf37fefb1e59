"""What the functions accept. Errors have the type and begin with the text of torch's own for the same mistake."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlayers import masks
from fastlayers.dtypes import SUPPORTED
from fastlayers.pooling import Pool

Vectors = tuple[tuple[str, Tensor | None], ...]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _torch_name(dtype: torch.dtype) -> str:
    """The name that torch's C++ errors use, such as Float or ComplexDouble."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")


def dropout_probability(p: float, name: str = "p") -> None:
    """Raises what torch raises for a probability outside [0, 1]: ValueError, and RuntimeError for NaN."""
    if not isinstance(p, (int, float)):
        raise TypeError(
            f"dropout probability has to be between 0 and 1, but got {p!r} "
            f"({name}: should be a float, not {type(p).__name__})"
        )
    if not 0 <= p <= 1:  # also false for NaN
        error = RuntimeError if p != p else ValueError
        raise error(f"dropout probability has to be between 0 and 1, but got {p} ({name})")


def drop_mode(mode: str) -> None:
    """Raises ValueError for an unknown mode."""
    if mode not in masks.MODES:
        raise ValueError(f"drop_mode: should be one of {', '.join(masks.MODES)}, but got {mode!r}")


def dropout_input(input: Tensor) -> None:
    """Raises what torch's dropout raises for an input that it cannot draw for or scale."""
    if input.dtype in SUPPORTED or input.numel() == 0:
        return
    name = _torch_name(input.dtype)
    allowed = f"input: dtype {input.dtype}; allowed: {_names(SUPPORTED)}"
    if input.is_complex():
        raise NotImplementedError(f"\"bernoulli_scalar_cpu_\" not implemented for '{name}' ({allowed})")
    raise RuntimeError(f"result type Float can't be cast to the desired output type {name} ({allowed})")


def batch_norm_input(input: Tensor, training: bool, eps: float) -> None:
    """Raises what torch raises for an input that cannot be normalised."""
    if input.dim() < 2:
        raise IndexError(
            "Dimension out of range (expected to be in range of [-1, 0], but got 1) "
            f"(input: expected at least 2 dimensions (N, C, ...), but got {input.dim()})"
        )
    if input.layout != torch.strided or input.dtype not in SUPPORTED:
        raise NotImplementedError(
            f"\"batch_norm\" not implemented for '{_torch_name(input.dtype)}' "
            f"(input: layout {input.layout}, dtype {input.dtype}; allowed: torch.strided and {_names(SUPPORTED)})"
        )
    if not isinstance(eps, float | int | torch.SymFloat):
        raise TypeError(f"batch_norm(): argument 'eps' must be float, not {type(eps).__name__} (eps: {eps!r})")
    if not training:
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return
    positive_eps(eps)
    channels = input.shape[1]
    if channels and input.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape} "
            "(input: N * spatial size is 1; allowed: 0, or 2 and more)"
        )


def positive_eps(eps: float) -> None:
    """Raises what torch raises for an eps that training does not take."""
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def sync_batch_norm_shape(input: Tensor) -> None:
    """Raises what `torch.nn.SyncBatchNorm` raises for an input without channels."""
    if input.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    if input.shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")


def num_features(input: Tensor, num_features: int) -> None:
    """Raises for another number of channels than the other ranks have."""
    if input.shape[1] != num_features:
        raise RuntimeError(
            f"input: expected {num_features} channels (num_features), but got {input.shape[1]} in shape "
            f"{tuple(input.shape)}"
        )


def tensors(input: Tensor, optional: Vectors, function: str = "batch_norm") -> None:
    """Raises what torch raises for an `input` that is no tensor, and for others that are neither that nor None."""
    for name, value in (("input", input), *((n, v) for n, v in optional if v is not None)):
        if not isinstance(value, Tensor):
            allowed = "a tensor" if name == "input" else "a tensor or None"
            raise TypeError(
                f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__} "
                f"({name}: {value!r}; allowed: {allowed})"
            )


def _batch_count(count: Tensor, device: torch.device) -> None:
    if count.dtype != torch.int64 or count.numel() != 1 or count.device != device:
        raise RuntimeError(
            f"num_batches_tracked should be one int64 on {device}, as running_mean is, but got shape "
            f"{tuple(count.shape)} of {count.dtype} on {count.device}"
        )


def running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
) -> None:
    """Raises what torch raises for statistics that are missing, or that want a gradient."""
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is None and not training:
            raise RuntimeError(f"{name} must be defined in evaluation mode ({name}: None; allowed: a tensor (C,))")
        if running is not None and running.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. "
                f"This input cannot have requires_grad True. ({name})"
            )
    if training and running_mean is not None and num_batches_tracked is not None:
        _batch_count(num_batches_tracked, running_mean.device)
    if training and running_mean is not None and not isinstance(momentum, (int, float)):
        if momentum is None and num_batches_tracked is not None:
            return
        raise TypeError(
            f"batch_norm(): argument 'momentum' must be float, not {type(momentum).__name__} "
            f"(momentum: {momentum!r}; None averages over all batches and needs num_batches_tracked)"
        )


def _strided(name: str, values: Tensor) -> None:
    if values.layout != torch.strided:
        raise NotImplementedError(
            f'"batch_norm" not implemented for {values.layout} ({name}: layout {values.layout}; allowed: torch.strided)'
        )


def channel_sizes(input: Tensor, vectors: Vectors) -> None:
    """Raises what torch raises for parameters and running statistics of another size, or on another device."""
    channels = input.shape[1] if input.dim() > 1 else 0  # as torch counts them
    for name, values in vectors:
        if values is None:
            continue
        _strided(name, values)
        if values.dim() != 1 or values.shape[0] != channels:
            rank = f"input: expected at least 2 dimensions (N, C, ...), but got {input.dim()}"
            raise RuntimeError(
                f"{name} should contain {channels} elements not {values.numel()} ({name}: shape {tuple(values.shape)}, "
                f"input: shape {tuple(input.shape)}; {f'allowed: ({channels},)' if input.dim() > 1 else rank})"
            )
        if values.device != input.device:
            raise RuntimeError(
                f"Tensor on device {values.device} is not on the expected device {input.device}! "
                f"({name}: should be on the device of input)"
            )


def channel_dtypes(input: Tensor, vectors: Vectors) -> None:
    """Raises what torch raises for parameters and running statistics of a dtype that does not go with the input's."""
    for name, values in vectors:
        if values is None or values.dtype == input.dtype:
            continue
        if values.dtype != torch.float32 or input.dtype == torch.float64:
            _raise_mixed_dtype(name, values.dtype, input, dict(vectors)["weight"])


def _raise_mixed_dtype(name: str, dtype: torch.dtype, input: Tensor, weight: Tensor | None) -> None:
    allowed = (input.dtype,) if input.dtype in (torch.float32, torch.float64) else (torch.float32, input.dtype)
    if weight is not None and weight.dtype in allowed:
        text = f"expected scalar type {_torch_name(weight.dtype)} but found {_torch_name(dtype)}"
    elif input.dtype == torch.float64:
        text = f"mixed dtype ({input.device.type.upper()}): all inputs must share same datatype."
    else:
        text = f"mixed dtype ({input.device.type.upper()}): expect parameter to have scalar type of Float"
    raise RuntimeError(f"{text} ({name}: dtype {dtype} with an input of {input.dtype}; allowed: {_names(allowed)})")


def residual(residual: Tensor | None, input: Tensor) -> None:
    """Raises what adding `residual` to `input` would raise, and where it would broadcast or promote."""
    if residual is None:
        return
    _strided("residual", residual)
    if residual.device != input.device:
        raise RuntimeError(
            f"Tensor on device {residual.device} is not on the expected device {input.device}! "
            "(residual: should be on the device of input)"
        )
    if residual.shape != input.shape:
        raise RuntimeError(
            f"The size of tensor a {tuple(input.shape)} must match the size of tensor b {tuple(residual.shape)} "
            "(residual: should have the shape of input; it is not broadcast)"
        )
    if residual.dtype != input.dtype:
        raise RuntimeError(
            f"expected scalar type {_torch_name(input.dtype)} but found {_torch_name(residual.dtype)} "
            f"(residual: dtype {residual.dtype}; should have the dtype of input, {input.dtype}; it is not promoted)"
        )


def pool(pool: Pool, input: Tensor) -> None:
    """Raises what torch raises for an `input` that is too small for `pool`, and where a window would have no element.

    Of such a window, which only a dilation beyond the input makes, torch returns what memory happens to hold.
    """
    channels, *spatial = input.shape[1:]
    sizes = pool.output_size(spatial)
    if channels and min(sizes) >= 1 and min(spatial) >= pool.most_dilation:
        return
    if channels == 0 or 0 in spatial:
        raise RuntimeError(
            f"Expected {pool.dims + 1}D or {pool.dims + 2}D (batch mode) tensor with optional 0 dim batch size for "
            f"input, but got:{list(input.shape)} (pool: {pool}; allowed: sizes of at least 1 except the first)"
        )
    if min(sizes) < 1:
        given, calculated = ("x".join(map(str, (channels, *s))) for s in (spatial, sizes))
        raise RuntimeError(
            f"Given input size: ({given}). Calculated output size: ({calculated}). Output size is too small "
            f"(pool: {pool}; allowed: windows of which at least one fits into the padded input)"
        )
    _no_empty_window(pool, spatial, sizes)


def _no_empty_window(pool: Pool, spatial: Sequence[int], sizes: Sequence[int]) -> None:
    per_dim = zip(spatial, sizes, pool.kernel_size, pool.stride, pool.padding, pool.dilation, strict=True)
    for size, count, kernel, stride, padding, dilation in per_dim:
        for start in range(-padding, count * stride - padding, stride):
            if not any(0 <= start + k * dilation < size for k in range(kernel)):
                raise ValueError(
                    f"pool: {pool} has windows without a single element of an input of spatial size "
                    f"{tuple(spatial)}; allowed: a dilation of at most that, or less padding"
                )
