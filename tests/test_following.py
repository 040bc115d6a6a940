"""`follow` and its three results: axes that may be stepped, packed or split, and the line of an obstacle."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

import treadle as t
from treadle.ir.analysis.encounters import (
    Generated,
    Indexed,
    Kind,
    Paired,
    Reduced,
    Reordered,
    Resized,
    Scanned,
    SelfAttention,
    Verdict,
    Whole,
)
from treadle.ir.analysis.following import follow
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError
from treadle.ir.graph import Graph
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.models.t5 import t5, t5_encoder

SMALL = {"vocab": 100, "dim": 64, "heads": 4, "layers": 3}


@pytest.fixture(scope="module")
def gpt2_graph() -> Graph:
    return gpt2.configure(**SMALL).graph()


def line_of(model: t.Model, text: str) -> str:
    """Return the line of a model's source that contains this text, as errors show it."""
    lines, first = inspect.getsourcelines(model.function)
    (offset,) = [i for i, line in enumerate(lines) if text in line]
    return f"test_following.py:{first + offset}"


def lines(verdict: Verdict) -> set[str]:
    return {e.line.rpartition("/")[2] for e in verdict.against}


def test_gpt2_sequence_may_be_stepped_and_packed(gpt2_graph: Graph) -> None:
    found = follow(gpt2_graph, "S")
    assert found.step() and found.pack()
    assert found.outputs == {"logits": 1}
    assert [(e.node.op.name, e.count) for e in found.encounters] == [("positions", 1), ("attention", 3)]


def test_a_decoder_of_t5_may_be_stepped() -> None:
    found = follow(t5.configure(**SMALL).graph(), "T")
    assert found.step()
    assert all(e.node.op.name in ("attention", "iota", "positions") for e in found.encounters)


def test_encoders_may_be_packed_and_not_stepped() -> None:
    for model in (bert.configure(**SMALL), t5_encoder.configure(**SMALL)):
        found = follow(model.graph(), "S")
        assert found.pack(), str(found.pack())
        step = found.step()
        assert not step
        assert "attention" in {e.node.op.name for e in step.against}


@t.model
def mean_decoder(tokens: t.i64["B S"], *, dim=32):
    x = t.embed(tokens, 100, dim, name="wte")
    for _ in t.stack("h", 2):
        x += t.self_attention(x, 4, causal=True, name="attn")
        x += t.expand(t.reduce_mean(x, axes=(1,), keep=True), shape=x.shape)
    return t.unembed(x, tied="wte")


@t.model
def convolution_decoder(tokens: t.i64["B S"], *, dim=32):
    x = t.embed(tokens, 100, dim, name="wte")
    for _ in t.stack("h", 2):
        x += t.self_attention(x, 4, causal=True, name="attn")
        y = t.rearrange(x, pattern="b s d -> b d s")
        y = t.convolution(y, dim, (3,), padding=(1,), name="conv")
        x += t.rearrange(y, pattern="b d s -> b s d")
    return t.unembed(x, tied="wte")


@t.model
def attention_by_hand(tokens: t.i64["B S"], *, dim=32):
    x = t.embed(tokens, 100, dim, name="wte")
    scores = t.einsum(t.linear(x, dim, name="q"), x, equation="b s d, b t d -> b s t")
    return t.einsum(t.softmax(scores), x, equation="b s t, b t d -> b s d")


def test_a_mean_over_the_sequence_is_named_with_its_line() -> None:
    found = follow(mean_decoder.graph(), "S")
    assert not found.step()
    assert lines(found.step()) == {line_of(mean_decoder, "reduce_mean")}
    assert found.pack(), "a mean over a ragged axis is the mean over a row's own tokens"


def test_a_convolution_over_the_sequence_is_named_with_its_line() -> None:
    found = follow(convolution_decoder.graph(), "S")
    for verdict in (found.step(), found.pack()):
        assert not verdict
        assert line_of(convolution_decoder, "t.convolution") in lines(verdict)
        assert "conv" in {e.node.op.name for e in verdict.against}


def test_pairs_of_positions_outside_attention_cannot_be_packed() -> None:
    verdict = follow(attention_by_hand.graph(), "S").pack()
    assert lines(verdict) == {line_of(attention_by_hand, "scores =")}
    assert "paired with itself" in str(verdict)


@pytest.mark.parametrize(
    ("axis", "rows", "columns"),
    [("heads", "attn.q.weight", "attn.out.weight"), ("ffn", "mlp.up.weight", "mlp.down.weight")],
)
def test_heads_and_ffn_split_with_one_sum_a_block(gpt2_graph: Graph, axis: str, rows: str, columns: str) -> None:
    found = follow(gpt2_graph, axis)
    split = found.split()
    assert split, str(split)
    assert [(c.encounter.node.op.name, c.by, c.encounter.count) for c in split.combine] == [("linear", "sum", 3)]
    for i in range(3):
        assert found.parameters[f"h.{i}.{rows}"] == 0
        assert found.parameters[f"h.{i}.{rows.replace('weight', 'bias')}"] == 0
        assert found.parameters[f"h.{i}.{columns}"] == 1
        assert f"h.{i}.{columns.replace('weight', 'bias')}" not in found.parameters, "added once, after the sum"


def test_the_vocabulary_splits_with_a_sum_at_the_lookup(gpt2_graph: Graph) -> None:
    found = follow(gpt2_graph, "wte.weight[0]")
    split = found.split()
    assert split
    assert [(c.encounter.node.op.name, c.by) for c in split.combine] == [("embedding", "sum")]
    assert found.outputs == {"logits": 2}, "the logits keep the axis: each device has its part"


def test_one_layer_alone_may_be_split(gpt2_graph: Graph) -> None:
    found = follow(gpt2_graph, "h.1.mlp.up.weight[0]")
    assert found.parameters == {"h.1.mlp.up.weight": 0, "h.1.mlp.up.bias": 0, "h.1.mlp.down.weight": 1}


def test_a_softmax_over_a_split_axis_combines_a_max_and_a_sum() -> None:
    @t.model
    def head(x: t.f32["B 32"], *, vocab=64):
        return t.softmax(t.linear(x, t.Dim.of(vocab, "vocab"), name="logits"))

    split = follow(head.graph(), "vocab").split()
    assert split
    assert {c.by for c in split.combine} == {"max", "sum"}
    assert {c.encounter.within.op.name for c in split.combine if c.encounter.within} == {"softmax"}


def test_equal_sizes_are_not_one_axis() -> None:
    @t.model
    def two(x: t.f32["B S D"], y: t.f32["B S D"]):
        return {"x": t.softmax(x, axis=1), "y": y}

    g = two.graph()
    assert follow(g, "x[1]").outputs == {"x": 1}
    assert follow(g, "y[1]").encounters == ()


def refused(build: Callable[[t.Tensor], t.Tensor], type: t.Type, axis: str, reason: str) -> bool:
    """Return True if a model of one input must not be stepped along an axis, for this reason."""

    def probe(x):
        return build(x)

    probe.__annotations__["x"] = type
    verdict = follow(t.model(probe).graph(), axis).step()
    return not verdict and reason in str(verdict)


def test_an_order_along_a_merged_axis_is_not_the_sequence_s() -> None:
    def causal_over_heads_and_positions(x: t.Tensor) -> t.Tensor:
        q = t.rearrange(x, pattern="b s (h=2 d) -> b 1 (h s) d")
        y = t.attention(q, q, q, mask=t.causal)
        return t.rearrange(y, pattern="b 1 (h=2 s) d -> b s (h d)")

    def sum_over_heads_and_positions(x: t.Tensor) -> t.Tensor:
        y = t.cumsum(t.rearrange(x, pattern="b s (h=2 d) -> b (h s) d"), axis=1)
        return t.rearrange(y, pattern="b (h=2 s) d -> b s (h d)")

    def causal_over_the_batch(x: t.Tensor) -> t.Tensor:
        q = t.rearrange(x, pattern="b s d -> 1 1 (b s) d")
        return t.attention(q, q, q, mask=t.causal)

    for build in (causal_over_heads_and_positions, sum_over_heads_and_positions, causal_over_the_batch):
        assert refused(build, t.f32["B S 8"], "S", "the axis is whole"), build.__name__


def test_a_shuffled_axis_is_named() -> None:
    def shuffled(x: t.Tensor) -> t.Tensor:
        y = t.rearrange(x, pattern="b (s r=2) d -> b 1 (r s) d")
        return t.attention(y, y, y, mask=t.causal)

    assert refused(shuffled, t.f32["B 8 4"], "x[1]", "rearrange: the axis is reordered")


def test_an_axis_of_another_length_is_named() -> None:
    def cut(x: t.Tensor) -> t.Tensor:
        return t.slice(x, axis=1, start=1)

    def strided(x: t.Tensor) -> t.Tensor:
        return t.slice(x, axis=1, start=0, stride=2)

    def padded(x: t.Tensor) -> t.Tensor:
        return t.pad(x, axis=1, before=1)

    def joined(x: t.Tensor) -> t.Tensor:
        return t.concat(x, x, axis=1)

    def pooled(x: t.Tensor) -> t.Tensor:
        return t.max_pool(t.rearrange(x, pattern="b s c -> b c s"), kernel=(2,))

    for build in (cut, strided, padded, joined, pooled):
        reason = "the axis is sliced, padded, joined or strided"
        assert refused(build, t.f32["B S 8"], "S", reason), build.__name__


def test_values_computed_from_the_length_are_followed() -> None:
    def from_the_end(x: t.Tensor) -> t.Tensor:
        back = t.reduce_max(t.iota(size="S"), axes=(0,)) - t.iota(size="S")
        return x + t.rearrange(back.cast("f32"), pattern="s -> s 1")

    def by_the_length(x: t.Tensor) -> t.Tensor:
        return x * t.reduce_sum(t.iota(size="S", dtype="f32"), axes=(0,))

    def by_another_length(x: t.Tensor) -> t.Tensor:
        return x * t.reduce_sum(t.iota(size="2*S", dtype="f32"), axes=(0,))

    def in_a_block(x: t.Tensor) -> t.Tensor:
        c = t.parameter("c", 1, 8)
        for _ in t.stack("h", 2):
            c = c * t.ops.size(value="S", dtype="f32") + 1.0
        return x + t.rearrange(c, pattern="b d -> b 1 d")

    assert refused(from_the_end, t.f32["B S 8"], "S", "reduce_max: the axis is reduced")
    assert refused(by_the_length, t.f32["B S 8"], "S", "reduce_sum: the axis is reduced")
    assert refused(by_another_length, t.f32["B S 8"], "S", "iota")
    assert refused(in_a_block, t.f32["B S 8"], "S", "size")


def test_pairs_in_an_output_cannot_be_stepped() -> None:
    def scores(x: t.Tensor) -> t.Tensor:
        return t.einsum(x, x, equation="b s d, b t d -> b s t")

    assert refused(scores, t.f32["B S 8"], "S", "paired with itself in an output")


def test_splitting_the_sequence_names_self_attention_alone(gpt2_graph: Graph) -> None:
    split = follow(gpt2_graph, "S").split()
    assert [e.node.op.name for e in split.against] == ["attention"]
    assert [(c.encounter.node.op.name, c.by) for c in split.combine] == [("positions", "scan")]


def kinds_of(build: Callable[[t.Tensor], t.Tensor], type: t.Type, axis: str) -> list[Kind]:
    def probe(x):
        return build(x)

    probe.__annotations__["x"] = type
    return [e.kind for e in follow(t.model(probe).graph(), axis).encounters]


@pytest.mark.parametrize(
    ("build", "axis", "met"),
    [
        (lambda x: t.reduce_max(x, axes=(1,)), "S", [Reduced("a1", "max")]),
        (lambda x: t.softmax(x, axis=1), "S", [Whole("a1")]),
        (lambda x: t.cumsum(x, axis=1), "S", [Scanned("a1")]),
        (lambda x: t.gather(x, t.iota(size=2), axis=1), "S", [Indexed("b")]),
        (lambda x: x + t.rearrange(t.iota(size="S", dtype="f32"), pattern="s -> s 1"), "S", [Generated("a")]),
        (lambda x: t.pad(x, axis=1, before=1), "S", [Resized("b")]),
        (lambda x: t.rearrange(x, pattern="b s (h=2 d) -> b s (d h)"), "x[2]", [Reordered()]),
        (
            lambda x: t.reduce_sum(t.einsum(x, x, equation="b s d, b t d -> b s t"), axes=(1, 2)),
            "S",
            [Paired(), Reduced("a1", "sum"), Reduced("a2", "sum")],
        ),
        (
            lambda x: t.einsum(x, x, equation="b s d, b t d -> b s t"),
            "S",
            [Paired(), Paired(in_output=True)],
        ),
        (lambda x: attended(x, t.causal), "S", [SelfAttention("t", causal=True, aligned=True)]),
        (lambda x: attended(x, None), "S", [SelfAttention("t", causal=False, aligned=True)]),
    ],
)
def test_each_kind_of_encounter(build: Callable[[t.Tensor], t.Tensor], axis: str, met: list[Kind]) -> None:
    assert kinds_of(build, t.f32["B S 8"], axis) == met


def attended(x: t.Tensor, mask: t.Mask | None) -> t.Tensor:
    y = t.rearrange(x, pattern="b s d -> b 1 s d")
    return t.rearrange(t.attention(y, y, y, mask=mask), pattern="b 1 s d -> b s d")


def test_a_combination_says_by_what_an_encounter_does_not() -> None:
    """A scan has no reduction. Only the split decides that its parts are combined by a scan."""

    @t.model
    def running(x: t.f32["B S"]):
        return t.cumsum(x, axis=1)

    (combination,) = follow(running.graph(), "S").split().combine
    assert combination.by == "scan"
    assert str(combination.encounter).startswith("cumsum: the axis is scanned  (")
    assert str(combination).startswith("cumsum: the axis is scanned by scan  (")


def test_an_unknown_axis_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(GraphError, match="no axis 'Q'") as error:
        follow(gpt2.configure(**SMALL).graph(), "Q")
    assert "heads" in (error.value.hint or "") and "S" in (error.value.hint or "")


def test_a_followed_axis_prints_as_one_line() -> None:
    found = follow(gpt2.configure(layers=2, dim=8, heads=2, vocab=10).graph(), "S")
    for shown in (found, found.split(), found.step(), *found.encounters):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)
    assert repr(found).startswith("<axis S of gpt2: in ")
    assert repr(found.split()).startswith("<S may not be split: ")
    assert repr(found.step()) == "<S may be stepped>"


def test_a_place_that_spans_a_part_of_a_factor_is_followed_into_it() -> None:
    """8 columns cover all of d, and 2 of the rows of h, which are summed."""
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, 24]")
    columns = b.rearrange(x, pattern="b (a=3 cols=8) -> b a cols")
    rows = b.rearrange(x, pattern="b (h=6 d=4) -> b h d")
    b.outputs(y=columns, z=b.reduce_sum(rows, axes=(1,)))
    assert any(e.node.op.name == "reduce_sum" for e in follow(b.graph, "cols").encounters)


def test_an_axis_of_size_one_is_told_from_what_it_is_merged_with() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, 1, 8]")
    merged = b.rearrange(x, pattern="b a c -> b (a c)")
    b.outputs(y=merged, z=b.rearrange(merged, pattern="b (a=1 c) -> b a c"))
    found = follow(b.graph, "x[1]")
    assert found.outputs == {"y": 1, "z": 1}
    assert [(p.dim, p.inner, p.size) for p in found.places] == [(1, 1, 1), (1, 8, 1), (1, 1, 1)]
    assert follow(b.graph, "x[2]").outputs == {"y": 1, "z": 2}


def test_a_scatter_and_a_count_along_a_divided_axis_need_nothing() -> None:
    """In each part of the axis, a scatter writes the elements of that part, and a count begins at the start of the
    part.
    """
    b = Builder(Graph("g"))
    x, i, u = b.input("x", "f32[B, S]"), b.input("i", "i64[B, 3]"), b.input("u", "f32[B, 3]")
    scattered, counted = b.scatter_add(x, i, u, axis=1), b.iota(size="S")
    b.outputs(y=scattered, n=b.layer_norm(x, None, None), c=counted)
    split = follow(b.graph, "S").split()
    assert split and [(c.encounter.op, c.by) for c in split.combine] == [("layer_norm (reduce_sum inside)", "sum")] * 2
    assert [(c.encounter.op, c.by) for c in follow(b.graph, "u[1]").split().combine] == [("scatter_add", "sum")]


def test_an_axis_that_the_model_does_not_have() -> None:
    graph = gpt2.configure(layers=1).graph()
    with pytest.raises(GraphError, match="there is no axis 'T'") as caught:
        follow(graph, "T")
    assert follow(graph, str(caught.value.hint).rpartition("such as ")[2]).places


@pytest.mark.parametrize("name", ["wte.weight", "tokens"])
def test_a_weight_or_an_input_without_a_dimension(name: str) -> None:
    graph = gpt2.configure(layers=1).graph()
    with pytest.raises(GraphError, match="there is no axis") as caught:
        follow(graph, name)
    assert str(caught.value.hint).endswith(f"or a dimension such as {name}[0]")
    assert follow(graph, f"{name}[0]").places
