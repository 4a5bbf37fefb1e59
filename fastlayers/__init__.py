"""fastlayers: BatchNorm, activation, dropout and residual add in one pass, as drop-in PyTorch layers.

import fastlayers as fl

fl.BatchNorm2d(64)                                    # nn.BatchNorm2d, same arguments, same state_dict
fl.BatchNormAct2d(64, act_layer="relu", drop_p=0.4)   # BatchNorm2d + ReLU + Dropout2d
fl.BatchNormAct2d(64, act_layer="gelu")(x, residual)  # BatchNorm2d + add + GELU
fl.fuse(model)                                        # the same in a model of torch's layers; fl.unfuse undoes it
"""

from fastlayers import functional, models, ops, reference
from fastlayers.backends import get_backend, set_backend, use_backend
from fastlayers.fusion import FusionReport, FusionWarning, fuse, fusion_report, unfuse
from fastlayers.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    SyncBatchNorm,
    SyncBatchNormAct,
    convert_sync_batchnorm,
    freeze_batch_norm,
    unfreeze_batch_norm,
)

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FusionReport",
    "FusionWarning",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "convert_sync_batchnorm",
    "freeze_batch_norm",
    "functional",
    "fuse",
    "fusion_report",
    "get_backend",
    "models",
    "ops",
    "reference",
    "set_backend",
    "unfreeze_batch_norm",
    "unfuse",
    "use_backend",
]
