"""T5's learned bias by distance, for any computation of the buckets.

    gather(gather(table, buckets), clip(j - i, -far, far) + far)      a bucket for each distance, as a constant
    gather(table, f(i, j))                                            an f that reads positions alone

In the second form, f is evaluated: T5's buckets do not change beyond the greatest distance, which must be below `SEEN`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import T5Relative
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Node, Value
from treadle.ir.ops.arithmetic import Add, Maximum, Minimum
from treadle.ir.ops.indexing import Embedding, Gather
from treadle.passes.fusion.attention.core import Placed, number_of
from treadle.passes.fusion.attention.positions import Affine, affine, offset_table
from treadle.passes.fusion.attention.roles import Fused, Roles, WholeOperand
from treadle.passes.fusion.axis_tracking import narrowed

Array = np.ndarray[Any, Any]

SEEN = 160
"""The limit below which distances are evaluated. The greatest distance in Hugging Face's models is 128."""
_MOST_NODES = 96


def t5_relative(roles: Roles, placed: Placed) -> Fused | None:
    """Return the bias as a term, or None for any other bias. placed: [s, t, h], before it is rearranged."""
    node = placed.value.node
    if node is None or placed.value.type.rank != 3 or not _is_lookup(node):
        return None
    table, index = node.inputs
    rows = table.type.shape[0].constant
    if table.type.rank != 2 or rows is None or roles.axes.flat(placed.layout[2]) != roles.atoms("h"):
        return None
    at = Placed(index, placed.layout[:2])
    inner = table.node
    if inner is not None and _is_lookup(inner) and inner.inputs[1].literal is not None:
        return _by_constant(roles, inner, at)
    if roles.axes.resolved(at.layout) != (roles.atoms("s"), roles.atoms("t")):
        return None
    return _by_evaluation(roles, table, rows, index)


def _is_lookup(node: Node) -> bool:
    """Return True if a node selects rows of a matrix."""
    op: Any = node.op
    return bool(isinstance(op, Embedding) or (isinstance(op, Gather) and op.axis == 0))


def _by_constant(roles: Roles, inner: Node, at: Placed) -> Fused | None:
    table, buckets = inner.inputs
    rows = table.type.shape[0].constant
    assert buckets.literal is not None
    listed = buckets.literal.array
    if listed.ndim != 1 or len(listed) % 2 == 0 or rows is None or table.type.rank != 2:
        return None
    far = len(listed) // 2
    if not _is_clipped_offset(roles, at, far):
        return None
    for term in _terms(rows, (far,)):
        if np.array_equal(term.bucket_by_offset, listed):
            return _fused(roles, term, table)
    return None


def _fused(roles: Roles, term: T5Relative, table: Value) -> Fused:
    return Fused(term, (WholeOperand(Placed(table, roles.axes.of(table)), ""),))


def _terms(rows: int, distances: Iterable[int]) -> Iterator[T5Relative]:
    for far in distances:
        for bidirectional in (False, True):
            try:
                yield T5Relative(rows, far, bidirectional)
            except TreadleError:
                continue


def _is_clipped_offset(roles: Roles, placed: Placed, far: int) -> bool:
    """Return True if the value is min(max(j - i, -far), far) + far."""
    offsets = offset_table(roles, placed)
    if offsets is not None:
        array, position = offsets
        return bool(np.array_equal(array, np.clip(position, -far, far) + far))
    value, layout = placed.value, placed.layout
    for op, number in ((Add, far), (Minimum, far), (Maximum, -far)):
        node = value.node
        if node is None or not isinstance(node.op, op) or number_of(node.inputs[1]) != number:
            return False
        value = node.inputs[0]
        layout = narrowed(value, layout)
    return affine(roles, Placed(value, layout)) == Affine(-1, 1)


# -- computed buckets ------------------------------------------------------------------------------------------


def _by_evaluation(roles: Roles, table: Value, rows: int, index: Value) -> Fused | None:
    if index not in roles.by_offset:  # once for all layers that share it
        roles.by_offset[index] = _by_offset(index)
    by_offset = roles.by_offset[index]
    if by_offset is None:
        return None
    backward = by_offset[SEEN - 1 :: -1]  # for keys before the query, at distances 0, 1, ...
    for term in _terms(rows, _distances(backward)):
        far = term.max_distance
        if np.array_equal(by_offset, term.bucket_by_offset[np.clip(np.arange(1 - SEEN, SEEN), -far, far) + far]):
            return _fused(roles, term, table)
    return None


def _by_offset(index: Value) -> Array | None:
    """Return an index's numbers for each j - i from 1 - SEEN to SEEN - 1. Return None if the index depends on anything
    else.
    """
    nodes = _of_positions_alone(index)
    if nodes is None:
        return None
    symbols = {s for node in nodes for v in node.results for s in v.type.symbols}
    buckets = _evaluated(index, nodes, dict.fromkeys(symbols, SEEN))
    if buckets is None or buckets.shape != (SEEN, SEEN):
        return None
    found = np.concatenate([buckets[::-1, 0][:-1], buckets[0]])
    offsets = np.arange(SEEN) - np.arange(SEEN)[:, None]
    return found if np.array_equal(buckets, found[offsets + SEEN - 1]) else None


def _distances(backward: Array) -> Sequence[int]:
    """Return the values of max_distance for which the last bucket begins at the same distance. If 128 is one of these
    values, it comes first.
    """
    last = int(backward[-1])
    near = (last + 1) // 2
    begin, growing = int(np.argmax(backward == last)), last + 1 - near
    if near < 1 or growing < 2 or begin < 1 or not (backward[begin:] == last).all():
        return ()
    # Bucket `last` begins at the least d with d^growing >= near * far^(growing - 1).
    low, high = (int((d**growing / near) ** (1 / (growing - 1))) for d in (begin - 1, begin))
    found = [far for far in range(max(low - 1, near + 1), high + 2) if far < SEEN]
    return sorted(found, key=lambda far: far != 128)


def _of_positions_alone(value: Value) -> list[Node] | None:
    """Return the nodes that compute a value, in order, if they read no input and no weight; else None."""
    order: dict[Node, None] = {}
    stack = [(value, False)]
    while stack:
        x, through = stack.pop()
        node = x.node
        if node is None:
            if x.literal is None:
                return None
        elif through:
            order[node] = None
        elif node not in order:
            if node.op.callee is not None or len(order) > _MOST_NODES:
                return None
            stack.append((x, True))
            stack += [(v, False) for v in node.inputs]
    return list(order)


def _evaluated(value: Value, nodes: Sequence[Node], sizes: Mapping[str, int]) -> Array | None:
    """Return a value's numbers at these sizes, rounded as the ops themselves round; None if the ops fail at these
    sizes.
    """
    known: dict[Value, Array] = {}

    def read(x: Value | None) -> Any:
        return None if x is None else x.literal.array if x.literal is not None else known[x]

    try:
        with np.errstate(all="ignore"):
            for node in nodes:
                if any(np.prod(v.type.evaluate(sizes)) > SEEN * SEEN for v in node.results):
                    return None
                made = node.op.at(sizes).reference(*map(read, node.operands))
                known.update(zip(node.results, made if isinstance(made, tuple) else (made,), strict=True))
    except (TreadleError, ArithmeticError, IndexError, TypeError, ValueError):
        return None
    return known.get(value)
