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
        ("models/own", "models/own.py:gpt"),
        ("zoo", "zoo.py:gpt"),
        ("gpt", "zoo.py:gpt"),
    ],
)
def test_a_declaration_that_is_named_as_a_module(name: str, meant: str) -> None:
    with raises_freely(t.UsageError) as caught:
        t.compile(name)
    assert str(caught.value.hint) == f"{meant}?"
    assert t.compile(meant, backend="numpy").name == "gpt"


def test_a_file_in_place_of_a_model_leads_to_its_models() -> None:
    for file, hint in (
        ("zoo.py", "zoo.py:gpt?"),
        ("none.py", "none.py:FUNCTION, a function with the decorator @t.model"),
    ):
        Path("none.py").write_text("x = 3", encoding="utf-8")
        with raises_freely(t.UsageError) as caught:
            t.compile(file)
        assert str(caught.value.hint) == hint
    Path("zoo.py").write_text(GPT + GPT.replace("def gpt", "def other"), encoding="utf-8")
    with raises_freely(t.UsageError) as caught:
        t.compile("zoo")
    assert str(caught.value.hint) == "one of zoo.py:gpt, zoo.py:other"


def test_a_module_of_pytorch_in_a_file_leads_to_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    text = "import torch\nNet = torch.nn.Identity\nnet = torch.nn.Linear(3, 2)\nother = 3\n"
    Path("m.py").write_text(text, encoding="utf-8")
    names: dict[str, Any] = {"input": torch.ones(1, 3), "treadle": t}
    exec(text, names)
    for name in ("Net", "net"):
        with raises_freely(t.UsageError) as caught:
            t.compile(f"m.py:{name}")
        code = str(caught.value.hint).removeprefix("in Python: ").partition(", with")[0]
        assert isinstance(eval(code, names), t.Compiled)
    with raises_freely(t.UsageError) as caught:
        t.compile("m.py:other")
    assert str(caught.value.hint) == "m.py:FUNCTION, a function with the decorator @t.model"


@pytest.mark.parametrize(("name", "family"), [("mistral", "llama"), ("Qwen2", "llama"), ("deit", "vit")])
def test_a_model_type_leads_to_the_family_that_reads_it(name: str, family: str) -> None:
    with raises_freely(t.UsageError) as caught:
        t.compile(name)
    assert str(caught.value.hint).startswith(f"{family}, the family that reads {name}; ")


def test_the_case_of_a_name_is_no_difference() -> None:
    with raises_freely(t.UsageError) as caught:
        t.compile("GPT2")
    assert str(caught.value.hint).startswith("gpt2? ")


def test_a_missing_file_of_a_folder_is_no_name_of_the_hub() -> None:
    Path("o_gpt", "config.json").write_text("{}", encoding="utf-8")
    with raises_freely(t.UsageError, match="there is no file") as caught:
        t.compile("o_gpt/model.safetensors")
    assert str(caught.value.hint) == "o_gpt?"


def test_names_are_models_in_a_folder_with_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("o_gpt", "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir("o_gpt")
    with raises_freely(t.UsageError) as caught:
        t.compile("gtp2")
    assert str(caught.value.hint).startswith("gpt2? ")


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
