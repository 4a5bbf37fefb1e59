"""A problem's call by the public function or by a layer, and everything that is checked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlayers as fl
from tests.fuzz import judge
from tests.fuzz.problems import Problem, Tensors, make

Operator = Callable[[Tensors], Tensor]


@contextlib.contextmanager
def as_set(problem: Problem) -> Iterator[None]:
    """The switches of a problem, and its surroundings but for modes without gradients, which `judge.run` sees to."""
    with contextlib.ExitStack() as stack:
        stack.callback(fl.ops.set_cpu_capability, fl.ops.cpu_capability())
        fl.ops.set_cpu_capability(problem.capability)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(problem.threads)
        if problem.past_the_caches:
            stack.callback(fl.ops.set_last_level_cache_bytes, fl.ops.set_last_level_cache_bytes(0))
        if "float64 by default" in problem.surroundings:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        if "filled" in problem.surroundings:
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
        if "autocast" in problem.surroundings:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def by_function(t: Tensors) -> Tensor:
    """By `functional.batch_norm_act`."""
    p = t.problem
    torch.manual_seed(p.seed)
    return fl.functional.batch_norm_act(
        t.input, t.running_mean, t.running_var, t.weight, t.bias, p.training, p.momentum, p.eps,
        residual=t.residual, act=p.act.module(), drop_p=p.drop_p, drop_mode=p.drop_mode,
        num_batches_tracked=t.num_batches_tracked, stochastic=p.stochastic,
        pool=None if p.pool is None else p.pool.module(),
    )  # fmt: skip


#: What a layer may have gone through before it is called. In one process SyncBatchNorm is an ordinary BatchNorm.
REWRITES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda layer: layer,
    "sync": fl.convert_sync_batchnorm,
    "frozen and not": lambda layer: fl.unfreeze_batch_norm(fl.freeze_batch_norm(layer, parameters=False)),
}


def by_layer(rewrite: str) -> Operator:
    """By a layer with the tensors and in the mode of a call that `fits_a_layer`, after one of `REWRITES`."""

    def call(t: Tensors) -> Tensor:
        p = t.problem
        layer = _layer(t)
        if p.running is not None or rewrite == "sync":
            layer = REWRITES[rewrite](layer)
        layer.train(p.drops)
        if not p.training and p.drops:
            layer = fl.freeze_batch_norm(layer, parameters=False)
        torch.manual_seed(p.seed)
        output: Tensor = layer(t.input) if t.residual is None else layer(t.input, t.residual)
        return output

    return call


def fits_a_layer(p: Problem) -> bool:
    """Whether there is a layer and a mode for a call."""
    counts = p.running is None or p.batches is not None
    drops_or_has_no_statistics = p.drops or p.running is None
    shares_nothing = not p.from_views and not any("weight" in pair for pair in p.same)
    return 2 <= len(p.shape) <= 5 and counts and shares_nothing and (not p.training or drops_or_has_no_statistics)


def _layer(t: Tensors) -> nn.Module:
    p = t.problem
    dims = max(len(p.shape) - 2, 1)
    options: dict[str, Any] = {"eps": p.eps, "momentum": p.momentum, "track_running_stats": p.running is not None}
    plain = t.residual is None and p.drop_p == 0 and p.act.name == "Identity" and p.pool is None
    if not plain:
        options |= {"act_layer": p.act.module(), "drop_p": p.drop_p, "drop_mode": p.drop_mode}
        options["pool"] = None if p.pool is None else p.pool.module()
    cls = getattr(fl, f"BatchNorm{'' if plain else 'Act'}{dims}d")
    layer: nn.Module = cls(p.shape[1], **options)
    for name in ("weight", "bias"):
        value = getattr(t, name)
        layer.register_parameter(name, None if value is None else nn.Parameter(value, value.requires_grad))
        # `Parameter` makes a tensor of its own, with the same memory.
        setattr(t, name, getattr(layer, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if p.running is not None:
            setattr(layer, name, getattr(t, name))
    return layer


def check(
    problem: Problem,
    operator: Operator = by_function,
    kernels: bool = True,
    gpu: bool = False,
    in_steps: bool = False,
) -> None:
    """Runs a call and compares everything that comes of it.

    Args:
        problem: drawn by `problems`.
        operator: what runs it.
        kernels: whether that is certainly our kernels, whose results have the input's layout and their own memory.
        gpu: whether they are those for GPUs.
        in_steps: whether several compute each result, and torch pools.
    """
    with as_set(problem):
        tensors = make(problem, gpu)
        rounding = judge.Rounding(tensors, kernels and not in_steps, gpu)
        if not any("grad_output" in pair for pair in problem.same):
            tensors.memories["grad_output"].zero(rounding.unclear)
        copies = tensors.fresh(torch.float64), tensors.fresh()
        results = judge.run(operator, tensors)
        judge.assert_nothing_else_changed(tensors)
        if kernels:
            judge.assert_own_memory(results, tensors)
            _check_layouts(results, tensors, in_steps)
        for copy in copies:
            copy.taken, copy.special = rounding.taken, rounding.special_channels()
        expected, theirs = judge.run(judge.exact, copies[0]), judge.run(judge.eager, copies[1])
        judge.Judge(rounding, expected, theirs).compare(results)


def _check_layouts(results: judge.Results, t: Tensors, torch_pools: bool) -> None:
    """The input's, but for what torch's max-pool makes of it behind our kernels."""
    p = t.problem
    if p.pool is None or (p.has_kernel_that_pools and not torch_pools):
        output = results["output"]
        assert judge.has_right_layout(output, t.input, p.pool is not None), f"output: strides {output.stride()}"
    gradient = results.get("gradient of input")
    if gradient is not None:
        assert judge.has_right_layout(gradient, t.input, False), f"gradient of input: strides {gradient.stride()}"
