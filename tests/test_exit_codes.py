"""The exit code of a command, also if the reader of its output closed the pipe."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TextIO

import pytest

import treadle.cli
from treadle.cli.application import LEFT

MODEL = """
import treadle as t

@t.model
def small(x: t.f32["B 4"]):
    return t.relu(x)

@t.model
def failing(x: t.f32["B 4"]):
    return t.no_such_word(x)
"""


def left() -> TextIO:
    """Return a pipe whose reader has closed it."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)


def code_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["treadle", *words])
    with pytest.raises(SystemExit) as ended:
        treadle.cli.main()
    return ended.value.code


CODES: list[tuple[list[str], int, int]] = [  # the exit code, and the exit code with a closed pipe
    (["inspect", "m.py:small"], 0, 0),
    (["inspect", "m.py:small", "--json"], 0, 0),
    (["explain", "m.py:small", "fusion"], 0, 0),
    (["explain", "m.py:small", "fusion", "--expect", "attention=0"], 0, LEFT),
    (["explain", "m.py:small", "fusion", "--expect", "attention=1"], 1, LEFT),
    (["diff", "m.py:small"], 0, 0),
    (["diff", "m.py:small", "--fail-if", "added>0"], 0, LEFT),
    (["diff", "m.py:small", "--fail-if", "added=0"], 1, LEFT),
    (["diff", "m.py:small", "--fail-if", "aded>0"], 2, 2),
    (["verify", "m.py:small", "--backend", "numpy"], 0, LEFT),
    (["shard", "m.py:small", "--mesh", "dp=2", "--recipe", "dp"], 0, 0),
    (["shard", "m.py:small", "--mesh", "dp=2", "--recipe", "dp", "--lab"], 0, LEFT),
    (["inspect", "m.py:failing"], 2, 2),
    (["inspect", "m.py:failing", "--json"], 2, 2),
    (["inspect"], 2, 2),
    (["inspect", "--json"], 2, 2),
    (["inspect", "--no-such-option", "x", "--json"], 2, 2),
    (["--help"], 0, 0),
    (["-h"], 0, 0),
    (["inspect", "--help"], 0, 0),
    (["--version"], 0, 0),
]


@pytest.mark.parametrize(("words", "code", "alone"), CODES, ids=[" ".join(words) for words, _, _ in CODES])
def test_a_reader_that_left_changes_the_code_of_an_answer_alone(
    words: list[str], code: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_of(words, monkeypatch) == code
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, left())
    assert code_of(words, monkeypatch) == alone


def test_a_fault_of_our_own_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*given: object, **more: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("treadle.program.source.ModelSource.open", broken)
    for more in ([], ["--json"]):
        assert code_of(["inspect", "m.py:small", *more], monkeypatch) == 1
    said = capsys.readouterr()
    assert "Treadle has failed, which is a fault of Treadle: KeyError: 'a fault'" in said.err
    assert json.loads(said.out)["error"]["kind"] == "InternalError"
    monkeypatch.setattr(sys, "stderr", left())
    assert code_of(["inspect", "m.py:small"], monkeypatch) == 1


@pytest.mark.parametrize(
    "words", [["inspect"], ["inspect", "a", "b"], ["run", "m.py:small", "--seed", "x"], ["nosuch"]]
)
def test_wrong_usage_is_one_object_of_json(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([*words, "--json"], monkeypatch) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["kind"] == "UsageError"
    named = f" {words[0]}" if words[0] in treadle.cli.COMMANDS else ""
    assert error["try"] == f"treadle{named} --help"
    assert said.err == ""


def test_an_interrupt_while_the_command_line_is_loaded_ends_it_quietly() -> None:
    class Interrupted:
        """A module finder that raises KeyboardInterrupt during the import of the command line."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "treadle.cli":
                raise KeyboardInterrupt

    program = f"{textwrap.dedent(inspect.getsource(Interrupted))}\nimport sys, runpy\n"
    program += "sys.meta_path.insert(0, Interrupted)\nrunpy.run_module('treadle', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
