"""The glossary: one line for each term, sorted, with a link to a module that exists. Also: links to headings of all
pages.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"\| (?P<term>[^|]+) \| (?P<meaning>[^|]+) \| \[(?P<name>[^]]+)\]\((?P<link>[^)]+)\) \|")


def rows() -> list[re.Match[str]]:
    """Return the rows of the glossary's table. Fails if a line of the table has another form."""
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    matches = [ROW.fullmatch(line) for line in table]
    assert not [line for line, match in zip(table, matches, strict=True) if match is None]
    return [match for match in matches if match]


def test_terms_are_in_alphabetical_order_and_unique() -> None:
    terms = [re.sub(r"[^a-z ]", "", row["term"].lower()) for row in rows()]
    assert len(terms) > 50
    assert terms == sorted(set(terms))


def test_each_term_links_to_a_module() -> None:
    for row in rows():
        assert row["link"] == f"../{row['name']}", row["term"]
        assert (ROOT / row["name"]).is_file(), f"{row['term']} links to {row['name']}"
        assert row["name"].endswith(".py"), row["term"]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub derives them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        linked = folder / target if target else ROOT / page
        assert anchor in anchors(linked), f"{page} links to {target}#{anchor}"
