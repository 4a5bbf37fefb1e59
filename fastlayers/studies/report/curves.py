"""Loss and accuracy per epoch, and learning rates per epoch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastlayers.studies.report import style
from fastlayers.studies.report.findings import Finding, Trained

_QUANTITIES = ("loss", "accuracy")
_PHASE_NAMES = {"train": "training", "val": "validation", "test": "test"}
_PHASE_COLOURS = ("#0072B2", "#D55E00")
# So few points are marked, since lines between them alone would hide where they are, or that there is only one.
_FEW = 12


def draw_curves(finding: Finding) -> Figure | None:
    """A row of panels for loss and one for accuracy, training and held-out images side by side.

    A study of one run has both in the same panel, in two colours.
    """
    if not finding.trained:
        return None
    phases = ("train", finding.held_out)
    alone = len(finding.variants) == 1
    title = f"{finding.study.id}. {finding.study.title}"
    drawn = style.figure(11, 3.8, title) if alone else style.figure(12, 7.2, title)
    shape = (1, 2) if alone else (2, 2)
    grid = drawn.subplots(*shape, squeeze=False)
    if not alone:
        # Losses are not on one scale: training losses span decades, and would flatten the others.
        grid[1][1].sharey(grid[1][0])
    colour_of = style.colours(finding)
    shown: dict[Axes, list[float]] = {axes: [] for axes in grid.flat}
    for row, quantity in enumerate(_QUANTITIES):
        for column, phase in enumerate(phases):
            axes = grid[0][row] if alone else grid[row][column]
            for variant in finding.variants:
                colour = _PHASE_COLOURS[column] if alone else colour_of[variant.label]
                for trained in variant.trained.values():
                    shown[axes] += _draw_line(axes, trained, f"{phase}_{quantity}", colour)
            name = quantity.capitalize() if alone else f"{_PHASE_NAMES[phase].capitalize()} {quantity}"
            style.tidy(axes, title=name)
            style.epochs_axis(axes)
    for axes in grid[0][:1] if alone else grid[0]:
        if style.spans_decades(shown[axes], 1.3):
            style.log_axis(axes)
    if alone:
        kinds = zip((_PHASE_NAMES[phase] for phase in phases), _PHASE_COLOURS, strict=True)
        style.legend(drawn, [_key(name, colour) for name, colour in kinds] + _layer_keys(finding))
    else:
        style.legend(drawn, [_key(*item) for item in colour_of.items()] + _layer_keys(finding))
    return drawn


def draw_schedules(finding: Finding) -> Figure | None:
    """The learning rate of every epoch, by run."""
    if not finding.variants:
        return None
    drawn = style.figure(9, 4, f"{finding.study.id}. Learning rates")
    axes = drawn.subplots()
    colour_of = style.colours(finding)
    for variant in finding.variants:
        history = next(iter(variant.trained.values())).results[0].history
        axes.plot(
            [epoch.epoch for epoch in history],
            [epoch.lr for epoch in history],
            color=colour_of[variant.label],
            marker="." if len(history) <= _FEW else "",
        )
    style.tidy(axes, ylabel="learning rate")
    style.epochs_axis(axes)
    style.legend(drawn, [_key(*item) for item in colour_of.items()])
    return drawn


def _draw_line(axes: Axes, trained: Trained, quantity: str, colour: Any) -> list[float]:
    """Draws the mean over the seeds and the band between the smallest and the largest; returns the means drawn.

    Where a seed's value is not finite the others go on; a cross marks the last epoch in which all were finite.
    """
    by_epoch: dict[int, list[float]] = {}
    for result in trained.results:
        for epoch in result.history:
            value = getattr(epoch, quantity)
            if value is not None:
                by_epoch.setdefault(epoch.epoch, []).append(value)
    epochs = sorted(by_epoch)
    finite = [[value for value in by_epoch[epoch] if math.isfinite(value)] for epoch in epochs]
    means = [statistics.fmean(values) if values else math.nan for values in finite]
    options: dict[str, Any] = {**style.LAYER_LINES[trained.layers], "color": colour}
    axes.plot(epochs, means, marker="." if len(epochs) <= _FEW else "", **options)
    if len(trained.results) > 1:
        lows, highs = ([pick(values, default=math.nan) for values in finite] for pick in (min, max))
        axes.fill_between(epochs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    lost = [index for index, epoch in enumerate(epochs) if len(finite[index]) < len(by_epoch[epoch])]
    if lost:
        _mark_divergence(axes, epochs, means, lost[0], colour)
    return [mean for mean in means if math.isfinite(mean)]


def _mark_divergence(axes: Axes, epochs: Sequence[int], means: Sequence[float], first: int, colour: Any) -> None:
    if first:
        axes.plot(epochs[first - 1], means[first - 1], marker="x", markersize=9, markeredgewidth=2, color=colour)
    else:
        # There is no finite value to put the mark at.
        place = axes.get_xaxis_transform()
        axes.plot(epochs[0], 0.97, marker="x", markersize=9, markeredgewidth=2, color=colour, transform=place)


def _key(name: str, colour: Any) -> Artist:
    return Line2D([], [], color=colour, linewidth=3, label=name)


def _layer_keys(finding: Finding) -> list[Artist]:
    keys: list[Artist] = [
        # The checker takes all keywords for one type.
        Line2D([], [], color="#444444", label=f"layers: {layers}", **style.LAYER_LINES[layers])  # type: ignore[arg-type]
        for layers in finding.layers
    ]
    if any(True for trained in finding.trained for _ in trained.diverged()):
        keys.append(Line2D([], [], color="#444444", marker="x", linestyle="", label="loss not finite afterwards"))
    return keys
