"""`treadle shard`: plan and explain a model split over a mesh of devices, and simulate it without any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, Axis, Device, ModelName, OptionKeywords, Recipe, mesh_flags
from treadle.ir.errors import UsageError


@command("shard", takes=["shard"], judges=lambda options: options["lab"])
def shard_command(
    model: ModelName,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="AXES", help="The mesh of devices, such as tp=2,dp=2.", show_default=False),
    ] = None,
    recipe: Recipe = None,
    axis: Axis = None,
    device: Device = None,
    lab: Annotated[
        bool,
        typer.Option("--lab", help="Run all ranks in this process, and compare the result with the unsplit model."),
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", min=0, help="Print the program of a rank.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the plan and weights to a .treadle file.", show_default=False
        ),
    ] = None,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Split a model over a mesh; print the placement of every value, every collective, and the reasons.

    For a .treadle file written by -o, print the plan in it.
    """
    from treadle.artifacts.reading import SUFFIX, is_artifact, open_artifact
    from treadle.files.nearest_names import check_suffix
    from treadle.files.shown_names import printable
    from treadle.fitting import fit_graph, fit_prose, fitted
    from treadle.passes.sharding.plan_printing import plan_json
    from treadle.program.flag_values import parse_axes
    from treadle.program.options import CompileOptions
    from treadle.progress import working
    from treadle.reporting.counts import human
    from treadle.sharding import device_needs, rank_graph, shard_model, try_in_lab
    from treadle.sharding.sharded_models import ShardedModel, load_sharded, sharded

    made: ShardedModel | None = None
    options = CompileOptions.of("shard", keywords)
    if output is not None:
        check_suffix(output, [SUFFIX], "an artifact")
    if is_artifact(model):
        split: dict[str, Any] = {"mesh": mesh, "recipe": recipe, "axis": axis, "device": device, "output": output}
        split["sizes"] = options.sizes
        given = [f"--{name}" for name, value in split.items() if value]
        if given:
            if Path(model).is_file() and open_artifact(model, check=False).sharding is None:
                raise UsageError(
                    "an artifact is not split again",
                    received=printable(model),
                    hint="the model that it was compiled from, with the same options",
                )
            raise UsageError(
                "the file of a sharded model has its plan, and does not accept " + " or ".join(given),
                hint=f"leave out {' and '.join(given)}; or the model that it was made from",
            )
        options.refuse_for_artifact(model, also=("seed",))
        made = load_sharded(model, limits=options.limits)
        plan = made.plan
    else:
        if mesh is None:
            raise UsageError("sharding needs a mesh", received=f"shard {model}", hint=mesh_flags(recipe, axis))
        asked: dict[str, Any] = {
            "recipe": recipe,
            "axes": parse_axes(axis or ()),
            "device": "h100" if device is None else device,
            **keywords,
        }
        with working(f"planning {model}", shown=not as_json):
            if output is None:
                plan = shard_model(model, mesh, **asked)
            else:
                made = sharded(model, mesh, **asked)
                plan = made.plan
                made.save(output)
    program = None if rank is None else rank_graph(plan, rank)
    needs = device_needs(plan)
    if not as_json:
        shown = fitted(f"{plan}{needs}", fit_prose) if program is None else fitted(str(program).rstrip("\n"), fit_graph)
        print(shown)
    if output is not None and not as_json:
        print(f"wrote {output}, {human(output.stat().st_size, 'B')}")
    tried = None
    if lab:
        with working(f"running {plan.devices.ranks} ranks", shown=not as_json):
            tried = try_in_lab(plan, weights=None if made is None else made.weights, seed=options.seed)
    if as_json:
        facts = {
            **plan_json(plan),
            "device": needs.facts(),
            **({"program": str(program)} if program is not None else {}),
        }
        print_json({**facts, **({"lab": tried.facts()} if tried is not None else {})})
    elif tried is not None:
        print(tried)
    if tried is not None and not tried.passed:
        raise typer.Exit(1)
