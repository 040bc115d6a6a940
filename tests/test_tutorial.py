"""docs/tutorial.md: every block runs in the page's order, and prints what is shown.

`...` in a block of output stands for any text.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for _name in ("openai", "starlette", "tokenizers", "uvicorn"):
    pytest.importorskip(_name)

from tests.command_line import Treadle, commands_in
from tests.test_readme import ROOT, every_block, run

PAGE = "docs/tutorial.md"
PORT = "8000"


def matches(printed: str, expected: str) -> bool:
    """Return True if output is as expected, where `...` stands for any text."""
    pattern = ".*?".join(map(re.escape, expected.split("...")))
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


class Page:
    """The tutorial while it runs: the namespace of its Python blocks, the commands, and the server."""

    def __init__(self, command: Treadle) -> None:
        self.command = command
        self.module = types.ModuleType("model")
        self.server: subprocess.Popen[str] | None = None
        self.port = PORT
        self.count = {"python": 0, "sh": 0, "text": 0}

    def python(self, code: str) -> str:
        if self.count["python"] == 1:  # "Save this as model.py"
            Path("model.py").write_text(code, encoding="utf-8")
        return run(code.replace(f":{PORT}/", f":{self.port}/"), self.module.__dict__)

    def sh(self, lines: str) -> str:
        """Run the commands of a block. The installation is not run; its extras are checked elsewhere."""
        printed = ""
        for line in lines.splitlines():
            first, *words = shlex.split(line, comments=True)
            if first in ("git", "python3", ".", "pip"):
                continue
            assert first == "treadle", line
            if words[0] == "serve":
                self.serve(words)
                continue
            done = self.command(*words)
            assert done.code == 0, f"{line}\n{done.out}{done.err}"
            printed += done.out
        return printed

    def serve(self, words: list[str]) -> None:
        """Start a server on a free port, in the background."""
        words[words.index("--port") + 1] = "0"
        command = [sys.executable, "-m", "treadle", *words, "--json"]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        printed = ""
        for line in self.server.stdout:
            printed += line
            if line == "}\n":  # the end of the object
                break
        facts = json.loads(printed)
        self.port = re.findall(r":(\d+)/", facts["address"])[0]


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    made = Page(commands_in(tmp_path, capsys, monkeypatch))
    monkeypatch.setitem(sys.modules, "model", made.module)
    yield made
    if made.server is not None:
        made.server.send_signal(signal.SIGINT)
        assert made.server.wait(timeout=60) == 0


def test_every_block_runs_and_prints_what_is_shown(page: Page) -> None:
    for language, code, expected in every_block(PAGE):
        page.count[language] += 1
        printed: Any = {"python": page.python, "sh": page.sh, "text": lambda _: ""}[language](code)
        if expected is not None:
            assert matches(printed, expected), f"{code}\nprinted\n{printed}\nexpected\n{expected}"
    assert page.count["python"] >= 7
    assert page.count["sh"] >= 6
    assert page.count["text"] >= 8
    assert page.server is not None


def test_the_port_is_free_to_choose() -> None:
    """The page names one port. The test replaces it, so that two tests may run at once."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert text.count(PORT) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))


def test_the_extras_to_install_are_there() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert set(re.findall(r"pip install '\./treadle\[([\w,]+)\]'", text)[0].split(",")) <= set(extras)
