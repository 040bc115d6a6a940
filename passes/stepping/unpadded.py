"""Inputs that only describe padding: their values for texts without padding.

    attention_mask[B, S]   1 at each token
    position_ids[B, S]     0, 1, 2, ... along each row

Models of transformers have inputs of these names. Rows of a session, windows of a perplexity and blocks of a training
text have no padding, so a caller passes only the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.generated_values import Array, GeneratedValue
from treadle.ir.graph import Graph, Value
from treadle.ir.transforms.clone import clone_graph
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION

_UNPADDED: Mapping[str, GeneratedValue] = {"attention_mask": GeneratedValue(1), "position_ids": GeneratedValue(None)}
"""The value of an input for each token of a text without padding, by its name in transformers."""


def padding_inputs(graph: Graph) -> list[Value]:
    """Return the inputs of `main` that only describe padding. Each has the axes [B, S] of the model's tokens, which are
    the only other input of integers along S. An input whose value for generated tokens is declared is not one of them.
    """
    inputs = graph.main.inputs
    found = [v for v in inputs if v.name in _UNPADDED and v.name not in graph.generated]
    others = [v.type for v in inputs if v not in found and v.type.dtype.is_int]
    tokens = [type.shape for type in others if type.rank == 2 and type.shape[-1].as_symbol is not None]
    return [v for v in found if v.type.shape in tokens]


def without_padding(graph: Graph) -> Graph:
    """Return a graph for texts without padding: `padding_inputs` have their values, and ops are recognized again. If
    there are no such inputs, return the graph itself.
    """
    replaced = {value.name for value in padding_inputs(graph)}
    if not replaced:
        return graph
    made = clone_graph(graph)
    main, nodes = made.main, made.main.nodes
    b, main.nodes = Builder(made), []
    values = {value: _expression(b, value).value for value in main.inputs if value.name in replaced}
    main.inputs = [value for value in main.inputs if value not in values]
    for node in nodes:
        node.operands = tuple([v if v is None else values.get(v, v) for v in node.operands])
    main.nodes += nodes
    main.outputs = {name: values.get(v, v) for name, v in main.outputs.items()}
    return PassManager(RECOGNITION).run(made).graph


def _expression(b: Builder, value: Value) -> Expr:
    """Return the value of an input [B, S] for texts without padding."""
    dtype, shape = value.type.dtype, value.type.shape
    number = _UNPADDED[value.name].constant
    return b.expand(b.iota(size=shape[1], dtype=dtype) if number is None else b.constant(number, dtype), shape=shape)


def padding_arrays(graph: Graph, tokens: Array) -> dict[str, Array]:
    """Return the arrays of `padding_inputs` for tokens [B, S] without padding, by name."""
    made = {}
    for value in padding_inputs(graph):
        like = np.zeros((0,), value.type.dtype.numpy)
        made[value.name] = np.broadcast_to(_UNPADDED[value.name].draw(tokens.shape[1], -1, like), tokens.shape)
    return made
