"""Dropout masks, drawn from torch's generator exactly as `torch.nn.functional`'s dropouts draw theirs."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("channel", "element")


def scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), or 0 where nothing is kept."""
    return 0.0 if p == 1 else 1.0 / (1.0 - p)


def draw(input: Tensor, p: float, mode: str, training: bool) -> Tensor | None:
    """Which parts of `input` dropout keeps, or None if it keeps all as they are.

    The result is bool, of shape (N, C) for mode "channel" and of the shape and memory order of ``empty_like(input)``
    for mode "element". For the same state of the generator it is the mask of `F.dropout2d` or `F.dropout`: like them,
    this draws nothing for p = 0, p = 1 and an empty input.
    """
    if p == 0 or not training or input.numel() == 0:
        return None
    if mode == "channel":
        return _bernoulli(input.new_empty(input.shape[:2], dtype=_drawing_dtype(input)), p)
    return _bernoulli(torch.empty_like(input, dtype=_drawing_dtype(input)), p)


def _bernoulli(values: Tensor, p: float) -> Tensor:
    if p == 1:
        return torch.zeros_like(values, dtype=torch.bool)
    values.bernoulli_(1 - p)
    return values if values.dtype == torch.bool else values != 0


def _drawing_dtype(input: Tensor) -> torch.dtype:
    # torch's CPU generator makes the same choices for every dtype, its others do not.
    return torch.bool if input.device.type == "cpu" else input.dtype
