"""What a process holds: memory, tensors, threads and open files; and how much memory there is to be had."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

_PROC = Path("/proc/self")


def available_bytes() -> int:
    """Memory that the system could still give, as Linux estimates it; less where a control group allows less."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    available = int(found[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    pages = int((_PROC / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """Tensors that Python holds, after a collection of garbage."""
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


class Held(NamedTuple):
    """Tensors, Python's threads, the system's threads and open files of this process."""

    tensors: int
    python_threads: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> Held:
        """What is held after a collection of garbage."""
        threads, files = (len(os.listdir(_PROC / name)) for name in ("task", "fd"))
        return cls(live_tensors(), threading.active_count(), threads, files)


def growth(step: Callable[[], object], steps: int) -> tuple[int, Held, Held]:
    """Bytes by which `steps` steps let the process grow, and what it held before and after them.

    A tenth as many go first: caches, pools of threads and the allocator's arenas are filled once.
    """
    for _ in range(max(1, steps // 10)):
        step()
    before, resident = Held.now(), resident_bytes()
    for _ in range(steps):
        step()
    after = Held.now()
    return resident_bytes() - resident, before, after
