"""The zoo, and the models that can be fetched, as facts and as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from treadle.ir.analysis.cost import parameter_count
from treadle.reporting import Facts
from treadle.reporting.counts import human
from treadle.reporting.tables import Items, phrases, plain_table


def zoo_facts() -> Facts:
    """Return the zoo's families with their defaults, and the models that can be fetched, with the paths of fetched
    ones.
    """
    from treadle.fetching import fetched_model
    from treadle.models.registry import family_names, find_family
    from treadle.wheels.pinned_models import PINNED

    zoo = []
    for name in family_names():
        family = find_family(name)
        zoo.append(
            {
                "name": name,
                "description": family.model.description,
                "parameters": parameter_count(family.model.graph()),
                "defaults": {key: _config_text(value) for key, value in family.model.defaults.items()},
                "model_types": list(family.model_types),
            }
        )
    fetched = []
    for wheel in PINNED.values():
        path = fetched_model(wheel.name)
        where = None if path is None else str(path)
        fetched.append({"name": wheel.name, "about": wheel.about, "download_bytes": wheel.size, "path": where})
    return {"zoo": zoo, "fetched": fetched}


def _config_text(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_config_text(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else f"t.{value.__name__}"


def zoo_tables(facts: Facts) -> Iterable[Table | Text]:
    """Yield tables of the zoo and of the models that can be fetched, then the path of each fetched model on an unbroken
    line.
    """
    zoo = plain_table("zoo", "description", "parameters", "defaults", numbers={"parameters"})
    for each in facts["zoo"]:
        defaults = Items([f"{key}={value}" for key, value in each["defaults"].items()])
        zoo.add_row(each["name"], phrases(each["description"]), human(each["parameters"]), defaults)
    yield zoo
    pinned = plain_table("fetch", "description", "download", "", numbers={"download"})
    for each in facts["fetched"]:
        status = Text("fetched") if each["path"] else Text(f"treadle fetch {each['name']}", style="dim", no_wrap=True)
        pinned.add_row(each["name"], each["about"], human(each["download_bytes"], "B"), status)
    yield pinned
    paths = [(each["name"], each["path"]) for each in facts["fetched"] if each["path"]]
    if paths:
        width = max(len(name) for name, _ in paths)
        yield Text("\n".join(f"{name:<{width}}  {path}" for name, path in paths))
