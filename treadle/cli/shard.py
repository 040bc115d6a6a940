"""`treadle shard`: a model split over a mesh of devices, planned, explained, and tried without any."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    Config,
    Device,
    Dtype,
    Limit,
    ModelName,
    OptionalInputs,
    Quantize,
    Recipe,
    Seed,
    SplitAxes,
    Widen,
    names_of,
)


@command("shard", judges=lambda options: options["lab"])
def shard_command(
    model: ModelName,
    mesh: Annotated[
        str,
        typer.Option("--mesh", metavar="AXES", help="The mesh of devices, such as tp=2,dp=2.", show_default=False),
    ],
    recipe: Recipe = None,
    axis: SplitAxes = None,
    device: Device = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", metavar="B=8,S=128", help="Sizes to compare costs at.", show_default=False),
    ] = None,
    lab: Annotated[
        bool, typer.Option("--lab", help="Run all ranks in this process, and compare with the model that is not split.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", min=0, help="Print the program of a rank.", show_default=False)
    ] = None,
    config: Config = None,
    limit: Limit = None,
    inputs: OptionalInputs = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Split a model over a mesh, and tell where everything lies, where ranks meet, and why."""
    from treadle.fitting import fit_graph, fit_prose, fitted
    from treadle.option_values import parse_axes, parse_config, parse_sizes
    from treadle.passes.sharding.plan_printing import plan_json
    from treadle.progress import working
    from treadle.sharding import device_needs, rank_graph, shard_model, try_in_lab

    with working(f"planning {model}", shown=not as_json):
        plan = shard_model(
            model,
            mesh,
            recipe=recipe,
            axes=parse_axes(axis or ()),
            sizes=parse_sizes(sizes),
            device="h100" if device is None else device,
            inputs=names_of(inputs),
            dtype=dtype,
            quantize=quantize,
            widen=names_of(widen) or (),
            **parse_config(config or (), limit or ()),
        )
    program = None if rank is None else rank_graph(plan, rank)
    needs = device_needs(plan)
    if not as_json:
        shown = fitted(f"{plan}{needs}", fit_prose) if program is None else fitted(str(program).rstrip("\n"), fit_graph)
        print(shown)
    tried = None
    if lab:
        with working(f"running {plan.mesh.ranks} ranks", shown=not as_json):
            tried = try_in_lab(plan, seed=seed)
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
