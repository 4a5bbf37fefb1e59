"""Options of ``pytest benchmarks``: which cases, and where they run."""

from __future__ import annotations

import pytest
import torch
from fastlayers_benchmarks import cases
from fastlayers_benchmarks.contenders import contenders
from fastlayers_benchmarks.steps import CONTENDERS, step_cases


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlayers benchmarks")
    group.addoption(
        "--bench-grid", choices=cases.GRIDS, default="quick", help="cases: quick (default), default (hours), or full"
    )
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--bench-rounds", type=int, default=5, help="samples of each benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of the chosen grid with each contender that runs on the device."""
    grid: cases.Grid = metafunc.config.getoption("--bench-grid")
    if "contender" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("--bench-device"))
        pairs = [(case, c) for case in cases.grid(grid) for c in contenders(device) if c.can(case)]
        metafunc.parametrize(("case", "contender"), [pytest.param(*p, id=f"{p[0].name}-{p[1].name}") for p in pairs])
        metafunc.parametrize("phase", cases.PHASES)
    if "step_contender" in metafunc.fixturenames:
        steps = step_cases(quick=grid == "quick")
        metafunc.parametrize("step_case", steps, ids=lambda case: case.name)
        metafunc.parametrize("step_contender", CONTENDERS)


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--bench-device"))


@pytest.fixture
def rounds(pytestconfig: pytest.Config) -> int:
    value: int = pytestconfig.getoption("--bench-rounds")
    return value
