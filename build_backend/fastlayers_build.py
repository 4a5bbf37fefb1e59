"""PEP 517 build backend: setuptools', which asks for torch and for nvcc only where the user has none.

To build, the op library needs torch's headers, and pip builds in an isolated environment without
the user's torch. Naming torch in `build-system.requires` would download a second one, of gigabytes.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import nvcc
import places
from setuptools import build_meta
from target_torch import find_torch

P = ParamSpec("P")
T = TypeVar("T")


def _alone(hook: Callable[P, T]) -> Callable[P, T]:
    """The hook, while no other build of this checkout is running: setuptools writes to the same files each time."""

    @functools.wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with places.alone():
            return hook(*args, **kwargs)

    return run


build_wheel = _alone(build_meta.build_wheel)
prepare_metadata_for_build_wheel = _alone(build_meta.prepare_metadata_for_build_wheel)
get_requires_for_build_sdist = _alone(build_meta.get_requires_for_build_sdist)


@_alone
def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """The source distribution, which setuptools puts together in the checkout."""
    places.must_be_in_tree("A source distribution")
    return build_meta.build_sdist(sdist_directory, config_settings)


@_alone
def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """The wheel that refers to the checkout, and the library in the checkout."""
    places.must_be_in_tree("An editable install")
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


@_alone
def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """What `build_editable` will say, where it will work."""
    places.must_be_in_tree("An editable install")
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


@_alone
def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What a wheel build needs besides `build-system.requires`."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


@_alone
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
