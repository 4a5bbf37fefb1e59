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
    return [entry for python in _interpreters() for entry in _module_path(python)] + sys.path


def _interpreters() -> list[Path]:
    """This one, and those of the environments that may be the target: `pip install` runs the build by the target's own.

    Frontends such as uv and build run it by the interpreter of an environment of their own. The user's is then the next
    on PATH, or else, where uv is to find it without being told, the folder .venv where uv was called or above. If it is
    not the target after all, the binary still serves the target's torch.
    """
    folders = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    # os.path's: a folder that this user may not look into, root's say, is none.
    active = [folder / "python" for folder in folders if os.path.exists(folder.with_name("pyvenv.cfg"))]
    called_in = Path(os.environ.get("PWD") or Path.cwd())  # the frontend itself goes to the checkout
    default = [folder / ".venv" / "bin" / "python" for folder in (called_in, *called_in.parents)]
    return list(dict.fromkeys([Path(sys.executable), *active, *default]))


def _module_path(python: Path) -> list[str]:
    """Where an interpreter looks for modules; nowhere, if it is not there or does not run."""
    # -E: pip isolates a build by PYTHONPATH, so without it the interpreter sees its own packages.
    program = r"import os, sys; sys.stdout.buffer.write(os.fsencode('\n'.join(sys.path)))"
    try:
        output = subprocess.run([str(python), "-E", "-c", program], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [entry for entry in os.fsdecode(output).split("\n") if entry]
