"""`treadle roofline`: each kernel of a run compared with the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    Config,
    Dtype,
    Limit,
    ModelName,
    OptionalInputs,
    Quantize,
    Seed,
    Sizes,
    Threads,
    Widen,
    names_of,
    refuse_for_artifact,
)


@command("roofline")
def show_roofline(
    model: ModelName,
    sizes: Sizes = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write an SVG drawing.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Timed runs.")] = 9,
    threads: Threads = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time each kernel of a run on the TVM backend, and compare it with the machine's limits."""
    from treadle.artifacts import is_artifact, load_artifact
    from treadle.benching.roofline import measure_roofline
    from treadle.benching.roofline_drawing import draw_roofline
    from treadle.explaining.memory_drawing import write_drawing
    from treadle.fitting import fit_prose, fitted
    from treadle.ir.target import Target
    from treadle.option_values import choose_sizes, parse_config, parse_limits, parse_sizes
    from treadle.progress import working

    target = Target("cpu", threads)
    with working(f"compiling {model}", shown=not as_json):
        if is_artifact(model):
            refuse_for_artifact(config=config, inputs=inputs, dtype=dtype, quantize=quantize)
            made = load_artifact(
                model, backend="tvm", target=target, limits=parse_limits(limit or ()), widen=names_of(widen) or ()
            )
        else:
            made = treadle.compile(
                model,
                backend="tvm",
                target=target,
                inputs=names_of(inputs),
                seed=seed,
                dtype=dtype,
                quantize=quantize,
                widen=names_of(widen) or (),
                **parse_config(config or (), limit or (), treadle.compile),
            )
    with working(f"running {model}", shown=not as_json):
        found = measure_roofline(made, choose_sizes(made.graph, parse_sizes(sizes)), rounds=rounds, seed=seed)
    if svg is not None:
        write_drawing(svg, draw_roofline(found))
    if as_json:
        print_json({**found.as_dict(), "drawing": None if svg is None else str(svg)})
        return
    print(fitted(str(found), fit_prose))
    if svg is not None:
        print(f"wrote {svg}")
