"""The check of plain English: each kind of finding in planted sources, and the allowed counts of this tree."""

import json
from pathlib import Path

import pytest

from tests import plain_english
from tests.plain_english import counts, findings_in_page, findings_in_source


def kinds(source: str, file: str = "ir/planted.py") -> list[tuple[str, int]]:
    """Return kind and line of all findings in a planted source, in the order of lines."""
    return sorted(((f.kind, f.line) for f in findings_in_source(source, file)), key=lambda pair: (pair[1], pair[0]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""What it does."""', [("openings", 1)]),
        ('"""A plan of what is stored."""', []),
        ('class A:\n    """Whether it holds."""', [("openings", 2)]),
        ('class A:\n    x: int = 0\n    """How many."""', [("openings", 3)]),
        ('def f():\n    """A result that nobody reads."""', [("public", 2)]),
        ('def _f():\n    """A result that nobody reads."""', [("elsewhere", 2)]),
        ('class _A:\n    def f(self):\n        """Computed anew."""', [("elsewhere", 3)]),
        ('def f():\n    def g():\n        """Computed anew."""', [("elsewhere", 3)]),
        ("x = 1  # computed anew", [("elsewhere", 1)]),
        ('raise ValueError("the loss is no number")', [("messages", 1)]),
        ('x = f"{y} is told at last"', [("messages", 1), ("messages", 1)]),
        ('x = """\n\nIt is told.\n"""', [("messages", 3)]),
        ('x = "told"', []),
        ('"""Return `told` and {told}."""', []),
        ("told = 1", [("identifiers", 1), ("participles", 1)]),
        ("class StepTold: pass", [("identifiers", 1)]),
        ("def f(given, _held): return given", [("participles", 1), ("participles", 1)]),
        ("def f():\n    found = 1\n    return found", []),
        ("class A:\n    made: int\n    _kept: int", [("participles", 2)]),
        ("if X:\n    def found(): ...", [("participles", 2)]),
    ],
)
def test_a_planted_source_has_these_findings(source: str, expected: list[tuple[str, int]]) -> None:
    assert kinds(source) == expected


def test_tests_are_counted_apart_from_the_product() -> None:
    assert kinds('"""What it does."""\nx = "is told"\ndef f(made): ...', "tests/planted.py") == [
        ("openings", 1),
        ("elsewhere", 2),
    ]


def test_pages_and_decisions_are_counted_apart() -> None:
    text = "Each refusal is told.\n\nIt is computed again, at\nlast, by whoever asks."
    assert [(f.kind, f.line) for f in findings_in_page(text, "docs/a.md")] == [("pages", 1), ("pages", 4)]
    assert {f.kind for f in findings_in_page(text, "docs/decisions/0001-a.md")} == {"elsewhere"}


def test_words_inside_other_words_are_not_counted() -> None:
    assert kinds('x = "untold intellect: a teller, the price of"') == [("messages", 1)]


def test_counts_are_by_kind_and_folder() -> None:
    findings = [*findings_in_source("told = 1", "ir/a.py"), *findings_in_page("told it", "README.md")]
    found = counts(iter(findings))
    assert found["identifiers"] == {"ir": 1}
    assert found["pages"] == {".": 1}
    assert found["openings"] == {}


def test_lowering_never_raises_a_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "allowed.json"
    file.write_text(json.dumps({"openings": {"ir": 1}, "pages": {"docs": 5}}))
    monkeypatch.setattr(plain_english, "ALLOWED", file)
    planted = [
        *findings_in_source('"""What."""\ndef f():\n    """How."""', "ir/a.py"),
        *findings_in_page("told it", "docs/a.md"),
    ]
    monkeypatch.setattr(plain_english, "all_findings", lambda: iter(planted))
    monkeypatch.setattr("sys.argv", ["plain_english", "--lower"])
    assert plain_english.main() == 1  # two openings, of which one is allowed
    lowered = json.loads(file.read_text())
    assert lowered["openings"] == {"ir": 1}
    assert lowered["pages"] == {"docs": 1}
