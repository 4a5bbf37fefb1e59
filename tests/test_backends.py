"""Choosing a backend; that backends agree; that results do not depend on threads, runs or concurrent calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import backends
from tests.cases import Case, make_sample
from tests.oracle import Results, fused, run

# Planes and rows, whole and split, so that every parallel loop of the kernels runs.
CASES = [
    Case((8, 40, 9, 7), act="gelu", drop_p=0.3),
    Case((8, 70, 9, 7), layout="channels_last", act="relu", residual="channels_last"),
    Case((2, 3, 129, 131), act="silu", drop_p=0.3, drop_mode="element"),
    Case((44001, 3), act="mish", residual="contiguous"),
    Case((260, 600), torch.bfloat16, drop_p=0.3),
    Case((8, 3, 129, 131), training=False, act="tanh"),
    # A MiB and more, where memory is fetched ahead: blocks of small planes that are walked twice, of wide rows; planes.
    Case((70, 200, 5, 4), act="relu", residual="contiguous", drop_p=0.3),
    Case((64, 1100, 2, 2), layout="channels_last", act="relu", drop_p=0.3),
    Case((16, 130, 12, 12), act="relu", residual="contiguous", drop_p=0.3),
]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fl.set_backend("auto")


def test_set_and_use() -> None:
    assert fl.get_backend() == "auto"
    fl.set_backend("cpp")
    assert fl.get_backend() == "cpp"
    with fl.use_backend("reference"):
        assert fl.get_backend() == "reference"
        with fl.use_backend("auto"):
            assert fl.get_backend() == "auto"
        assert fl.get_backend() == "reference"
    assert fl.get_backend() == "cpp"


def test_use_restores_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), fl.use_backend("reference"):
        raise ZeroDivisionError
    assert fl.get_backend() == "auto"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'cudnn'.*auto, cpp, cuda, triton, reference"):
        fl.set_backend("cudnn")
    with pytest.raises(ValueError, match="'cudnn'"), fl.use_backend("cudnn"):
        pass
    assert fl.get_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_cannot_run_here(name: str, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("it may run here")
    with pytest.raises(RuntimeError, match=rf"'{name}'.*allowed"):
        fl.set_backend(name)
    assert fl.get_backend() == "auto"


@pytest.mark.parametrize("layer", [fl.BatchNorm2d(3, device="meta"), fl.Dropout(), fl.Dropout2d()], ids=str)
def test_backend_that_does_not_serve_the_device(layer: nn.Module) -> None:
    """It raises at the call and names both."""
    fl.set_backend("cpp")
    with pytest.raises(RuntimeError, match=r"'cpp'.*meta.*cpu"):
        layer(torch.ones(4, 3, 2, 2, device="meta"))


def test_auto_serves_other_devices() -> None:
    """By the reference: here shapes and dtypes alone."""
    layer = fl.BatchNormAct2d(3, drop_p=0.5, device="meta", dtype=torch.bfloat16)
    y = layer(torch.ones(4, 3, 2, 2, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((4, 3, 2, 2), torch.bfloat16, "meta")


@pytest.mark.parametrize(("setting", "chosen"), [("auto", "cpp"), ("cpp", "cpp"), ("reference", "reference")])
def test_explain(setting: str, chosen: str) -> None:
    """A row per operation and device; each says why."""
    with fl.use_backend(setting):
        rows = backends.explain()
    on_cpu = [row for row in rows if row.device == "cpu"]
    assert [row.op for row in on_cpu] == ["batch_norm_act", "dropout"]
    assert {row.backend for row in on_cpu} == {chosen}
    assert all(row.why for row in rows)


def test_reference_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And cpp nothing else."""
    kernel = Mock(wraps=fl.ops.batch_norm_act_fwd)
    monkeypatch.setattr(fl.ops, "batch_norm_act_fwd", kernel)
    x = torch.randn(4, 3, 2, 2)
    for name, calls in (("reference", 0), ("cpp", 1)):
        with fl.use_backend(name):
            fl.functional.batch_norm(x, None, None, training=True)
        assert kernel.call_count == calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_agree(case: Case, device: torch.device) -> None:
    """To the rounding of the dtype; strides exactly."""
    sample = make_sample(case, device)
    results = []
    for name in ("auto", "reference"):
        with fl.use_backend(name):
            results.append(run(fused, sample.fresh()))
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 2e-4
    for name, got in results[0].items():
        scale = results[1][name].abs().max().item()
        torch.testing.assert_close(got, results[1][name], rtol=tolerance, atol=tolerance * scale)
        assert got.stride() == results[1][name].stride()


def _same_bits(a: Results, b: Results) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_whatever_the_threads(case: Case, capability: str, device: torch.device) -> None:
    """For one thread, two, and more than there are processors; and from run to run."""
    sample = make_sample(case, device)
    torch.set_num_threads(1)
    expected = run(fused, sample.fresh())
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert _same_bits(run(fused, sample.fresh()), expected)


def test_deterministic_algorithms(device: torch.device) -> None:
    """No operator refuses, and uninitialised memory, which is then filled with NaN, shows nowhere."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in CASES:
            results = run(fused, make_sample(case, device).fresh())
            assert all(t.isfinite().all() for t in results.values())
    finally:
        torch.use_deterministic_algorithms(False)


def test_python_threads(device: torch.device) -> None:
    """Forward and backward from several threads at once, as data-parallel code runs them."""
    case = Case((8, 20, 33, 31), act="gelu", residual="contiguous")  # no mask: the generator is one for all threads
    sample = make_sample(case, device)
    expected = run(fused, sample.fresh())
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: run(fused, sample.fresh()), range(24)))
    assert all(_same_bits(r, expected) for r in results)


def test_one_layer_in_python_threads(device: torch.device) -> None:
    """A layer in evaluation mode holds nothing that calls could share."""
    layer = fl.BatchNormAct2d(20, act_layer="silu", device=device).eval()
    inputs = [torch.randn(4, 20, 17, 19, device=device) for _ in range(24)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        outputs: list[Tensor] = list(pool.map(layer, inputs))
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("wanted", ["avx512", "avx2", "baseline", "sse9", ""])
def test_capability_from_the_environment(wanted: str) -> None:
    """FASTLAYERS_CPU_CAPABILITY lowers the instruction set; an unknown one is an error, not ignored."""
    best = fl.ops.cpu_capability()
    process = subprocess.run(
        [sys.executable, "-c", "import fastlayers as fl; print(fl.ops.cpu_capability())"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {
            "FASTLAYERS_CPU_CAPABILITY": wanted,
            "PYTHONPATH": os.pathsep.join([str(Path(fl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    if wanted == "sse9":
        assert process.returncode != 0
        assert all(
            word in process.stderr for word in ("FASTLAYERS_CPU_CAPABILITY", "sse9", "avx512", "avx2", "baseline")
        )
    else:
        order = ["baseline", "avx2", "avx512"]
        expected = min(best, wanted or best, key=order.index)
        assert process.stdout.strip() == expected


def test_capability_that_is_unknown() -> None:
    with pytest.raises(RuntimeError, match=r"baseline, avx2 or avx512.*sse9"):
        fl.ops.set_cpu_capability("sse9")
