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
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", min=1, help="Number of timed runs. By default 9.")
    ] = None,
    entry: Annotated[
        str, typer.Option("--entry", metavar="NAME", help="main, or step: a step of generation.")
    ] = "main",
    rows: Annotated[
        int | None,
        typer.Option("--rows", metavar="N", min=1, help="With --entry step: number of rows. By default 1."),
    ] = None,
    past: Annotated[
        int | None,
        typer.Option(
            "--past",
            metavar="N",
            min=1,
            help="With --entry step: tokens that each row has already. By default 128, within the model's positions.",
        ),
    ] = None,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Time each kernel of a run on the TVM backend, and compare it with the machine's limits.

    For a GPU, such as --target h100, which need not be here, predict the least time of each kernel from the record of
    the hardware: its memory's bandwidth and its rate in f32.
    """
    from treadle.artifacts.reading import is_artifact
    from treadle.backends.registry import find_backend
    from treadle.benching.measured_roofline import measure_roofline, measure_step_roofline
    from treadle.benching.predicted_roofline import predict_roofline, predict_step_roofline
    from treadle.benching.roofline_drawing import draw_roofline
    from treadle.explaining.memory_drawing import write_drawing
    from treadle.files.nearest_names import check_suffix
    from treadle.fitting import fit_prose, fitted
    from treadle.ir.errors import BackendError, UsageError
    from treadle.ir.target import Target
    from treadle.program.backend_choice import AUTO
    from treadle.program.budgets import choose_sizes
    from treadle.program.flag_values import parse_sizes
    from treadle.progress import working

    if svg is not None:
        check_suffix(svg, [".svg"], "a drawing")
    if entry not in ("main", "step"):
        raise UsageError(f"a roofline has no entry {entry}", hint="--entry main, or --entry step")
    if entry == "main" and (rows, past) != (None, None):
        raise UsageError("only --entry step accepts --rows or --past", hint="--entry step")
    if entry == "step" and sizes is not None:
        raise UsageError("--entry step does not accept --sizes", hint="--rows and --past")
    missing = find_backend("tvm").available()
    if missing is not None and keywords["backend"] in ("tvm", AUTO):
        reason, _, remedy = missing.partition(": ")
        what = "a roofline needs the kernels of the tvm backend, which is not available"
        raise BackendError(what, received=reason, hint=remedy or None)
    asked = parse_sizes(sizes)
    target = keywords.get("target", "cpu")
    if (target if isinstance(target, Target) else Target(target)).kind not in ("cpu", "isa"):
        if svg is not None or rounds is not None:
            raise UsageError("a prediction for a device has no measured times", hint="leave out --svg and --rounds")
        with working(f"lowering {model}", shown=not as_json):
            predicted = (
                predict_step_roofline(model, rows=rows or 1, past=past, **keywords)
                if entry == "step"
                else predict_roofline(model, asked, **keywords)
            )
        print_json(predicted.as_dict()) if as_json else print(fitted(str(predicted), fit_prose))
        return
    if "memory" in keywords:
        keywords["sizes"] = asked
    with working(f"compiling {model}", shown=not as_json):
        made = (
            load_with_options(model, keywords, also=("seed",))
            if is_artifact(model)
            else treadle.compile(model, **keywords)
        )
    how = {"rounds": rounds or 9, "seed": keywords.get("seed", 0)}
    with working(f"running {model}", shown=not as_json):
        if entry == "step":
            found = measure_step_roofline(made, rows=rows or 1, past=past, **how)
        else:
            found = measure_roofline(made, choose_sizes(made.graph, asked), **how)
    if svg is not None:
        write_drawing(svg, draw_roofline(found))
    if as_json:
        print_json({**found.as_dict(), "drawing": None if svg is None else str(svg)})
        return
    print(fitted(str(found), fit_prose))
    if svg is not None:
        print(f"wrote {svg}")
