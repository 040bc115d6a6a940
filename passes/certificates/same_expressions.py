"""Whether two graphs compute the same expressions of the same inputs and weights, whenever and wherever they do.

Passes that move work to `bind`, share it, or lay a weight out anew may not change what is computed. Each output of an
entry, and what each state is in the end, is an expression: a tree of ops over inputs, weights, states and constants, in
which a call stands for its body, a made parameter for what makes it, and a relayout for its operand. Equal trees are
given one number here, so that comparing is cheap. The passes know nothing of this.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.hashing import literal_key, op_key
from treadle.ir.ops.layout import Relayout

MOST_NODES = 200_000
"""Nodes that are looked at, calls entered each time: blocks that call others twice, and so on, would have too many."""

Key = tuple[object, ...]


class Expressions:
    """Numbers for expressions, the same for equal ones of all graphs that it is asked about."""

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}
        self._literals: dict[Value, int] = {}
        self._left = MOST_NODES

    def of(self, graph: Graph) -> dict[str, int] | None:
        """A number for each output of entries, and each state that they update; None where the graph is too large."""
        self._left = MOST_NODES
        held: dict[str, int] = {}
        outputs: dict[str, int] = {}
        for entry in graph.entries:
            arguments = [self._number(("input", v.name)) for v in entry.inputs]
            arguments += [held.get(n, self._number(("weight", n))) for n in entry.parameters]
            arguments += [self._number(("state", n)) for n in entry.states]
            found = self._function(graph, entry, arguments)
            if found is None:
                return None
            if entry is graph.bind:
                held = dict(zip(entry.outputs, found, strict=True))
                continue
            place = "" if len(graph.later_entries) == 1 else f"{entry.name}, "
            names = [f"{place}output {name}" for name in entry.outputs]
            names += [f"{place}state {name}" for name in entry.states if name in entry.updated]
            outputs |= zip(names, found, strict=True)
        return outputs

    def _function(self, graph: Graph, function: Function, arguments: Sequence[int]) -> list[int] | None:
        values: dict[Value, int] = dict(zip(function.arguments, arguments, strict=True))
        self._left -= len(function.nodes)
        if self._left < 0:
            return None

        def read(value: Value | None) -> int:
            if value is None:
                return -1
            return values[value] if value.literal is None else self._literal(value)

        for node in function.nodes:
            operands = [read(v) for v in node.operands]
            callee = graph.callee(node)
            if callee is not None:
                results = self._function(graph, callee, operands)
                if results is None:
                    return None
            elif isinstance(node.op, Relayout):
                results = operands
            else:
                made = self._number((op_key(node.op), *operands))
                results = [made, *(self._number(("result", made, i)) for i in range(1, len(node.results)))]
            values |= zip(node.results, results, strict=True)
        return [read(v) for v in function.results]

    def _literal(self, value: Value) -> int:
        if value not in self._literals:
            assert value.literal is not None
            self._literals[value] = self._number(("constant", literal_key(value.literal)))
        return self._literals[value]

    def _number(self, key: Key) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def check_same_expressions(before: Graph, after: Graph) -> bool:
    """Whether it could be told that they are the same; False where the graphs are too large.

    Raises PassError with the output that is another expression, or is not there.
    """
    expressions = Expressions()
    was, now = expressions.of(before), expressions.of(after)
    if was is None or now is None:
        return False
    if was.keys() != now.keys():
        raise PassError("the outputs are not those that they were", received=f"{list(now)}; before: {list(was)}")
    for name, number in was.items():
        if now[name] != number:
            raise PassError(f"{name} is no longer the same expression of inputs and weights")
    return True
