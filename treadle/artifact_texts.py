"""The tokenizer of a model for text, and the pooling of an embedding model, as files that their artifacts store."""

from __future__ import annotations

import json
from typing import Any

from treadle.ir.analysis.following import follow
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.ir.types import i64
from treadle.passes.stepping.derivation import for_step, may_be_empty
from treadle.program.source import ModelSource
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.pooling import read_pooling_files

_SETTINGS = "tokenizer_config.json"
_PATHS = ("name_or_path",)
"""Keys whose value may be a path of the machine on which a tokenizer was saved."""


def stored_texts(source: ModelSource) -> dict[str, bytes]:
    """Return the files of a model's tokenizer, chat template and pooling by name, and a generation_config.json with its
    end tokens and token rules. Return only the pooling if it has no tokenizer that can be read.
    """
    pooling: dict[str, bytes] = {}
    if source.path is not None and source.kind not in ("gguf", "onnx"):
        pooling = read_pooling_files(source.folder)
    try:
        if not source.has_tokenizer:
            return pooling
        files, rules = source.text_files(), FolderRules.read(source)
    except TreadleError:
        return pooling
    settings: dict[str, Any] = {**rules.options, **({"eos_token_id": list(rules.end)} if rules.end else {})}
    if settings:
        files["generation_config.json"] = json.dumps(settings, indent=2).encode()
    if _SETTINGS in files:
        found = json.loads(files[_SETTINGS])
        if isinstance(found, dict) and any(key in found for key in _PATHS):
            kept = {key: value for key, value in found.items() if key not in _PATHS}
            files[_SETTINGS] = json.dumps(kept, indent=2, ensure_ascii=False).encode()
    return {**files, **pooling}


def continues_text(graph: Graph) -> bool:
    """Return True if a model maps tokens [B, S] to logits, can be stepped along S, and needs no other inputs for a
    text.
    """
    graph = for_step(graph)
    inputs = [v for v in graph.main.inputs if v.name not in graph.generated and not may_be_empty(v, graph)]
    if len(inputs) != 1 or "logits" not in graph.main.outputs:
        return False
    (tokens,) = inputs
    axis = tokens.type.shape[-1].as_symbol if tokens.type.rank == 2 and tokens.type.dtype is i64 else None
    return axis is not None and bool(follow(graph, axis).step())


def embeds_text(graph: Graph) -> bool:
    """Return True if a model maps tokens [B, S], and optionally their lengths [B], to hidden states [B, S, D]."""
    takes, hidden = {v.name: v.type for v in graph.main.inputs}, graph.main.outputs.get("hidden")
    tokens = takes.get("tokens")
    return (
        tokens is not None
        and takes.keys() <= {"tokens", "lengths"}
        and (tokens.rank, tokens.dtype) == (2, i64)
        and hidden is not None
        and hidden.type.rank == 3
        and hidden.type.shape[:2] == tokens.shape
    )
