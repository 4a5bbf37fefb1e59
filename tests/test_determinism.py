"""The same bits from run to run, for any number of threads, and under torch.use_deterministic_algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import masks
from tests.cases import Case, make_sample
from tests.layouts import in_layout
from tests.oracle import Results, fused, run

THREADS = (1, 2, 3, 5, 8)

# Shapes by how the kernels cut them (PlaneSplit in planes.h, RowSplit in rows.h, Geometry in kernels.h).
SIZES = {
    "few channels in spans": ((3, 3, 130, 131), "contiguous"),
    "one channel in spans": ((1, 1, 1, 120_001), "contiguous"),
    "channel by channel": ((5, 17, 31, 33), "contiguous"),
    "small planes in cache": ((40, 64, 5, 5), "contiguous"),
    "small planes in tiles": ((900, 12, 11, 11), "contiguous"),
    "rows in blocks": ((60, 700), "contiguous"),
    "rows in tiles": ((3000, 72), "contiguous"),
    "wide rows in tiles and blocks": ((150, 2100), "contiguous"),
    "channels_last in tiles": ((9, 65, 21, 19), "channels_last"),
    "channels_last in blocks": ((2, 1100, 3, 5), "channels_last"),
    "narrow rows, several at once": ((7, 5, 64, 64), "channels_last"),
    "narrow rows, one at a time": ((7, 5, 63, 65), "channels_last"),
    "a view with gaps": ((4, 9, 40, 41), "some_channels"),
    "a view that is copied": ((4, 9, 40, 41), "every_second"),
    "tiny": ((4, 6, 3, 3), "contiguous"),
    "tiny channels_last": ((4, 6, 3, 3), "channels_last"),
}
# Together they have: every use of masks, of flat bits, of residuals, and of the double results for float64.
CALLS = {
    "relu": {"act": "relu"},
    "channels dropped, residual": {
        "act": "relu", "residual": "contiguous", "drop_p": 0.4, "dtype": torch.bfloat16, "param_dtype": torch.float32,
    },
    "elements dropped": {"act": "gelu", "drop_p": 0.4, "drop_mode": "element"},
    "float64": {"act": "tanh", "dtype": torch.float64, "param_dtype": torch.float64},
    "evaluation": {"act": "silu", "training": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _differing(results: Callable[[], Results]) -> list[str]:
    """What of `results()` is not the same for some number of threads, or from run to run."""
    torch.set_num_threads(1)
    expected = results()
    found = []
    for threads in (1, *THREADS):
        torch.set_num_threads(threads)
        again = results()
        assert again.keys() == expected.keys()
        # By bits: NaN is NaN, and 0 is not -0.
        found += [f"{name}, {threads} threads" for name in expected if not _same_bits(again[name], expected[name])]
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() and t.dim() else t.reshape(1).view(torch.uint8)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("size", SIZES)
def test_kernels(size: str, call: str, device: torch.device) -> None:
    shape, layout = SIZES[size]
    case = Case(shape, layout=layout, **CALLS[call])  # type: ignore[arg-type]  # a table of all kinds of arguments
    if case.residual is not None:
        case = replace(case, residual=layout)
    sample = make_sample(case, device)
    assert _differing(lambda: run(fused, sample.fresh())) == []


@dataclass(frozen=True)
class _Layer:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layout: str = "contiguous"

    def results(self) -> Results:
        """Two steps, each forward and backward, and an evaluation."""
        torch.manual_seed(7)
        layer = self.build()
        x = in_layout(torch.randn(self.shape), self.layout).requires_grad_()
        found: Results = {}
        for step in range(2):
            y = layer(x)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            found[f"output {step}"] = y.detach()
        assert x.grad is not None
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        state = {f"state {name}": value for name, value in layer.state_dict().items()}
        return {**found, "input": x.grad, **gradients, **state, "evaluated": layer.eval()(x).detach()}


def _fused_model() -> nn.Module:
    return fl.fuse(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3)))


LAYERS = {
    "BatchNorm1d": _Layer(lambda: fl.BatchNorm1d(70), (90, 70)),
    "BatchNorm1d, larger": _Layer(lambda: fl.BatchNorm1d(70), (3000, 70)),
    "BatchNorm2d, channels_last": _Layer(lambda: fl.BatchNorm2d(16), (8, 16, 12, 12), "channels_last"),
    "BatchNorm2d": _Layer(lambda: fl.BatchNorm2d(16), (8, 16, 12, 12)),
    "BatchNorm2d, one position": _Layer(lambda: fl.BatchNorm2d(300), (50, 300, 1, 1)),
    "BatchNorm3d": _Layer(lambda: fl.BatchNorm3d(6), (4, 6, 5, 9, 10)),
    "BatchNormAct1d": _Layer(lambda: fl.BatchNormAct1d(70, act_layer="relu", drop_p=0.3), (20, 70)),
    "BatchNormAct2d": _Layer(lambda: fl.BatchNormAct2d(6, act_layer="silu", drop_p=0.3), (4, 6, 30, 30)),
    "BatchNormAct3d": _Layer(
        lambda: fl.BatchNormAct3d(6, act_layer="mish", drop_p=0.3, drop_mode="element"), (4, 6, 5, 9, 10)
    ),
    "Dropout": _Layer(lambda: fl.Dropout(0.3), (50, 3001)),
    "Dropout1d": _Layer(lambda: fl.Dropout1d(0.3), (50, 11, 101)),
    "Dropout2d": _Layer(lambda: fl.Dropout2d(0.3), (50, 11, 30, 31), "channels_last"),
    "Dropout3d": _Layer(lambda: fl.Dropout3d(0.3), (5, 11, 6, 30, 31)),
    "fused": _Layer(_fused_model, (4, 6, 30, 30)),
}
# Small ones whose channels are adjacent go to torch's own kernels, whose sums depend on the number of threads.
OF_TORCH = ("BatchNorm1d", "BatchNorm2d, channels_last", "BatchNorm2d, one position", "BatchNormAct1d")


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in OF_TORCH])
def test_layers(name: str) -> None:
    assert _differing(LAYERS[name].results) == []


@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_deterministic_algorithms(name: str, deterministic: None) -> None:
    """For any number of threads all of them; and uninitialised memory, then filled with NaN, shows nowhere."""
    assert _differing(LAYERS[name].results) == []
    assert all(value.isfinite().all() for value in LAYERS[name].results().values())


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_of_torchs_kernels_with_the_same_threads(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    expected = LAYERS[name].results()
    for _ in range(3):
        again = LAYERS[name].results()
        assert all(_same_bits(again[key], value) for key, value in expected.items())


@pytest.mark.parametrize("mode", masks.MODES)
def test_masks(mode: str) -> None:
    """They are drawn one number after the other, whatever threads there are."""
    x = torch.empty(300, 101)

    def drawn() -> Results:
        torch.manual_seed(3)
        mask = masks.draw_for_kernels(x, 0.3, mode, True)
        assert mask is not None
        return {"mask": mask}

    assert _differing(drawn) == []


def test_a_training_of_a_network() -> None:
    """Ten steps with torch's convolutions between the layers, from the same start: the same weights, bit by bit."""

    def trained() -> Results:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), fl.BatchNormAct2d(8, act_layer="relu", drop_p=0.2), nn.Flatten(), nn.Linear(8 * 196, 10)
        )
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 16, 16)).square().mean().backward()
            optimizer.step()
        return dict(model.state_dict())

    torch.set_num_threads(2)
    first, second = trained(), trained()
    assert all(_same_bits(first[name], second[name]) for name in first)
