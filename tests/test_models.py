"""The studies' networks: fused and plain twins train alike, sizes are as published, errors say what is allowed."""

from __future__ import annotations

import ast
import copy
import itertools
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import models
from fastlayers.models.blocks import ConvBlock
from fastlayers.models.layers import KITS

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 6
ORDERS = [
    *("CBRDM", "CBRMD", "CBMRD", "CBMDR", "DCBRM", "CRDBM", "CBRM", "CBMR", "CRDM", "CBM", "CBDM", "CBMD", "CBDRM"),
    *("CM", "MBRDC", "CDBRM", "C"),
]
SMALL_CNN: dict[str, Any] = {"channels": (8, 12), "image_size": 11}
SMALL_RES: dict[str, Any] = {"widths": (8, 12, 16, 24)}

# Name of a case: the network's name, arguments that make it small, the shape of an input.
Case = tuple[str, dict[str, Any], tuple[int, ...]]
CASES: dict[str, Case] = {
    "mlp": ("mlp", {"in_features": 48, "hidden": (32, 24)}, (3, 4, 4)),
    "mlp-no-dropout": ("mlp_a", {"in_features": 48, "hidden": 32, "drop_p": 0.0}, (48,)),
    "mlp-no-norm": ("mlp_a", {"in_features": 48, "hidden": (32,), "norm": "none"}, (48,)),
    **{
        f"mlp-e-{act}": ("mlp_e", {"in_features": 16, "hidden": (16, 16), "act": act, "drop_p": 0.2}, (1, 4, 4))
        for act in ("selu", "swish", "gelu", "relu", "sigmoid")
    },
    **{f"cnn-{order}": ("cnn_a", SMALL_CNN | {"order": order}, (3, 11, 11)) for order in ORDERS},
    # Twice this is not the same as once.
    "cnn-CBDRM-gelu": ("cnn_a", SMALL_CNN | {"order": "CBDRM", "act": "gelu"}, (3, 11, 11)),
    # Nor does max-pool commute with it, nor with random slopes.
    **{
        f"cnn-{order}-{act}": ("cnn_a", SMALL_CNN | {"order": order, "act": act}, (3, 11, 11))
        for order in ("CBRMD", "CBMRD")
        for act in ("gelu", "rrelu")
    },
    "cnn-element": ("cnn_a", SMALL_CNN | {"drop_mode": "element"}, (3, 11, 11)),
    **{
        f"cnn-element-{order}": ("cnn_a", SMALL_CNN | {"drop_mode": "element", "order": order}, (3, 11, 11))
        for order in ("CBRMD", "CBMRD", "CBMD")
    },
    "cnn-oblong": ("cnn_a", SMALL_CNN | {"image_size": (11, 17), "in_channels": 1}, (1, 11, 17)),
    "cnn-a7": ("cnn_a7", SMALL_CNN, (3, 11, 11)),
    "cnn-b": ("cnn_b", {"channels": (8, 12), "image_size": 16, "drop_p": 0.3}, (3, 16, 16)),
    "cnn-b14": ("cnn_b14", {"channels": (8, 12), "image_size": 16}, (3, 16, 16)),
    "res18": ("res18", SMALL_RES | {"num_classes": 7}, (3, 16, 16)),
    "res18-digits": ("res18", SMALL_RES | {"in_channels": 1}, (1, 8, 8)),
    "res9": ("res9", SMALL_RES | {"drop_p": 0.3}, (3, 16, 16)),
    "res9-no-norm": ("res9", SMALL_RES | {"drop_p": 0.3, "norm": "none"}, (3, 16, 16)),
    **{
        f"simp-res9-{act}": ("simp_res9", SMALL_RES | {"act": act}, (3, 16, 16))
        for act in ("relu", "mish", "elu", "rrelu", "gelu")
    },
    **{
        f"simp-res9-{''.join(map(str, stem))}": ("simp_res9", SMALL_RES | {"stem": stem}, (3, 16, 16))
        for stem in ([7], [3, 3, 3], [3, 3])
    },
    "vgg-a": ("vgg_a", {"width": 1 / 32, "drop_p": 0.5}, (3, 32, 32)),
    "vgg-a-no-norm": ("vgg_a", {"width": 1 / 32, "norm": "none"}, (3, 32, 32)),
    "lenet": ("lenet", {"drop_p": 0.5}, (3, 32, 32)),
    "lenet-mnist": ("lenet", {"in_channels": 1, "image_size": 28}, (1, 28, 28)),
}


def twins(case: Case) -> tuple[nn.Module, nn.Module]:
    """The fused network and torch's, each from the same seed."""
    name, arguments, _ = case
    made = []
    for layers in ("fastlayers", "torch"):
        torch.manual_seed(0)
        made.append(models.build(name, **arguments, layers=layers))
    fused, plain = made
    return fused, plain


def images(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((BATCH, *case[2]), generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(model: nn.Module, input: Tensor) -> list[Tensor]:
    """Logits, the state after, and all gradients, of a call with a loss."""
    torch.manual_seed(2)
    input = input.detach().requires_grad_()
    logits = model(input)
    loss = F.cross_entropy(logits, torch.arange(BATCH) % 3)
    gradients = torch.autograd.grad(loss, [input, *model.parameters()])
    return [logits, *gradients, *(value.clone() for value in model.state_dict().values())]


def assert_same(fused: list[Tensor], plain: list[Tensor], rtol: float = 1e-6, atol: float = 1e-9) -> None:
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def modules(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twins_train_alike(case: Case) -> None:
    """In float64, where rounding is small, so that a wrong mask or order cannot hide; two steps, then evaluation."""
    fused, plain = (model.double() for model in twins(case))
    input = images(case)
    with fl.use_backend("cpp"):  # small tensors would otherwise go to torch
        for training in (True, True, False):
            results = [step(model.train(training), input) for model in (fused, plain)]
            assert_same(results[0], results[1])
            for model in (fused, plain):
                for parameter, gradient in zip(model.parameters(), results[0][2:], strict=False):
                    parameter.data -= 0.01 * gradient


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twins_have_the_same_state(case: Case) -> None:
    fused, plain = twins(case)
    for ours, theirs in ((fused, plain), (plain, fused)):
        state = ours.state_dict()
        assert list(theirs.state_dict()) == list(state)
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, state[name])  # the same seed gives the same weights
        for value in state.values():
            value.add_(1)
        assert not torch.equal(next(theirs.parameters()), next(ours.parameters()))
        theirs.load_state_dict(state, strict=True)
        assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whose_layers(case: Case) -> None:
    fused, plain = twins(case)
    assert not [module for module in plain.modules() if type(module).__module__.startswith("fastlayers.modules")]
    own = modules(fused, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    assert all(type(module).__module__.startswith("fastlayers.modules") for module in own)


@pytest.mark.parametrize("name", ["cnn-CBRDM", "cnn-element", "res9", "simp-res9-rrelu", "vgg-a"])
def test_channels_last(name: str) -> None:
    case = CASES[name]
    fused, plain = (model.to(memory_format=torch.channels_last) for model in twins(case))  # type: ignore[call-overload]
    input = images(case, torch.float32).contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        results = [step(model.train(training), input) for model in (fused, plain)]
        assert_same(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn-CBRDM", "simp-res9-relu", "vgg-a", "lenet"])
@pytest.mark.parametrize("layers", KITS)
def test_copies(name: str, layers: str) -> None:
    model_name, arguments, _ = case = CASES[name]
    model = models.build(model_name, **arguments, layers=layers)
    expected = step(copy.deepcopy(model), images(case, torch.float32))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, step(other, images(case, torch.float32)), expected))


@pytest.mark.parametrize("name", ["mlp", "cnn-CBRDM", "simp-res9-relu", "vgg-a", "lenet"])
def test_plain_twin_can_be_traced(name: str) -> None:
    """By torch.fx, with which models are rewritten."""
    _, plain = twins(CASES[name])
    input = images(CASES[name], torch.float32)
    plain.eval()
    assert torch.equal(torch.fx.symbolic_trace(plain)(input), plain(input))


@pytest.mark.parametrize("name", ["mlp", "cnn-CBRDM", "simp-res9-relu"])
@pytest.mark.parametrize("layers", KITS)
def test_compiles_as_one_graph(name: str, layers: str) -> None:
    model_name, arguments, _ = case = CASES[name]
    torch._dynamo.reset()
    model = models.build(model_name, **arguments, layers=layers).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    input = images(case, torch.float32)
    torch.testing.assert_close(compiled(input), model(input))


# Of an order, an activation and a mode of dropping, the letters of each layer, those of a fused one as it does them.
FUSED = [
    ("CBRDM", "relu", "channel", "C BRDM"),
    ("CBRMD", "relu", "channel", "C BRDM"),
    ("CBMRD", "relu", "channel", "C BRDM"),
    ("CBMDR", "relu", "channel", "C BDM R"),
    ("CBRM", "relu", "channel", "C BRM"),
    ("CBMR", "relu", "channel", "C BRM"),
    ("CBM", "relu", "channel", "C BM"),
    ("CBDM", "relu", "channel", "C BDM"),
    ("CBMD", "relu", "channel", "C BDM"),
    ("DCBRM", "relu", "channel", "D C BRM"),
    ("CRDBM", "relu", "channel", "C R D BM"),
    ("CBDRM", "relu", "channel", "C BD R M"),
    ("CRDM", "relu", "channel", "C R D M"),
    ("BRCDM", "relu", "channel", "BR C D M"),
    # Max-pool commutes with what nowhere falls and draws nothing, and with dropout of channels.
    ("CBRMD", "gelu", "channel", "C BRDM"),
    ("CBMRD", "gelu", "channel", "C BM R D"),
    ("CBMRD", "rrelu", "channel", "C BM R D"),
    ("CBRDM", "relu", "element", "C BRD M"),
    ("CBRMD", "relu", "element", "C BRM D"),
    ("CBMRD", "relu", "element", "C BRM D"),
    ("CBMRD", "gelu", "element", "C BM R D"),
]
LETTERS = {"conv": "C", "norm": "B", "act": "R", "drop": "D", "pool": "M"}


def letters(name: str, layer: nn.Module) -> str:
    if not isinstance(layer, fl.BatchNormAct2d):
        return LETTERS[name]
    does = {"R": layer.act.name != "identity", "D": layer.drop_p == 0.4, "M": layer.pool is not None}
    return LETTERS[name] + "".join(letter for letter, done in does.items() if done)


@pytest.mark.parametrize(("order", "act", "drop_mode", "layers"), FUSED)
def test_what_is_fused(order: str, act: str, drop_mode: Any, layers: str) -> None:
    fused, plain = (
        models.CNN(order, **SMALL_CNN, act=act, drop_mode=drop_mode, layers=kit).features[1]
        for kit in (models.fused_layers, models.torch_layers)
    )
    assert [letters(*named) for named in fused.named_children()] == layers.split()
    assert [letters(*named) for named in plain.named_children()] == list(order)


@pytest.mark.parametrize("layers", KITS)
def test_pools_are_those_asked_for(layers: Any) -> None:
    model = models.CNN(**SMALL_CNN, pool=(3, 2), pool_stride=(2, 1), pool_padding=(1, 0), layers=layers)
    layer = fl.BatchNormAct2d if layers == "fastlayers" else nn.MaxPool2d
    pools: list[Any] = [getattr(module, "pool", module) for module in modules(model, layer)]
    expected = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, 0)
    assert [fl.pooling.resolve(pool, 2) for pool in pools] == [fl.pooling.resolve(pool, 2) for pool in expected]


@pytest.mark.parametrize("order", ["CBRDM", "CBRMD", "CBMRD"])
@pytest.mark.parametrize("layers", KITS)
def test_state_is_as_before_pools_were_fused(order: str, layers: Any) -> None:
    norm = [f"norm.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    expected = [f"features.{block}.{key}" for block in (0, 1) for key in ("conv.weight", *norm)]
    assert list(models.CNN(order, **SMALL_CNN, layers=layers).state_dict()) == [*expected, "head.weight", "head.bias"]


@pytest.mark.parametrize(("name", "fused"), [("cnn_a", 2), ("cnn_a7", 2), ("cnn_b", 2), ("cnn_b14", 2), ("vgg_a", 5)])
def test_networks_of_the_studies_pool_in_the_fused_layer(name: str, fused: int) -> None:
    with torch.device("meta"):
        model = models.build(name)
    assert len([layer for layer in modules(model, fl.BatchNormAct2d) if layer.pool is not None]) == fused
    assert not modules(model, nn.MaxPool2d)


def test_dropout_of_nothing_is_left_out_and_the_rest_fused() -> None:
    block = models.CNN("CBDRM", **SMALL_CNN, drop_p=0).features[0]
    assert [letters(*named) for named in block.named_children()] == ["C", "BRM"]
    for layers in ("fastlayers", "torch"):
        assert not modules(models.build("mlp_a", drop_p=0, layers=layers), nn.modules.dropout._DropoutNd)


@pytest.mark.parametrize(("order", "bias"), [("CBRDM", False), ("DCBRM", False), ("CRDBM", True), ("CDBR", True)])
@pytest.mark.parametrize("drop_p", [0.0, 0.5])
def test_bias_only_where_no_batch_norm_follows(order: str, bias: bool, drop_p: float) -> None:
    """Whatever the probability of dropping, so that the state's keys do not depend on it."""
    cnn = models.CNN(order, **SMALL_CNN, drop_p=drop_p)
    assert {conv.bias is not None for conv in modules(cnn, nn.Conv2d)} == {bias}
    assert {block.conv().bias is not None for block in (ConvBlock(order, 1, 1, 1, 0),)} == {bias}


@pytest.mark.parametrize("layers", KITS)
@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        # By hand: weights of convolutions and linear layers, two for each channel of a BatchNorm, biases.
        ("mlp_a", {}, 3072 * 1024 + 2 * 1024 + 1025 * 10),
        ("mlp_a", {"norm": "none"}, 3073 * 1024 + 1025 * 10),
        ("mlp_e", {}, 785 * 784 + 785 * 10),
        ("mlp_e", {"hidden": (784, 784)}, 2 * 785 * 784 + 785 * 10),
        ("cnn_a", {}, 75 * 256 + 256 * 49 * 1024 + 2 * 1280 + 16385 * 10),
        ("cnn_a", {"order": "CRDM"}, 76 * 256 + (256 * 49 + 1) * 1024 + 16385 * 10),
        ("cnn_a7", {}, 75 * 128 + 128 * 49 * 480 + 2 * 608 + (480 * 16 + 1) * 10),
        ("cnn_b", {}, 75 * 256 + 256 * 25 * 256 + 2 * 512 + 6401 * 10),
        ("cnn_b14", {}, 75 * 128 + 128 * 25 * 128 + 2 * 256 + 3201 * 10),
        ("res18", {}, 11_173_962),
        ("lenet", {}, 62_006),
        # Column A of VGG's table without biases, BatchNorm's two, three linear layers.
        ("vgg_a", {}, 9 * 1_024_192 + 2 * 2752 + 2 * 513 * 512 + 513 * 10),
        ("vgg_a", {"norm": "none"}, 9 * 1_024_192 + 2752 + 2 * 513 * 512 + 513 * 10),
    ],
)
def test_parameters(name: str, arguments: dict[str, Any], parameters: int, layers: str) -> None:
    with torch.device("meta"):
        assert models.count_parameters(models.build(name, **arguments, layers=layers)) == parameters


def test_parameters_are_about_as_many_as_published() -> None:
    with torch.device("meta"):
        count = {name: models.count_parameters(models.build(name)) for name in ("cnn_a", "cnn_a7", "mlp_a")}
    assert count["cnn_a"] == pytest.approx(13e6, rel=0.05)
    assert count["cnn_a7"] == pytest.approx(3e6, rel=0.05)
    assert count["cnn_a7"] == pytest.approx(count["mlp_a"], rel=0.05)


@pytest.mark.parametrize("layers", KITS)
@pytest.mark.parametrize(("name", "published"), [("res18", 42.7), ("res9", 8.7), ("simp_res9", 3.41)])
def test_state_is_as_large_as_published(name: str, published: float, layers: str) -> None:
    with torch.device("meta"):
        assert models.state_mib(models.build(name, layers=layers)) == pytest.approx(published, rel=0.05)


def test_res9_has_nine_convolutions() -> None:
    for name, kernels in (("res9", 9 * [3]), ("simp_res9", [3] + 4 * [1, 3])):
        with torch.device("meta"):
            model = models.build(name)
        convs = [conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and "shortcut" not in path]
        assert [conv.kernel_size[0] for conv in convs] == kernels


@pytest.mark.parametrize(
    ("name", "arguments", "dropouts"),
    [
        ("mlp_a", {}, ["Dropout(p=0.5)"]),
        ("mlp_e", {}, []),
        ("mlp_e", {"drop_p": 0.2, "hidden": (8, 8)}, 2 * ["Dropout(p=0.2)"]),
        ("cnn_a", {}, 2 * ["Dropout2d(p=0.4)"]),
        ("cnn_a", {"drop_mode": "element"}, 2 * ["Dropout(p=0.4)"]),
        ("cnn_b", {}, []),
        ("res18", {}, []),
        ("res9", {"drop_p": 0.3}, 4 * ["Dropout2d(p=0.3)"]),
        ("vgg_a", {}, []),
        ("vgg_a", {"drop_p": 0.5}, 2 * ["Dropout(p=0.5)"]),
        ("lenet", {}, []),
        ("lenet", {"drop_p": 0.5}, 2 * ["Dropout(p=0.5)"]),
    ],
)
def test_dropouts(name: str, arguments: dict[str, Any], dropouts: list[str]) -> None:
    with torch.device("meta"):
        model = models.build(name, layers="torch", **arguments)
    assert [repr(m).replace(", inplace=False", "") for m in modules(model, nn.modules.dropout._DropoutNd)] == dropouts


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_vgg_a_is_that_of_its_table(norm: Any) -> None:
    model = models.VGGA(norm, layers="torch")
    layers = modules(model.features, nn.Conv2d, nn.MaxPool2d)
    found = [str(layer.out_channels) if isinstance(layer, nn.Conv2d) else "M" for layer in layers]
    assert " ".join(found) == "64 M 128 M 256 256 M 512 512 M 512 512 M"
    for layer in modules(model, nn.Conv2d, nn.Linear):
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
        assert layer.bias is None or not layer.bias.any()


def test_sizes_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))
    model[0].bias.requires_grad_(False)
    assert models.count_parameters(model) == 12
    assert models.state_mib(model) == (4 * (12 + 4 + 8) + 8) / 2**20


def test_heads_have_the_published_sizes() -> None:
    with torch.device("meta"):
        heads = (models.CNN().head, models.cnn_b().head)
    assert [head.in_features for head in heads] == [16384, 6400]


@pytest.mark.parametrize("act", ["gelu_tanh", nn.LeakyReLU(0.3), nn.ELU, None, nn.GELU("tanh"), "hardsigmoid"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_activations_of_every_kind(act: Any, norm: str) -> None:
    case: Case = ("mlp", {"in_features": 8, "hidden": 8, "act": act, "norm": norm}, (8,))
    fused, plain = (model.double() for model in twins(case))
    assert_same(step(fused, images(case)), step(plain, images(case)))


@pytest.mark.parametrize("name", fl.activations.NAMES)
def test_modules_of_activations(name: str) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    activation = fl.activations.resolve(name)
    torch.testing.assert_close(fl.activations.as_module(name).eval()(x), activation.apply(x))
    assert fl.activations.resolve(fl.activations.as_module(name)).params == activation.params


def test_module_of_an_activation_has_its_parameters() -> None:
    assert repr(fl.activations.as_module("leaky_relu", {"negative_slope": 0.3})) == repr(nn.LeakyReLU(0.3))
    given = nn.Softplus(2.0, 3.0)
    made = fl.activations.as_module(given)
    assert made is not given
    assert repr(made) == repr(given)


def test_layers_of_ones_own() -> None:
    """A kit sees each run of letters once, with the features there; its residual layer is called with the residual."""
    seen = []

    def kit(run: str, features: int, style: models.Style) -> dict[str, nn.Module]:
        seen.append((run, features))
        return models.fused_layers(run, features, style)

    model = models.res9(**SMALL_RES, layers=kit, drop_p=0.1)
    stage = [("BRD", 12), ("BR", 12), ("B", 12)]
    assert sorted(seen[:6]) == sorted([("BR", 8), ("BRD", 8), ("BR", 8), *stage])
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


SMALL: dict[str, Any] = {"channels": (4, 4)}
WRONG: list[tuple[Callable[[], object], list[str]]] = [
    (lambda: models.MLP(0), ["in_features", "0", "at least 1"]),
    (lambda: models.MLP(8, ()), ["hidden", "()", "one positive integer or more"]),
    (lambda: models.MLP(8, (4, -1)), ["hidden[1]", "-1", "at least 1"]),
    (lambda: models.MLP(8, "44"), ["hidden", "'44'"]),  # type: ignore[arg-type]
    (lambda: models.MLP(8, 4, True), ["num_classes", "True", "at least 1"]),
    (lambda: models.MLP(8, 4, norm="layer"), ["norm", "'layer'", "'batch', 'none'"]),  # type: ignore[arg-type]
    (lambda: models.MLP(8, 4, act="rely"), ["act", "'rely'", "relu"]),
    (lambda: models.MLP(8, 4, drop_p=1.5), ["drop_p", "1.5", "between 0 and 1"]),
    (lambda: models.MLP(8, 4, drop_p=float("nan")), ["drop_p", "nan", "between 0 and 1"]),
    (lambda: models.MLP(8, 4, drop_p="0.5"), ["drop_p", "'0.5'", "between 0 and 1"]),  # type: ignore[arg-type]
    (lambda: models.MLP(8, 4, layers="timm"), ["layers", "'timm'", "'fastlayers', 'torch'"]),  # type: ignore[arg-type]
    (lambda: models.MLP(8, 4)(torch.ones(2, 9)), ["input", "(N, 8)", "(2, 9)"]),
    (lambda: models.CNN("BRDM"), ["order", "'BRDM'", "C (conv)"]),
    (lambda: models.CNN("CBRBM"), ["order", "'CBRBM'", "at most once"]),
    (lambda: models.CNN("CBX"), ["order", "'CBX'", "M (pool)"]),
    (lambda: models.CNN(5), ["order", "5", "M (pool)"]),  # type: ignore[arg-type]
    (lambda: models.CNN(channels=(4, 0)), ["channels[1]", "0", "at least 1"]),
    (lambda: models.CNN(channels=(4, 4, 4)), ["kernels", "(5, 7)", "one integer or 3"]),
    (lambda: models.CNN(**SMALL, kernels=0), ["kernels", "0", "at least 1"]),
    (lambda: models.CNN(**SMALL, kernels=4), ["padding", "'same'", "(4, 4)"]),
    (lambda: models.CNN(**SMALL, padding=-1), ["padding", "-1", "at least 0"]),
    (lambda: models.CNN(**SMALL, padding="valid"), ["padding", "'valid'"]),  # type: ignore[arg-type]
    (lambda: models.CNN(**SMALL, pool=(3,)), ["pool", "(3,)", "one integer or 2"]),
    (lambda: models.CNN(**SMALL, pool_stride=0), ["pool_stride", "0", "at least 1"]),
    (lambda: models.CNN(**SMALL, pool_padding=3), ["pool_padding", "3", "at most half of pool, 2"]),
    (lambda: models.CNN("CBRM", **SMALL, drop_p=0.3), ["drop_p", "0.3", "'CBRM', which has no D"]),
    (lambda: models.CNN(**SMALL, drop_mode="row"), ["drop_mode", "'row'", "channel, element"]),  # type: ignore[arg-type]
    (lambda: models.CNN(**SMALL, in_channels=0), ["in_channels", "0"]),
    (lambda: models.CNN(**SMALL, image_size=(8,)), ["image_size", "(8,)", "or 2"]),
    (lambda: models.CNN(**SMALL, num_classes=0), ["num_classes", "0"]),
    (lambda: models.CNN(**SMALL)(torch.ones(2, 3, 28, 28)), ["input", "(N, 3, 32, 32)", "(2, 3, 28, 28)"]),
    (lambda: models.CNN(**SMALL)(torch.ones(2, 1, 32, 32)), ["input", "(N, 3, 32, 32)", "(2, 1, 32, 32)"]),
    (lambda: models.cnn_b(image_size=8), ["image_size", "8 is too small", "block 1 (CBRDM)", "16 and more"]),
    (lambda: models.cnn_b(image_size=(32, 15)), ["image_size", "15 is too small", "16 and more"]),
    (lambda: models.cnn_b(image_size=4), ["image_size", "4 is too small", "block 0", "16 and more"]),
    (lambda: models.LeNet(image_size=8), ["image_size", "8 is too small", "block 1 (CRM)", "16 and more"]),
    (lambda: models.LeNet(drop_p=-0.1), ["drop_p", "-0.1"]),
    (lambda: models.VGGA(image_size=28), ["image_size", "28 is too small", "block 7 (CBRM)", "32 and more"]),
    (lambda: models.VGGA("instance"), ["norm", "'instance'", "'none'"]),  # type: ignore[arg-type]
    (lambda: models.VGGA(width=0), ["width", "0", "above 0"]),
    (lambda: models.ResNet("wide"), ["block", "'wide'", "'basic', 'bottleneck'"]),  # type: ignore[arg-type]
    (lambda: models.ResNet(widths=(8, 0)), ["widths[1]", "0"]),
    (lambda: models.ResNet(widths=(8, 8), depths=(1, 1, 1)), ["depths", "(1, 1, 1)", "or 2"]),
    (lambda: models.res9(stem=()), ["stem", "()"]),
    (lambda: models.res9(stem=(3, 4)), ["stem", "(3, 4)", "odd"]),
    (lambda: models.res9(norm="group"), ["norm", "'group'"]),
    (lambda: models.res9(in_channels=-3), ["in_channels", "-3"]),
    (lambda: models.res9(num_classes=1.5), ["num_classes", "1.5"]),
    (lambda: models.build("resnet"), ["name", "'resnet'", "res18"]),
    (lambda: models.build("res18", activation="relu"), ["res18", "'activation'", "stem"]),
    (lambda: models.build("mlp", hidden=(4,)), ["mlp", "in_features"]),
]


@pytest.mark.parametrize(("call", "parts"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, list) else "")
def test_errors_name_argument_value_and_what_is_allowed(call: Callable[[], object], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        call()
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize("name", ["cnn_b", "lenet", "vgg_a"])
def test_smallest_size_that_an_error_names_works(name: str) -> None:
    least = {"cnn_b": 16, "lenet": 16, "vgg_a": 32}[name]
    with torch.device("meta"):
        model = models.build(name, image_size=least)
        assert model.eval()(torch.empty(1, 3, least, least)).shape == (1, 10)


def test_every_name_is_built_and_documented() -> None:
    for (name, model), layers in itertools.product(models.MODELS.items(), KITS):
        with torch.device("meta"):
            made = models.build(name, layers=layers, **dict.fromkeys(model.required, 4))
        assert type(made) is model.cls
        assert model.make.__doc__


def test_reachable_from_the_package() -> None:
    assert fl.models is models
    assert set(models.__all__) <= set(dir(models))


def test_nothing_but_torch_is_imported() -> None:
    (folder,) = models.__path__
    nodes = [node for path in Path(folder).glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in found} - sys.stdlib_module_names
    assert packages == {"torch", "fastlayers"}
