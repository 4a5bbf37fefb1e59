"""Where a build writes, and the lock that lets only one write there at a time."""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What setuptools and CMake would write to in this checkout.
_WRITTEN = (".", "build", "build/cmake", "fastlayers.egg-info")
#: Of file systems that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def can_be_written(root: Path, names: Sequence[str] = _WRITTEN) -> bool:
    """Whether this user may write to those of the folders `names` of `root` that exist."""
    return all(os.access(root / name, os.W_OK) for name in names if (root / name).exists())


def scratch_folder(root: Path) -> Path:
    """``build`` in `root`, or a temporary folder, gone with this process, where `root` is read-only."""
    if can_be_written(root):
        return root / "build"
    folder = Path(tempfile.mkdtemp(prefix="fastlayers-build-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


SCRATCH = scratch_folder(ROOT)
#: False: nothing is written to the checkout, and nothing compiled is kept for the next build.
IN_TREE = ROOT in SCRATCH.parents


def must_be_in_tree(what: str) -> None:
    """Exits with a message where `what`, which writes to the checkout itself, cannot be."""
    if not IN_TREE:
        raise SystemExit(
            f"{what} writes to {ROOT}, which is read-only for this user. Install without -e, or copy the folder first."
        )


@contextmanager
def alone(folder: Path = SCRATCH) -> Iterator[None]:
    """Waits until no other process is within this for `folder`; within itself it does not wait."""
    if folder in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        _lock(file.fileno(), folder)
        _held.add(folder)
        try:
            yield  # the lock ends with the file, and so with the process, however that ends
        finally:
            _held.remove(folder)


_held: set[Path] = set()


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another build of fastlayers is running in {folder}; waiting for it to end.", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"The file system of {folder} has no locks: run one build of fastlayers at a time.", flush=True)
