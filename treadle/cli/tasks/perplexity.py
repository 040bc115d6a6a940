"""`treadle perplexity`: perplexity of a causal language model on a text, with and without quantization."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import task_command

if TYPE_CHECKING:
    from treadle.program.program import Program
    from treadle.tasks.perplexity import Perplexity


@task_command("perplexity")
def measure_text(
    program: Program,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text file; - is standard input.", show_default=False)],
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Number of tokens in a window.")] = 512,
    most: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=2,
            help="Maximum number of tokens to read. By default all.",
            show_default=False,
        ),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not compare with the model without --quantize and --dtype.")
    ] = False,
    *,
    as_json: bool,
) -> None:
    """Print the perplexity of a causal language model on a text, with and without quantization."""
    from treadle.program.given_texts import read_text
    from treadle.progress import counting, working
    from treadle.tasks.perplexity import PerplexityMeter, windows

    text = read_text(file)
    with working(f"compiling {program.model}", shown=not as_json):
        meter = PerplexityMeter.open(program, alone=alone)
    ids = meter.tokens(text, most)
    total = len(list(windows(len(ids), window)))
    with counting("reading", total, shown=not as_json) as progress:
        found = meter.measure(ids, window=window, progress=progress)
    if as_json:
        print_json({"model": meter.model.name, "backend": program.backend, "window": window, **asdict(found)})
        return
    for line in perplexity_lines(found, window):
        print(line)


def perplexity_lines(found: Perplexity, window: int) -> list[str]:
    """Return the report on a measured perplexity as lines of text."""
    from treadle.reporting.counts import counted

    read = f"{counted(found.tokens, 'token')} predicted in {counted(found.windows, 'window')} of up to {window:,}"
    apart = "" if found.error is None else f", standard error {found.error:.4f}"
    lines = [read, f"perplexity {found.perplexity:.4f}{apart}"]
    if (beside := found.beside) is not None:
        more = found.perplexity / beside.perplexity - 1
        lines += [
            f"full precision: {beside.perplexity:.4f}; change {more:+.2%}",
            f"mean KL divergence {beside.divergence:.5f} nats, 99th percentile {beside.largest:.4f}",
            f"same most likely token: {beside.alike:.2%}",
        ]
    return lines
