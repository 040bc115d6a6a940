"""The registry of backends: our own backends, and backends that installed packages register as entry points.

    [project.entry-points."treadle.backends"]
    mine = "my_package.backend:MyBackend"

An entry point names a class (or function) that is called without arguments and returns a `Backend`.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points

from treadle.backends.protocol import Backend
from treadle.ir.errors import BackendError, Hint
from treadle.ir.hardware import HARDWARE

GROUP = "treadle.backends"
_OURS = {
    "numpy": ("treadle.backends.numpy.backend", "NumpyBackend"),
    "torch": ("treadle.backends.torch.backend", "TorchBackend"),
    "tvm": ("treadle.backends.tvm.backend", "TvmBackend"),
}


def backend_names() -> list[str]:
    """Return the names of all registered backends, available or not: ours first, then the others in alphabetical
    order.
    """
    return [*_OURS, *sorted(_theirs())]


def find_backend(name: str) -> Backend:
    """Import and return the backend of that name.

    Raises BackendError if there is no such backend (with similar names), or if a third party's backend cannot be
    loaded.
    """
    if name in _OURS:
        module, attribute = _OURS[name]
        made: Backend = getattr(importlib.import_module(module), attribute)()
        return made
    found = _theirs().get(name)
    if found is None:
        near = difflib.get_close_matches(name, backend_names(), n=1)
        others = ", ".join(backend_names())
        hint: str | Hint = (f"{near[0]}, or another of: " if near else "one of ") + others
        if name in (*HARDWARE, "gpu"):
            target = "cuda" if name == "gpu" else name
            hint = Hint(f'target="{target}"; backends are {others}', f"--target {target}; backends are {others}")
        raise BackendError(f"there is no backend {name!r}", hint=hint)
    return _load(found)


def _theirs() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in _OURS}


def _load(point: EntryPoint) -> Backend:
    package = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    within = f"entry point {point.name} = {point.value}{package}"
    try:
        found = point.load()
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        made = None if missing else found()
    except Exception as error:  # a third party's module may raise any exception when imported
        raise BackendError(
            f"backend {point.name!r} cannot be loaded",
            received=f"{type(error).__name__}: {error}",
            within=within,
            hint="repair or uninstall the package that registers it",
        ) from error
    if missing:
        raise BackendError(
            f"backend {point.name!r} is not complete",
            received=f"a class without {' and '.join(missing)}",
            within=within,
            hint="name, pipeline(target), and emit(graph, target, weights), as treadle.backends.staged says",
        )
    if not isinstance(made, Backend):
        raise BackendError(
            f"backend {point.name!r} is not a backend",
            received=type(made).__name__,
            within=within,
            hint="it needs name, available, supports and compile, "
            "or to be a treadle.backends.staged.StagedBackend with name, pipeline and emit",
        )
    return made
