"""The data sets of the experiments: their contents, and every way in which CIFAR-10's files can be wrong."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlayers.experiments import data

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def batch_file(images: int, seed: int) -> bytes:
    """A file as Python 2 and NumPy 1 wrote CIFAR-10's: its strings are bytes to Python 3."""
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 3072), dtype=np.uint8)
    labels = [index % 10 for index in range(images)]
    content = pickle.dumps({b"data": pixels, b"labels": labels}, protocol=3)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small files that count as the official ones."""
    for table, size in ((data.CIFAR10_TRAIN_FILES, 20), (data.CIFAR10_TEST_FILES, 10)):
        for seed, name in enumerate(table):
            content = batch_file(size, seed)
            (tmp_path / name).write_bytes(content)
            check = data.FileCheck(len(content), hashlib.md5(content).hexdigest())
            monkeypatch.setitem(table, name, check)
    return tmp_path


def test_digits() -> None:
    digits = data.load("digits", data_dir=None, fraction=1.0)
    assert len(digits.train) == 1438
    assert len(digits.test) == 359
    assert digits.train.images.shape == (1438, 1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert set(digits.test.labels.tolist()) == set(range(10))


def test_normalised_training_images_have_zero_mean_and_unit_deviation() -> None:
    digits = data.load_digits()
    pixels = digits.normalise(digits.train.images)
    assert pixels.dtype == torch.float32
    assert abs(pixels.mean().item()) < 1e-5
    assert pixels.std().item() == pytest.approx(1, abs=1e-5)


def test_fraction_takes_the_leading_images_of_both_splits() -> None:
    whole, tenth = data.load_digits(), data.load_digits(0.1)
    assert len(tenth.train) == 144
    assert len(tenth.test) == 36
    assert torch.equal(tenth.train.images, whole.train.images[:144])


def test_cifar10_reads_a_folder_and_the_folder_above_it(cifar10: Path) -> None:
    images = data.load("cifar10", cifar10, fraction=1.0)
    assert images.train.images.shape == (100, 3, 32, 32)
    assert images.test.images.shape == (10, 3, 32, 32)
    assert images.train.labels[:11].tolist() == [*range(10), 0]
    assert images.mean.shape == (3, 1, 1)

    inner = cifar10 / data.CIFAR10_FOLDER
    inner.mkdir()
    for name in (*data.CIFAR10_TRAIN_FILES, *data.CIFAR10_TEST_FILES):
        (cifar10 / name).rename(inner / name)
    again = data.load("cifar10", cifar10, fraction=1.0)
    assert torch.equal(again.train.images, images.train.images)


def test_cifar10_needs_a_folder() -> None:
    with pytest.raises(data.DataError, match=r"needs --data-dir.*cifar-10-python\.tar\.gz"):
        data.load("cifar10", data_dir=None, fraction=1.0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"data_batch_1: expected .* found no file\. Download"):
        data.load_cifar10(tmp_path / "nowhere")


def test_missing_file(cifar10: Path) -> None:
    (cifar10 / "test_batch").unlink()
    with pytest.raises(data.DataError, match=r"test_batch: expected .* found no file"):
        data.load_cifar10(cifar10)


def test_truncated_file(cifar10: Path) -> None:
    path = cifar10 / "data_batch_3"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(data.DataError, match=rf"data_batch_3: expected {whole} .* found 1000 bytes"):
        data.load_cifar10(cifar10)


def test_file_with_another_md5(cifar10: Path) -> None:
    path = cifar10 / "data_batch_2"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    found = hashlib.md5(content).hexdigest()
    expected = data.CIFAR10_TRAIN_FILES["data_batch_2"].md5
    with pytest.raises(data.DataError, match=f"MD5 {expected}, found .* MD5 {found}"):
        data.load_cifar10(cifar10)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_pickle_that_names_another_object_is_refused(tmp_path: Path) -> None:
    written = tmp_path / "written"
    content = pickle.dumps({b"data": Malicious(written)})
    with pytest.raises(data.DataError, match=r"refused to load (_?io)\.open"):
        data.unpickle_batch(content)
    assert not written.exists()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data with CIFAR-10")
def test_official_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SHARED_DATA / "restore.py", tmp_path], check=True)
    images = data.load_cifar10(tmp_path)
    assert images.train.images.shape == (50_000, 3, 32, 32)
    assert images.train.labels.bincount().tolist() == [5000] * 10
    assert images.test.labels.bincount().tolist() == [1000] * 10
    # The channels' means that everyone's CIFAR-10 recipes carry.
    assert (images.mean.flatten() / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
