"""Write the contents of an artifact to one `.treadle` file. docs/artifacts.md describes the layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from treadle.artifacts.file import write_sections
from treadle.files.contained_files import PathLike
from treadle.files.nearest_names import check_suffix
from treadle.ir.analysis.narrow_reads import read_only_in
from treadle.ir.text.printer import print_graph
from treadle.ir.types import bf16, f32
from treadle.passes.framework.manager import Optimized
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.plan_printing import plan_record
from treadle.program.places import ARTIFACT_SUFFIX


def write_artifact(
    path: PathLike,
    name: str,
    backend: str,
    target: str,
    optimized: Optimized,
    weights: Mapping[str, Any],
    seed: int | None,
    plan: ShardingPlan | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> str:
    """Write the contents of an artifact (`treadle.artifacts.reading.Artifact`). Return the file's seal, 64 hexadecimal
    digits that identify the content.

    Equal arguments give equal bytes: the file holds no times and no local paths. An existing file is replaced
    atomically.

    plan     the sharding plan of the optimized graph
    options  the options that the model was compiled with (`CompileOptions.record`)
    files    the files of the model's tokenizer by name (`treadle.artifacts.tasks`)

    Raises UsageError if the file's name does not end in .treadle, since it would not be read as an artifact, or if the
    file cannot be written.
    """
    check_suffix(Path(path), [ARTIFACT_SUFFIX], "an artifact")
    graph, log = optimized.graph, optimized.log
    texts = {"graph": print_graph(graph).encode(), "declared": print_graph(optimized.source).encode()}
    texts["log"] = _json(log.as_dict())
    if plan is not None:
        texts["sharding"] = _json(plan_record(plan))
    narrow = read_only_in(bf16, graph)
    dtypes = {n: value.type.storage_type.dtype for n, value in graph.parameters.items()}
    sections = {n: (bf16 if dtype is f32 and n in narrow else dtype, weights[n]) for n, dtype in dtypes.items()}
    metadata = {
        "name": name,
        "backend": backend,
        "target": target,
        "passes": ", ".join(f"{r.name}{{{r.options}}}" if r.options else r.name for r in log),
        "seed": "" if seed is None else str(seed),
        "options": _json(dict(options)).decode(),
    }
    return write_sections(Path(path), texts, sections, metadata, files)


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
