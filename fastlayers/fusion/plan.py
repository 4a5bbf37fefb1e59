"""Decides what is fused in a model: for each module the graphs that may run instead of its forward.

Each module is traced on its own, with the modules that it calls as leaves, so that one which does not trace spoils
nothing else, and hooks on all that is called stay where they are. Only where a chain begins or goes on in a submodule
is that traced through.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from fastlayers.fusion import match, table
from fastlayers.fusion.chain import KnownBlock, Step
from fastlayers.fusion.install import Fusion, Program, Variant, problem_of_class
from fastlayers.fusion.interrupts import uninterrupted
from fastlayers.fusion.match import Match
from fastlayers.fusion.trace import Kinds, Traced, TraceError, runs_its_forward, trace


def plan(model: nn.Module) -> list[tuple[nn.Module, Fusion]]:
    """What is to be installed in which module of `model`. The model is not changed."""
    return _Planner(model).plan()


class _Planner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reasons: dict[int, str] = {}
        self.ends: dict[int, str] = {}
        self.failures: dict[int, str] = {}
        self._traces: dict[tuple[int, frozenset[str], tuple[tuple[str, str | None], ...]], Traced | str] = {}

    def plan(self) -> list[tuple[nn.Module, Fusion]]:
        fusions: dict[int, tuple[nn.Module, Fusion]] = {}
        for module in _candidates(self.model):
            fusion = _known_block(module) or self._fusion_of(module)
            if fusion is not None:
                fusions[id(module)] = module, fusion
        fused: set[int] = set()
        for module, fusion in fusions.values():
            for chain in fusion.chains:
                norm = id(module.get_submodule(chain.norm))
                # What follows a chain may be known only where its module is called.
                chain.ends = chain.ends or self.ends.get(norm, "")
                fused.add(norm)
        for path, module in self.model.named_modules():
            if table.looks_like_batch_norm(module) and id(module) not in fused and id(module) not in fusions:
                fusions[id(module)] = module, Fusion(reason=self._reason(path, module))
        return list(fusions.values())

    def _reason(self, path: str, norm: nn.Module) -> str:
        own = table.norm_problem(norm)
        if own is not None:
            return own
        if id(norm) in self.reasons:
            return self.reasons[id(norm)]
        while path:
            path = path.rpartition(".")[0]
            module = self.model.get_submodule(path)
            if id(module) in self.failures:
                cls = table.class_of(module).__name__
                return f"{path or 'the model'} ({cls}) cannot be traced: {self.failures[id(module)]}"
        return "no forward that traces calls it"

    def _fusion_of(self, module: nn.Module) -> Fusion | None:
        problem = problem_of_class(module)
        if problem is not None:
            self.failures[id(module)] = problem
            return None
        variants: list[Variant] = []
        names = 0
        for kinds, training in self._ways(module):
            with _training(module, training):
                variant = self._variant(module, kinds, names)
            if variant is not None:
                variants.append(variant)
                names += len(variant.chains)
        return Fusion(tuple(variants)) if any(variant.chains for variant in variants) else None

    def _ways(self, module: nn.Module) -> Iterator[tuple[Kinds, bool]]:
        """The types of arguments and the modes that the forward of `module` has to be traced with."""
        for mode in (True, False):
            kinds: list[Kinds] = [{}]
            with _training(module, mode):
                traced = self._trace(module, self._inlined(module, {}), {})
            required, optional = _arguments(module)
            if isinstance(traced, Traced):
                kinds += [{name: "sequence"} for name in sorted(traced.asked)]
            else:
                kinds += [{name: "sequence"} for name in required[:1]]
            kinds += [{name: None} for name in optional]
            if len(optional) > 1:
                kinds.append(dict.fromkeys(optional))
            yield from ((k, mode) for k in kinds)
            if isinstance(traced, Traced) and all(guard.name != "training" for guard in traced.guards):
                return

    def _variant(self, module: nn.Module, kinds: Kinds, first_name: int) -> Variant | None:
        inline = self._inlined(module, kinds)
        traced = self._trace(module, inline, kinds)
        if not isinstance(traced, Traced):
            return None
        matches = match.find(traced.graph, module)
        for found in matches.chains:
            if found.ends:
                where = f"{table.class_of(module).__name__}'s {found.ends}"
                self.ends.setdefault(id(module.get_submodule(str(found.norm.target))), where)
        needed = _needed(matches.chains)
        if needed != inline:
            traced = self._trace(module, needed, kinds)
            if not isinstance(traced, Traced):
                return None
            inner = matches.reasons
            matches = match.find(traced.graph, module)
            matches.reasons.update({path: why for path, why in inner.items() if path not in matches.reasons})
        for path, reason in matches.reasons.items():
            self.reasons.setdefault(id(module.get_submodule(path)), reason)
        if not matches.chains:
            return Variant.of(traced, None, {})
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(traced.graph, copies)
        graph.output(output)
        chains = match.substitute(graph, [_copied(m, copies) for m in matches.chains], first_name)
        for chain in chains.values():
            chain.prepare(module)
        return Variant.of(traced, Program.of(graph, table.class_of(module).__name__), chains)

    def _inlined(self, module: nn.Module, kinds: Kinds) -> frozenset[str]:
        """The submodules to trace through, so that chains which begin or go on in them are seen whole."""
        inline: frozenset[str] = frozenset()
        refused: set[str] = set()
        while True:
            traced = self._trace(module, inline, kinds)
            if not isinstance(traced, Traced):
                return frozenset()
            more = {path for path in self._openings(traced.graph, module) if path not in refused}
            if not more - inline:
                return inline
            for path in sorted(more):
                if isinstance(self._trace(module, inline | {path}, kinds), Traced):
                    inline |= {path}
                else:
                    refused.add(path)

    def _openings(self, graph: fx.Graph, root: nn.Module) -> Iterator[str]:
        """Submodules in which a chain may begin that goes on outside, or go on that began outside."""
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            module = root.get_submodule(str(node.target))
            if not self._is_container(module):
                continue
            users = list(node.users)
            goes_on = len(users) == 1 and self._may_go_on(users[0], root)
            inputs = node.all_input_nodes
            begins = len(inputs) == 1 and len(inputs[0].users) == 1 and self._may_begin(inputs[0], root)
            if (goes_on and self._end(module)) or (begins and self._start(module)):
                yield str(node.target)

    def _may_go_on(self, node: fx.Node, root: nn.Module) -> bool:
        stage = match.stage_of(node, root)
        if stage is not None:
            return stage != "norm"
        module = _called(node, root)
        return module is not None and self._is_container(module) and self._start(module)

    def _may_begin(self, node: fx.Node, root: nn.Module) -> bool:
        if match.stage_of(node, root) is not None:
            return True
        module = _called(node, root)
        return module is not None and self._is_container(module) and self._end(module)

    def _start(self, module: nn.Module) -> bool:
        """Whether the first thing that `module` does to its input may be a step of a chain."""
        traced = self._trace(module, frozenset(), {})
        if not isinstance(traced, Traced):
            return False
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        if len(placeholders) != 1 or len(placeholders[0].users) != 1:
            return False
        return self._may_go_on(next(iter(placeholders[0].users)), module)

    def _end(self, module: nn.Module) -> bool:
        """Whether the last thing that `module` does may be a step of a chain, or a BatchNorm."""
        traced = self._trace(module, frozenset(), {})
        if not isinstance(traced, Traced):
            return False
        (output,) = next(iter(reversed(traced.graph.nodes))).args
        return isinstance(output, fx.Node) and len(output.users) == 1 and self._may_begin(output, module)

    def _is_container(self, module: nn.Module) -> bool:
        return (
            not _is_leaf(module)
            and table.module_stage(module) is None
            and problem_of_class(module) is None
            and runs_its_forward(module)
        )

    def _trace(self, module: nn.Module, inline: frozenset[str], kinds: Kinds) -> Traced | str:
        mode = tuple((path, str(m.training)) for path, m in module.named_modules() if path == "" or path in inline)
        key = (id(module), inline, (*mode, *kinds.items()))
        if key not in self._traces:
            try:
                self._traces[key] = trace(module, inline, kinds)
            except TraceError as error:
                self._traces[key] = str(error)
                if not inline and not kinds:
                    self.failures.setdefault(id(module), str(error))
        return self._traces[key]


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward may call a BatchNorm."""
    for module in model.modules():
        if _is_leaf(module) and table.qualified_name(table.class_of(module)) not in table.KNOWN_BLOCKS:
            continue
        if any(table.looks_like_batch_norm(m) for m in module.modules()):
            yield module


def _arguments(module: nn.Module) -> tuple[list[str], list[str]]:
    """The arguments of a module's forward that must be given, and those that are None if they are not."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    return required, [p.name for p in parameters if p.default is None]


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module's forward is not looked into: torch's own, other than `nn.Sequential`, and BatchNorms."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    cls = table.class_of(module)
    own = cls.__module__.startswith(("torch.nn.", "torch.ao.nn.", "fastlayers.modules.")) and cls is not nn.Sequential
    return own or table.looks_like_batch_norm(module) or cls.forward is nn.Module.forward


def _called(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _needed(chains: list[Match]) -> frozenset[str]:
    """The submodules that chains lie in together with other modules' forwards."""
    paths: set[str] = set()
    for chain in chains:
        if len(chain.owners) > 1 or "" not in chain.owners:
            shared = _common(chain.owners)
            if shared == "":
                paths |= chain.owners - {""}
    # A submodule of a submodule is reached through that.
    prefixes = {path.rsplit(".", i)[0] for path in paths for i in range(path.count(".") + 1)}
    return frozenset(prefixes)


def _common(paths: set[str]) -> str:
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _copied(found: Match, copies: dict[fx.Node, fx.Node]) -> Match:
    residual = None if found.residual is None else copies[found.residual]
    nodes = [copies[node] for node in found.nodes]
    return dataclasses.replace(found, norm=copies[found.norm], nodes=nodes, residual=residual)


@contextmanager
def _training(module: nn.Module, mode: bool) -> Iterator[None]:
    """Sets the mode of all of `module`, whose hooks and overrides of ``train`` are not to notice."""
    saved = [(m, m.training) for m in module.modules() if "training" in m.__dict__]
    with uninterrupted():
        try:
            for m, _ in saved:
                m.__dict__["training"] = mode
            yield
        finally:
            for m, training in saved:
                m.__dict__["training"] = training


def _known_block(module: nn.Module) -> Fusion | None:
    members = table.KNOWN_BLOCKS.get(table.qualified_name(table.class_of(module)))
    if members is None or problem_of_class(module) is not None:
        return None
    modules = [getattr(module, name, None) for name, _ in members]
    stages = [None if m is None else table.module_stage(m) for m in modules]
    if any(s not in (stage, "identity") for (_, stage), s in zip(members, stages, strict=True)):
        return None
    if not table.is_worth_it(stage for stage in stages if stage is not None):
        return None
    steps = tuple(Step(stage, "module", name) for name, stage in members)
    source = "def forward(self, input):\n    return self._fastlayers_fusion.c0(input, self, None, {})\n".format(
        ", ".join(f"self.{name}" for name, _ in members)
    )
    chain = KnownBlock("", steps)
    chain.prepare(module)
    return Fusion(
        (Variant((), {"input": None}, {}, ("input",), Program(type(module).__name__, source, {}), {"c0": chain}),)
    )
