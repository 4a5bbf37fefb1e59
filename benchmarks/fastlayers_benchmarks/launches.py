"""What a call of the Triton kernels costs in Python: `python -m fastlayers_benchmarks.launches`.

It needs no GPU: `NoGpu` stands for one, for which Triton compiles, and launches nothing. So the times hold all of
Python and allocations (on the CPU), but neither Triton's last step in C, which hands arguments to the CUDA driver, nor
the driver's own time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastlayers as fl
from fastlayers import autograd
from fastlayers.activations import resolve
from fastlayers.triton import launches

H200 = GPUTarget("cuda", 90, 32)
SHAPE = (2, 16, 8, 8)
CALLS, ROUNDS = 50, 60


class _Launcher:
    """Notes what it is to launch."""

    def __init__(self, source: object, metadata: object) -> None:
        del source, metadata

    def __call__(self, *arguments: object) -> None:
        if NoGpu.launched is not None:
            NoGpu.launched.append(arguments)


class _Utilities:
    def load_binary(self, name: str, binary: bytes, *rest: object) -> tuple[int, ...]:
        function = hash(binary)  # launches tell by it what they launch
        return (1, function, 32, 0, 1024)

    def unload_module(self, module: int) -> None:
        """Triton 3.9 asks for it."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class NoGpu:
    """A driver of Triton's that says which GPU it is for, and launches nothing.

    Attributes:
        launched: the arguments of launches, where they are to be noted.
    """

    utils = _Utilities()
    launcher_cls = _Launcher
    launched: ClassVar[list[tuple[Any, ...]] | None] = None

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> str:
        """Kernels are kept per device."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        """There is one."""
        return 0

    def get_device_interface(self) -> Any:
        """What torch offers for it."""
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def microseconds(contenders: dict[str, tuple[Callable[[], object], Callable[[], Any]]]) -> dict[str, float]:
    """The median time of a call of each contender, in its context; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (call, context) in contenders.items():
            with context():
                call()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def _training_step(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    x, grad_output = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    return lambda: torch.autograd.backward(layer(x), grad_output)


def _fused(module: fl.BatchNormAct2d) -> Callable[[Tensor], Tensor]:
    """The layer's own call of the operators, as for a tensor on a GPU."""
    call = autograd.Call(
        training=True, momentum=0.1, eps=1e-5, activation=resolve("relu"), drop_p=0.5, backend="triton"
    )

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            mask = x.new_empty(x.shape[:2]).bernoulli_(0.5)
        return autograd.batch_norm_act(
            x, module.weight, module.bias, None, mask, module.running_mean, module.running_var,
            module.num_batches_tracked, call,
        )  # fmt: skip

    return run


def main() -> None:
    """Prints the table of docs/triton.md."""
    torch.set_num_threads(1)
    fl.backends._problem("triton", "cpu", None)  # imports the operators
    fused = _training_step(_fused(fl.BatchNormAct2d(SHAPE[1])))
    eager = _training_step(nn.Sequential(nn.BatchNorm2d(SHAPE[1]), nn.ReLU(), nn.Dropout2d(0.5)))
    contenders: dict[str, tuple[Callable[[], object], Callable[[], Any]]] = {
        "torch's BatchNorm2d, ReLU, Dropout2d, with their CPU kernels": (eager, contextlib.nullcontext),
        "Triton backend, what is compiled looked up and launched": (fused, contextlib.nullcontext),
        "Triton backend, by Triton's own way": (fused, lambda: patch.object(launches, "_IS_KNOWN", False)),
        "Triton backend, without launches": (fused, lambda: patch.object(launches, "launch", lambda *_: None)),
    }
    with patch.object(driver, "_active", NoGpu(H200)):
        fused()
        found = microseconds(contenders)
    print(f"microseconds for forward and backward at {SHAPE}, torch {torch.__version__}, one thread")
    for name, value in found.items():
        print(f"{value:7.1f}  {name}")


if __name__ == "__main__":
    main()
