"""Names that PyTorch, ONNX Runtime and Hugging Face have for loading, running, saving and training a model: each hint
is code that runs, or says that there is nothing to call.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from tests.error_texts import raises_freely
from treadle.frontends.text import TextTokenizer
from treadle.ir.wording.other_interfaces import (
    COMPILED_ATTRIBUTES,
    ENTRY_WORDS,
    GRAPH_ATTRIBUTES,
    LOADED_ATTRIBUTES,
    MODEL_ATTRIBUTES,
    SESSION_ATTRIBUTES,
    TOKENIZER_ATTRIBUTES,
    TRAINER_ATTRIBUTES,
)
from treadle.ir.wording.other_spellings import OTHER_WORDS
from treadle.program.program import Program
from treadle.tasks.loaded import LoadedModel

pytestmark = pytest.mark.usefixtures("quickly_planned")

TOKENS = np.array([[1, 2, 3]])


@t.model
def classes(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 20, dim: int = 8) -> t.Tensor:
    x = t.embed(tokens, vocab, dim, name="wte")
    return t.linear(t.self_attention(x, 2, causal=True), vocab, name="head")


def code_of(hint: str) -> str | None:
    """Return the code of a hint, or None if it says that nothing is to be called."""
    if hint.startswith("leave it out: "):
        return None
    return hint.partition("  #")[0]


TABLES: dict[str, Mapping[str, str]] = {
    "treadle": ENTRY_WORDS,
    "model": MODEL_ATTRIBUTES,
    "exe": COMPILED_ATTRIBUTES,
    "loaded": LOADED_ATTRIBUTES,
    "trainer": TRAINER_ATTRIBUTES,
    "session": SESSION_ATTRIBUTES,
    "graph": GRAPH_ATTRIBUTES,
    "tokenizer": TOKENIZER_ATTRIBUTES,
}
HINTS = sorted(
    {(code, kind == "loaded") for kind, table in TABLES.items() for h in table.values() if (code := code_of(h))}
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that hints name: a checkpoint with a tokenizer, an ONNX model and a state."""
    task_models = pytest.importorskip("tests.task_models")
    pytest.importorskip("onnx")
    from treadle.backends.onnx.exporter import export_onnx

    place: Path = tmp_path_factory.mktemp("place")
    task_models.save(place / "folder", "GPT2LMHeadModel", task_models.without_specials())
    task_models.save(place / "encoder", "BertModel", task_models.wordpiece())
    exe = t.compile(classes, backend="numpy")
    export_onnx(exe.graph, exe.weights, place / "model.onnx")
    t.Trainer(classes, backend="numpy").save_state(place / "state.safetensors")
    return place


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that hints use."""
    torch = pytest.importorskip("torch")
    exe = t.compile(classes, backend="numpy")
    session = exe.session(rows=2, capacity=16)
    return {
        **{"t": t, "np": np, "exe": exe, "session": session, "row": session.open(), "model": classes},
        **{"inputs": {"tokens": TOKENS}, "batch": {"tokens": TOKENS, "targets": TOKENS}},
        **{"weights": dict(exe.weights), "array": torch.ones(1, 2)},
        **{"trainer": t.Trainer(classes, backend="numpy"), "module": torch.nn.Linear(2, 2).eval()},
    }


REPLACED = {
    '"cuda"': '"cpu"',
    "model.gguf": "folder",
    't.compile("gpt2", layers=2)': 't.ModelSource.open("gpt2")',  # it has many weights
    "model, dtype=": 'model, backend="torch", dtype=',
    "model, target=t.Target": 'model, backend="torch", target=t.Target',
    '"folder", dtype=': '"folder", backend="torch", dtype=',
}
"""A target that tests have not, a file without an example, and a backend that takes the option: tests use NumPy."""


@pytest.mark.parametrize(("code", "is_loaded"), HINTS, ids=[code for code, _ in HINTS])
def test_every_hint_runs(
    code: str, is_loaded: bool, place: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    if "fetch_model" in code:
        pytest.skip("needs a network")
    if 'backend="tvm"' in code:
        pytest.importorskip("tvm")
    if code.startswith("@t.model"):
        code = f"{code}\ndef net(x: t.f32['B 8']): return t.linear(x, 64, name='f')"
    for theirs, ours in REPLACED.items():
        code = code.replace(theirs, ours)
    model = t.load("encoder" if "embed" in code else "folder", backend="numpy") if is_loaded else classes
    tokenizer = t.ModelSource.open("folder").tokenizer()
    exec(code, {**names, "model": model, "tokenizer": tokenizer, "graph": names["exe"].graph})


def test_hints_name_no_input_that_a_model_may_lack() -> None:
    """Those of calls take any model's arrays by name. Devices are those that a trainer and a compiled model take."""
    assert not [code for code, _ in HINTS if re.search(r"\btokens=", code)]
    assert TRAINER_ATTRIBUTES["cuda"].startswith("leave it out")
    for table in (MODEL_ATTRIBUTES, COMPILED_ATTRIBUTES, LOADED_ATTRIBUTES):
        assert 'target="cpu"' in table["cpu"] and 'dtype="f32"' in table["float"]


@pytest.mark.parametrize("word", ENTRY_WORDS)
def test_words_of_other_libraries_are_no_names_of_treadle(word: str) -> None:
    assert word not in dir(t)
    assert word not in OTHER_WORDS
    with raises_freely(t.FrontendError) as caught:
        getattr(t, word)
    assert caught.value.hint == ENTRY_WORDS[word]


@pytest.mark.parametrize(
    ("word", "tried"),
    [
        ("AutoModel", 't.load("folder")'),
        ("AutoModelForCausalLM", 't.load("folder")'),
        ("BertForSequenceClassification", 't.load("folder")'),
        ("GPT2LMHeadModel", 't.load("folder")'),
        ("TextGenerationPipeline", 't.load("folder")'),
        ("AutoTokenizer", 't.ModelSource.open("folder").tokenizer()'),
        ("GPT2TokenizerFast", 't.ModelSource.open("folder").tokenizer()'),
        ("AutoImageProcessor", 't.ModelSource.open("folder").tokenizer()'),
        ("sofmax", "did you mean t.softmax?"),
        ("Trainre", "did you mean t.Trainer?"),
        ("utils", "dir(treadle) lists its names"),
    ],
)
def test_classes_of_hugging_face_and_misspelled_names(word: str, tried: str) -> None:
    with raises_freely(t.FrontendError) as caught:
        getattr(t, word)
    assert str(caught.value.hint).startswith(tried)


@pytest.mark.parametrize(
    ("option", "tried"),
    [
        ({"fullgraph": True}, "leave it out: a model is one graph"),
        ({"mode": "max-autotune"}, "leave it out: torch_compile=True for the torch backend"),
        ({"trust_remote_code": True}, "leave it out: no code of a model's folder is run"),
        ({"device_map": "auto"}, "did you mean target=, an option of compile?"),
        ({"load_in_8bit": True}, "did you mean quantize=, an option of compile?"),
        ({"providers": ["CPUExecutionProvider"]}, "did you mean backend=, an option of compile?"),
    ],
)
def test_options_of_compilers_and_loaders(option: dict[str, Any], tried: str) -> None:
    with raises_freely(t.FrontendError, match=f"has no option {next(iter(option))}") as caught:
        t.compile(classes, backend="numpy", **option)
    assert str(caught.value.hint).startswith(tried)


def test_a_loaded_model_has_a_method_for_each_task() -> None:
    model = LoadedModel(Program.of("no-such-folder"))
    with raises_freely(t.UsageError, match="a loaded model is called by its tasks") as caught:
        model("Once")
    for name in re.findall(r"model\.(\w+)\(", str(caught.value.hint)):
        assert hasattr(LoadedModel, name)


def objects() -> dict[str, Any]:
    exe = t.compile(classes, backend="numpy")
    trainer = t.Trainer(classes, backend="numpy")
    loaded = LoadedModel(Program.of("no-such-folder"))
    return {
        "model": classes,
        "exe": exe,
        "loaded": loaded,
        "trainer": trainer,
        "session": exe.session(rows=1, capacity=16),
        "graph": exe.graph,
        "tokenizer": TextTokenizer(None, None),
    }


def test_attributes_of_other_libraries() -> None:
    for kind, value in objects().items():
        for name, hint in TABLES[kind].items():
            assert not hasattr(value, name), (kind, name)
            with raises_freely(t.UsageError, match=rf"has no \.{name}\b") as caught:
                getattr(value, name)
            assert caught.value.hint == hint


def test_a_misspelled_attribute_names_the_nearest_one() -> None:
    exe = objects()["exe"]
    with raises_freely(t.UsageError, match="a compiled model has no .sesion") as caught:
        _ = exe.sesion
    assert caught.value.hint == "did you mean .session?"
    with pytest.raises(AttributeError) as private:
        _ = exe._nothing
    assert type(private.value) is AttributeError


def test_the_settings_of_a_trainer_are_fixed() -> None:
    trainer = objects()["trainer"]
    for name, value in {"learning_rate": 0.5, "clip": None}.items():
        with raises_freely(t.UsageError, match=rf"a trainer has fixed settings: \.{name} cannot be set") as caught:
            setattr(trainer, name, value)
        assert caught.value.hint == f"t.Trainer(model, {name}=...)"

    class Own(t.Trainer):
        def __init__(self, model: object) -> None:
            super().__init__(model)
            self.best = 1.0

    assert Own(classes).best == 1.0


def test_the_settings_of_a_compiled_model_are_fixed() -> None:
    exe = objects()["exe"]
    for name, hint in {"weights": "t.compile(model, weights=...)", "graph": "t.compile(model, ...)"}.items():
        with raises_freely(
            t.UsageError, match=rf"a compiled model has fixed settings: \.{name} cannot be set"
        ) as caught:
            setattr(exe, name, {})
        assert caught.value.hint == hint


def test_a_module_is_not_a_word_of_the_package() -> None:
    with raises_freely(t.FrontendError, match="the DSL has no 'fetch'") as caught:
        t.fetch("minilm")  # type: ignore[attr-defined]
    assert caught.value.hint == 't.fetch_model("minilm")'
    with raises_freely(t.FrontendError, match="the DSL has no 'triu'") as array:
        t.triu(np.ones((3, 3)))  # type: ignore[attr-defined]
    assert str(array.value.hint).startswith("x.triu()")
    assert not [name for name in dir(t) if inspect.ismodule(getattr(t, name)) and name != "ops"]


def test_an_error_inside_a_property_is_not_a_missing_name() -> None:
    from treadle.ir.wording.unknown_attributes import with_attribute_hints

    @with_attribute_hints("a thing", {})
    class Thing:
        @property
        def size(self) -> int:
            return None.size  # type: ignore[attr-defined,no-any-return]

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'size'"):
        _ = Thing().size
