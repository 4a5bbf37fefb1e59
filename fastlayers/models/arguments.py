"""Checks of the networks' arguments. Every error names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlayers import checks


def with_defaults(options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """`options` and, where they leave one out, `defaults`."""
    return defaults | options


def whole(name: str, value: object, least: int = 1) -> int:
    """`value` itself, if it is an integer of at least `least`; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: should be an integer of at least {least}, but got {value!r}")
    return value


def wholes(name: str, values: object) -> tuple[int, ...]:
    """A positive integer, or several, as a tuple; ValueError for anything else, and for none."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        if not values:
            raise ValueError(f"{name}: should be one positive integer or more, but got {values!r}")
        return tuple(whole(f"{name}[{i}]", value) for i, value in enumerate(values))
    return (whole(name, values),)


def per_block(name: str, values: object, blocks: int, least: int = 1) -> tuple[int, ...]:
    """One integer for all blocks, or one for each, as a tuple with one for each."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return (whole(name, values, least),) * blocks
    if len(values) != blocks:
        raise ValueError(f"{name}: should be one integer or {blocks}, one for each block, but got {values!r}")
    return tuple(whole(f"{name}[{i}]", value, least) for i, value in enumerate(values))


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError for a `value` that is not `allowed`."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: should be one of {', '.join(map(repr, allowed))}, but got {value!r}")


def probability(name: str, value: float) -> None:
    """Raises ValueError for a `value` outside [0, 1]."""
    try:
        checks.dropout_probability(value, name)
    except (TypeError, RuntimeError) as error:  # what torch raises for other types, and for NaN
        raise ValueError(str(error)) from None


def image_size(value: object) -> tuple[int, int]:
    """Height and width, of one number for both or of two."""
    height, width = (
        per_block("image_size", value, 2) if isinstance(value, Sequence) else (whole("image_size", value),) * 2
    )
    return height, width


@torch.fx.wrap  # torch.fx, which cannot follow a condition on sizes, then has one node for it
def input_shape(input: Tensor, expected: tuple[int, ...]) -> Tensor:
    """`input`, if it is (N, *expected); raises ValueError otherwise."""
    if tuple(input.shape[1:]) != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"input: should be of shape (N, {sizes}), but got {tuple(input.shape)}")
    return input
