"""The definition itself, fl.reference, against torch's own layers one after the other, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl
from tests.cases import ACTIVATIONS, SEED, Case, Sample, make_sample
from tests.oracle import eager, exact, run

# hardsigmoid: torch's gradient is 1 / 6 in float32, for float64 too.
RTOL = 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"track": False},
        {"training": False},
        {"affine": "none"},
        {"affine": "no bias"},
        {"residual": "channels_last"},
        {"drop_p": 0.3, "layout": "channels_last"},
        {"drop_p": 0.3, "drop_mode": "element"},
        {"drop_p": 1.0},
        {"pool": "5/3/2", "drop_p": 0.3},
        {"pool": "3/2/1 dilated ceil", "shape": (2, 5, 3, 4, 5), "residual": "contiguous"},
        {"pool": "2/2", "shape": (4, 5, 7), "drop_p": 0.3, "drop_mode": "element", "training": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_reference_is_torch(act: str, options: dict[str, object], device: torch.device) -> None:
    """Output, gradients, running statistics."""
    case = dataclasses.replace(Case(dtype=torch.float64, param_dtype=torch.float64, act=act), **options)  # type: ignore[arg-type]
    sample = make_sample(case, device)
    definition, composed = run(exact, sample.fresh()), run(eager, sample.fresh())
    for name, got in definition.items():
        torch.testing.assert_close(got, composed[name], rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize("drop_mode", ["channel", "element"])
@pytest.mark.parametrize("pool", [None, "2/2"])
@pytest.mark.parametrize("training", [True, False])
def test_public_reference_draws_the_mask(
    training: bool, pool: str | None, drop_mode: str, device: torch.device
) -> None:
    """fl.reference.batch_norm_act differs from what the oracle calls by the draw alone."""
    case = Case(act="silu", residual="contiguous", training=training, drop_p=0.4, drop_mode=drop_mode, pool=pool)
    sample = make_sample(case, device)

    def public(s: Sample) -> Tensor:
        torch.manual_seed(SEED)
        return fl.reference.batch_norm_act(
            s.input,
            s.running_mean,
            s.running_var,
            s.weight,
            s.bias,
            training,
            residual=s.residual,
            act="silu",
            drop_p=0.4,
            drop_mode=drop_mode,
            num_batches_tracked=s.num_batches_tracked,
            pool=case.pool_layer,
        )

    results, expected = run(public, sample.fresh()), run(exact, sample.fresh())
    for name, got in results.items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"training": True},
        {"training": True, "drop_p": 0.3, "drop_mode": "channel"},
        {"training": True, "drop_p": 0.3, "drop_mode": "element", "pool": nn.MaxPool2d(2)},
        {"training": True, "stochastic": False, "drop_p": 0.3},
        {"training": False, "stochastic": True, "drop_p": 0.3},
        {"training": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("residual", [False, True])
def test_random_slopes_are_those_of_the_layers(options: dict[str, Any], residual: bool, device: torch.device) -> None:
    """Drawn where something is drawn, before the mask."""
    generator = torch.Generator().manual_seed(SEED)
    x, other = (torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    results = []
    for functions in (fl.reference, fl.functional):
        mean, var = (value * torch.ones(3, dtype=torch.float64, device=device) for value in (0.2, 1.5))
        leaf = x.clone().requires_grad_()
        torch.manual_seed(SEED)
        y = functions.batch_norm_act(leaf, mean, var, act="rrelu", residual=other if residual else None, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf), mean, var, torch.rand(1)))
    torch.testing.assert_close(*results, rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dropout", (4, 3, 5)),
        ("dropout1d", (4, 3, 5)),
        ("dropout1d", (3, 5)),
        ("dropout2d", (4, 3, 5, 2)),
        ("dropout3d", (4, 3, 5, 2, 2)),
        ("dropout3d", (3, 5, 2, 2)),
    ],
)
@pytest.mark.parametrize("given", [(), (0.3,), (0.3, False), (0.3, True, True), (1.0,), (0.0,)], ids=str)
def test_dropouts_are_those_of_the_functions(
    name: str, shape: tuple[int, ...], given: tuple[Any, ...], device: torch.device
) -> None:
    results = []
    for functions in (fl.reference, fl.functional):
        x = torch.ones(shape, device=device)
        torch.manual_seed(SEED)
        y = getattr(functions, name)(x, *given)
        results.append((y, x, torch.rand(1)))  # the input, too: in place or not
    assert all(map(torch.equal, *results))


def test_batch_norm_is_that_of_the_function(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, device=device)
    results = []
    for functions in (fl.reference, fl.functional):
        mean, var, weight, bias = (value * torch.ones(3, dtype=torch.float64, device=device) for value in (0, 1, 2, 3))
        y = functions.batch_norm(x, mean, var, weight, bias, True, 0.3, 1e-2)
        results.append((y, mean, var))
    torch.testing.assert_close(*results, rtol=RTOL, atol=1e-9)
