"""Has a module run its graphs instead of its forward, and undoes that.

The module gets a subclass of its class, with the class's name, whose forward runs the first graph that stands for the
present state and arguments, and otherwise the forward of the class. All else of the module stays as it is.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import linecache
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fastlayers.fusion.chain import Chain, warn
from fastlayers.fusion.table import class_of
from fastlayers.fusion.trace import Guard, Traced, failing_guard

#: The name of what fusion keeps in a module's ``__dict__``.
KEY = "_fastlayers_fusion"

_MISSING = object()
_counter = itertools.count()
_TYPES: dict[str, type | tuple[type, ...]] = {"tensor": Tensor, "sequence": (list, tuple)}


class Program:
    """The Python function that a graph was written as."""

    def __init__(self, label: str, source: str, globals: dict[str, Any]) -> None:
        self.label, self.source, self.globals = label, source, globals
        filename = f"<fastlayers.fuse: {label} {next(_counter)}>"
        namespace = dict(globals)
        exec(compile(source, filename, "exec"), namespace)
        self.run: Callable[..., Any] = namespace["forward"]
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        weakref.finalize(self, linecache.cache.pop, filename, None)

    @classmethod
    def of(cls, graph: fx.Graph, label: str) -> Program:
        """The program of `graph`, a method of the traced module."""
        code = graph.python_code("self")
        return cls(label, code.src, dict(code.globals))

    def __reduce__(self) -> tuple[Any, ...]:
        # Modules cannot be pickled.
        plain = {k: v for k, v in self.globals.items() if not isinstance(v, types.ModuleType)}
        modules = {k: v.__name__ for k, v in self.globals.items() if isinstance(v, types.ModuleType)}
        return _rebuild_program, (self.label, self.source, plain, modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing in it belongs to one module, and nothing changes


def _rebuild_program(label: str, source: str, plain: dict[str, Any], modules: dict[str, str]) -> Program:
    return Program(label, source, plain | {k: importlib.import_module(name) for k, name in modules.items()})


@dataclass
class Variant:
    """One way in which the forward can go.

    Attributes:
        guards: what must hold of the module's state.
        inputs: the arguments that it takes, with the type that each must have, "tensor", "sequence" or None for any.
        defaults: the arguments that must be as their defaults.
        positional: the names of the arguments that can be given by position.
        program: what runs; None for the forward as it is, which has nothing to fuse.
        chains: the names of its chains.
    """

    guards: tuple[Guard, ...]
    inputs: dict[str, str | None]
    defaults: dict[str, Any]
    positional: tuple[str, ...]
    program: Program | None
    chains: dict[str, Chain] = field(default_factory=dict)

    @classmethod
    def of(cls, traced: Traced, program: Program | None, chains: dict[str, Chain]) -> Variant:
        """The variant that `program`, or without it the forward, is for a traced module."""
        return cls(traced.guards, traced.inputs, traced.defaults, traced.positional, program, chains)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The values of `inputs` in a call; None where the call is none for this variant."""
        names = tuple(self.inputs)
        if not kwargs and len(names) == len(args) and names == self.positional[: len(args)]:
            values = list(args)
        else:
            given = dict(zip(self.positional, args, strict=False)) | kwargs
            if len(given) != len(args) + len(kwargs):
                return None
            for name, value in given.items():
                if name not in self.inputs and value is not self.defaults.get(name, _MISSING):
                    return None
            if any(name not in given for name in names):
                return None
            values = [given[name] for name in names]
        for value, kind in zip(values, self.inputs.values(), strict=True):
            if value is None or (kind is not None and not isinstance(value, _TYPES[kind])):
                return None
        return values


class Fusion:
    """What fusion keeps of one module.

    Attributes:
        variants: the ways in which its forward can go.
        reason: if it is a BatchNorm that is in no chain, why.
        fallbacks: why its forward once ran as it was written.
    """

    def __init__(self, variants: tuple[Variant, ...] = (), reason: str | None = None) -> None:
        self.variants, self.reason = variants, reason
        self.fallbacks: tuple[str, ...] = ()
        for variant in variants:
            for name, chain in variant.chains.items():
                setattr(self, name, chain)  # where the programs look for them

    @property
    def chains(self) -> list[Chain]:
        """Of each BatchNorm the chains of the first variant that has any."""
        found: dict[str, list[Chain]] = {}
        for variant in self.variants:
            own: dict[str, list[Chain]] = {}
            for chain in variant.chains.values():
                own.setdefault(chain.norm, []).append(chain)
            found = own | found
        return [chain for chains in found.values() for chain in chains]

    def take_fallbacks(self, other: Fusion) -> None:
        """Takes over what a copy had to run unfused."""
        self.fallbacks = other.fallbacks
        for own, theirs in zip(self.variants, other.variants, strict=True):
            for name, chain in own.chains.items():
                chain.fallbacks = theirs.chains[name].fallbacks

    def select(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The program for a call of `module` and its arguments; None and none for the forward of its class."""
        problem = "the forward is called with other arguments, or in another mixture of modes, than it was traced with"
        for variant in self.variants:
            values = variant.arguments(args, kwargs)
            if values is None:
                continue
            failing = failing_guard(module, variant.guards)
            if failing is None:
                return variant.program, values
            if "training" not in failing:  # else it is the variant for the other mode
                problem = failing
        if problem not in self.fallbacks:
            self.fallbacks = (*self.fallbacks, problem)
            warn(problem)
        return None, []


def problem_of_class(module: nn.Module) -> str | None:
    """Why a module's forward cannot be replaced; None if it can."""
    cls = type(module)
    if isinstance(module, fx.GraphModule):
        return "it is a torch.fx.GraphModule: fuse the model before it is traced"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if cls.__call__ is not nn.Module.__call__:
        return f"{cls.__name__} has a __call__ of its own"
    if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        return f"{cls.__name__} has a way of its own to be copied"
    if hasattr(cls, "__deepcopy__") or hasattr(cls, "__copy__"):
        return f"{cls.__name__} has a way of its own to be copied"
    return None


def install(module: nn.Module, fusion: Fusion) -> None:
    """Has `module` run the variants of `fusion`."""
    module.__dict__[KEY] = fusion
    if fusion.variants:
        module.__class__ = _fused_class(type(module))


def remove(module: nn.Module) -> None:
    """Gives `module` its class back."""
    module.__class__ = class_of(module)
    module.__dict__.pop(KEY, None)


def fusion_of(module: nn.Module) -> Fusion | None:
    """What was installed in `module`, if anything."""
    fusion: Fusion | None = module.__dict__.get(KEY)
    return fusion


_classes: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakValueDictionary()


def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    found = _classes.get(original)
    if found is None:
        found = _classes[original] = _make_class(original)
    return found


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        program, values = self._fastlayers_fusion.select(self, args, kwargs)
        if program is None:
            return original.forward(self, *args, **kwargs)
        return program.run(self, *values)

    def reduce(self: Any, protocol: Any) -> Any:
        # By the original class, since this one cannot be imported.
        _, (_, *arguments), *rest = super(fused, self).__reduce_ex__(max(protocol, 2))
        return (_new, (original, *arguments), *rest)

    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "_fastlayers_original": original,
        "forward": forward,
    }
    fused: type[nn.Module] = types.new_class(original.__name__, (original,), exec_body=lambda space: space.update(body))
    return fused


def _new(original: type[nn.Module], *arguments: Any) -> nn.Module:
    module = original.__new__(original, *arguments)
    module.__class__ = _fused_class(original)
    return module
