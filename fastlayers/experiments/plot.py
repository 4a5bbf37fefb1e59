"""The quickstart's result as one picture: losses, their distance, the time per step and where it goes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastlayers.experiments.quickstart import Result
from fastlayers.experiments.training import PHASES
from fastlayers.writing import write_whole

TORCH_COLOUR = "#ee4c2c"
FUSED_COLOUR = "#1f4e79"
LINES = {"train": "-", "test": "--"}


def save(result: Result, title: str, path: Path) -> None:
    """Writes the picture as a PNG."""
    figure = Figure(figsize=(15, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    losses, distances, times, parts = figure.subplots(1, 4, width_ratios=(4, 4, 4, 3))
    _draw_losses(losses, result)
    _draw_distances(distances, result)
    _draw_times(times, result)
    _draw_parts(parts, result)
    for axes in (losses, distances, times, parts):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_whole(path, content.getbuffer())


def _epochs(result: Result) -> range:
    return range(1, len(result.torch.run.epochs) + 1)


def _draw_losses(axes: Axes, result: Result) -> None:
    # Torch's lines are broad, so that both show where one covers the other.
    for name, measured, colour, width in (
        ("torch", result.torch, TORCH_COLOUR, 5.0),
        ("fastlayers", result.fused, FUSED_COLOUR, 1.5),
    ):
        for phase in PHASES:
            values = [epoch.mean_loss(phase) for epoch in measured.run.epochs]
            (line,) = axes.plot(_epochs(result), values, LINES[phase], color=colour)
            line.set(linewidth=width, alpha=min(1.0, 2 / width), label=f"{name}, {phase}")
    axes.set(title="Loss", xlabel="epoch", yscale="log")


def _draw_distances(axes: Axes, result: Result) -> None:
    for phase in PHASES:
        agreement = result.agreement[phase]
        for name, values, colour in (
            ("rounding explains", agreement.explained, "grey"),
            ("fastlayers", agreement.distance, FUSED_COLOUR),
        ):
            label = f"{name}, {phase}"
            axes.plot(_epochs(result), values, LINES[phase], color=colour, label=label)
    axes.set(title="Distance of the losses from torch's", xlabel="epoch", yscale="log")


def _draw_times(axes: Axes, result: Result) -> None:
    kinds = (("torch", result.torch, TORCH_COLOUR), ("fastlayers", result.fused, FUSED_COLOUR))
    times = [np.array(measured.step_seconds) * 1e3 for _, measured, _ in kinds]
    # The slowest steps are other programs' doing, and would squeeze the rest.
    limits = (min(map(np.min, times)), max(np.quantile(time, 0.97) for time in times))
    for (name, measured, colour), time in zip(kinds, times, strict=True):
        axes.hist(time, bins=40, range=limits, color=colour, alpha=0.55)
        median = measured.median_step * 1e3
        axes.axvline(median, color=colour, label=f"{name}, median {median:.2f} ms")
    axes.set(title="Time per step", xlabel="ms", ylabel="steps")


def _draw_parts(axes: Axes, result: Result) -> None:
    names, measured = ("torch", "fastlayers"), (result.torch, result.fused)
    between = [1e3 * m.between_seconds for m in measured]
    rest = [max(0.0, 1e3 * m.median_step - part) for m, part in zip(measured, between, strict=True)]
    bars = axes.bar(names, between, color=(TORCH_COLOUR, FUSED_COLOUR), label="BatchNorm to max-pool")
    axes.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    axes.bar(names, rest, bottom=between, color="lightgrey", label="the rest of the step")
    axes.set(title="Where a step's time goes", ylabel="ms")
    axes.set_ylim(0, 1.3 * max(map(sum, zip(between, rest, strict=True))))  # room for the legend
