"""Sentence embeddings: a sentence as a vector of length one; the dot product of two vectors measures their similarity.

    embedder = SentenceEmbedder.open("minilm")                        # a fetched model, or a folder
    vectors = embedder.embed(["A cat sits.", "A kitten rests."])      # f32[2, D]
    vectors @ vectors.T                                               # cosine similarities

The model's hidden states are pooled over the sentence's tokens, without padding (Reimers & Gurevych 2019, section 3).
The folder's modules.json and 1_Pooling/config.json specify the pooling in the format of sentence-transformers. Without
these files, the vector is the mean, scaled to length one. An artifact contains these files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.artifacts.tasks import embeds_text
from treadle.compiled import Compiled
from treadle.compiling import compile_program
from treadle.files.shown_names import printable
from treadle.frontends.declarations import UnknownInputError
from treadle.frontends.text import TextTokenizer, TokenBatch
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.program.forms.artifact_form import ArtifactForm
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel, ModelSource
from treadle.runtime.language_models import count_token_ids
from treadle.tasks.batching import batches_by_length
from treadle.tasks.fitted_tokenizers import fit_tokenizer, no_tokens
from treadle.tasks.opening import token_positions, trained_in_python
from treadle.tasks.pooling import Pooling, Vectors, read_pooling

_READ = 4096
"""Number of sentences that are tokenized at a time, to bound the memory."""


class NotEmbeddingError(UsageError):
    """The error for a model that embeds no sentences, whatever its files are."""


@dataclass(frozen=True)
class Embedded:
    """Sentence vectors.

    vectors  f32[N, D]
    tokens   number of tokens of each sentence after truncation, including special tokens
    cut      indices of the sentences that were truncated
    """

    vectors: Vectors
    tokens: tuple[int, ...]
    cut: tuple[int, ...]


@dataclass(frozen=True)
class SentenceEmbedder:
    """A model that embeds sentences. Created by `open`."""

    model: Compiled
    tokenizer: TextTokenizer
    pooling: Pooling

    @classmethod
    def open(cls, model: AnyModel, **options: Any) -> SentenceEmbedder:
        """Compile a folder's model, or a fetched model, together with its tokenizer and its pooling.

        Raises CheckpointError if a file is missing or damaged, or specifies an unsupported pooling; UsageError if the
        model has no input for token ids or returns no hidden states; and the errors of `compile`.
        """
        chosen = CompileOptions.of("embed", options)
        source = chosen.open(model)
        if source.kind in ("gguf", "onnx"):
            raise NotEmbeddingError(
                f"embed reads no {source.place.suffix} files",
                received=printable(source.place.name),
                hint="a folder with config.json, such as the fetched model minilm; or a declaration with weights",
            )
        program = Program(source, chosen)
        inputs, graph = _with_lengths(program)
        if not source.has_weights:
            error = source.without_weights()
            is_trained = source.kind != "declaration" or "logits" in graph.main.outputs
            raise error if is_trained else trained_in_python(error)
        pooling = Pooling() if source.path is None else read_pooling(source.folder)
        made = compile_program(program, inputs, ["hidden[:, 0]" if pooling.mode == "first" else "hidden"])
        context = token_positions(made)
        tokenizer = source.tokenizer(max_tokens=pooling.max_tokens, context=context)
        return cls(made, fit_tokenizer(tokenizer, source, made.graph.main), pooling)

    @property
    def width(self) -> int | None:
        """Number of elements of a vector."""
        (hidden,) = (p for p in self.model.outputs if p.name == "hidden")
        return hidden.type.shape[-1].constant

    def embed(self, sentences: Sequence[str], *, batch_size: int = 32) -> Vectors:
        """Return vectors f32[len(sentences), D] in the order of the sentences. Raises UsageError for an empty list, and
        for a sentence without tokens.
        """
        return self.embed_reporting(sentences, batch_size=batch_size).vectors

    def embed_reporting(
        self, sentences: Sequence[str | Sequence[int]], *, batch_size: int = 32, truncate: bool = True
    ) -> Embedded:
        """Embed sentences. Return the vectors, the number of tokens of each sentence, and the indices of truncated
        ones.

        sentences  texts; or lists of token ids, to which no special tokens are added
        truncate   False: raise UsageError for a sentence that is too long

        Raises UsageError as `embed` does, and for a token id that is not in the vocabulary.
        """
        if not sentences:
            raise UsageError("there are no sentences to embed")
        counts, cut = [0] * len(sentences), []
        takes = [port.name for port in self.model.inputs]
        vectors = np.zeros((len(sentences), self.width or 0), np.float32)
        by_letters = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
        for at in range(0, len(sentences), _READ):
            read = by_letters[at : at + _READ]
            batch = self._tokenized([sentences[i] for i in read])
            if empty := [i for i, length in zip(read, batch.lengths, strict=True) if not length]:
                raise no_tokens(min(empty), len(sentences))
            if not truncate and batch.cut.any():
                raise UsageError(
                    f"a text has more than {self.tokenizer.max_tokens} tokens, the most that the model takes",
                    received=f"text number {min(i for i, was_cut in zip(read, batch.cut, strict=True) if was_cut)}",
                    hint="split it into shorter texts",
                )
            for chosen in batches_by_length(batch.lengths.tolist(), batch_size if "lengths" in takes else 1):
                lengths = batch.lengths[chosen]
                given = {"tokens": np.ascontiguousarray(batch.ids[chosen, : int(lengths.max())]), "lengths": lengths}
                hidden = np.asarray(self.model(**{name: given[name] for name in takes})["hidden"])
                vectors[[read[row] for row in chosen]] = self.pooling(hidden, lengths)
            for i, length, was_cut in zip(read, batch.lengths, batch.cut, strict=True):
                counts[i] = int(length)
                cut += [i] if was_cut else []
        return Embedded(vectors, tuple(counts), tuple(sorted(cut)))

    def _tokenized(self, sentences: Sequence[str | Sequence[int]]) -> TokenBatch:
        """Return sentences as one padded array. Raises UsageError for a token id that is not in the vocabulary."""
        if texts := [each for each in sentences if isinstance(each, str)]:
            return self.tokenizer.batch(texts)
        all_ids = [list(each) for each in sentences if not isinstance(each, str)]
        count, most = count_token_ids(self.model.graph.main, "tokens") or self.tokenizer.size, self.tokenizer.max_tokens
        for token in (token for ids in all_ids for token in ids):
            if not 0 <= token < count:
                raise UsageError(f"token {token} is not in the vocabulary", hint=f"ids from 0 to {count - 1}")
        rows = [ids[:most] for ids in all_ids]
        lengths = np.array([len(ids) for ids in rows], np.int64)
        padded = np.zeros((len(rows), max(1, int(lengths.max()))), np.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        return TokenBatch(padded, lengths, np.array([len(ids) for ids in all_ids]) > lengths)


def _with_lengths(program: Program) -> tuple[tuple[str, ...], Graph]:
    """Return the optional input `lengths`, if the model has it, and the graph with it. Raises NotEmbeddingError for a
    model that does not embed.
    """
    inputs: tuple[str, ...] = ()
    if isinstance(program.source.form, ArtifactForm):
        graph = program.source.form.content.optimized.graph
    else:
        if program.source.kind != "graph":
            inputs = ("lengths",)
        try:
            graph = program.but(inputs=inputs).declared(deferred=True).graph
        except UnknownInputError:
            inputs = ()
            graph = program.declared(deferred=True).graph
    _check_embeds(graph, program.source)
    return inputs, graph


def _check_embeds(graph: Graph, source: ModelSource) -> None:
    """Raise NotEmbeddingError if a model has other inputs and outputs than a model that embeds."""
    if embeds_text(graph):
        return
    main = graph.main
    takes = ", ".join(f"{value.name}: {value.type}" for value in main.inputs)
    gives = ", ".join(f"{name}: {value.type}" for name, value in main.outputs.items())
    raise NotEmbeddingError(
        f"{printable(source.label)} does not embed sentences",
        received=f"({takes}) -> ({gives})",
        hint="a model with inputs tokens [B, S] and, optionally, lengths [B], and output hidden [B, S, dim], such as "
        "an encoder without a head",
    )
