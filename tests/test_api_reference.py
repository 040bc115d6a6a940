"""The API reference of `make docs`: an entry for every public name, links that lead somewhere, and no other host."""

from __future__ import annotations

import ast
import html
import inspect
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import GenericAlias
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("pdoc")

import treadle
from treadle.frontends import language

ROOT = Path(__file__).resolve().parent.parent
BUILDER = ROOT / "docs" / "api_reference.py"


class Page(HTMLParser):
    """The ids of a page, its links, and the addresses that a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = re.findall(r"url\(['\"]?([^'\")]+)", text) + re.findall(r"@import[^;]+", text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag in ("a", "area"):
            self.links.append(found.get("href", ""))
        else:
            self.loaded += [found[name] for name in ("src", "href", "data", "srcset", "action") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built once, in a folder. Another process builds them, since pdoc runs blocks for type checkers."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, BUILDER, folder], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def declared_names() -> set[str]:
    """Return the public names, read from the sources of the package without importing it."""
    found: set[str] = set()
    for path in ("treadle/__init__.py", "frontends/language.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {alias.asname for alias in node.names if alias.asname}
    for path in ("treadle/entry_functions.pyi", "frontends/operations.pyi"):
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        found |= {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return {name for name in found if not name.startswith("_")}


def entries(site: Path) -> dict[str, str]:
    """Return the text of every entry of the page of `treadle`, by name, without tags."""
    page = (site / "treadle.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    docstring = re.compile(r'<div class="docstring">(.*?)</div>', re.DOTALL)
    return {
        name: " ".join(html.unescape(re.sub(r"<[^>]+>", "", " ".join(docstring.findall(text)))).split())
        for name, text in sections
    }


def test_every_public_name_has_an_entry(site: Path) -> None:
    found = entries(site)
    assert len(declared_names()) > 150
    assert sorted(name for name in declared_names() if len(found.get(name, "")) < 12) == []


def arguments(value: Any) -> list[str]:
    """Return the names of the arguments of a function or class."""
    if isinstance(value, GenericAlias):  # newer versions of Python report *args of a type such as Callable[[A], B]
        return []
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each.name for each in found if each.kind is not each.VAR_KEYWORD and each.name != "_"]


def test_every_argument_is_described(site: Path) -> None:
    """An entry may refer to the entry of another function, which then describes the argument."""
    found, missing = entries(site), []
    for name in sorted(declared_names()):
        text = found[name]
        for _ in range(2):  # an entry may refer to one that refers to a third
            for other in re.findall(r"(\w+)(?:, which)? documents the|as (?:in|for) (?:the op )?(\w+)", text):
                text += " ".join(found.get(each, "") for each in other)
        missing += [
            f"{name}({argument})"
            for argument in arguments(getattr(language if name in dir(language) else treadle, name))
            if not re.search(rf"\b{argument}\b", text)
        ]
    assert missing == []


def test_ops_have_shapes_dtypes_and_errors(site: Path) -> None:
    assert re.search(r"shapes \.\.\. \[\w+\] -> \.\.\. \[\w+\]", entries(site)["softmax"])
    for name in dir(treadle.ops):
        if getattr(language, name) is not getattr(treadle.ops, name):  # a layer has the op's name
            continue
        text = entries(site)[name]
        assert "shapes" in text and "dtypes" in text and "Raises" in text, name


def test_columns_become_tables(site: Path) -> None:
    page = (site / "treadle.html").read_text(encoding="utf-8")
    assert "<td><strong>peak</strong></td>" in page
    assert "<td><strong>learning_rate</strong></td>" in page
    convert = runpy.run_path(str(BUILDER))["columns_as_tables"]
    assert convert("A sum.\n\nx, y  a | b, on\n      two lines") == (
        "A sum.\n\n| | |\n|---|---|\n| **x, y** | a \\| b, on two lines |"
    )
    assert convert("z = x\ny = a*b") == "    z = x\n    y = a*b"
    assert convert("a *b* <i>, `a*b`") == r"a \*b\* &lt;i>, `a*b`"


def test_every_link_leads_to_a_page_and_an_entry(pages: dict[Path, Page]) -> None:
    count, broken = 0, []
    for path, page in pages.items():
        for link in page.links:
            if link == "https://pdoc.dev":  # the generator's name links to its site
                continue
            place, _, part = link.partition("#")
            target = (path.parent / unquote(place)).resolve() if place else path
            if target not in pages or (part and unquote(part) not in pages[target].ids):
                broken.append(f"{path.name} links to {link}")
            count += 1
    assert broken == []
    assert count > 500


def test_pages_load_nothing_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        loaded = [each for each in page.loaded if not each.startswith(("data:", "#"))]
        assert [each for each in loaded if "//" in each] == [], path.name
        assert all((path.parent / each).resolve().is_file() for each in loaded if each.endswith((".css", ".js")))
        scripts = " ".join(re.findall(r"<script.*?</script>", path.read_text(encoding="utf-8"), re.DOTALL))
        addresses = set(re.findall(r"https?://[\w./-]+", scripts))
        assert {address for address in addresses if "w3.org" not in address} <= {"http://elasticlunr.com"}, path.name


def test_make_docs_uses_the_extra() -> None:
    recipe = r"^docs: \.venv/ready-docs .*\n\t@\$\(VENV_PYTHON\) docs/api_reference\.py build/docs$"
    assert re.search(recipe, (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
