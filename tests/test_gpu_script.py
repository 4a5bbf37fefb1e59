"""benchmarks/gpu.sh with a python that only notes what it is asked: which steps run, resume, fail, are refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cmake_call
import pytest

SCRIPT = cmake_call.ROOT / "benchmarks" / "gpu.sh"
CASES = "case-a case-b"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a stand-in for python, which fails at what the file "failing" names, and without other tools."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
cd {tmp_path}
echo "$*" >> calls
case "$*" in
  *"import grid"*) echo {CASES} ;;
  *--json*) touch "${{@: -1}}" ;;
esac
! grep -qFf failing <<<"$*"
"""
    )
    python.chmod(0o755)
    (tmp_path / "failing").touch()
    return tmp_path


def run(folder: Path, stage: str, **env: str) -> tuple[int, str]:
    environment = os.environ | {"OUT": str(folder / "out"), "PYTHON": str(folder / "python"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([SCRIPT, stage], env=environment | env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def calls(folder: Path, what: str) -> list[str]:
    return [line for line in (folder / "calls").read_text().splitlines() if what in line]


def test_unknown_stage(folder: Path) -> None:
    assert run(folder, "play") == (1, "usage: benchmarks/gpu.sh test|sanitize|bench|profile\n")


def test_tests_that_take_a_device_run_once(folder: Path) -> None:
    status, output = run(folder, "test")
    assert status == 0, output
    assert "test_matrix: passed" in output
    assert "test: complete" in output
    ran = calls(folder, "--device=cuda")
    assert any("tests/test_cuda_device.py" in call for call in ran)
    assert not any("test_build.py" in call or "emulat" in call for call in ran)
    assert run(folder, "test") == (0, "test: complete\n")
    assert calls(folder, "--device=cuda") == ran


def test_a_step_that_fails_is_told_and_does_not_stop_the_others(folder: Path) -> None:
    (folder / "failing").write_text("tests/test_matrix.py\n")
    status, output = run(folder, "test")
    assert status == 1
    assert "test_matrix: failed (1)" in output
    assert "test_numerics: passed" in output
    assert run(folder, "test") == (1, "test: complete\n")


def test_a_stage_without_time_goes_on_when_it_is_called_again(folder: Path) -> None:
    assert run(folder, "test", SECONDS_PER_STAGE="10") == (0, "test: not complete, run it again\n")
    assert calls(folder, "--device=cuda") == []
    assert "test: complete" in run(folder, "test")[1]


def test_each_case_is_measured_in_a_process_of_its_own(folder: Path) -> None:
    status, output = run(folder, "bench")
    assert status == 0, output
    measured = calls(folder, "--device cuda --gpu")
    assert ["--only ^case-a$" in call for call in measured] == [True, False]
    (page,) = calls(folder, "--markdown")
    assert all(f"--load {folder}/out/bench/{name}.json" in page for name in CASES.split())
    assert len(calls(folder, "--device cuda --gpu")) == 2


def test_a_gpu_that_does_not_work_ends_it(folder: Path) -> None:
    (folder / "failing").write_text("torch sees no GPU\n")
    status, output = run(folder, "bench")
    assert status == 1
    assert "the CUDA kernels would not run" in output


def test_tools_that_are_missing_are_refusals(folder: Path) -> None:
    assert run(folder, "sanitize") == (0, "refused: compute-sanitizer is not installed\nsanitize: complete\n")
    run(folder, "bench")
    status, output = run(folder, "profile")
    assert status == 0, output
    assert "refused: ncu is not installed" in output


@pytest.mark.parametrize(("allowed", "says"), [("1", "memcheck: passed"), ("0", "refused: ===== Error: no device")])
def test_compute_sanitizer(folder: Path, allowed: str, says: str) -> None:
    tool = folder / "compute-sanitizer"
    refusal = 'echo "===== Error: no device"; exit 1' if allowed == "0" else "exit 0"
    tool.write_text(f"#!/bin/bash\n{refusal}\n")
    tool.chmod(0o755)
    status, output = run(folder, "sanitize", PATH=f"{folder}:/usr/bin:/bin")
    assert status == 0, output
    assert says in output
