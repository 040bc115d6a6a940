"""Views of states: values that show what a state holds, and change with it where it is written in place.

    old = rearrange(%k, ...); %k = append(%k, ...); y = exp(old)          y would read what was appended

Each such value has a base: the version of a state, or the argument of its function, whose elements it shows.
"""

from __future__ import annotations

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.elementwise import Cast


class StateViews:
    """Asked for functions of one graph; follows what blocks give into their callers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[Function, dict[Value, Value]] = {}

    def bases(self, function: Function) -> dict[Value, Value]:
        """The base of each value of a function that shows another's elements."""
        if function not in self._known:
            for each in self.graph.functions.values():  # callees first, so that nothing goes deep
                if each is not function and each not in self._known:
                    self._known[each] = self._found(each)
                if each is function:
                    break
            self._known[function] = self._found(function)
        return self._known[function]

    def _found(self, function: Function) -> dict[Value, Value]:
        found: dict[Value, Value] = {}
        for node in function.nodes:
            self.add(node, found)
        return found

    def add(self, node: Node, found: dict[Value, Value]) -> None:
        """Add the bases of what a node gives to those of what comes before it."""
        callee = self.graph.callee(node)
        if callee is not None:
            self._given(node, callee, found)
        elif _is_view(node):
            (x,) = node.inputs
            found[node.result] = found.get(x, x)

    def _given(self, node: Node, callee: Function, found: dict[Value, Value]) -> None:
        """What a call gives that shows what it was passed, or a state that it updates."""
        inside = self.bases(callee)
        passed = dict(zip(callee.arguments, node.operands, strict=True))
        after = {node.operands[at]: node.results[index] for index, at in node.op.updates.items()}
        for value, result in zip(callee.outputs.values(), node.results, strict=False):
            base = inside.get(value, value)
            actual = passed.get(base if base.state is None else base.state)
            if actual is not None and actual.literal is None:
                changed = base.node is not None  # by the callee, whose last version this then is
                found[result] = after[actual] if changed else found.get(actual, actual)


def _is_view(node: Node) -> bool:
    """Whether a backend may give the memory of the operand itself."""
    if isinstance(node.op, Cast):
        return node.inputs[0].type.dtype is node.result.type.dtype
    return node.op.is_view


def deadlines(function: Function) -> dict[Node, int]:
    """For nodes that read a state which is updated later, or what may show it: the position of the first update.

    Whoever computes a node in another place than its own, as a part of a group, must do so before that. What a call
    gives is taken to show every state that it was passed.
    """
    if not function.states:
        return {}
    shown: dict[Value, set[Value]] = {}
    updated: dict[Value, int] = {}
    for at, node in enumerate(function.nodes):
        versions = {v for v in (*node.inputs, *node.results) if v.state is not None}
        inside = versions.union(*(shown.get(v, ()) for v in node.inputs))
        if node.op.callee is not None or _is_view(node):
            shown |= dict.fromkeys(node.named_results, inside)
        updated |= {before: at for v in node.results if v.state is not None and (before := v.before) is not None}
    found = {}
    for at, node in enumerate(function.nodes):
        read = {v for v in node.inputs if v.state is not None}.union(*(shown.get(v, ()) for v in node.inputs))
        until = [updated[v] for v in read if updated.get(v, at) > at]
        if until:
            found[node] = min(until)
    return found
