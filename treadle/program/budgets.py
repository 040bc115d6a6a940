"""The memory budget of a run, and the sizes of symbolic axes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph

if TYPE_CHECKING:
    from treadle.passes.budget.fitted_pipeline import MemoryLimit
    from treadle.passes.stepping.derivation import DerivedStep

DEFAULT_SIZE = 128
"""Default size of a symbolic axis, such as a row of 128 tokens. A leading axis (the batch) has size 1."""


BYTE_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(memory: int | str | None, *, keyword: str = "memory", flag: str = "--memory") -> int | None:
    """Parse `300MB`, `1.5 GiB`, or a number of bytes. Raises UsageError for anything else, and for less than one.

    keyword, flag  the names of the option in Python and on the command line, for the error
    """
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
            near = next((u for u in BYTE_UNITS if u.lower() in (match[2].lower(), f"{match[2]}b".lower())), "MB")
            asked = f"{match[1]}{near}"
    if found < 1:
        units = ", ".join(BYTE_UNITS)
        raise UsageError(
            f"{keyword} must be a number of bytes",
            received=printable(repr(memory))[:80],
            hint=Hint(f'{keyword}="{asked}"; units are {units}', f"{flag} {asked}; units are {units}"),
        )
    return found


def budget_of(memory: int | str | None, sizes: Mapping[str, int] | None, graph: Graph) -> MemoryLimit | None:
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
    from treadle.passes.budget.fitted_pipeline import MemoryLimit

    return MemoryLimit(most, choose_sizes(graph, sizes or {}))


def choose_sizes(graph: Graph, asked: Mapping[str, int]) -> dict[str, int]:
    """Return a size for every symbol: the requested size, or else 1 for a leading axis of the inputs and 128 for other
    axes, clipped to the symbol's bounds.

    Raises UsageError for a symbol that the graph does not have, and for a requested size outside its bounds.
    """
    if not isinstance(asked, Mapping):
        raise UsageError("sizes must be a mapping", received=printable(repr(asked))[:80], hint=_example(graph))
    given: Mapping[Any, Any] = asked
    for named, size in given.items():
        if not isinstance(named, str) or not isinstance(size, int | np.integer) or isinstance(size, bool):
            shown = printable(f"{named!r}: {size!r}")[:80]
            raise UsageError("a size must be an integer", received=shown, hint=_example(graph))
    unknown = [name for name in asked if name not in graph.symbols]
    if unknown:
        raise UsageError(
            f"{graph.name} has no symbolic axis {', '.join(map(printable, unknown))}",
            hint="one of " + ", ".join(graph.symbols) if graph.symbols else _FIXED,
        )
    leading = {v.type.shape[0].as_symbol for v in graph.main.inputs if v.type.rank}
    sizes = {}
    for name, bounds in graph.symbols.items():
        size = asked.get(name, 1 if name in leading else DEFAULT_SIZE)
        if name not in asked:
            size = max(bounds.lower, size if bounds.upper is None else min(size, bounds.upper))
        if size not in bounds:
            hint = f"{'1 <= ' if size < 1 == bounds.lower else ''}{bounds.around(name)}"
            raise UsageError(f"the size of {name} cannot be {size}", within=graph.name, hint=hint)
        sizes[name] = size
    return sizes


_FIXED = "no sizes: all axes have fixed sizes"


def _example(graph: Graph) -> str:
    """Return sizes of the graph's symbols as arguments, for the hint of an error."""
    sizes = choose_sizes(graph, {})
    return f"sizes={sizes}, or memory({', '.join(f'{n}={size}' for n, size in sizes.items())})" if sizes else _FIXED


def step_sizes(derived: DerivedStep, rows: int, past: int) -> dict[str, int]:
    """Return the sizes of the symbols of a decoding step: one token for each row, and caches that hold it and `past`
    tokens. Other axes, such as those of an encoder's input, have size `past`.
    """
    graph = derived.graph
    of_states = {symbol for state in graph.states.values() for size in state.type.shape for symbol in size.symbols}
    sizes = {}
    for name, bounds in graph.symbols.items():
        length = past + (name in of_states and name not in derived.memories)
        if name in derived.memories:
            length = bounds.upper or past
        if name in derived.windows:
            length = min(length, derived.windows[name] + 1)
        sizes[name] = length if bounds.upper is None else min(length, bounds.upper)
    tokens = next(value for value in graph.functions["step"].arguments if value.name == derived.tokens[0])
    batch = [state.type.shape[0] for state in graph.states.values()] + [tokens.type.shape[0]]
    sizes |= {size.as_symbol: rows for size in batch if size.as_symbol is not None}
    sizes[derived.axis] = 1
    return sizes
