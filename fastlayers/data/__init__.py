"""The data sets of the experiments, held in memory: their files, splits, loaders and augmentation.

`fastlayers.data.augmentation` is imported on its own, since it needs kornia (the extra "studies").
"""

from fastlayers.data.digits import load_digits
from fastlayers.data.files import DataError
from fastlayers.data.loaders import loader
from fastlayers.data.named import NAMES, load
from fastlayers.data.splits import DataSet, Split

__all__ = ["NAMES", "DataError", "DataSet", "Split", "load", "load_digits", "loader"]
