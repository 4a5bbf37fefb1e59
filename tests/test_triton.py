"""Runs test_triton_interpreted.py in processes in which Triton interprets its kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = Path(__file__).with_name("test_triton_interpreted.py")


@pytest.mark.timeout(900)  # it takes a minute; a busy machine, some
@pytest.mark.parametrize("tests", ["test_triton_every_pair_of_choices", "not test_triton_every_pair_of_choices"])
def test_triton_in_its_interpreter(tests: str) -> None:
    """All pass there, and none is left out."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("with --device cuda they run on the GPU itself")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(INTERPRETED), "-k", tests],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=INTERPRETED.parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed is not None
    assert int(passed[1]) > 50
    assert "skipped" not in process.stdout
