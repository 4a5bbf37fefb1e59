"""Runs of studies that a full disk, Ctrl-C or kill -9 stops: what is lost, and that they go on; and what runs hold."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fastlayers.cli import main
from fastlayers.studies import runner, sweep
from fastlayers.studies.classifier import Classifier
from fastlayers.studies.results import Job, Result, Store
from tests.resources import Held
from tests.small_runs import curve, job

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes: Any) -> Job:
    return job(**{"epochs": 3, "batch_size": 100, "fraction": 0.4} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing stopped."""
    result = runner.run(small(), runner.Machine(out=tmp_path_factory.mktemp("whole"), progress=False))
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
        assert curve(runner.run(small(), machine)) == curve(whole)
    assert begun == list(range(done, 3))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("place", ["on_train_batch_start", "on_validation_epoch_end", "on_train_epoch_end"])
def test_ctrl_c_is_keyboard_interrupt_and_can_be_given_again(
    place: str, tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning alone exits, and has Ctrl-C ignored from then on."""
    machine = runner.Machine(out=tmp_path, progress=False)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        original = getattr(Classifier, place)

        def interrupt(self: Classifier, *arguments: Any) -> Any:
            if self.current_epoch == 1:
                signal.raise_signal(signal.SIGINT)
            return original(self, *arguments)

        patched.setattr(Classifier, place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(small(), machine)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not Store(tmp_path).failures()
    assert curve(runner.run(small(), machine)) == curve(whole)


def test_runs_hold_no_threads_and_no_files(tmp_path: Path) -> None:
    """Loggers are closed, also of runs that fail."""

    def run(number: int) -> None:
        for changes in ({}, {"batch_size": 10**9}):
            out = tmp_path / f"{number}-{len(changes)}"
            list(sweep.in_turn([small(epochs=1, **changes)], runner.Machine(out=out, progress=False), lambda _: None))

    run(0)
    before = Held.now()
    for number in range(1, 4):
        run(number)
    after = Held.now()
    assert (after.python_threads, after.threads, after.files) == (before.python_threads, before.threads, before.files)


COMMAND = [sys.executable, "-m", "fastlayers", "study", "run", "A1", "--only", "MLP", "--no-progress", "--threads", "1"]


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), pytest.param(signal.SIGKILL, 12, marks=pytest.mark.long)]
)
def test_stopped_studies_go_on(number: signal.Signals, times: int, tmp_path: Path) -> None:
    """Ctrl-C, or kill -9 at any moment, time and again; at the end the curve is that of a run which nothing stopped."""
    chance = random.Random(0)
    command = [*COMMAND, "--epochs", "25", "--fraction", "0.3", "--out", str(tmp_path / "stopped")]
    for _ in range(times):
        begun = len(list(tmp_path.rglob("events.out*")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while len(list(tmp_path.rglob("events.out*"))) == begun and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGINT and process.returncode:
            assert "Aborted!" in errors
            assert not list(tmp_path.rglob(".*.partial"))
    options = ["study", "run", "A1", "--only", "MLP", "--no-progress", "--threads", "1", "--epochs", "25"]
    options += ["--fraction", "0.3", "--out"]
    for out in ("stopped", "undisturbed"):
        said = CliRunner().invoke(main, [*options, str(tmp_path / out)])
        assert said.exit_code == 0, said.output
    stopped, undisturbed = (next(Store(tmp_path / out).results()) for out in ("stopped", "undisturbed"))
    assert curve(stopped) == curve(undisturbed)
    assert (stopped.test_loss, stopped.scored_epoch) == (undisturbed.test_loss, undisturbed.scored_epoch)
    assert not list((tmp_path / "stopped").rglob(".*.partial"))
