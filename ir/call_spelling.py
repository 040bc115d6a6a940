"""How a function or an op is called, as text, and which of its options a misspelt one is nearest to: for errors."""

from __future__ import annotations

import difflib
import inspect
from inspect import Parameter, Signature


def spelled_call(name: str, signature: Signature) -> str:
    """`softmax(x, axis=-1)`: the parameters with their defaults, without types."""
    return f"{name}({', '.join(map(_spelled, signature.parameters.values()))})"


def nearest_option(wanted: str, signature: Signature) -> str | None:
    """The parameter that may be given by name and is spelled most like this one, if one is near."""
    by_name = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    options = [p.name for p in signature.parameters.values() if p.kind in by_name]
    return next(iter(difflib.get_close_matches(wanted, options, n=1, cutoff=0.4)), None)


def _spelled(parameter: Parameter) -> str:
    if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        return ("*" if parameter.kind is Parameter.VAR_POSITIONAL else "**") + parameter.name
    if parameter.default is Parameter.empty:
        return parameter.name
    default = parameter.default
    return f"{parameter.name}={default.__name__ if inspect.isfunction(default) else repr(default)}"
