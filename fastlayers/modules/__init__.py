"""The layers: drop-in subclasses of torch's BatchNorm and Dropout modules, and BatchNorm with what follows it fused."""

from fastlayers.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastlayers.modules.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from fastlayers.modules.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from fastlayers.modules.replace import convert_sync_batchnorm, freeze_batch_norm, unfreeze_batch_norm
from fastlayers.modules.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct

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
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "convert_sync_batchnorm",
    "freeze_batch_norm",
    "unfreeze_batch_norm",
]
