"""Study C8's VGG-A, with and without BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from fastlayers.activations import ActLayer
from fastlayers.models import arguments
from fastlayers.models.blocks import ConvBlock, ConvNet
from fastlayers.models.layers import NORMS, Layers, Norm, SquarePool, dense_style, style

# Simonyan and Zisserman 2014, table 1, column A: channels of 3x3 convolutions, and whether a max-pool follows.
_WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
_POOLED = (True, True, False, True, False, True, False, True)
_HIDDEN = (512, 512)


class VGGA(ConvNet):
    """VGG-A, of 11 layers (Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556, table 1), for 32 x 32 images.

    Input: (N, in_channels, *image_size), at least 32 x 32; output: (N, num_classes). The two hidden linear layers have
    512 features, not 4096: five max-pools leave one pixel of 512 channels. Weights are drawn as by He et al. 2015
    (https://arxiv.org/abs/1502.01852, section 2.2), by which networks this deep train without BatchNorm too.

    Args:
        norm: "batch", after each convolution, or "none".
        act: the activation, see `MLP`.
        drop_p: the probability of dropping single elements after the hidden linear layers, in [0, 1].
        width: what the numbers of channels and hidden features are multiplied by.
        num_classes: how many logits.
        in_channels: of the images.
        image_size: height and width of the images, or one number for both.
        layers: whose layers, see `MLP`.

    Raises:
        ValueError: a wrong argument, images that are too small, or in the call an input of another size.
    """

    def __init__(
        self,
        norm: Norm = "batch",
        *,
        act: ActLayer = "relu",
        drop_p: float = 0.0,
        width: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        layers: Layers = "fastlayers",
    ) -> None:
        arguments.one_of("norm", norm, NORMS)
        widths = [_scaled(size, width) for size in _WIDTHS]
        order = "CBR" if norm == "batch" else "CR"
        per_block = zip(pairwise((arguments.whole("in_channels", in_channels), *widths)), _POOLED, strict=True)
        super().__init__(
            [
                ConvBlock(f"{order}M" if pooled else order, before, after, kernel=3, padding=1, pool=SquarePool(2, 2))
                for (before, after), pooled in per_block
            ],
            style(layers, act),
            image_size,
            num_classes,
            hidden=[_scaled(size, width) for size in _HIDDEN],
            hidden_letters="RD",
            hidden_style=dense_style(layers, act, drop_p),
        )
        for module in self.modules():
            _initialise(module)


def _scaled(size: int, width: float) -> int:
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width * size < float("inf"):
        raise ValueError(f"width: should be a number above 0, but got {width!r}")
    return max(1, round(size * width))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
