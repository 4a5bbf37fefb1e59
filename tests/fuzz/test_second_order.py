"""Gradients of gradients, against the definition in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlayers as fl
from tests.fuzz import calls, judge, profiles
from tests.fuzz.problems import Problem, Spec, Tensors, make, problems
from tests.fuzz.values import Values
from tests.oracle import kinds

#: Units in the last place of the largest number of a result that sums and differences of sums may cost. The formulas
#: are autograd's own, so there is nothing but rounding to go wrong in what they do with ordinary numbers.
ROUNDINGS = 2000


def _ordinary(spec: Spec | None, mean: float, std: float, positive: bool = False) -> Spec | None:
    if spec is None:
        return None
    return dataclasses.replace(spec, values=Values(spec.values.seed, ((mean, std),), (), positive))


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    """With ordinary values and every choice else; now and then with a NaN."""
    # Torch cannot differentiate Hardsigmoid twice.
    p = draw((problems(most=300) | problems(most=300, pooled=True)).filter(lambda p: p.act.name != "Hardsigmoid"))
    mean = draw(st.sampled_from((0.0, 1.0, 30.0)))
    input, grad_output = _ordinary(p.input, mean, 1.0), _ordinary(p.grad_output, 0.0, 1.0)
    assert input is not None
    assert grad_output is not None
    if draw(st.integers(0, 9)) == 9:
        input = dataclasses.replace(input, values=dataclasses.replace(input.values, specials=((1, float("nan")),)))
    running = None
    if p.running is not None:
        means, variances = _ordinary(p.running[0], mean, 1.0), _ordinary(p.running[1], 2.0, 0.2, True)
        assert means is not None
        assert variances is not None
        running = (means, variances)
    return dataclasses.replace(
        p,
        input=input,
        grad_output=grad_output,
        residual=_ordinary(p.residual, 0.0, 1.0),
        weight=_ordinary(p.weight, 1.0, 0.3),
        bias=_ordinary(p.bias, 0.0, 1.0),
        running=running,
        # In 16 bits, channels of equal values would have gradients whose sine is arbitrary.
        eps=max(p.eps, 1e-5 if p.dtype.itemsize > 2 else 0.1),
        drop_p=min(p.drop_p, 0.5) if p.drop_p < 1 else p.drop_p,
        # One of these at least, or there is nothing to differentiate; and tensors that are one have one gradient.
        wanted=p.wanted or frozenset({"input"}),
        same=frozenset(),
        surroundings=p.surroundings - {"no_grad", "inference_mode"},
    )


def _second_order(operator: Callable[[Tensors], Tensor], t: Tensors) -> judge.Results:
    """The gradients of what is made of the first-order gradients."""
    sources = t.sources()
    upstream = t.grad_output.detach().requires_grad_()
    first = torch.autograd.grad(operator(t), list(sources.values()), upstream, create_graph=True)
    value = sum(((g.sin() * _weights(g)).sum() for g in first), torch.zeros((), dtype=t.input.dtype))
    inputs = sources | {"grad_output": upstream}
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    return {
        f"second {n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(inputs.items(), found, strict=True)
    }


def _weights(g: Tensor) -> Tensor:
    """Fixed numbers, so that not all elements count alike."""
    return torch.linspace(-1, 1, max(g.numel(), 1), dtype=g.dtype)[: g.numel()].view(g.shape)


@profiles.examples(0.4)
@given(_problems())
def test_second_order(problem: Problem) -> None:
    with calls.as_set(problem), fl.use_backend("cpp"):
        tensors = make(problem)
        if not tensors.sources():
            return
        rounding = judge.Rounding(tensors)
        tensors.memories["grad_output"].zero(rounding.unclear)
        copies = tensors.fresh(torch.float64), tensors.fresh()
        for copy in copies:
            copy.taken, copy.special = rounding.taken, rounding.special_channels()
        got = _second_order(calls.by_function, tensors)
        judge.assert_nothing_else_changed(tensors)
        exact, eager = _second_order(judge.exact, copies[0]), _second_order(judge.eager, copies[1])
        for name, value in got.items():
            _compare(name, value, exact[name], eager[name], rounding)
    profiles.count("second order")


def _compare(name: str, got: Tensor, exact: Tensor, eager: Tensor, rounding: judge.Rounding) -> None:
    assert got.dtype == eager.dtype, name
    assert got.shape == eager.shape, name
    unsure = torch.zeros_like(exact, dtype=torch.bool)
    if name == "second grad_output":
        unsure = rounding.unclear  # a slope times what comes
    elif rounding.problem.pool is None and exact.dim() > 1:
        unsure = rounding.unclear
    elif rounding.problem.pool is not None and rounding.unclear.any():
        return  # of a slope, or of an element, that may be another, all sums are
    elif rounding.unclear.any():
        unsure = rounding.unclear.transpose(0, 1).flatten(1).any(1)
    special = ~exact.isfinite() | ~eager.isfinite()
    if special.any():
        # A NaN of the input: in its channel, what is NaN for torch and the definition is for us.
        undefined = judge.undefined_gradients(rounding)
        certain = special & (kinds(eager) == kinds(exact))
        certain &= ~(fl.reference.per_channel(undefined, exact) if exact.dim() > 1 else undefined)
        assert torch.equal(kinds(got)[certain], kinds(exact)[certain]), name
        return
    if unsure.all() or got.numel() == 0:
        return
    unit = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    their_error = (eager.double() - exact).abs()[~unsure].max()
    largest = max(exact.abs().max().item(), 1.0)
    allowed = 2 * their_error + ROUNDINGS * unit * largest + 8 * torch.finfo(got.dtype).eps * largest
    error = (got.double() - exact).abs()[~unsure].max()
    assert error <= allowed, f"{name}: error {error:.3g} where {allowed:.3g} is allowed, largest {largest:.3g}"
