"""Examples in README and docs: every `python` block runs, and prints the `text` block after it.

Blocks of one page run in order, in one namespace. If a block raises a TreadleError, the `text` block after it is the
text of the error.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.backends.numpy.destinations import NUMPY
from treadle.backends.onnx.spelling import SPELLINGS as ONNX
from treadle.backends.torch.spelling import TORCH
from treadle.backends.tvm.kernels.arithmetic.vector_math import ADDED, FUNCTIONS
from treadle.ir.errors import TreadleError
from treadle.ir.op_registry import OPS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "dsl",
            "architecture",
            "cli",
            "comparing",
            "devices",
            "generation",
            "gpu",
            "kernels",
            "memory",
            "onnx",
            "onnx-export",
            "quantization",
            "torch-import",
            "training",
            "vision",
        )
    ),
    *(f"docs/adding-{name}.md" for name in ("an-op", "a-pass", "a-backend")),
)

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def every_block(page: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield the language and the text of each block, with the `text` block that directly follows it, or None."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        behind = re.match(r"\n+```text\n(.*?)^```$", text[match.end() :], re.DOTALL | re.MULTILINE)
        yield match[1], match[2], behind[1] if behind else None


def blocks(page: str, language: str) -> Iterator[tuple[str, str | None]]:
    """Yield the blocks in a language, each with the `text` block that directly follows it, or None."""
    return ((code, expected) for kind, code, expected in every_block(page) if kind == language)


def run(code: str, namespace: dict[str, Any]) -> str:
    """Return a block's output, or the text of the error that ends it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            exec(compile(code, "model.py", "exec"), namespace)
        except TreadleError as error:
            print(error)
    return said.getvalue()


@pytest.fixture
def _own_ops() -> Iterator[None]:
    """Remove the ops that an example defines, and their code generators, when the example ends."""
    tables: list[Any] = [OPS, NUMPY.spellings, TORCH.spellings, ONNX, FUNCTIONS]
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)
    ADDED.clear()


@pytest.mark.usefixtures("_own_ops")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_and_print_what_is_shown(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples write files there
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = types.ModuleType("model")
    monkeypatch.setitem(sys.modules, "model", module)  # dataclasses look up the module there
    namespace = module.__dict__
    for code, expected in blocks(page, "python"):
        said = run(code, namespace)
        if expected is not None:
            assert said == expected, f"{page}, the block that begins with\n{code[:200]}"


def commands(page: str) -> Iterator[list[str]]:
    """Yield the `treadle` commands in a page's shell blocks."""
    for text, _ in blocks(page, "sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["treadle"] and not words[1].startswith("-"):
                yield words[1:]


@pytest.mark.parametrize("page", PAGES)
def test_shell_commands_take_the_options_that_are_shown(page: str) -> None:
    """Each command line is parsed by typer without being run; a wrong name or option fails."""
    import typer

    from treadle.cli import app

    group = typer.main.get_command(app)
    for words in commands(page):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        with command.make_context(words[0], list(words[1:])):
            pass


def test_links_between_pages_lead_somewhere() -> None:
    for page in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        folder = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (folder / target).exists(), f"{page} links to {target}"


def test_the_pages_of_the_language_and_of_ops_have_all_its_words() -> None:
    import treadle.frontends.language as language

    inside = {"size"}  # tracing and differentiation add these ops themselves
    page = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("docs/dsl.md", "docs/ops.md"))
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", re.sub(_BLOCK, "", page)))))
    ours = {
        name for name, op in OPS.items() if op.__module__.startswith("treadle.ir.") and op.is_word
    }  # tests register further ops
    known = {*dir(language)} & {*vars(language), *ours} - inside - {
        "Factor",
        "Model",
        "trace",
    }  # for extensions
    assert sorted(known - words) == []


def test_files_that_pages_name_are_there() -> None:
    for page in PAGES:
        text = re.sub(_BLOCK, "", (ROOT / page).read_text(encoding="utf-8"))
        for name in re.findall(
            r"\b(?:treadle|ir|frontends|passes|backends|models|runtime|docs)/\w+\.(?:py|md)\b", text
        ):
            assert (ROOT / name).is_file(), f"{page} names {name}"


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_index_of_docs_lists_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", text))
    assert sorted({path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} - listed) == []
