"""`functional.batch_norm_act` and the layers, on everything that they take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import fastlayers as fl
from tests.fuzz import calls, profiles
from tests.fuzz.problems import Problem, problems


@profiles.examples(1.5)
@given(problems())
def test_batch_norm_act(problem: Problem) -> None:
    calls.check(problem)
    profiles.count("batch_norm_act")


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
