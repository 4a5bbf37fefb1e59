"""The record as pictures: ratios per case, bandwidth against the copy rate, training steps. Losses are red."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from fastlayers.writing import write_whole
from fastlayers_benchmarks import steps
from fastlayers_benchmarks.cases import PHASES
from fastlayers_benchmarks.contenders import COMPILE, EAGER, FUSED_COMPILED, MAX_AUTOTUNE
from fastlayers_benchmarks.record import STEP, Record, Row, Setting
from fastlayers_benchmarks.summary import milliseconds

LOSS = "#d62728"
COLOURS = {EAGER: "#1f4e79", COMPILE: "#e08e0b"}
DTYPE_MARKERS = {"float32": "o", "bfloat16": "^"}
LAYOUT_COLOURS = {"contiguous": "#1f4e79", "channels_last": "#2a9d8f"}
STEP_COLOURS = {
    EAGER: COLOURS[EAGER],
    COMPILE: COLOURS[COMPILE],
    MAX_AUTOTUNE: "#b5651d",
    steps.FUSED: "#2a9d8f",
    FUSED_COMPILED: "#6a4c93",
    steps.WITHOUT: "#8a8a8a",
}

Draw = Callable[[Setting, Sequence[Row]], Figure | None]


def save(record: Record, folder: Path) -> list[Path]:
    """Writes PNGs and returns their paths: one of each kind per setting and phase, as far as it was measured."""
    paths = []
    for setting in record.settings:
        for phase in (*PHASES, STEP):
            rows = [row for row in setting.rows if row.phase == phase]
            for kind, draw in _DRAWINGS[phase == STEP].items():
                figure = draw(setting, rows) if rows else None
                if figure is None:
                    continue
                name = re.sub(r"\W+", "-", f"{kind} {phase} {setting.title}").strip("-")
                paths.append(folder / f"{name}.png")
                FigureCanvasAgg(figure)
                content = io.BytesIO()
                figure.savefig(content, format="png", dpi=110)
                write_whole(paths[-1], content.getbuffer())
    return paths


def _figure(width: float, height: float, setting: Setting, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title} ({setting.title})")
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _draw_ratios(setting: Setting, rows: Sequence[Row]) -> Figure | None:
    """How many times as fast as eager and as torch.compile: a dot per case, with its quantiles."""
    rows = [row for row in rows if row.ratio(setting.fastlayers) is not None]
    layouts = [layout for layout in LAYOUT_COLOURS if any(row.about["layout"] == layout for row in rows)]
    if not rows:
        return None
    columns = [[row for row in rows if row.about["layout"] == layout] for layout in layouts]
    height = 1.8 + 0.19 * max(map(len, columns))
    figure = _figure(7.5 * len(columns), height, setting, f"{rows[0].phase}: times as fast, {setting.fastlayers}")
    for axes, column, layout in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, layouts, strict=True):
        _draw_ratio_column(axes, column, setting.fastlayers)
        axes.set(title=layout, xlabel="ratio of times, log scale: right of 1 is faster, red is a loss")
    return figure


def _draw_ratio_column(axes: Axes, rows: Sequence[Row], fused: str) -> None:
    for contender, offset, marker in ((EAGER, -0.17, "o"), (COMPILE, 0.17, "D")):
        for place, row in enumerate(rows):
            ratio = row.ratio(fused, contender)
            if ratio is None:
                continue
            colour = LOSS if ratio.median < 1 else COLOURS[contender]
            axes.plot((ratio.q20, ratio.q80), (place + offset,) * 2, color=colour, linewidth=1.5)
            axes.plot(ratio.median, place + offset, marker, color=colour, markersize=4)
        axes.plot([], [], marker, color=COLOURS[contender], label=f"against {contender}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _tidy(axes)
    axes.legend(frameon=False, fontsize="small")


def _label(row: Row) -> str:
    """The case's name without the layout, which the column says."""
    return row.case.replace(f"-{row.about['layout']}", "")


def _draw_roofline(setting: Setting, rows: Sequence[Row]) -> Figure | None:
    """Achieved bandwidth by the size of the tensor, below the rate at which one is copied."""
    points = [(row, row.bandwidth(setting.fastlayers)) for row in rows]
    found = [(row, bandwidth) for row, bandwidth in points if bandwidth and row.copy_rate and row.tensor_bytes]
    if not found:
        return None
    figure = _figure(8.5, 5.5, setting, f"{rows[0].phase}: bandwidth, {setting.fastlayers}")
    axes = figure.subplots()
    for row, bandwidth in found:
        ratio = row.ratio(setting.fastlayers)
        colour = LOSS if ratio and ratio.median < 1 else LAYOUT_COLOURS[row.about["layout"]]
        marker = DTYPE_MARKERS[row.about["dtype"]]
        fill = "none" if row.about.get("pool") else "full"
        size = (row.tensor_bytes or 0) / 2**20
        axes.plot(size, bandwidth / 1e9, marker, color=colour, markersize=6, alpha=0.75, fillstyle=fill)
    roof = sorted(((row.tensor_bytes or 0) / 2**20, (row.copy_rate or 0) / 1e9) for row, _ in found)
    axes.plot(*zip(*roof, strict=True), "_", color="black", markersize=9, label="copy of such a tensor")
    for layout, colour in LAYOUT_COLOURS.items():
        axes.plot([], [], "s", color=colour, label=layout)
    for dtype, marker in DTYPE_MARKERS.items():
        axes.plot([], [], marker, color="grey", label=dtype)
    if any(row.about.get("pool") for row, _ in found):
        axes.plot([], [], "o", color="grey", fillstyle="none", label="with max-pool")
    axes.plot([], [], "s", color=LOSS, label="slower than eager")
    axes.set(xlabel="one tensor, MiB", ylabel="GB/s by the design's passes", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        # Numbers between the powers of ten, plain, where an axis is short.
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    _tidy(axes)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _draw_steps(setting: Setting, rows: Sequence[Row]) -> Figure | None:
    """The time of a training step by contender, as a part of eager's."""
    names = [name for name in steps.CONTENDERS if any(name in row.outcomes for row in rows)]
    figure = _figure(max(7.0, 1.5 + 2.2 * len(rows)), 4.5, setting, "training step, part of eager's time")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for place, row in enumerate(rows):
        for number, name in enumerate(names):
            ratio = row.ratio(EAGER, to=name)
            if ratio is None:
                continue
            lost = ratio.median > 1 and name not in (EAGER, *steps.COMPILES)
            colour = LOSS if lost else STEP_COLOURS[name]
            middle = place + (number - (len(names) - 1) / 2) * width
            spread = [[ratio.median - ratio.q20], [ratio.q80 - ratio.median]]
            axes.bar(middle, ratio.median, 0.92 * width, color=colour, yerr=spread, error_kw={"linewidth": 1})
            text = f"{name}, {milliseconds(row.outcomes[name].seconds.median)} ms"
            axes.text(middle, 0.02, text, rotation=90, ha="center", va="bottom", fontsize=8, color="white")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.case for row in rows])
    _tidy(axes)
    axes.grid(False, axis="x")
    return figure


# Whether of training steps: what is drawn.
_DRAWINGS: dict[bool, dict[str, Draw]] = {
    False: {"ratios": _draw_ratios, "roofline": _draw_roofline},
    True: {"steps": _draw_steps},
}
