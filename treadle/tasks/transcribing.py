"""Transcribe the speech in a recording with Whisper.

    transcriber = Transcriber.open(Program("whisper-tiny", backend="torch"))
    transcriber.transcribe("talk.wav").text

A recording of more than 30 s is read in pieces. Each piece ends at the quietest moment of its last 5 s, so that words
are rarely split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.program.program import Program
from treadle.runtime.generation import generate
from treadle.runtime.token_rules import TokenRules
from treadle.stepped import SteppedModel, stepped_program
from treadle.tasks.classifying import Progress
from treadle.tasks.generation_settings import GenerationSettings
from treadle.tasks.heads import HEADS
from treadle.tasks.opening import checked_folder
from treadle.tasks.sound import read_sound
from treadle.tasks.spectrogram import HOP, RATE, log_mel

HEAD = HEADS["transcribe"]
_QUIET_SECONDS = 5
_MULTILINGUAL = 51_865
"""The smallest vocabulary size of OpenAI's multilingual models."""
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")


@dataclass(frozen=True)
class Passage:
    """A piece of a recording.

    text        the transcript of the piece
    start, end  in seconds
    tokens      the generated ids, including the end token
    language    the language; None if the model knows only one
    """

    text: str
    start: float
    end: float
    tokens: tuple[int, ...]
    language: str | None


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording, piece by piece."""

    passages: tuple[Passage, ...]

    @property
    def text(self) -> str:
        """The text of all pieces."""
        return "".join(passage.text for passage in self.passages).strip()


@dataclass(frozen=True)
class Transcriber:
    """A speech recognition model.

    languages  token ids of the languages by name; empty if the model knows only one language
    """

    model: SteppedModel
    tokenizer: TextTokenizer
    rules: TokenRules
    context: int
    languages: Mapping[str, int]

    @classmethod
    def open(cls, program: Program) -> Transcriber:
        """Open a model. Raises UsageError if MODEL is not a speech model, CheckpointError for a damaged file, and the
        errors of `compile`.
        """
        source = program.source
        if source.kind == "ctranslate2":
            place = source.folder
            rules = _converted_rules(place)
        else:
            place, config = checked_folder(program, HEAD)
            found = GenerationSettings.read(place, config).rules
            rules = TokenRules(banned=found.banned, banned_first=found.banned_first)
        made = stepped_program(program)
        if made.derived.prologue != ("mel",):
            raise UsageError(f"{made.name} does not transcribe speech", hint="a Whisper folder")
        positions = made.derived.graph.parameters["encoder.positions.weight"].type.shape[0].constant
        tokenizer = source.tokenizer(cut=False)
        if positions is None:
            raise CheckpointError("the model does not state the length of its recordings", within=place.shown)
        vocabulary = made.derived.graph.parameters["decoder.tokens.weight"].type.shape[0].constant or 0
        several = _knows_several(place, vocabulary)
        return cls(made, tokenizer, rules, positions, _languages(tokenizer) if several else {})

    def transcribe(
        self, path: PathLike, *, language: str | None = None, most: int | None = None, progress: Progress | None = None
    ) -> Transcript:
        """Transcribe a WAV file.

        language  a language such as "en"; None: the model detects the language
        most      maximum number of generated tokens per piece

        Raises UsageError if the file is not a sound, or if the model does not know the language.
        """
        if language is not None and language not in self.languages:
            known = ", ".join(self.languages) or "its own language, which need not be passed"
            raise UsageError(f"the model does not know the language {language!r}", hint=known)
        samples = read_sound(path, rate=RATE)
        passages = []
        for start, end in _pieces(samples, 2 * self.context * HOP):
            passages.append(self._passage(samples[start:end], start, end, language, most))
            if progress is not None:
                progress(len(passages))
        return Transcript(tuple(passages))

    def _passage(
        self, samples: npt.NDArray[np.float64], start: int, end: int, language: str | None, most: int | None
    ) -> Passage:
        mel = log_mel(samples, frames=2 * self.context)
        begin, plain, last = (self._special(name) for name in ("startoftranscript", "notimestamps", "endoftext"))
        session = self.model.session(rows=1, memory={"memory": self.context})
        prompt = [begin]
        if self.languages:
            language = language or self._heard(mel, begin)
            prompt += [self.languages[language], self._special("transcribe")]
        prompt.append(plain)
        room = session.capacity - len(prompt)
        if most is not None and most > room:
            raise UsageError(
                f"{self.model.name} has {room:,} positions for the tokens of a piece",
                received=f"{most:,} tokens",
                hint=Hint(f"most={room}", f"--tokens {room}"),
            )
        count = min(room, self.context) if most is None else most
        stop, given = [last], [{"mel": mel}]
        tokens = [k.id for k in generate(session, [prompt], most=count, rules=self.rules, stop=stop, inputs=given)]
        return Passage(self.tokenizer.text(tokens), start / RATE, end / RATE, tuple(tokens), language)

    def _heard(self, mel: npt.NDArray[np.float32], begin: int) -> str:
        """Return the most likely language of a spectrogram. `begin` is the decoder's start token."""
        session = self.model.session(rows=1, memory={"memory": self.context})
        row = session.open(mel=mel)
        logits = session.prefill({row: [begin]})[row]
        return max(self.languages, key=lambda name: float(logits[self.languages[name]]))

    def _special(self, name: str) -> int:
        found = self.tokenizer.id_of(f"<|{name}|>")
        if found is None:
            raise CheckpointError(f"the folder's vocabulary has no token <|{name}|>")
        return found


def _pieces(samples: npt.NDArray[np.float64], longest: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds (start, end) of a recording's pieces. A piece has at most `longest` samples, and ends at the
    quietest tenth of a second near its maximum length.
    """
    start = 0
    while len(samples) - start > longest:
        last = samples[start + longest - min(_QUIET_SECONDS * RATE, longest // 2) : start + longest]
        width = min(RATE // 10, len(last))
        loud = np.convolve(last**2, np.ones(width), mode="valid")
        end = start + longest - len(last) + int(loud.argmin()) + width // 2
        yield start, end
        start = end
    yield start, len(samples)


def _knows_several(place: ModelFolder, vocabulary: int) -> bool:
    """Return True if a model is multilingual. generation_config.json may say so. Otherwise the vocabulary size decides:
    vocabularies of English models also contain the tokens of languages, but are one token shorter.
    """
    name = "generation_config.json"
    if place.has(name):
        said = place.read_settings(name).get("is_multilingual")
        if isinstance(said, bool):
            return said
    return vocabulary >= _MULTILINGUAL


def _languages(tokenizer: TextTokenizer) -> dict[str, int]:
    """Return the token ids of languages by name. These ids are between the id of the start token and the id of the
    translate token.
    """
    first, translate = tokenizer.id_of("<|startoftranscript|>"), tokenizer.id_of("<|translate|>")
    found: dict[str, int] = {}
    for name in tokenizer.special_tokens():
        match = _LANGUAGE.fullmatch(name)
        number = tokenizer.id_of(name)
        if match and first is not None and translate is not None and number is not None and first < number < translate:
            found[match[1]] = number
    return found


def _converted_rules(place: ModelFolder) -> TokenRules:
    """Return rules for the tokens that are forbidden, always or at the beginning, from the config.json next to
    CTranslate2's model.bin.
    """
    said = place.config
    found: dict[str, Any] = {}
    for name, theirs in (("banned", "suppress_ids"), ("banned_first", "suppress_ids_begin")):
        ids = said.get(theirs, [])
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
            raise CheckpointError(f"{theirs} must be a list of ids", within=place.show("config.json"))
        found[name] = tuple(ids)
    return TokenRules(**found)
