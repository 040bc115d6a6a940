"""The tasks of an artifact, and the files that it stores for them: the tokenizer of a model for text, the pooling of an
embedding model, and the labels and settings of a model with a head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from treadle.frontends.model_folder import CONFIG, MemoryFolder, ModelFolder
from treadle.frontends.vocabularies.folder_vocabulary import FILE, FILE_BYTES, SETTINGS
from treadle.ir.analysis.following import follow
from treadle.ir.errors import CheckpointError, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.types import i64
from treadle.passes.stepping.derivation import for_step, may_be_empty
from treadle.program.source import ModelSource
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.heads import HEADS, classes_of
from treadle.tasks.pooling import read_pooling_files

_GENERATION = "generation_config.json"
_HEAD_FILES = (CONFIG, _GENERATION, "preprocessor_config.json", "processor_config.json")
"""The files with the settings of a head, without those of the tokenizer."""
_WITHOUT_TOKENIZER = ("label",)
"""The tasks that need no tokenizer."""
_PATHS = ("name_or_path", "_name_or_path")
"""Keys whose value may be a path of the machine on which a tokenizer or a checkpoint was saved."""


def stored_files(source: ModelSource, graph: Graph) -> dict[str, bytes]:
    """Return the files of a model's tokenizer, chat template and pooling by name, and a generation_config.json with its
    end tokens and token rules; for a model with a head, config.json and the settings for images or for generation.
    Return no tokenizer if it cannot be read, and no files for a model that has no task.

    graph  the model's optimized graph
    """
    folder = source.folder if source.path is not None and source.kind not in ("gguf", "onnx") else None
    tasks = _tasks(graph, {} if folder is None else _config_of(folder))
    if not tasks:
        return {}
    has_head = any(task in HEADS for task in tasks)
    files: dict[str, bytes] = {}
    if folder is not None:
        files |= read_pooling_files(folder)
        names = filter(folder.has, _HEAD_FILES if has_head else ())
        files |= {name: _without_paths(folder.read(name, FILE_BYTES)) for name in names}
    try:
        if not source.has_tokenizer:
            return files
        texts, rules = source.text_files(), FolderRules.read(source)
    except TreadleError:
        return files
    settings: dict[str, Any] = {**rules.options, **({"eos_token_id": list(rules.end)} if rules.end else {})}
    if settings and not has_head:
        texts[_GENERATION] = json.dumps(settings, indent=2).encode()
    if SETTINGS in texts:
        texts[SETTINGS] = _without_paths(texts[SETTINGS])
    return {**texts, **files}


def _config_of(folder: ModelFolder) -> Mapping[str, Any]:
    """Return config.json, which names a head's class or its labels; empty if it is missing or damaged."""
    try:
        return folder.config if folder.has(CONFIG) else {}
    except CheckpointError:
        return {}


def _without_paths(data: bytes) -> bytes:
    """Return a JSON object without the keys that may hold a path; data that is no object is returned as it is."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(found, dict) or not any(key in found for key in _PATHS):
        return data
    return json.dumps({key: value for key, value in found.items() if key not in _PATHS}, indent=2).encode()


def tasks_of(graph: Graph, files: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return the commands that take an artifact as MODEL, by its graph and the files that it stores."""
    tasks = _tasks(graph, _config_of(MemoryFolder.of(files, "the artifact")))
    return tasks if FILE in files else tuple(task for task in tasks if task in _WITHOUT_TOKENIZER)


def takes_text(graph: Graph) -> bool:
    """Return True if a model continues or embeds text, or has a head for texts."""
    return continues_text(graph) or embeds_text(graph) or any(head.is_on(graph) for head in HEADS.values())


def _tasks(graph: Graph, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the commands of a model's tasks. The class in config.json determines the head, or else the outputs. A
    causal model that labels tokens has the same outputs as one that continues text, unless labels have names.
    """
    if is_named := bool(classes_of(config)):
        heads = [task for task, head in HEADS.items() if head.is_of(config)][:1]
        heads = [task for task in heads if not HEADS[task].logits or HEADS[task].is_on(graph)]
    else:
        is_named = "id2label" in config
        heads = [task for task, head in HEADS.items() if head.is_on(graph) and (is_named or not head.needs_names)][:1]
    continues = continues_text(graph) and not (is_named and any(HEADS[task].logits for task in heads))
    heads += ["summarize"] * (heads == ["translate"])
    return (*["generate", "chat"] * continues, *["embed"] * embeds_text(graph), *(() if continues else heads))


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
