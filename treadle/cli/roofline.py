"""`treadle roofline`: each kernel of a run compared with the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, ModelName, OptionKeywords, Sizes, load_with_options


@command("roofline", takes=["compile"], defaults={"backend": "tvm"})
def show_roofline(
    model: ModelName,
    sizes: Sizes = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write an SVG drawing.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Timed runs.")] = 9,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Time each kernel of a run on the TVM backend, and compare it with the machine's limits."""
    from treadle.artifacts import is_artifact
    from treadle.backends.registry import find_backend
    from treadle.benching.roofline import measure_roofline
    from treadle.benching.roofline_drawing import draw_roofline
    from treadle.explaining.memory_drawing import write_drawing
    from treadle.fitting import fit_prose, fitted
    from treadle.ir.errors import BackendError
    from treadle.program.backend_choice import AUTO
    from treadle.program.budgets import choose_sizes
    from treadle.program.flag_values import parse_sizes
    from treadle.progress import working

    missing = find_backend("tvm").available()
    if missing is not None and keywords["backend"] in ("tvm", AUTO):
        reason, _, remedy = missing.partition(": ")
        what = "a roofline needs the kernels of the tvm backend, which is not available"
        raise BackendError(what, received=reason, hint=remedy or None)
    asked = parse_sizes(sizes)
    if "memory" in keywords:
        keywords["sizes"] = asked
    with working(f"compiling {model}", shown=not as_json):
        made = (
            load_with_options(model, keywords, also=("seed",))
            if is_artifact(model)
            else treadle.compile(model, **keywords)
        )
    with working(f"running {model}", shown=not as_json):
        found = measure_roofline(made, choose_sizes(made.graph, asked), rounds=rounds, seed=keywords.get("seed", 0))
    if svg is not None:
        write_drawing(svg, draw_roofline(found))
    if as_json:
        print_json({**found.as_dict(), "drawing": None if svg is None else str(svg)})
        return
    print(fitted(str(found), fit_prose))
    if svg is not None:
        print(f"wrote {svg}")
