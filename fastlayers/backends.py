"""Which implementation serves an operation: the choice, why it was made, and the switches for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.autograd import forward_ad

from fastlayers import masks, ops

NAMES = ("auto", "cpp", "cuda", "triton", "reference")
_F = TypeVar("_F", bound=Callable[..., Any])

OPS = ("batch_norm_act", "batch_norm_act_pool", "dropout")

#: Up to this many elements, torch's own layers one after the other take less time than an autograd.Function written in
#: Python around one kernel, forward and backward (docs/performance.md). Where channels are adjacent torch is faster.
SMALL_PLANES, SMALL_ROWS = 48 * 1024, 144 * 1024
#: The same with dropout: exact zeros are a select more, and compiled kernels draw element masks faster. Also the same
#: under torch.compile, which makes one kernel of all that it knows.
TINY = 2 * 1024

EXPORT = "torch.export"

_COMPOSED = (
    "a residual, dropped elements, RReLU in training, 3 dimensions, windows of more than 256 elements, statistics of "
    "several processes"
)

# The kernels that "auto" tries on a device, the fastest first; after them comes the reference.
_KERNELS = {"cpu": ("cpp",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}

_current = "auto"


class Choice(NamedTuple):
    """Which backend serves `op` on `device`, and why."""

    op: str
    device: str
    backend: str
    why: str


class OpSet(Protocol):
    """The operators of a backend, by the schemas of csrc/torch/schemas.h.

    What they save for their own backward (``flat_bits``, masks of bits, seeds) has a format of their own.
    """

    batch_norm_act_fwd: Any
    batch_norm_act_bwd: Any
    batch_norm_act_pool_fwd: Any
    batch_norm_act_pool_bwd: Any
    dropout: Any
    unpack_mask: Any
    element_mask: Any


_OP_SETS: dict[str, OpSet] = {"cpp": ops, "cuda": ops}


def op_set(backend: str) -> OpSet:
    """The operators of a backend that `serving` named."""
    return _OP_SETS[backend]


def get_backend() -> str:
    """The name that was last given to `set_backend`; "auto" at first."""
    return _current


def set_backend(name: str) -> None:
    """Chooses what runs the operations, for the whole process.

    Args:
        name: "auto" takes the fastest that serves the tensor's device (`explain` says which and why); "cpp" the
            compiled CPU kernels; "cuda" the compiled CUDA kernels; "triton" the Triton kernels, which serve CPU tensors
            only where TRITON_INTERPRET=1 was set from the start; "reference" plain PyTorch.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run on this machine at all.
    """
    global _current
    if name not in NAMES:
        raise ValueError(f"set_backend: unknown backend {name!r}; allowed: {', '.join(NAMES)}")
    problems = {other: _problem_here(other) for other in NAMES}
    if problems[name] is not None:
        allowed = ", ".join(other for other, problem in problems.items() if problem is None)
        raise RuntimeError(f"set_backend: backend {name!r} cannot run here: {problems[name]}; allowed: {allowed}")
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


def serving(input: Tensor, leaves_tiny: bool = True) -> str:
    """The backend that serves an operation on `input`: "cpp", "cuda", "triton", "reference" or "torch".

    The last is `unfused`, torch's own operators one after the other. It serves `observer`s, that see nothing in a
    kernel, and so decides what exported programs consist of; and, where the caller `leaves_tiny` ones to it, tiny
    tensors under torch.compile.

    Raises:
        RuntimeError: the backend that was set does not serve the tensor's device, or the observer.
    """
    device = input.device
    watching = observer()
    if watching is not None and _current != "reference":
        if _current == "auto":
            return "torch"
        if watching != EXPORT:  # a program of our operators is what was asked for
            raise RuntimeError(
                f"backend {_current!r} does not serve {watching}, which cannot look into a kernel "
                "(set_backend('auto') runs torch's own operators there)"
            )
    if _current == "auto":
        if device.type == "cpu":
            leaves = leaves_tiny and torch.compiler.is_compiling() and _is_known_to_be_tiny(input)
            return "torch" if leaves else "cpp"
        chosen: str = _automatic(device.type, device.index)
        return chosen
    if _current != "reference":
        problem = _constant_problem(_current, device.type, device.index)
        if problem is not None:
            raise RuntimeError(
                f"backend {_current!r} does not serve tensors on {device}: {problem} "
                "(set_backend('auto') serves every device)"
            )
    return _current


def observer() -> str | None:
    """What follows a computation operator by operator, and needs such that torch itself defines; None if nothing does.

    `torch.compile` is none: it takes our operators as they are, and their gradients from `autograd`.
    """
    compiling = torch.compiler.is_compiling()
    # Not is_exporting(): torch.compile of torch 2.11 takes it for true wherever it compiles.
    if compiling and torch.compiler._is_exporting_flag:
        return EXPORT
    if _are_functorch_transforms_active():
        return "the transforms of torch.func"
    if compiling:
        return None
    if _is_tracing():
        return "torch.jit.trace"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def _is_known_to_be_tiny(input: Tensor) -> bool:
    """Without a guard on sizes that are dynamic: no batch compiles anew for this."""
    # Brings the compiler and SymPy along, which take as long to import as all else; here they are there already.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(input.numel() <= TINY)


def prefers_torch(input: Tensor, drop_p: float = 0.0) -> bool:
    """Whether `input` is so small that a layer had better call torch's own kernels one by one.

    Args:
        input: on which the layer is called.
        drop_p: the probability with which it drops now.
    """
    # Compiled or traced, the answer for this size would become a part of the program.
    if _current != "auto" or torch.compiler.is_compiling() or _is_tracing() or _are_functorch_transforms_active():
        return False
    size = input.numel()
    if size > SMALL_ROWS or not input.is_cpu:
        return False
    if drop_p and not (size <= TINY and 0.0 < drop_p < 1.0 and masks.is_plain(input)):
        return False
    if input.dim() > 3 and _is_a_line(input):
        return False
    if input.is_contiguous():
        small = size <= SMALL_PLANES or input.dim() == 2
    else:  # other layouts torch would not keep
        small = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    # Where channels are adjacent, torch adds up in an order that depends on the number of threads.
    return small and not torch.are_deterministic_algorithms_enabled()


def _is_a_line(input: Tensor) -> bool:
    """Whether images are one element wide or high, which are contiguous and channels_last at once.

    Given a gradient that is one of the two, torch's backward reads it as the other, and gives wrong results.
    """
    batch, channels, *spatial = input.shape
    return 1 in spatial and input.numel() != batch * channels


def explain() -> list[Choice]:
    """What the current setting chooses for each operation on each device type of this machine."""
    return [_row(op, device) for op in OPS for device in _devices()]


def _row(op: str, device: str) -> Choice:
    backend, why = _choice(device)
    if op == "batch_norm_act_pool" and backend in ("cpp", "cuda", "triton"):
        why = f"{why}; torch pools behind {_COMPOSED}"
    return Choice(op, device, backend, why)


def _devices() -> list[str]:
    return ["cpu"] + [name for name in ("cuda", "xpu", "mps") if _is_available(name)]


def _is_available(device: str) -> bool:
    module = getattr(torch, device, None)
    return bool(module is not None and module.is_available())


def _choice(device: str) -> tuple[str, str]:
    if _current not in ("auto", "reference"):
        problem = _problem(_current, device, None)
        if problem is not None:
            return "none", f"set_backend({_current!r}) does not serve {device}, {problem}: a call raises"
    if _current != "auto":
        return _current, f"set_backend({_current!r})"
    chosen = _automatic(device, None)
    reasons = [f"no {name}: {_problem(name, device, None)}" for name in _before(chosen, device)]
    if chosen == "reference":
        return chosen, "; ".join(reasons or [f"there are no kernels for {device}"]) + "; so plain PyTorch runs"
    if chosen == "cpp":
        small = (
            f"call torch's own up to {SMALL_PLANES} elements, {SMALL_ROWS} with channels last, "
            f"{TINY} with dropout or compiled, unless torch.use_deterministic_algorithms is on"
        )
        reasons.append(f"layers {small}")
    return chosen, "; ".join([f"{'Triton' if chosen == 'triton' else 'compiled'} kernels", *reasons])


def _before(chosen: str, device: str) -> Sequence[str]:
    """What "auto" would rather have chosen."""
    names = _KERNELS.get(device, ())
    return names[: names.index(chosen)] if chosen in names else names


def _constant_when_compiled(function: _F) -> _F:
    """As `torch.compiler.assume_constant_result`, which would import the compiler, needed or not."""
    marked: Any = function  # to the checker, functions have no such attribute
    marked._dynamo_marked_constant = True
    return function


@_constant_when_compiled
def _automatic(device: str, index: int | None) -> str:
    return next((name for name in _KERNELS.get(device, ()) if _problem(name, device, index) is None), "reference")


@_constant_when_compiled
def _constant_problem(backend: str, device: str, index: int | None) -> str | None:
    return _problem(backend, device, index)


def _problem_here(backend: str) -> str | None:
    """Why `backend` serves no device of this machine; None if it serves one."""
    if backend in ("auto", "reference"):
        return None
    places: list[tuple[str, int | None]] = [("cpu", None)]
    for device in _devices():
        places += [(device, index) for index in range(getattr(torch, device).device_count())]
    problems = [_problem(backend, *place) for place in places]
    # The last is about a GPU, where there is one.
    return None if None in problems else problems[-1]


@functools.cache
def _problem(backend: str, device: str, index: int | None) -> str | None:
    """Why `backend` does not serve this device (None is the current one); None if it does."""
    if backend == "cpp":
        return None if device == "cpu" else "it serves cpu only"
    if backend == "cuda":
        return _problem_of_cuda(device, index)
    return _problem_of_triton(device, index)


def _problem_of_cuda(device: str, index: int | None) -> str | None:
    build = ops.build_info()
    if not build.get("cuda", False):
        return f"no CUDA kernels were compiled ({build['why_no_cuda']})"
    if device != "cuda":
        return "it serves cuda only"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs"
    capability = torch.cuda.get_device_capability(index)
    if not _runs_on(build["cuda_archs"], capability):
        return (
            f"CUDA kernels were compiled for {', '.join(build['cuda_archs'])}, not for a GPU of compute capability "
            f"{capability[0]}.{capability[1]}"
        )
    return None


def _runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs`, which are CMake's names of architectures, runs on a GPU of this compute capability.

    Machine code for x.y runs on x.z from z = y on; PTX, which a name without "-real" has too, on all that is later.
    Names with a letter are for one GPU ("a") or one family ("f"), of which only the exact match is taken.
    """
    for arch in archs:
        name, _, kind = arch.partition("-")
        major, minor = int(name.rstrip("af")[:-1]), int(name.rstrip("af")[-1])
        if name[-1] in "af":
            served = capability == (major, minor)
        else:
            same_major = capability[0] == major and capability[1] >= minor
            served = (kind != "virtual" and same_major) or (kind != "real" and capability >= (major, minor))
        if served:
            return True
    return False


def _problem_of_triton(device: str, index: int | None) -> str | None:
    if device not in ("cpu", "cuda", "xpu"):
        return "it serves cuda and xpu only"
    try:
        from fastlayers.triton import calls
        from fastlayers.triton import ops as triton_ops
    except ImportError as error:
        return f"Triton is not installed, or does not fit ({error})"
    _OP_SETS["triton"] = triton_ops
    if device == "cpu" and not calls.INTERPRETED:
        return "it serves CPU tensors only in its interpreter, with TRITON_INTERPRET=1 set from the start"
    if device == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < (7, 0):
            return f"Triton compiles for compute capability 7.0 and later, not {capability[0]}.{capability[1]}"
    return None
