"""The `fastlayers study` command: list, show, run and report."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlayers.cli import needs_extra

if TYPE_CHECKING:
    from rich.console import Console

    from fastlayers.studies.config import Run, Study, Training
    from fastlayers.studies.results import Job
    from fastlayers.studies.runner import Machine
    from fastlayers.studies.sweep import Finished

OUT = Path("studies")


@click.group(short_help="The published experiments, run again.")
def study() -> None:
    """The experiments of five published reports on MLPs, CNNs, ResNets, VGG and LeNet.

    Each row of their tables is a run; a table, or a plot, is a study.
    """


@study.command("list")
def list_studies() -> None:
    """Lists the studies."""
    with needs_extra("studies"):
        from rich.console import Console
        from rich.table import Table

        from fastlayers.studies import config
    console = Console()
    for report in config.reports():
        table = Table(
            "study", "what", "data", "runs", title=f"{report.letter}. {report.title}", title_justify="left", box=None
        )
        for each in report.studies:
            table.add_row(each.id, each.title, ", ".join(_datasets(each)), str(len(each.runs)))
        console.print(table, "")


@study.command()
@click.argument("name")
def show(name: str) -> None:
    """Shows study NAME, such as A2: its runs, their settings, and what was published."""
    with needs_extra("studies"):
        from rich.console import Console
        from rich.table import Table
    console = Console()
    found = _study(name)
    report = _report_of(found)
    console.print(f"[bold]{found.id}. {found.title}[/]\n{report.title}\n")
    for text in (report.notes, found.notes, found.expected and f"Expected: {found.expected}"):
        if text:
            console.print(" ".join(text.split()) + "\n", highlight=False)
    table = Table("run", "published", "settings", show_lines=True)
    for run in found.runs:
        published = run.published.model_dump(exclude_none=True)
        settings = "\n".join(_flat(run.training.model_dump(exclude_defaults=True)))
        table.add_row(run.name, "\n".join(f"{key} {value:g}" for key, value in published.items()), settings)
    if found.runs:
        console.print(table)


@study.command("run")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--dataset",
    type=click.Choice(["cifar10", "mnist", "digits"]),
    help="The images.  [default: the study's own where --data-dir or --download is given, otherwise digits]",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    envvar="FASTLAYERS_DATA",
    show_envvar=True,
    help="Folder of the official files.",
)
@click.option("--download", is_flag=True, help="Fetch official files that are missing.")
@click.option("--only", multiple=True, metavar="RUN", help="Only the run of this name; may be given again.")
@click.option("--epochs", type=click.IntRange(min=1), help="[default: as published]")
@click.option(
    "--fraction", type=click.FloatRange(0, 1, min_open=True), help="Share of the images to use.  [default: 1]"
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="How many times, with seeds 0, 1, ..."
)
@click.option(
    "--patience", type=click.IntRange(min=1), help="Stop early after so many evaluations without a better one."
)
@click.option("--layers", type=click.Choice(["fastlayers", "torch", "both"]), default="fastlayers", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that share each batch."
)
@click.option(
    "--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines, each with --devices."
)
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each process.  [default: torch's]")
@click.option("--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]", help="Hand the runs to a Ray cluster.")
@click.option("--progress/--no-progress", default=None, help="Progress bars.  [default: where there is a terminal]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, show_default=True)
@click.pass_context
def run_studies(ctx: click.Context, /, names: Sequence[str], ray: str | None, out: Path, **options: Any) -> None:
    """Does the runs of studies NAME..., such as B1 B2, or of "all", that are not done yet.

    What is stopped, by Ctrl-C or worse, goes on from its last epoch when the same command is given again. Exits with 1
    where a run failed; the others are done all the same.
    """
    with needs_extra("ray" if ray else "studies"):
        from rich.console import Console

        from fastlayers.studies import sweep
        from fastlayers.studies.runner import Machine

        if ray:
            import ray as _  # noqa: F401  # said here rather than in the middle of the work
    console = Console()
    if options["progress"] is None:
        options["progress"] = sys.stderr.isatty()
    machine = Machine(out=out.resolve(), **{key: options[key] for key in Machine.model_fields if key in options})
    jobs = list(_jobs(_chosen(names, options["only"]), options, console))
    console.print(f"{len(jobs)} runs, results in {out}", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    if not jobs:
        console.print("Nothing is trained for that; `fastlayers study report` draws it.")
    _check_data(jobs, machine)
    if ray:
        finished = sweep.by_ray(jobs, machine, None if ray == "local" else ray)
    else:
        finished = sweep.in_turn(jobs, machine, lambda job: console.print(f"[bold]{job.folder}[/]", highlight=False))
    failed = sum(_tell(console, each) for each in finished)
    if failed:
        ctx.exit(1)


@study.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path), default=OUT)
def report(out: Path) -> None:
    """Puts the finished runs in OUT beside what was published: tables, plots, and a page for the browser."""
    with needs_extra("studies"):
        from rich.console import Console

        from fastlayers.studies import report as reporting
        from fastlayers.studies.results import ResultError
    console = Console()
    try:
        reporting.show(console, out)
        console.print(f"Page: {reporting.write(out)}", highlight=False)
    except ResultError as error:
        raise click.ClickException(str(error)) from error


def _study(name: str) -> Study:
    from fastlayers.studies import config

    try:
        return config.study(name)
    except config.UnknownStudyError as error:
        raise click.BadParameter(str(error)) from error


def _report_of(found: Study) -> Any:
    from fastlayers.studies import config

    return next(report for report in config.reports() if found in report.studies)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested settings as lines, such as "network.drop_p = 0.4"."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value}"


def _datasets(study: Study) -> list[str]:
    return sorted({run.training.dataset for run in study.runs})


def _chosen(names: Sequence[str], only: Sequence[str]) -> Iterator[Run]:
    """The runs of the studies `names`, or those of them whose name is in `only`."""
    from fastlayers.studies import config

    everything = [study for report in config.reports() for study in report.studies]
    studies = everything if "all" in names else [_study(name) for name in names]
    runs = [run for study in studies for run in study.runs]
    unknown = set(only) - {run.name for run in runs}
    if unknown:
        raise click.BadParameter(f"--only: no run {sorted(unknown)}; there are {[run.name for run in runs]}")
    yield from (run for run in runs if not only or run.name in only)


def _jobs(runs: Iterable[Run], options: dict[str, Any], console: Console) -> Iterator[Job]:
    """One job per run, layers and seed, in an order in which what is compared is done one after the other.

    A training that several studies have is done once.
    """
    from fastlayers.studies.results import Job, Layers

    layers: list[Layers] = ["fastlayers", "torch"] if options["layers"] == "both" else [options["layers"]]
    stand_ins: set[str] = set()
    trainings = {run.training.key: run.training for run in runs}
    for key, training in trainings.items():
        for seed in range(options["seeds"]):
            for kind in layers:
                changed = _changed(training, options, stand_ins)
                yield Job(published=key, training=changed, layers=kind, seed=seed, precision=options["precision"])
    for name in sorted(stand_ins):
        console.print(
            f"scikit-learn's digits stand in for {name}, for neither --dataset, --data-dir nor --download is given."
        )


def _changed(training: Training, options: dict[str, Any], stand_ins: set[str]) -> Training:
    """The training as the command line wants it; `stand_ins` takes the data sets that digits replace unasked."""
    changes = {key: options[key] for key in ("dataset", "epochs", "fraction", "patience") if options[key] is not None}
    if "dataset" not in changes and options["data_dir"] is None and not options["download"]:
        stand_ins.add(training.dataset)
        changes["dataset"] = "digits"
    # An evaluation every five epochs, of two, would never come.
    changes["test_every"] = min(training.test_every, changes.get("epochs", training.epochs))
    return training.model_copy(update=changes)


def _check_data(jobs: Iterable[Job], machine: Machine) -> None:
    """Loads every data set once: what is missing is fetched before several processes want it, or said at once."""
    from fastlayers.data import DataError
    from fastlayers.studies import runner

    trainings = {(job.training.dataset, job.training.fraction): job.training for job in jobs}
    try:
        for training in trainings.values():
            runner.load(training, machine)
    except (DataError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _tell(console: Console, finished: Finished) -> bool:
    """Says what became of a run; whether it failed."""
    name = finished.job.folder
    if finished.outcome == "failed":
        console.print(f"failed: {name}: {finished.reason}", highlight=False, markup=False, style="red")
    else:
        console.print(f"{finished.outcome}: {name}", highlight=False)
    return finished.outcome == "failed"
