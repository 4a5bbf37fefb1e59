"""What a process holds: memory, tensors, threads and open files; and how much memory there is to be had."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, eq=False)
class Held:
    """Tensors, threads and open files of this process, each by its identity.

    Not counted: in a process in which other tests ran, what they left goes at any time, and would hide what is new.
    """

    tensors: tuple[weakref.ref[torch.Tensor], ...]
    threads: frozenset[str]
    files: frozenset[tuple[str, str]]

    @classmethod
    def now(cls) -> Held:
        """What is held after a collection of garbage."""
        gc.collect()
        tensors = tuple(weakref.ref(found) for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
        return cls(tensors, frozenset(os.listdir(_PROC / "task")), frozenset(_open_files()))

    def beyond(self, before: Held) -> dict[str, int]:
        """How many tensors, threads and files are held here that were not then; only those of which there are any."""
        known = {id(reference()) for reference in before.tensors}
        more = {
            "tensors": sum(id(reference()) not in known for reference in self.tensors if reference() is not None),
            "threads": len(self.threads - before.threads),
            "files": len(self.files - before.files),
        }
        return {name: count for name, count in more.items() if count}


def _open_files() -> Iterator[tuple[str, str]]:
    for number in os.listdir(_PROC / "fd"):
        with suppress(FileNotFoundError):  # the one by which they are listed
            yield number, os.readlink(_PROC / "fd" / number)


def growth(step: Callable[[], object], steps: int) -> tuple[int, dict[str, int]]:
    """Bytes by which `steps` steps let the process grow, and what it holds after them that it did not before.

    A tenth as many go first: caches, pools of threads and the allocator's arenas are filled once. Memory is measured
    between the two looks at what is held, since these take memory: a list of all objects, of some MiB where other tests
    ran before.
    """
    for _ in range(max(1, steps // 10)):
        step()
    before = Held.now()
    resident = resident_bytes()
    for _ in range(steps):
        step()
    gc.collect()
    grown = resident_bytes() - resident
    return grown, Held.now().beyond(before)
