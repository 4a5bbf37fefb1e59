"""Runs of studies that a full disk, Ctrl-C or kill -9 stops: what is lost, and that they go on; and what runs hold."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fastlayers.cli import main
from fastlayers.studies import runner, sweep
from fastlayers.studies.classifier import Classifier
from fastlayers.studies.results import Job, Result, Store
from tests import scripts
from tests.resources import Held
from tests.small_runs import found, job

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes: Any) -> Job:
    return job(**{"epochs": 3, "batch_size": 100, "fraction": 0.4} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test
    result = runner.run(small(), runner.Machine(out=tmp_path_factory.mktemp("whole"), progress=False))
    torch.set_num_threads(threads)
    assert result is not None
    return result


@pytest.mark.parametrize("files", range(7))
def test_full_disk_loses_what_follows_the_last_checkpoint(
    files: int, tmp_path: Path, full_disk: Callable[[int], None], whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that a run writes: its job, then for each epoch the best checkpoint and the last one."""
    machine = runner.Machine(out=tmp_path, progress=False)
    folder = Store(tmp_path).folder(small())
    with monkeypatch.context():
        full_disk(files)
        (finished,) = sweep.in_turn([small()], machine, lambda _: None)
        monkeypatch.undo()
    assert finished.outcome == "failed"
    assert "No space left on device" in finished.reason
    assert str(folder) in finished.reason
    last = folder / "last.ckpt"
    done = torch.load(last, weights_only=True)["epoch"] + 1 if last.exists() else 0
    assert done >= (files - 1) // 2
    begun: list[int] = []
    with monkeypatch.context() as patched:
        start = Classifier.on_train_epoch_start

        def note(self: Classifier) -> None:
            begun.append(self.current_epoch)
            start(self)

        patched.setattr(Classifier, "on_train_epoch_start", note)
        assert found(runner.run(small(), machine)) == found(whole)
    assert begun == list(range(done, 3))
    assert not list(folder.glob(".*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_disk_with_too_little_room(share: float, small_disk: Path, tmp_path: Path, whole: Result) -> None:
    """A real one: whatever file is the first that does not fit, once there is room the run goes on."""
    machine = runner.Machine(out=small_disk, progress=False)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - int(share * _checkpoint_bytes(tmp_path / "other"))))
    (finished,) = sweep.in_turn([small()], machine, lambda _: None)
    assert finished.outcome == "failed"
    assert "No space left on device" in finished.reason
    ballast.unlink()
    assert found(runner.run(small(), machine)) == found(whole)


def _checkpoint_bytes(out: Path) -> int:
    """Of the one that stays when a run is done."""
    runner.run(small(), runner.Machine(out=out, progress=False))
    return (Store(out).folder(small()) / "best.ckpt").stat().st_size


def test_the_last_checkpoint_knows_the_best_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who goes on from it may take an epoch that is no better for the best."""
    monkeypatch.setattr(runner, "remove_partials", lambda folder: 1 / 0)  # so that the run fails when all is trained
    list(sweep.in_turn([small()], runner.Machine(out=tmp_path, progress=False), lambda _: None))
    checkpoint = torch.load(Store(tmp_path).folder(small()) / "last.ckpt", weights_only=True)
    (best,) = (kept["best_model_score"] for kept in checkpoint["callbacks"].values() if kept.get("monitor"))
    assert best == max(epoch["val_accuracy"] for epoch in checkpoint["history"])


@pytest.fixture
def _ctrl_c_taken() -> Iterator[None]:
    """What is started in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_taken")
@pytest.mark.parametrize("place", ["on_train_batch_start", "on_validation_epoch_end", "on_train_epoch_end"])
def test_ctrl_c_is_keyboard_interrupt_and_can_be_given_again(
    place: str, tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning alone exits, and has Ctrl-C ignored from then on."""
    machine = runner.Machine(out=tmp_path, progress=False)
    with monkeypatch.context() as patched:
        original = getattr(Classifier, place)

        def interrupt(self: Classifier, *arguments: Any) -> Any:
            if self.current_epoch == 1:
                signal.raise_signal(signal.SIGINT)
            return original(self, *arguments)

        patched.setattr(Classifier, place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(small(), machine)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Store(tmp_path).failures()
    assert found(runner.run(small(), machine)) == found(whole)


def test_runs_hold_nothing(tmp_path: Path) -> None:
    """No tensors, threads and files: loggers are closed, also of runs that fail."""

    def run(number: int) -> None:
        for changes in ({}, {"batch_size": 10**9}):
            out = tmp_path / f"{number}-{len(changes)}"
            list(sweep.in_turn([small(epochs=1, **changes)], runner.Machine(out=out, progress=False), lambda _: None))

    run(0)
    before = Held.now()
    for number in range(1, 4):
        run(number)
    assert not Held.now().beyond(before)


# Runs a study in a process forked from it, in each folder whose name it reads, and says which process and how it ended.
_STUDIES = """
    import faulthandler, os, signal, sys
    import torch
    from fastlayers.cli import main
    from fastlayers.studies import runner, sweep  # once for all processes: it takes seconds

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            faulthandler.dump_traceback_later(60, exit=True)
            main([*sys.argv[1:], line.strip()])  # ends the process
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
_KEYBOARD = re.compile("^(Aborted!|KeyboardInterrupt)$", re.MULTILINE)  # the latter when Python is about to end
STUDY = ["study", "run", "A1", "--only", "MLP", "--no-progress", "--threads", "1", "--epochs", "25"]
STUDY += ["--fraction", "0.3", "--out"]


@pytest.mark.parametrize("times", [2, pytest.param(30, marks=pytest.mark.long)])
def test_stopped_studies_go_on(times: int, tmp_path: Path) -> None:
    """Ctrl-C and kill -9 in turn, at any moment; what they find is what a study finds that nothing stopped."""
    chance = random.Random(0)
    stopped: Counter[signal.Signals] = Counter()
    folders = 0

    def stop(studies: subprocess.Popen[str]) -> None:
        nonlocal folders
        while stopped.total() < times:
            number = (signal.SIGINT, signal.SIGKILL)[stopped.total() % 2]
            before = set(tmp_path.rglob(".*.partial"))
            status = _run_and_stop(studies, tmp_path / str(folders), number, chance.uniform(0, 0.6))
            folders += status == 0
            stopped[number] += status != 0
            if status:
                said = (tmp_path / "errors").read_text()
                # The signal itself ends Python that has all but ended.
                assert status == -number or (number == signal.SIGINT and _KEYBOARD.search(said)), said
                assert number == signal.SIGKILL or set(tmp_path.rglob(".*.partial")) <= before

    scripts.output_of(_STUDIES, tmp_path, *STUDY, meanwhile=stop)
    for out in (str(folders), "undisturbed"):
        said = CliRunner().invoke(main, [*STUDY, str(tmp_path / out)])
        assert said.exit_code == 0, said.output
    expected = found(next(Store(tmp_path / "undisturbed").results()))
    for folder in range(folders + 1):
        assert found(next(Store(tmp_path / str(folder)).results())) == expected
    assert not list(tmp_path.rglob(".*.partial"))
    print(f"{dict(stopped)} in {folders + 1} runs")


def _run_and_stop(studies: subprocess.Popen[str], out: Path, number: signal.Signals, after: float) -> int:
    """The exit status of a study that is sent a signal some seconds after its training has begun, or is over."""
    assert studies.stdin is not None
    assert studies.stdout is not None
    begun = len(list(out.rglob("events.out*")))
    studies.stdin.write(f"{out}\n")
    studies.stdin.flush()
    process = int(studies.stdout.readline())
    while len(list(out.rglob("events.out*"))) == begun and Path(f"/proc/{process}").exists():
        time.sleep(0.01)
    time.sleep(after)
    with suppress(ProcessLookupError):
        os.kill(process, number)
    return int(studies.stdout.readline())
