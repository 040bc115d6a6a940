"""Lowering rules of shape."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.backends.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node


def _rearrange(w: RoutineWriter, node: Node) -> None:
    w.rearranged(node)


RULES: Mapping[str, Rule] = {"rearrange": _rearrange}
KEEPS: Mapping[str, Keeps] = {}
