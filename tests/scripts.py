"""Python scripts in processes of their own, which import the same fastlayers as the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import fastlayers as fl

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(fl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


def start(script: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts `script`, a file of it in `folder`; its output is read by `communicate`."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=folder,
    )


def output_of(
    script: str, folder: Path, *arguments: str, meanwhile: Callable[[subprocess.Popen[str]], object] | None = None
) -> str:
    """What `script` printed; it must end well. `meanwhile` is done while it runs."""
    process = start(script, folder, *arguments)
    try:
        if meanwhile is not None:
            _do(meanwhile, process)
        printed, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, f"exit status {process.returncode}\n{printed}\n{errors}"
    return printed


def _do(meanwhile: Callable[[subprocess.Popen[str]], object], process: subprocess.Popen[str]) -> None:
    try:
        meanwhile(process)
    except Exception as error:  # of a script that ended, say
        process.kill()
        error.add_note(process.communicate()[1])
        raise
