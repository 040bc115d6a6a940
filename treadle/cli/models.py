"""`treadle models`: list the zoo, and the models that can be fetched."""

from __future__ import annotations

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson


@command("models")
def list_models(as_json: AsJson = False) -> None:
    """List the zoo, and the models with real weights that can be fetched."""
    from rich.text import Text

    from treadle.reporting.tables import console
    from treadle.reporting.zoo import zoo_facts, zoo_tables

    facts = zoo_facts()
    if as_json:
        print_json(facts)
        return
    out = console()
    for table in zoo_tables(facts):
        out.print(table, soft_wrap=isinstance(table, Text))
        print()
