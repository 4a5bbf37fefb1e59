"""The oracle: what is right (fl.reference in float64), what torch's own layers give, and how far off we may be."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlayers as fl
from fastlayers import activations
from tests.cases import ACTIVATIONS, SEED, Case, Sample, make_sample, reference_of, take

Results = dict[str, Tensor]

#: Floor of the tolerance, in units in the last place of a result's largest magnitude.
FLOOR_ULPS = 2
#: In float64 the oracle's own rounding adds to that.
FLOOR_ULPS_FLOAT64 = 16


def tolerance(exact: Tensor, eager: Tensor, size: float = 0.0) -> float:
    """The largest error allowed of a result: twice eager's own, plus a floor.

    The floor is for results that eager gets exactly right by luck or by doing less (a copy, one rounding): a correctly
    rounded result is off by half a unit in the last place, and sums taken in another order by one or two. It is
    measured at the largest magnitude, or at `size` where that is more: a sum whose terms cancel is only as exact as its
    terms. Where eager overflows and the definition does not, eager excuses nothing.
    """
    errors = (eager.double() - exact).abs()
    eager_error = torch.where(errors.isfinite(), errors, 0).max().item()
    ulps = FLOOR_ULPS_FLOAT64 if eager.dtype == torch.float64 else FLOOR_ULPS
    return 2 * eager_error + ulps * torch.finfo(eager.dtype).eps * max(size, exact.abs().max().item())


def assert_close(name: str, got: Tensor, exact: Tensor, eager: Tensor, size: float = 0.0) -> None:
    """Compares one result with its exact value in float64, within `tolerance`; dtype and shape are to be eager's.

    Where the exact value is NaN or infinite, or too large for the dtype, so should be the result.
    """
    assert got.dtype == eager.dtype, name
    assert got.shape == eager.shape, name
    finite = exact.to(got.dtype).isfinite()
    assert torch.equal(kinds(got[~finite]), kinds(exact.to(got.dtype)[~finite])), name
    if not finite.any():
        return
    got, exact, eager = got[finite], exact[finite], eager[finite]
    error, allowed = (got.double() - exact).abs().max().item(), tolerance(exact, eager, size)
    assert error <= allowed, (
        f"{name}: error {error:.3g} where {allowed:.3g} is allowed, largest magnitude {exact.abs().max().item():.3g}"
    )


def kinds(t: Tensor) -> Tensor:
    """Everything finite as 0; NaN and the infinities as numbers, which are equal to themselves."""
    return torch.nan_to_num(torch.where(t.isfinite(), 0, t), nan=1, posinf=2, neginf=3)


def fused(sample: Sample) -> Tensor:
    """The operator under test, through the public function."""
    case = sample.case
    torch.manual_seed(SEED)
    return fl.functional.batch_norm_act(
        sample.input,
        sample.running_mean,
        sample.running_var,
        sample.weight,
        sample.bias,
        case.training,
        case.momentum,
        case.eps,
        residual=sample.residual,
        act=ACTIVATIONS[case.act],
        drop_p=case.drop_p,
        drop_mode=case.drop_mode,
        num_batches_tracked=sample.num_batches_tracked,
        pool=case.pool_layer,
    )


def eager(sample: Sample) -> Tensor:
    """The same by torch's own layers, one after the other.

    Max-pooling takes the elements that are known as `Sample.taken`, those of exact arithmetic: two that rounding makes
    equal have gradients of their own, and an error of which one it was would excuse every other.
    """
    case = sample.case
    momentum = case.momentum
    if case.training and sample.num_batches_tracked is not None:
        sample.num_batches_tracked.add_(1)
        momentum = 1 / sample.num_batches_tracked.item() if momentum is None else momentum
    z = F.batch_norm(
        sample.input,
        sample.running_mean,
        sample.running_var,
        sample.weight,
        sample.bias,
        case.training,
        0.0 if momentum is None else momentum,
        case.eps,
    )
    if sample.residual is not None:
        z = z + sample.residual
    y: Tensor = ACTIVATIONS[case.act](z)
    y = y if sample.mask is None else y * _noise(sample, y)
    if sample.taken is not None:
        return take(y, sample.taken)
    return y if case.pool is None else case.pool_layer(y)


def _noise(sample: Sample, y: Tensor) -> Tensor:
    """What F.dropout2d and F.dropout multiply by."""
    assert sample.mask is not None
    noise = sample.mask.to(y.dtype)
    if sample.case.drop_p < 1:
        noise = noise.div_(1 - sample.case.drop_p)
    return noise if noise.shape == y.shape else noise.reshape(noise.shape + (1,) * (y.dim() - 2))


def exact(sample: Sample) -> Tensor:
    """The definition, to be run on a sample in float64."""
    return reference_of(sample, activations.resolve(ACTIVATIONS[sample.case.act]))


def run(operator: Callable[[Sample], Tensor], sample: Sample) -> Results:
    """Output, gradients of all that has one, and the state afterwards."""
    output = operator(sample)
    sources = {
        name: t
        for name in ("input", "residual", "weight", "bias")
        if (t := getattr(sample, name)) is not None and t.requires_grad
    }
    gradients = torch.autograd.grad(output, list(sources.values()), sample.grad_output)
    results = {"output": output.detach()}
    results |= {f"gradient of {name}": g for name, g in zip(sources, gradients, strict=True)}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if (t := getattr(sample, name)) is not None:
            results[name] = t
    return results


@functools.lru_cache(maxsize=4)
def expected(case: Case, device: torch.device) -> tuple[Sample, Results, Results]:
    """The sample of `case`, its exact results (float64) and eager's; kept for the instruction sets that follow."""
    sample = make_sample(case, device)
    return sample, run(exact, sample.fresh(torch.float64)), run(eager, sample.fresh())


def _size(name: str, sample: Sample) -> float:
    """The size that a gradient's terms have where they cancel.

    For a parameter that is the 2-norm of what is summed. Of two values per channel the input gradient cancels to almost
    nothing, whatever its terms.
    """
    grad_output = sample.grad_output.double().transpose(0, 1).flatten(1)
    if grad_output.numel() == 0:
        return 0.0
    values = sample.input.double().transpose(0, 1).flatten(1)
    if name in ("gradient of weight", "gradient of bias"):
        return float(grad_output.norm(dim=1).max())
    if name == "gradient of input" and sample.case.training and values.shape[1] == 2:
        invstd = torch.rsqrt(values.var(dim=1, unbiased=False) + sample.case.eps)
        scale = invstd if sample.weight is None else invstd * sample.weight.double()
        return float((grad_output * scale[:, None]).abs().max())
    return 0.0


def check(case: Case, device: torch.device) -> None:
    """Runs the operator under test on `case` and compares all that comes out."""
    sample, exact_results, eager_results = expected(case, device)
    results = run(fused, sample.fresh())
    compare(results, sample, exact_results, eager_results)
    like = torch.empty_like(sample.input)
    assert results["output"].stride() == (like if case.pool is None else _pooled_like(results["output"], like)).stride()
    assert results["gradient of input"].stride() == like.stride()


def _pooled_like(output: Tensor, like: Tensor) -> Tensor:
    """Channels adjacent where they are in the input, and else contiguous."""
    batch, channels, *sizes = output.shape
    if like[0, 0].numel() == 1 or (channels > 1 and like.stride(1) == 1):
        return output.new_empty(batch, *sizes, channels).movedim(-1, 1)
    return output.new_empty(output.shape)


def compare(results: Results, sample: Sample, exact_results: Results, eager_results: Results) -> None:
    """Compares all results of the operator under test."""
    assert results.keys() == exact_results.keys()
    for name, got in results.items():
        if name == "num_batches_tracked":
            assert torch.equal(got, eager_results[name])
        else:
            assert_close(name, got, exact_results[name], eager_results[name], _size(name, sample))
