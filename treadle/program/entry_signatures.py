"""The signatures and docstrings of entry functions, with the options that they take.

An entry function is declared with `**options`; its signature has the options that `treadle.program.option_table`
declares for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from treadle.program.option_table import taken_by

_OWN_PARAMETERS: dict[str, list[str]] = {}


def own_parameters(entry: str) -> Sequence[str]:
    """Return the keyword parameters of an entry function that are not options, such as `learning_rate` of a trainer."""
    return _OWN_PARAMETERS.get(entry, ())


def documented(entry: str) -> str:
    """Return the text on an entry function's options for its docstring: name and meaning of each option."""
    import textwrap

    width = 10
    lines = []
    for each in taken_by(entry):
        body = textwrap.fill(
            each.about, 116, initial_indent=f"{each.name}  ".ljust(width), subsequent_indent=" " * width
        )
        lines.append(body)
    return "\n".join(lines)


def with_options(function: Callable[..., Any], entry: str) -> inspect.Signature:
    """Return the signature of an entry function in which its options replace `**options`, followed by `**config`, the
    model's configuration.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    _OWN_PARAMETERS[entry] = [each.name for each in own if each.kind is keyword]
    named = [
        inspect.Parameter(each.name, keyword, default=each.default, annotation=each.type)
        for each in taken_by(entry)
        if each.name not in signature.parameters
    ]
    config = inspect.Parameter("config", inspect.Parameter.VAR_KEYWORD, annotation="Any")
    return signature.replace(parameters=[*own, *named, config])


def describe_options(function: Callable[..., Any], entry: str) -> None:
    """Set an entry function's full signature, and replace OPTIONS in its docstring by the text on its options."""
    function.__signature__ = with_options(function, entry)  # type: ignore[attr-defined]
    function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("OPTIONS", documented(entry))
