"""How rough the loss is with and without BatchNorm: the plots of Santurkar et al. 2018.

"How Does Batch Normalization Help Optimization?" (https://arxiv.org/abs/1805.11604), section 3.1 and figure 4.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastlayers.studies.report import style
from fastlayers.studies.report.findings import Finding, Variant
from fastlayers.studies.results import LANDSCAPE_FILE, Layers, Result, ResultError, Store

Array = NDArray[np.floating]
Steps = NDArray[np.number]

_KINDS = {"batch": ("with BatchNorm", "#0072B2"), "none": ("without BatchNorm", "#D55E00")}
# A hundredth of the training is averaged: the noise between batches would hide the curves.
_WINDOWS = 100
# Without BatchNorm, single values are thousands of times the rest.
_SHOWN = 0.98
# A million steps.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class _Path:
    """What one run recorded: the loss of every step, and what was found around the measured steps."""

    loss: Array
    step: NDArray[np.int64]
    smoothness: Array
    loss_low: Array
    loss_high: Array


def draw_landscape(finding: Finding, store: Store) -> Figure | None:
    """A row of three panels for each way in which the runs were done.

    The band of the training loss over the learning rates with its mean; how far the loss goes along the gradient; how
    much the gradient changes.

    Raises ResultError where a run's record is missing or is none.
    """
    settings = _settings(finding)
    if not settings:
        return None
    drawn = style.figure(13.5, 0.6 + 3.9 * len(settings), f"{finding.study.id}. {finding.study.title}")
    grid = drawn.subplots(len(settings), 3, squeeze=False)
    for row, (name, by_norm) in zip(grid, settings.items(), strict=True):
        for norm, results in by_norm.items():
            label, colour = _KINDS[norm]
            paths = [_read(store, result) for result in results]
            rates = {result.job.training.optimizer.lr for result in results}
            lost = sum(not np.isfinite(path.loss).all() for path in paths)
            label += f", {len(rates)} rates" + (f", {lost} of {len(paths)} runs diverged" if lost else "")
            _draw_loss(row[0], paths, label, colour)
            _draw_range(row[1], paths, label, colour)
            _draw_smoothness(row[2], paths, label, colour)
        _finish(row, name)
    return drawn


def _settings(finding: Finding) -> dict[str, dict[str, list[Result]]]:
    """The results by how they were done, and by normalisation."""
    found: dict[str, dict[str, list[Result]]] = {}
    for variant in finding.variants:
        norm = variant.run.training.network.arguments["norm"]
        for layers, trained in variant.trained.items():
            found.setdefault(_how(variant, layers), {}).setdefault(norm, []).extend(trained.results)
    return found


def _how(variant: Variant, layers: Layers) -> str:
    return "\n".join((f"layers: {layers}", *variant.deviations))


def _read(store: Store, result: Result) -> _Path:
    path: Path = store.folder(result.job) / LANDSCAPE_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it holds {size} bytes, more than {_MOST_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            floats = [arrays[name].astype(np.float64) for name in ("loss", "smoothness", "loss_low", "loss_high")]
            step = arrays["step"].astype(np.int64)
    except Exception as error:  # a file may be wrong in any way
        raise ResultError(f"{path} is not the record of a loss landscape: {error}") from error
    loss, smoothness, low, high = floats
    if not loss.size or not step.shape == smoothness.shape == low.shape == high.shape:
        raise ResultError(f"{path} is not the record of a loss landscape: its arrays are empty or of unequal lengths")
    return _Path(loss, step, smoothness, low, high)


def _smooth(values: Array, window: int) -> Array:
    """The mean of every `window` values, NaN where one of them is not finite."""
    finite = np.where(np.isfinite(values), values, np.nan)
    return np.convolve(finite, np.full(window, 1 / window), mode="valid")


def _stack(arrays: Iterator[Array]) -> Array:
    """Runs by steps, as long as the shortest; not finite values become NaN."""
    found = list(arrays)
    length = min(map(len, found))
    stacked = np.stack([array[:length] for array in found])
    return np.where(np.isfinite(stacked), stacked, np.nan)


def _band(axes: Axes, steps: Steps, values: Array, middle: Array, label: str, colour: str) -> None:
    """The band over the runs that are still finite, and a line in it; steps at which none is are left out."""
    axes.fill_between(
        steps, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.25, linewidth=0, label=label
    )
    axes.plot(steps, middle, color=colour, linewidth=1.4)


def _some_finite(values: Array) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(values).any(0))


def _draw_loss(axes: Axes, paths: Sequence[_Path], label: str, colour: str) -> None:
    window = max(1, min(len(path.loss) for path in paths) // _WINDOWS)
    losses = _stack(_smooth(path.loss, window) for path in paths)
    kept = _some_finite(losses)
    steps = (np.arange(losses.shape[1]) + window / 2)[kept]
    losses = losses[:, kept]
    if losses.size:
        _band(axes, steps, losses, np.nanmean(losses, 0), label, colour)
    axes.set_title(f"Training loss over the learning rates\nband and mean, of {window} steps each")


def _draw_range(axes: Axes, paths: Sequence[_Path], label: str, colour: str) -> None:
    low, high = (_stack(getattr(path, name) for path in paths) for name in ("loss_low", "loss_high"))
    kept = _some_finite(low) & _some_finite(high)
    steps = paths[0].step[: low.shape[1]][kept]
    low, high = low[:, kept], high[:, kept]
    if steps.size:
        both = np.concatenate([low, high])
        _band(axes, steps, both, np.nanmean(both, 0), label, colour)
    axes.set_title("Loss along the gradient\nfrom the smallest to the largest, all rates")


def _draw_smoothness(axes: Axes, paths: Sequence[_Path], label: str, colour: str) -> None:
    values = _stack(path.smoothness for path in paths)
    kept = _some_finite(values)
    steps = paths[0].step[: values.shape[1]][kept]
    values = values[:, kept]
    if steps.size:
        _band(axes, steps, values, np.nanmedian(values, 0), label, colour)
    axes.set_title("Change of the gradient per distance\nband and median over the rates")


def _finish(row: Sequence[Axes], name: str) -> None:
    for axes in row:
        style.tidy(axes, xlabel="step")
    for axes in row[:2]:
        _cut(axes)
    # Below, since bands may fill the panels.
    row[1].legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))
    row[0].set_ylabel(f"{name}\n\nloss")
    row[1].set_ylabel("loss")
    row[2].set_ylabel("effective smoothness")
    style.log_axis(row[2])


def _cut(axes: Axes) -> None:
    """Leaves the largest values off the picture where they would squeeze the rest, and says so."""
    tops = np.concatenate(
        [np.zeros(0), *(np.asarray(path.vertices)[:, 1] for band in axes.collections for path in band.get_paths())]
    )
    if not tops.size:
        return
    shown = float(np.quantile(tops, _SHOWN))
    if tops.max() > 2 * shown > 0:
        axes.set_ylim(0, 1.1 * shown)
        axes.annotate(f"cut; the largest is {tops.max():.3g}", (0.02, 0.03), xycoords="axes fraction", fontsize=8)
