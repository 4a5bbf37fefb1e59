"""What there is to tell of a study: its finished runs beside its description, those not done, and those that failed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from fastlayers.studies import config
from fastlayers.studies.config import PlotName, Report, Run, Study, Training
from fastlayers.studies.results import RESULT_FILE, Job, Layers, Result, Store

LAYERS: tuple[Layers, ...] = get_args(Layers)
# Plots of formulas, for which nothing has to be trained.
WITHOUT_RUNS: frozenset[PlotName] = frozenset({"focal", "activation_slopes"})


@dataclass(frozen=True)
class Sample:
    """One quantity over the seeds: the finite values, and how many were not finite."""

    values: tuple[float, ...]
    lost: int = 0

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Sample | None:
        """The sample of what was measured; None where nothing was."""
        measured = [value for value in values if value is not None]
        finite = tuple(filter(math.isfinite, measured))
        return cls(finite, len(measured) - len(finite)) if measured else None

    @property
    def mean(self) -> float:
        """The mean of the finite values, NaN where there is none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """The standard deviation, with n - 1; None for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def reach(self) -> tuple[float, float]:
        """How far the smallest value lies below the mean, and the largest above."""
        return (self.mean - min(self.values), max(self.values) - self.mean) if self.values else (0.0, 0.0)


@dataclass(frozen=True)
class Metric:
    """One quantity that a run has: its name in `Published`, its heading, and how it is measured and printed."""

    name: str
    heading: str
    measure: Callable[[Result], float | None]
    factor: float = 1.0
    digits: int = 4
    varies: bool = True  # with the seed

    def published(self, run: Run) -> float | None:
        """What the report printed."""
        value: float | None = getattr(run.published, self.name)
        return value


def _last(name: str) -> Callable[[Result], float | None]:
    def measure(result: Result) -> float | None:
        values = [getattr(epoch, name) for epoch in result.history]
        return next((value for value in reversed(values) if value is not None), None)

    return measure


def _accuracy(name: str, heading: str, measure: Callable[[Result], float | None]) -> Metric:
    return Metric(name, f"{heading} accuracy, %", measure, factor=100.0, digits=2)


TEST_ACCURACY = _accuracy("test_accuracy", "test", lambda result: result.test_accuracy)
TRAIN_ACCURACY = _accuracy("train_accuracy", "train", _last("train_accuracy"))
ACCURACIES = (
    TEST_ACCURACY,
    _accuracy("best_val_accuracy", "best val", lambda result: result.best_val_accuracy),
    _accuracy("val_accuracy", "val", _last("val_accuracy")),
    TRAIN_ACCURACY,
)
LOSSES = (
    Metric("train_loss", "train loss", _last("train_loss")),
    Metric("val_loss", "val loss", _last("val_loss")),
    Metric("test_loss", "test loss", lambda result: result.test_loss),
)
SIZE = Metric("state_mib", "state, MiB", lambda result: result.state_mib, digits=2, varies=False)


@dataclass(frozen=True)
class Trained:
    """A run trained with the same settings and layers, once per seed: `results`, at least one, in order of seeds."""

    results: tuple[Result, ...]

    @property
    def job(self) -> Job:
        """What all results share, but for the seed."""
        return self.results[0].job

    @property
    def layers(self) -> Layers:
        """Whose layers were trained."""
        return self.job.layers

    @property
    def last_epochs(self) -> list[int]:
        """The last epoch of each seed."""
        return [max((epoch.epoch for epoch in result.history), default=0) for result in self.results]

    @property
    def machines(self) -> set[tuple[str, int, int]]:
        """What times depend on: device, threads and processes."""
        found = (result.environment for result in self.results)
        return {(machine.device, machine.threads, machine.processes) for machine in found}

    def sample(self, metric: Metric) -> Sample | None:
        """A metric over the seeds."""
        return Sample.of(metric.measure(result) for result in self.results[: None if metric.varies else 1])

    def epoch_seconds(self) -> Sample | None:
        """The median seconds per epoch of each seed."""
        times = [[epoch.seconds for epoch in result.history] for result in self.results]
        return Sample.of(statistics.median(seconds) for seconds in times if seconds)

    def diverged(self) -> Iterator[tuple[int, int]]:
        """Seeds whose loss stopped being finite, and the first epoch in which it was not."""
        for result in self.results:
            for epoch in result.history:
                losses = (epoch.train_loss, epoch.val_loss, epoch.test_loss)
                if not all(math.isfinite(loss) for loss in losses if loss is not None):
                    yield result.job.seed, epoch.epoch
                    break


@dataclass(frozen=True)
class Variant:
    """A run as it was done: `deviations` say how that differs from its description; `trained` is by layers."""

    run: Run
    label: str
    deviations: tuple[str, ...]
    trained: Mapping[Layers, Trained]


@dataclass(frozen=True)
class Finding:
    """A study with what was found of it: `variants` of its runs, runs that are `missing`, and `failures` by folder."""

    study: Study
    variants: tuple[Variant, ...]
    missing: tuple[Run, ...]
    failures: Mapping[str, str]

    @property
    def is_shown(self) -> bool:
        """Whether there is anything to show besides that nothing was run."""
        return bool(self.variants or self.failures or WITHOUT_RUNS.intersection(self.study.plots))

    @cached_property
    def trained(self) -> tuple[Trained, ...]:
        """All that was trained."""
        return tuple(trained for variant in self.variants for trained in variant.trained.values())

    @property
    def layers(self) -> tuple[Layers, ...]:
        """Whose layers were trained at all."""
        found = {trained.layers for trained in self.trained}
        return tuple(layers for layers in LAYERS if layers in found)

    @property
    def held_out(self) -> str:
        """What the curves compare training with: "val" where a run had validation images, otherwise "test"."""
        epochs = (epoch for trained in self.trained for result in trained.results for epoch in result.history)
        return "val" if any(epoch.val_accuracy is not None for epoch in epochs) else "test"

    def of(self, run: Run) -> list[Variant]:
        """How `run` was done."""
        return [variant for variant in self.variants if variant.run == run]


@dataclass(frozen=True)
class Findings:
    """All of a folder: findings by report, and the failures of runs by folder."""

    reports: tuple[tuple[Report, tuple[Finding, ...]], ...]
    failures: Mapping[str, str]
    runs: int


def collect(out: Path) -> Findings:
    """What the runs in `out` say of every study.

    Raises ResultError for a result that cannot be read.
    """
    store = Store(out)
    results = list(store.results())
    # A run that failed once may be finished by now.
    failures = {
        name: reason for name, reason in store.failures().items() if not (store.root / name / RESULT_FILE).is_file()
    }
    found = (
        (report, tuple(_finding(study, results, failures) for study in report.studies)) for report in config.reports()
    )
    return Findings(tuple(found), failures, len(results))


def _finding(study: Study, results: Iterable[Result], failures: Mapping[str, str]) -> Finding:
    results = list(results)
    of_run = [(run, [result for result in results if result.job.published == run.training.key]) for run in study.runs]
    variants = tuple(variant for run, found in of_run for variant in _variants(run, found))
    missing = tuple(run for run, found in of_run if not found)
    # A folder's name has the key of what was trained; of failures only that tells what they belong to.
    keys = {run.training.key for run in study.runs} | {
        result.job.training.key for _, found in of_run for result in found
    }
    own = {name: reason for name, reason in failures.items() if Path(name).parts[0].rpartition("-")[2] in keys}
    return Finding(study, variants, missing, own)


def _variants(run: Run, results: Iterable[Result]) -> Iterator[Variant]:
    groups: dict[tuple[str, str], dict[Layers, list[Result]]] = {}
    for result in results:
        of_layers = groups.setdefault((result.job.training.key, result.job.precision), {})
        of_layers.setdefault(result.job.layers, []).append(result)
    for of_layers in groups.values():
        trained = {
            layers: Trained(tuple(sorted(of_layers[layers], key=lambda result: result.job.seed)))
            for layers in LAYERS
            if layers in of_layers
        }
        found = deviations(run.training, next(iter(trained.values())).job)
        label = run.name if len(groups) == 1 else f"{run.name} ({', '.join(found) or 'as described'})"
        yield Variant(run, label, found, trained)


def deviations(described: Training, job: Job) -> tuple[str, ...]:
    """How what was trained differs from its description, one phrase per setting."""
    before, after = (dict(_flat(training.model_dump())) for training in (described, job.training))
    phrases = {
        "epochs": "{1} epochs instead of {0}",
        "fraction": "a share of {1:g} of the images instead of {0:g}",
        "dataset": "{1} instead of {0}",
        "patience": "stops early after {1} evaluations without a better one",
    }
    found = [
        phrases.get(name, name + " {1} instead of {0}").format(before.get(name), after.get(name))
        for name in sorted(set(before) | set(after), key=lambda name: (name not in phrases, name))
        if before.get(name) != after.get(name) and name != "test_every"  # which changes nothing that is trained
    ]
    return (*found, *([job.precision] if job.precision != "float32" else []))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
