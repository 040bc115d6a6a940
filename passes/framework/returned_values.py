"""Values that a model only returns: they reach outputs of `main` only through moves and casts."""

from __future__ import annotations

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.elementwise import Cast


class ReturnedValues:
    """A cached analysis of the values of functions. It follows the outputs of a block to all callers of the block."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._users: dict[str, dict[Value, list[Node | None]]] = {}
        self._known: dict[Value, bool] = {}

    def goes_out(self, function: Function, user: Node | None, value: Value) -> bool:
        """Return True if a reader of a value only passes the value on to outputs of `main`. If `user` is None, the
        reader is an output of the function.
        """
        if user is None:
            return self._output_goes_out(function, value)
        if not (user.op.is_view or isinstance(user.op, Cast)):
            return False
        (made,) = user.results
        found = self._known.get(made)
        if found is None:
            found = self._known[made] = self._all_go_out(function, made)
        return found

    def _all_go_out(self, function: Function, value: Value) -> bool:
        """Return True if every reader of the value passes it on to outputs; an unused value counts as passed on."""
        return all(self.goes_out(function, user, value) for user in self._readers(function).get(value, []))

    def _output_goes_out(self, function: Function, value: Value) -> bool:
        if function in self.graph.later_entries:
            return True
        at = [n for n, v in enumerate(function.outputs.values()) if v is value]
        calls = [
            (caller, node)
            for caller in self.graph.functions.values()
            for node in caller.nodes
            if node.op.callee == function.name
        ]
        return bool(calls) and all(self._all_go_out(caller, node.results[n]) for caller, node in calls for n in at)

    def _readers(self, function: Function) -> dict[Value, list[Node | None]]:
        found = self._users.get(function.name)
        if found is None:
            found = self._users[function.name] = readers_of(function)
        return found


def readers_of(function: Function) -> dict[Value, list[Node | None]]:
    """Return the readers of the results of the function's nodes, each once; None for an output or an updated state."""
    found: dict[Value, list[Node | None]] = {}
    for node in function.nodes:
        for value in node.operands:
            if value is not None and value.node is not None:  # weights and inputs are not needed, and there are many
                readers = found.setdefault(value, [])
                if not readers or readers[-1] is not node:
                    readers.append(node)
    for value in dict.fromkeys(function.results):
        if value.node is not None:
            found.setdefault(value, []).append(None)
    return found
