"""Commands run as the entry point runs them, in a folder that holds model.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import treadle.cli

MODEL = """\
import treadle as t


@t.model
def small(tokens: t.i64["B S"], lengths: t.i64["B"] | None, *, dim=8, layers=2, act=t.gelu):
    \"\"\"A small encoder.\"\"\"
    x = t.embed(tokens, 10, dim, name="wte")
    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("h", layers):
        x += t.self_attention(x, 2, mask=mask, name="attn")
        x += t.mlp(x, 16, act=act, name="mlp")
    return {"hidden": x}


@t.model
def wrong_axis(x: t.f32["B S 8"]):
    for _ in t.stack("h", 2):
        y = t.linear(x, 6, name="proj")
        x = x + y
    return x


@t.model
def unknown_op(x: t.f32["B S 8"]):
    return t.sofmax(x)


@t.model
def unknown_attribute(x: t.f32["B S 8"]):
    return t.softmax(x, axs=1)


@t.model
def python_error(x: t.f32["B S 8"]):
    return t.mlp(x)


@t.model
def branches(x: t.f32["B S 8"]):
    return x if x > 0 else -x


@t.model
def scale(x: t.f32["B 3"]):
    return {"y": x * 2, "total": t.reduce_sum(x, axes=(0, 1))}
"""


SMALL = "model.py:small"


def line_of(code: str) -> str:
    """Return the location of a part of MODEL, in the form that errors use."""
    return f"model.py:{MODEL[: MODEL.index(code)].count(chr(10)) + 1}"


@dataclass(frozen=True)
class Result:
    """The result of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The single object on standard output."""
        return json.loads(self.out)


Treadle = Callable[..., Result]


def commands_in(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    """Return a function that runs a command, as the entry point would, in a folder that contains model.py."""
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TREADLE_DEBUG", raising=False)

    def run(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["treadle", *words])
        with pytest.raises(SystemExit) as ended:
            treadle.cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        assert "\x1b[" not in said.out, "colour codes without a terminal"
        return Result(code if isinstance(code, int) else 0, said.out, said.err)

    return run


def with_last_values(command: str, words: str) -> list[str]:
    """Return the words of a command without values that a later one of the same option overrides. Options that are
    repeatable keep all values.
    """
    group: Any = typer.main.get_command(treadle.cli.app)
    single = {flag for param in group.commands[command].params if not param.multiple for flag in param.opts}
    kept = words.split()
    for at, word in reversed([*enumerate(kept)]):
        if word in single and word in kept[at + 1 :]:
            del kept[at : at + 2]
    return kept


def refused(said: Result, *parts: str) -> None:
    """Check for exit code 2, empty standard output, and an error in the house's form on standard error, without a
    traceback.
    """
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err
