"""Workspaces of our NumPy kernels: arrays by name, which the storage plan places.

Elementwise functions work in chunks. A size is split into equal chunks of at most a given length, so that a size
expression can state the length of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from treadle.backends.numpy import attention_kernels, kernels
from treadle.backends.numpy.written_terms import needed_by_term
from treadle.backends.python.axis_spelling import einsum_letters
from treadle.ir.graph import Node, Value
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.storage.views import View
from treadle.ir.types import Type, boolean, i64

Lies = Callable[[Value], View]


def workspace(node: Node, lies: Lies) -> Mapping[str, Type]:
    """Return the workspace arrays of a node as types by name. `lies` returns the layout of a value; all written arrays
    are row-major.
    """
    needed = _NEEDED.get(node.op.name)
    return {} if needed is None else needed(node, lies)


def _chunk(size: Size, most: int) -> Size:
    """Split a size into equal parts of at most `most`, and return the size of the largest part."""
    return _part(size, size // most + 1)


def _part(size: Size, count: Size) -> Size:
    return (size + count - 1) // count


def _row(node: Node, axis: int) -> Type:
    """Return the type of one element along an axis of the first operand."""
    x = node.inputs[0].type
    shape = list(x.shape)
    shape[axis] = ONE
    return x.dtype[tuple(shape)]


def _chunks(*names: str) -> Callable[[Node, Lies], Mapping[str, Type]]:
    """Return a function that returns the workspace of an elementwise function: chunks, and one chunk of the operand if
    the operand has gaps.
    """

    def needed(node: Node, lies: Lies) -> Mapping[str, Type]:
        x = node.inputs[0]
        part = x.type.dtype[(_chunk(x.type.elements, kernels.CHUNK),)]
        return dict.fromkeys((*names, *(() if lies(x).is_contiguous else ("kept",))), part)

    return needed


def _softmax(node: Node, lies: Lies) -> Mapping[str, Type]:
    op: Any = node.op
    return {"row": _row(node, op.axis)}


def _log_softmax(node: Node, lies: Lies) -> Mapping[str, Type]:
    return {**_softmax(node, lies), "powers": node.inputs[0].type.dtype[node.inputs[0].type.shape]}


def _rms_norm(node: Node, lies: Lies) -> Mapping[str, Type]:
    return {"row": _row(node, -1)}


def _layer_norm(node: Node, lies: Lies) -> Mapping[str, Type]:
    x = node.inputs[0].type
    return {"row": _row(node, -1), "squares": x.dtype[x.shape]}


def _rotary(node: Node, lies: Lies) -> Mapping[str, Type]:
    x, positions, frequencies = (value.type for value in node.inputs)
    (batch, heads, tokens, _), (turned,) = x.shape, frequencies.shape
    angles = frequencies.dtype[(batch, ONE, tokens, turned)]
    part = x.dtype[(batch, heads, tokens, turned)]
    return {"positions": frequencies.dtype[positions.shape], "cos": angles, "sin": angles, "part": part}


def _take_along_axis(node: Node, lies: Lies) -> Mapping[str, Type]:
    op: Any = node.op
    x, indices = (value.type for value in node.inputs)
    if not lies(node.inputs[0]).is_contiguous:
        return {}
    others = [size for axis, size in enumerate(x.shape) if axis != op.axis % x.rank]
    return {"places": i64[indices.shape], "steps": i64[(sum(others, ONE),)]}


def _attention(node: Node, lies: Lies) -> Mapping[str, Type]:
    op: Any = node.op
    q, k, _, *operands = (value.type for value in node.inputs)
    (rows, heads, queries, width), keys = q.shape, k.shape[2]
    scores = heads * queries * keys
    some_queries = _part(queries, scores // attention_kernels.SCORES + 1)
    some_rows = _part(rows, rows * scores // attention_kernels.SCORES + 1)
    row = (some_rows, heads, some_queries, ONE)
    found = {
        "scaled": q.dtype[(some_rows, heads, some_queries, width)],
        "scores": q.dtype[(some_rows, heads, some_queries, keys)],
        "row": q.dtype[row],
        "blank": boolean[row],
    }
    given = iter(operands)
    for number, term in enumerate(op.terms):
        found |= needed_by_term(term, [next(given) for _ in term.operands], queries, keys, number)
    return found


# -- einsum --------------------------------------------------------------------------------------------------------


def is_product_of_two(node: Node) -> bool:
    """Return True if an einsum is one matrix product after its axes are permuted and joined."""
    terms, right = _letters(node)
    if len(terms) != 2 or any("." in term for term in (*terms, right)):
        return False
    x, y = terms
    distinct = all(len({*term}) == len(term) for term in terms)
    return distinct and all(c in right + y for c in x) and all(c in right + x for c in y)


def _letters(node: Node) -> tuple[list[str], str]:
    op: Any = node.op
    left, right = einsum_letters(op.equation).split("->")
    return left.split(","), right


def _einsum(node: Node, lies: Lies) -> Mapping[str, Type]:
    """Return the workspace of an einsum: copies of operands whose axes cannot be permuted and joined by strides, and
    of a product that must be permuted.
    """
    terms, right = _letters(node)
    order = kernels.EinsumOrder(terms, right)
    sizes = {c: n for term, v in zip(terms, node.inputs, strict=True) for c, n in zip(term, v.type.shape, strict=True)}
    batch = [sizes[c] for c in order.batch]

    def joined(*groups: list[str]) -> tuple[Size, ...]:
        return (*batch, *(product(sizes[c] for c in group) for group in groups))

    found = {}
    for name, term, value, groups in zip("xy", terms, node.inputs, order.operands, strict=True):
        axes = [c for group in (order.batch, *groups) for c in group]
        if lies(value).permuted([term.index(c) for c in axes]).reshaped(joined(*groups)) is None:
            found[name] = value.type.dtype[joined(*groups)]
    if order.made != list(right):
        found["product"] = node.result.type.dtype[joined(order.rows, order.columns)]
    return found


_NEEDED: dict[str, Callable[[Node, Lies], Mapping[str, Type]]] = {
    **{"erf": _chunks("square", "polynomial"), "gelu": _chunks("square", "polynomial"), "gelu_tanh": _chunks()},
    **{"softmax": _softmax, "log_softmax": _log_softmax, "layer_norm": _layer_norm, "rms_norm": _rms_norm},
    **{"rotary": _rotary, "take_along_axis": _take_along_axis, "attention": _attention, "einsum": _einsum},
}
