"""`functional.batch_norm_act` and the layers, on everything that they take."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlayers as fl
from tests.fuzz import calls, profiles
from tests.fuzz.problems import IDENTITY, Problem, Tensors, problems


@profiles.examples(1.5)
@given(problems())
def test_batch_norm_act(problem: Problem) -> None:
    calls.check(problem)
    profiles.count("batch_norm_act")


def _plain(p: Problem) -> Problem:
    """The part of a call that `functional.batch_norm` has arguments for."""
    momentum = 0.1 if p.momentum is None else p.momentum
    return dataclasses.replace(p, residual=None, act=IDENTITY, drop_p=0.0, batches=None, momentum=momentum)


def _by_batch_norm(t: Tensors) -> Tensor:
    p = t.problem
    return fl.functional.batch_norm(
        t.input, t.running_mean, t.running_var, t.weight, t.bias, p.training, p.momentum, p.eps
    )


@profiles.examples(0.3)
@given(problems().map(_plain), st.sampled_from(("auto", "cpp")))
def test_batch_norm(problem: Problem, backend: str) -> None:
    with fl.use_backend(backend):
        calls.check(problem, _by_batch_norm, kernels=backend == "cpp")
    profiles.count("batch_norm")


@profiles.examples(0.1)
@given(problems(most=100_000))
def test_larger_tensors(problem: Problem) -> None:
    """Which several threads and blocks share."""
    calls.check(problem)
    profiles.count("batch_norm_act, larger")


@profiles.examples(0.5)
@given(problems(most=1500, pooled=True))
def test_pools(problem: Problem) -> None:
    """Behind everything else, with and without a kernel of its own."""
    calls.check(problem)
    profiles.count("batch_norm_act with a pool")


@profiles.examples(0.1)
@given(problems(most=50_000, pooled=True))
def test_larger_pools(problem: Problem) -> None:
    calls.check(problem)
    profiles.count("batch_norm_act with a pool, larger")


@profiles.examples(0.7)
@given(
    (problems() | problems(pooled=True)).filter(calls.fits_a_layer),
    st.sampled_from(list(calls.REWRITES)),
    st.sampled_from(("auto", "cpp")),
)
def test_layers(problem: Problem, rewrite: str, backend: str) -> None:
    """By default small tensors go to torch's own kernels."""
    with fl.use_backend(backend):
        calls.check(problem, calls.by_layer(rewrite), kernels=backend == "cpp")
    profiles.count("layers")
