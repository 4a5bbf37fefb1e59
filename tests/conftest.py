"""Options, parameters and fixtures that all tests share."""

from __future__ import annotations

import errno
import importlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cmake_call
import pytest
import torch

import fastlayers as fl
from tests.emulated import Emulation
from tests.fuzz import profiles

CAPABILITIES = ("avx512", "avx2", "baseline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that take one: cpu (default) or cuda")
    parser.addoption(
        "--sanitizer",
        choices=("address", "thread"),
        help="of .ci/sanitize, which has compiled the emulated CUDA kernels with it",
    )


@pytest.hookimpl(trylast=True)  # so that the instruction sets take turns on the same sample
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `capability` run once per instruction set of the CPU kernels; on other devices, once."""
    if "capability" in metafunc.fixturenames:
        on_cpu = metafunc.config.getoption("--device") == "cpu"
        metafunc.parametrize("capability", CAPABILITIES if on_cpu else ("",), indirect=True)


profiles.register()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many examples of tests/fuzz were judged."""
    if profiles.judged:
        each = ", ".join(f"{name} {count}" for name, count in sorted(profiles.judged.items()))
        terminalreporter.write_line(f"fuzzed: {profiles.judged.total()} examples ({each})")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Has the CPU kernels of one instruction set serve the test."""
    name: str = request.param
    if not name:
        yield name
        return
    previous = fl.ops.cpu_capability()
    try:
        fl.ops.set_cpu_capability(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield name
    fl.ops.set_cpu_capability(previous)


@pytest.fixture
def results_written_past_the_caches() -> Iterator[None]:
    """As those are that the caches cannot hold, whatever their size."""
    before = fl.ops.set_last_level_cache_bytes(0)
    yield
    fl.ops.set_last_level_cache_bytes(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tensors of moderate size, where threads wait for each other longer than they work.

    That results do not depend on the number of threads is for test_backends.py.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_fills_with_nan() -> Iterator[None]:
    """So that results that nobody wrote show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the Triton kernels serve the test, in the interpreter with canaries around all that they are given."""
    from tests import interpreted

    if device.type == "cpu":
        interpreted.put_canaries(monkeypatch)
    with interpreted.served(device):
        yield


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Has the tensors of a test take one of `tests.interpreted.WAYS`."""
    from tests import interpreted

    interpreted.use(request.param, monkeypatch)
    yield request.param
    monkeypatch.undo()
    interpreted.forget()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cpp() -> ModuleType:
    """The C++ test module, tests/cpp."""
    return _compiled("fastlayers_cpp_tests", "fastlayers_cpp_tests", "tests")


@pytest.fixture(scope="session")
def cuda_emulated(pytestconfig: pytest.Config) -> ModuleType:
    """The CUDA kernels on the CPU, tests/cuda_emulation; with a sanitizer, as .ci/sanitize has built them."""
    sanitizer = pytestconfig.getoption("--sanitizer")
    if sanitizer is None:
        return _compiled("fastlayers_cuda_emulated", "fastlayers_cuda_emulated", "fastlayers_cuda_emulated")
    return _imported("fastlayers_cuda_emulated", cmake_call.BUILD_DIR / f"fastlayers_cuda_emulated_{sanitizer}")


@pytest.fixture
def emulation(cuda_emulated: ModuleType, pytestconfig: pytest.Config) -> Emulation:
    """The CUDA kernels on the CPU, to be called on tensors."""
    return Emulation(cuda_emulated, guarded=pytestconfig.getoption("--sanitizer") != "address")


@pytest.fixture(scope="session")
def emulated_ops() -> Any:
    """The operators on CUDA tensors over the emulated kernels, tests/cuda_emulation/ops."""
    folder = _built("fastlayers_emulated_ops") / "fastlayers_emulated_ops"
    torch.ops.load_library(str(next(folder.glob("*.so"))))
    return torch.ops.fastlayers_emulated


@pytest.fixture
def emulated_backend(emulated_ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the emulated CUDA kernels serve CPU tensors, by the operators that CUDA tensors have."""
    monkeypatch.setitem(fl.backends._OP_SETS, "emulated", emulated_ops)
    monkeypatch.setattr(fl.backends, "serving", lambda input: "emulated")


def _built(target: str) -> Path:
    """The build folder, with `target` in it up to date."""
    try:
        return cmake_call.build(target, FASTLAYERS_BUILD_TESTS="ON")
    except SystemExit as error:
        pytest.fail(f"{target} could not be built: {error}")


def _compiled(target: str, module: str, subfolder: str) -> ModuleType:
    """A Python module that CMake builds as `target`, unless it is up to date, into a folder of the build folder."""
    return _imported(module, _built(target) / subfolder)


def _imported(module: str, folder: Path) -> ModuleType:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """After so many more files that are written whole, a disk has no room: half of a file is there, then an error."""

    def fill(files: int) -> None:
        left = [files]

        def sync(descriptor: int) -> None:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                left[0] -= 1
                if left[0] < 0:
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", sync)

    return fill


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
