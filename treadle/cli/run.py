"""`treadle run`: run a model on arrays."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_backend, complete_target
from treadle.cli.options import (
    AsJson,
    Axis,
    Config,
    Dtype,
    GivenOutputs,
    Limit,
    Mesh,
    ModelName,
    Patience,
    Quantize,
    Recipe,
    Seed,
    Threads,
    Widen,
    names_of,
    outputs_of,
    refuse_for_artifact,
)
from treadle.ir.errors import UsageError


@command("run")
def run_model(
    model: ModelName,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=VALUE",
            help="A .npy file, numbers 1,2,3 (one row) or lists [[1,2],[3,4]]. Repeatable. A given optional input is "
            "included.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each output to DIR/NAME.npy.", show_default=False)
    ] = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    asked: GivenOutputs = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="By default numpy, or an artifact's own.",
            show_default=False,
            autocompletion=complete_backend,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="By default cpu, or an artifact's own.",
            show_default=False,
            autocompletion=complete_target,
        ),
    ] = None,
    threads: Threads = None,
    mesh: Mesh = None,
    recipe: Recipe = None,
    axis: Axis = None,
    timeout: Patience = 60.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a model on arrays, alone or as one of several ranks."""
    from treadle.cli.rank_runs import refuse_without_mesh, run_rank

    if mesh is not None:
        if asked is not None:
            raise UsageError("--outputs cannot be combined with --mesh", hint="--mesh without --outputs")
        run_rank(
            model,
            values or [],
            mesh=mesh,
            recipe=recipe,
            axis=axis or [],
            timeout=timeout,
            output=output,
            config=config or (),
            limit=limit or (),
            dtype=dtype,
            quantize=quantize,
            widen=names_of(widen) or (),
            backend=backend or "numpy",
            target=target or "cpu",
            threads=threads,
            seed=seed,
            as_json=as_json,
        )
        return
    refuse_without_mesh(recipe, axis or ())
    import numpy as np

    from treadle.artifacts import is_artifact, load_artifact, open_artifact
    from treadle.ir.target import Target
    from treadle.npy_files import write_npy
    from treadle.option_values import input_names, parse_config, parse_inputs, parse_limits
    from treadle.progress import working
    from treadle.reporting.arrays import array_facts, array_table
    from treadle.reporting.compilations import weights_text
    from treadle.reporting.tables import console

    narrow = names_of(widen) or ()
    assigned, chosen = values or [], parse_config(config or (), limit or (), treadle.compile)
    with working(f"compiling {model}", shown=not as_json):
        if is_artifact(model):
            refuse_for_artifact(config=config, outputs=asked, dtype=dtype, quantize=quantize)
            where = (
                None
                if target is None and threads is None
                else target or open_artifact(model, limits=parse_limits(limit or ())).target
            )
            made = load_artifact(
                model,
                backend=backend,
                target=None if where is None else Target(where, threads),
                limits=parse_limits(limit or ()),
                widen=narrow,
            )
        else:
            chosen |= {"inputs": input_names(assigned), "outputs": outputs_of(asked)}
            chosen |= {"backend": backend or "numpy", "target": Target(target or "cpu", threads)}
            made = treadle.compile(model, seed=seed, dtype=dtype, quantize=quantize, widen=narrow, **chosen)
    arrays = parse_inputs(assigned, {p.name: p.type.rank for p in made.inputs})
    with working(f"running {made.name}", shown=not as_json):
        started = time.perf_counter()
        outputs = {name: np.asarray(array) for name, array in made(**arrays).items()}
        seconds = time.perf_counter() - started
    files = write_npy(output, outputs) if output is not None else []
    facts = {name: array_facts(array) for name, array in outputs.items()}
    if as_json:
        print_json(
            {
                "model": made.name,
                "backend": made.backend,
                "target": str(made.target),
                "weights": weights_text(made),
                "seconds": seconds,
                "outputs": facts,
                "files": list(map(str, files)),
            }
        )
        return
    console().print(array_table(facts))
    for name, told in facts.items():
        if "values" in told:
            print(f"\n{name} = {json.dumps(told['values'])}")
    where = f"in {made.backend} on {made.target}"
    print(f"\n{made.name} ran in {seconds * 1e3:.1f} ms {where}, its weights {weights_text(made)}")
    for file in files:
        print(f"wrote {file}")
