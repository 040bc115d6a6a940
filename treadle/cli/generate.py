"""`treadle generate`: continue text with a language model."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_model
from treadle.cli.options import (
    AsJson,
    Axis,
    BackendName,
    CacheName,
    Config,
    Dtype,
    Limit,
    Mesh,
    ModelName,
    Patience,
    Quantize,
    Recipe,
    TargetName,
    Threads,
    Widen,
    names_of,
)

if TYPE_CHECKING:
    from treadle.continuation import FoundText, Piece, TextWriter
    from treadle.runtime.speculation import SpeculationTally


@command("generate")
def continue_texts(
    model: ModelName,
    prompts: Annotated[list[str], typer.Argument(metavar="TEXTS", help="Texts to continue.", show_default=False)],
    most: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Maximum number of tokens to add to each text.", min=1)
    ] = 32,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0 disables this.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the most likely tokens whose probabilities sum to P.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample from tokens whose probability is at least P times the largest one."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed; the same seed gives the same text.")] = 0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Values above 1 make tokens that are already in the text less likely. By default the folder's.",
            show_default=False,
        ),
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Subtracted from the logits of tokens that were already generated.")
    ] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End at this text. Repeatable.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=100,
            help="Print each token's log probability, and the N most likely tokens.",
            show_default=False,
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=512, help="Beam search with N beams.", show_default=False),
    ] = None,
    length_penalty: Annotated[
        float, typer.Option(metavar="X", help="With --beams: values above 0 favour long texts.")
    ] = 1.0,
    best: Annotated[int, typer.Option(metavar="N", min=1, help="With --beams: number of texts to print.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each text into the model's chat template as a user message.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="With --chat: the system message.", show_default=False),
    ] = None,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Speculative decoding from the text so far: the same text in less time.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Speculative decoding with a smaller model of the same vocabulary.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    cache: CacheName = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    mesh: Mesh = None,
    recipe: Recipe = None,
    axis: Axis = None,
    timeout: Patience = 60.0,
    as_json: AsJson = False,
) -> None:
    """Continue text with a causal language model, such as the fetched smollm2, alone or as one of several ranks."""
    from treadle.cli.rank_runs import opened_on_ranks
    from treadle.continuation import TextWriter, need_for_text
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.progress import working
    from treadle.reporting.counts import counted
    from treadle.runtime.beams import Beams
    from treadle.runtime.sampling import Sampling
    from treadle.runtime.speculation import PromptLookup, SpeculationTally
    from treadle.stepped import open_stepped
    from treadle.tasks.generation_settings import FolderRules

    sampling = Sampling(temperature, top_k, top_p, seed, min_p)
    penalties = {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty or None}
    FolderRules().but(**penalties)  # a wrong value is refused before compiling
    search = None if beams is None else Beams(beams, length_penalty, best)
    if search is not None:
        drawing = {"temperature": temperature, "top-k": top_k, "top-p": top_p != 1, "min-p": min_p, "stop": stop}
        guessing = {"logprobs": logprobs is not None, "speculate": speculate, "draft": draft}
        _refuse("a beam search does not accept", **drawing, **guessing)
    else:
        _refuse("only --beams accepts", **{"best": best != 1, "length-penalty": length_penalty != 1})
    if not chat:
        _refuse("only --chat accepts", system=system)
    where = Target(target, threads)
    said = (prompts, most, sampling, penalties, stop, search, logprobs, chat, system, speculate, draft, cache)
    opener: Callable[..., Any] = open_stepped
    if mesh is not None:
        from treadle.sharding.rank_models import RankPart

        opener = RankPart.of
    configured = parse_config(config or (), limit or (), TextWriter.open, opener)
    with opened_on_ranks(mesh, recipe, axis or [], timeout, f"{said}") as stepped:
        need_for_text(model, chat=chat)
        with working(f"compiling {model}", shown=not as_json):
            writer = TextWriter.open(
                model,
                backend=backend,
                target=where,
                dtype=dtype,
                quantize=quantize,
                widen=names_of(widen) or (),
                cache=cache,
                stepped=stepped,
                **configured,
            )
            guess = None
            if draft is not None:
                guess = TextWriter.open(draft, backend=backend, target=where, cache=cache).draft_for(writer)
        asked = prompts
        if chat:
            template = writer.chat_template()
            messages = [] if system is None else [{"role": "system", "content": system}]
            prompts = [template.render([*messages, {"role": "user", "content": text}]) for text in asked]
        facts: dict[str, Any] = {"model": writer.model.name, "backend": backend}
        chosen: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
        }
        asked_of = writer.asked.but(**penalties)
        rules = asked_of.rules
        chosen |= {"repetition_penalty": rules.repetition_penalty, "presence_penalty": rules.presence_penalty}
        facts["from_folder"] = asked_of.as_dict()
        if search is not None:
            with working(f"continuing {counted(len(prompts), 'text')}", shown=not as_json):
                searched = writer.searched(prompts, most=most, beams=search, rules=rules, special=not chat)
            if as_json:
                texts = [
                    {"prompt": p, "found": list(map(asdict, each))} for p, each in zip(asked, searched, strict=True)
                ]
                print_json({**facts, "beams": asdict(search), "texts": texts})
            else:
                _tell_searched([""] * len(asked) if chat else asked, searched)
                if asked_of.options:
                    print(asked_of, file=sys.stderr)
            return
        tally = SpeculationTally() if speculate or draft is not None else None
        written = [Written(prompt) for prompt in asked]
        pace = Pace()
        pieces = writer.continued(
            prompts,
            most=most,
            sampling=sampling,
            rules=rules,
            stop=stop or (),
            likely=logprobs or 0,
            guess=guess or (PromptLookup() if speculate else None),
            tally=tally,
            special=not chat,
        )
        stream = len(prompts) == 1 and not as_json
        if stream and not chat:
            print(prompts[0], end="", flush=True)
        try:
            with working(f"continuing {counted(len(prompts), 'text')}", shown=not as_json and not stream):
                for piece in pieces:
                    written[piece.row].add(piece)
                    pace.count()
                    if stream:
                        print(piece.text, end="", flush=True)
        finally:
            if stream:
                print(flush=True)  # also before an error
        if as_json:
            facts |= {"sampling": chosen, "chat_template": writer.template is not None, **pace.facts()}
            if tally is not None:
                facts["speculation"] = _tally_facts(tally)
            print_json({**facts, "texts": [each.facts(writer, logprobs is not None) for each in written]})
            return
        _tell_written(writer, written, shown=stream, without_prompt=chat, with_logprobs=logprobs is not None)
        if asked_of.options:
            print(asked_of, file=sys.stderr)
        if pace.summary():
            print(pace.summary(), file=sys.stderr)
        if tally is not None:
            right = f"{tally.accepted} of {counted(tally.guessed, 'guessed token')} accepted"
            print(f"{right}, {tally.accepted_length:.2f} per call of the model", file=sys.stderr)


def _tell_searched(prompts: Sequence[str], searched: Sequence[Sequence[FoundText]]) -> None:
    """Print the results of a beam search for each prompt; scores go to standard error."""
    from treadle.reporting.counts import counted

    for prompt, found in zip(prompts, searched, strict=True):
        for text in found:
            print(f"{prompt}{text.text}\n", flush=True)
            print(f"score {text.score:.4f}, {counted(len(text.tokens), 'token')}", file=sys.stderr)


def _tell_written(
    writer: TextWriter, written: Sequence[Written], *, shown: bool, without_prompt: bool, with_logprobs: bool
) -> None:
    """Print texts that were not streamed, their tokens' log probabilities, and the reasons why they stopped."""
    for each in written if not shown else []:
        print(f"{'' if without_prompt else each.prompt}{each.text}\n")
    for each in written if with_logprobs else []:
        print("\n".join(each.probabilities(writer)) + "\n")
    sys.stdout.flush()
    for number, each in enumerate(written, 1):
        which = f"text {number}: " if len(written) > 1 else ""
        print(which + each.reason(writer), file=sys.stderr)


def _refuse(what: str, **options: Any) -> None:
    """Raise UsageError if one of these options is set."""
    from treadle.ir.errors import UsageError

    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(f"{what} " + " or ".join(f"--{name}" for name in given), hint="leave it out")


def _tally_facts(tally: SpeculationTally) -> dict[str, Any]:
    """Return the counts of speculation as JSON; `margin` is null if no chosen token was the most likely one."""
    margin = tally.margin if math.isfinite(tally.margin) else None
    return {**asdict(tally), "margin": margin, "accepted_length": tally.accepted_length}


class Pace:
    """The speed of generation: the time to the first token, and the rate of the others."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = self.last = 0.0
        self.tokens = 0

    def count(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    @property
    def a_second(self) -> float | None:
        """Tokens per second after the first one; None for fewer than two tokens."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else None

    def facts(self) -> dict[str, float | None]:
        return {
            "seconds_to_first_token": self.first - self.started if self.tokens else None,
            "tokens_per_second": self.a_second,
        }

    def summary(self) -> str:
        """The speed as text; empty for fewer than two tokens."""
        if self.a_second is None:
            return ""
        return f"first token after {self.first - self.started:.2f} s, then {self.a_second:.1f} tokens per second"


@dataclass
class Written:
    """The continuation of one prompt."""

    prompt: str
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.pieces.append(piece)

    @property
    def ending(self) -> str | None:
        """The reason for the end, or None."""
        return self.pieces[-1].ending if self.pieces else None

    def facts(self, writer: TextWriter, with_logprobs: bool) -> dict[str, Any]:
        ids = [piece.id for piece in self.pieces]
        facts: dict[str, Any] = {"prompt": self.prompt, "text": self.text, "tokens": ids, "ending": self.ending}
        if with_logprobs:
            facts["logprobs"] = [
                {
                    **_priced(writer, piece.id, piece.logprob),
                    "likely": [_priced(writer, number, logprob) for number, logprob in piece.likely],
                }
                for piece in self.pieces
            ]
        return facts

    def probabilities(self, writer: TextWriter) -> list[str]:
        """Return one line per token: its log probability, its text, and the most likely tokens at its position."""
        lines = []
        for piece in self.pieces:
            others = "  ".join(f"{writer.tokenizer.token(i)!r} {logprob:.4f}" for i, logprob in piece.likely)
            lines.append(f"{piece.logprob:9.4f}  {writer.tokenizer.token(piece.id)!r:20} {others}".rstrip())
        return lines

    def reason(self, writer: TextWriter) -> str:
        """Return the reason why generation stopped, as text."""
        from treadle.reporting.counts import counted

        tokens = counted(len(self.pieces), "token")
        if self.ending == "context":
            return f"stopped after {tokens}: the model's context is full"
        if self.ending == "count":
            return f"stopped after {tokens}: the limit of --tokens"
        if self.ending == "stop":
            return f"stopped after {tokens}: --stop appeared"
        message = f"stopped after {tokens}: the model ended the text"
        if self.text.strip() or writer.template is None:
            return message
        marks = f", with its marks {', '.join(writer.marks)}" if writer.marks else ""
        return f"{message} at once. It is a chat model: --chat puts the prompt into its chat template{marks}"


def _priced(writer: TextWriter, number: int, logprob: float) -> dict[str, Any]:
    return {"token": number, "text": writer.tokenizer.token(number), "logprob": logprob}
