"""Image data sets in memory: scikit-learn's digits, and CIFAR-10 from its official Python files."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_HELP = (
    "Download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, unpack it, and give the "
    f"folder that now holds {CIFAR10_FOLDER} as --data-dir."
)


@dataclass(frozen=True)
class FileCheck:
    """What an official file must be: its size in bytes and its published MD5."""

    size: int
    md5: str


CIFAR10_TRAIN_FILES = {
    "data_batch_1": FileCheck(31035704, "c99cafc152244af753f735de768cd75f"),
    "data_batch_2": FileCheck(31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": FileCheck(31035999, "54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": FileCheck(31035696, "634d18415352ddfa80567beed471001a"),
    "data_batch_5": FileCheck(31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
}
CIFAR10_TEST_FILES = {"test_batch": FileCheck(31035526, "40351d587109b95175f43aff81a1287e")}


class DataError(Exception):
    """A data file is missing or is not the official one; the message says which and what to do."""


@dataclass(frozen=True)
class Split:
    """Images of shape (N, C, H, W) in uint8 and their labels of shape (N,) in int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, fraction: float) -> Split:
        """The leading part of the split: `fraction` of its images, at least one."""
        count = max(1, round(len(self) * fraction))
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class DataSet:
    """A training and a test split, with the training pixels' mean and deviation per channel."""

    name: str
    train: Split
    test: Split
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, name: str, train: Split, test: Split) -> DataSet:
        """Measures the normalisation on `train`; both of its tensors have shape (C, 1, 1)."""
        pixels = train.images.transpose(0, 1).flatten(1).float()
        deviation, mean = torch.std_mean(pixels, dim=1)
        return cls(name, train, test, mean[:, None, None], deviation[:, None, None])

    def normalise(self, images: Tensor) -> Tensor:
        """`images` as float32 with zero mean and unit deviation per channel."""
        return (images.float() - self.mean) / self.deviation


def load(name: str, data_dir: Path | None, fraction: float) -> DataSet:
    """The data set `name`, "digits" or "cifar10", of which the leading `fraction` of each split.

    Raises DataError where the files in `data_dir`, which "cifar10" needs, are not CIFAR-10's.
    """
    if name == "digits":
        return load_digits(fraction)
    if data_dir is None:
        raise DataError(f"cifar10 needs --data-dir. {CIFAR10_HELP}")
    return load_cifar10(data_dir, fraction)


def load_digits(fraction: float = 1.0) -> DataSet:
    """scikit-learn's 1797 handwritten digits, 8x8 in grey; every fifth image is for testing."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    for_test = torch.arange(len(targets)) % 5 == 4
    return DataSet.of(
        "digits",
        Split(images[~for_test], targets[~for_test]).first(fraction),
        Split(images[for_test], targets[for_test]).first(fraction),
    )


def load_cifar10(data_dir: Path, fraction: float = 1.0) -> DataSet:
    """The leading `fraction` of CIFAR-10's training and test images, 32x32 in colour.

    `data_dir` holds the official Python files, or a folder `cifar-10-batches-py` with them.
    Raises DataError where a file is missing or differs from the published one.
    """
    folder = data_dir / CIFAR10_FOLDER if (data_dir / CIFAR10_FOLDER).is_dir() else data_dir
    train = _read_cifar10(folder, CIFAR10_TRAIN_FILES).first(fraction)
    test = _read_cifar10(folder, CIFAR10_TEST_FILES).first(fraction)
    return DataSet.of("cifar10", train, test)


def _read_cifar10(folder: Path, files: dict[str, FileCheck]) -> Split:
    batches = [unpickle_batch(_read_checked(folder / name, files[name])) for name in files]
    images = np.concatenate([batch[b"data"] for batch in batches])
    labels = np.concatenate([batch[b"labels"] for batch in batches])
    return Split(torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels))


def _read_checked(path: Path, expected: FileCheck) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: expected CIFAR-10's file {path.name}, found no file. {CIFAR10_HELP}")
    content = path.read_bytes()
    found = FileCheck(len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
    if found != expected:
        raise DataError(
            f"{path}: expected {expected.size} bytes with MD5 {expected.md5}, "
            f"found {found.size} bytes with MD5 {found.md5}. {CIFAR10_HELP}"
        )
    return content


_ALLOWED_IN_PICKLES = {
    # Under this old name in the files; NumPy has moved it since.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the dictionaries of NumPy arrays that CIFAR-10 consists of, and no other object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_IN_PICKLES:
            raise DataError(f"refused to load {module}.{name}: CIFAR-10's files hold arrays only")
        return _ALLOWED_IN_PICKLES[module, name]


def unpickle_batch(content: bytes) -> dict[bytes, Any]:
    """One CIFAR-10 file's dictionary: b"data" is uint8 (N, 3072), b"labels" a list of N ints.

    Raises DataError where the pickle names any object but NumPy's arrays.
    """
    batch: dict[bytes, Any] = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return batch
