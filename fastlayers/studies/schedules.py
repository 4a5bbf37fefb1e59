"""Optimizers and schedules of the learning rate, as torch has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, CyclicLR, LRScheduler, OneCycleLR

from fastlayers.studies import config


def optimizer(parameters: Iterable[Parameter], settings: config.Optimizer) -> Optimizer:
    """SGD or Adam on `parameters`."""
    if settings.name == "adam":
        if settings.momentum:
            raise ValueError(f"optimizer.momentum: {settings.momentum} with adam; only sgd has it")
        return torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def schedule(optimizer: Optimizer, settings: config.Schedule, lr: float, steps: int) -> LRScheduler:
    """The schedule over `steps` steps of the optimizer, which all belong to one training; `lr` is its largest rate."""
    lowest = lr / settings.divisor
    match settings.name:
        case "constant":
            return ConstantLR(optimizer, factor=1.0)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        case "one_cycle":
            return OneCycleLR(optimizer, lr, total_steps=steps, div_factor=settings.divisor, cycle_momentum=False)
        case "cyclic":
            up = max(1, steps // (2 * settings.cycles))
            return CyclicLR(optimizer, lowest, lr, step_size_up=up, cycle_momentum=False)
