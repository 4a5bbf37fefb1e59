"""Whole training steps by pytest-benchmark: a group per model, a row per contender."""

from __future__ import annotations

import torch
from fastlayers_benchmarks.steps import Step, StepCase
from fastlayers_benchmarks.timing import synchronized
from pytest_benchmark.fixture import BenchmarkFixture


def test_step(
    benchmark: BenchmarkFixture, step_case: StepCase, step_contender: str, rounds: int, device: torch.device
) -> None:
    torch._dynamo.reset()
    benchmark.group = f"{step_case.name} training step"
    step = Step(step_case, step_contender, device)
    benchmark.pedantic(synchronized(step.run, device), rounds=rounds, warmup_rounds=2)
