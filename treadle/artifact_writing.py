"""Writing a compiled model to one `.treadle` file. docs/artifacts.md has the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.artifact_file import write_sections
from treadle.files.contained_files import PathLike
from treadle.ir.text.printer import print_graph

if TYPE_CHECKING:
    from treadle.compiled import Compiled  # which saves itself


def save(compiled: Compiled, path: PathLike) -> str:
    """Write a compiled model to one file; returns the file's seal, which names its content (64 hexadecimal digits).

    Equal models, options and weights give equal bytes: no times, no paths of this machine. A file of that name is
    replaced in one step. Raises UsageError where the file cannot be written.
    """
    graph, log = compiled.optimized.graph, compiled.optimized.log.as_dict()
    texts = {
        "graph": print_graph(graph).encode(),
        "declared": print_graph(compiled.optimized.source).encode(),
        "log": json.dumps(log, ensure_ascii=False, separators=(",", ":")).encode(errors="replace"),
    }
    weights = {name: (value.type.held.dtype, compiled.weights[name]) for name, value in graph.parameters.items()}
    metadata = {
        "name": compiled.name,
        "backend": compiled.backend,
        "target": str(compiled.target),
        "passes": ", ".join(f"{r.name}({r.options})" if r.options else r.name for r in compiled.optimized.log),
        "seed": "" if compiled.seed is None else str(compiled.seed),
    }
    return write_sections(Path(path), texts, weights, metadata)
