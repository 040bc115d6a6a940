"""Calls of public functions with arguments that they do not take: typed errors, and hints that can be followed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
