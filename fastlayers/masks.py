"""Dropout masks, drawn from torch's generator exactly as `torch.nn.functional`'s dropouts draw theirs.

`bernoulli_` takes about 10 ns for each value on a CPU. For the compiled kernels, larger masks are computed from the
state of torch's generator in a tenth of that, by operators that know which numbers `bernoulli_` would draw, and the
state that would follow is put in its place.

All draws for the kernels in a process take turns, so no two threads get the same mask and each mask advances the
generator once. torch's own random functions in other threads do not wait for that: if they drew while a mask was
computed, it is computed anew. Only one that is already running in C++, without the interpreter's lock, can draw in the
microsecond between that comparison and writing the state; it goes unseen, and its numbers are drawn once more.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.nn import Parameter

from fastlayers import ops

MODES = ("channel", "element")

# Reading, comparing and writing the generator's state takes some 9 us, as bernoulli_ for about this many values.
_VALUES_WORTH_IT = 512

_PLAIN = (Tensor, Parameter)

# How often another thread's draws may come in between before bernoulli_, which waits for them, draws the mask.
_ATTEMPTS = 3

_drawing = threading.RLock()
# A process forked while another thread draws would wait for a thread that it does not have.
os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_drawing.release)


def scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), or 0 where nothing is kept."""
    return 0.0 if p == 1 else 1.0 / (1.0 - p)


def draw(input: Tensor, p: float, mode: str, training: bool) -> Tensor | None:
    """Which parts of `input` dropout keeps, or None if it keeps all as they are.

    The result is bool, of shape (N, C) for mode "channel" and of the shape and memory order of ``empty_like(input)``
    for mode "element". For the same state of the generator it is the mask of `F.dropout2d` or `F.dropout`: like them,
    this draws nothing for p = 0, p = 1 and an empty input.
    """
    if p == 0 or not training or input.numel() == 0:
        return None
    return _bernoulli(input, p, mode)


def draw_for_kernels(input: Tensor, p: float, mode: str, training: bool, flat: bool = False) -> Tensor | None:
    """The mask of `draw` in the form that the compiled CPU operators take.

    For mode "channel" it is bool, (N, C). For mode "element" it is uint8, one bit per element, in the layout of
    ``ops.pack_mask(mask, flat)``.
    """
    if p == 0 or not training or input.numel() == 0:
        return None
    if p < 1 and input.is_cpu and runs_eagerly(input):
        with _drawing:
            return _draw_eagerly(input, 1 - p, mode, flat)
    mask = _bernoulli(input, p, mode)
    if mode == "element":
        mask = ops.pack_mask(mask, flat)
    return mask


def draw_for_gpu_kernels(input: Tensor, p: float, mode: str, training: bool) -> Tensor | None:
    """A dropout mask in the form that the operators of GPU backends take; None where `draw` gives None.

    For mode "channel" it is the tensor (N, C) that `F.dropout2d` draws, in the dtype of `input`: what is not zero is
    kept. For mode "element" it is one int64, the seed of `reference.element_mask`, which the kernels read from the
    device; not drawn but 0 for p = 1.
    """
    if p == 0 or not training or input.numel() == 0:
        return None
    if mode == "channel":
        values = input.new_empty(input.shape[:2])
        return values.zero_() if p == 1 else values.bernoulli_(1 - p)
    seed = input.new_empty(1, dtype=torch.int64)
    if p == 1:
        return seed.zero_()
    # torch.compile knows only the operator that returns a new tensor.
    drawn: Tensor = torch.ops.aten.random.default(seed) if is_compiling() else seed.random_()
    return drawn


def draw_tiny(input: Tensor, p: float, mode: str) -> Tensor:
    """The mask of `draw`, bool, to be broadcast, for 0 < p < 1 and an `input` on a CPU that `runs_eagerly`."""
    if mode == "element":
        mask = torch.empty_like(input, dtype=torch.bool)
    else:
        batch, channels, *spatial = input.shape
        mask = torch.empty((batch, channels, *[1] * len(spatial)), dtype=torch.bool, device="cpu")
    with _drawing:
        return mask.bernoulli_(1 - p)


def runs_eagerly(input: Tensor) -> bool:
    """Whether a call on `input` computes values now, with no tracer, transform or subclass in between."""
    return not is_compiling() and is_plain(input) and peek_interpreter_stack() is None and not _is_tracing()


def is_plain(input: Tensor) -> bool:
    """Whether `input` is no subclass, and no dispatch mode looks on."""
    return type(input) in _PLAIN and _len_torch_dispatch_stack() == 0


def _draw_eagerly(input: Tensor, keep_probability: float, mode: str, flat: bool) -> Tensor:
    # For a small mask Python takes longer than the drawing, hence the fewest calls that do.
    if mode == "channel":
        batch, channels = input.shape[:2]
        if batch * channels >= _VALUES_WORTH_IT and predicts_bernoulli():
            mask = _from_state(lambda state: ops.draw_channel_mask(state, input, keep_probability))
            if mask is not None:
                return mask
        return input.new_empty(batch, channels, dtype=torch.bool).bernoulli_(keep_probability)
    if input.numel() >= _VALUES_WORTH_IT and predicts_bernoulli():
        mask = _from_state(lambda state: ops.draw_element_mask(state, input, keep_probability, flat))
        if mask is not None:
            return mask
    bits: Tensor = ops.pack_mask(torch.empty_like(input, dtype=torch.bool).bernoulli_(keep_probability), flat)
    return bits


def _from_state(operator: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor | None:
    """The mask that `operator` computes of the generator's state; None if other threads kept drawing meanwhile."""
    generator = torch.default_generator
    for _ in range(_ATTEMPTS):
        state = generator.get_state()
        mask, next_state = operator(state)
        # None of these three calls lets go of the interpreter's lock, so that no other Python thread comes in between.
        if _bytes(generator.get_state()) == _bytes(state):
            generator.set_state(next_state)
            return mask
    return None


def _bytes(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.numel())


@functools.cache
def predicts_bernoulli() -> bool:
    """Whether `bernoulli_` draws the numbers here that the compiled operators compute; tried once per process.

    It does not on Intel processors, where torch draws through MKL.
    """
    ours, theirs = (torch.Generator().manual_seed(2**40 + 1) for _ in range(2))
    # With all the ways that values and the 624 words of a block can meet: a value takes two words, randint one.
    for count, keep_probability in ((1, 0.5), (311, 0.3), (700, 0.9), (1, 1e-3), (313, 0.6)):
        expected = torch.empty(1, count, dtype=torch.bool, device="cpu").bernoulli_(keep_probability, generator=theirs)
        try:
            mask, state = ops.draw_channel_mask(ours.get_state(), expected, keep_probability)
        except RuntimeError:  # no state that the operator knows: another generator than in the torch of today
            return False
        ours.set_state(state)
        following = [torch.randint(2**24, (1,), generator=g, device="cpu") for g in (ours, theirs)]
        if not (torch.equal(mask, expected) and torch.equal(*following)):
            return False
    return True


def _bernoulli(input: Tensor, p: float, mode: str) -> Tensor:
    # torch's CPU generator makes the same choices for every dtype, its others do not.
    dtype = torch.bool if input.device.type == "cpu" else input.dtype
    if mode == "channel":
        values = input.new_empty(input.shape[:2], dtype=dtype)
    else:
        values = torch.empty_like(input, dtype=dtype)
    if p == 1:
        return torch.zeros_like(values, dtype=torch.bool)
    values.bernoulli_(1 - p)
    return values if dtype == torch.bool else values != 0
