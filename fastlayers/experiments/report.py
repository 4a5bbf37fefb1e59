"""The quickstart's result as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from fastlayers.experiments.agreement import FLOOR, TOLERANCE
from fastlayers.experiments.quickstart import MOVED_RUNS, Measured, Result
from fastlayers.experiments.training import PHASES, Phase


def show(console: Console, results: Sequence[Result]) -> None:
    """Prints what `quickstart.run` returned: the last result, and why those before do not count."""
    for failed in results[:-1]:
        console.print(f"Seed {failed.seed}: {_unexplained(failed)} So the next seed was tried.")
    result = results[-1]
    for phase in PHASES:
        console.print(_losses(phase, result))
    console.print(_costs(result))
    console.print(_verdict(result, len(results)))


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(first, title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _losses(phase: Phase, result: Result) -> Table:
    table = _table(f"Loss in {phase}ing", "epoch", "torch", "fastlayers", "distance", "rounding explains")
    agreement = result.agreement[phase]
    runs = zip(result.torch.run.epochs, result.fused.run.epochs, strict=True)
    distances = zip(agreement.distance, agreement.explained, strict=True)
    for number, (epochs, (distance, explained)) in enumerate(zip(runs, distances, strict=True), 1):
        losses = [f"{epoch.mean_loss(phase):.6f}" for epoch in epochs]
        table.add_row(str(number), *losses, f"{distance:.1e}", f"{explained:.1e}")
    return table


def _costs(result: Result) -> Table:
    eager, fused = result.torch, result.fused
    table = _table("Accuracy and cost", "", "torch", "fastlayers", "torch / fastlayers")
    table.add_row("test accuracy", _accuracy(eager), _accuracy(fused), "")
    for name, ours, theirs in (
        ("median step", fused.median_step, eager.median_step),
        ("BatchNorm to max-pool", fused.between_seconds, eager.between_seconds),
    ):
        table.add_row(name, f"{theirs * 1e3:.2f} ms", f"{ours * 1e3:.2f} ms", f"{theirs / ours:.2f}")
    table.add_row(
        "saved for backward",
        f"{eager.saved_bytes / 2**20:.2f} MiB",
        f"{fused.saved_bytes / 2**20:.2f} MiB",
        f"{eager.saved_bytes / fused.saved_bytes:.2f}",
    )
    return table


def _accuracy(measured: Measured) -> str:
    return f"{measured.run.epochs[-1].test_accuracy:.2%}"


def _verdict(result: Result, seeds: int) -> str:
    if not result.agrees:
        return (
            f"NOT the same training, with any of {seeds} seeds. Seed {result.seed}: "
            f"{_unexplained(result)} Please report this with the output of `fastlayers info`."
        )
    return (
        "The same training: in every epoch, rounding explains the distance between the losses. "
        "The distance is the mean difference between both losses on one batch or test image. "
        f"Rounding explains {TOLERANCE:g} times the largest distance so far of {MOVED_RUNS} runs "
        "of torch's layers from weights moved by one unit in the last place, "
        f"and {FLOOR:.1e} for the rounding of the losses themselves."
    )


def _unexplained(result: Result) -> str:
    found = [
        f"in {phase}ing epoch {epoch + 1} the losses are {agreement.distance[epoch]:.1e} apart, "
        f"and rounding explains {agreement.explained[epoch]:.1e}"
        for phase, agreement in result.agreement.items()
        for epoch in agreement.unexplained_epochs[:1]
    ]
    return "; ".join(found) + "."
