"""`treadle verify`: every backend compared with the float64 reference of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_backend
from treadle.cli.options import (
    AsJson,
    Config,
    Dtype,
    Limit,
    ModelName,
    OptionalInputs,
    Quantize,
    TargetName,
    Widen,
    names_of,
    refuse_for_artifact,
)


@command("verify", judges=lambda options: True)
def verify_backends(
    model: ModelName,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Backend to verify. By default all registered ones. Repeatable.",
            autocompletion=complete_backend,
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(metavar="B=1,S=16", help="Sizes to run at. By default a few small ones. Repeatable."),
    ] = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    target: TargetName = "cpu",
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed of the inputs, and of missing weights.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare every backend with the float64 reference of a model, whole and op by op. Exit code 1 if one is wrong."""
    from treadle.artifacts import is_artifact
    from treadle.fitting import fit_prose, fitted
    from treadle.option_values import parse_config, parse_sizes
    from treadle.progress import working
    from treadle.verifying import verify_model

    if is_artifact(model):
        refuse_for_artifact(config=config, inputs=inputs, dtype=dtype, quantize=quantize, widen=widen)
    with working(f"verifying {model}", shown=not as_json) as tell:
        report = verify_model(
            model,
            backends=backend,
            target=target,
            inputs=names_of(inputs),
            sizes=None if sizes is None else [parse_sizes(each) for each in sizes],
            seed=seed,
            dtype=dtype,
            quantize=quantize,
            widen=names_of(widen) or (),
            emit=lambda line: None if as_json else tell(fitted(line, fit_prose)),
            **parse_config(config or (), limit or (), verify_model),
        )
    if as_json:
        print_json(report.as_dict())
    if not report.passed:
        raise typer.Exit(1)
