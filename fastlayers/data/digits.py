"""scikit-learn's handwritten digits: a data set that comes with a library, so that nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
from sklearn import datasets

from fastlayers.data.splits import DataSet, Split


def load_digits(fraction: float = 1.0) -> DataSet:
    """scikit-learn's 1797 handwritten digits, 8x8 in grey; every fifth image is for testing."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    for_test = torch.arange(len(targets)) % 5 == 4
    train = Split(images[~for_test], targets[~for_test])
    test = Split(images[for_test], targets[for_test])
    return DataSet.of("digits", train, test, fraction)
