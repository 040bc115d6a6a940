"""Values of a pass's options as text."""

from __future__ import annotations

import json
import re

from treadle.ir.types import DType

WORDS = {"true": True, "false": False, "none": None}
"""The words that stand for a value in the text form."""


def value_text(value: object) -> str:
    """Return a value as text that `treadle.passes.framework.pass_text` parses. Other objects, such as functions, are
    given by name.
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
    return getattr(value, "__qualname__", None) or repr(value)
