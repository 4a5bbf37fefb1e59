"""The CNN of the experiments, from torch's own layers or from fastlayers, with the same state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastlayers as fl


@dataclass(frozen=True)
class Block:
    """Sizes of one block: conv, BatchNorm, ReLU, Dropout2d, max-pool.

    The convolution keeps the image's size.
    """

    in_channels: int
    out_channels: int
    kernel: int
    pool: int
    pool_padding: int
    stride: int


@dataclass(frozen=True)
class CnnPlan:
    """Blocks, then a linear layer from `features` numbers per image to ten classes."""

    blocks: tuple[Block, ...]
    features: int
    drop_p: float = 0.4


PLANS = {
    # 8x8 -> 4x4 -> 2x2
    "digits": CnnPlan(
        (
            Block(1, 64, kernel=3, pool=2, pool_padding=0, stride=2),
            Block(64, 64, kernel=3, pool=2, pool_padding=0, stride=2),
        ),
        features=64 * 2 * 2,
    ),
    # 32x32 -> 11x11 -> 4x4
    "cifar10": CnnPlan(
        (
            Block(3, 32, kernel=5, pool=5, pool_padding=2, stride=3),
            Block(32, 64, kernel=7, pool=5, pool_padding=2, stride=3),
        ),
        features=64 * 4 * 4,
    ),
}

# From a number of channels and a dropout probability to the named layers of one block.
LayerFactory = Callable[[int, float], dict[str, nn.Module]]


def torch_layers(channels: int, drop_p: float) -> dict[str, nn.Module]:
    """BatchNorm, ReLU and Dropout2d as torch has them: three layers."""
    return {"norm": nn.BatchNorm2d(channels), "act": nn.ReLU(), "drop": nn.Dropout2d(drop_p)}


def fused_layers(channels: int, drop_p: float) -> dict[str, nn.Module]:
    """The same three in one layer; it keeps the name, and thus the state, of the BatchNorm."""
    return {"norm": fl.BatchNormAct2d(channels, act_layer="relu", drop_p=drop_p)}


def build_cnn(plan: CnnPlan, layers: LayerFactory) -> nn.Sequential:
    """The network of `plan`: images (N, C, H, W) to logits (N, 10)."""
    blocks = [_build_block(block, layers(block.out_channels, plan.drop_p)) for block in plan.blocks]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(plan.features, 10))


def _build_block(block: Block, middle: dict[str, nn.Module]) -> nn.Sequential:
    # BatchNorm subtracts the mean, so that a conv's bias would change nothing.
    conv = nn.Conv2d(block.in_channels, block.out_channels, block.kernel, padding=block.kernel // 2, bias=False)
    pool = nn.MaxPool2d(block.pool, block.stride, block.pool_padding)
    return nn.Sequential(OrderedDict(conv=conv, **middle, pool=pool))
