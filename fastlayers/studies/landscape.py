"""How rough the loss is around a training's path: its value and gradient a little way along the gradient.

The measures of Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?"
(https://arxiv.org/abs/1805.11604), section 3.1.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call

from fastlayers.studies.classifier import Batch, Classifier
from fastlayers.studies.results import LANDSCAPE_FILE
from fastlayers.writing import write_whole

# Steps along the gradient, in learning rates: what the optimizer would do, half of it, and twice.
_REACHES = (0.5, 1.0, 2.0)


class Landscape(Callback):
    """Records the loss of every step and, a few times per epoch, how loss and gradient change along the gradient.

    At weights w with gradient g, for some distances d: the smallest and largest loss at w - d g / |g|, and the largest
    |g(w - d g / |g|) - g(w)| / d, the effective smoothness. A distance is what plain gradient descent with the run's
    learning rate would go, half and twice of it. Nothing of the training changes: running statistics are copies, and
    random numbers are given back.
    """

    def __init__(self, per_epoch: int = 5) -> None:
        self.per_epoch = per_epoch
        self.losses: list[float] = []
        self.measured: list[tuple[int, float, float, float]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Looks around before the step."""
        if batch_idx % max(1, int(trainer.num_training_batches) // self.per_epoch) == 0:
            assert isinstance(pl_module, Classifier)
            images, labels = batch
            smoothness, low, high = look_around(
                pl_module.network,
                pl_module.criterion,
                pl_module.preparation(images),
                labels,
                pl_module.settings.optimizer.lr,
            )
            self.measured.append((trainer.global_step, smoothness, low, high))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Files the step's loss."""
        self.losses.append(float(outputs["loss"]))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": self.losses, "measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.losses = list(state_dict["losses"])
        self.measured = [(step, *rest) for step, *rest in state_dict["measured"]]

    def save(self, folder: Path) -> None:
        """Writes `landscape.npz`: loss per step; step, smoothness, loss_low and loss_high per measured step."""
        steps, smoothness, low, high = np.array(self.measured, dtype=np.float64).reshape(-1, 4).T
        content = io.BytesIO()
        np.savez(
            content,
            loss=np.array(self.losses, dtype=np.float32),
            step=steps.astype(np.int64),
            smoothness=smoothness.astype(np.float32),
            loss_low=low.astype(np.float32),
            loss_high=high.astype(np.float32),
        )
        write_whole(folder / LANDSCAPE_FILE, content.getbuffer())


def look_around(
    network: nn.Module, criterion: nn.Module, images: Tensor, labels: Tensor, lr: float
) -> tuple[float, float, float]:
    """The effective smoothness and the smallest and largest loss on the way that `Landscape` describes.

    Args:
        network: in training mode; neither its parameters nor its buffers change.
        images: (N, C, H, W), prepared; labels: (N,).
        lr: the learning rate in whose steps the way is measured.
    """
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss_and_gradient(weights: Mapping[str, Tensor]) -> tuple[float, list[Tensor]]:
        # The same for all: otherwise the change of a dropout mask would count as the loss's.
        torch.manual_seed(seed)
        weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        loss = criterion(functional_call(network, (weights, buffers), (images,)), labels)
        return loss.item(), list(torch.autograd.grad(loss, list(weights.values())))

    with torch.enable_grad(), torch.random.fork_rng():
        seed = int(torch.randint(2**62, ()))
        start, gradient = loss_and_gradient({name: weight.clone() for name, weight in parameters.items()})
        norm = _norm(gradient)
        losses, smoothness = [start], 0.0
        for reach in _REACHES:
            rates = zip(parameters.items(), gradient, strict=True)
            loss, moved = loss_and_gradient({name: weight - lr * reach * g for (name, weight), g in rates})
            losses.append(loss)
            change = _norm([there - here for there, here in zip(moved, gradient, strict=True)])
            smoothness = max(smoothness, change / (lr * reach * norm) if norm else 0.0)
    return smoothness, min(losses), max(losses)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])))
