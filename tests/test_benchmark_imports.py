"""The names that benchmarks import exist: no other test imports all benchmarks on every change."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests" / "fuzz").glob("*.py")])


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield modules of ours that a file imports, also inside functions, each with a name that it imports from there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("treadle", "tests"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_of_benchmarks_exist(path: Path) -> None:
    for module, name in imported(path):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] in ("treadle", "tests"):
                raise
            continue  # an extra that is not here
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
