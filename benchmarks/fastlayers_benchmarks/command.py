"""The `fastlayers bench` command: its options, and what to do with the result."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from fastlayers.cli import needs_extra
from fastlayers_benchmarks import cases
from fastlayers_benchmarks.machine import (
    ALLOCATORS,
    OTHER,
    current_allocator,
    describe_machine,
    describe_versions,
    environment_for,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fastlayers_benchmarks.contenders import Contender
    from fastlayers_benchmarks.record import Record, Row, Setting
    from fastlayers_benchmarks.steps import StepCase

WIDTH = 120
ROUNDS = {"quick": 5, "default": 15, "full": 15, "gpu": 15}


@click.command(short_help="Measure the layers against torch's, and compare with earlier results.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--quick", "grid", flag_value="quick", help="A few small shapes and few rounds: some two minutes.")
@click.option("--full", "grid", flag_value="full", help="The product of all choices, which takes hours.")
@click.option("--gpu", "grid", flag_value="gpu", help="Two dozen cases for a GPU, large tensors among them.")
@click.option("--only", metavar="REGEX", default="", help="Cases whose name matches, such as 'channels_last.*p0.5'.")
@click.option("--contender", "names", multiple=True, metavar="NAME", help="Only these, and eager. Repeatable.")
@click.option(
    "--backend", "backends", metavar="NAMES", default="", help="Only these of this library, such as triton,cuda."
)
@click.option("--phase", "phases", multiple=True, type=click.Choice(cases.PHASES), help="Only these. Repeatable.")
@click.option("--layers/--no-layers", default=True, help="Measure single layers.  [default: yes]")
@click.option("--steps/--no-steps", default=True, help="Measure whole training steps.  [default: yes]")
@click.option("--rounds", type=click.IntRange(min=1), help="Samples of each.  [default: 15, 5 if quick]")
@click.option(
    "--threads", type=click.IntRange(min=1), multiple=True, help="CPU threads. Repeatable.  [default: torch's]"
)
@click.option(
    "--allocator",
    "allocators",
    type=click.Choice(list(ALLOCATORS)),
    multiple=True,
    help="glibc's malloc as it is, or told to keep freed memory. Repeatable.  [default: as this process has it]",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the record.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the tables.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Folder for the pictures.")
@click.option(
    "--load",
    "loaded",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: report this earlier record. Repeatable, for runs on one machine.",
)
@click.option(
    "--check",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An earlier record of this machine. Exits with 1 where a ratio to eager fell by more than the noise.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    json_path: Path | None,
    markdown: Path | None,
    plots: Path | None,
    loaded: tuple[Path, ...],
    check: Path | None,
    **options: Any,
) -> None:
    """Measures the layers, and whole training steps, against torch's own, torch.compile and others.

    All contenders take turns in one process. With several --threads or --allocator, each pair of them is measured in
    a process of its own. Cases: see benchmarks/fastlayers_benchmarks/cases.py.
    """
    with needs_extra("bench"):
        from rich.console import Console

        from fastlayers_benchmarks import check as checking
        from fastlayers_benchmarks import plots as drawing
        from fastlayers_benchmarks import record as recording
        from fastlayers_benchmarks import report

    try:
        # Read before hours are spent on what it is compared with.
        earlier = None if check is None else recording.load(check)
        chosen = _Options(**options)
        if earlier is not None:
            checking.ensure_comparable(earlier, describe_machine(chosen.device), chosen.empty_settings())
        if loaded:
            record = recording.merged([recording.load(path) for path in loaded])
        else:
            record = _measure(chosen, Console(stderr=True))
        # Saved first: it took the time.
        if json_path is not None:
            record.save(json_path)
        report.show(_console(), record)
        pictures = [] if plots is None else drawing.save(record, plots)
        if markdown is not None:
            report.save_markdown(record, markdown, pictures)
        fell = earlier is not None and _report_falls(earlier, record, chosen)
    except recording.RecordError as error:
        raise click.ClickException(str(error)) from error
    if fell:
        ctx.exit(1)


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _report_falls(earlier: Record, record: Record, options: _Options) -> bool:
    """Says which ratios fell; whether some did. What seems to have fallen is measured once more to be sure."""
    from fastlayers_benchmarks.check import compare, lasting

    comparison = compare(earlier, record)
    falls = comparison.falls
    if falls:
        click.echo(f"Ratios that seem to have fallen: {len(falls)}. Their cases are measured again.")
        falls = lasting(falls, compare(earlier, _measure_again(options, [fall.case for fall in falls])).falls)
    for fall in falls:
        click.secho(
            f"Slower: {fall.case}, {fall.phase}, {fall.contender} ({fall.setting}): {fall.before.median:.2f} times as "
            f"fast as eager before, {fall.now.median:.2f} now; noise {fall.noise:.2f}",
            fg="red",
        )
    click.echo(f"Compared: {comparison.compared} ratios to eager; {len(falls)} fell by more than the noise.")
    return bool(falls)


class _Options:
    """What to measure, and under which settings."""

    def __init__(
        self,
        device: str,
        grid: str | None,
        only: str,
        names: Sequence[str],
        backends: str,
        phases: Sequence[cases.Phase],
        layers: bool,
        steps: bool,
        rounds: int | None,
        threads: Sequence[int],
        allocators: Sequence[str],
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.BadParameter("no CUDA device is available", param_hint="--device")
        try:
            self.only = re.compile(only)
        except re.error as error:
            raise click.BadParameter(f"{only!r} is no regular expression: {error}", param_hint="--only") from error
        self.device = torch.device(device)
        # Typed as str; the command passes names of grids only.
        self.grid: cases.Grid = grid or "default"  # type: ignore[assignment]
        self.names = [*names, *_contenders_of([name for name in backends.split(",") if name], self.device)]
        self.phases = [phase for phase in cases.PHASES if not phases or phase in phases]
        self.layers, self.steps = layers, steps
        self.rounds = rounds or ROUNDS[self.grid]
        self.settings = [
            (threads_, allocator)
            for threads_ in threads or [torch.get_num_threads()]
            for allocator in allocators or [_own_allocator()]
        ]

    def empty_settings(self) -> list[Setting]:
        """The settings, without results."""
        from fastlayers_benchmarks.contenders import fused_contender
        from fastlayers_benchmarks.record import Setting

        fused = fused_contender(self.device)
        return [Setting(str(self.device), threads, allocator, fused, []) for threads, allocator in self.settings]

    def with_only(self, names: Iterable[str]) -> _Options:
        """The same for the cases of these names."""
        narrowed = copy.copy(self)
        narrowed.only = re.compile(f"^({'|'.join(map(re.escape, dict.fromkeys(names)))})$")
        return narrowed

    def as_facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "grid": self.grid,
            "rounds": self.rounds,
            "only": self.only.pattern or "all cases",
            "contenders": " ".join(self.names) or "all",
            "phases": " ".join(self.phases),
        }

    def as_arguments(self) -> list[str]:
        """The same options, but for the setting, for another process."""
        switches = [] if self.grid == "default" else [f"--{self.grid}"]
        return [
            f"--device={self.device}",
            f"--rounds={self.rounds}",
            f"--only={self.only.pattern}",
            *switches,
            *(f"--contender={name}" for name in self.names),
            *(f"--phase={phase}" for phase in self.phases),
            "--layers" if self.layers else "--no-layers",
            "--steps" if self.steps else "--no-steps",
        ]


def _contenders_of(backends: Sequence[str], device: torch.device) -> list[str]:
    """The contenders that these backends of the library are."""
    from fastlayers_benchmarks import contenders

    reasons = contenders.why_not(device)
    for backend in backends:
        if backend not in contenders.BACKENDS:
            raise click.BadParameter(
                f"unknown: {backend}; known: {', '.join(contenders.BACKENDS)}", param_hint="--backend"
            )
        if contenders.name_of(backend) in reasons:
            raise click.BadParameter(reasons[contenders.name_of(backend)], param_hint="--backend")
    return [contenders.name_of(backend) for backend in backends]


def _measure(options: _Options, console: Console) -> Record:
    if len(options.settings) == 1 and options.settings[0][1] == _own_allocator():
        return _measure_here(options, console)
    return _measure_elsewhere(options)


def _measure_again(options: _Options, names: Iterable[str]) -> Record:
    """The named cases, in processes other than this one."""
    return _measure_elsewhere(options.with_only(names))


def _measure_elsewhere(options: _Options) -> Record:
    """Each setting in a process of its own: what it needs of the environment is read when a process starts."""
    records = [_measure_setting(options, *setting) for setting in options.settings]
    return dataclasses.replace(records[0], settings=[setting for record in records for setting in record.settings])


def _measure_setting(options: _Options, threads: int, allocator: str) -> Record:
    from fastlayers_benchmarks.record import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        command = [sys.executable, "-m", "fastlayers", "bench", *options.as_arguments()]
        command += [f"--threads={threads}", f"--json={path}"]
        # The parent reports; what the child has to say while it works goes to standard error.
        done = subprocess.run(command, env=environment_for(allocator), stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise click.ClickException(f"threads {threads}, allocator {allocator}: exit status {done.returncode}")
        return load(path)


def _own_allocator() -> str:
    return current_allocator() or OTHER


def _measure_here(options: _Options, console: Console) -> Record:
    from fastlayers_benchmarks import contenders, record

    ((threads, _),) = options.settings
    torch.set_num_threads(threads)
    (setting,) = options.empty_settings()
    console.print(setting.title, highlight=False)
    rows = _rows(options, console)
    if not rows:
        raise click.ClickException(f"--only {options.only.pattern!r}: no case of the {options.grid} grid matches")
    return record.Record(
        describe_machine(options.device),
        describe_versions(),
        options.as_facts(),
        contenders.why_not(options.device),
        [dataclasses.replace(setting, rows=rows)],
    )


def _rows(options: _Options, console: Console) -> list[Row]:
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from fastlayers_benchmarks import contenders, layers, steps

    available = contenders.contenders(options.device)
    chosen = _chosen(options.names, available, options.device)
    step_names = [name for name in steps.CONTENDERS if name in chosen]
    work: list[tuple[str, Callable[[], list[Row]]]] = []
    if options.layers:
        entrants: list[Contender] = [contender for contender in available if contender.name in chosen]
        work += [
            (case.name, partial(layers.measure_case, case, entrants, options.phases, options.rounds, options.device))
            for case in cases.grid(options.grid)
        ]
    if options.steps:
        work += [
            (case.name, partial(_step_rows, case, step_names, options))
            for case in steps.step_cases(quick=options.grid == "quick")
        ]
    work = [(name, job) for name, job in work if options.only.search(name)]
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for name, job in work:
            progress.update(task, description=name)
            rows += job()
            progress.advance(task)
    return rows


def _step_rows(case: StepCase, names: Sequence[str], options: _Options) -> list[Row]:
    from fastlayers_benchmarks.steps import measure_step

    return [measure_step(case, names, options.rounds, options.device)]


def _chosen(names: Sequence[str], available: Sequence[Contender], device: torch.device) -> set[str]:
    """The contenders asked for, and eager, to which all are compared."""
    from fastlayers_benchmarks import contenders, steps

    known = list(dict.fromkeys([*(contender.name for contender in available), *steps.CONTENDERS]))
    unknown = [name for name in names if name not in known]
    if unknown:
        message = f"unknown: {', '.join(unknown)}; known here: {', '.join(known)}"
        raise click.BadParameter(message, param_hint="--contender")
    chosen = {contenders.EAGER, *(names or known)}
    # A training step has one contender for this library, whose name does not say which backend serves it.
    aliases = {steps.FUSED, contenders.fused_contender(device)}
    return chosen | aliases if chosen & aliases else chosen
