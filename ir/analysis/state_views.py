"""Views of states: values that share memory with a state, and change if the state is written in place.

    old = rearrange(%k, ...); %k = append(%k, ...); y = exp(old)          y would read the appended rows

Each view has a base: the value whose elements it shows. That is a version of a state, or an argument of the function.
"""

from __future__ import annotations

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.elementwise import Cast


class StateViews:
    """The views in the functions of one graph. Views that a function returns are followed into its callers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[Function, dict[Value, Value]] = {}

    def bases(self, function: Function) -> dict[Value, Value]:
        """Return a dict from each view in a function to its base."""
        if function not in self._known:
            for each in self.graph.functions.values():  # callees first, so that recursion stays shallow
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
        """Add the bases of a node's results to the bases of the preceding values."""
        callee = self.graph.callee(node)
        if callee is not None:
            self._given(node, callee, found)
        elif _is_view(node):
            (x,) = node.inputs
            found[node.result] = found.get(x, x)

    def _given(self, node: Node, callee: Function, found: dict[Value, Value]) -> None:
        """Add the bases of a call's results that show an operand, or a state that the callee updates."""
        inside = self.bases(callee)
        passed = dict(zip(callee.arguments, node.operands, strict=True))
        after = {node.operands[at]: node.results[index] for index, at in node.op.updates.items()}
        for value, result in zip(callee.outputs.values(), node.results, strict=False):
            base = inside.get(value, value)
            actual = passed.get(base if base.state is None else base.state)
            if actual is not None and actual.literal is None:
                changed = base.node is not None  # updated by the callee: the base is its last version
                found[result] = after[actual] if changed else found.get(actual, actual)


def _is_view(node: Node) -> bool:
    """Return True if a backend may return the memory of the operand itself."""
    if isinstance(node.op, Cast):
        return node.inputs[0].type.dtype is node.result.type.dtype
    return node.op.is_view


def deadlines(function: Function) -> dict[Node, int]:
    """Return, for each node that reads a state or a view of a state, the position of the first later update of that
    state.

    A caller that moves a node, for example into a group, must compute the node before that position. The results of a
    call are assumed to show every state that was passed to the call.
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
