"""Parsers of command line option values: `--set layers=2`, `--sizes B=1,S=128`, `--input tokens=1,2,3`.

Values are JSON, or else plain words; nothing is evaluated as Python.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.backends.fitted_pipeline import Budget
from treadle.files.contained_files import read_regular
from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.npy_files import read_npy
from treadle.resolving import resolve

DEFAULT_SIZE = 128
"""Default size of a symbolic axis: a row of 128 tokens. A leading axis, the batch, has size 1."""

_INLINE_BYTES = 1 << 20
_TEXT_BYTES = 256 << 20  # limit on sentences to embed


def parse_config(
    assignments: Iterable[str], limits: Iterable[str] = (), *callees: Callable[..., Any]
) -> dict[str, Any]:
    """Parse `layers=2`, `act=t.relu`, `head=masked_lm`: JSON, a word of the DSL after `t.`, or else text.

    limits   limits on a file's contents; if there are any, they become the argument `limits`
    callees  the functions that get the result as `**config` before `resolve` does

    Raises UsageError, with the name as its `option`, for a name that is a parameter of one of these functions.
    """
    taken = {name for callee in (resolve, *callees) for name in inspect.signature(callee).parameters}
    config: dict[str, Any] = {}
    for name, text in (_assignment(each, "--set layers=2") for each in assignments):
        if name in taken:
            raise UsageError(f"--set {name}= is no option of a model", option=name)
        config[name] = _word(text[2:]) if re.fullmatch(r"t\.\w+", text) else _json_or_text(text)
    if allowed := parse_limits(limits):
        config["limits"] = allowed
    return config


def parse_limits(assignments: Iterable[str]) -> dict[str, int] | None:
    """Parse `nodes=400000`, a limit on a file's contents. Raises UsageError for anything but positive integers."""
    limits = {}
    for name, value in (_assignment(each, "--limit nodes=400000") for each in assignments):
        if not re.fullmatch(r"[1-9][0-9]{0,17}", value):
            raise UsageError(f"the limit {name} must be a positive integer", received=printable(value))
        limits[name] = int(value)
    return limits or None


def parse_sizes(text: str | None) -> dict[str, int]:
    """Parse `B=1,S=128`. Raises UsageError for anything but positive integers."""
    sizes = {}
    for part in (text or "").split(",") if text else []:
        name, value = _assignment(part, "--sizes B=1,S=128")
        if not re.fullmatch(r"[1-9][0-9]{0,11}", value):
            what = f"the size of {name} must be a positive integer"
            raise UsageError(what, received=printable(value), hint=f"--sizes {name}=8")
        sizes[name] = int(value)
    return sizes


def parse_axes(assignments: Iterable[str]) -> dict[str, str]:
    """Parse `heads=tp`, `batch=dp tp`: axes of a model, each with the mesh axes that split it."""
    return dict(_assignment(each, "--axis heads=tp") for each in assignments)


BYTE_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Units of bytes, by name."""


def parse_bytes(memory: int | str | None) -> int | None:
    """Parse `300MB`, `1.5 GiB`, or a number of bytes. Raises UsageError for anything else, and for less than one."""
    if memory is None:
        return None
    asked = "300MB"
    if isinstance(memory, int) and not isinstance(memory, bool):
        found = memory
    else:
        text = memory if isinstance(memory, str) else ""
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)\s*", text)
        unit = None if match is None else BYTE_UNITS.get(match[2] or "B")
        found = 0 if match is None or unit is None else int(float(match[1]) * unit)
        if match is not None and unit is None:
            near = next((u for u in BYTE_UNITS if u.lower() == match[2].lower()), "MB")
            asked = f"{match[1]}{near}"
    if found < 1:
        units = ", ".join(BYTE_UNITS)
        raise UsageError(
            "memory must be a number of bytes",
            received=printable(repr(memory))[:80],
            hint=Hint(f'memory="{asked}"; units are {units}', f"--memory {asked}; units are {units}"),
        )
    return found


def budget_of(memory: int | str | None, sizes: Mapping[str, int] | None, graph: Graph) -> Budget | None:
    """Return the memory budget of a run and the sizes it holds for, see `choose_sizes`. None if memory is None.

    Raises UsageError as `parse_bytes` and `choose_sizes` do, and for sizes without memory.
    """
    most = parse_bytes(memory)
    if most is None:
        if sizes:
            raise UsageError(
                "`sizes=` only applies together with `memory=`",
                received=", ".join(f"{name}={size}" for name, size in sizes.items()),
                hint=Hint('pass memory="300MB", or leave sizes out', "pass --memory 300MB, or leave --sizes out"),
            )
        return None
    return Budget(most, choose_sizes(graph, sizes or {}))


def choose_sizes(graph: Graph, asked: Mapping[str, int]) -> dict[str, int]:
    """Return a size for every symbol: the given one, else 1 for a leading axis of the inputs and 128 for others, in
    bounds.

    Raises UsageError for a symbol that the graph does not have, and for a size outside its bounds.
    """
    if not isinstance(asked, Mapping):
        raise UsageError(
            "sizes must be a mapping", received=printable(repr(asked))[:80], hint='sizes={"B": 8, "S": 128}'
        )
    given: Mapping[Any, Any] = asked
    for named, size in given.items():
        if not isinstance(named, str) or not isinstance(size, int | np.integer) or isinstance(size, bool):
            told = printable(f"{named!r}: {size!r}")[:80]
            raise UsageError("a size must be an integer", received=told, hint='sizes={"B": 8, "S": 128}')
    unknown = [name for name in asked if name not in graph.symbols]
    if unknown:
        raise UsageError(
            f"{graph.name} has no symbolic axis {', '.join(map(printable, unknown))}",
            hint="one of " + ", ".join(graph.symbols) if graph.symbols else "all of its sizes are fixed",
        )
    leading = {v.type.shape[0].as_symbol for v in graph.main.inputs if v.type.rank}
    sizes = {}
    for name, bounds in graph.symbols.items():
        size = asked.get(name, 1 if name in leading else DEFAULT_SIZE)
        if name not in asked:
            size = max(bounds.lower, size if bounds.upper is None else min(size, bounds.upper))
        if size not in bounds:
            raise UsageError(f"{name} cannot be {size}", within=graph.name, hint=bounds.around(name))
        sizes[name] = size
    return sizes


def parse_inputs(assignments: Sequence[str], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Parse `tokens=ids.npy`, `tokens=[[1, 2], [3, 4]]`, or `tokens=1,2,3`. The last form is one row: the array gets a
    leading axis of size 1 for each further axis of the input.

    ranks  the number of axes of each known input

    Raises UsageError for text in none of these forms, CheckpointError for a file that cannot be read.
    """
    inputs: dict[str, Any] = {}
    for name, text in (_assignment(each, "--input tokens=ids.npy") for each in assignments):
        if text.endswith(".npy"):
            inputs[name] = read_npy(text)
            continue
        leading = ranks.get(name, 1) - 1
        is_row = leading >= 0 and not text.startswith("[")
        value = _numbers(name, f"[{text}]" if is_row else text)
        for _ in range(leading if is_row else 0):
            value = [value]
        inputs[name] = value
    return inputs


def input_names(assignments: Iterable[str]) -> tuple[str, ...]:
    """Return the names to which values are assigned."""
    return tuple(_assignment(each, "--input tokens=ids.npy")[0] for each in assignments)


def _assignment(text: str, example: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition("="))
    if not name or not value:  # any name: an ONNX file may call an axis `?` and an input `input.1`
        raise UsageError("an option must be NAME=VALUE", received=printable(text) if text else "nothing", hint=example)
    return name, value


def _word(name: str) -> Any:
    import treadle.frontends.language as language

    try:
        return getattr(language, name)
    except TreadleError as error:
        error.source = None  # not a line of a file
        raise


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _numbers(name: str, text: str) -> Any:
    """Parse a number, or nested lists of numbers."""
    try:
        if len(text) > _INLINE_BYTES:
            raise ValueError(f"{len(text)} characters")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"input {name} is neither a .npy file nor numbers",
            received=f"{printable(text, 80)}: {error}",
            hint=f"{name}=ids.npy, {name}=1,2,3 or {name}=[[1,2],[3,4]]",
        ) from None
    return value


def read_sentences(given: Sequence[str], file: str | None, command: str = "embed minilm") -> list[str]:
    """Return sentences from the command line, or nonblank lines of a file or of standard input.

    command  the command that reads them, for the hint of an error

    Raises UsageError if there is no sentence, or if the text is too long or not UTF-8.
    """
    if given and file is not None:
        raise UsageError(
            "sentences were given both as arguments and in a file",
            received=f"{len(given)} and --file {file}",
            hint="use one of them",
        )
    if given:
        return list(given)
    if file is None and sys.stdin.isatty():
        raise UsageError("there is no sentence", hint=f'treadle {command} "A sentence."')
    text, shown = _read(file)
    found = [line for line in map(str.strip, text.splitlines()) if line]
    if not found:
        raise UsageError("there is no sentence", received="no line of text", within=shown)
    return found


def read_text(file: str) -> str:
    """Return the text of a file; `-` is standard input. Raises UsageError if it is too long or not UTF-8."""
    return _read(file)[0]


def _read(file: str | None) -> tuple[str, str]:
    """Return the text of a file, or of standard input for None and `-`, and its name for errors."""
    piped = file in (None, "-")
    shown = "standard input" if piped else str(file)
    data = sys.stdin.buffer.read(_TEXT_BYTES + 1) if piped else read_regular(str(file), _TEXT_BYTES)
    if len(data) > _TEXT_BYTES:
        raise UsageError("the text is longer than the limit", received=f"limit {_TEXT_BYTES} bytes", within=shown)
    try:
        return data.decode("utf-8"), shown
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", received=f"byte {error.start}", within=shown) from None
