"""Names that nodes of an ONNX file may refer to, and the paths that nodes have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.values import Known


@dataclass
class Scope:
    """Names that nodes may refer to: of the main graph, of a branch within it, or of a function's body.

    values  by name
    outer   the scope around a branch
    opsets  by domain
    path    in scopes of the graph's nodes and in names of weights
    depth   how many scopes are around it
    line    the line that its nodes are said to come from: that of the call in the main graph
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
    """A node's domain, in which ONNX's own has two names."""
    return "" if node.domain == "ai.onnx" else str(node.domain)


_SCOPE_NAMES = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")


def path_of(node: Any, index: int, scope: Scope) -> str:
    """A node's path: the module that it came from, where the exporter says it, and its name."""
    name = node.name or f"{node.op_type}_{index}"
    path = name.strip("/").replace("/", ".")
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes" and len(entry.value) < 10_000:
            modules = [a or b for a, b in _SCOPE_NAMES.findall(entry.value)]
            if len(modules) > 1 and modules[-2]:  # the last is the node itself
                path = f"{modules[-2]}.{path}"
    path = printable(path, 400)
    return f"{scope.path}.{path}" if scope.depth and scope.path else path
