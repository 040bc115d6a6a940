"""Options as fields of frozen dataclasses: type, default, texts and flag, declared once.

    @dataclass(frozen=True)
    class TrainingSettings:
        steps: int = declare(1000, "number of updates", "Total number of updates.", Flag("steps", "N", least=1))

`declared(TrainingSettings)` returns the declarations, from which `treadle.cli.options` makes flags.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from os import PathLike
from typing import Any

from treadle.files.shown_names import printable
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.target import Target
from treadle.ir.types import DType


@dataclass(frozen=True)
class _Kind:
    """The values of a type in an option's annotation: their classes, and a noun for errors."""

    text: str
    classes: tuple[type, ...]

    def accepts(self, value: object) -> bool:
        return isinstance(value, self.classes) and (bool in self.classes or not isinstance(value, bool))


_KINDS = {
    "str": _Kind("text", (str, DType)),
    "int": _Kind("an integer", (Integral,)),
    "bool": _Kind("True or False", (bool,)),
    "Path": _Kind("a path", (PathLike,)),
    "Target": _Kind("a Target", (Target,)),
    "Mapping": _Kind("a mapping", (Mapping,)),
    "Sequence": _Kind("a list", (Sequence, Set)),
    "Iterable": _Kind("a list", (Iterable,)),
}
"""The kinds of values by the name in an annotation. A text passes as a sequence, and the option's reader refuses it."""


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

    def check(self, value: object) -> None:
        """Raise UsageError for a value of another type than the option's. None is a value of every option."""
        kinds = [kind.partition("[")[0] for kind in self.type.split(" | ") if kind != "None"]
        if value is None or any(_KINDS[kind].accepts(value) for kind in kinds):
            return
        raise UsageError(
            f"{self.name}= must be {' or '.join(dict.fromkeys(_KINDS[kind].text for kind in kinds))}",
            received=printable(repr(value))[:80],
            hint=self._parsed(value) or self._of_module(value) or self._example() or self.about.partition(". ")[0],
        )

    def _example(self) -> str | None:
        """Return the option with the value that `about` has as an example, or None if it has none."""
        example = re.search(r"such as (\(.*?\)|\{.*?\}|\".*?\")", self.about)
        return None if example is None else f"{self.name}={example[1]}"

    def _of_module(self, value: object) -> str | None:
        """Return the option with the weights of a module of PyTorch; None for another value or option."""
        return f"{self.name}=module.state_dict()" if self.name == "weights" and hasattr(value, "state_dict") else None

    def _parsed(self, value: object) -> str | None:
        """Return the option with the value that its flag reads from a text: `sizes={'B': 1}` for "B=1"."""
        if not isinstance(value, str) or self.flag is None:
            return None
        try:
            parsed = int(value) if self.type == "int" else self.flag.parse([value] if self.flag.many else value)
        except (ValueError, TreadleError):
            return None
        return None if isinstance(parsed, str) else f"{self.name}={printable(repr(parsed))}"


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
