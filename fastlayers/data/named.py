"""The data sets by their names, and where their files are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastlayers.data import cifar10, mnist
from fastlayers.data.digits import load_digits
from fastlayers.data.download import Remote, default_folder
from fastlayers.data.files import DataError
from fastlayers.data.splits import DataSet

FOLDER_VARIABLE = "FASTLAYERS_DATA"


class _Loader(Protocol):
    def __call__(self, data_dir: Path, fraction: float, *, download: bool) -> DataSet: ...


@dataclass(frozen=True)
class _FromFiles:
    """A data set from files: what loads it, and what a person who has none of them should get from where."""

    load: _Loader
    files: Sequence[Remote]

    def help(self, folder: Path) -> str:
        urls = " ".join(file.urls[0] for file in self.files)
        return (
            f"Put {urls} (or what is packed in it) into a folder, and give that as --data-dir DIR or in "
            f"{FOLDER_VARIABLE}; now it is {folder}. Or have what is missing downloaded into it: --download where a "
            "command has it, load(..., download=True) in Python. Remove files that are not the official ones first."
        )


_FROM_FILES = {
    "cifar10": _FromFiles(cifar10.load_cifar10, [cifar10.PYTHON.archive]),
    "mnist": _FromFiles(mnist.load_mnist, [file.remote for file in mnist.FILES.values()]),
}
NAMES = ("digits", *_FROM_FILES)


def load(name: str, data_dir: Path | None = None, fraction: float = 1.0, download: bool = False) -> DataSet:
    """The data set `name`: "digits", "cifar10" or "mnist".

    Args:
        name: Which data set. The digits come with scikit-learn, without any file.
        data_dir: Where the files are. Without it, the environment variable FASTLAYERS_DATA says, and without that it
            is pooch's cache folder for fastlayers.
        fraction: How much of each split to take, from its beginning: over 0 and up to 1.
        download: Whether to fetch files that are missing into that folder. Of several processes, let one do so first.

    Raises:
        DataError: A file is missing, is not the published one, or cannot be downloaded.
        ValueError: There is no data set of this name, or `fraction` is out of its range.
    """
    if name == "digits":
        return load_digits(fraction)
    if name not in _FROM_FILES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(NAMES)}")
    source = _FROM_FILES[name]
    folder = data_dir or _folder()
    try:
        return source.load(folder, fraction, download=download)
    except DataError as error:
        raise DataError(f"{error}. {source.help(folder)}") from error


def _folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else default_folder()
