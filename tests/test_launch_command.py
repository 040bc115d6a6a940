"""The words of `treadle launch`: its own options, then the command of the ranks, with or without `--`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import treadle
from treadle import progress
from treadle.cli import app
from treadle.ir.errors import UsageError
from treadle.runtime.distributed.launching import launch_ranks
from treadle.runtime.distributed.rank_reports import REPORTS

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["run", "gpt2", "--mesh", "tp=2", "--recipe", "megatron", "--input", "tokens=1,2"]


@pytest.mark.parametrize(
    "words",
    [
        ["-n", "2", "--", *COMMAND],
        ["-n", "2", *COMMAND],
        ["--ranks=2", *COMMAND],
        ["--ranks", "2", "script.py", "--", "-n", "-h", "--mesh"],
    ],
)
def test_words_after_the_command_are_its_own(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script.py").touch()
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr("treadle.runtime.distributed.launching.launch_ranks", lambda *given: started.append(given) or 0)
    done = CliRunner().invoke(app, ["launch", *words])
    assert (done.exit_code, done.output) == (0, "")
    if "script.py" in words:
        assert started == [([sys.executable, *words[2:]], 2)]
    else:
        assert started == [([sys.executable, "-m", "treadle", *COMMAND], 2)]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (COMMAND, "launch needs the number of ranks"),
        (["--", *COMMAND], "launch needs the number of ranks"),
        ([*COMMAND, "-n", "2"], "launch needs the number of ranks before the command"),
        ([*COMMAND, "--ranks=2"], "launch needs the number of ranks before the command"),
        (["2", *COMMAND], "launch needs the number of ranks"),
        (["2", "--", *COMMAND], "launch needs the number of ranks"),
        (["-n", "2"], "launch needs a command"),
        (["-n", "2", "--"], "launch needs a command"),
        ([], "launch needs a command"),
        (["-n", "2", "--mesh", "tp=2", "run", "gpt2"], "launch has no option --mesh"),
        (["-n", "2", "--recipe=megatron", "run", "gpt2"], "launch has no option --recipe"),
    ],
)
def test_the_hint_for_a_wrong_order_starts_ranks(words: list[str], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr("treadle.runtime.distributed.launching.launch_ranks", lambda *given: started.append(given) or 0)
    done = CliRunner().invoke(app, ["launch", *words])
    assert done.exit_code == 2 and not started
    assert done.output.startswith(what)
    (hint,) = [line.split("try", 1)[1] for line in done.output.splitlines() if line.startswith("  try")]
    program, *corrected = shlex.split(hint.replace("MODEL", "gpt2"))
    assert program == "treadle" and "--" in corrected
    assert CliRunner().invoke(app, corrected).exit_code == 0
    ((command, count),) = started
    assert count == 2 and command[:5] == [sys.executable, "-m", "treadle", "run", "gpt2"]
    if {*COMMAND} <= {*words}:
        assert command[3:] == COMMAND


def test_an_artifact_is_not_given_a_mesh() -> None:
    done = CliRunner().invoke(app, ["launch", "-n", "2", "run", "split.treadle"])
    assert done.exit_code == 2 and "--mesh" not in done.output
    assert "treadle shard split.treadle --lab" in done.output


def test_hints_of_a_rank_start_ranks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank is a process with the words of its command alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREADLE_LAUNCHER", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = ["run", "gpt3", "--mesh", "tp=3", "--recipe", "megatron"]
    monkeypatch.setattr(sys, "argv", ["treadle", *line])
    said = CliRunner().invoke(app, ["compile", "gpt3"]).output
    assert "launch" not in said, "the hint is for another command"
    Path("small.py").write_text("import treadle as t\n\n@t.model\ndef small(x: t.f32['B 4']):\n    return x * 2.0\n")
    monkeypatch.setattr(sys, "argv", ["treadle", "inspect", "smal.py:small"])
    said = CliRunner().invoke(app, ["inspect", "smal.py:small"]).output
    assert "try       treadle launch -n 3 -- inspect small.py:small" in said


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_of_all_ranks_is_printed_once(as_json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Treadle's own failures and errors before the ranks are connected, too. Other errors are printed beside them."""
    monkeypatch.setenv(REPORTS, str(tmp_path))

    def printed(problem: Exception) -> str:
        def fail(*_: object) -> None:
            raise problem

        monkeypatch.setattr("treadle.reporting.zoo.zoo_facts", fail)
        return CliRunner().invoke(app, ["models", *["--json"] * as_json]).output

    for problem in (KeyError("a"), KeyError("b"), UsageError("a"), UsageError("a", received="b")):
        assert "a" in (first := printed(problem)) or "b" in first
        assert printed(problem) == ""
        if as_json:
            assert json.loads(first).keys() == {"error"}


def test_an_uncaught_error_of_all_ranks_of_a_script_is_printed_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        'import os, treadle\nif os.environ["RANK"] == "2":\n    raise ValueError("of rank 2")\n{}["all"]\n'
    )
    assert launch_ranks([sys.executable, str(script)], 3, {"PYTHONPATH": str(ROOT)}) == 1
    said = capfd.readouterr().err
    assert said.count("KeyError: 'all'") == 1, said
    assert said.count("ValueError: of rank 2") == 1, said


def test_notes_are_printed_by_the_first_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(REPORTS, str(tmp_path))
    monkeypatch.setattr(progress, "_announced", set())
    for rank, printed in (("1", ""), ("0", "a note\n")):
        monkeypatch.setenv("RANK", rank)
        progress.note("a note")
        assert capsys.readouterr().err == printed


def test_another_format_keeps_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = ["compile", "gpt2", "--set", "layers=1", "--quantize", "int8", "-o", "m.onnx"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["treadle", *line])
    said = CliRunner().invoke(app, line).output
    assert "try       treadle export gpt2 --set layers=1 --quantize int8 -o m.onnx" in said
    line[-1] = "m.json"
    monkeypatch.setattr(sys, "argv", ["treadle", *line])
    assert "try       treadle export --to json gpt2 --set layers=1" in CliRunner().invoke(app, line).output


def test_an_artifact_is_not_split_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    treadle.compile("gpt2", layers=1, dim=8, heads=2, vocab=9, context=8, backend="numpy", seed=1).save("m.treadle")
    done = CliRunner().invoke(app, ["shard", "m.treadle", "--mesh", "tp=2", "--recipe", "megatron"])
    assert done.exit_code == 2
    assert done.output.startswith("an artifact is not split again")
