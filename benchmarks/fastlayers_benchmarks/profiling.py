"""Profiles the case of earlier records on which this library is furthest from its design's limit.

python -m fastlayers_benchmarks.profiling [--once] RECORD...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from fastlayers_benchmarks import cases, contenders, record
from fastlayers_benchmarks.layers import Entrant


def slowest(records: Sequence[record.Record]) -> cases.Case:
    """The case of the "gpu" grid with the smallest share of a copy's speed; graphs and small tensors are left out.

    Raises:
        click.ClickException: no such case was measured.
    """
    known = {case.name: case for case in cases.grid("gpu")}
    shares = {
        row.case: share
        for one in records
        for setting in one.settings
        for row in setting.rows
        if row.case in known and (share := row.of_copy_rate(setting.fastlayers)) and (row.tensor_bytes or 0) > 2**20
    }
    if not shares:
        raise click.ClickException("none of the records has a case of the grid --gpu by fastlayers")
    return known[min(shares, key=lambda name: shares[name])]


def _call(case: cases.Case, device: torch.device) -> None:
    """Forward and backward, as `fastlayers bench` calls them."""
    name = contenders.fused_contender(device)
    (contender,) = (c for c in contenders.contenders(device) if c.name == name)
    run = Entrant(contender, contender.layer(case, device)).run("forward+backward", cases.make_inputs(case, device))
    with run.active():
        run.call()
        run.reset()
        torch.cuda.synchronize(device)
        run.call()
        torch.cuda.synchronize(device)


@click.command()
@click.option("--once", is_flag=True, help="Only make the calls, for another profiler to watch.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(once: bool, paths: tuple[Path, ...]) -> None:
    """Prints what torch's profiler says of each kernel of the slowest case in these records."""
    case = slowest([record.load(path) for path in paths])
    device = torch.device("cuda")
    click.echo(case.name)
    if once:
        _call(case, device)
        return
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        _call(case, device)
    click.echo(profile.key_averages().table(sort_by="device_time_total", row_limit=20))


if __name__ == "__main__":
    main()
