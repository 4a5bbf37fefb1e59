"""`fastlayers info`: what it says, and what it says where the library does not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastlayers as fl
from fastlayers import info, plans
from fastlayers.cli import main


def test_info_shows_versions_build_and_backends() -> None:
    output = CliRunner().invoke(main, ["info"], catch_exceptions=False).output
    assert fl.__version__ in output
    assert torch.__version__ in output
    assert f"instruction set  {fl.ops.cpu_capability()}" in output
    for row in fl.backends.explain():
        assert any(all(cell in line for cell in row) for line in output.splitlines())


def test_collect_follows_the_backend_that_is_set() -> None:
    with fl.use_backend("reference"):
        facts = info.collect()
    assert facts["run time"]["backend"] == "reference"
    assert {row[2] for row in facts["backends"]} == {"reference"}


@pytest.mark.parametrize(("predicted", "says"), [(True, "MT19937 in vectors, from"), (False, "MKL")])
def test_collect_says_how_masks_are_drawn(predicted: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fl.masks, "predicts_bernoulli", lambda: predicted)
    assert says in info.collect()["run time"]["dropout masks"]


def test_collect_names_the_variable_that_lowers_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTLAYERS_CPU_CAPABILITY", "baseline")
    assert "FASTLAYERS_CPU_CAPABILITY=baseline" in info.collect()["run time"]["instruction set"]


def test_render_aligns_columns() -> None:
    facts = {
        "versions": {"torch": "2", "fastlayers": "1"},
        "build": {"isas": ["a", "b"], "cuda_archs": []},
        "backends": [("dropout", "cpu", "cpp", "fast")],
    }
    assert info.render(facts).splitlines() == [
        "versions",
        "  torch       2",
        "  fastlayers  1",
        "",
        "build",
        "  isas        a, b",
        "  cuda archs  none",
        "",
        "  op       device  backend  why",
        "  dropout  cpu     cpp      fast",
    ]


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (["128,64,32,32"], ("planes_on_chip", "planes_on_chip", "planes_pointwise")),
        (["1,3,512,512"], ("planes_split", "planes_split", "planes_pointwise")),
        (["100,1024"], ("rows_one_block", "rows_one_block", "rows_pointwise")),
        (["128,64,32,32", "--layout", "channels_last"], ("rows_split", "rows_split", "rows_pointwise")),
        (
            ["128,64,32,32", "--layout", "channels_last", "--dtype", "bfloat16"],
            ("rows_on_chip", "rows_split", "rows_pointwise"),
        ),
        (["100,256,32,32", "--pool", "5,3,2"], ("planes_on_chip", "planes_split", "planes_pointwise")),
        (["128,64,28,28", "--pool", "2", "--layout", "channels_last"], ("rows_split", "rows_split", "rows_pointwise")),
    ],
    ids=str,
)
def test_explain_says_which_kernels_run(arguments: list[str], paths: tuple[str, ...]) -> None:
    output = CliRunner().invoke(main, ["info", "--explain", *arguments], catch_exceptions=False).output
    assert [line.split()[1].rstrip(":") for line in output.splitlines()[1:]] == list(paths)


@pytest.mark.parametrize("shape", ["", "7", "2,x", "2,0,3", "2,-1"])
def test_explain_wants_a_shape(shape: str) -> None:
    result = CliRunner().invoke(main, ["info", "--explain", shape])
    assert result.exit_code == 2
    assert "128,64,32,32" in result.output


@pytest.mark.parametrize("pool", ["", "2,x", "1,2,3,4", "0", "40", "3,1,2", "17"])
def test_explain_wants_a_pool_that_kernels_take(pool: str) -> None:
    result = CliRunner().invoke(main, ["info", "--explain", "2,3,32,32", "--pool", pool])
    assert result.exit_code == 2
    assert "pool" in result.output or "window" in result.output


def test_plans_want_a_shape_and_a_layout() -> None:
    with pytest.raises(ValueError, match="two positive sizes"):
        plans.explain([3], torch.float32, "contiguous")
    with pytest.raises(ValueError, match="layout should be one of contiguous, channels_last, not 'NHWC'"):
        plans.explain([3, 4], torch.float32, "NHWC")


def test_with_a_damaged_library_it_says_how_to_mend_that(tmp_path: Path) -> None:
    package = Path(fl.__file__).parent
    copy = shutil.copytree(package, tmp_path / "fastlayers", ignore=shutil.ignore_patterns("*.so"))
    (copy / "_C.abi3.so").write_bytes(b"")
    result = subprocess.run(
        [sys.executable, "-m", "fastlayers", "info"],
        cwd=copy.parent,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "ImportError: fastlayers cannot load its compiled library" in result.stderr
    assert "pip install" in result.stderr
