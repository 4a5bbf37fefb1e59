"""The Triton kernels compiled ahead of time, for GPUs that are not here: no spills, and 16 bytes at a time.

What would be launched goes to Triton's own compiler, by the way that a launch takes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastlayers as fl
from fastlayers import activations
from fastlayers.pooling import Pool
from tests.cases import ACTIVATIONS

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

# Below the skips, for Triton may not be there.
from fastlayers_benchmarks.launches import H200, NoGpu  # noqa: E402  (Triton may not be there)
from triton.backends.compiler import GPUTarget  # noqa: E402  (Triton may not be there)
from triton.runtime import driver  # noqa: E402  (Triton may not be there)

from fastlayers.triton import calls, dropout, forward, launches, plans  # noqa: E402  (Triton may not be there)
from fastlayers.triton.calls import batch_norm_act_pool, copies  # noqa: E402  (Triton may not be there)

f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

MI300 = GPUTarget("hip", "gfx942", 64)
# In rows of float32 Triton 3.6 (torch 2.11) stores one register before the loop and loads it after it.
_SPILLS = {"batch_statistics": 2} if triton.__version__.startswith("3.6.") else {}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "_active", driver._active)
    yield
    copies.plan_of.cache_clear()
    batch_norm_act_pool.pool_plan_of.cache_clear()
    launches._compiled.clear()


class _Compiled(NamedTuple):
    kernel: str
    asm: dict[str, Any]
    warps: int
    elements_per_thread: int
    wide: bool


def _compile(target: GPUTarget, run: Callable[[], object], patch: pytest.MonkeyPatch) -> list[_Compiled]:
    """What `run` would launch on `target`, compiled."""
    driver.set_active(NoGpu(target))
    found = []

    def compile_only(kernel: Any, grid: plans.Grid, pointers: Any, numbers: Any, sizes: Any, constants: Any) -> None:
        compiled = kernel.warmup(
            *pointers, *numbers, *sizes, *constants, grid=(grid.blocks, grid.parts), num_warps=grid.warps
        )
        threads = grid.warps * target.warp_size
        found.append(
            _Compiled(kernel.fn.__name__, compiled.asm, grid.warps, grid.tile[0] * grid.tile[1] // threads, grid.wide)
        )

    patch.setattr(launches, "launch", compile_only)
    run()
    return found


class _Layer(NamedTuple):
    """A call of the fused operators, and of their backward."""

    shape: tuple[int, ...]
    dtype: torch.dtype = f32
    rows: bool = False
    act: str = "relu"
    dropout: str = ""
    residual: bool = False
    training: bool = True

    def run(self) -> None:
        """Runs both, on memory that nobody reads."""
        activation = activations.resolve(ACTIVATIONS[self.act])
        x = torch.empty(self.shape, dtype=self.dtype)
        if self.rows and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        channels = [torch.empty(self.shape[1]) for _ in range(4)]
        masks: dict[str, Tensor] = {
            "channel": x.new_empty(self.shape[:2]), "element": torch.empty(1, dtype=torch.int64),
        }  # fmt: skip
        mask, residual = masks.get(self.dropout), torch.empty_like(x) if self.residual else None
        bits_saved = self.saves_bits
        _, mean, invstd, bits = calls.batch_norm_act_fwd(
            x, channels[0], channels[1], residual, mask, channels[2], channels[3], torch.zeros((), dtype=torch.int64),
            self.training, 0.1, 1e-5, activation.code, activation.params, 2.0, bits_saved,
        )  # fmt: skip
        calls.batch_norm_act_bwd(
            x, x, channels[0], channels[1], None if bits_saved else residual, bits if bits_saved else None, mask, mean,
            invstd, self.training, activation.code, activation.params, 2.0, True, True, self.residual,
        )  # fmt: skip

    @property
    def saves_bits(self) -> bool:
        """Whether backward has bits instead of the residual."""
        return self.residual and activations.resolve(ACTIVATIONS[self.act]).derivatives is not None

    def full_size_accesses(self, kernel: str) -> tuple[int, int]:
        """How many tensors of full size a kernel reads and writes."""
        forward, backward = self.residual, self.residual and not self.saves_bits
        written = self.residual + 1
        return {
            "batch_statistics": (1, 0),
            "normalise": (1 + forward, 1),
            "whole_forward": (1 + forward, 1),
            "gradient_sums": (2 + backward, 0 if self.training else written),
            "input_gradient": (2 + backward, written),
            "whole_backward": (2 + backward, written),
        }.get(kernel, (0, 0))


class _PoolLayer(NamedTuple):
    """A call of the operators with max-pooling, and of their backward."""

    pool: Pool
    shape: tuple[int, ...]
    dtype: torch.dtype = f32
    rows: bool = False
    act: str = "relu"
    dropout: bool = False
    training: bool = True

    def run(self) -> None:
        """Runs both, on memory that nobody reads."""
        activation, window = activations.resolve(ACTIVATIONS[self.act]), (self.pool.window, self.pool.ceil_mode)
        x = torch.empty(self.shape, dtype=self.dtype)
        if self.rows:
            x = x.contiguous(memory_format=torch.channels_last)
        channels = [torch.empty(self.shape[1]) for _ in range(4)]
        mask = x.new_empty(self.shape[:2]) if self.dropout else None
        act = (activation.code, activation.params)
        output, mean, invstd, selected, positions = calls.batch_norm_act_pool_fwd(
            x, channels[0], channels[1], mask, channels[2], channels[3], torch.zeros((), dtype=torch.int64),
            self.training, 0.1, 1e-5, *act, activation.monotone, 2.0, *window, True,
        )  # fmt: skip
        calls.batch_norm_act_pool_bwd(
            output, x, selected, positions, channels[0], channels[1], mask, mean, invstd, self.training, *act, 2.0,
            *window, True, True,
        )  # fmt: skip

    def full_size_accesses(self, kernel: str) -> tuple[int, int]:
        """How many tensors a kernel reads and writes 16 bytes at a time; windows of planes begin anywhere."""
        return {
            "batch_statistics": (1, 0),
            "whole_pool": (1, 0),
            # A row of each window is unrolled.
            "pool": (self.pool.kernel_size[1], 2) if self.rows else (0, 0),
            "gradient_sums": (2, 0),
            "pool_gradient": (int(self.training), 1),
        }.get(kernel, (0, 0))


# Large ones, whose channels are split, in both layouts; and what one program holds.
LARGE = (128, 64, 32, 32)
LAYERS = [
    _Layer(LARGE, f32, False, "relu", "channel"),
    _Layer(LARGE, bf16, False, "gelu", "element", True),
    _Layer(LARGE, f32, True, "gelu", "element", True),
    _Layer(LARGE, bf16, True, "relu", "channel", True),
    _Layer(LARGE, bf16, True, "gelu", "element", True),
    _Layer(LARGE, f16, False, "relu", "channel", True, training=False),
    _Layer(LARGE, f32, True, "silu", training=False),
    _Layer(LARGE, f64, False, "gelu"),
    _Layer((128, 64, 14, 14), f32, False, "relu", "channel"),  # 196 places: 16 bytes, but no multiple of 16
    _Layer((64, 64, 8, 8), f32, False, "gelu", "element", True),
    _Layer((64, 64, 8, 8), bf16, False, "relu", "channel", True),
    _Layer((100, 1024), f32, True, "gelu", "element", True),
    _Layer((100, 1024), f16, True, "relu", "", True),
]
SQUARE, OVERLAPPING = (Pool((k, k), (s, s), (p, p), (1, 1)) for k, s, p in ((2, 2, 0), (5, 3, 2)))
POOL_LAYERS = [
    _PoolLayer(SQUARE, (128, 64, 28, 28), f32, False, "relu", True),
    _PoolLayer(SQUARE, (128, 64, 28, 28), bf16, True, "relu", True),
    _PoolLayer(OVERLAPPING, (100, 256, 64, 64), f32, False, "gelu", True),
    # 24 by 24 windows: planes of 22 by 22 begin in the middle of 16 bytes.
    _PoolLayer(OVERLAPPING, (100, 256, 72, 72), bf16, False, "relu", False, training=False),
    _PoolLayer(OVERLAPPING, (100, 256, 32, 32), f32, True, "relu", True),
    _PoolLayer(OVERLAPPING, (100, 256, 32, 32), f16, True, "silu", True),
    _PoolLayer(OVERLAPPING, (100, 64, 64, 64), f64, False, "relu"),
    _PoolLayer(SQUARE, (64, 64, 8, 8), f32, False, "relu", True),
    _PoolLayer(OVERLAPPING, (16, 64, 8, 8), bf16, True, "gelu", True),
]


@pytest.mark.parametrize("layer", [*LAYERS, *POOL_LAYERS], ids=str)
def test_triton_for_sm_90_moves_16_bytes_and_spills_nothing(
    layer: _Layer | _PoolLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _compile(H200, layer.run, monkeypatch)
    assert found
    for compiled in found:
        usage, accesses = _audit(compiled.asm["cubin"])
        spills = sum(count for name, count in accesses.items() if name.startswith(("LDL", "STL")))
        allowed = _SPILLS.get(compiled.kernel, 0) if layer.rows else 0
        assert usage["LOCAL"] == 0, compiled.kernel
        assert usage["STACK"] <= 4 * allowed, compiled.kernel
        assert spills <= allowed, compiled.kernel
        # Two programs of four warps at least find room for their registers on a multiprocessor's 65536.
        assert usage["REG"] * 32 * max(compiled.warps, 8) <= 65536, compiled.kernel
        reads, writes = layer.full_size_accesses(compiled.kernel)
        each = compiled.elements_per_thread * layer.dtype.itemsize // 16
        assert _wide(accesses, "LDG") >= reads * each, (compiled.kernel, accesses)
        assert _wide(accesses, "STG") >= writes * each, (compiled.kernel, accesses)


def _wide(accesses: Counter[str], kind: str) -> int:
    return sum(count for name, count in accesses.items() if name.startswith(kind) and ".128" in name)


def _audit(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Registers, stack and local memory; and how often each memory instruction stands in the machine code."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return resources, Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)[\w.]*)", code))


def _tool(name: str, *arguments: str) -> str:
    environment = os.environ | {"PATH": f"{_TOOLS}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if "(" not in act or act == "gelu(tanh)"])
def test_triton_activations_compile(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for compiled in _compile(H200, _Layer((8, 16, 4, 4), f32, False, act).run, monkeypatch):
        assert ".local" not in compiled.asm["ptx"]


@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[3], LAYERS[10], *POOL_LAYERS[:6:2]], ids=str)
def test_triton_for_gfx942_spills_nothing(layer: _Layer | _PoolLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's MI300: vector registers, and accesses of 16 bytes."""
    for compiled in _compile(MI300, layer.run, monkeypatch):
        code = compiled.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", code) == ["0"], compiled.kernel
        reads, _ = layer.full_size_accesses(compiled.kernel)
        assert not reads or re.search(r"(global|buffer)_load_dwordx4", code), compiled.kernel


def test_triton_compiles_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor beyond 2**31 elements, whose memory nobody has."""
    monkeypatch.setattr(plans, "WIDE_FROM", 2**20)
    copies.plan_of.cache_clear()
    found = _compile(H200, _Layer((128, 64, 32, 32), bf16, False, "relu", "channel", True).run, monkeypatch)
    assert {compiled.wide for compiled in found if compiled.kernel in ("batch_statistics", "normalise")} == {True}
    batch_norm_act_pool.pool_plan_of.cache_clear()
    for rows in (False, True):
        found = _compile(H200, _PoolLayer(SQUARE, (128, 64, 32, 32), bf16, rows, "relu", True).run, monkeypatch)
        assert {compiled.wide for compiled in found if compiled.kernel in ("pool", "pool_gradient")} == {True}


def test_triton_dropout_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seed = torch.empty(64, 32, 16, 16, dtype=bf16), torch.empty(1, dtype=torch.int64)

    def run() -> None:
        calls.dropout(x, x.new_empty(64, 32), 2.0)
        calls.dropout(x, torch.empty(64, 32, dtype=torch.bool), 2.0)
        calls.dropout(x, seed, 2.0)
        calls.element_mask(seed, x, 2.0)

    for compiled, reads in zip(_compile(H200, run, monkeypatch), (1, 1, 1, 0), strict=True):
        usage, accesses = _audit(compiled.asm["cubin"])
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert _wide(accesses, "LDG") >= reads * compiled.elements_per_thread // 8


class TestLaunches:
    """The short way to a launch: what Triton compiled, found again, with the arguments in Triton's order."""

    @pytest.fixture(autouse=True)
    def _records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver.set_active(NoGpu(H200))
        monkeypatch.setattr(NoGpu, "launched", [])
        launches._compiled.clear()
        if not launches._IS_KNOWN:
            pytest.skip("Triton of another version is asked to launch")
        for kernel in (forward.normalise, dropout.drop):
            # Triton, too, keeps what it compiled, per device.
            monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))

    def test_triton_would_launch_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is asked once for each kind; then the same binaries get the same arguments as by its own launches."""
        by_triton, first, second = (self._launched(known, monkeypatch) for known in (False, True, True))
        assert len(by_triton) == 2 * len(self.INPUTS)
        assert [each.rest for each in first] == [each.rest for each in by_triton] == [each.rest for each in second]
        assert [each.by_triton for each in by_triton] == [True] * len(by_triton)
        assert not any(each.by_triton for each in second)

    # Sizes of 1, of multiples of 16 and of neither; other dtypes, alignments and layouts.
    INPUTS = (
        torch.ones(16, 32, 16, 16),
        torch.ones(1, 32, 16, 16),
        torch.ones(17, 32, 48, 16),
        torch.ones(3, 32, 5, 1),
        torch.ones(3, 32, 5, 1, dtype=bf16),
        torch.ones(8193)[1:].view(1, 32, 16, 16),
        torch.ones(16, 32),
    )

    class _Launch(NamedTuple):
        by_triton: bool  # with metadata for profilers, which is made for nothing where there are none
        rest: list[object]

    def _launched(self, known: bool, monkeypatch: pytest.MonkeyPatch) -> list[_Launch]:
        monkeypatch.setattr(launches, "_IS_KNOWN", known)
        monkeypatch.setattr(NoGpu, "launched", [])
        for x in self.INPUTS:
            self._evaluate(x)
            calls.dropout(x, x.new_ones(x.shape[:2]), 2.0)
        return [
            self._Launch(metadata is not None, [self._comparable(a) for a in (*before, *after)])
            for *before, metadata, after in ((*each[:7], each[7:]) for each in NoGpu.launched or ())
        ]

    def _comparable(self, argument: object) -> object:
        if not isinstance(argument, Tensor):
            return argument
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16

    @pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
    def test_triton_itself_launches_for_profilers(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which are told what is launched."""
        hook = getattr(triton.knobs.runtime, name)
        monkeypatch.setattr(hook, "calls", [print])
        for _ in range(2):
            self._evaluate(torch.ones(16, 32, 16, 16))
        assert [arguments[6] is None for arguments in NoGpu.launched or ()] == [False, False]

    def test_triton_batch_sizes_share_what_is_compiled(self) -> None:
        for batch in (16, 17, 31, 100, 1):
            self._evaluate(torch.ones(batch, 32, 64, 64))
        assert len({id(compiled) for compiled in launches._compiled.values()}) <= 2
        assert len(NoGpu.launched or ()) == 5

    def _evaluate(self, x: Tensor) -> Sequence[Tensor]:
        statistics = (torch.zeros(32), torch.ones(32))
        return calls.batch_norm_act_fwd(
            x, None, None, None, None, *statistics, None, False, 0.1, 1e-5, 1, (0.0, 0.0, 0.0), 1.0, False
        )


def test_triton_cannot_serve_this_machine_without_gpu() -> None:
    """Unless interpreted."""
    if torch.cuda.is_available():
        pytest.skip("it can")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        fl.set_backend("triton")
