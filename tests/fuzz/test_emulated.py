"""The CUDA kernels under their emulator, from the operators down, on what hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.fuzz import calls, profiles
from tests.fuzz.problems import Problem, problems

pytestmark = pytest.mark.usefixtures("emulated_backend")


@profiles.examples(0.15)
@given(problems(most=400))
def test_cuda_kernels(problem: Problem) -> None:
    calls.check(problem, gpu=True)
    profiles.count("CUDA, emulated")


@profiles.examples(0.1)
@given(problems(most=400, pooled=True))
def test_cuda_pools(problem: Problem) -> None:
    calls.check(problem, gpu=True)
    profiles.count("CUDA with a pool, emulated")
