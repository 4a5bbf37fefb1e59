"""Compares a record with an earlier one of the same machine: which ratios to eager fell by more than the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastlayers_benchmarks.contenders import EAGER
from fastlayers_benchmarks.record import Record, RecordError, Row, Setting
from fastlayers_benchmarks.timing import Quantiles


@dataclass(frozen=True)
class Fall:
    """A contender that, compared with eager, is slower than it was.

    `noise` is how far apart both ratios may be: their spreads, combined.
    """

    setting: str
    case: str
    phase: str
    contender: str
    before: Quantiles
    now: Quantiles

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What fell."""
        return self.setting, self.case, self.phase, self.contender

    @property
    def noise(self) -> float:
        """In units of the ratio."""
        return noise_of(self.before, self.now)


def noise_of(before: Quantiles, now: Quantiles) -> float:
    """Spreads of independent measurements, added as such: the root of the sum of squares."""
    return math.hypot(before.spread, now.spread)


@dataclass(frozen=True)
class Comparison:
    """What of both records could be compared, and what fell."""

    compared: int
    falls: list[Fall]


def ensure_comparable(earlier: Record, machine: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Refuses a record that does not tell anything of `machine` and `settings`, whose rows do not matter.

    Raises:
        RecordError: the record is of another machine, or lacks a setting (device, threads, allocator).
    """
    if earlier.machine != machine:
        names = [n for n in earlier.machine | machine if earlier.machine.get(n) != machine.get(n)]
        differences = ", ".join(f"{n}: {earlier.machine.get(n)} then, {machine.get(n)} now" for n in names)
        raise RecordError(f"the earlier record is of another machine ({differences})")
    known = {setting.key for setting in earlier.settings}
    missing = [setting.title for setting in settings if setting.key not in known]
    if missing:
        found = "; ".join(setting.title for setting in earlier.settings)
        raise RecordError(f"the earlier record was not made with: {'; '.join(missing)}. It has: {found}")


def compare(earlier: Record, later: Record) -> Comparison:
    """Compares what both records have measured.

    Raises:
        RecordError: see `ensure_comparable`; also where both have no measurement in common.
    """
    ensure_comparable(earlier, later.machine, later.settings)
    settings = {setting.key: setting for setting in earlier.settings}
    pairs = [pair for setting in later.settings for pair in _pairs(settings[setting.key], setting)]
    if not pairs:
        raise RecordError("the earlier record has none of the cases, phases and contenders of this run")
    # Not `>=`: with no spread at all, equal ratios are no fall.
    falls = [pair for pair in pairs if pair.before.median - pair.now.median > pair.noise]
    return Comparison(len(pairs), falls)


def lasting(falls: Sequence[Fall], again: Sequence[Fall]) -> list[Fall]:
    """Those of `falls` that another measurement, `again`, has too.

    Two processes differ by more than the rounds of one, by where memory happens to lie for example.
    """
    found = {fall.key for fall in again}
    return [fall for fall in falls if fall.key in found]


def _pairs(before: Setting, now: Setting) -> Iterator[Fall]:
    """Everything that both have measured, as if it had fallen."""
    earlier: dict[tuple[str, str], Row] = {(row.case, row.phase): row for row in before.rows}
    for row in now.rows:
        old = earlier.get((row.case, row.phase))
        for name in row.outcomes:
            ratios = (old.ratio(name) if old else None, row.ratio(name))
            if name != EAGER and ratios[0] is not None and ratios[1] is not None:
                yield Fall(now.title, row.case, row.phase, name, ratios[0], ratios[1])
