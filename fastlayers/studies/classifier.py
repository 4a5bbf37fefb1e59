"""The training of one network as a Lightning module: steps, scores per epoch, and what a resumed training needs."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fastlayers.studies import losses, schedules
from fastlayers.studies.config import Training
from fastlayers.studies.results import Epoch

Batch = tuple[Tensor, Tensor]


class Scores(nn.Module):
    """Mean loss and accuracy over images, over all processes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="disable")  # a training that diverges shows it
        self.accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts one batch, whose mean loss is `loss`."""
        self.loss.update(loss.detach(), len(labels))
        self.accuracy.update(logits.detach(), labels)

    def take(self, prefix: str) -> dict[str, float]:
        """What was counted, as `prefix`_loss and `prefix`_accuracy; counting starts anew."""
        taken = {f"{prefix}_loss": self.loss.compute().item(), f"{prefix}_accuracy": self.accuracy.compute().item()}
        self.loss.reset()
        self.accuracy.reset()
        return taken


class Classifier(pl.LightningModule):
    """Trains `network` as `training` says.

    Every epoch starts with random numbers of its own, which depend on `seed`, the epoch and the process alone: a
    training that is resumed after an epoch goes on as if it had never stopped, and both kinds of layers see the same.

    Args:
        network: prepared images to logits.
        preparation: normalises images (N, C, H, W) in uint8, and in training mode augments them.
        evaluated: "val" or "test", what is evaluated during the training.
    """

    def __init__(
        self, network: nn.Module, preparation: nn.Module, training: Training, classes: int, seed: int, evaluated: str
    ) -> None:
        super().__init__()
        self.network = network
        self.preparation = preparation
        self.settings = training
        self.seed = seed
        self.evaluated = evaluated
        self.criterion = losses.build(training.loss)
        self.train_scores = Scores(classes)
        self.eval_scores = Scores(classes)
        self.history: list[Epoch] = []
        self.wall_seconds = 0.0
        self._evaluation: dict[str, float] = {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and, moved on after every step, its schedule."""
        settings = self.settings
        optimizer = schedules.optimizer(self.network.parameters(), settings.optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = schedules.schedule(optimizer, settings.schedule, settings.optimizer.lr, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Seeds the epoch."""
        words = np.random.SeedSequence([self.seed, self.current_epoch, self.global_rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> 1))  # the seed is a signed number
        self._started = self._trained = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self._scored(batch, self.train_scores)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Takes the time at the end of the epoch's last step, before it is evaluated."""
        if self.trainer.is_last_batch:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._trained = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores one batch."""
        self._scored(batch, self.eval_scores)

    def on_validation_epoch_end(self) -> None:
        """Files what the evaluation found; checkpoints and early stopping look at it."""
        self._evaluation = self.eval_scores.take(self.evaluated)
        self.log_dict(self._evaluation, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Files the epoch."""
        found = self.train_scores.take("train")
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]  # there is one optimizer
        seconds = self._trained - self._started
        epoch = Epoch(epoch=self.current_epoch + 1, seconds=seconds, lr=rate, **found, **self._evaluation)
        self._evaluation = {}
        self.history.append(epoch)
        self.log_dict({**found, "lr": rate, "seconds": seconds})
        self.wall_seconds += time.perf_counter() - self._started

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores one batch."""
        self._scored(batch, self.eval_scores)

    def on_test_epoch_end(self) -> None:
        """Files the scores of the test images as test_loss and test_accuracy."""
        self.log_dict(self.eval_scores.take("test"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the result will need of the epochs so far."""
        checkpoint["history"] = [epoch.model_dump() for epoch in self.history]
        checkpoint["wall_seconds"] = self.wall_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back, unless the checkpoint is loaded to test its weights."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.history = [Epoch.model_validate(epoch) for epoch in checkpoint["history"]]
        self.wall_seconds = checkpoint["wall_seconds"]

    def _scored(self, batch: Batch, scores: Scores) -> Tensor:
        images, labels = batch
        logits = self.network(self.preparation(images))
        loss: Tensor = self.criterion(logits, labels)
        scores.add(loss, logits, labels)
        return loss
