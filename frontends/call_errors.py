"""Wrong words and wrong calls of layers, told with the words that there are and with the layer's own options."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable

from treadle.ir.errors import FrontendError
from treadle.ir.source_lines import user_line

_CALL = re.compile(r"(?:\w+\.)*(\w+)\(\) (missing|got an unexpected keyword argument|takes)(.*)")


class UnknownNameError(FrontendError, AttributeError):
    """The DSL has no layer, op or type of that name. An AttributeError too, so that `hasattr` answers no."""


def unknown_word(name: str, known: Iterable[str]) -> UnknownNameError:
    """What to raise for a word that the DSL lacks; with the nearest of those it has."""
    near = difflib.get_close_matches(name, known, n=3)
    return UnknownNameError(
        f"the DSL has no {name!r}",
        source=str(user_line() or "") or None,
        hint="did you mean " + " or ".join(f"t.{n}" for n in near) + "?" if near else "dir(treadle) lists its words",
    )


def call_hint(error: BaseException) -> str | None:
    """What to try after a TypeError of a layer's call: the nearest option, and how the layer is called.

    None where the error is no such TypeError.
    """
    import treadle.frontends.layers as layers

    match = _CALL.match(str(error)) if isinstance(error, TypeError) else None
    layer = getattr(layers, match[1], None) if match else None
    if match is None or not inspect.isfunction(layer):
        return None
    parameters = inspect.signature(layer).parameters.values()
    options = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    spelled = ", ".join(p.name if p.default is p.empty else f"{p.name}={_shown(p.default)}" for p in parameters)
    wanted = re.search(r"'(\w+)'", match[3]) if match[2].startswith("got") else None
    near = difflib.get_close_matches(wanted[1], options, n=1, cutoff=0.4) if wanted else []
    return (f"did you mean {near[0]}=? " if near else "") + f"t.{match[1]}({spelled})"


def _shown(default: object) -> str:
    return default.__name__ if inspect.isfunction(default) else repr(default)
