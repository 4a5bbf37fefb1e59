"""Freezing, and the functions of torch that fold, convert, average or quantise BatchNorm: they keep all or fail."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn

import fastlayers as fl

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    fl.BatchNorm1d: nn.BatchNorm1d,
    fl.BatchNorm2d: nn.BatchNorm2d,
    fl.BatchNorm3d: nn.BatchNorm3d,
}
ACT = (fl.BatchNormAct1d, fl.BatchNormAct2d, fl.BatchNormAct3d, fl.SyncBatchNormAct)
SHAPE = (6, 4, 3, 5, 2)


def _randomised(layer: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return layer


def _rank(layer: nn.Module) -> int:
    return _rank_of(type(layer))


def _rank_of(cls: type[nn.Module]) -> int:
    return next((rank for rank in (1, 2, 3) if f"{rank}d" in cls.__name__), 2)


# --- freezing ---


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("cls", [*PLAIN, *PLAIN.values(), *ACT, nn.SyncBatchNorm, fl.SyncBatchNorm])
def test_frozen_layers_use_their_statistics_and_keep_them(cls: type[nn.Module], backend: str) -> None:
    layer = _randomised(cls(4))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(SHAPE[: 2 + _rank(layer)])
    expected = layer.eval()(x)
    frozen = fl.freeze_batch_norm(layer.train())
    with fl.use_backend(backend):
        torch.testing.assert_close(frozen(x), expected)
        torch.testing.assert_close(frozen.eval().train()(x), expected)
    assert isinstance(frozen, nn.modules.batchnorm._BatchNorm)
    assert (frozen is layer) == (cls.__module__.startswith("fastlayers"))
    torch.testing.assert_close(frozen.state_dict(), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.load_state_dict(cls(4).state_dict(), strict=True)


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("spatial", [(), (7, 7), (40, 40)], ids=str)
@pytest.mark.parametrize(("mode", "dropout"), [("channel", nn.Dropout2d), ("element", nn.Dropout)])
@pytest.mark.parametrize("act", ["relu", "gelu", "rrelu"])
def test_frozen_layers_still_drop_in_training(
    act: str, mode: str, dropout: Callable[[float], nn.Module], spatial: tuple[int, ...], backend: str
) -> None:
    cls = fl.BatchNormAct2d if spatial else fl.BatchNormAct1d
    fused = _randomised(cls(4, act_layer=act, drop_p=0.4, drop_mode=mode))
    chain = copy.deepcopy(fused)
    chain.drop_p = 0.0
    drop = dropout(0.4) if spatial or mode == "element" else nn.Dropout(0.4)
    fl.freeze_batch_norm(fused)
    fl.freeze_batch_norm(chain)
    found = []
    with fl.use_backend(backend):
        for function in (fused, lambda x, r: drop(chain(x, r))):
            torch.manual_seed(2)
            x, residual = (torch.randn(16, 4, *spatial, requires_grad=True) for _ in range(2))
            y = function(x, residual)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, residual.grad))
    assert 0.2 < (found[0][0] == 0).float().mean() < 0.8
    torch.testing.assert_close(found[0], found[1])
    fused.eval(), chain.eval()
    torch.testing.assert_close(fused(x, residual), chain(x, residual), rtol=0, atol=0)


def test_unfreezing_brings_back_what_was() -> None:
    model = nn.Sequential(fl.BatchNormAct2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    twin = copy.deepcopy(model)
    for m in (model, twin):
        m[0].weight.requires_grad_(False)
    assert fl.freeze_batch_norm(fl.freeze_batch_norm(model)) is model
    assert type(model[2]) is fl.BatchNorm2d
    assert model[1].weight.requires_grad
    assert not any(p.requires_grad for norm in (model[0], model[2]) for p in norm.parameters())
    assert fl.unfreeze_batch_norm(model) is model
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_frozen_statistics_with_trained_parameters() -> None:
    """The gradients are those of evaluation mode."""
    layer = _randomised(fl.BatchNormAct2d(4, act_layer="silu"))
    gradients = []
    for mode in (layer.eval(), fl.freeze_batch_norm(layer, parameters=False).train()):
        x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        gradients.append(torch.autograd.grad(mode(x).square().sum(), (x, layer.weight, layer.bias)))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_freezing_survives_copies_conversion_and_update_bn() -> None:
    layer = fl.freeze_batch_norm(_randomised(fl.BatchNormAct2d(4)))
    before = copy.deepcopy(layer.state_dict())
    for frozen in (copy.deepcopy(layer), fl.convert_sync_batchnorm(layer), AveragedModel(layer).module):
        update_bn([torch.randn(3, 4, 5, 5)], frozen)
        frozen.train()(torch.randn(3, 4, 5, 5))
        torch.testing.assert_close(frozen.state_dict(), before, rtol=0, atol=0)


def test_freezing_needs_running_statistics() -> None:
    model = nn.Sequential(fl.BatchNorm2d(4), fl.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"freeze_batch_norm: .*no running statistics"):
        fl.freeze_batch_norm(model)
    assert not model[0].frozen


# --- folding and converting by torch and others ---


def test_folding_into_a_convolution() -> None:
    conv, norm = nn.Conv2d(3, 4, 3).eval(), _randomised(fl.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)))
    linear, norm1 = nn.Linear(3, 4).eval(), _randomised(fl.BatchNormAct1d(4, act_layer=None)).eval()
    y = torch.randn(2, 3)
    torch.testing.assert_close(fuse_linear_bn_eval(linear, norm1)(y), norm1(linear(y)))
    frozen: Any = fl.freeze_batch_norm(norm).eval()
    torch.testing.assert_close(fuse_conv_bn_eval(conv, frozen)(x), norm(conv(x)))


@pytest.mark.parametrize("cls", ACT)
@pytest.mark.parametrize(
    ("options", "lost"), [({}, "the activation relu"), ({"act_layer": None, "drop_p": 0.2}, r"dropout of p = 0\.2")]
)
def test_folding_does_not_lose_what_is_fused(cls: type[nn.Module], options: dict[str, Any], lost: str) -> None:
    norm: Any = cls(4, **options).eval()
    with pytest.raises(RuntimeError, match=f"fuse_conv_bn_eval takes .* would lose {lost}"):
        fuse_conv_bn_eval(nn.Conv2d(3, 4, 3).eval(), norm)
    with pytest.raises(RuntimeError, match=f"fuse_linear_bn_eval takes .* would lose {lost}"):
        fuse_linear_bn_eval(nn.Linear(3, 4).eval(), norm)


@pytest.mark.parametrize("cls", ACT)
def test_torchs_converter_does_not_lose_what_is_fused(cls: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cls(4, act_layer="gelu", drop_p=0.1))
    with pytest.raises(
        RuntimeError, match=r"lose the activation gelu and dropout .* use fastlayers\.convert_sync_batch"
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize("cls", ACT)
def test_nothing_loses_a_pool(cls: type[nn.Module]) -> None:
    """Freezing and our converter keep it; torch's converter and folding say no."""
    rank = _rank_of(cls)
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[rank](2)
    layer: Any = cls(4, act_layer=None, pool=pool)
    x = torch.randn(SHAPE[:2] + (6, 5, 4)[:rank])
    expected = layer.eval()(x)
    with pytest.raises(RuntimeError, match=r"fuse_conv_bn_eval takes .* would lose MaxPool"):
        fuse_conv_bn_eval(nn.Conv2d(3, 4, 3).eval(), layer)
    with pytest.raises(RuntimeError, match=r"lose MaxPool.*use fastlayers\.convert_sync_batch"):
        nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    converted: Any = fl.convert_sync_batchnorm(layer)
    assert type(converted) is fl.SyncBatchNormAct
    assert converted.pool == layer.pool
    for kept in (converted, fl.freeze_batch_norm(layer).train(), copy.deepcopy(converted)):
        torch.testing.assert_close(kept(x), expected, rtol=0, atol=0)


def test_torchs_converter_does_not_thaw() -> None:
    with pytest.raises(RuntimeError, match="lose that it is frozen"):
        nn.SyncBatchNorm.convert_sync_batchnorm(fl.freeze_batch_norm(fl.BatchNorm2d(4)))


@pytest.mark.parametrize("cls", [*PLAIN, fl.SyncBatchNorm])
def test_torchs_converter_takes_plain_layers(cls: type[nn.Module]) -> None:
    layer = _randomised(cls(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted) is nn.SyncBatchNorm
    assert converted.weight is layer.weight
    assert converted.eps == layer.eps


@pytest.mark.parametrize(
    "name", ["convert_syncbn_model", "freeze_batch_norm_2d", "convert_frozen_batchnorm", "fuse_conv_and_bn"]
)
def test_converters_of_other_packages_do_not_lose_what_is_fused(name: str) -> None:
    """apex's, timm's, detectron2's and ultralytics' read `eps` of any BatchNorm, as this does."""
    scope: dict[str, Any] = {}
    exec(f"def {name}(layer): return layer.eps", scope)
    assert scope[name](fl.BatchNorm2d(4, eps=1e-3)) == 1e-3
    with pytest.raises(RuntimeError, match=f"{name} takes BatchNormAct2d for a BatchNorm alone"):
        scope[name](fl.BatchNormAct2d(4))


def test_eps_is_an_attribute_like_others() -> None:
    layer = fl.BatchNormAct2d(4, eps=1e-3)
    layer.eps = 0.5
    assert layer.eps == 0.5
    assert copy.deepcopy(layer).eps == 0.5
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer(x), torch.relu(nn.BatchNorm2d(4, eps=0.5)(x)))


# --- by class ---


@pytest.mark.parametrize("cls", [*PLAIN, *ACT, fl.SyncBatchNorm])
def test_update_bn(cls: type[nn.Module]) -> None:
    ours, theirs = cls(4), {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[_rank(cls(4))](4)
    batches = [torch.randn(SHAPE[: 2 + _rank(ours)]) + i for i in range(3)]
    for model in (ours, theirs):
        update_bn(batches, model)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.momentum == 0.1


@pytest.mark.parametrize("cls", [*PLAIN, *ACT, fl.SyncBatchNorm])
def test_weight_decay_filters(cls: type[nn.Module]) -> None:
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), cls(4))
    spared = [p for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)]
    assert [id(p) for p in spared] == [id(model[1].weight), id(model[1].bias)]
    if cls is not fl.SyncBatchNorm and cls is not fl.SyncBatchNormAct:
        assert isinstance(model[1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


# --- quantisation-aware training ---


@pytest.fixture
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _convolutional(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()).train()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("cls", [fl.BatchNorm2d, fl.BatchNormAct2d, fl.SyncBatchNormAct])
def test_eager_quantisation_does_not_fuse_our_layers(cls: type[nn.Module]) -> None:
    """It goes by the exact type, and says that it does not know ours."""
    for names in (["0", "1"], ["0", "1", "2"]):
        with pytest.raises(AssertionError, match=rf"did not find fuser method .*{cls.__name__}"):
            quantization.fuse_modules_qat(_convolutional(cls(4)), names)
        with pytest.raises(AssertionError, match=rf"did not find fuser method .*{cls.__name__}"):
            quantization.fuse_modules(_convolutional(cls(4)).eval(), names)


@pytest.mark.usefixtures("_quiet")
def test_eager_quantisation_keeps_our_layers_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), fl.BatchNormAct2d(4, act_layer="relu"))
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(model.train())
    assert type(prepared[0]) is torch.ao.nn.qat.Conv2d
    assert isinstance(prepared[1], fl.BatchNormAct2d)
    y = prepared(torch.randn(2, 3, 8, 8))
    y.sum().backward()
    assert y.min() == 0


@pytest.mark.usefixtures("_quiet")
def test_fx_quantisation() -> None:
    """Its tracer enters our layers and fails there; told to leave them, it keeps them as they are."""
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    example = (torch.randn(2, 3, 8, 8),)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), fl.BatchNormAct2d(4)).train()
    with pytest.raises(torch.fx.proxy.TraceError, match="symbolically traced variables"):
        prepare_qat_fx(copy.deepcopy(model), mapping, example)
    opaque = PrepareCustomConfig().set_non_traceable_module_classes([fl.BatchNormAct2d])
    prepared = prepare_qat_fx(model, mapping, example, prepare_custom_config=opaque)
    assert any(isinstance(m, fl.BatchNormAct2d) for m in prepared.modules())
    y: Tensor = prepared(*example)
    assert y.min() == 0
