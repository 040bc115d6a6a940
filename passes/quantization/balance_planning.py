"""Plan SmoothQuant: choose the matmuls to smooth. The input of such a matmul is always the output of a norm, and its
weights are used only with that norm.

Example: `layer.{0..5}.attn.balance` is the smoothing vector for `layer.{0..5}.attn.{q,k,v}.weight`, and is folded into
the gain and shift of the preceding norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from treadle.ir.graph import Function, Graph, Value
from treadle.ir.ops.blocks import STEPS
from treadle.ir.ops.products import MixedProduct
from treadle.ir.transforms.balances import Balance, norm_of, picked_of, scored, vector_name
from treadle.ir.types import f32
from treadle.passes.quantization.quantization_plan import ActivationPlan

_Norm = tuple[str, str | None]
"""The names of a norm's gain and shift."""


@dataclass(frozen=True)
class _Use:
    """The products of one quantized value, in one call of its function.

    norm     the norm that produces the value; None if no norm does
    weights  the parameters with which the value is multiplied; None for a matrix that is not a parameter
    by       the parameters whose products are used as more than queries and keys of attention; all, if there are none
    """

    norm: _Norm | None
    weights: tuple[str | None, ...]
    by: tuple[str | None, ...]


def plan_balances(
    graph: Graph, activations: Sequence[ActivationPlan], picked: AbstractSet[str]
) -> tuple[tuple[ActivationPlan, ...], tuple[Balance, ...]]:
    """Return the plans of values, with the smoothing decision in their reasons, and the balances.

    picked  weights whose rows are looked up as well; they are not smoothed

    A vector belongs to weights, so every product with one of these weights must have the result of the same norm as its
    other operand, and must also multiply it with the other weights.
    """
    places = {(a.function, place): i for i, a in enumerate(activations) if a.encoding == STEPS for place in a.products}
    found = _Finding(graph, places)
    for entry in graph.later_entries:
        held = {value: name for name, value in entry.parameters.items()}
        found.read(entry, held, {})
    whys = {i: _why_not(uses, picked) for i, uses in found.uses.items()}
    by_weight: dict[str, set[tuple[int, _Use] | None]] = {name: {None} for name in found.alone}
    for i, uses in found.uses.items():
        for use in uses:
            for name in use.weights:
                if name is not None:
                    by_weight.setdefault(name, set()).add((i, use))
    changed = True
    while changed:  # a refusal for one value also applies to values multiplied with the same weights
        changed = False
        for i, uses in found.uses.items():
            if whys[i]:
                continue
            for name in [n for use in uses for n in use.weights if n is not None]:
                others = by_weight[name]
                if None in others or any(u is not None and whys[u[0]] for u in others):
                    whys[i] = f"other products read {name}"
                elif len({u[1] for u in others if u is not None}) > 1:
                    whys[i] = f"{name} is multiplied with results of several norms"
            changed = changed or bool(whys[i])
    explained = [
        a
        if i not in whys
        else replace(a, reason=f"{a.reason}; {f'not smoothed: {whys[i]}' if whys[i] else 'smoothed'}")
        for i, a in enumerate(activations)
    ]
    return tuple(explained), tuple(_balances(graph, [u for i, uses in found.uses.items() if not whys[i] for u in uses]))


def _why_not(uses: Sequence[_Use], picked: AbstractSet[str]) -> str:
    for use in uses:
        if use.norm is None:
            return "no norm with a gain produces it"
        if None in use.weights:
            return "its matrix is not a single parameter"
        for name in use.weights:
            if name in picked:
                return f"rows of {name} are looked up"
    return ""


def _balances(graph: Graph, uses: Sequence[_Use]) -> list[Balance]:
    taken = set(graph.parameters)
    made: list[Balance] = []
    for use in dict.fromkeys(uses):
        assert use.norm is not None
        weights = tuple([name for name in use.weights if name is not None])
        vector = vector_name(weights, taken.__contains__)
        taken.add(vector)
        made.append(Balance(vector, *use.norm, weights, tuple([name for name in use.by if name is not None])))
    return made


class _Finding:
    """A record of products, call by call.

    uses   for each planned value, by its index among the plans: the products of the value, in each call
    alone  parameters of products whose other operand is not quantized
    """

    def __init__(self, graph: Graph, places: Mapping[tuple[str, int], int]) -> None:
        self.graph, self.places = graph, places
        self.uses: dict[int, list[_Use]] = {}
        self.alone: set[str] = set()

    def read(self, function: Function, held: Mapping[Value, str], given: Mapping[Value, _Norm]) -> list[_Norm | None]:
        """Record one call of a function. `held` and `given` are its values that are parameters, and results of norms.
        Return the norms of its results.
        """
        norms = dict(given)
        rounded: dict[int, tuple[Value, list[str | None], list[str | None]]] = {}
        uses = function.uses()
        for place, node in enumerate(function.nodes):
            callee = self.graph.callee(node)
            if callee is not None:
                pairs = [(f, v) for f, v in zip(callee.arguments, node.operands, strict=True) if v is not None]
                inner = {f: held[v] for f, v in pairs if v in held}
                results = self.read(callee, inner, {f: norms[v] for f, v in pairs if v in norms})
                norms |= {v: n for v, n in zip(node.results, results, strict=True) if n is not None}
                continue
            x = picked_of(node)
            if x is not None and x in norms:
                norms[node.results[0]] = norms[x]
            elif (norm := norm_of(node.results[0])) is not None and (named := _named(norm, held)) is not None:
                norms[node.results[0]] = named
            if isinstance(node.op, MixedProduct):
                matrices = [node.operands[p] for p in node.op.multiplies(len(node.operands))]
                names = [None if m is None else held.get(m) for m in matrices]
                i = self.places.get((function.name, place))
                if i is None:
                    self.alone.update(n for n in names if n is not None)
                    continue
                x = node.operands[0]
                assert x is not None
                _, found, counted = rounded.setdefault(i, (x, [], []))
                found += names
                own = len(names) == len(node.results)
                counted += [n for at, n in enumerate(names) if not scored(node.results[at if own else 0], uses)]
        for i, (x, found, counted) in rounded.items():
            by = dict.fromkeys(counted or found)
            self.uses.setdefault(i, []).append(_Use(norms.get(x), tuple(dict.fromkeys(found)), tuple(by)))
        return [norms.get(v) for v in function.results]


def _named(norm: tuple[Value | None, Value | None], held: Mapping[Value, str]) -> _Norm | None:
    """Return the names of a norm's weights. Return None if the gain is not a vector of numbers, or if a weight is not a
    parameter.
    """
    gain, shift = norm
    for vector in (gain, shift):
        if vector is not None and (vector not in held or vector.type.dtype is not f32 or vector.type.rank != 1):
            return None
    return None if gain is None else (held[gain], None if shift is None else held[shift])
