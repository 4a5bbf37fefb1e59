"""Unpacking an archive of official files: these and nothing else, checked before they get their names."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from fastlayers.data.files import DataError, FileCheck, read_checked


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


def _extract(archive: Path, prefix: str, files: Mapping[str, FileCheck], target: Path) -> None:
    wanted = {f"{prefix}/{name}": check for name, check in files.items()}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            expected = wanted.pop(member.name, None)
            if expected is None:
                continue
            if not member.isreg():
                raise DataError(f"{archive}: expected {member.name} to be a file, found a link or a device")
            if member.size != expected.size:
                raise DataError(f"{archive}: expected {member.name} with {expected}, found {member.size} bytes")
            tar.extract(member, target, filter="data")
    if wanted:
        raise DataError(f"{archive}: expected {', '.join(wanted)} in it, found no such member")
