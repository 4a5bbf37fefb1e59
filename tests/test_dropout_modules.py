"""fl.Dropout, Dropout1d, 2d and 3d as replacements of torch's: every input, warning and mode."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl

PAIRS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "Dropout": (fl.Dropout, nn.Dropout),
    "Dropout1d": (fl.Dropout1d, nn.Dropout1d),
    "Dropout2d": (fl.Dropout2d, nn.Dropout2d),
    "Dropout3d": (fl.Dropout3d, nn.Dropout3d),
}


def _outcome(layer: nn.Module, x: Tensor) -> tuple[object, ...]:
    """Result, gradient and warnings of one step, or the type and text of the error."""
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leaf = x.clone().requires_grad_(x.is_floating_point())
        try:
            y = layer(leaf * 1)
        except Exception as error:
            return type(error), str(error)
        gradient = torch.autograd.grad(y.sum(), leaf)[0] if x.is_floating_point() else None
    return y, gradient, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", range(7))
@pytest.mark.parametrize("name", PAIRS)
def test_every_rank(name: str, rank: int, training: bool, inplace: bool, device: torch.device) -> None:
    """Batched, unbatched, or wrong: the same results, warnings and errors, for p = 0.5 bit by bit."""
    ours, theirs = (cls(0.5, inplace).train(training) for cls in PAIRS[name])
    x = torch.randn((4, 3, 2, 3, 4, 2)[:rank], device=device)
    got, expected = _outcome(ours, x), _outcome(theirs, x)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


@pytest.mark.parametrize("name", PAIRS)
def test_module(name: str) -> None:
    """An instance of torch's class, with its attributes, text and copies."""
    ours, theirs = PAIRS[name]
    layer = ours(0.25, inplace=True)
    assert isinstance(layer, theirs)
    assert repr(layer) == repr(theirs(0.25, inplace=True))
    assert repr(ours()) == repr(theirs())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is ours
        assert repr(twin) == repr(layer)
    assert not layer.state_dict()


@pytest.mark.parametrize("name", PAIRS)
def test_inplace_writes_over_the_input(name: str, device: torch.device) -> None:
    x = torch.ones(4, 5, 6, 7, device=device)[0 if name == "Dropout1d" else slice(None)]
    y = PAIRS[name][0](0.5, inplace=True)(x)
    assert y.data_ptr() == x.data_ptr()
    assert (x == 0).any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_dropped_is_returned(name: str, training: bool) -> None:
    """As in torch, p = 0 and evaluation return the input itself, not a copy."""
    shape = (2, 3, 4) if name == "Dropout1d" else (2, 3, 4, 5)
    x = torch.randn(shape)
    layer = PAIRS[name][0](0.0 if training else 0.5).train(training)
    assert layer(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", PAIRS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """In evaluation mode and with p = 0 torch's dropouts take any dtype."""
    x = torch.ones((2, 3, 4) if name == "Dropout1d" else (2, 3, 4, 5), dtype=dtype)
    for layer in (PAIRS[name][0](0.5).eval(), PAIRS[name][0](0.0)):
        assert torch.equal(layer(x), x)
