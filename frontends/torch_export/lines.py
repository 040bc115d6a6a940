"""Sources of torch.export nodes: the enclosing module, and the user's line.

nn_module_stack   {..., "L__self__transformer.h.0.attn": ("transformer.h.0.attn", ...)}   transformer.h.0.attn
stack_trace       File ".../transformers/models/gpt2/modeling_gpt2.py", line 213           the same, shortened
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from types import TracebackType
from typing import Any

from treadle.ir.source_lines import SourceLine

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_TORCH = re.compile(r"[\\/](?:site|dist)-packages[\\/]torch(?:gen)?[\\/]|^<")
_PACKAGES = re.compile(r"^.*[\\/](?:site|dist)-packages[\\/]")


@lru_cache(maxsize=4096)
def shown(path: str) -> str:
    """Return a path for display: relative to a package's folder or to the working directory, else only the file's
    name.
    """
    if _PACKAGES.match(path):
        return _PACKAGES.sub("", path).replace(os.sep, "/")
    here = os.getcwd() + os.sep
    full = os.path.abspath(path)
    return os.path.relpath(full, here).replace(os.sep, "/") if full.startswith(here) else os.path.basename(path)


def source_in(text: str | None) -> SourceLine | None:
    """Return the innermost line in a printed stack that is not PyTorch's own; if all lines are PyTorch's, the innermost
    line.
    """
    frames = [f for f in _FRAME.findall(text or "") if not f[0].startswith("<")]
    if not frames:
        return None
    users = [f for f in frames if not _TORCH.search(f[0])] or frames
    return SourceLine(shown(users[-1][0]), int(users[-1][1]))


def source_of(node: Any) -> SourceLine | None:
    """Return the user's line for a node."""
    return source_in(node.meta.get("stack_trace"))


def guarded_at(guard: Any) -> str | None:
    """Return the user's line at which the export added a guard; None if the line is PyTorch's own."""
    place = getattr(guard, "sloc", None)
    frame: Any = getattr(place, "maybe_user_loc", None) or getattr(place, "framework_loc", None)
    own = frame is None or not frame.filename or _TORCH.search(frame.filename)
    return None if own else f"{shown(frame.filename)}:{frame.lineno}"


def scope_of(node: Any) -> str:
    """Return the path of a node's module: "transformer.h.0.attn"."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"^L\['self'\]\.?|^L__self__\.?", "", path)
    return path[:400]


def raised_at(error: BaseException) -> SourceLine | None:
    """Return the last line that an exception passed through, except lines of torch and of this project."""
    own = os.path.dirname(os.path.abspath(__file__)) + os.sep
    trace: TracebackType | None = error.__traceback__
    found = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not _TORCH.search(name) and not name.startswith(own):
            found = SourceLine(shown(name), trace.tb_lineno)
        trace = trace.tb_next
    return found


_CALL = re.compile(r"[\\/]torch[\\/]_ops\.py$")


def within_operator(error: BaseException) -> bool:
    """Return True if an exception was raised while PyTorch computed an operator's shape, not in the module's own
    code.
    """
    trace: TracebackType | None = error.__traceback__
    found = False
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        found = _CALL.search(name) is not None or (found and _TORCH.search(name) is not None)
        trace = trace.tb_next
    return found
