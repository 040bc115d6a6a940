"""The error for a storage plan that fails a check."""

from __future__ import annotations

from treadle.ir.builder import describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Value
from treadle.passes.memory.storage_plan import FunctionPlan


def wrong_plan(what: str, plan: FunctionPlan, value: Value | None = None, detail: str = "") -> PassError:
    """Return the error for a plan, at a value if one is known."""
    node = value.node if value is not None else None
    parts = [] if value is None else [f"{value.name}: {value.type}"]
    return PassError(
        f"the storage plan is wrong: {what}",
        received=", ".join([*parts, detail] if detail else parts) or None,
        within=f"{plan.function.name}, {node!r}" if node is not None else plan.function.name,
        source=describe_source(node.source, node.scope) if node is not None else None,
    )
