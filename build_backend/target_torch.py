"""Finds the torch to build against: the one of the environment that fastlayers goes into."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path


def find_torch(path: Sequence[str] | None = None) -> Path | None:
    """The folder of the first torch package on `path`, or None.

    `path` is searched as Python searches `sys.path`. By default it is where the target environment
    looks for modules, then where this process does: an isolated build may have been given a torch
    of its own. torch is not imported.
    """
    spec = PathFinder.find_spec("torch", target_path() if path is None else path)
    return Path(spec.origin).parent if spec and spec.origin else None


def target_path() -> list[str]:
    """Where to look for torch, the target environment first."""
    # Frontends such as uv and build run this by the interpreter of an environment of their own, and the user's is the
    # next on PATH. If it is not the target after all, the binary still serves the target's torch.
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    active = [Path(folder, "python") for folder in folders if Path(folder).with_name("pyvenv.cfg").exists()]
    pythons = dict.fromkeys([Path(sys.executable), *active])
    return [entry for python in pythons for entry in _module_path(python)] + sys.path


def _module_path(python: Path) -> list[str]:
    if not python.exists():
        return []
    # -E: pip isolates a build by PYTHONPATH, so without it the interpreter sees its own packages.
    command = [str(python), "-E", "-c", "import sys; print(*sys.path, sep='\\n')"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [entry for entry in output.splitlines() if entry]
