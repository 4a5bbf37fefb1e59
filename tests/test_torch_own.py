"""PyTorch's own samples of BatchNorm and dropout, of the installed torch, given to our classes and functions.

What counts is torch's result for the same sample, seed and start: output, gradients, state, and errors with their text.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import pooling
from tests.cases import SEED

pytest.importorskip("expecttest", reason="torch's own tests import it")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: fl.BatchNorm1d,
    nn.BatchNorm2d: fl.BatchNorm2d,
    nn.BatchNorm3d: fl.BatchNorm3d,
}
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    f"nn.functional.{name}": (getattr(fl.functional, name), getattr(F, name))
    for name in ("batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d")
}
POOLS: dict[str, Callable[..., Tensor]] = {
    f"nn.functional.max_pool{dims}d": getattr(F, f"max_pool{dims}d") for dims in (1, 2, 3)
}
#: What torch has samples of under such names and is not compared, and why.
_BELOW = "one of torch's operators below batch_norm, which this library does not replace"
_NO_LAYER = "this library has no such layer"
LEFT_OUT = {
    "nn.functional.batch_norm, without_cudnn": "for CUDA; elsewhere it has no dtypes",
    "nn.functional.alpha_dropout": _NO_LAYER,
    "nn.functional.feature_alpha_dropout, with_train": _NO_LAYER,
    "nn.functional.feature_alpha_dropout, without_train": _NO_LAYER,
    "native_batch_norm": _BELOW,
    "_native_batch_norm_legit": _BELOW,
    "_batch_norm_with_update": _BELOW,
    "native_dropout_backward": "the backward of an operator for GPUs",
    "LazyBatchNorm1d": "a layer that becomes torch's own BatchNorm1d",
    "LazyBatchNorm2d": "a layer that becomes torch's own BatchNorm2d",
    "LazyBatchNorm3d": "a layer that becomes torch's own BatchNorm3d",
    "SyncBatchNorm": "it needs processes; its samples are test_sync_batch_norm.py's matter",
    "AlphaDropout": _NO_LAYER,
    "FeatureAlphaDropout": _NO_LAYER,
}
#: Samples that our function refuses though torch's takes them: the shape of the input, and why.
REFUSED = {("nn.functional.batch_norm", (0,)): "no channels: torch gives an empty result in training, and raises else"}
#: What torch 2.11 says, and what later versions and this library say.
OLD_TEXTS = {"batch_norm eps must be positive, but": "batch_norm eps must be positive during training, but"}
#: torch has samples of the others only.
WITHOUT_SAMPLES = "nn.functional.dropout1d"


@pytest.fixture(autouse=True, params=["auto", "cpp", "reference"])
def _backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """By default tiny samples go to torch's kernels, so all is tried with the compiled ones alone too."""
    if device.type != "cpu":
        pytest.skip("torch's samples are made on the CPU here")
    with fl.use_backend(request.param):
        yield


@functools.cache
def _modules() -> dict[type[nn.Module], Any]:
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls: info for info in module_db if info.module_cls in LAYERS}


@functools.cache
def _operators() -> dict[str, list[Any]]:
    from torch.testing._internal.common_methods_invocations import op_db

    names = (*FUNCTIONS, *POOLS)
    return {name: [info for info in op_db if info.name == name and info.dtypes] for name in names}


def _samples(make: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    torch.manual_seed(SEED)
    return list(make(*args, **kwargs))


def _outcome(call: Callable[..., list[Tensor | None]], *args: Any) -> list[Tensor | None] | Exception:
    """What the call gives or raises."""
    torch.manual_seed(SEED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dropout2d of three dimensions; test_masks.py compares warnings
            return call(*args)
    except Exception as error:
        return error


def _gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if not output.requires_grad:
        return [None] * len(leaves)
    grad_output = torch.empty_like(output).normal_(generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(output, leaves, grad_output, allow_unused=True))


def _tolerance(expected: Tensor) -> dict[str, Any]:
    """For 16 bits, units of the largest value: torch rounds on the way, 2.11 more often; what cancels leaves that."""
    if expected.dtype not in (torch.bfloat16, torch.float16) or not expected.numel():
        return {}
    eps = torch.finfo(expected.dtype).eps
    units = 4 if torch.torch_version.TorchVersion(torch.__version__) >= "2.13" else 6
    return {"rtol": units * eps, "atol": units * eps * max(1.0, float(expected.abs().nan_to_num().max()))}


def _compare(got: Any, expected: Any) -> None:
    """Values to rounding and all else exactly; of errors type and text, which ours may go on from."""
    if isinstance(expected, Exception):
        assert type(got) is type(expected), (got, expected)
        text = str(expected).rstrip(".")
        for old, new in OLD_TEXTS.items():
            text = text.replace(old, new)
        assert text in str(got)
        return
    assert not isinstance(got, Exception), got
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, equal_nan=True, **_tolerance(theirs))
            assert ours.stride() == theirs.stride() or theirs.numel() == 0


def _samples_of_modules(dtype: torch.dtype) -> Iterator[tuple[type[nn.Module], Any, bool]]:
    for cls, info in _modules().items():
        for training in (True, False):
            samples = _samples(
                info.module_inputs_func, info, device="cpu", dtype=dtype, requires_grad=True, training=training
            )
            for sample in samples:
                yield cls, sample, training


def _run_layer(cls: type[nn.Module], sample: Any, training: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """Two steps from the same start: outputs, gradients and state."""
    made = sample.constructor_input
    layer = cls(*made.args, **made.kwargs, dtype=dtype).train(training)
    given = sample.forward_input
    results: list[Tensor | None] = []
    for _ in range(2):
        x = given.args[0].detach().clone().requires_grad_()
        output = layer(x, *given.args[1:], **given.kwargs)
        results += [output.detach(), *_gradients(output, [x, *layer.parameters()])]
    return [*results, *layer.state_dict().values()]


def test_nothing_is_left_out_silently() -> None:
    """All that torch has samples of under names such as these is compared, or listed with the reason."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    names = {info.module_cls.__name__ for info in module_db}
    names |= {", ".join(filter(None, (info.name, info.variant_test_name))) for info in op_db}
    ours = {name for name in names if "dropout" in name.lower() or "batch_norm" in name or "BatchNorm" in name}
    compared = {cls.__name__ for cls in LAYERS} | set(FUNCTIONS)
    assert compared - names == {WITHOUT_SAMPLES}
    assert ours <= compared | set(LEFT_OUT), ours - compared - set(LEFT_OUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_info(dtype: torch.dtype) -> None:
    compared = set()
    for cls, sample, training in _samples_of_modules(dtype):
        theirs, ours = (_outcome(_run_layer, c, sample, training, dtype) for c in (cls, LAYERS[cls]))
        _compare(ours, theirs)
        compared.add(cls)
    assert compared == set(LAYERS)


def test_module_info_errors() -> None:
    compared = 0
    for cls, info in _modules().items():
        function = info.module_error_inputs_func
        if function is None:
            continue
        for wrong in function(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
            sample = wrong.module_error_input
            theirs, ours = (_outcome(_run_layer, c, sample, True, torch.float32) for c in (cls, LAYERS[cls]))
            assert type(theirs) is wrong.error_type
            assert re.search(wrong.error_regex, str(ours))
            _compare(ours, theirs)
            compared += 1
    # torch 2.11 has no such inputs of BatchNorm; their mistakes are in test_errors.py in any case.
    assert compared or all(info.module_error_inputs_func is None for info in _modules().values())


def _leaves(sample: Any) -> tuple[list[Any], dict[str, Any], list[Tensor]]:
    """Copies of a sample's arguments, and those of them that need gradients."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    args = [own(value) for value in (sample.input, *sample.args)]
    kwargs = {name: own(value) for name, value in sample.kwargs.items()}
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    return args, kwargs, leaves


def _run_function(function: Callable[..., Tensor], sample: Any) -> list[Tensor | None]:
    """Output, gradients, and what was written to: the running statistics."""
    args, kwargs, leaves = _leaves(sample)
    output = function(*args, **kwargs)
    written = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor) and not t.requires_grad]
    return [output.detach(), *_gradients(output, leaves), *written]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != WITHOUT_SAMPLES])
def test_op_info(name: str, dtype: torch.dtype) -> None:
    infos = _operators()[name]
    assert infos, f"this torch has no samples of {name}"
    ours, theirs = FUNCTIONS[name]
    compared = 0
    for info in infos:
        for sample in _samples(info.sample_inputs, "cpu", dtype, requires_grad=True):
            got, expected = (_outcome(_run_function, function, sample) for function in (ours, theirs))
            if (name, tuple(sample.input.shape)) in REFUSED and not isinstance(expected, Exception):
                assert isinstance(got, IndexError)
                continue
            _compare(got, expected)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", ["nn.functional.dropout1d", "nn.functional.dropout2d", "nn.functional.dropout3d"])
def test_samples_of_other_dropouts(name: str) -> None:
    """Of any rank: where torch warns, or raises, so do we."""
    ours, theirs = FUNCTIONS[name]
    for other in ("nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d"):
        for info in _operators()[other]:
            for sample in _samples(info.sample_inputs, "cpu", torch.float32, requires_grad=True):
                _compare(_outcome(_run_function, ours, sample), _outcome(_run_function, theirs, sample))


def test_op_info_errors() -> None:
    for name, (ours, theirs) in FUNCTIONS.items():
        for info in _operators()[name]:
            if info.error_inputs_func is None:
                continue
            for wrong in info.error_inputs("cpu"):
                sample = wrong.sample_input
                expected = _outcome(_run_function, theirs, sample)
                assert isinstance(expected, Exception)
                _compare(_outcome(_run_function, ours, sample), expected)


def _pooled(x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Max-pooling by the fused layer, of which normalisation changes nothing."""
    channels = x.shape[1]
    mean, var = x.new_zeros(channels), x.new_ones(channels)
    return fl.functional.batch_norm_act(x, mean, var, eps=0.0, pool=arguments)


def _compare_gradients(ours: Tensor | None, expected: Tensor | None) -> None:
    assert ours is not None
    assert expected is not None
    tolerance = _tolerance(expected) or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_max_pool_samples(name: str, dtype: torch.dtype) -> None:
    """Of batches: the same values, exactly, and gradients, but that torch may round 16 bits where windows overlap."""
    theirs, compared = POOLS[name], 0
    dims = int(name[-2])
    for info in _operators()[name]:
        for sample in _samples(info.sample_inputs, "cpu", dtype, requires_grad=True):
            given = dict(zip(pooling.KEYWORDS, sample.args, strict=False)) | sample.kwargs
            if sample.input.dim() != dims + 2 or given.pop("return_indices", False):
                continue
            results = []
            for function in (lambda x, a: _pooled(x, a), lambda x, a: theirs(x, **a)):
                x = sample.input.detach().clone().requires_grad_()
                results.append(_outcome(lambda f, x, a: [f(x, a), *_gradients(f(x, a), [x])], function, x, given))
            ours, expected = results
            if isinstance(expected, Exception):
                assert isinstance(ours, (RuntimeError, ValueError))
                continue
            assert not isinstance(ours, Exception), ours
            torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=0)
            _compare_gradients(ours[1], expected[1])
            compared += 1
    assert compared >= 20
