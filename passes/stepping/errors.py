"""The error for a model that has no step. All files of this folder use it."""

from __future__ import annotations

from treadle.ir.builder import describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Node


def refusal(node: Node, why: str, *, hint: str | None = None) -> PassError:
    """Return the error for a model that has no step because of a node, with the author's line."""
    return PassError(
        f"no step can be derived: {node.op.name} {why}",
        received=", ".join(str(v.type) for v in node.inputs) or None,
        source=describe_source(node.source, node.scope),
        hint=hint,
    )
