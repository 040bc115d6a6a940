"""Names that nodes of an ONNX file may refer to, and the nodes' paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.values import Known


@dataclass
class Scope:
    """Names that nodes may refer to: in the main graph, in a branch of an If, or in a function's body.

    values  the values, by name
    outer   the enclosing scope of a branch
    opsets  the opset of each domain
    path    prefix of the scopes of the graph's nodes and of the names of weights
    depth   number of enclosing scopes
    line    source line of its nodes: the line of the call in the main graph
    absent  the inputs of a function that its call left out
    """

    values: dict[str, Known]
    opsets: Mapping[str, int]
    outer: Scope | None = None
    path: str = ""
    depth: int = 0
    line: int | None = None
    absent: frozenset[str] = frozenset()

    def find(self, name: str) -> Known | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        return None


def domain_of(node: Any) -> str:
    """Return a node's domain: "" for ONNX's own domain, which has two names."""
    return "" if node.domain == "ai.onnx" else str(node.domain)


_SCOPE_NAMES = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")


def path_of(node: Any, index: int, scope: Scope) -> str:
    """Return a node's path: its module, if the exporter records it, and its name."""
    name = node.name or f"{node.op_type}_{index}"
    path = name.strip("/").replace("/", ".")
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes" and len(entry.value) < 10_000:
            modules = [a or b for a, b in _SCOPE_NAMES.findall(entry.value)]
            if len(modules) > 1 and modules[-2]:  # the last part is the node itself
                path = f"{modules[-2]}.{path}"
    path = printable(path, 400)
    return f"{scope.path}.{path}" if scope.depth and scope.path else path
