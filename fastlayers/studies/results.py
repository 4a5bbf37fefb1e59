"""What a run leaves behind: a folder of its own, found again by what was trained, and its result in one JSON file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastlayers.studies.config import Training
from fastlayers.writing import write_whole

Layers = Literal["fastlayers", "torch"]
Precision = Literal["float32", "bfloat16", "float16"]

RESULT_FILE = "result.json"
FAILURE_FILE = "failure.txt"
LANDSCAPE_FILE = "landscape.npz"

# A result of a thousand epochs has a quarter of a megabyte.
_MOST_BYTES = 64 << 20
# The end of a traceback, in which its last line is.
_LAST_BYTES = 64 << 10


class _Frozen(BaseModel):
    # The losses of a training that diverged are NaN, also in JSON.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Job(_Frozen):
    """One run to do: what to train, as the command line left it, and with which layers, seed and precision.

    `published` is the key of the training as the report describes it, before the command line changed epochs, data set
    or fraction; studies find their runs by it.
    """

    published: str
    training: Training
    layers: Layers = "fastlayers"
    seed: int = 0
    precision: Precision = "float32"

    @property
    def folder(self) -> Path:
        """Where the run's files are, below the folder of all runs."""
        training = self.training
        what = re.sub(r"[^a-z0-9_]", "", training.network.name)
        precision = "" if self.precision == "float32" else f"-{self.precision}"
        return Path(f"{training.dataset}-{what}-{training.key}", f"{self.layers}{precision}-seed{self.seed}")


class Epoch(_Frozen):
    """What one epoch, counted from 1, measured; `seconds` are of training alone.

    Training loss and accuracy are means over the epoch's batches, in training mode. Where there is a validation set, it
    is evaluated, otherwise the test set, in every epoch or every few.
    """

    epoch: int
    seconds: float
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None


class Environment(_Frozen):
    """Where a run ran."""

    device: str
    threads: int
    processes: int
    torch: str
    fastlayers: str
    backend: str


class Result(_Frozen):
    """A finished run.

    `test_*` are of the weights after epoch `scored_epoch`: those that were best in validation, or the last ones where
    there is no validation set. `seconds` are of training and evaluation together.
    """

    job: Job
    history: tuple[Epoch, ...]
    scored_epoch: int
    test_loss: float
    test_accuracy: float
    seconds: float
    train_images: int
    validation_images: int
    test_images: int
    parameters: int
    state_mib: float
    environment: Environment

    @property
    def best_val_accuracy(self) -> float | None:
        """The largest validation accuracy of any epoch."""
        found = [epoch.val_accuracy for epoch in self.history if epoch.val_accuracy is not None]
        return max(found, default=None)


class Store:
    """The runs below one folder, `OUT/runs`."""

    def __init__(self, out: Path) -> None:
        self.root = out / "runs"

    def folder(self, job: Job) -> Path:
        """The folder of a run, which may not exist yet."""
        return self.root / job.folder

    def is_finished(self, job: Job) -> bool:
        """Whether the run has a result.

        Raises ResultError where it has a file that is none, or is another run's.
        """
        path = self.folder(job) / RESULT_FILE
        if not path.exists():
            return False
        found = read_result(path)
        if found.job != job:
            raise ResultError(f"{path} is the result of another run: {found.job.model_dump_json()}")
        return True

    def write(self, result: Result) -> None:
        """Files the result, as a whole or not at all."""
        write_whole(self.folder(result.job) / RESULT_FILE, result.model_dump_json(indent=1))

    def results(self) -> Iterator[Result]:
        """Every result there is, in order of the folders' names.

        Raises ResultError for a file that is no result, or is not where its run's result should be.
        """
        for path in sorted(self.root.glob(f"*/*/{RESULT_FILE}")):
            result = read_result(path)
            if self.folder(result.job) != path.parent:
                raise ResultError(f"{path} is the result of another run, of {result.job.folder}")
            yield result

    def failures(self) -> dict[str, str]:
        """The last line of what every failed run left, by the name of its folder."""
        found = sorted(self.root.glob(f"*/*/{FAILURE_FILE}"))
        lines = {str(path.parent.relative_to(self.root)): _end_of(path).splitlines() for path in found}
        return {name: text[-1] for name, text in lines.items() if text}


class ResultError(Exception):
    """A file is not the result of a run; the message says which and why."""


def read_result(path: Path) -> Result:
    """The result in a JSON file; ResultError where it is none."""
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ResultError(f"{path} is not the result of a run: it has {size} bytes, more than {_MOST_BYTES}")
        return Result.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(f"{path} is not the result of a run: {where}: {first['msg']}") from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error}") from error


def _end_of(path: Path) -> str:
    """The end of a text file, whatever its bytes; ResultError where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_BYTES))
            return file.read(_LAST_BYTES).decode(errors="replace")
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error}") from error
