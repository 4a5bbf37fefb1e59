"""Reading files that must be the official ones: size, then MD5, and no more bytes than they may have."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


class DataError(Exception):
    """A data file is missing, is not the official one or cannot be had; the message says which and what to do."""


@dataclass(frozen=True)
class FileCheck:
    """What an official file must be: its size in bytes and its MD5."""

    size: int
    md5: str

    @classmethod
    def of(cls, content: bytes) -> FileCheck:
        """What `content` is."""
        return cls(len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())

    def __str__(self) -> str:
        return f"{self.size} bytes with MD5 {self.md5}"


def read_checked(path: Path, expected: FileCheck) -> bytes:
    """The content of `path`, which must be what is expected.

    Raises DataError where it is missing, cannot be read or is another; what is too large is not read to its end.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file of {expected}, found no file")
    try:
        size = path.stat().st_size
        if size > expected.size:
            raise DataError(f"{path}: expected {expected}, found {size} bytes, too many to be it")
        with path.open("rb") as file:
            return _checked(file, path, expected)
    except OSError as error:
        raise DataError(f"{path}: expected {expected}, found a file that cannot be read: {error}") from error


def read_checked_gzip(path: Path, expected: FileCheck) -> bytes:
    """The content of the gzip file `path`: what it holds must be what is expected, however it was compressed.

    Raises DataError as `read_checked`, and where `path` is no whole gzip file.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a gzip file with {expected}, found no file")
    try:
        with gzip.open(path) as file:
            return _checked(file, path, expected)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a gzip file with {expected}, found a damaged one: {error}") from error


def _checked(file: BinaryIO | gzip.GzipFile, path: Path, expected: FileCheck) -> bytes:
    # One byte more than expected tells of a file that is too long, and has gzip compare the sum at its end.
    content = file.read(expected.size + 1)
    if len(content) > expected.size:
        raise DataError(f"{path}: expected {expected}, found more bytes than that")
    found = FileCheck.of(content)
    if found != expected:
        raise DataError(f"{path}: expected {expected}, found {found}")
    return content
