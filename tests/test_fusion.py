"""Models of many kinds, fused and as they were: the same outputs, gradients, statistics, masks and state."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import gc
import io
import operator
import pickle
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlayers as fl
from fastlayers.fusion import install, trace
from tests.fusion_models import MODELS, BasicBlock, ConvNormAct

f64 = torch.float64


@pytest.fixture(autouse=True)
def _kernels(device: torch.device) -> Iterator[None]:
    """By default small tensors without dropout go to torch's kernels."""
    if device.type != "cpu":
        pytest.skip("fusion chooses what to call, which does not depend on the device")
    with fl.use_backend("cpp"):
        yield


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fl.FusionWarning)
        yield


def _randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator, dtype=f64)
            # Variances have to be positive; other values are of both signs.
            value.copy_(noise + 0.5 if name.endswith(("running_var", "weight")) and value.dim() == 1 else noise - 0.5)
    return model


def _twins(build: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """A fused model and its original, in float64."""
    original = _randomise(build().double())
    return fl.fuse(copy.deepcopy(original)), original


def _step(model: Callable[..., Any], *inputs: Any, seed: int = 1) -> list[Tensor]:
    """Outputs and all gradients; the parameters' are added to those of the step before."""
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    torch.manual_seed(seed)
    outputs = [y for y in pytree.tree_leaves(model(*leaves)) if isinstance(y, Tensor)]
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs).backward()  # type: ignore[union-attr]
    grads = [x.grad for x in leaves if isinstance(x, Tensor)] + [p.grad for p in model.parameters()]  # type: ignore[attr-defined]
    drawn = torch.rand(1)  # the generator has gone on as far
    return [*outputs, *(torch.zeros(0) if g is None else g for g in grads), drawn]


def _assert_same(fused: nn.Module, original: nn.Module, *inputs: Any, rtol: float = 1e-7, atol: float = 1e-8) -> None:
    for step in range(2):
        found, expected = (_step(model, *inputs, seed=step) for model in (fused, original))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(dict(fused.state_dict()), dict(original.state_dict()), rtol=rtol, atol=atol)


def _image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (3, 3, 8, 8)), generator=torch.Generator().manual_seed(seed), dtype=f64)


def _chains(model: nn.Module) -> list[str]:
    return [chain.chain for chain in fl.fusion_report(model).fused]


def _reasons(model: nn.Module) -> str:
    return "\n".join(f"{entry.norm}: {entry.reason}" for entry in fl.fusion_report(model).not_fused)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_architectures(name: str, training: bool) -> None:
    """Outputs, gradients, statistics after two steps, and masks."""
    expected = MODELS[name]
    fused, original = _twins(expected.build)
    report = fl.fusion_report(fused)
    assert (len(report.fused), len(report.not_fused)) == (expected.fused, expected.not_fused), str(report)
    _assert_same(fused.train(training), original.train(training), _image())
    assert not fl.fusion_report(fused).fell_back


@pytest.mark.parametrize("name", MODELS)
def test_state_and_structure_stay(name: str) -> None:
    original = MODELS[name].build()
    classes = {path: type(module) for path, module in original.named_modules()}
    attributes = {path: dict(module.__dict__) for path, module in original.named_modules()}
    parameters, state, text = list(original.named_parameters()), list(original.state_dict().items()), str(original)
    fused = fl.fuse(original)
    assert fused is original
    assert str(fused) == text
    for (path, parameter), (fused_path, fused_parameter) in zip(parameters, fused.named_parameters(), strict=True):
        assert (path, parameter) == (fused_path, fused_parameter) or parameter is fused_parameter
    for (key, value), (fused_key, fused_value) in zip(state, fused.state_dict().items(), strict=True):
        assert key == fused_key
        assert value.data_ptr() == fused_value.data_ptr()
    plain = MODELS[name].build()
    plain.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(plain.state_dict(), strict=True)
    for path, module in fused.named_modules():
        assert isinstance(module, classes[path])
        assert type(module).__name__ == classes[path].__name__
    assert fl.unfuse(fused) is original
    for path, module in original.named_modules():
        assert type(module) is classes[path]
        assert module.__dict__ == attributes[path]


def test_fusing_twice_changes_nothing() -> None:
    model = MODELS["resnet_basic"].build()
    first = str(fl.fusion_report(fl.fuse(model)))
    classes = [type(module) for module in model.modules()]
    assert str(fl.fusion_report(fl.fuse(model))) == first
    assert [type(module) for module in model.modules()] == classes
    fl.unfuse(model)
    assert fl.fusion_report(fl.unfuse(model)).fused == ()


def test_optimiser_from_before() -> None:
    original = _randomise(MODELS["resnet_basic"].build().double())
    fused = copy.deepcopy(original)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (fused, original)]
    fl.fuse(fused)
    for _ in range(2):
        for model, optimiser in zip((fused, original), optimisers, strict=True):
            optimiser.zero_grad()
            _step(model, _image())
            optimiser.step()
    torch.testing.assert_close(dict(fused.state_dict()), dict(original.state_dict()), rtol=1e-6, atol=1e-7)


# What chains are made of.


class Chain(nn.Module):
    """A BatchNorm with a function behind it."""

    def __init__(self, behind: Callable[[Any, Tensor, Tensor], Any], *layers: nn.Module) -> None:
        super().__init__()
        self.bn, self.layers, self.behind = nn.BatchNorm2d(3), nn.ModuleList(layers), behind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.behind(self, self.bn(x), y)


_FUSED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "F.relu": lambda m, z, y: F.relu(z),
    "F.relu inplace": lambda m, z, y: F.relu(z, inplace=True),
    "F.relu_": lambda m, z, y: F.relu_(z),
    "torch.relu": lambda m, z, y: torch.relu(z),
    "method": lambda m, z, y: z.relu(),
    "method in place": lambda m, z, y: z.sigmoid_(),
    "F.leaky_relu": lambda m, z, y: F.leaky_relu(z, 0.2),
    "F.leaky_relu by name": lambda m, z, y: F.leaky_relu(z, negative_slope=0.3, inplace=True),
    "F.elu": lambda m, z, y: F.elu(z, 0.7),
    "F.celu": lambda m, z, y: F.celu(z, 0.7),
    "F.selu": lambda m, z, y: F.selu(z),
    "F.silu": lambda m, z, y: F.silu(z),
    "F.mish": lambda m, z, y: F.mish(z),
    "F.gelu": lambda m, z, y: F.gelu(z),
    "F.gelu tanh": lambda m, z, y: F.gelu(z, approximate="tanh"),
    "F.sigmoid": lambda m, z, y: F.sigmoid(z),
    "F.tanh": lambda m, z, y: F.tanh(z),
    "F.relu6": lambda m, z, y: F.relu6(z),
    "F.hardswish": lambda m, z, y: F.hardswish(z),
    "F.hardsigmoid": lambda m, z, y: F.hardsigmoid(z),
    "F.softplus": lambda m, z, y: F.softplus(z, 2, 10),
    "F.rrelu in evaluation": lambda m, z, y: F.rrelu(z, 0.1, 0.3),
    "add": lambda m, z, y: F.relu(z + y),
    "add on the right": lambda m, z, y: F.relu(y + z),
    "torch.add": lambda m, z, y: F.relu(torch.add(z, y)),
    "torch.add by name": lambda m, z, y: F.relu(torch.add(z, other=y, alpha=1)),
    "add method": lambda m, z, y: F.relu(y.add(z)),
    "add_": lambda m, z, y: F.relu(z.add_(y)),
    "operator.iadd": lambda m, z, y: F.relu(operator.iadd(z, y)),
    "F.dropout": lambda m, z, y: F.dropout(F.relu(z), 0.4, m.training),
    "F.dropout always": lambda m, z, y: F.dropout(F.relu(z), 0.4),
    "F.dropout never": lambda m, z, y: F.dropout(F.relu(z), 0.4, False),
    "F.dropout2d": lambda m, z, y: F.dropout2d(F.silu(z + y), p=0.4, training=m.training, inplace=True),
    "identity between": lambda m, z, y: m.layers[1](m.layers[0](z)),
    "module in between that changes nothing": lambda m, z, y: (lambda s, w: F.relu(s) + w)(z + y, m.layers[0](y)),
    "same activation twice": lambda m, z, y: m.layers[1](m.bn(m.layers[1](z))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", _FUSED)
def test_what_chains_are_made_of(name: str, training: bool) -> None:
    fused, original = _twins(lambda: Chain(_FUSED[name], nn.Identity(), nn.ReLU(inplace=True)))
    assert len(_chains(fused)) == 1 + (name == "same activation twice"), _reasons(fused)
    _assert_same(fused.train(training), original.train(training), _image(), _image(seed=1))
    assert not fl.fusion_report(fused).fell_back


_LEFT_ALONE: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "output used twice": (lambda m, z, y: F.relu(z) + z, "its output is used 2 times"),
    "sum used twice": (lambda m, z, y: (lambda s: F.relu(s) * s)(z + y), "is used 2 times"),
    "added to itself": (lambda m, z, y: F.relu(z + z), "adds no other tensor"),
    "a number added": (lambda m, z, y: F.relu(z + 1.0), "adds no other tensor"),
    "alpha": (lambda m, z, y: F.relu(torch.add(z, y, alpha=2)), "alpha = 2"),
    "added in place to the other": (lambda m, z, y: F.relu((y * 1).add_(z)), "in place to another tensor"),
    "no activation": (lambda m, z, y: z * 2, "goes to mul, which is no part"),
    "returned": (lambda m, z, y: z, "returned by the forward"),
    "dropout first": (lambda m, z, y: F.relu(F.dropout(z, 0.5, m.training)), "out of order|F.relu|dropout"),
    "not used": (lambda m, z, y: F.relu(y), "is not used"),
    "random slopes": (lambda m, z, y: F.rrelu(z, training=True), "random slopes"),
    "changed in between": (
        lambda m, z, y: (lambda t: (y.add_(1), F.relu(t))[1])(z + y),
        "may change what the chain reads",
    ),
    "called in between": (lambda m, z, y: (lambda w: F.relu(z) + w)(m.bn(y)), "called again"),
    "argument by name": (lambda m, z, y: torch.relu(input=z), "is not the first argument of relu"),
    "unknown argument": (lambda m, z, y: F.relu(torch.add(z, y, out=None)), "arguments that are not known: ['out']"),
    "changed in place by a function": (
        lambda m, z, y: (lambda s, w: F.relu(s) + w)(z + y, F.relu(y, inplace=True)),
        "relu may change what the chain reads",
    ),
    "written to": (
        lambda m, z, y: (lambda s, w: F.relu(s) + w)(z + y, torch.neg(y, out=y)),
        "neg may change what the chain reads",
    ),
    "changed in place by a module": (
        lambda m, z, y: (lambda s, w: F.relu(s) + w)(z + y, m.layers[0](y)),
        "layers.0 (ReLU) may change what the chain reads",
    ),
    "changed by a module of others": (
        lambda m, z, y: (lambda s, w: F.relu(s) + w)(z + y, m.layers[1](y)),
        "layers.1 (_AddsOne) may change what the chain reads",
    ),
    "statistics read in between": (
        lambda m, z, y: (lambda mean: F.relu(z) + mean)(m.bn.running_mean.view(1, 3, 1, 1)),
        "its statistics are read",
    ),
}


class _AddsOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


@pytest.mark.parametrize("name", _LEFT_ALONE)
def test_what_is_left_alone(name: str) -> None:
    behind, reason = _LEFT_ALONE[name]
    fused, original = _twins(lambda: Chain(behind, nn.ReLU(inplace=True), _AddsOne()))
    assert not _chains(fused)
    report = fl.fusion_report(fused)
    assert [entry.norm for entry in report.not_fused] == ["bn"]
    assert any(part in report.not_fused[0].reason for part in reason.split("|")), _reasons(fused)
    assert type(fused) is Chain
    torch.manual_seed(0)
    found = fused(_image(), _image(seed=1))
    torch.manual_seed(0)
    torch.testing.assert_close(found, original(_image(), _image(seed=1)))


def test_norm_called_by_name_is_left_alone() -> None:
    class ByName(Chain):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return F.relu(self.bn(input=x))

    fused, original = _twins(lambda: ByName(lambda m, z, y: z))
    assert not _chains(fused)
    assert _reasons(fused) == "bn: bn is called with other arguments than one tensor"
    _assert_same(fused, original, _image(), _image())


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_probability_that_torch_refuses_is_left_to_it(p: float) -> None:
    fused, original = _twins(lambda: Chain(lambda m, z, y: F.dropout(F.relu(z), p)))
    assert _chains(fused) == ["bn → relu"]
    assert "has p = " in _reasons(fl.fuse(Chain(lambda m, z, y: F.dropout(z, p))))
    for model in (fused, original):
        with pytest.raises((RuntimeError, ValueError), match=f"between 0 and 1, but got {p}"):
            model(_image(), _image())


# What is pooled: the function behind the BatchNorm, and what the chain then is.
_POOLED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "F.max_pool2d": (lambda m, z, y: F.max_pool2d(F.relu(z), 2), "relu → max_pool2d"),
    "overlapping": (lambda m, z, y: F.max_pool2d(F.relu(z), (3, 2), 2, 1, ceil_mode=True), "relu → max_pool2d"),
    "list of sizes": (lambda m, z, y: F.max_pool2d(z.sigmoid(), [3, 2], [2, 1]), "sigmoid → max_pool2d"),
    "torch.max_pool2d": (lambda m, z, y: torch.max_pool2d(z.tanh(), 3, 2), "tanh → max_pool2d"),
    "by position": (lambda m, z, y: torch.max_pool2d(z.relu_(), 2, 2, 1, 2, True), "relu_ → max_pool2d"),
    "module": (lambda m, z, y: m.layers[1](m.layers[0](z)), "layers.0 → layers.1"),
    "identity between": (lambda m, z, y: m.layers[1](m.layers[2](m.layers[0](z))), "layers.0 → layers.1"),
    "not monotone": (lambda m, z, y: m.layers[1](F.silu(z)), "silu → layers.1"),
    "dropout": (
        lambda m, z, y: F.max_pool2d(F.dropout2d(F.gelu(z), 0.4, m.training), 2),
        "gelu → dropout2d → max_pool2d",
    ),
    "dropout behind": (
        lambda m, z, y: F.dropout2d(F.max_pool2d(F.gelu(z), 2), 0.4, m.training),
        "gelu → max_pool2d → dropout2d",
    ),
    "dropout that drops nothing": (
        lambda m, z, y: m.layers[1](F.dropout(z.relu(), 0.5, False)),
        "relu → dropout → layers.1",
    ),
    "alone": (lambda m, z, y: F.max_pool2d(z, 2), "max_pool2d"),
    "dropout without activation": (lambda m, z, y: m.layers[1](m.layers[3](z)), "layers.3 → layers.1"),
    "first": (lambda m, z, y: F.leaky_relu(F.max_pool2d(z, 3, 1), 0.2), "max_pool2d → leaky_relu"),
    "first, module": (lambda m, z, y: m.layers[0](m.layers[1](z)), "layers.1 → layers.0"),
    "first, with dropout": (lambda m, z, y: m.layers[3](F.elu(m.layers[1](z))), "layers.1 → elu → layers.3"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", _POOLED)
def test_what_is_pooled(name: str, training: bool) -> None:
    behind, chain = _POOLED[name]
    layers = (nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Identity(), nn.Dropout2d(0.5))
    fused, original = _twins(lambda: Chain(behind, *layers))
    assert _chains(fused) == [f"bn → {chain}"], _reasons(fused)
    assert fl.fusion_report(fused).fused[0].ends == ""
    _assert_same(fused.train(training), original.train(training), _image(), _image(seed=1))
    assert not fl.fusion_report(fused).fell_back


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "pool", [nn.MaxPool1d(3, 2, 1), lambda x: F.max_pool1d(x, 2), lambda x: torch.max_pool1d(x, 2)]
)
@pytest.mark.parametrize("order", ["BRDM", "BRMD", "BMRD"])
def test_pools_of_one_dimension(pool: Any, order: str, training: bool) -> None:
    layers = {"B": nn.BatchNorm1d(3), "R": nn.ReLU(), "D": nn.Dropout1d(0.4), "M": pool}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({k: copy.deepcopy(v) for k, v in layers.items() if isinstance(v, nn.Module)})

        def forward(self, x: Tensor) -> Tensor:
            for letter in order:
                x = self.layers[letter](x) if letter in self.layers else pool(x)
            return x

    fused, original = _twins(Net)
    assert _chains(fused)[0].count("→") == 3, str(fl.fusion_report(fused))
    _assert_same(fused.train(training), original.train(training), _image(4, 3, 9))
    assert not fl.fusion_report(fused).fell_back


_POOLED_BEHIND: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str, str]] = {
    "indices": (lambda m, z, y: F.max_pool2d(F.relu(z), 2, return_indices=True), "relu", "it returns indices"),
    "indices, module": (lambda m, z, y: m.layers[0](F.relu(z)), "relu", "layers.0 (MaxPool2d): it returns indices"),
    "large": (lambda m, z, y: F.max_pool2d(F.relu(z), 17, 1, 8), "relu", "have 289 elements, where up to 256"),
    "residual": (lambda m, z, y: m.layers[1](F.relu(z + y)), "add → relu", "layers.1 (MaxPool2d): a residual is added"),
    "elements dropped before": (
        lambda m, z, y: m.layers[1](m.layers[2](F.relu(z))),
        "relu → layers.2",
        "layers.1 (MaxPool2d): single elements are dropped before it",
    ),
    "elements dropped behind": (
        lambda m, z, y: m.layers[2](m.layers[1](F.relu(z))),
        "relu → layers.1",
        "layers.2 (Dropout): drops single elements behind",
    ),
    "elements dropped behind by a function": (
        lambda m, z, y: F.dropout(m.layers[1](F.relu(z)), 0.2),
        "relu → layers.1",
        "dropout: drops single elements behind",
    ),
    "not monotone": (lambda m, z, y: m.layers[3](m.layers[1](z)), "layers.1", "layers.3 (GELU): not monotone"),
    "not monotone, by its slope": (
        lambda m, z, y: F.leaky_relu(m.layers[1](z), -0.1),
        "layers.1",
        "leaky_relu: not monotone",
    ),
    "hooks": (lambda m, z, y: m.layers[4](F.relu(z)), "relu", "layers.4 has hooks"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", _POOLED_BEHIND)
def test_chains_that_end_before_a_pool_or_what_follows_it(name: str, training: bool) -> None:
    """What comes before is fused, and the report says why no more is."""
    behind, chain, reason = _POOLED_BEHIND[name]
    pools = nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(3, 2, 1)
    hooked = nn.MaxPool2d(2)
    hooked.register_forward_hook(lambda m, args, output: 2 * output)
    fused, original = _twins(lambda: Chain(behind, *pools, nn.Dropout(0.4), nn.GELU(), hooked))
    assert _chains(fused) == [f"bn → {chain}"], _reasons(fused)
    assert reason in fl.fusion_report(fused).fused[0].ends
    assert f"\n      ends before {fl.fusion_report(fused).fused[0].ends}" in str(fl.fusion_report(fused))
    _assert_same(fused.train(training), original.train(training), _image(), _image(seed=1))
    assert not fl.fusion_report(fused).fell_back


def test_pool_of_three_dimensions_stays_behind() -> None:
    fused, original = _twins(lambda: nn.Sequential(nn.BatchNorm3d(3), nn.ReLU(), nn.MaxPool3d(2)))
    assert _chains(fused) == ["0 → 1"]
    assert fl.fusion_report(fused).fused[0].ends.startswith("2 (MaxPool3d): it has 3 spatial dimensions")
    _assert_same(fused, original, _image(2, 3, 4, 4, 4))


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        (lambda m, z, y: F.max_pool3d(z, 2), "max_pool3d: it has 3 spatial dimensions"),
        (lambda m, z, y: F.max_pool2d(z + y, 2), "max_pool2d: a residual is added before it"),
        (lambda m, z, y: F.relu(F.dropout2d(z)), "dropout2d goes to relu, which is out of order"),
        (lambda m, z, y: F.max_pool2d(z, 2 * y), "takes more tensors than one"),
        (lambda m, z, y: F.max_pool2d(z, 0), "at least 1"),
        (lambda m, z, y: F.max_pool2d(z, 2, 2, 2), "half of kernel size"),
        (lambda m, z, y: F.adaptive_max_pool2d(z, 2), "no part of a chain"),
    ],
)
def test_bare_norms_whose_pool_is_not_fused(behind: Callable[[Any, Tensor, Tensor], Any], reason: str) -> None:
    """For which nothing is worth fusing."""
    model = fl.fuse(Chain(behind))
    assert not _chains(model)
    assert reason in _reasons(model)


def test_stems_of_known_architectures() -> None:
    """In one module, and begun in one that its parent goes on from with a function."""
    chains = {name: _chains(fl.fuse(MODELS[name].build())) for name in ("resnet_basic", "vgg", "densenet", "googlenet")}
    assert chains["resnet_basic"][0] == "1 → 2 → 3"
    assert chains["vgg"][:3] == ["1 → 2 → 3", "5 → 6 → 7", "9 → 10 → 11"]
    assert chains["densenet"][0] == "1 → 2 → 3"
    assert chains["googlenet"][0] == "stem.bn → relu → max_pool2d"


def test_a_pool_whose_input_is_used_elsewhere_stays() -> None:
    """As in a U-Net, whose way up takes it too."""
    report = str(fl.fusion_report(fl.fuse(MODELS["unet"].build())))
    assert "max_pool2d" not in report


def test_pooled_functions_are_pickled() -> None:
    fused, original = _twins(MODELS["googlenet"].build)
    copied = pickle.loads(pickle.dumps(fused))
    assert _chains(copied) == _chains(fused)
    _assert_same(copied, original, _image())


@pytest.mark.parametrize("order", ["left", "right", "in place"])
def test_two_batch_norms_added(order: str) -> None:
    """One is the residual of the other's chain."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a, b = self.bn1(x), self.bn2(y)
            if order == "in place":
                a += b
            else:
                a = a + b if order == "left" else b + a
            output: Tensor = self.relu(a)
            return output

    fused, original = _twins(Block)
    assert len(_chains(fused)) == 1
    assert _chains(fused)[0].startswith("bn2" if order == "right" else "bn1")
    assert "residual" in _reasons(fused) or "in place" in _reasons(fused)
    _assert_same(fused, original, _image(), _image(seed=1))


def test_chains_across_modules() -> None:
    """A chain that begins in one submodule and goes on in another, seen with what is between."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), ConvNormAct(3, 3, act=None))
            self.shortcut = ConvNormAct(3, 3, act=None)
            self.behind = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.behind(self.body(x) + self.shortcut(x))
            return output

    fused, original = _twins(lambda: nn.Sequential(Outer(), nn.Sequential(nn.BatchNorm2d(3)), nn.Tanh()))
    assert _chains(fused) == ["1.0 → 2", "shortcut.1 → add → behind.0 → behind.1"], str(fl.fusion_report(fused))
    _assert_same(fused, original, _image())
    calls: list[str] = []
    for model in (fused, original):
        model[0].behind.register_forward_hook(lambda *_: calls.append("behind"))
    with pytest.warns(fl.FusionWarning, match="behind has hooks"):
        fused(_image())
    original(_image())
    assert calls == ["behind", "behind"]
    assert fl.fusion_report(fused).fell_back[0].fallbacks == ("behind has hooks, another forward or another class",)


@pytest.mark.parametrize(
    ("build", "module", "chain"),
    [
        (lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.ReLU())), "", "0.0 → 1.0"),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.ReLU())), nn.Tanh()),
            "0",
            "0.0 → 1.0",
        ),
    ],
)
def test_chains_between_siblings(build: Callable[[], nn.Module], module: str, chain: str) -> None:
    """They are in the forward of the innermost module that has both."""
    fused, original = _twins(build)
    (found,) = fl.fusion_report(fused).fused
    assert (found.module, found.chain) == (module, chain)
    _assert_same(fused, original, _image())


# What a forward may do that a graph does not show.


class Odd(nn.Module):
    """A forward with a twist around a chain."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = ConvNormAct(3, 3)
        self.bn, self.relu, self.scale = nn.BatchNorm2d(3), nn.ReLU(), nn.Parameter(torch.ones(1))
        self.factor, self.seen, self.count = 1.0, [0], 0

    def finish(self, x: Tensor) -> Tensor:
        output: Tensor = self.relu(self.bn(self.inner(x)))
        return output


class ByValue(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x) if x.sum() > 0 else self.finish(-x)


class WithoutGradient(Odd):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x * self.scale
        return self.finish(x)


class Decorated(Odd):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x)


class Counting(Odd):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.finish(x)


class Appending(Odd):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.finish(x)


_global_calls = 0


class CountingGlobally(Odd):
    def forward(self, x: Tensor) -> Tensor:
        global _global_calls
        _global_calls += 1
        return self.finish(x)


class Printing(Odd):
    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return self.finish(x)


class Random(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x) if torch.rand(()) < 0.5 else x


class Constant(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x + torch.ones(1))


class Checkpointing(Odd):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.finish, x, use_reentrant=False)
        return output


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.mul(3 * ctx.saved_tensors[0], grads[0])  # not the derivative, as users' may be


class OwnGradient(Odd):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Square.apply(x)
        return self.finish(result)


class Swallowing(Odd):
    """As code that tries the fast way first."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            with contextlib.suppress(Exception):
                return self.finish(_Square.apply(x))
        return x


class ByC(Odd):
    """In C++, torch.as_tensor asks whether it is given a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.as_tensor(x))


class ByConstructor(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.Tensor(x))


class TypeOfResult(Odd):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.relu(self.bn(y[0] if isinstance(y, tuple) else y))  # type: ignore[no-any-return]


_GLOBAL = torch.full((1,), 2.0, dtype=f64)


class OfGlobal(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x * _GLOBAL)


class OfObject(Odd):
    """What its attribute holds nobody can compare."""

    def __init__(self) -> None:
        super().__init__()
        self.options = SimpleNamespace(factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x * self.options.factor)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OfGlobal, "uses a tensor that is no attribute of a module"),
        (OfObject, "reads the attribute 'options', whose type SimpleNamespace cannot be watched"),
        (ByValue, "control flow"),
        (WithoutGradient, "switches gradients"),
        (Decorated, "switches gradients"),
        (Counting, "sets or deletes the attribute 'count'"),
        (Appending, "changes a list"),
        (CountingGlobally, "writes to a variable outside"),
        (Printing, "prints"),
        (Random, "on tensors that do not depend"),
        (Constant, "on tensors that do not depend"),
        (Checkpointing, "checkpointing"),
        (OwnGradient, "autograd.Function"),
        (Swallowing, "autograd.Function"),
        (ByC, "cannot be traced"),  # torch's own reason
        (ByConstructor, "to C, which asks for its type"),
        (TypeOfResult, "asks for the type"),
    ],
)
def test_forwards_that_no_graph_stands_for(cls: type[Odd], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They stay; what is in their submodules is fused."""
    fused, original = _twins(cls)
    assert _chains(fused) == ["1 → 2"], str(fl.fusion_report(fused))
    assert type(fused) is cls
    assert f"the model ({cls.__name__}) cannot be traced" in _reasons(fused)
    assert reason in _reasons(fused)
    x = _image()
    assert fused.seen == [0]
    torch.manual_seed(0)
    found = fused(x.clone())
    torch.manual_seed(0)
    torch.testing.assert_close(found, original(x.clone()))
    assert fused.__dict__.keys() >= original.__dict__.keys()
    assert fused.count == original.count
    assert fused.seen == original.seen
    if cls is Printing:
        assert capsys.readouterr().out.count("forward") >= 2


def test_what_does_not_trace_is_not_looked_into() -> None:
    """Neither where a chain would go on in it, nor where one would begin."""
    fused, original = _twins(lambda: nn.Sequential(nn.BatchNorm2d(3), ByValue(), nn.ReLU()))
    assert _chains(fused) == ["1 → 2"]
    assert [found.module for found in fl.fusion_report(fused).fused] == ["1.inner"]
    assert "0: its output goes to 1 (ByValue), which is no part of a chain" in _reasons(fused)
    _assert_same(fused, original, _image())


class _AsksForAType(nn.Module):
    """It goes by the type of its input, which is known where it is the model, or behind a layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = self.relu(x)
        output: Tensor = self.bn(x)
        return output


class _Opaque(nn.Module):
    """Of whose result nobody knows the type, unless it is looked into."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "first",
    [
        lambda: _Opaque(nn.Conv2d(3, 3, 1)),  # into which nothing has to look
        lambda: _Opaque(nn.Conv2d(3, 3, 1), nn.Identity()),  # which is looked into, and in the end is in no chain
    ],
)
def test_submodules_that_trace_only_by_themselves(first: Callable[[], nn.Module]) -> None:
    fused, original = _twins(lambda: nn.Sequential(first(), _AsksForAType(), nn.Tanh()))
    assert not _chains(fused)
    assert _reasons(fused) == "1.bn: its output is returned by the forward"
    _assert_same(fused, original, _image())


def test_norms_that_nothing_calls() -> None:
    model: Any = Residual()
    model.spare = nn.BatchNorm2d(3)
    for given, path, chains in ((model, "spare", 1), (nn.BatchNorm2d(3), "the model", 0)):
        report = fl.fusion_report(fl.fuse(given))
        assert [str(entry) for entry in report.not_fused] == [f"{path}: no forward that traces calls it"]
        assert len(report.fused) == chains


class Switched(nn.Module):
    """A forward that goes by flags, options and types."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.twice, self.extra = nn.BatchNorm2d(3), nn.ReLU(), False, None
        self.sizes = [1, 2]

    def forward(self, x: Tensor | list[Tensor], residual: Tensor | None = None, *, shift: float = 0.0) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.cat(x)
        z = self.bn(x)
        if residual is not None:
            z = z + residual
        if self.extra is not None:
            z = self.extra(z)
        z = self.relu(z) + shift
        if self.training:
            z = z * len(self.sizes)
        return torch.mul(z, 2 if self.twice else 1)


@pytest.mark.parametrize("training", [True, False])
def test_flags_and_types_are_watched(training: bool) -> None:
    fused, original = _twins(Switched)
    fused.train(training)
    original.train(training)
    x = _image()
    torch.testing.assert_close(fused(x), original(x))
    torch.testing.assert_close(fused(x=x, shift=0.0), original(x=x, shift=0.0))
    torch.testing.assert_close(fused([x, x]), original([x, x]))
    torch.testing.assert_close(fused((x, x)), original((x, x)))
    torch.testing.assert_close(fused(x, x), original(x, x))
    torch.testing.assert_close(fused(x, residual=x), original(x, residual=x))
    torch.testing.assert_close(fused(x, None), original(x, None))
    assert not fl.fusion_report(fused).fell_back
    with pytest.warns(fl.FusionWarning, match="other arguments"):
        torch.testing.assert_close(fused(x, shift=1.0), original(x, shift=1.0))
    with pytest.raises(TypeError, match="missing 1 required"):
        fused()
    for name, value in {"twice": True, "extra": nn.Tanh(), "sizes": [1, 2, 3]}.items():
        if name == "sizes" and not training:
            continue  # not read
        before = getattr(fused, name)
        for model in (fused, original):
            setattr(model, name, value)
        with pytest.warns(fl.FusionWarning, match=name):
            torch.testing.assert_close(fused(x), original(x))
        for model in (fused, original):
            delattr(model, name)
            setattr(model, name, before)
        torch.testing.assert_close(fused(x), original(x))
    original.sizes.append(3)
    fused.sizes.append(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(fused(x), original(x))
    assert len(fl.fusion_report(fused).fell_back) == 1


def test_an_argument_given_twice_is_torchs_error() -> None:
    fused, original = _twins(Switched)
    x = _image()
    for arguments, given, message in (
        ((x, x, x), {}, "takes from 2 to 3 positional arguments but 4"),
        ((x,), {"x": x}, "multiple values for argument 'x'"),
    ):
        with pytest.raises(TypeError, match=message):
            original(*arguments, **given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fl.FusionWarning)
            with pytest.raises(TypeError, match=message):
                fused(*arguments, **given)


class _Optional(nn.Module):
    """Two arguments that may be left out, one that has no place, and some that it leaves to others."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(
        self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None, *rest: Tensor, add: Tensor, **more: Tensor
    ) -> Tensor:
        z = self.bn(x)
        if a is not None:
            z = z + a
        y: Tensor = self.relu(z) + add
        if b is not None:
            y = y * b
        return sum([*rest, *more.values()], y)


@pytest.mark.parametrize(("positional", "fuses"), [(1, True), (2, True), (3, True), (4, False)])
def test_every_way_to_give_arguments(positional: int, fuses: bool) -> None:
    fused, original = _twins(_Optional)
    images = [_image(seed=i) for i in range(positional)]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if fuses else "ignore", fl.FusionWarning)
        torch.testing.assert_close(fused(*images, add=_image(seed=9)), original(*images, add=_image(seed=9)))
    assert bool(fl.fusion_report(fused).fell_back) == (not fuses)
    with pytest.warns(fl.FusionWarning) if fuses else contextlib.nullcontext():
        given = {"add": _image(seed=9), "other": _image(seed=8)}
        torch.testing.assert_close(fused(*images, **given), original(*images, **given))


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_arguments_without_number(rest: int) -> None:
    """What they were traced without is left to the forward as it is written."""

    class Summing(Residual):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            return sum(others, self.relu(self.bn(x)))

    fused, original = _twins(Summing)
    assert _chains(fused) == ["bn → relu"]
    images = [_image(seed=i) for i in range(1 + rest)]
    with pytest.warns(fl.FusionWarning, match="other arguments") if rest else contextlib.nullcontext():
        torch.testing.assert_close(fused(*images), original(*images))


class _Kinds(nn.Module):
    """A forward that asks for types and reads a tensor, a parameter and a dict in ways of its own."""

    plain: Tensor
    shift: Any

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.options = {"factor": 2.0}
        self.plain = torch.full((1,), 3.0, dtype=f64)
        self.register_parameter("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(x, Tensor) and isinstance(self.scale, Tensor) and x.__class__ is Tensor:
            scale: Any = self._parameters["scale"]
            x = x * scale * self.options["factor"] + self.plain
        z: Tensor = self.relu(self.bn(x))
        return z if self.shift is None else z + self.shift


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: None, ""),
        (lambda m: setattr(m, "scale", nn.Parameter(torch.full((1,), -1.0, dtype=f64))), ""),
        (lambda m: setattr(m, "plain", torch.full((1,), 7.0, dtype=f64)), ""),
        (lambda m: m.options.update(factor=5.0), "options is no longer {'factor': 2.0}"),
        (lambda m: setattr(m, "shift", nn.Parameter(torch.ones(1, dtype=f64))), "shift is no longer None"),
    ],
    ids=["as it was", "parameter", "tensor", "dict", "None"],
)
def test_what_a_forward_reads_may_change(change: Callable[[Any], Any], reason: str) -> None:
    fused, original = _twins(_Kinds)
    assert _chains(fused) == ["bn → relu"], str(fl.fusion_report(fused))
    for model in (fused, original):
        change(model)
    with pytest.warns(fl.FusionWarning, match=reason) if reason else contextlib.nullcontext():
        _assert_same(fused, original, _image())
    assert [text for chain in fl.fusion_report(fused).fell_back for text in chain.fallbacks] == [reason][: bool(reason)]


# What changes after fusion.


def _net(act: nn.Module | None = None, drop: nn.Module | None = None) -> nn.Module:
    layers: list[nn.Module] = [nn.BatchNorm2d(3), act or nn.ReLU(), drop or nn.Dropout2d(0.5), nn.Conv2d(3, 2, 1)]
    return nn.Sequential(*layers)


def _set(index: int, **values: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in values.items():
            setattr(model[index], name, value)

    return change


def _replace(index: int, module: nn.Module) -> Callable[[Any], None]:
    return lambda model: model.__setitem__(index, copy.deepcopy(module).double())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set(0, momentum=0.5, eps=0.1), ""),
        (_set(0, momentum=None), ""),
        (_set(2, p=0.9), ""),
        (_set(2, p=0.0), ""),
        (_set(2, p=1.0), ""),
        (lambda model: model[0].eval(), ""),
        (lambda model: model[2].eval(), ""),
        (lambda model: model.eval()[2].train(), ""),
        (lambda model: model[0].requires_grad_(False), ""),
        (_set(0, track_running_stats=False), ""),
        (_replace(1, nn.SiLU()), ""),
        (_replace(1, nn.LeakyReLU(0.3)), ""),
        (_replace(0, fl.BatchNorm2d(3)), ""),
        (_replace(2, nn.Dropout(0.5)), ""),
        (_replace(2, nn.AlphaDropout(0.5)), "2 is now a AlphaDropout"),
        (_replace(1, nn.PReLU()), "1 is now a PReLU"),
        (_replace(0, nn.InstanceNorm2d(3)), "InstanceNorm2d is not a BatchNorm"),
        (_replace(1, nn.RReLU()), "random slopes"),
        (lambda model: model[0].register_forward_hook(lambda m, a, y: 2 * y), "it has hooks"),
        (lambda model: model[1].register_forward_pre_hook(lambda m, a: (a[0] - 1,)), "1 has hooks"),
        (lambda model: model[2].register_full_backward_hook(lambda m, a, b: (a[0] * 2,)), "2 has hooks"),
        (_set(1, forward=torch.tanh), "1 has hooks or a forward of its own"),
        (_set(0, forward=torch.tanh), "forward of its own"),
        (lambda model: model.append(nn.Tanh()), "the module has other submodules"),
        (lambda model: model.pop(2), "the module has other submodules"),
    ],
)
def test_changes_after_fusion_are_honoured(change: Callable[[Any], Any], reason: str) -> None:
    fused, original = _twins(_net)
    for model in (fused, original):
        change(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _assert_same(fused, original, _image())
    fallbacks = [text for chain in fl.fusion_report(fused).fell_back for text in chain.fallbacks]
    assert len(fallbacks) == (reason != ""), fallbacks
    assert all(reason in text for text in fallbacks)
    assert any(issubclass(w.category, fl.FusionWarning) for w in caught) == (reason != "")


def test_submodules_taken_out() -> None:
    """The model fails as it would unfused; the report still says what was fused."""
    fused, original = _twins(lambda: nn.Sequential(ConvNormAct(3, 3), Residual(), nn.Sequential(Parted())))
    chains = _chains(fused)
    assert len(chains) == 3
    for model in (fused, original):
        model[0][1] = model[1].bn = model[2][0].first = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fl.FusionWarning)
            for part, arguments in ((model[0], 1), (model[1], 2), (model[2], 1)):
                with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                    part(*[_image()] * arguments)
    assert _chains(fused) == chains
    assert "first is gone" in str(fl.fusion_report(fused))


class Parted(nn.Module):
    """The norm in one submodule, the activation in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class _Calls:
    """The activations, probabilities and pools of all fused calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, float, bool]] = []
        whole = fl.modules.batch_norm.fused_batch_norm

        def counted(norm: Any, x: Tensor, residual: Any, act: Any, p: float, *rest: Any, **kwargs: Any) -> Tensor:
            self.seen.append((act.name, p, kwargs["pool"] is not None))
            return whole(norm, x, residual, act, p, *rest, **kwargs)

        monkeypatch.setattr(fl.fusion.chain, "fused_batch_norm", counted)


def _hook(index: int) -> Callable[[Any], None]:
    return lambda model: model[index].register_forward_hook(lambda module, args, output: 2 * output)


def _pooled_net(order: str) -> nn.Module:
    layers = {"R": nn.ReLU(), "D": nn.Dropout2d(0.5), "M": nn.MaxPool2d(3, 2, 1)}
    return nn.Sequential(nn.BatchNorm2d(3), *(layers[letter] for letter in order))


_WHOLE = ("relu", 0.5, True)


@pytest.mark.parametrize(
    ("order", "change", "reason", "call"),
    [
        ("RDM", _set(3, kernel_size=2, stride=1, padding=0), "", _WHOLE),
        ("RDM", _set(3, kernel_size=[2, 3], ceil_mode=True, dilation=2), "", _WHOLE),
        ("RDM", _replace(3, nn.MaxPool2d(4)), "", _WHOLE),
        ("RDM", _replace(1, nn.GELU()), "", ("gelu", 0.5, True)),
        ("RDM", lambda model: model[2].eval(), "", ("relu", 0.0, True)),
        ("RMD", _set(3, p=0.0), "", ("relu", 0.0, True)),
        ("MRD", _replace(2, nn.Sigmoid()), "", ("sigmoid", 0.5, True)),
        # What comes before the one that changed is still one call.
        ("RDM", _set(3, return_indices=True), "3: it returns indices", ("relu", 0.5, False)),
        ("RDM", _set(3, kernel_size=17, padding=8), "3: its windows have 289 elements", ("relu", 0.5, False)),
        ("RDM", _replace(3, nn.AvgPool2d(2)), "3 is now a AvgPool2d", ("relu", 0.5, False)),
        ("RDM", _replace(2, nn.Dropout(0.5)), "3: single elements are dropped before it", ("relu", 0.5, False)),
        ("RDM", _hook(3), "3 has hooks", ("relu", 0.5, False)),
        ("RDM", _hook(2), "2 has hooks", ("relu", 0.0, False)),
        ("RMD", _replace(3, nn.Dropout(0.5)), "3 drops single elements behind", ("relu", 0.0, True)),
        ("MRD", _replace(2, nn.Mish()), "2 is not monotone, and behind a max-pool", ("identity", 0.0, True)),
        ("MRD", _set(2, forward=torch.tanh), "2 has hooks or a forward of its own", ("identity", 0.0, True)),
        # Of a bare BatchNorm no fused call is made.
        ("RDM", _replace(1, nn.PReLU()), "1 is now a PReLU", None),
        ("MRD", _replace(1, nn.AvgPool2d(2)), "1 is now a AvgPool2d", None),
    ],
)
def test_changes_of_pooled_chains_are_honoured(
    order: str,
    change: Callable[[Any], Any],
    reason: str,
    call: tuple[str, float, bool] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, original = _twins(lambda: _pooled_net(order))
    assert _chains(fused) == ["0 → 1 → 2 → 3"]
    for model in (fused, original):
        change(model)
    calls = _Calls(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if reason else "error", fl.FusionWarning)
        _assert_same(fused, original, _image())
    assert calls.seen == ([] if call is None else [call, call])
    fallbacks = [text for chain in fl.fusion_report(fused).fell_back for text in chain.fallbacks]
    assert len(fallbacks) == (reason != ""), fallbacks
    assert all(reason in text for text in fallbacks)


class _Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["RDM", "RMD", "MRD", "M"])
def test_a_pooled_chain_is_one_operator_each_way(order: str) -> None:
    fused, _ = _twins(lambda: _pooled_net(order))
    x = _image().requires_grad_()
    with _Operators() as operators:
        fused(x).sum().backward()
    assert [name for name in operators.names if "batch_norm" in name] == [
        "batch_norm_act_pool_fwd",
        "batch_norm_act_pool_bwd",
    ]
    assert not [name for name in operators.names if "max_pool" in name or "relu" in name or "dropout" in name]


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        # Which torch takes for one image, or one row, without a batch.
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(2)), (4, 3)),
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool2d(2)), (4, 3, 6)),
    ],
)
def test_pools_that_are_not_of_planes(net: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    fused, original = _twins(net)
    assert _chains(fused) == ["0 → 1 → 2"]
    with pytest.warns(fl.FusionWarning, match="2 does not pool planes of a tensor with"):
        _assert_same(fused, original, _image(*shape))


def test_random_slopes_behind_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn for what is left; in evaluation all is one call."""
    fused, original = _twins(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.RReLU()))
    calls = _Calls(monkeypatch)
    _assert_same(fused.eval(), original.eval(), _image())
    assert calls.seen == 2 * [("rrelu", 0.0, True)]
    calls.seen.clear()
    with pytest.warns(fl.FusionWarning, match="2 draws random slopes in training"):
        _assert_same(fused.train(), original.train(), _image())
    assert calls.seen == 2 * [("identity", 0.0, True)]


def test_hooks_from_before_fire() -> None:
    """On a member the chain is left alone; on the module around it, or the convolution, it is not."""
    for index, fused_chains in ((0, 0), (1, 0), (3, 1)):
        model: Any = _net()
        calls: list[int] = []
        model[index].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(2))
        fl.fuse(model)
        assert len(_chains(model)) == fused_chains
        assert ("hooks" in _reasons(model)) == (fused_chains == 0)
        model(_image().float())
        assert calls == [2, 1]


def test_global_hooks_fire() -> None:
    fused, original = _twins(_net)
    seen: list[list[type]] = []
    for model in (fused, original):
        names: list[type] = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, names=names: names.append(type(m)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(_image())
        finally:
            handle.remove()
        seen.append(names)
    assert [t.__name__ for t in seen[0]] == [t.__name__ for t in seen[1]]
    assert "hooks for all modules" in str(fl.fusion_report(fused))


# What tensors the kernel does not take.


class Residual(nn.Module):
    """BatchNorm, what is added, and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor, residual: Any) -> Tensor:
        z = self.bn(x)
        z = z + residual
        output: Tensor = self.relu(z)
        return output


class _Subclass(Tensor):
    """A tensor that may mean anything."""


@pytest.mark.parametrize(
    ("residual", "reason"),
    [
        (_image(1, 3, 1, 1), "broadcast"),
        (_image(2, 3, 3, 8, 8), "broadcast"),
        (_image().float(), "float32"),
        (2.0, "is a float"),
        (_image().to_sparse(), "layout torch.sparse_coo"),
        (_image().as_subclass(_Subclass), "_Subclass"),
    ],
    ids=["broadcast", "wider shape", "narrow", "number", "sparse", "subclass"],
)
def test_residuals_that_are_not_fused(residual: Any, reason: str) -> None:
    fused, original = _twins(Residual)
    if reason.startswith("layout"):  # which torch cannot add either way round
        residual = residual.requires_grad_(False)
    with pytest.warns(fl.FusionWarning):
        found = fused(_image(), residual)
    torch.testing.assert_close(found, original(_image(), residual))
    ((fallback,),) = [chain.fallbacks for chain in fl.fusion_report(fused).fell_back]
    assert reason in fallback


def test_residual_on_another_device() -> None:
    """The error is torch's."""
    fused, original = _twins(Residual)
    with pytest.raises(RuntimeError) as expected:
        original(_image(), _image().to("meta"))
    with (
        pytest.warns(fl.FusionWarning, match="the residual is on meta, the input on cpu"),
        pytest.raises(RuntimeError) as raised,
    ):
        fused(_image(), _image().to("meta"))
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    "behind",
    [
        lambda m, z, y: z.add(y).relu(),
        lambda m, z, y: y.add(z).sigmoid(),
        lambda m, z, y: F.elu(torch.add(y, other=z), alpha=0.7),
        lambda m, z, y: F.dropout2d(z.add_(y).tanh_(), 0.4, m.training),
    ],
)
def test_functions_and_methods_run_unfused(behind: Callable[[Any, Tensor, Tensor], Any]) -> None:
    fused, original = _twins(lambda: Chain(behind))
    assert len(_chains(fused)) == 1
    with pytest.warns(fl.FusionWarning, match="it is broadcast"):
        _assert_same(fused, original, _image(), _image(1, 3, 1, 1))


def test_what_the_garbage_collector_calls_is_not_the_forwards() -> None:
    def clock(phase: str, info: dict[str, int]) -> None:
        time.perf_counter()

    threshold = gc.get_threshold()
    gc.callbacks.append(clock)
    gc.set_threshold(1)
    try:
        fused = fl.fuse(Residual())
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(clock)
    assert gc.isenabled()
    fusion = install.fusion_of(fused)
    assert fusion is not None
    assert len(fusion.variants) == 1  # where tracing fails, the arguments are tried as sequences


def test_wider_residual_promotes() -> None:
    fused, original = (model.to(torch.bfloat16) for model in _twins(Residual))
    x, wide = _image().bfloat16(), _image(seed=1).float()
    with pytest.warns(fl.FusionWarning, match="float32"):
        found = fused(x, wide)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, original(x, wide), rtol=2e-2, atol=2e-2)


def test_errors_stay() -> None:
    fused, original = _twins(Residual)
    for arguments in ((_image(3, 4, 8, 8), 0.0), (_image(3, 3, 8), 0.0), (_image(1, 3, 1, 1), _image(1, 3, 1, 1))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises((RuntimeError, ValueError)) as expected:
                original(*arguments)
            with pytest.raises(type(expected.value), match=str(expected.value).split("(")[0].strip()[:40]):
                fused(*arguments)


def _one_dimensional(drop: nn.Module) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), drop)


@pytest.mark.filterwarnings("ignore:dropout2d")
@pytest.mark.parametrize(
    ("drop", "shape", "reason"),
    [
        (nn.Dropout1d(0.5), (4, 3, 5), ""),
        (nn.Dropout(0.5), (4, 3), ""),
        (nn.Dropout1d(0.5), (4, 3), "does not drop channels"),
        (nn.Dropout2d(0.5), (4, 3, 5), "does not drop channels"),
        (nn.Dropout2d(0.5), (4, 3), "does not drop channels"),
        (nn.Dropout3d(0.5), (4, 3, 5), "does not drop channels"),
    ],
)
def test_dropout_that_is_not_of_channels(drop: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    """Among them Dropout1d on (N, C), which drops rows."""
    fused, original = _twins(lambda: _one_dimensional(drop))
    assert len(_chains(fused)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _assert_same(fused, original, _image(*shape))
    assert reason in str(fl.fusion_report(fused))
    assert bool(fl.fusion_report(fused).fell_back) == (reason != "")


class _OwnNorm(nn.BatchNorm2d):
    """A BatchNorm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class FrozenBatchNorm2d(nn.Module):
    """As in detection models: no BatchNorm to torch."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.SyncBatchNorm(3), "convert_sync_batchnorm makes it one that fuses"),
        (nn.LazyBatchNorm2d(), "lazy"),
        (_OwnNorm(3), "_OwnNorm is not a BatchNorm whose forward is known"),
        (FrozenBatchNorm2d(), "FrozenBatchNorm2d is not a BatchNorm"),
        (parametrizations.weight_norm(nn.BatchNorm2d(3)), "Parametrized"),
        (parametrizations.spectral_norm(nn.Linear(3, 3)), ""),
        (fl.BatchNormAct2d(3), "has an activation, dropout or max-pool of its own"),
        (fl.BatchNormAct2d(3, apply_act=False, pool=nn.MaxPool2d(2)), "dropout or max-pool of its own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_that_are_not_fused(norm: nn.Module, reason: str) -> None:
    model = fl.fuse(nn.Sequential(norm, nn.ReLU()))
    assert not _chains(model)
    assert reason in _reasons(model)


@pytest.mark.parametrize(
    "norm", [fl.BatchNorm2d(3), fl.BatchNormAct2d(3, apply_act=False), nn.BatchNorm2d(3, affine=False)]
)
def test_own_layers_are_fused(norm: nn.Module) -> None:
    fused, original = _twins(lambda: nn.Sequential(copy.deepcopy(norm), nn.Hardswish(), nn.Dropout2d(0.3)))
    assert _chains(fused) == ["0 → 1 → 2"]
    _assert_same(fused, original, _image())


def test_one_norm_called_twice_updates_its_statistics_in_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.relu(self.bn(x)) * 3))  # type: ignore[no-any-return]

    fused, original = _twins(Twice)
    assert _chains(fused) == ["bn → relu", "bn → relu"]
    _assert_same(fused, original, _image())
    assert int(fused.bn.num_batches_tracked) == 4


def test_shared_submodule() -> None:
    shared = ConvNormAct(3, 3)
    fused, original = _twins(lambda: nn.Sequential(shared, nn.Tanh(), shared))
    assert len(_chains(fused)) == 1
    _assert_same(fused, original, _image())


def test_sequential_with_its_own_forward() -> None:
    """Neighbours in it are not called one after the other."""

    class Reversed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self):
                x = layer(x)
            return x

    fused, original = _twins(lambda: Reversed(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    assert _chains(fused) == ["2 → 1"]
    _assert_same(fused, original, _image())


def test_forward_on_the_instance_is_left_alone() -> None:
    model = _net()
    model.forward = lambda x: x + 1
    fl.fuse(model)
    assert "its forward was replaced on the instance" in _reasons(model)
    assert torch.equal(model(torch.ones(1)), torch.full((1,), 2.0))


def test_compiled_by_jit_is_left_alone() -> None:
    model = fl.fuse(nn.Sequential(torch.jit.script(_net()), nn.BatchNorm2d(2), nn.ReLU()))
    assert len(_chains(model)) == 1
    model(_image().float())


# What models are put through.


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "pickle 1", "save", "copy of a part"])
def test_copies(how: str) -> None:
    fused, original = _twins(MODELS["resnet_basic"].build)
    if how == "deepcopy":
        copied = copy.deepcopy(fused)
    elif how == "save":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    elif how == "copy of a part":
        copied, original = copy.deepcopy(fused[1]), original[1]
        assert len(_chains(copied)) == 4
        _assert_same(copied, original, _image(3, 4, 8, 8))
        return
    else:
        copied = pickle.loads(pickle.dumps(fused, protocol=1 if how == "pickle 1" else pickle.HIGHEST_PROTOCOL))
    assert _chains(copied) == _chains(fused)
    _assert_same(copied, original, _image())
    assert not torch.equal(fused[0][1].running_mean, copied[0][1].running_mean)
    fl.unfuse(copied)
    assert type(copied[1][0]) is BasicBlock
    assert len(_chains(fused)) == 5


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training: bool) -> None:
    torch._dynamo.reset()
    stem = [ConvNormAct(3, 4, act=partial(nn.LeakyReLU, 0.1)), nn.MaxPool2d((2, 3), ceil_mode=True)]
    model = fl.fuse(nn.Sequential(*stem, BasicBlock(4, 6), nn.Dropout2d(0.0)).double()).train(training)
    assert [chain.count("→") for chain in _chains(model)] == [2, 1, 3]
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_step(compiled, _image()), _step(model, _image()), rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


def test_compiles_what_runs_unfused() -> None:
    torch._dynamo.reset()
    fused, original = _twins(Residual)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(_image(), _image(1, 3, 1, 1)), original(_image(), _image(1, 3, 1, 1)))
    assert "broadcast" in str(fl.fusion_report(fused))
    torch._dynamo.reset()


def test_checkpointing_half_and_memory_format() -> None:
    fused, original = _twins(lambda: _net(drop=nn.Dropout(0.5)))
    runs = [lambda x, m=model: checkpoint(m, x, use_reentrant=False) for model in (fused, original)]
    results = []
    for run in runs:
        x = _image().requires_grad_()
        torch.manual_seed(0)
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results)
    last = torch.channels_last
    for model in (fused, original):
        model.to(torch.bfloat16).to(memory_format=last)
        model.eval()
    x = _image().bfloat16().to(memory_format=last)
    torch.testing.assert_close(fused(x), original(x), rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused.float()(x.float()), original.float()(x.float()), rtol=3e-2, atol=3e-2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_transforms_run_unfused() -> None:
    """torch.func, forward-mode differentiation and torch.jit know no fused kernels."""
    fused, original = (model.eval() for model in _twins(_net))
    x = _image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vmap, jacrev = torch.func.vmap, torch.func.jacrev
        torch.testing.assert_close(vmap(fused)(x[None]), vmap(original)(x[None]))
        torch.testing.assert_close(jacrev(fused)(x[:1, :, :2, :2]), jacrev(original)(x[:1, :, :2, :2]))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            found, expected = (torch.autograd.forward_ad.unpack_dual(m(dual)) for m in (fused, original))
            torch.testing.assert_close(tuple(found), tuple(expected))
        torch.testing.assert_close(torch.jit.trace(fused, x)(x), original(x))
    text = str(fl.fusion_report(fused))
    for reason in ("torch.func", "forward-mode", "torch.jit"):
        assert reason in text


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """The model fused before it is wrapped, and within the wrapper; one process."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for fuse_first in (True, False):
            fused, original = _twins(MODELS["resnet_basic"].build)
            if not fuse_first:
                fl.unfuse(fused)
            wrapped = nn.parallel.DistributedDataParallel(fused)
            if not fuse_first:
                fl.fuse(wrapped)
            assert len(_chains(wrapped)) == 5
            _assert_same(wrapped.module, original, _image())
            found, expected = (_step(model, _image()) for model in (wrapped, original))
            torch.testing.assert_close(found, expected)
    finally:
        torch.distributed.destroy_process_group()


class _OwnCopy(Switched):
    def __deepcopy__(self, memo: dict[int, Any]) -> _OwnCopy:
        return self


class _OwnCall(Switched):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) + 1


class _OwnPickle(Switched):
    def __reduce__(self) -> Any:
        return _OwnPickle, ()


class _OwnPickleOfAProtocol(Switched):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _OwnPickleOfAProtocol, ()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (_OwnCall, "a __call__ of its own"),
        *((cls, "a way of its own to be copied") for cls in (_OwnCopy, _OwnPickle, _OwnPickleOfAProtocol)),
    ],
)
def test_classes_that_cannot_be_replaced(cls: type[Switched], reason: str) -> None:
    model = fl.fuse(cls())
    assert type(model) is cls
    assert reason in _reasons(model)


def test_profilers_are_put_back() -> None:
    """What is traced is watched by a profile function, of which there can be one."""
    events: list[str] = []

    def own(*event: Any) -> None:
        events.append(event[1])

    sys.setprofile(own)
    try:
        fl.fuse(_net())
        assert sys.getprofile() is own
    finally:
        sys.setprofile(None)
    with cProfile.Profile() as profile:
        fl.fuse(_net())
    assert any("fuse" in str(entry.code) for entry in profile.getstats())
    assert sys.getprofile() is None


def test_functions_of_autograd_are_refused_to_one_thread_only() -> None:
    watch, x = trace._Watch(nn.ReLU()), _image().requires_grad_()
    with ThreadPoolExecutor(1) as other, trace._no_functions_of_autograd(watch, trace._Here()):
        with pytest.raises(trace.TraceError, match=r"calls an autograd\.Function"):
            _Square.apply(x)
        torch.testing.assert_close(other.submit(_Square.apply, x).result(), x * x)
    torch.testing.assert_close(_Square.apply(x), x * x)


def test_traced_models_are_left_alone_but_not_broken() -> None:
    """A GraphModule is copied by its graph, which knows of no fusion."""
    traced = torch.fx.symbolic_trace(_net())
    fl.fuse(traced)
    assert "it is a torch.fx.GraphModule" in _reasons(traced)
    with pytest.warns(fl.FusionWarning, match="the input is a Proxy"):
        torch.fx.symbolic_trace(fl.fuse(_net()))(_image().float())


def test_functional_call_and_data_parallel_replicas() -> None:
    fused, original = _twins(_net)
    state = {name: value + 1 if value.is_floating_point() else value for name, value in fused.state_dict().items()}
    found, expected = (torch.func.functional_call(m.eval(), state, (_image(),)) for m in (fused, original))
    torch.testing.assert_close(found, expected)
    replica = fused._replicate_for_data_parallel()
    torch.testing.assert_close(replica(_image()), original(_image()))


# Models of other libraries, where they are installed.


def test_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    for name, chains, first in (
        ("resnet18", 17, "bn1 → relu → maxpool"),
        ("densenet121", 121, "features.norm0 → features.relu0 → features.pool0"),
        ("mobilenet_v3_small", 23, "1 → 2"),
    ):
        fused, original = _twins(partial(models.get_model, name))
        assert len(_chains(fused)) == chains
        assert _chains(fused)[0] == first
        _assert_same(fused, original, _image(4, 3, 64, 64), rtol=1e-5, atol=1e-5)


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    for name, chains, first in (("resnet18", 17, "bn1 → act1 → maxpool"), ("mobilenetv2_050", 35, "")):
        fused, original = _twins(partial(timm.create_model, name))
        assert len(_chains(fused)) == chains
        assert _chains(fused)[0].startswith(first)
        _assert_same(fused, original, _image(4, 3, 64, 64), rtol=1e-5, atol=1e-5)


class _BatchNormAct(nn.BatchNorm2d):
    """timm's layer in short: it drops before it activates."""

    def __init__(self, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(3)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


@pytest.mark.parametrize(
    ("act", "drop", "problem"),
    [
        (nn.SiLU(), nn.Identity(), ""),
        (nn.ReLU(), nn.Dropout2d(0.5), ""),
        (nn.LeakyReLU(), nn.Dropout(0.5), ""),
        (nn.SiLU(), nn.Dropout2d(0.5), "it drops before silu"),
    ],
)
def test_batch_norm_with_its_own_activation(
    act: nn.Module, drop: nn.Module, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{_BatchNormAct.__module__}.{_BatchNormAct.__qualname__}"
    for known in (fl.fusion.table.KNOWN_BLOCKS, fl.fusion.table.NORMS_BY_NAME):
        monkeypatch.setitem(known, name, known["timm.layers.norm_act.BatchNormAct2d"])
    fused, original = _twins(lambda: nn.Sequential(_BatchNormAct(copy.deepcopy(act), copy.deepcopy(drop))))
    assert len(_chains(fused)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _assert_same(fused, original, _image())
    assert problem in str(fl.fusion_report(fused))
    assert bool(fl.fusion_report(fused).fell_back) == bool(problem)
    bare, original = _twins(lambda: nn.Sequential(_BatchNormAct(nn.Identity(), nn.Identity()), nn.ReLU()))
    assert _chains(bare) == ["0 → 1"]
    _assert_same(bare, original, _image())
    for members in ((nn.PReLU(), drop), (act, nn.AlphaDropout(0.5))):
        unknown, original = _twins(partial(_BatchNormAct, *members))
        assert not _chains(unknown)
        assert "has an activation, dropout or max-pool of its own" in _reasons(unknown)
        _assert_same(unknown, original, _image())


def test_batch_norm_with_its_own_activation_runs_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{_BatchNormAct.__module__}.{_BatchNormAct.__qualname__}"
    for known in (fl.fusion.table.KNOWN_BLOCKS, fl.fusion.table.NORMS_BY_NAME):
        monkeypatch.setitem(known, name, known["timm.layers.norm_act.BatchNormAct2d"])
    fused, original = _twins(lambda: nn.Sequential(_BatchNormAct(nn.SiLU(), nn.Identity())))
    with pytest.warns(fl.FusionWarning, match="the input is a _Subclass"):
        torch.testing.assert_close(fused(_image().as_subclass(_Subclass)), original(_image().as_subclass(_Subclass)))


# example_inputs


def test_example_inputs_change_nothing() -> None:
    model = nn.Sequential(MODELS["resnet_basic"].build(), nn.Dropout(0.5)).double()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    inputs = _image()
    fl.fuse(model, inputs)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(inputs, _image())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert len(_chains(model)) == 5


def test_example_inputs_tell_what_will_run_unfused() -> None:
    with pytest.warns(fl.FusionWarning, match="broadcast"):
        model = fl.fuse(Residual(), (torch.randn(2, 3, 4, 4), torch.randn(3, 1, 1)))
    assert "broadcast" in fl.fusion_report(model).fused[0].fallbacks[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x, "output 0 of the fused model is not the original's: they differ by"),
        (lambda x: (x, x), "the fused model returns 2 tensors, the original 1"),
        (lambda x: x[:1], r"torch.float32 \(1, 3, 4, 4\) instead of torch.float32 \(2, 3, 4, 4\)"),
        (lambda x: x.double(), r"torch.float64 \(2, 3, 4, 4\) instead of torch.float32 \(2, 3, 4, 4\)"),
    ],
    ids=["values", "number", "shape", "dtype"],
)
def test_example_inputs_find_a_wrong_result(
    wrong: Callable[[Tensor], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fl.fusion.chain, "fused_batch_norm", lambda norm, x, *_, drops, pool: wrong(x))
    model = Residual()
    with pytest.raises(RuntimeError, match=message):
        fl.fuse(model, (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)))
    assert type(model) is Residual
    assert not fl.fusion_report(model).fused


def test_example_inputs_compare_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly; nothing at all where there are no elements."""
    inputs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    behind = [lambda m, z, y: F.relu(z) > 0.5, lambda m, z, y: F.relu(z)[:0]]
    models = [fl.fuse(Chain(function), inputs) for function in behind]
    assert [_chains(model) for model in models] == [["bn → relu"]] * 2
    monkeypatch.setattr(fl.fusion.chain, "fused_batch_norm", lambda norm, x, *_, drops, pool: x - 1)
    fl.fuse(Chain(behind[1]), inputs)
    with pytest.raises(RuntimeError, match="output 0 of the fused model is not the original's: other values"):
        fl.fuse(Chain(behind[0]), inputs)


@pytest.mark.parametrize(
    ("name", "chains", "options"),
    [
        ("simp_res9", {"norm → act": 5, "norm → add → 0": 4}, {}),
        ("cnn_b", {"norm → act → pool": 2}, {}),
        *(
            ("cnn_b", {chain: 2}, {"order": order, "drop_p": 0.3})
            for order, chain in {
                "CBRDM": "norm → act → drop → pool",
                "CBRMD": "norm → act → pool → drop",
                "CBMRD": "norm → pool → act → drop",
            }.items()
        ),
        ("mlp_a", {"norm → act → drop": 1}, {}),
        ("vgg_a", {"norm → act": 3, "norm → act → pool": 5}, {}),
        ("lenet", {}, {}),
    ],
)
def test_plain_networks_of_this_library(name: str, chains: dict[str, int], options: dict[str, Any]) -> None:
    """Their forwards are looked into, though they are fastlayers', and the same is fused as in their twins."""
    model = fl.fuse(fl.models.build(name, layers="torch", **options))
    assert Counter(re.sub(r"[\w.]*\.", "", chain) for chain in _chains(model)) == chains
    twin = fl.models.build(name, **options)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(3)
    expected = twin(images)
    torch.manual_seed(3)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_synchronised_after_fusing_or_before() -> None:
    """Without processes; with some it is the layers' business, tests/test_sync_batch_norm.py."""
    x = torch.randn(4, 3, 5, 5)
    expected = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    before, after = copy.deepcopy(expected), copy.deepcopy(expected)
    fl.fuse(fl.convert_sync_batchnorm(before))
    fl.convert_sync_batchnorm(fl.fuse(after))
    for model in (before, after):
        assert isinstance(model[1], fl.SyncBatchNorm)
        torch.testing.assert_close(model(x), expected(x))
        assert len(fl.fusion_report(model).fused) == 1
        assert not fl.fusion_report(model).fell_back


def test_frozen_layer_with_active_dropout_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    whole = fl.functional.batch_norm_act

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["drop_p"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(fl.functional, "batch_norm_act", counted)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout2d(0.5))
    model[0].eval()
    x = torch.randn(8, 3, 16, 16)
    torch.manual_seed(1)
    expected = model(x)
    fl.fuse(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)
    assert calls == [0.5]


@pytest.mark.parametrize("function", [fl.fuse, fl.unfuse])
def test_only_modules_are_taken(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model should be an nn\.Module, but got 3 of type int"):
        function(3)


def test_report_reads_well() -> None:
    pooled = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    model = fl.fuse(nn.Sequential(BasicBlock(3, 6), nn.MaxPool2d(2), pooled, nn.BatchNorm2d(6)))
    assert str(fl.fusion_report(model)).splitlines() == [
        "3 chains are fused, 2 BatchNorms are not.",
        "",
        "Fused:",
        "  0: bn1 → relu",
        "  0: bn2 → add → relu",
        "      ends before Sequential's 1 (MaxPool2d): a residual is added before it",
        "  2: 0 → 1 → 2",
        "",
        "Not fused:",
        "  0.downsample.1: it is added in place to another tensor, which may be used elsewhere, by iadd",
        "  3: its output is returned by the forward",
    ]
