"""The report as one HTML page, which has everything in it, and as Markdown beside its figures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastlayers.studies.config import Report
from fastlayers.studies.report.figures import Picture
from fastlayers.studies.report.findings import Finding
from fastlayers.studies.report.tables import NOT_AS_PUBLISHED, NOTHING, Cell, Table

READING = (
    "Measured numbers are means over the seeds ± their standard deviation (n - 1). Test: of the weights that were best "
    "in validation, or of the last ones where there are no validation images. Train, val: of the last epoch; train is "
    "the mean over the epoch's batches, in training mode. Differences are measured minus published, of accuracies in "
    "points. Published times are of the report's own hardware. Median epoch: training alone. Seeds' spread: the "
    f"standard deviation of one seed, pooled over both kinds of layers. {NOT_AS_PUBLISHED}: not the published training."
)


@dataclass(frozen=True)
class Section:
    """A study's part of the page."""

    finding: Finding
    tables: Sequence[Table]
    remarks: Sequence[str]
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Chapter:
    """A report's part of the page: the sections of its studies, and the studies of which there is nothing to show."""

    report: Report
    sections: Sequence[Section]
    others: Sequence[Finding]


def html(chapters: Sequence[Chapter], failures: dict[str, str], runs: int) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("fastlayers.studies.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    page = environment.get_template("page.html")
    return page.render(chapters=chapters, failures=failures, runs=runs, reading=READING, nothing=NOTHING)


def markdown(chapters: Sequence[Chapter], failures: dict[str, str], runs: int, plots: str) -> str:
    """The same as Markdown; figures are linked in the folder `plots`."""
    parts = ["# The studies", f"{runs} finished runs." if runs else "There is no finished run.", READING]
    if failures:
        parts += ["## Failed runs", _list([f"`{name}`: {_escaped(reason)}" for name, reason in failures.items()])]
    for chapter in chapters:
        parts += [f"## {chapter.report.letter}. {_escaped(chapter.report.title)}", _escaped(chapter.report.notes)]
        for section in chapter.sections:
            parts += _section(section, plots)
        if chapter.others:
            names = "; ".join(f"{each.study.id} {_escaped(each.study.title)}" for each in chapter.others)
            parts.append(f"Not run yet: {names}.")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _section(section: Section, plots: str) -> list[str]:
    study = section.finding.study
    expected = f"What the report states: {_escaped(study.expected)}" if study.expected else ""
    parts = [f"### {study.id}. {_escaped(study.title)}", _escaped(study.notes), expected]
    for table in section.tables:
        parts += [f"**{table.title}**", _table(table)]
    failed = [f"failed: `{name}`: {_escaped(reason)}" for name, reason in section.finding.failures.items()]
    parts.append(_list([*map(_escaped, section.remarks), *failed]))
    return [*parts, *(f"![{picture.caption}]({plots}/{picture.name})" for picture in section.pictures)]


def _table(table: Table) -> str:
    heading = [column.heading for column in table.columns]
    rule = [":--" if column.is_text else "--:" for column in table.columns]
    rows: list[Sequence[Cell]] = [heading, rule, *table.rows]
    return "\n".join("| " + " | ".join(_escaped(cell or NOTHING) for cell in row) + " |" for row in rows)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _escaped(text: str) -> str:
    """Text in one line in which neither tables nor HTML begin."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
