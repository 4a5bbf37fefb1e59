"""The report as text for a terminal."""

from __future__ import annotations

import textwrap

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from fastlayers.studies.report.findings import Finding, Findings
from fastlayers.studies.report.tables import NOTHING, Table, remarks, short_tables

_HEADING_WIDTH = 10
_ENDLESS = 1000


def print_findings(console: Console, findings: Findings) -> None:
    """Prints every study of which a run is finished or failed; names of runs may have brackets, which are no markup."""
    if not findings.runs:
        console.print("There is no finished run.")
    for report, of_studies in findings.reports:
        shown = [finding for finding in of_studies if finding.trained or finding.failures]
        if shown:
            console.print(Text(f"{report.letter}. {report.title}", style="bold underline"))
        for finding in shown:
            _print_finding(console, finding)
    for name, reason in findings.failures.items():
        console.print(Text(f"failed: {name}: {reason}", style="red"))


def _print_finding(console: Console, finding: Finding) -> None:
    console.print()
    console.print(Text(f"{finding.study.id}. {finding.study.title}", style="bold"))
    for table in short_tables(finding):
        _print_whole(console, _rich(table))
    for remark in remarks(finding):
        console.print(Text(remark, style="dim"))


def _print_whole(console: Console, table: RichTable) -> None:
    """Prints a table; where the terminal is too narrow, lines go on in the next one rather than lose numbers."""
    least = Measurement.get(console, console.options.update(width=_ENDLESS), table).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False, soft_wrap=least > console.width)


def _rich(table: Table) -> RichTable:
    printed = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        title=table.title,
        title_justify="left",
    )
    for column in table.columns:
        heading = textwrap.fill(column.heading, _HEADING_WIDTH, break_long_words=False)
        cells = [cell or NOTHING for cell in column.cells]
        # Names may be broken between words, numbers not at all.
        parts = [word for cell in cells for word in cell.split()] if column.is_text else cells
        printed.add_column(
            Text(heading),
            justify="left" if column.is_text else "right",
            no_wrap=not column.is_text,
            min_width=max(map(len, [*parts, *heading.splitlines()])),
        )
    for row in table.rows:
        printed.add_row(*(Text(cell or NOTHING) for cell in row))
    return printed
