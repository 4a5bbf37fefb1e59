"""A module's own forward as a `torch.fx` graph, or the reason why no graph would do what the forward does.

`torch.fx` runs the forward once, with proxies for its inputs. What the forward decides meanwhile by anything else (a
flag of the module, a random number, the type of an argument) is decided for good in the graph. Here all that is either
watched, and becomes a condition under which the graph may stand for the forward (`Guard`), or refused.
"""

from __future__ import annotations

import _lsprof
import builtins
import copy
import dis
import enum
import functools
import gc
import importlib
import inspect
import operator
import os
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo import eval_frame
from torch.fx import _symbolic_trace as fx_trace
from torch.utils._python_dispatch import TorchDispatchMode

from fastlayers.fusion.table import class_of

# What is replaced while a forward is traced is there for all threads: one traces at a time, since each puts back what
# it found.
_tracing = threading.RLock()
# In a forked process, whether a thread that it does not have holds torch.compile's lock.
_compilation_never_ends = False


def _after_fork_in_child() -> None:
    global _compilation_never_ends
    _tracing.release()
    lock = getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)
    if lock is None:
        return
    _compilation_never_ends = not lock.acquire(blocking=False)
    if not _compilation_never_ends:
        lock.release()


# A process forked meanwhile would keep what is replaced, and wait for a thread that it does not have.
os.register_at_fork(before=_tracing.acquire, after_in_parent=_tracing.release, after_in_child=_after_fork_in_child)

# How often a forward is traced anew where other threads may have drawn the random numbers that it seems to draw.
_ATTEMPTS = 5


class TraceError(Exception):
    """No graph stands for a forward; the text says why."""


@dataclass(frozen=True)
class Guard:
    """A condition on a module's state under which a graph holds.

    Attributes:
        path: of the module, from the traced one.
        kind: "value": the attribute `name` equals `expected`; "none": whether it is None equals `expected`; "children":
            the names of its submodules are `expected`; "inlined": its class is `expected` and a call of it is a call of
            its class's forward.
        name: of the attribute.
        expected: what was read while tracing.
    """

    path: tuple[str, ...]
    kind: str
    name: str
    expected: Any


@dataclass
class Traced:
    """A module's forward as a graph, and when it holds.

    Attributes:
        graph: with submodules as leaves; ``node.meta["owner"]`` is the path of the module whose forward made a node.
        guards: conditions on the state.
        inputs: the arguments that the graph takes, with the type that the forward saw each as: "tensor", "sequence", or
            None where it never asked.
        defaults: the other arguments, which the graph takes to be as their defaults.
        positional: the names of the arguments that can be given by position.
        asked: the inputs whose type the forward asked for.
    """

    graph: fx.Graph
    guards: tuple[Guard, ...]
    inputs: dict[str, str | None]
    defaults: dict[str, Any]
    positional: tuple[str, ...]
    asked: frozenset[str]


Kinds = Mapping[str, str | None]

_TYPES: dict[str, type] = {"tensor": Tensor, "sequence": list}
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)
_BY_IDENTITY = (types.FunctionType, types.BuiltinFunctionType, type)
_CONTAINERS = (list, dict, set)
# What every module has; the hooks among it are looked at when the graph runs.
_BASE_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"training"}

# Operations of Python, and modules whose functions in C, ask for a type in the name of the code that they are in.
_ASKS_FOR_A_TYPE = ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS")
_ASK_FOR_A_TYPE = ("builtins", "_abc")

# Frames of these modules and calls of these functions have effects that a graph does not show.
_SILENT_MODULES = {
    "torch.autograd.grad_mode": "switches gradients",
    "torch.amp.autocast_mode": "switches autocast",
    "torch.autograd.function": "calls an autograd.Function",
    "torch.autograd.profiler": "marks a region for the profiler",
    "torch.utils.checkpoint": "uses checkpointing",
    "torch.random": "sets or reads the generator",
    "logging": "logs",
    "warnings": "warns",
}
_SILENT_CALLS: dict[Any, str] = {
    builtins.print: "prints",
    builtins.open: "opens a file",
    torch._C._set_grad_enabled: "switches gradients",
    torch.is_grad_enabled: "asks whether gradients are on",
    torch.is_autocast_enabled: "asks whether autocast is on",
}


def _not_compiled(function: Callable[..., Any]) -> None:
    """Has torch.compile leave the function to Python, and look at what it calls.

    It cannot know which thread it compiles for, and what it compiled would hold no longer than one module is traced.
    """
    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


class _Here:
    """True in the thread that made it until `thread` is set to None, False in others."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return self.thread is not None and self.thread == threading.get_ident()


_not_compiled(_Here.__bool__)


Methods = Mapping[str, Callable[..., Any]]


@contextmanager
def _methods_of_modules(hooks: Methods, here: _Here) -> Iterator[None]:
    """Has nn.Module the methods `hooks`, by their names, where `here`; in other threads they do what they did."""
    before = {name: nn.Module.__dict__.get(name) for name in hooks}
    try:
        for name, hook in hooks.items():
            setattr(nn.Module, name, _where(here, hook, getattr(nn.Module, name)))
        yield
    finally:
        # First of all, and no call: whatever interrupts what follows leaves methods that do what they did.
        here.thread = None
        for name, method in before.items():
            if method is not None:
                setattr(nn.Module, name, method)
            elif name in nn.Module.__dict__:
                delattr(nn.Module, name)


def _where(here: _Here, hook: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (hook if here else otherwise)(module, *args, **kwargs)

    _not_compiled(method)
    return method


def _no_compilation() -> AbstractContextManager[object]:
    """Has torch.compile in other threads wait: what it would see of modules is not what is there afterwards."""
    # torch imports its compiler where a forward first uses checkpointing, say; that is none of the forward's effects.
    # Nor is it to be cut short by a fork, after which nobody would go on with it.
    with _tracing:
        compiler = importlib.import_module("torch._dynamo.convert_frame")
    return nullcontext() if _compilation_never_ends else compiler.compile_lock


@contextmanager
def _no_functions_of_autograd(watch: _Watch, here: _Here) -> Iterator[None]:
    """Refuses calls of an autograd.Function where `here`: some versions of torch (2.15) crash when given proxies."""
    function: Any = torch.autograd.Function  # to the checker, methods cannot be set
    before = function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if here:
            watch.refuse("calls an autograd.Function")
        return before.__get__(None, cls)(*args, **kwargs)

    _not_compiled(apply)
    try:
        function.apply = classmethod(apply)
        yield
    finally:
        here.thread = None
        function.apply = before


@contextmanager
def _said_to_trace(here: _Here) -> Iterator[None]:
    """Tells torch.compile, which refuses to be traced, that torch.fx traces; in other threads it may run."""
    if hasattr(fx_trace, "_is_fx_tracing_context"):  # from torch 2.15 on, of each thread its own
        with fx_trace._is_fx_tracing_context(True):
            yield
        return
    before = fx_trace._is_fx_tracing_flag
    try:
        # A bool to the checker; it is asked for its truth only.
        fx_trace._is_fx_tracing_flag = here  # type: ignore[assignment]
        yield
    finally:
        fx_trace._is_fx_tracing_flag = before


class _Proxy(fx.Proxy):
    """A proxy that passes for a tensor, or for a list, where the traced code asks for its type."""

    # To the checker __class__ is settable, and always the class itself; here it is what the traced code is told.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        # The tracer of these proxies is ours, which has these.
        if _is_library(frame) or not self.tracer.watch.is_asked_by(frame):  # type: ignore[attr-defined]
            return _Proxy
        return self.tracer.type_of(self.node)  # type: ignore[attr-defined, no-any-return]


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    # Without these methods, a += b would be traced as a + b.
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what is computed with buffers would be a constant

    def __init__(self, inline: frozenset[str], kinds: Kinds, watch: _Watch) -> None:
        super().__init__()
        self.inline, self.kinds, self.watch = inline, kinds, watch
        self.owners = [""]
        self.inputs: dict[str, str | None] = {}
        self.defaults: dict[str, Any] = {}
        self.positional: list[str] = []
        self.asked: set[str] = set()

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As `torch.fx.Tracer.trace` of a module, but that modules which other threads run are none of its business."""
        assert isinstance(root, nn.Module)
        assert concrete_args is None
        self.root, self.root_module_name = root, root._get_name()
        self.submodule_paths = {module: path for path, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{path}.{name}" if path else name
            for module, path in self.submodule_paths.items()
            for name, value in module.__dict__.items()
            if isinstance(value, (Tensor, torch.ScriptObject))
        }
        self.graph = fx.Graph(tracer_cls=type(self))
        forward = type(root).forward
        run, args = self.create_args_for_root(forward, True)
        with self._recording(forward):
            output = run(*args)
        self.create_node("output", "output", (self.create_arg(output),), {})
        return self.graph

    @contextmanager
    def _recording(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Records calls of modules and of functions, reads of parameters, and what `watch` wants to know."""
        here, proxies = _Here(), dict[str, fx.Proxy]()
        run_module, read_parameter = nn.Module.__call__, nn.Module.__getattr__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fx_trace._autowrap_check(patcher, _globals_of(module), self._autowrap_function_ids)
            return self.call_module(module, functools.partial(run_module, module), args, kwargs)

        def read(module: nn.Module, name: str) -> Any:
            return self.getattr(name, read_parameter(module, name), proxies)

        hooks = {"__call__": call, "__getattr__": read, **self.watch.hooks}
        with _said_to_trace(here), fx_trace._Patcher() as patcher:
            # Functions that are replaced do what they did for all but proxies.
            fx_trace._patch_wrapped_functions(patcher)
            for names in (forward.__globals__, *(module.__dict__ for module in self._autowrap_search)):
                fx_trace._autowrap_check(patcher, names, self._autowrap_function_ids)
            with (
                self.watch.active(),
                _no_functions_of_autograd(self.watch, here),
                _methods_of_modules(hooks, here),
            ):
                yield

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.owners[-1]
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Proxy:
            return a.node
        if isinstance(a, Tensor) and a not in self.tensor_attrs and not self._belongs_to_root(a):
            raise TraceError("it uses a tensor that is no attribute of a module")
        return super().create_arg(a)

    def _belongs_to_root(self, tensor: Tensor) -> bool:
        return any(tensor is t for group in (self.root.parameters(), self.root.buffers()) for t in group)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if path not in self.inline:
            return self.create_proxy("call_module", path, args, kwargs)
        self.owners.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self.owners.pop()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # Arguments that have a default are left at it unless asked for: a proxy never is None.
        _, *parameters = inspect.signature(root_fn).parameters.values()
        positional: list[fx.Proxy] = []
        keywords: dict[str, fx.Proxy] = {}
        for parameter in parameters:
            name, kind = parameter.name, parameter.kind
            if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if kind != parameter.KEYWORD_ONLY:
                self.positional.append(name)
            if parameter.default is not parameter.empty and name not in self.kinds:
                self.defaults[name] = parameter.default
                continue
            self.inputs[name] = self.kinds.get(name)
            proxy = self.create_proxy("placeholder", name, (), {})
            if kind == parameter.KEYWORD_ONLY or self.defaults:
                keywords[name] = proxy
            else:
                positional.append(proxy)

        def run(*proxies: fx.Proxy) -> Any:
            return root_fn(self.root, *positional, **keywords)

        return run, [*positional, *keywords.values()]

    def type_of(self, node: fx.Node) -> type:
        """The type that the traced code gets to see a proxy as."""
        if node.op == "placeholder":
            name = str(node.target)
            self.asked.add(name)
            self.inputs[name] = self.inputs[name] or "tensor"
            return _TYPES[self.inputs[name] or "tensor"]
        if node.op == "get_attr" or (node.op == "call_module" and self._returns_tensor(str(node.target))):
            return Tensor
        raise TraceError(f"it asks for the type of what {node.target} returns")

    def _returns_tensor(self, path: str) -> bool:
        cls = class_of(self.root.get_submodule(path))
        recurrent = issubclass(cls, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Sequential))
        return cls.__module__.startswith("torch.nn.modules") and not recurrent


class _NoRealTensors(TorchDispatchMode):
    """Refuses to compute: a result on real tensors would be a constant of the graph, or decide what is in it."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.refuse(f"calls {func} on tensors that do not depend on its inputs")


class _Watch:
    """Records what the traced code reads from modules, and refuses what it must not do."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        scripted = torch.jit.ScriptModule  # their forward is an attribute, and theirs alone
        self.paths = {id(m): path for path, m in root.named_modules() if not isinstance(m, scripted)}
        self.reads: dict[tuple[str, str, str], Any] = {}
        self.containers: list[tuple[Any, Any]] = []
        self.violation: str | None = None
        self.draws = False  # this thread or another
        self.calls_of_c: dict[types.FrameType, Any] = {}  # that have not returned, by the code that they are in

    @property
    def hooks(self) -> Methods:
        """What methods of nn.Module are to be meanwhile."""

        def read(module: nn.Module, name: str) -> Any:
            self._on_read(module, name)
            return object.__getattribute__(module, name)

        def write(module: nn.Module, name: str, *value: Any) -> None:
            raise TraceError(f"it sets or deletes the attribute {name!r} of a module")

        return {"__getattribute__": read, "__setattr__": write, "__delattr__": write}

    @contextmanager
    def active(self) -> Iterator[None]:
        profile, states = sys.getprofile(), _random_states()
        collects = gc.isenabled()
        # What others have the collector call (a test framework's clock, say) is none of the forward's doing.
        gc.disable()
        try:
            if isinstance(profile, _lsprof.Profiler):  # cProfile's, which sys.setprofile cannot put back
                profile.disable()
            sys.setprofile(self._audit)
            with _NoRealTensors(self):
                yield
        finally:
            sys.setprofile(None if isinstance(profile, _lsprof.Profiler) else profile)
            if isinstance(profile, _lsprof.Profiler):
                profile.enable()
            if collects:
                gc.enable()
            self.calls_of_c.clear()
            self._restore_containers()
        self.draws = _random_states() != states
        if self.draws:
            self.violation = self.violation or "it draws random numbers of Python or NumPy"
        if self.violation is not None:
            raise TraceError(self.violation)

    def refuse(self, effect: str) -> NoReturn:
        """Ends the tracing for the first effect that was seen: what follows, a checkpoint's say, may be torch's own."""
        self.violation = self.violation or f"it {effect}"
        raise TraceError(self.violation)

    def guards(self) -> tuple[Guard, ...]:
        found = [
            Guard(tuple(path.split(".")) if path else (), kind, name, expected)
            for (path, kind, name), expected in self.reads.items()
        ]
        return tuple(sorted(found, key=lambda guard: guard.name != "training"))  # what most often differs

    def _on_read(self, module: nn.Module, name: str) -> None:
        path = self.paths.get(id(module))
        state = object.__getattribute__(module, "__dict__")
        if path is None:
            return
        if name == "_modules":
            if sys._getframe(3).f_code.co_name != "named_modules":  # torch.fx's own reading
                self.reads[path, "children", name] = tuple(state[name])
        elif name in state:
            if name not in _BASE_ATTRIBUTES:
                self._on_value(path, name, state[name])
        else:
            for group in ("_modules", "_parameters", "_buffers"):
                if name in state.get(group, {}):
                    self.reads[path, "none", name] = state[group][name] is None

    def _on_value(self, path: str, name: str, value: Any) -> None:
        if isinstance(value, (Tensor, nn.Module)):
            return
        if not _is_watchable(value):
            raise TraceError(f"it reads the attribute {name!r}, whose type {type(value).__name__} cannot be watched")
        key = (path, "value", name)
        if key not in self.reads:
            snapshot = copy.deepcopy(value) if isinstance(value, (*_CONTAINERS, tuple)) else value
            self.reads[key] = snapshot
            if isinstance(value, _CONTAINERS):
                self.containers.append((value, snapshot))

    def _restore_containers(self) -> None:
        for container, snapshot in self.containers:
            if not _same(container, snapshot):
                self.violation = self.violation or f"it changes a {type(container).__name__} of the module"
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(snapshot)

    def is_asked_by(self, frame: types.FrameType) -> bool:
        """Whether the code of `frame` asks for a type, not a function in C that it calls.

        Those of torch go on to read from the tensor that they were told to have; some versions (2.15) then crash.
        """
        if _operation(frame) in _ASKS_FOR_A_TYPE:
            return True
        if frame not in self.calls_of_c:
            self.refuse("gives what depends on its inputs to C, which asks for its type")
        return getattr(self.calls_of_c[frame], "__module__", None) in _ASK_FOR_A_TYPE

    def _audit(self, frame: types.FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            self.calls_of_c[frame] = function
        elif event.startswith("c_"):
            self.calls_of_c.pop(frame, None)
        caller = frame.f_back if event == "call" else frame
        if self.violation is not None or caller is None or _module_name(caller).startswith("torch.fx"):
            return
        if event == "c_call":
            effect = _SILENT_CALLS.get(function) if type(function) is types.BuiltinFunctionType else None
            if effect is None and getattr(function, "__module__", None) == "time":
                effect = "reads the clock"
            if effect is None or (_is_library(frame) and function is not torch._C._set_grad_enabled):
                return
        elif event == "call":
            effect = _SILENT_MODULES.get(_module_name(frame))
            # torch.fx itself logs, and logging calls itself.
            if not _module_name(frame).startswith("torch.") and (
                _is_library(caller) or _module_name(caller) in _SILENT_MODULES
            ):
                effect = None
            if effect is None and not _is_library(frame) and _writes_outside(frame.f_code):
                effect = "writes to a variable outside of itself"
            if effect is None:
                return
        else:
            return
        self.violation = f"it {effect}"


def _globals_of(module: nn.Module) -> dict[str, Any]:
    """Of the function that is the forward of `module`."""
    return getattr(getattr(module, "forward", module), "__globals__", {})


def _module_name(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_library(frame: types.FrameType) -> bool:
    name = _module_name(frame)
    return name == "torch" or name.startswith(("torch.", "fastlayers.fusion"))


def _operation(frame: types.FrameType) -> str:
    """The name of what Python does in the frame at the moment."""
    code, index = frame.f_code.co_code, frame.f_lasti
    while dis.opname[code[index]] == "CACHE":  # behind an operation are entries of its own
        index -= 2
    return dis.opname[code[index]]


def _writes_outside(code: types.CodeType) -> bool:
    free = code.co_freevars
    return any(
        i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (i.opname == "STORE_DEREF" and i.argval in free)
        for i in dis.get_instructions(code)
    )


def _random_states() -> list[Any]:
    states: list[Any] = [random.getstate()]
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states.append((kind, keys.tobytes(), *rest))
    return states


def _is_watchable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_watchable(v) for pair in value.items() for v in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_watchable, value))
    return isinstance(value, (*_ATOMS, *_BY_IDENTITY))


def _same(value: Any, expected: Any) -> bool:
    return value is expected or (type(value) is type(expected) and bool(value == expected))


def failing_guard(module: nn.Module, guards: tuple[Guard, ...]) -> str | None:
    """Why a graph with these conditions does not stand for the forward of `module` now; None if it does."""
    for guard in guards:
        target = module
        for name in guard.path:
            child = getattr(target, name, None)
            if child is None:
                return f"{'.'.join(guard.path)} is gone"
            target = child
        if not _holds(guard, target):
            return _what_failed(guard)
    return None


def _holds(guard: Guard, target: nn.Module) -> bool:
    if guard.kind == "value":
        return _same(getattr(target, guard.name, Guard), guard.expected)
    if guard.kind == "none":
        return (getattr(target, guard.name, None) is None) == bool(guard.expected)
    if guard.kind == "children":
        return bool(tuple(target._modules) == guard.expected)
    return runs_its_forward(target) and class_of(target) is guard.expected


def _what_failed(guard: Guard) -> str:
    path, where = ".".join(guard.path), ".".join((*guard.path, guard.name))
    if guard.kind == "value":
        return f"{where} is no longer {guard.expected!r}"
    if guard.kind == "none":
        return f"{where} is {'no longer' if guard.expected else 'now'} None"
    if guard.kind == "children":
        return f"{path or 'the module'} has other submodules"
    return f"{path} has hooks, another forward or another class"


def runs_its_forward(module: nn.Module) -> bool:
    """Whether calling `module` is calling its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def trace(module: nn.Module, inline: frozenset[str] = frozenset(), kinds: Kinds | None = None) -> Traced:
    """The forward of `module`, with its submodules as leaves but for those in `inline`, which are traced through.

    Args:
        module: is not changed.
        inline: paths of submodules.
        kinds: for names of arguments what the forward shall see them as if it asks, "tensor" or "sequence"; None for
            whatever it likes. Arguments that have a default are given only if they are named here.

    Raises:
        TraceError: no graph does what the forward does.
    """
    graph, tracer, watch = _traced(module, inline, kinds or {})
    inlined = tuple(
        Guard(tuple(path.split(".")), "inlined", "", class_of(module.get_submodule(path))) for path in sorted(inline)
    )
    guards, positional = inlined + watch.guards(), tuple(tracer.positional)
    return Traced(graph, guards, tracer.inputs, tracer.defaults, positional, frozenset(tracer.asked))


def _traced(module: nn.Module, inline: frozenset[str], kinds: Kinds) -> tuple[fx.Graph, _Tracer, _Watch]:
    attempts = 0
    while True:
        attempts += 1
        watch = _Watch(module)
        tracer = _Tracer(inline, kinds, watch)
        try:
            with _no_compilation(), _tracing:
                return tracer.trace(module), tracer, watch
        except TraceError:
            if not watch.draws or threading.active_count() == 1 or attempts == _ATTEMPTS:
                raise
        except Exception as error:  # the forward is any code, and so may fail in any way with proxies
            first_line = str(error).strip().splitlines()[0] if str(error) else ""
            raise TraceError(f"{type(error).__name__}: {first_line}") from None
