"""Max-pools as the layers are given them: how they are read, their sizes and positions beside torch's, and errors."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlayers import checks, pooling
from fastlayers.pooling import Pool
from tests.cases import POOLS, pool_layer

LAYERS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def _resolved(pool: Any, dims: int) -> Pool:
    resolved = pooling.resolve(pool, dims)
    assert resolved is not None
    return resolved


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("name", POOLS)
def test_layers_and_their_arguments_mean_the_same(name: str, dims: int) -> None:
    layer = pool_layer(name, dims)
    pool = _resolved(layer, dims)
    x = torch.randn(2, 3, *(18, 17, 19)[:dims])
    assert torch.equal(pool.apply(x), layer(x))
    arguments = {key: getattr(layer, key) for key in pooling.KEYWORDS}
    assert pooling.resolve(arguments, dims) == pool
    assert pooling.resolve(pool, dims) is pool
    assert pooling.dims_of(layer) == pooling.dims_of(pool) == dims
    assert pool.output_size(x.shape[2:]) == layer(x).shape[2:]


def test_defaults_are_torchs() -> None:
    assert _resolved({"kernel_size": 3}, 2) == _resolved(nn.MaxPool2d(3), 2)
    assert _resolved({"kernel_size": (3, 2), "stride": None}, 2) == Pool((3, 2), (3, 2), (0, 0), (1, 1))
    assert _resolved({"kernel_size": [3], "stride": [], "padding": [1]}, 2) == Pool((3, 3), (3, 3), (1, 1), (1, 1))
    assert pooling.resolve(None, 2) is None


def test_what_the_operators_are_told() -> None:
    assert _resolved(nn.MaxPool2d((5, 4), (3, 2), (2, 1), (1, 6)), 2).window == (5, 4, 3, 2, 2, 1, 1, 6)
    assert _resolved(nn.MaxPool1d(5, 3, 2, 4), 1).window == (1, 5, 1, 3, 0, 2, 1, 4)
    for name, dims in itertools.product(POOLS, (1, 2)):
        pool = _resolved(pool_layer(name, dims), dims)
        assert Pool.of_window(pool.window, pool.ceil_mode, dims) == pool


@pytest.mark.parametrize(
    ("layer", "fusible"),
    [
        (nn.MaxPool1d(256), True),
        (nn.MaxPool1d(257), False),
        (nn.MaxPool2d(16), True),
        (nn.MaxPool2d((16, 17)), False),
        (nn.MaxPool3d(2), False),
    ],
    ids=str,
)
def test_what_is_fused(layer: Any, fusible: bool) -> None:
    assert _resolved(layer, pooling.dims_of(layer)).is_fusible == fusible


def test_copies_and_descriptions() -> None:
    for name in POOLS:
        pool = _resolved(pool_layer(name, 2), 2)
        again = pickle.loads(pickle.dumps(pool))
        assert again == pool
        assert hash(again) == hash(pool)
        assert (again.window, again.is_fusible) == (pool.window, pool.is_fusible)
    assert str(_resolved(nn.MaxPool2d(5, (3, 2), 2), 2)) == (
        "MaxPool2d(kernel_size=5, stride=(3, 2), padding=2, dilation=1, ceil_mode=False)"
    )


GRID = [
    dict(zip(pooling.KEYWORDS, numbers, strict=True))
    for numbers in itertools.product((1, 2, 3, 5), (1, 2, 3, 7), (0, 1, 2), (1, 2, 3, 6), (False, True))
    if 2 * numbers[2] <= numbers[0]
]


@pytest.mark.parametrize("size", range(1, 12))
def test_sizes_and_refusals(size: int) -> None:
    """Those of torch, over all parameters; and refused, besides what torch refuses, is a window without elements."""
    input = torch.zeros(1, 1, size, size)
    for arguments in GRID:
        pool = _resolved(arguments, 2)
        pooled = _pooled_or_refused(pool, input)
        if isinstance(pooled, str):
            assert min(pool.output_size((size, size))) < 1
            with pytest.raises(RuntimeError, match=re.escape(pooled)):
                checks.pool(pool, input)
            continue
        assert pool.output_size((size, size)) == pooled.shape[2:], arguments
        if all(_elements(arguments, size, window) for window in range(pooled.shape[2])):
            checks.pool(pool, input)
        else:
            with pytest.raises(ValueError, match="windows without a single element"):
                checks.pool(pool, input)


def _pooled_or_refused(pool: Pool, input: Tensor) -> Tensor | str:
    try:
        return pool.apply(input)
    except RuntimeError as error:
        return str(error)


def _elements(arguments: Mapping[str, Any], size: int, window: int) -> list[int]:
    start = window * arguments["stride"] - arguments["padding"]
    places = [start + k * arguments["dilation"] for k in range(arguments["kernel_size"])]
    return [place for place in places if 0 <= place < size]


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name", POOLS)
def test_indices_of_positions(name: str, dims: int) -> None:
    """What torch returns as indices, and what is there."""
    layer, x = pool_layer(name, dims), torch.randn(2, 3, *(19, 18)[:dims])
    layer.return_indices = True
    values, expected = layer(x)
    layer.return_indices = False
    pool = _resolved(layer, dims)
    indices = pooling.indices(pool, _positions(pool, x, values), x.shape[2:])
    assert torch.equal(indices, expected)
    assert torch.equal(pooling.take(x, indices), values)


def _positions(pool: Pool, x: Tensor, values: Tensor) -> Tensor:
    """Of each window, which element has the value; one after the other."""
    positions = torch.full(values.shape, 255, dtype=torch.uint8)
    for place in itertools.product(*map(range, values.shape)):
        for number, offsets in enumerate(itertools.product(*map(range, pool.kernel_size))):
            at = [
                o * stride - padding + k * dilation
                for o, k, stride, padding, dilation in zip(
                    place[2:], offsets, pool.stride, pool.padding, pool.dilation, strict=True
                )
            ]
            inside = all(0 <= a < size for a, size in zip(at, x.shape[2:], strict=True))
            if inside and x[(*place[:2], *at)] == values[place]:
                positions[place] = number
    return positions


class _OwnPool(nn.MaxPool2d):
    """Its forward could be any function."""


WRONG: list[tuple[Any, int, type[Exception], tuple[str, ...]]] = [
    (nn.MaxPool2d(2), 1, ValueError, ("MaxPool2d", "2 spatial dimensions, not 1")),
    (nn.MaxPool1d(2), 2, ValueError, ("MaxPool1d", "1 spatial dimensions, not 2")),
    (nn.MaxPool1d(2), 0, ValueError, ("MaxPool1d", "1, 2 or 3", "not 0")),
    ({"kernel_size": 2}, 4, ValueError, ("1, 2 or 3", "not 4")),
    (nn.MaxPool2d(2, return_indices=True), 2, ValueError, ("return_indices=True", "allowed: False")),
    (_OwnPool(2), 2, TypeError, ("_OwnPool", "nn.MaxPool2d")),
    (nn.AvgPool2d(2), 2, TypeError, ("AvgPool2d", "nn.MaxPool2d")),
    (nn.AdaptiveMaxPool2d(2), 2, TypeError, ("AdaptiveMaxPool2d", "nn.MaxPool2d")),
    (nn.MaxPool2d, 2, TypeError, ("MaxPool2d", "mapping")),
    (2, 2, TypeError, ("2", "mapping")),
    ({"kernel": 2}, 2, ValueError, ("unknown kernel", "kernel_size, stride, padding, dilation, ceil_mode")),
    ({"stride": 2}, 2, ValueError, ("kernel_size is missing",)),
    ({"kernel_size": 0}, 2, ValueError, ("kernel_size", "at least 1", "0")),
    ({"kernel_size": (2, 2, 2)}, 2, ValueError, ("kernel_size", "one integer or 2", "(2, 2, 2)")),
    ({"kernel_size": 2.5}, 2, TypeError, ("kernel_size", "2.5")),
    ({"kernel_size": True}, 2, TypeError, ("kernel_size", "True")),
    ({"kernel_size": "2"}, 2, TypeError, ("kernel_size", "'2'")),
    ({"kernel_size": 2, "stride": 0}, 2, ValueError, ("stride", "at least 1", "0")),
    ({"kernel_size": 2, "dilation": 0}, 2, ValueError, ("dilation", "at least 1", "0")),
    ({"kernel_size": 2, "padding": -1}, 2, ValueError, ("padding", "at least 0", "-1")),
    ({"kernel_size": 3, "padding": 2}, 2, ValueError, ("pad should be", "padding=(2, 2)", "kernel_size=(3, 3)")),
]


@pytest.mark.parametrize(("pool", "dims", "kind", "says"), WRONG, ids=[f"{p} {d}" for p, d, *_ in WRONG])
def test_what_cannot_be_read(pool: Any, dims: int, kind: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(kind, match="of_mine") as caught:
        pooling.resolve(pool, dims, "of_mine")
    for word in says:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("pool", "kind", "says"),
    [
        ({"kernel_size": 2}, ValueError, "one number per dimension, 1, 2 or 3, but is 2"),
        ({"kernel_size": (1, 2, 3, 4)}, ValueError, r"but is \(1, 2, 3, 4\)"),
        (nn.AvgPool1d(2), TypeError, "AvgPool1d"),
    ],
)
def test_dimensions_that_nothing_tells(pool: Any, kind: type[Exception], says: str) -> None:
    assert pooling.dims_of({"kernel_size": (1, 2, 3)}) == 3
    with pytest.raises(kind, match=f"of_mine: .*{says}"):
        pooling.dims_of(pool, "of_mine")
