"""Smoothed products: the channels of a norm's output, and of the weights that multiply it, are scaled to similar
magnitudes.

    linear(x, w) = linear(x / s, w s)        s[k] = sqrt((3 |gain[k]| + |shift[k]|) / max_n |w[n, k]|)

A row that is rounded has one scale, so a few large channels leave few steps for all others. s moves a part of their
magnitude to the weights, whose rows have scales of their own (SmoothQuant, Xiao et al. 2023, equation 4). The magnitude
of a channel is estimated from the norm's own weights: three standard deviations of normalized numbers, times the gain,
plus the shift. So no data is needed. Products that read the same rows share s. The maximum over n covers only the
weights that count. If the projection of values is among them, the projections of queries and keys do not count, because
the softmax evens out their errors.

A graph has 1 / s as a parameter, by which `encode` multiplies; w s is stored in blocks. Both are computed when weights
are encoded: `treadle.ir.transforms.encoded_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.graph import Graph, Node, Value
from treadle.ir.ops.attending import Attending
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.blocks import Encode
from treadle.ir.ops.indexing import Gather
from treadle.ir.ops.normalization import LayerNorm, RMSNorm
from treadle.ir.ops.parts import Slice
from treadle.ir.ops.products import MixedProduct
from treadle.ir.ops.residual_norms import AddLayerNorm, AddRMSNorm
from treadle.ir.transforms.inline import inline_calls

Array = np.ndarray[Any, Any]
Uses = Mapping[Value, Sequence[tuple[Node, int]]]
"""For each used value, the nodes and operand positions that read it."""

DEVIATIONS = 3.0
"""The number of standard deviations that a channel of normalized numbers is assumed to span."""


@dataclass(frozen=True)
class Balance:
    """Products of one norm's output with weights, smoothed by one vector. All fields are names of parameters.

    vector   1 / s, f32[k]
    gain     the norm's weight, f32[k]
    shift    the norm's bias, f32[k]; None: the norm has no bias
    weights  the matrices, each held as w s
    by       the matrices that count for the maximum over n
    """

    vector: str
    gain: str
    shift: str | None
    weights: tuple[str, ...]
    by: tuple[str, ...]

    @property
    def read(self) -> tuple[str, ...]:
        """The parameters from which s is computed."""
        return (*self.weights, self.gain, *([self.shift] if self.shift is not None else []))

    def factors(self, graph: Graph, weights: Mapping[str, Any]) -> Array | None:
        """Compute s from the numbers of weights. Return None if a weight is missing, does not match, or is held in
        blocks.
        """
        found = {}
        for name in self.read:
            value, array = graph.parameters.get(name), weights.get(name)
            held = None if array is None else np.asarray(array)
            if value is None or held is None or held.dtype.kind != "f" or held.shape != value.type.static_shape:
                return None
            found[name] = held
        largest = np.zeros(len(found[self.gain]), np.float32)
        for name in self.by:
            encoding = graph.parameters[name].type.encoding
            over = 1 if encoding is not None and encoding.axis == 0 else 0
            np.maximum(largest, np.abs(found[name]).max(axis=over, initial=0), out=largest)
        size = np.float32(DEVIATIONS) * np.abs(found[self.gain].astype(np.float32))
        if self.shift is not None:
            size += np.abs(found[self.shift])
        with np.errstate(all="ignore"):  # s is 1 for a channel that is always 0, or is unused
            s = np.sqrt(size / largest)
        return np.where(np.isfinite(s) & (s > 0), s, 1).astype(np.float32)


def balances_of(graph: Graph) -> tuple[Balance, ...]:
    """Return the balances of a graph, read from the vectors of its `encode` nodes, in the order of its nodes."""
    if not any(isinstance(node.op, Encode) and len(node.inputs) > 1 for _, node in graph.walk()):
        return ()
    found: dict[str, Balance] = {}
    for entry in inline_calls(graph).later_entries:
        uses = entry.uses()
        for node in entry.nodes:
            vector = node.operands[1] if isinstance(node.op, Encode) else None
            norm = norm_of(node.operands[0]) if vector is not None else None
            if vector is None or norm is None or any(v is not None and v.kind != "parameter" for v in (vector, *norm)):
                continue
            gain, shift = norm
            read = [reader for decode, _ in uses.get(node.result, []) for reader, _ in uses.get(decode.result, [])]
            weights = dict.fromkeys(w.name for reader in read for w in _matrices(reader))
            counted = [w.name for reader in read for w, y in _results(reader, _matrices(reader)) if not scored(y, uses)]
            if gain is not None and vector.name not in found:
                of = None if shift is None else shift.name
                found[vector.name] = Balance(vector.name, gain.name, of, tuple(weights), tuple(counted or weights))
    return tuple(found.values())


def scored(value: Value, uses: Uses) -> bool:
    """Return True if a value is used only as queries and keys of attention. It may be moved or rotated in between."""
    read = uses.get(value, [])
    for node, at in read:
        if isinstance(node.op, Attending):
            if at > 1:
                return False
        elif (
            node.op.callee is not None
            or isinstance(node.op, MixedProduct)
            or not all(scored(y, uses) for y in node.results)
        ):
            return False
    return bool(read)


def _results(node: Node, matrices: Sequence[Value]) -> list[tuple[Value, Value]]:
    """Return the pairs of a product's matrix and the result of that matrix. A product with several matrices has a
    result for each.
    """
    own = len(node.results) == len(matrices)
    return [(w, node.results[i if own else 0]) for i, w in enumerate(matrices)]


def picked_of(node: Node) -> Value | None:
    """Return the operand of which a node selects rows without changing them; None for any other node."""
    if not isinstance(node.op, Slice | Gather):
        return None
    x = node.inputs[0]
    return x if place(node.op.axis, x.type.rank) < x.type.rank - 1 else None


def norm_of(value: Value | None) -> tuple[Value | None, Value | None] | None:
    """Return the gain and the shift of the norm that computes a value, or some of its rows; None for other ops."""
    node = None if value is None else value.node
    while node is not None and (x := picked_of(node)) is not None:
        value, node = x, x.node
    if node is None or node.results[0] is not value:
        return None
    match node.op:
        case LayerNorm() | AddLayerNorm():
            gain, shift = node.operands[-2:]
            return gain, shift
        case RMSNorm() | AddRMSNorm():
            return node.operands[-1], None
    return None


def vector_name(weights: Iterable[str], taken: Callable[[str], bool], word: str = "balance") -> str:
    """Return a name for a vector of these weights: `attn.balance` for attn.q.weight and attn.k.weight."""
    paths = [name.split(".")[:-1] for name in weights]
    path = paths[0]
    for other in paths[1:]:
        same = [a == b for a, b in zip(path, other, strict=False)]
        path = path[: same.index(False) if False in same else len(same)]
    made = base = ".".join([*path, word])
    count = 2
    while taken(made):
        made, count = f"{base}_{count}", count + 1
    return made


def _matrices(node: Node) -> list[Value]:
    """Return the parameters whose blocks a product multiplies with the other operand."""
    if not isinstance(node.op, MixedProduct):
        return []
    found = [node.operands[position] for position in node.op.multiplies(len(node.operands))]
    blocks = [v.node.inputs[0] for v in found if v is not None and v.node is not None and v.node.op.decodes]
    return [v for v in blocks if v.kind == "parameter"]
