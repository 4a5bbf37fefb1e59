"""What the kernels are told besides tensors and sizes: dropout, activation, momentum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlayers.triton.tiles import ALL, ELEMENTS, PLANES


class Call(NamedTuple):
    """The settings of one call.

    Attributes:
        keep: how the mask comes, see tiles.py.
        activation: its number and three parameters.
        eps, momentum, cumulative: for forward.
    """

    keep: int
    drop_scale: float
    activation: tuple[object, ...] = ()
    eps: float = 0.0
    momentum: float = 0.0
    cumulative: bool = False

    @classmethod
    def of(
        cls,
        mask: Tensor | None,
        drop_scale: float,
        activation: tuple[object, ...] = (),
        eps: float = 0.0,
        momentum: float | None = 0.0,
    ) -> Call:
        """From an operator's arguments."""
        keep: int = (ALL if mask is None else ELEMENTS if is_seed(mask) else PLANES).value
        return cls(keep, drop_scale, activation, float(eps), float(momentum or 0), momentum is None)

    @property
    def dropping(self) -> tuple[float, int]:
        """The scale of what is kept, and the largest random word that keeps an element, minus 2**31."""
        if self.keep != ELEMENTS.value:
            return self.drop_scale, 0
        threshold = round(2**32 / self.drop_scale) if self.drop_scale else 0
        return self.drop_scale, max(threshold - 1, 0) - 2**31

    @property
    def constants(self) -> tuple[object, ...]:
        """KEEP, ACT, A, B, C."""
        return (self.keep, *self.activation)


def is_seed(mask: Tensor | None) -> bool:
    """Whether a mask is a seed of one by elements, not one of channels."""
    return mask is not None and mask.dtype == torch.int64
