"""Imports go down the layers of docs/architecture.md, never up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlayers
from tests import scripts

PACKAGE = Path(fastlayers.__file__).parent

# From the bottom up. What stands together does not import one another.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_library", "activations", "collectives", "dtypes", "pooling", "writing"),
    ("fakes",),
    ("ops",),
    ("masks", "plans"),
    ("checks",),
    ("triton",),
    ("backends",),
    ("reference",),
    ("autograd", "synchronised", "unfused"),
    ("pooled",),
    ("functional",),
    ("modules",),
    ("fusion", "models"),
    ("data", "cli"),
    ("experiments", "studies"),
    ("info",),
)
HEIGHT = {unit: height for height, units in enumerate(LAYERS) for unit in units}
# The package itself: it offers what the layers have, and commands see it as users do.
OUTSIDE = {"__init__", "__main__"}


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """The units of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastlayers":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastlayers."))


def test_every_file_belongs_to_a_layer() -> None:
    units = {unit_of(path) for path in PACKAGE.rglob("*.py")} - OUTSIDE
    assert units == set(HEIGHT)


@pytest.mark.parametrize("unit", sorted(HEIGHT))
def test_a_unit_imports_only_what_is_below_it(unit: str) -> None:
    for path in (p for p in PACKAGE.rglob("*.py") if unit_of(p) == unit):
        upwards = {
            other for other in imported(path) if other in HEIGHT and other != unit and HEIGHT[other] >= HEIGHT[unit]
        }
        assert not upwards, f"{path.relative_to(PACKAGE)} imports {upwards}, which are not below it"


def test_reading_the_imports_sees_them() -> None:
    assert "functional" in set(imported(PACKAGE / "modules" / "batch_norm.py"))
    assert "masks" in set(imported(PACKAGE / "functional.py"))


def test_import_brings_no_compiler(tmp_path: Path) -> None:
    """torch.compile and what it needs, SymPy among it, take as long to import as all of torch."""
    script = "import sys, torch; before = set(sys.modules); import fastlayers; print(*(set(sys.modules) - before))"
    brought = scripts.output_of(script, tmp_path).split()
    assert "fastlayers.functional" in brought
    assert not {"torch._dynamo", "torch.export", "sympy"} & set(brought)
