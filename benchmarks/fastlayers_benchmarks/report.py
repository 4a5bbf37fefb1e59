"""The record as tables: in the terminal with losses in red, and as Markdown with losses marked."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fastlayers.writing import write_whole
from fastlayers_benchmarks import summary
from fastlayers_benchmarks.record import Record
from fastlayers_benchmarks.summary import Cell, Table

LOSS_MARK = "▼"


def show(console: Console, record: Record) -> None:
    """Prints the record."""
    for line in summary.heading(record):
        console.print(Text(line))
    for setting in record.settings:
        console.rule(Text(setting.title))
        for table in summary.tables(setting):
            console.print(_rich_table(table))
            console.print()
    for line in summary.not_measured(record):
        console.print(Text(f"Not measured: {line}"))
    console.print(Text.assemble(("Red", "bold red"), " is a loss."))


def _rich_table(table: Table) -> RichTable:
    rich_table = RichTable(
        title=table.title,
        caption=table.note or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        padding=0,
        pad_edge=False,
    )
    for number, column in enumerate(table.columns):
        label = number < table.labels
        rich_table.add_column(column, justify="left" if label else "right", no_wrap=label)
    before = ""
    for row in table.rows:
        name = row[0].text
        # What the row above says already is left out.
        cells = [row[0] if name != before or table.labels == 1 else Cell(""), *row[1:]]
        rich_table.add_row(*(Text(cell.text, style="bold red" if cell.loss else "") for cell in cells))
        before = name
    return rich_table


def save_markdown(record: Record, path: Path, pictures: list[Path]) -> None:
    """Writes the record as a page for docs/results, with links to `pictures`."""
    parts = ["# fastlayers bench", "\n".join(f"- {line}" for line in summary.heading(record))]
    parts.append(f"**{LOSS_MARK}** marks a loss. Times are medians, interleaved in one process.")
    for setting in record.settings:
        parts.append(f"## {setting.title}")
        parts += [_markdown_table(table) for table in summary.tables(setting)]
    missing = summary.not_measured(record)
    if missing:
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in missing))
    folder = path.parent.resolve()
    parts += [f"![{p.stem}]({os.path.relpath(p.resolve(), folder)})" for p in pictures]
    write_whole(path, "\n\n".join(parts) + "\n")


def _markdown_table(table: Table) -> str:
    alignment = [":--" if number < table.labels else "--:" for number in range(len(table.columns))]
    rows = [[_markdown(cell) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in ([*table.columns], alignment, *rows)]
    note = [f"\n{table.note}"] if table.note else []
    return "\n".join([f"### {table.title}\n", *lines, *note])


def _markdown(cell: Cell) -> str:
    return f"**{cell.text} {LOSS_MARK}**" if cell.loss else cell.text
