"""The activations that layers can fuse: names, parameters, and how torch's modules are read as one.

The numbers are those of ``enum class Activation`` in csrc/kernels/common/activations.h, which defines what the kernels
compute; `Activation.apply` is the same function as plain PyTorch.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Activation:
    """One activation with its parameters.

    Attributes:
        name: its name in the table below.
        code: its number in the kernels.
        params: what the kernels need of its parameters, always three numbers.
        apply: the function itself on a tensor.
        derivatives: where the derivative takes only two values, these: the smaller, and the other. Then backward needs
            one bit per element instead of the activation's input.
        monotone: whether it nowhere falls, so that the largest of several values comes from the largest argument.
        random: what it is in training, if that draws random numbers and so cannot be fused (RReLU).
        kwargs: the parameters it was made with.
    """

    name: str
    code: int
    params: tuple[float, float, float]
    apply: Callable[[Tensor], Tensor] = field(compare=False, repr=False)
    derivatives: tuple[float, float] | None = None
    monotone: bool = True
    random: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)
    kwargs: tuple[tuple[str, object], ...] = ()

    def in_evaluation(self) -> Activation:
        """The same without randomness."""
        return self if self.random is None else replace(self, random=None)

    def __reduce__(self) -> tuple[object, ...]:
        return resolve, (self.name, dict(self.kwargs))


def _activation(
    name: str,
    code: int,
    apply: Callable[[Tensor], Tensor],
    *params: float,
    derivatives: tuple[float, float] | None = None,
    monotone: bool = True,
    random: Callable[[Tensor], Tensor] | None = None,
) -> Activation:
    a, b, c = (*params, 0.0, 0.0, 0.0)[:3]
    return Activation(name, code, (float(a), float(b), float(c)), apply, derivatives, monotone, random)


def _hardsigmoid(z: Tensor) -> Tensor:
    if torch.compiler._is_exporting_flag:  # not is_exporting(), as in `backends.observer`
        return F.hardsigmoid(z)  # one node
    # Its gradient is 1 / 6 in float32, for float64 too.
    return F.relu6(z + 3) / 6


def _leaky_relu(negative_slope: float = 0.01) -> Activation:
    return _activation(
        "leaky_relu",
        3,
        lambda z: F.leaky_relu(z, negative_slope),
        negative_slope,
        derivatives=(negative_slope, 1.0),
        monotone=negative_slope >= 0,
    )


def _rrelu(lower: float = 1.0 / 8, upper: float = 1.0 / 3) -> Activation:
    return _activation(
        "rrelu",
        3,
        lambda z: F.rrelu(z, lower, upper, training=False),
        (lower + upper) / 2,
        derivatives=((lower + upper) / 2, 1.0),
        monotone=lower + upper >= 0,
        random=lambda z: F.rrelu(z, lower, upper, training=True),
    )


def _elu(alpha: float = 1.0) -> Activation:
    return _activation("elu", 4, lambda z: F.elu(z, alpha), 1.0, alpha, 1.0, monotone=alpha >= 0)


def _selu() -> Activation:
    return _activation("selu", 4, F.selu, _SELU_SCALE, _SELU_SCALE * _SELU_ALPHA, 1.0)


def _celu(alpha: float = 1.0) -> Activation:
    if alpha == 0:
        raise ValueError(f"act_kwargs: alpha should not be 0 for celu, but got {alpha}")
    return _activation("celu", 4, lambda z: F.celu(z, alpha), 1.0, alpha, 1.0 / alpha)


def _gelu(approximate: str = "none") -> Activation:
    if approximate == "none":
        return _activation("gelu", 7, F.gelu, monotone=False)
    if approximate == "tanh":
        return _activation("gelu", 8, lambda z: F.gelu(z, approximate="tanh"), monotone=False)
    raise ValueError(f"act_kwargs: approximate should be 'none' or 'tanh', but got {approximate!r}")


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    if beta == 0:
        raise ValueError(f"act_kwargs: beta should not be 0 for softplus, but got {beta}")
    # At threshold / beta it falls by log(1 + exp(-threshold)) / beta. From 20 on that is lost in float32, and 1e-10 of
    # the value in float64.
    return _activation(
        "softplus", 13, lambda z: F.softplus(z, beta, threshold), beta, threshold, monotone=beta > 0 and threshold >= 20
    )


@dataclass(frozen=True)
class _Kind:
    """How to build an activation, and the torch module whose attributes have its parameters' names."""

    build: Callable[..., Activation]
    module: type[nn.Module]
    parameters: tuple[str, ...]


def _kind(build: Callable[..., Activation], module: type[nn.Module]) -> _Kind:
    return _Kind(build, module, tuple(inspect.signature(build).parameters))


def _fixed(activation: Activation, module: type[nn.Module]) -> _Kind:
    return _Kind(lambda: activation, module, ())


_KINDS: dict[str, _Kind] = {
    "identity": _fixed(_activation("identity", 0, lambda z: z), nn.Identity),
    "relu": _fixed(_activation("relu", 1, F.relu, derivatives=(0.0, 1.0)), nn.ReLU),
    "relu6": _fixed(_activation("relu6", 2, F.relu6, derivatives=(0.0, 1.0)), nn.ReLU6),
    "leaky_relu": _kind(_leaky_relu, nn.LeakyReLU),
    "rrelu": _kind(_rrelu, nn.RReLU),
    "elu": _kind(_elu, nn.ELU),
    "selu": _kind(_selu, nn.SELU),
    "celu": _kind(_celu, nn.CELU),
    "silu": _fixed(_activation("silu", 5, F.silu, monotone=False), nn.SiLU),
    "mish": _fixed(_activation("mish", 6, F.mish, monotone=False), nn.Mish),
    "gelu": _kind(_gelu, nn.GELU),
    "gelu_tanh": _fixed(replace(_gelu("tanh"), name="gelu_tanh"), nn.GELU),
    "sigmoid": _fixed(_activation("sigmoid", 9, torch.sigmoid), nn.Sigmoid),
    "tanh": _fixed(_activation("tanh", 10, torch.tanh), nn.Tanh),
    "hardswish": _fixed(_activation("hardswish", 11, F.hardswish, monotone=False), nn.Hardswish),
    "hardsigmoid": _fixed(_activation("hardsigmoid", 12, _hardsigmoid, derivatives=(0.0, 1 / 6)), nn.Hardsigmoid),
    "softplus": _kind(_softplus, nn.Softplus),
}

# Other spellings that timm and older code use.
_ALIASES = {"swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid", "none": "identity"}

_KIND_OF_MODULE = {kind.module: name for name, kind in _KINDS.items() if name != "gelu_tanh"}

# Built once: the functions resolve a name at every call.
_DEFAULTS = {name: kind.build() for name, kind in _KINDS.items()}

#: Every name that ``act=`` and ``act_layer=`` take.
NAMES: tuple[str, ...] = tuple(_KINDS)

IDENTITY, RELU = _DEFAULTS["identity"], _DEFAULTS["relu"]

_NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)

ActLayer = str | type[nn.Module] | nn.Module | Activation | None


def resolve(act: ActLayer, act_kwargs: Mapping[str, object] | None = None) -> Activation:
    """The `Activation` that a name, an ``nn`` class, a module or ``None`` (identity) stands for.

    Args:
        act: a name of `NAMES`, one of torch's activation classes, an instance of one (its parameters are read; its
            ``inplace`` changes nothing here), or an `Activation`.
        act_kwargs: parameters by the names of torch's constructors (``negative_slope``, ``alpha``, ...), for a name or
            a class. ``inplace`` is accepted.

    Raises:
        ValueError: an unknown activation or parameter.
        TypeError: `act` is of another type, a module comes with `act_kwargs`, or a parameter is no number.
    """
    if isinstance(act, Activation):
        return act
    if isinstance(act, str) and act in _DEFAULTS and not act_kwargs:
        return _DEFAULTS[act]
    kwargs = {name: value for name, value in (act_kwargs or {}).items() if name != "inplace"}
    if isinstance(act, nn.Module):
        if kwargs:
            raise TypeError(f"act_kwargs: should be empty when act_layer is a module, but got {kwargs}")
        kind = _kind_of_module(type(act))
        return _build(kind, {name: getattr(act, name) for name in kind.parameters})
    kind = _kind_of(act)
    unknown = sorted(set(kwargs) - set(kind.parameters))
    if unknown:
        allowed = ", ".join(kind.parameters) or "none"
        raise ValueError(f"act_kwargs: unknown parameters {unknown} for activation {act!r}; allowed: {allowed}")
    return _build(kind, kwargs)


def as_module(act: ActLayer, act_kwargs: Mapping[str, object] | None = None) -> nn.Module:
    """A new module of torch's for an activation. The arguments and errors are those of `resolve`."""
    activation = resolve(act, act_kwargs)
    kwargs = {"approximate": "tanh"} if activation.name == "gelu_tanh" else dict(activation.kwargs)
    return _kind_of(activation.name).module(**kwargs)


def parameters_of(module: type[nn.Module]) -> tuple[str, ...]:
    """The attributes of one of torch's activation modules that `resolve` reads."""
    return _kind_of_module(module).parameters


def _build(kind: _Kind, kwargs: Mapping[str, object]) -> Activation:
    for name, value in kwargs.items():
        if name != "approximate" and not isinstance(value, _NUMBERS):
            raise TypeError(f"act_kwargs: {name} should be a number, but got {value!r} of type {type(value).__name__}")
    activation = kind.build(**kwargs)
    return replace(activation, kwargs=tuple(kwargs.items())) if kwargs else activation


def _kind_of(act: object) -> _Kind:
    if act is None:
        return _KINDS["identity"]
    if isinstance(act, str):
        name = _ALIASES.get(act.lower(), act.lower())
        if name not in _KINDS:
            raise ValueError(f"act: unknown activation {act!r}; allowed: {', '.join(NAMES)}")
        return _KINDS[name]
    if isinstance(act, type) and issubclass(act, nn.Module):
        return _kind_of_module(act)
    raise TypeError(
        f"act: should be a name, an nn.Module class or a module, but got {act!r} of type {type(act).__name__}"
    )


def _kind_of_module(module: type[nn.Module]) -> _Kind:
    # Subclasses are not taken: their forward may be another function.
    name = _KIND_OF_MODULE.get(module)
    if name is None:
        allowed = ", ".join(f"nn.{m.__name__}" for m in _KIND_OF_MODULE)
        raise ValueError(f"act: unknown activation class {module.__name__}; allowed: {allowed}")
    return _KINDS[name]
