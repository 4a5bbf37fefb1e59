"""Images and labels in memory: one split of a data set, and the pair to train and to test on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]
"""Images of shape (N, C, H, W) and their labels of shape (N,)."""


@dataclass(frozen=True, eq=False)
class Split(Dataset[Batch]):
    """Images of shape (N, C, H, W) in uint8 and their labels of shape (N,) in int64.

    Raises ValueError where there are not as many labels as images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"labels: got {len(self.labels)}, expected one for each of the {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """One image of shape (C, H, W) and its label of shape ()."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images and labels at `indices`, by one indexing; torch's DataLoader calls this once per batch."""
        chosen = torch.tensor(indices, dtype=torch.int64, device=self.labels.device)
        return self.images[chosen], self.labels[chosen]

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def first(self, fraction: float) -> Split:
        """The leading part of the split: `fraction`, over 0 and up to 1, of its images, at least one."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: got {fraction}, expected over 0 and up to 1")
        count = max(1, round(len(self) * fraction))
        return Split(self.images[:count], self.labels[:count])

    def split_off(self, count: int, seed: int = 0) -> tuple[Split, Split]:
        """The split without `count` images chosen at random, and a split of these, as for validation.

        The split's indices are permuted by `torch.randperm` from a CPU generator seeded with `seed`; the last
        `count` of them are split off. The choice depends on the split's length and `seed` alone: not on the
        device, the global generator or earlier calls.

        Raises ValueError where `count` leaves nothing or takes nothing.
        """
        if not 0 < count < len(self):
            raise ValueError(f"count: got {count}, expected from 1 to {len(self) - 1} of {len(self)} images")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return Split(*self.__getitems__(order[:-count])), Split(*self.__getitems__(order[-count:]))


@dataclass(frozen=True)
class DataSet:
    """A training and a test split, with the training pixels' mean and deviation per channel."""

    name: str
    train: Split
    test: Split
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, name: str, train: Split, test: Split, fraction: float = 1.0) -> DataSet:
        """The leading `fraction` of both splits. Measures the normalisation, of shape (C, 1, 1), on that of `train`."""
        train, test = train.first(fraction), test.first(fraction)
        # One channel at a time: all of CIFAR-10 in float32 is 600 MB.
        measured = [torch.std_mean(channel.float()) for channel in train.images.unbind(1)]
        deviation, mean = (torch.stack(values)[:, None, None] for values in zip(*measured, strict=True))
        return cls(name, train, test, mean, deviation)

    def normalise(self, images: Tensor) -> Tensor:
        """`images` as float32 with zero mean and unit deviation per channel."""
        return (images.float() - self.mean) / self.deviation
