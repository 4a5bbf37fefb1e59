"""A study as text: published against measured, losses and costs, fastlayers against torch, and remarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fastlayers.studies.config import Run
from fastlayers.studies.report.findings import (
    ACCURACIES,
    LOSSES,
    SIZE,
    TEST_ACCURACY,
    Finding,
    Metric,
    Sample,
    Trained,
    Variant,
)
from fastlayers.studies.results import Result

Cell = str | None
# Marks differences from numbers that were published for another training.
NOT_AS_PUBLISHED = "†"
# Stands in cells that say nothing.
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column under a heading that it may share with its neighbours; a cell is None where there is nothing to say."""

    name: str
    cells: tuple[Cell, ...]
    group: str = ""
    is_text: bool = False

    @property
    def heading(self) -> str:
        """The whole heading in one line."""
        return f"{self.group}: {self.name}" if self.group else self.name


@dataclass(frozen=True)
class Table:
    """Columns of equal length."""

    title: str
    columns: tuple[Column, ...]

    @classmethod
    def of(cls, title: str, columns: Iterable[Column]) -> Table:
        """The table without the columns that say nothing."""
        return cls(title, tuple(column for column in columns if any(cell is not None for cell in column.cells)))

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """The cells by row."""
        return list(zip(*(column.cells for column in self.columns), strict=True))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The upper line of headings: each heading, and how many columns it spans."""
        found = groupby(self.columns, key=lambda column: column.group or column.name)
        return [(name, len(list(columns))) for name, columns in found]


@dataclass(frozen=True)
class _Row:
    run: Run
    label: str
    variant: Variant | None = None
    trained: Trained | None = None

    def measured(self, of: Callable[[Trained], Cell]) -> Cell:
        return None if self.trained is None else of(self.trained)


def tables(finding: Finding) -> list[Table]:
    """What a study's part of the page shows; none for a study without runs."""
    rows = _rows(finding)
    if not rows:
        return []
    results = Table.of("Accuracy", [*_identity(rows), *_conditions(rows), *_all_metrics(rows, ACCURACIES)])
    costs = Table.of(
        "Losses, time and size",
        [*_identity(rows), *_all_metrics(rows, LOSSES), *_times(rows), *_sizes(rows)],
    )
    return [results, *([costs] if finding.variants else []), *_comparison(finding)]


def short_tables(finding: Finding) -> list[Table]:
    """The same for a terminal's width."""
    rows = _rows(finding)
    accuracy = [replace(column, group="") for column in _metric(rows, TEST_ACCURACY)]
    times = [column for column in _times(rows) if column.name != "published"]
    columns = [*_identity(rows), *_run_lengths(rows), *accuracy, *times]
    return (
        [Table.of(f"{TEST_ACCURACY.heading[0].upper()}{TEST_ACCURACY.heading[1:]}", columns), *_comparison(finding)]
        if rows
        else []
    )


def remarks(finding: Finding) -> list[str]:
    """What has to be known of the tables: how the trainings differ from the published, what is missing or diverged."""
    return [*_faithfulness(finding), *_divergences(finding), *_stops(finding), *_missing(finding), *_machines(finding)]


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def spread(sample: Sample | None, factor: float = 1.0, digits: int = 4) -> Cell:
    """A sample as mean and standard deviation; it says which of the values were not finite."""
    if sample is None:
        return None
    total = len(sample.values) + sample.lost
    if not sample.values:
        return "not finite"
    deviation = "" if sample.deviation is None else f" ± {factor * sample.deviation:.{digits}f}"
    lost = f" ({sample.lost} of {total} not finite)" if sample.lost else ""
    return f"{factor * sample.mean:.{digits}f}{deviation}{lost}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _rows(finding: Finding) -> list[_Row]:
    rows: list[_Row] = []
    for run in finding.study.runs:
        variants = finding.of(run)
        rows += [
            _Row(run, variant.label, variant, trained) for variant in variants for trained in variant.trained.values()
        ]
        if not variants:
            rows.append(_Row(run, run.name))
    return rows


def _identity(rows: Sequence[_Row]) -> Iterator[Column]:
    yield Column("run", tuple(row.label for row in rows), is_text=True)
    yield Column("layers", tuple(row.measured(_layers) or "not run" for row in rows), is_text=True)


def _layers(trained: Trained) -> str:
    precision = trained.job.precision
    return trained.layers if precision == "float32" else f"{trained.layers}, {precision}"


def _conditions(rows: Sequence[_Row]) -> Iterator[Column]:
    yield Column("data", tuple(row.measured(_dataset) for row in rows), is_text=True)
    yield Column("images: train / val / test", tuple(row.measured(_images) for row in rows))
    yield from _run_lengths(rows)


def _run_lengths(rows: Sequence[_Row]) -> Iterator[Column]:
    yield Column("epochs", tuple(_epochs(row) for row in rows))
    yield Column("seeds", tuple(row.measured(_seeds) for row in rows))


def _dataset(trained: Trained) -> str:
    return trained.job.training.dataset


def _images(trained: Trained) -> str:
    first = trained.results[0]
    counts = (first.train_images, first.validation_images, first.test_images)
    return " / ".join(f"{count:,}".replace(",", "\N{NO-BREAK SPACE}") if count else NOTHING for count in counts)


def _epochs(row: _Row) -> Cell:
    if row.trained is None:
        return None
    done, described = row.trained.last_epochs, row.run.training.epochs
    text = f"{min(done)}" if min(done) == max(done) else f"{min(done)} to {max(done)}"
    return text if text == str(described) else f"{text} of {described}"


def _seeds(trained: Trained) -> str:
    return ", ".join(str(result.job.seed) for result in trained.results)


def _all_metrics(rows: Sequence[_Row], metrics: Iterable[Metric]) -> Iterator[Column]:
    for metric in metrics:
        yield from _metric(rows, metric)


def _metric(rows: Sequence[_Row], metric: Metric) -> Iterator[Column]:
    published = [metric.published(row.run) for row in rows]
    samples = [None if row.trained is None else row.trained.sample(metric) for row in rows]
    numbers = (f"{metric.factor * value:.{metric.digits}f}" if value is not None else None for value in published)
    yield Column("published", tuple(numbers), metric.heading)
    yield Column("measured", tuple(spread(sample, metric.factor, metric.digits) for sample in samples), metric.heading)
    triples = zip(rows, published, samples, strict=True)
    yield Column("difference", tuple(_difference(metric, *triple) for triple in triples), metric.heading)


def _difference(metric: Metric, row: _Row, published: float | None, sample: Sample | None) -> Cell:
    if published is None or sample is None or not sample.values:
        return None
    mark = f" {NOT_AS_PUBLISHED}" if row.variant and row.variant.deviations else ""
    return signed(metric.factor * (sample.mean - published), metric.digits) + mark


def _times(rows: Sequence[_Row]) -> Iterator[Column]:
    yield Column("published", tuple(_published_time(row.run) for row in rows), "whole run")
    yield Column("measured", tuple(row.measured(_wall_time) for row in rows), "whole run")
    yield Column("median epoch", tuple(row.measured(_epoch_time) for row in rows))


def _published_time(run: Run) -> Cell:
    if run.published.minutes is not None:
        return duration(60 * run.published.minutes)
    return None if run.published.seconds is None else duration(run.published.seconds)


def _wall_time(trained: Trained) -> Cell:
    sample = Sample.of(result.seconds for result in trained.results)
    return None if sample is None else duration(sample.mean)


def _epoch_time(trained: Trained) -> Cell:
    sample = trained.epoch_seconds()
    return None if sample is None else duration(sample.mean)


def _sizes(rows: Sequence[_Row]) -> Iterator[Column]:
    yield Column("parameters", tuple(row.measured(_parameters) for row in rows))
    yield from _metric(rows, SIZE)
    yield Column("scored epoch", tuple(row.measured(_scored_epochs) for row in rows))


def _parameters(trained: Trained) -> str:
    return f"{trained.results[0].parameters:,}".replace(",", "\N{NO-BREAK SPACE}")


def _scored_epochs(trained: Trained) -> Cell:
    if not any(result.validation_images for result in trained.results):
        return None
    return ", ".join(str(result.scored_epoch) for result in trained.results)


def _comparison(finding: Finding) -> Iterator[Table]:
    both = [variant for variant in finding.variants if len(variant.trained) > 1]
    if not both:
        return
    pairs = [(variant.trained["fastlayers"], variant.trained["torch"]) for variant in both]
    heading = TEST_ACCURACY.heading
    columns = [Column("run", tuple(variant.label for variant in both), is_text=True)]
    for index, layers in enumerate(("fastlayers", "torch")):
        samples = (pair[index].sample(TEST_ACCURACY) for pair in pairs)
        columns.append(Column(layers, tuple(spread(sample, 100.0, 2) for sample in samples), heading))
    found = [_accuracy_difference(*pair) for pair in pairs]
    columns += [
        Column("difference", tuple(signed(difference, 2) for difference, _ in found), heading),
        Column("seeds' spread", tuple(None if sd is None else f"{sd:.2f}" for _, sd in found), heading),
    ]
    for index, layers in enumerate(("fastlayers", "torch")):
        columns.append(Column(layers, tuple(_epoch_time(pair[index]) for pair in pairs), "median epoch"))
    ratios = (time_ratio(*pair) for pair in pairs)
    cells = tuple(None if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    yield Table.of("fastlayers against torch's layers", [*columns, Column("torch / fastlayers", cells, "median epoch")])


def _accuracy_difference(ours: Trained, theirs: Trained) -> tuple[float, float | None]:
    """The difference of the mean test accuracies in points, and the pooled standard deviation of a seed."""
    samples = [Sample(tuple(100 * result.test_accuracy for result in each.results)) for each in (ours, theirs)]
    free = [(len(sample.values) - 1, sample.deviation**2) for sample in samples if sample.deviation is not None]
    pooled = math.sqrt(sum(n * var for n, var in free) / sum(n for n, _ in free)) if free else None
    return samples[0].mean - samples[1].mean, pooled


def time_ratio(ours: Trained, theirs: Trained) -> float | None:
    """Torch's median seconds per epoch over ours; None where they were not measured on the same kind of machine."""
    times = [each.epoch_seconds() for each in (ours, theirs)]
    if times[0] is None or times[1] is None or ours.machines != theirs.machines or len(ours.machines) > 1:
        return None
    return times[1].mean / times[0].mean if times[0].mean else None


def _faithfulness(finding: Finding) -> Iterator[str]:
    by_deviation: dict[tuple[str, ...], list[str]] = {}
    for variant in finding.variants:
        by_deviation.setdefault(variant.deviations, []).append(variant.label)
    for found, labels in by_deviation.items():
        names = "All runs" if len(by_deviation) == 1 else "; ".join(labels)
        if found:
            yield (
                f"{NOT_AS_PUBLISHED} Not the published training. {names}: {', '.join(found)}. "
                "Published numbers are there to be seen, not to be met."
            )
        else:
            yield f"{names}: epochs, data and settings as described."


def _divergences(finding: Finding) -> Iterator[str]:
    for variant in finding.variants:
        for trained in variant.trained.values():
            for seed, epoch in trained.diverged():
                yield f"{variant.label} ({trained.layers}, seed {seed}): the loss is not finite from epoch {epoch} on."


def _stops(finding: Finding) -> Iterator[str]:
    for variant in finding.variants:
        for trained in variant.trained.values():
            planned = trained.job.training.epochs
            early = [str(last) for last in trained.last_epochs if last < planned]
            if early:
                yield f"{variant.label} ({trained.layers}): stopped after epoch {', '.join(early)} of {planned}."


def _missing(finding: Finding) -> Iterator[str]:
    if finding.missing:
        yield f"Not run yet: {'; '.join(run.name for run in finding.missing)}."


def _machines(finding: Finding) -> Iterator[str]:
    results = [result for trained in finding.trained for result in trained.results]
    backends = sorted({result.environment.backend for result in results if result.job.layers == "fastlayers"})
    if results:
        backend = f"; fastlayers' backend: {', '.join(backends)}" if backends else ""
        yield f"Measured with {'; '.join(sorted({_machine(result) for result in results}))}{backend}."


def _machine(result: Result) -> str:
    """Where a run ran, in words."""
    where = result.environment
    processes = f", {where.processes} processes" if where.processes > 1 else ""
    threads = f"{where.threads} thread{'s' if where.threads > 1 else ''}"
    return f"{where.device}, {threads}{processes}, torch {where.torch}, fastlayers {where.fastlayers}"
