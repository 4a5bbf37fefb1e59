"""What a call on a tiny tensor costs beside torch's layers: `python -m fastlayers_benchmarks.overhead`.

There the kernels take a few microseconds, and Python, dispatch and allocations the rest. Prints a Markdown table of
medians in microseconds, ours / torch's; both take turns in one process. `--compile` compiles both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import nn

import fastlayers as fl
from fastlayers_benchmarks.cases import PHASES, Case, Inputs, Variant, Window, make_inputs
from fastlayers_benchmarks.contenders import Contender, compiled, eager_layer, fused_layer
from fastlayers_benchmarks.layers import Entrant
from fastlayers_benchmarks.timing import measure, quantiles

CPU = torch.device("cpu")
# Of MLPs and of small convolutional networks; the last has one value per channel, and so no training.
SHAPES = ((16, 32), (32, 64), (2, 3, 4, 4), (2, 16, 8, 8), (4, 16, 8, 8), (1, 8, 1, 1))


@dataclass(frozen=True)
class Comparison:
    """Two layers that compute the same: torch's, and ours."""

    name: str
    theirs: Callable[[Case], nn.Module]
    ours: Callable[[Case], nn.Module]
    drop_p: float = 0.0
    pool: Window | None = None

    def case(self, shape: tuple[int, ...]) -> Case | None:
        """The case of `shape`; None where there is nothing to pool."""
        pool = self.pool
        if pool and (len(shape) < 4 or min(shape[2:]) < pool[0]):
            return None
        return Case(shape, variant=Variant(drop_p=self.drop_p, pool=pool))


def _norm(rank_2: type[nn.Module], rank_4: type[nn.Module]) -> Callable[[Case], nn.Module]:
    return lambda case: (rank_2 if len(case.shape) == 2 else rank_4)(case.shape[1])


COMPARISONS = (
    Comparison("BatchNorm", _norm(nn.BatchNorm1d, nn.BatchNorm2d), _norm(fl.BatchNorm1d, fl.BatchNorm2d)),
    Comparison("BatchNorm, ReLU", eager_layer, fused_layer),
    Comparison("BatchNorm, ReLU, dropout", eager_layer, fused_layer, 0.5),
    Comparison("BatchNorm, ReLU, dropout, max-pool", eager_layer, fused_layer, 0.5, (2, 2, 0)),
)


def _row(comparison: Comparison, case: Case, rounds: int, compile_both: bool) -> Iterator[str]:
    """The cells of one comparison on one shape: for each phase "ours / theirs" and the ratio."""
    torch._dynamo.reset()
    builds = {"ours": comparison.ours, "theirs": comparison.theirs}
    entrants = {
        name: Entrant(Contender(name, build), (compiled(build) if compile_both else build)(case))
        for name, build in builds.items()
    }
    inputs: Inputs = make_inputs(case, CPU)
    for phase in PHASES:
        if phase != "eval" and case.elements == case.shape[1]:
            yield "-"
            continue
        runs = {name: entrant.run(phase, inputs) for name, entrant in entrants.items()}
        for run in runs.values():  # compiled layers are compiled now
            run.call()
            run.reset()
        found = {name: quantiles(samples).median * 1e6 for name, samples in measure(runs, rounds, CPU).items()}
        yield f"{found['ours']:.1f} / {found['theirs']:.1f}: {found['ours'] / found['theirs']:.2f}"


def _parsed(shape: str) -> tuple[int, ...]:
    sizes = shape.split(",")
    if len(sizes) not in (2, 4) or not all(size.isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"should be N,C or N,C,H,W, not {shape!r}", param_hint="--shape")
    return tuple(map(int, sizes))


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=200, show_default=True, help="Samples of each.")
@click.option("--compile", "compile_both", is_flag=True, help="Under torch.compile, both.")
@click.option("--shape", "shapes", multiple=True, metavar="N,C,...", help="Only these. Repeatable.  [default: six]")
def main(rounds: int, compile_both: bool, shapes: tuple[str, ...]) -> None:
    """Print the table. One thread: more have nothing to do."""
    torch.set_num_threads(1)
    click.echo(f"microseconds, ours / torch's: ratio; torch {torch.__version__}{', compiled' * compile_both}\n")
    click.echo(f"| layers | shape | {' | '.join(PHASES)} |")
    click.echo(f"| :-- | :-- |{' --: |' * len(PHASES)}")
    for comparison in COMPARISONS:
        for shape in [_parsed(text) for text in shapes] or SHAPES:
            case = comparison.case(shape)
            if case is None:
                continue
            cells = " | ".join(_row(comparison, case, rounds, compile_both))
            click.echo(f"| {comparison.name} | {'x'.join(map(str, shape))} | {cells} |")


if __name__ == "__main__":
    main()
