"""Runs the tests of the Triton kernels in processes in which Triton interprets these."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
#: Files, which of their tests, and how many these are at least.
PARTS = (
    ("test_triton_interpreted.py", "every_pair_of_choices", 50),
    ("test_triton_interpreted.py", "not every_pair_of_choices", 50),
    ("test_triton_pool.py", "every_pair_of_choices", 50),
    ("test_triton_pool.py", "not every_pair_of_choices", 50),
    ("fuzz/test_interpreted.py", "triton", 6),
)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One for each part of the tests, at the same time: each keeps one processor busy."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("with --device cuda they run on the GPU itself")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    started = {
        f"{file} {tests}": subprocess.Popen(
            [*command, str(FOLDER / file), "-k", tests],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=FOLDER.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for file, tests, _ in PARTS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.timeout(900)  # they take a minute; on a busy machine, some
@pytest.mark.parametrize(("file", "tests", "least"), PARTS)
def test_triton_in_its_interpreter(
    file: str, tests: str, least: int, processes: dict[str, subprocess.Popen[str]]
) -> None:
    """All pass there, and none is left out."""
    process = processes[f"{file} {tests}"]
    output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed[1]) >= least
    assert "skipped" not in output
