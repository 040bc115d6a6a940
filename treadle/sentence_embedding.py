"""Sentence embeddings: a sentence as a vector of length one; the dot product of two vectors measures their similarity.

    embedder = SentenceEmbedder.open("minilm")                        # a fetched model, or a folder
    vectors = embedder.embed(["A cat sits.", "A kitten rests."])      # f32[2, D]
    vectors @ vectors.T                                               # cosine similarities

The model's hidden states are pooled over the sentence's tokens, without padding (Reimers & Gurevych 2019, section 3).
The folder's modules.json and 1_Pooling/config.json specify the pooling in the format of sentence-transformers. Without
these files, the vector is the mean, scaled to length one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.compiled import Compiled
from treadle.compiling import compile_model
from treadle.files.shown_names import printable
from treadle.files.strict_json import JsonReader
from treadle.frontends.declarations import UnknownInputError
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import TextTokenizer, TokenBatch
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.ir.transforms.chosen_outputs import UnknownOutputError
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.runtime.language_models import count_token_ids
from treadle.tasks.batching import batches_by_length
from treadle.tasks.fitted_tokenizers import fit_tokenizer, no_tokens
from treadle.tasks.opening import token_positions

Vectors = npt.NDArray[np.float32]

_CONFIG_BYTES = 1 << 20
_NESTING, _VALUES = 16, 10_000
_READ = 4096
"""Number of sentences that are tokenized at a time, to bound the memory."""

_MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}
"""Pooling modes in all versions of sentence-transformers, and the corresponding mode of `Pooling`."""


@dataclass(frozen=True)
class Pooling:
    """The conversion of a sentence's hidden states to one vector.

    mode       "mean" over all tokens except padding, or the "first" token
    normalize  True if vectors are scaled to length one
    max_tokens maximum number of tokens of a sentence; None: the tokenizer's limit
    """

    mode: str = "mean"
    normalize: bool = True
    max_tokens: int | None = None

    def __call__(self, hidden: Vectors, lengths: npt.NDArray[np.int64]) -> Vectors:
        """Return the vectors [B, D] of a batch.

        hidden   the hidden states of all tokens, [B, S, D], or of the first tokens only, [B, D]
        lengths  number of tokens of each row without padding, [B]
        """
        if self.mode == "first":
            pooled = hidden
        else:
            real = np.arange(hidden.shape[1]) < lengths[:, None]
            pooled = np.where(real[:, :, None], hidden, 0).sum(1) / lengths[:, None]
        if self.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled.astype(np.float32, copy=False)


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
        chosen = CompileOptions.of("embed", options, inputs=("lengths",))
        source = chosen.open(model)
        if source.kind in ("gguf", "onnx", "artifact"):
            raise UsageError(
                f"embed reads no {source.place.suffix} files",
                received=printable(source.place.name),
                hint="a folder with config.json, such as the fetched model minilm; or a declaration with weights",
            )
        if source.kind == "graph":
            declared = "a declaration, for which @t.model decorates a function"
            raise UsageError(
                "embed needs a folder with config.json, or a declaration",
                received=f"{printable(source.label)}, a graph",
                hint=Hint(f"{declared}; t.compile(model) takes arrays", declared),
            )
        pooling = read_pooling(source.folder)
        wanted = ["hidden[:, 0]" if pooling.mode == "first" else "hidden"]
        try:
            made = compile_model(source, chosen.but(outputs=wanted))
        except UnknownOutputError:
            made = compile_model(source, chosen)
        except UnknownInputError as error:
            raise _does_not_embed(source.label, error.what) from error
        takes, gives = [p.name for p in made.inputs], [p.name for p in made.outputs]
        if takes != ["tokens", "lengths"] or gives != ["hidden"]:
            ports = f"({', '.join(map(str, made.inputs))}) -> ({', '.join(map(str, made.outputs))})"
            raise _does_not_embed(made.name, ports)
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
            for chosen in batches_by_length(batch.lengths.tolist(), batch_size):
                lengths = batch.lengths[chosen]
                tokens = np.ascontiguousarray(batch.ids[chosen, : int(lengths.max())])
                hidden = np.asarray(self.model(tokens=tokens, lengths=lengths)["hidden"])
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


def _does_not_embed(name: str, received: str) -> UsageError:
    return UsageError(
        f"{printable(name)} does not embed sentences",
        received=received,
        hint="a model with inputs tokens and lengths and output hidden, such as an encoder without a head",
    )


def read_pooling(place: ModelFolder) -> Pooling:
    """Return the pooling that a folder specifies. Raises CheckpointError for an unsupported pooling."""
    if not place.has("modules.json"):
        return Pooling(max_tokens=_max_length(place))
    modules = _read_modules(place)
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0][1]:
        raise CheckpointError(
            "the folder's modules.json describes an unsupported pipeline",
            received=", ".join(map(printable, kinds)) or "no module",
            within=place.show("modules.json"),
            hint="the modules Transformer (in the folder itself), Pooling and, optionally, Normalize",
        )
    path = f"{modules[1][1]}/config.json"
    pooling = place.read_settings(path)
    chosen = _chosen_modes(pooling)
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise CheckpointError(
            "the folder uses an unsupported pooling of tokens",
            received=", ".join(map(printable, chosen)) or "none",
            within=place.show(path),
            hint="one of " + ", ".join(_MODES),
        )
    return Pooling(_MODES[chosen[0]], "Normalize" in kinds, _max_length(place))


def _chosen_modes(pooling: Mapping[str, Any]) -> list[str]:
    """Return the pooling modes that 1_Pooling/config.json selects: by `"pooling_mode": "mean"` or, in older files, by
    `"pooling_mode_mean_tokens": true`.
    """
    named = pooling.get("pooling_mode")
    if named is not None:
        return [str(mode) for mode in (named if isinstance(named, list) else [named])]
    prefix = "pooling_mode_"
    return [key.removeprefix(prefix) for key, on in pooling.items() if key.startswith(prefix) and on is True]


def _read_modules(place: ModelFolder) -> list[tuple[str, str]]:
    """Return the type and the folder of each module in modules.json."""
    shown = place.show("modules.json")
    data = place.read("modules.json", _CONFIG_BYTES)
    reader = JsonReader(data, shown, nesting=_NESTING, values=_VALUES)
    modules = reader.value()
    reader.end()
    if isinstance(modules, list) and all(isinstance(m, Mapping) for m in modules):
        found = [(m.get("type"), m.get("path")) for m in modules]
        if all(isinstance(kind, str) and isinstance(path, str) for kind, path in found):
            return found
    raise CheckpointError("modules.json must list objects with a type and a path", within=shown)


def _max_length(place: ModelFolder) -> int | None:
    name = "sentence_bert_config.json"
    if not place.has(name):
        return None
    length = place.read_settings(name).get("max_seq_length")
    if length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0):
        return length
    raise CheckpointError(
        "max_seq_length must be a positive integer", received=printable(repr(length)), within=place.show(name)
    )
