"""Models of transformers as models of tokens alone: `main(tokens: i64[B, S]) -> logits`.

    input_ids        i64[B, S]                the tokens
    attention_mask   i64[B, S]                1 at each token
    position_ids     i64[B, S]                0, 1, 2, ... along each row
    past_key_values  f32[B, heads, P, dim]    empty: P is 0

Rows of a session, windows of a perplexity and blocks of training texts have no padding, so a caller passes only tokens.
Keys and values of earlier tokens are in the states of a decoding step, which is derived from a model without a past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.ir.builder import Builder, Expr
from treadle.ir.generated_values import GeneratedValue
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.sizing.sizes import ZERO
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.fixing import fix_sizes
from treadle.ir.types import Type, i64

TOKENS, LOGITS = "tokens", "logits"

_UNPADDED: Mapping[str, GeneratedValue] = {"attention_mask": GeneratedValue(1), "position_ids": GeneratedValue(None)}
"""The value of an input for each token of a text without padding, by its name in transformers."""
_PAST = ("past_key", "past_value")
_PRESENT = "present"
"""The first letters of the names of keys and values, as inputs and as outputs."""


def without_padding(graph: Graph) -> Graph:
    """Return a graph without the inputs [B, S] that only describe padding, and without a past. They have their values
    for a text without padding, from its first token on. If there are no such inputs, return the graph itself.

    An input whose value for generated tokens is declared stays an input.
    """
    inputs = graph.main.inputs
    past = [v for v in inputs if _is_past(v)]
    if not past and not any(v.name in _UNPADDED for v in inputs):
        return graph
    tokens = [v.type.shape for v in inputs if v.name not in _UNPADDED and v.type.rank == 2]
    known = {symbol for shape in tokens for size in shape for symbol in size.symbols}
    made = clone_graph(graph)
    lengths = {s for v in past for size in v.type.shape for s in size.symbols} - known
    fix_sizes(made, dict.fromkeys(lengths, 0))
    made.symbols = {symbol: bounds for symbol, bounds in made.symbols.items() if symbol not in lengths}
    replaced = [v for v in made.main.inputs if _is_empty_past(v) or _describes_padding(v, tokens, graph)]
    if not replaced:
        return graph
    if past:
        made.main.outputs = {n: v for n, v in made.main.outputs.items() if not n.startswith(_PRESENT)}
    return _with_values(made, replaced)


def for_text(graph: Graph) -> Graph:
    """Return the graph of a model of tokens alone, whose input is called `tokens` and whose output is called `logits`.

    If the model needs other inputs, or if its tokens or logits cannot be distinguished from others, they keep their
    names.
    """
    made = without_padding(graph)
    made = clone_graph(made) if made is graph else made
    main = made.main
    names = {v.name for v in main.inputs}
    found = [v for v in main.inputs if v.type.rank == 2 and v.type.dtype.is_int and v.name not in made.generated]
    if len(found) == len(main.inputs) == 1 and TOKENS not in names:
        _rename_tokens(made, found[0])
    shapes = [v.type.shape for v in found]
    scores = [n for n, v in main.outputs.items() if v.type.dtype.is_float and v.type.shape[:-1] in shapes]
    if not scores and len(main.outputs) == 1:  # logits of labels, [B, labels]
        rows = [shape[:1] for shape in shapes]
        scores = [n for n, v in main.outputs.items() if v.type.dtype.is_float and v.type.shape[:-1] in rows]
    if len(scores) == 1 and LOGITS not in main.outputs:
        main.outputs = {LOGITS if name in scores else name: v for name, v in main.outputs.items()}
    return made


def _is_past(value: Value) -> bool:
    return value.name.startswith(_PAST) and value.type.dtype.is_float and value.type.rank > 2


def _is_empty_past(value: Value) -> bool:
    return _is_past(value) and ZERO in value.type.shape


def _describes_padding(value: Value, tokens: Sequence[object], graph: Graph) -> bool:
    return value.name in _UNPADDED and value.name not in graph.generated and value.type.shape in tokens


def _with_values(graph: Graph, replaced: Sequence[Value]) -> Graph:
    """Replace inputs by their values for a text without padding, which are computed first. Return the graph."""
    main, nodes = graph.main, graph.main.nodes
    b, main.nodes = Builder(graph), []
    values = {value: _value(b, value).value for value in replaced}
    main.inputs = [value for value in main.inputs if value not in values]
    _replace(graph, nodes, values)
    return graph


def _replace(graph: Graph, nodes: Sequence[Node], values: Mapping[Value, Value]) -> None:
    """Append nodes to `main`, with values replaced by others in them and in the outputs."""
    main = graph.main
    for node in nodes:
        node.operands = tuple([v if v is None else values.get(v, v) for v in node.operands])
    main.nodes += nodes
    main.outputs = {name: values.get(v, v) for name, v in main.outputs.items()}


def _value(b: Builder, value: Value) -> Expr:
    """Return the value of an input for a text without padding."""
    dtype, shape = value.type.dtype, value.type.shape
    number = 0 if _is_past(value) else _UNPADDED[value.name].constant
    return b.expand(b.iota(size=shape[1], dtype=dtype) if number is None else b.constant(number, dtype), shape=shape)


def _rename_tokens(graph: Graph, tokens: Value) -> None:
    """Name an input `tokens`, as i64."""
    if tokens.type.dtype is i64:
        tokens.name = TOKENS
        return
    main, nodes = graph.main, graph.main.nodes
    main.inputs, main.nodes = [], []
    b = Builder(graph)
    cast = b.input(TOKENS, Type(i64, tokens.type.dims)).cast(tokens.type.dtype)
    _replace(graph, nodes, {tokens: cast.value})
