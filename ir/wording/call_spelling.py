"""Calls of functions and ops as text, and the option nearest to a misspelt one, for error messages."""

from __future__ import annotations

import difflib
import inspect
import keyword
from collections.abc import Sequence
from inspect import Parameter, Signature

from treadle.ir.wording.other_spellings import LEFT_OUT_OPTIONS, OTHER_OPTIONS

_SIMILAR = 0.75  # difflib's ratio: above it are misspellings, below it other words, such as inplace and name


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


def spelled_keywords(names: Sequence[str]) -> str:
    """Return keyword arguments of these names, such as `x=..., y=...`. If one is not a name in Python, as in ONNX
    files, the text is `**{'input.1': ..., 'y': ...}`.
    """
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        return ", ".join(f"{name}=..." for name in names)
    return f"**{{{', '.join(f'{name!r}: ...' for name in names)}}}"


def nearest_option(wanted: str, signature: Signature) -> str | None:
    """Return the keyword parameter that has this name in other libraries, or is a misspelling or a part of the name.

    None for other names: a wrong option that compiles is worse than no suggestion.
    """
    options = _options(signature)
    here = [name for name in OTHER_OPTIONS.get(wanted, ()) if name in options]
    if here:
        return here[0]
    if wanted in OTHER_OPTIONS or wanted in LEFT_OUT_OPTIONS:  # a known word, not a misspelt one
        return None
    near = difflib.get_close_matches(wanted, options, n=1, cutoff=_SIMILAR)
    return next(iter(near or [name for name in options if len(name) > 2 and name in wanted.split("_")]), None)


def option_guess(option: str, signature: Signature) -> str:
    """Return the beginning of a hint for an unknown option: `did you mean axis=? `, or empty if there is none."""
    near, names = nearest_option(option, signature), _options(signature)
    if near is not None:
        return f"did you mean {near}=? "
    arguments = [a for a in OTHER_OPTIONS.get(option, ()) if a.partition("=")[0] in names]
    if arguments:
        return f"{arguments[0]} in place of {option}=True: "
    return f"leave {option}= out, {LEFT_OUT_OPTIONS[option]}: " if option in LEFT_OUT_OPTIONS else ""


def _options(signature: Signature) -> list[str]:
    """Return the parameters that can be passed by keyword."""
    by_name = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.kind in by_name]


def _spelled(parameter: Parameter) -> str:
    if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        return ("*" if parameter.kind is Parameter.VAR_POSITIONAL else "**") + parameter.name
    if parameter.default is Parameter.empty:
        return parameter.name
    default = parameter.default
    return f"{parameter.name}={default.__name__ if inspect.isfunction(default) else repr(default)}"
