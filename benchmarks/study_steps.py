"""Time per training step of the studies' networks, with both kinds of layers: `python benchmarks/study_steps.py`.

Each network takes steps as its study trains it, with images and labels drawn at random. The two kinds take turns in one
process; what is compared are medians.
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from fastlayers_benchmarks.timing import Run, measure, quantiles

from fastlayers.studies import config, losses, runner, schedules
from fastlayers.studies.config import Training
from fastlayers.studies.results import Layers

CPU = torch.device("cpu")
# Studies and their runs, one for each network.
RUNS = (
    ("B1", "MLP, p 0.5"), ("A1", "CNN"), ("B6", "per channel, p 0.3"), ("B6", "per element, p 0.3"),
    ("C1", "Res18"), ("C1", "Res9"), ("C1", "simp_Res9"), ("C8", "BatchNorm, lr 5e-4"),
)  # fmt: skip
KINDS: tuple[Layers, ...] = ("fastlayers", "torch")


def step(training: Training, layers: Layers, batch: int) -> Callable[[], None]:
    """One training step on a batch of CIFAR-10's size."""
    torch.manual_seed(0)
    network = runner.network(training.network, 3, 32, layers)
    optimizer = schedules.optimizer(network.parameters(), training.optimizer)
    criterion = losses.build(training.loss)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(runner.CLASSES, (batch,))

    def run() -> None:
        optimizer.zero_grad()
        criterion(network(images), labels).backward()
        optimizer.step()

    return run


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Samples of each.")
@click.option("--batch", type=click.IntRange(min=2), default=50, show_default=True, help="Images of a step.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
def main(rounds: int, batch: int, threads: int | None) -> None:
    """Print a Markdown table: milliseconds of a step, and torch's over fastlayers'."""
    if threads is not None:
        torch.set_num_threads(threads)
    click.echo("| study | run | fastlayers, ms | torch's layers, ms | torch / fastlayers |")
    click.echo("| :-- | :-- | --: | --: | --: |")
    for name, run_name in RUNS:
        (training,) = (run.training for run in config.study(name).runs if run.name == run_name)
        samples = measure({kind: Run(step(training, kind, batch)) for kind in KINDS}, rounds, CPU)
        fused, plain = (quantiles(samples[kind]).median * 1e3 for kind in KINDS)
        click.echo(f"| {name} | {run_name} | {fused:.4g} | {plain:.4g} | {plain / fused:.2f} |")


if __name__ == "__main__":
    main()
