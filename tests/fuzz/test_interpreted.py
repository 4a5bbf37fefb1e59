"""The Triton kernels in their interpreter, on what hypothesis draws; test_triton.py starts it in a process of its own.

By itself: ``TRITON_INTERPRET=1 pytest tests/fuzz/test_interpreted.py --hypothesis-profile=long``.
"""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.fuzz import calls, profiles
from tests.fuzz.problems import Problem, problems

# Skips this module where kernels are not interpreted; its fixtures, for all tests here, choose Triton and put canaries
# around what kernels are given.
from tests.test_triton_interpreted import WAYS, _guards, _triton, _use  # noqa: F401


@pytest.mark.parametrize("way", WAYS)
def test_triton_kernels(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(way, monkeypatch)
    _check()


@profiles.examples(0.1)
@given(problems(most=120))
def _check(problem: Problem) -> None:
    calls.check(problem, gpu=True)
    profiles.count("Triton, interpreted")
