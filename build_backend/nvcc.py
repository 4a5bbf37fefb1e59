"""Finds nvcc: the system's, or else one that pip installs, for the CUDA that torch was built with."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

#: Together they are what nvcc needs to compile the kernels: the driver, its headers, its compiler, the runtime.
_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
#: For CUDA 12 and older NVIDIA publishes no nvcc in this form; nvidia-cuda-nvcc-cu12 holds ptxas alone.
_FIRST_MAJOR = 13
#: Where a CPU-only torch does not say: the kernels then run beside any torch whose driver knows this.
_DEFAULT_VERSION = "13.0"


def system_nvcc() -> Path | None:
    """Where CMake, too, looks for one: CUDACXX, CUDA_HOME, PATH and the usual place."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(1, f"{home}/bin/nvcc")
    return next((Path(place) for place in places if place and os.path.exists(place)), None)


def installed_by_pip(path: Sequence[str] | None = None) -> Path | None:
    """The newest nvcc among the packages on `path`, by default `sys.path`."""
    folders = sys.path if path is None else path
    found = [nvcc for folder in folders for nvcc in Path(folder or ".").glob("nvidia/cu[0-9]*/bin/nvcc")]
    return max(found, key=lambda nvcc: int(nvcc.parts[-3].removeprefix("cu")), default=None)


def cuda_of(torch: Path) -> str | None:
    """The CUDA version that the torch package in this folder was built with, such as "13.0"; None for none."""
    match = re.search(r"^cuda\b[^=]*= *['\"]([0-9.]+)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None


def requirements(torch: Path | None) -> list[str]:
    """What pip has to install so that the kernels can be compiled for the torch in this folder.

    Nothing where there is an nvcc, where none is wanted (FASTLAYERS_CUDA=0, or a torch without CUDA unless
    FASTLAYERS_CUDA=1 asks for one), and where none can be had.
    """
    wanted = os.environ.get("FASTLAYERS_CUDA", "auto")
    version = cuda_of(torch) if torch else None
    if wanted == "0" or (wanted != "1" and version is None) or system_nvcc() is not None:
        return []
    version = version or _DEFAULT_VERSION
    if int(version.partition(".")[0]) < _FIRST_MAJOR:
        return []
    # Of torch's own minor version: PTX of a newer one would not load with the driver that torch needs.
    return [f"{package}=={version}.*" for package in _PACKAGES]
