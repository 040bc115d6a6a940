"""`treadle generate`: text continued by a language model."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, BackendName, Config, ModelName, TargetName, Threads


@command("generate")
def continue_texts(
    model: ModelName,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.", show_default=False)],
    most: Annotated[int, typer.Option("--tokens", metavar="N", help="The most tokens to add to each.", min=1)] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher values vary more.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed gives the same text.")] = 0,
    config: Config = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue text with a causal language model, such as the fetched smollm2."""
    from treadle.continuation import TextWriter
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    writer = TextWriter.open(model, backend=backend, target=Target(target, threads), **parse_config(config or ()))
    texts, ids = [""] * len(prompts), [[] for _ in prompts]  # type: ignore[var-annotated]
    stream = len(prompts) == 1 and not as_json
    if stream:
        print(prompts[0], end="", flush=True)
    for piece in writer.continued(prompts, most=most, sampling=sampling):
        texts[piece.row] += piece.text
        ids[piece.row].append(piece.id)
        if stream:
            print(piece.text, end="", flush=True)
    if as_json:
        print_json(
            {
                "model": writer.model.name,
                "backend": backend,
                "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
                "texts": [
                    {"prompt": prompt, "text": text, "tokens": row}
                    for prompt, text, row in zip(prompts, texts, ids, strict=True)
                ],
            }
        )
    elif stream:
        print()
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
