"""Right calls with one thing wrong: an error that names it, of torch's type, and nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastlayers as fl
from tests.fuzz import profiles
from tests.fuzz.memory import Memory
from tests.fuzz.problems import Problem, make, problems

#: What torch raises for wrong arguments.
ERRORS = (ValueError, RuntimeError, TypeError, NotImplementedError, IndexError)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    """Some arguments of `functional.batch_norm_act` that are wrong.

    Attributes:
        argument: which the message has to name.
        change: the new value of that argument, made of all arguments.
        applies: whether it is a mistake, given the right arguments.
        others: of other arguments, new values.
        torch_knows: whether `F.batch_norm` has the argument, so that the type of its error is ours.
    """

    argument: str
    text: str
    change: Callable[[Arguments], Any]
    applies: Callable[[Arguments], bool] = lambda a: True
    others: tuple[tuple[str, Any], ...] = ()
    torch_knows: bool = True

    def __repr__(self) -> str:
        return f"<{self.argument}: {self.text}>"

    def make(self, right: Arguments) -> Arguments:
        return right | {self.argument: self.change(right)} | dict(self.others)


_VECTORS = ("weight", "bias", "running_mean", "running_var")


def _tracks(a: Arguments) -> bool:
    return bool(a["training"]) and a["running_mean"] is not None


def _always(value: Any) -> Callable[[Arguments], Any]:
    return lambda a: value


def _is_given(name: str) -> Callable[[Arguments], bool]:
    return lambda a: a[name] is not None


def _made_of(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Any]:
    return lambda a: change(a[name])


def _of_tensor(
    wrong: dict[str, Callable[[Tensor], Any]], name: str, source: str = "", **options: Any
) -> Iterator[Mistake]:
    """Each of `wrong`, for the argument `name`, made of the tensor `source` where there is one."""
    source = source or name
    for text, change in wrong.items():
        yield Mistake(name, text, _made_of(source, change), _is_given(source), **options)


def _values(name: str, *wrong: Any, **options: Any) -> Iterator[Mistake]:
    for value in wrong:
        yield Mistake(name, repr(value), _always(value), **options)


def _like(t: Tensor, **options: Any) -> Tensor:
    return torch.ones(t.shape, **{"dtype": t.dtype} | options)


_WRONG_VECTORS: dict[str, Callable[[Tensor], Any]] = {
    "one more": lambda t: torch.ones(len(t) + 1, dtype=t.dtype),
    "one less": lambda t: t.detach()[1:],
    "none": lambda t: t.detach()[:0],
    "a row": lambda t: t.detach()[None],
    "a column": lambda t: t.detach()[:, None],
    "a scalar": lambda t: t.detach()[0],
    "int64": lambda t: _like(t, dtype=torch.int64),
    "complex": lambda t: _like(t, dtype=torch.complex64),
    "on another device": lambda t: _like(t, device="meta"),
    "sparse": lambda t: _like(t).to_sparse(),
    "a list": lambda t: [1.0] * len(t),
    "a number": lambda t: 1.0,
}
_WRONG_INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "int64": lambda t: _like(t, dtype=torch.int64),
    "bool": lambda t: _like(t, dtype=torch.bool),
    "complex": lambda t: _like(t, dtype=torch.complex64),
    "float8": lambda t: torch.ones(t.shape).to(torch.float8_e5m2),
    "one dimension": lambda t: t.detach().reshape(-1),
    "a scalar": lambda t: torch.ones((), dtype=t.dtype),
    "sparse": lambda t: _like(t).to_sparse(),
    "None": lambda t: None,
    "a list": lambda t: [[1.0, 2.0]],
}
_WRONG_RESIDUALS: dict[str, Callable[[Tensor], Any]] = {
    "broadcasting": lambda t: torch.ones(1 if t.shape[0] > 1 else 2, *t.shape[1:], dtype=t.dtype),
    "one dimension more": lambda t: torch.ones((*t.shape, 2), dtype=t.dtype),
    "flat": lambda t: torch.ones(t.numel() + 1, dtype=t.dtype),
    "of another dtype": lambda t: _like(t, dtype=torch.float32 if t.dtype != torch.float32 else torch.float64),
    "int64": lambda t: _like(t, dtype=torch.int64),
    "on another device": lambda t: _like(t, device="meta"),
    "sparse": lambda t: _like(t).to_sparse(),
    "a number": lambda t: 1.0,
}
_WRONG_ACT_KWARGS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("relu", {"alpha": 1.0}),
    ("elu", {"negative_slope": 1.0}),
    ("celu", {"alpha": 0.0}),
    ("celu", {"alpha": 0}),
    ("softplus", {"beta": 0.0}),
    ("gelu", {"approximate": "erf"}),
    ("gelu", {"approximate": None}),
    ("elu", {"alpha": "1"}),
    ("leaky_relu", {"negative_slope": None}),
    ("softplus", {"threshold": "20"}),
    ("rrelu", {"lower": None}),
    (nn.ELU(), {"alpha": 1.0}),
)
_WRONG_COUNTS: dict[str, Any] = {
    "float32": torch.tensor(3.0),
    "int32": torch.tensor(3, dtype=torch.int32),
    "two": torch.tensor([3, 4]),
    "none": torch.tensor([], dtype=torch.int64),
    "on another device": torch.tensor(3, device="meta"),
    "a number": 3,
}

_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def _spatial_dims(a: Arguments) -> int:
    return len(a["input"].shape) - 2


def _takes_pools(a: Arguments) -> bool:
    return _spatial_dims(a) in _POOLS


def _made_of_dims(change: Callable[[int], Any]) -> Callable[[Arguments], Any]:
    return lambda a: change(_spatial_dims(a))


#: Made of the number of spatial dimensions.
_WRONG_POOLS: dict[str, Callable[[int], Any]] = {
    "too many dimensions": lambda dims: _POOLS[dims % 3 + 1](1),
    "that returns indices": lambda dims: _POOLS[dims](1, return_indices=True),
    "an average": lambda dims: nn.AvgPool2d(1),
    "its name": lambda dims: "max",
    "a number": lambda dims: 2,
    "a kernel of 0": lambda dims: _POOLS[dims](0),
    "a stride of 0": lambda dims: {"kernel_size": 1, "stride": 0},
    "a negative padding": lambda dims: {"kernel_size": 3, "padding": -1},
    "padding beyond half the kernel": lambda dims: _POOLS[dims](2, padding=2),
    "no dilation": lambda dims: {"kernel_size": 2, "dilation": 0},
    "a float": lambda dims: {"kernel_size": 2.0},
    "too many numbers": lambda dims: {"kernel_size": (1,) * (dims + 1)},
    "an unknown keyword": lambda dims: {"kernel_size": 1, "size": 1},
    "no kernel": lambda dims: {"stride": 1},
    "a kernel that does not fit": lambda dims: _POOLS[dims](1000),
    "a dilation that does not fit": lambda dims: {"kernel_size": 2, "dilation": 1000},
    "windows without an element": lambda dims: {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 200},
}

MISTAKES = [
    *(
        Mistake("pool", text, _made_of_dims(change), _takes_pools, torch_knows=False)
        for text, change in _WRONG_POOLS.items()
    ),
    *(mistake for name in _VECTORS for mistake in _of_tensor(_WRONG_VECTORS, name)),
    *_of_tensor(_WRONG_INPUTS, "input"),
    *_of_tensor(_WRONG_RESIDUALS, "residual", "input", torch_knows=False),
    *(
        Mistake(name, "wants a gradient", _made_of(name, lambda t: _like(t).requires_grad_()), _is_given(name))
        for name in ("running_mean", "running_var")
    ),
    *(
        Mistake(name, "None", _always(None), _is_given(other))
        for name, other in (("running_mean", "running_var"), ("running_var", "running_mean"))
    ),
    Mistake("running_mean", "no statistics", _always(None), lambda a: not a["training"], (("running_var", None),)),
    *_values("eps", -1e-5, -1.0, -math.inf, "1e-5", None),
    Mistake("eps", "0 in training", _always(0.0), lambda a: a["training"]),
    *_values("momentum", "0.1", [0.1], applies=_tracks),
    Mistake("momentum", "None", _always(None), _tracks, (("num_batches_tracked", None),)),
    *_values("drop_p", -0.1, 1.1, math.nan, math.inf, "0.5", None, torch_knows=False),
    *_values("drop_mode", "plane", "", None, 1, torch_knows=False),
    *_values("act", "rleu", "", 3, nn.Softmax, nn.PReLU(), F.relu, ["relu"], torch_knows=False),
    *(
        Mistake("act_kwargs", f"{kwargs} of {act}", _always(kwargs), others=(("act", act),), torch_knows=False)
        for act, kwargs in _WRONG_ACT_KWARGS
    ),
    *(
        Mistake("num_batches_tracked", text, _always(value), _tracks, torch_knows=False)
        for text, value in _WRONG_COUNTS.items()
    ),
]


def _arguments(p: Problem) -> tuple[Arguments, list[Memory]]:
    t = make(p)
    arguments = {
        "input": t.input, "running_mean": t.running_mean, "running_var": t.running_var, "weight": t.weight,
        "bias": t.bias, "training": p.training, "momentum": p.momentum, "eps": p.eps, "residual": t.residual,
        "act": p.act.module(), "drop_p": p.drop_p, "drop_mode": p.drop_mode,
        "num_batches_tracked": t.num_batches_tracked, "stochastic": p.stochastic, "pool": None,
    }  # fmt: skip
    return arguments, list(t.memories.values())


_TORCHS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@profiles.examples(0.7)
@given(problems(most=200), st.sampled_from(MISTAKES), st.sampled_from(("auto", "cpp", "reference")))
def test_mistakes(problem: Problem, mistake: Mistake, backend: str) -> None:
    right, memories = _arguments(problem)
    if not mistake.applies(right) or right["input"].numel() == 0:
        return
    wrong = mistake.make(right)
    count = right["num_batches_tracked"]
    before = None if count is None else count.item()
    with fl.use_backend(backend), pytest.raises(ERRORS) as ours:
        fl.functional.batch_norm_act(**wrong)
    message = str(ours.value)
    assert mistake.argument in message, message
    for memory in memories:
        assert memory.is_untouched(), f"written to before {message}"
    assert count is None or count.item() == before
    if mistake.torch_knows:
        theirs = _torchs_error(wrong, mistake)
        assert theirs is None or type(ours.value) is type(theirs), f"{ours.value!r} where torch raises {theirs!r}"
    profiles.count("mistakes")


def _torchs_error(wrong: Arguments, mistake: Mistake) -> Exception | None:
    """What torch says; None where it does not mind, or falls over what is no tensor or has no channels."""
    arguments = {name: wrong[name] for name in _TORCHS}
    if wrong["momentum"] is None and mistake.argument != "momentum":
        arguments["momentum"] = 0.1  # which torch's layers pass where theirs is None
    if isinstance(wrong["input"], Tensor) and wrong["input"].dim() < 2:
        return None
    try:
        F.batch_norm(**arguments)
    except AttributeError:
        return None
    except ERRORS as error:
        return error
    return None
