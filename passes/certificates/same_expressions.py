"""The check that two graphs compute the same expressions of the same inputs and weights, regardless of where and how
often.

Passes that move work to `bind`, share it, or change a weight's layout must not change the computed values. Each output
of an entry, and the final value of each state, is an expression: a tree of ops over inputs, weights, states and
constants. In this tree, a call stands for its body, a derived weight for the expression that computes it, and a
relayout for its operand. Equal trees get equal numbers, so that comparing is cheap. The check is independent of the
passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.hashing import literal_key, op_key
from treadle.ir.ops.layout import Relayout

MOST_NODES = 200_000
"""The greatest number of visited nodes, counting each call. Functions that call others twice, and so on, may have many
more.
"""

Key = tuple[object, ...]


Numbers = dict[str, int]
"""The number of the expression of each output of the entries, and of each state that they update."""

Step = tuple[Function | None, str | None, tuple[Value | None, ...], tuple[Value, ...]]
"""A node: the function that it calls, or the key of its op, or neither if it only changes its operand's layout; then
its operands and results.
"""


class Expressions:
    """A table of numbers for expressions. Equal expressions get equal numbers, also in different graphs."""

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}
        self._literals: dict[Value, int] = {}
        self._left = MOST_NODES
        self._read: dict[Function, tuple[list[Step], dict[Value | None, int]]] = {}
        """The steps and the constants of each function of the graph whose expressions are being numbered."""

    def of(self, graph: Graph) -> Numbers | None:
        """Return the numbers of a graph's expressions as it is now, or None if the graph is too large."""
        self._left = MOST_NODES
        self._read.clear()
        held: Numbers = {}
        outputs: Numbers = {}
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
        self._left -= len(function.nodes)
        if self._left < 0:
            return None
        steps, constants = self._steps(graph, function)
        values: dict[Value | None, int] = dict(constants)
        values.update(zip(function.arguments, arguments, strict=True))
        for callee, key, read, made in steps:
            operands = [values[v] for v in read]
            if callee is not None:
                found = self._function(graph, callee, operands)
                if found is None:
                    return None
                values.update(zip(made, found, strict=True))
            elif key is None:
                values[made[0]] = operands[0]
            else:
                number = values[made[0]] = self._number((key, *operands))
                for i in range(1, len(made)):
                    values[made[i]] = self._number(("result", number, i))
        return [values[v] for v in function.results]

    def _steps(self, graph: Graph, function: Function) -> tuple[list[Step], dict[Value | None, int]]:
        known = self._read.get(function)
        if known is None:
            steps: list[Step] = []
            for node in function.nodes:
                callee = graph.callee(node)
                key = None if callee is not None or isinstance(node.op, Relayout) else op_key(node.op)
                steps.append((callee, key, node.operands, node.results))
            read = (*(v for node in function.nodes for v in node.inputs), *function.results)
            constants: dict[Value | None, int] = {v: self._literal(v) for v in read if v.literal is not None}
            constants[None] = -1
            known = self._read[function] = steps, constants
        return known

    def _literal(self, value: Value) -> int:
        if value not in self._literals:
            assert value.literal is not None
            self._literals[value] = self._number(("constant", literal_key(value.literal)))
        return self._literals[value]

    def _number(self, key: Key) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def check_same_expressions(
    before: Graph, after: Graph, expressions: Expressions | None = None, was: Numbers | None = None
) -> Numbers | None:
    """Return the numbers of the expressions of `after` if they are the same as in `before`. Return None if a graph is
    too large to compare.

    was   the old expressions, if `expressions` has computed them already

    Raises PassError with the output whose expression changed or that is missing.
    """
    expressions = expressions or Expressions()
    was = was or expressions.of(before)
    now = None if was is None else expressions.of(after)
    if was is None or now is None:
        return None
    if was.keys() != now.keys():
        raise PassError(
            "the outputs have other names than before the pass", received=f"{list(now)}; before: {list(was)}"
        )
    for name, number in was.items():
        if now[name] != number:
            raise PassError(f"{name} is no longer the same expression of inputs and weights")
    return now
