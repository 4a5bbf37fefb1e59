"""The CUDA kernels with max-pooling, emulated on the CPU, against their definition in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlayers import activations, pooling
from tests import emulated, oracle
from tests.cases import ACTIVATIONS, POOLS, Case, case_of, pairwise, take
from tests.emulated import (
    GPUS,
    EmulatedSample,
    Emulation,
    MaskArgument,
    PooledForward,
    Wanted,
    check,
    far_apart,
    make_emulated_sample,
    with_options,
)
from tests.layouts import in_layout

pytestmark = pytest.mark.usefixtures("one_thread")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [f32, f64, bf16, f16]

# Sizes that every pool but the largest takes, each with what it is there for.
SHAPES = [
    (6, 1, 9),  # one channel, one row
    (3, 20, 17),
    (1, 2, 6000),  # a row is more than a tile
    (4, 3, 9, 7),  # odd planes
    (3, 8, 8, 8),  # planes of whole groups, whole groups of channels
    (9, 21, 6, 8),
    (2, 300, 5, 6),  # several blocks of channels
    (2, 5, 33, 70),  # a plane is several tiles
]
_FACTORS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "pool": [name for name in POOLS if name not in ("16/16", "all")],
    "act": list(ACTIVATIONS),
    "dtypes": [(f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)],
    "layout": ["contiguous", "channels_last", "channels_first", "some_channels", "some_channels_last", "offset"],
    "grad_layout": ["contiguous", "channels_last", "offset", "expanded"],
    "affine": ["both", "none", "no bias", "frozen weight"],
    "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
    "drop_p": [0.0, 0.3, 1.0],
    "gpu": list(GPUS),
    "order": ["up", "random"],
    "mask_dtype": [torch.bool, f32, f64, bf16],
}


def _matrix() -> list[Any]:
    parameters = []
    for row in pairwise(_FACTORS):
        options = {name: row.pop(name) for name in ("gpu", "order")}
        mask_dtype = row.pop("mask_dtype")
        case = case_of(row)
        label = f"{case} {options['gpu']} {options['order']} {mask_dtype}"
        parameters.append(pytest.param(case, mask_dtype, options, id=label))
    return parameters


@pytest.mark.parametrize(("case", "mask_dtype", "options"), _matrix())
def test_every_pair_of_choices_pooled(
    case: Case, mask_dtype: torch.dtype, options: dict[str, str], emulation: Emulation
) -> None:
    check(with_options(emulation, **options), case, mask_dtype)


# What each path is for, with the GPU on which a small tensor takes it forward and backward.
PATHS = [
    (Case((5, 12, 8, 8), pool="5/3/2"), "hopper", "planes_on_chip", "planes_split"),
    (Case((5, 12, 9, 7), pool="2/2", dtype=bf16), "hopper", "planes_on_chip", "planes_split"),
    (Case((5, 3, 20, 17), pool="5/3/2"), "little memory", "planes_on_chip", "planes_split"),  # clusters
    (Case((3, 3, 40, 33), pool="3/1/1"), "least memory", "planes_split", "planes_split"),
    (Case((9, 20, 9, 7), pool="5/3/2", layout="channels_last"), "hopper", "rows_split", "rows_split"),
    (Case((5, 16, 9, 8), pool="2/2", layout="channels_last", dtype=bf16), "turing", "rows_split", "rows_split"),
    (Case((3, 5, 9, 7), pool="2/2", training=False, affine="none"), "hopper", "planes_pointwise", "planes_pointwise"),
    (
        Case((3, 12, 9, 7), pool="5/3/2", training=False, affine="none", layout="channels_last"),
        "hopper",
        "rows_pointwise",
        "rows_pointwise",
    ),
]
SUMMED = [path[:2] for path in PATHS if path[0].training]


@pytest.mark.parametrize("order", ["up", "down", "random"])
@pytest.mark.parametrize("options", [{}, {"act": "relu", "drop_p": 0.4}, {"act": "gelu", "drop_p": 0.4}], ids=str)
@pytest.mark.parametrize(("case", "gpu", "forward", "backward"), PATHS, ids=str)
def test_each_path_pooled(
    case: Case, gpu: str, forward: str, backward: str, options: dict[str, Any], order: str, emulation: Emulation
) -> None:
    plans = check(with_options(emulation, gpu=gpu, order=order), dataclasses.replace(case, **options))
    assert [plan.last.path for plan in plans] == [forward, backward]


@pytest.mark.parametrize("order", ["up", "random"])
@pytest.mark.parametrize("shape", [(9, 3, 20, 20), (13, 3, 19, 21)], ids=str)
def test_each_size_of_a_cluster_pooled(
    shape: tuple[int, ...], order: str, emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a cluster share a channel's planes: the less memory each has, the more there are."""
    seen: set[int] = set()
    for shared_kilobytes in (40, 14, 8, 6, 4):
        shared_bytes = shared_kilobytes * 1024
        monkeypatch.setitem(GPUS, "this one", (4, shared_bytes, 2 * shared_bytes + 2048, 8))
        forward, _ = check(with_options(emulation, gpu="this one", order=order), Case(shape, pool="5/3/2", drop_p=0.3))
        if forward.last.path == "planes_on_chip":
            seen.add(forward.last.cluster)
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "pool"), [((4, 5, 9, 7), "all"), ((2, 10, 33, 40), "16/16")], ids=str)
def test_large_windows_pooled(shape: tuple[int, ...], pool: str, layout: str, act: str, emulation: Emulation) -> None:
    """The whole input, of which one element is left; and as many positions as there can be."""
    check(emulation, Case(shape, pool=pool, layout=layout, act=act, drop_p=0.3))


@pytest.mark.parametrize(
    "values",
    [
        {"mean": 1e4, "std": 1.0},
        {"mean": 1e4, "std": 1.0, "training": False},
        {"mean": 1e30, "std": 1e26},
        {"mean": 100.0, "std": 1.0, "dtype": f16, "eps": 1e-12},
        {"mean": 1.0, "std": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_hard_values_pooled(case: Case, gpu: str, values: dict[str, Any], emulation: Emulation) -> None:
    check(with_options(emulation, gpu=gpu), dataclasses.replace(case, act="relu", **values))


def whole_numbers(case: Case, weights: tuple[float, ...]) -> EmulatedSample:
    """Many equal values, in every second group of channels NaN and infinities among them; weights take turns."""
    given = make_emulated_sample(dataclasses.replace(case, drop_p=0.3))
    channels = case.shape[1]
    values = torch.randint(-2, 3, given.sample.input.shape).to(case.dtype)
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), float("-inf")], dtype=case.dtype)
    poisoned = (torch.rand(values.shape) < 0.3) & (torch.arange(channels) // len(weights) % 2 == 1).view(-1, 1, 1)
    values = torch.where(poisoned, special[torch.randint(0, 4, values.shape)], values)
    values[0, len(weights) % channels] = float("-inf")  # a window of nothing else
    sample = dataclasses.replace(
        given.sample,
        input=in_layout(values, case.layout),
        weight=torch.tensor(weights).repeat(channels)[:channels],
        mask=torch.rand(case.shape[:2]) >= 0.3,
    )
    return EmulatedSample(sample, MaskArgument(planes=sample.mask))


def places(emulation: Emulation, given: EmulatedSample) -> tuple[PooledForward, Tensor]:
    """Forward, and where it finds the largest elements in the planes."""
    case = given.sample.case
    forward = PooledForward(emulation, given, activations.resolve(ACTIVATIONS[case.act]))
    pool = pooling.resolve(case.pool_layer, len(case.shape) - 2)
    assert pool is not None
    assert forward.positions is not None
    return forward, pooling.indices(pool, forward.positions, case.shape[2:])


def torch_places(case: Case, keys: Tensor) -> Tensor:
    """Where torch finds them."""
    layer = case.pool_layer
    layer.return_indices = True
    found: Tensor = layer(keys)[1]
    return found


@pytest.mark.parametrize("pool", ["5/3/2", "3/2/1 dilated ceil", "oblong"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_ties_and_nan_are_taken_as_torch_takes_them(
    case: Case, gpu: str, dtype: torch.dtype, training: bool, pool: str, emulation: Emulation
) -> None:
    """Of a rising and a falling channel, and of one whose scale is 0: the first of equal ones, the last NaN."""
    case = dataclasses.replace(case, pool=pool, dtype=dtype, training=training, act="relu")
    given = whole_numbers(case, (1.0, -2.0, 0.0))
    sample = given.sample
    forward, got = places(with_options(emulation, gpu=gpu), given)
    assert sample.weight is not None
    assert sample.mask is not None
    assert forward.selected is not None
    scale = (sample.weight.double() * forward.invstd).view(-1, 1, 1)
    expected = torch_places(case, sample.input.double() * torch.where(scale.isnan(), scale, scale.sign()))
    assert torch.equal(got[sample.mask], expected[sample.mask])
    taken = take(sample.input, got.clamp(min=0))
    assert torch.equal(forward.selected[sample.mask].nan_to_num(nan=9), taken[sample.mask].nan_to_num(nan=9))


@pytest.mark.parametrize("act", ["hardswish", "leaky_relu(-0.5)", "silu"])
@pytest.mark.parametrize(("case", "gpu"), [path[:2] for path in PATHS if not path[0].training], ids=str)
def test_ties_and_nan_of_activations_that_rise_and_fall(case: Case, gpu: str, act: str, emulation: Emulation) -> None:
    """They are compared by their activated values: hardswish is 0 wherever it is below -3."""
    given = whole_numbers(dataclasses.replace(case, affine="both", act=act, eps=0.0), (2.0, -2.0, 0.0))
    sample = given.sample
    assert sample.weight is not None
    assert sample.bias is not None
    plain = dataclasses.replace(
        sample,
        bias=torch.zeros_like(sample.bias),
        running_mean=torch.zeros_like(sample.bias),
        running_var=torch.ones_like(sample.bias),
    )
    _, got = places(with_options(emulation, gpu=gpu), dataclasses.replace(given, sample=plain))
    keys = ACTIVATIONS[act](sample.input * sample.weight.view(-1, 1, 1))
    assert sample.mask is not None
    assert torch.equal(got[sample.mask], torch_places(case, keys)[sample.mask])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("changes", [{}, {"training": False}, {"dtype": bf16}], ids=str)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_nan_and_infinity_pooled(
    case: Case, gpu: str, changes: dict[str, Any], value: float, emulation: Emulation
) -> None:
    """They come out where torch lets them out; but what no window takes has no part in the gradient of the weight."""
    given = make_emulated_sample(dataclasses.replace(case, act="relu", **changes))
    given.sample.input[-1, 1, 3, 4] = value
    results = emulated.run(with_options(emulation, gpu=gpu), given)
    sample = given.sample
    taken = torch_places(case, sample.input.double() * sample.weight.double().view(-1, 1, 1))  # type: ignore[union-attr]
    eager = oracle.run(oracle.eager, dataclasses.replace(sample, taken=taken).fresh())
    for name, got in results.items():
        if sample.case.training or name != "gradient of weight":
            assert torch.equal(oracle.kinds(got), oracle.kinds(eager[name])), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_dropped_planes_hold_no_nan_pooled(
    case: Case, gpu: str, p: float, dtype: torch.dtype, emulation: Emulation
) -> None:
    """A poisoned channel's dropped planes are zeros, and NaN gradients that arrive there are ignored."""
    given = make_emulated_sample(dataclasses.replace(case, dtype=dtype, act="gelu", drop_p=p))
    sample = given.sample
    assert sample.mask is not None
    sample.input[0, 1, 0, 0] = float("nan")
    sample.grad_output[~sample.mask] = float("nan")
    on_gpu = with_options(emulation, gpu=gpu)
    results = emulated.run(on_gpu, given)
    forward, _ = places(on_gpu, given)
    for saved in (results["output"], forward.selected, forward.positions):
        assert saved is not None
        assert not saved[~sample.mask].any()
    healthy = torch.arange(sample.input.shape[1]) != 1
    assert results["gradient of input"][:, healthy].isfinite().all()
    assert results["gradient of weight"][healthy].isfinite().all()
    assert results["gradient of bias"][healthy].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_saved_without_a_backward(training: bool, layout: str, emulation: Emulation) -> None:
    given = make_emulated_sample(Case((3, 5, 9, 7), pool="5/3/2", layout=layout, training=training, act="relu"))
    activation = activations.resolve("relu")
    saving, other = (PooledForward(emulation, given, activation, save=save) for save in (True, False))
    for name, got in other.results.items():
        assert torch.equal(got, saving.results[name]), name


@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_results_do_not_depend_on_the_order_of_threads_pooled(case: Case, gpu: str, emulation: Emulation) -> None:
    """To the last bit."""
    given = make_emulated_sample(dataclasses.replace(case, act="gelu", drop_p=0.3))
    runs = [
        emulated.run(with_options(emulation, gpu=gpu, order=order), given) for order in ("up", "down", "random", "up")
    ]
    for name, first in runs[0].items():
        assert all(torch.equal(first, other[name]) for other in runs[1:]), name


@pytest.mark.parametrize(
    "wanted", [Wanted(input=False), Wanted(parameters=False), Wanted(input=False, parameters=False)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_gradients_that_nobody_wants_pooled(
    case: Case, gpu: str, training: bool, wanted: Wanted, emulation: Emulation
) -> None:
    given = make_emulated_sample(dataclasses.replace(case, training=training, act="silu", drop_p=0.3))
    emulated.check_unwanted(with_options(emulation, gpu=gpu), given, wanted)


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_parameters_and_statistics_with_gaps_pooled(
    case: Case, gpu: str, parameter_dtype: torch.dtype, emulation: Emulation
) -> None:
    given = make_emulated_sample(dataclasses.replace(case, param_dtype=parameter_dtype, act="relu"))
    emulated.check_same(with_options(emulation, gpu=gpu), given, **emulated.gaps_of(given.sample))


@pytest.mark.parametrize("gpu", ["hopper", "least memory"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 5, 7), (2, 8, 4)], ids=str)
def test_strides_beyond_32_bits_pooled(shape: tuple[int, ...], layout: str, gpu: str, emulation: Emulation) -> None:
    given = make_emulated_sample(Case(shape, dtype=bf16, layout=layout, pool="3/1/1", act="gelu", drop_p=0.3))
    sample = given.sample
    far = {"input": far_apart(sample.input), "grad_output": far_apart(sample.grad_output)}
    emulated.check_same(with_options(emulation, gpu=gpu), given, **far)
