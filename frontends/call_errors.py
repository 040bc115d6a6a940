"""Wrong calls of layers, told with the layer's own options, of which Python's TypeError names none."""

from __future__ import annotations

import difflib
import inspect
import re

_CALL = re.compile(r"(?:\w+\.)*(\w+)\(\) (missing|got an unexpected keyword argument|takes)(.*)")


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
