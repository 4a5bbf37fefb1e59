"""What tests of the Triton kernels share: in Triton's interpreter, or with ``--device cuda`` on a GPU.

Importing it skips what cannot run. In an ordinary run test_triton.py starts such tests in processes of their own, since
the interpreter has to be chosen before Triton is imported. Small tables of tiles make small tensors take every way that
large ones take.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlayers as fl
from fastlayers import backends
from tests.cases import Sample
from tests.oracle import fused, run

_PROBLEM = backends._problem_of_triton("cpu", None) if os.environ.get("TRITON_INTERPRET") == "1" else "not interpreted"
if _PROBLEM is not None and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=1 has to be set from the start: test_triton.py does", allow_module_level=True)

from fastlayers.triton import calls, launches, layouts, plans  # noqa: E402  (Triton may not be there)
from fastlayers.triton.calls import batch_norm_act_pool, copies  # noqa: E402  (Triton may not be there)

#: How channels are shared among programs: by tables of (elements of a tile, of a whole channel, programs wanted).
WAYS = {"whole": (1024, 8192, 1), "one part": (128, 0, 1), "parts": (128, 0, 1000)}

every_way = pytest.mark.parametrize("way", WAYS, indirect=True)


@contextlib.contextmanager
def served(device: torch.device) -> Iterator[None]:
    """Has the Triton kernels serve."""
    if calls.INTERPRETED:
        assert device.type == "cpu", "the interpreter copies from the GPU at every call: leave TRITON_INTERPRET unset"
        _round_as_hardware_does()
    elif device.type == "cpu":
        pytest.skip("a GPU is there: --device cuda")
    with fl.use_backend("triton"):
        yield


def _round_as_hardware_does() -> None:
    """The interpreter truncates float32 to bfloat16, and knows no conversion of its own to float32."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.cast_impl
    if original.__name__ == "rounding":
        return

    def rounding(self: Any, source: Any, to: Any) -> Any:
        have, want = source.dtype.scalar, to.scalar
        if have in (tl.float32, tl.float64) and want == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
            return TensorHandle(values.view(np.uint16).reshape(np.shape(source.data)), tl.bfloat16)
        if have == tl.bfloat16 and want in (tl.float32, tl.float64):
            values = (np.asarray(source.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            return TensorHandle(values.astype(np.float64) if want == tl.float64 else values, want)
        return original(self, source, to)

    InterpreterBuilder.cast_impl = rounding


def use(way: str, patch: pytest.MonkeyPatch) -> None:
    """Has the tensors of a test take this way."""
    tile, whole, programs = WAYS[way]
    patch.setattr(plans, "TILE", dict.fromkeys(plans.TILE, tile))
    patch.setattr(plans, "ROW_CHANNELS", dict.fromkeys(plans.ROW_CHANNELS, 16))
    patch.setattr(plans, "WHOLE", dict.fromkeys(plans.WHOLE, whole))
    patch.setattr(plans, "WINDOWS", dict.fromkeys(plans.WINDOWS, tile))
    patch.setattr(plans, "COLUMNS_OF_WINDOWS", (4, 16))
    patch.setattr(plans, "COLUMNS_OF_ELEMENTS", (8, 16))
    patch.setattr(plans, "PROGRAMS", programs)
    forget()


def forget() -> None:
    """Has launches be planned anew."""
    copies.plan_of.cache_clear()
    batch_norm_act_pool.pool_plan_of.cache_clear()


class _Guarded:
    """A tensor moved between canaries: what lies around its elements, and between them, is NaN and has to stay so."""

    MARGIN = 64

    def __init__(self, original: Tensor) -> None:
        size = layouts.extent(original.shape, original.stride())
        # By the elements of memory: several of a tensor may be one.
        self.flat = original.as_strided((size,), (1,), original.storage_offset())
        places = torch.arange(size).as_strided(original.shape, original.stride()).reshape(-1)
        # In steps of 16 bytes, so that the copy is as aligned as the original.
        begin = self.MARGIN + int(original.storage_offset()) % self.MARGIN
        self.places, self.moved = places, begin + places
        self.memory = self._canaries(begin + size + self.MARGIN)
        self.memory[self.moved] = self.flat[places]
        self.tensor = self.memory.as_strided(original.shape, original.stride(), begin)

    def _canaries(self, size: int) -> Tensor:
        value = float("nan") if self.flat.is_floating_point() else 0x55
        return self.flat.new_full((size,), value if self.flat.dtype != torch.bool else True)

    def finish(self) -> None:
        """Checks the canaries and copies back what a kernel wrote."""
        written = self.memory[self.moved]
        # What was not written keeps its version, by which autograd would call it changed.
        if not torch.equal(self.flat[self.places].view(torch.uint8), written.view(torch.uint8)):
            self.flat[self.places] = written
        self.memory[self.moved] = self._canaries(1)
        expected = self._canaries(self.memory.numel())
        assert torch.equal(torch.nan_to_num(self.memory.float(), nan=-7), torch.nan_to_num(expected.float(), nan=-7))


def put_canaries(patch: pytest.MonkeyPatch) -> None:
    """Puts canaries around all that a kernel is given."""
    launch = launches.launch

    def guarded(kernel: Any, grid: Any, pointers: Sequence[Tensor | None], *args: Any) -> None:
        guards = [None if t is None else _Guarded(t) for t in pointers]
        launch(kernel, grid, [None if g is None else g.tensor for g in guards], *args)
        for guard in guards:
            if guard is not None:
                guard.finish()

    patch.setattr(launches, "launch", guarded)


def turn_around_the_order(patch: pytest.MonkeyPatch) -> None:
    """Has the interpreter run the last program first."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.set_grid_idx

    def last_first(self: Any, *at: int) -> None:
        original(self, *(size - 1 - i for size, i in zip(self.grid_dim, at, strict=True)))

    patch.setattr(InterpreterBuilder, "set_grid_idx", last_first)


def check_same_again(sample: Sample, change: Callable[[], object]) -> None:
    """Results of the operator stay the same, bit by bit, when `change` was called."""
    expected = run(fused, sample.fresh())
    change()
    again = run(fused, sample.fresh())
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def widen_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all tensors take offsets of 64 bits."""
    monkeypatch.setattr(plans, "WIDE_FROM", 0)
    forget()
