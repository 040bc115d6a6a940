"""The tokenizer of a language model, as files that its artifact stores."""

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

_SETTINGS = "tokenizer_config.json"
_PATHS = ("name_or_path",)
"""Keys whose value may be a path of the machine on which a tokenizer was saved."""


def stored_texts(source: ModelSource) -> dict[str, bytes]:
    """Return the files of a model's tokenizer and chat template by name, and a generation_config.json with its end
    tokens and token rules. Return an empty mapping if it has no tokenizer that can be read.
    """
    try:
        files = source.text_files()
        rules = FolderRules.read(source) if files else FolderRules()
    except TreadleError:
        return {}
    if not files:
        return {}
    settings: dict[str, Any] = {**rules.options, **({"eos_token_id": list(rules.end)} if rules.end else {})}
    files["generation_config.json"] = json.dumps(settings, indent=2).encode()
    if _SETTINGS in files:
        found = json.loads(files[_SETTINGS])
        if isinstance(found, dict) and any(key in found for key in _PATHS):
            kept = {key: value for key, value in found.items() if key not in _PATHS}
            files[_SETTINGS] = json.dumps(kept, indent=2, ensure_ascii=False).encode()
    return files


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
