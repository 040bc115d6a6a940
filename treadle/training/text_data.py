"""Training data from texts: documents, tokenized and split into blocks, with a training objective.

    data = TextData.open("folder", ["novel.txt"], resolved, objective="next-token", length=128, batch=8)
    for tokens in data.batches.after(0):
        trainer.step(**data.objective.asked(tokens, 0))

If the data does not fit the model, this raises before a model is compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treadle.continuation import need_for_text
from treadle.extras import need_packages
from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.ir.analysis.following import follow
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import i64
from treadle.passes.stages import Recognize, run
from treadle.program.resolved import Resolved
from treadle.program.source import ModelSource
from treadle.tasks.generation_settings import FolderRules
from treadle.training.documents import read_documents
from treadle.training.objectives import MASKED_TOKEN, NEXT_TOKEN, OBJECTIVES, MaskedToken, NextToken, Objective
from treadle.training.texts import BlockBatches, Tokens, blocks_of

LENGTH = 128
"""Default number of tokens per block. A model with a smaller maximum gets blocks of its maximum length."""


@dataclass(frozen=True)
class TextData:
    """Blocks of tokens and a training objective.

    batches   the training batches
    heldout   held-out blocks [N, S], from the end of the texts; N may be 0
    digest    SHA-256 of the texts, in hexadecimal
    """

    objective: Objective
    batches: BlockBatches
    heldout: Tokens
    digest: str = ""

    @property
    def length(self) -> int:
        """Number of tokens of a block."""
        return int(self.heldout.shape[1])

    @property
    def tokens_digest(self) -> str:
        """SHA-256 of the tokens of all blocks, in hexadecimal."""
        found = hashlib.sha256()
        for blocks in (self.batches.blocks, self.heldout):
            found.update(np.ascontiguousarray(blocks, "<i8").data)
        return found.hexdigest()

    @classmethod
    def open(
        cls,
        model: str,
        files: Sequence[str],
        resolved: Resolved,
        *,
        objective: str = NEXT_TOKEN,
        length: int | None = None,
        batch: int = 8,
        holdout: float = 0.0,
        seed: int = 0,
        tokenizer: str | None = None,
        teacher: str | None = None,
    ) -> TextData:
        """Read and tokenize the texts of files, and split them into blocks.

        model      the model whose tokenizer is used; `resolved` is the same model
        length     tokens per block; None: 128, or the model's maximum if that is smaller
        batch      blocks per batch
        holdout    fraction of blocks to hold out; if it is not 0, at least one block
        tokenizer  a model whose tokenizer is used instead, needed if `model` has no folder or no tokenizer
        teacher    a model with the same vocabulary, which must support blocks of this length

        Raises UsageError for data that does not fit, and the errors of reading files and the tokenizer.
        """
        if objective not in OBJECTIVES:
            raise UsageError(f"there is no objective {objective!r}", hint="one of " + ", ".join(OBJECTIVES))
        if not 0 <= holdout < 1:
            raise UsageError(
                "the held-out fraction of blocks must be 0 or more and below 1", received=f"{holdout:g}", hint="0.05"
            )
        graphs = [resolved.graph]
        other = None if tokenizer is None else ModelSource.open(tokenizer)
        taught_by = None if teacher is None else ModelSource.open(teacher)
        if taught_by is not None:
            graphs.append(taught_by.resolve(widen=("bf16", "f16"), deferred=True).graph)
        length = _checked_length(graphs, length)
        _check_model(model, resolved.graph, objective)
        opened = _tokenizer(model, resolved, other)
        if taught_by is not None and taught_by.tokenizer(cut=False).vocabulary() != opened.vocabulary():
            raise UsageError(
                "a teacher must have the same vocabulary as the model that it teaches",
                received=f"the vocabulary of {printable(taught_by.label)} differs",
            )
        asked = _objective(objective, opened, seed)
        documents = read_documents(files)
        end = _end_of_text(other or resolved.source, opened) if objective == NEXT_TOKEN else None
        blocks = blocks_of(opened.ids(documents), length, end=end)
        _check_vocabulary(
            resolved, opened, max(int(blocks.max()), asked.vocab - 1 if isinstance(asked, MaskedToken) else 0)
        )
        apart = min(max(1, round(len(blocks) * holdout)), len(blocks)) if holdout else 0
        kept = len(blocks) - apart
        return cls(asked, BlockBatches(blocks[:kept], batch, seed), blocks[kept:], _digest(documents))


def _digest(documents: Sequence[str]) -> str:
    found = hashlib.sha256()
    for document in documents:
        text = document.encode("utf-8", "surrogatepass")
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()


def _checked_length(graphs: Sequence[Graph], length: int | None) -> int:
    """Return the number of tokens per block. Raises UsageError if the model or its teacher supports fewer."""
    limits = [limit for graph in graphs if (limit := _most_tokens(graph)) is not None]
    most = min(limits, default=None)
    usual = LENGTH if most is None else min(LENGTH, most)
    if length is None:
        return usual
    if length < 2 or (most is not None and length > most):
        taker = "the teacher" if len(graphs) > 1 and most != _most_tokens(graphs[0]) else "the model"
        bound = "" if most is None else f" and at most {most:,}, the maximum of {taker}"
        raise UsageError(f"a block must have 2 tokens or more{bound}", received=f"{length:,}", hint=f"{usual}")
    return length


def _most_tokens(graph: Graph) -> int | None:
    """Return the maximum number of tokens that a model supports, or None if there is no limit."""
    tokens = next((v for v in graph.main.inputs if v.name == "tokens"), None)
    symbol = tokens.type.shape[-1].as_symbol if tokens is not None and tokens.type.rank else None
    return None if symbol is None else graph.symbols[symbol].upper


def _check_model(model: str, graph: Graph, objective: str) -> None:
    """Raise UsageError if the model has inputs other than tokens [B, S], or if the objective needs a causal model and
    the model is not causal.
    """
    takes = {value.name: value.type for value in graph.main.inputs}
    tokens = takes.get("tokens")
    axis = tokens.shape[-1].as_symbol if tokens is not None and tokens.rank == 2 and tokens.dtype is i64 else None
    shown = printable(model)
    if axis is None or len(takes) > 1:
        raise UsageError(
            f"{shown} cannot be trained on texts: it is not a model of tokens alone",
            received=", ".join(f"{name}: {type}" for name, type in takes.items()),
            hint=Hint("t.Trainer, with batches of your own", "in Python: treadle.Trainer, with batches of your own"),
        )
    if objective == NEXT_TOKEN and not follow(run(graph, [Recognize()]).graph, axis).step():
        raise UsageError(
            f"{shown} sees the tokens that it must predict: it is not a causal language model",
            received=f"objective {NEXT_TOKEN}",
            hint=Hint(f"objective={MASKED_TOKEN!r}", f"--objective {MASKED_TOKEN}"),
        )


def _tokenizer(model: str, resolved: Resolved, other: ModelSource | None) -> TextTokenizer:
    """Return the tokenizer of `other`, or, if that is None, of the model. Raises UsageError if the model then has no
    folder.
    """
    need_packages(f"training {printable(model)} on texts", "tokenizers")
    if other is None and resolved.source.path is None:
        raise UsageError(
            f"{printable(model)} has no folder, and so no tokenizer",
            hint=Hint(
                "tokenizer=FOLDER, of a model with the intended vocabulary",
                "--tokenizer FOLDER, of a model with the intended vocabulary",
            ),
        )
    source = other or resolved.source
    need_for_text(source)
    return source.tokenizer(cut=False)


def _objective(name: str, tokenizer: TextTokenizer, seed: int) -> Objective:
    if name == NEXT_TOKEN:
        return NextToken()
    mask = None if tokenizer.mask is None else tokenizer.id_of(tokenizer.mask)
    if mask is None:
        raise CheckpointError(
            "the folder's vocabulary has no mask token",
            received=f"objective {name}",
            hint=Hint(
                f'"mask_token": "[MASK]" in tokenizer_config.json, or objective={NEXT_TOKEN!r}',
                f'"mask_token": "[MASK]" in tokenizer_config.json, or --objective {NEXT_TOKEN}',
            ),
        )
    named = [*tokenizer.special_tokens(), *tokenizer.special_names.values()]
    special = {number for number in map(tokenizer.id_of, named) if number is not None}
    return MaskedToken(mask, len(tokenizer.vocabulary()), tuple(sorted(special)), seed)


def _end_of_text(source: ModelSource, tokenizer: TextTokenizer) -> int | None:
    """Return the id of the end-of-text token that the folder's files name, or None."""
    named = tokenizer.special_names.get("eos_token")
    found = None if named is None else tokenizer.id_of(named)
    return next(iter(FolderRules.read(source).end), None) if found is None else found


def _check_vocabulary(resolved: Resolved, tokenizer: TextTokenizer, largest: int) -> None:
    """Raise UsageError if the tokenizer has token ids that are not in the model's vocabulary."""
    rows = None if resolved.model is None else resolved.model.config.get("vocab")
    if isinstance(rows, int) and largest >= rows:
        raise UsageError(
            f"the tokenizer has tokens that {resolved.name} does not have",
            received=f"token {largest:,}; the model has {rows:,} tokens",
            hint=Hint(f"vocab={len(tokenizer.vocabulary())}", f"--set vocab={len(tokenizer.vocabulary())}"),
        )
