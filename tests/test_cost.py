"""Costs: numbers of operations by the usual formulas, of live pairs by counting, of bytes, and of parameters of known
models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import treadle.frontends.language as t
from treadle.ir.analysis.cost import Cost, graph_cost, kernel_cost, node_cost, parameter_bytes, parameter_count
from treadle.ir.attention.attention_terms import Causal, Padding, Term, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import SizeError
from treadle.ir.graph import Graph
from treadle.ir.ops.blocks import Decode
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.program.program import Program


def cost(make: Callable[..., Any], *types: str, **sizes: int) -> Cost:
    """Return the cost of the ops that `make` adds to a builder, for inputs of these types."""
    b = Builder(Graph("g"))
    made = make(b, *[b.input(f"x{i}", type) for i, type in enumerate(types)])
    b.outputs(**{f"y{i}": y for i, y in enumerate(made if isinstance(made, tuple) else (made,))})
    return graph_cost(b.graph, sizes)


# -- operations ----------------------------------------------------------------------------------------------------

FLOPS: dict[str, tuple[Callable[..., Any], list[str], int]] = {
    "matmul": (lambda b, x, y: x @ y, ["f32[2, 3, 4]", "f32[4, 5]"], 2 * 2 * 3 * 4 * 5),
    "matmul, batches": (lambda b, x, y: x @ y, ["f32[2, 1, 3, 4]", "f32[7, 4, 5]"], 2 * 2 * 7 * 3 * 4 * 5),
    "linear": (lambda b, x, w: b.linear(x, w), ["f32[2, 3, 4]", "f32[5, 4]"], 2 * 2 * 3 * 4 * 5),
    "linear with bias": (lambda b, *x: b.linear(*x), ["f32[6, 4]", "f32[5, 4]", "f32[5]"], 2 * 6 * 4 * 5),
    "einsum": (
        lambda b, x, y: b.einsum(x, y, equation="b i d, b j d -> b i j"),
        ["f32[2, 3, 4]", "f32[2, 5, 4]"],
        2 * 2 * 3 * 5 * 4,
    ),
    "add": (lambda b, x, y: x + y, ["f32[2, 3]", "f32[2, 3]"], 6),
    "add, broadcasting": (lambda b, x, y: x + y, ["f32[2, 1]", "f32[3]"], 6),
    "sum": (lambda b, x: b.reduce_sum(x, axes=(1,)), ["f32[2, 3]"], 6),
    "softmax": (lambda b, x: b.softmax(x), ["f32[2, 3]"], 5 * 6),  # maximum, difference, exponential, sum, quotient
    "conv": (
        lambda b, x, w: b.conv(x, w, strides=(16, 16)),
        ["f32[1, 3, 224, 224]", "f32[768, 3, 16, 16]"],
        2 * 14 * 14 * 768 * 3 * 16 * 16,
    ),
    "conv, padded": (
        lambda b, x, w: b.conv(x, w, padding=(1,)),
        ["f32[2, 3, 10]", "f32[4, 3, 3]"],
        2 * 2 * 10 * 4 * 3 * 3,
    ),
    "conv, in groups": (
        lambda b, x, w: b.conv(x, w, groups=3),
        ["f32[1, 6, 10]", "f32[3, 2, 3]"],
        2 * 8 * 3 * 2 * 3,
    ),
    "rearrange": (lambda b, x: b.rearrange(x, pattern="a b -> b a"), ["f32[2, 3]"], 0),
    "cast": (lambda b, x: x.cast("f16"), ["f32[2, 3]"], 0),
    "embedding": (lambda b, table, i: b.embedding(table, i), ["f32[9, 4]", "i64[5]"], 0),
    "nothing": (lambda b, x: x, ["f32[2, 3]"], 0),
}


@pytest.mark.parametrize("name", FLOPS)
def test_operations(name: str) -> None:
    make, types, wanted = FLOPS[name]
    assert cost(make, *types).flops == wanted


def test_symbols_take_sizes() -> None:
    def make(b: Builder, x: Expr, w: Expr) -> Expr:
        return b.linear(x, w)  # type: ignore[no-any-return]

    for rows, length in ((1, 1), (3, 7)):
        assert cost(make, "f32[B, S, 8]", "f32[5, 8]", B=rows, S=length).flops == 2 * rows * length * 8 * 5
    assert cost(lambda b, x: x + 1.0, "f32[(S+3)//4]", S=6).flops == 2
    with pytest.raises(SizeError, match="a cost needs a size for B, S") as caught:
        cost(make, "f32[B, S, 8]", "f32[5, 8]")
    assert caught.value.hint == "B=128"


# -- attention -----------------------------------------------------------------------------------------------------

TERMS: dict[str, tuple[tuple[Term, ...], Callable[[int, int], bool]]] = {
    "all": ((), lambda i, j: True),
    "causal": ((Causal(),), lambda i, j: j <= i),
    "window": ((Window(3),), lambda i, j: abs(i - j) < 3),
    "both": ((Causal(), Window(2)), lambda i, j: i - 1 <= j <= i),
    "padding": ((Padding(),), lambda i, j: True),  # depends on values: an upper bound
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8), (8, 3), (1, 1)])
def test_attention_costs_its_live_pairs(name: str, queries: int, keys: int) -> None:
    """Each pair costs 2 d + 2 e for the two products, and 5 in between (scale, maximum, difference, exponential,
    sum).
    """
    terms, sees = TERMS[name]
    live = sum(sees(i, j) for i in range(queries) for j in range(keys))
    given = ["i64[2]"] if Padding() in terms else []
    found = cost(
        lambda b, *x: b.attention(*x, terms=terms),
        f"f32[2, 4, {queries}, 8]",
        f"f32[2, 2, {keys}, 8]",
        f"f32[2, 2, {keys}, 6]",
        *given,
    )
    assert found.flops == 2 * 4 * live * (2 * 8 + 2 * 6 + 5)


def test_causal_attention_is_near_half() -> None:
    def flops(**options: Any) -> int:
        return cost(lambda b, *x: b.attention(*x, **options), *["f32[1, 1, 128, 64]"] * 3).flops

    assert flops(terms=(Causal(),)) * 128 * 2 == flops() * 129


def test_soft_cap_and_biases_cost_a_little() -> None:
    def flops(*more: str, **options: Any) -> int:
        return cost(lambda b, *x: b.attention(*x, **options), *["f32[1, 2, 4, 8]"] * 3, *more).flops

    assert flops(softcap=2.0) - flops() == 3 * 2 * 16


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_are_what_is_read_and_written_once() -> None:
    assert cost(lambda b, x, y: x + y, "f32[2, 3]", "f32[3]").bytes == 4 * (6 + 3 + 6)
    assert cost(lambda b, x: x.cast("f16"), "f32[8]").bytes == 4 * 8 + 2 * 8
    assert cost(lambda b, x: x + 1.0, "f16[8]").bytes == 2 * (8 + 1 + 8)
    assert cost(lambda b, *x: b.linear(*x), "f32[6, 4]", "f32[5, 4]", "f32[5]").bytes == 4 * (24 + 20 + 5 + 30)
    assert cost(lambda b, x: b.softmax(x), "f32[2, 3]").bytes == 4 * (6 + 6), "a composite is one op here"
    assert cost(lambda b, x: x > 0.0, "f32[8]").bytes == 4 * 8 + 4 + 8
    plain = cost(lambda b, x, r, bias: b.add_layer_norm(x, r, None, bias), "f32[6, 4]", "f32[6, 4]", "f32[4]")
    assert plain.bytes == 4 * (2 * 24 + 4 + 2 * 24), "without a weight, which comes before the bias"


def test_a_table_is_read_as_often_as_it_is_looked_up() -> None:
    def looked_up(rows: int, count: int) -> int:
        return cost(lambda b, table, i: b.embedding(table, i), f"f32[{rows}, 768]", f"i64[{count}]").bytes

    assert looked_up(30522, 128) == 128 * 768 * 4 * 2 + 128 * 8
    assert cost(lambda b, table, i: b.gather(table, i), "i64[4]", "i64[3]").bytes == 8 * (3 + 3 + 3), "of integers"
    assert looked_up(2, 128) == 2 * 768 * 4 + 128 * 768 * 4 + 128 * 8, "at most the whole"


def test_attention_reads_the_slots_of_its_rows() -> None:
    """A call with 2 of 8 slots reads the keys and values of these two: 3 heads of 128 positions each."""
    types = "f32[2, 9, 1, 64]", "f32[8, 3, 128, 64]", "f32[8, 3, 128, 64]", "i64[2]", "i64[2]"
    found = cost(lambda b, *x: b.cached_attention(*x, terms=("causal",), scale=0.125), *types).bytes
    assert found == 4 * (2 * (2 * 3 * 128 * 64) + 2 * (2 * 9 * 64)) + 8 * (2 + 2)


def _decoded(b: Builder, blocks: Expr) -> Expr:
    return b.apply(Decode, blocks, of=blocks.type.encoding)  # type: ignore[no-any-return]


def test_blocks_are_decoded_where_they_are_read() -> None:
    """A product reads the bytes of its weight's blocks, whether the weight is bound once or computed at every call."""
    blocks = 96 * (64 + 4)  # a byte for each of 64 numbers, and the scale of the row
    types = ("f32[3, 64]", "f32[96, 64] as int8_rows")
    whole = cost(lambda b, x, w: b.linear(x, _decoded(b, w)), *types)
    assert whole == Cost(2 * 3 * 64 * 96, blocks + 4 * (3 * 64 + 3 * 96))

    b = Builder(Graph("g"))
    b.outputs(y=b.linear(b.input("x", types[0]), _decoded(b, b.parameter("w", types[1]))))
    assert graph_cost(b.graph, {}) == whole


def test_a_lookup_reads_the_blocks_of_its_rows() -> None:
    def looked_up(rows: int, count: int, encoding: str = "int8_rows") -> Cost:
        types = f"f32[{rows}, 64] as {encoding}", f"i64[{count}]"
        return cost(lambda b, table, i: b.embedding(_decoded(b, table), i), *types)

    assert looked_up(50_000, 3) == Cost(0, 3 * (64 + 4) + 3 * 8 + 3 * 64 * 4)
    assert looked_up(50_000, 3, "q4_0") == Cost(0, 3 * 2 * 18 + 3 * 8 + 3 * 64 * 4)
    assert looked_up(2, 3) == Cost(0, 2 * (64 + 4) + 3 * 8 + 3 * 64 * 4), "at most the whole"


def test_numbers_that_are_an_output_or_an_argument_are_written() -> None:
    type, blocks, numbers = "f32[96, 64] as int8_rows", 96 * 68, 96 * 64 * 4
    assert cost(_decoded, type) == Cost(0, blocks + numbers)
    both = cost(lambda b, x: (y := _decoded(b, x), y + y), type)
    assert both == Cost(96 * 64, blocks + numbers + 3 * numbers), "the sum reads the numbers that are there"
    called = parse_graph(
        "graph g {\n block f(a: f32[96, 64]) -> (y: f32[96, 64])\n {\n  y = exp(a)\n  return y = y\n }\n"
        f" main(x: {type}) -> (y: f32[96, 64]) {{\n"
        "  d = decode(x, of=int8_rows)\n  y = f(d)\n  return y = y\n }\n}"
    )
    assert graph_cost(called, {}) == Cost(96 * 64, blocks + numbers + 2 * numbers)


def test_a_kernel_decodes_only_what_is_decoded_inside_it() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[96, 64] as int8_rows")
    y = b.embedding(_decoded(b, x), b.input("i", "i64[3]"))
    b.outputs(y=y)
    decode, lookup = b.graph.main.nodes
    blocks, numbers, others = 96 * 68, 96 * 64 * 4, 3 * 8 + 3 * 64 * 4
    assert kernel_cost([decode, lookup], {}) == Cost(0, 3 * 68 + others)
    assert kernel_cost([decode], {}) == Cost(0, blocks + numbers)
    assert kernel_cost([lookup], {}) == Cost(0, 3 * 64 * 4 + others)
    assert (node_cost(decode, {}), node_cost(lookup, {})) == (Cost(), Cost(0, 3 * 68 + others))


@pytest.mark.parametrize("scheme", ["int8-weights", "int4"])
def test_a_quantized_model_reads_fewer_bytes_and_does_the_same_operations(scheme: str) -> None:
    model, sizes = gpt2.configure(layers=2, dim=128, heads=2, vocab=1000), {"B": 1, "S": 1}
    plain, quantized = (Program.of(model, quantize=q).optimize().graph for q in (None, scheme))
    less = parameter_bytes(plain) - parameter_bytes(quantized)
    a, b = graph_cost(plain, sizes), graph_cost(quantized, sizes)
    assert a.flops == b.flops
    assert a.bytes - b.bytes == pytest.approx(less, rel=0.01), "each weight is read once"


def test_costs_add() -> None:
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
    assert (Cost(6, 3).intensity, Cost(0, 0).intensity) == (2.0, 0.0)


# -- models --------------------------------------------------------------------------------------------------------


def test_a_call_costs_its_function() -> None:
    @t.model
    def model(x: t.f32["B S 8"], *, layers=3):
        for _ in t.stack("stage", layers):
            for _ in t.stack("h", 2):
                x = x + t.self_attention(t.layer_norm(x, name="ln"), 2, causal=True, name="attn")
        return x

    sizes = {"B": 2, "S": 5}
    graph = model.graph()
    assert graph_cost(graph, sizes) == graph_cost(inline_calls(graph), sizes)
    one, two, three = (graph_cost(model.configure(layers=n).graph(), sizes) for n in (1, 2, 3))
    assert two + two == one + three, "each layer costs the same"
    assert one == Cost(one.flops, one.bytes) != Cost()


def products(batch: int, length: int, *, dim: int, layers: int, vocab: int = 0, causal: bool = False) -> int:
    """Return the number of operations in a transformer's products: 4 projections, 2 of an MLP that is 4 times wider,
    attention, logits.
    """
    pairs = length * (length + 1) // 2 if causal else length * length
    weights = layers * (4 * dim * dim + 2 * 4 * dim * dim) + vocab * dim
    return batch * (2 * length * weights + layers * 4 * pairs * dim)


def test_bert_base_is_22_gflop() -> None:
    """BERT-base takes 22.3 GFLOP for 128 tokens. All ops except the products take less than one per cent of that."""
    graph = bert.graph()
    flops = graph_cost(graph, {"B": 1, "S": 128}).flops
    assert flops == pytest.approx(22.3e9, rel=0.01)
    counted = products(1, 128, dim=768, layers=12)
    assert counted < flops < 1.01 * counted
    assert graph_cost(graph, {"B": 4, "S": 128}).flops == 4 * flops


def test_gpt2_by_hand() -> None:
    flops = graph_cost(gpt2.graph(), {"B": 2, "S": 256}).flops
    counted = products(2, 256, dim=768, layers=12, vocab=50257, causal=True)
    assert counted < flops < 1.01 * counted


def test_bytes_of_a_forward_pass_hold_the_weights_once() -> None:
    graph = bert.graph()
    read = sum(v.type.bytes_at({}) for name, v in graph.parameters.items() if not name.startswith("embeddings."))
    small = graph_cost(graph, {"B": 1, "S": 1}).bytes
    assert read < small < 1.01 * read, "at one token, activations are negligible"


PARAMETERS = {
    # as counted by Hugging Face's num_parameters() for openai-community/gpt2 and google-bert/bert-base-uncased
    "GPT-2 124M": (gpt2, 124_439_808),
    "BERT-base": (bert, 108_891_648),
    "BERT-base with pooler": (bert.configure(head="pooler"), 109_482_240),
    "BERT-base, masked LM": (bert.configure(head="masked_lm"), 109_514_298),
    "GPT-2 355M": (gpt2.configure(dim=1024, heads=16, layers=24), 354_823_168),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_known_models(name: str) -> None:
    model, count = PARAMETERS[name]
    graph = model.graph()
    assert parameter_count(graph) == count
    assert parameter_bytes(graph) == 4 * count


def test_shared_parameters_count_once_and_by_dtype() -> None:
    @t.model
    def model(x: t.i64["B"]):
        y = t.embed(x, 10, 4, name="wte")
        return t.unembed(y * t.parameter("gain", 4, dtype=t.f16).cast("f32"), tied="wte")

    graph = model.graph()
    assert parameter_count(graph) == 44
    assert parameter_bytes(graph) == 40 * 4 + 4 * 2
