"""Continuing text: a language model with its tokenizer, from a folder, a GGUF file or a fetched model.

writer = TextWriter.open("smollm2", backend="torch")
for piece in writer.continued(["The capital of France is"], most=8):
    print(piece.text, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.files.contained_files import read_regular
from treadle.files.strict_json import read_json_object
from treadle.frontends.ctranslate2_file import find_ctranslate2
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.gguf_tokenizer import gguf_chat_template, gguf_end_tokens, gguf_text_tokenizer
from treadle.frontends.huggingface import ModelFolder, open_checkpoint
from treadle.frontends.text import TextTokenizer, folder_chat_template
from treadle.ir.errors import CheckpointError, UsageError
from treadle.ir.target import Target
from treadle.models.registry import family_of, read_gguf
from treadle.resolving import GGUF_SUFFIX, find_folder
from treadle.runtime.generation import Ending, Token, generate
from treadle.runtime.sampling import Sampling
from treadle.stepped import SteppedModel, open_stepped

_CONFIG_BYTES = 4 << 20
MOST_ROWS = 8
"""Texts that are continued at a time; more wait for one to end."""


@dataclass(frozen=True)
class Piece:
    """A part of one row's continuation, as soon as it is known.

    row     the prompt's number
    text    what is new of the text: none where a character's bytes are not complete
    id      the token
    ending  why the row ends with it: "end", "context" or "count"; None where it goes on
    """

    row: int
    text: str
    id: int
    ending: Ending | None

    @property
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.ending is not None


@dataclass(frozen=True)
class TextWriter:
    """A causal language model, its tokenizer, the ids that end a text, and its chat template if it has one."""

    model: SteppedModel
    tokenizer: TextTokenizer
    end: tuple[int, ...]
    template: str | None = None

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        backend: str = "numpy",
        target: str | Target = "cpu",
        limits: Mapping[str, int] | None = None,
        cache: str | None = None,
        **config: Any,
    ) -> TextWriter:
        """Compile a model that has a tokenizer; `cache` is the dtype of its caches, None: the model's own.

        Raises UsageError where MODEL names no weights or no causal language model, and the errors of reading it: what
        no family reads is told before what its tokenizer lacks.
        """
        place = find_folder(model)
        if place.suffix == GGUF_SUFFIX:
            file = GGUFFile.open(place, limits)
            read_gguf(file)
            tokenizer, end, template = gguf_text_tokenizer(file), gguf_end_tokens(file), gguf_chat_template(file)
        else:
            if place.is_dir() and find_ctranslate2(place, limits) is None:
                family_of(open_checkpoint(place, limits).config)
            tokenizer, end = TextTokenizer.open(place, cut=False), _folder_end_tokens(place)
            template = folder_chat_template(place)
        made = open_stepped(model, backend=backend, target=target, limits=limits, cache=cache, **config)
        if made.derived.prologue or len(made.derived.tokens) != 1:
            raise UsageError(
                "text is continued by a model of one input, the tokens [B, S]",
                received=f"{made.name} takes {', '.join((*made.derived.prologue, *made.derived.tokens))}",
                hint="an encoder-decoder model, or one with optional inputs, runs in a session of `compile`",
            )
        return cls(made, tokenizer, end, template)

    def continued(self, prompts: Sequence[str], *, most: int, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Continue each prompt by up to `most` tokens, or to the model's end of text. Raises UsageError at once for an
        empty prompt, or one that leaves no room."""
        batch = self.tokenizer.batch(prompts)
        rows = [[int(i) for i in ids[:length]] for ids, length in zip(batch.ids, batch.lengths, strict=True)]
        longest = max(map(len, rows), default=0)
        context = self.model.derived.context
        capacity = longest + most if context is None else min(longest + most, context)
        session = self.model.session(rows=max(1, min(len(rows), MOST_ROWS)), capacity=max(1, capacity))
        tokens = generate(session, rows, most=most, sampling=sampling, stop=self.end)
        return self._pieces(tokens, len(rows))

    @property
    def marks(self) -> list[str]:
        """The special tokens that the chat template writes around what is said, such as <|im_start|>."""
        return [token for token in self.tokenizer.special_tokens() if self.template and token in self.template]

    def _pieces(self, tokens: Iterator[Token], count: int) -> Iterator[Piece]:
        written: list[list[int]] = [[] for _ in range(count)]
        shown = [""] * count
        for token in tokens:
            written[token.row].append(token.id)
            text = self.tokenizer.text(written[token.row])
            whole = text if token.last else text.rstrip("\N{REPLACEMENT CHARACTER}")
            new, shown[token.row] = whole[len(shown[token.row]) :], whole
            yield Piece(token.row, new, token.id, token.ending)


def _folder_end_tokens(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: a number, or several."""
    place = ModelFolder.find(folder)
    for name in ("generation_config.json", "config.json"):
        if not place.has(name):
            continue
        shown = place.show(name)
        data = read_regular(place.file(name), _CONFIG_BYTES, shown)
        found = read_json_object(data, shown, nesting=32, values=200_000).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError("eos_token_id must be a token's id, or several", received=repr(found), within=shown)
        return tuple(ids)
    return ()
