"""Calls of the compiled operators that make no sense. As a script: prints what each raises, as name, tab, error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastlayers as fl

N, C, H, W = 3, 10, 4, 5
WINDOW = [2, 2, 2, 2, 0, 0, 1, 1]  # kernel, stride, padding and dilation, each of height and width
BITS = N * C * ((H * W + 7) // 8)


def _full_size(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(N, C, H, W, dtype=dtype)


def _call_forward(**changes: Any) -> Any:
    right: dict[str, Any] = {
        "input": _full_size(), "weight": torch.ones(C), "bias": torch.ones(C), "residual": None, "mask": None,
        "running_mean": torch.ones(C), "running_var": torch.ones(C), "num_batches_tracked": torch.tensor(0),
        "training": True, "momentum": 0.1, "eps": 1e-5, "activation": 1, "activation_params": [0.0] * 3,
        "drop_scale": 1.0, "save_flat_bits": False,
    }  # fmt: skip
    return fl.ops.batch_norm_act_fwd(**right | changes)


def _forward(**changes: Any) -> Callable[[], object]:
    return lambda: _call_forward(**changes)


def _backward(**changes: Any) -> Callable[[], object]:
    """With what the forward operator returned for the right input, except for `changes`."""

    def call() -> object:
        _, mean, invstd, _ = _call_forward()
        right: dict[str, Any] = {
            "grad_output": _full_size(), "input": _full_size(), "weight": torch.ones(C), "bias": torch.ones(C),
            "residual": None, "flat_bits": None, "mask": None, "mean": mean, "invstd": invstd, "training": True,
            "activation": 1, "activation_params": [0.0] * 3, "drop_scale": 1.0,
            "input_grad": True, "affine_grad": True, "residual_grad": True,
        }  # fmt: skip
        given = {name: change(right[name]) if callable(change) else change for name, change in changes.items()}
        return fl.ops.batch_norm_act_bwd(**right | given)

    return call


def _call_pooled_forward(**changes: Any) -> Any:
    right: dict[str, Any] = {
        "input": _full_size(), "weight": torch.ones(C), "bias": torch.ones(C), "mask": None,
        "running_mean": torch.ones(C), "running_var": torch.ones(C), "num_batches_tracked": torch.tensor(0),
        "training": True, "momentum": 0.1, "eps": 1e-5, "activation": 1, "activation_params": [0.0] * 3,
        "monotone": True, "drop_scale": 1.0, "window": WINDOW, "ceil_mode": False, "save": True,
    }  # fmt: skip
    return fl.ops.batch_norm_act_pool_fwd(**right | changes)


def _pooled_forward(**changes: Any) -> Callable[[], object]:
    return lambda: _call_pooled_forward(**changes)


def _pooled_backward(**changes: Any) -> Callable[[], object]:
    """With what the forward operator returned for the right input, except for `changes`."""

    def call() -> object:
        output, mean, invstd, selected, positions = _call_pooled_forward()
        right: dict[str, Any] = {
            "grad_output": output, "input": _full_size(), "selected": selected, "positions": positions,
            "weight": torch.ones(C), "bias": torch.ones(C), "mask": None, "mean": mean, "invstd": invstd,
            "training": True, "activation": 1, "activation_params": [0.0] * 3, "drop_scale": 1.0, "window": WINDOW,
            "ceil_mode": False, "input_grad": True, "affine_grad": True,
        }  # fmt: skip
        given = {name: change(right[name]) if callable(change) else change for name, change in changes.items()}
        return fl.ops.batch_norm_act_pool_bwd(**right | given)

    return call


def _bits(size: int = BITS) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def _kept(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def _state(**changes: int) -> Tensor:
    """A state of the generator, with other numbers in its header: where the next word is, and how many are left."""
    state = torch.Generator().manual_seed(0).get_state()
    words = state.view(torch.int32)
    for name, value in changes.items():
        words[{"left": 2, "next": 4}[name]] = value
    return state


WRONG_CHANNELS: dict[str, Tensor] = {
    "too few": torch.ones(C - 1),
    "none": torch.ones(0),
    "a matrix": torch.ones(1, C),
    "a scalar": torch.tensor(1.0),
    "int64": torch.ones(C, dtype=torch.int64),
    "complex": torch.ones(C, dtype=torch.complex64),
}
WRONG_FULL_SIZE: dict[str, Tensor] = {
    "of another shape": torch.ones(N, C, H, W - 1),
    "of another rank": torch.ones(N, C, H * W),
    "float64": _full_size(torch.float64),
    "int64": _full_size(torch.int64),
}
WRONG_MASKS: dict[str, Tensor] = {
    "too few planes": _kept(N, C - 1),
    "a bool per element": _kept(N, C, H, W),
    "no planes": _kept(0),
    "planes with gaps": _kept(N, 2 * C)[:, ::2],
    "planes as float": torch.ones(N, C),
    "planes as int64": torch.ones(N, C, dtype=torch.int64),
    "too few bits": _bits(BITS - 1),
    "too many bits": _bits(BITS + 1),
    "no bits": _bits(0),
    "bits with gaps": _bits(2 * BITS)[::2],
}

WRONG_STATES: dict[str, Tensor] = {
    "too short": _state()[:-8],
    "with gaps": torch.stack([_state(), _state()], 1)[:, 0],
    "as int8": _state().view(torch.int8),
    "none": torch.empty(0, dtype=torch.uint8),
    "past its block": _state(left=2, next=624),
    "before its block": _state(left=630, next=-5),
    "with too few words": _state(left=5, next=5),
    "with no words": _state(left=0, next=0),
    "with fewer than none": _state(left=-7, next=632),
}

WRONG_WINDOWS: dict[str, list[int]] = {
    "too short": WINDOW[:-1],
    "none": [],
    "without kernel": [0, 2, 2, 2, 0, 0, 1, 1],
    "without stride": [2, 2, 0, 2, 0, 0, 1, 1],
    "of negative padding": [2, 2, 2, 2, -1, 0, 1, 1],
    "of too much padding": [2, 2, 2, 2, 0, 2, 1, 1],
    "without dilation": [2, 2, 2, 2, 0, 0, 1, 0],
    "of too many positions": [16, 17, 1, 1, 8, 8, 1, 1],
    "larger than the input": [5, 2, 2, 2, 0, 0, 1, 1],
    "of no elements": [2, 2, 1, 1, 0, 1, 1, 6],
    "of sizes that overflow": [2, 2, 2, 2, 0, 0, 2**62, 1],
}

CALLS: dict[str, Callable[[], object]] = {
    **{
        f"forward: {name} {text}": _forward(**{name: t})
        for name in ("weight", "bias", "running_mean", "running_var")
        for text, t in WRONG_CHANNELS.items()
    },
    **{f"forward: residual {text}": _forward(residual=t) for text, t in WRONG_FULL_SIZE.items()},
    **{f"forward: mask {text}": _forward(mask=t) for text, t in WRONG_MASKS.items()},
    **{f"forward: activation {code}": _forward(activation=code) for code in (-1, 14, 2**40)},
    **{f"forward: {n} parameters": _forward(activation_params=[1.0] * n) for n in (0, 2, 4)},
    "forward: rank 0": _forward(input=torch.tensor(1.0)),
    "forward: rank 1": _forward(input=torch.ones(C)),
    "forward: int64": _forward(input=_full_size(torch.int64)),
    "forward: complex": _forward(input=_full_size(torch.complex64)),
    "forward: float8": _forward(input=_full_size().to(torch.float8_e5m2)),
    "forward: sparse": _forward(input=_full_size().to_sparse()),
    "forward: one statistic in evaluation": _forward(training=False, running_var=None),
    "forward: no statistics in evaluation": _forward(training=False, running_mean=None, running_var=None),
    "forward: count as float": _forward(num_batches_tracked=torch.tensor(0.0)),
    "forward: two counts": _forward(num_batches_tracked=torch.tensor([0, 0])),
    "forward: no count and no momentum": _forward(num_batches_tracked=None, momentum=None),
    **{f"backward: {name} {text}": _backward(**{name: t})
       for name in ("weight", "bias", "mean", "invstd") for text, t in WRONG_CHANNELS.items()},
    **{f"backward: {name} {text}": _backward(**{name: t})
       for name in ("grad_output", "residual") for text, t in WRONG_FULL_SIZE.items()},
    **{f"backward: mask {text}": _backward(mask=t) for text, t in WRONG_MASKS.items()},
    **{f"backward: flat bits {text}": _backward(flat_bits=t) for text, t in WRONG_MASKS.items()},
    **{f"backward: {name} cut short": _backward(**{name: lambda t: t[..., :-1]}) for name in ("mean", "invstd")},
    **{f"backward: {name} in bfloat16": _backward(**{name: Tensor.bfloat16}) for name in ("mean", "invstd")},
    "backward: activation 14": _backward(activation=14),
    "backward: no parameters": _backward(activation_params=[]),
    **{
        f"pooled {direction}: {name} {text}": call(**{name: t})
        for direction, call in (("forward", _pooled_forward), ("backward", _pooled_backward))
        for name, wrong in (
            ("weight", WRONG_CHANNELS), ("bias", WRONG_CHANNELS), ("mask", WRONG_MASKS), ("window", WRONG_WINDOWS)
        )
        for text, t in wrong.items()
    },
    **{f"pooled forward: {name} {text}": _pooled_forward(**{name: t})
       for name in ("running_mean", "running_var") for text, t in WRONG_CHANNELS.items()},
    **{f"pooled backward: {name} {text}": _pooled_backward(**{name: t})
       for name in ("mean", "invstd") for text, t in WRONG_CHANNELS.items()},
    **{f"pooled backward: {name} {text}": _pooled_backward(**{name: change})
       for name in ("grad_output", "selected", "positions")
       for text, change in (
           ("of the input's size", lambda t: _full_size(t.dtype)), ("cut short", lambda t: t[1:]),
           ("of another rank", lambda t: t.flatten(2)), ("in int64", Tensor.long), ("of nothing", lambda t: t[:0]),
       )},
    **{f"pooled forward: activation {code}": _pooled_forward(activation=code) for code in (-1, 14, 2**40)},
    "pooled backward: activation 14": _pooled_backward(activation=14),
    "pooled forward: rank 2": _pooled_forward(input=torch.ones(N, C)),
    "pooled forward: rank 3 with two dimensions": _pooled_forward(input=torch.ones(N, C, W)),
    "pooled forward: rank 5": _pooled_forward(input=torch.ones(N, C, 2, 2, 2)),
    "pooled forward: int64": _pooled_forward(input=_full_size(torch.int64)),
    "pooled forward: sparse": _pooled_forward(input=_full_size().to_sparse()),
    "pooled forward: no statistics in evaluation":
        _pooled_forward(training=False, running_mean=None, running_var=None),
    "pooled forward: no count and no momentum": _pooled_forward(num_batches_tracked=None, momentum=None),
    **{f"dropout: mask {text}": lambda t=t: fl.ops.dropout(_full_size(), t, 2.0)  # type: ignore[misc]
       for text, t in WRONG_MASKS.items()},
    "dropout: int64": lambda: fl.ops.dropout(_full_size(torch.int64), _kept(N, C), 2.0),
    "dropout: planes of a vector": lambda: fl.ops.dropout(torch.ones(C), _kept(C), 2.0),
    "pack: float": lambda: fl.ops.pack_mask(_full_size(), False),
    "pack: vector as planes": lambda: fl.ops.pack_mask(_kept(C), False),
    "pack: scalar as planes": lambda: fl.ops.pack_mask(torch.tensor(True), False),
    **{f"unpack: {text}, flat={flat}": lambda t=t, flat=flat: fl.ops.unpack_mask(t, _full_size(), flat)  # type: ignore[misc]
       for flat in (True, False) for text, t in WRONG_MASKS.items() if text != "no bits"},
    "unpack: vector as planes": lambda: fl.ops.unpack_mask(_bits(2), torch.ones(C), False),
    **{f"draw: state {text}": lambda t=t: fl.ops.draw_channel_mask(t, _full_size(), 0.5)  # type: ignore[misc]
       for text, t in WRONG_STATES.items()},
    **{f"draw bits: state {text}": lambda t=t: fl.ops.draw_element_mask(t, _full_size(), 0.5, True)  # type: ignore[misc]
       for text, t in WRONG_STATES.items()},
    **{f"draw: probability {p}": lambda p=p: fl.ops.draw_channel_mask(_state(), _full_size(), p)  # type: ignore[misc]
       for p in (-0.1, 1.1, float("nan"))},
    "draw: channels of a vector": lambda: fl.ops.draw_channel_mask(_state(), torch.ones(C), 0.5),
    "draw bits: planes of a vector": lambda: fl.ops.draw_element_mask(_state(), torch.ones(C), 0.5, False),
    "capability: unknown": lambda: fl.ops.set_cpu_capability("sse9"),
}  # fmt: skip


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__} {error}".splitlines()[0]
    return "no error"


if __name__ == "__main__":
    for name, call in CALLS.items():
        print(f"{name}\t", end="", flush=True)
        print(_outcome(call), flush=True)
