"""Whether two trainings are the same but for rounding, where what rounding does is measured.

Torch's layers are trained again from weights moved by one unit in the last place. Such a run stays
within 1e-7 of the first until, somewhere, a value so near zero that rounding decides its sign meets
a ReLU; from there the two drift apart, a thousandfold within some epochs. When that happens is
chance, so several moved runs are made, and the largest distance is what rounding explains. A wrong
kernel is off from the first steps, before rounding can explain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from fastlayers.experiments.training import PHASES, Phase, Run

# How many times further from torch's run than the moved ones fastlayers may be.
TOLERANCE = 2.0
# A float32 loss near one cannot be told from its neighbour.
FLOOR = torch.finfo(torch.float32).eps


@torch.no_grad()
def move_by_one_ulp(model: nn.Module, seed: int) -> None:
    """Moves every parameter to a neighbouring float, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        towards = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
        parameter.copy_(parameter.nextafter(towards))


@dataclass(frozen=True)
class Agreement:
    """Per epoch, the distance of fastlayers' losses from torch's, and the moved runs' largest."""

    distance: list[float]
    rounding: list[float]

    @property
    def explained(self) -> list[float]:
        """Per epoch, the distance that rounding explains."""
        return [TOLERANCE * moved + FLOOR for moved in self.rounding]

    @property
    def unexplained_epochs(self) -> list[int]:
        """The epochs, from 0, in which fastlayers is further away than rounding explains."""
        epochs = enumerate(zip(self.distance, self.explained, strict=True))
        # Not `>`: a NaN is no agreement.
        return [epoch for epoch, (found, explained) in epochs if not found <= explained]


def compare(torch_run: Run, fused_run: Run, moved_runs: Sequence[Run]) -> dict[Phase, Agreement]:
    """The agreement of `fused_run` with `torch_run` in training and in testing."""
    return {
        phase: Agreement(
            distance=_distances(phase, torch_run, fused_run),
            rounding=_envelope([_distances(phase, torch_run, moved) for moved in moved_runs]),
        )
        for phase in PHASES
    }


def _distances(phase: Phase, one: Run, other: Run) -> list[float]:
    """Per epoch, the mean difference between two runs' losses on the same batch or image."""
    return [
        (a.losses[phase] - b.losses[phase]).abs().mean().item() for a, b in zip(one.epochs, other.epochs, strict=True)
    ]


def _envelope(by_run: Sequence[Sequence[float]]) -> list[float]:
    """Per epoch, the largest distance of any run up to that epoch."""
    return list(accumulate(map(max, zip(*by_run, strict=True)), max))
