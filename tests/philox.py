"""Random numbers of element-wise dropout in plain NumPy, the kernels' oracle: Philox4x32-10 (Salmon et al. 2011)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: Sequence[NDArray[np.uint64]], key: Sequence[int]) -> NDArray[np.uint32]:
    """The four random words, (n, 4), for each of n counters of four words, and a key of two."""
    c, (low, high) = list(counter), key
    for _ in range(10):
        a, b = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [(b >> _HALF) ^ c[1] ^ np.uint64(low), b & _LOW, (a >> _HALF) ^ c[3] ^ np.uint64(high), a & _LOW]
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return np.stack(c, 1).astype(np.uint32)


def words(seed: int, count: int) -> NDArray[np.uint32]:
    """The first `count` random words for the int64 `seed`: word i % 4 of the counter i // 4, for each i."""
    counter = np.arange((count + 3) // 4, dtype=np.uint64)
    zeros = np.zeros_like(counter)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    return philox((counter & _LOW, counter >> _HALF, zeros, zeros), key).ravel()[:count]


def kept(seed: int, count: int, p: float) -> Tensor:
    """Which of the first `count` elements dropout with `p` keeps: bool, (count,)."""
    return torch.from_numpy(words(seed, count).astype(np.int64) < round((1 - p) * 2**32))
