"""Stops functions of torch and others that take any BatchNorm for a plain one and would silently lose what is fused."""

from __future__ import annotations

import sys

from torch import nn

# By name, since some belong to packages that are not installed: timm, apex, detectron2, ultralytics. All of them read
# `eps` themselves. What tells layers by their exact type, as torch.ao.quantization does, does not know ours.
_REBUILD = {
    "convert_sync_batchnorm": "fastlayers.convert_sync_batchnorm",
    "convert_syncbn_model": "fastlayers.convert_sync_batchnorm",
    "freeze_batch_norm_2d": "fastlayers.freeze_batch_norm",
    "convert_frozen_batchnorm": "fastlayers.freeze_batch_norm",
}
_FOLD = {"fuse_conv_bn_eval", "fuse_linear_bn_eval", "fuse_conv_and_bn"}


def raise_if_reader_would_lose(fused: tuple[str, ...], frozen: bool, layer: nn.Module) -> None:
    """Raises RuntimeError if the function that reads the property that calls this would lose what `layer` does.

    Args:
        fused: what the layer does besides normalising, in words.
        frozen: whether it is; what is folded has constant statistics anyway.
    """
    reader = sys._getframe(2).f_code.co_name
    if reader in _REBUILD:
        lost = (*fused, "that it is frozen") if frozen else fused
        remedy = f"use {_REBUILD[reader]}, which keeps all"
    elif reader in _FOLD:
        lost, remedy = fused, "fold a plain BatchNorm, with the activation as a module after it"
    else:
        return
    if lost:
        raise RuntimeError(
            f"{reader} takes {type(layer).__name__} for a BatchNorm alone and would lose {' and '.join(lost)}; {remedy}"
        )
