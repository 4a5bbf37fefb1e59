"""What a tensor holds: per channel a mean and a spread, from subnormal to huge ones, and single special values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

INF, NAN = math.inf, math.nan

#: A huge and a tiny number of each dtype: squares of the first overflow in it, the second is subnormal.
_HUGE = {torch.float32: 1e30, torch.float64: 1e60, torch.bfloat16: 1e30, torch.float16: 2e4}
_TINY = {torch.float32: 1e-40, torch.float64: 1e-310, torch.bfloat16: 1e-40, torch.float16: 1e-7}


@dataclass(frozen=True)
class Values:
    """Normal random numbers.

    Attributes:
        seed: of the numbers.
        channels: (mean, standard deviation), for the channels in turn.
        specials: (index, value) of single elements; indices wrap around.
        positive: whether all but the specials are made positive.
    """

    seed: int = 0
    channels: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    specials: tuple[tuple[int, float], ...] = ()
    positive: bool = False

    def fill(self, shape: tuple[int, ...]) -> Tensor:
        """A float64 tensor; its second dimension, or its only one, are the channels."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        count = shape[1] if len(shape) > 1 else shape[0] if shape else 0
        if count == 0 or numbers.numel() == 0:
            return numbers
        per_channel = (1, -1, *(1,) * (len(shape) - 2)) if len(shape) > 1 else (-1,)
        in_turn = torch.tensor(self.channels, dtype=torch.float64).repeat(-(-count // len(self.channels)), 1)[:count]
        numbers = numbers * in_turn[:, 1].reshape(per_channel) + in_turn[:, 0].reshape(per_channel)
        if self.positive:
            numbers = numbers.abs()
        for index, value in self.specials:
            numbers.view(-1)[index % numbers.numel()] = value
        return numbers


def _regimes(dtype: torch.dtype) -> list[tuple[float, float]]:
    huge, tiny = _HUGE[dtype], _TINY[dtype]
    return [
        (0.0, 1.0), (1.0, 2.0), (-3.0, 0.5),
        (100.0, 1.0), (1e4, 1.0), (-1e4, 1.0), (1e4, 1e-2),
        (0.0, 0.0), (0.1, 0.0), (-1e4, 0.0),
        (0.0, huge), (huge, huge), (huge, huge * 1e-4), (-huge, 0.0),
        (0.0, tiny), (tiny, 0.0), (0.0, math.sqrt(tiny)),
    ]  # fmt: skip


_SPECIALS = (NAN, INF, -INF, 0.0, -0.0, 3.0, 6.0, 1e-42, -1e-45, 1e30, -1e30)

_seeds = st.integers(0, 9)


@st.composite
def full_size(draw: st.DrawFn, dtype: torch.dtype) -> Values:
    """Values of a tensor (N, C, ...)."""
    regimes = st.just((0.0, 1.0)) if draw(st.booleans()) else st.sampled_from(_regimes(dtype))
    channels = draw(st.lists(regimes, min_size=1, max_size=3))
    return Values(draw(_seeds), tuple(channels), _specials(draw))


@st.composite
def gradients(draw: st.DrawFn, dtype: torch.dtype) -> Values:
    """Values of a gradient, seldom special ones."""
    channel = draw(st.sampled_from(((0.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, _TINY[dtype]))))
    return Values(draw(_seeds), (channel,), _specials(draw) if draw(st.integers(0, 3)) == 3 else ())


@st.composite
def per_channel(draw: st.DrawFn, plain: tuple[float, float], positive: bool = False) -> Values:
    """One value per channel: normal ones with mean and spread `plain`, and now and then others."""
    channels = [plain]
    specials: list[tuple[int, float]] = []
    if draw(st.integers(0, 3)) == 3:
        others = [(0.0, 0.0), (1.0, 0.0), (1e4, 0.0), (1e-6, 0.0), (1e12, 0.0), (1e-40, 0.0)]
        if not positive:
            others += [(-1.0, 0.0), (-1e4, 0.0)]
        channels = draw(st.lists(st.sampled_from(others), min_size=1, max_size=3))
        if draw(st.integers(0, 3)) == 3:
            value = draw(st.sampled_from((NAN, INF, -0.0, -1.0) if positive else (NAN, INF, -INF, 1e30)))
            specials.append((draw(st.integers(0, 9)), value))
    return Values(draw(_seeds), tuple(channels), tuple(specials), positive)


def _specials(draw: st.DrawFn) -> tuple[tuple[int, float], ...]:
    if draw(st.integers(0, 3)) < 3:
        return ()
    special = st.tuples(st.integers(0, 999), st.sampled_from(_SPECIALS))
    return tuple(draw(st.lists(special, min_size=1, max_size=3)))
