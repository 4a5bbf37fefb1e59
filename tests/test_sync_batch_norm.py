"""SyncBatchNorm and SyncBatchNormAct: by two and three real processes (sync_worker.py), and what one process shows."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl
from tests import sync_worker

Outcomes = list[dict[str, str | None]]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    """What each rank says of each check, by the number of ranks; torchrun starts once for each, and at once."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks_{ranks}") for ranks in sync_worker.CHECKS}
    running = {ranks: _start(ranks, folder) for ranks, folder in folders.items()}
    texts = {ranks: process.communicate(timeout=240)[0] for ranks, process in running.items()}
    return {ranks: _read(ranks, folders[ranks], texts[ranks]) for ranks in folders}


def _start(ranks: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    package = str(Path(fl.__file__).parents[1])  # the one that is tested, however it was found
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    return subprocess.Popen(
        [*command, str(sync_worker.__file__), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _read(ranks: int, folder: Path, text: str) -> Outcomes:
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    if not all(file.exists() for file in files):
        pytest.fail(f"torchrun with {ranks} ranks failed:\n{text[-5000:]}")
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    ("ranks", "name"),
    [pytest.param(n, name, id=f"{n}-{name}") for n, found in sync_worker.CHECKS.items() for name in found],
)
def test_with_several_processes(ranks: int, name: str, outcomes: dict[int, Outcomes]) -> None:
    for rank, found in enumerate(outcomes[ranks]):
        if name not in found:
            pytest.fail(f"rank {rank} did not come to it; it failed {[n for n, e in found.items() if e]}")
        assert found[name] is None, f"rank {rank}: {found[name]}"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
    # torch 2.11 has no such argument.
    *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm1d).parameters else []),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_is_torchs(options: dict[str, Any]) -> None:
    ours, theirs = fl.SyncBatchNorm(4, **options), nn.SyncBatchNorm(4, **options)
    for source, target in ((theirs, ours), (ours, theirs)):
        target.load_state_dict(source.state_dict(), strict=True)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata  # type: ignore[attr-defined]
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)


def test_arguments_by_position() -> None:
    """They are torch's, in torch's order."""
    group: Any = object()
    for cls in (fl.SyncBatchNorm, nn.SyncBatchNorm):
        layer = cls(4, 1e-3, 0.2, False, True, group, "cpu", torch.float64)
        assert (layer.eps, layer.momentum, layer.affine, layer.process_group) == (1e-3, 0.2, False, group)
        assert layer.running_mean is not None
        assert layer.running_mean.dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 5), (6, 4, 3, 5, 2)], ids=str)
def test_one_process_is_batch_norm(shape: tuple[int, ...], training: bool) -> None:
    plain = {2: fl.BatchNormAct1d, 3: fl.BatchNormAct1d, 4: fl.BatchNormAct2d, 5: fl.BatchNormAct3d}[len(shape)]
    options: dict[str, Any] = {"act_layer": "gelu", "drop_p": 0.4}
    if len(shape) > 2:
        options["pool_kernel_size"] = (2,) * (len(shape) - 2)
    results = []
    for layer in (fl.SyncBatchNormAct(4, **options), plain(4, **options)):
        torch.manual_seed(1)
        x, residual = torch.randn(shape, requires_grad=True), torch.randn(shape)
        y = layer.train(training)(x, residual)
        y.square().sum().backward()
        results.append((y, x.grad, layer.weight.grad, dict(layer.state_dict())))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 0, 3)], ids=str)
def test_errors_are_torchs(shape: tuple[int, ...]) -> None:
    messages = []
    for cls in (fl.SyncBatchNorm, nn.SyncBatchNorm):
        with pytest.raises(ValueError, match=r"expected at least 2D|channels should be non-zero") as caught:
            cls(4)(torch.zeros(shape))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_copies() -> None:
    layer = fl.SyncBatchNormAct(4, act_layer="silu", drop_p=0.2, pool=nn.MaxPool2d(2))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == repr(layer)
        assert again.weight is not layer.weight
        torch.testing.assert_close(dict(again.state_dict()), dict(layer.state_dict()))


CONVERTED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: fl.SyncBatchNorm,
    nn.BatchNorm2d: fl.SyncBatchNorm,
    nn.BatchNorm3d: fl.SyncBatchNorm,
    nn.SyncBatchNorm: fl.SyncBatchNorm,
    fl.BatchNorm1d: fl.SyncBatchNorm,
    fl.BatchNorm2d: fl.SyncBatchNorm,
    fl.BatchNorm3d: fl.SyncBatchNorm,
    fl.SyncBatchNorm: fl.SyncBatchNorm,
    fl.BatchNormAct1d: fl.SyncBatchNormAct,
    fl.BatchNormAct2d: fl.SyncBatchNormAct,
    fl.BatchNormAct3d: fl.SyncBatchNormAct,
    fl.SyncBatchNormAct: fl.SyncBatchNormAct,
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", CONVERTED, ids=lambda cls: f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
def test_convert_keeps_everything(cls: type[nn.Module], options: dict[str, Any]) -> None:
    before: Any = cls(4, **options).eval()
    if before.weight is not None:
        before.weight.requires_grad_(False)
    group: Any = object()
    after: Any = fl.convert_sync_batchnorm(before, group)
    assert type(after) is CONVERTED[cls]
    assert after.process_group is group
    assert not after.training
    assert list(after.state_dict()) == list(before.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        assert all(a[1] is b[1] for a, b in zip(getattr(after, kind)(), getattr(before, kind)(), strict=True))
    assert after.extra_repr() == before.extra_repr()
    after.register_buffer("running_mean", None)
    assert before.track_running_stats == (before.running_mean is not None)


def test_convert_rewrites_a_model_in_place() -> None:
    shared = fl.BatchNormAct2d(4)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(nn.BatchNorm2d(4), shared), shared)
    calls: list[Tensor] = []
    handle = shared.register_forward_hook(lambda module, args, output: calls.append(output))
    x = torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    count = len(calls)
    returned = fl.convert_sync_batchnorm(model)
    assert type(model[1]) is fl.SyncBatchNormAct
    assert model[1] is model[2][1] is model[3]
    assert type(model[2][0]) is fl.SyncBatchNorm
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert len(calls) == 2 * count
    handle.remove()
    model(x)
    assert len(calls) == 2 * count
    assert returned is model


class _Subclass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("helper", [fl.convert_sync_batchnorm, fl.freeze_batch_norm])
def test_helpers_refuse_what_they_do_not_know(helper: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"does not know what .*_Subclass does"):
        helper(nn.Sequential(_Subclass(4)))
