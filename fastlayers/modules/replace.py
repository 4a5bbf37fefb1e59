"""Rewrites a model's BatchNorm layers: to synchronised ones, and to frozen ones and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fastlayers.modules import batch_norm, batch_norm_act
from fastlayers.modules.batch_norm import _FusedBatchNorm
from fastlayers.modules.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Module = TypeVar("_Module", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: batch_norm.BatchNorm1d,
    nn.BatchNorm2d: batch_norm.BatchNorm2d,
    nn.BatchNorm3d: batch_norm.BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys((*_FUSED, *_FUSED.values()), SyncBatchNorm),
    batch_norm_act.BatchNormAct1d: SyncBatchNormAct,
    batch_norm_act.BatchNormAct2d: SyncBatchNormAct,
    batch_norm_act.BatchNormAct3d: SyncBatchNormAct,
    SyncBatchNormAct: SyncBatchNormAct,
}
_FROZEN: dict[type[nn.Module], type[nn.Module]] = {cls: _FUSED.get(cls, cls) for cls in _SYNCHRONISED}


def convert_sync_batchnorm(module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Replaces BatchNorm layers by `SyncBatchNorm`, and those with an activation by `SyncBatchNormAct`.

    Takes torch's BatchNorm layers and `torch.nn.SyncBatchNorm`, and this library's. The new layers have the same
    parameters and buffers (the same tensors), mode, hooks and other attributes; a layer that is used in two places is
    one in both afterwards. The layers that they replace are left as they were.

    Args:
        module: changed in place.
        process_group: whose statistics are taken together; None is all processes.

    Returns:
        `module`, or if that is a BatchNorm layer itself, the new layer.

    Raises:
        TypeError: a layer is of another subclass of torch's BatchNorm, whose forward may be another function.
    """

    def replacement(layer: nn.Module) -> nn.Module:
        return _become(layer, _class_for(layer, _SYNCHRONISED, "convert_sync_batchnorm"), process_group=process_group)

    return _replace(module, replacement)


def freeze_batch_norm(module: nn.Module, *, parameters: bool = True) -> nn.Module:
    """Has BatchNorm layers use their running statistics and leave them as they are, in training mode too.

    ``train()`` and ``eval()`` do not change that, nor does `torch.optim.swa_utils.update_bn`. Activation and residual
    stay, and dropout still drops in training mode. A layer's state has the same entries as before; whether it is frozen
    is not among them. This library's layers are frozen in place; torch's are replaced by this library's, which are
    subclasses of theirs, with the same parameters, buffers and hooks.

    Args:
        module: changed in place.
        parameters: also switch off the gradients of weight and bias. False leaves those as they are.

    Returns:
        `module`, or if that is a layer of torch's, what replaces it.

    Raises:
        TypeError: a layer is of another subclass of torch's BatchNorm, whose forward may be another function.
        ValueError: a layer has no running statistics.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        _class_for(layer, _FROZEN, "freeze_batch_norm")
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"freeze_batch_norm: {layer} has no running statistics (track_running_stats=False)")

    def frozen(layer: nn.Module) -> nn.Module:
        cls = _FROZEN[type(layer)]
        new = layer if isinstance(layer, cls) else _become(layer, cls)
        assert isinstance(new, _FusedBatchNorm)
        new.frozen = True
        if parameters:
            trained = tuple(name for name, p in new.named_parameters(recurse=False) if p.requires_grad)
            new._frozen_parameters += trained
            for name in trained:
                getattr(new, name).requires_grad_(False)
        return new

    return _replace(module, frozen)


def unfreeze_batch_norm(module: _Module) -> _Module:
    """Undoes `freeze_batch_norm`: in training mode, layers use the batch's statistics and update the running ones.

    Gradients that freezing switched off are switched on again; others stay off. Changes and returns `module`.
    """
    for layer in module.modules():
        if isinstance(layer, _FusedBatchNorm) and layer.frozen:
            for name in layer._frozen_parameters:
                getattr(layer, name).requires_grad_(True)
            layer.frozen, layer._frozen_parameters = False, ()
    return module


def _class_for(layer: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]], function: str) -> type[nn.Module]:
    # Not of subclasses: their forward may be another function.
    cls = classes.get(type(layer))
    if cls is None:
        allowed = ", ".join(sorted({f"nn.{c.__name__}" for c in _FUSED}))
        raise TypeError(
            f"{function}: does not know what {type(layer).__module__}.{type(layer).__qualname__} does besides "
            f"normalising; allowed: {allowed} and fastlayers' own"
        )
    return cls


def _replace(module: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Puts ``replacement(layer)`` in the place of every BatchNorm layer, the same one in all its places."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            is_layer = isinstance(module, nn.modules.batchnorm._BatchNorm)
            done[module] = replacement(module) if is_layer else module
            # Not named_children, which skips a child's second name.
            for name, child in list(module._modules.items()):
                if child is not None:
                    new = visit(child)
                    if new is not child:
                        module.add_module(name, new)
        return done[module]

    return visit(module)


def _become(layer: nn.Module, cls: type[nn.Module], **attributes: object) -> nn.Module:
    """A layer of another class with all that `layer` has."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    if issubclass(cls, _FusedBatchNorm):
        new.__dict__["_eps"] = new.__dict__["eps"]
    # Tables of its own for what may be replaced in one layer later. Those of hooks are shared: their handles hold them.
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[table] = layer.__dict__[table].copy()
    new.__dict__.update(attributes)
    return new
