"""The CPU operators with max-pooling, beside plain torch in float64: values, positions and gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlayers import activations, ops
from fastlayers.pooling import Pool, resolve
from tests.cases import ACTIVATIONS
from tests.layouts import LAYOUTS, in_layout

RTOL = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
EPS = 1e-5


def pool_of(dims: int, *sizes: Any, ceil_mode: bool = False) -> Pool:
    """From kernel, stride, padding and dilation, as many as given."""
    names = ("kernel_size", "stride", "padding", "dilation")
    pool = resolve(dict(zip(names, sizes, strict=False)) | {"ceil_mode": ceil_mode}, dims)
    assert pool is not None
    return pool


@dataclass(frozen=True)
class Case:
    """One forward and backward pass, without its tensors.

    Attributes:
        drop: the share of planes that the mask drops; None for no mask.
        scales: what the weights are multiplied by, by turns.
    """

    shape: tuple[int, ...] = (3, 5, 9, 11)
    pool: Pool = dataclasses.field(default_factory=lambda: pool_of(2, 3, 2, 1))
    act: str = "relu"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = torch.float32
    training: bool = True
    affine: bool = True
    drop: float | None = 0.4
    scales: tuple[float, ...] = (1.0, -1.0)

    @property
    def activation(self) -> activations.Activation:
        return activations.resolve(ACTIVATIONS[self.act])


@dataclass
class Sample:
    """The tensors of a case."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    grad_output: Tensor
    drop_scale: float


def make_sample(case: Case) -> Sample:
    channels = case.shape[1]
    scales = torch.tensor(case.scales).repeat(channels)[:channels]
    pooled = case.shape[:2] + case.pool.output_size(case.shape[2:])
    weight = ((torch.rand(channels) + 0.5) * scales).to(case.param_dtype)
    bias = torch.randn(channels).to(case.param_dtype)
    return Sample(
        input=in_layout((torch.randn(case.shape) * 2 + 1).to(case.dtype), case.layout),
        weight=weight if case.affine else None,
        bias=bias if case.affine else None,
        mask=None if case.drop is None else torch.rand(case.shape[:2]) >= case.drop,
        running_mean=torch.randn(channels),
        running_var=torch.rand(channels) + 0.5,
        grad_output=in_layout(torch.randn(pooled).to(case.dtype), case.grad_layout),
        drop_scale=1.0 if case.drop is None else 1 / (1 - case.drop),
    )


Results = dict[str, Tensor]


def forward(case: Case, sample: Sample, save: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    activation = case.activation
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = ops.batch_norm_act_pool_fwd(
        sample.input,
        sample.weight,
        sample.bias,
        sample.mask,
        None if case.training else sample.running_mean,
        None if case.training else sample.running_var,
        None,
        case.training,
        0.1,
        EPS,
        activation.code,
        activation.params,
        activation.monotone,
        sample.drop_scale,
        case.pool.window,
        case.pool.ceil_mode,
        save,
    )
    return results


def backward(
    case: Case, sample: Sample, saved: Sequence[Tensor], input_grad: bool = True, affine_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    mean, invstd, selected, positions = saved
    activation = case.activation
    results: tuple[Tensor, Tensor, Tensor] = ops.batch_norm_act_pool_bwd(
        sample.grad_output,
        sample.input,
        selected,
        positions,
        sample.weight,
        sample.bias,
        sample.mask,
        mean,
        invstd,
        case.training,
        activation.code,
        activation.params,
        sample.drop_scale,
        case.pool.window,
        case.pool.ceil_mode,
        input_grad,
        affine_grad,
    )
    return results


def run(case: Case, sample: Sample) -> Results:
    output, *saved = forward(case, sample)
    gradients = backward(case, sample, saved)
    names = ("output", "mean", "invstd", "selected", "positions", "grad_input", "grad_weight", "grad_bias")
    return dict(zip(names, (output, *saved, *gradients), strict=True))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape((1, -1) + (1,) * (like.dim() - 2))


def torch_pool(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each window, and the positions that the operators number."""
    kernel, stride, padding, dilation = (case.pool.window[i : i + 2] for i in range(0, 8, 2))
    planes = x if x.dim() == 4 else x.unsqueeze(2)
    values, indices = F.max_pool2d(
        planes.contiguous(), kernel, stride, padding, dilation, case.pool.ceil_mode, return_indices=True
    )
    start = [torch.arange(n) * stride[d] - padding[d] for d, n in enumerate(values.shape[2:])]
    row = (indices // planes.shape[3] - start[0][:, None]) // dilation[0]
    column = (indices % planes.shape[3] - start[1]) // dilation[1]
    positions = row * kernel[1] + column
    shape = x.shape[:2] + case.pool.output_size(x.shape[2:])
    return values.reshape(shape), positions.reshape(shape).to(torch.uint8)


def exact(case: Case, sample: Sample, positions: Tensor | None = None) -> Results:
    """What `run` should give, by autograd in float64.

    What is selected are the elements with torch's positions of the keys, or, where an activation is not monotone, those
    at `positions`: digits that are lost where it is flat decide there. The largest values are torch's in any case.
    """
    x = sample.input.double().contiguous().requires_grad_()
    dims = [d for d in range(x.dim()) if d != 1]
    channels = x.shape[1]
    weight = torch.ones(channels) if sample.weight is None else sample.weight
    bias = torch.zeros(channels) if sample.bias is None else sample.bias
    weight, bias = (t.double().requires_grad_() for t in (weight, bias))
    if case.training:
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
    else:
        mean, var = sample.running_mean.double(), sample.running_var.double()
    invstd = torch.rsqrt(var + EPS)
    z = (x - per_channel(mean, x)) * per_channel(invstd * weight, x) + per_channel(bias, x)
    y = case.activation.apply(z)
    scale = (invstd * weight).detach()
    sign = torch.where(scale.isnan(), scale, torch.sign(scale))
    found = torch_pool(case, x.detach() * per_channel(sign, x) if case.activation.monotone else y.detach())[1]
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if sample.mask is None else sample.mask
    kept = kept.reshape(kept.shape + (1,) * (x.dim() - 2))
    if positions is not None and not case.activation.monotone:
        found = torch.where(kept, positions, found)
    values = elements_at(case, y, found)
    torch.testing.assert_close(values, torch_pool(case, y)[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    # Not a product: what is dropped is zero whatever it is.
    output = torch.where(kept, values * sample.drop_scale, 0)
    grads = torch.autograd.grad(output, (x, weight, bias), sample.grad_output.double())
    selected = torch.where(kept, elements_at(case, x.detach(), found), 0)
    positions = torch.where(kept, found, 0)
    results = {"output": output, "mean": mean, "invstd": invstd, "selected": selected, "positions": positions}
    results |= {"grad_input": grads[0], "grad_weight": grads[1], "grad_bias": grads[2]}
    return {name: t.detach() for name, t in results.items()}


def elements_at(case: Case, x: Tensor, positions: Tensor) -> Tensor:
    """The elements of `x` at these positions of their windows."""
    kernel, stride, padding, dilation = (case.pool.window[i : i + 2] for i in range(0, 8, 2))
    planes = x if x.dim() == 4 else x.unsqueeze(2)
    number = positions.long() if x.dim() == 4 else positions.long().unsqueeze(2)
    row = number // kernel[1] * dilation[0] + (torch.arange(number.shape[2]) * stride[0] - padding[0])[:, None]
    column = number % kernel[1] * dilation[1] + torch.arange(number.shape[3]) * stride[1] - padding[1]
    flat = (row * planes.shape[3] + column).flatten(2)
    return planes.flatten(2).gather(2, flat).reshape(positions.shape)


def strides_like(input: Tensor, pooled: Tensor) -> tuple[int, ...]:
    """Those of planes or of rows, as torch.empty_like(input) has them."""
    channels, spatial = pooled.shape[1], pooled.shape[2:]
    rows = input[0, 0].numel() == 1 or (channels > 1 and torch.empty_like(input).stride(1) == 1)
    step = channels if rows else 1
    inner = [step * math.prod(spatial[d + 1 :]) for d in range(len(spatial))]
    return (channels * math.prod(spatial), 1 if rows else math.prod(spatial), *inner)


def check(case: Case, sample: Sample | None = None) -> None:
    sample = make_sample(case) if sample is None else sample
    got = run(case, sample)
    expected = exact(case, sample, got["positions"])
    pooled_strides = strides_like(sample.input, got["output"])
    assert got["output"].stride() == pooled_strides
    for name in ("selected", "positions"):
        assert got[name].stride() == pooled_strides
        assert torch.equal(got[name].double(), expected[name].double()), name
    assert got["grad_input"].stride() == torch.empty_like(sample.input).stride()
    assert got["output"].dtype == got["grad_input"].dtype == case.dtype
    for name in ("output", "mean", "invstd", "grad_input", "grad_weight", "grad_bias"):
        if name.startswith("grad_") and not case.affine and name != "grad_input":
            assert got[name].numel() == 0
            continue
        if name in ("grad_weight", "grad_bias"):
            assert got[name].dtype == case.param_dtype
        close(name, got[name], expected[name], case.dtype)


def close(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compares a result with its exact value; `dtype` is that of the input, which the errors depend on."""
    computed = torch.promote_types(dtype, torch.float32)
    rtol = max(RTOL[got.dtype], RTOL[computed])
    finite = expected.isfinite()
    size = expected[finite].abs().max().item() if finite.any() else 0.0
    torch.testing.assert_close(
        got.double(), expected, rtol=rtol, atol=rtol * size, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


WINDOWS: dict[str, tuple[tuple[int, ...], Pool]] = {
    "2/2": ((3, 5, 8, 12), pool_of(2, 2)),
    "2/2, odd sizes": ((3, 5, 9, 13), pool_of(2, 2)),
    "2/2, odd sizes, ceil": ((3, 5, 9, 13), pool_of(2, 2, ceil_mode=True)),
    "3/2/1": ((2, 4, 16, 17), pool_of(2, 3, 2, 1)),
    "3/1/1": ((2, 4, 7, 18), pool_of(2, 3, 1, 1)),
    "3/3": ((2, 4, 12, 54), pool_of(2, 3)),
    "5/3/2": ((2, 4, 32, 32), pool_of(2, 5, 3, 2)),
    "5/3/2, wide": ((2, 4, 13, 101), pool_of(2, 5, 3, 2)),
    "4/5": ((2, 4, 21, 33), pool_of(2, 4, 5)),
    "1/2": ((2, 4, 8, 8), pool_of(2, 1, 2)),
    "1/1": ((2, 4, 8, 8), pool_of(2, 1, 1)),
    "dilated": ((2, 3, 17, 19), pool_of(2, 3, 2, 1, 3)),
    "dilated, stride 1": ((2, 3, 12, 19), pool_of(2, 3, 1, 1, 2)),
    "dilated beyond the padding": ((2, 3, 9, 9), pool_of(2, (3, 2), 1, 1, (4, 5))),
    "not square": ((2, 3, 15, 40), pool_of(2, (2, 5), (3, 4), (1, 2), (2, 1))),
    "not square, ceil": ((2, 3, 15, 40), pool_of(2, (5, 2), (4, 3), (2, 0), (1, 3), ceil_mode=True)),
    "16 x 16": ((2, 3, 20, 40), pool_of(2, 16, 5, 8)),
    "global": ((2, 35, 7, 7), pool_of(2, 7)),
    "1d, 2/2": ((3, 4, 64), pool_of(1, 2)),
    "1d, 5/3/2": ((3, 20, 50), pool_of(1, 5, 3, 2)),
    "1d, 256/7": ((2, 3, 600), pool_of(1, 256, 7, 128)),
    "blocks of rows": ((1, 2, 150, 131), pool_of(2, 3, 2, 1)),
    "blocks of rows, 5/3/2": ((1, 20, 100, 90), pool_of(2, 5, 3, 2)),
    "long columns": ((1, 2, 700, 9), pool_of(2, (33, 2), (3, 2), (16, 0))),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window: str, layout: str, capability: str) -> None:
    shape, pool = WINDOWS[window]
    check(Case(shape=shape, pool=pool, layout=layout))
    check(Case(shape=shape, pool=pool, layout=layout, act="silu", drop=None, training=False))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str, layout: str, capability: str) -> None:
    check(Case(shape=(2, 19, 9, 10), act=act, layout=layout, dtype=torch.float64, param_dtype=torch.float64))
    check(Case(shape=(2, 19, 9, 10), act=act, layout=layout, training=False, drop=None))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("same_params", [False, True])
@pytest.mark.parametrize("dtype", RTOL)
def test_dtypes(dtype: torch.dtype, same_params: bool, layout: str, capability: str) -> None:
    param_dtype = dtype if same_params else torch.float32
    for pool in (pool_of(2, 5, 3, 2), pool_of(2, 2)):
        case = Case(shape=(4, 21, 14, 18), pool=pool, layout=layout, dtype=dtype, param_dtype=param_dtype)
        check(case)
        check(dataclasses.replace(case, training=False, act="leaky_relu", drop=None))


OF_EACH_LAYOUT = [
    ((3, 6, 9, 8), pool_of(2, 3, 2, 1)),
    ((3, 6, 20), pool_of(1, 2)),
    ((2, 3, 16, 16), pool_of(2, 16)),
    ((2, 5, 1, 1), pool_of(2, 1)),
]


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
@pytest.mark.parametrize(("shape", "pool"), OF_EACH_LAYOUT)
def test_layouts(shape: tuple[int, ...], pool: Pool, layout: str) -> None:
    check(Case(shape=shape, pool=pool, layout=layout, grad_layout="reversed", training=False))
    check(Case(shape=shape, pool=pool, layout="channels_last", grad_layout=layout, affine=False, training=False))


CHANNELS = {"one": 1, "few": 3, "narrow": 17, "sixteen": 16, "a block and a half": 1500}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_numbers_of_channels(channels: str, layout: str, capability: str) -> None:
    check(Case(shape=(2, CHANNELS[channels], 8, 8), pool=pool_of(2, 3, 2, 1), layout=layout))


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [(2, 64, 40, 40), (1, 3, 128, 130), (8, 40, 24, 32)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_split_among_threads(layout: str, shape: tuple[int, ...], act: str) -> None:
    case = Case(shape=shape, pool=pool_of(2, 5, 3, 2), layout=layout, act=act)
    sample = make_sample(case)
    check(case, sample)
    results = {}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results[count] = run(case, sample)
    finally:
        torch.set_num_threads(threads)
    for name, t in results[1].items():
        assert all(torch.equal(results[count][name], t) for count in (2, 3)), name


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 16, 16, 16), (2, 24, 12, 20), (1, 2, 130, 128)])
def test_results_written_past_the_caches(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    capability: str,
    results_written_past_the_caches: None,
) -> None:
    check(Case(shape=shape, layout=layout, dtype=dtype))


def special(shape: tuple[int, ...], values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), shape)].to(dtype)


SPECIAL = {
    "ties": [0.0, 1.0, 2.0],
    "zeros of both signs": [0.0, -0.0],
    "nan": [0.0, 1.0, 2.0, 3.0, math.nan],
    "infinities": [math.inf, -math.inf, 1.0],
    "all": [math.inf, -math.inf, math.nan, 0.0, -1.0],
    "lowest": [-math.inf],
    "highest": [math.inf],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("values", SPECIAL)
def test_ties_nan_and_infinities_of_an_evaluation(
    values: str, layout: str, dtype: torch.dtype, capability: str
) -> None:
    """Positions are torch's, of the keys x, -x and 0 * x."""
    for pool in (pool_of(2, 3, 2, 1), pool_of(2, 2), pool_of(2, 2, 3)):
        case = Case((2, 21, 9, 10), pool, "identity", layout, dtype=dtype, training=False, scales=(1.0, -1.0, 0.0))
        sample = make_sample(case)
        sample.input = in_layout(special(case.shape, SPECIAL[values], dtype), layout)
        output, _, _, selected, positions = forward(case, sample)
        expected = exact(case, sample)
        assert torch.equal(positions, expected["positions"])
        torch.testing.assert_close(selected.double(), expected["selected"], rtol=0, atol=0, equal_nan=True)
        close("output", output, expected["output"], dtype)


@pytest.mark.parametrize("act", ["relu", "gelu", "hardswish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(2, 5, 9, 10), (2, 64, 40, 40)])
def test_what_is_not_finite_stays_in_its_channel(
    shape: tuple[int, ...], value: float, layout: str, act: str, capability: str
) -> None:
    case = Case(shape=shape, act=act, layout=layout, drop=0.5)
    sample = make_sample(case)
    assert sample.mask is not None
    sample.mask[0, 1] = True
    clean = run(case, sample)
    sample.input[0, 1, 3, 4] = value
    got = run(case, sample)
    expected = exact(case, sample, got["positions"])
    assert torch.equal(got["output"].isnan(), expected["output"].isnan())
    assert torch.equal(got["positions"][:, 1], expected["positions"][:, 1])
    assert got["grad_input"][:, 1].isnan().all()
    for name, t in got.items():
        others = torch.tensor([c for c in range(shape[1]) if c != 1])
        dim = min(1, t.dim() - 1)
        # Beside what is not finite, channels_last sums the statistics of all channels in double.
        torch.testing.assert_close(t.index_select(dim, others), clean[name].index_select(dim, others))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_dropped_planes_take_no_part(training: bool, layout: str, capability: str) -> None:
    case = Case(shape=(4, 20, 9, 9), layout=layout, training=training, act="gelu")
    sample = make_sample(case)
    assert sample.mask is not None
    before = run(case, sample)
    sample.grad_output[~sample.mask] = math.nan
    after = run(case, sample)
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    for name in ("output", "selected", "positions"):
        assert not before[name][~sample.mask].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_evaluation_reads_no_input_in_backward(layout: str, capability: str) -> None:
    case = Case(layout=layout, training=False)
    sample = make_sample(case)
    _, *saved = forward(case, sample)
    before = backward(case, sample, saved)
    sample.input.fill_(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, backward(case, sample, saved), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 9, 11), (2, 64, 40, 40)])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_is_saved_that_is_not_wanted(layout: str, act: str, shape: tuple[int, ...], training: bool) -> None:
    case = Case(shape=shape, act=act, layout=layout, training=training)
    sample = make_sample(case)
    saving, saved_nothing = forward(case, sample), forward(case, sample, save=False)
    assert all(torch.equal(a, b) for a, b in zip(saving[:3], saved_nothing[:3], strict=True))
    assert [t.shape for t in saved_nothing[3:]] == [(0,), (0,)]
    assert [t.dtype for t in saved_nothing[3:]] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_are_not_wanted(layout: str, training: bool) -> None:
    case = Case(layout=layout, training=training)
    sample = make_sample(case)
    _, *saved = forward(case, sample)
    both = backward(case, sample, saved)
    of_input = backward(case, sample, saved, affine_grad=False)
    of_params = backward(case, sample, saved, input_grad=False)
    assert torch.equal(of_input[0], both[0])
    assert [t.numel() for t in of_input[1:]] == [0, 0]
    assert of_params[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(of_params[1:], both[1:], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_are_those_without_a_pool(momentum: float | None, layout: str) -> None:
    case = Case(shape=(3, 40, 13, 11), layout=layout)
    sample = make_sample(case)
    activation = case.activation

    def state() -> list[Tensor]:
        return [sample.running_mean.clone(), sample.running_var.clone(), torch.tensor(3)]

    pooled, unpooled = state(), state()
    shared = (True, momentum, EPS, activation.code, activation.params)
    affine = (sample.input, sample.weight, sample.bias)
    got = ops.batch_norm_act_pool_fwd(
        *affine, None, *pooled, *shared, True, 1.0, case.pool.window, case.pool.ceil_mode, True
    )
    expected = ops.batch_norm_act_fwd(*affine, None, None, *unpooled, *shared, 1.0, False)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])
    assert all(torch.equal(a, b) for a, b in zip(pooled, unpooled, strict=True))


def test_an_empty_batch() -> None:
    case = Case(shape=(0, 4, 8, 8), pool=pool_of(2, 2))
    sample = make_sample(case)
    results = run(case, sample)
    assert results["output"].shape == results["selected"].shape == results["positions"].shape == (0, 4, 4, 4)
    assert results["grad_input"].shape == case.shape
    for name in ("mean", "invstd", "grad_weight", "grad_bias"):
        assert torch.equal(results[name], torch.zeros(4, dtype=results[name].dtype))


def replaced(**changes: Any) -> Callable[[Sample], None]:
    def change(sample: Sample) -> None:
        for name, value in changes.items():
            setattr(sample, name, value)

    return change


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([2, 2, 2, 2, 0, 0, 1], "window should have 8 numbers, not 7"),
        ([0, 2, 2, 2, 0, 0, 1, 1], "at least 1"),
        ([2, 2, 2, 0, 0, 0, 1, 1], "at least 1"),
        ([2, 2, 2, 2, 2, 0, 1, 1], "padding"),
        ([2, 2, 2, 2, -1, 0, 1, 1], "padding"),
        ([17, 16, 2, 2, 8, 8, 1, 1], "at most 256 elements, not 272"),
        ([2, 12, 2, 2, 0, 0, 1, 1], "fit"),
        ([2, 2, 1, 1, 1, 0, 10, 1], "without elements"),
    ],
)
def test_windows_that_are_refused(window: list[int], message: str) -> None:
    case = Case()
    sample = make_sample(case)
    arguments = (None, None, None, None, None, None, True, 0.1, EPS, 1, [0.0, 0.0, 0.0], True, 1.0)
    with pytest.raises(RuntimeError, match=message):
        ops.batch_norm_act_pool_fwd(sample.input, *arguments, window, False, True)


def test_other_dimensions_are_refused() -> None:
    arguments = (None, None, None, None, None, None, True, 0.1, EPS, 1, [0.0, 0.0, 0.0], True, 1.0)
    for shape in ((2, 3), (2, 3, 4, 4, 4)):
        with pytest.raises(RuntimeError, match=f"not of {len(shape)} dimensions"):
            ops.batch_norm_act_pool_fwd(torch.randn(shape), *arguments, [2, 2, 2, 2, 0, 0, 1, 1], False, True)
    with pytest.raises(RuntimeError, match="height 1"):
        ops.batch_norm_act_pool_fwd(torch.randn(2, 3, 9), *arguments, [2, 2, 2, 2, 1, 0, 1, 1], False, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(mask=torch.ones(3, 5)), "mask should be bool"),
        (replaced(mask=torch.ones(3, 4, dtype=torch.bool)), "should have 15 elements, not 12"),
        (replaced(weight=torch.ones(4)), "weight should contain 5 elements not 4"),
        (replaced(bias=torch.ones(4)), "bias should contain 5 elements not 4"),
    ],
)
def test_tensors_that_are_refused(change: Callable[[Sample], None], message: str) -> None:
    case = Case()
    sample = make_sample(case)
    _, *saved = forward(case, sample)
    change(sample)
    with pytest.raises(RuntimeError, match=message):
        forward(case, sample)
    with pytest.raises(RuntimeError, match=message):
        backward(case, sample, saved)


@pytest.mark.parametrize("index", range(4))
def test_saved_tensors_that_are_refused(index: int) -> None:
    case = Case()
    sample = make_sample(case)
    _, *saved = forward(case, sample)
    name = ("mean", "invstd", "selected", "positions")[index]
    for wrong in (saved[index][..., :-1], saved[index].to(torch.int32)):
        with pytest.raises(RuntimeError, match=f"{name} should"):
            backward(case, sample, [*saved[:index], wrong, *saved[index + 1 :]])
    sample.grad_output = sample.grad_output[:1]
    with pytest.raises(RuntimeError, match="grad_output should have the shape of the output"):
        backward(case, sample, saved)
