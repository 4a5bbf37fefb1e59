"""What a run of the benchmarks found, and its form as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlayers_benchmarks.contenders import EAGER
from fastlayers_benchmarks.timing import Quantiles, outliers, quantiles

FORMAT = 1

STEP = "training step"  # the phase of what is not a single layer


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


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
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise RecordError(f"{path}: expected a record of format {FORMAT}")
        content["settings"] = [_setting(setting) for setting in content["settings"]]
        return Record(**content)
    except RecordError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: no record of fastlayers bench ({type(error).__name__}: {error})") from error


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
    options = first.options | {"only": "; ".join(dict.fromkeys(record.options["only"] for record in records))}
    return dataclasses.replace(first, options=options, settings=settings)


def _setting(content: dict[str, Any]) -> Setting:
    return Setting(**content | {"rows": [_row(row) for row in content["rows"]]})


def _row(content: dict[str, Any]) -> Row:
    outcomes = {
        name: Outcome(**{key: value for key, value in outcome.items() if key != "summary"})
        for name, outcome in content["outcomes"].items()
    }
    return Row(**content | {"outcomes": outcomes})
