"""The choice of a backend: the one that the caller names, or for "auto" the fastest installed one that accepts a graph.

    chosen = choose_backend("auto", graph, Target("cpu"))
    chosen.name, chosen.why      # "numpy", "backend numpy, the fastest installed one that accepts bert (tvm: TVM ..."

A backend accepts a graph if `refuse` raises nothing. That needs no kernels and no weights, and a package that is not
installed is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.backends.protocol import Backend
from treadle.backends.refusals import KINDS, unavailable
from treadle.backends.registry import backend_names, find_backend
from treadle.backends.staged import StagedBackend
from treadle.files.shown_names import printable
from treadle.ir.errors import BackendError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.progress import announce

AUTO = "auto"
FASTEST_FIRST = ("tvm", "torch", "numpy")
"""The backends that "auto" considers, in their order. The speed of other packages' backends is unknown."""

_ON_NVIDIA = ("torch", "tvm", "numpy")
"""Their order for NVIDIA GPUs: PyTorch calls NVIDIA's libraries, which use the tensor cores; our kernels do not yet."""


@dataclass(frozen=True)
class BackendChoice:
    """A backend, its name, and the reason for its choice: one line, empty if the caller named it."""

    name: str
    backend: Backend
    why: str = ""


def check_backend(name: str) -> str:
    """Return the name of the requested backend: for "auto" the one that TREADLE_BACKEND names, if it is set.

    Raises BackendError if there is no such backend.
    """
    named = (os.environ.get("TREADLE_BACKEND") or AUTO) if name == AUTO else name
    if named == AUTO:
        return AUTO
    try:
        find_backend(named)
    except BackendError as error:
        if name == AUTO:
            error.what = f"TREADLE_BACKEND: {error.what}"
            error.hint = f"TREADLE_BACKEND={' or '.join(backend_names())}, or unset it"
        raise
    return named


def fastest_installed() -> str:
    """Return the name of the fastest installed backend, or the one that TREADLE_BACKEND names."""
    named = check_backend(AUTO)
    return named if named != AUTO else next(name for name in FASTEST_FIRST if _is_installed(name))


def choose_backend(
    name: str, graph: Graph, target: Target, *, before: Sequence[str] = (), torch_compile: bool = False
) -> BackendChoice:
    """Return the backend of this name; for "auto" the one that TREADLE_BACKEND names, or else the fastest installed one
    that accepts the graph on the target.

    before  backends that "auto" prefers to others
    torch_compile  True for the torch backend with torch.compile; "auto" then is "torch"

    For "auto", the reason is shown on standard error, if that is a terminal. Raises BackendError if there is no such
    backend; for "auto", if no backend accepts the graph, with the reason of each; UsageError for torch_compile
    with another backend.
    """
    if torch_compile:
        return _compiling(check_backend(name), before)
    named = check_backend(name)
    if named != AUTO and (name != AUTO or not before):
        return BackendChoice(named, find_backend(named))
    preferred = [each for each in before if each != AUTO]
    refusals: dict[str, BackendError] = {}
    ordered = _ON_NVIDIA if target.kind == "cuda" else FASTEST_FIRST
    for each in dict.fromkeys([*preferred, *(ordered if named == AUTO else [named])]):
        try:
            backend = _accepting(each, graph, target)
        except BackendError as error:
            refusals[each] = error
            continue
        if each in preferred or named != AUTO:
            return BackendChoice(each, backend)
        why = f"backend {each}, the fastest installed one that accepts {printable(graph.name)}"
        if refusals:
            why += f" ({'; '.join(_reason(other, error) for other, error in refusals.items())})"
        if isinstance(backend, StagedBackend) and backend.first_run:
            why += f"; {backend.first_run}"
        announce(why)
        return BackendChoice(each, backend, why)
    fitting = [each for each in refusals if target.kind in KINDS.get(each, {target.kind})] or list(refusals)
    first = refusals[next((each for each in fitting if _is_installed(each)), fitting[0])]
    others = [error for each, error in refusals.items() if error is not first and _is_installed(each)]
    if not others:
        raise first
    raise BackendError(
        f"no installed backend accepts {printable(graph.name)} on {target}",
        received="\n".join(_reason(each, error) for each, error in refusals.items()),
        source=first.source,
        hint=first.hint,
    )


def _compiling(name: str, before: Sequence[str]) -> BackendChoice:
    """Return the torch backend with torch.compile. Raises UsageError for another backend."""
    name = "torch" if name == AUTO and not before else name
    backend = find_backend(name)
    variant = getattr(backend, "with_torch_compile", None)
    if variant is None:
        raise UsageError(
            "torch_compile applies to backend torch",
            received=f"backend {name}",
            hint=Hint('backend="torch"', "--backend torch"),
        )
    return BackendChoice(name, variant())


def _accepting(name: str, graph: Graph, target: Target) -> Backend:
    """Return a backend. Raises BackendError if it is not installed, or does not accept the graph."""
    backend = find_backend(name)
    if isinstance(backend, StagedBackend):
        backend.refuse(graph, target)
    elif (missing := backend.available()) is not None:
        raise unavailable(name, missing, target)
    return backend


def _reason(name: str, error: BackendError) -> str:
    """Return the first reason of a refusal in one line."""
    received = error.received.splitlines()[0] if error.received else ""
    if received and not _is_installed(name):
        return received
    return f"{error.what}: {received}" if received else error.what


def _is_installed(name: str) -> bool:
    try:
        return find_backend(name).available() is None
    except BackendError:
        return False
