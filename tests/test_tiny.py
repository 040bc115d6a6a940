"""The smallest complete example of Treadle, in under two seconds: declare a model, compile it, read it, run it, query
it, break it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import treadle as t
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph


def swish(x: t.Tensor) -> t.Tensor:
    return x * t.sigmoid(x)


@t.model
def tiny(tokens: t.i64["B S"], *, vocab=17, dim=8, layers=2):
    x = t.embed(tokens, vocab, dim, name="wte")
    for _ in t.stack("h", layers):
        x += t.self_attention(t.layer_norm(x, name="ln_1"), heads=2, causal=True, name="attn")
        x += t.mlp(t.layer_norm(x, name="ln_2"), 4 * dim, act=swish, name="mlp")
    return t.unembed(x, tied="wte")


@pytest.fixture(scope="module")
def exe() -> t.Compiled:
    return t.compile(tiny, backend="numpy")


def test_one_compilation_runs_at_every_size(exe: t.Compiled) -> None:
    assert str(exe.inputs[0]) == "tokens: i64[B, S]"
    for rows, length in ((1, 3), (4, 7)):
        tokens = np.arange(rows * length).reshape(rows, length) % 17
        meant = interpret(tiny.graph(), {"tokens": tokens}, exe.weights, float64=True)["logits"]
        assert exe(tokens=tokens).logits.shape == (rows, length, 17)
        np.testing.assert_allclose(exe(tokens=tokens).logits, meant, rtol=0, atol=64 * 2.0**-23)


def test_passes_say_what_they_did(exe: t.Compiled) -> None:
    (fused,) = [event for record in exe.log for event in record.matches if event.rule == "silu"]
    assert fused.source.endswith(line("def swish", after=1))
    assert "silu" in str(exe.graph)


def test_the_graph_is_text_that_folds_the_layers_and_parses_back(exe: t.Compiled) -> None:
    text = str(exe.graph)
    assert text.count("attention(") == 1
    assert "h.{0..1}.mlp.up.weight" in text
    assert parse_graph(text) == exe.graph


def test_the_graph_answers_questions_about_an_axis(exe: t.Compiled) -> None:
    assert t.follow(exe.graph, "S").step(), "each token looks back only, so they may be generated one by one"
    split = t.follow(exe.graph, "heads").split()
    assert split, "the heads may lie on several devices, which then add what each has"
    assert [(c.encounter.node.op.name, c.by, c.encounter.count) for c in split.combine] == [("linear", "sum", 2)]


def test_an_error_names_the_users_line() -> None:
    @t.model
    def broken(tokens: t.i64["B S"], *, dim=8):
        x = t.embed(tokens, 17, dim, name="wte")
        return x + t.linear(x, 2 * dim, name="up")

    with pytest.raises(t.TreadleError) as caught:
        broken.graph()
    assert str(caught.value).startswith("add: sizes disagree: 8 in x, 16 in y\n")
    assert line("return x + t.linear") in str(caught.value)


def line(text: str, after: int = 0) -> str:
    """Return the location of this file's line that begins with a text, in the form that errors and logs use."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [n for n, each in enumerate(lines, 1) if each.strip().startswith(text)]
    return f"test_tiny.py:{number + after}"
