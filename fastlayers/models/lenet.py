"""Study D's LeNet."""

from __future__ import annotations

from collections.abc import Sequence

from fastlayers.activations import ActLayer
from fastlayers.models import arguments
from fastlayers.models.blocks import ConvBlock, ConvNet
from fastlayers.models.layers import Layers, SquarePool, dense_style, style

_CHANNELS = (6, 16)
_HIDDEN = (120, 84)


class LeNet(ConvNet):
    """LeNet-5 (LeCun et al. 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf, figure 2) as used for CIFAR-10.

    Two 5x5 convolutions of 6 and 16 channels, each with activation and 2x2 max-pool, then linear layers of 120, 84 and
    `num_classes` features. Input: (N, in_channels, *image_size), at least 16 x 16; output: (N, num_classes).

    Args:
        act: the activation, see `MLP`.
        drop_p: the probability of dropping single elements between the linear layers, in [0, 1]; 0.5 in study D4.
        num_classes: how many logits.
        in_channels: of the images.
        image_size: height and width of the images, or one number for both.
        layers: whose layers, see `MLP`.

    Raises:
        ValueError: a wrong argument, images that are too small, or in the call an input of another size.
    """

    def __init__(
        self,
        *,
        act: ActLayer = "relu",
        drop_p: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        layers: Layers = "fastlayers",
    ) -> None:
        first, second = _CHANNELS
        sizes = ((arguments.whole("in_channels", in_channels), first), (first, second))
        super().__init__(
            [ConvBlock("CRM", before, after, kernel=5, padding=0, pool=SquarePool(2, 2)) for before, after in sizes],
            style(layers, act),
            image_size,
            num_classes,
            hidden=_HIDDEN,
            hidden_letters="RD",
            hidden_style=dense_style(layers, act, drop_p),
        )
