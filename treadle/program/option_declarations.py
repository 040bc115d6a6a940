"""Options as fields of frozen dataclasses: type, default, texts and flag, declared once.

    @dataclass(frozen=True)
    class TrainingSettings:
        steps: int = declare(1000, "number of updates", "Total number of updates.", Flag("steps", "N", least=1))

`declared(TrainingSettings)` returns the declarations, from which `treadle.cli.options` makes flags.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Flag:
    """The flag of an option on the command line.

    name      without the leading dashes; "": the field's name
    metavar   the placeholder of the value in `--help`; "": the flag has no value
    parse     converts the string, or all strings of a repeatable flag, to the option's value
    many      True if the flag is repeatable
    negated   True if --no-NAME exists, too; without either, the value is None
    least, most  bounds of a number
    complete  the kind of values for shell completion: "model", "backend" or "target"
    """

    name: str = ""
    metavar: str = ""
    parse: Callable[[Any], Any] = lambda value: value
    many: bool = False
    negated: bool = False
    least: float | None = None
    most: float | None = None
    complete: str | None = None


@dataclass(frozen=True)
class Option:
    """The declaration of an option.

    name     the name of the field, and of the keyword argument in Python
    type     its type, as source
    default  its default
    about    its meaning, for API documentation
    help     its meaning, for `--help`; a sentence
    flag     its flag; None if the option exists in Python only
    takers   the entry functions that take it; empty for settings of a single command
    """

    name: str
    type: str
    default: Any
    about: str
    help: str
    flag: Flag | None
    takers: frozenset[str] = frozenset()

    def is_set(self, value: object) -> bool:
        """Return True if a value differs from the default. None counts as the default."""
        if value is None or value is self.default:
            return False
        return not (isinstance(value, str | int | float | Sequence | set) and value == self.default)


def declare(default: Any, about: str, help: str = "", flag: Flag | None = None, *, takers: Collection[str] = ()) -> Any:
    """Return a dataclass field that declares an option; see `Option`. If `help` is empty, `about` is used for it."""
    return field(
        default=default,
        metadata={"about": about, "help": help or about, "flag": flag, "takers": frozenset(takers)},
    )


@cache
def declared(*subjects: type) -> Mapping[str, Option]:
    """Return the options that these dataclasses declare, without the options of base classes, by name and in order."""
    found = {}
    for subject in subjects:
        for each in fields(subject):
            if each.metadata and each.name in inspect.get_annotations(subject):
                flag = each.metadata["flag"]
                named = replace(flag, name=each.name) if flag is not None and not flag.name else flag
                found[each.name] = Option(each.name, str(each.type), each.default, **{**each.metadata, "flag": named})
    return found
