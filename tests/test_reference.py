"""The definition itself, fl.reference, against torch's own layers one after the other, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

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
