"""What a measurement depends on besides the code: processor, caches, memory, versions, allocator."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastlayers as fl
from fastlayers.info import installed_version

_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")

# glibc's malloc gives freed pages of large tensors back to the kernel, which then clears new ones at the next call.
# "keep" has it keep them. The variable is read when a process starts.
ALLOCATORS = {
    "default": None,
    "keep": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000",
}
ALLOCATOR_VARIABLE = "GLIBC_TUNABLES"
OTHER = "other"  # neither of them


@dataclass(frozen=True)
class CpuCaches:
    """Bytes of a core's second-level cache and of the third-level cache; `third_shared_by` processors share that.

    Zero where the system does not say.
    """

    second: int = 0
    third: int = 0
    third_shared_by: int = 0


@cache
def cpu_caches(folder: Path = _CACHE_FOLDER) -> CpuCaches:
    """The caches of the first processor, as Linux describes them in `folder`."""
    found: dict[str, tuple[int, int]] = {}
    for index in folder.glob("index*"):
        level, kind, size, shared = (
            (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            found[level] = (_bytes(size), _count(shared))
    return CpuCaches(found.get("2", (0, 0))[0], *found.get("3", (0, 0)))


def _bytes(size: str) -> int:
    """Of a size such as "1024K"."""
    number = size.rstrip("KMG")
    units: dict[str, int] = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    return int(number) * units[size[len(number) :]]


def _count(cpu_list: str) -> int:
    """How many processors a list such as "0-3,8" names."""
    spans = [span.split("-") for span in cpu_list.split(",")]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def current_allocator() -> str | None:
    """The name in ALLOCATORS of what this process was started with, or None for something else."""
    value = os.environ.get(ALLOCATOR_VARIABLE)
    return next((name for name, setting in ALLOCATORS.items() if setting == value), None)


def environment_for(allocator: str) -> dict[str, str]:
    """The environment for a process with that allocator; for OTHER, as it is."""
    if allocator == OTHER:
        return dict(os.environ)
    environment = {name: value for name, value in os.environ.items() if name != ALLOCATOR_VARIABLE}
    setting = ALLOCATORS[allocator]
    return environment if setting is None else environment | {ALLOCATOR_VARIABLE: setting}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The hardware, by which results are told to be of the same machine."""
    caches = cpu_caches()
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instruction set": fl.ops.cpu_capability(),
        "L2 per core, KiB": caches.second // 1024,
        "L3, KiB": caches.third // 1024,
        "memory, GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu L2, KiB"] = properties.L2_cache_size // 1024
        facts["gpu multiprocessors"] = properties.multi_processor_count
    return facts


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of what takes part."""
    build = fl.ops.build_info()
    facts = {
        "fastlayers": fl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": str(build["compiler"]),
        "system": f"{platform.system()} {platform.machine()}",
        "timm": installed_version("timm"),
        "triton": installed_version("triton"),
    }
    return facts | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
