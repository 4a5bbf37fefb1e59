"""The `fastlayers quickstart` command: its options, and what to do with the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
import torch

import fastlayers as fl
from fastlayers.cli import needs_extra

EPOCHS = {"digits": 15, "cifar10": 4}
# A tenth of CIFAR-10 takes a few minutes on two cores.
FRACTIONS = {"digits": 1.0, "cifar10": 0.1}


def _per_dataset(values: Mapping[str, float]) -> str:
    return "[default: " + ", ".join(f"{value:g} for {name}" for name, value in values.items()) + "]"


@click.command(short_help="Train with torch's layers and with these.")
@click.option("--dataset", type=click.Choice(list(EPOCHS)), default="digits", show_default=True)
@click.option(
    "--data-dir",
    type=Path,
    help="Folder of CIFAR-10's official files.  [default: $FASTLAYERS_DATA, else the user's cache]",
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help=f"Share of the images to use.  {_per_dataset(FRACTIONS)}",
)
@click.option("--epochs", type=click.IntRange(min=1), help=_per_dataset(EPOCHS))
@click.option("--batch-size", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Folder for the picture.  [default: here]",
)
@click.pass_context
def quickstart(
    ctx: click.Context,
    dataset: str,
    data_dir: Path | None,
    fraction: float | None,
    epochs: int | None,
    batch_size: int,
    seed: int,
    threads: int | None,
    out: Path,
) -> None:
    """Trains a CNN with torch's layers and with fastlayers, and compares losses, time and memory.

    Both trainings share weights, batches and dropout masks, and take their steps in turn. Exits
    with 1 where the losses differ by more than rounding explains.
    """
    with needs_extra("experiments"):
        from rich.console import Console
        from rich.progress import Progress

        from fastlayers import data
        from fastlayers.experiments import plot, report
        from fastlayers.experiments.quickstart import Settings, run

    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(epochs or EPOCHS[dataset], batch_size, seed)
    console = Console()
    try:
        images = data.load(dataset, data_dir, fraction or FRACTIONS[dataset])
        title = _title(images.name, len(images.train), len(images.test), settings.batch_size)
        console.print(title, highlight=False)
        with Progress(console=console, transient=True) as progress:
            results = run(images, settings, progress)
    except (data.DataError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    report.show(console, results)
    picture = out / f"quickstart-{dataset}.png"
    plot.save(results[-1], title, picture)
    console.print(f"Picture: {picture}")
    if not results[-1].agrees:
        ctx.exit(1)


def _title(dataset: str, train: int, test: int, batch_size: int) -> str:
    return (
        f"{dataset}: {train} images to train on, {test} to test, batches of {batch_size}\n"
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}, "
        f"backend: {fl.get_backend()}, {fl.ops.cpu_capability()}"
    )
