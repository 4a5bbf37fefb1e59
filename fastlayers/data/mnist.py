"""MNIST from its official idx files, plain or compressed."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlayers.data.download import Remote, fetch
from fastlayers.data.files import DataError, FileCheck, read_checked, read_checked_gzip
from fastlayers.data.splits import DataSet, Split

# Where torchvision puts the files, below its folder of data sets.
FOLDER = Path("MNIST", "raw")
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class IdxFile:
    """One of the four files: its name, its check, and its compressed form on the mirrors."""

    name: str
    check: FileCheck
    remote: Remote

    @classmethod
    def of(cls, name: str, size: int, md5: str, gzip_md5: str) -> IdxFile:
        """The file of this size and MD5, whose published compressed form has the MD5 `gzip_md5`."""
        return cls(name, FileCheck(size, md5), Remote.on(MIRRORS, f"{name}.gz", gzip_md5))

    def is_in(self, folder: Path) -> bool:
        """Whether the file is in `folder` in either form."""
        return (folder / self.name).exists() or (folder / self.remote.name).exists()

    def read(self, folder: Path) -> Tensor:
        """The file's bytes in their dimensions; the plain form is read where both are there."""
        plain, compressed = folder / self.name, folder / self.remote.name
        if compressed.exists() and not plain.exists():
            return parse_idx(read_checked_gzip(compressed, self.check), compressed)
        return parse_idx(read_checked(plain, self.check), plain)


# Images and labels, to train and to test.
FILES = {
    "train-images": IdxFile.of(
        "train-images-idx3-ubyte",
        size=47040016,
        md5="6bbc9ace898e44ae57da46a324031adb",
        gzip_md5="f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ),
    "train-labels": IdxFile.of(
        "train-labels-idx1-ubyte",
        size=60008,
        md5="a25bea736e30d166cdddb491f175f624",
        gzip_md5="d53e105ee54ea40749a09fcbcd1e9432",
    ),
    "test-images": IdxFile.of(
        "t10k-images-idx3-ubyte",
        size=7840016,
        md5="2646ac647ad5339dbf082846283269ea",
        gzip_md5="9fb629c4189551a2d022fa330f9573f3",
    ),
    "test-labels": IdxFile.of(
        "t10k-labels-idx1-ubyte",
        size=10008,
        md5="27ae3e4e09519cfbb04c329615203637",
        gzip_md5="ec29112dd5afa0611ce80d1b7f02629c",
    ),
}


def load_mnist(data_dir: Path, fraction: float = 1.0, *, download: bool = False) -> DataSet:
    """The leading `fraction` of MNIST's 60 000 images to train on and 10 000 to test, 28x28 in grey.

    `data_dir` holds the idx files, as they are or with .gz, or holds MNIST/raw with them. With `download`, those that
    are missing are fetched.

    Raises DataError where a file is missing or its content differs from the published one.
    """
    folder = data_dir if any(file.is_in(data_dir) for file in FILES.values()) else data_dir / FOLDER
    missing = [file for file in FILES.values() if not file.is_in(folder)]
    if missing and not download:
        names = ", ".join(f"{file.name} (or .gz)" for file in missing)
        raise DataError(f"{data_dir}: expected MNIST's files in it or in {folder}, found no {names}")
    for file in missing:
        fetch(file.remote, folder)
    return DataSet.of("mnist", _split(folder, "train"), _split(folder, "test"), fraction)


def _split(folder: Path, kind: str) -> Split:
    images = FILES[f"{kind}-images"].read(folder)
    return Split(images[:, None], FILES[f"{kind}-labels"].read(folder).long())


def parse_idx(content: bytes, path: Path) -> Tensor:
    """The array in `content` of `path`, an idx file of unsigned bytes, as uint8.

    Two zero bytes, the type's number, the number of dimensions, these as big-endian 32-bit integers, then the elements
    (http://yann.lecun.com/exdb/mnist, "The IDX file format").

    Raises DataError where that is not so, or the dimensions do not fit the number of bytes.
    """
    magic, dimensions = content[:3], content[3] if len(content) > 3 else 0
    if magic != bytes((0, 0, UNSIGNED_BYTE)) or dimensions == 0:
        raise DataError(
            f"{path}: expected an idx file of unsigned bytes, 0x000008 and the number of dimensions, "
            f"found 0x{content[:4].hex()}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: expected an idx header of {start} bytes, found {len(content)} bytes in all")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    size = start + math.prod(shape)
    if len(content) != size:
        raise DataError(f"{path}: expected {size} bytes for an idx file of dimensions {shape}, found {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
