"""What layers and training steps with max-pool are to reach: how many times as fast as torch, by device."""

from __future__ import annotations

from dataclasses import dataclass

from fastlayers_benchmarks.cases import LAYOUTS, POOLED_BASE, Phase

#: What the goals for layers are about.
PHASE: Phase = "forward+backward"
VARIANT = POOLED_BASE


@dataclass(frozen=True)
class Goal:
    """How many times as fast as eager, and as the fastest that `torch.compile` makes of it."""

    eager: float
    compiled: float


#: By device and layout: for geometric means over the shapes.
LAYERS = {
    ("cpu", "contiguous"): Goal(8, 6),
    ("cpu", "channels_last"): Goal(4, 5),
    **{("cuda", layout): Goal(3, 1.5) for layout in LAYOUTS},
}
_CNN = {"contiguous": Goal(1.7, 1), "channels_last": Goal(1.35, 1)}
#: By device and the name of a training step.
STEPS = {("cpu", f"{model}-{layout}"): goal for model in ("cnn", "cnn-3x3") for layout, goal in _CNN.items()}
