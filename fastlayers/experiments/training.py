"""Training of several runs in one process, step by step in turn, each as if it were alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlayers.data import DataSet

Phase = Literal["train", "test"]
PHASES: tuple[Phase, ...] = get_args(Phase)

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Epoch:
    """What one run did in one epoch.

    There is one training loss and one time per step, and one test loss per image.
    """

    losses: dict[Phase, Tensor]
    seconds: list[float]
    test_accuracy: float

    def mean_loss(self, phase: Phase) -> float:
        """The loss averaged over the epoch's steps, or over the test images."""
        return self.losses[phase].mean().item()


class Run:
    """One model in training with Adam, with a stream of random numbers of its own.

    Runs with the same seed see the same random numbers for as long as they draw as many.
    """

    def __init__(self, model: nn.Module, seed: int, learning_rate: float = 1e-3) -> None:
        self.model = model
        self.epochs: list[Epoch] = []
        self._optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self._rng_state = torch.Generator().manual_seed(seed).get_state()
        self._losses: list[Tensor] = []
        self._seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step, of which the loss and the wall-clock time are kept."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng_state)
            started = time.perf_counter()
            self._optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self._optimizer.step()
            self._seconds.append(time.perf_counter() - started)
            self._rng_state = torch.get_rng_state()
        self._losses.append(loss.detach())

    @torch.no_grad()
    def finish_epoch(self, data: DataSet) -> None:
        """Tests the model, and files the results with those of the steps since the last epoch."""
        self.model.eval()
        batches = data.test.images.split(EVALUATION_BATCH)
        logits = torch.cat([self.model(data.normalise(batch)) for batch in batches])
        self.model.train()
        labels = data.test.labels
        test_losses = F.cross_entropy(logits, labels, reduction="none")
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        losses: dict[Phase, Tensor] = {"train": torch.stack(self._losses), "test": test_losses}
        self.epochs.append(Epoch(losses, self._seconds, accuracy))
        self._losses, self._seconds = [], []


def train_interleaved(
    runs: Sequence[Run],
    data: DataSet,
    epochs: int,
    batch_size: int,
    seed: int,
    after_step: Callable[[], object],
) -> None:
    """Trains all `runs` on the same batches, in an order drawn from `seed`.

    The last images of an epoch are left out where they do not fill a batch.
    """
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.train), generator=shuffle)
        for step in range(steps_per_epoch(data, batch_size)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            images = data.normalise(data.train.images[chosen])
            # To and fro, so that no run always follows the same other one.
            for run in runs if step % 2 == 0 else reversed(runs):
                run.step(images, data.train.labels[chosen])
            after_step()
        for run in runs:
            run.finish_epoch(data)


def steps_per_epoch(data: DataSet, batch_size: int) -> int:
    """How many whole batches the training images fill; ValueError where they do not fill one."""
    steps = len(data.train) // batch_size
    if steps == 0:
        raise ValueError(f"batch size {batch_size}: expected at most {len(data.train)}")
    return steps
