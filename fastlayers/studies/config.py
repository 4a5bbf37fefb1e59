"""What a study is: the schema of `reports/*.toml`, and the studies that they hold."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

DatasetName = Literal["cifar10", "mnist", "digits"]
_FOLDER = resources.files("fastlayers.studies") / "reports"

PlotName = Literal[
    "curves", "bars", "against_x", "schedules", "landscape", "focal", "activation_slopes", "seconds_per_epoch"
]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Network(_Frozen):
    """A network of `fastlayers.models`: its name there, and its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """What is given to the network, besides what the data set and the command line decide."""
        return dict(self.model_extra or {})


class Optimizer(_Frozen):
    """Stochastic gradient descent, or Adam, with torch's meaning of the names."""

    name: Literal["sgd", "adam"]
    lr: PositiveFloat
    momentum: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0


class Schedule(_Frozen):
    """How the learning rate moves, per step of the optimizer, over the whole training.

    `cosine` falls from the optimizer's rate to zero. `one_cycle` and `cyclic` rise to it: one_cycle once, cyclic
    `cycles` times, from `lr / divisor`.
    """

    name: Literal["constant", "cosine", "cyclic", "one_cycle"] = "constant"
    cycles: PositiveInt = 5
    divisor: PositiveFloat = 25.0


class Loss(_Frozen):
    """A loss of `fastlayers.studies.losses`, by name."""

    name: Literal["cross_entropy", "smooth_l1", "bce_with_logits", "mse", "hinge", "focal"] = "cross_entropy"
    gamma: NonNegativeFloat = 2.0
    margin: PositiveFloat = 1.0


class Augmentation(_Frozen):
    """What is done to training images besides normalising them; as in `fastlayers.data.Augmentation`."""

    crop_padding: NonNegativeInt = 0
    flip: bool = False
    erasing_p: Annotated[float, Field(ge=0, le=1)] = 0.0


class Training(_Frozen):
    """Everything that decides what a run computes, but the seed and the layers' implementation."""

    dataset: DatasetName
    network: Network
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    augmentation: Augmentation = Augmentation()
    epochs: PositiveInt
    batch_size: PositiveInt
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test_every: PositiveInt = 1
    patience: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    least_image_size: PositiveInt = 1
    record_landscape: bool = False

    @property
    def key(self) -> str:
        """Ten digits that tell this training from any other. A setting added later, at its default, keeps them."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


class Published(_Frozen):
    """What the report printed: accuracies from 0 to 1, times of the whole run, the float32 state's size in MiB."""

    train_accuracy: float | None = None
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None
    test_accuracy: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    test_loss: float | None = None
    seconds: float | None = None
    minutes: float | None = None
    state_mib: float | None = None


class Run(_Frozen):
    """One row of a study's table; `x` is its place on the axis of plots against a setting."""

    name: str
    training: Training
    published: Published = Published()
    x: float | None = None


class Study(_Frozen):
    """One table or plot of a report."""

    id: str
    title: str
    notes: str = ""
    expected: str = ""
    x_label: str = ""
    plots: tuple[PlotName, ...] = ("curves",)
    runs: tuple[Run, ...] = ()


class Report(_Frozen):
    """One file of `reports/`."""

    letter: str
    title: str
    notes: str
    studies: tuple[Study, ...]


class ConfigError(ValueError):
    """A file does not describe a report; the message says which and why."""


class UnknownStudyError(KeyError):
    """There is no such study; the message names those that there are."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def reports() -> tuple[Report, ...]:
    """The five reports, in order of their letters; ConfigError where a file describes none."""
    files = [file for file in _FOLDER.iterdir() if file.name.endswith(".toml")]
    return tuple(_read(file) for file in sorted(files, key=lambda file: file.name))


def _read(file: Traversable) -> Report:
    try:
        return read_report(file.name[0].upper(), file.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} describes no report ({type(error).__name__}: {error})") from error


def study(name: str) -> Study:
    """The study `name`, such as "A2"; UnknownStudyError where there is none."""
    found = {study.id: study for report in reports() for study in report.studies}
    if name.upper() not in found:
        raise UnknownStudyError(f"study: there is no {name!r}; there are {', '.join(found)}")
    return found[name.upper()]


def read_report(letter: str, text: str) -> Report:
    """The report in a TOML text.

    `[defaults]` holds for every run, `[base.NAME]` for those that say ``base = "NAME"``, a study's `training` for all
    of its runs; what a run says itself counts most. A table is changed key by key, but for one that names another
    network, optimizer, schedule or loss: that starts anew.

    Raises pydantic.ValidationError, a ValueError, which names what is wrong, and KeyError for an unknown base.
    """
    content = tomllib.loads(text)
    bases = content.get("base", {})
    studies = [
        _study(name, dict(table), content.get("defaults", {}), bases) for name, table in content["studies"].items()
    ]
    unknown = set(content) - {"title", "notes", "defaults", "base", "studies"}
    if unknown:
        raise ValueError(f"report {letter}: unknown keys {sorted(unknown)}")
    studies.sort(key=lambda study: _natural(study.id))
    return Report(letter=letter, title=content["title"], notes=content.get("notes", ""), studies=tuple(studies))


def _study(name: str, table: dict[str, Any], defaults: Mapping[str, Any], bases: Mapping[str, Any]) -> Study:
    of_study = table.pop("training", {})
    base = table.pop("base", None)
    runs = [_run(dict(run), base, defaults, bases, of_study) for run in table.pop("runs", [])]
    return Study(id=name, runs=tuple(runs), **table)


def _run(
    table: dict[str, Any],
    base: str | None,
    defaults: Mapping[str, Any],
    bases: Mapping[str, Any],
    of_study: Mapping[str, Any],
) -> Run:
    own = {key: table.pop(key) for key in ("name", "published", "x") if key in table}
    base = table.pop("base", base)
    training: dict[str, Any] = {}
    for layer in (defaults, bases[base] if base else {}, of_study, table):
        training = _merged(training, layer)
    return Run(training=Training.model_validate(training), **own)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        is_change = (
            isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, old.get("name"))
        )
        merged[key] = _merged(old, value) if is_change else value  # type: ignore[arg-type]  # is_change says so
    return merged


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
