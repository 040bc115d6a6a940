"""`is_causal`: each answer is compared with outputs for other later tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import pytest

import treadle as t
from tests.op_checks import Case
from treadle.ir.analysis.causal_runs import causality_in_runs
from treadle.ir.analysis.causality import is_causal
from treadle.ir.analysis.following import follow
from treadle.ir.op_registry import OPS
from treadle.ir.ops.axis_names import place
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.models.llama import llama
from treadle.models.opt import opt
from treadle.passes.stages import Recognize, run

Tokens = Annotated[t.Tensor, t.i64["B S"]]
SMALL = {"vocab": 30, "dim": 16, "heads": 2, "layers": 2}


def previous(x: t.Tensor) -> t.Tensor:
    return t.pad(x, axis=1, before=1)[:, :-1]


def convolved(x: t.Tensor, before: int, after: int, kernel: int) -> t.Tensor:
    channels = t.pad(t.rearrange(x, "b s d -> b d s"), axis=2, before=before, after=after)
    return t.rearrange(t.convolution(channels, 8, (kernel,), name="conv"), "b d s -> b s d")


MIXES: dict[str, tuple[Callable[[t.Tensor], t.Tensor], bool]] = {
    "padded token shift": (previous, True),
    "joined token shift": (lambda x: t.concat(x[:, :1] * 0, x[:, :-1], axis=1), True),
    "shift by two": (lambda x: previous(previous(x)), True),
    "back and forth": (lambda x: t.pad(previous(x), axis=1, after=1)[:, 1:], True),
    "next token": (lambda x: t.pad(x, axis=1, after=1)[:, 1:], False),
    "ahead after a shift": (lambda x: t.pad(previous(x), axis=1, after=2)[:, 2:], False),
    "rotation": (lambda x: t.concat(x[:, -1:], x[:, :-1], axis=1), False),
    "causal convolution": (lambda x: convolved(x, 2, 0, 3), True),
    "centered convolution": (lambda x: convolved(x, 1, 1, 3), False),
    "mean": (lambda x: x + t.reduce_mean(x, axes=(1,), keep=True), False),
    "running sum": (lambda x: t.cumsum(x, axis=1), True),
    "softmax over positions": (lambda x: t.softmax(x, axis=1), False),
    "causal attention": (lambda x: t.self_attention(x, 2, causal=True, name="attn"), True),
    "attention": (lambda x: t.self_attention(x, 2, name="attn"), False),
    "attention to the next token": (
        lambda x: t.attention(*(heads(each) for each in (x, ahead(x), ahead(x))), mask=t.causal)[:, 0],
        False,
    ),
}


def heads(x: t.Tensor) -> t.Tensor:
    return t.rearrange(
        x,
        "b s (h=1 d) -> b h s d",
    )


def ahead(x: t.Tensor) -> t.Tensor:
    return t.pad(x, axis=1, after=1)[:, 1:]


@pytest.mark.parametrize("name", MIXES)
def test_a_model_is_causal_if_no_logits_depend_on_later_tokens(name: str) -> None:
    mix, wanted = MIXES[name]
    mixed = model_of(mix)
    rng = np.random.default_rng(0)
    weights = {name: 10 * array for name, array in t.compile(mixed, backend="numpy").weights.items()}
    exe = t.compile(mixed, backend="numpy", weights=weights)
    tokens = rng.integers(0, 20, (3, 9))
    logits = np.asarray(exe(tokens=tokens)["logits"])
    equal = []
    for first in range(1, 9):
        others = np.concatenate([tokens[:, :first], rng.integers(0, 20, (3, 9 - first))], 1)
        equal.append(np.allclose(np.asarray(exe(tokens=others)["logits"])[:, :first], logits[:, :first], atol=1e-4))
    assert all(equal) == wanted, "the example is not what its name says"
    for graph in (mixed.graph(), run(mixed.graph(), [Recognize()]).graph):
        assert is_causal(graph, "S", "logits") == wanted
        assert not is_causal(graph, "S", "pooled")
        assert wanted or not follow(graph, "S").step()


def attended(x: t.Tensor, weigh: Callable[[t.Tensor, t.Tensor], t.Tensor]) -> t.Tensor:
    """Return values weighted by a function of the scores of all pairs and a triangle of ones for later keys."""
    i = t.iota(size=x.shape[1])
    q, k, v = (t.linear(x, 8, name=name) for name in "qkv")
    return weigh(q @ k.mT, (i[None] > i[:, None]).float()) @ v


UNPROVED: dict[str, tuple[Callable[[t.Tensor], t.Tensor], bool]] = {
    "linear attention": (lambda x: attended(x, lambda s, later: s * (1.0 - later)), True),
    "numbers": (lambda x: attended(x, lambda s, later: (s * (1.0 - later) - 1e4 * later).softmax(-1)), True),
    "sigmoid": (lambda x: attended(x, lambda s, later: s.sigmoid() * (1.0 - later)), True),
    "softmax before the mask": (lambda x: attended(x, lambda s, later: s.softmax(-1) * (1.0 - later)), False),
    "a mask that is off by one": (
        lambda x: attended(x, lambda s, later: s * t.pad(1.0 - later, axis=1, before=1)[:, :-1]),
        False,
    ),
    "a weak mask": (lambda x: attended(x, lambda s, later: (s - 12.0 * later).softmax(-1)), False),
    "zeros": (lambda x: x.mean(1, keepdim=True) * t.parameter("gate", 8, init="zeros"), False),
    "the length": (lambda x: attended(x, lambda s, later: s * (1.0 - later)) * x.shape[1], False),
}


def model_of(mix: Callable[[t.Tensor], t.Tensor], lower: int = 1) -> t.Model:
    """Return a model of two layers that mix positions; texts have `lower` tokens or more."""

    @t.model
    def mixed(tokens: Tokens) -> t.Tensor:
        if lower > 1:
            t.bound("S", lower=lower)
        x = t.embed(tokens, 20, 8, name="wte")
        for _ in t.stack("h", 2):
            x += t.linear(mix(x), 8, name="out")
        return {"logits": t.unembed(x, tied="wte"), "pooled": t.reduce_mean(x, axes=(1,))}

    return mixed


@pytest.mark.parametrize("lower", [1, 60])
@pytest.mark.parametrize("name", UNPROVED)
def test_runs_show_what_no_rule_does(name: str, lower: int) -> None:
    """Texts of 60 tokens or more are not cut, so a dependence on their length is not seen."""
    mix, wanted = UNPROVED[name]
    wanted = wanted or (lower > 1 and name == "the length")
    mixed = model_of(mix, lower)
    graph = mixed.graph()
    assert not is_causal(graph, "S", "logits")
    assert causality_in_runs(graph, "S", "logits") == wanted
    weights = t.compile(mixed, backend="numpy").weights
    assert causality_in_runs(graph, "S", "logits", weights) == wanted


@pytest.mark.parametrize("name", MIXES)
def test_runs_agree_with_the_rules(name: str) -> None:
    """But for the last position of a text that is moved back and forth: it is lost, and so depends on the length."""
    mix, wanted = MIXES[name]
    mixed = model_of(mix)
    assert causality_in_runs(mixed.graph(), "S", "logits") == (wanted and name != "back and forth")


def test_models_that_runs_cannot_try() -> None:
    """Without an axis in the output, with weights of several gigabytes, and with an axis of one position."""

    def of(context: int | None, size: int) -> t.Graph:
        @t.model
        def model(tokens: Tokens) -> t.Tensor:
            if context is not None:
                t.bound("S", upper=context)
            x = t.embed(tokens, 20, size, name="wte")
            return {"logits": x, "first": x[:, 0]}

        return model.graph()

    assert causality_in_runs(of(None, 8), "S", "first") is None
    assert causality_in_runs(of(None, 1 << 24), "S", "logits") is None
    assert causality_in_runs(of(1, 8), "S", "logits") is None
    assert causality_in_runs(of(2, 8), "S", "logits") is True


@pytest.mark.parametrize("model", [gpt2, llama, opt])
def test_models_with_a_step_are_causal(model: t.Model) -> None:
    graph = run(model.configure(**SMALL).graph(), [Recognize()]).graph
    assert follow(graph, "S").step() and is_causal(graph, "S", "logits")


def test_a_model_that_computes_with_the_length_is_not_known_to_be_causal() -> None:
    @t.model
    def backward(tokens: Tokens) -> t.Tensor:
        place = t.size_of(tokens, 1) - 1 - t.positions(tokens)  # positions from the end
        x = t.embed(tokens, 20, 8, name="wte") + t.embed(place, 64, 8, name="wpe")
        return {"logits": t.unembed(x, tied="wte")}

    assert not is_causal(backward.graph(), "S", "logits")


def test_pairs_of_positions_are_not_causal() -> None:
    """Scores of queries and keys: the score of a query reads later keys."""

    @t.model
    def scored(tokens: Tokens) -> t.Tensor:
        x = t.embed(tokens, 20, 8, name="wte")
        return {"logits": t.einsum("b i d, b j d -> b i j", x, x)}

    assert not is_causal(scored.graph(), "S", "logits")


def test_an_encoder_is_not_causal() -> None:
    assert not is_causal(bert.configure(**SMALL).graph(), "S", "hidden")


def test_the_lookahead_of_an_op_is_that_of_its_reference() -> None:
    """Elements beyond the lookahead do not change the results up to a position, and the element at it does."""
    compared = set()
    for name in OPS:
        for case in (Case.of(name, number) for number in range(len(OPS[name].samples))):
            for number, ahead in enumerate(case.op.lookahead(case.types) or ()):
                x = case.operands[number]
                if ahead is None or x is None or x.dtype.kind != "f":
                    continue
                along, (result, *_) = place(case.op.axis, x.ndim), case.results  # type: ignore[attr-defined]
                for i in range(result.shape[along]):
                    changed = x.copy()
                    later = [slice(None)] * x.ndim
                    later[along] = slice(max(0, i + ahead + 1), None)
                    changed[tuple(later)] += 1
                    operands = [changed if n == number else each for n, each in enumerate(case.operands)]
                    (found, *_) = case.evaluate(operands)
                    upto = [slice(None)] * found.ndim
                    upto[along] = slice(0, i + 1)
                    np.testing.assert_array_equal(found[tuple(upto)], result[tuple(upto)])
                    if 0 <= i + ahead < x.shape[along]:
                        at = [slice(None)] * x.ndim
                        at[along] = slice(i + ahead, i + ahead + 1)
                        changed[tuple(at)] += 1
                        assert (case.evaluate(operands)[0][tuple(upto)] != result[tuple(upto)]).any()
                compared.add(name)
    assert compared == {"concat", "slice", "pad", "windows"}
