"""PEP 517 build backend: setuptools', which asks for torch and for nvcc only where the user has none.

To build, the op library needs torch's headers, and pip builds in an isolated environment without
the user's torch. Naming torch in `build-system.requires` would download a second one, of gigabytes.
"""

import sys
from typing import Any

import nvcc
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from target_torch import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What a wheel build needs besides `build-system.requires`."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What an editable build needs besides `build-system.requires`."""
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()


def _requirements() -> list[str]:
    if sys.platform != "linux":
        raise SystemExit(
            f"fastlayers cannot be built on {sys.platform}. Supported are Linux on x86-64 (tested) "
            "and Linux on aarch64 (compiles, kernels of the baseline instruction set)."
        )
    torch = find_torch()
    return ([] if torch else ["torch>=2.11"]) + nvcc.requirements(torch)
