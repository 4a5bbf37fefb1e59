"""Who is compared: for each contender, where it can run and how its layer is built."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers_benchmarks.cases import Case, Variant

EAGER = "eager"
COMPILE = "compile"
MAX_AUTOTUNE = "compile-max-autotune"
FUSED_COMPILED = "fastlayers-compiled"
FUSED_THEN_POOL = "fastlayers-then-pool"
REFERENCE = "reference"

#: The backends that are contenders of their own.
BACKENDS = tuple(name for name in fl.backends.NAMES if name != "auto")

_ACT_LAYERS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class EagerChain(nn.Module):
    """What the fused layers stand for, from torch's own: BatchNorm, residual add, activation, dropout, max-pool.

    What is not asked for is not there: no dropout for p = 0.
    """

    def __init__(
        self,
        norm: nn.Module,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.act, self.drop, self.pool = norm, act, drop, pool

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The chain on `input`, and on `residual` of the same shape."""
        z = self.norm(input)
        if residual is not None:
            z = z + residual
        for layer in (self.act, self.drop, self.pool):
            if layer is not None:
                z = layer(z)
        result: Tensor = z
        return result


def eager_layer(case: Case) -> nn.Module:
    """The chain of torch's layers that `case` describes."""
    v, channels, flat = case.variant, case.shape[1], len(case.shape) == 2
    norm = nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)
    drop = (nn.Dropout(v.drop_p) if flat else nn.Dropout2d(v.drop_p)) if v.drop_p else None
    return EagerChain(norm, _ACT_LAYERS[v.act](), drop, case.pool_layer())


def fused_layer(case: Case) -> nn.Module:
    """The one layer of this library that `case` describes."""
    v, channels = case.variant, case.shape[1]
    if len(case.shape) == 2:
        return fl.BatchNormAct1d(channels, act_layer=v.act, drop_p=v.drop_p, drop_mode="element")
    return fl.BatchNormAct2d(channels, act_layer=v.act, drop_p=v.drop_p, pool=case.pool_layer())


def _then_pool(layer: nn.Module, case: Case) -> nn.Module:
    """`layer`, and torch's max-pool behind it where `case` has one."""
    pool = case.pool_layer()
    return layer if pool is None else nn.Sequential(layer, pool)


def _fused_then_pool(case: Case) -> nn.Module:
    """The fused layer that has no max-pool, and torch's: what fusing the pool too is worth."""
    return _then_pool(fused_layer(replace(case, variant=replace(case.variant, pool=None))), case)


def _timm_layer(case: Case) -> nn.Module:
    from timm.layers import BatchNormAct2d

    # By name: timm gives its activations `inplace`, which nn.GELU does not take.
    v = case.variant
    drop = partial(nn.Dropout2d, p=v.drop_p) if v.drop_p else None
    layer: nn.Module = BatchNormAct2d(case.shape[1], act_layer=v.act, drop_layer=drop)
    return _then_pool(layer, case)


def _timm_can(case: Case) -> bool:
    # timm has no residual, and drops before the activation, which is the same for ReLU only.
    v = case.variant
    return len(case.shape) == 4 and not v.residual and (v.drop_p == 0 or v.act == "relu")


def compiled(build: Callable[[Case], nn.Module], **options: Any) -> Callable[[Case], nn.Module]:
    """Builds what `build` builds, and compiles it with these options of `torch.compile`."""

    def compile_it(case: Case) -> nn.Module:
        # fullgraph: what falls back to eager half-way would be measured as something that it is not.
        # Typed as a callable; of a module it makes a module.
        module: nn.Module = torch.compile(build(case), fullgraph=True, **options)  # type: ignore[assignment]
        return module

    return compile_it


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        build: the layer, with parameters in float32, on CPU.
        backend: the backend of this library that serves it.
        can: whether it computes what the case asks for.
        same_mask: whether it draws torch's mask, so that its result can be compared with the expected one.
        graph: whether its call is captured once, and replayed as a CUDA graph.
    """

    name: str
    build: Callable[[Case], nn.Module]
    backend: str = "auto"
    can: Callable[[Case], bool] = lambda case: True
    same_mask: bool = True
    graph: bool = False

    def layer(self, case: Case, device: torch.device) -> nn.Module:
        """The layer on `device`."""
        with torch.random.fork_rng(devices=[]):
            return self.build(case).to(device)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """A context in which its backend serves this library's layers."""
        return fl.use_backend(self.backend)


def contenders(device: torch.device) -> list[Contender]:
    """Those that run on `device`."""
    found = [
        Contender(EAGER, eager_layer),
        Contender(COMPILE, compiled(eager_layer), same_mask=False),
        *(_fused(name_of(name), name, device) for name in _compiled_backends(device)),
        Contender(FUSED_COMPILED, compiled(fused_layer), same_mask=False),
        Contender(FUSED_THEN_POOL, _fused_then_pool, can=lambda case: bool(case.variant.pool)),
        Contender(REFERENCE, fused_layer, REFERENCE),
    ]
    if device.type == "cuda":
        # On CPU the mode tunes matrix products and convolutions only, of which these layers have none; see `steps`.
        found.append(Contender(MAX_AUTOTUNE, compiled(eager_layer, mode="max-autotune"), same_mask=False))
        replayed = (EAGER, COMPILE, fused_contender(device))
        found += [
            replace(c, name=f"{c.name}-graph", same_mask=False, graph=True) for c in list(found) if c.name in replayed
        ]
    if importlib.util.find_spec("timm"):
        found.append(Contender("timm", _timm_layer, can=_timm_can))
    return found


def why_not(device: torch.device) -> dict[str, str]:
    """The contenders that do not run on `device`, and why."""
    reasons = {name_of(name): error for name in BACKENDS if (error := _error_of(name, device))}
    if device.type != "cuda":
        reasons[MAX_AUTOTUNE] = "single layers: on CPU the mode tunes matrix products and convolutions only"
        reasons |= dict.fromkeys(("eager-graph", "compile-graph", "fastlayers-cuda-graph"), "CUDA graphs need a GPU")
    if not importlib.util.find_spec("timm"):
        reasons["timm"] = "not installed"
    return reasons


def fused_contender(device: torch.device) -> str:
    """The contender that users of this library get on `device` by default."""
    (chosen,) = {c.backend for c in fl.backends.explain() if c.op == "batch_norm_act" and c.device == device.type}
    return name_of(chosen)


def name_of(backend: str) -> str:
    """The contender that a backend of this library is."""
    return REFERENCE if backend == REFERENCE else f"fastlayers-{backend}"


def _fused(name: str, backend: str, device: torch.device) -> Contender:
    # What users get by default is measured as they get it: "auto" may hand small tensors to torch.
    return Contender(name, fused_layer, "auto" if name == fused_contender(device) else backend)


def _compiled_backends(device: torch.device) -> Iterator[str]:
    for name in BACKENDS:
        if name != REFERENCE and _error_of(name, device) is None:
            yield name


def _error_of(backend: str, device: torch.device) -> str | None:
    """Why `backend` does not serve `device`; None if it does. Tried out: the library knows best."""
    try:
        with fl.use_backend(backend):
            layer = fused_layer(Case((2, 2, 2, 2), variant=Variant(drop_p=0.0))).to(device)
            layer(torch.ones(2, 2, 2, 2, device=device))
    except RuntimeError as error:
        return str(error)
    return None
