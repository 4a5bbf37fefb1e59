"""The CNN of studies A and B: blocks whose layers stand in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastlayers.activations import ActLayer
from fastlayers.models import arguments
from fastlayers.models.blocks import ConvBlock, ConvNet
from fastlayers.models.layers import NAMES, DropMode, Layers, SquarePool, style

_DROP_P = 0.4


class CNN(ConvNet):
    """Convolution blocks, then a linear layer. The defaults are study A's CNN, of about 13 million parameters.

    Input: (N, in_channels, *image_size); output: (N, num_classes).

    `order` says what a block is made of, each letter at most once: C convolution (needed), B BatchNorm, R activation,
    D dropout, M max-pool. What is not in it is left out, and arguments for it mean nothing. With fastlayers, a B is one
    layer with the R, D and M that follow it, in this order or with the M before the D or, if R nowhere falls, before
    the R. Where D drops elements it is not in one layer with M. A convolution has a bias only where no B follows
    directly.

    Args:
        order: such as "CBRDM", "DCBRM", "CRDBM", or "CRDM" without BatchNorm.
        channels: of each block.
        kernels: of the convolutions, in pixels; stride 1. One for all blocks, or one for each; so the next four.
        padding: of the convolutions; "same" keeps the size, and needs odd kernels.
        pool, pool_stride, pool_padding: of the max-pools. The padding is at most half the kernel.
        act: the activation, see `MLP`.
        drop_p: the probability of dropping, in [0, 1]. By default 0.4 where there is a D.
        drop_mode: "channel" (Dropout2d), or "element".
        num_classes: how many logits.
        in_channels: of the images.
        image_size: height and width of the images, or one number for both.
        layers: whose layers, see `MLP`.

    Raises:
        ValueError: a wrong argument; a `drop_p` above 0 without a D; images that are too small, saying which size would
            not be; in the call, an input of another size.
    """

    def __init__(
        self,
        order: str = "CBRDM",
        channels: Sequence[int] = (256, 1024),
        kernels: int | Sequence[int] = (5, 7),
        *,
        padding: int | Sequence[int] | Literal["same"] = "same",
        pool: int | Sequence[int] = 5,
        pool_stride: int | Sequence[int] = 3,
        pool_padding: int | Sequence[int] = 2,
        act: ActLayer = "relu",
        drop_p: float | None = None,
        drop_mode: DropMode = "channel",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        layers: Layers = "fastlayers",
    ) -> None:
        _check_order(order)
        sizes = (arguments.whole("in_channels", in_channels), *arguments.wholes("channels", channels))
        blocks = len(sizes) - 1
        kernels = arguments.per_block("kernels", kernels, blocks)
        per_block = zip(
            sizes[:-1],
            sizes[1:],
            kernels,
            _padding(padding, kernels),
            _pools(pool, pool_stride, pool_padding, blocks),
            strict=True,
        )
        super().__init__(
            [
                ConvBlock(order, before, after, kernel, pad, pool=pools)
                for before, after, kernel, pad, pools in per_block
            ],
            style(layers, act, _drop_p(drop_p, order), drop_mode),
            image_size,
            num_classes,
        )


def _check_order(order: object) -> None:
    letters = order if isinstance(order, str) else ""
    if "C" not in letters or set(letters) - set(NAMES) or len(set(letters)) != len(letters):
        allowed = ", ".join(f"{letter} ({name})" for letter, name in NAMES.items())
        raise ValueError(f"order: should have a C, and each letter at most once, of {allowed}; but got {order!r}")


def _drop_p(drop_p: float | None, order: str) -> float:
    if drop_p is None:
        return _DROP_P if "D" in order else 0.0
    arguments.probability("drop_p", drop_p)
    if drop_p and "D" not in order:
        raise ValueError(f"drop_p: should be 0 or None for order {order!r}, which has no D, but got {drop_p}")
    return drop_p


def _padding(padding: object, kernels: tuple[int, ...]) -> tuple[int, ...]:
    if padding != "same":
        return arguments.per_block("padding", padding, len(kernels), least=0)
    if any(kernel % 2 == 0 for kernel in kernels):
        raise ValueError(f"padding: should be given in pixels, not 'same', for even kernels, but got kernels {kernels}")
    return tuple(kernel // 2 for kernel in kernels)


def _pools(kernel: object, stride: object, padding: object, blocks: int) -> list[SquarePool]:
    kernels = arguments.per_block("pool", kernel, blocks)
    strides = arguments.per_block("pool_stride", stride, blocks)
    paddings = arguments.per_block("pool_padding", padding, blocks, least=0)
    pools = [SquarePool(*sizes) for sizes in zip(kernels, strides, paddings, strict=True)]
    for pool in pools:
        if pool.padding > pool.kernel // 2:
            raise ValueError(
                f"pool_padding: should be at most half of pool, {pool.kernel // 2}, but got {pool.padding}"
            )
    return pools


def cnn_a7(**options: Any) -> CNN:
    """Study A7's CNN, about as large as the MLP: 128 and 480 channels, 3.10 million parameters (the MLP: 3.16).

    The report does not give the widths. `options`: of `CNN`.
    """
    return CNN(**arguments.with_defaults(options, channels=(128, 480)))


def cnn_b(**options: Any) -> CNN:
    """Study B's CNN: 256 channels, kernels 5 without padding, max-pools 2, no dropout unless asked for.

    `options`: of `CNN`.
    """
    sizes = {"channels": (256, 256), "kernels": 5, "padding": 0, "pool": 2, "pool_stride": 2, "pool_padding": 0}
    return CNN(**arguments.with_defaults(options, **sizes, drop_p=0.0))


def cnn_b14(**options: Any) -> CNN:
    """Study B14's CNN: `cnn_b` with 128 channels. `options`: of `CNN`."""
    return cnn_b(**arguments.with_defaults(options, channels=(128, 128)))
