"""The dtypes of tensors and of their statistics."""

from __future__ import annotations

import torch
from torch import Tensor

#: What the layers take.
SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def statistics_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which statistics of `input` are kept: float64 for float64, else float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32
