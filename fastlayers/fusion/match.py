"""Finds the chains of a traced graph, and puts one call in the place of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fastlayers import activations
from fastlayers.fusion import table
from fastlayers.fusion.chain import Chain, Slot, Step, modules_of
from fastlayers.fusion.trace import runs_its_forward
from fastlayers.pooling import Pool


@dataclass
class Match:
    """A chain in a graph.

    Attributes:
        norm: the node of the BatchNorm.
        nodes: those of the steps.
        steps: the steps.
        residual: the node that is added.
        ends: as in `Chain`.
    """

    norm: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    residual: fx.Node | None = None
    ends: str = ""

    @property
    def owners(self) -> set[str]:
        """The paths of the modules whose forwards the chain's calls stand in."""
        return {node.meta["owner"] for node in (self.norm, *self.nodes)}


@dataclass
class Matches:
    """The chains of a graph, and for each other BatchNorm that it calls (by path) why it starts none."""

    chains: list[Match]
    reasons: dict[str, str]


class _StaysBehind(str):
    """Why a chain ends before a max-pool, or what follows one, which else would be in it."""


def stage_of(node: fx.Node, root: nn.Module) -> str | None:
    """The stage of a chain that a node may be: "norm", one of `table.STAGES`, "identity"; None if none."""
    if node.op == "call_module":
        return table.module_stage(root.get_submodule(str(node.target)))
    function = _function(node)
    return None if function is None else function.stage


def find(graph: fx.Graph, root: nn.Module) -> Matches:
    """The chains of `graph`, no two of which share a node."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    norms = [n for n in graph.nodes if n.op == "call_module" and stage_of(n, root) == "norm"]
    found: list[Match] = []
    reasons: dict[str, str] = {}
    for norm in norms:
        match = _grow(norm, root, order)
        if isinstance(match, str):
            reasons.setdefault(str(norm.target), match)
        else:
            found.append(match)
    chosen = _without_overlap(found, order, reasons)
    for node in graph.nodes:
        if node.op == "call_module" and node not in norms:
            module = root.get_submodule(str(node.target))
            if table.looks_like_batch_norm(module):
                reasons[str(node.target)] = table.norm_problem(module) or "its class is not known"
    return Matches(chosen, reasons)


def _without_overlap(found: list[Match], order: dict[fx.Node, int], reasons: dict[str, str]) -> list[Match]:
    # Where two BatchNorms are added, one is the residual: the one that lies deeper in submodules, whose forward then
    # stays as it is; of two equals the right one, as in `out + shortcut`.
    def preference(match: Match) -> tuple[int, int, int]:
        owner = match.norm.meta["owner"]
        addition = next((n for n, s in zip(match.nodes, match.steps, strict=True) if s.stage == "add"), None)
        left = addition is None or _is_first(match, addition)
        return (owner.count(".") + bool(owner), 0 if left else 1, order[match.norm])

    chosen: list[Match] = []
    taken: dict[fx.Node, Match] = {}
    for match in sorted(found, key=preference):
        other = next((taken[node] for node in match.nodes if node in taken), None)
        if other is not None:
            reasons[str(match.norm.target)] = f"it is the residual of the chain of {other.norm.target}"
            continue
        chosen.append(match)
        taken |= dict.fromkeys(match.nodes, match)
    return sorted(chosen, key=lambda match: order[match.norm])


def _is_first(match: Match, addition: fx.Node) -> bool:
    return bool(addition.args) and addition.args[0] in (match.norm, *match.nodes)


def _grow(norm: fx.Node, root: nn.Module, order: dict[fx.Node, int]) -> Match | str:
    """The longest chain that starts at `norm`, or why none does."""
    problem = table.norm_problem(root.get_submodule(str(norm.target))) or _problem_of_call(norm)
    if problem is not None:
        return problem
    match, last = Match(norm), norm
    while isinstance(step := _next_step(match, last, root), Step):
        last = next(iter(last.users))
        match.nodes.append(last)
        match.steps.append(step)
    if isinstance(step, _StaysBehind):
        match.ends = step
    while match.steps and match.steps[-1].stage == "identity":
        match.steps.pop()
        match.nodes.pop()
    if not table.is_worth_it(step.stage for step in match.steps):
        return step
    return _problem_of_moving(match, root, order) or match


def _next_step(match: Match, last: fx.Node, root: nn.Module) -> Step | str:
    """The step that `last`'s only user is, or why the chain ends at `last`."""
    what = (
        "its output" if last is match.norm else f"the output of {last.target if last.op != 'call_function' else last}"
    )
    if len(last.users) != 1:
        return f"{what} is used {len(last.users)} times" if last.users else f"{what} is not used"
    user = next(iter(last.users))
    if user.op == "output":
        return f"{what} is returned by the forward"
    stage = stage_of(user, root)
    if stage is None or stage == "norm":
        return f"{what} goes to {_describe(user, root)}, which is no part of a chain"
    before = [step.stage for step in match.steps if step.stage in table.STAGES]
    if stage == "pool" and "add" in before and "pool" not in before:
        return _StaysBehind(f"{_describe(user, root)}: a residual is added before it")
    if stage in table.STAGES and not table.in_order([*before, stage]):
        return f"{what} goes to {_describe(user, root)}, which is out of order"
    if stage == "add":
        return _addition(match, last, user)
    if sum(node is last for node in user.all_input_nodes) != 1 or list(user.args[:1]) != [last]:
        return f"{what} is not the first argument of {_describe(user, root)}"
    if user.op == "call_module":
        module = root.get_submodule(str(user.target))
        if not runs_its_forward(module):
            reason = f"{user.target} has hooks or a forward of its own"
            return _StaysBehind(reason) if stage == "pool" else reason
        step = _problem_of_call(user) or Step(stage, "module", str(user.target))
    else:
        step = _function_step(user, stage)
    problem = _problem_with_pool(match.steps, step, root) if isinstance(step, Step) else None
    return step if problem is None else _StaysBehind(f"{_describe(user, root)}: {problem}")


def _problem_with_pool(steps: list[Step], step: Step, root: nn.Module) -> str | None:
    """Why `step` cannot be in one chain with the max-pool that it is, or that is among `steps`; None if it can."""
    if step.stage == "pool":
        pool = table.pool_of(root.get_submodule(step.target)) if step.call == "module" else step.pool
        if isinstance(pool, str):
            return pool
        return table.BEFORE_POOL_DROP if any(_drops_elements(before, root) for before in steps) else None
    if all(before.stage != "pool" for before in steps):
        return None
    if step.stage == "act":
        act = activations.resolve(root.get_submodule(step.target)) if step.call == "module" else step.act
        return None if act is not None and act.monotone else table.BEHIND_POOL_ACT
    return table.BEHIND_POOL_DROP if _drops_elements(step, root) else None


def _drops_elements(step: Step, root: nn.Module) -> bool:
    if step.stage != "drop":
        return False
    if step.drop is not None:
        mode, _, p = step.drop
    else:
        module = root.get_submodule(step.target)
        # Attributes of modules are tensors or modules to the checker; that of a dropout is a float.
        mode, p = table.DROPS[table.class_of(module)][0], module.p  # type: ignore[assignment]
    return mode == "element" and p > 0


def _addition(match: Match, last: fx.Node, user: fx.Node) -> Step | str:
    operands = [*user.args, *(v for k, v in user.kwargs.items() if k in ("input", "other"))]
    others = [operand for operand in operands if operand is not last]
    if user.kwargs.get("alpha", 1) != 1:
        return f"{user} scales what it adds by alpha = {user.kwargs['alpha']}"
    if set(user.kwargs) - {"input", "other", "alpha"}:
        return f"{user} has arguments that are not known: {sorted(user.kwargs)}"
    if len(operands) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return f"{user} adds no other tensor"
    name = table.FUNCTION_NAMES.get(user.target, "") if callable(user.target) else str(user.target)
    if name in table.IN_PLACE_ADDS and user.args[0] is not last:
        return f"it is added in place to another tensor, which may be used elsewhere, by {_describe(user, None)}"
    match.residual = others[0]
    slots = {last: Slot.INPUT, others[0]: Slot.RESIDUAL}
    # fx types arguments as anything; above they were found to be the two nodes that are keys here.
    args = tuple(slots[a] for a in user.args)  # type: ignore[index]
    kwargs = tuple((k, slots[v] if isinstance(v, fx.Node) else v) for k, v in user.kwargs.items())
    return Step("add", "method" if user.op == "call_method" else "function", name, args, kwargs)


def _function_step(user: fx.Node, stage: str) -> Step | str:
    function = _function(user)
    assert function is not None
    rest = (*user.args[1:], *user.kwargs.values())
    if any(isinstance(value, fx.Node) for value in rest):
        return f"{user} takes more tensors than one"
    given = dict(zip(function.parameters, user.args[1:], strict=False)) | user.kwargs
    act = drop = pool = None
    try:
        if stage == "act":
            act = _activation(function, given)
        elif stage == "pool":
            found = _pool(function, given)
            if isinstance(found, str):
                return _StaysBehind(f"{_name(user)}: {found}")
            pool = found
        else:
            # fx types arguments as anything; what is no number raises, and is reported.
            p = float(given.get("p", 0.5)) if given.get("training", True) else 0.0  # type: ignore[arg-type]
            drop = (*table.DROPS[getattr(nn, function.name)], p)
            if not 0 <= p <= 1:
                return f"{user} has p = {p}"
    except (TypeError, ValueError) as error:
        return f"{user}: {error}"
    called = user.target
    target = called if isinstance(called, str) else table.FUNCTION_NAMES[called]
    args, kwargs = (Slot.INPUT, *user.args[1:]), tuple(user.kwargs.items())
    return Step(stage, "method" if called == target else "function", target, args, kwargs, act, drop, pool)


def _activation(function: table.Function, given: dict[str, Any]) -> activations.Activation:
    kwargs = {name: value for name, value in given.items() if name not in ("inplace", "training")}
    act = activations.resolve(function.name, kwargs)
    if act.random is not None and given.get("training", False):
        raise ValueError("it draws random slopes")
    return act.in_evaluation()


def _pool(function: table.Function, given: dict[str, Any]) -> Pool | str:
    if not function.name:
        return table.read_pool(0, {"return_indices": True})
    return table.read_pool(table.POOLS[getattr(nn, function.name)], given)


def _function(node: fx.Node) -> table.Function | None:
    if node.op == "call_method":
        return table.METHODS.get(str(node.target))
    name = table.FUNCTION_NAMES.get(node.target) if callable(node.target) else None
    return None if name is None else table.FUNCTIONS[name][1]


def _problem_of_call(node: fx.Node) -> str | None:
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return None
    return f"{node.target} is called with other arguments than one tensor"


def _describe(node: fx.Node, root: nn.Module | None) -> str:
    if node.op == "call_module" and root is not None:
        return f"{node.target} ({table.class_of(root.get_submodule(str(node.target))).__name__})"
    return _name(node)


def _problem_of_moving(match: Match, root: nn.Module, order: dict[fx.Node, int]) -> str | None:
    """Why the BatchNorm cannot run where its chain ends, after what came in between; None if it can."""
    nodes = list(order)
    own = {match.norm, *match.nodes}
    between = [n for n in nodes[order[match.norm] : order[match.nodes[-1]]] if n not in own]
    norm = root.get_submodule(str(match.norm.target))
    for node in between:
        if node.op == "call_module" and norm in root.get_submodule(str(node.target)).modules():
            return f"it is called again, by {node.target}, before its chain ends"
        if node.op == "get_attr" and str(node.target).startswith(f"{match.norm.target}.running"):
            return "its statistics are read before its chain ends"
    read = [(match.norm.all_input_nodes[0], match.norm)]
    if match.residual is not None:
        read.append((match.residual, match.nodes[[step.stage for step in match.steps].index("add")]))
    for tensor, reader in read:
        watched = _aliases(tensor, root)
        for node in between:
            if order[node] > order[reader] and watched & set(node.all_input_nodes) and _may_write(node, root):
                return f"{_describe(node, root)} may change what the chain reads before the chain ends"
    return None


_VIEWS = frozenset(
    {
        *("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "as_strided", "unfold"),
        *("permute", "transpose", "swapaxes", "movedim", "t", "T", "mT", "diagonal", "expand", "expand_as"),
        *("narrow", "select", "chunk", "split", "tensor_split", "unbind", "getitem", "getattr", "real", "imag", "data"),
        *("to", "type_as", "float", "half", "bfloat16", "contiguous", "detach", "requires_grad_"),
    }
)


def _aliases(node: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The nodes that may share memory with `node`."""
    found, todo = {node}, [node]
    while todo:
        current = todo.pop()
        sources = current.all_input_nodes if _may_alias(current, root) else []
        targets = [user for user in current.users if _may_alias(user, root)]
        new = [n for n in (*sources, *targets) if n not in found]
        found.update(new)
        todo += new
    return found


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _may_alias(node: fx.Node, root: nn.Module) -> bool:
    """Whether what `node` returns may share memory with what it takes."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        shares = isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Sequential))
        return shares or getattr(module, "inplace", False) or not _is_torchs(module)
    return _name(node) in _VIEWS or _may_write(node, root)


def _may_write(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` may change a tensor that it takes."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) or not _is_torchs(module)
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    name = _name(node)
    if node.kwargs.get("inplace", False) is not False or node.kwargs.get("out") is not None:
        return True
    # Functions of other libraries may do anything; operator's in-place ones begin with an i.
    module_name = str(getattr(node.target, "__module__", "") or "")
    foreign = node.op == "call_function" and not module_name.startswith(("torch", "_operator", "builtins", "math"))
    known = foreign and node.target in table.FUNCTION_NAMES
    in_place = module_name == "_operator" and name.startswith("i") and name not in ("inv", "invert", "index", "is_")
    positional = any(argument is True for argument in node.args)  # an `inplace` by position, perhaps
    return (foreign and not known and module_name != "") or in_place or positional or name.endswith("_")


def _is_torchs(module: nn.Module) -> bool:
    return table.class_of(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Sequential)


def substitute(graph: fx.Graph, matches: list[Match], first_name: int) -> dict[str, Chain]:
    """Replaces the chains in `graph` by calls of the returned ones, under the names that the graph has for them."""
    chains = {}
    replaced: dict[fx.Node | None, fx.Node] = {}
    for number, match in enumerate(matches, start=first_name):
        name, steps = f"c{number}", tuple(match.steps)
        chains[name] = Chain(str(match.norm.target), steps, match.ends)
        end = match.nodes[-1]
        with graph.inserting_before(end):
            arguments = [_get(graph, path) for path in (str(match.norm.target), *modules_of(steps))]
            call = graph.create_node(
                "call_module",
                f"_fastlayers_fusion.{name}",
                (match.norm.args[0], arguments[0], replaced.get(match.residual, match.residual), *arguments[1:]),
            )
        end.replace_all_uses_with(call)
        replaced[end] = call
        for node in (*reversed(match.nodes), match.norm):
            graph.erase_node(node)
    return chains


def _get(graph: fx.Graph, path: str | None) -> fx.Node | None:
    return None if path is None else graph.create_node("get_attr", path)
