"""Candidate sites along the residual stream: the embeddings at its start, and the norms of its sums.

A sum with a bias or a table is not a residual, nor is a sum that broadcasts; a sum of embeddings alone is a separate
site. A sum with fewer than two plain embeddings as terms (Marian scales them) is not a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Sub
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.normalization import LayerNorm, RMSNorm
from treadle.passes.fusion.fuse_embedding_sum import lookup_of


def normed_value(node: Node, spelled: Sequence[Node] | None) -> Value | None:
    """Return the operand of a norm over the last axis. `node` is the norm, or the mean of a norm in primitives, whose
    nodes are in `spelled`. Return None for any other node.
    """
    if isinstance(node.op, (LayerNorm, RMSNorm)):
        return _uncast(node.inputs[0])
    if spelled is None:
        return None
    axes, rank = node.op.attributes["axes"], node.inputs[0].type.rank
    if [axis % rank for axis in axes] != [rank - 1]:
        return None
    square = spelled[0].inputs[0]
    centered = square.node
    return _uncast(centered.inputs[0] if centered is not None and isinstance(centered.op, Sub) else square)


def residual_nodes(node: Node, norms: Mapping[Value, Sequence[Node]]) -> Sequence[Node] | None:
    """Return the nodes of norm(x + residual), if `node` is the addition of two computed values of one shape, else
    None.
    """
    if not isinstance(node.op, Add) or node.result not in norms:
        return None
    stretched = any(v.type.shape != node.result.type.shape for v in node.inputs)
    if stretched or any(map(_is_weight, node.inputs)) or all(map(_is_lookups, node.inputs)):
        return None
    return norms[node.result]


def embedding_nodes(node: Node, users: Mapping[Value, Sequence[Node]]) -> Sequence[Node] | None:
    """Return the nodes of embedding(t, i) + embedding(u, j) + ..., if `node` is the last addition of the sum, else
    None.
    """
    if not isinstance(node.op, Add):
        return None
    terms = _terms(node, users)
    if sum(lookup_of(term) is not None for term in terms) < 2:
        return None
    readers = users.get(node.result, ())
    if len(readers) == 1 and isinstance(readers[0].op, Add):
        return None
    return [*_adds(node, users)[1:], *terms]


def _adds(root: Node, users: Mapping[Value, Sequence[Node]]) -> list[Node]:
    """Return an addition, and the additions whose results are read only by its sum."""
    found, pending = [], [root]
    while pending:
        node = pending.pop()
        found.append(node)
        below = [v.node for v in node.inputs if v.node is not None and len(users.get(v, ())) == 1]
        pending += [n for n in below if isinstance(n.op, Add)]
    return found


def _terms(root: Node, users: Mapping[Value, Sequence[Node]]) -> list[Node]:
    """Return the nodes that compute the terms of a sum. They are part of the site, since refusals refer to a term that
    is not an embedding.
    """
    adds = _adds(root, users)
    terms = [v.node for each in adds for v in each.inputs if v.node is not None]
    return [node for node in terms if node not in adds]


def _is_lookups(value: Value) -> bool:
    node = value.node
    if node is not None and isinstance(node.op, Add):
        return all(map(_is_lookups, node.inputs))
    return lookup_of(node) is not None


def _is_weight(value: Value) -> bool:
    """Return True if a value is a weight or a constant, possibly moved or cast."""
    while value.node is not None and (value.node.op.is_view or isinstance(value.node.op, Cast)):
        value = value.node.inputs[0]
    return value.weight is not None or value.kind == "constant"


def _uncast(value: Value) -> Value:
    while value.node is not None and isinstance(value.node.op, Cast):
        value = value.node.inputs[0]
    return value
