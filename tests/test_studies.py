"""What the studies are: every row of the reports, networks that can be built, and errors that say what is wrong."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from torch.nn import functional as F

from fastlayers import models
from fastlayers.cli import main
from fastlayers.studies import config, losses, schedules
from fastlayers.studies.runner import network

STUDIES = [study for report in config.reports() for study in report.studies]
TRAININGS = {run.training.key: run.training for study in STUDIES for run in study.runs}

MINIMAL = """
title = "t"
[defaults]
dataset = "digits"
epochs = 2
batch_size = 10
network = { name = "mlp", hidden = [8], drop_p = 0.5 }
optimizer = { name = "sgd", lr = 0.1, momentum = 0.9 }
[base.deep]
network.hidden = [8, 8]
[studies.X10]
title = "ten"
runs = [{ name = "a" }]
[studies.X2]
title = "two"
"""


def read(runs: str) -> config.Study:
    return config.read_report("X", MINIMAL + runs).studies[0]


def test_every_study_of_the_five_reports_is_there() -> None:
    counts = {"A": 7, "B": 14, "C": 9, "D": 5, "E": 12}
    assert [study.id for study in STUDIES] == [
        f"{letter}{n + 1}" for letter, count in counts.items() for n in range(count)
    ]


def test_every_published_accuracy_is_a_share() -> None:
    published = [run.published for study in STUDIES for run in study.runs]
    shares = [value for each in published for name, value in each if name.endswith("accuracy") and value is not None]
    assert len(shares) > 100
    assert all(0.4 < share <= 1 for share in shares)


@pytest.mark.parametrize("name", ["A2", "B11", "C3", "D3", "E1"])
def test_runs_of_a_study_differ(name: str) -> None:
    keys = [run.training.key for run in config.study(name).runs]
    assert len(set(keys)) == len(keys) > 1


def test_the_same_training_in_two_studies_has_one_key() -> None:
    full = {
        study: config.study(study).runs[run].training.key for study, run in (("A1", 1), ("A2", 0), ("A3", 0), ("A4", 0))
    }
    assert len(set(full.values())) == 1


@pytest.mark.parametrize("layers", ["fastlayers", "torch"])
def test_every_network_can_be_built_for_its_images(layers: str) -> None:
    channels = {"cifar10": 3, "mnist": 1}
    sizes = {"cifar10": 32, "mnist": 28}
    descriptions = {str(training.network): training for training in TRAININGS.values()}
    for training in descriptions.values():
        size = max(training.least_image_size, sizes[training.dataset])
        with torch.device("meta"):
            built = network(training.network, channels[training.dataset], size, layers)  # type: ignore[arg-type]
        assert models.count_parameters(built) > 10_000, training.network


def test_every_network_takes_digits() -> None:
    """For these are the default, for trying anything."""
    descriptions = {(str(training.network), training.least_image_size): training for training in TRAININGS.values()}
    for training in descriptions.values():
        with torch.device("meta"):
            built = network(training.network, 1, max(training.least_image_size, 8), "torch")
        assert models.count_parameters(built) > 1000, training.network


def test_published_sizes_are_met() -> None:
    for run in config.study("C1").runs:
        size = models.state_mib(network(run.training.network, 3, 32, "fastlayers"))
        assert size == pytest.approx(run.published.state_mib, rel=0.05)


def test_layers_of_settings() -> None:
    runs = """training = { epochs = 3 }
    runs = [
      { name = "as the study says" },
      { name = "changed", base = "deep", optimizer.lr = 0.2, epochs = 4, x = 1.5 },
      { name = "anew", network = { name = "lenet" } },
    ]"""
    plain, changed, anew = read(runs).runs
    assert (plain.training.epochs, plain.training.network.arguments) == (3, {"hidden": [8], "drop_p": 0.5})
    assert changed.training.network.arguments == {"hidden": [8, 8], "drop_p": 0.5}
    assert (changed.training.epochs, changed.training.optimizer.lr, changed.training.optimizer.momentum) == (
        4,
        0.2,
        0.9,
    )
    assert changed.x == 1.5
    assert anew.training.network.arguments == {}


def test_studies_are_in_order_of_their_numbers() -> None:
    assert [study.id for study in config.read_report("X", MINIMAL).studies] == ["X2", "X10"]


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        ('runs = [{ name = "a", epoch = 3 }]', "epoch"),
        ('runs = [{ name = "a", epochs = 0 }]', "epochs"),
        ('runs = [{ name = "a", optimizer.name = "rmsprop" }]', "optimizer"),
        ('runs = [{ name = "a", published = { accuracy = 1 } }]', "accuracy"),
        ('plots = ["pie"]', "plots"),
        ('titel = "two"', "titel"),
    ],
)
def test_wrong_settings_are_named(runs: str, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        read(runs)


def test_unknown_tables_and_bases_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['stuff'\]"):
        config.read_report("X", MINIMAL + "[stuff]")
    with pytest.raises(KeyError, match="nowhere"):
        read('runs = [{ name = "a", base = "nowhere" }]')


def test_a_setting_that_is_added_later_keeps_the_keys() -> None:
    training = config.study("B1").runs[0].training
    assert training.key == training.model_copy(update={"patience": None}).key
    assert training.key != training.model_copy(update={"patience": 3}).key


# The losses against their formulas.
LOGITS = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 9, 3, 5, 1])
PROBABILITY = LOGITS.softmax(1)[range(6), LABELS]
ONE_HOT = F.one_hot(LABELS, 10).float()
WRONG = (1 + LOGITS - LOGITS[range(6), LABELS][:, None]).clamp_min(0) * (1 - ONE_HOT)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "cross_entropy"}, -PROBABILITY.log().mean()),
        ({"name": "focal", "gamma": 3.0}, -((1 - PROBABILITY) ** 3 * PROBABILITY.log()).mean()),
        ({"name": "focal", "gamma": 0.0}, -PROBABILITY.log().mean()),
        ({"name": "mse"}, ((LOGITS - ONE_HOT) ** 2).sum(1).mean()),
        ({"name": "hinge"}, WRONG.sum(1).mean()),
        ({"name": "bce_with_logits"}, F.binary_cross_entropy(LOGITS.sigmoid(), ONE_HOT)),
        ({"name": "smooth_l1"}, F.smooth_l1_loss(LOGITS, ONE_HOT)),
    ],
)
def test_losses(settings: dict[str, object], expected: torch.Tensor) -> None:
    loss = losses.build(config.Loss.model_validate(settings))
    torch.testing.assert_close(loss(LOGITS, LABELS), expected)


def rates(steps: int = 100, **settings: object) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = schedules.optimizer([parameter], config.Optimizer(name="sgd", lr=0.5, momentum=0.9))
    schedule = schedules.schedule(optimizer, config.Schedule.model_validate(settings), 0.5, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9
    return found


def test_schedules() -> None:
    assert rates(name="constant") == [0.5] * 100
    cosine = rates(name="cosine")
    assert cosine[0] == 0.5
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] < 0.001
    one_cycle = rates(name="one_cycle", divisor=10)
    assert one_cycle[0] == pytest.approx(0.05)
    assert max(one_cycle) == pytest.approx(0.5)
    assert one_cycle[-1] < 0.001
    cyclic = rates(name="cyclic", cycles=4, divisor=10)
    assert min(cyclic) == pytest.approx(0.05)
    assert max(cyclic) == pytest.approx(0.5, rel=0.05)
    turns = [a < b > c for a, b, c in zip(cyclic, cyclic[1:], cyclic[2:], strict=False)]
    assert sum(turns) == 4


def test_adam_has_no_momentum() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.momentum: 0\.9 with adam"):
        schedules.optimizer([torch.nn.Parameter(torch.zeros(1))], config.Optimizer(name="adam", lr=1, momentum=0.9))


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["study", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_list_names_every_study() -> None:
    code, text = invoke("list")
    assert code == 0
    missing = [study.id for study in STUDIES if f" {study.id} " not in text]
    assert not missing


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.id)
def test_show(study: config.Study) -> None:
    code, text = invoke("show", study.id.lower())
    assert code == 0
    assert " ".join(study.title.split()) in text
    # Rich breaks long names.
    missing = [word for run in study.runs for word in run.name.split() if word not in text]
    assert not missing


def test_show_says_what_was_published_and_how_it_is_trained() -> None:
    _, text = invoke("show", "C8")
    assert "test_accuracy 0.864" in text
    assert "optimizer.lr = 0.002" in text
    assert "network.norm = none" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "Z9"], "there is no 'Z9'; there are A1, A2"),
        (["run", "A99"], "there is no 'A99'"),
        (["run", "A2", "--only", "CNN"], "no run ['CNN']; there are ['CNN, full'"),
        (["run"], "Missing argument"),
        (["run", "A1", "--fraction", "0"], "'--fraction': 0.0 is not in the range"),
        (["run", "A1", "--layers", "jax"], "'jax' is not one of"),
        (["report", "/nowhere/at/all"], "does not exist"),
    ],
)
def test_wrong_commands(arguments: list[str], said: str) -> None:
    code, text = invoke(*arguments)
    assert code == 2
    assert said in text
