"""What the README and the pages in docs show works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


PAGES = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]
WITH_EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_python_examples_run(page: Path) -> None:
    """All of a page, one after the other, as a reader would."""
    namespace: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, page.name, "exec"), namespace)


def test_pages_have_examples() -> None:
    assert {"README.md", "training.md", "studies.md"} <= {page.name for page in WITH_EXAMPLES}


def test_links_lead_somewhere() -> None:
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
