"""Tests of the report of the studies, on results that no training made."""

import base64
import io
import math
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from rich.console import Console

from fastlayers.studies import config, report
from fastlayers.studies.config import PlotName, Run
from fastlayers.studies.report import comparisons, curves, figures, formulas, landscape, style, tables
from fastlayers.studies.report.findings import Finding, Sample, collect
from fastlayers.studies.report.tables import Table
from fastlayers.studies.results import (
    FAILURE_FILE,
    RESULT_FILE,
    Environment,
    Epoch,
    Job,
    Layers,
    Result,
    ResultError,
    Store,
)

PNG = b"\x89PNG\r\n\x1a\n"
VOID_TAGS = {"meta", "img", "br"}


def run_of(study: str, name: str) -> Run:
    return next(run for run in config.study(study).runs if run.name == name)


def fake(
    run: Run,
    *,
    accuracy: float = 0.5,
    seed: int = 0,
    layers: Layers = "fastlayers",
    seconds: float = 2.0,
    diverges_in: int | None = None,
    threads: int = 2,
    validates: bool = True,
    **changes: Any,
) -> Result:
    """A result whose accuracy rises to `accuracy`, of a tenth of a second more per epoch."""
    training = run.training.model_copy(update={"epochs": 4, **changes})
    held_out = "val" if validates else "test"
    history = []
    for epoch in range(1, training.epochs + 1):
        loss = math.nan if diverges_in is not None and epoch >= diverges_in else 2.0 / epoch
        part = {f"{held_out}_loss": loss + 0.1, f"{held_out}_accuracy": accuracy * epoch / training.epochs}
        history.append(
            Epoch(
                epoch=epoch, seconds=seconds, lr=0.1 / epoch, train_loss=loss, train_accuracy=accuracy + 0.1, **part
            )
        )  # fmt: skip
    return Result(
        job=Job(published=run.training.key, training=training, layers=layers, seed=seed),
        history=tuple(history),
        scored_epoch=training.epochs,
        test_loss=history[-1].train_loss,
        test_accuracy=accuracy,
        seconds=10.0 * seconds,
        train_images=40000,
        validation_images=10000 if validates else 0,
        test_images=10000,
        parameters=1234567,
        state_mib=4.7,
        environment=Environment(
            device="cpu", threads=threads, processes=1, torch="2.13.0", fastlayers="0.1.0", backend="cpu"
        ),
    )


def file_landscape(store: Store, result: Result, *, diverges: bool = False) -> Path:
    steps = np.arange(0, 300, 20)
    loss = np.linspace(2.3, 0.3, 300, dtype=np.float32)
    loss[200 if diverges else 300 :] = np.nan
    path = store.folder(result.job) / "landscape.npz"
    np.savez(
        path,
        loss=loss,
        step=steps,
        smoothness=np.full(15, 3.0),
        loss_low=loss[steps] - 0.1,
        loss_high=loss[steps] + 0.1,
    )
    return path


def finding_of(out: Path, study: str) -> Finding:
    return next(each for _, found in collect(out).reports for each in found if each.study.id == study)


def cell(table: Table, heading: str, *beginning: str) -> str | None:
    """The cell of a column in the row that begins so."""
    column = [column.heading for column in table.columns].index(heading)
    (row,) = [row for row in table.rows if row[: len(beginning)] == beginning]
    return row[column]


FULL = run_of("A2", "CNN, full")
NO_DROPOUT = run_of("A2", "CNN, no Dropout")
MLP = run_of("A2", "MLP, full")
SHOWN = {"A2", "B3", "C2", "C3", "C5", "C9", "E9", "E10"}
FAILED = f"cifar10-mlp-{run_of('B3', 'MLP, no BatchNorm').training.key}/fastlayers-seed0"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    store = Store(folder)
    for seed, accuracy in enumerate((0.80, 0.82)):
        store.write(fake(FULL, accuracy=accuracy, seed=seed, epochs=100))
        store.write(fake(FULL, accuracy=accuracy - 0.01, seed=seed, epochs=100, layers="torch", seconds=3.0))
    store.write(fake(NO_DROPOUT, accuracy=0.6, epochs=3, fraction=0.25))
    store.write(fake(MLP, seed=0, epochs=30))
    store.write(fake(MLP, seed=1, epochs=30, diverges_in=2))
    for name in ("BatchNorm, lr 1e-4", "BatchNorm, lr 2e-3", "none, lr 1e-4", "none, lr 2e-3"):
        result = fake(run_of("C9", name), validates=False)
        store.write(result)
        file_landscape(store, result, diverges=name == "none, lr 2e-3")
    for study in ("C2", "E9"):
        for run in config.study(study).runs[:4]:
            store.write(fake(run, validates=False, seconds=run.x or 1.0))
    store.write(fake(run_of("C5", "[3,3]"), validates=False))
    (store.root / FAILED).mkdir(parents=True)
    (store.root / FAILED / FAILURE_FILE).write_text("Traceback\nRuntimeError: <no> memory | left\n", encoding="utf-8")
    (store.folder(Job(published="", training=MLP.training)) / FAILURE_FILE).write_text("ValueError: before\n")
    with pytest.MonkeyPatch.context() as patch:
        # Drawing the other studies that share runs with these would take as long again.
        shown = tuple(map(_some_studies, config.reports()))
        patch.setattr(config, "reports", lambda: shown)
        report.write(folder)
    return folder


def _some_studies(found: config.Report) -> config.Report:
    kept = tuple(study for study in found.studies if study.id in SHOWN)
    return found.model_copy(update={"studies": kept})


class Reader(HTMLParser):
    """Collects a page's text, pictures and links, and fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def test_published_against_measured(out: Path) -> None:
    accuracy, costs, _ = tables.tables(finding_of(out, "A2"))
    row = ("CNN, full", "fastlayers")
    assert cell(accuracy, "test accuracy, %: published", *row) == "80.70"
    assert cell(accuracy, "test accuracy, %: measured", *row) == "81.00 ± 1.41"
    assert cell(accuracy, "test accuracy, %: difference", *row) == "+0.30"
    assert cell(accuracy, "images: train / val / test", *row) == "40\xa0000 / 10\xa0000 / 10\xa0000"
    assert (cell(accuracy, "epochs", *row), cell(accuracy, "seeds", *row)) == ("100", "0, 1")
    assert cell(costs, "train loss: published", *row) == "0.0600"
    assert cell(costs, "train loss: measured", *row) == "0.0200 ± 0.0000"
    assert cell(costs, "train loss: difference", *row) == "\N{MINUS SIGN}0.0400"
    assert cell(costs, "whole run: published", *row) == "40.7 min"
    assert (cell(costs, "whole run: measured", *row), cell(costs, "median epoch", *row)) == ("20 s", "2 s")


def test_layers_beside_each_other(out: Path) -> None:
    table = tables.tables(finding_of(out, "A2"))[2]
    assert table.rows == [
        ("CNN, full", "81.00 ± 1.41", "80.00 ± 1.41", "+1.00", "1.41", "2 s", "3 s", "1.50"),
    ]


def test_times_of_different_machines_are_not_divided(tmp_path: Path) -> None:
    for layers, threads in (("fastlayers", 2), ("torch", 1)):
        Store(tmp_path).write(fake(FULL, layers=layers, threads=threads))  # type: ignore[arg-type]  # from the tuple
    table = tables.tables(finding_of(tmp_path, "A2"))[2]
    headings = [column.heading for column in table.columns]
    assert "median epoch: torch" in headings
    assert "median epoch: torch / fastlayers" not in headings


def test_other_epochs_and_data_are_told(out: Path) -> None:
    finding = finding_of(out, "A2")
    accuracy = tables.tables(finding)[0]
    row = ("CNN, no Dropout", "fastlayers")
    assert cell(accuracy, "epochs", *row) == "3 of 100"
    assert cell(accuracy, "test accuracy, %: measured", *row) == "60.00"
    assert cell(accuracy, "test accuracy, %: difference", *row) == "\N{MINUS SIGN}22.90 †"
    (told,) = [remark for remark in tables.remarks(finding) if remark.startswith("†")]
    assert "CNN, no Dropout: 3 epochs instead of 100, a share of 0.25 of the images instead of 1." in told
    assert "CNN, full; MLP, full: epochs, data and settings as described." in tables.remarks(finding)


def test_one_run_done_in_two_ways_is_two_rows(tmp_path: Path) -> None:
    for epochs in (2, 100):
        Store(tmp_path).write(fake(FULL, epochs=epochs))
    labels = [variant.label for variant in finding_of(tmp_path, "A2").variants]
    assert sorted(labels) == ["CNN, full (2 epochs instead of 100)", "CNN, full (as described)"]


def test_a_result_serves_every_study_that_has_the_run(out: Path) -> None:
    assert [variant.run.name for variant in finding_of(out, "A3").variants] == ["CBRDM"]


def test_what_is_not_run_is_told(out: Path) -> None:
    finding = finding_of(out, "A2")
    accuracy = tables.tables(finding)[0]
    assert cell(accuracy, "test accuracy, %: published", "CNN, no BatchNorm", "not run") == "75.20"
    assert cell(accuracy, "test accuracy, %: measured", "CNN, no BatchNorm", "not run") is None
    assert "Not run yet: CNN, no BatchNorm; MLP, no Dropout; MLP, no BatchNorm." in tables.remarks(finding)


def test_a_diverged_seed_is_told(out: Path) -> None:
    finding = finding_of(out, "A2")
    losses = tables.tables(finding)[1]
    assert cell(losses, "train loss: measured", "MLP, full", "fastlayers") == "0.0667 (1 of 2 not finite)"
    assert "MLP, full (fastlayers, seed 1): the loss is not finite from epoch 2 on." in tables.remarks(finding)


def test_failures(out: Path) -> None:
    assert collect(out).failures == {FAILED: "RuntimeError: <no> memory | left"}, "one was finished afterwards"
    assert set(finding_of(out, "B3").failures) == {FAILED}
    assert not finding_of(out, "B1").failures


def test_early_stop_is_told(tmp_path: Path) -> None:
    result = fake(FULL, epochs=100)
    Store(tmp_path).write(result.model_copy(update={"history": result.history[:7]}))
    finding = finding_of(tmp_path, "A2")
    assert cell(tables.tables(finding)[0], "epochs", "CNN, full", "fastlayers") == "7 of 100"
    assert "CNN, full (fastlayers): stopped after epoch 7 of 100." in tables.remarks(finding)


def test_the_page_needs_no_other_file(out: Path) -> None:
    page = read(out / report.PAGE)
    pictures = page.values("src")
    assert len(pictures) == len(list((out / report.PLOTS).iterdir()))
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert all(base64.b64decode(source.partition(",")[2]).startswith(PNG) for source in pictures)
    assert not {tag for tag, *_ in page.attributes} & {"script", "link", "iframe"}
    anchors = [link for link in page.values("href") if link.startswith("#")]
    assert {"#A", "#A2", "#C9", "#E10"} <= set(anchors)
    assert {link[1:] for link in anchors} <= set(page.values("id"))
    assert "<no> memory | left" in page.text
    assert "81.00 ± 1.41" in page.text


def test_every_picture_shows_something(out: Path) -> None:
    names = {path.stem for path in (out / report.PLOTS).iterdir()}
    assert {f"C9-{name}" for name in ("landscape", "curves")} <= names
    assert {f"E9-{name}" for name in ("curves", "against_x", "seconds_per_epoch")} <= names
    assert {"A2-bars", "A2-curves", "C2-schedules", "C3-activation_slopes", "E10-focal"} <= names
    for path in (out / report.PLOTS).iterdir():
        pixels: NDArray[np.float32] = matplotlib.image.imread(io.BytesIO(path.read_bytes()))
        assert min(pixels.shape[:2]) > 200
        assert (pixels[..., :3].min(2) < 0.5).mean() > 0.002, f"{path.name} is empty"


def test_markdown_has_whole_tables_and_links_to_pictures(out: Path) -> None:
    lines = (out / report.MARKDOWN).read_text(encoding="utf-8").splitlines()
    rules = [index for index, line in enumerate(lines) if line.startswith("| :--")]
    assert len(rules) > 5
    for index in rules:
        assert lines[index - 1].count("|") == lines[index].count("|") == lines[index + 1].count("|")
    linked = [line.partition("](")[2].rstrip(")") for line in lines if line.startswith("![")]
    assert len(linked) > 10
    assert all((out / path).is_file() for path in linked)
    assert any(r"&lt;no> memory \| left" in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 140])
def test_terminal(out: Path, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    report.show(console, out)
    text = console.export_text()
    assert "[3,3]" in text, "a name, not rich's markup"
    assert "RuntimeError: <no> memory | left" in " ".join(text.split())
    for number in ("81.00 ± 1.41", "\N{MINUS SIGN}22.90 †", "fastlayers", "1.50"):
        assert number in text
    assert "…" not in text


def test_without_runs_the_page_says_so(tmp_path: Path) -> None:
    page = read(report.write(tmp_path))
    assert "There is no finished run" in page.text
    assert "Not run yet: A1 The best MLP and CNN (2 runs)" in page.text
    plots = {path.name for path in (tmp_path / report.PLOTS).iterdir()}
    assert plots == {"E10-focal.png", "C3-activation_slopes.png"}, "what needs no runs"
    assert "There is no finished run." in (tmp_path / report.MARKDOWN).read_text(encoding="utf-8")
    console = Console(record=True, file=io.StringIO())
    report.show(console, tmp_path)
    assert "There is no finished run." in console.export_text()


def test_a_corrupt_result_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = fake(FULL)
    store.write(result)
    path = store.folder(result.job) / RESULT_FILE
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(ResultError, match=f"{path} is not the result of a run"):
        report.write(tmp_path)


@pytest.mark.parametrize("content", [None, b"no archive", b"PK\x03\x04 half of one"])
def test_a_missing_or_corrupt_landscape_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    store = Store(tmp_path)
    result = fake(run_of("C9", "none, lr 1e-3"))
    store.write(result)
    path = store.folder(result.job) / "landscape.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultError, match=f"{path} is not the record of a loss landscape"):
        list(figures.pictures(finding_of(tmp_path, "C9"), store))


def test_landscape_arrays_of_unequal_lengths_are_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = fake(run_of("C9", "none, lr 1e-3"))
    store.write(result)
    path = file_landscape(store, result)
    with np.load(path) as arrays:
        content = dict(arrays)
    np.savez(path, **{**content, "smoothness": content["smoothness"][1:]})
    with pytest.raises(ResultError, match="unequal lengths"):
        list(figures.pictures(finding_of(tmp_path, "C9"), store))


@pytest.mark.parametrize("gamma", formulas.GAMMAS)
def test_focal_loss(gamma: float) -> None:
    confidence = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = (1 - confidence) ** gamma * -confidence.log()
    torch.testing.assert_close(formulas.focal_loss(confidence, gamma), expected)


def test_slopes() -> None:
    inputs = torch.linspace(-5, 5, 101, dtype=torch.float64)
    sigmoid = formulas.slope("sigmoid", inputs)
    torch.testing.assert_close(sigmoid, torch.sigmoid(inputs) * torch.sigmoid(-inputs))
    assert sigmoid.max() == 0.25


def test_every_study_has_what_its_plots_need() -> None:
    assert set(figures.KINDS) == set(get_args(PlotName))
    for each in (study for found in config.reports() for study in found.studies):
        if "against_x" in each.plots:
            assert each.x_label
            assert all(run.x is not None for run in each.runs)
        if "landscape" in each.plots:
            assert {run.training.network.arguments["norm"] for run in each.runs} == {"batch", "none"}
            assert all(run.training.record_landscape for run in each.runs)
        if "focal" not in each.plots:
            assert "curves" in each.plots


def test_nothing_is_drawn_of_runs_that_are_not_there(tmp_path: Path) -> None:
    store, of_runs = Store(tmp_path), figures.KINDS.keys() - {"focal", "activation_slopes"}
    found = [each for _, findings in collect(tmp_path).reports for each in findings]
    drawn = [(name, figures.KINDS[name].draw(each, store)) for each in found for name in each.study.plots]
    assert {name for name, figure in drawn if figure is None} == of_runs


def test_seconds_of_runs_without_a_setting_are_bars(out: Path) -> None:
    drawn = comparisons.draw_seconds(finding_of(out, "A2"))
    assert drawn is not None
    (axes,) = drawn.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "CNN, full"
    assert "MLP, no BatchNorm (not run)" in labels
    widths = sorted(bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle))
    assert widths == [2.0, 2.0, 2.0, 3.0], "of three runs, and of one with torch's layers"


@pytest.mark.parametrize(("seconds", "scale"), [((1.0, 3.0), "linear"), ((1.0, 90.0), "log")])
def test_seconds_that_span_decades(seconds: tuple[float, float], scale: str, tmp_path: Path) -> None:
    for run, taken in zip(config.study("E9").runs[:2], seconds, strict=True):
        Store(tmp_path).write(fake(run, validates=False, seconds=taken))
    drawn = comparisons.draw_seconds(finding_of(tmp_path, "E9"))
    assert drawn is not None
    (axes,) = drawn.axes
    assert axes.get_yscale() == scale
    assert (axes.get_ylim()[0] == 0) == (scale == "linear")


def test_samples_without_a_finite_value() -> None:
    lost = Sample((), 2)
    assert tables.spread(lost) == "not finite"
    bars = [comparisons._Bars(name, "red", samples) for name, samples in (("a", (None,)), ("b", (lost,)))]
    assert comparisons._draw_bars("", "", ["run"], bars, "{}") is None


@pytest.mark.parametrize(("diverges_in", "place"), [(1, (1, 0.97)), (3, (2, 1.0))])
def test_divergence_is_marked(diverges_in: int, place: tuple[int, float], tmp_path: Path) -> None:
    """At the last finite value; where there is none, at the upper end of the panel."""
    Store(tmp_path).write(fake(FULL, diverges_in=diverges_in))
    drawn = curves.draw_curves(finding_of(tmp_path, "A2"))
    assert drawn is not None
    panel = drawn.axes[0]
    crosses = [line for line in panel.lines if line.get_marker() == "x"]
    assert np.asarray(crosses[0].get_xydata()).tolist() == [list(place)]
    assert (crosses[0].get_transform() == panel.transData) == (diverges_in == 3)


@pytest.mark.parametrize(
    ("tops", "top"), [((), None), (((1.0,) * 100), None), (((1.0,) * 99 + (500.0,)), 1.1)], ids=["none", "even", "cut"]
)
def test_largest_values_are_cut_off_and_told(tops: tuple[float, ...], top: float | None) -> None:
    axes = style.figure(3, 3, "").subplots()
    if tops:
        axes.fill_between(range(len(tops)), 0.9, tops)
    before = axes.get_ylim()
    landscape._cut(axes)
    if top is None:
        assert (axes.get_ylim(), len(axes.texts)) == (before, 0)
    else:
        assert axes.get_ylim() == pytest.approx((0, top))
        assert [text.get_text() for text in axes.texts] == ["cut; the largest is 500"]


@pytest.mark.parametrize("count", [1, 8, 9, 30])
def test_every_run_has_a_colour_of_its_own(count: int) -> None:
    variants = [SimpleNamespace(label=f"run {number}", run=SimpleNamespace(x=None)) for number in range(count)]
    found = style.colours(SimpleNamespace(variants=variants))  # type: ignore[arg-type]  # all that it looks at
    assert list(found) == [variant.label for variant in variants]
    assert len(set(found.values())) == count
