"""`treadle report`: write a report on a model as one HTML file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    Axis,
    Device,
    ModelName,
    OptionKeywords,
    Recipe,
    Sizes,
    load_with_options,
    mesh_flags,
)
from treadle.ir.errors import UsageError


@command("report", takes=["compile"])
def report_command(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    sizes: Sizes = None,
    profile: Annotated[
        int, typer.Option("--profile", metavar="N", min=0, help="Time the kernels of N runs, with tvm. 0: no run.")
    ] = 0,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="AXES", help="Also report the model split over a mesh, such as tp=2,dp=2."),
    ] = None,
    recipe: Recipe = None,
    axis: Axis = None,
    device: Device = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="DTYPE", help="The dtype of keys and values in the step.", show_default=False),
    ] = None,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Write a report that a browser opens without a network: the graph after every pass, fusions and the reasons
    against them, memory, storage, weights, and the decoding step.
    """
    from treadle.artifacts.reading import is_artifact
    from treadle.explaining.sharding import explain_sharding
    from treadle.exporting.file_formats import writing_hint
    from treadle.files.nearest_names import check_suffix
    from treadle.program.flag_values import parse_axes, parse_sizes
    from treadle.program.option_table import taken_by
    from treadle.program.options import CompileOptions
    from treadle.program.program import Program
    from treadle.progress import working
    from treadle.report.building import SUFFIXES, Report, report_of
    from treadle.report.subjects import lowered_subject
    from treadle.reporting.counts import human

    check_suffix(output, SUFFIXES, "an HTML page", writing_hint(output, model, of="report"))
    split = {"recipe": recipe, "axes": parse_axes(axis or ()) or None, "device": device}
    given: dict[str, Any] = {name: value for name, value in split.items() if value is not None}
    if mesh is None and given:
        raise UsageError(
            "--recipe, --axis and --device apply to a mesh",
            received=f"report {model}",
            hint=f"{mesh_flags(recipe, axis)} as well",
        )
    chosen = parse_sizes(sizes)
    if "memory" in keywords:
        keywords["sizes"] = chosen
    sharding = originals = None
    report_with: Callable[..., Report]
    with working(f"compiling {model}", shown=not as_json):
        if is_artifact(model):
            if mesh is not None:
                raise UsageError("an artifact was compiled for one device", received=model, hint="the model itself")
            report_with = load_with_options(model, keywords, also=("seed",)).report
        elif profile:
            report_with = treadle.compile(model, **keywords).report
            originals = Program.of(model, "compile", **keywords).declared(deferred=True).resolved.weights
        else:
            report_with = partial(report_of, lowered_subject(model, **keywords))
    if mesh is not None:
        shared = {"config", *(each.name for each in taken_by("explain sharding"))}
        own = {name: value for name, value in keywords.items() if name in shared}
        with working(f"planning {model}", shown=not as_json):
            sharding = explain_sharding(model, mesh=mesh, **{**own, "sizes": chosen}, **given)
    seed = CompileOptions.of("compile", keywords).seed
    with working(f"writing {output}", shown=not as_json):
        report = report_with(
            sizes=chosen,
            sharding=sharding,
            cache=cache,
            profile=profile,
            seed=seed,
            command=shlex.join(["treadle", *(word for word in sys.argv[1:] if word != "--json")]),
            originals=originals,
        )
        report.save(output)
    count = output.stat().st_size
    if as_json:
        print_json({"model": report.name, "path": str(output), "bytes": count, "sections": list(report.sections)})
    else:
        print(f"wrote {output}, {human(count, 'B')}")
