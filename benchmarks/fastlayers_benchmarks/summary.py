"""The tables that are made of a record, for the terminal and for Markdown alike."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlayers_benchmarks import goals, steps
from fastlayers_benchmarks.cases import PHASES
from fastlayers_benchmarks.contenders import COMPILE, EAGER
from fastlayers_benchmarks.goals import Goal
from fastlayers_benchmarks.record import STEP, Outcome, Record, Row, Setting
from fastlayers_benchmarks.timing import Quantiles

# What is promised: errors of at most twice eager's.
ERROR_ALLOWED = 2.0


@dataclass(frozen=True)
class Cell:
    """Text, and whether it tells of a loss."""

    text: str
    loss: bool = False


@dataclass(frozen=True)
class Table:
    """Columns of text; the first `labels` of them say what a row is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    labels: int
    note: str = ""


NOTHING = Cell("-")
NO_GOAL = Goal(0, 0)

_ABOUT = ("shape", "layout", "dtype", "p", "act")
_SHORT = {"contiguous": "contig", "channels_last": "ch_last", "float32": "f32", "bfloat16": "bf16"}


@dataclass
class _Group:
    """Ratios of several cases."""

    eager: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)
    losses: int = 0

    @property
    def cases(self) -> Cell:
        """How many."""
        return Cell(str(max(len(self.eager), len(self.compiled))))

    def add(self, row: Row, fused: str) -> None:
        for ratios, other in ((self.eager, EAGER), (self.compiled, COMPILE)):
            if (ratio := row.ratio(fused, other)) is not None:
                ratios.append(ratio.median)
                self.losses += ratio.median < 1


def tables(setting: Setting) -> list[Table]:
    """Everything that is said of one setting, what matters most first."""
    fused = setting.fastlayers
    layers = [row for row in setting.rows if row.phase != STEP]
    plain, pooled = ([row for row in layers if bool(_pool(row)) == wanted] for wanted in (False, True))
    training_steps = [row for row in setting.rows if row.phase == STEP]
    found = [means(plain, fused)] if plain else []
    if pooled:
        found.append(pooled_means(pooled, fused, setting.device))
    if training_steps:
        found += [step_times(training_steps), step_ratios(training_steps, setting.device)]
    for kind in (plain, pooled):
        for phase in PHASES:
            rows = [row for row in kind if row.phase == phase]
            if rows:
                found += [ratio_table(phase, rows, fused), time_table(phase, rows)]
        costs = [row for row in kind if any(outcome.errors for outcome in row.outcomes.values())]
        if costs:
            found.append(cost_table(costs, fused))
    return found


def _pool(row: Row) -> str:
    """As "5/3/2"; empty where there is none, as in records of before there were any."""
    pool: str = row.about.get("pool", "")
    return pool


def means(rows: Iterable[Row], fused: str) -> Table:
    """Geometric means of the ratios, by phase, dtype, p and layout."""
    body = [
        [*map(Cell, key), group.cases, _mean(group.eager), _mean(group.compiled), Cell(str(group.losses))]
        for key, group in _groups(rows, fused, lambda row: (_drop_p(row), _layout(row.about)))
    ]
    return Table(
        "Geometric means: how many times as fast as eager and as torch.compile",
        ("phase", "dtype", "p", "layout", "cases", "vs eager", "vs compile", "losses"),
        body,
        labels=4,
        note="losses: single ratios, of both kinds, below one.",
    )


def pooled_means(rows: Iterable[Row], fused: str, device: str) -> Table:
    """The same for layers with max-pool, by activation too, beside what is to be reached."""
    body = []
    for key, group in _groups(rows, fused, lambda row: (_drop_p(row), row.about["act"], _layout(row.about))):
        phase, *variant, layout = key
        v = goals.VARIANT
        is_goals = [phase, *variant] == [goals.PHASE, v.dtype, f"{v.drop_p:g}", v.act]
        goal = goals.LAYERS.get((device, layout), NO_GOAL) if is_goals else NO_GOAL
        pairs = ((group.eager, goal.eager), (group.compiled, goal.compiled))
        cells = [cell for ratios, least in pairs for cell in (_mean(ratios), _goal(ratios, least))]
        body.append([*map(Cell, key), group.cases, *cells, Cell(str(group.losses))])
    return Table(
        "With max-pool, geometric means: how many times as fast as eager and as torch.compile",
        ("phase", "dtype", "p", "act", "layout", "cases", "vs eager", "goal", "vs compile", "goal", "losses"),
        body,
        labels=5,
        note="goal: what the mean is to be; a loss where it is less. losses: single ratios, of both kinds, below one.",
    )


def _groups(
    rows: Iterable[Row], fused: str, about: Callable[[Row], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], _Group]]:
    """The ratios of all rows of one phase, dtype and what else `about` says of a row."""
    groups: dict[tuple[str, ...], _Group] = defaultdict(_Group)
    for row in rows:
        groups[row.phase, row.about["dtype"], *about(row)].add(row, fused)
    return sorted(groups.items(), key=lambda item: (PHASES.index(item[0][0]), *item[0][1:]))


def _drop_p(row: Row) -> str:
    return "any" if row.phase == "eval" else f"{row.about['drop_p']:g}"


def _goal(ratios: Sequence[float], goal: float) -> Cell:
    if not goal or not ratios:
        return NOTHING
    return Cell(f"{goal:g}", loss=statistics.geometric_mean(ratios) < goal)


def _mean(ratios: Sequence[float]) -> Cell:
    return _ratio(statistics.geometric_mean(ratios)) if ratios else NOTHING


def _layout(about: dict[str, Any]) -> str:
    layout: str = about["layout"]
    return layout if len(about["shape"]) > 2 else "(N, C)"


def _about(row: Row) -> list[Cell]:
    a = row.about
    layout = _layout(a)
    shape = "x".join(map(str, a["shape"]))
    texts = [shape, _SHORT.get(layout, layout), _SHORT[a["dtype"]], f"{a['drop_p']:g}", a["act"]]
    return [Cell(text) for text in (*texts, _pool(row) or "+" * a["residual"])]


def _about_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The headings of `_about`. No fused layer has both a residual and a max-pool."""
    return (*_ABOUT, "pool" if _pool(rows[0]) else "res")


def _phase(phase: str, rows: Sequence[Row]) -> str:
    return f"{phase} with max-pool" if _pool(rows[0]) else phase


def _digits(value: float) -> str:
    """Three digits that count, or all before the point, without exponents."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def _ratio_text(value: float) -> str:
    return f"{value:.2f}" if value < 1 else _digits(value)


def _ratio(value: float) -> Cell:
    return Cell(_ratio_text(value), loss=value < 1)


def _spread_ratio(value: Quantiles | None) -> Cell:
    if value is None:
        return NOTHING
    low, high = map(_ratio_text, (value.q20, value.q80))
    return Cell(f"{_ratio_text(value.median)} ({low}-{high})", loss=value.median < 1)


def milliseconds(seconds: float) -> str:
    """As text, without the unit."""
    return _digits(seconds * 1e3)


def _time(row: Row, contender: str) -> Cell:
    if contender not in row.outcomes:
        return Cell("failed", loss=True) if contender in row.failures else NOTHING
    return Cell(milliseconds(row.outcomes[contender].seconds.median))


def _outliers(row: Row, names: Iterable[str]) -> Cell:
    """Of each contender that has some."""
    counts = [row.outcomes[name].outliers if name in row.outcomes else 0 for name in names]
    return Cell("/".join(map(str, counts)) if any(counts) else "0")


def ratio_table(phase: str, rows: Sequence[Row], fused: str) -> Table:
    """Eager and this library by case, with the achieved bandwidth. `rows`: all with max-pool, or all without."""
    about = _about_columns(rows)
    body = []
    for row in rows:
        bandwidth, of_copy = row.bandwidth(fused), row.of_copy_rate(fused)
        body.append(
            [
                *_about(row),
                _time(row, EAGER),
                _time(row, fused),
                _spread_ratio(row.ratio(fused)),
                _spread_ratio(row.ratio(fused, COMPILE)),
                Cell(_digits(bandwidth / 1e9)) if bandwidth else NOTHING,
                Cell(_ratio_text(of_copy)) if of_copy else NOTHING,
                _outliers(row, (EAGER, fused)),
            ]
        )
    return Table(
        f"{_phase(phase, rows)}: {fused}, ms",
        (*about, "eager", "ours", "vs eager", "vs compile", "GB/s", "/copy", "out"),
        body,
        labels=len(about),
        note="eager, ours: median ms. Ratios: median (20 % to 80 % quantile). GB/s: the design's passes over the "
        "median time; /copy: over the rate of a copy of one such tensor. out: outliers of eager/ours.",
    )


def time_table(phase: str, rows: Sequence[Row]) -> Table:
    """Median times of all contenders. `rows`: all with max-pool, or all without."""
    about = _about_columns(rows)
    names = list(dict.fromkeys(name for row in rows for name in (*row.outcomes, *row.failures)))
    body = [[*_about(row), *(_time(row, name) for name in names), _outliers(row, names)] for row in rows]
    headings = (name.replace("fastlayers", "fl") for name in names)
    return Table(
        f"{_phase(phase, rows)}: all contenders, ms",
        (*about, *headings, "outliers"),
        body,
        labels=len(about),
        note="fl: fastlayers. outliers: by column.",
    )


def cost_table(rows: Sequence[Row], fused: str) -> Table:
    """Memory and errors, eager beside this library. `rows`: all with max-pool, or all without."""
    about = _about_columns(rows)
    getters: tuple[tuple[Callable[[Outcome], float | None], Callable[[float], str], float], ...] = (
        (lambda o: o.saved_bytes, _mebibytes, 1.0),
        (lambda o: o.peak_bytes, _mebibytes, 1.0),
        (lambda o: (o.errors or {}).get("output"), "{:.1e}".format, ERROR_ALLOWED),
        (lambda o: o.gradient_error, "{:.1e}".format, ERROR_ALLOWED),
    )
    body = []
    for row in rows:
        cells = _about(row)
        for get, text, allowed in getters:
            eager, its = (get(row.outcomes[n]) if n in row.outcomes else None for n in (EAGER, fused))
            cells.append(NOTHING if eager is None else Cell(text(eager)))
            worse = eager is not None and its is not None and its > allowed * eager
            cells.append(NOTHING if its is None else Cell(text(its), worse))
        body.append(cells)
    return Table(
        f"Memory and errors in {_phase('forward+backward', rows)}: eager, ours",
        (*about, "saved", "ours", "peak", "ours", "output", "ours", "grads", "ours"),
        body,
        labels=len(about),
        note="saved, peak: MiB kept for backward, and most held during a call. output, grads: relative error (root "
        "mean square) against float64, of the gradients the largest; a loss where it is more than twice eager's.",
    )


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}" if value >= 2**20 else f"{value / 2**20:.3f}"


def step_times(rows: Sequence[Row]) -> Table:
    """Median times of whole training steps."""
    names = [name for name in steps.CONTENDERS if any(name in row.outcomes for row in rows)]
    headings = (name.replace("fastlayers", "fl") for name in names)
    return Table(
        "Training steps, ms",
        ("model", *headings, "outliers"),
        [[Cell(row.case), *(_time(row, name) for name in names), _outliers(row, names)] for row in rows],
        labels=1,
        note="fl: fastlayers. without: torch's model without BatchNorm, add, activation, dropout and max-pool behind "
        "them. outliers: by column.",
    )


def step_ratios(rows: Sequence[Row], device: str) -> Table:
    """How much faster whole training steps are, on a kind of device, and what becomes of the fused layers' share."""
    body = []
    for row in rows:
        share = steps.share_of(row)
        ratios = row.ratio(steps.FUSED), row.ratio(steps.FUSED, _fastest(row, steps.COMPILES))
        body.append(
            [
                Cell(row.case),
                *map(_spread_ratio, ratios),
                _step_goal(goals.STEPS.get((device, row.case), NO_GOAL), *ratios),
                Cell(f"{share.share.median:.0%}") if share else NOTHING,
                _removed(share.removed) if share else NOTHING,
            ]
        )
    return Table(
        "Training steps: times as fast, and the share of what is fused",
        ("model", "vs eager", "vs compile", "goal", "share", "removed"),
        body,
        labels=1,
        note="Ratios: median (20 % to 80 % quantile). vs compile: the fastest that torch.compile makes of torch's "
        "layers. goal: of both medians; a loss where either is less. share: what the layers that `without` lacks take "
        "of eager's step, so that fusing them makes it at most 1 / (1 - share) times as fast. removed: which part of "
        "that fastlayers takes away.",
    )


def _fastest(row: Row, names: Sequence[str]) -> str:
    """Of those that were measured, by the median; the first if none was."""
    measured = [name for name in names if name in row.outcomes]
    return min(measured, key=lambda name: row.outcomes[name].seconds.median, default=names[0])


def _step_goal(goal: Goal, eager: Quantiles | None, compiled: Quantiles | None) -> Cell:
    if goal == NO_GOAL:
        return NOTHING
    pairs = ((eager, goal.eager), (compiled, goal.compiled))
    missed = any(ratio is not None and ratio.median < least for ratio, least in pairs)
    return Cell(f"{goal.eager:g}, {goal.compiled:g}", missed)


def _removed(removed: Quantiles) -> Cell:
    return Cell(f"{removed.median:.0%} ({removed.q20:.0%} to {removed.q80:.0%})", loss=removed.median < 0)


def heading(record: Record) -> list[str]:
    """Machine, versions and options, one line each."""
    lines = [
        ", ".join(f"{name}: {value}" for name, value in facts.items())
        for facts in (record.machine, record.versions, record.options)
    ]
    return [f"date: {record.date}", *lines]


def not_measured(record: Record) -> list[str]:
    """Contenders that are missing, and those that failed, with the reason."""
    failed: dict[str, list[str]] = defaultdict(list)
    for setting in record.settings:
        for row in setting.rows:
            for name, why in row.failures.items():
                failed[f"{name} failed: {why.splitlines()[0]}"].append(row.case)
    absent = [f"{name}: {why}" for name, why in record.absent.items()]
    return absent + [f"{why} (cases: {len(set(found))}, such as {found[0]})" for why, found in failed.items()]
