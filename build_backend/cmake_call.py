"""Calls CMake on this checkout, for setup.py and for the tests that need C++ built."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nvcc
from places import ROOT, SCRATCH, alone
from target_torch import find_torch

__all__ = ["BUILD_DIR", "ROOT", "build", "install"]

# One folder for every kind of build: the kernels, which take the time, are then compiled only once.
BUILD_DIR = SCRATCH / "cmake"
# CMake looks at these, and for Python, in a new build folder only.
_COMPILER_VARIABLES = ("CC", "CFLAGS", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDA_HOME")


def build(target: str, **options: str) -> Path:
    """Configure with `options` (CMake cache entries), build `target`, return the build folder.

    From the environment come MAX_JOBS, DEBUG=1, FASTLAYERS_CUDA (auto, 0 or 1),
    TORCH_CUDA_ARCH_LIST and what CMake itself reads, such as CXX.
    Exits with a message, not a traceback, when CMake fails: CMake has printed why.
    """
    with alone():
        _configure(options)
        _run("--build", str(BUILD_DIR), "--target", target, "--parallel", str(_jobs()))
    return BUILD_DIR


def install(target: str, destination: Path) -> None:
    """Build `target` and copy its files, the install component of that name, to `destination`."""
    with alone():
        folder = build(target)
        _run("--install", str(folder), "--component", target, "--prefix", str(destination))


def _configure(options: dict[str, str]) -> None:
    stamp = BUILD_DIR / "environment.txt"
    settings = _settings()
    nvcc_by_pip = settings.get("FASTLAYERS_NVCC", "")
    # The folder, too: a checkout may have been moved or copied, and CMake's cache names the old one.
    environment = repr([str(BUILD_DIR), sysconfig.get_path("include"), *map(os.environ.get, _COMPILER_VARIABLES)])
    before, _, nvcc_before = stamp.read_text("utf-8").partition("\n") if stamp.exists() else ("", "", "")
    nvcc_is_gone = bool(nvcc_before) and not nvcc_by_pip
    if nvcc_is_gone and settings["FASTLAYERS_CUDA"] == "auto":
        # pip has removed the build's own packages. What else was compiled is as good as ever.
        settings["FASTLAYERS_CUDA"], nvcc_by_pip = "0", nvcc_before
    if before != environment or nvcc_before != nvcc_by_pip:
        shutil.rmtree(BUILD_DIR, ignore_errors=True)
    # Gone until CMake succeeds: a cache that remembers a missing compiler must not be used again.
    stamp.unlink(missing_ok=True)
    definitions = [f"-D{name}={value}" for name, value in (settings | options).items()]
    _run("-S", str(ROOT), "-B", str(BUILD_DIR), "-G", "Ninja", *definitions)
    stamp.write_text(f"{environment}\n{nvcc_by_pip}", "utf-8")


def _settings() -> dict[str, str]:
    torch = find_torch()
    if torch is None:
        raise SystemExit('fastlayers is built against torch: pip install "torch>=2.11" first')
    by_pip = None if nvcc.system_nvcc() else nvcc.installed_by_pip()
    return ({"FASTLAYERS_NVCC": str(by_pip)} if by_pip else {}) | {
        # Said each time: the cache remembers that the tests, which need pybind11, were built here.
        "FASTLAYERS_BUILD_TESTS": "OFF",
        "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG") == "1" else "Release",
        # Named at each call: pip puts ninja into a folder that is gone after the build.
        "CMAKE_MAKE_PROGRAM": _program("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "FASTLAYERS_TORCH_ROOT": str(torch),
        "FASTLAYERS_CUDA": os.environ.get("FASTLAYERS_CUDA", "auto"),
        "FASTLAYERS_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
    }


def _jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not value.isdecimal() or int(value) == 0:
        raise SystemExit(f"MAX_JOBS={value!r}: a positive number of parallel compilations is allowed")
    return int(value)


def _run(*arguments: str) -> None:
    status = subprocess.run([_program("cmake"), *arguments]).returncode
    if status != 0:
        raise SystemExit(f"fastlayers could not be built: the lines above say why (cmake ended with {status}).")


def _program(name: str) -> str:
    # The scripts folder first: a virtual environment need not be activated to be used.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"fastlayers is built with CMake and ninja; {name} is missing: pip install {name}")
    return found
