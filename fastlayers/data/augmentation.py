"""What is done to a batch of images before a network sees them: normalisation, and random changes in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlayers.data.splits import DataSet


@dataclass(frozen=True)
class Augmentation:
    """What to do to images. Cropping, flipping and erasing are for training alone, the rest is always done.

    Raises ValueError where a number is out of its range.

    Args:
        crop_padding: Rows and columns of zeros (black) on each side, before a crop of the image's size is taken from a
            random place. 0 for no cropping.
        flip: Whether to mirror half of the images left to right.
        erasing_p: Share of the images in which a random rectangle becomes the mean colour: 2 to 33 % of the image, its
            sides in a ratio of 0.3 to 3.3 (Zhong et al. 2017, "Random Erasing Data Augmentation", section 3.2).
        resize: Height and width to scale the images to first, bilinearly. None for their own.
        channels: How often to repeat the channel of grey images, for networks that expect colour. None for once.
    """

    crop_padding: int = 4
    flip: bool = True
    erasing_p: float = 0.0
    resize: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding: got {self.crop_padding}, expected 0 or more")
        if not 0 <= self.erasing_p <= 1:
            raise ValueError(f"erasing_p: got {self.erasing_p}, expected from 0 to 1")
        for name, value in (("resize", self.resize), ("channels", self.channels)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more, or None")


class Augmenter(nn.Module):
    """Applies an `Augmentation` to batches of a data set's images.

    In training mode each image gets random changes of its own, drawn from torch's global CPU generator whatever the
    images' device; in eval mode nothing is drawn. There is no gradient, and nothing in the state_dict.

    Raises ValueError where images of several channels should have their channel repeated.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, augmentation: Augmentation, data: DataSet) -> None:
        super().__init__()
        channels, *size = data.train.images.shape[1:]
        if augmentation.channels is not None and channels != 1:
            raise ValueError(f"channels: got {augmentation.channels}, expected None: {data.name} has {channels}, not 1")
        self.augmentation = augmentation
        self.size = (augmentation.resize,) * 2 if augmentation.resize else cast(tuple[int, int], tuple(size))
        self.register_buffer("mean", data.mean.clone(), persistent=False)
        self.register_buffer("deviation", data.deviation.clone(), persistent=False)
        self.move = nn.Sequential()
        if augmentation.crop_padding:
            # Slices are exact, and faster than kornia's resampling.
            self.move.append(K.RandomCrop(self.size, padding=augmentation.crop_padding, cropping_mode="slice"))
        if augmentation.flip:
            self.move.append(K.RandomHorizontalFlip())
        self.erase = K.RandomErasing(p=augmentation.erasing_p) if augmentation.erasing_p else nn.Identity()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (N, C, H, W), uint8 or floats from 0 to 255, as float32 of zero mean and unit deviation.

        The shape stays, but for `resize` and `channels`.
        """
        images = images.float()
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        if self.training:
            images = self.move(images)
        # kornia's Normalize takes 20 times as long.
        images = (images - self.mean) / self.deviation
        if self.augmentation.channels:
            images = images.repeat(1, self.augmentation.channels, 1, 1)
        return self.erase(images) if self.training else images
