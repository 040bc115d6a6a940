"""`treadle run`: run a model on arrays."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, Axis, Mesh, ModelName, OptionKeywords, Patience, Recipe, load_with_options
from treadle.ir.errors import UsageError


@command("run", takes=["compile"], defaults={"target": None})
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
    mesh: Mesh = None,
    recipe: Recipe = None,
    axis: Axis = None,
    timeout: Patience = 60.0,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Run a model on arrays, alone or as one of several ranks."""
    from treadle.cli.rank_runs import refuse_without_mesh, run_rank
    from treadle.files.nearest_names import check_folder

    check_folder(output, "NAME.npy")
    if mesh is not None:
        if keywords.get("outputs") is not None:
            raise UsageError("--outputs cannot be combined with --mesh", hint="--mesh without --outputs")
        run_rank(
            model,
            values or [],
            mesh=mesh,
            recipe=recipe,
            axis=axis or [],
            timeout=timeout,
            output=output,
            keywords=keywords,
            as_json=as_json,
        )
        return
    refuse_without_mesh(recipe, axis or ())
    import numpy as np

    from treadle.artifacts.reading import is_artifact
    from treadle.npy_files import write_npy
    from treadle.program.flag_values import input_names, parse_inputs
    from treadle.progress import working
    from treadle.reporting.arrays import array_facts, array_table
    from treadle.reporting.compilations import weights_text
    from treadle.reporting.tables import console

    assigned = values or []
    with working(f"compiling {model}", shown=not as_json):
        if is_artifact(model):
            made = load_with_options(model, keywords)
        else:
            made = treadle.compile(model, **{"inputs": input_names(assigned), **keywords})
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
                "weights": weights_text(made.seed),
                "seconds": seconds,
                "outputs": facts,
                "files": list(map(str, files)),
            }
        )
        return
    console().print(array_table(facts))
    for name, fact in facts.items():
        if "values" in fact:
            print(f"\n{name} = {json.dumps(fact['values'])}")
    where = f"in {made.backend} on {made.target}"
    print(f"\n{made.name} ran in {seconds * 1e3:.1f} ms {where}, its weights {weights_text(made.seed)}")
    for file in files:
        print(f"wrote {file}")
