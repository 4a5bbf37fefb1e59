"""Runs one of the probes that are wrong on purpose, for .ci/sanitize to see that a sanitizer reports it.

python plant.py FOLDER PROBE, where FOLDER holds the module fastlayers_cuda_emulated.
"""

from __future__ import annotations

import sys

import numpy as np


def main(folder: str, probe: str) -> None:
    """Runs it on as many ints as two blocks of 32 threads have, with just enough shared memory."""
    sys.path.insert(0, folder)
    import fastlayers_cuda_emulated as emulated

    data = np.zeros(64, np.int32)
    emulated.run_probe(probe, data, grid=[2], block=[32], shared_bytes=128)
    print(f"{probe} ran to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
