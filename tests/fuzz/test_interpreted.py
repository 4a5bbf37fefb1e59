"""The Triton kernels in their interpreter, on what hypothesis draws; test_triton.py starts it in a process of its own.

By itself: ``TRITON_INTERPRET=1 pytest tests/fuzz/test_interpreted.py --hypothesis-profile=long``.
"""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.fuzz import calls, profiles
from tests.fuzz.problems import Problem, problems
from tests.interpreted import every_way

pytestmark = [pytest.mark.usefixtures("triton_kernels"), every_way]


@profiles.examples(0.1)
@given(problems(most=120))
def test_triton_kernels(way: str, problem: Problem) -> None:
    calls.check(problem, gpu=True)
    profiles.count("Triton, interpreted")


@profiles.examples(0.05)
@given(problems(most=120, pooled=True))
def test_triton_pools(way: str, problem: Problem) -> None:
    calls.check(problem, gpu=True)
    profiles.count("Triton with a pool, interpreted")
