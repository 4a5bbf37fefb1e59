"""What the operators refuse: arguments that do not fit together, which a kernel would read beyond."""

from __future__ import annotations

import math

from torch import Tensor

from fastlayers.pooling import MOST_POSITIONS
from fastlayers.triton.calls.settings import is_seed


def check(
    input: Tensor, mask: Tensor | None, full_size: dict[str, Tensor | None], per_channel: dict[str, Tensor | None]
) -> None:
    """Raises RuntimeError unless tensors of full size and of one number per channel are that."""
    shape, device = input.shape, input.device
    if len(shape) < 2:
        raise RuntimeError(f"input should have at least 2 dimensions (N, C, ...), not {len(shape)}")
    for name, t in full_size.items():
        if t is not None and (t.shape != shape or t.device != device):
            raise RuntimeError(f"{name} should have the shape and device of input")
    channels = shape[1]
    for name, t in per_channel.items():
        if t is not None and (t.dim() != 1 or t.shape[0] != channels or t.device != device):
            raise RuntimeError(f"{name} should be of shape ({channels},) and on the device of input")
    check_mask(input, mask)


def check_statistics(training: bool, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raises RuntimeError where evaluation has nothing to normalise by."""
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("running_mean and running_var must be defined in evaluation mode")


def check_mask(input: Tensor, mask: Tensor | None) -> None:
    """Raises RuntimeError unless a mask is a seed, or one of channels."""
    if mask is None:
        return
    expected = (1,) if is_seed(mask) else input.shape[:2]
    if mask.shape != expected or mask.device != input.device:
        raise RuntimeError(
            f"mask should be a seed, one int64, or of shape {tuple(input.shape[:2])}, and on the device of input, but "
            f"has dtype {mask.dtype} and shape {tuple(mask.shape)}"
        )


def check_channel_mask(mask: Tensor | None) -> None:
    """Raises RuntimeError for a seed."""
    if is_seed(mask):
        raise RuntimeError("mask should be of channels, (N, C), but is a seed for one of elements")


def check_pooled(input: Tensor, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
    """Raises RuntimeError unless these are of the pooled shape."""
    for name, t in tensors.items():
        if t.shape != shape or t.device != input.device:
            raise RuntimeError(
                f"{name} should be of shape {shape} and on the device of input, but is of shape {tuple(t.shape)}"
            )


def check_window(window: tuple[int, ...], dims: int) -> None:
    """Raises RuntimeError unless these are a kernel, stride, padding and dilation that kernels of `dims` take."""
    if dims not in (1, 2):
        raise RuntimeError(f"input should be of shape (N, C, L) or (N, C, H, W), but has {dims + 2} dimensions")
    if len(window) != 8:
        raise RuntimeError(f"window should have 8 numbers, but is {window}")
    kernel, stride, padding, dilation = (window[i : i + 2] for i in range(0, 8, 2))
    if min(kernel + stride + dilation) < 1 or math.prod(kernel) > MOST_POSITIONS:
        raise RuntimeError(
            f"window should have a kernel of 1 to {MOST_POSITIONS} elements, and strides and dilations of at least 1, "
            f"but is {window}"
        )
    if any(not 0 <= 2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        raise RuntimeError(f"window should have a padding of 0 to half of the kernel's size, but is {window}")
    if dims == 1 and (kernel[0], padding[0]) != (1, 0):
        raise RuntimeError(f"window should have height 1 for an input of 3 dimensions, but is {window}")
