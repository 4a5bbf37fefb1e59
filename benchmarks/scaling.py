"""How time grows with the batch, and shrinks with a second thread: `python benchmarks/scaling.py` prints a table.

A step that more than doubles where the work doubles, and does not cross the size of a cache, is a bug in how the
kernels cut tensors into tasks.
"""

from __future__ import annotations

import click
import torch
from fastlayers_benchmarks.cases import LAYOUTS, Case, make_inputs
from fastlayers_benchmarks.contenders import Contender, fused_layer
from fastlayers_benchmarks.layers import TRAINING, Entrant
from fastlayers_benchmarks.timing import measure, quantiles

CPU = torch.device("cpu")
# (C, H, W): planes that are swept one by one, and such that are swept together.
PLANES = ((64, 32, 32), (256, 8, 8))
BATCHES = (4, 8, 16, 32, 64, 128, 256)


def milliseconds(shape: tuple[int, ...], layout: str, threads: int, rounds: int) -> float:
    """The median time of forward and backward of BatchNorm, ReLU and Dropout2d(0.5) in float32."""
    torch.set_num_threads(threads)
    case = Case(shape, layout)
    contender = Contender("fastlayers", fused_layer)
    run = Entrant(contender, contender.layer(case, CPU)).run(TRAINING, make_inputs(case, CPU))
    return quantiles(measure({"fastlayers": run}, rounds, CPU)["fastlayers"]).median * 1e3


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Samples of each.")
def main(rounds: int) -> None:
    """Print a Markdown table: milliseconds with one thread and two, and how they grow with the batch."""
    click.echo("| shape | layout | MiB | 1 thread | x | 2 threads | x | 1 / 2 |")
    click.echo("| :-- | :-- | --: | --: | --: | --: | --: | --: |")
    for planes in PLANES:
        for layout in LAYOUTS:
            before: list[float] = []
            for batch in BATCHES:
                shape = (batch, *planes)
                times = [milliseconds(shape, layout, threads, rounds) for threads in (1, 2)]
                grown = [f"{now / then:.2f}" for now, then in zip(times, before, strict=True)] if before else ["", ""]
                cells = ["x".join(map(str, shape)), layout, f"{Case(shape).nbytes / 2**20:.2f}"]
                for time, growth in zip(times, grown, strict=True):
                    cells += [f"{time:.3g}", growth]
                click.echo(f"| {' | '.join(cells)} | {times[0] / times[1]:.2f} |")
                before = times


if __name__ == "__main__":
    main()
