"""Calls of public functions with arguments that they do not take: typed errors, and hints that can be followed."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from tests.error_texts import raises_freely
from treadle.ir.wording.checked_calls import check_call
from treadle.program.program import Program
from treadle.tasks.loaded import LoadedModel


@t.model
def classes(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 20, dim: int = 8) -> t.Tensor:
    return t.linear(t.embed(tokens, vocab, dim, name="wte"), vocab, name="head")


UNKNOWN: list[tuple[Callable[..., Any], tuple[Any, ...], str, str]] = [
    (t.from_torch, (None, ()), "dynamic_axes", 'dynamic={"input_ids": "B S"}'),
    (t.from_torch, (None, ()), "dynamic_shapes", 'dynamic={"input_ids": "B S"}'),
    (t.load_artifact, ("a.treadle",), "quantize", "leave it out, or compile the model again with t.compile"),
    (t.load_artifact, ("a.treadle",), "chek", "check=..."),
    (t.save, (None, "a.treadle"), "overwrite", "save(compiled, path)"),
    (t.AdamW, (), "lr", "t.Trainer(model, learning_rate=1e-3)"),
    (t.AdamW, (), "betas", "beta1=0.9, beta2=0.999"),
    (t.SGD, (), "lr", "t.Trainer(model, learning_rate=1e-3)"),
    (t.Schedule, (1e-3,), "warm_up", "warmup=..."),
    (t.Sampling, (), "temprature", "temperature=..."),
    (t.TokenRules, (), "repetition_penality", "repetition_penalty=..."),
    (t.Beams, (4,), "lenght_penalty", "length_penalty=..."),
    (t.Target, ("cpu",), "thread", "threads=..."),
    (t.follow, (None, "S"), "axes", "follow(graph, axis)"),
    (t.fetch_model, ("gpt2",), "cach", "cache=..."),
    (t.Compiled.session, (None,), "batch", "rows=..."),
    (t.Compiled.session, (None,), "max_length", "capacity=..."),
]


@pytest.mark.parametrize(("function", "ordered", "option", "hint"), UNKNOWN)
def test_an_unknown_option_of_a_public_function(
    function: Callable[..., Any], ordered: tuple[Any, ...], option: str, hint: str
) -> None:
    """The hint starts with an option of the function, or is a call of it."""
    with raises_freely(t.UsageError, match=f"{function.__name__} has no option '{option}'") as caught:
        function(*ordered, **{option: 1})
    assert str(caught.value.hint).startswith(hint)
    proposed = hint.partition("=")[0]
    if proposed.isidentifier():
        assert proposed in inspect.signature(function).parameters


@pytest.mark.parametrize("function", [getattr(t, name) for name in sorted(t._LAZY)])
def test_a_call_without_its_arguments(function: Any) -> None:
    """Every function and class of the public API that has a required argument."""
    if function in (t.Compiled, t.Graph, t.ModelSource, t.Specializing):
        pytest.skip("created by functions, not by callers")
    called = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p.name for p in called if p.default is p.empty]
    with raises_freely(t.UsageError, match=f"{function.__name__} (needs the argument|takes at most)"):
        function(*[] if needed else [1] * 20)


METHODS = [name for name, value in vars(LoadedModel).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", ["logprobs", "promts", "textss", "imagess", "qqq"])
def test_a_hint_for_a_task_names_no_argument_that_the_call_has(method: str, option: str) -> None:
    """The first argument is passed without a name, and the hint is followed: the call has it as an option."""
    model = LoadedModel(Program.of("no-such-folder"))
    function = inspect.signature(getattr(LoadedModel, method))
    first = [p for p in list(function.parameters.values())[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    ordered = ["the cat"] * len(first[:1])
    with raises_freely(t.UsageError, match=f"{method} has no option '{option}'") as caught:
        getattr(model, method)(*ordered, **{option: 2})
    proposed, found, _ = str(caught.value.hint).partition("=...")
    if found:
        function.bind_partial(model, *ordered, **{proposed: 2})


def test_arguments_without_a_name_that_have_no_place() -> None:
    model = LoadedModel(Program.of("no-such-folder"))
    with raises_freely(t.UsageError, match="generate takes at most 1 argument without a name") as many:
        model.generate("a", 5)  # type: ignore[call-overload]
    assert str(many.value.hint).startswith("generate(prompts, *, most=128")
    with raises_freely(t.UsageError, match="generate received prompts twice"):
        model.generate("a", prompts="b")  # type: ignore[call-overload]
    with raises_freely(t.UsageError, match="generate needs the argument prompts"):
        model.generate()  # type: ignore[call-overload]
    with raises_freely(t.UsageError, match="nothing takes no argument without a name"):
        check_call("nothing", inspect.signature(lambda *, a=1: a), [1], {})


@pytest.mark.parametrize("method", ["step", "evaluate"])
def test_a_batch_without_names(method: str) -> None:
    """The hint has the names, and the call of the hint works."""
    trainer = t.Trainer(classes, backend="numpy")
    tokens = np.array([[1, 2, 3]])
    with raises_freely(t.UsageError, match=f"{method} takes arrays by name") as caught:
        getattr(trainer, method)(tokens, tokens)
    assert str(caught.value.hint) == f"trainer.{method}(tokens=..., targets=...)"
    assert getattr(trainer, method)(tokens=tokens, targets=tokens)


# -- arguments of another kind -------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, 3, -1, 1.5, True, "a", b"a", {}, {"a": 1}, {3: [1]}, [], [1], [None], ["a"], ("a",), object(), len),
    *(np.zeros(3), np.array(["a", "b"]), Path("a")),
]
"""Arguments that most methods do not take."""


@pytest.fixture(scope="module")
def public_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The objects that the functions of the public API return, and the API itself."""
    exe = t.compile(classes, backend="numpy")
    loaded: dict[str, Any] = {}
    if importlib.util.find_spec("transformers") is not None:
        from tests import task_models

        place = tmp_path_factory.mktemp("models")
        for kind, architecture in {"gpt": "GPT2LMHeadModel", "cls": "BertForSequenceClassification"}.items():
            tokenizer = task_models.without_specials() if kind == "gpt" else task_models.wordpiece()
            task_models.save(place / kind, architecture, tokenizer)
            loaded[kind] = t.load(place / kind, backend="numpy")
    return {
        "exe": exe,
        "session": exe.session(rows=2, capacity=16),
        "stepped": exe.stepped,
        "trainer": t.Trainer(classes, backend="numpy"),
        "model": classes,
        "report": exe.report(),
        "following": t.follow(exe, "S"),
        "memory": t.Trainer(classes, backend="numpy").memory(B=1, S=2),
        "t": t,
        **loaded,
    }


def public_callables(value: Any) -> dict[str, Callable[..., Any]]:
    """Return the public methods of an object; of the API, the functions and classes that are no part of the DSL."""
    if value is t:
        skipped = {"Compiled", "Graph", "ModelSource", "Specializing"}
        return {name: getattr(t, name) for name in t._LAZY if name not in skipped} | {"model": t.model}
    methods = {name: m for name, m in vars(type(value)).items() if inspect.isfunction(m) and not name.startswith("_")}
    return {name: getattr(value, name) for name in methods}


@pytest.mark.parametrize(
    "kind",
    ["exe", "session", "stepped", "trainer", "model", "gpt", "cls", "t", "report", "following", "memory"],
)
def test_no_call_raises_an_error_of_python(
    kind: str, public_objects: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every public method with each value for each of its parameters, with too many, and with an unknown name."""
    if kind not in public_objects:
        pytest.skip("transformers is not installed")
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    failed, count = [], 0
    for name, function in public_callables(public_objects[kind]).items():
        parameters = list(inspect.signature(function).parameters.values())
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        calls: list[tuple[list[Any], dict[str, Any]]] = [([], {"qqq": 1}), ([3] * 20, {})]
        for value in [*VALUES, torch.tensor([[1, 2]]), torch.nn.Linear(2, 2)]:
            named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            calls += [([], {**dict.fromkeys(needed, value), option: value}) for option in named]
            calls += [([value], {}), ([value, value], {})]
        for ordered, options in calls:
            count += 1
            try:
                function(*copy.copy(ordered), **options)
            except t.TreadleError:
                pass
            except Exception as error:
                failed.append(f"{name}(*{ordered}, **{options}): {type(error).__name__}: {error}"[:300])
    assert count > 20
    assert not failed, "\n".join(failed)


def test_arrays_are_lists_of_numbers() -> None:
    session = t.compile(classes, backend="numpy").session(rows=8, capacity=16)
    for tokens in ([1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.int32)):
        row = session.resume(tokens)
        assert session.prefill({row: tokens})[row].shape == (20,)
        assert session.prefill(dict.fromkeys(np.array([row]), tokens))
        session.close(row)
    assert t.TokenRules(banned=np.array([1])) and t.TokenRules(banned=[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "what", "hint"),
    [
        (lambda s: s.open([1, 2]), "open takes no argument without a name", "row = session.open(), then session.pre"),
        (
            lambda s: s.prefill([1]),
            "tokens must be a mapping from integers to lists of integers",
            "session.prefill({row",
        ),
        (lambda s: s.length("a"), "row must be an integer", None),
        (lambda s: s.close(0, keep="no"), "keep must be True or False", "keep=False"),
        (lambda s: s.prefix_length([1]), "prompt must be a prompt", "session.prompt([4, 3])"),
    ],
)
def test_hints_for_arguments_of_another_kind(call: Callable[[Any], Any], what: str, hint: str | None) -> None:
    session = t.compile(classes, backend="numpy").session(rows=2, capacity=16)
    session.open()
    with raises_freely(t.UsageError, match=what) as caught:
        call(session)
    assert caught.value.hint is None if hint is None else str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize(
    ("call", "what", "hint"),
    [
        (lambda m: m.generate([1, 2, 3]), "prompts must be a string or a list of strings", "a string, or a list of"),
        (
            lambda m: m.generate(np.array([1])),
            "prompts must be a string or a list of strings",
            "a string, or a list of",
        ),
        (lambda m: m.generate("a", stop="."), "stop must be a list of strings", "stop=['.']"),
        (lambda m: m.generate("a", most="5"), "most must be an integer", "most=5"),
        (lambda m: m.generate("a", most="few"), "most must be an integer", "most=128"),
        (lambda m: m.embed(("a", "b")), "sentences must be a string or a list of strings", "a string, or a list of"),
        (lambda m: m.match("a.png", "cat"), "texts must be a list of strings", "texts=['cat']"),
        (
            lambda m: m.classify(("a", "b", "c")),
            "texts must be a text, a pair of texts, or a list of them",
            "a string, or a list of",
        ),
        (lambda m: m.answer([{"question": "a"}]), "question must be a string or a list of pairs of", "answer(question"),
        (
            lambda m: m.label(len),
            "images must be an image or a list of images",
            "the path of a file, its bytes, an image of Pillow",
        ),
        (lambda m: m.transcribe(np.zeros(3)), "recording must be a path", "the path of a WAV file"),
    ],
)
def test_hints_for_tasks(call: Callable[[Any], Any], what: str, hint: str) -> None:
    """They come before the model is opened."""
    with raises_freely(t.UsageError, match=what) as caught:
        call(LoadedModel(Program.of("no-such-folder")))
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize("function", [t.compile, t.load, t.Trainer])
def test_objects_that_are_no_models(function: Callable[..., Any]) -> None:
    exe = t.compile(classes, backend="numpy")
    hints = {
        "exe": (exe, "it is compiled already"),
        "trainer": (t.Trainer(classes, backend="numpy"), "trainer.compiled()"),
        "loaded": (LoadedModel(Program.of("no-such-folder")), "the model that t.load loaded"),
        "dict": ({}, "t.compile(declaration, weights=...)"),
        "None": (None, 'a declaration, "folder", or "model.onnx"'),
    }
    for value, hint in hints.values():
        with raises_freely(t.UsageError, match="a model must be a declaration") as caught:
            function(value)
        assert str(caught.value.hint).startswith(hint)


def test_a_compiled_models_weights_serve_its_model() -> None:
    """As the hint says."""
    exe = t.compile(classes, backend="numpy", seed=1)
    tokens = np.array([[1, 2, 3]])
    again = t.compile(classes, backend="numpy", weights=exe.weights)
    np.testing.assert_array_equal(again(tokens)["head"], exe(tokens)["head"])
    trainer = t.Trainer(classes, backend="numpy", weights=exe.weights)
    np.testing.assert_array_equal(trainer.weights["wte.weight"], exe.weights["wte.weight"])


def test_what_is_saved_is_a_compiled_model(tmp_path: Path) -> None:
    exe = t.compile(classes, backend="numpy")
    trainer = t.Trainer(classes, backend="numpy")
    for value, hint in (
        ("model.treadle", 't.save(exe, "model.treadle")'),
        (trainer, 't.save(trainer.compiled(), "model.treadle")'),
        (classes, 't.save(t.compile(MODEL), "model.treadle")'),
    ):
        with raises_freely(t.UsageError, match="save takes a compiled model") as caught:
            t.save(value, tmp_path / "x.treadle")  # type: ignore[arg-type]
        assert str(caught.value.hint).startswith(hint)
    assert t.save(trainer.compiled(), tmp_path / "x.treadle") and t.save(exe, tmp_path / "y.treadle")


def test_a_declaration_is_a_function() -> None:
    for value in (3, "a", int, type("Net", (), {"forward": len})):
        with raises_freely(t.FrontendError, match="@t.model decorates a function of tensors"):
            t.model(value)
    assert t.follow(classes, "S").axis == "S"


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: t.AdamW(betas=(0.8, 0.95)), "beta1=0.8, beta2=0.95"),  # type: ignore[call-arg]
        (lambda: t.AdamW(betas=(0.8, 0.95, 0.9)), "beta1=0.9, beta2=0.999"),  # type: ignore[call-arg]
        (lambda: t.from_torch(None, (), dynamic_axes={"x": {0: "N"}}), "dynamic={'x': {0: 'N'}}"),  # type: ignore[call-arg, arg-type]
        (lambda: t.from_torch(None, example_inputs=()), "example=..."),  # type: ignore[call-arg, arg-type]
        (lambda: t.Beams(num_beams=3), "count=3"),  # type: ignore[call-arg]
        (lambda: t.Sampling(temperature="0.7"), "temperature=0.7"),  # type: ignore[arg-type]
        (lambda: t.AdamW(beta1="0.8"), "0.8"),  # type: ignore[arg-type]
        (lambda: t.AdamW(beta1="8"), "0.9"),  # type: ignore[arg-type]
        (lambda: t.Schedule(0.1, warmup="10"), "10"),  # type: ignore[arg-type]
        (lambda: t.Beams(num_return_sequences=2), "best=2"),  # type: ignore[call-arg]
        (
            lambda: t.Sampling(no_repeat_ngram_size=2),  # type: ignore[call-arg]
            "generate(prompt, sampling=..., rules=t.TokenRules(no_repeat_ngram=2))",
        ),
    ],
)
def test_a_hint_for_another_name_keeps_the_values(call: Callable[[], Any], hint: str) -> None:
    with raises_freely(t.UsageError) as caught:
        call()
    assert str(caught.value.hint) == hint


@pytest.mark.parametrize(
    ("method", "options", "hint"),
    [
        ("generate", {"stream": True}, "stream(prompt)"),
        ("generate", {"beams": 2}, "search(prompts, beams=t.Beams(count=2))"),
        ("generate", {"num_return_sequences": 2}, "search(prompts, beams=t.Beams(best=2))"),
        ("generate", {"messages": []}, 'print(*chat().say("Hello")'),
        ("chat", {"messages": []}, 'print(*chat().say("Hello")'),
    ],
)
def test_the_hint_names_the_method_of_a_task(method: str, options: dict[str, Any], hint: str) -> None:
    model = LoadedModel(Program.of("no-such-folder"))
    with raises_freely(t.UsageError) as caught:
        getattr(model, method)(*["a"] * (method != "chat"), **options)
    assert str(caught.value.hint).startswith(hint)
