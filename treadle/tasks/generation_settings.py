"""A folder's settings for text generation, as Hugging Face reads them: from generation_config.json, or else from
config.json.

    settings = GenerationSettings.read(folder, config)
    settings.start, settings.end, settings.rules, settings.beams, settings.most
    asked = FolderRules.read(ModelSource.open(folder))
    asked.rules, asked.end, asked.options, asked.file
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError
from treadle.program.source import ModelSource
from treadle.runtime.beams import Beams
from treadle.runtime.token_rules import TokenRules

_FILE, _CONFIG = "generation_config.json", "config.json"
_SPECIAL = ("bos_token_id", "decoder_start_token_id", "eos_token_id")
_MOST = 1 << 20
_MOST_BEAMS = 512
_RULES = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "forced_eos_token_id",
)


@dataclass(frozen=True)
class FolderRules:
    """The default logits processors and end tokens of a language model's folder.

    rules    the logits processors
    end      ids of the tokens that end a text
    options  the options in the file that set the rules, by name
    file     the name of that file

    The caller chooses sampling, search and length, so `do_sample`, `temperature`, `num_beams` and similar options are
    not read. `forced_bos_token_id` applies only to decoders that begin with a single token, and is not read.
    """

    rules: TokenRules = field(default_factory=TokenRules)
    end: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str = _FILE

    @classmethod
    def read(cls, source: ModelSource) -> FolderRules:
        """Return the rules in a folder's files. For a model in a single file, return only the end tokens. Raises
        CheckpointError if an option is invalid.
        """
        source = source.text_source
        if source.kind == "gguf":
            return cls(end=source.end_tokens)
        place = source.folder
        config = place.config if place.has(_CONFIG) else {}
        read = _Reader.of(place, config)
        rules = replace(read.rules(), first=None)
        asked = [name for name in _RULES if replace(read.without(name).rules(), first=None) != rules]
        options = {name: read.said[name] for name in asked}
        return cls(rules, read.tokens("eos_token_id"), options, read.file)

    def __str__(self) -> str:
        return f"from {self.file}: " + ", ".join(f"{n} {printable(f'{x}', 60)}" for n, x in self.options.items())

    def as_dict(self) -> dict[str, Any] | None:
        """Return the options and their file for `--json`, or None if no option has an effect."""
        return {"file": self.file, "options": dict(self.options)} if self.options else None

    def but(self, **given: Any) -> FolderRules:
        """Return a copy of these rules with the caller's values. A value of None keeps the folder's value. Raises
        UsageError for a value out of range.
        """
        said = {name: value for name, value in given.items() if value is not None}
        left = {name: value for name, value in self.options.items() if name not in said}
        return replace(self, rules=replace(self.rules, **said), options=left)


@dataclass(frozen=True)
class GenerationSettings:
    """The default settings of text generation.

    start  the first token of the decoder; None if the folder has no encoder
    end    ids of the tokens that end a text
    most   maximum number of generated tokens
    beams  settings of the beam search; None: greedy decoding
    rules  logits processors
    """

    start: int | None
    end: tuple[int, ...]
    most: int | None
    beams: Beams | None
    rules: TokenRules

    @classmethod
    def read(
        cls, place: ModelFolder, config: Mapping[str, Any], task: Mapping[str, Any] | None = None
    ) -> GenerationSettings:
        """Return the settings in a folder's files.

        task  the settings of one task in config.json (task_specific_params), which take precedence

        Raises CheckpointError if an option is invalid.
        """
        read = _Reader.of(place, config, task)
        count = read.integer("num_beams", 1, least=1, most=_MOST_BEAMS)
        start = read.token("decoder_start_token_id")
        if start is None:
            start = read.token("bos_token_id")
        most = read.said.get("max_new_tokens")
        if most is None:
            # max_length includes the start token
            most = read.integer("max_length", 0, least=0, most=_MOST) - 1
        early = read.said.get("early_stopping", False)
        beams = Beams(
            count,
            length_penalty=read.number("length_penalty", 1.0, above=-100),
            early=early if early in (True, False, "never") else False,
        )
        wanted = int(most) if isinstance(most, int) and most > 0 else None
        return cls(start, read.tokens("eos_token_id"), wanted, beams if count > 1 else None, read.rules())


@dataclass(frozen=True)
class _Reader:
    """A reader of options: the options by name, the name of the file that contains them, and the file's path for
    errors.
    """

    said: Mapping[str, Any]
    file: str
    shown: str

    @classmethod
    def of(cls, place: ModelFolder, config: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> _Reader:
        """Return a reader of the options of a folder; see `GenerationSettings.read`."""
        said: dict[str, Any] = {name: value for name, value in config.items() if value is not None}
        file = _CONFIG
        if place.has(_FILE):  # then only the special tokens are read from config.json
            file = _FILE
            found = place.read_settings(_FILE)
            said = {name: value for name, value in said.items() if name in _SPECIAL}
            said |= {name: value for name, value in found.items() if value is not None}
        if task and "max_length" in task:
            said.pop("max_new_tokens", None)
        return cls(said | dict(task or {}), file, place.show(file))

    def without(self, option: str) -> _Reader:
        """Return a reader without one of the options."""
        return replace(self, said={name: value for name, value in self.said.items() if name != option})

    def rules(self) -> TokenRules:
        """Return the logits processors."""
        end = self.tokens("eos_token_id")
        words = [word for word in self.words("bad_words_ids") if word not in {(token,) for token in end}]
        single = [token for word in words if len(word) == 1 for token in word]
        return TokenRules(
            repetition_penalty=self.number("repetition_penalty", 1.0, above=0),
            no_repeat_ngram=self.integer("no_repeat_ngram_size", 0, least=0, most=_MOST),
            banned=tuple(dict.fromkeys((*single, *self.tokens("suppress_tokens")))),
            banned_runs=tuple(word for word in words if len(word) > 1),
            fewest=self.integer("min_new_tokens", 0, least=0, most=_MOST),
            shortest=self.integer("min_length", 0, least=0, most=_MOST),
            first=self.token("forced_bos_token_id"),
            last=self.token("forced_eos_token_id"),
            banned_first=self.tokens("begin_suppress_tokens"),
        )

    def integer(self, name: str, default: int, *, least: int, most: int) -> int:
        value = self.said.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float, *, above: float) -> float:
        value = self.said.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < 100:
            raise self._wrong(name, f"a number above {above} and below 100")
        return float(value)

    def token(self, name: str) -> int | None:
        value = self.said.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None:
            return None
        return self._id(name, value)

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.said.get(name)
        if value is None:
            return ()
        return tuple(self._id(name, each) for each in (value if isinstance(value, list) else [value]))

    def words(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Return an option that lists forbidden words. Each word is one or more token ids."""
        value = self.said.get(name, [])
        if not isinstance(value, list) or not all(isinstance(word, list) and word for word in value):
            raise self._wrong(name, "a list of words, each a list of ids")
        return tuple(tuple(self._id(name, token) for token in word) for word in value)

    def _id(self, name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise self._wrong(name, "a token id or a list of token ids")
        return value

    def _wrong(self, name: str, what: str) -> CheckpointError:
        received = printable(repr(self.said[name]), 100)
        return CheckpointError(f"{name} must be {what}", received=received, within=self.shown)
