"""The words of `treadle launch`: its own options, then the command of the ranks, with or without `--`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle.cli import app

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
