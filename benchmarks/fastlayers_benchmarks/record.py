"""What a run of the benchmarks found, and its form as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlayers.writing import write_whole
from fastlayers_benchmarks.cases import DTYPES, LAYOUTS, PHASES
from fastlayers_benchmarks.contenders import EAGER
from fastlayers_benchmarks.timing import Quantiles, outliers, quantiles

FORMAT = 1

STEP = "training step"  # the phase of what is not a single layer

# The full grid, with hundreds of rounds.
_MOST_BYTES = 256 << 20
# What a row's `about` has at least, of which type or among which values; that of a step has less.
_ABOUT: dict[str, Any] = {
    "layout": tuple(LAYOUTS),
    "shape": list[int],
    "dtype": tuple(DTYPES),
    "drop_p": float,
    "act": str,
    "residual": bool,
}
_ABOUT_STEP: dict[str, Any] = {"layout": tuple(LAYOUTS), "model": str}


class RecordError(ValueError):
    """A file that is no record of this format."""


@dataclass(frozen=True)
class Outcome:
    """What one contender did in one phase of one case.

    Attributes:
        samples: seconds per call, one per round.
        peak_bytes: the most memory held at one time during a call, above what was held before.
        saved_bytes: kept for backward besides the parameters.
        errors: relative error, root mean square, of the output and of each gradient against float64.
    """

    samples: list[float]
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    errors: dict[str, float] | None = None

    @property
    def seconds(self) -> Quantiles:
        """Per call."""
        return quantiles(self.samples)

    @property
    def outliers(self) -> int:
        """How many samples are far above the others."""
        return outliers(self.samples)

    @property
    def gradient_error(self) -> float | None:
        """The largest error of a gradient."""
        return max((e for name, e in (self.errors or {}).items() if name != "output"), default=None)


@dataclass(frozen=True)
class Row:
    """One phase of one case.

    Attributes:
        case: its name.
        about: what the case is made of, by which rows are put together: shape, layout, dtype, drop_p, act, residual,
            pool (older records have none); or model and layout.
        phase: forward, forward+backward, eval, or training step.
        passes: reads and writes of full-size tensors, each `tensor_bytes` long, that the design needs for one call.
        copy_rate: bytes read and written per second by a copy of such a tensor.
        failures: contenders that raised, with what they said.
    """

    case: str
    about: dict[str, Any]
    phase: str
    outcomes: dict[str, Outcome]
    passes: float | None = None
    tensor_bytes: int | None = None
    copy_rate: float | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, contender: str, to: str = EAGER) -> Quantiles | None:
        """How many times as fast as `to` the contender is, paired by round; None where either was not measured."""
        if contender not in self.outcomes or to not in self.outcomes:
            return None
        pairs = zip(self.outcomes[to].samples, self.outcomes[contender].samples, strict=True)
        return quantiles([theirs / its for theirs, its in pairs])

    def bandwidth(self, contender: str) -> float | None:
        """Bytes per second that the design's passes make of the contender's median time."""
        if contender not in self.outcomes or self.passes is None or self.tensor_bytes is None:
            return None
        return self.passes * self.tensor_bytes / self.outcomes[contender].seconds.median

    def of_copy_rate(self, contender: str) -> float | None:
        """That bandwidth over the rate of a copy."""
        bandwidth = self.bandwidth(contender)
        return None if bandwidth is None or not self.copy_rate else bandwidth / self.copy_rate


@dataclass(frozen=True)
class Setting:
    """What was measured by one process.

    Attributes:
        allocator: a name of `machine.ALLOCATORS`, or `machine.OTHER`.
        fastlayers: the contender that is this library's choice on the device.
    """

    device: str
    threads: int
    allocator: str
    fastlayers: str
    rows: list[Row]

    @property
    def title(self) -> str:
        """Such as "cpu, 2 threads, default allocator"."""
        if self.device != "cpu":
            return self.device
        return f"cpu, {self.threads} thread{'s' * (self.threads != 1)}, {self.allocator} allocator"

    @property
    def key(self) -> tuple[str, int, str]:
        """By which the setting of another record is told to be the same."""
        return self.device, self.threads, self.allocator


@dataclass(frozen=True)
class Record:
    """A whole run: one or more settings on one machine."""

    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    absent: dict[str, str]
    settings: list[Setting]
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def save(self, path: Path) -> None:
        """Writes JSON. Medians, quantiles and outliers are added for whoever reads it; samples are what counts."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        for setting in content["settings"]:
            for row in setting["rows"]:
                for name, outcome in row["outcomes"].items():
                    row["outcomes"][name] = _with_summary(outcome)
        write_whole(path, json.dumps(content, indent=1) + "\n")


def _with_summary(outcome: dict[str, Any]) -> dict[str, Any]:
    samples = outcome["samples"]
    summary = {**quantiles(samples)._asdict(), "outliers": outliers(samples)}
    return outcome | {"summary": summary}


def load(path: Path) -> Record:
    """The record in `path`.

    Raises:
        RecordError: the file is none, or of another format.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise RecordError(f"it has {size} bytes, more than {_MOST_BYTES}")
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise RecordError(f"expected a record of format {FORMAT}")
        for setting in content["settings"]:
            for row in setting["rows"]:
                for outcome in row["outcomes"].values():
                    outcome.pop("summary", None)
        record: Record = _typed(Record, content, "")
        for setting in record.settings:
            for row in setting.rows:
                _check_row(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{path}: no record of fastlayers bench ({type(error).__name__}: {error})") from error
    return record


def merged(records: Sequence[Record]) -> Record:
    """One record of what several runs on one machine have measured, of the first one's date.

    Raises:
        RecordError: they are of different machines, versions or settings.
    """
    first = records[0]
    keys = [setting.key for setting in first.settings]
    for other in records[1:]:
        if (other.machine, other.versions) != (first.machine, first.versions):
            raise RecordError("records of different machines or versions make no page together")
        if [setting.key for setting in other.settings] != keys:
            raise RecordError("records of different devices, threads or allocators make no page together")
    settings = [
        dataclasses.replace(setting, rows=[row for record in records for row in record.settings[i].rows])
        for i, setting in enumerate(first.settings)
    ]
    options = first.options | {
        "only": "; ".join(dict.fromkeys(str(record.options.get("only", "")) for record in records))
    }
    return dataclasses.replace(first, options=options, settings=settings)


def _check_row(row: Row) -> None:
    """Raises RecordError where the row's numbers are none that a measurement gives."""
    samples = [outcome.samples for outcome in row.outcomes.values()]
    if len({len(each) for each in samples}) > 1 or not all(samples):
        raise RecordError(f"{row.case}, {row.phase}: expected as many samples of each contender")
    if not all(0 < sample < math.inf for each in samples for sample in each):
        raise RecordError(f"{row.case}, {row.phase}: expected samples above 0, in seconds")
    _typed((*PHASES, STEP), row.phase, "phase")
    for name, kind in (_ABOUT_STEP if row.phase == STEP else _ABOUT).items():
        _typed(kind, row.about.get(name), f"{row.case}, about.{name}")


def _typed(kind: Any, content: Any, where: str) -> Any:
    """What JSON holds as an object of a type, such as a dataclass of lists of dataclasses, or as one of some values.

    Raises RecordError, which names the place, where it is of another type.
    """
    if kind is Any:
        return content
    if isinstance(kind, tuple):
        if content not in kind:
            raise RecordError(f"{where}: expected one of {', '.join(kind)}, found {content!r:.40}")
        return content
    if isinstance(kind, types.UnionType):  # T | None
        return None if content is None else _typed(typing.get_args(kind)[0], content, where)
    outer: Any = typing.get_origin(kind) or kind
    expected: Any = dict if dataclasses.is_dataclass(outer) else (int, float) if outer is float else outer
    if not isinstance(content, expected) or isinstance(content, bool) != (outer is bool):
        raise RecordError(f"{where or 'the file'}: expected {getattr(kind, '__name__', kind)}, found {content!r:.40}")
    if dataclasses.is_dataclass(outer):
        hints = typing.get_type_hints(outer)
        unknown = content.keys() - hints.keys()
        if unknown:
            raise RecordError(f"{where or 'the file'}: unknown: {', '.join(sorted(unknown))}")
        return kind(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in content.items()})
    if outer is list:
        (of,) = typing.get_args(kind)
        return [_typed(of, value, f"{where}[{i}]") for i, value in enumerate(content)]
    if outer is dict:
        _, of = typing.get_args(kind)
        return {name: _typed(of, value, f"{where}.{name}") for name, value in content.items()}
    return float(content) if outer is float else content
