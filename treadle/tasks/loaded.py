"""A model for tasks: `t.load(MODEL)` returns an object with a method per task.

    model = t.load("folder", backend="tvm")
    model.classify("I like it.").label
    model.answer("Where did Ada live?", "Ada lived in London.").text

A method takes one input or a list of inputs. It returns one result, or a list of results. A task's model is compiled at
the first call of the task's method, and cached. Each task is also a class in a file of `treadle.tasks`, for direct use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar, overload

from treadle.files.contained_files import PathLike
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.ir.wording.other_interfaces import LOADED_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints
from treadle.program.program import Program
from treadle.tasks.heads import task_of
from treadle.tasks.option_hints import with_task_calls

if TYPE_CHECKING:
    from treadle.chatting.conversation import Conversation
    from treadle.continuation import Piece, TextWriter
    from treadle.runtime.beams import Beams
    from treadle.runtime.sampling import Sampling
    from treadle.runtime.token_rules import TokenRules
    from treadle.sentence_embedding import SentenceEmbedder
    from treadle.tasks.answering import Answer, QuestionAnswerer
    from treadle.tasks.classifying import Classified, Text, TextClassifier, Texts
    from treadle.tasks.filling import Filled, MaskFiller
    from treadle.tasks.images.reading import Image
    from treadle.tasks.labelling import ImageLabeller
    from treadle.tasks.matching import ImageMatcher, Matched
    from treadle.tasks.perplexity import Perplexity, PerplexityMeter
    from treadle.tasks.pooling import Vectors
    from treadle.tasks.rewriting import Rewritten, TextRewriter
    from treadle.tasks.scoring import Scored
    from treadle.tasks.tagging import TaggedSpan, TokenTagger
    from treadle.tasks.transcribing import Transcriber


T = TypeVar("T")


class _TaskModel(Generic[T]):
    """A descriptor for a task's model. The model is compiled at the first access, and cached.

    kind  the task's class in `treadle.tasks`, such as "classifying.TextClassifier"
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: LoadedModel, owner: type) -> T:
        module, _, kind = self.kind.rpartition(".")
        opened: T = getattr(import_module(f"treadle.tasks.{module}"), kind).open(model.program)
        model.__dict__[self.name] = opened
        return opened


@with_attribute_hints("a loaded model", LOADED_ATTRIBUTES)
@with_task_calls
@dataclass(frozen=True)
class LoadedModel:
    """The model that MODEL names, and its compile options; see the module's docstring.

    A method raises UsageError, with the name of the model's class, if the model lacks the head; CheckpointError if a
    file that the task needs is missing or damaged; and the errors of `treadle.compile`.
    """

    program: Program

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a pickle: another process opens the model again."""
        return {"program": self.program}

    # -- texts -------------------------------------------------------------------------------------------------

    @overload
    def classify(self, texts: Text) -> Classified: ...
    @overload
    def classify(self, texts: list[Text] | list[str] | list[tuple[str, str]]) -> list[Classified]: ...
    def classify(self, texts: Texts) -> Any:
        """Return the labels of a text or of a pair (text, text), best first. For a list, return the labels of each
        item.
        """
        found = self.classifier.classify(_listed(texts))
        return found if _many(texts) else found[0]

    @overload
    def answer(self, question: str, text: str) -> Answer | None: ...
    @overload
    def answer(self, question: list[tuple[str, str]]) -> list[Answer | None]: ...
    def answer(self, question: str | list[tuple[str, str]], text: str | None = None) -> Any:
        """Return the span of the text that best answers the question, or None if the text has no answer. For a list of
        (question, text) pairs, return the span of each pair.
        """
        if isinstance(question, str) == (text is None):
            raise UsageError(
                "a question needs a text that may contain the answer",
                hint="answer(question, text), or answer([(question, text), ...])",
            )
        asked: Any = question if text is None else [(question, text)]
        found = [spans[0] if spans else None for spans in self.answerer.answer(asked)]
        return found if text is None else found[0]

    @overload
    def tag(self, texts: str, *, grouping: str = "simple") -> list[TaggedSpan]: ...
    @overload
    def tag(self, texts: list[str], *, grouping: str = "simple") -> list[list[TaggedSpan]]: ...
    def tag(self, texts: str | list[str], *, grouping: str = "simple") -> Any:
        """Return the labeled spans of a text, such as names. `grouping` is as in `treadle.tasks.tagging`."""
        found = self.tagger.tag(_listed(texts), grouping=grouping)
        return found if _many(texts) else found[0]

    @overload
    def fill(self, texts: str, *, top: int = 5) -> Filled: ...
    @overload
    def fill(self, texts: list[str], *, top: int = 5) -> list[Filled]: ...
    def fill(self, texts: str | list[str], *, top: int = 5) -> Any:
        """Return the `top` most likely tokens for each mask of a text."""
        found = self.filler.fill(_listed(texts), top=top)
        return found if _many(texts) else found[0]

    def embed(self, sentences: str | list[str]) -> Vectors:
        """Return a sentence's embedding [D], or several sentences' embeddings [N, D]."""
        found = self.embedder.embed(_listed(sentences))
        return found if _many(sentences) else found[0]

    @overload
    def translate(
        self, texts: str, *, source: str | None = None, target: str | None = None, most: int | None = None
    ) -> str: ...
    @overload
    def translate(
        self, texts: list[str], *, source: str | None = None, target: str | None = None, most: int | None = None
    ) -> list[str]: ...
    def translate(
        self, texts: str | list[str], *, source: str | None = None, target: str | None = None, most: int | None = None
    ) -> Any:
        """Translate a text into up to `most` tokens. A model for several languages needs source and target."""
        found = self.rewriter.translate(_listed(texts), source=source, target=target, most=most)
        return _texts(found, texts)

    @overload
    def summarize(self, texts: str, *, most: int | None = None) -> str: ...
    @overload
    def summarize(self, texts: list[str], *, most: int | None = None) -> list[str]: ...
    def summarize(self, texts: str | list[str], *, most: int | None = None) -> Any:
        """Return a summary of a text, of up to `most` tokens."""
        return _texts(self.rewriter.summarize(_listed(texts), most=most), texts)

    @overload
    def generate(
        self,
        prompts: str,
        *,
        most: int = 128,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
    ) -> str: ...
    @overload
    def generate(
        self,
        prompts: list[str],
        *,
        most: int = 128,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]: ...
    def generate(
        self,
        prompts: str | list[str],
        *,
        most: int = 128,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
    ) -> Any:
        """Continue a prompt by up to `most` tokens, to the end-of-text token, or to a string in `stop`.

        rules   token rules; None: the rules in generation_config.json
        """
        listed = _listed(prompts)
        found = [""] * len(listed)
        for piece in self.writer.continued(listed, most=most, sampling=sampling, rules=rules, stop=stop):
            found[piece.row] += piece.text
        return found if _many(prompts) else found[0]

    @with_checked_call({"max_length": "window=512", "stride": "window=512", "max_tokens": "most=64"})
    def perplexity(self, text: str, *, window: int | None = None, most: int | None = None) -> Perplexity:
        """Return the perplexity of the model on the first `most` tokens of a text, in windows of `window` tokens: 512,
        or the model's maximum. A quantized or reduced-precision model is compared with the model in its original
        precision.

        Raises UsageError for the name of a file in place of its text.
        """
        if len(text) < 200 and os.path.isfile(text):
            hint = f"perplexity(Path({text!r}).read_text())"
            raise UsageError("perplexity takes a text, not the name of a file", received=text, hint=hint)
        return self.meter.measure(self.meter.tokens(text, most), window=window)

    def stream(
        self,
        prompt: str,
        *,
        most: int = 128,
        sampling: Sampling | None = None,
        rules: TokenRules | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Continue one prompt. Yield the text piece by piece while it is generated."""
        return self.writer.continued([prompt], most=most, sampling=sampling, rules=rules, stop=stop)

    @overload
    def search(self, prompts: str, *, most: int = 128, beams: Beams | int = 4) -> list[str]: ...
    @overload
    def search(self, prompts: list[str], *, most: int = 128, beams: Beams | int = 4) -> list[list[str]]: ...
    def search(self, prompts: str | list[str], *, most: int = 128, beams: Beams | int = 4) -> Any:
        """Return the best continuations of a prompt that a beam search finds, best first. If `beams` is an integer,
        one continuation is returned.
        """
        from treadle.runtime.beams import Beams

        chosen = Beams(beams) if isinstance(beams, int) else beams
        searched = self.writer.searched(_listed(prompts), most=most, beams=chosen)
        found = [[each.text for each in of_one] for of_one in searched]
        return found if _many(prompts) else found[0]

    def chat(self, *, system: str | None = None) -> Conversation:
        """Start a conversation with a chat model. `chat().say("Hello")` yields the reply piece by piece."""
        from treadle.chatting.conversation import Conversation
        from treadle.continuation import need_for_text

        need_for_text(self.program.source, chat=True)
        return Conversation.open(self.writer, system=system)

    # -- sound -------------------------------------------------------------------------------------------------

    def transcribe(self, recording: PathLike, *, language: str | None = None) -> str:
        """Return the transcript of the speech in a WAV file. If `language` is None, the model detects the language."""
        return self.transcriber.transcribe(recording, language=language).text

    # -- images ------------------------------------------------------------------------------------------------

    @overload
    def label(self, images: Image) -> tuple[Scored, ...]: ...
    @overload
    def label(self, images: list[Image] | list[str]) -> list[tuple[Scored, ...]]: ...
    def label(self, images: Image | list[Image] | list[str]) -> Any:
        """Return the labels of an image with their scores, best first. An image is the path of a file, its bytes, an
        image of Pillow, or an array u8[height, width, 3].
        """
        found = self.labeller.label(_listed(images))
        return found if _many(images) else found[0]

    @overload
    def match(self, images: Image, texts: Sequence[str]) -> Matched: ...
    @overload
    def match(self, images: list[Image] | list[str], texts: Sequence[str]) -> list[Matched]: ...
    def match(self, images: Image | list[Image] | list[str], texts: Sequence[str]) -> Any:
        """Return the probabilities that the texts describe an image (`treadle.tasks.matching.Matched`). Images are as
        in `label`.
        """
        found = self.matcher.match(_listed(images), texts)
        return found if _many(images) else found[0]

    def describe(
        self, images: Image | Sequence[Image], question: str = "Describe this image.", *, most: int = 256
    ) -> str:
        """Answer a question about an image, or several, with a chat model that reads images. Images are as in
        `label`.
        """
        from treadle.tasks.images.prompts import ImagePrompts

        ImagePrompts.check(self.program.source)
        shown: Any = [*images] if isinstance(images, list | tuple) else [images]
        talk = self.chat()
        return "".join(piece.text for piece in talk.say(question, images=shown, most=most))

    # -- the models of the methods, compiled at first use ------------------------------------------------------

    classifier: ClassVar[_TaskModel[TextClassifier]] = _TaskModel("classifying.TextClassifier")
    answerer: ClassVar[_TaskModel[QuestionAnswerer]] = _TaskModel("answering.QuestionAnswerer")
    tagger: ClassVar[_TaskModel[TokenTagger]] = _TaskModel("tagging.TokenTagger")
    filler: ClassVar[_TaskModel[MaskFiller]] = _TaskModel("filling.MaskFiller")
    labeller: ClassVar[_TaskModel[ImageLabeller]] = _TaskModel("labelling.ImageLabeller")
    matcher: ClassVar[_TaskModel[ImageMatcher]] = _TaskModel("matching.ImageMatcher")
    transcriber: ClassVar[_TaskModel[Transcriber]] = _TaskModel("transcribing.Transcriber")
    rewriter: ClassVar[_TaskModel[TextRewriter]] = _TaskModel("rewriting.TextRewriter")
    meter: ClassVar[_TaskModel[PerplexityMeter]] = _TaskModel("perplexity.PerplexityMeter")

    @cached_property
    def embedder(self) -> SentenceEmbedder:
        """The opened `treadle.sentence_embedding.SentenceEmbedder`."""
        from treadle.sentence_embedding import SentenceEmbedder

        return SentenceEmbedder.open(self.program.source, **self.program.options.but(cache=None).keywords())

    @cached_property
    def writer(self) -> TextWriter:
        """The opened `treadle.continuation.TextWriter`."""
        from treadle.continuation import TextWriter

        return TextWriter.open(self.program.source, **self.program.options.keywords())

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError: a model has a method for each task, while Hugging Face's pipeline has one task."""
        hint = 'model.generate("Once upon a time"), model.classify("I like it."), model.embed("a cat"), ...'
        with suppress(TreadleError):  # a model without a class, or a damaged folder
            if task := task_of(self.program.source.config):
                hint = f"model.{task}(...), the task of its class"
        raise UsageError("a loaded model is called by its tasks", received=repr(self), hint=hint)

    def __repr__(self) -> str:
        return f"<model {self.program.model} for tasks, backend {self.program.options.backend}>"


def _many(given: object) -> bool:
    return isinstance(given, list)


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _texts(found: Sequence[Rewritten], given: Any) -> Any:
    return [each.text for each in found] if _many(given) else found[0].text
