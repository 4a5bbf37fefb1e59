"""Runs beside each other: accuracies as bars or against a setting, and seconds per epoch likewise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastlayers.studies.report import style
from fastlayers.studies.report.findings import TEST_ACCURACY, TRAIN_ACCURACY, Finding, Metric, Sample, Trained
from fastlayers.studies.results import Layers

_THICKNESS = 0.8
# Torch's markers lie above.
_MARKER_SIZES: dict[Layers, float] = {"fastlayers": 8.0, "torch": 5.0}


@dataclass(frozen=True)
class _Bars:
    """The bars of one kind, such as "published": a value, or none, for each label."""

    name: str
    colour: str
    samples: tuple[Sample | None, ...]


def draw_bars(finding: Finding) -> Figure | None:
    """Test accuracy by run: published, and measured with both kinds of layers."""
    if not finding.variants:
        return None
    labels, published, trained = _entries(finding)
    kinds = [_Bars("published", style.PUBLISHED_COLOUR, tuple(published))]
    for layers in finding.layers:
        samples = (_scaled(each[layers].sample(TEST_ACCURACY), 100) if layers in each else None for each in trained)
        kinds.append(_Bars(f"measured, {layers}", style.LAYER_COLOURS[layers], tuple(samples)))
    title = f"{finding.study.id}. {finding.study.title}"
    return _draw_bars(title, "test accuracy, %", labels, kinds, "{:.2f}")


def draw_seconds(finding: Finding) -> Figure | None:
    """Seconds per epoch against the runs' setting, or by run where they have none."""
    if not finding.variants:
        return None
    title = f"{finding.study.id}. Seconds of training per epoch"
    if all(variant.run.x is not None for variant in finding.variants):
        drawn, axes = _settings_figure(title)
        means = [
            mean
            for layers in finding.layers
            for mean in _draw_against_x(axes, finding, layers, Trained.epoch_seconds, f"layers: {layers}", marker="o")
        ]
        if style.spans_decades(means):
            style.log_axis(axes)
        else:
            axes.set_ylim(bottom=0)
        _finish_settings(drawn, axes, finding, "seconds per epoch (median)")
        return drawn
    labels, _, trained = _entries(finding)
    kinds = [
        _Bars(
            f"layers: {layers}",
            style.LAYER_COLOURS[layers],
            tuple(each[layers].epoch_seconds() if layers in each else None for each in trained),
        )
        for layers in finding.layers
    ]
    return _draw_bars(title, "seconds per epoch (median)", labels, kinds, "{:.3g}")


def draw_against_x(finding: Finding) -> Figure | None:
    """Test and training accuracy against the setting that the runs differ in."""
    if not finding.variants:
        return None
    drawn, axes = _settings_figure(f"{finding.study.id}. {finding.study.title}")
    for metric, name in ((TRAIN_ACCURACY, "train"), (TEST_ACCURACY, "test")):
        is_test = metric is TEST_ACCURACY
        _draw_published(axes, finding, metric, name)
        for layers in finding.layers:
            _draw_against_x(
                axes,
                finding,
                layers,
                partial(_percent, metric),
                f"{name}, {layers}",
                marker="o" if is_test else "^",
                alpha=1.0 if is_test else 0.45,
            )
    _finish_settings(drawn, axes, finding, "accuracy, %")
    return drawn


def _entries(finding: Finding) -> tuple[list[str], list[Sample | None], list[dict[Layers, Trained]]]:
    """Label, published test accuracy in percent, and trainings of every variant, and of every run not done."""
    labels: list[str] = []
    published: list[Sample | None] = []
    trained: list[dict[Layers, Trained]] = []
    for run in finding.study.runs:
        variants = finding.of(run)
        labels += [variant.label for variant in variants] or [f"{run.name} (not run)"]
        trained += [dict(variant.trained) for variant in variants] or [{}]
        published += [_scaled(Sample.of([run.published.test_accuracy]), 100)] * max(1, len(variants))
    return labels, published, trained


def _percent(metric: Metric, trained: Trained) -> Sample | None:
    return _scaled(trained.sample(metric), 100)


def _scaled(sample: Sample | None, factor: float) -> Sample | None:
    return None if sample is None else Sample(tuple(factor * value for value in sample.values), sample.lost)


def _draw_bars(title: str, label: str, labels: Sequence[str], kinds: Iterable[_Bars], number: str) -> Figure | None:
    """Horizontal bars, so that long names of runs can be read; whiskers from the smallest seed to the largest."""
    kinds = [kind for kind in kinds if any(sample is not None and sample.values for sample in kind.samples)]
    if not kinds:
        return None
    drawn = style.figure(10, 1.5 + len(labels) * (0.15 + 0.22 * len(kinds)), title)
    axes = drawn.subplots()
    thickness = _THICKNESS / len(kinds)
    for index, kind in enumerate(kinds):
        for row, sample in enumerate(kind.samples):
            if sample is None or not sample.values:
                continue
            place = row + (index + 0.5) * thickness - _THICKNESS / 2
            whisker = [[reach] for reach in sample.reach] if len(sample.values) > 1 else None
            axes.barh(place, sample.mean, 0.92 * thickness, color=kind.colour, xerr=whisker, ecolor="black", capsize=2)
            end = sample.mean + (sample.reach[1] if whisker else 0)
            axes.annotate(
                number.format(sample.mean), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    style.tidy(axes, xlabel=label)
    axes.grid(visible=False, axis="y")
    style.legend(drawn, [Line2D([], [], color=kind.colour, linewidth=7, label=kind.name) for kind in kinds])
    return drawn


def _settings_figure(title: str) -> tuple[Figure, Axes]:
    drawn = style.figure(10, 4.4, title)
    return drawn, drawn.subplots()


def _finish_settings(drawn: Figure, axes: Axes, finding: Finding, label: str) -> None:
    settings = [variant.run.x for variant in finding.variants if variant.run.x is not None]
    settings += [run.x for run in finding.study.runs if run.x is not None and run.published.test_accuracy is not None]
    style.tidy(axes, ylabel=label)
    style.settings_axis(axes, settings, finding.study.x_label)
    style.legend(drawn, axes.get_legend_handles_labels()[0])


def _draw_published(axes: Axes, finding: Finding, metric: Metric, name: str) -> None:
    points = sorted(
        (run.x, 100 * value)
        for run in finding.study.runs
        if run.x is not None and (value := metric.published(run)) is not None
    )
    if points:
        options: dict[str, Any] = {"alpha": 1.0 if metric is TEST_ACCURACY else 0.5}
        marker = "o" if metric is TEST_ACCURACY else "^"
        axes.plot(*zip(*points, strict=True), "--", color=style.PUBLISHED_COLOUR, marker=marker, **options).pop().set(
            label=f"{name}, published", markerfacecolor="white", markersize=8
        )


def _draw_against_x(
    axes: Axes,
    finding: Finding,
    layers: Layers,
    measure: Callable[[Trained], Sample | None],
    name: str,
    **options: Any,
) -> list[float]:
    """One line for all runs done in the same way; whiskers from the smallest seed to the largest. Returns the means."""
    lines: dict[tuple[str, ...], list[tuple[float, Sample]]] = {}
    for variant in finding.variants:
        if layers in variant.trained and variant.run.x is not None:
            sample = measure(variant.trained[layers])
            if sample is not None and sample.values:
                lines.setdefault(variant.deviations, []).append((variant.run.x, sample))
    for found, points in lines.items():
        points.sort(key=lambda point: point[0])
        places, samples = zip(*points, strict=True)
        reaches = list(zip(*(sample.reach for sample in samples), strict=True))
        label = name if len(lines) == 1 else f"{name} ({', '.join(found) or 'as described'})"
        axes.errorbar(
            places,
            [sample.mean for sample in samples],
            yerr=reaches,
            label=label,
            color=style.LAYER_COLOURS[layers],
            capsize=3,
            elinewidth=1.2,
            markersize=_MARKER_SIZES[layers],
            **{**style.LAYER_LINES[layers], **options},
        )
    return [sample.mean for points in lines.values() for _, sample in points if math.isfinite(sample.mean)]
