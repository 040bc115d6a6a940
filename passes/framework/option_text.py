"""Values of a pass's options as text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from treadle.ir.types import DType
from treadle.passes.capabilities import Capabilities

WORDS = {"true": True, "false": False, "none": None}
"""The words that stand for a value in the text form."""


def options_text(value: Any) -> str:
    """Return the fields of a dataclass that differ from their default, as `name=value,...`."""
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare]
    return _fields({f.name: held for f, held in fields if f.default is dataclasses.MISSING or held != f.default})


def _fields(values: Mapping[str, object]) -> str:
    return ",".join(f"{value_text(name)}={value_text(value)}" for name, value in values.items())


def value_text(value: object) -> str:
    """Return a value as text that `treadle.passes.framework.pass_text` parses. Other objects, such as functions, are
    given by name. A field of a dataclass is left out if it has its default, or does not distinguish values.
    """
    if isinstance(value, DType):
        return value.name
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][\w.-]*", value) and value not in WORDS else json.dumps(value)
    if isinstance(value, tuple):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{_fields(value)}}}"
    if isinstance(value, Capabilities):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{{{options_text(value)}}}"
    return getattr(value, "__qualname__", None) or repr(value)
