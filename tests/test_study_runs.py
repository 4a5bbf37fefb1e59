"""Runs of studies on the digits: results, twins, resuming, failures, several processes, Ray, the loss landscape."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import nn

from fastlayers import data, models
from fastlayers.cli import main
from fastlayers.data.augmentation import Augmentation, Augmenter
from fastlayers.studies import config, runner, sweep
from fastlayers.studies.classifier import Classifier
from fastlayers.studies.landscape import look_around
from fastlayers.studies.results import FAILURE_FILE, LANDSCAPE_FILE, Store, read_result
from fastlayers.studies.results import Result as Finished
from fastlayers.writing import write_whole
from tests.small_runs import curve, job

pytestmark = pytest.mark.usefixtures("one_thread")


def study(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["study", "run", "--no-progress", "--out", str(out), *arguments])


def results(out: Path) -> list[Finished]:
    return list(Store(out).results())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """B1 with both kinds of layers and two seeds."""
    out = tmp_path_factory.mktemp("both")
    return out, study(out, "B1", "--layers", "both", "--seeds", "2", "--epochs", "4")


def test_command_does_every_run(both: tuple[Path, Result]) -> None:
    out, said = both
    assert said.exit_code == 0, said.output
    assert "digits stand in for cifar10" in " ".join(said.output.split())
    done = {(result.job.layers, result.job.seed) for result in results(out)}
    assert done == {("fastlayers", 0), ("fastlayers", 1), ("torch", 0), ("torch", 1)}
    assert {result.job.published for result in results(out)} == {config.study("B1").runs[0].training.key}


def test_result_says_what_was_trained(both: tuple[Path, Result]) -> None:
    result = results(both[0])[0]
    assert (result.train_images, result.validation_images, result.test_images) == (1150, 288, 359)
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3, 4]
    assert result.parameters == 64 * 1024 + 2 * 1024 + 1024 * 10 + 10
    assert result.environment.torch == torch.__version__
    assert result.seconds > sum(epoch.seconds for epoch in result.history) > 0
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_twins_train_alike_and_seeds_differ(both: tuple[Path, Result]) -> None:
    by_run = {(result.job.layers, result.job.seed): result for result in results(both[0])}
    for seed in (0, 1):
        fused, plain = by_run["fastlayers", seed].history, by_run["torch", seed].history
        torch.testing.assert_close(
            [epoch.train_loss for epoch in fused], [epoch.train_loss for epoch in plain], rtol=1e-4, atol=1e-5
        )
    assert by_run["fastlayers", 0].history[0].train_loss != by_run["fastlayers", 1].history[0].train_loss


def test_test_images_are_scored_with_the_best_weights(both: tuple[Path, Result]) -> None:
    out, _ = both
    for result in results(out):
        accuracies = [epoch.val_accuracy for epoch in result.history]
        assert (
            accuracies[result.scored_epoch - 1]
            == max(accuracies, key=lambda found: found or 0)
            == result.best_val_accuracy
        )
        network = models.build("mlp", in_features=64, layers=result.job.layers)
        checkpoint = torch.load(Store(out).folder(result.job) / "best.ckpt", weights_only=True)
        state = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
        network.load_state_dict({name: state[name] for name in network.state_dict()})
        digits = data.load("digits")
        logits = network.eval()(Augmenter(Augmentation(), digits).eval()(digits.test.images))
        assert (logits.argmax(1) == digits.test.labels).float().mean().item() == pytest.approx(result.test_accuracy)


def test_logs(both: tuple[Path, Result]) -> None:
    out, _ = both
    folder = Store(out).folder(results(out)[0].job)
    assert list(folder.glob("tensorboard/events.out.tfevents.*"))
    (csv,) = folder.glob("csv/version_*/metrics.csv")
    assert {"train_loss", "val_accuracy", "lr"} <= set(csv.read_text().splitlines()[0].split(","))


def test_what_is_done_is_not_done_again(both: tuple[Path, Result]) -> None:
    out, _ = both
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = study(out, "B1", "B7", "--only", "MLP, p 0.5", "--only", "p 0.5", "--epochs", "4")
    assert again.exit_code == 0
    assert again.output.count("done before") == 1  # of one training that both studies have
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_resumed_training_has_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.run(job(), runner.Machine(out=tmp_path / "whole", progress=False))
    machine = runner.Machine(out=tmp_path / "stopped", progress=False)

    def stop(self: Classifier, *_: object) -> None:
        if self.current_epoch == 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "on_train_batch_start", stop, raising=False)
        (finished,) = sweep.in_turn([job()], machine, lambda _: None)
    assert (finished.outcome, finished.reason) == ("failed", "RuntimeError: power cut")
    store = Store(machine.out)
    assert "power cut" in store.failures()[str(job().folder)]

    resumed = runner.run(job(), machine)
    assert whole is not None
    assert resumed is not None
    assert curve(resumed) == curve(whole)
    assert (resumed.test_loss, resumed.scored_epoch) == (whole.test_loss, whole.scored_epoch)
    assert not (store.folder(job()) / FAILURE_FILE).exists()


COMMAND = [sys.executable, "-m", "fastlayers", "study", "run", "A1", "--only", "MLP", "--no-progress", "--threads", "1"]


def test_killed_run_goes_on(tmp_path: Path) -> None:
    """By kill -9, after some epoch."""
    command = [*COMMAND, "--epochs", "30", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/*/*/last.ckpt")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not results(tmp_path)
    assert study(tmp_path, "A1", "--only", "MLP", "--epochs", "30", "--threads", "1").exit_code == 0
    whole = tmp_path / "whole"
    assert study(whole, "A1", "--only", "MLP", "--epochs", "30", "--threads", "1").exit_code == 0
    assert curve(results(tmp_path)[0]) == curve(results(whole)[0])


def test_a_failed_run_is_reported_and_the_rest_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build

    def fail_for_some(name: str, **arguments: Any) -> nn.Module:
        if arguments.get("drop_p") == 0.3:
            raise ValueError("no [such] network")
        return build(name, **arguments)

    monkeypatch.setattr(models, "build", fail_for_some)
    said = study(tmp_path, "B7", "--epochs", "1", "--fraction", "0.2")
    assert said.exit_code == 1
    assert "ValueError: no [such] network" in " ".join(said.output.split())
    assert sorted(result.job.training.network.arguments["drop_p"] for result in results(tmp_path)) == [0, 0.1, 0.5]
    assert len(Store(tmp_path).failures()) == 1


def test_study_of_a_formula_trains_nothing(tmp_path: Path) -> None:
    said = study(tmp_path / "new", "E10")
    assert said.exit_code == 0
    assert "Nothing is trained" in said.output
    assert CliRunner().invoke(main, ["study", "report", str(tmp_path / "new")]).exit_code == 0
    assert (tmp_path / "new" / "plots" / "E10-focal.png").is_file()


def test_folder_of_data_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLAYERS_DATA", str(tmp_path / "nothing"))
    said = study(tmp_path, "B1")
    assert said.exit_code == 1
    assert "cifar-10-python.tar.gz" in said.output


def test_missing_data_is_said_at_once(tmp_path: Path) -> None:
    said = study(tmp_path, "B7", "--data-dir", str(tmp_path / "nothing"))
    assert said.exit_code == 1
    assert "--download" in said.output
    assert not list(tmp_path.rglob("job.json"))


def test_last_weights_are_scored_without_a_validation_set(tmp_path: Path) -> None:
    """Also where the last epoch is none of those that are tested."""
    result = runner.run(job(validation_share=0.0, test_every=3, epochs=4), runner.Machine(out=tmp_path, progress=False))
    assert result is not None
    assert [epoch.test_accuracy is not None for epoch in result.history] == [False, False, True, False]
    assert (result.scored_epoch, result.best_val_accuracy) == (4, None)


def test_early_stopping(tmp_path: Path) -> None:
    patient = job(epochs=60, patience=2, optimizer=config.Optimizer(name="sgd", lr=1e-9))
    result = runner.run(patient, runner.Machine(out=tmp_path, progress=False))
    assert result is not None
    assert len(result.history) == result.scored_epoch + 2 < 60


@pytest.mark.parametrize("schedule", ["constant", "cosine", "cyclic", "one_cycle"])
def test_schedules_move_with_every_step(tmp_path: Path, schedule: str) -> None:
    scheduled = job(schedule=config.Schedule.model_validate({"name": schedule}), epochs=2)
    result = runner.run(scheduled, runner.Machine(out=tmp_path, progress=False))
    assert result is not None
    rates = [epoch.lr for epoch in result.history]
    assert (rates[0] == rates[1] == 1e-2) == (schedule == "constant")
    if schedule in ("cosine", "one_cycle"):
        assert rates[1] < 1e-4


def test_augmentation_and_precision(tmp_path: Path) -> None:
    augmented = job(epochs=1, augmentation=config.Augmentation(crop_padding=1, flip=True, erasing_p=0.5))
    machine = runner.Machine(out=tmp_path, progress=False)
    plain, changed, coarse = (
        runner.run(each, machine)
        for each in (job(epochs=1), augmented, job(epochs=1).model_copy(update={"precision": "bfloat16"}))
    )
    assert plain is not None
    assert changed is not None
    assert coarse is not None
    assert changed.history[0].train_loss != plain.history[0].train_loss
    assert coarse.history[0].train_loss != plain.history[0].train_loss
    assert coarse.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=0.05)
    assert len(results(tmp_path)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in float16")
def test_float16_needs_a_gpu(tmp_path: Path) -> None:
    said = study(tmp_path, "B1", "--epochs", "1", "--precision", "float16")
    assert said.exit_code == 1
    assert "precision: float16 is not there on cpu; allowed: float32, bfloat16" in " ".join(said.output.split())
    assert not results(tmp_path)


def test_diverged_training_is_a_result(tmp_path: Path) -> None:
    machine = runner.Machine(out=tmp_path, progress=False)
    settings = {"optimizer": config.Optimizer(name="sgd", lr=1e30), "loss": config.Loss(name="mse"), "epochs": 2}
    network = config.Network.model_validate({"name": "mlp", "hidden": [32], "drop_p": 0.0, "norm": "none"})
    result = runner.run(job(**settings, network=network), machine)
    assert result is not None
    assert np.isnan(result.history[-1].train_loss)
    (again,) = results(tmp_path)
    assert np.isnan(again.history[-1].train_loss)


def test_two_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    """Of a network without BatchNorm and Dropout, which see each process's share alone."""
    options = ["D2", "--only", "50 epochs, lr .001, momentum .9", "--epochs", "2", "--threads", "1", "--device", "cpu"]
    assert study(tmp_path / "one", *options).exit_code == 0
    assert study(tmp_path / "two", *options, "--devices", "2").exit_code == 0
    (one,), (two,) = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one.environment.processes, two.environment.processes) == (1, 2)
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        found = [[getattr(epoch, name) for epoch in result.history] for result in (one, two)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_batches_that_processes_cannot_share_are_an_error(tmp_path: Path) -> None:
    said = study(tmp_path, "D1", "--epochs", "1", "--devices", "3", "--device", "cpu")
    assert said.exit_code == 1
    assert "batch_size: 4 cannot be shared by 3 processes" in " ".join(said.output.split())


def test_ray_does_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    said = study(tmp_path, "B1", "B2", "--epochs", "1", "--fraction", "0.2", "--ray")
    assert said.exit_code == 0, said.output
    assert len(results(tmp_path)) == 2
    assert said.output.count("done: ") == 2


def test_landscape_is_recorded_and_changes_nothing(tmp_path: Path) -> None:
    recorded, plain = (
        runner.run(job(record_landscape=record), runner.Machine(out=tmp_path, progress=False))
        for record in (True, False)
    )
    assert recorded is not None
    assert plain is not None
    assert curve(recorded) == curve(plain)
    with np.load(Store(tmp_path).folder(recorded.job) / LANDSCAPE_FILE, allow_pickle=False) as found:
        steps = 4 * -(-1150 // 60)
        assert found["loss"].shape == (steps,)
        assert found["step"].tolist() == list(range(0, steps, 4))  # five times in each of twenty
        assert (found["smoothness"] > 0).all()
        assert (found["loss_low"] <= found["loss_high"]).all()


def test_landscape_of_a_quadratic_loss() -> None:
    """Its gradient changes by the Hessian along the direction, whatever the distance."""
    curvature = torch.tensor([[1.0, 4.0, 9.0]])
    network = nn.Linear(3, 1, bias=False)
    start = torch.tensor([[1.0, 0.5, -2.0]])
    network.weight.data.copy_(start)

    class Quadratic(nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return (curvature * torch.diag(logits[:, 0]).sum(0) ** 2).sum() / 2

    gradient = curvature * start
    expected = (curvature * gradient).norm() / gradient.norm()
    smoothness, low, high = look_around(network, Quadratic(), torch.eye(3), torch.zeros(3), lr=0.01)
    assert smoothness == pytest.approx(expected.item(), rel=1e-4)
    assert high == pytest.approx((curvature * start**2).sum().item() / 2)
    moved = start - 0.02 * gradient
    assert low == pytest.approx((curvature * moved**2).sum().item() / 2, rel=1e-5)
    assert torch.equal(network.weight, start)
    assert network.weight.grad is None


def test_result_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a" / "b" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"job": "x"}))
    with pytest.raises(Exception, match=r"result\.json is not the result of a run"):
        read_result(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert study(tmp_path / "out", "B1", "--epochs", "1").exit_code == 1


class _Ray:
    """A cluster with a GPU, on which the third of its tasks dies."""

    class RayError(Exception):
        pass

    def __init__(self) -> None:
        self.exceptions, self.taken, self.tasks, self.is_up = self, dict[str, Any](), list[Any](), False

    def init(self, *address: Any, **options: Any) -> None:
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": 2.0}

    def remote(self, **resources: Any) -> Any:
        self.taken = resources
        return lambda function: SimpleNamespace(remote=self._start)

    def _start(self, *given: Any) -> int:
        self.tasks.append(given)
        return len(self.tasks)

    def wait(self, numbers: list[int]) -> tuple[list[int], list[int]]:
        return numbers[-1:], numbers[:-1]

    def get(self, number: int) -> sweep.Finished:
        if number == 3:
            raise self.RayError("much is told\nthe worker died")
        return sweep.Finished(self.tasks[number - 1][0], "done")


@pytest.mark.parametrize(("device", "gpus"), [("cpu", {}), ("cuda", {"num_gpus": 2})])
def test_what_becomes_of_runs_on_a_cluster(
    device: Any, gpus: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = _Ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    jobs = [job(epochs=epochs) for epochs in (1, 2, 3, 4)]
    monkeypatch.setattr(Store, "is_finished", lambda store, which: which == jobs[1])
    machine = runner.Machine(out=tmp_path, device=device, devices=2, threads=3)
    found = list(sweep.by_ray(jobs, machine, None))
    assert [(jobs.index(each.job), each.outcome, each.reason) for each in found] == [
        (1, "done before", ""),
        (3, "failed", "the worker died"),
        (2, "done", ""),
        (0, "done", ""),
    ]
    assert ray.taken == {"num_cpus": 3, **gpus}
    assert all(not given.progress for _, given in ray.tasks)
    assert not ray.is_up


@pytest.mark.parametrize("told", [True, False])
def test_processes_that_fail(told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they left, or else their exit status."""
    wanted = job(batch_size=50)

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        if told:
            write_whole(Store(tmp_path).folder(wanted) / FAILURE_FILE, "Traceback\nValueError: too hot")
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    machine = runner.Machine(out=tmp_path, device="cpu", devices=2, progress=False)
    (finished,) = sweep.in_turn([wanted], machine, lambda _: None)
    assert finished.outcome == "failed"
    assert finished.reason == f"ResultError: {'ValueError: too hot' if told else 'exit status 7'}"


@pytest.mark.parametrize(("interrupted", "raised"), [(True, KeyboardInterrupt), (False, SystemExit)])
def test_exit_that_is_no_interrupt_stays_one(interrupted: bool, raised: type[BaseException]) -> None:
    trainer: Any = SimpleNamespace(interrupted=interrupted)
    with pytest.raises(raised), runner._Interruptible().during(trainer):
        raise SystemExit(3)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_names_no_version(progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = runner._callbacks(job().training, runner.Machine(out=tmp_path, progress=progress), tmp_path)
    bars = [callback for callback in callbacks if isinstance(callback, TQDMProgressBar)]
    assert len(bars) == progress
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda *_: {"v_num": 3, "loss": 0.5})
    trainer: Any = None
    assert [bar.get_metrics(trainer, trainer) for bar in bars] == [{"loss": 0.5}] * progress
