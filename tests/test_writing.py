"""Files are written as a whole or not at all: full disks, several writers, links, devices, kill -9."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from fastlayers import writing
from fastlayers.writing import remove_partials, write_whole
from tests import scripts


def _everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_written_whole_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in ("text é", b"bytes", memoryview(b"memory"), ""):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
    assert list(_everything_in(tmp_path)) == ["new/file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_full_disk_leaves_what_was_there(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    path = tmp_path / "file"
    write_whole(path, "before")
    full_disk(0)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_whole(path, "after")
    assert _everything_in(tmp_path) == {"file": b"before"}


def test_devices_are_written_as_they_are() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_whole(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()


def test_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere/file")
    write_whole(tmp_path / "link", "content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "content"


def test_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/below"):
        write_whole(tmp_path / "file" / "below", "x")
    with pytest.raises(OSError, match=str(tmp_path)):
        write_whole(tmp_path, "x")


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folder_that_cannot_be_synchronised(
    number: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have no such thing; a broken disk is an error. No descriptor is left open."""
    fsync, folders = os.fsync, list[int]()

    def fail_for_folders(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return fsync(descriptor)
        folders.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(OSError, match=os.strerror(number)) if fails else nullcontext():
        write_whole(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
    (descriptor,) = folders
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)


def test_many_writers_and_a_reader(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([number]) * 300_000 for number in range(4)]
    write_whole(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(15):
            write_whole(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert list(_everything_in(tmp_path)) == ["file"]


_WRITER = """
    import runpy, sys
    from pathlib import Path

    write_whole = runpy.run_path(sys.argv[1])["write_whole"]  # without torch, which takes seconds to import
    number = 0
    while True:
        number = (number + 1) % 256
        write_whole(Path("file"), bytes([number]) * 3_000_000)
        print(number, flush=True)
"""


@pytest.mark.parametrize("times", [20, pytest.param(500, marks=pytest.mark.long)])
def test_kill_in_the_middle_of_writing(times: int, tmp_path: Path) -> None:
    """What is there is whole, and what was whole is not lost."""
    chance = random.Random(0)
    for _ in range(times):
        process = scripts.start(_WRITER, tmp_path, writing.__file__)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        done = int((first + process.communicate()[0]).split()[-1])
        content = (tmp_path / "file").read_bytes()
        assert content == content[:1] * 3_000_000
        assert content[0] in (done, (done + 1) % 256)
        remove_partials(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"file", "script.py"}


def test_a_disk_that_is_full(small_disk: Path) -> None:
    path = small_disk / "file"
    write_whole(path, bytes(2_000_000))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_whole(path, bytes(2_000_001))
    assert {name: len(content) for name, content in _everything_in(small_disk).items()} == {"file": 2_000_000}
