"""The checkpoints of a run: written as a whole or not at all, and read only where they are this run's own."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from fastlayers.studies.results import Job
from fastlayers.writing import write_whole

_JOB = "fastlayers_job"
# What Lightning writes, and the classifier adds.
_PARTS = ("epoch", "global_step", "state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks", "history")


class CheckpointError(Exception):
    """A file is no checkpoint of the run that it should be of; the message says which file, why, and what to do."""


class RunCheckpoints(CheckpointIO):
    """Lightning's checkpoints of the run `job`, in `folder`.

    Lightning's own way is by a file in the folder for temporary ones, which another file system may hold: moving it is
    copying then, and kill -9 leaves half a checkpoint in place of a whole one.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint, whole."""
        if storage_options is not None:
            raise TypeError(f"storage_options: got {storage_options!r}, expected None")
        content = io.BytesIO()
        torch.save(checkpoint | {_JOB: self.job.model_dump_json()}, content)
        write_whole(Path(path), content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint in a file, of tensors and plain values alone.

        Raises CheckpointError where the file is damaged, of another run, or would be more in memory than on the disk.
        """
        if weights_only is False:
            raise ValueError("weights_only: got False, expected True or None; checkpoints run no code")
        try:
            _check_archive(Path(path))
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
            self._check(checkpoint)
        except Exception as error:  # a file may be wrong in any way
            reason = f"{type(error).__name__}: {_reason(Path(path), error)}"
            raise CheckpointError(
                f"{path} is no checkpoint of this run ({reason}); remove it, and the run starts from the beginning"
            ) from error
        found: dict[str, Any] = checkpoint
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file of the folder. Lightning has its name from a checkpoint, which may say anything."""
        if Path(path).resolve().parent != self.folder.resolve():
            raise CheckpointError(f"{path} is not removed: it is no checkpoint in {self.folder}")
        Path(path).unlink(missing_ok=True)

    def _check(self, checkpoint: object) -> None:
        if not isinstance(checkpoint, dict):
            raise ValueError(f"expected a dictionary, found {type(checkpoint).__name__}")
        missing = [name for name in (_JOB, *_PARTS) if name not in checkpoint]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        job = Job.model_validate_json(checkpoint[_JOB])
        if job != self.job:
            raise ValueError(f"it is of another run, {job.folder}")


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file, in a line."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text recommends to read the file without weights_only, which runs what is in it.
        return ": ".join(["it holds more than tensors and plain values", *_named_by_pickle(path)])
    return next(iter(str(error).strip().splitlines()), "no reason given")


def _named_by_pickle(path: Path) -> list[str]:
    """The first function or class in a file that torch.load refuses, where there is one. Nothing is run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file may be wrong in any way
        return []
    return [f"{name!r:.80}" for name in sorted(names)[:1]]


def _check_archive(path: Path) -> None:
    """Refuses what torch.save does not write: packed members could become anything in memory."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its members overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
