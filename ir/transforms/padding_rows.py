"""Rows of embedding tables that get no gradient through an embedding: `padding_idx` of PyTorch's nn.Embedding.

    y = embedding(table, ids)   -->   y = where(ids == row, stop_gradient(embedding(table, ids)), embedding(table, ids))

If the table is also used elsewhere, as for tied logits, the row gets the gradient from there, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph, Node
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.ops.indexing import Embedding
from treadle.ir.transforms.clone import clone_graph


def without_gradient(b: Builder, y: Expr, indices: Expr, row: int) -> Expr:
    """Return the result y [..., d] of an embedding with these indices, without a gradient for one row of the table."""
    padded = b.equal(indices, b.constant(row, indices.dtype))
    names = " ".join(axis_letters(indices.rank))
    made: Expr = b.where(b.rearrange(padded, pattern=f"{names} -> {names} 1"), b.stop_gradient(y), y)
    return made


def with_padding_rows(graph: Graph, rows: Mapping[str, int]) -> Graph:
    """Return a copy of a graph in which the embeddings of `main` pass no gradient to some rows. `rows` maps the names
    of weights to row numbers.
    """
    made = clone_graph(graph)
    main = made.main
    for node in [node for node in main.nodes if _row_of(node, rows) is not None]:
        row, (y,) = _row_of(node, rows), node.results
        assert row is not None
        at = main.nodes.index(node) + 1
        later, main.nodes = main.nodes[at:], main.nodes[:at]
        b = Builder(made, main)
        with b.placed_as(node):
            new = without_gradient(b, b.expr(y), b.expr(node.inputs[1]), row).value
        for reader in later:
            reader.operands = tuple([new if v is y else v for v in reader.operands])
        main.nodes += later
        main.outputs = {name: new if v is y else v for name, v in main.outputs.items()}
    return made


def _row_of(node: Node, rows: Mapping[str, int]) -> int | None:
    table = node.operands[0] if isinstance(node.op, Embedding) else None
    return rows.get(table.name) if table is not None and table.kind == "parameter" else None
