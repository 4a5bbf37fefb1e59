"""Augmentation: what comes out for the images that go in, where its randomness comes from, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlayers.data import DataSet, Split, load_digits
from fastlayers.data.augmentation import Augmentation, Augmenter

NOTHING = Augmentation(crop_padding=0, flip=False)


@pytest.fixture(scope="module")
def colour() -> DataSet:
    images = torch.randint(1, 256, (64, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.zeros(64, dtype=torch.int64))
    return DataSet.of("colour", split, split)


def raw(data: DataSet, output: Tensor) -> Tensor:
    """The normalised `output` back as bytes."""
    return (output * data.deviation + data.mean).round().to(torch.uint8)


def crops(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop of the padded `image`, of its own size."""
    height, width = image.shape[-2:]
    padded = F.pad(image, [padding] * 4)
    places = range(2 * padding + 1)
    return [padded[:, top : top + height, left : left + width] for top in places for left in places]


def test_nothing_but_normalisation(colour: DataSet) -> None:
    output = Augmenter(NOTHING, colour)(colour.train.images)
    torch.testing.assert_close(output, colour.normalise(colour.train.images))


def test_evaluation_draws_nothing(colour: DataSet) -> None:
    augmenter = Augmenter(Augmentation(erasing_p=1.0), colour).eval()
    state = torch.get_rng_state()
    output = augmenter(colour.train.images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(output, colour.normalise(colour.train.images))


def test_crops_are_exact_with_a_place_for_each_image(colour: DataSet) -> None:
    torch.manual_seed(0)
    images = colour.train.images
    output = raw(colour, Augmenter(Augmentation(crop_padding=2, flip=False), colour)(images))
    found = [
        [place for place, crop in enumerate(crops(image, 2)) if torch.equal(crop, cropped)]
        for image, cropped in zip(images, output, strict=True)
    ]
    assert all(len(places) == 1 for places in found)
    # 64 draws from 25 places: fewer than 15 of them would be no chance.
    assert len({places[0] for places in found}) >= 15


def test_flips_mirror_about_half_of_the_images(colour: DataSet) -> None:
    torch.manual_seed(0)
    images = colour.train.images
    output = raw(colour, Augmenter(Augmentation(crop_padding=0), colour)(images))
    flipped = [torch.equal(one, image.flip(-1)) for one, image in zip(output, images, strict=True)]
    kept = [torch.equal(one, image) for one, image in zip(output, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48


def test_erasing_makes_a_rectangle_the_mean_colour(colour: DataSet) -> None:
    torch.manual_seed(0)
    erasing = Augmentation(crop_padding=0, flip=False, erasing_p=0.5)
    output = Augmenter(erasing, colour)(colour.train.images)
    plain = colour.normalise(colour.train.images)
    changed = (output != plain).any(1)
    assert not output.masked_select(changed[:, None]).any()
    sizes = set()
    for mask in changed[changed.any(-1).any(-1)]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)  # a rectangle
        assert mask.sum() <= 0.4 * mask.numel()
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert 16 < changed.any(-1).any(-1).sum() < 48
    assert len(sizes) > 5


def test_random_numbers_are_the_global_generators(colour: DataSet) -> None:
    augmenter = Augmenter(Augmentation(erasing_p=0.5), colour)
    torch.manual_seed(1)
    first, second = augmenter(colour.train.images), augmenter(colour.train.images)
    torch.manual_seed(1)
    again = copy.deepcopy(augmenter)(colour.train.images)
    assert torch.equal(again, first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("training", [True, False])
def test_output_is_float32_of_the_inputs_shape_without_gradient(training: bool, colour: DataSet) -> None:
    augmenter = Augmenter(Augmentation(erasing_p=0.5), colour).train(training)
    images = colour.train.images.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = augmenter(images)
    assert output.shape == images.shape
    assert output.dtype == torch.float32
    assert not output.requires_grad


def test_batches_of_one_and_of_none(colour: DataSet) -> None:
    augmenter = Augmenter(Augmentation(erasing_p=0.5), colour)
    for count in (0, 1):
        assert augmenter(colour.train.images[:count]).shape == (count, 3, 16, 12)


def test_input_stays_as_it_is(colour: DataSet) -> None:
    images = colour.train.images.float()
    before = images.clone()
    Augmenter(Augmentation(erasing_p=1.0), colour)(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("training", [True, False])
def test_digits_as_large_and_colourful_as_cifar10(training: bool) -> None:
    digits = load_digits(0.1)
    augmenter = Augmenter(Augmentation(erasing_p=0.5, resize=32, channels=3), digits).train(training)
    output = augmenter(digits.train.images)
    assert output.shape == (len(digits.train), 3, 32, 32)
    assert output.is_contiguous()
    if not training:
        assert torch.equal(output[:, 0], output[:, 2])
        expected = F.interpolate(digits.train.images.float(), (32, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(output[:, :1], digits.normalise(expected))


def test_nothing_is_added_to_a_checkpoint(colour: DataSet) -> None:
    augmenter = Augmenter(Augmentation(erasing_p=0.5), colour)
    assert augmenter.state_dict() == {}
    assert list(augmenter.parameters()) == []
    assert {name for name, _ in augmenter.named_buffers()} == {"mean", "deviation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_padding": -1}, "crop_padding: got -1, expected 0 or more"),
        ({"erasing_p": 1.5}, "erasing_p: got 1.5, expected from 0 to 1"),
        ({"erasing_p": float("nan")}, "erasing_p: got nan"),
        ({"resize": 0}, "resize: got 0, expected 1 or more"),
        ({"channels": 0}, "channels: got 0, expected 1 or more"),
    ],
)
def test_wrong_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_channels_of_colour_images(colour: DataSet) -> None:
    with pytest.raises(ValueError, match="channels: got 3, expected None: colour has 3, not 1"):
        Augmenter(Augmentation(channels=3), colour)
