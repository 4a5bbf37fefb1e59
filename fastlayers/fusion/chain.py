"""What a chain is when the model runs: one fused call, and its modules one by one where that would not be the same."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_tracing
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fastlayers import activations
from fastlayers.activations import Activation
from fastlayers.fusion import table
from fastlayers.fusion.trace import runs_its_forward
from fastlayers.modules.batch_norm import fused_batch_norm
from fastlayers.pooling import Pool


class FusionWarning(UserWarning):
    """A chain that was fused runs unfused, or its end does, for a reason that the warning tells."""


class Slot(enum.Enum):
    """Arguments of a step that are known only when it runs."""

    INPUT = "what the step before returned"
    RESIDUAL = "what is added"


@dataclass(frozen=True)
class Step:
    """One call behind the BatchNorm, as the original forward makes it.

    Attributes:
        stage: one of `table.STAGES`, or "identity".
        call: "module", "method" or "function".
        target: the module's path, the method's name or the function's in `table.FUNCTIONS`.
        args, kwargs: with `Slot` where tensors come.
        act: of an activation that is a function, what it computes.
        drop: of a dropout that is a function: its mode, the number of dimensions that it is right for, and p (0 where
            it is not to drop).
        pool: of a max-pool that is a function, what it computes.
    """

    stage: str
    call: str
    target: str
    args: tuple[Any, ...] = (Slot.INPUT,)
    kwargs: tuple[tuple[str, Any], ...] = ()
    act: Activation | None = None
    drop: tuple[str, int | None, float] | None = None
    pool: Pool | None = None

    def __str__(self) -> str:
        if self.stage == "add":
            return "add"
        return self.target if self.call == "module" else self.target.split(".")[-1]

    def run(self, input: Tensor, residual: Any, module: nn.Module | None) -> Tensor:
        """The call itself."""
        if module is not None:
            output: Tensor = module(input)
            return output
        args = [input if a is Slot.INPUT else residual if a is Slot.RESIDUAL else a for a in self.args]
        kwargs = {k: input if a is Slot.INPUT else residual if a is Slot.RESIDUAL else a for k, a in self.kwargs}
        if self.call == "method":
            receiver, *rest = args
            output = getattr(receiver, self.target)(*rest, **kwargs)
        else:
            output = table.FUNCTIONS[self.target][0](*args, **kwargs)
        return output


class _Parts:
    """What a chain's steps come to at one call."""

    # No dataclass: torch.compile cannot trace a default that is an Activation.
    def __init__(self) -> None:
        self.act = activations.IDENTITY
        self.drop_p = 0.0
        self.drop_mode = "channel"
        self.pool: Pool | None = None
        #: How many steps these are, and if not all, why.
        self.count = 0
        self.problem: str | None = None


class Chain:
    """BatchNorm → (add) → activation → (dropout) → (max-pool), called in place of its first member.

    It reads the members at every call and keeps nothing but the reasons why it once ran unfused.

    Attributes:
        norm: the path of the BatchNorm from the module whose forward the chain is in.
        steps: what follows it.
        ends: which max-pool, or activation or dropout behind one, stays behind it, and why; "" if none does.
        fallbacks: why calls ran members one by one.
    """

    def __init__(self, norm: str, steps: tuple[Step, ...], ends: str = "") -> None:
        self.norm, self.steps, self.ends = norm, steps, ends
        self.fallbacks: tuple[str, ...] = ()
        self._resolved: dict[tuple[Any, ...], Activation] = {}
        self._pools: dict[tuple[Any, ...], Pool | str] = {}

    def prepare(self, root: nn.Module) -> None:
        """Reads activation and max-pool beforehand: nothing to do at every call, nor within `torch.compile`."""
        for step, path in zip(self.steps, modules_of(self.steps), strict=True):
            if path is not None and step.stage in ("act", "pool"):
                module = root.get_submodule(path)
                if table.class_of(module) in table.ACTS:
                    self._activation(module)
                elif table.class_of(module) in table.POOLS:
                    self._pool(module)

    def _activation(self, module: nn.Module) -> Activation:
        key = (type(module), *[getattr(module, name) for name in activations.parameters_of(type(module))])
        found = self._resolved.get(key)
        if found is None:
            found = self._resolved[key] = activations.resolve(module).in_evaluation()
        return found

    def _pool(self, module: nn.Module) -> Pool | str:
        given = [getattr(module, name) for name in table.POOL_ARGUMENTS]
        key = (table.class_of(module), *[tuple(value) if isinstance(value, list) else value for value in given])
        found = self._pools.get(key)
        if found is None:
            found = self._pools[key] = table.pool_of(module)
        return found

    def __str__(self) -> str:
        return " → ".join((self.norm or "batch norm", *(str(s) for s in self.steps if s.stage != "identity")))

    def __call__(self, input: Tensor, norm: nn.Module, residual: Any, *members: nn.Module | None) -> Tensor:
        """Runs the chain.

        Args:
            input: of the BatchNorm.
            norm: the BatchNorm.
            residual: what is added; None without an addition.
            members: for each step its module; None for functions.
        """
        parts = self._parts(input, norm, residual, members)
        if parts.problem is not None:
            self._note(parts.problem)
            if not table.is_worth_it(step.stage for step in self.steps[: parts.count]):
                return self._unfused(input, norm, residual, members)
        # The dropout's mode, not the BatchNorm's, says whether something is dropped.
        act, p, mode, pool = parts.act, parts.drop_p, parts.drop_mode, parts.pool
        # A Module to the checker: table.norm_problem has told that it is a BatchNorm.
        output = fused_batch_norm(norm, input, residual, act, p, mode, drops=p > 0, pool=pool)  # type: ignore[arg-type]
        for step, module in zip(self.steps[parts.count :], members[parts.count :], strict=True):
            output = step.run(output, residual, module)
        return output

    def _parts(self, input: Tensor, norm: nn.Module, residual: Any, members: tuple[nn.Module | None, ...]) -> _Parts:
        """The arguments of a fused call, for as many steps as there is one that does the same."""
        parts = _Parts()
        parts.problem = _problem_here() or table.norm_problem(norm)
        if parts.problem is None and "forward" in norm.__dict__:
            parts.problem = "the BatchNorm has a forward of its own"
        if parts.problem is None:
            parts.problem = _problem_of_tensors(input, residual, any(step.stage == "add" for step in self.steps))
        if parts.problem is not None:
            return parts
        for step, module in zip(self.steps, members, strict=True):
            parts.problem = self._read(step, module, input, parts)
            if parts.problem is not None:
                break
            parts.count += 1
        return parts

    def _read(self, step: Step, module: nn.Module | None, input: Tensor, parts: _Parts) -> str | None:
        if module is not None:
            if not runs_its_forward(module):
                return f"{step.target} has hooks or a forward of its own"
            if table.module_stage(module) != step.stage:
                return f"{step.target} is now a {type(module).__name__}"
        if step.stage == "act":
            return self._read_act(step, module, parts)
        if step.stage == "drop":
            return self._read_drop(step, module, input, parts)
        if step.stage == "pool":
            return self._read_pool(step, module, input, parts)
        return None

    def _read_act(self, step: Step, module: nn.Module | None, parts: _Parts) -> str | None:
        if module is None:
            assert step.act is not None
            act = step.act
        elif module.training and type(module) in table.RANDOM_ACTS:
            return f"{step.target} draws random slopes in training"
        else:
            act = self._activation(module)
        if parts.pool is not None and not act.monotone:
            return f"{step} is {table.BEHIND_POOL_ACT}"
        parts.act = act
        return None

    def _read_drop(self, step: Step, module: nn.Module | None, input: Tensor, parts: _Parts) -> str | None:
        if module is None:
            assert step.drop is not None
            mode, dims, p = step.drop
        else:
            mode, dims = table.DROPS[table.class_of(module)]
            # Attributes of modules are tensors or modules to the checker; that of a dropout is a float.
            p = module.p if module.training else 0.0  # type: ignore[assignment]
        if dims is not None and input.dim() != dims:
            return f"{step} does not drop channels of a tensor with {input.dim()} dimensions"
        if p:
            if parts.pool is not None and mode == "element":
                return f"{step} {table.BEHIND_POOL_DROP}"
            parts.drop_p, parts.drop_mode = p, mode
        return None

    def _read_pool(self, step: Step, module: nn.Module | None, input: Tensor, parts: _Parts) -> str | None:
        pool = step.pool if module is None else self._pool(module)
        assert pool is not None
        if isinstance(pool, str):
            return f"{step}: {pool}"
        if input.dim() != pool.dims + 2:
            return f"{step} does not pool planes of a tensor with {input.dim()} dimensions"
        if parts.drop_p and parts.drop_mode == "element":
            return f"{step}: {table.BEFORE_POOL_DROP}"
        parts.pool = pool
        return None

    def _unfused(self, input: Tensor, norm: nn.Module, residual: Any, members: tuple[nn.Module | None, ...]) -> Tensor:
        output: Tensor = norm(input)
        for step, module in zip(self.steps, members, strict=True):
            output = step.run(output, residual, module)
        return output

    def _note(self, reason: str) -> None:
        if reason not in self.fallbacks:
            self.fallbacks = (*self.fallbacks, reason)
            warn(reason)


class KnownBlock(Chain):
    """The forward of a class in `table.KNOWN_BLOCKS`, called with the module itself.

    It drops before it activates: the same as after where the activation commutes with positive factors, and where
    nothing is dropped.
    """

    def _parts(self, input: Tensor, norm: nn.Module, residual: Any, members: tuple[nn.Module | None, ...]) -> _Parts:
        parts = _Parts()
        parts.problem = _problem_here() or _problem_of_tensors(input, None, False)
        for step, module in zip(self.steps, members, strict=True):
            assert module is not None
            if parts.problem is not None:
                break
            if not (table.module_stage(module) == "identity" and runs_its_forward(module)):
                parts.problem = self._read(step, module, input, parts)
        if parts.problem is None:
            parts.count = len(self.steps)
            if parts.drop_p and parts.act.name not in ("identity", "relu", "leaky_relu"):
                parts.problem, parts.count = f"it drops before {parts.act.name}, which is not the same as after", 0
        return parts

    def _unfused(self, input: Tensor, norm: nn.Module, residual: Any, members: tuple[nn.Module | None, ...]) -> Tensor:
        output: Tensor = table.class_of(norm).forward(norm, input)
        return output


def warn(reason: str) -> None:
    """Says once per process and reason that something fused runs unfused."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"fastlayers.fuse: a chain runs unfused: {reason} (fastlayers.fusion_report names it)",
            FusionWarning,
            stacklevel=2,
        )


def _problem_here() -> str | None:
    """Why nothing is fused in the present state of torch."""
    if torch.compiler.is_compiling():
        return None
    if _has_any_global_hook():
        return "hooks for all modules are registered"
    if _is_tracing():
        return "torch.jit traces the model"
    if peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def _problem_of_tensors(input: Any, residual: Any, adds: bool) -> str | None:
    for name, tensor in (("input", input), ("residual", residual)) if adds else (("input", input),):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"the {name} is a {type(tensor).__name__}"
        if tensor.layout != torch.strided:
            return f"the {name} has the layout {tensor.layout}"
    if not adds:
        return None
    if residual.shape != input.shape:
        return "the residual's shape is not the input's: it is broadcast"
    if residual.dtype != input.dtype:
        return f"the residual is {residual.dtype}, the input {input.dtype}"
    if residual.device != input.device:
        return f"the residual is on {residual.device}, the input on {input.device}"
    return None


def modules_of(steps: tuple[Step, ...]) -> Iterator[str | None]:
    """For each step the path of its module; None for functions."""
    for step in steps:
        yield step.target if step.call == "module" else None
