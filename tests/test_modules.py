"""The BatchNorm layers as replacements of torch's: state, constructor, modes, copies, and the same training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

import fastlayers as fl
from tests.cases import ACTIVATIONS

RANKS = (1, 2, 3)
OURS: dict[int, type[nn.Module]] = {1: fl.BatchNorm1d, 2: fl.BatchNorm2d, 3: fl.BatchNorm3d}
OURS_ACT: dict[int, type[nn.Module]] = {1: fl.BatchNormAct1d, 2: fl.BatchNormAct2d, 3: fl.BatchNormAct3d}
THEIRS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

# Every constructor argument, by name and by position.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3},
    {"momentum": 0.7},
    {"momentum": 0.0},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
]


@pytest.fixture(autouse=True, params=["auto", "cpp"])
def _backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """By default small tensors go to torch's kernels, so all is tried with the compiled ones alone too."""
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip(f"the cpp backend does not serve {device}")
    with fl.use_backend(request.param):
        yield


@pytest.mark.parametrize(
    ("drop_p", "spatial", "own"), [(0.0, 8, False), (0.5, 4, False), (0.5, 16, True), (0.0, 64, True)]
)
def test_small_tensors_go_to_torch(drop_p: float, spatial: int, own: bool) -> None:
    x = torch.randn(4, 16, spatial, spatial, requires_grad=True)
    output = fl.BatchNormAct2d(16, act_layer="identity", drop_p=drop_p)(x)
    assert output.grad_fn is not None
    assert ("_BatchNormAct" in output.grad_fn.name()) == (own or fl.get_backend() == "cpp")


def _input(rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn((6, 4, 3, 5, 2)[: 2 + rank], generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return x.to(dtype)


def _randomise(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)


def _torchs(rank: int, bias: bool = True, **options: Any) -> nn.Module:
    """Torch's layer; its argument `bias` is new in torch 2.13."""
    layer = THEIRS[rank](4, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def _twins(rank: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, with the same parameters."""
    ours, theirs = OURS[rank](4, **options), _torchs(rank, **options)
    _randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def _assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("cls", [OURS, OURS_ACT], ids=["BatchNorm", "BatchNormAct"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_loads_both_ways(options: dict[str, Any], rank: int, cls: dict[int, type[nn.Module]]) -> None:
    ours, theirs = cls[rank](4, **options), _torchs(rank, **options)
    for source, target in ((theirs, ours), (ours, theirs)):
        _randomise(source)
        source(_input(rank, options.get("dtype", torch.float32)))
        target.load_state_dict(source.state_dict(), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        for name, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[name])
            assert value.dtype == source.state_dict()[name].dtype
    assert ours._version == theirs._version
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", RANKS)
def test_state_has_torchs_five_entries(rank: int) -> None:
    for cls in (OURS[rank], OURS_ACT[rank]):
        assert list(cls(4).state_dict()) == STATE


@pytest.mark.parametrize("cls", [OURS, OURS_ACT], ids=["BatchNorm", "BatchNormAct"])
@pytest.mark.parametrize("rank", RANKS)
def test_state_of_the_first_version_loads(rank: int, cls: dict[int, type[nn.Module]]) -> None:
    """Checkpoints from before torch 0.4.1 have no num_batches_tracked."""
    state = THEIRS[rank](4).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    layer = cls[rank](4)
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("rank", RANKS)
def test_class(rank: int) -> None:
    for cls in (OURS[rank], OURS_ACT[rank]):
        assert issubclass(cls, THEIRS[rank])
    assert issubclass(OURS_ACT[rank], OURS[rank])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attributes_and_text(options: dict[str, Any]) -> None:
    ours, theirs = fl.BatchNorm2d(4, **options), _torchs(2, **options)
    assert repr(ours) == repr(theirs)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    _assert_same_state(ours, theirs)


def test_positional_arguments() -> None:
    """Torch's order, then timm's."""
    values = (4, 1e-3, 0.3, False, False)
    assert repr(fl.BatchNorm2d(*values)) == repr(nn.BatchNorm2d(*values))
    layer = fl.BatchNormAct2d(*values, True, "elu", {"alpha": 0.5}, False, nn.Dropout2d(0.2))
    batch_norm = repr(nn.BatchNorm2d(*values)).removeprefix("BatchNorm2d").removesuffix(")")
    assert repr(layer) == f"BatchNormAct2d{batch_norm}, act=elu, drop_p=0.2, drop_mode='channel')"


def test_device_and_dtype() -> None:
    for cls in (fl.BatchNorm2d, fl.BatchNormAct2d):
        layer = cls(4, device="meta", dtype=torch.bfloat16)
        assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
        dtypes = {name: t.dtype for name, t in layer.state_dict().items()}
        assert dtypes == dict.fromkeys(STATE[:4], torch.bfloat16) | {"num_batches_tracked": torch.int64}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_in_training_and_evaluation(options: dict[str, Any], rank: int) -> None:
    """Outputs, gradients and running statistics through several steps and both modes."""
    ours, theirs = _twins(rank, **options)
    for step, training in enumerate((True, True, False, True, False, False)):
        results = []
        for layer in (ours, theirs):
            x = _input(rank, options.get("dtype", torch.float32), seed=step).requires_grad_()
            y = layer.train(training)(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        _assert_same_state(ours, theirs)


def test_batchnorm1d_takes_both_ranks() -> None:
    ours, theirs = _twins(1)
    for shape in ((6, 4), (6, 4, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("attribute", ["track_running_stats", "momentum", "eps"])
def test_attributes_changed_afterwards(attribute: str) -> None:
    """Those that networks are known to overwrite count at the next call."""
    ours, theirs = _twins(2)
    for layer in (ours, theirs):
        setattr(layer, attribute, {"track_running_stats": False, "momentum": 0.5, "eps": 0.1}[attribute])
    for seed, training in enumerate((True, False, True)):
        x = _input(2, seed=seed)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
        _assert_same_state(ours, theirs)


def test_statistics_removed_afterwards() -> None:
    """Without running statistics, torch takes those of the batch in evaluation mode too."""
    ours, theirs = _twins(2)
    for layer in (ours, theirs):
        for name in ("running_mean", "running_var"):
            setattr(layer, name, None)
        layer.eval()
    x = _input(2)
    torch.testing.assert_close(ours(x), theirs(x))


def test_reset() -> None:
    ours, theirs = _twins(2)
    for layer in (ours, theirs):
        layer(_input(2))
    for reset in ("reset_running_stats", "reset_parameters"):
        for layer in (ours, theirs):
            getattr(layer, reset)()
        _assert_same_state(ours, theirs)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameter(frozen: str) -> None:
    ours, theirs = _twins(2)
    for layer in (ours, theirs):
        getattr(layer, frozen).requires_grad_(False)
        layer(_input(2)).square().sum().backward()
    trained = {"weight": "bias", "bias": "weight"}[frozen]
    assert getattr(ours, frozen).grad is None
    torch.testing.assert_close(getattr(ours, trained).grad, getattr(theirs, trained).grad)


def _through_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copied: nn.Module = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize(
    "layer",
    [
        fl.BatchNorm1d(4, momentum=None),
        fl.BatchNorm2d(4, bias=False),
        fl.BatchNormAct2d(4, act_layer=nn.LeakyReLU(0.3), drop_p=0.4),
        fl.BatchNormAct2d(4, act_layer="gelu", act_kwargs={"approximate": "tanh"}, drop_layer=nn.Dropout),
        fl.BatchNormAct2d(4, act_layer="rrelu"),
        fl.BatchNormAct3d(4, apply_act=False),
        fl.BatchNormAct1d(4, pool=nn.MaxPool1d(2, 1)),
        fl.BatchNormAct2d(4, pool=nn.MaxPool2d((3, 2), 1, (1, 0), ceil_mode=True), drop_p=0.4),
    ],
    ids=str,
)
def test_copies(layer: nn.Module, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """A copy made after a backward pass computes the same and shares nothing."""
    rank = next(r for r in RANKS if isinstance(layer, THEIRS[r]))
    layer(_input(rank)).sum().backward()
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    results = []
    for module in (layer, twin):
        torch.manual_seed(1)
        results.append(module(_input(rank, seed=1)))
    assert torch.equal(*results)
    pointers = [{t.data_ptr() for t in module.state_dict().values()} for module in (layer, twin)]
    assert pointers[0].isdisjoint(pointers[1])


BY_NAME: dict[str, nn.Module] = {
    "identity": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(), "elu": nn.ELU(),
    "selu": nn.SELU(), "celu": nn.CELU(), "silu": nn.SiLU(), "mish": nn.Mish(), "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(), "softplus": nn.Softplus(),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BY_NAME)
def test_activation_by_name_and_class_and_module(name: str, training: bool) -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(4), BY_NAME[name]).train(training)
    given: list[Any] = [name, name.upper(), BY_NAME[name]]
    if name != "gelu_tanh":
        given.append(type(BY_NAME[name]))
    for act_layer in given:
        layer = fl.BatchNormAct2d(4, act_layer=act_layer).train(training)
        torch.testing.assert_close(layer(_input(2)), theirs(_input(2)))


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_parameters_of_an_activation_module_are_read(activation: nn.Module) -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(4), activation)
    layer = fl.BatchNormAct2d(4, act_layer=activation)
    torch.testing.assert_close(layer(_input(2)), theirs(_input(2)))


@pytest.mark.parametrize(
    ("act_layer", "act_kwargs", "same"),
    [
        ("leaky_relu", {"negative_slope": 0.3, "inplace": True}, nn.LeakyReLU(0.3)),
        (nn.LeakyReLU, {"negative_slope": 0.3}, nn.LeakyReLU(0.3)),
        ("elu", {"alpha": 0.5}, nn.ELU(0.5)),
        ("celu", {"alpha": 2.0}, nn.CELU(2.0)),
        ("softplus", {"beta": 2.0, "threshold": 5.0}, nn.Softplus(2.0, 5.0)),
        (nn.GELU, {"approximate": "tanh"}, nn.GELU("tanh")),
        (nn.ReLU, {"inplace": True}, nn.ReLU()),
        (None, None, nn.Identity()),
    ],
)
def test_act_kwargs(act_layer: Any, act_kwargs: dict[str, Any], same: nn.Module) -> None:
    layer = fl.BatchNormAct2d(4, act_layer=act_layer, act_kwargs=act_kwargs)
    torch.testing.assert_close(layer(_input(2)), same(nn.BatchNorm2d(4)(_input(2))))


def test_apply_act_false_leaves_the_activation_out() -> None:
    layer = fl.BatchNormAct2d(4, apply_act=False, act_layer="relu")
    torch.testing.assert_close(layer(_input(2)), nn.BatchNorm2d(4)(_input(2)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("given", ["rrelu", nn.RReLU, nn.RReLU(0.1, 0.6)], ids=str)
def test_rrelu(given: Any, track: bool, training: bool) -> None:
    """Random in training, unfused, with torch's numbers; the mean slope in evaluation; with dropout behind it."""
    activation = given if isinstance(given, nn.Module) else nn.RReLU()
    theirs = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=track), activation, nn.Dropout2d(0.4)).train(training)
    ours = fl.BatchNormAct2d(4, track_running_stats=track, act_layer=given, drop_p=0.4).train(training)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        x = _input(2).requires_grad_()
        y = layer(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


DROPOUTS = [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Dropout1d(0.3), nn.Dropout3d(0.3),
            fl.Dropout(0.3), fl.Dropout2d(0.3), fl.Dropout1d(0.3), fl.Dropout3d(0.3)]  # fmt: skip


@pytest.mark.parametrize("drop_layer", DROPOUTS, ids=lambda d: f"{type(d).__module__} {d}")
def test_drop_layer(drop_layer: nn.Module) -> None:
    """A module gives its p and kind, a class torch's p of 0.5; what it does is what drop_p and drop_mode do."""
    mode = "element" if isinstance(drop_layer, nn.Dropout) else "channel"
    for given, p in ((drop_layer, 0.3), (type(drop_layer), 0.5)):
        layers = fl.BatchNormAct2d(4, drop_layer=given), fl.BatchNormAct2d(4, drop_p=p, drop_mode=mode)
        results = []
        for layer in layers:
            torch.manual_seed(5)
            results.append(layer(_input(2)))
        assert torch.equal(*results)
        assert (layers[0].drop_p, layers[0].drop_mode) == (p, mode)


def test_residual_by_position_and_name() -> None:
    layer, x, residual = fl.BatchNormAct2d(4, act_layer="gelu"), _input(2), _input(2, seed=1)
    expected = F.gelu(nn.BatchNorm2d(4)(x) + residual)
    torch.testing.assert_close(layer(x, residual), expected)
    torch.testing.assert_close(layer(x, residual=residual), expected)


POOLS_1D, POOLS_2D, POOLS_3D = (
    {
        f"{cls.__name__}({kwargs})": (cls(**kwargs), kwargs)  # type: ignore[arg-type]
        for kwargs in (
            {"kernel_size": 2},
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 2, "stride": 1, "dilation": 2, "padding": 1, "ceil_mode": True},
        )
    }
    for cls in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
)  # fmt: skip
ACT_OF_RANK: dict[int, Any] = dict(OURS_ACT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rank", "name"), [(rank, name) for rank, pools in enumerate((POOLS_1D, POOLS_2D, POOLS_3D), 1) for name in pools]
)
def test_pool(rank: int, name: str, training: bool) -> None:
    """As torch's layers one after the other, whichever way it is given; and the state has nothing of it."""
    layer, kwargs = {1: POOLS_1D, 2: POOLS_2D, 3: POOLS_3D}[rank][name]
    theirs = nn.Sequential(THEIRS[rank](4), nn.GELU(), layer).train(training)
    _randomise(theirs)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((6, 4, 5, 7, 6)[: 2 + rank], generator=generator).requires_grad_()
    expected = theirs(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *theirs.parameters()])
    by_keyword = {f"pool_{key}": value for key, value in kwargs.items()}
    for given in ({"pool": layer}, {"pool": kwargs}, {"pool": fl.pooling.resolve(layer, rank)}, by_keyword):
        ours = ACT_OF_RANK[rank](4, act_layer="gelu", **given).train(training)
        ours.load_state_dict({**_torchs(rank).state_dict(), **dict(theirs[0].named_parameters())}, strict=True)
        assert list(ours.state_dict()) == STATE
        assert str(layer).split("(")[0] in repr(ours)
        got = ours(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert got.shape == expected.shape
        for mine, other in zip(
            torch.autograd.grad(got.square().sum(), [x, *ours.parameters()]), gradients, strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        _assert_same_state(ours, theirs[0])


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_channels_dropped_before_or_behind_a_pool(p: float, place: str) -> None:
    """The same function of the mask that torch draws for the same seed; larger than what is drawn value by value."""
    layers: list[nn.Module] = [nn.Dropout2d(p), nn.MaxPool2d(2)]
    theirs = nn.Sequential(nn.BatchNorm2d(64), nn.Sigmoid(), *(layers if place == "before" else layers[::-1]))
    ours = fl.BatchNormAct2d(64, act_layer="sigmoid", drop_p=p, pool_kernel_size=2)
    x = torch.randn(16, 64, 6, 6)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        results.append((layer(x), torch.rand(3)))
    torch.testing.assert_close(*results)
    dropped = (results[0][0] == 0).all(3).all(2)
    assert torch.equal(dropped, (results[1][0] == 0).all(3).all(2))
    assert 0.3 < dropped.float().mean() < 0.5 if p < 1 else dropped.all()


@pytest.mark.parametrize(
    ("options", "shape", "fused"),
    [
        ({"pool": nn.MaxPool2d(5, 3, 2), "drop_p": 0.4}, (4, 5, 9, 8), True),
        ({"pool": nn.MaxPool2d(16, 3)}, (4, 5, 17, 18), True),
        ({"pool": nn.MaxPool2d(2), "drop_p": 0.4, "drop_mode": "element"}, (4, 5, 9, 8), False),
        ({"pool": nn.MaxPool2d(2), "act_layer": "rrelu"}, (4, 5, 9, 8), False),
        ({"pool": nn.MaxPool2d(2), "residual": True}, (4, 5, 9, 8), False),
        ({"pool": nn.MaxPool2d((16, 17))}, (4, 5, 17, 18), False),
        ({"pool": nn.MaxPool3d(2), "drop_p": 0.4}, (4, 5, 4, 3, 5), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_pooled_by_torch(
    options: dict[str, Any], shape: tuple[int, ...], fused: bool, dtype: torch.dtype
) -> None:
    """What the kernels have no pool for is the layer without it and torch's pool behind, bit by bit."""
    given = dict(options)
    pool = given.pop("pool")
    residual = torch.randn(shape).to(dtype) if given.pop("residual", False) else None
    cls = ACT_OF_RANK[len(shape) - 2]
    layers = cls(5, pool=pool, **given), cls(5, **given)
    x = torch.randn(shape).to(dtype)
    results = []
    for layer, behind in zip(layers, (nn.Identity(), pool), strict=True):
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        with fl.use_backend("cpp"):
            y = behind(layer(leaf, residual))
            results.append((y, *torch.autograd.grad(y.float().square().sum(), [leaf, *layer.parameters()])))
    assert ("_BatchNormActPool" in results[0][0].grad_fn.name()) == fused
    exact = None if fused else 0.0
    if not fused or dtype == torch.float32:  # rounding to 16 bits makes some equal, of which torch takes the first
        torch.testing.assert_close(*results, rtol=exact, atol=exact)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=exact, atol=exact)


def test_small_tensors_with_a_pool_go_to_torch() -> None:
    for channels_last in (False, True):
        x = torch.randn(2, 4, 6, 6).requires_grad_()
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        y = fl.BatchNormAct2d(4, pool_kernel_size=2)(x)
        assert ("MaxPool2D" in y.grad_fn.name()) == (fl.get_backend() == "auto")


def test_inputs_are_left_alone() -> None:
    """inplace=True, timm's default, is accepted and changes nothing."""
    layer, x, residual = fl.BatchNormAct2d(4, inplace=True, drop_p=0.5), _input(2), _input(2, seed=1)
    layer(x, residual)
    assert torch.equal(x, _input(2))
    assert torch.equal(residual, _input(2, seed=1))


def test_torchs_convert_sync_batchnorm_takes_what_it_can_keep() -> None:
    """It makes a plain SyncBatchNorm of every BatchNorm; test_freezing.py has those that would lose something."""
    network = nn.Sequential(fl.BatchNorm2d(4), fl.BatchNormAct2d(4, act_layer=None))
    _randomise(network)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert [type(layer) for layer in converted] == [nn.SyncBatchNorm] * 2
    _assert_same_state(converted, network)


class _Network(nn.Module):
    """A small residual network; `norm(channels, p, pool)` makes its normalisation layers."""

    def __init__(self, norm: Callable[[int, float, nn.MaxPool2d | None], nn.Module], pool: nn.MaxPool2d | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = norm(8, 0.3, pool)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = norm(8, 0.0, None)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x))
        x = self.norm2(self.conv(x), x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class _Composed(nn.BatchNorm2d):
    """What BatchNormAct2d fuses, by torch's layers."""

    def __init__(self, channels: int, p: float, pool: nn.MaxPool2d | None) -> None:
        super().__init__(channels)
        self.p, self.pool = p, pool or nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        x = x if residual is None else x + residual
        pooled: Tensor = self.pool(F.dropout2d(F.relu(x), self.p, self.training))
        return pooled


def _fused_network(pool: nn.MaxPool2d | None = None) -> _Network:
    return _Network(lambda channels, p, pool: fl.BatchNormAct2d(channels, drop_p=p, pool=pool), pool)


def _composed_network(pool: nn.MaxPool2d | None = None) -> _Network:
    return _Network(_Composed, pool)


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(5, 3, 2)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_same_training(memory_format: torch.memory_format, pool: nn.MaxPool2d | None) -> None:
    """Three steps of SGD from the same weights and seed leave the same network, to rounding; so does evaluation."""
    networks = _fused_network(pool), _composed_network(pool)
    networks[0].load_state_dict(networks[1].state_dict(), strict=True)
    x = torch.randn(8, 3, 10, 10).to(memory_format=memory_format)
    labels = torch.randint(5, (8,))
    losses = []
    for network in networks:
        torch.manual_seed(9)
        network.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack it
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(networks[0].state_dict()), dict(networks[1].state_dict()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(networks[0].eval()(x), networks[1].eval()(x), rtol=1e-4, atol=1e-5)


def test_update_bn_and_averaged_model() -> None:
    """Torch's helper finds the layers by their class and resets momentum to None for one sweep."""
    networks = _fused_network().requires_grad_(False), _composed_network().requires_grad_(False)
    networks[0].load_state_dict(networks[1].state_dict())
    loader = [torch.randn(8, 3, 6, 6) for _ in range(3)]
    averaged = [AveragedModel(network) for network in networks]
    for model in averaged:
        torch.manual_seed(2)
        update_bn(loader, model)
    torch.testing.assert_close(dict(averaged[0].state_dict()), dict(averaged[1].state_dict()))
    norm = averaged[0].get_submodule("module.norm1")
    assert isinstance(norm, fl.BatchNormAct2d)
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, pool: nn.MaxPool2d | None) -> None:
    """In a half-precision region: the dtype of what comes in, float32 parameters, as torch's layers."""
    networks = _fused_network(pool), _composed_network(pool)
    networks[0].load_state_dict(networks[1].state_dict())
    x, outputs = torch.randn(8, 3, 6, 6), []
    for network in networks:
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype):
            y = network(x)
            assert network.norm1(network.stem(x)).dtype == dtype
        y.float().square().sum().backward()
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=3e-2, atol=3e-2)
    assert {p.grad.dtype for p in networks[0].parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("method", ["half", "bfloat16", "double"])
def test_casts(method: str) -> None:
    """Layers cast as a whole, as `model.half()` does."""
    ours, theirs = _twins(2)
    x = getattr(_input(2), method)()
    getattr(ours, method)(), getattr(theirs, method)()
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=1e-2)
    _assert_same_state(ours, theirs)


def test_inference_mode() -> None:
    ours, theirs = _twins(2)
    for training in (True, False):
        with torch.inference_mode():
            x = _input(2)
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    _assert_same_state(ours, theirs)


def test_functional_call() -> None:
    """torch.func replaces parameters and buffers for one call."""
    layer = fl.BatchNormAct2d(4)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight"] = torch.full((4,), 3.0, requires_grad=True)
    y = torch.func.functional_call(layer, state, (_input(2),))
    torch.testing.assert_close(y, F.relu(F.batch_norm(_input(2), None, None, training=True) * 3))
    assert state["num_batches_tracked"] == 1
    assert layer.num_batches_tracked == 0


def test_parameters_with_gaps_in_memory() -> None:
    """Views with strides, as weight sharing and flat parameter buffers make them."""
    ours, theirs = _twins(2)
    for name in ("weight", "bias"):
        setattr(ours, name, nn.Parameter(torch.stack((getattr(theirs, name),) * 2, -1).detach()[:, 0]))
    for name in ("running_mean", "running_var"):
        setattr(ours, name, torch.stack((getattr(theirs, name),) * 2, -1)[:, 0])
    for seed in range(2):
        torch.testing.assert_close(ours(_input(2, seed=seed)), theirs(_input(2, seed=seed)))
    _assert_same_state(ours, theirs)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _parametrised(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", _Doubled())
    parametrize.register_parametrization(layer, "bias", _Doubled())


def _plain_tensors(layer: Any) -> None:
    """In place of buffers, which then no longer are in the state."""
    for name in ("running_mean", "running_var"):
        value = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, value.clone())


def _plain_weight(layer: Any) -> None:
    """As weight normalisation of old, and code that computes weights, leave it."""
    value = layer.weight
    del layer.weight
    layer.raw = value
    layer.weight = 3 * value


@pytest.mark.parametrize(
    ("change", "track"),
    [(_parametrised, True), (_parametrised, False), (_plain_tensors, True), (_plain_weight, True)],
)
def test_parameters_and_buffers_of_other_kinds(change: Callable[[nn.Module], None], track: bool) -> None:
    ours, theirs = _twins(2, track_running_stats=track)
    for layer in (ours, theirs):
        change(layer)
    layers: tuple[Any, Any] = ours, theirs
    for step, training in enumerate((True, True, False)):
        results: list[list[Tensor]] = []
        for layer in layers:
            x = _input(2, seed=step).requires_grad_()
            y = layer.train(training)(x)
            leaves = [x, *layer.parameters()]
            gradients = torch.autograd.grad(y.pow(3).sum(), leaves, retain_graph=True)
            statistics = [layer.running_mean.clone(), layer.running_var.clone()] if track else []
            results.append([y, *gradients, *statistics])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        _assert_same_state(ours, theirs)
