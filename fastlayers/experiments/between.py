"""What the layers between the convolutions take of a training step: BatchNorm, activation, dropout and max-pool."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from fastlayers.models import CNN

REPEATS = 40


def seconds_between_convolutions(models: Sequence[CNN], images: Tensor, repeats: int = REPEATS) -> list[float]:
    """The median time of forward and backward of all that follows the convolutions, alone, for each of `models`.

    They take turns, on what their convolutions make of `images`; the first tenth of the turns warms up. Models and
    random state stay as they are.

    Args:
        models: whose blocks begin with a convolution.
        images: (N, C, H, W).
        repeats: how often.
    """
    with torch.random.fork_rng(devices=[]):
        parts = [_behind_convolutions(copy.deepcopy(model), images) for model in models]
        seconds: list[list[float]] = [[] for _ in parts]
        for turn in range(repeats):
            # To and fro, so that none always follows the same other one.
            for number in range(len(parts)) if turn % 2 == 0 else reversed(range(len(parts))):
                seconds[number].append(sum(_step(*part) for part in parts[number]))
    return [median(of_one[repeats // 10 :]) for of_one in seconds]


def _behind_convolutions(model: CNN, images: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """For each block what follows its convolution, an input of that and a gradient of its output."""
    parts: list[tuple[nn.Module, Tensor, Tensor]] = []
    for block in model.train().features:
        assert isinstance(block, nn.Sequential)
        conv, *rest = block
        assert isinstance(conv, nn.Conv2d), f"{conv}: a block begins with its convolution"
        behind, input = nn.Sequential(*rest), conv(images).detach().requires_grad_()
        images = behind(input).detach()
        parts.append((behind, input, torch.rand_like(images)))
    return parts


def _step(layers: nn.Module, input: Tensor, grad_output: Tensor) -> float:
    """Seconds."""
    for tensor in (input, *layers.parameters()):
        tensor.grad = None
    started = time.perf_counter()
    layers(input).backward(grad_output)
    return time.perf_counter() - started
