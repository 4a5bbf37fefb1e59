"""Batches of a split in memory, in an order that depends on seed and epoch alone, however many processes share it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from fastlayers.data.splits import Batch, Split


class _EveryImageOnce(DistributedSampler[Batch]):
    """Every `num_replicas`-th index from `rank` on, in order and without the repetitions that even out the ranks."""

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # torch types a sampler as what it samples from
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def _indices(self) -> range:
        # torch types a Dataset without a length; a Split has one.
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]


def loader(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
) -> DataLoader[Batch]:
    """The batches of `split` for one of `world_size` processes, indexed in this process and on the split's device.

    Shuffled, the order depends on `seed` and on the epoch given to `loader.sampler.set_epoch` (Lightning calls it), and
    the global generator is left alone. `world_size` processes with batches of b see together, step by step, the batches
    that one process has with batches of b * world_size; where `world_size` does not divide the number of images, that
    needs `drop_last`.

    Without `drop_last`, images that do not divide evenly are treated so: shuffled, as for training, torch's
    DistributedSampler repeats up to `world_size` - 1 images, since every process must make as many steps. Unshuffled,
    as for evaluation, no image is repeated and none is left out: some processes have one image fewer.

    Args:
        split: Images and labels; they may be on a GPU.
        batch_size: Images per batch of this process.
        shuffle: Whether to permute the images anew in each epoch.
        seed: Of the permutations; the same in all processes.
        rank: Which of the processes this is, from 0.
        world_size: How many there are.
        drop_last: Whether to leave out what does not fill a batch in every process.

    Returns:
        A DataLoader of images (b, C, H, W) in uint8 and labels (b,) in int64.

    Raises:
        ValueError: No batch is full with `drop_last`, `rank` is out of range, or images that are not repeated would
            give some processes a batch more than others, which would wait for them for ever.
    """
    _check_batches(len(split), batch_size, shuffle, world_size, drop_last)
    sampler_class: type[DistributedSampler[Batch]] = DistributedSampler if shuffle or drop_last else _EveryImageOnce
    sampler = sampler_class(split, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
    return DataLoader(
        split,
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=_as_it_is,
        # DataLoader draws a seed for workers, which there are none of, in each epoch.
        generator=torch.Generator().manual_seed(seed),
    )


def _as_it_is(batch: Any) -> Any:
    """What `Split.__getitems__` returns is a batch already."""
    return batch


def _check_batches(images: int, batch_size: int, shuffle: bool, world_size: int, drop_last: bool) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if world_size < 1:
        raise ValueError(f"world_size: got {world_size}, expected at least 1")
    fewest = images // world_size
    if drop_last and fewest < batch_size:
        raise ValueError(f"batch_size: got {batch_size}, expected at most {fewest}, each process's share of {images}")
    # The first processes have one image more where there is a remainder; that must not make a batch of its own.
    if not shuffle and not drop_last and images % world_size and fewest % batch_size == 0:
        raise ValueError(
            f"batch_size: got {batch_size}, which makes {fewest // batch_size} batches of {images} images in some of "
            f"{world_size} processes and one more in others; expected one that does not divide {fewest}"
        )
