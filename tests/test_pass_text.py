"""Passes and pipelines as text: every one parses back to an equal one, and malformed text is refused with the place."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import treadle as t
from tests.pipelines import FIT, PIPELINES
from treadle.backends.staged import capabilities_of
from treadle.ir.errors import ParseError, TreadleError
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, DType
from treadle.passes.budget.fit_memory import FitMemory
from treadle.passes.budget.memory_fit import MemoryFit
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_text import parse_pipeline, pass_classes, pipeline_text, spell_pass
from treadle.passes.lowering.legalize import Legalize


def on_cpu(name: str) -> Capabilities:
    return capabilities_of(name, Target("cpu"))


def on(name: str) -> Any:
    target = name.split(" on ")[1].split(",")[0] if " on " in name else "cpu"
    return lambda backend: capabilities_of(backend, Target(target))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_parses_back(name: str) -> None:
    text = pipeline_text(PIPELINES[name])
    assert parse_pipeline(text, on(name)) == PIPELINES[name]


# -- drawn options of every pass ---------------------------------------------------------------------------------------

_TEXTS = ("x", "true", "a b", 'quoted "', "-1", "né\n", "", "h.0.attn", "{", "1e5")


def drawn(type: Any, rng: random.Random) -> Any:
    """Return a value of a field's type."""
    if type is Capabilities:
        return rng.choice([PRIMITIVES, on_cpu("numpy"), on_cpu("torch")])
    if type is MemoryFit:
        return dataclasses.replace(FIT, host=rng.choice([None, "y", "none"]), ratio=rng.choice([1.0, 1.5, 3e-7]))
    if get_origin(type) is tuple:
        return tuple([drawn(get_args(type)[0], rng) for _ in range(rng.randrange(3))])
    choices: Mapping[Any, tuple[Any, ...]] = {
        bool: (True, False),
        int: (0, 1, -3, 10**20),
        float: (0.0, -1.5, 1e300, 7.0),
        str: _TEXTS,
        DType: tuple(DTYPES.values()),
    }
    return rng.choice(choices[type])


@pytest.mark.parametrize("name", pass_classes())
def test_every_pass_parses_back_with_drawn_options(name: str) -> None:
    kind, rng = pass_classes()[name], random.Random(name)
    types = {f.name: get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)}
    for _ in range(20 if types else 1):
        try:
            made = kind(**{field: drawn(type, rng) for field, type in types.items()})
        except TreadleError:  # the pass refuses the value
            continue
        assert parse_pipeline(spell_pass(made), on_cpu) == (made,), spell_pass(made)


@given(st.lists(st.sampled_from(sorted(PIPELINES)), max_size=3), st.randoms())
def test_drawn_pipelines_parse_back(chosen: list[str], rng: random.Random) -> None:
    passes = [each for name in chosen for each in PIPELINES[name] if " on " not in name or "cpu" in name]
    rng.shuffle(passes)
    assert parse_pipeline(pipeline_text(passes), on_cpu) == tuple(passes)


def test_spaces_between_tokens_are_allowed() -> None:
    assert parse_pipeline(" \n fuse-gelu ,\tlegalize { backend = numpy } ", on_cpu)[1] == Legalize(on_cpu("numpy"))
    assert parse_pipeline("") == ()


def test_the_log_prints_what_parses_back() -> None:
    small = {"layers": 1, "dim": 16, "heads": 2, "vocab": 5, "context": 8}
    exe = t.compile("gpt2", backend="numpy", dtype=None, memory="1MB", sizes={"B": 1, "S": 8}, **small)
    for record in exe.optimized.stages:
        if record.name.startswith("lower-to-"):
            continue
        text = f"{record.name}{{{record.options}}}" if record.options else record.name
        assert spell_pass(parse_pipeline(text, on_cpu)[0]) == text


def test_a_pass_of_unnamed_capabilities_has_no_text() -> None:
    for each in (Legalize(Capabilities(keeps=lambda op, types: True)), Foreign()):
        with pytest.raises(ValueError, match="a pass without a text form"):
            spell_pass(each)
    assert spell_pass(Legalize()) == "legalize"


@dataclasses.dataclass(frozen=True)
class Foreign(Pass):
    """A pass outside of the product."""


# -- refusals ----------------------------------------------------------------------------------------------------------

FIT_TEXT = spell_pass(FitMemory(FIT))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("fuse-geru", "unknown pass 'fuse-geru'", "fuse-gelu?"),
        ("fuse-gelu, , dead-code", "unknown pass ','", None),
        ("fuse-gelu dead-code", "expected ','", None),
        ("legalize{backnd=numpy}", "legalize has no option 'backnd'", "backend?"),
        ("legalize{backend=numpi}", "there is no backend 'numpi'", None),
        ("legalize{backend=1}", "backend of legalize must be the name of a backend", None),
        ("plan-storage{strided=1}", "strided of plan-storage must be true or false", None),
        ("plan-storage{strided=true,strided=true}", "plan-storage has strided twice", "one value for each option"),
        ("plan-storage{donated=x}", "donated of plan-storage must be a list", None),
        ("plan-storage{donated=[x", "expected ','", None),
        ("plan-storage{donated=[[x]]}", "donated of plan-storage must be a list", None),
        ("quantize-weights", "quantize-weights needs scheme", "quantize-weights{scheme=...}"),
        ('decompose{ops=["\\x"]}', "malformed text in quotes", None),
        ("fit-memory{fit={budget=1}}", "fit of fit-memory must be {...} with the fields of MemoryFit", None),
        (FIT_TEXT.replace("parts=4", "prts=4"), "fit of fit-memory must be {...} with the fields of MemoryFit", None),
        (f"plan-storage{{donated={'[' * 50}", "lists must not be nested that deep", None),
        ("!", "expected a token of a pipeline", None),
        ("fuse-gelu," * 20_000, "a pipeline's text has at most 100000 characters", None),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(ParseError, match="position") as refused:
        parse_pipeline(text, on_cpu)
    assert message in str(refused.value)
    if hint is not None:
        assert hint in str(refused.value.hint)


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["fuse-gelu", "{", "}", ",", "=", "[", "x", '"a"', "1"])).map("".join)
)
def test_drawn_text_ends_in_a_pipeline_or_an_error_of_ours(text: str) -> None:
    try:
        passes = parse_pipeline(text, on_cpu)
    except ParseError:
        return
    assert parse_pipeline(pipeline_text(passes), on_cpu) == passes
