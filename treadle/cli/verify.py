"""`treadle verify`: compare every backend with the float64 reference of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_backend
from treadle.cli.options import AsJson, ModelName, OptionKeywords


@command("verify", takes=["verify"], judges=lambda options: True)
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
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Compare every backend with the float64 reference of a model, whole and op by op. Exit code 1 if one is wrong."""
    from treadle.fitting import fit_prose, fitted
    from treadle.program.flag_values import parse_sizes
    from treadle.progress import working
    from treadle.verifying import verify_model

    with working(f"verifying {model}", shown=not as_json) as tell:
        report = verify_model(
            model,
            backends=backend,
            sizes=None if sizes is None else [parse_sizes(each) for each in sizes],
            emit=lambda line: None if as_json else tell(fitted(line, fit_prose)),
            **keywords,
        )
    if as_json:
        print_json(report.as_dict())
    if not report.passed:
        raise typer.Exit(1)
