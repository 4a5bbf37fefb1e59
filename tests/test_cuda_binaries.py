"""What nvcc made of the CUDA kernels: nothing in local memory, accesses of 16 bytes, registers as the launches plan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import cmake_call
import pytest

import fastlayers as fl

#: Newer than the others in what matters here: clusters. nvcc compiles the others from the same source.
ARCH = "sm_90"
REGISTERS = 65536  # of one processor


class Kernel(NamedTuple):
    """One kernel: its readable name, what it takes of a processor, and its instructions on memory."""

    name: str
    registers: int
    stack: int
    local: int
    accesses: frozenset[str]


def _folder_of_cuobjdump() -> Path:
    """Where it and nvdisasm, which it calls, are: by pip (the extra "test" asks for them), or a toolkit's."""
    folders = [str(path) for entry in sys.path for path in Path(entry).glob("nvidia/cu*/bin")]
    found = shutil.which(
        "cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    )
    if found is None:
        pytest.skip("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return Path(found).parent


def _output(*command: str | Path, folder: Path | None = None) -> str:
    env = os.environ | ({"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} if folder else {})
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def _dump(folder: Path, what: str, path: Path) -> str:
    return _output("cuobjdump", what, "-arch", ARCH, path, folder=folder)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """The kernels of the objects that were compiled for ARCH; compiles them unless they are up to date."""
    info = fl.ops.build_info()
    if not info["cuda"]:
        pytest.skip(f"no CUDA kernels were compiled: {info['why_no_cuda']}")
    if ARCH not in info["cuda"]:
        pytest.skip(f"compiled for {', '.join(info['cuda'])}, not for {ARCH}")
    tools = _folder_of_cuobjdump()
    found = defaultdict(list)
    for path in cmake_call.build("fastlayers_cuda").glob("CMakeFiles/fastlayers_cuda*.dir/**/*.cu.o"):
        found[path.name.removesuffix(".cu.o")].append(_kernels_of(tools, path))
    # One for each storage type, and what they have in common.
    assert {source: len(each) for source, each in found.items()} == {
        "dispatch": 1,
        "storage_kernels": 4,
        "storage_pooling": 4,
    }
    return [kernel for objects in found.values() for kernels in objects for kernel in kernels]


def _kernels_of(tools: Path, path: Path) -> list[Kernel]:
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(pattern, _dump(tools, "-res-usage", path))
    accesses = defaultdict(set)
    function = ""
    for line in _dump(tools, "-sass", path).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            function = found[1]
        elif found := re.search(r"\*/\s+(?:@!?U?P\w+ )?((?:LDG|STG|LDL|STL)[\w.]*)", line):
            accesses[function].add(found[1])
    names = _output("c++filt", *(name for name, *_ in usage)).splitlines()
    return [
        Kernel(readable, int(registers), int(stack), int(local), frozenset(accesses[name]))
        for readable, (name, registers, stack, local) in zip(names, usage, strict=True)
    ]


def test_all_kernels_are_there(kernels: list[Kernel]) -> None:
    """So that the tests below look at something."""
    names = " ".join(kernel.name for kernel in kernels)
    for layout in ("planes", "rows"):
        for direction in ("forward", "backward"):
            for part in ("on_chip", "sums", "apply"):
                assert f"{layout}_{direction}_{part}<" in names
    for part in ("planes_pool_forward_on_chip", "planes_pool_forward", "planes_pool_backward"):
        assert f"{part}<" in names
    for direction in ("forward", "backward"):
        assert f"rows_pool_{direction}<" in names
    for storage in ("float", "double", "fastlayers::bf16", "fastlayers::f16"):
        assert f"planes_forward_on_chip<{storage}," in names
        assert f"planes_pool_forward_on_chip<{storage}," in names


def test_nothing_is_in_local_memory(kernels: list[Kernel]) -> None:
    def is_local(access: str) -> bool:
        return access.startswith(("LDL", "STL"))

    assert [k for k in kernels if k.stack or k.local or any(map(is_local, k.accesses))] == []


def _streams(kernel: Kernel) -> bool:
    """Those that move what is full-size in groups of 8 elements."""
    pattern = (
        r"\b(planes|rows)_(forward|backward)_|dropout_groups|\brows_pool_|\bplanes_pool_(forward_on_chip|backward)"
    )
    return re.search(pattern, kernel.name) is not None


def test_streaming_kernels_load_16_bytes(kernels: list[Kernel]) -> None:
    streaming = [kernel for kernel in kernels if _streams(kernel)]
    assert len(streaming) > 50
    assert [k for k in streaming if not any(a.startswith("LDG.E.128") for a in k.accesses)] == []


def test_streaming_kernels_store_16_bytes(kernels: list[Kernel]) -> None:
    # Windows of planes are pooled, and what comes out written, one by one: it is as many times smaller.
    one_by_one = ("_sums<", "planes_pool_forward_on_chip<")
    writing = [kernel for kernel in kernels if _streams(kernel) and not any(n in kernel.name for n in one_by_one)]
    assert len(writing) > 40
    assert [k for k in writing if not any(a.startswith("STG.E.128") for a in k.accesses)] == []


def test_registers_allow_the_blocks_that_launches_plan(kernels: list[Kernel]) -> None:
    """As csrc/kernels/cuda/launch_limits.h has them: threads of a block, and blocks on a processor."""
    too_many = []
    for kernel in kernels:
        wide = "<double" in kernel.name
        if re.search(r"planes_pool_(forward|backward)<", kernel.name):
            threads = 256 * (1 if wide else 4)
        elif "planes_pool_" in kernel.name:
            threads = 256 if wide else 512 * 2
        elif "planes_" in kernel.name:
            all_activations = "(fastlayers::cuda::Activations)1" in kernel.name
            threads = (256 if wide else 512) * (1 if all_activations else 2)
        elif "rows_" in kernel.name:
            threads = 128 * (2 if wide else 3)
        else:
            threads = 256
        # A processor hands out registers in units of eight for each thread.
        if (kernel.registers + 7) // 8 * 8 * threads > REGISTERS:
            too_many.append((kernel.name, kernel.registers, threads))
    assert too_many == []
