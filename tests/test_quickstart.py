"""The quickstart: same training, honest costs, a picture, and failure where a layer is wrong."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from rich.progress import Progress
from torch import nn

import fastlayers as fl
from fastlayers import data
from fastlayers.cli import COMMANDS, main, needs_extra
from fastlayers.experiments import between, models, quickstart
from fastlayers.experiments.agreement import FLOOR, Agreement, move_by_one_ulp
from fastlayers.experiments.memory import bytes_saved_for_backward
from fastlayers.experiments.training import Epoch, Phase, Run, train_interleaved
from fastlayers.models import Style

QUICK = ["quickstart", "--epochs", "1", "--fraction", "0.4"]


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


class DropsAnotherMask(fl.BatchNormAct2d):
    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        torch.rand(1)
        return super().forward(input, residual)


MakeLayer = Callable[..., nn.Module]

WRONG_LAYERS: dict[str, MakeLayer] = {
    "eps": partial(fl.BatchNormAct2d, eps=1e-3),
    "momentum": partial(fl.BatchNormAct2d, momentum=0.11),
    "activation": partial(fl.BatchNormAct2d, act_layer="gelu"),
    "drop_p": lambda channels, drop_p, pool: fl.BatchNormAct2d(channels, drop_p=drop_p / 2, pool=pool),
    "mask": DropsAnotherMask,
    "pool": lambda channels, drop_p, pool: fl.BatchNormAct2d(channels, drop_p=drop_p, pool=nn.MaxPool2d(1, 2)),
}


def use_layer(monkeypatch: pytest.MonkeyPatch, make: MakeLayer) -> None:
    """Has the quickstart take its fused layers from `make`."""

    def kit(run: str, features: int, style: Style) -> dict[str, nn.Module]:
        assert run == "BRDM"
        assert style.pool is not None
        return {"norm": make(features, drop_p=style.drop_p, pool=style.pool.layer())}

    monkeypatch.setattr(quickstart, "fused_layers", kit)


def test_command_reports_the_same_training_and_draws_it(tmp_path: Path) -> None:
    result = invoke([*QUICK, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for text in (
        "The same training",
        "Loss in training",
        "Loss in testing",
        "test accuracy",
        "median step",
        "BatchNorm to max-pool",
        "saved for backward",
        "rounding explains",
    ):
        assert text in result.output
    picture = (tmp_path / "out" / "quickstart-digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_command_fails_where_a_layer_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_layer(monkeypatch, WRONG_LAYERS["eps"])
    result = invoke([*QUICK, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "NOT the same training, with any of 3 seeds" in result.output


@pytest.mark.parametrize("kind", WRONG_LAYERS)
def test_wrong_layer_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_layer(monkeypatch, WRONG_LAYERS[kind])
    monkeypatch.setattr(quickstart, "SEEDS_TRIED", 1)
    settings = quickstart.Settings(epochs=1, batch_size=64, seed=0)
    (result,) = quickstart.run(data.load_digits(0.4), settings, Progress(disable=True))
    assert not result.agrees


def test_right_layers_agree_with_the_first_seed() -> None:
    settings = quickstart.Settings(epochs=1, batch_size=64, seed=0)
    (result,) = quickstart.run(data.load_digits(0.4), settings, Progress(disable=True))
    assert result.agrees
    assert result.seed == 0


def test_next_seed_is_tried_where_chance_had_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def wrong_for_the_first_seed(channels: int, drop_p: float, pool: nn.MaxPool2d) -> nn.Module:
        made.append(channels)
        first_seed = len(made) <= len(models.PLANS["digits"]["channels"])
        return fl.BatchNormAct2d(channels, drop_p=drop_p / 2 if first_seed else drop_p, pool=pool)

    use_layer(monkeypatch, wrong_for_the_first_seed)
    settings = quickstart.Settings(epochs=1, batch_size=64, seed=5)
    results = quickstart.run(data.load_digits(0.4), settings, Progress(disable=True))
    assert [(result.seed, result.agrees) for result in results] == [(5, False), (6, True)]


@pytest.mark.parametrize(
    ("distance", "rounding", "unexplained"),
    [
        ([2e-6, 1e-3], [1e-6, 1e-3], []),
        ([2e-6, 3e-3], [1e-6, 1e-3], [1]),
        ([FLOOR], [0.0], []),
        ([1.1 * FLOOR], [0.0], [0]),
        ([math.nan], [1.0], [0]),
    ],
)
def test_agreement(distance: list[float], rounding: list[float], unexplained: list[int]) -> None:
    assert Agreement(distance, rounding).unexplained_epochs == unexplained


def test_move_by_one_ulp_moves_every_weight_to_a_neighbour() -> None:
    model = nn.Linear(30, 30)
    before = copy.deepcopy(model.weight.data)
    move_by_one_ulp(model, seed=1)
    up, down = before.nextafter(torch.tensor(math.inf)), before.nextafter(torch.tensor(-math.inf))
    went_up, went_down = model.weight.data == up, model.weight.data == down
    assert bool((went_up | went_down).all())
    assert 0.3 < went_up.double().mean() < 0.7


def test_interleaved_runs_train_as_if_alone() -> None:
    digits = data.load_digits(0.2)
    torch.manual_seed(0)
    model = models.build_cnn("digits", fl.models.torch_layers)
    alone, first, second = (Run(copy.deepcopy(model), seed=3) for _ in range(3))
    train_interleaved([alone], digits, 1, 50, seed=0, after_step=lambda: None)
    before = torch.get_rng_state()
    train_interleaved([first, second], digits, 1, 50, seed=0, after_step=lambda: None)
    assert torch.equal(torch.get_rng_state(), before)
    for run in (first, second):
        assert torch.equal(run.epochs[0].losses["train"], alone.epochs[0].losses["train"])
        assert torch.equal(run.epochs[0].losses["test"], alone.epochs[0].losses["test"])


def test_both_models_have_the_same_state() -> None:
    for name in models.PLANS:
        eager, fused = (models.build_cnn(name, layers) for layers in (fl.models.torch_layers, fl.models.fused_layers))
        fused.load_state_dict(eager.state_dict(), strict=True)
        assert list(fused.state_dict()) == list(eager.state_dict())


@pytest.mark.parametrize(("name", "shape"), [("digits", (2, 1, 8, 8)), ("cifar10", (2, 3, 32, 32))])
def test_models_take_their_data(name: str, shape: tuple[int, ...]) -> None:
    model = models.build_cnn(name, fl.models.fused_layers)
    assert model(torch.randn(shape)).shape == (2, 10)


def test_bytes_saved_counts_shared_memory_once_and_no_parameters() -> None:
    images = torch.randn(100, 10, requires_grad=True)
    # The ReLU saves its output, which is what the second layer saves as its input.
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    before = torch.get_rng_state()
    assert bytes_saved_for_backward(model, images) == 4 * (100 * 10 + 100 * 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_fastlayers_saves_less_for_backward() -> None:
    images = torch.randn(8, 1, 8, 8)
    eager, fused = (
        bytes_saved_for_backward(models.build_cnn("digits", layers), images)
        for layers in (fl.models.torch_layers, fl.models.fused_layers)
    )
    assert fused < 0.8 * eager


def test_time_between_convolutions_is_that_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers behind them, on what the convolutions make; nothing of the models changes."""
    made = [models.build_cnn("digits", layers) for layers in (fl.models.torch_layers, fl.models.fused_layers)]
    states = copy.deepcopy([model.state_dict() for model in made])
    shapes: list[tuple[int, ...]] = []
    images, drawn = torch.randn(5, 1, 8, 8), torch.get_rng_state()
    clock = iter(range(1000))
    monkeypatch.setattr(between, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    step = between._step

    def seen(layers: nn.Module, input: torch.Tensor, grad_output: torch.Tensor) -> float:
        shapes.append((len(list(layers.children())), *input.shape, *grad_output.shape))
        return step(layers, input, grad_output)

    monkeypatch.setattr(between, "_step", seen)
    assert between.seconds_between_convolutions(made, images, repeats=2) == [2.0, 2.0]
    blocks = [((5, 64, 8, 8), (5, 64, 4, 4)), ((5, 64, 4, 4), (5, 64, 2, 2))]
    first, second = ([(layers, *x, *y) for x, y in blocks] for layers in (4, 1))
    assert shapes == first + second + second + first
    assert torch.equal(torch.get_rng_state(), drawn)
    for model, state in zip(made, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_first_tenth_of_the_steps_is_not_timed() -> None:
    run = Run(nn.Linear(1, 1), seed=0)
    empty: dict[Phase, torch.Tensor] = {"train": torch.zeros(1), "test": torch.zeros(1)}
    run.epochs = [Epoch(empty, [9.0, 9.0] + 8 * [2.0], 0.0), Epoch(empty, 10 * [1.0], 0.0)]
    measured = quickstart.Measured(run, saved_bytes=0, between_seconds=0.0)
    assert measured.step_seconds == 8 * [2.0] + 10 * [1.0]
    assert measured.median_step == 1.0


def test_command_says_what_is_wrong_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLAYERS_DATA", str(tmp_path / "nowhere"))
    for arguments, message in (
        (["--dataset", "cifar10"], "give that as --data-dir DIR or in FASTLAYERS_DATA"),
        (["--dataset", "cifar10", "--data-dir", str(tmp_path)], "found none of them"),
        (["--batch-size", "5000"], "batch size 5000: expected at most 1438"),
        (["--fraction", "1.5"], "1.5 is not in the range"),
    ):
        result = invoke(["quickstart", *arguments, "--out", str(tmp_path)])
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())


def test_command_takes_as_many_threads_as_it_is_told(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (3, 2):
            invoke(["quickstart", "--threads", str(threads), "--batch-size", "5000", "--out", str(tmp_path)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_commands_are_listed_and_others_named() -> None:
    said = invoke(["--help"])
    assert said.exit_code == 0
    assert all(f"\n  {name} " in said.output for name in COMMANDS)
    said = invoke(["study2"])
    assert said.exit_code == 2
    assert "No such command 'study2'" in said.output


def test_a_missing_module_of_our_own_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"), needs_extra("experiments"):
        raise ModuleNotFoundError("nothing there", name="fastlayers.nothing")


def test_command_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("fastlayers.experiments.", "fastlayers.data"))]:
        if not module.endswith(".command"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = invoke(["quickstart"])
    assert result.exit_code == 1
    assert 'sklearn is missing. What this command needs: pip install -e ".[experiments]"' in result.output
    assert invoke(["info"]).exit_code == 0
