"""The facts of each op at each stage: types, axis rule, line, operations, bytes. Equal facts are stored once.

facts = NodeDetails(sizes)
index = facts.of(stage)              # for each node's number, the index of its facts
facts.light, facts.details           # the facts that drawing and search need, and all others
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from treadle.ir.analysis.cost import Cost, function_cost, node_cost
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.text.attributes import attribute_text, default_texts
from treadle.ir.text.constants import constant_text
from treadle.ir.types import Type
from treadle.report.box_contents import result_name, value_key
from treadle.report.stages import ProgramStage


class NodeDetails:
    """A table of the facts of ops.

    light    [op, name, type, scope, line, FLOPs, bytes] of each entry
    details  the other facts of each entry
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.light: list[list[Any]] = []
        self.details: list[dict[str, Any]] = []
        self._index: dict[Any, int] = {}
        self._functions: dict[int, tuple[Function, dict[int, int]]] = {}
        self._costs: dict[int, Cost] = {}
        self._ops: dict[Op, dict[str, Any]] = {}

    def of(self, stage: ProgramStage) -> dict[int, int]:
        """Return the index of the facts of each node of a stage, by the node's number."""
        costs = self._functions_costs(stage.graph)
        found: dict[int, int] = {}
        for name, function in stage.graph.functions.items():
            known = self._functions.get(id(function))
            if known is None:
                numbers = stage.numbers[name]
                known = function, self._of_function(stage.graph, function, numbers, costs)
                self._functions[id(function)] = known  # keeps the function alive, so that its id is not reused
            found |= known[1]
        return found

    def _functions_costs(self, graph: Graph) -> dict[str, Cost]:
        costs: dict[str, Cost] = {}
        for name, function in graph.functions.items():
            if id(function) not in self._costs:
                self._costs[id(function)] = function_cost(function, self.sizes, costs)
            costs[name] = self._costs[id(function)]
        return costs

    def _of_function(
        self, graph: Graph, function: Function, numbers: Iterable[int], costs: Mapping[str, Cost]
    ) -> dict[int, int]:
        number_of = dict(zip(function.nodes, numbers, strict=True))
        found = {}
        for node, number in number_of.items():
            first = node.results[0] if node.results else None
            light = (
                node.op.callee or node.op.name,
                "" if first is None else result_name(first, graph),
                "" if first is None else first.type.text,
                node.scope,
                str(node.source or ""),
            )
            cost = node_cost(node, self.sizes, costs)
            results = tuple([(value_key(v, number_of), result_name(v, graph), v.type.text) for v in node.results])
            key = light, self._operands(node, number_of), results, node.op, cost
            if key not in self._index:
                self._index[key] = len(self.light)
                self.light.append([*light, cost.flops, cost.bytes])
                self.details.append(self._details(node, key[1], results))
            found[number] = self._index[key]
        return found

    def _operands(self, node: Node, numbers: Mapping[Node, int]) -> tuple[tuple[str, ...], ...]:
        names = node.op.operand_names(len(node.operands)) if node.op.callee is None else [""] * len(node.operands)
        found = []
        for name, value in zip(names, node.operands, strict=True):
            if value is not None:
                found.append((name, *_operand(value, numbers), value.type.text))
        return tuple(found)

    def _details(self, node: Node, operands: tuple[Any, ...], results: tuple[Any, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {"operands": operands, "results": results}
        return found if node.op.callee is not None else found | self._of_op(node)

    def _of_op(self, node: Node) -> dict[str, Any]:
        unsaid = default_texts(type(node.op))
        attributes = {n: attribute_text(v) for n, v in node.op.attributes.items()}
        rule = node.op.axis_rule([None if v is None else v.type.rank for v in node.operands])
        doc = (type(node.op).__doc__ or "").strip().partition("\n\n")[0]
        return {
            "rule": rule,
            "equation": " ".join(doc.split()),
            "attributes": {n: text for n, text in attributes.items() if unsaid.get(n) != text},
        }


def _operand(value: Value, numbers: Mapping[Node, int]) -> tuple[str, str]:
    """Return the kind of an operand, and its key, its name or its constant's text."""
    if value.node is not None:
        return "value", value_key(value, numbers)
    if value.literal is not None:
        return "constant", constant_text(value.literal, None) if _is_small(value.type) else "constant"
    if value.kind == "input":
        return "value", value_key(value, numbers)
    return value.kind, value.name


def _is_small(type: Type) -> bool:
    return type.elements.constant is not None and type.elements.constant <= 8
