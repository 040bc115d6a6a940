"""Hints for MODEL named in another way: as a module, or by the folder of its weights alone. Each hint is followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import treadle as t
from tests.command_line import commands_in, refused
from tests.error_texts import raises_freely
from treadle.verifying import verify_model

GPT = """
import treadle as t

@t.model
def gpt(tokens: t.i64["B S"], *, vocab=64, dim=32):
    return t.unembed(t.embed(tokens, vocab, dim, name="wte"), tied="wte")
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zoo.py").write_text(GPT, encoding="utf-8")
    Path("models").mkdir()
    Path("models", "own.py").write_text(GPT, encoding="utf-8")
    for name in ("o_gpt", "zoo_gpt"):
        Path(name).mkdir()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("zoo:gpt", "zoo.py:gpt"),
        ("zoo::gpt", "zoo.py:gpt"),
        ("zoo.py::gpt", "zoo.py:gpt"),
        ("zoo.gpt", "zoo.py:gpt"),
        ("models.own:gpt", "models/own.py:gpt"),
        ("models.own.gpt", "models/own.py:gpt"),
        ("models/own:gpt", "models/own.py:gpt"),
        ("models/own", "models/own.py:FUNCTION"),
        ("zoo", "zoo.py:FUNCTION"),
        ("gpt", "zoo.py:gpt"),
    ],
)
def test_a_declaration_that_is_named_as_a_module(name: str, meant: str) -> None:
    with raises_freely(t.UsageError) as caught:
        t.compile(name)
    assert str(caught.value.hint) == f"{meant}?"
    assert t.compile(meant.replace("FUNCTION", "gpt"), backend="numpy").name == "gpt"


def test_a_text_before_the_model_is_exchanged_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commands_in(tmp_path, capsys, monkeypatch)
    for model in ("minilm", "gpt2", "zoo.py:gpt"):
        said = run("classify", "I like it.", model, "--backend", "numpy")
        tried = f"treadle classify {model} 'I like it.' --backend numpy: the model comes first"
        refused(said, "there is no model 'I like it.'", tried)
    assert "comes first" not in run("classify", "I like it.", "--tokenizer", "gpt2", "--file", "zoo.py").err


def test_a_name_without_such_a_file_is_answered_as_before() -> None:
    with raises_freely(t.UsageError, match="there is no model 'gtp2'") as caught:
        t.compile("gtp2")
    assert str(caught.value.hint).startswith("gpt2? ")


@pytest.mark.parametrize("file", ["weights.safetensors", "config.json"])
def test_a_file_of_a_model_names_its_folder(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t.Trainer("gpt2", backend="numpy", layers=1, dim=8, heads=2, vocab=9, context=8).save("out")
    with raises_freely(t.UsageError, match="a file is a model only if") as caught:
        t.compile(f"out/{file}")
    assert str(caught.value.hint) == "out?"
    assert t.compile("out", backend="numpy").seed is None
    monkeypatch.chdir("out")
    with raises_freely(t.UsageError, match="a file is a model only if") as caught:
        t.compile(file)
    assert str(caught.value.hint) == ".?"
    Path("config.json").rename("other.json")
    with raises_freely(t.UsageError, match="a file is a model only if") as caught:
        t.compile("other.json")
    assert str(caught.value.hint).startswith("a folder with config.json")


CALLS: list[str] = [
    "t.compile('out', quantize='int8-weights', backend='numpy').weights",
    "t.Trainer('out', learning_rate=0.5, backend='numpy').schedule",
    "verify_model('out', seed=3)",
]


@pytest.mark.parametrize("call", CALLS)
def test_a_folder_of_weights_alone_is_named_with_its_declaration(call: str) -> None:
    """The hint replaces the argument, so the call keeps its function and its options."""
    trainer = t.Trainer("zoo.py:gpt", backend="numpy")
    trainer.save("out")
    names: dict[str, Any] = {"t": t, "verify_model": verify_model}
    with raises_freely(t.UsageError, match="out has the weights of zoo.py:gpt") as caught:
        eval(call, names)
    arguments, _, argument = str(caught.value.hint).partition(" in place of ")
    assert call.count(argument) == 1
    assert eval(call.replace(argument, arguments), names) is not None
