"""What all figures share: colours, axes, legends, and how they become PNG files."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastlayers.studies.report.findings import Finding
from fastlayers.studies.results import Layers

PUBLISHED_COLOUR = "#9a9a9a"
LAYER_COLOURS: dict[Layers, str] = {"fastlayers": "#1f4e79", "torch": "#ee4c2c"}
# Torch's lines are dotted and lie above, so that both show where one covers the other.
LAYER_LINES: dict[Layers, dict[str, object]] = {
    "fastlayers": {"linestyle": "-", "linewidth": 1.5},
    "torch": {"linestyle": (0, (1, 1.2)), "linewidth": 2.6},
}
# Okabe and Ito's colours, which colour-blind people tell apart; without yellow, which hardly shows on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1")
_DPI = 110
_LEGEND_WIDTH = 28
# Values of a wider span than this are shown on a logarithmic axis.
_DECADE = 10.0
# Of a label at an axis of settings, as a part of the axis.
_LABEL_WIDTH = 0.05


def figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of `width` by `height` inches."""
    empty = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(empty)
    empty.suptitle(title, fontsize="large")
    return empty


def png(drawn: Figure) -> bytes:
    """The figure as a file."""
    content = io.BytesIO()
    drawn.savefig(content, format="png")
    return content.getvalue()


def tidy(axes: Axes, **labels: str) -> None:
    """A light grid, no box, and the labels that `Axes.set` takes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.set(**labels)


def epochs_axis(axes: Axes) -> None:
    """Ticks at whole epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend(drawn: Figure, handles: Sequence[Artist]) -> None:
    """A legend at the right of all axes, its entries broken into lines."""
    labels = [textwrap.fill(str(handle.get_label()), _LEGEND_WIDTH, break_on_hyphens=False) for handle in handles]
    drawn.legend(list(handles), labels, loc="outside right upper", frameon=False, fontsize="small")


def colours(finding: Finding) -> dict[str, object]:
    """A colour for each variant, by label: in order of the setting where the runs are a row of one, else distinct."""
    labels = [variant.label for variant in finding.variants]
    settings = [variant.run.x for variant in finding.variants]
    numbers = sorted({x for x in settings if x is not None})
    if len(numbers) == len(settings) > 3:
        shades = mpl.colormaps["plasma"]
        places = (numbers.index(x) for x in settings if x is not None)
        return {label: shades(0.88 * place / (len(numbers) - 1)) for label, place in zip(labels, places, strict=True)}
    if len(labels) <= len(_COLOURS):
        return dict(zip(labels, _COLOURS, strict=False))
    shades = mpl.colormaps["turbo"]
    return {label: shades((index + 0.5) / len(labels)) for index, label in enumerate(labels)}


def spans_decades(values: Sequence[float], decades: float = 1.0) -> bool:
    """Whether positive values differ by a factor of ten to the `decades` or more."""
    return len(values) > 1 and min(values) > 0 and max(values) / min(values) >= _DECADE**decades


def settings_axis(axes: Axes, values: Sequence[float], label: str) -> None:
    """An x axis with a tick at every setting, logarithmic where they span decades."""
    places = sorted(set(values))
    if spans_decades(places):
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [f"{place:g}" for place in places], rotation=45 if _are_crowded(places) else 0)
    axes.set_xlabel(label)


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _are_crowded(places: Sequence[float]) -> bool:
    """Whether labels at these places, in ascending order, would touch each other."""
    shown = [math.log(place) for place in places] if spans_decades(places) else places
    gaps = [after - before for before, after in pairwise(shown)]
    return bool(gaps) and min(gaps) < _LABEL_WIDTH * (shown[-1] - shown[0])
