"""A folder's settings for text generation: generation_config.json, else config.json, as Hugging Face reads them.

settings = GenerationSettings.read(folder, config) settings.start, settings.end, settings.rules, settings.beams,
settings.most
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.huggingface import ModelFolder
from treadle.ir.errors import CheckpointError
from treadle.runtime.beams import Beams
from treadle.runtime.token_rules import TokenRules

_FILE = "generation_config.json"
_SPECIAL = ("bos_token_id", "decoder_start_token_id", "eos_token_id")
_MOST = 1 << 20
_MOST_BEAMS = 512


@dataclass(frozen=True)
class GenerationSettings:
    """The default settings of text generation.

    start  the token with which a decoder begins; None if the folder has no encoder
    end    ids that end a text
    most   maximum number of generated tokens
    beams  None: greedy
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
        """Read the settings from a folder's files.

        task  the settings of one task in config.json (task_specific_params), which take precedence

        Raises CheckpointError if an option is invalid.
        """
        said: dict[str, Any] = {name: value for name, value in config.items() if value is not None}
        shown = place.show("config.json")
        if place.has(_FILE):  # config.json then only names the special tokens
            shown = place.show(_FILE)
            found = place.read_settings(_FILE)
            said = {name: value for name, value in said.items() if name in _SPECIAL}
            said |= {name: value for name, value in found.items() if value is not None}
        if task and "max_length" in task:
            said.pop("max_new_tokens", None)
        said |= task or {}
        read = _Reader(said, shown)
        count = read.integer("num_beams", 1, least=1, most=_MOST_BEAMS)
        start = read.token("decoder_start_token_id")
        if start is None:
            start = read.token("bos_token_id")
        most = said.get("max_new_tokens")
        if most is None:
            # max_length includes the start token
            most = read.integer("max_length", 0, least=0, most=_MOST) - 1
        early = said.get("early_stopping", False)
        beams = Beams(
            count,
            length_penalty=read.number("length_penalty", 1.0, above=-100),
            early=early if early in (True, False, "never") else False,
        )
        rules = TokenRules(
            repetition_penalty=read.number("repetition_penalty", 1.0, above=0),
            no_repeat_ngram=read.integer("no_repeat_ngram_size", 0, least=0, most=_MOST),
            banned=tuple(dict.fromkeys((*read.single_words("bad_words_ids"), *read.tokens("suppress_tokens")))),
            fewest=max(
                read.integer("min_length", 0, least=0, most=_MOST) - 1,
                read.integer("min_new_tokens", 0, least=0, most=_MOST),
                0,
            ),
            first=read.token("forced_bos_token_id"),
            last=read.token("forced_eos_token_id"),
            banned_first=read.tokens("begin_suppress_tokens"),
        )
        wanted = int(most) if isinstance(most, int) and most > 0 else None
        return cls(start, read.tokens("eos_token_id"), wanted, beams if count > 1 else None, rules)


@dataclass(frozen=True)
class _Reader:
    """Options by name, with the file that contains them."""

    said: Mapping[str, Any]
    shown: str

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

    def single_words(self, name: str) -> tuple[int, ...]:
        """Return forbidden words, each of one token."""
        value = self.said.get(name, [])
        if not isinstance(value, list) or not all(isinstance(word, list) and len(word) == 1 for word in value):
            raise self._wrong(name, "a list of words of one token each")
        return tuple(self._id(name, word[0]) for word in value)

    def _id(self, name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise self._wrong(name, "a token id or a list of token ids")
        return value

    def _wrong(self, name: str, what: str) -> CheckpointError:
        received = printable(repr(self.said[name]), 100)
        return CheckpointError(f"{name} must be {what}", received=received, within=self.shown)
