"""`treadle generate`: text continued by a language model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    BackendName,
    CacheName,
    Config,
    Dtype,
    Limit,
    ModelName,
    Quantize,
    TargetName,
    Threads,
)

if TYPE_CHECKING:
    from treadle.continuation import Piece, TextWriter


@command("generate")
def continue_texts(
    model: ModelName,
    prompts: Annotated[list[str], typer.Argument(metavar="TEXTS", help="Texts to continue.", show_default=False)],
    most: Annotated[int, typer.Option("--tokens", metavar="N", help="The most tokens to add to each.", min=1)] = 32,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; higher values vary more.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from the likeliest tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws: the same seed gives the same text.")] = 0,
    cache: CacheName = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue text with a causal language model, such as the fetched smollm2."""
    from treadle.continuation import TextWriter
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.progress import working
    from treadle.reports import counted
    from treadle.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    with working(f"compiling {model}", shown=not as_json):
        writer = TextWriter.open(
            model,
            backend=backend,
            target=Target(target, threads),
            dtype=dtype,
            quantize=quantize,
            cache=cache,
            **parse_config(config or (), limit or ()),
        )
    written = [Written(prompt) for prompt in prompts]
    pace = Pace()
    pieces = writer.continued(prompts, most=most, sampling=sampling)
    stream = len(prompts) == 1 and not as_json
    if stream:
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
        print_json(
            {
                "model": writer.model.name,
                "backend": backend,
                "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
                "chat_template": writer.template is not None,
                **pace.facts(),
                "texts": [each.facts() for each in written],
            }
        )
        return
    for each in written if not stream else []:
        print(f"{each.prompt}{each.text}\n")
    sys.stdout.flush()
    for number, each in enumerate(written, 1):
        which = f"text {number}: " if len(written) > 1 else ""
        print(which + each.reason(writer), file=sys.stderr)
    if told := pace.told():
        print(told, file=sys.stderr)


class Pace:
    """How fast tokens come: the first after what the prompt takes, the others at each step."""

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
        """Tokens a second after the first one; None where there are no two."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else None

    def facts(self) -> dict[str, float | None]:
        return {
            "seconds_to_first_token": self.first - self.started if self.tokens else None,
            "tokens_per_second": self.a_second,
        }

    def told(self) -> str:
        """In words; nothing where there are no two tokens."""
        if self.a_second is None:
            return ""
        return f"first token after {self.first - self.started:.2f} s, then {self.a_second:.1f} tokens a second"


@dataclass
class Written:
    """What one prompt was continued by."""

    prompt: str
    text: str = ""
    ids: list[int] = field(default_factory=list)
    ending: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.ids.append(piece.id)
        self.ending = piece.ending

    def facts(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "text": self.text, "tokens": self.ids, "ending": self.ending}

    def reason(self, writer: TextWriter) -> str:
        """Why it stopped, in words."""
        from treadle.reports import counted

        tokens = counted(len(self.ids), "token")
        if self.ending == "context":
            return f"stopped after {tokens}: the model's context is full"
        if self.ending == "count":
            return f"stopped after {tokens}, as many as --tokens allows"
        told = f"stopped after {tokens}: the model ended the text"
        if self.text.strip() or writer.template is None:
            return told
        marks = f", with its marks {', '.join(writer.marks)}" if writer.marks else ""
        return f"{told} at once. It was made for chat: write the prompt as its chat template does{marks}"
