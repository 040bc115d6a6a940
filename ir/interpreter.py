"""The meaning of a graph: every op's NumPy reference, node by node.

The interpreter is slow, and correct by definition: backends and passes are verified against it. With `float64=True`,
weights, inputs and constants are widened first, so that the interpreter's own rounding is negligible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError, TreadleError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Composite
from treadle.ir.types import Type

Array = np.ndarray[Any, Any]
Operands = Sequence[Array | None]
Watch = Callable[[Node, Sequence[Array]], None]
Disturb = Callable[[Node, Operands, Callable[[Operands], list[Array]]], list[Array]]


def interpret(
    graph: Graph,
    inputs: Mapping[str, Any],
    weights: Mapping[str, Array] | None = None,
    *,
    float64: bool = False,
    watch: Watch | None = None,
    disturb: Disturb | None = None,
) -> dict[str, Array]:
    """Run `main` on named inputs and weights. Return its outputs by name.

    watch    is called for every node of every call with its results
    disturb  computes the results of every node in place of its op. Its arguments are the node, its operands, and a
             function that computes the results for given operands

    Raises GraphError for a missing or unknown input or weight, a shape that does not match, or a graph that has states
    or several entries to call: see `interpret_entry`.
    """
    if graph.states or len(graph.later_entries) > 1:
        entries = ", ".join(e.name for e in graph.later_entries)
        raise GraphError(
            "a graph with states or several entries must be interpreted entry by entry",
            received=f"entries {entries}; {len(graph.states)} states",
            hint="interpret_entry(graph, 'step', inputs, weights, states)",
        )
    weights = weights or {}
    wanted = [v.name for v in graph.main.inputs]
    _refuse_other_names(("input", wanted, wanted, inputs), ("weight", graph.parameters, graph.parameters, weights))
    run = _Run(graph, float64, watch, disturb)
    held = dict(weights)
    for entry in graph.entries:
        outputs, _ = run.entry(entry, inputs, held, {})
        held |= outputs  # derived weights, which later entries read
    return outputs


def interpret_entry(
    graph: Graph,
    entry: str,
    inputs: Mapping[str, Any],
    weights: Mapping[str, Array],
    states: Mapping[str, Any],
    *,
    made: Mapping[str, Array] | None = None,
    float64: bool = False,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run one entry on named inputs, the graph's weights, and the states before the call.

    made     the derived weights; None: `bind` is run for this call

    Return the outputs by name, and the states after the call by name, including unchanged ones. The arguments are not
    changed. Raises GraphError for an unknown entry, a missing or unknown input, weight or state, or a shape that does
    not match.
    """
    if entry not in graph.entry_names:
        raise GraphError(f"the graph has no entry {entry!r}", hint="one of " + ", ".join(graph.entry_names))
    function, run = graph.functions[entry], _Run(graph, float64)
    wanted = [v.name for v in function.inputs]
    _refuse_other_names(
        ("input", wanted, wanted, inputs),
        ("weight", graph.parameters, graph.parameters, weights),
        ("state", function.states, graph.states, states),
    )
    held = dict(weights)
    if graph.bind is not None and function is not graph.bind:
        held |= made if made is not None else run.entry(graph.bind, {}, held, {})[0]
    outputs, updated = run.entry(function, inputs, held, states)
    return outputs, {name: updated.get(name, run.widen(np.asarray(array))) for name, array in states.items()}


def _refuse_other_names(*kinds: tuple[str, Collection[str], Collection[str], Collection[str]]) -> None:
    """Raise GraphError if a name is missing or unknown. Each kind consists of its noun, and its required, allowed and
    given names.
    """
    missing = [name for _, wanted, _, given in kinds for name in wanted if name not in given]
    if missing:
        raise GraphError(f"no value for {', '.join(missing[:5])}" + (" and more" if len(missing) > 5 else ""))
    unknown = [name for _, _, known, given in kinds for name in given if name not in known]
    if unknown:
        words = " or ".join(kind for kind, *_ in kinds)
        raise GraphError(f"there is no {words} {', '.join(unknown[:5])}" + (" and more" if len(unknown) > 5 else ""))


def interpret_function(function: Function, arguments: Sequence[Array], sizes: Mapping[str, int]) -> list[Array]:
    """Run one function that contains no calls on its arguments (inputs, parameters, states), with these sizes of
    symbols.

    Return its outputs, then its updated states.
    """
    run = _Run(None, False)
    run.sizes.update(sizes)
    return run.function(function, list(arguments))


def interpret_body(op: Composite, operands: Sequence[Array | None]) -> Any:
    """Run a composite's body on arrays. Return an array or a tuple of arrays."""
    from treadle.ir.types import dtype_of

    types: list[Type | None] = []
    for array in operands:
        dtype = None if array is None else dtype_of(array)
        types.append(None if array is None or dtype is None else Type(dtype, dtype[array.shape].dims))
    results = interpret_function(body_of(op, types), [a for a in operands if a is not None], {})
    return results[0] if len(results) == 1 else tuple(results)


def solve_sizes(type: Type, shape: Sequence[int], sizes: dict[str, int]) -> str | None:
    """Match an array's shape against a type. Add the sizes of symbols that the shape determines to `sizes`: S from S,
    and from 2*S+1.

    Return a description of a mismatch, or None.
    """
    if len(shape) != type.rank:
        return f"must have rank {type.rank}, has rank {len(shape)}"
    for position, (wanted, got) in enumerate(zip(type.shape, shape, strict=True)):
        symbol = wanted.as_symbol
        if got == (wanted.constant if symbol is None else sizes.get(symbol)):  # most dimensions match at once
            continue
        known = {s: sizes[s] for s in sorted(wanted.symbols) if s in sizes}
        left = wanted.substitute(known) if known else wanted
        linear = left.as_linear
        if linear is not None:
            name, coefficient, offset = linear
            size, rest = divmod(int(got) - offset, coefficient)
            fits = rest == 0 and size >= 0
            if fits:
                sizes[name] = size
        else:
            fits = left.constant is None or left.constant == got
        if not fits:
            where = ", ".join(f"{s} = {n}" for s, n in known.items())
            return f"dimension {position} must be {wanted}" + (f" ({where})" if where else "") + f", is {got}"
    return None


class _Run:
    def __init__(
        self, graph: Graph | None, float64: bool, watch: Watch | None = None, disturb: Disturb | None = None
    ) -> None:
        self.graph, self.float64, self.watch, self.disturb = graph, float64, watch, disturb
        self.sizes: dict[str, int] = {}

    def bind(self, value: Value, array: Array) -> None:
        wrong = solve_sizes(value.type.storage_type, array.shape, self.sizes)
        if not wrong and value.type.encoding is not None and array.dtype != np.uint8:
            wrong = f"is {value.type}, held in {value.type.storage_type}"
        if wrong:
            raise GraphError(f"{value.kind} {value.name} {wrong}", received=f"{array.dtype}{list(array.shape)}")

    def widen(self, array: Array) -> Array:
        return array.astype(np.float64, copy=False) if self.float64 and array.dtype.kind == "f" else array

    def entry(
        self, entry: Function, inputs: Mapping[str, Any], weights: Mapping[str, Any], states: Mapping[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Run an entry. Return its outputs and the states that it updates, by name."""
        named = [(v, inputs[v.name]) for v in entry.inputs]
        named += [(v, weights[name]) for name, v in entry.parameters.items()]
        named += [(v, states[name]) for name, v in entry.states.items()]
        arguments = [self.widen(np.asarray(array)) for _, array in named]
        for _ in range(2):  # a size such as 2*S may precede the input that determines S
            for (value, _), array in zip(named, arguments, strict=True):
                self.bind(value, array)
        results = self.function(entry, arguments)
        count = len(entry.outputs)
        updated = [name for name in entry.states if name in entry.updated]
        return dict(zip(entry.outputs, results[:count], strict=True)), dict(zip(updated, results[count:], strict=True))

    def function(self, function: Function, arguments: list[Array]) -> list[Array]:
        values: dict[Value, Array] = dict(zip(function.arguments, arguments, strict=True))

        def read(value: Value | None) -> Array | None:
            if value is None:
                return None
            if value.literal is None:
                return values[value]
            return value.literal.wide if self.float64 else value.literal.array

        for node in function.nodes:
            operands = [read(v) for v in node.operands]
            if self.disturb is None or node.op.callee is not None:
                results = self.node(node, operands)
            else:
                results = self.disturb(node, operands, partial(self.node, node))
            if self.watch is not None and node.op.callee is None:
                self.watch(node, results)
            values.update(zip(node.results, results, strict=True))
        found = [read(v) for v in function.results]
        return [a for a in found if a is not None]

    def node(self, node: Node, operands: Operands) -> list[Array]:
        if node.op.callee is not None:
            if self.graph is None:
                raise GraphError("a call cannot be interpreted without its graph")
            callee = self.graph.callee(node)
            assert callee is not None
            return self.function(callee, [a for a in operands if a is not None])
        for size, otherwise in node.op.demands([None if v is None else v.type for v in node.operands]):
            if size.symbols <= self.sizes.keys() and size.evaluate(self.sizes) < 0:
                known = ", ".join(f"{s} = {self.sizes[s]}" for s in sorted(size.symbols))
                raise GraphError(f"{node.op.name}: {otherwise}", received=known, source=str(node.source or "") or None)
        op = node.op.at(self.sizes)
        if self.float64:
            op = op.in_float64()
        try:
            with np.errstate(all="ignore"):
                made = op.reference(*operands)
        except TreadleError:
            raise
        except Exception as error:  # errors of NumPy, such as a result too large for memory
            raise GraphError(
                f"the reference implementation of {op.name} raised an error",
                received=f"{type(error).__name__}: {error}",
                source=str(node.source or "") or None,
            ) from error
        arrays = [np.asarray(a) for a in (made if isinstance(made, tuple) else (made,))]
        for value, array in zip(node.results, arrays, strict=True):
            wanted = value.type.storage_type.evaluate(self.sizes) if value.type.symbols <= self.sizes.keys() else None
            if wanted is not None and array.shape != wanted:
                raise GraphError(
                    f"{node.op.name}: the reference returns shape {list(array.shape)}, "
                    f"but the rule gives {list(wanted)}",
                    source=str(node.source or "") or None,
                )
        return [self._as(value.type, array) for value, array in zip(node.results, arrays, strict=True)]

    def _as(self, type: Type, array: Array) -> Array:
        if type.encoding is not None:
            return array
        if type.dtype.is_float:
            array = self.widen(array)  # decoded blocks are float32 even in a run in float64
            return array if self.float64 or array.dtype == type.dtype.numpy else self._narrow(type, array)
        return array.astype(type.dtype.numpy, copy=False)

    def _narrow(self, type: Type, array: Array) -> Array:
        """Round an array to the type's dtype. In a body that runs in another precision than its types (float64
        samples), keep the array's precision.
        """
        return array if self.graph is None or type.dtype.numpy is None else array.astype(type.dtype.numpy)
