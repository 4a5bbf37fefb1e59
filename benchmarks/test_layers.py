"""Single layers by pytest-benchmark: a group per case and phase, a row per contender."""

from __future__ import annotations

import torch
from fastlayers_benchmarks.cases import Case, Phase, make_inputs
from fastlayers_benchmarks.contenders import Contender
from fastlayers_benchmarks.layers import Entrant
from fastlayers_benchmarks.timing import synchronized
from pytest_benchmark.fixture import BenchmarkFixture


def test_layer(
    benchmark: BenchmarkFixture, case: Case, contender: Contender, phase: Phase, rounds: int, device: torch.device
) -> None:
    torch._dynamo.reset()
    benchmark.group = f"{case.name} {phase}"
    run = Entrant(contender, contender.layer(case, device)).run(phase, make_inputs(case, device))
    with run.active():
        benchmark.pedantic(synchronized(run.call, device), setup=run.reset, rounds=rounds, warmup_rounds=2)
