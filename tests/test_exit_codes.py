"""The exit code of a command, also if the reader of its output closed the pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

import treadle.cli
from treadle.cli.application import LEFT
from treadle.interrupted_loading import is_command

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


# -- Ctrl-C ------------------------------------------------------------------------------------------------------


INTERRUPTING = """
import os, signal, sys

class Interrupting:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED_MODULE"]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting)
"""


def interrupted_at(module: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python, which gets a Ctrl-C while it imports a module."""
    (folder / "sitecustomize.py").write_text(INTERRUPTING)
    path = os.pathsep.join([str(folder), str(Path(treadle.cli.__file__).parent.parent.parent)])
    environment = os.environ | {"PYTHONPATH": path, "INTERRUPTED_MODULE": module}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["-m", "treadle", "--version"], ["-m", "treadle.demo"], ["treadle", "--version"]])
@pytest.mark.parametrize("module", ["numpy", "treadle.ir.errors"])
def test_an_interrupt_while_a_command_is_loaded_ends_it_quietly(module: str, words: list[str], tmp_path: Path) -> None:
    if words[0] != "-m":  # the script that pip installs
        Path("treadle").write_text("import sys\nfrom treadle.__main__ import main\nsys.exit(main())\n")
    done = interrupted_at(module, tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("module", ["treadle.cli", "treadle.cli.models", "treadle.reporting.zoo"])
def test_an_interrupt_of_a_command_ends_it_quietly(module: str, tmp_path: Path) -> None:
    """The last module is loaded by the command itself."""
    for more in ([], ["--json"]):
        done = interrupted_at(module, tmp_path, "-m", "treadle", "models", *more)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_program_that_imports_treadle_keeps_its_interrupts(tmp_path: Path) -> None:
    program = "import signal\nimport treadle\nprint(signal.getsignal(2) is signal.default_int_handler)"
    Path("program.py").write_text(program)
    for words in (["-c", program], ["program.py"], ["-m", "program"]):
        assert interrupted_at("", tmp_path, *words).stdout == "True\n"
        assert "KeyboardInterrupt" in interrupted_at("numpy", tmp_path, *words).stderr


def test_commands_are_recognized_by_their_arguments() -> None:
    for words, python in (
        (["/usr/bin/treadle", "models"], ["python", "/usr/bin/treadle", "models"]),
        (["/venv/treadle.exe"], []),
        (["/venv/treadle-script.py"], []),
        (["-m", "models"], ["python", "-m", "treadle", "models"]),
        (["-m"], ["python", "-X", "dev", "-mtreadle"]),
        (["-m"], ["python", "-P", "-m", "treadle.demo"]),
    ):
        assert is_command(words, python)
    for words, python in (
        ([""], ["python"]),
        ([], []),
        (["-c"], ["python", "-c", "import treadle"]),
        (["train.py", "treadle"], ["python", "train.py", "treadle"]),
        (["-m", "treadle"], ["python", "-m", "pytest", "treadle"]),
        (["-m"], ["python", "-m", "treadle.chatting.template_worker"]),
    ):
        assert not is_command(words, python)
