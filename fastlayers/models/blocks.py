"""Blocks: a convolution or linear layer with what stands around it, and networks that are a row of these."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise

from torch import Tensor, nn

from fastlayers.models import arguments
from fastlayers.models.layers import NAMES, SquarePool, Style


@dataclass(frozen=True)
class ConvBlock:
    """One convolution and what stands before and after it.

    Attributes:
        order: letters of `layers.NAMES`, each at most once, with a C.
        kernel, padding, stride: of the convolution, in pixels.
        pool: what M is; needed where there is an M.
    """

    order: str
    in_channels: int
    out_channels: int
    kernel: int
    padding: int
    stride: int = 1
    pool: SquarePool | None = None

    def build(self, style: Style) -> nn.Sequential:
        """The layers, by the names of `layers.NAMES`."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        style, features = replace(style, pool=self.pool), self.in_channels
        for run in style.runs(self.order):
            if run == "C":
                layers[NAMES[run]] = self.conv()
                features = self.out_channels
            else:
                layers.update(style.layers(run, features))
        return nn.Sequential(layers)

    def conv(self) -> nn.Conv2d:
        """The convolution alone."""
        # A BatchNorm right behind it subtracts the mean, and so whatever a bias adds: none is needed there.
        bias = "CB" not in self.order
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel, self.stride, self.padding, bias=bias)

    def size_after(self, size: int) -> int:
        """What is left of `size` pixels; 0 or less if nothing."""
        for letter in self.order:
            if letter == "C":
                size = _size_after(size, self.kernel, self.stride, self.padding)
            elif letter == "M" and self.pool is not None:
                size = _size_after(size, self.pool.kernel, self.pool.stride, self.pool.padding)
        return size


def linear_block(in_features: int, out_features: int, letters: str, style: Style) -> nn.Sequential:
    """A linear layer, and what `letters` stand for."""
    # As for convolutions: no bias that the BatchNorm right behind it would subtract.
    linear = nn.Linear(in_features, out_features, bias=not letters.startswith("B"))
    return nn.Sequential(OrderedDict(linear=linear, **style.layers(letters, out_features)))


def linear_blocks(sizes: Sequence[int], letters: str, style: Style) -> list[nn.Module]:
    """Linear blocks from each of `sizes` to the next."""
    return [linear_block(before, after, letters, style) for before, after in pairwise(sizes)]


class ConvNet(nn.Module):
    """Convolution blocks, then linear ones, then a linear layer to the logits.

    Its forward raises ValueError for images of another size than it was built for.
    """

    def __init__(
        self,
        blocks: Sequence[ConvBlock],
        style: Style,
        image_size: int | Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (),
        hidden_letters: str = "",
        hidden_style: Style | None = None,
    ) -> None:
        super().__init__()
        arguments.whole("num_classes", num_classes)
        height, width = (_size_after_all(blocks, size) for size in arguments.image_size(image_size))
        self.input_shape = (blocks[0].in_channels, *arguments.image_size(image_size))
        self.features = nn.Sequential(*(block.build(style) for block in blocks))
        sizes = [blocks[-1].out_channels * height * width, *hidden]
        self.hidden = nn.Sequential(*linear_blocks(sizes, hidden_letters, hidden_style or style))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        features = self.features(arguments.input_shape(input, self.input_shape))
        logits: Tensor = self.head(self.hidden(features.flatten(1)))
        return logits


def _size_after(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1 if size > 0 else 0


def _size_after_all(blocks: Sequence[ConvBlock], size: int) -> int:
    """What is left of `size` pixels after all blocks; ValueError, with the smallest size that works, if nothing."""

    def sizes(first: int) -> list[int]:
        return list(accumulate(blocks, lambda left, block: max(0, block.size_after(left)), initial=first))[1:]

    *_, last = left = sizes(size)
    if last > 0:
        return last
    block = left.index(0)
    least = next(larger for larger in count(size + 1) if sizes(larger)[-1] > 0)
    raise ValueError(
        f"image_size: {size} is too small: nothing of it is left after block {block} ({blocks[block].order}); "
        f"allowed: {least} and more"
    )
