"""Calls of functions and ops as text, and the option nearest to a misspelt one, for error messages."""

from __future__ import annotations

import difflib
import inspect
from inspect import Parameter, Signature

from treadle.ir.wording.other_spellings import OTHER_OPTIONS


def spelled_call(name: str, signature: Signature) -> str:
    """Return a signature as a call, such as `softmax(x, *, axis=-1)`: the parameters with their defaults, without
    types. Parameters after * are keyword-only.
    """
    parameters = list(signature.parameters.values())
    spelled = [_spelled(p) for p in parameters]
    by_name = [i for i, p in enumerate(parameters) if p.kind is Parameter.KEYWORD_ONLY]
    if by_name and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        spelled.insert(by_name[0], "*")
    return f"{name}({', '.join(spelled)})"


def nearest_option(wanted: str, signature: Signature) -> str | None:
    """Return the keyword parameter that has this name in other libraries, or the most similar name."""
    by_name = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    options = [p.name for p in signature.parameters.values() if p.kind in by_name]
    here = [name for name in OTHER_OPTIONS.get(wanted, ()) if name in options]
    if here:
        return here[0]
    return next(iter(difflib.get_close_matches(wanted, options, n=1, cutoff=0.4)), None)


def _spelled(parameter: Parameter) -> str:
    if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        return ("*" if parameter.kind is Parameter.VAR_POSITIONAL else "**") + parameter.name
    if parameter.default is Parameter.empty:
        return parameter.name
    default = parameter.default
    return f"{parameter.name}={default.__name__ if inspect.isfunction(default) else repr(default)}"
