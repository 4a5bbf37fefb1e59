"""What a node of a traced graph is to a chain: the tables of norms, additions, activations, dropouts and max-pools.

A new kind of BatchNorm, activation or dropout is a line here. A new stage is its place in `ORDERS`, a table beside the
others, and its argument to the kernel in `chain.Chain`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlayers import activations, modules, pooling
from fastlayers.modules import batch_norm_act
from fastlayers.pooling import Pool

#: The orders in which a chain's steps may follow its BatchNorm. Any may be missing, identities may come in between.
#: All with a max-pool are one function: it commutes with activations that nowhere fall and with dropout of channels,
#: for which `chain` and `match` look. A residual is not fused with one.
ORDERS = (("add", "act", "drop"), ("act", "drop", "pool"), ("act", "pool", "drop"), ("pool", "act", "drop"))

#: What a chain's steps can be.
STAGES = frozenset(stage for order in ORDERS for stage in order)

#: A chain without one of these is not worth a kernel of its own.
REQUIRED = frozenset({"act", "pool"})


def _is_bare(layer: nn.Module) -> str | None:
    """For BatchNorms that bring an activation and a dropout along: why one does more than normalise; None if not."""
    act, drop = getattr(layer, "act", None), getattr(layer, "drop", None)
    if isinstance(layer, batch_norm_act._BatchNormAct):
        bare = layer.act == activations.IDENTITY and layer.drop_p == 0 and layer.pool is None
    else:
        bare = all(type(module) is nn.Identity and not is_hooked(module) for module in (act, drop))
    return None if bare else f"{class_of(layer).__name__} has an activation, dropout or max-pool of its own"


def _is_plain(layer: nn.Module) -> str | None:
    return None


#: BatchNorms that start a chain, and what tells why a given one cannot. Subclasses are not taken: they may do more.
NORMS: dict[type[nn.Module], Callable[[nn.Module], str | None]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _is_plain),
    **dict.fromkeys((modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d), _is_plain),
    **dict.fromkeys((modules.BatchNormAct1d, modules.BatchNormAct2d, modules.BatchNormAct3d), _is_bare),
    modules.SyncBatchNorm: _is_plain,
    modules.SyncBatchNormAct: _is_bare,
}

#: The same for classes of libraries that need not be installed.
NORMS_BY_NAME: dict[str, Callable[[nn.Module], str | None]] = {"timm.layers.norm_act.BatchNormAct2d": _is_bare}

#: Classes whose own forward is a chain that does not trace: the attributes behind the normalisation, in order.
KNOWN_BLOCKS: dict[str, tuple[tuple[str, str], ...]] = {
    "timm.layers.norm_act.BatchNormAct2d": (("drop", "drop"), ("act", "act"))
}

# Why norms that users may expect to be fused are not.
_NORM_PROBLEMS: dict[type[nn.Module], str] = {
    nn.SyncBatchNorm: "torch's exchanges statistics itself; fastlayers.convert_sync_batchnorm makes it one that fuses",
    nn.LazyBatchNorm1d: "it is lazy: run the model once, then fuse it",
    nn.LazyBatchNorm2d: "it is lazy: run the model once, then fuse it",
    nn.LazyBatchNorm3d: "it is lazy: run the model once, then fuse it",
}

#: Dropouts, their mode, and for how many dimensions of the input the mode is right (None: for all). For others torch's
#: channel-wise dropouts do something else: `nn.Dropout1d` on (N, C) drops rows.
DROPS: dict[type[nn.Module], tuple[str, int | None]] = {
    **dict.fromkeys((nn.Dropout, modules.Dropout), ("element", None)),
    **dict.fromkeys((nn.Dropout1d, modules.Dropout1d), ("channel", 3)),
    **dict.fromkeys((nn.Dropout2d, modules.Dropout2d), ("channel", 4)),
    **dict.fromkeys((nn.Dropout3d, modules.Dropout3d), ("channel", 5)),
}

#: Max-pools, and how many spatial dimensions each has.
POOLS: Mapping[type[nn.Module], int] = pooling.MODULES

#: The arguments of torch's max-pools behind the input, in order. They are the modules' attributes, too.
POOL_ARGUMENTS = (*pooling.KEYWORDS, "return_indices")

#: Why a max-pool does not go with some dropouts and activations.
BEFORE_POOL_DROP = "single elements are dropped before it"
BEHIND_POOL_DROP = "drops single elements behind a max-pool"
BEHIND_POOL_ACT = "not monotone, and behind a max-pool"

#: Activation modules, by exact class.
ACTS = frozenset(activations._KIND_OF_MODULE) - {nn.Identity}

#: Those that draw random numbers in training, and so are fused in evaluation mode only.
RANDOM_ACTS = frozenset({nn.RReLU})


@dataclass(frozen=True)
class Function:
    """A function or method that is a step of a chain.

    Attributes:
        stage: one of `STAGES`.
        name: of an activation, or of a dropout or max-pool module in `torch.nn`; none for what returns indices too.
        parameters: the names of its arguments behind the first, by position.
    """

    stage: str
    name: str = ""
    parameters: tuple[str, ...] = ()


def _act(name: str, *parameters: str) -> Function:
    return Function("act", name, parameters)


_ADD = Function("add", parameters=("other",))
_DROP = ("p", "training", "inplace")

_RELU, _RELU6, _SELU = _act("relu", "inplace"), _act("relu6", "inplace"), _act("selu", "inplace")
_LEAKY, _RRELU = _act("leaky_relu", "negative_slope", "inplace"), _act("rrelu", "lower", "upper", "training", "inplace")
_ELU, _CELU = _act("elu", "alpha", "inplace"), _act("celu", "alpha", "inplace")

#: By the name under which a chain remembers the function, so that it can be pickled.
FUNCTIONS: dict[str, tuple[Callable[..., Any], Function]] = {
    "operator.add": (operator.add, _ADD),
    "operator.iadd": (operator.iadd, _ADD),
    "torch.add": (torch.add, _ADD),
    "F.relu": (F.relu, _RELU),
    "torch.relu": (torch.relu, _act("relu")),
    "torch.relu_": (torch.relu_, _act("relu")),
    "F.relu6": (F.relu6, _RELU6),
    "F.leaky_relu": (F.leaky_relu, _LEAKY),
    "F.leaky_relu_": (F.leaky_relu_, _LEAKY),
    "F.rrelu": (F.rrelu, _RRELU),
    "F.elu": (F.elu, _ELU),
    "F.elu_": (F.elu_, _ELU),
    "F.selu": (F.selu, _SELU),
    "torch.selu": (torch.selu, _act("selu")),
    "torch.selu_": (torch.selu_, _act("selu")),
    "F.celu": (F.celu, _CELU),
    "torch.celu": (torch.celu, _act("celu", "alpha")),
    "torch.celu_": (torch.celu_, _act("celu", "alpha")),
    "F.silu": (F.silu, _act("silu", "inplace")),
    "F.mish": (F.mish, _act("mish", "inplace")),
    "F.gelu": (F.gelu, _act("gelu")),
    "torch.sigmoid": (torch.sigmoid, _act("sigmoid")),
    "torch.sigmoid_": (torch.sigmoid_, _act("sigmoid")),
    "torch.tanh": (torch.tanh, _act("tanh")),
    "torch.tanh_": (torch.tanh_, _act("tanh")),
    "F.hardswish": (F.hardswish, _act("hardswish", "inplace")),
    "F.hardsigmoid": (F.hardsigmoid, _act("hardsigmoid", "inplace")),
    "F.softplus": (F.softplus, _act("softplus", "beta", "threshold")),
    "F.dropout": (F.dropout, Function("drop", "Dropout", _DROP)),
    "F.dropout1d": (F.dropout1d, Function("drop", "Dropout1d", _DROP)),
    "F.dropout2d": (F.dropout2d, Function("drop", "Dropout2d", _DROP)),
    "F.dropout3d": (F.dropout3d, Function("drop", "Dropout3d", _DROP)),
    "F.max_pool1d": (F.max_pool1d, Function("pool", "MaxPool1d", POOL_ARGUMENTS)),
    "F.max_pool2d": (F.max_pool2d, Function("pool", "MaxPool2d", POOL_ARGUMENTS)),
    "F.max_pool3d": (F.max_pool3d, Function("pool", "MaxPool3d", POOL_ARGUMENTS)),
    "F.max_pool1d_with_indices": (F.max_pool1d_with_indices, Function("pool")),
    "F.max_pool2d_with_indices": (F.max_pool2d_with_indices, Function("pool")),
    "F.max_pool3d_with_indices": (F.max_pool3d_with_indices, Function("pool")),
    "torch.max_pool1d": (torch.max_pool1d, Function("pool", "MaxPool1d", pooling.KEYWORDS)),
    "torch.max_pool2d": (torch.max_pool2d, Function("pool", "MaxPool2d", pooling.KEYWORDS)),
    "torch.max_pool3d": (torch.max_pool3d, Function("pool", "MaxPool3d", pooling.KEYWORDS)),
}

FUNCTION_NAMES: Mapping[Callable[..., Any], str] = {function: name for name, (function, _) in FUNCTIONS.items()}

METHODS: dict[str, Function] = {
    "add": _ADD,
    "add_": _ADD,
    **{name + end: _act(name) for name in ("relu", "sigmoid", "tanh") for end in ("", "_")},
}

#: Functions and methods that write to the first argument.
IN_PLACE_ADDS = ("operator.iadd", "add_")


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before it was fused."""
    original: type[nn.Module] = getattr(type(module), "_fastlayers_original", type(module))
    return original


def qualified_name(cls: type) -> str:
    """The class's name with that of its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def looks_like_batch_norm(module: nn.Module) -> bool:
    """Whether users would take `module` for a BatchNorm, so that the report owes them a word on it."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in class_of(module).__name__


def norm_problem(module: nn.Module) -> str | None:
    """Why no chain can start at `module`, whatever follows; None if one can."""
    cls = class_of(module)
    check = NORMS.get(cls) or NORMS_BY_NAME.get(qualified_name(cls))
    if check is None:
        return _NORM_PROBLEMS.get(cls, f"{qualified_name(cls)} is not a BatchNorm whose forward is known")
    if is_hooked(module):
        return "it has hooks"
    return check(module)


def module_stage(module: nn.Module) -> str | None:
    """The stage of a chain that calling `module` is: "norm", one of `STAGES`, "identity"; None if none."""
    cls = class_of(module)
    if cls in NORMS or qualified_name(cls) in NORMS_BY_NAME:
        return "norm"
    if cls in ACTS:
        return "act"
    if cls in DROPS:
        return "drop"
    if cls in POOLS:
        return "pool"
    return "identity" if cls is nn.Identity else None


def in_order(stages: Sequence[str]) -> bool:
    """Whether steps of these stages, each at most once, may follow a BatchNorm in this order."""
    return any([stage for stage in order if stage in stages] == list(stages) for order in ORDERS)


def is_worth_it(stages: Iterable[str]) -> bool:
    """Whether a chain of these steps is worth a kernel of its own."""
    return not REQUIRED.isdisjoint(stages)


def pool_of(module: nn.Module) -> Pool | str:
    """`read_pool` of one of torch's modules."""
    return read_pool(POOLS[class_of(module)], {name: getattr(module, name) for name in POOL_ARGUMENTS})


def read_pool(dims: int, given: Mapping[str, Any]) -> Pool | str:
    """The max-pool that the arguments of torch's function or module mean, or why the kernels do not take it.

    Args:
        dims: how many spatial dimensions it has.
        given: by the names of `POOL_ARGUMENTS`; what is missing is as torch has it.
    """
    if given.get("return_indices", False):
        return "it returns indices"
    try:
        pool = pooling.resolve({name: given[name] for name in pooling.KEYWORDS if name in given}, dims)
    except (TypeError, ValueError) as error:
        return str(error)
    assert pool is not None
    if pool.is_fusible:
        return pool
    if pool.dims > 2:
        return f"it has {pool.dims} spatial dimensions, where 1 and 2 are fused"
    return f"its windows have {pool.positions} elements, where up to {pooling.MOST_POSITIONS} are fused"
