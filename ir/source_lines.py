"""Source lines of the user: the innermost frame on the stack that is not part of the compiler."""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType, TracebackType

import numpy as np


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the user's code: the file to print (relative if possible) and the line number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The folder of models is missing here, since models are treated like a user's code.
_PARTS = ("files", "ir", "frontends", "passes", "backends", "runtime", "treadle")
_COMPILER = tuple(os.path.join(_ROOT, part) + os.sep for part in _PARTS)
_INSTALLED = os.path.exists(os.path.join(_ROOT, "__init__.py"))
"""True if the package is installed: then the folders of `treadle/` are next to the other packages, which a checkout has
at its top level.
"""
_MODELS = os.path.join(_ROOT, "models") + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_NUMPY = os.path.dirname(np.__file__) + os.sep
_CALLED = tuple(
    f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("torch", "jax", "scipy", "einops", "pandas")
)
"""Parts of the paths of libraries that a model may call by mistake with its tensors. NumPy's path is known."""


class _CompilerFiles(dict[str, bool]):
    """A dictionary from file names to booleans: True for files of the compiler, Python, NumPy and libraries like it.
    Frames of such files are between the user's line and the call in the compiler.

    Missing entries are computed on lookup. The dictionary saves time, since the search for an op's line passes about
    ten frames of such files.
    """

    def __missing__(self, filename: str) -> bool:
        path = os.path.abspath(filename)
        known = path.startswith(_COMPILER) or filename.startswith("<frozen ")
        known = known or (_INSTALLED and path.startswith(_ROOT + os.sep) and not path.startswith(_MODELS))
        known = known or path.startswith(_NUMPY) or any(part in path for part in _CALLED)
        self[filename] = known or (path.startswith(_LIBRARY) and "site-packages" not in path)
        return self[filename]


_is_compiler = _CompilerFiles()


def _is_users(code: CodeType) -> bool:
    filename = code.co_filename
    return not _is_compiler[filename] and (
        filename != "<string>" or code.co_name != "__init__"
    )  # not the __init__ that a dataclass generates


@lru_cache(maxsize=4096)
def _source(filename: str, line: int) -> SourceLine:
    """Return a source line with the path relative to the compiler's own folder or to the working directory, else the
    bare file name: text generated from a graph should not contain a machine's folders.
    """
    path = os.path.abspath(filename)
    for base in (_ROOT, os.getcwd()):
        if path.startswith(base + os.sep):
            return SourceLine(os.path.relpath(path, base).replace(os.sep, "/"), line)
    return SourceLine(os.path.basename(path), line)


def raising_line(error: BaseException) -> SourceLine | None:
    """Return the user's last line that an exception passed through, or None if it passed through none."""
    trace, found = error.__traceback__, None
    while trace is not None:
        if _is_users(trace.tb_frame.f_code):
            found = _source(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def user_line(*, beyond: int = 0) -> SourceLine | None:
    """Return the user's line that called this, or None if no frame of the user is on the stack.

    beyond  number of frames, from the caller on, known to be the compiler's: checking each takes time
    """
    frame = _user_frame(sys._getframe(beyond + 1))
    return None if frame is None else _source(frame.f_code.co_filename, frame.f_lineno)


def calling_line() -> SourceLine | None:
    """Return the line that called the caller of this, or None if it is not the user's."""
    frame = sys._getframe(2)
    return _source(frame.f_code.co_filename, frame.f_lineno) if _user_frame(frame) is frame else None


def user_call(trace: TracebackType | None = None) -> ast.Call | None:
    """Return the call that the user's line makes, or whose function it looks up. None if the line calls nothing, or if
    its text cannot be read.

    trace  where the user's line raised an error, if its frame is no longer on the stack
    """
    frame = _user_frame(sys._getframe(1)) if trace is None else trace.tb_frame
    if frame is None:
        return None
    at = list(frame.f_code.co_positions())[(frame.f_lasti if trace is None else trace.tb_lasti) // 2]
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except (SyntaxError, ValueError):
        return None
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return next((node for node in calls if at in (*_positions(node, node.func), *_positions(node.func))), None)


def _positions(node: ast.expr, function: ast.expr | None = None) -> Iterator[tuple[int | None, ...]]:
    """Yield the positions that Python's instructions may have for an expression: the line and the last line, then the
    columns. A method of a call over several lines begins at its name.
    """
    yield node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
    function = function or node
    if isinstance(function, ast.Attribute) and function.end_col_offset is not None:
        start = function.end_col_offset - len(function.attr)
        yield function.end_lineno, node.end_lineno, start, node.end_col_offset


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of the user, from this frame on."""
    while frame is not None:
        code = frame.f_code
        if not _is_compiler[code.co_filename] and _is_users(code):  # tested first, since most frames are the compiler's
            return frame
        frame = frame.f_back
    return None
