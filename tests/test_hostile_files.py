"""Files that are truncated, swapped, oversized or malicious: the error names the file, and nothing runs."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import random
import resource
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fastlayers_benchmarks import record, report
from rich.console import Console

from fastlayers.cli import main
from fastlayers.data import DataError, archives, cifar10
from fastlayers.data.files import FileCheck
from fastlayers.studies import config, runner, sweep
from fastlayers.studies.checkpoints import CheckpointError, RunCheckpoints
from fastlayers.studies.classifier import Classifier
from fastlayers.studies.report import landscape
from fastlayers.studies.results import Environment, Epoch, Job, Result, ResultError, Store, read_result
from fastlayers.writing import write_whole
from tests.small_runs import job

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes: Any) -> Job:
    return job(**{"epochs": 3, "batch_size": 100, "fraction": 0.4} | changes)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


# Checkpoints


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last one of a run that was stopped."""
    out = tmp_path_factory.mktemp("good")
    start = Classifier.on_train_epoch_start

    def stop(self: Classifier) -> None:
        start(self)
        if self.current_epoch == 2:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Classifier, "on_train_epoch_start", stop)
        (finished,) = sweep.in_turn([small()], runner.Machine(out=out, progress=False), lambda _: None)
    assert finished.reason == "RuntimeError: power cut"
    return (Store(out).folder(small()) / "last.ckpt").read_bytes()


def _zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def _saved(content: object, **options: Any) -> bytes:
    stored = io.BytesIO()
    torch.save(content, stored, **options)
    return stored.getvalue()


def _with_data_pickle(good: bytes, content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return _zipped({name: content if name.endswith("data.pkl") else old for name, old in members.items()})


def _overlapping(good: bytes) -> bytes:
    """An archive in which the same bytes are the content of many members."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data/0", bytes(10_000))
        first = archive.infolist()[0]
        for number in range(1, 50):
            again = copy.copy(first)
            again.filename = again.orig_filename = f"archive/data/{number}"
            archive.filelist.append(again)
    return packed.getvalue()


def _changed(good: bytes, **changes: object) -> bytes:
    checkpoint = torch.load(io.BytesIO(good), weights_only=True)
    checkpoint.update(changes)
    return _saved({name: value for name, value in checkpoint.items() if value is not None})


# A call of bytearray for 2^46 bytes.
_HUGE = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x40\x85R."

# Made of a good checkpoint and the folder that the payload would make.
BAD_CHECKPOINTS: dict[str, tuple[Callable[[bytes, Path], bytes], str]] = {
    "empty": (lambda good, ran: b"", "zip"),
    "text": (lambda good, ran: b"hello\n" * 100, "zip"),
    "truncated early": (lambda good, ran: good[:100], "zip"),
    "truncated in the middle": (lambda good, ran: good[: len(good) // 2], "zip"),
    "without its last byte": (lambda good, ran: good[:-1], ""),
    "zeros in the middle": (lambda good, ran: good[:3000] + bytes(3000) + good[6000:], ""),
    "another archive": (lambda good, ran: _zipped({"a": b"b"}), ""),
    "packed": (lambda good, ran: _zipped({"archive/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED), "compressed"),
    "overlapping": (lambda good, ran: _overlapping(good), "overlap"),
    "pickle": (lambda good, ran: pickle.dumps(Payload(ran)), "zip"),
    "torch's old form": (lambda good, ran: _saved(Payload(ran), _use_new_zipfile_serialization=False), "zip"),
    "payload": (lambda good, ran: _saved({"state_dict": Payload(ran)}), "mkdir"),
    "payload among tensors": (lambda good, ran: _with_data_pickle(good, pickle.dumps(Payload(ran), 2)), "mkdir"),
    "huge number of bytes": (lambda good, ran: _with_data_pickle(good, _HUGE), ""),
    "pickle that nobody can read": (
        lambda good, ran: _with_data_pickle(good, b"\xff"),
        r"UnpicklingError: it holds more than tensors and plain values\)",
    ),
    "no dictionary": (lambda good, ran: _saved([1, 2]), "expected a dictionary, found list"),
    "of tensors alone": (lambda good, ran: _saved({"weight": torch.zeros(3)}), "lacks fastlayers_job, epoch"),
    "without epochs": (lambda good, ran: _changed(good, history=None), "lacks history"),
    "of another run": (
        lambda good, ran: _changed(good, fastlayers_job=small(epochs=7).model_dump_json()), "it is of another run"
    ),
    "of no run": (lambda good, ran: _changed(good, fastlayers_job="{"), "ValidationError"),
    "job of another type": (lambda good, ran: _changed(good, fastlayers_job=torch.zeros(2)), "ValidationError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_named_and_runs_nothing(kind: str, tmp_path: Path, good_checkpoint: bytes) -> None:
    make, reason = BAD_CHECKPOINTS[kind]
    path, ran = tmp_path / "last.ckpt", tmp_path / "ran"
    path.write_bytes(make(good_checkpoint, ran))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"(?s){path} is no checkpoint of this run .*{reason}.*; remove it"):
        RunCheckpoints(small(), tmp_path).load_checkpoint(path)
    assert path.read_bytes() == before
    assert not ran.exists()


@pytest.mark.parametrize("seed", range(12))
def test_damaged_checkpoint_is_named_or_the_same(seed: int, tmp_path: Path, good_checkpoint: bytes) -> None:
    """A byte that is another, anywhere: an error that names the file, never other weights."""
    chance = random.Random(seed)
    content = bytearray(good_checkpoint)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    checkpoints = RunCheckpoints(small(), tmp_path)
    with warnings.catch_warnings(), suppress(CheckpointError):
        warnings.simplefilter("ignore")
        found = checkpoints.load_checkpoint(path)
        assert _same_weights(found, good_checkpoint)


def _same_weights(found: dict[str, Any], good: bytes) -> bool:
    expected = torch.load(io.BytesIO(good), weights_only=True)
    same = [torch.equal(value, expected["state_dict"][name]) for name, value in found["state_dict"].items()]
    return all(same) and found.keys() == expected.keys()


def test_good_checkpoint_is_read(tmp_path: Path, good_checkpoint: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(good_checkpoint)
    found = RunCheckpoints(small(), tmp_path).load_checkpoint(tmp_path / "last.ckpt")
    assert (found["epoch"], len(found["history"])) == (1, 2)
    with pytest.raises(ValueError, match="weights_only: got False"):
        RunCheckpoints(small(), tmp_path).load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


def test_options_of_storage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"storage_options: got \{\}, expected None"):
        RunCheckpoints(small(), tmp_path).save_checkpoint({}, tmp_path / "last.ckpt", storage_options={})
    assert not list(tmp_path.iterdir())


def test_oversized_checkpoint_is_not_read(tmp_path: Path, good_checkpoint: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(good_checkpoint)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk, and more than there is in memory
    with pytest.raises(CheckpointError, match=str(path)):
        RunCheckpoints(small(), tmp_path).load_checkpoint(path)


def test_only_checkpoints_of_the_folder_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoints = RunCheckpoints(small(), folder)
    (tmp_path / "precious").touch()
    for path in (tmp_path / "precious", folder / ".." / "precious", "gs://bucket/precious"):
        with pytest.raises(CheckpointError, match="precious is not removed"):
            checkpoints.remove_checkpoint(path)
    assert (tmp_path / "precious").exists()
    (folder / "old.ckpt").touch()
    checkpoints.remove_checkpoint(folder / "old.ckpt")
    assert not (folder / "old.ckpt").exists()


def test_run_with_a_bad_checkpoint_fails_and_the_next_goes_on(tmp_path: Path) -> None:
    path = Store(tmp_path).folder(small()) / "last.ckpt"
    write_whole(path, _saved({"state_dict": Payload(tmp_path / "ran")}))
    other = small().model_copy(update={"seed": 1})
    first, second = sweep.in_turn([small(), other], runner.Machine(out=tmp_path, progress=False), lambda _: None)
    assert (first.outcome, second.outcome) == ("failed", "done")
    assert str(path) in first.reason
    assert not (tmp_path / "ran").exists()
    path.unlink()
    (again,) = sweep.in_turn([small()], runner.Machine(out=tmp_path, progress=False), lambda _: None)
    assert again.outcome == "done"


# Results


def a_result(of: Job, **changes: Any) -> Result:
    epoch = Epoch(epoch=1, seconds=1.0, lr=0.1, train_loss=1.0, train_accuracy=0.5, val_loss=1.0, val_accuracy=0.5)
    values: dict[str, Any] = {
        "job": of, "history": (epoch,), "scored_epoch": 1, "test_loss": 1.0, "test_accuracy": 0.5, "seconds": 2.0,
        "train_images": 10, "validation_images": 2, "test_images": 3, "parameters": 4, "state_mib": 0.1,
        "environment": Environment(device="cpu", threads=1, processes=1, torch="2", fastlayers="0", backend="auto"),
    }  # fmt: skip
    return Result(**values | changes)


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


GOOD_RESULT = a_result(small()).model_dump_json(indent=1).encode()
BAD_RESULTS = {
    "empty": b"",
    "no JSON": b"hello",
    "bytes": bytes(range(256)),
    "truncated": GOOD_RESULT[: len(GOOD_RESULT) // 2],
    "without its end": GOOD_RESULT[:-1],
    "a list": b"[]",
    "another object": b'{"job": 1}',
    "more keys": GOOD_RESULT.replace(b'"seconds"', b'"more": 1, "seconds"', 1),
    "another type": GOOD_RESULT.replace(b'"test_loss": 1.0', b'"test_loss": "x"'),
    "nested": _nested(100_000),
    "another data set": GOOD_RESULT.replace(b'"digits"', b'"../../etc"'),
}


@pytest.mark.parametrize("kind", BAD_RESULTS)
def test_bad_result_is_named(kind: str, tmp_path: Path) -> None:
    path = Store(tmp_path).folder(small()) / "result.json"
    write_whole(path, BAD_RESULTS[kind])
    with pytest.raises(ResultError, match=rf"{path} is not the result of a run: "):
        read_result(path)
    (finished,) = sweep.in_turn([small()], runner.Machine(out=tmp_path, progress=False), lambda _: None)
    assert finished.outcome == "failed"
    assert f"{path} is not the result of a run" in finished.reason
    said = CliRunner().invoke(main, ["study", "report", str(tmp_path)])
    assert said.exit_code == 1
    assert str(path) in said.output.replace("\n", "")
    assert not (tmp_path / "index.html").exists()


def test_result_cut_anywhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for length in range(0, len(GOOD_RESULT), 7):
        path.write_bytes(GOOD_RESULT[:length])
        with pytest.raises(ResultError, match=str(path)):
            read_result(path)


def test_oversized_result_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(GOOD_RESULT)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ResultError, match=f"{path} is not the result of a run: it has {1 << 40} bytes"):
        read_result(path)
    with pytest.raises(ResultError, match="cannot be read"):
        read_result(tmp_path)


def test_swapped_results_are_named(tmp_path: Path) -> None:
    """The result of one run in the folder of another counts for neither."""
    store, other = Store(tmp_path), small(epochs=9)
    path = store.folder(small()) / "result.json"
    write_whole(path, a_result(other).model_dump_json())
    with pytest.raises(ResultError, match=f"{path} is the result of another run"):
        list(store.results())
    (finished,) = sweep.in_turn([small()], runner.Machine(out=tmp_path, progress=False), lambda _: None)
    assert finished.outcome == "failed"
    assert f"{path} is the result of another run" in finished.reason


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\0binary", b"x" * 300_000, b"line\n" * 100_000 + b"ValueError: last"]
)
def test_failures_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_whole(store.folder(small()) / "failure.txt", content)
    found = store.failures()
    assert len(found) == bool(content)
    assert all(len(line) <= 70_000 for line in found.values())
    if content.endswith(b"last"):
        assert found == {str(small().folder): "ValueError: last"}


def test_failure_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.folder(small()) / "failure.txt"
    path.mkdir(parents=True)
    with pytest.raises(ResultError, match=f"{path} cannot be read: .*Is a directory"):
        store.failures()


def test_page_shows_what_files_say_as_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    evil = "<script>alert(1)</script> [red]x[/red] | ![a](b)"
    write_whole(store.folder(small()) / "failure.txt", f"ValueError: {evil}")
    study = config.study("B1").runs[0].training
    of = Job(published=study.key, training=study.model_copy(update={"dataset": "digits"}))
    environment = Environment(device=evil, threads=1, processes=1, torch=evil, fastlayers=evil, backend=evil)
    store.write(a_result(of, environment=environment))
    said = CliRunner().invoke(main, ["study", "report", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "<script>alert" not in (tmp_path / "index.html").read_text()
    assert "<script>alert" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "payload", "bomb", "oversized", "lengths", "header"])
def test_bad_landscape_is_named(kind: str, tmp_path: Path) -> None:
    result, ran = a_result(small()), tmp_path / "ran"
    path = Store(tmp_path).folder(result.job) / "landscape.npz"
    names = ("loss", "step", "smoothness", "loss_low", "loss_high")

    def saved(save: Callable[..., None], **arrays: Any) -> bytes:
        content = io.BytesIO()
        save(content, **{name: np.ones(9) for name in names} | arrays)
        return content.getvalue()

    good = saved(np.savez)
    huge = np.lib.format.MAGIC_PREFIX + b"\x01\x00" + (118).to_bytes(2, "little")
    huge += b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }".ljust(117) + b"\n"
    contents: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello",
        "truncated": good[:-100],
        "payload": saved(np.savez, loss=np.array([Payload(ran)], dtype=object)),
        "bomb": saved(np.savez_compressed, loss=np.zeros(20_000_000)),
        "oversized": good,
        "lengths": saved(np.savez, step=np.ones(3)),
        "header": _zipped({f"{name}.npy": huge for name in names}),
    }
    write_whole(path, contents[kind])
    if kind == "oversized":
        with path.open("r+b") as file:
            file.truncate(1 << 40)
    with pytest.raises(ResultError, match=f"{path} is not the record of a loss landscape"):
        landscape._read(Store(tmp_path), result)
    assert not ran.exists()


# Descriptions of studies

_GOOD_TOML = (Path(config.__file__).parent / "reports" / "b.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no toml",
        "title = 3",
        "studies = 3",
        _GOOD_TOML[: len(_GOOD_TOML) // 2] + "[",
        'title = "t"\nnotes = ""\n[studies.X1]\ntitle = "x"\nruns = [{ name = "a" }]',
        'title = "t"\nnotes = ""\n[studies.X1]\ntitle = "x"\nbase = "missing"\nruns = [{ name = "a" }]',
        'title = "t"\nnotes = ""\n[studies.X1]\nunknown = 1',
        'title = "t"\nnotes = ""\nunknown = 1\n[studies]',
        'title = "t"\nstudies = "[' + "[" * 50_000,
        "a = " + "[" * 50_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
    ids=lambda content: content[:20],
)
def test_bad_description_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(config.ConfigError, match=f"{path} describes no report"):
        config._read(path)


def test_description_cut_anywhere_is_named_or_shorter(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    studies = len(config.read_report("B", _GOOD_TOML).studies)
    for length in range(0, len(_GOOD_TOML), 131):
        path.write_text(_GOOD_TOML[:length], encoding="utf-8")
        try:
            found = len(config._read(path).studies)
        except config.ConfigError as error:
            said = str(error)
        else:
            said, found = str(path), min(found, studies + 1)
            assert found <= studies
        assert str(path) in said


# Records of benchmarks


def _a_record() -> dict[str, Any]:
    outcome = {
        "samples": [1.0, 2.0, 1.5],
        "peak_bytes": 10,
        "saved_bytes": 5,
        "errors": {"output": 1e-7, "input": 2e-7},
    }
    about = {
        "shape": [2, 16, 8, 8],
        "layout": "contiguous",
        "dtype": "float32",
        "drop_p": 0.0,
        "act": "relu",
        "residual": False,
    }
    rows = [
        {
            "case": "a", "about": about, "phase": "forward+backward", "passes": 4.0, "tensor_bytes": 100,
            "outcomes": {"eager": outcome, "fastlayers-cpp": outcome}, "copy_rate": 1e9, "failures": {"compile": "no"},
        },
        {
            "case": "s", "about": {"model": "cnn", "layout": "contiguous"}, "phase": "training step",
            "outcomes": {"eager": {"samples": [1.0]}, "fastlayers": {"samples": [2.0]}},
        },
    ]  # fmt: skip
    setting = {"device": "cpu", "threads": 2, "allocator": "default", "fastlayers": "fastlayers-cpp", "rows": rows}
    return {
        "format": 1, "machine": {"cpu": "x"}, "versions": {"torch": "2"}, "options": {"only": ""},
        "absent": {"timm": "no"}, "settings": [setting], "date": "2026-11-01",
    }  # fmt: skip


def _places(content: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if where:
        yield where
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield from _places(value, (*where, key))


def test_any_other_value_in_a_record_is_an_error_that_names_the_file_or_can_be_shown(tmp_path: Path) -> None:
    """Each value of a record in turn as each other kind of value, and without it."""
    path, missing = tmp_path / "record.json", object()
    console = Console(file=StringIO(), width=120)
    refused = shown = 0
    for place in _places(_a_record()):
        for value in (missing, None, "x", -1, True, [], {}, float("nan")):
            content = _a_record()
            inner: Any = content
            for key in place[:-1]:
                inner = inner[key]
            if value is missing:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            path.write_text(json.dumps(content))
            said = ""
            try:
                report.show(console, record.load(path))
                shown += 1
            except record.RecordError as error:
                said = str(error)
                refused += 1
            assert not said or str(path) in said
    assert refused > 3 * shown > 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        bytes(range(256)),
        _nested(100_000),
        b'{"format": 1e400}',
        pickle.dumps({"format": 1}),
        b"null",
        b"1" * 10_000,
    ],
    ids=lambda content: repr(content[:10]),
)
@pytest.mark.parametrize("option", ["--check", "--load"])
def test_bad_record_is_named_and_nothing_is_measured(content: bytes, option: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    said = CliRunner().invoke(main, ["bench", "--quick", "--no-steps", option, str(path)])
    assert said.exit_code == 1
    assert f"Error: {path}: no record of fastlayers bench" in said.output
    assert not [*tmp_path.glob("*.png"), *tmp_path.glob("*.md")]


def test_oversized_record_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(_a_record()))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(record.RecordError, match=f"{path}: .*it has {1 << 40} bytes"):
        record.load(path)


def test_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(_a_record()))
    made = record.load(path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full_disk(0)
    with pytest.raises(OSError, match=str(path)):
        made.save(path)
    with pytest.raises(OSError, match="page"):
        report.save_markdown(made, tmp_path / "page.md", [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Archives


@pytest.mark.parametrize("kind", ["zeros", "many members", "long header", "large file"])
def test_archive_that_unpacks_to_too_much(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends where an official one would have ended; nothing is left, and nothing was held in memory."""
    content = b"x" * 1000
    files = {"data_batch_1": FileCheck.of(content)}

    def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    huge = 1 << 40
    start = {
        "zeros": b"",
        "many members": member("a", 0) * 5000,
        "long header": member("a", huge, tarfile.XHDTYPE),
        "large file": member(f"{cifar10.PYTHON.folder}/other", huge),
    }[kind]
    archive = tmp_path / "archive.tar.gz"
    with gzip.open(archive, "wb", compresslevel=1) as packed:
        packed.write(start)
        filling = member("a", 0) * 512 if kind == "many members" else b"\1" * (512 * 512)
        for _ in range(100):
            packed.write(filling)
    monkeypatch.setattr(archives, "_ROOM", 1 << 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"{archive}: "):
        archives.unpack(archive, cifar10.PYTHON.folder, tmp_path / "out", files)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tar.gz"]
