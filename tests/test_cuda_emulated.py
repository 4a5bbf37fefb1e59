"""The CUDA kernels, emulated on the CPU, against their definition in float64: every path, layout, dtype and option."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlayers import activations
from tests import emulated, oracle, philox
from tests.cases import ACTIVATIONS, Case, case_of, pairwise, reference_of
from tests.emulated import (
    GPUS,
    Call,
    EmulatedSample,
    Emulation,
    Forward,
    MaskArgument,
    Wanted,
    check,
    dtype_of,
    far_apart,
    from_memory_order,
    in_memory_order,
    is_rows,
    make_emulated_sample,
    shape_of,
    with_options,
)
from tests.layouts import in_layout

pytestmark = pytest.mark.usefixtures("one_thread")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [f32, f64, bf16, f16]


# Each with what it is there for.
SHAPES = [
    (2, 64),  # two values per channel
    (7, 5),  # odd rows
    (40, 24),
    (5, 520),  # several blocks of channels
    (1, 3, 2),  # two values per channel, in planes
    (6, 1, 9),  # one channel
    (4, 3, 5, 7),  # odd planes
    (1, 5, 8, 8),  # one sample, planes of whole groups
    (3, 12, 4, 8),
    (9, 20, 5, 7),
    (3, 5, 1, 1),  # planes of one value, which are rows
    (2, 5, 3, 4, 5),
    (2, 8, 33, 31),  # larger than what a block of little memory keeps
]
_FACTORS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "act": list(ACTIVATIONS),
    "dtypes": [(f32, f32), (f64, f64), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16)],
    "layout": ["contiguous", "channels_last", "channels_first", "some_channels", "some_channels_last", "offset"],
    "grad_layout": ["contiguous", "channels_last", "offset", "expanded"],
    "residual": [None, "contiguous", "channels_last", "some_channels", "offset", "every_second"],
    "affine": ["both", "none", "no bias", "frozen weight"],
    "mode": [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1)],
    "dropout": [(0.0, "channel"), (0.3, "channel"), (1.0, "channel"), (0.3, "element"), (1.0, "element")],
    "gpu": list(GPUS),
    "order": ["up", "random"],
    "mask_dtype": [torch.bool, f32, f64, bf16],
}
_OF_EMULATION = ("gpu", "order")


def _matrix() -> list[Any]:
    parameters = []
    for row in pairwise(_FACTORS):
        options = {name: row.pop(name) for name in _OF_EMULATION}
        mask_dtype = row.pop("mask_dtype")
        case = case_of(row)
        label = f"{case} {options['gpu']} {options['order']} {mask_dtype}"
        parameters.append(pytest.param(case, mask_dtype, options, id=label))
    return parameters


@pytest.mark.parametrize(("case", "mask_dtype", "options"), _matrix())
def test_every_pair_of_choices_emulated(
    case: Case, mask_dtype: torch.dtype, options: dict[str, str], emulation: Emulation
) -> None:
    check(with_options(emulation, **options), case, mask_dtype)


# What each path is for, with the GPU on which a small tensor takes it.
PATHS = [
    (Case((3, 12, 4, 8)), "hopper", "planes_on_chip"),
    (Case((3, 12, 5, 7), dtype=bf16), "hopper", "planes_on_chip"),
    (Case((2, 3, 40, 33)), "little memory", "planes_on_chip"),
    (Case((3, 3, 40, 33)), "least memory", "planes_split"),
    (Case((2, 3, 129, 131)), "turing", "planes_split"),
    (Case((40, 24)), "hopper", "rows_one_block"),
    (Case((5000, 8), dtype=bf16), "one processor", "rows_on_chip"),
    (Case((5000, 3)), "hopper", "rows_on_chip"),
    (Case((2, 33)), "hopper", "rows_on_chip"),
    (Case((40, 24)), "turing", "rows_split"),
    (Case((9, 20, 7, 7), layout="channels_last"), "turing", "rows_split"),
    (Case((700, 300)), "turing", "rows_split"),
    (Case((3, 12, 5, 7), training=False, affine="none"), "hopper", "planes_pointwise"),
    (Case((3, 12, 5, 7), training=False, affine="none", layout="channels_last"), "hopper", "rows_pointwise"),
]
# One for each way to sum: within a block, a cluster, two kernels; rows in a block, a grid, three kernels.
SUMMED = [PATHS[i][:2] for i in (1, 2, 3, 5, 7, 10)]


@pytest.mark.parametrize("order", ["up", "down", "random"])
@pytest.mark.parametrize(
    "options",
    [{}, {"act": "gelu", "residual": "contiguous", "drop_p": 0.4}, {"drop_p": 0.4, "drop_mode": "element"}],
    ids=str,
)
@pytest.mark.parametrize(("case", "gpu", "path"), PATHS, ids=str)
def test_each_path_emulated(
    case: Case, gpu: str, path: str, options: dict[str, Any], order: str, emulation: Emulation
) -> None:
    taken = check(with_options(emulation, gpu=gpu, order=order), dataclasses.replace(case, **options))
    assert [plan.path for plan in taken] == [path, path]


@pytest.mark.parametrize("channels", [*range(1, 76), 90, 132, 140, 250, 301], ids=str)
def test_each_number_of_channels_emulated(channels: int, emulation: Emulation) -> None:
    """Rows are taken together until they fill groups, of which there are then more or fewer than a block takes."""
    for batch in (2, 9, 70):
        check(with_options(emulation, gpu="hopper", order="random"), Case((batch, channels)))


def test_all_paths_emulated(cuda_emulated: ModuleType) -> None:
    assert {path for _, _, path in PATHS} == set(cuda_emulated.path_names())


@pytest.mark.parametrize("options", [{}, {"residual": "contiguous", "act": "relu", "drop_p": 0.4}], ids=str)
@pytest.mark.parametrize("order", ["up", "random"])
@pytest.mark.parametrize("shape", [(2, 3, 60, 64), (2, 3, 61, 63)], ids=str)
def test_each_size_of_a_cluster_emulated(
    shape: tuple[int, ...], order: str, options: dict[str, Any], emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a cluster keep a channel together: the less memory each has, the more there are."""
    seen: set[int] = set()
    for shared_kilobytes in (40, 24, 12, 7, 5):
        shared_bytes = shared_kilobytes * 1024
        monkeypatch.setitem(GPUS, "this one", (4, shared_bytes, 2 * shared_bytes + 2048, 8))
        plans = check(with_options(emulation, gpu="this one", order=order), Case(shape, **options))
        seen |= {plan.cluster for plan in plans if plan.path == "planes_on_chip"}
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        {"mean": 1e4, "std": 1.0},
        {"mean": -1e4, "std": 1.0, "act": "gelu", "residual": "contiguous"},
        {"mean": 1e4, "std": 1.0, "act": "relu", "drop_p": 0.3},
        {"mean": 1e8, "std": 1e4, "dtype": f64, "param_dtype": f64},
        {"mean": 1e30, "std": 1e26, "dtype": f32},
        {"mean": 1e30, "std": 1e30, "dtype": bf16},
        {"mean": 1e-30, "std": 1e-30},
        {"mean": 1.0, "std": 1e-3, "eps": 1e-12},
        {"mean": 100.0, "std": 1.0, "dtype": f16, "eps": 1e-12},
        {"mean": 2e4, "std": 5e3, "dtype": f16},
        {"mean": 1.0, "std": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_hard_values_emulated(
    case: Case, gpu: str, values: dict[str, Any], training: bool, emulation: Emulation
) -> None:
    check(with_options(emulation, gpu=gpu), dataclasses.replace(case, training=training, **values))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("changes", [{}, {"training": False}, {"dtype": bf16}], ids=str)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_nan_and_infinity_emulated(
    case: Case, gpu: str, changes: dict[str, Any], place: int, value: float, emulation: Emulation
) -> None:
    """They come out where torch lets them out: of one channel, and as the same kind."""
    given = make_emulated_sample(dataclasses.replace(case, **changes))
    plane = given.sample.input[place, 1]
    plane[(place,) * plane.dim()] = value
    results = emulated.run(with_options(emulation, gpu=gpu), given)
    eager = oracle.run(oracle.eager, given.sample.fresh())
    for name, got in results.items():
        assert torch.equal(oracle.kinds(got), oracle.kinds(eager[name])), name


@pytest.mark.parametrize("mode", ["channel", "element"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_dropped_elements_hold_no_nan_emulated(
    case: Case, gpu: str, p: float, dtype: torch.dtype, mode: str, emulation: Emulation
) -> None:
    """A poisoned channel's dropped planes are zeros, and NaN gradients that arrive there are ignored."""
    options: dict[str, Any] = {"dtype": dtype, "residual": case.layout, "act": "gelu", "drop_p": p, "drop_mode": mode}
    given = make_emulated_sample(dataclasses.replace(case, **options))
    sample = given.sample
    assert sample.mask is not None
    mask = (
        sample.mask if mode == "element" else sample.mask.reshape(sample.mask.shape + (1,) * (sample.input.dim() - 2))
    )
    dropped = ~mask.expand_as(sample.input)
    sample.input[(0, 1, *(0,) * (sample.input.dim() - 2))] = float("nan")
    sample.grad_output[dropped] = float("nan")
    results = emulated.run(with_options(emulation, gpu=gpu), given)
    assert not results["output"][dropped].any()
    assert not results["gradient of residual"][dropped].any()
    healthy = torch.arange(sample.input.shape[1]) != 1
    assert results["gradient of input"][:, healthy].isfinite().all()
    assert results["gradient of weight"][healthy].isfinite().all()
    assert results["gradient of bias"][healthy].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 1), (1, 100, 1, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("gpu", ["hopper", "turing"])
def test_one_value_per_channel_in_evaluation_emulated(shape: tuple[int, ...], gpu: str, emulation: Emulation) -> None:
    check(with_options(emulation, gpu=gpu), Case(shape, training=False, act="silu", residual="contiguous"))


@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_results_do_not_depend_on_the_order_of_threads_emulated(case: Case, gpu: str, emulation: Emulation) -> None:
    """To the last bit."""
    given = make_emulated_sample(dataclasses.replace(case, act="gelu", residual="contiguous", drop_p=0.3))
    runs = [
        emulated.run(with_options(emulation, gpu=gpu, order=order), given) for order in ("up", "down", "random", "up")
    ]
    for name, first in runs[0].items():
        assert all(torch.equal(first, other[name]) for other in runs[1:]), name


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(input=False),
        Wanted(parameters=False),
        Wanted(residual=False),
        Wanted(input=False, parameters=False),
        Wanted(input=False, residual=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_gradients_that_nobody_wants_emulated(
    case: Case, gpu: str, training: bool, wanted: Wanted, emulation: Emulation
) -> None:
    given = make_emulated_sample(
        dataclasses.replace(case, training=training, act="silu", residual="contiguous", drop_p=0.3)
    )
    emulated.check_unwanted(with_options(emulation, gpu=gpu), given, wanted)


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "gpu"), SUMMED, ids=str)
def test_parameters_and_statistics_with_gaps_emulated(
    case: Case, gpu: str, parameter_dtype: torch.dtype, emulation: Emulation
) -> None:
    given = make_emulated_sample(dataclasses.replace(case, param_dtype=parameter_dtype, act="relu"))
    emulated.check_same(with_options(emulation, gpu=gpu), given, **emulated.gaps_of(given.sample))


@pytest.mark.parametrize("options", [{}, {"residual": "contiguous", "act": "gelu", "drop_p": 0.3}], ids=str)
@pytest.mark.parametrize("gpu", ["hopper", "turing", "least memory"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 3, 5, 7), (2, 16), (2, 5)], ids=str)
def test_strides_beyond_32_bits_emulated(
    shape: tuple[int, ...], gpu: str, options: dict[str, Any], emulation: Emulation
) -> None:
    given = make_emulated_sample(Case(shape, dtype=bf16, **options))
    sample = given.sample
    far = {
        name: far_apart(t) for name in ("input", "grad_output", "residual") if (t := getattr(sample, name)) is not None
    }
    emulated.check_same(with_options(emulation, gpu=gpu), given, **far)


def flat_bits_of(bits: Tensor, like: Tensor) -> Tensor:
    """The layout of the bits, as kernels.h defines it: bool, in the order of memory."""
    rows, (n, c) = is_rows(like), like.shape[:2]
    spatial = like.numel() // (n * c)
    unpacked = (bits[:, None] >> torch.arange(8) & 1).bool()
    if rows or spatial % 8 == 0:
        return unpacked.flatten()[: like.numel()]
    planes = unpacked.view(n * c, -1)
    assert planes.shape[1] == (spatial + 14) // 8 * 8
    starts = [plane * spatial % 8 for plane in range(n * c)]
    return torch.cat([plane[start : start + spatial] for plane, start in zip(planes, starts, strict=True)])


@pytest.mark.parametrize("gpu", ["hopper", "least memory", "turing"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "relu6", "hardsigmoid"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 4, 8), (3, 5, 5, 7), (2, 3, 1, 1), (5, 3, 3, 1), (2, 16, 3, 3), (1, 1, 1, 9)], ids=str
)
def test_flat_bits_emulated(shape: tuple[int, ...], act: str, layout: str, gpu: str, emulation: Emulation) -> None:
    case = Case(shape, act=act, layout=layout, residual=layout, std=3.0, training=False)
    sample = make_emulated_sample(case).sample
    activation = activations.resolve(ACTIVATIONS[act])
    forward = Forward(with_options(emulation, gpu=gpu), EmulatedSample(sample, None), activation, save_bits=True)
    assert forward.flat_bits is not None
    assert activation.derivatives is not None
    module, rows = emulation.module, is_rows(sample.input)
    z = reference_of(sample.fresh(f64), activations.IDENTITY).requires_grad_()
    slope = torch.autograd.grad(ACTIVATIONS[act](z).sum(), z)[0]
    flat_slope, other = activation.derivatives
    flat = (slope - flat_slope).abs() < (slope - other).abs()
    near_a_kink = torch.stack([(z - kink).abs() < 1e-3 for kink in (-3.0, 0.0, 3.0, 6.0)]).any(0)
    kernel_shape = shape_of(module, sample.input)
    got = flat_bits_of(forward.flat_bits, sample.input)
    clear = in_memory_order(~near_a_kink, rows)
    assert torch.equal(got[clear], in_memory_order(flat, rows)[clear])
    memory = emulation.memory()
    unpacked = memory.empty((sample.input.numel(),), torch.bool)
    module.unpack_flat_bits(kernel_shape, memory.constant(forward.flat_bits).data_ptr(), unpacked.data_ptr())
    memory.check()
    assert torch.equal(unpacked, got)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_of_random_numbers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    """The known answers of Random123, the authors' library."""
    found = philox.philox([np.array([word], np.uint64) for word in counter], key)
    assert " ".join(f"{word:08x}" for word in found[0]) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize(("count", "p"), [(1, 0.5), (7, 0.1), (8, 0.9), (4099, 0.25), (100, 0.999), (33, 1.0)])
def test_element_mask_emulated(seed: int, count: int, p: float, emulation: Emulation) -> None:
    call = Call(emulation, torch.empty(1, 1, count))
    mask = call.memory.empty((count,), torch.bool)
    emulation.module.element_mask(count, call.keep(MaskArgument(seed=seed), p), mask.data_ptr())
    call.memory.check()
    assert torch.equal(mask, philox.kept(seed, count, p))


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("mask_dtype", [torch.bool, f32, f64, bf16, None], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 16), (3, 5, 4, 8), (3, 5, 5, 7), (2, 16, 3, 3), (1, 1, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_emulated(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    mask_dtype: torch.dtype | None,
    p: float,
    emulation: Emulation,
) -> None:
    """`mask_dtype` None: by element, from a seed. NaN that is dropped is gone."""
    x = in_layout(torch.randn(shape).to(dtype), layout)
    call = Call(emulation, x)
    if mask_dtype is None:
        argument = MaskArgument(seed=99)
        mask = from_memory_order(philox.kept(99, x.numel(), p), x, call.rows)
    else:
        planes = torch.rand(shape[:2]) >= p
        argument = MaskArgument(planes=planes.to(mask_dtype))
        mask = planes.reshape(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)
    x = torch.where(mask, x, float("nan"))
    args = emulation.module.DropoutArgs()
    args.shape = (
        emulation.module.Shape(False, 1, 1, x.numel()) if mask_dtype is None else shape_of(call.module, call.like)
    )
    args.dtype, args.keep = dtype_of(call.module, dtype), call.keep(argument, p)
    result = call.memory.empty((x.numel(),), dtype)
    args.input = call.memory.constant(in_memory_order(x, call.rows).clone()).data_ptr()
    args.output = result.data_ptr()
    emulation.module.dropout(args)
    call.memory.check()
    scale = 0.0 if p == 1 else 1 / (1 - p)
    compute = torch.float64 if dtype == f64 else torch.float32
    expected = torch.where(mask, x.to(compute) * torch.tensor(scale, dtype=compute), 0).to(dtype)
    assert torch.equal(from_memory_order(result, x, call.rows), expected)
