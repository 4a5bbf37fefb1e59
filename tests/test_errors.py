"""Bad input: the type and the text that torch raises for the same mistake, then argument, value and what is allowed."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from tests import wrong_calls


@dataclass(frozen=True)
class Mistake:
    """A wrong call.

    Attributes:
        call: the call, by way of `fl.functional` or `torch.nn.functional`.
        says: what our message names beyond torch's text: argument, value, what is allowed.
        same_text: whether torch's text is about the mistake, not about what happened to fail first.
    """

    name: str
    call: Callable[[Any], object]
    says: tuple[str, ...] = ()
    same_text: bool = True


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (4, 5, 3, 3), dtype=dtype)


def _c(size: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _batch_norm(**changes: Any) -> Callable[[Any], object]:
    """batch_norm with five channels and everything right except for `changes`."""
    right = {"running_mean": _c(), "running_var": _c(), "weight": _c(), "bias": _c(), "input": _x()}  # fmt: skip
    return lambda functions: functions.batch_norm(**right | changes)


PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")
NO_STATISTICS = {"running_mean": None, "running_var": None}
WRONG_DTYPES = [
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.int64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
]
BATCH_NORM = [
    Mistake("rank 0", _batch_norm(input=torch.tensor(1.0)), ("input", "0"), same_text=False),
    Mistake("rank 1", _batch_norm(input=_x(5)), ("input", "1"), same_text=False),
    Mistake(
        "rank 1 in training", _batch_norm(input=_x(5), **NO_STATISTICS, training=True), ("input",), same_text=False
    ),
    *(Mistake(f"{name} of 4", _batch_norm(**{name: _c(4)}), (name, "(4,)", "(5,)")) for name in PER_CHANNEL),
    *(
        Mistake(f"{name} on another device", _batch_norm(**{name: _c(device="meta")}), (name, "meta", "cpu"))
        for name in PER_CHANNEL
    ),
    *(
        Mistake(
            f"{_name(dtype)} {name} with {_name(of)} input",
            _batch_norm(input=_x(dtype=of), **{n: _c(dtype=dtype if n == name else of) for n in PER_CHANNEL}),
            (name, str(dtype), str(of), "allowed"),
            # For the others torch complains of whichever its kernel reads first.
            same_text=name == "weight" and of != torch.float64,
        )
        for of, dtype in WRONG_DTYPES
        for name in PER_CHANNEL
    ),
    *(
        Mistake(
            f"{_name(dtype)} parameters with {_name(of)} input",
            _batch_norm(input=_x(dtype=of), **{name: _c(dtype=dtype) for name in PER_CHANNEL}),
            (str(dtype), str(of), "allowed"),
        )
        for of, dtype in WRONG_DTYPES
    ),
    Mistake("no statistics in evaluation", _batch_norm(**NO_STATISTICS), ("running_mean", "None")),
    Mistake("no mean in evaluation", _batch_norm(running_mean=None), ("running_mean", "None")),
    Mistake("no variance in evaluation", _batch_norm(running_var=None), ("running_var", "None")),
    Mistake("no variance in training", _batch_norm(running_var=None, training=True), ("running_var",)),
    Mistake(
        "statistics with a gradient",
        _batch_norm(running_mean=_c().requires_grad_(), training=True),
        ("running_mean",),
        same_text=False,
    ),
    Mistake("one value per channel", _batch_norm(input=_x(1, 5), training=True), ("input", "1")),
    Mistake("one value in planes", _batch_norm(input=_x(1, 5, 1, 1), training=True), ("input", "1, 5, 1, 1")),
    Mistake("eps of zero", _batch_norm(training=True, eps=0.0), ("eps", "0"), same_text=False),
    Mistake("negative eps", _batch_norm(training=True, eps=-1.0), ("eps", "-1"), same_text=False),
    Mistake("no momentum", _batch_norm(training=True, momentum=None), ("momentum", "num_batches_tracked")),
    *(
        Mistake(
            f"{_name(dtype)} input" + ", training" * training,
            _batch_norm(input=_x(dtype=dtype), training=training, **NO_STATISTICS if training else {}),
            ("input", str(dtype), "float32", "bfloat16"),
        )
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
        for training in (True, False)
    ),
    Mistake("sparse input", _batch_norm(input=_x().to_sparse(), training=True), ("input", "sparse"), same_text=False),
]


def _dropout(name: str, *arguments: Any) -> Callable[[Any], object]:
    return lambda functions: getattr(functions, name)(*arguments)


DROPOUTS = {"dropout": _x(), "dropout1d": _x(4, 5, 3), "dropout2d": _x(), "dropout3d": _x()}
DROPOUT = [
    *(
        Mistake(f"{name} with p of {p}", _dropout(name, x, p), ("p", str(p), "between 0 and 1"))
        for name, x in DROPOUTS.items()
        for p in (-0.1, 1.1, math.inf, -math.inf, math.nan)
    ),
    *(
        Mistake(f"{name} with p of {p!r}", _dropout(name, x, p), same_text=False)
        for name, x in DROPOUTS.items()
        for p in ("0.5", None)
    ),
    *(
        Mistake(f"{name} of {_name(dtype)}", _dropout(name, x.to(dtype), 0.5), ("input", str(dtype), "float32"))
        for name, x in DROPOUTS.items()
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    Mistake("dropout1d of rank 1", _dropout("dropout1d", _x(4))),
    Mistake("dropout1d of rank 4", _dropout("dropout1d", _x())),
    Mistake("inplace on a leaf", _dropout("dropout", _x().requires_grad_(), 0.5, True, True)),
]


def _pool(x: Tensor, kernel_size: Any, **arguments: Any) -> Callable[[Any], object]:
    """Torch's max-pool of `x`, or ours of the normalised `x`."""
    torchs = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.dim()]

    def call(functions: Any) -> object:
        if functions is F:
            return torchs(x, kernel_size, **arguments)
        pool = {"kernel_size": kernel_size} | arguments
        return functions.batch_norm_act(x, None, None, training=True, pool=pool)

    return call


MAX_POOL = [
    Mistake("max_pool2d of a window that is too large", _pool(_x(), 4), ("pool", "kernel_size=4", "allowed")),
    Mistake("max_pool2d dilated too far", _pool(_x(), 2, dilation=3), ("pool", "dilation=3", "allowed")),
    Mistake("max_pool3d of a window that is too large", _pool(_x(4, 5, 3, 3, 3), (1, 1, 4)), ("pool", "(1, 1, 4)")),
    Mistake("max_pool1d of a window that is too large", _pool(_x(4, 5, 3), 4), ("Given input size: (5x3)",), False),
    Mistake("max_pool2d without channels", _pool(_x(4, 0, 3, 3), 2), ("pool", "[4, 0, 3, 3]")),
    Mistake("max_pool2d of nothing", _pool(_x(4, 5, 0, 3), 2, padding=1), ("pool", "[4, 5, 0, 3]")),
    Mistake("max_pool1d of nothing", _pool(_x(4, 5, 0), 2, padding=1), ("pool", "[4, 5, 0]"), False),
]


def _error(call: Callable[[Any], object], argument: Any) -> Exception | None:
    try:
        call(argument)
    except Exception as error:
        return error
    return None


def _assert_like(ours: Exception | None, theirs: Exception | None, same_text: bool = True) -> None:
    """The same type; torch's first line comes first. Where torch allows it, as some versions do, any error."""
    assert ours is not None
    if theirs is None:
        return
    assert type(ours) is type(theirs), f"{ours!r} where torch raises {theirs!r}"
    if same_text:
        # The position of an argument is another matter in another function.
        expected = re.sub(r" \(position \d+\)", "", str(theirs).splitlines()[0])
        assert str(ours).startswith(expected)


@pytest.mark.parametrize("mistake", BATCH_NORM + DROPOUT + MAX_POOL, ids=lambda m: m.name)
def test_functions(mistake: Mistake) -> None:
    theirs, ours = _error(mistake.call, F), _error(mistake.call, fl.functional)
    _assert_like(ours, theirs, mistake.same_text)
    for word in mistake.says:
        assert word in str(ours)


LAYERS = [
    ("BatchNorm1d", (5,), _x(5)),
    ("BatchNorm1d", (5,), _x()),
    ("BatchNorm2d", (5,), _x(4, 5)),
    ("BatchNorm2d", (5,), _x(4, 5, 3, 3, 3)),
    ("BatchNorm3d", (5,), _x()),
    ("BatchNorm2d", (5,), _x(1, 5, 1, 1)),
    ("BatchNorm2d", (5,), _x(4, 6, 3, 3)),
    ("BatchNorm2d", (5, 1e-5, 0.1, True, False), _x(4, 6, 3, 3)),
    ("BatchNorm2d", (5,), _x(dtype=torch.float64)),
    ("BatchNorm2d", (5,), _x(dtype=torch.int64)),
    ("BatchNorm2d", (-1,), _x()),
    ("Dropout", (-0.5,), _x()),
    ("Dropout2d", (1.5,), _x()),
    ("Dropout2d", (math.nan,), _x()),
    ("Dropout1d", (0.5,), _x()),
]


@pytest.mark.parametrize(("name", "arguments", "x"), LAYERS, ids=[f"{n}{a} {tuple(x.shape)}" for n, a, x in LAYERS])
def test_layers(name: str, arguments: tuple[Any, ...], x: Tensor) -> None:
    """In the constructor or in forward, as torch's layer of the same name."""
    theirs, ours = (_error(lambda module: getattr(module, name)(*arguments)(x), module) for module in (nn, fl))
    _assert_like(ours, theirs)


@pytest.mark.parametrize("name", ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"])
def test_rank_of_fused_layers(name: str) -> None:
    theirs, ours = (
        _error(lambda cls: cls(5)(_x(5)), cls) for cls in (getattr(nn, name.replace("Act", "")), getattr(fl, name))
    )
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


def _act(**changes: Any) -> Callable[[], object]:
    return lambda: fl.functional.batch_norm_act(_x(), None, None, training=True, **changes)


def _layer(**changes: Any) -> Callable[[], object]:
    return lambda: fl.BatchNormAct2d(5, **changes)


class _OwnReLU(nn.ReLU):
    """Its forward could be any function."""


class _OwnDropout(nn.Dropout2d):
    """Its forward could be any function."""


# Mistakes that torch's functions have no arguments for. For the residual: the type that `y + residual` raises.
OWN: list[tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = [
    (_act(residual=_x(4, 6, 3, 3)), RuntimeError, ("The size of tensor a", "residual", "(4, 6, 3, 3)", "(4, 5, 3, 3)")),
    (_act(residual=_x(5, 3, 3)), RuntimeError, ("residual", "(5, 3, 3)", "(4, 5, 3, 3)")),
    (_act(residual=_x(4, 5, 1, 1)), RuntimeError, ("residual", "broadcast")),
    (_act(residual=_x(dtype=torch.float64)), RuntimeError, ("residual", "float64", "float32")),
    (_act(residual=_x(dtype=torch.int64)), RuntimeError, ("residual", "int64", "float32")),
    (_act(residual=_x().to("meta")), RuntimeError, ("residual", "meta", "cpu")),
    (_act(act="rleu"), ValueError, ("act", "'rleu'", "relu, ")),
    (_act(act=nn.Softmax), ValueError, ("act", "Softmax", "nn.ReLU")),
    (_act(act=nn.PReLU()), ValueError, ("act", "PReLU", "nn.ReLU")),
    (_act(act=_OwnReLU()), ValueError, ("act", "_OwnReLU", "nn.ReLU")),
    (_act(act=F.relu), TypeError, ("act", "relu")),
    (_act(act=3), TypeError, ("act", "3", "int")),
    (_act(act="relu", act_kwargs={"negative_slope": 1}), ValueError, ("act_kwargs", "negative_slope", "none")),
    (_act(act="elu", act_kwargs={"slope": 1}), ValueError, ("act_kwargs", "slope", "alpha")),
    (_act(act=nn.ELU(), act_kwargs={"alpha": 2}), TypeError, ("act_kwargs", "alpha")),
    (_act(act="gelu", act_kwargs={"approximate": "erf"}), ValueError, ("approximate", "'erf'", "tanh")),
    (_act(act="celu", act_kwargs={"alpha": 0}), ValueError, ("act_kwargs", "alpha", "celu", "0")),
    (_act(act=nn.CELU(0.0)), ValueError, ("alpha", "celu", "0.0")),
    (_act(act="softplus", act_kwargs={"beta": 0}), ValueError, ("act_kwargs", "beta", "softplus", "0")),
    (_layer(act_layer=nn.Softplus(0.0)), ValueError, ("beta", "softplus", "0.0")),
    (_act(drop_p=-0.1), ValueError, ("drop_p", "-0.1", "between 0 and 1")),
    (_act(drop_p=1.1), ValueError, ("drop_p", "1.1", "between 0 and 1")),
    (_act(drop_mode="plane"), ValueError, ("drop_mode", "'plane'", "channel, element")),
    (_layer(act_layer="rleu"), ValueError, ("act", "'rleu'", "relu, ")),
    (_layer(act_layer="rleu", apply_act=False), ValueError, ("act", "'rleu'")),
    (_layer(drop_p=1.1), ValueError, ("drop_p", "1.1", "between 0 and 1")),
    (_layer(drop_p=math.nan), RuntimeError, ("drop_p", "nan", "between 0 and 1")),
    (_layer(drop_p=0.1, drop_mode="plane"), ValueError, ("drop_mode", "'plane'", "channel, element")),
    (_layer(drop_mode=""), ValueError, ("drop_mode", "''", "channel, element")),
    (_layer(drop_layer=nn.Dropout2d, drop_p=0.1), ValueError, ("drop_layer", "drop_p", "0.1")),
    (_layer(drop_layer=nn.Dropout2d, drop_p=0.0), ValueError, ("drop_layer", "drop_p", "0.0")),
    (_layer(drop_layer=nn.Dropout2d, drop_mode="element"), ValueError, ("drop_layer", "drop_mode", "'element'")),
    (_layer(drop_layer=nn.ReLU()), ValueError, ("drop_layer", "ReLU()", "nn.Dropout2d")),
    (_layer(drop_layer=nn.Linear), ValueError, ("drop_layer", "Linear", "nn.Dropout2d")),
    (_layer(drop_layer=nn.AlphaDropout), ValueError, ("drop_layer", "AlphaDropout", "nn.Dropout2d")),
    (_layer(drop_layer=_OwnDropout(0.2)), ValueError, ("drop_layer", "_OwnDropout", "nn.Dropout2d")),
    (_layer(drop_layer=0.5), ValueError, ("drop_layer", "0.5", "nn.Dropout2d", "drop_p")),
    (_act(pool=nn.MaxPool1d(2)), ValueError, ("pool", "MaxPool1d", "2")),
    (_act(pool=nn.AvgPool2d(2)), TypeError, ("pool", "AvgPool2d", "nn.MaxPool2d")),
    (_act(pool={"kernel_size": 2, "size": 3}), ValueError, ("pool", "unknown size", "kernel_size, stride")),
    (
        _act(pool={"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 4}),
        ValueError,
        ("pool", "dilation=4", "without a single element", "(3, 3)", "allowed"),
    ),
    (_layer(pool=nn.MaxPool1d(2)), ValueError, ("pool", "MaxPool1d", "2")),
    (_layer(pool=nn.MaxPool2d), TypeError, ("pool", "MaxPool2d", "nn.MaxPool2d")),
    (_layer(pool=nn.MaxPool2d(2, return_indices=True)), ValueError, ("pool", "return_indices=True", "allowed: False")),
    (_layer(pool=nn.MaxPool2d(2), pool_kernel_size=2), ValueError, ("pool", "MaxPool2d", "pool_kernel_size=2")),
    (_layer(pool=nn.MaxPool2d(2), pool_padding=1), ValueError, ("pool", "pool_padding=1", "one or the other")),
    (_layer(pool=nn.MaxPool2d(2), pool_ceil_mode=True), ValueError, ("pool", "pool_ceil_mode=True")),
    (_layer(pool_stride=2), ValueError, ("pool_kernel_size", "pool_stride")),
    (_layer(pool_kernel_size=0), ValueError, ("pool", "kernel_size", "at least 1", "0")),
    (_layer(pool_kernel_size=3, pool_padding=2), ValueError, ("pad should be", "padding=(2, 2)", "(3, 3)")),
    (_layer(pool_kernel_size=(2, 2, 2)), ValueError, ("pool", "kernel_size", "(2, 2, 2)")),
    (lambda: fl.SyncBatchNormAct(5, pool_kernel_size=2), ValueError, ("pool", "one number per dimension", "2")),
    (lambda: fl.BatchNormAct1d(5, pool_kernel_size=2)(_x(4, 5)), ValueError, ("pool", "MaxPool1d", "not 0")),
]


@pytest.mark.parametrize(("call", "kind", "says"), OWN, ids=[f"{k.__name__}: {' '.join(says)}" for _, k, says in OWN])
def test_own_arguments(call: Callable[[], object], kind: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in says:
        assert word in str(caught.value)


@pytest.mark.parametrize("mistake", ["one value", "residual", "momentum", "pool"])
def test_nothing_changes_before_an_error(mistake: str) -> None:
    """Running statistics and the count of batches are those from before the call."""
    layer = fl.BatchNormAct2d(
        5, momentum=None if mistake == "momentum" else 0.1, pool_kernel_size=4 if mistake == "pool" else None
    )
    if mistake == "momentum":
        layer.num_batches_tracked = None
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = _x(1, 5, 1, 1) if mistake == "one value" else _x()
    residual = _x(4, 5) if mistake == "residual" else None
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        layer(x, residual)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name])


@pytest.fixture(scope="module")
def raised() -> dict[str, str]:
    """What each of `wrong_calls` raised, in a process of its own: a crash is to end that one only."""
    script = Path(wrong_calls.__file__)
    process = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(fl.__file__).parent.parent)},
    )
    lines = process.stdout.splitlines()
    assert process.returncode == 0, f"{lines[-1:]}\n{process.stderr[-2000:]}"
    return dict(line.split("\t", 1) for line in lines)


@pytest.mark.parametrize("name", wrong_calls.CALLS)
def test_operators_called_directly(name: str, raised: dict[str, str], device: torch.device) -> None:
    """Nonsense given to torch.ops.fastlayers raises; it does not read or write what it should not."""
    if device.type != "cpu":
        pytest.skip("the compiled operators serve the CPU")
    assert raised[name].split()[0] in ("RuntimeError", "NotImplementedError"), raised[name]
