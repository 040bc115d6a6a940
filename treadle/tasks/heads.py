"""The heads of models that tasks need: the classes of checkpoints and the inputs and outputs of graphs that have them.

HEADS["classify"].is_of(config), HEADS["classify"].is_on(graph)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from treadle.ir.graph import Graph


@dataclass(frozen=True)
class Head:
    """The head that a task needs.

    does   the task as a phrase for error messages: "classify texts"
    ends   suffixes of the names of the Hugging Face classes that have this head
    logits the output `logits` of a graph that has this head, as its axes: ("B", "S", "vocab"), where a number is a
           size; empty: the class of a checkpoint decides
    needs_names  True if config.json must have the names of a declaration's labels; otherwise they are numbers
    fetched  a model with this head that can be fetched; "": none
    """

    does: str
    ends: tuple[str, ...]
    logits: tuple[str, ...] = ()
    needs_names: bool = False
    fetched: str = ""

    @property
    def folders(self) -> str:
        """The folders that have this head, for the hint of an error."""
        first = f"{self.fetched}, after `treadle fetch {self.fetched}`; or " if self.fetched else ""
        return f"{first}a folder of a class whose name ends in {' or '.join(self.ends)}"

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Return True if a config.json names a class that has this head."""
        return any(name.endswith(self.ends) for name in classes_of(config))

    def is_on(self, graph: Graph) -> bool:
        """Return True if a graph maps tokens [B, S], and optionally their lengths and types, to this head's logits."""
        takes = {value.name: value.type for value in graph.main.inputs}
        tokens, found = takes.get("tokens"), graph.main.outputs.get("logits")
        if not self.logits or tokens is None or tokens.rank != 2 or {*takes} - {"tokens", "lengths", "token_types"}:
            return False
        if found is None or found.type.rank != len(self.logits):
            return False
        *rows, classes = found.type.shape
        size, wanted = classes.constant, self.logits[-1]
        return tuple(rows) == tokens.shape[: len(rows)] and size is not None and wanted in (str(size), *_NAMES)


_NAMES = ("labels", "vocab")
"""Names of the last axis of logits that may have any size."""

HEADS: Mapping[str, Head] = MappingProxyType(
    {
        "classify": Head("classify texts", ("ForSequenceClassification",), ("B", "labels")),
        "tag": Head("tag tokens", ("ForTokenClassification",), ("B", "S", "labels"), needs_names=True),
        "answer": Head("answer questions", ("ForQuestionAnswering",), ("B", "S", "2")),
        "fill": Head("fill masks", ("ForMaskedLM", "BertForPreTraining", "AlbertForPreTraining"), ("B", "S", "vocab")),
        "label": Head("label images", ("ForImageClassification", "ForImageClassificationWithTeacher")),
        "match": Head("match images and texts", ("CLIPModel", "SiglipModel")),
        "transcribe": Head("transcribe speech", ("WhisperForConditionalGeneration",), fetched="whisper-tiny"),
        "translate": Head("rewrite texts", ("ForConditionalGeneration", "WithLMHeadModel", "MTModel")),
    }
)
"""The head of each command that needs one; if a class has two, its own comes first. `summarize` needs the head of
`translate`.
"""


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes in a config.json."""
    named = config.get("architectures")
    return tuple(map(str, named)) if isinstance(named, list) else ()


def task_of(config: Mapping[str, Any]) -> str | None:
    """Return the command that runs the task of a config.json's class; None for a class that has none."""
    classes, reads_texts = classes_of(config), "vocab_size" in config
    if "vision_config" in config and any(name.endswith("ForConditionalGeneration") for name in classes):
        return "describe"
    if (task := next((name for name, head in HEADS.items() if head.is_of(config)), None)) is not None:
        return task
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        return "generate"
    return "embed" if reads_texts and any(name.endswith("Model") for name in classes) else None
