"""The data sets' files: their contents, every way in which they can be wrong, and their download."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import torch

from fastlayers import data
from fastlayers.data import archives, cifar10, download, mnist, named
from fastlayers.data.files import FileCheck, read_checked, read_checked_gzip

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data with the official files")

Files = dict[str, bytes]


def pixels(images: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (images, 3072), dtype=np.uint8)


def python_file(images: int, seed: int) -> bytes:
    """A file as Python 2 and NumPy 1 wrote CIFAR-10's: its strings are bytes to Python 3."""
    labels = [index % 10 for index in range(images)]
    content = pickle.dumps({b"data": pixels(images, seed), b"labels": labels}, protocol=3)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def binary_file(images: int, seed: int) -> bytes:
    labels = np.arange(images, dtype=np.uint8)[:, None] % 10
    return np.concatenate([labels, pixels(images, seed)], axis=1).tobytes()


def idx_file(*shape: int) -> bytes:
    elements = np.arange(np.prod(shape)) % 10
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + elements.astype(np.uint8).tobytes()


def tar_gz(members: Mapping[str, bytes], *others: tarfile.TarInfo) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for other in others:
            tar.addfile(other)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@dataclass(frozen=True)
class Small:
    """A few small files that count as the official ones of a data set."""

    name: str
    files: Files
    folder: str  # below the data_dir
    packed: Files  # what is downloaded

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def load(self, data_dir: Path, **options: Any) -> data.DataSet:
        return data.load(self.name, data_dir, **options)


def small_cifar10(
    version: cifar10.Version, make: Callable[[int, int], bytes], monkeypatch: pytest.MonkeyPatch
) -> tuple[Small, cifar10.Version]:
    """100 images to train on and 10 to test; `version` knows them from then on."""
    files = {}
    for table, images in ((version.train, 20), (version.test, 10)):
        for seed, name in enumerate(table):
            files[name] = make(images, seed)
            monkeypatch.setitem(table, name, FileCheck.of(files[name]))
    packed = tar_gz({f"{version.folder}/{name}": content for name, content in files.items()})
    small = Small("cifar10", files, version.folder, {version.archive.name: packed})
    return small, replace(version, archive=replace(version.archive, md5=md5(packed)))


def small_mnist(monkeypatch: pytest.MonkeyPatch) -> Small:
    """100 images to train on and 10 to test."""
    files = {}
    for key, file in mnist.FILES.items():
        count = 100 if key.startswith("train") else 10
        files[file.name] = idx_file(count, 28, 28) if key.endswith("images") else idx_file(count)
        remote = replace(file.remote, md5=md5(gzip.compress(files[file.name], mtime=0)))
        known = replace(file, check=FileCheck.of(files[file.name]), remote=remote)
        monkeypatch.setitem(mnist.FILES, key, known)
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    return Small("mnist", files, str(mnist.FOLDER), packed)


@pytest.fixture
def smalls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Small]:
    python, python_version = small_cifar10(cifar10.PYTHON, python_file, monkeypatch)
    binary, binary_version = small_cifar10(cifar10.BINARY, binary_file, monkeypatch)
    monkeypatch.setattr(cifar10, "PYTHON", python_version)
    monkeypatch.setattr(cifar10, "VERSIONS", (python_version, binary_version))
    return {"python": python, "binary": binary, "idx": small_mnist(monkeypatch)}


@pytest.fixture(params=["python", "binary", "idx"])
def small(request: pytest.FixtureRequest, smalls: dict[str, Small]) -> Small:
    """The small files of each format in turn."""
    return smalls[request.param]


def same(one: data.DataSet, other: data.DataSet) -> bool:
    pairs = [(a, b) for a, b in ((one.train, other.train), (one.test, other.test))]
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


# What is in them


def test_digits() -> None:
    digits = data.load("digits")
    assert len(digits.train) == 1438
    assert len(digits.test) == 359
    assert digits.train.images.shape == (1438, 1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert set(digits.test.labels.tolist()) == set(range(10))


def test_normalised_training_images_have_zero_mean_and_unit_deviation() -> None:
    digits = data.load_digits()
    normalised = digits.normalise(digits.train.images)
    assert normalised.dtype == torch.float32
    assert abs(normalised.mean().item()) < 1e-5
    assert normalised.std().item() == pytest.approx(1, abs=1e-5)


def test_mean_and_deviation_are_per_channel(smalls: dict[str, Small], tmp_path: Path) -> None:
    images = smalls["python"].load(smalls["python"].write(tmp_path))
    pixels = images.train.images.double()
    torch.testing.assert_close(images.mean.double(), pixels.mean((0, 2, 3))[:, None, None], rtol=1e-5, atol=0)
    torch.testing.assert_close(images.deviation.double(), pixels.std((0, 2, 3))[:, None, None], rtol=1e-5, atol=0)


def test_fraction_takes_the_leading_images_of_both_splits() -> None:
    whole, tenth = data.load_digits(), data.load("digits", fraction=0.1)
    assert len(tenth.train) == 144
    assert len(tenth.test) == 36
    assert torch.equal(tenth.train.images, whole.train.images[:144])


def test_fraction_of_files(small: Small, tmp_path: Path) -> None:
    tenth = small.load(small.write(tmp_path), fraction=0.1)
    assert (len(tenth.train), len(tenth.test)) == (10, 1)


@pytest.mark.parametrize("fraction", [0, -1, 1.1])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction: got {fraction}, expected over 0"):
        data.load("digits", fraction=fraction)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name: got 'imagenet', expected one of digits, cifar10, mnist"):
        data.load("imagenet")


def test_folder_with_the_files_and_the_folder_above_it(small: Small, tmp_path: Path) -> None:
    inner = small.load(small.write(tmp_path / "inner"))
    assert inner.train.images.shape[1:] == ((3, 32, 32) if small.name == "cifar10" else (1, 28, 28))
    assert (len(inner.train), len(inner.test)) == (100, 10)
    assert inner.train.labels[:11].tolist() == [*range(10), 0]
    assert (inner.train.images.dtype, inner.train.labels.dtype) == (torch.uint8, torch.int64)
    small.write(tmp_path / "outer" / small.folder)
    assert same(small.load(tmp_path / "outer"), inner)


def test_both_versions_of_cifar10_are_the_same_images(smalls: dict[str, Small], tmp_path: Path) -> None:
    python, binary = (smalls[kind].load(smalls[kind].write(tmp_path / kind)) for kind in ("python", "binary"))
    assert same(python, binary)


def test_packed_files_are_read_and_nothing_else_is_left(small: Small, tmp_path: Path) -> None:
    small.write(tmp_path / "plain")
    data_dir = tmp_path / "packed"
    data_dir.mkdir()
    for name, content in small.packed.items():
        (data_dir / name).write_bytes(content)
    assert same(small.load(data_dir), small.load(tmp_path / "plain"))
    unpacked = {small.folder} if small.name == "cifar10" else set()
    assert {path.name for path in data_dir.iterdir()} == {*small.packed, *unpacked}


def test_archive_completes_a_folder(smalls: dict[str, Small], tmp_path: Path) -> None:
    small = smalls["binary"]
    folder = small.write(tmp_path / small.folder)
    whole = small.load(tmp_path)
    (folder / "data_batch_3.bin").unlink()
    for name, content in small.packed.items():
        (tmp_path / name).write_bytes(content)
    assert same(small.load(tmp_path), whole)


def test_gzip_compressed_anew_is_accepted(smalls: dict[str, Small], tmp_path: Path) -> None:
    small = smalls["idx"]
    for name, content in small.files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1, mtime=7))
    assert len(small.load(tmp_path).train) == 100


def test_folder_from_the_environment(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(named.FOLDER_VARIABLE, str(small.write(tmp_path)))
    assert len(data.load(small.name).train) == 100


def test_folder_in_the_users_cache(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(named.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: small.write(tmp_path / project))
    assert len(data.load(small.name).train) == 100


# What is wrong with them


def test_message_says_how_to_get_the_files(small: Small, tmp_path: Path) -> None:
    expected = rf"{tmp_path}/nowhere: expected .*found .*https://.*--data-dir DIR.*FASTLAYERS_DATA.*--download"
    with pytest.raises(data.DataError, match=expected):
        small.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_without_pooch_a_folder_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(named.FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(data.DataError, match=r"--data-dir DIR.*FASTLAYERS_DATA.*studies.*pooch is missing"):
        data.load("cifar10")
    with pytest.raises(data.DataError, match=r"pooch is missing.*fastlayers\[studies\]"):
        data.load("cifar10", tmp_path, download=True)


def test_import_needs_neither_pooch_nor_kornia() -> None:
    without = "import sys; sys.modules.update(pooch=None, kornia=None, lightning=None)"
    code = f"{without}; import fastlayers.data, fastlayers.experiments.quickstart"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_file(small: Small, tmp_path: Path) -> None:
    name = list(small.files)[-1]
    (small.write(tmp_path) / name).unlink()
    with pytest.raises(data.DataError, match=rf"expected .*found .*{name}"):
        small.load(tmp_path)


@pytest.mark.parametrize("read", [read_checked, read_checked_gzip])
def test_no_file_is_there(read: Callable[[Path, FileCheck], bytes], tmp_path: Path) -> None:
    """Neither is a folder one."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(data.DataError, match=f"{path}: expected a .*file .*{FileCheck.of(b'x')}, found no file"):
            read(path, FileCheck.of(b"x"))


def test_truncated_file(small: Small, tmp_path: Path) -> None:
    name, content = list(small.files.items())[2]
    (small.write(tmp_path) / name).write_bytes(content[:100])
    expected = f"{name}: expected {FileCheck.of(content)}, found {FileCheck.of(content[:100])}"
    with pytest.raises(data.DataError, match=expected):
        small.load(tmp_path)


def test_file_with_another_md5(small: Small, tmp_path: Path) -> None:
    name, content = list(small.files.items())[1]
    other = content[:-1] + bytes([content[-1] ^ 1])
    (small.write(tmp_path) / name).write_bytes(other)
    with pytest.raises(data.DataError, match=f"{name}: expected .* MD5 {md5(content)}, found .* MD5 {md5(other)}"):
        small.load(tmp_path)


def test_oversized_file_is_not_read(small: Small, tmp_path: Path) -> None:
    name, content = next(iter(small.files.items()))
    with (small.write(tmp_path) / name).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk, and more than there is in memory
    with pytest.raises(data.DataError, match=f"{name}: expected {len(content)} bytes .*, found {1 << 40} bytes"):
        small.load(tmp_path)


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def denied(*_: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(data.DataError, match=r"file: expected 1 bytes .* cannot be read: denied"):
        read_checked(tmp_path / "file", FileCheck.of(b"x"))


def damaged(kind: str, content: bytes) -> bytes:
    compressed = gzip.compress(content)
    return {
        "no gzip": content,
        "truncated": compressed[: len(compressed) // 2],
        "without its end": compressed[:-8],
        "wrong sum": compressed[:-8] + bytes(4) + compressed[-4:],
        "wrong bits": compressed[:20] + bytes(20) + compressed[40:],
    }[kind]


@pytest.mark.parametrize("kind", ["no gzip", "truncated", "without its end", "wrong sum", "wrong bits"])
def test_damaged_gzip(kind: str, smalls: dict[str, Small], tmp_path: Path) -> None:
    name, content = next(iter(smalls["idx"].files.items()))
    path = smalls["idx"].write(tmp_path) / name
    path.unlink()
    (tmp_path / f"{name}.gz").write_bytes(damaged(kind, content))
    with pytest.raises(data.DataError, match=rf"{name}\.gz: expected a gzip file with .* found a damaged one"):
        smalls["idx"].load(tmp_path)


def test_gzip_of_other_contents(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    check = FileCheck.of(bytes(1000))
    for content, found in ((bytes(10**7), "found more bytes"), (bytes(10), "found 10 bytes"), (b"1" * 1000, "MD5")):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(data.DataError, match=f"expected 1000 bytes .*{found}"):
            read_checked_gzip(path, check)
    with pytest.raises(data.DataError, match="found no file"):
        read_checked_gzip(tmp_path, check)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_pickle_that_names_another_object_is_refused(tmp_path: Path) -> None:
    written = tmp_path / "written"
    content = pickle.dumps({b"data": Malicious(written)})
    with pytest.raises(data.DataError, match=r"data_batch_1: refused to load (_?io)\.open"):
        cifar10.parse_pickle(content, Path("data_batch_1"))
    assert not written.exists()


def test_binary_records_must_be_whole() -> None:
    with pytest.raises(data.DataError, match="file: expected records of 3073 bytes each, found 3074"):
        cifar10.parse_binary(bytes(3074), Path("file"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ".* found 0x$"),
        (b"\0\0\x08", ".* found 0x000008$"),
        (b"\0\0\x08\0", ".* number of dimensions, found 0x00000800"),
        (b"\0\0\x0d\x01\0\0\0\x01\0", ".* unsigned bytes, .* found 0x00000d01"),
        (b"\x01\0\x08\x01\0\0\0\x01\0", ".* found 0x01000801"),
        (b"\0\0\x08\x03\0\0\0\x01", "an idx header of 16 bytes, found 8 bytes"),
        (idx_file(2, 3)[:-1], r"18 bytes for an idx file of dimensions \(2, 3\), found 17"),
        (idx_file(2, 3) + b"\0", r"18 bytes for an idx file of dimensions \(2, 3\), found 19"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "18446744065119617037 bytes"),
    ],
)
def test_wrong_idx_header(content: bytes, message: str) -> None:
    with pytest.raises(data.DataError, match=f"file: expected {message}"):
        mnist.parse_idx(content, Path("file"))


def test_idx_dimensions_and_order() -> None:
    assert torch.equal(mnist.parse_idx(idx_file(2, 3), Path("file")), torch.arange(6, dtype=torch.uint8).view(2, 3))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def packed(smalls: dict[str, Small], tmp_path: Path) -> Callable[..., Path]:
    """Writes an archive, from which `change` took members or to which it added some, and returns its folder."""
    small = smalls["python"]

    def write(change: Mapping[str, bytes | None], *others: tarfile.TarInfo) -> Path:
        members = {f"{small.folder}/{name}": content for name, content in small.files.items()}
        changed = {name: content for name, content in {**members, **change}.items() if content is not None}
        data_dir = tmp_path / "data"
        data_dir.mkdir()
        (data_dir / "cifar-10-python.tar.gz").write_bytes(tar_gz(changed, *others))
        return data_dir

    return write


def refused(data_dir: Path, message: str) -> None:
    """Nothing but the archive is there after the refusal, beside it neither."""
    with pytest.raises(data.DataError, match=message):
        data.load("cifar10", data_dir)
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-python.tar.gz"]
    assert [path.name for path in data_dir.parent.iterdir()] == ["data"]


BATCH = "cifar-10-batches-py/data_batch_2"


def test_archive_without_a_file(packed: Callable[..., Path]) -> None:
    refused(packed({BATCH: None}), f"expected {BATCH} in it")


def test_archive_with_a_file_of_another_size_or_content(packed: Callable[..., Path], smalls: dict[str, Small]) -> None:
    data_dir = packed({BATCH: b"short"})
    refused(data_dir, f"expected {BATCH} with .*, found 5 bytes")
    content = bytearray(smalls["python"].files["data_batch_2"])
    content[500] ^= 1
    (data_dir / "cifar-10-python.tar.gz").unlink()
    data_dir.rmdir()
    refused(packed({BATCH: bytes(content)}), "data_batch_2: expected .* MD5 .* found .* MD5")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_archive_with_a_link_for_a_file(kind: bytes, packed: Callable[..., Path]) -> None:
    refused(packed({BATCH: None}, link(BATCH, "/etc/passwd", kind)), f"expected {BATCH} to be a file, found a link")


def test_archive_with_a_path_outside(packed: Callable[..., Path], tmp_path: Path) -> None:
    outside = {"../outside": b"x", str(tmp_path / "absolute"): b"x", "cifar-10-batches-py/../../outside": b"x"}
    data_dir = packed(outside, link("link", "/"), link("cifar-10-batches-py/more", ".."))
    assert len(data.load("cifar10", data_dir).train) == 100
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    assert {path.name for path in data_dir.iterdir()} == {"cifar-10-python.tar.gz", "cifar-10-batches-py"}
    assert {path.name for path in (data_dir / "cifar-10-batches-py").iterdir()} == set(cifar10.PYTHON.files)


def test_archive_whose_folder_is_a_link_elsewhere(packed: Callable[..., Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "data" / "elsewhere"
    data_dir = packed({}, link("cifar-10-batches-py", str(elsewhere)))
    assert len(data.load("cifar10", data_dir).train) == 100
    assert not elsewhere.exists()
    assert not (data_dir / "cifar-10-batches-py").is_symlink()


@pytest.mark.parametrize("length", [0, 5, 1000, -100])
def test_truncated_archive(length: int, packed: Callable[..., Path]) -> None:
    data_dir = packed({})
    path = data_dir / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:length])
    refused(data_dir, r"cifar-10-python\.tar\.gz: ")


def test_interrupted_unpacking_leaves_nothing(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = packed({})

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(archives, "read_checked", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", data_dir)
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-python.tar.gz"]


# Where they come from


class Server(http.server.ThreadingHTTPServer):
    """Serves `contents` by their paths, and remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents: Files = {}
        self.asked: list[str] = []
        self.cut = False  # whether to break off in the middle

    def mirror(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.contents.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["python", "idx"])
def served(
    request: pytest.FixtureRequest, smalls: dict[str, Small], server: Server, monkeypatch: pytest.MonkeyPatch
) -> Small:
    """Small files that the server has on its second mirror, of two."""
    mirrors = [server.mirror("first"), server.mirror("second")]

    def from_here(remote: download.Remote) -> download.Remote:
        return replace(remote, urls=tuple(mirror + remote.name for mirror in mirrors))

    python = replace(cifar10.PYTHON, archive=from_here(cifar10.PYTHON.archive))
    monkeypatch.setattr(cifar10, "PYTHON", python)
    monkeypatch.setattr(cifar10, "VERSIONS", (python, cifar10.BINARY))
    for key, file in mnist.FILES.items():
        monkeypatch.setitem(mnist.FILES, key, replace(file, remote=from_here(file.remote)))
    small = smalls[request.param]
    server.contents = {f"/second/{name}": content for name, content in small.packed.items()}
    return small


def everything_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_download_tries_each_mirror_and_only_once(served: Small, server: Server, tmp_path: Path) -> None:
    expected = served.load(served.write(tmp_path / "plain"))
    data_dir = tmp_path / "new" / "folder"
    assert same(served.load(data_dir, download=True), expected)
    assert server.asked == [f"/{mirror}/{name}" for name in served.packed for mirror in ("first", "second")]
    server.asked.clear()
    assert same(served.load(data_dir, download=True), expected)
    assert same(served.load(data_dir), expected)
    assert server.asked == []
    names = set(served.packed) | (set(served.files) if served.name == "cifar10" else set())
    assert {path.name for path in everything_in(data_dir)} == names


def test_nothing_is_downloaded_unasked(served: Small, server: Server, tmp_path: Path) -> None:
    with pytest.raises(data.DataError):
        served.load(tmp_path)
    assert server.asked == []


def test_only_missing_files_are_downloaded(served: Small, server: Server, tmp_path: Path) -> None:
    name = next(iter(served.files))
    (served.write(tmp_path) / name).unlink()
    served.load(tmp_path, download=True)
    assert len(server.asked) == 2  # the archive, or the one file, on two mirrors


def test_wrong_files_are_not_downloaded_anew(served: Small, server: Server, tmp_path: Path) -> None:
    (served.write(tmp_path) / next(iter(served.files))).write_bytes(b"mine")
    with pytest.raises(data.DataError, match=r"found 4 bytes .* Remove files that are not the official ones"):
        served.load(tmp_path, download=True)
    assert server.asked == []


@pytest.mark.parametrize("failure", ["not found", "wrong content", "broken off", "no server"])
def test_failed_download_leaves_nothing(failure: str, served: Small, server: Server, tmp_path: Path) -> None:
    reason = "404"
    if failure == "not found":
        server.contents.clear()
    elif failure == "wrong content":
        server.contents = dict.fromkeys(server.contents, b"something else")
        reason = "hash"
    elif failure == "broken off":
        server.cut = True
        reason = "(broken|Incomplete|incomplete)"
    else:
        server.server_close()
        reason = "refused"
    name = re.escape(next(iter(served.packed)))
    expected = rf"(?s){name}: could not be downloaded.*/first/{name}: .*/second/{name}: .*{reason}.*--data-dir DIR"
    with pytest.raises(data.DataError, match=expected):
        served.load(tmp_path, download=True)
    assert everything_in(tmp_path) == []


def test_interrupted_download_leaves_nothing(
    served: Small, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(pooch.HTTPDownloader):  # type: ignore[misc]
        def __call__(self, url: str, output_file: str, pooch: object, check_only: bool = False) -> None:
            Path(output_file).write_bytes(b"half of it")
            raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "HTTPDownloader", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        served.load(tmp_path, download=True)
    assert everything_in(tmp_path) == []


def test_folder_that_cannot_be_made(served: Small, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="could not be downloaded"):
        served.load(tmp_path / "file" / "below", download=True)


def test_all_mirrors_are_https_and_the_official_one_is_first() -> None:
    remotes = [version.archive for version in cifar10.VERSIONS] + [file.remote for file in mnist.FILES.values()]
    for remote in remotes:
        assert len(remote.urls) >= 2
        assert all(re.fullmatch(rf"https://\S+/{re.escape(remote.name)}", url) for url in remote.urls)
    assert cifar10.PYTHON.archive.urls[0] == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


# The official ones


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    subprocess.run([sys.executable, SHARED_DATA / "restore.py", folder], check=True)
    return folder


@needs_shared_data
def test_official_cifar10(official: Path, tmp_path: Path) -> None:
    images = data.load("cifar10", official)
    assert images.train.images.shape == (50_000, 3, 32, 32)
    assert images.train.labels.bincount().tolist() == [5000] * 10
    assert images.test.labels.bincount().tolist() == [1000] * 10
    # The channels' means that everyone's CIFAR-10 recipes carry.
    assert (images.mean.flatten() / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)

    # The binary files hold the same records, so their MD5s follow from the Python ones.
    files = zip(cifar10.PYTHON.files, cifar10.BINARY.files, strict=True)
    for name, binary_name in files:
        part = cifar10.parse_pickle((official / cifar10.PYTHON.folder / name).read_bytes(), Path(name))
        records = torch.cat([part.labels[:, None].to(torch.uint8), part.images.flatten(1)], dim=1)
        (tmp_path / binary_name).write_bytes(records.numpy().tobytes())
    assert same(data.load("cifar10", tmp_path), images)


@needs_shared_data
def test_official_mnist(official: Path) -> None:
    images = data.load("mnist", official)
    assert images.train.images.shape == (60_000, 1, 28, 28)
    assert images.test.images.shape == (10_000, 1, 28, 28)
    assert images.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert (images.mean.item() / 255, images.deviation.item() / 255) == pytest.approx((0.1307, 0.3081), abs=1e-4)
