"""Dead code: remove nodes that no output depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.ops.call import Call
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord

_NAMED = 5


@dataclass(frozen=True)
class DeadCode(Pass):
    """a = f(x); b = g(x); return b   -->   b = g(x); return b

    Removes nodes without a used result, results of a function that no call uses, inputs, weights and states that a
    function does not read, functions that are never called, and unused weights and states of the model, which the log
    names. Keeps the model's own inputs and outputs, the derived weights of `bind`, and the final values of states.
    """

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        changes = 0
        # A function that loses arguments may leave dead nodes in its callers. The next walk finds these nodes.
        while found := _walk(graph, log):
            changes += found
        return changes


def _walk(graph: Graph, log: PassRecord) -> int:
    """Clean every function once, callers first. Return the number of removed items."""
    removed = 0
    used: set[Value] = set()
    calls: dict[str, list[Node]] = {}
    for function in reversed(list(graph.functions.values())):
        callers = calls.get(function.name, [])
        if function not in graph.entries:
            if not callers:
                del graph.functions[function.name]
                log.notes.append(f"removed function {function.name}, which is never called")
                removed += 1
                continue
            removed += _drop_results(function, callers, used)
        removed += _drop_nodes(function, used)
        if function not in graph.entries:
            removed += _drop_arguments(function, callers, used)
        elif function.name == graph.entry_names[0]:  # entries are visited last to first
            removed += _drop_weights(graph, used, log)
        for node in function.nodes:
            if node.op.callee is not None:
                calls.setdefault(node.op.callee, []).append(node)
    return removed


def _drop_nodes(function: Function, used: set[Value]) -> int:
    """Drop nodes without a used result, and add the operands of the other nodes to `used`. Return the number of dropped
    nodes.
    """
    kept = needed_nodes(function.nodes, function.results)
    used.update(function.results, *(node.inputs for node in kept))
    removed = len(function.nodes) - len(kept)
    function.nodes = kept
    return removed


def _drop_results(function: Function, callers: Sequence[Node], used: set[Value]) -> int:
    wanted = [any(call.results[i] in used for call in callers) for i in range(len(function.outputs))]
    if all(wanted):
        return 0
    function.outputs = {name: v for (name, v), keep in zip(function.outputs.items(), wanted, strict=True) if keep}
    for call in callers:
        call.op = Call.of(function)
        call.results = tuple(v for i, v in enumerate(call.results) if i >= len(wanted) or wanted[i])
        for index, value in enumerate(call.results):
            value.index = index
    return wanted.count(False)


def _drop_arguments(function: Function, callers: Sequence[Node], used: set[Value]) -> int:
    wanted = [v in used for v in function.arguments]
    if all(wanted):
        return 0
    function.inputs = [v for v in function.inputs if v in used]
    function.parameters = {name: v for name, v in function.parameters.items() if v in used}
    function.states = {name: v for name, v in function.states.items() if v in used}
    for call in callers:
        call.op = Call.of(function)
        call.operands = tuple(v for v, keep in zip(call.operands, wanted, strict=True) if keep)
    return wanted.count(False)


def _drop_weights(graph: Graph, used: set[Value], log: PassRecord) -> int:
    """Drop weights and states that an entry does not read. Log those that no other entry reads either."""
    removed = 0
    known = {"weights": list(graph.parameters), "states": list(graph.states)}
    for entry in graph.later_entries:
        for values in entry.parameters, entry.states:
            for name in [name for name, v in values.items() if v not in used]:
                del values[name]
                removed += 1
    for kind, left in ("weights", graph.parameters), ("states", graph.states):
        unused = [name for name in known[kind] if name not in left]
        for name in unused:
            graph.initial.pop(name, None)
        if unused:
            more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
            log.notes.append(f"removed unused {kind}: {', '.join(unused[:_NAMED])}{more}")
    return removed
