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
from fastlayers import autograd, backends
from fastlayers.activations import IDENTITY
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
    Case((16, 40, 32, 33), act="relu", drop_p=0.3, pool="5/3/2"),
    Case((16, 40, 32, 33), layout="channels_last", act="gelu", drop_p=0.3, pool="2/2"),
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


ARCHS = ["75-real", "80-real", "90a-real", "100"]


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        (ARCHS, (7, 0), False),
        (ARCHS, (7, 5), True),
        (ARCHS, (8, 9), True),
        (ARCHS, (9, 0), True),
        (["90a-real"], (9, 1), False),
        (["80-real"], (9, 0), False),
        (["86-real"], (8, 0), False),
        (ARCHS, (12, 0), True),
        (["100-virtual"], (9, 0), False),
        (["100f"], (12, 0), False),
        ([], (9, 0), False),
    ],
)
def test_code_runs_on_its_gpu_and_later_ones(archs: list[str], gpu: tuple[int, int], runs: bool) -> None:
    assert backends._runs_on(archs, gpu) == runs


def _gpu(monkeypatch: pytest.MonkeyPatch, cuda: bool, triton: str | None) -> None:
    """As if there were a GPU of compute capability 9.0: with CUDA kernels or not; and why Triton does not serve it."""
    build = {"cuda": cuda, "cuda_archs": ["90-real"], "why_no_cuda": "no nvcc"}
    monkeypatch.setattr(fl.ops, "build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        backends, "_problem_of_triton", lambda device, index: "needs a GPU" if device == "cpu" else triton
    )
    backends._problem.cache_clear()


@pytest.fixture
def _probed_again() -> Iterator[None]:
    yield
    backends._problem.cache_clear()


@pytest.mark.usefixtures("_probed_again")
@pytest.mark.parametrize(
    ("cuda", "triton", "chosen", "why"),
    [
        (True, None, "cuda", "compiled kernels"),
        (False, None, "triton", "Triton kernels; no cuda: no CUDA kernels were compiled (no nvcc)"),
        (False, "it is not installed", "reference", "no triton: it is not installed; so plain PyTorch runs"),
    ],
)
def test_auto_on_a_gpu(cuda: bool, triton: str | None, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels, then Triton's, then plain PyTorch; and why."""
    _gpu(monkeypatch, cuda, triton)
    assert backends.serving(Mock(device=torch.device("cuda", 0))) == chosen
    rows = [row for row in backends.explain() if row.device == "cuda"]
    assert {row.backend for row in rows} == {chosen}
    assert all(why in row.why for row in rows)


@pytest.mark.usefixtures("_probed_again")
def test_why_a_gpu_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled kernels: another vendor's; one that they were not compiled for, whatever the others are."""
    capabilities = [(9, 0), (8, 0)]
    _gpu(monkeypatch, True, "it is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert [backends._problem("cuda", "cuda", index) for index in (0, 1)] == [
        None,
        "CUDA kernels were compiled for 90-real, not for a GPU of compute capability 8.0",
    ]
    assert backends._problem("cuda", "xpu", 0) == "it serves cuda only"
    assert [backends.serving(Mock(device=torch.device("cuda", index))) for index in (0, 1)] == ["cuda", "reference"]
    monkeypatch.setattr(torch.version, "hip", "6.0")
    backends._problem.cache_clear()
    assert backends._problem("cuda", "cuda", 0) == "this torch is for AMD GPUs"


@pytest.mark.parametrize(
    ("place", "compute", "problem"),
    [
        ("mps", None, "it serves cuda and xpu only"),
        ("meta", None, "it serves cuda and xpu only"),
        ("cuda", (6, 1), "Triton compiles for compute capability 7.0 and later, not 6.1"),
        ("cuda", (7, 0), None),
        ("xpu", None, None),
    ],
)
def test_what_triton_serves(
    place: str, compute: tuple[int, int] | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: compute)
    assert backends._problem_of_triton(place, 0) == problem


def test_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlayers.triton", None)
    assert (backends._problem_of_triton("cuda", 0) or "").startswith("Triton is not installed, or does not fit (")


@pytest.mark.usefixtures("_probed_again")
def test_gpu_backends_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be set; a tensor elsewhere raises at the call. What is not there cannot be set."""
    _gpu(monkeypatch, True, "it is not installed")
    with fl.use_backend("cuda"):
        assert backends.serving(Mock(device=torch.device("cuda", 0))) == "cuda"
        assert [row.backend for row in backends.explain()] == ["none", "cuda"] * 3
        with pytest.raises(RuntimeError, match=r"'cuda' does not serve tensors on cpu"):
            fl.BatchNorm2d(3)(torch.ones(4, 3, 2, 2))
    with pytest.raises(RuntimeError, match=r"'triton'.*not installed.*allowed: auto, cpp, cuda, reference"):
        fl.set_backend("triton")


def test_backward_is_of_the_backend_that_ran_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set by then: what forward saves has a format of its own."""
    kernels = {name: Mock(wraps=fl.ops) for name in ("cpp", "triton")}
    monkeypatch.setattr(backends, "_OP_SETS", kernels)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    call = autograd.Call(training=True, momentum=0.1, eps=1e-5, activation=IDENTITY, drop_p=0.5, backend="triton")
    y = autograd.batch_norm_act(x, *(None,) * 7, call)
    z = autograd.dropout(y, torch.ones(4, 3, dtype=torch.bool), 0.5, "triton")
    z.sum().backward()
    assert [name for name, *_ in kernels["triton"].method_calls] == [
        "batch_norm_act_fwd", "dropout", "dropout", "batch_norm_act_bwd",
    ]  # fmt: skip
    assert not kernels["cpp"].method_calls


def test_auto_serves_other_devices() -> None:
    """By the reference: here shapes and dtypes alone."""
    layer = fl.BatchNormAct2d(3, drop_p=0.5, device="meta", dtype=torch.bfloat16)
    y = layer(torch.ones(4, 3, 2, 2, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((4, 3, 2, 2), torch.bfloat16, "meta")
    layer.pool = fl.pooling.resolve(nn.MaxPool2d(2), 2)
    y = layer(torch.ones(4, 3, 5, 4, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((4, 3, 2, 2), torch.bfloat16, "meta")


def test_operators_of_meta_tensors() -> None:
    """Shapes and strides, as for a compiler."""
    x, c = torch.empty(4, 3, 9, 8, device="meta"), torch.ones(3, device="meta")
    pool = fl.pooling.resolve(nn.MaxPool2d(3, 2, 1), 2)
    assert pool is not None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        output, mean, _, selected, positions = fl.ops.batch_norm_act_pool_fwd(
            x.contiguous(memory_format=memory_format), c, c, None, None, None, None, True, 0.1, 1e-5, 1, [0.0] * 3,
            True, 1.0, pool.window, pool.ceil_mode, True,
        )  # fmt: skip
        assert all(t.shape == (4, 3, 5, 4) for t in (output, selected, positions))
        assert all(t.is_contiguous(memory_format=memory_format) for t in (output, selected, positions))
        assert (mean.dtype, selected.dtype, positions.dtype) == (torch.float64, torch.float32, torch.uint8)


@pytest.mark.parametrize(("setting", "chosen"), [("auto", "cpp"), ("cpp", "cpp"), ("reference", "reference")])
def test_explain(setting: str, chosen: str) -> None:
    """A row per operation and device; each says why."""
    with fl.use_backend(setting):
        rows = backends.explain()
    on_cpu = [row for row in rows if row.device == "cpu"]
    assert [row.op for row in on_cpu] == ["batch_norm_act", "batch_norm_act_pool", "dropout"]
    assert ("torch pools behind a residual" in on_cpu[1].why) == (chosen == "cpp")
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
    """To the rounding of the dtype; strides exactly, but for those of the gradients that torch's pools give."""
    sample = make_sample(case, device)
    results = []
    for name in ("auto", "reference"):
        with fl.use_backend(name):
            results.append(run(fused, sample.fresh()))
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 2e-4
    for name, got in results[0].items():
        scale = results[1][name].abs().max().item()
        torch.testing.assert_close(got, results[1][name], rtol=tolerance, atol=tolerance * scale)
        assert got.stride() == results[1][name].stride() or (case.pool and name.startswith("gradient"))


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
