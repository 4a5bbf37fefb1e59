"""Writes files as a whole or not at all, whatever stops it: an error, a full disk, kill -9, a power cut."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

# Files being written end so, beside the file that they will be; kill -9 leaves one behind.
_PARTIAL = ".partial"


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Writes a file, whose folder is made where there is none, by way of another beside it.

    Whoever reads `path`, at any time, finds what was there before or all of `content`; several may write it at once.
    What is no regular file, such as /dev/stdout, is written as it is. A link stays one, to the new content.

    Raises OSError, which names `path`, where it cannot be written; what was there is still there then.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_partials(folder: Path) -> None:
    """Removes what kill -9 left of files that were being written to `folder`. Nobody may write there meanwhile."""
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def _replace(path: Path, data: bytes | memoryview) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the reason is the other one
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Has the new name survive a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)
