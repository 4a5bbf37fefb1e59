"""What finished runs say, beside what was published: tables in the terminal, a page, Markdown, and plots.

`findings` sorts the results by study; `tables` makes text of them; `curves`, `comparisons`, `landscape` and `formulas`
draw, `figures` knows which study has which plots; `page` and `terminal` put it all together.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastlayers.studies.report import figures, page, tables, terminal
from fastlayers.studies.report.findings import Finding, collect
from fastlayers.studies.results import Store
from fastlayers.writing import write_whole

PAGE = "index.html"
MARKDOWN = "report.md"
PLOTS = "plots"


def write(out: Path) -> Path:
    """Writes the report of the runs in `out`: `index.html`, `report.md` and `plots/*.png`, there.

    Returns:
        The path of the page, which needs no other file.

    Raises:
        ResultError: a run's result, or what it recorded, cannot be read; the message names the file.
    """
    findings = collect(out)
    store = Store(out)
    chapters = [
        page.Chapter(
            report,
            [_section(finding, store) for finding in of_studies if finding.is_shown],
            [finding for finding in of_studies if not finding.is_shown],
        )
        for report, of_studies in findings.reports
    ]
    for chapter in chapters:
        for section in chapter.sections:
            for picture in section.pictures:
                write_whole(out / PLOTS / picture.name, picture.content)
    failures = dict(findings.failures)
    write_whole(out / MARKDOWN, page.markdown(chapters, failures, findings.runs, PLOTS))
    write_whole(out / PAGE, page.html(chapters, failures, findings.runs))
    return out / PAGE


def show(console: Console, out: Path) -> None:
    """Prints the tables of the runs in `out`.

    Raises ResultError for a result that cannot be read.
    """
    terminal.print_findings(console, collect(out))


def _section(finding: Finding, store: Store) -> page.Section:
    return page.Section(
        finding, tables.tables(finding), tables.remarks(finding), list(figures.pictures(finding, store))
    )
