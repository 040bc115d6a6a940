"""`treadle report`: write the report on a model as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    Axis,
    BackendName,
    CacheName,
    Config,
    Device,
    Dtype,
    GivenOutputs,
    Limit,
    Memory,
    ModelName,
    OptionalInputs,
    Quantize,
    Recipe,
    Seed,
    Sizes,
    TargetName,
    Threads,
    Widen,
    names_of,
    outputs_of,
    refuse_for_artifact,
)
from treadle.ir.errors import UsageError


@command("report")
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
    cache: CacheName = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    outputs: GivenOutputs = None,
    memory: Memory = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a report that a browser opens without a network: the graph after every pass, fusions and the reasons
    against them, memory, storage, weights, and the decoding step.
    """
    from treadle.artifacts import is_artifact, load
    from treadle.compiled import Compiled
    from treadle.explaining.sharding import explain_sharding
    from treadle.ir.target import Target
    from treadle.option_values import parse_axes, parse_config, parse_limits, parse_sizes
    from treadle.progress import working
    from treadle.report.building import Subject, lowered_subject, report_of
    from treadle.reporting.counts import human

    split = {"recipe": recipe, "axes": parse_axes(axis or ()) or None, "device": device}
    given: dict[str, Any] = {name: value for name, value in split.items() if value is not None}
    if mesh is None and given:
        raise UsageError(
            "--recipe, --axis and --device apply to a mesh", received=f"report {model}", hint="--mesh tp=2"
        )
    where = Target(target, threads)
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "widen": names_of(widen) or ()}
    chosen = parse_sizes(sizes)
    budget: dict[str, Any] = {} if memory is None else {"memory": memory, "sizes": chosen}
    sharding = None
    subject: Subject | Compiled
    with working(f"compiling {model}", shown=not as_json):
        if is_artifact(model):
            refused = {"config": config, "inputs": inputs, "outputs": outputs, "mesh": mesh}
            refuse_for_artifact(**refused, dtype=dtype, quantize=quantize)
            bounds = parse_limits(limit or ())
            subject = load(model, backend=backend, target=where, limits=bounds, widen=options["widen"], **budget)
        else:
            named: dict[str, Any] = {"inputs": names_of(inputs), "outputs": outputs_of(outputs), **options, **budget}
            asked = parse_config(config or (), limit or (), treadle.compile)
            if profile:
                subject = treadle.compile(model, backend=backend, target=where, seed=seed, **named, **asked)
            else:
                subject = lowered_subject(model, backend=backend, target=where, **named, **asked)
    if mesh is not None:
        with working(f"planning {model}", shown=not as_json):
            asked = parse_config(config or (), limit or (), explain_sharding)
            sharding = explain_sharding(
                model, mesh=mesh, sizes=chosen, inputs=names_of(inputs), **given, **options, **asked
            )
    with working(f"writing {output}", shown=not as_json):
        report = report_of(
            subject,
            sizes=chosen,
            sharding=sharding,
            cache=cache,
            profile=profile,
            seed=seed,
            command=f"treadle report {model} -o {output}",
        )
        report.save(output)
    count = output.stat().st_size
    if as_json:
        print_json({"model": report.name, "path": str(output), "bytes": count, "sections": list(report.sections)})
    else:
        print(f"wrote {output}, {human(count, 'B')}")
