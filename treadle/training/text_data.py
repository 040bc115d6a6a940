"""Training data from texts: documents, tokenized and split into blocks, with a training objective.

    data = TextData.open(["novel.txt"], resolved, objective="next-token", length=128, batch=8)
    for tokens in data.batches.after(0):
        trainer.step(**data.objective.asked(tokens, 0))

If the data does not fit the model, this raises before a model is compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from treadle.continuation import need_for_text
from treadle.extras import need_packages
from treadle.files.shown_names import printable
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.trained_vocabularies import USUAL_VOCABULARY, least_vocabulary, train_tokenizer
from treadle.ir.errors import FrontendError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import i64
from treadle.passes.stages import Recognize, run
from treadle.passes.stepping.table_rows import context_of
from treadle.program.forms.artifact_form import ArtifactForm
from treadle.program.further_models import open_further
from treadle.program.given_texts import read_documents
from treadle.program.source import ModelSource, Resolved
from treadle.program.trained_folders import family_of_declaration
from treadle.runtime.language_models import count_token_ids
from treadle.tasks.causal_models import causality_of, fixed_length, logits_of
from treadle.tasks.fitted_tokenizers import fit_tokenizer
from treadle.tasks.generation_settings import FolderRules
from treadle.training.objectives import MASKED_TOKEN, NEXT_TOKEN, OBJECTIVES, MaskedToken, NextToken, Objective
from treadle.training.texts import BlockBatches, Tokens, blocks_of

_IN_PYTHON = Hint(
    "t.Trainer, with batches and targets of your own: docs/training.md",
    "in Python, t.Trainer with batches and targets of your own: docs/training.md",
)
_BY_MASK = Hint(
    "mask=t.causal of t.attention, which shows it; or t.Trainer, with batches and targets of your own",
    "mask=t.causal of t.attention, which shows it; or in Python, t.Trainer, with batches and targets of your own",
)
_MASKED = Hint(f"objective={MASKED_TOKEN!r}", f"--objective {MASKED_TOKEN}")
_MASKED_HEAD = Hint(
    f'head="masked_lm" and objective={MASKED_TOKEN!r}', f"--set head=masked_lm --objective {MASKED_TOKEN}"
)
LENGTH = 128
"""Default number of tokens per block. A model with a smaller maximum gets blocks of its maximum length."""


_CAUSAL_MASKS = (
    "the model is causal: it predicts a masked token from the tokens before it alone; the objective of such a model is "
    f"{NEXT_TOKEN}"
)


@dataclass(frozen=True)
class TextData:
    """Blocks of tokens and a training objective.

    batches   the training batches
    heldout   held-out blocks [N, S], from the end of the texts; N may be 0
    digest    SHA-256 of the texts, in hexadecimal
    texts     the tokenizer, for the folder of the trained model; None: that of a checkpoint's own folder
    note      a remark on the objective for this model, or None
    """

    objective: Objective
    batches: BlockBatches
    heldout: Tokens
    digest: str = ""
    texts: TextFiles | None = None
    note: str | None = None

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
        files: Sequence[str],
        resolved: Resolved,
        *,
        objective: str = NEXT_TOKEN,
        length: int | None = None,
        batch: int = 8,
        holdout: float = 0.0,
        seed: int = 0,
        vocab: int | None = None,
        teacher: str | None = None,
        column: str | None = None,
    ) -> TextData:
        """Read and tokenize the texts of files, and split them into blocks.

        resolved   the model; its source has the tokenizer
        length     tokens per block; None: 128, or the model's maximum if that is smaller
        batch      blocks per batch
        holdout    fraction of blocks to hold out; if it is not 0, at least one block
        vocab      train a new tokenizer of up to as many tokens from the texts
        teacher    a model with the same vocabulary, which must support blocks of this length
        column     the column of tables with the texts, as in `treadle.program.text_files.read_column`

        Raises UsageError for data that does not fit, and the errors of reading files and the tokenizer.
        """
        if objective not in OBJECTIVES:
            raise UsageError(f"there is no objective {objective!r}", hint="one of " + ", ".join(OBJECTIVES))
        if not 0 <= holdout < 1:
            raise UsageError(
                "the held-out fraction of blocks must be 0 or more and below 1", received=f"{holdout:g}", hint="0.05"
            )
        graphs = [resolved.graph]
        source = resolved.source
        taught_by = None if teacher is None else open_further(teacher, "teacher")
        if taught_by is not None:
            if isinstance(taught_by.form, ArtifactForm):
                graphs.append(taught_by.form.content.optimized.source)
            else:
                graphs.append(taught_by.resolve(widen=("bf16", "f16"), deferred=True).graph)
        sources = [source, *([] if taught_by is None else [taught_by])]
        length = _checked_length(graphs, sources, length)
        _check_model(resolved, objective)
        documents: Sequence[str] = ()
        if vocab is None:
            opened = _tokenizer(resolved, objective)
        else:
            _refuse_vocab(source)
            documents = read_documents(files, column)
            opened = _trained_tokenizer(documents, vocab, resolved, objective)
        opened = _fitting(opened, resolved, None if vocab is None else _new_vocabulary(resolved, objective))
        if taught_by is not None and taught_by.tokenizer(cut=False).vocabulary() != opened.vocabulary():
            raise UsageError(
                "a teacher must have the same vocabulary as the model that it teaches",
                received=f"the vocabulary of {printable(taught_by.label)} differs",
            )
        asked = _objective(objective, opened, seed, resolved)
        documents = documents or read_documents(files, column)
        end = _end_of_text(None if vocab is not None else source, opened) if objective == NEXT_TOKEN else None
        blocks = blocks_of(opened.ids(documents), length, end=end)
        apart = min(max(1, round(len(blocks) * holdout)), len(blocks)) if holdout else 0
        kept = len(blocks) - apart
        batches = BlockBatches(blocks[:kept], batch, seed)
        texts = _text_files(source, opened, end, vocab)
        if texts is not None and objective == MASKED_TOKEN:
            texts = replace(texts, mask=opened.mask)
        note = _CAUSAL_MASKS if objective == MASKED_TOKEN and causality_of(resolved) else None
        return cls(asked, batches, blocks[kept:], _digest(documents), texts, note)


@dataclass(frozen=True)
class TextFiles:
    """The tokenizer of a trained model, as files.

    files  contents by name: tokenizer.json, tokenizer_config.json, chat_template.jinja, ...
    end    ids that end a text
    mask   the mask token of a model that predicts masked tokens; None for other models
    """

    files: Mapping[str, bytes]
    end: tuple[int, ...] = ()
    mask: str | None = None


def _text_files(source: ModelSource, tokenizer: TextTokenizer, end: int | None, vocab: int | None) -> TextFiles | None:
    """Return the tokenizer's files, for a checkpoint only if they are not in its own folder."""
    if source.kind != "declaration" and source.text_source is source:
        return None
    if vocab is not None:
        return TextFiles(tokenizer.text_files(), () if end is None else (end,))
    ends = FolderRules.read(source).end
    return TextFiles(source.text_files(), ends if end is None or end in ends else (end, *ends))


def _digest(documents: Sequence[str]) -> str:
    found = hashlib.sha256()
    for document in documents:
        text = document.encode("utf-8", "surrogatepass")
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()


def _checked_length(graphs: Sequence[Graph], sources: Sequence[ModelSource], length: int | None) -> int:
    """Return the number of tokens per block. Raises UsageError if the model or its teacher supports fewer."""
    found = [(_most_tokens(graph), source.positions) for graph, source in zip(graphs, sources, strict=True)]
    own, *others = [min([n for n in limits if n is not None], default=None) for limits in found]
    most = min([n for n in (own, *others) if n is not None], default=None)
    usual = LENGTH if most is None else min(LENGTH, most)
    if length is None:
        return usual
    if length < 2 or (most is not None and length > most):
        taker = "the teacher" if most != own else "the model"
        bound = "" if most is None else f" and at most {most:,}, the maximum of {taker}"
        hint = usual if length < 2 or most is None else most
        raise UsageError(
            f"a block must have 2 tokens or more{bound}",
            received=f"{length:,}",
            hint=Hint(f"length={hint}", f"--length {hint}"),
        )
    return length


def _most_tokens(graph: Graph) -> int | None:
    """Return the maximum number of tokens that a model supports, or None if there is no limit."""
    tokens = next((v for v in graph.main.inputs if v.name == "tokens"), None)
    symbol = tokens.type.shape[-1].as_symbol if tokens is not None and tokens.type.rank else None
    if symbol is None or graph.symbols[symbol].upper is not None:
        return None if symbol is None else graph.symbols[symbol].upper
    return context_of(run(graph, [Recognize()]).graph, symbol)  # an imported model has only tables of positions


def _check_model(resolved: Resolved, objective: str) -> None:
    """Raise UsageError if the model has inputs other than tokens [B, S], if it has no logits [B, S, vocab], or if the
    objective needs a causal model and the model is not causal.
    """
    graph = resolved.graph
    takes = {value.name: value.type for value in graph.main.inputs}
    tokens = takes.get("tokens")
    axis = tokens.shape[-1].as_symbol if tokens is not None and tokens.rank == 2 and tokens.dtype is i64 else None
    shown = printable(resolved.source.label)
    if tokens is None or axis is None or len(takes) > 1:
        fixed = None if tokens is None else fixed_length(graph.main.inputs)
        raise UsageError(
            f"{shown} cannot be trained on texts: "
            + ("it is not a model of tokens alone" if fixed is None else "the length of its inputs is fixed"),
            received=", ".join(f"{name}: {type}" for name, type in takes.items()),
            hint=fixed or _IN_PYTHON,
        )
    outputs = {name: value.type for name, value in graph.main.outputs.items()}
    scored = logits_of(graph)
    if scored not in outputs or scored == "hidden" or outputs[scored].shape[:-1] != tokens.shape:
        raise UsageError(
            f"{shown} cannot be trained on texts: it has no logits for each token",
            received=", ".join(f"{name}: {type}" for name, type in outputs.items()),
            hint=_MASKED_HEAD if _has_masked_head(resolved) else _IN_PYTHON,
        )
    classes, count = outputs[scored].shape[-1].constant, count_token_ids(graph.main, "tokens")
    if classes is not None and count is not None and classes < count:
        raise UsageError(
            f"{shown} cannot be trained on texts: its logits are not of all tokens",
            received=f"{classes:,} classes, {count:,} tokens",
            hint=_IN_PYTHON,
        )
    causality = causality_of(resolved) if objective == NEXT_TOKEN else True
    if not causality:
        what, hint = "sees the tokens that it must predict: it is not a causal language model", _MASKED
        if causality is None:
            what, hint = "may see the tokens that it must predict: no op shows that it is causal", _BY_MASK
        raise UsageError(f"{shown} {what}", received=f"objective {NEXT_TOKEN}", hint=hint)


def _has_masked_head(resolved: Resolved) -> bool:
    """Return True for a family of the zoo, without weights, that has a head for masked tokens."""
    model = resolved.model
    if model is None or resolved.source.path is not None or family_of_declaration(model) is None:
        return False
    try:
        return "logits" in model.configure(head="masked_lm").graph().main.outputs
    except FrontendError:
        return False


def _new_vocabulary(resolved: Resolved, objective: str) -> Hint | None:
    """Return the options for a new vocabulary that fits the model; None if the model has too few token ids, and no
    option for their number.
    """
    count, usual = count_token_ids(resolved.graph.main, "tokens"), USUAL_VOCABULARY
    if count is None or count >= least_vocabulary(mask=objective == MASKED_TOKEN):
        size = min(usual, count or usual)
        return Hint(f"vocab={size}", f"--vocab {size}")
    if resolved.model is None or "vocab" not in resolved.model.defaults:
        return None
    return Hint(f"vocab={usual}, and vocab={usual} of the model", f"--vocab {usual} --set vocab={usual}")


def _tokenizer(resolved: Resolved, objective: str) -> TextTokenizer:
    """Return the tokenizer of a model, or of the other model whose tokenizer it uses. Raises UsageError if that model
    has no folder.
    """
    source, new = resolved.source, _new_vocabulary(resolved, objective)
    need_packages(f"training {printable(source.label)} on texts", "tokenizers")
    if source.text_source.path is None:
        raise UsageError(
            f"{printable(source.label)} has no folder, and so no tokenizer",
            hint=Hint(
                "tokenizer=FOLDER, of a model with the intended vocabulary"
                + ("" if new is None else f"; or {new}, which trains a new one"),
                "--tokenizer FOLDER, of a model with the intended vocabulary"
                + ("" if new is None else f"; or {new.command}, which trains a new one"),
            ),
        )
    need_for_text(source.text_source)
    return source.tokenizer(cut=False)


def _refuse_vocab(source: ModelSource) -> None:
    """Raise UsageError for a new vocabulary in place of one that is chosen or that weights were trained with."""
    need_packages(f"training {printable(source.label)} on texts", "tokenizers")
    if source.text_source is not source or source.path is not None:
        has = "weights" if source.text_source is source else f"the tokenizer of {source.text_source}"
        raise UsageError(
            "a new vocabulary is trained for a declaration without weights and without another tokenizer",
            received=f"{printable(source.label)} with {printable(has)}",
            hint="leave out one of them",
        )


def _other_way(resolved: Resolved) -> str:
    """Return a hint for a masked-token objective and a vocabulary without a mask token."""
    source = resolved.source
    if source.kind == "declaration" and source.path is None:
        if (new := _new_vocabulary(resolved, MASKED_TOKEN)) is not None:
            return Hint(
                f"{new} in place of tokenizer=, which trains a vocabulary with a mask token",
                f"{new.command} in place of --tokenizer, which trains a vocabulary with a mask token",
            )
    elif causality_of(resolved):
        return Hint(f"objective={NEXT_TOKEN!r}", f"--objective {NEXT_TOKEN}")
    return Hint("tokenizer=FOLDER, with a mask token", "--tokenizer FOLDER, with a mask token")


def _objective(name: str, tokenizer: TextTokenizer, seed: int, resolved: Resolved) -> Objective:
    if name == NEXT_TOKEN:
        return NextToken()
    mask = tokenizer.id_of(tokenizer.need_mask(lambda: _other_way(resolved)))
    assert mask is not None
    named = [*tokenizer.special_tokens(), *tokenizer.special_names.values()]
    special = {number for number in map(tokenizer.id_of, named) if number is not None}
    return MaskedToken(mask, tokenizer.size, tuple(sorted(special)), seed)


def _end_of_text(source: ModelSource | None, tokenizer: TextTokenizer) -> int | None:
    """Return the id of the end-of-text token that the tokenizer or the folder's files name, or None."""
    named = tokenizer.special_names.get("eos_token")
    found = None if named is None else tokenizer.id_of(named)
    return next(iter(FolderRules.read(source).end), None) if found is None and source is not None else found


def _trained_tokenizer(documents: Sequence[str], vocab: int, resolved: Resolved, objective: str) -> TextTokenizer:
    """Train a tokenizer. If `vocab` is too small, the hint is a size that fits the model."""
    try:
        return train_tokenizer(documents, vocab, mask=objective == MASKED_TOKEN)
    except UsageError as error:
        error.hint = _new_vocabulary(resolved, objective) or "a model with more token ids"
        raise


def _fitting(tokenizer: TextTokenizer, resolved: Resolved, new: Hint | None) -> TextTokenizer:
    """Return the tokenizer for the model that is trained. Raises UsageError if the model lacks some of its tokens.

    new  the hint for a new vocabulary that fits the model; None if the tokenizer is another model's
    """
    count, model, source = count_token_ids(resolved.graph.main, "tokens"), resolved.model, resolved.source
    if count is not None and model is not None and source.path is None and "vocab" in model.defaults:
        size = len(tokenizer.vocabulary())
        new = Hint(f"vocab={size}", f"--set vocab={size}")
    if count is None or new is None:
        return fit_tokenizer(tokenizer, source, resolved.graph.main)
    return tokenizer.for_model(count, resolved.name, hint=new)
