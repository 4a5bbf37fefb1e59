"""The figures of a study by the names that its description has for them, and what to say below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from fastlayers.studies.config import PlotName
from fastlayers.studies.report import comparisons, curves, formulas, landscape, style
from fastlayers.studies.report.findings import Finding
from fastlayers.studies.results import Store


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG file: its name without the folder, its bytes, and what it shows."""

    name: str
    content: bytes
    caption: str


@dataclass(frozen=True)
class _Kind:
    draw: Callable[[Finding, Store], Figure | None]
    caption: str


_SEEDS = "Several seeds: their mean, and from the smallest to the largest."

KINDS: dict[PlotName, _Kind] = {
    "curves": _Kind(lambda finding, _: curves.draw_curves(finding), f"Loss and accuracy per epoch. {_SEEDS}"),
    "bars": _Kind(lambda finding, _: comparisons.draw_bars(finding), f"Test accuracy by run. {_SEEDS}"),
    "against_x": _Kind(
        lambda finding, _: comparisons.draw_against_x(finding), f"Accuracy against the setting. {_SEEDS}"
    ),
    "schedules": _Kind(lambda finding, _: curves.draw_schedules(finding), "The learning rate of each epoch."),
    "landscape": _Kind(
        landscape.draw_landscape,
        "The band of the training loss over the learning rates, with its mean; the loss a step along the gradient; "
        "how much the gradient changes on the way. A run that diverged is in the band until it does.",
    ),
    "focal": _Kind(
        lambda finding, _: formulas.draw_focal(finding),
        "Focal loss against the probability of the true class, and its logit's lead, with ten classes.",
    ),
    "activation_slopes": _Kind(
        lambda finding, _: formulas.draw_slopes(finding),
        "Derivatives of activations. The sigmoid's is never above 1/4, so that gradients vanish through many layers.",
    ),
    "seconds_per_epoch": _Kind(
        lambda finding, _: comparisons.draw_seconds(finding), f"Seconds of training per epoch. {_SEEDS}"
    ),
}


def pictures(finding: Finding, store: Store) -> Iterator[Picture]:
    """A study's figures; none that would be empty.

    Raises ResultError where what a run recorded cannot be read.
    """
    for name in finding.study.plots:
        kind = KINDS[name]
        drawn = kind.draw(finding, store)
        if drawn is not None:
            yield Picture(f"{finding.study.id}-{name}.png", style.png(drawn), kind.caption)
