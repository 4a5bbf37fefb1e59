"""Unpacking an archive of official files: these and nothing else, checked before they get their names."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

from fastlayers.data.files import DataError, FileCheck, read_checked

# For headers, padding and what else is in an official archive, besides as much again as its files.
_ROOM = 1 << 20


def unpack(archive: Path, prefix: str, folder: Path, files: Mapping[str, FileCheck]) -> None:
    """Writes `files` into `folder` from `archive`, a .tar.gz that holds them in its folder `prefix`.

    No other member is written. The files are unpacked into a temporary folder beside the archive, checked, and only
    then moved to their places, so that an interruption leaves none that is not whole. What is in `folder` stays.

    Raises DataError where the archive is damaged, lacks one of `files` or holds another in its stead.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{prefix}-", dir=archive.parent) as temporary:
            _extract(archive, prefix, files, Path(temporary))
            unpacked = Path(temporary, prefix)
            for name, check in files.items():
                read_checked(unpacked / name, check)
            folder.mkdir(exist_ok=True)
            for name in files:
                if not (folder / name).exists():
                    (unpacked / name).replace(folder / name)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{archive}: could not be unpacked into {folder}: {error}") from error


class _Limited:
    """Reads a stream, and ends with DataError where it is longer than it may be, so that nobody waits for a bomb."""

    def __init__(self, stream: gzip.GzipFile, most: int, archive: Path) -> None:
        self.stream, self.left, self.most, self.archive = stream, most, most, archive

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.archive}: expected at most {self.most} bytes in it, found more")
        return content


def _extract(archive: Path, prefix: str, files: Mapping[str, FileCheck], target: Path) -> None:
    wanted = {f"{prefix}/{name}": check for name, check in files.items()}
    most = _ROOM + 2 * sum(check.size for check in files.values())
    with gzip.open(archive) as unpacked:
        # A stream is read and nothing else.
        limited = cast(IO[bytes], _Limited(unpacked, most, archive))
        _extract_from(limited, archive, wanted, target)


def _write(content: IO[bytes], path: Path) -> None:
    """Only the bytes: no owner, mode or time; `TarFile.extract` leaves those only in later releases of Python 3.11."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file)


def _extract_from(stream: IO[bytes], archive: Path, wanted: dict[str, FileCheck], target: Path) -> None:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            expected = wanted.pop(member.name, None)
            if expected is None:
                continue
            if not member.isreg():
                raise DataError(f"{archive}: expected {member.name} to be a file, found a link or a device")
            if member.size != expected.size:
                raise DataError(f"{archive}: expected {member.name} with {expected}, found {member.size} bytes")
            _write(cast(IO[bytes], tar.extractfile(member)), target / member.name)
    if wanted:
        raise DataError(f"{archive}: expected {', '.join(wanted)} in it, found no such member")
