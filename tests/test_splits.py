"""Splits and their loaders: the same batches however many processes share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from fastlayers.data import Split, loader

Batch = tuple[Tensor, Tensor]


def numbered(count: int) -> Split:
    """A split whose labels are its indices, and whose images hold them too."""
    labels = torch.arange(count)
    return Split((labels % 256).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous(), labels)


def labels_of(batches: DataLoader[Batch], epoch: int = 0) -> list[list[int]]:
    """Per batch, the labels; Lightning too sets the epoch so."""
    cast(DistributedSampler[Batch], batches.sampler).set_epoch(epoch)
    return [labels.tolist() for _, labels in batches]


def together(split: Split, batch_size: int, world_size: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    """Per step, what all processes see, sorted."""
    ranks = range(world_size)
    loaders = [loader(split, batch_size // world_size, rank=rank, world_size=world_size, **options) for rank in ranks]
    assert len({len(batches) for batches in loaders}) == 1
    steps = zip(*(labels_of(batches, epoch) for batches in loaders), strict=True)
    return [sorted(flat(step)) for step in steps]


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [label for batch in batches for label in batch]


def test_batch_holds_images_and_labels_of_the_same_index() -> None:
    for images, labels in loader(numbered(50), 20, shuffle=True, seed=3):
        assert images.shape == (len(labels), 3, 2, 2)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_one_image_is_indexed_with_its_label() -> None:
    image, label = numbered(50)[7]
    assert (image.shape, label.shape) == ((3, 2, 2), ())
    assert (image == 7).all()
    assert label == 7


def test_batch_is_indexed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Split, "__getitem__", lambda *_: pytest.fail("asked for a single image"))
    assert flat(labels_of(loader(numbered(10), 4, shuffle=False, seed=0))) == list(range(10))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(("count", "drop_last"), [(120, False), (96, False), (120, True), (125, True), (119, True)])
def test_processes_see_together_the_batches_of_one(world_size: int, count: int, drop_last: bool) -> None:
    split = numbered(count)
    for epoch in (0, 1, 5):
        alone = together(split, 36, 1, epoch, shuffle=True, seed=7, drop_last=drop_last)
        assert together(split, 36, world_size, epoch, shuffle=True, seed=7, drop_last=drop_last) == alone


def test_order_depends_on_seed_and_epoch_alone() -> None:
    split = numbered(100)
    batches = loader(split, 10, shuffle=True, seed=1)
    epochs = [labels_of(batches, epoch) for epoch in range(4)]
    assert len({tuple(flat(epoch)) for epoch in epochs}) == 4
    assert all(sorted(flat(epoch)) == list(range(100)) for epoch in epochs)
    torch.manual_seed(99)
    resumed = loader(split, 10, shuffle=True, seed=1)
    assert labels_of(resumed, 3) == epochs[3]
    assert labels_of(loader(split, 10, shuffle=True, seed=2)) != epochs[0]


def test_loading_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    labels_of(loader(numbered(100), 10, shuffle=True, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [120, 121, 122, 359])
def test_evaluation_sees_every_image_once(world_size: int, count: int) -> None:
    ranks = range(world_size)
    loaders = [loader(numbered(count), 25, shuffle=False, seed=0, rank=r, world_size=world_size) for r in ranks]
    seen = [labels_of(batches) for batches in loaders]
    assert sorted(flat([flat(batches) for batches in seen])) == list(range(count))
    assert len({len(batches) for batches in seen}) == 1
    assert [len(batches) for batches in loaders] == [len(batches) for batches in seen]


def test_training_evens_out_by_repeating() -> None:
    seen = flat(together(numbered(10), 6, 3, shuffle=True, seed=0))
    assert len(seen) == 12
    assert set(seen) == set(range(10))


def test_evaluation_with_a_batch_too_many_in_some_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size: got 10, .* 2 batches of 41 images .* does not divide 20"):
        loader(numbered(41), 10, shuffle=False, seed=0, world_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"world_size": 0}, "world_size: got 0, expected at least 1"),
        ({"batch_size": 11, "drop_last": True}, "batch_size: got 11, expected at most 10"),
        ({"batch_size": 6, "drop_last": True, "world_size": 2}, "batch_size: got 6, expected at most 5"),
        ({"rank": 2, "world_size": 2}, "rank"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(numbered(10), **{"batch_size": 2, "shuffle": True, "seed": 0, **options})


def test_split_off_is_a_partition_that_depends_on_the_seed_alone() -> None:
    split = numbered(500)
    rest, off = split.split_off(100, seed=4)
    assert (len(rest), len(off)) == (400, 100)
    assert sorted(rest.labels.tolist() + off.labels.tolist()) == list(range(500))
    assert torch.equal(off.images[:, 0, 0, 0].long(), off.labels % 256)
    torch.manual_seed(1)
    again, other = split.split_off(100, seed=4)[1], split.split_off(100, seed=5)[1]
    assert torch.equal(again.labels, off.labels)
    assert not torch.equal(other.labels, off.labels)
    # As documented.
    order = torch.randperm(500, generator=torch.Generator().manual_seed(4))
    assert torch.equal(off.labels, order[-100:])


@pytest.mark.parametrize("count", [0, -1, 10, 11])
def test_split_off_must_leave_and_take_something(count: int) -> None:
    with pytest.raises(ValueError, match=f"count: got {count}, expected from 1 to 9 of 10"):
        numbered(10).split_off(count)


def test_split_moves_to_a_device() -> None:
    moved = numbered(4).to("meta")
    assert moved.images.is_meta
    assert moved.labels.is_meta
    assert moved.__getitems__([1, 2])[0].is_meta


def test_split_needs_a_label_per_image() -> None:
    with pytest.raises(ValueError, match="labels: got 3, expected one for each of the 2 images"):
        Split(torch.zeros(2, 1, 1, 1), torch.zeros(3))
