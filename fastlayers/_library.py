"""Loads the compiled op library, or says why it does not load and which command mends that."""

import functools
import json
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from typing import Any

# Before the library: its undefined symbols are found in the libtorch that this loads.
import torch

_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def load() -> None:
    """Register `torch.ops.fastlayers`.

    Raises:
        ImportError: with both torch versions, the reason, and the command that mends it.
    """
    # By path: an import by name can find the library of another, editable fastlayers.
    loader = ExtensionFileLoader("fastlayers._C", str(_PACKAGE / "_C.abi3.so"))
    try:
        loader.create_module(ModuleSpec(loader.name, loader, origin=loader.path))
    except ImportError as error:
        raise ImportError(_explain(error)) from error


@functools.cache
def build_info() -> dict[str, Any]:
    """How the library was built: compiler, instruction sets, CUDA architectures, torch versions.

    Raises:
        FileNotFoundError: where nothing was built.
    """
    info: dict[str, Any] = json.loads((_PACKAGE / "build_info.json").read_text())
    return info


def _explain(error: ImportError) -> str:
    try:
        built = "torch {torch_built_against}, for torch >= {torch_target}, by {compiler}".format_map(build_info())
    except FileNotFoundError:
        built = "nothing: it was never built"
    return (
        "fastlayers cannot load its compiled library.\n"
        f"  reason:          {error}\n"
        f"  installed torch: {torch.__version__} ({Path(torch.__file__).parent})\n"
        f"  built against:   {built}\n"
        f"  to mend it:      {_remedy()}"
    )


def _remedy() -> str:
    if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
        return 'pip install --upgrade "torch>=2.11"'
    checkout = _PACKAGE.parent
    if (checkout / "CMakeLists.txt").exists():
        return f'cd "{checkout}" && pip install -e .'
    return "pip install --force-reinstall --no-cache-dir --no-deps fastlayers"
