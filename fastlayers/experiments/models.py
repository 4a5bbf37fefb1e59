"""The quickstart's CNN, one for each dataset: study A's with fewer channels, and smaller for digits."""

from __future__ import annotations

from typing import Any

from fastlayers.models import CNN
from fastlayers.models.layers import Layers

# For each dataset, the arguments of `CNN`.
PLANS: dict[str, dict[str, Any]] = {
    # 8x8 -> 4x4 -> 2x2
    "digits": {
        "in_channels": 1,
        "image_size": 8,
        "channels": (64, 64),
        "kernels": 3,
        "pool": 2,
        "pool_stride": 2,
        "pool_padding": 0,
    },
    # 32x32 -> 11x11 -> 4x4
    "cifar10": {"channels": (32, 64)},
}


def build_cnn(dataset: str, layers: Layers) -> CNN:
    """The network for `dataset`: images (N, C, H, W) to logits (N, 10)."""
    return CNN(**PLANS[dataset], layers=layers)
