"""Slices move before the computation of the sliced value, also into calls; near misses stay; numbers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pytest

import treadle
import treadle.frontends.language as t
from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.cut_sooner import CutSooner
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

WEIGHTS = ["w: f32[8, 4]", "b: f32[8]"]

FORMS = {
    "first": (
        ("x: f32[B, S, 4]", "y: f32[B, 8]"),
        ["h = linear(x, $w, $b)", "y = gather(h, 0, axis=1)"],
        ["x_2 = slice(x, axis=1, stop=1)", "h = linear(x_2, $w, $b)", "y = gather(h, 0, axis=1)"],
    ),
    "last": (
        ("x: f32[B, S, 4]", "y: f32[B, 1, 8]"),
        ["h = linear(x, $w, $b)", "g = gelu(h)", "y = slice(g, axis=1, start=-1)"],
        ["x_2 = slice(x, axis=1, start=-1)", "h = linear(x_2, $w, $b)", "y = gelu(h)"],
    ),
    "two-near-each-other": (
        ("x: f32[B, 9, 4]", "y: f32[B, 4], z: f32[B, 1, 4]"),
        ["h = tanh(x)", "y = gather(h, 2, axis=1)", "z = slice(h, axis=1, start=4, stop=5)"],
        [
            "x_2 = slice(x, axis=1, start=2, stop=5)",
            "h = tanh(x_2)",
            "y = gather(h, 0, axis=1)",
            "z = slice(h, axis=1, start=2)",
        ],
    ),
    "a-table-of-positions": (
        ("x: f32[B, 9, 8]", "y: f32[B, 8]"),
        ["h = add(x, $p)", "y = gather(h, 3, axis=1)"],
        [
            "x_2 = slice(x, axis=1, start=3, stop=4)",
            "p = slice($p, axis=0, start=3, stop=4)",
            "h = add(x_2, p)",
            "y = gather(h, 0, axis=1)",
        ],
    ),
    "queries-alone": (
        ("q: f32[B, 2, S, 4], k: f32[B, 2, S, 4], lengths: i64[B]", "y: f32[B, 1, (2 4)]"),
        [
            "a = attention(q, k, k, lengths, terms=[padding])",
            'r = rearrange(a, pattern="b h s d -> b s (h d)")',
            "y = slice(r, axis=1, stop=1)",
        ],
        [
            "q_2 = slice(q, axis=2, stop=1)",
            "a = attention(q_2, k, k, lengths, terms=[padding])",
            'y = rearrange(a, pattern="b h s d -> b s (h d)")',
        ],
    ),
    "queries-at-their-positions": (
        ("q: f32[B, 2, S, 4], k: f32[B, 2, S, 4], m: bool[B, 2, S, S]", "y: f32[B, 2, 1, 4]"),
        ["a = attention(q, k, k, m, terms=[causal, mask])", "y = slice(a, axis=2, start=-1)"],
        [
            "q_2 = slice(q, axis=2, start=-1)",
            "m_2 = slice(m, axis=2, start=-1)",
            "y = attention(q_2, k, k, m_2, terms=[causal, mask], start=S-1)",
        ],
    ),
    "a-sum-along-another-axis": (
        ("x: f32[B, S, 4]", "y: f32[B, 1]"),
        ["e = exp(x)", "r = reduce_sum(e, axes=[2])", "y = slice(r, axis=1, start=1, stop=2)"],
        ["x_2 = slice(x, axis=1, start=1, stop=2)", "e = exp(x_2)", "y = reduce_sum(e, axes=[2])"],
    ),
}


def cut(takes: str, gives: str, lines: Sequence[str], weights: Sequence[str] = (*WEIGHTS, "p: f32[9, 8]")) -> str:
    names = [part.strip().partition(":")[0] for part in gives.split(", ") if ":" in part]
    held = [w for w in weights if any(f"${w.partition(':')[0]}" in line for line in lines)]
    return program(takes, gives, *lines, "return " + ", ".join(f"{n} = {n}" for n in names), weights=held)


@pytest.mark.parametrize("name", FORMS)
def test_only_values_that_are_read_are_computed(name: str) -> None:
    (takes, gives), before, after = FORMS[name]
    done = PassManager([CutSooner()], certify=True).run(parse_graph(cut(takes, gives, before)))
    assert done.graph == parse_graph(cut(takes, gives, after))
    assert_same_numbers(done.source, done.graph)
    assert done.log[0].certificates
    assert not done.log[0].refusals
    again = PassManager([CutSooner()]).run(done.graph)
    assert again.graph == done.graph
    assert not again.log[0].matches


TAKEN = ['e = rearrange(i, pattern="b n -> b n 1")', "f = expand(e, shape=[B, N, 8])"]
MOVED = ["t = expand(e, shape=[B, N, 4])", "x_2 = take_along_axis(x, t, axis=1)"]

STAYS = {
    "as-many-as-it-comes-to": (
        "x: f32[B, 9, 8], j: i64[B, S]",
        "y: f32[B, S, 8]",
        [
            "h = tanh(x)",
            "i = mul(j, 2)",
            'e = rearrange(i, pattern="b n -> b n 1")',
            "f = expand(e, shape=[B, S, 8])",
            "y = take_along_axis(h, f, axis=1)",
        ],
    ),
    "elements-of-their-own": (
        "x: f32[B, 9, 8], i: i64[B, 2, 8]",
        "y: f32[B, 2, 8]",
        ["h = tanh(x)", "y = take_along_axis(h, i, axis=1)"],
    ),
    "computed-of-what-is-read-there": (
        "x: f32[B, 9, 8]",
        "y: f32[B, 1, 8]",
        [
            "h = tanh(x)",
            "m = reduce_max(h, axes=[1, 2], keep=true)",
            "o = cast(m, to=i64)",
            "f = expand(o, shape=[B, 1, 8])",
            "y = take_along_axis(h, f, axis=1)",
        ],
    ),
    "more-than-half": ("x: f32[B, 9, 8]", "y: f32[B, 5, 8]", ["h = tanh(x)", "y = slice(h, axis=1, stop=5)"]),
    "as-many-as-there-are": ("x: f32[B, S, 8]", "y: f32[B, S-1, 8]", ["h = tanh(x)", "y = slice(h, axis=1, stop=-1)"]),
    "far-apart": (
        "x: f32[B, 9, 8]",
        "y: f32[B, 8], z: f32[B, 8]",
        ["h = tanh(x)", "y = gather(h, 0, axis=1)", "z = gather(h, 8, axis=1)"],
    ),
    "along-two-axes": (
        "x: f32[B, 9, 8]",
        "y: f32[B, 8], z: f32[B, 9]",
        ["h = tanh(x)", "y = gather(h, 0, axis=1)", "z = gather(h, 0, axis=2)"],
    ),
    "read-as-a-whole": (
        "x: f32[B, 9, 8]",
        "y: f32[B, 8], h: f32[B, 9, 8]",
        ["h = tanh(x)", "y = gather(h, 0, axis=1)"],
    ),
    "computed-positions": (
        "x: f32[B, 9, 8], i: i64[]",
        "y: f32[B, 8]",
        ["h = tanh(x)", "y = gather(h, i, axis=1)"],
    ),
    "steps-of-two": ("x: f32[B, 9, 8]", "y: f32[B, 5, 8]", ["h = tanh(x)", "y = slice(h, axis=1, stride=2)"]),
    "rows-of-a-weight": ("x: f32[B, 9, 4]", "y: f32[B, 9]", ["h = linear(x, $w)", "y = gather(h, 0, axis=2)"]),
    "summed-up": (
        "x: f32[B, 9, 8]",
        "y: f32[B, 1, 8]",
        ["h = cumsum(x, axis=1)", "y = slice(h, axis=1, stop=1)"],
    ),
    "over-the-whole-axis": ("x: f32[B, 9, 8]", "y: f32[B, 8]", ["h = softmax(x, axis=1)", "y = gather(h, 0, axis=1)"]),
    "nothing-computed": (
        "x: f32[B, 9, 8]",
        "y: f32[8, B]",
        ['h = rearrange(x, pattern="b s d -> s d b")', "y = gather(h, 0, axis=0)"],
    ),
    "joined-axes": (
        "x: f32[B, 9, 8]",
        "y: f32[8]",
        ["g = tanh(x)", 'h = rearrange(g, pattern="b s d -> (b s) d")', "y = gather(h, 0, axis=0)"],
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_programs_that_stay_unchanged(name: str) -> None:
    takes, gives, lines = STAYS[name]
    text = cut(takes, gives, lines)
    done = optimize(text, CutSooner())
    assert done.graph == parse_graph(text)
    assert not done.log[0].changes


def test_several_positions_that_are_looked_up() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", t.f32["B", 9, 4])
    b.outputs(y=b.gather(b.tanh(x), b.constant(np.array([[3, 1], [4, 4]])), axis=1))
    done = PassManager([CutSooner()]).run(b.graph)
    tanh = next(node for node in done.graph.main.nodes if node.op.name == "tanh")
    assert str(tanh.result.type) == "f32[B, 4, 4]"
    assert_same_numbers(done.source, done.graph)


def picks(*lines: str, takes: str = "x: f32[B, 9, 4]", gives: str = "y: f32[B, N, 8]") -> Graph:
    text = cut(f"{takes}, i: i64[B, N]", gives, lines)
    return parse_graph(text.replace("symbols B, S", "symbols B, S, N"))


def test_positions_that_each_row_has_of_its_own() -> None:
    before = picks("h = linear(x, $w, $b)", "g = gelu(h)", *TAKEN, "y = take_along_axis(g, f, axis=1)")
    done = PassManager([CutSooner()], certify=True).run(before)
    after = picks(TAKEN[0], *MOVED, "h = linear(x_2, $w, $b)", "y = gelu(h)")
    assert done.graph == after
    assert done.log[0].certificates
    assert_same_numbers(done.source, done.graph)


def test_positions_are_turned_to_where_rows_lie() -> None:
    """An added table has the axis of positions but not the axis of rows, and is not sliced."""
    lines = ["h = tanh(x)", 'r = rearrange(h, pattern="b s (h d) -> b h s d", h=2)', "a = attention(r, r, r)"]
    lines = [line.replace(", h=2)", ")").replace("(h d)", "(h=2 d)") for line in lines]
    lines += ['m = rearrange(a, pattern="b h s d -> b s (h d)")', *TAKEN, "y = take_along_axis(m, f, axis=1)"]
    done = PassManager([CutSooner()]).run(picks(*lines, takes="x: f32[B, 9, 8]"))
    types = {node.op.name: str(node.result.type) for node in done.graph.main.nodes}
    assert types["attention"] == "f32[B, 2, N, 4]"
    assert types["tanh"] == "f32[B, 9, 8]"
    assert_same_numbers(done.source, done.graph)
    added = ["h = add(x, $p)", "g = tanh(h)", *TAKEN, "y = take_along_axis(g, f, axis=1)"]
    done = PassManager([CutSooner()]).run(picks(*added, takes="x: f32[B, 9, 8]"))
    types = {node.op.name: str(node.result.type) for node in done.graph.main.nodes}
    assert (types["add"], types["tanh"]) == ("f32[B, 9, 8]", "f32[B, N, 8]")


def test_positions_go_into_calls_but_not_to_a_causal_mask() -> None:
    exe = treadle.compile("gpt2", head="classifier", inputs=["lengths"], dim=8, heads=2, layers=3, vocab=20)
    assert calls(exe.graph) == [*[("h", "f32[B, S, 8]")] * 2, ("h_cut", "f32[B, 1, 8]")]
    types = {node.op.name: str(node.results[0].type) for node in exe.graph.functions["h_cut"].nodes}
    assert types["attention"] == "f32[B, heads=2, S, 4]"
    assert types["activated_linear"] == "f32[B, 1, ffn=32]"
    (record,) = [each for each in exe.log if each.name == "cut-sooner"]
    assert [event.reason for event in record.refusals] == [
        "attention depends on positions, and each row is read at its own positions"
    ]


def test_a_word_is_said_where_an_op_has_no_part() -> None:
    text = cut(
        "q: f32[B, 2, S, 4], k: f32[B, 2, S, 4], o: i64[B]",
        "y: f32[B, 2, 1, 4], m: f32[B, 2, 1], s: f32[B, 2, 1]",
        [
            "a, n, l = attention_parts(q, k, k, o, terms=[causal])",
            "y = slice(a, axis=2, stop=1)",
            "m = slice(n, axis=2, stop=1)",
            "s = slice(l, axis=2, stop=1)",
        ],
    )
    done = optimize(text, CutSooner())
    assert done.graph == parse_graph(text)
    (refusal,) = done.log[0].refusals
    assert refusal.reason == "attention_parts cannot compute 1 of S positions, though only these are read"


# -- into calls ------------------------------------------------------------------------------------------------------


@t.model
def encoder(
    x: Annotated[t.Tensor, t.f32["B S 8"]], *, layers: int = 3, mixes: bool = True, shown: bool = False
) -> dict[str, t.Tensor]:
    for _ in t.stack("layer", layers):
        if mixes:
            x += t.self_attention(x, 2, name="attn")
        x += t.mlp(x, 16, act=t.gelu, name="mlp")
    first = t.gather(x, t.constant(0), axis=1)
    return {"first": first, "hidden": x} if shown else {"first": first}


def calls(graph: Graph) -> list[tuple[str, str]]:
    """Return the functions that main calls, each with the type of its result."""
    return [(n.op.callee, str(n.result.type)) for n in graph.main.nodes if n.op.callee is not None]


def test_the_last_layer_computes_one_token() -> None:
    done = PassManager([CutSooner()], certify=True).run(encoder.graph())
    assert calls(done.graph) == [*[("layer", "f32[B, S, 8]")] * 2, ("layer_cut", "f32[B, 1, 8]")]
    types = {node.op.name: str(node.result.type) for node in done.graph.functions["layer_cut"].nodes}
    assert types["attention"] == "f32[B, heads=2, 1, 4]"
    assert types["gelu"] == "f32[B, 1, ffn=16]"
    (match,) = done.log[0].matches
    assert match.reason == "1 of S positions: only these are computed by layer_cut"
    assert done.log[0].certificates
    assert_same_numbers(done.source, done.graph)


def test_layers_that_mix_nothing_compute_one_token_all() -> None:
    done = PassManager([CutSooner()]).run(encoder.configure(mixes=False).graph())
    assert calls(done.graph) == [("layer_cut", "f32[B, 1, 8]")] * 3
    assert list(done.graph.functions) == ["layer_cut", "main"]
    assert_same_numbers(done.source, done.graph)


def test_a_layer_that_is_shown_computes_all() -> None:
    done = PassManager([CutSooner()]).run(encoder.configure(shown=True).graph())
    assert not done.log[0].changes
    assert done.graph == done.source


def test_a_cut_inside_a_block_that_is_called_twice() -> None:
    """A slice in the block, and a slice in its caller, which moves into the block."""
    block = """
  block f(x: f32[B, 9, 8]) -> (y: f32[B, 4, 8]) {
    h = exp(x)
    t = slice(h, axis=1, stop=4)
    y = tanh(t)
    return y = y
  }

  main("""
    lines = ["a = f(x)", "c = pad(a, axis=1, after=5)", "d = f(c)", "y = slice(d, axis=1, start=1, stop=2)"]
    text = program("x: f32[B, 9, 8]", "y: f32[B, 1, 8]", *lines, "return y = y").replace("\n  main(", block)
    done = PassManager([CutSooner()]).run(parse_graph(text))
    sizes = {name: [str(n.result.type) for n in f.nodes] for name, f in done.graph.functions.items()}
    assert sizes["f"] == ["f32[B, 4, 8]"] * 3
    assert sizes["f_cut"] == ["f32[B, 1, 8]"] * 2
    assert_same_numbers(done.source, done.graph)


# -- models ----------------------------------------------------------------------------------------------------------

HEADS = {
    "bert": ("classifier", 1),
    "electra": ("classifier", 1),
    "roberta": ("classifier", 1),
    "vit": ("classifier", 1),
    "gpt2": ("classifier", 1),
    "deit": ("distilled_classifier", 2),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_classifiers_of_the_zoo(name: str, backend: str) -> None:
    """The last block returns only the position that the head reads, and the numbers equal the whole model's."""
    pytest.importorskip({"torch": "torch", "tvm": "tvm"}.get(backend, "numpy"))
    head, rows = HEADS[name]
    family, more = ("vit", {"distilled": True}) if name == "deit" else (name, {})
    config = {"dim": 16, "heads": 2, "layers": 2, "head": head, **more}
    if family == "vit":
        config |= {"height": 32, "width": 32}
    without = [each for each in DEFAULT if not isinstance(each, CutSooner)]
    exe, whole = (treadle.compile(family, backend=backend, passes=p, **config) for p in (DEFAULT, without))
    given = next(n for n in reversed(exe.graph.main.nodes) if n.op.callee is not None)
    assert given.result.type.shape[1].constant == rows
    rng = np.random.default_rng(0)
    takes = {
        p.name: rng.integers(0, 90, (3, 7)) if p.name == "tokens" else rng.standard_normal((3, 3, 32, 32), np.float32)
        for p in exe.inputs
    }
    np.testing.assert_allclose(exe(**takes).logits, whole(**takes).logits, rtol=0, atol=1e-6)


def test_an_encoder_of_pytorchs() -> None:
    """The attention of PyTorch's encoder moves rows to [s b] and back; the slice must pass through these ops."""
    torch = pytest.importorskip("torch")

    class First(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Any) -> Any:
            return self.layers(x)[:, 0]

    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    model = First().eval()
    exe = treadle.compile(treadle.from_torch(model, (x,)))
    sizes = [str(node.result.type.shape[2]) for _, node in exe.graph.walk() if node.op.name == "attention"]
    assert sizes == ["7", "1"]
    (got,) = exe(**{exe.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=0, atol=1e-5)
