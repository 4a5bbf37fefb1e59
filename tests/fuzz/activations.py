"""The activations that are drawn, with what is to be known of each to bound errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import strategies as st
from torch import nn


@dataclass(frozen=True)
class Act:
    """One of torch's modules by the name of its class and its arguments."""

    name: str = "Identity"
    arguments: tuple[float | str, ...] = ()

    def module(self) -> nn.Module:
        made: nn.Module = getattr(nn, self.name)(*self.arguments)
        # RReLU is deterministic in evaluation mode only.
        return made.eval()

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether it computes with its argument and multiples of it alone."""
        return self.name in ("Identity", "ReLU", "ReLU6", "LeakyReLU", "RReLU")

    @property
    def slope(self) -> float:
        """A bound of its derivative's magnitude."""
        return max([1.2, *map(abs, self._numbers())]) if self.name in _SLOPED else 1.8 if self.name == "SELU" else 1.2

    @property
    def curvature(self) -> float:
        """A bound of its second derivative's magnitude between kinks."""
        if self.name == "CELU":
            return max(1.0, abs(1 / self._numbers()[0])) if self.arguments else 1.0
        return max([1.8, *map(abs, self._numbers())]) if self.name in ("ELU", "SELU", "Softplus") else 1.2

    @property
    def size(self) -> float:
        """The magnitude of the numbers that it computes with besides its argument and multiples of it."""
        if self.is_piecewise_linear:
            return 0.0
        numbers = self._numbers()
        if self.name == "Softplus":
            return max(1.0, abs(1 / numbers[0])) if numbers else 1.0
        return max([2.0, *map(abs, numbers)])

    @property
    def kinks(self) -> tuple[float, ...]:
        """Where its derivative jumps."""
        if self.name == "Softplus":
            beta, threshold = self._numbers() or (1.0, 20.0)
            return (threshold / beta,)
        return _KINKS.get(self.name, ())

    @property
    def jump(self) -> float:
        """The largest step of its value there."""
        if self.name != "Softplus":
            return 0.0
        beta, threshold = self._numbers() or (1.0, 20.0)
        return abs((threshold - max(threshold, 0) - math.log1p(math.exp(-abs(threshold)))) / beta)

    def _numbers(self) -> tuple[float, ...]:
        return tuple(a for a in self.arguments if isinstance(a, float))


_SLOPED = ("LeakyReLU", "RReLU", "ELU", "CELU")
_KINKS = {
    "ReLU": (0.0,), "LeakyReLU": (0.0,), "RReLU": (0.0,), "ELU": (0.0,), "SELU": (0.0,), "CELU": (0.0,),
    "ReLU6": (0.0, 6.0), "Hardswish": (-3.0, 3.0), "Hardsigmoid": (-3.0, 3.0),
}  # fmt: skip

_NO_ARGUMENTS = (
    "Identity", "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "SiLU", "Mish", "GELU", "Sigmoid", "Tanh",
    "Hardswish", "Hardsigmoid", "Softplus", "RReLU",
)  # fmt: skip


def _with(name: str, *arguments: st.SearchStrategy[float]) -> st.SearchStrategy[Act]:
    return st.builds(lambda *numbers: Act(name, numbers), *arguments)


def _among(*numbers: float) -> st.SearchStrategy[float]:
    return st.sampled_from(numbers)


acts: st.SearchStrategy[Act] = st.one_of(
    st.sampled_from([Act(name) for name in _NO_ARGUMENTS]),
    st.one_of(
        st.just(Act("GELU", ("tanh",))),
        _with("LeakyReLU", _among(0.2, 0.0, 1.0, -0.5, 3.0)),
        _with("RReLU", _among(-0.5, 0.1), _among(0.3, 1.0)),
        _with("ELU", _among(0.5, -1.0, 0.0, 3.0)),
        _with("CELU", _among(0.5, 2.0, -1.0)),
        _with("Softplus", _among(2.0, 0.5, -1.0), _among(20.0, 5.0, 0.0, -5.0)),
    ),
)
