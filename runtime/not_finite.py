"""The origin of a NaN or an infinity in a model's outputs: an op, a weight, a constant or an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.graph import Graph, Node, Value
from treadle.runtime.verification_report import NotFinite

Array = np.ndarray[Any, Any]

_TESTS = (("NaN", np.isnan), ("infinite", np.isinf))


class FiniteWatch:
    """A recorder of the values that are NaN or infinite in a run of a graph without calls.

    interpret(graph, inputs, weights, float64=True, watch=finite), then finite.found(outputs)
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, Array], weights: Mapping[str, Array]) -> None:
        self.graph = graph
        self.held: dict[Value, frozenset[str]] = {}
        for values, arrays in (
            (((v.name, v) for v in graph.main.inputs), inputs),
            (graph.main.parameters.items(), weights),
        ):
            for name, value in values:
                self._see(value, np.asarray(arrays[name]))

    def __call__(self, node: Node, results: Sequence[Array]) -> None:
        for value, array in zip(node.results, results, strict=True):
            self._see(value, array)

    def _see(self, value: Value, array: Array) -> None:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            self.held[value] = frozenset(kind for kind, holds in _TESTS if holds(array).any())

    def _kinds(self, value: Value) -> frozenset[str]:
        if value.literal is not None and value not in self.held:
            self._see(value, value.literal.array)
        return self.held.get(value, frozenset())

    def found(self, outputs: Mapping[str, Array], sizes: Mapping[str, int]) -> list[NotFinite]:
        """Return a report for each output that is NaN or infinite; outputs with NaN come first."""
        events = []
        for name, value in self.graph.main.outputs.items():
            array = outputs[name]
            for kind, holds in _TESTS if array.dtype.kind == "f" else ():
                if count := int(np.sum(holds(array))):
                    events.append(self._event(name, kind, count, array.size, value, sizes))
                    break
        return events

    def _event(self, name: str, kind: str, count: int, of: int, value: Value, sizes: Mapping[str, int]) -> NotFinite:
        """Trace an output back to the first value with the same kind of number (NaN or infinite), and return the
        report.
        """
        while value.node is not None:
            above = next((v for v in value.node.inputs if kind in self._kinds(v)), None)
            if above is None:
                break
            value = above
        node = value.node
        if node is None:
            what = "a constant" if value.literal is not None else f"{_KINDS.get(value.kind, value.kind)} {value.name}"
            return NotFinite(name, kind, count, of, what, "", "", sizes, value.kind == "parameter")
        infinite = next((v for v in node.inputs if "infinite" in self._kinds(v)), None)
        what = node.op.name + (" of infinite numbers" if infinite is not None else "")
        return NotFinite(name, kind, count, of, what, node.scope, str(node.source or ""), sizes)


_KINDS = {"parameter": "weight"}
