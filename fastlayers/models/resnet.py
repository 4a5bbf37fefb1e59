"""Small ResNets for 32 x 32 images: study C's Res18, Res9 and simp_Res9."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from fastlayers.activations import ActLayer
from fastlayers.models import arguments
from fastlayers.models.blocks import ConvBlock
from fastlayers.models.layers import NORMS, DropMode, Layers, Norm, Style, style


class ResNet(nn.Module):
    """Stem, stages of residual blocks (He et al. 2015, https://arxiv.org/abs/1512.03385), mean over pixels, Linear.

    Input: (N, in_channels, H, W) of any size; each stage but the first halves it. Output: (N, num_classes).

    A block is ``act(norm(conv(...)) + shortcut)``, which with fastlayers is one `BatchNormAct2d` called with the
    residual. The shortcut is a 1x1 convolution with BatchNorm where sizes change.

    Args:
        block: "basic", two 3x3 convolutions (He et al., figure 5, left), or "bottleneck", simplified: 1x1 to half of
            the width, then 3x3 to the whole, without the third convolution of figure 5, right.
        widths: channels of each stage; the stem has the first stage's.
        depths: blocks of each stage.
        num_classes: how many logits.
        in_channels: of the images.
        stem: the kernels of the stem's convolutions, odd, in pixels. Each has stride 1 and is followed by norm and
            activation; there is no max-pool.
        act: the activation, see `MLP`.
        norm: "batch" or "none".
        drop_p: the probability of dropping, in [0, 1], between the two convolutions of a block (Zagoruyko and Komodakis
            2016, https://arxiv.org/abs/1605.07146, section 2.4).
        drop_mode: "channel" (Dropout2d), or "element".
        layers: whose layers, see `MLP`.

    Raises:
        ValueError: a wrong argument. For `act`, also as `fastlayers.activations.resolve`.
    """

    def __init__(
        self,
        block: Literal["basic", "bottleneck"] = "basic",
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: int | Sequence[int] = 2,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        stem: int | Sequence[int] = (3,),
        act: ActLayer = "relu",
        norm: Norm = "batch",
        drop_p: float = 0.0,
        drop_mode: DropMode = "channel",
        layers: Layers = "fastlayers",
    ) -> None:
        super().__init__()
        arguments.one_of("block", block, _INNER)
        arguments.one_of("norm", norm, NORMS)
        arguments.whole("num_classes", num_classes)
        widths = arguments.wholes("widths", widths)
        letters = "B" if norm == "batch" else ""
        made = style(layers, act, drop_p, drop_mode)
        self.stem = _stem(arguments.whole("in_channels", in_channels), widths[0], stem, letters, made)
        self.stages = nn.Sequential(
            *(
                _stage(block, channels, stride, depth, letters, made)
                for channels, stride, depth in zip(
                    pairwise((widths[0], *widths)),
                    (1, *[2] * (len(widths) - 1)),
                    arguments.per_block("depths", depths, len(widths)),
                    strict=True,
                )
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(input))).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """``act(norm(conv(inner(x))) + shortcut(x))``.

    Args:
        inner: what comes before the last convolution.
        end: norm and activation by name. A norm alone does all in one, the addition included; otherwise what follows
            the norm gets the sum.
        shortcut: from input to residual.
    """

    def __init__(
        self, inner: nn.Module, conv: nn.Module, end: dict[str, nn.Module], shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        self.inner = inner
        self.conv = conv
        self.norm = end.get("norm")
        rest = [layer for name, layer in end.items() if name != "norm"]
        self.after = nn.Sequential(*rest) if rest else None
        self.shortcut = shortcut

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the block's width and, where it has a stride of 2, half the size."""
        z: Tensor = self.conv(self.inner(input))
        residual: Tensor = input if self.shortcut is None else self.shortcut(input)
        if self.norm is not None:
            z = self.norm(z) if self.after is not None else self.norm(z, residual)
        return z if self.after is None else self.after(z + residual)


def _basic(channels_in: int, channels: int, stride: int, order: str) -> list[ConvBlock]:
    return [
        ConvBlock(order, channels_in, channels, kernel=3, padding=1, stride=stride),
        ConvBlock(order, channels, channels, kernel=3, padding=1),
    ]


def _bottleneck(channels_in: int, channels: int, stride: int, order: str) -> list[ConvBlock]:
    # The stride stands in the 3x3 convolution: in the 1x1 it would leave three of four pixels unread.
    half = max(1, channels // 2)
    return [
        ConvBlock(order, channels_in, half, kernel=1, padding=0),
        ConvBlock(order, half, channels, kernel=3, padding=1, stride=stride),
    ]


_INNER: dict[str, Callable[[int, int, int, str], list[ConvBlock]]] = {"basic": _basic, "bottleneck": _bottleneck}


def _stem(channels_in: int, channels: int, kernels: object, letters: str, style: Style) -> nn.Sequential:
    sizes = arguments.wholes("stem", kernels)
    if any(kernel % 2 == 0 for kernel in sizes):
        raise ValueError(f"stem: should be odd kernels, which keep the images' size, but got {kernels!r}")
    before = (channels_in, *[channels] * (len(sizes) - 1))
    blocks = (
        ConvBlock(f"C{letters}R", width, channels, kernel, kernel // 2)
        for width, kernel in zip(before, sizes, strict=True)
    )
    return nn.Sequential(*(block.build(style) for block in blocks))


def _stage(block: str, channels: tuple[int, int], stride: int, depth: int, letters: str, style: Style) -> nn.Sequential:
    before, after = channels
    first = _residual_block(block, before, after, stride, letters, style)
    return nn.Sequential(first, *(_residual_block(block, after, after, 1, letters, style) for _ in range(depth - 1)))


def _residual_block(
    block: str, channels_in: int, channels: int, stride: int, letters: str, style: Style
) -> ResidualBlock:
    *inner, last = _INNER[block](channels_in, channels, stride, f"C{letters}RD")
    shortcut = None
    if stride != 1 or channels_in != channels:
        shortcut = ConvBlock(f"C{letters}", channels_in, channels, 1, 0, stride).build(style)
    return ResidualBlock(
        nn.Sequential(*(part.build(style) for part in inner)),
        last.conv(),
        style.layers(f"{letters}R", channels),
        shortcut,
    )


def res18(**options: Any) -> ResNet:
    """Study C1's Res18: ResNet-18 with a stem of conv, BatchNorm and activation, without max-pool.

    Stages of 64, 128, 256 and 512 channels, two basic blocks each: 11.17 million parameters, 42.66 MiB of state
    (published: 42.7). Study D5's "simplified" ResNet-18 is taken to be the same: without stride and max-pool in the
    stem is how ResNet-18 is usually simplified for CIFAR-10. `options`: of `ResNet`.
    """
    return ResNet(**arguments.with_defaults(options, block="basic", widths=(64, 128, 256, 512), depths=2))


def res9(**options: Any) -> ResNet:
    """Study C1's Res9: stem and one basic block for each stage, so nine 3x3 convolutions.

    The report does not give the widths. Stages of 64, 128, 224 and 256 channels: 8.46 MiB of state (published: 8.7).
    `options`: of `ResNet`.
    """
    return ResNet(**arguments.with_defaults(options, block="basic", widths=(64, 128, 224, 256), depths=1))


def simp_res9(**options: Any) -> ResNet:
    """Study C's simp_Res9, its baseline: as `res9`, from simplified bottlenecks, 1x1 to half the width, 3x3 to all.

    The report gives neither widths nor what is simplified. Stages of 64, 128, 256 and 272 channels: 3.43 MiB of state
    (published: 3.41). `options`: of `ResNet`; C5's stems are ``stem=(3,)``, ``(7,)``, ``(3, 3, 3)`` and ``(3, 3)``.
    """
    return ResNet(**arguments.with_defaults(options, block="bottleneck", widths=(64, 128, 256, 272), depths=1))
