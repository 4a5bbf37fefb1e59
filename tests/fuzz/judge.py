"""What a call should give, how far off it may be, and what it may not touch.

The promise is that errors against `fastlayers.reference` in float64 are at most twice those of torch's own layers, plus
rounding. `Rounding` bounds what rounding is: the units in the last place of all that a careful computation rounds on
the way to a result, element by element. NaN and infinities come out where torch has them, but for what is dropped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlayers as fl
from fastlayers import activations
from tests.fuzz import pools
from tests.fuzz.pools import Pool
from tests.fuzz.problems import Problem, Tensors
from tests.oracle import kinds

Results = dict[str, Tensor]

#: How many times as large as its summands a sum in float32 gets, before it is carried over to float64.
_ADDITIONS = 16
#: How many roundings of the sizes below are allowed. In float64 the exact results have as many of their own.
ROUNDINGS = 4
ROUNDINGS_FLOAT64 = 16


def eager(t: Tensors) -> Tensor:
    """The call by torch's own layers, one after the other; what is dropped is zero even where it was NaN."""
    p = t.problem
    momentum = p.momentum
    if p.training and t.num_batches_tracked is not None:
        t.num_batches_tracked.add_(1)
        momentum = 1 / t.num_batches_tracked.item() if momentum is None else momentum
    weight = t.weight
    if weight is None and t.bias is not None:  # which torch cannot differentiate twice
        weight = torch.ones_like(t.bias.detach())
    z = F.batch_norm(t.input, t.running_mean, t.running_var, weight, t.bias, p.training, momentum or 0.0, p.eps)
    z = z if t.residual is None else z + t.residual
    if t.mask is None:
        y: Tensor = p.act.module()(z)
    else:
        # Twice: so that neither a value nor a slope that is NaN comes through.
        scale = 0.0 if p.drop_p == 1 else 1 / (1 - p.drop_p)
        y = torch.where(t.mask, p.act.module()(torch.where(t.mask, z, 0)) * scale, 0)
    return y if p.pool is None else _pooled(y, p.pool, t)


def _pooled(y: Tensor, pool: Pool, t: Tensors) -> Tensor:
    """The elements that exact arithmetic takes; torch's own where there is a NaN or an infinity in the channel.

    Two that rounding makes equal have gradients of their own, and an error of which one it was would excuse all others.
    """
    theirs: Tensor = pool.module()(y)
    if t.taken is None or t.special is None:
        return theirs
    return torch.where(fl.reference.per_channel(t.special, theirs), theirs, pools.take(y, t.taken))


def exact(t: Tensors) -> Tensor:
    """The definition, to be run on tensors in float64."""
    p = t.problem
    activation = activations.resolve(p.act.module()).in_evaluation()
    return fl.reference.batch_norm_act_masked(
        t.input, t.weight, t.bias, t.residual, t.mask, t.running_mean, t.running_var, t.num_batches_tracked,
        training=p.training, momentum=p.momentum, eps=p.eps, activation=activation, drop_p=p.drop_p,
        pool=None if p.pool is None else fl.pooling.resolve(p.pool.module(), len(p.shape) - 2),
    )  # fmt: skip


def run(operator: Callable[[Tensors], Tensor], t: Tensors) -> Results:
    """Output, gradients of all that has one, and the state afterwards."""
    records = True
    with contextlib.ExitStack() as stack:
        for name in ("no_grad", "inference_mode"):
            if name in t.problem.surroundings:
                records = False
                stack.enter_context(getattr(torch, name)())
        output = operator(t)
    assert records or not output.requires_grad
    results = {"output": output.detach()}
    sources = t.sources()
    if sources and records:
        assert output.requires_grad
        gradients = torch.autograd.grad(output, list(sources.values()), t.grad_output)
        results |= {f"gradient of {name}": g for name, g in zip(sources, gradients, strict=True)}
    return results | state(t)


def as_one(results: Results, t: Tensors) -> Results:
    """`results` of separate tensors as they are where two of them are the same tensor, which gets both gradients."""
    for pair in t.problem.same:
        names = [f"gradient of {name}" for name in pair]
        if all(name in results for name in names):
            results = results | dict.fromkeys(names, results[names[0]] + results[names[1]])
    return results


def state(t: Tensors) -> Results:
    """Running statistics and count."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name in names if (value := getattr(t, name)) is not None}


class Rounding:
    """Bounds what rounding costs each result of a call: so many units in the last place of all that is rounded.

    Everything is in float64. First what happens on the way forward; `sizes` adds the way back.
    """

    def __init__(self, t: Tensors, kernels: bool = True, gpu: bool = False) -> None:
        """What is rounded when `t` is computed.

        Args:
            t: the arguments.
            kernels: if one of ours computes all, in float32 for 16 bits, not several steps, which round in between and
                of which torch pools what is stored.
            gpu: if that is a GPU's, whose squares are those of float32.
        """
        self.gpu = gpu
        p = self.problem = t.problem
        self.tensors = t
        compute = torch.float32 if kernels and p.dtype != torch.float64 else p.dtype
        self.stores_between = not kernels
        self.unit, self.tiny = _unit(compute)
        self.pools_stored = not (kernels and p.has_kernel_that_pools)
        x = self.x = _double(t.input)
        self.dims = [d for d in range(x.dim()) if d != 1]
        self.count = max(x.numel() // max(x.shape[1], 1), 1)
        self.mean, self.var = self._statistics()
        invstd = self.invstd = self._column(torch.rsqrt(self.var + p.eps))
        mean = self._column(self.mean)
        weight = torch.ones_like(mean) if t.weight is None else self._column(_double(t.weight))
        bias = torch.zeros_like(mean) if t.bias is None else self._column(_double(t.bias))
        residual = torch.zeros_like(x) if t.residual is None else _double(t.residual)
        self.deviation = _largest((x - mean).abs(), self.dims)
        if p.dtype == torch.float64:  # the mean is rounded in the dtype of the statistics
            self.deviation = self.deviation + mean.abs()
        self.factor = weight * invstd
        self.scale = self.factor.abs()
        self.z = (x - mean) * invstd * weight + bias + residual
        self.of_z = self.unit * (self.scale * self.deviation + bias.abs() + residual.abs()) + self.tiny * (
            self.deviation + self.scale + 1
        )
        self.near_kink = torch.zeros_like(self.z, dtype=torch.bool)
        for kink in p.act.kinks:
            self.near_kink |= (self.z - kink).abs() < 0.02 + 64 * self.of_z
        scale = 0.0 if p.drop_p == 1 else 1 / (1 - p.drop_p)
        self.keep = torch.ones_like(x) if t.mask is None else t.mask.double() * scale
        activation = activations.resolve(p.act.module()).in_evaluation()
        leaf = self.z.clone().requires_grad_()
        value = activation.apply(leaf)
        (self.slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value)) if leaf.numel() else (leaf.detach(),)
        self.value = value.detach()
        # Some are steeper than their bound says: those with an exponential that grows.
        self.steepest = self.slope.abs().clamp_min(p.act.slope)
        jump = torch.where(self.near_kink, p.act.jump, 0.0)
        self.of_value = self.steepest * self.of_z + self.unit * p.act.size + jump
        self.taken: Tensor | None = None
        self.unclear = self.near_kink
        if p.pool is not None:
            self._find_taken(p.pool)

    def _find_taken(self, pool: Pool) -> None:
        """Which element of each window is taken, and where that is unclear, or its slope."""
        dropped = torch.where(self.keep == 0, 0, self.value * self.keep)
        _, taken = pool.module(return_indices=True)(dropped)
        self.taken = taken
        rounding = 64 * self.of_value * self.keep.clamp_min(1)
        if self.pools_stored:  # in the dtype of the tensors, in which more are equal: all that overflow
            limit = torch.finfo(self.problem.dtype).max
            dropped = dropped.clamp(-limit, limit)
            rounding = rounding + 2 * _of(dropped, self.problem.dtype)
        value, x, keep = (pools.take(t, taken)[..., None] for t in (dropped, self.x, self.keep))
        margin = pool.windows(rounding, 0.0).amax(-1, keepdim=True)
        # Among equal ones the first is taken by everybody, if they are equal from the start.
        others = (pool.windows(self.x, math.nan) != x) | (pool.windows(self.keep, 0.0) != keep)
        close = ~((pool.windows(dropped, -math.inf) - value).abs() > margin)
        outside = pool.windows(torch.zeros_like(self.x), 1.0) == 1
        self.unclear = (others & close & ~outside).any(-1) | pools.take(self.near_kink, taken)
        if not self.problem.act.is_piecewise_linear:
            # torch takes the exponential of its vectors for most, and that of the C library at the tensor's end.
            self.unclear |= (close & ~outside).sum(-1) > 1

    def special_channels(self) -> Tensor:
        """Which channels have something in an argument that is not finite (C,)."""
        t = self.tensors
        found = torch.zeros(self.problem.shape[1], dtype=torch.bool)
        for value in (t.input, t.grad_output, t.residual):
            if value is not None:
                found |= _any(~value.detach().isfinite())
        for value in (t.weight, t.bias, t.running_mean, t.running_var):
            if value is not None:
                found |= ~value.detach().isfinite()
        return found

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self.problem.training:
            return fl.reference.batch_statistics(self.x)
        assert self.tensors.running_mean is not None
        assert self.tensors.running_var is not None
        return _double(self.tensors.running_mean), _double(self.tensors.running_var)

    def _column(self, values: Tensor) -> Tensor:
        return fl.reference.per_channel(values, self.x)

    def sizes(self) -> Results:
        """Of each result. `grad_output` is read now."""
        p, unit, tiny = self.problem, self.unit, self.tiny
        curvature = (2 * self.slope.abs()).clamp_min(p.act.curvature)
        of_y = self.keep * self.of_value + tiny
        dout = _double(self.tensors.grad_output).abs()
        if p.pool is not None:
            assert self.taken is not None
            of_y = p.pool.windows(of_y, 0.0).amax(-1)
            dout = pools.put(dout, self.taken, self.x)
        dout = self.keep * dout
        g = (dout * self.slope).abs()
        of_g = dout * (unit * self.steepest + curvature * self.of_z) + 2 * unit * g + tiny
        if p.pool is not None and self.pools_stored:  # and adds the gradients of windows up as it stores them
            of_g = of_g + _unit(p.dtype)[0] * g
        # Near a kink either slope is right.
        of_g = of_g + torch.where(self.near_kink, 2 * self.steepest * dout, 0)
        normal = self.deviation * self.invstd
        of_weight = (of_g * normal + g * unit * normal + (g + 1) * tiny * self.invstd).sum(self.dims)
        of_input = of_g
        if p.training:
            of_input = (
                of_input
                + self._column(of_g.sum(self.dims) / self.count)
                + normal * self._column((of_weight + unit * (g * normal).sum(self.dims)) / self.count)
            )
        return self._of_statistics() | {
            "output": of_y,
            "gradient of input": self.scale * of_input + tiny * (g + self.deviation + 1),
            "gradient of residual": of_g,
            "gradient of weight": of_weight,
            "gradient of bias": of_g.sum(self.dims),
        }

    def gradients_of_taken(self) -> Results:
        """In evaluation mode, of kernels that pool: what no window takes has no part in them, whatever it is."""
        p = self.problem
        if p.training or not p.has_kernel_that_pools:
            return {}
        assert self.taken is not None
        upstream = _double(self.tensors.grad_output)
        arrives = pools.put(torch.ones_like(upstream), self.taken, self.x) * self.keep != 0
        dz = torch.where(arrives, pools.put(upstream, self.taken, self.x) * self.keep * self.slope, 0)
        normal = torch.where(arrives, (self.x - self._column(self.mean)) * self.invstd, 0)
        return {
            "gradient of input": dz * self.factor,
            "gradient of weight": (dz * normal).sum(self.dims),
            "gradient of bias": dz.sum(self.dims),
        }

    def _of_statistics(self) -> Results:
        t, p = self.tensors, self.problem
        if not p.training or t.running_mean is None or t.running_var is None:
            return {}
        factor = abs(1.0 if p.momentum is None else p.momentum)
        before = _unit(p.param_dtype)[0] * (1 + factor)
        unbiased = self.var * (self.count / max(self.count - 1, 1))
        # In float64 the means of parts, whose differences merging takes, are as inexact; and the definition's own mean.
        # There the mean is the sum of a shift and of deviations from it, each of which is rounded.
        if p.dtype == torch.float64:
            inexact = self.unit * self.mean.abs() * (self.unit * self.mean.abs() + self.var.sqrt())
            summed = self.deviation.flatten()
        else:
            inexact, summed = torch.zeros_like(self.var), self.x.abs().mean(self.dims)
            if p.dtype != torch.float32:
                # Deviations of numbers of 16 bits end in the same bits, so that all additions are rounded the same way.
                summed = summed * _ADDITIONS
        if self.stores_between:
            inexact = inexact + 1e-299  # by which synchronised.py keeps variances from being zero
        return {
            "running_mean": factor * self.unit * summed + before * _double(t.running_mean).abs(),
            "running_var": factor * (self.unit * unbiased + inexact) + before * _double(t.running_var).abs(),
        }


def _double(t: Tensor) -> Tensor:
    return t.detach().double()


def _largest(t: Tensor, dims: list[int]) -> Tensor:
    return t.amax(dims, keepdim=True) if t.numel() else t.sum(dims, keepdim=True)


def _unit(dtype: torch.dtype) -> tuple[float, float]:
    """Units in the last place of 1 and of the smallest subnormal."""
    info = torch.finfo(dtype)
    return info.eps, info.eps * info.smallest_normal


def _of(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding `t` to `dtype` costs."""
    unit, tiny = _unit(dtype)
    return unit * t.abs() + tiny


class Judge:
    """Compares the results of a call with the exact ones and with torch's."""

    def __init__(self, rounding: Rounding, expected: Results, theirs: Results) -> None:
        self.tensors = rounding.tensors
        expected = expected | {
            name: torch.where(expected[name].isnan(), value, expected[name])
            for name, value in rounding.gradients_of_taken().items()
            if name in expected
        }
        self.expected, self.theirs, self.sizes = (as_one(r, self.tensors) for r in (expected, theirs, rounding.sizes()))
        self.undefined = undefined_gradients(rounding)
        self.overflows, self.unknown = _overflows(rounding), _unknown(rounding)

    def compare(self, got: Results) -> None:
        """Raises AssertionError with the first element that is wrong."""
        assert got.keys() == self.expected.keys() == self.theirs.keys(), (got.keys(), self.expected.keys())
        for name, result in got.items():
            theirs = self.theirs[name]
            assert result.dtype == theirs.dtype, f"{name}: {result.dtype} where torch has {theirs.dtype}"
            assert result.shape == theirs.shape, f"{name}: {result.shape} where torch has {theirs.shape}"
            if name not in self.sizes:
                assert _same(result, theirs), f"{name}: {result} where torch has {theirs}"
            elif result.numel():
                self._compare(name, result)

    def _compare(self, name: str, got: Tensor) -> None:
        """One result: see the top of this file.

        Values near the dtype's largest are infinite for some and not for others.
        """
        right, theirs, size = self.expected[name], self.theirs[name], self.sizes[name]
        limit = torch.finfo(got.dtype).max
        error = (got.double().clamp(-limit, limit) - right).abs()
        as_torch, as_defined = kinds(got) == kinds(theirs), kinds(got) == kinds(right.to(got.dtype))
        # Under autocast, a pool behind the kernels may return a wider dtype than they stored.
        stored = self.tensors.problem.dtype if name == "output" else got.dtype
        allowed = self._allowed(right, theirs, size, stored)
        largest = min(limit, torch.finfo(stored).max)
        unsure = ~allowed.isfinite() | (right.abs() + allowed >= largest / 4)
        close = (error <= allowed) & right.isfinite() & (got.isfinite() | allowed.isfinite())
        fine = close | unsure & (as_torch | as_defined)
        # What is not finite in torch is not in ours: in the same way, but where something overflows.
        neither = ~got.isfinite() & ~theirs.isfinite()
        fine |= neither & (as_torch | self._per_element(self.overflows, got))
        if name.startswith("gradient"):
            fine |= self._per_element(self.undefined, got)
        fine |= self._per_element(self.unknown, got)
        if not fine.all():
            index = tuple((~fine).nonzero()[0].tolist())
            raise AssertionError(
                f"{name}{list(index)}: {got[index].item()!r}, exact {right[index].item()!r}, torch "
                f"{theirs[index].item()!r}; error {error[index].item():.3g} where {allowed[index].item():.3g} is "
                f"allowed (rounding {size[index].item():.3g}); {(~fine).sum().item()} of {got.numel()} are wrong"
            )

    def _allowed(self, right: Tensor, theirs: Tensor, size: Tensor, stored: torch.dtype) -> Tensor:
        """Twice torch's error in the channel, and rounding."""
        roundings = ROUNDINGS_FLOAT64 if self.tensors.problem.dtype == torch.float64 else ROUNDINGS
        error = (theirs.double() - right).abs()
        error = torch.where(error.isfinite(), error, 0)
        if right.dim() > 1:
            error = error.amax([d for d in range(right.dim()) if d != 1], keepdim=True)
        return 2 * error + roundings * size + 2 * _of(right, stored)

    @staticmethod
    def _per_element(channels: Tensor, of: Tensor) -> Tensor:
        return fl.reference.per_channel(channels, of) if of.dim() > 1 else channels


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=-77), torch.nan_to_num(b, nan=-77))


def _any(t: Tensor) -> Tensor:
    """Per channel, whether it is so anywhere (C,)."""
    return t.transpose(0, 1).flatten(1).any(1)


def _largest_computed(p: Problem) -> float:
    return torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).max


def _overflows(rounding: Rounding) -> Tensor:
    """Which channels overflow on the way, in the dtype of the kernels: in their scale, slopes or sums (C,)."""
    t = rounding.tensors
    largest = _largest_computed(t.problem)
    found = ~(rounding.scale.flatten() < largest / 4) | _any(rounding.slope.abs() >= largest / 4)
    if t.input.numel():
        largest_gradient = t.grad_output.double().transpose(0, 1).flatten(1).abs().amax(1)
        found |= ~(rounding.deviation.flatten() * largest_gradient < largest / 1e6)
        largest_stored = torch.finfo(t.problem.dtype).max if rounding.stores_between else largest
        factors = largest_gradient, rounding.deviation.flatten(), rounding.mean.abs()
        for factor in factors if rounding.stores_between else factors[1:]:
            found |= rounding.scale.flatten() * factor >= largest_stored / 4
    return found


def _unknown(rounding: Rounding) -> Tensor:
    """Which channels nobody knows the results of (C,).

    On GPUs those whose squares overflow, as in torch's kernels there.

    In float64, those whose deviations the exact results, too, have lost to the rounding of the mean: a constant channel
    is as wide. And those with a scale that overflows where a deviation is zero, which torch makes zero or NaN of by the
    order in which it multiplies, or a slope that does where a gradient is small.
    """
    p, scale = rounding.problem, rounding.scale.flatten()
    largest = _largest_computed(p)
    found = scale.isfinite() & (scale >= largest / 4) | _any(rounding.slope.abs() >= largest / 4)
    if rounding.gpu and p.dtype != torch.float64 and p.training:
        spread = rounding.deviation.flatten() + ROUNDINGS * rounding.unit * rounding.mean.abs()
        found |= spread**2 >= largest / 64
    if p.dtype == torch.float64 and p.training:
        lost = ROUNDINGS_FLOAT64 * rounding.unit * rounding.mean.abs()
        found |= rounding.var + p.eps <= lost * lost
    return found


#: Whose slope at NaN is one number or another in torch, by the length of the tensor, and whose slope at infinities is
#: NaN in torch and the limit here.
_UNDEFINED_AT_NAN = ("ReLU6", "ELU", "SELU", "CELU", "Hardswish")
_UNDEFINED_AT_INFINITY = ("Mish", "GELU")
#: Beyond which torch's formulas overflow on the way.
_CUBES_OVERFLOW = 1e12


def undefined_gradients(rounding: Rounding) -> Tensor:
    """Which channels have a gradient that depends on such slopes, or on a scale that overflows (C,).

    Behind a kernel's pool also on which of several values that overflowed is the largest: it has another slope.
    """
    p, z = rounding.problem, rounding.z
    scale = rounding.scale.flatten()
    found = scale.isfinite() & (scale >= _largest_computed(p) / 4)
    if p.pool is not None:
        found |= _any(rounding.unclear) & _any(~rounding.slope.isfinite())
    if p.act.name in _UNDEFINED_AT_NAN:
        found |= _any(z.isnan())
    if p.act.name in _UNDEFINED_AT_INFINITY:
        theirs = rounding.of_z + rounding.unit * rounding.scale * rounding._column(rounding.mean.abs())
        limit = min(_CUBES_OVERFLOW, torch.finfo(p.dtype).max / 4)
        found |= _any((z.abs() > limit) | (64 * theirs > limit))
    return found


def assert_nothing_else_changed(t: Tensors) -> None:
    """No argument was written to but the running statistics, and nothing around them."""
    writes = ("running_mean", "running_var") if t.problem.training else ()
    for name, memory in t.memories.items():
        assert memory.is_untouched_around() if name in writes else memory.is_untouched(), f"{name} was written to"


def assert_own_memory(results: Results, t: Tensors) -> None:
    """No result shares memory with an argument or another result."""
    owners = {m.storage.untyped_storage().data_ptr(): name for name, m in t.memories.items() if m.storage.numel()}
    for name, result in results.items():
        if name in ("running_mean", "running_var", "num_batches_tracked") or result.numel() == 0:
            continue
        pointer = result.untyped_storage().data_ptr()
        if any(
            name == f"gradient of {one}" and f"gradient of {other}" in owners.values() for one, other in t.problem.same
        ):
            continue  # of one tensor there is one gradient
        assert pointer not in owners, f"{name} shares memory with {owners.get(pointer)}"
        owners[pointer] = name


def has_right_layout(output: Tensor, input: Tensor, pooled: bool) -> bool:
    """Whether `output` lies in memory as ``empty_like(input)`` would; strides of single elements do not matter.

    If it is `pooled`: whether its channels are adjacent where they would be there, and it is else contiguous.
    """
    expected = torch.empty_like(input)
    if pooled:
        batch, channels, *sizes = output.shape
        rows = math.prod(input.shape[2:]) == 1 or (channels > 1 and expected.stride(1) == 1)
        expected = output.new_empty(batch, *sizes, channels).movedim(-1, 1) if rows else output.new_empty(output.shape)
    strides = zip(output.stride(), expected.stride(), output.shape, strict=True)
    return output.numel() == 0 or all(a == b or size == 1 for a, b, size in strides)
