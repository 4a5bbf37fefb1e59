"""Which implementation serves an operation: the choice, why it was made, and the switches for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("auto", "cpp", "cuda", "triton", "reference")
OPS = ("batch_norm_act", "dropout")

#: Device types that the compiled kernels serve.
CPP_DEVICES = ("cpu",)

#: Up to this many elements, torch's own layers one after the other take less time than an autograd.Function written in
#: Python around one kernel, forward and backward (docs/performance.md). Where channels are adjacent torch is faster.
SMALL_PLANES, SMALL_ROWS = 48 * 1024, 144 * 1024

_current = "auto"


class Choice(NamedTuple):
    """Which backend serves `op` on `device`, and why."""

    op: str
    device: str
    backend: str
    why: str


def get_backend() -> str:
    """The name that was last given to `set_backend`; "auto" at first."""
    return _current


def set_backend(name: str) -> None:
    """Chooses what runs the operations, for the whole process.

    Args:
        name: "auto" takes the fastest that serves the tensor's device (`explain` says which and why); "cpp" the
            compiled CPU kernels; "reference" plain PyTorch.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run on this machine at all.
    """
    global _current
    if name not in NAMES:
        raise ValueError(f"set_backend: unknown backend {name!r}; allowed: {', '.join(NAMES)}")
    if name in ("cuda", "triton"):
        raise RuntimeError(
            f"set_backend: backend {name!r} cannot run here: this version of fastlayers has no {name} kernels; "
            "allowed: auto, cpp, reference"
        )
    _current = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the duration of a ``with`` block."""
    previous = _current
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def uses_reference(input: Tensor) -> bool:
    """Whether plain PyTorch, not a compiled kernel, serves an operation on `input`.

    Raises:
        RuntimeError: the backend that was set does not serve the tensor's device.
    """
    device = input.device.type
    if _current == "auto":
        return device not in CPP_DEVICES
    if _current == "reference":
        return True
    if device not in CPP_DEVICES:
        raise RuntimeError(
            f"backend {_current!r} does not serve tensors on {input.device}; allowed: {', '.join(CPP_DEVICES)} "
            "(set_backend('auto') serves every device)"
        )
    return False


def prefers_torch(input: Tensor) -> bool:
    """Whether `input` is so small that a layer without dropout had better call torch's own kernels one by one."""
    if _current != "auto" or input.numel() > SMALL_ROWS or not input.is_cpu or torch.compiler.is_compiling():
        return False
    # Other layouts torch would not keep.
    if input.dim() == 2 or not input.is_contiguous():
        return input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    return input.numel() <= SMALL_PLANES


def explain() -> list[Choice]:
    """What the current setting chooses for each operation on each device type of this machine."""
    devices = ["cpu"] + [name for name in ("cuda", "xpu", "mps") if _is_available(name)]
    return [Choice(op, device, *_choice(device)) for op in OPS for device in devices]


def _is_available(device: str) -> bool:
    module = getattr(torch, device, None)
    return bool(module is not None and module.is_available())


def _choice(device: str) -> tuple[str, str]:
    if _current == "reference":
        return "reference", "set_backend('reference')"
    if device in CPP_DEVICES:
        small = (
            f"layers without dropout call torch's own up to {SMALL_PLANES} elements, {SMALL_ROWS} with channels last"
        )
        return "cpp", f"compiled kernels; {small}" if _current == "auto" else "set_backend('cpp')"
    if _current == "cpp":
        return "none", f"set_backend('cpp') does not serve {device}: a call raises"
    return "reference", f"this version has no compiled kernels for {device}, so plain PyTorch runs"
