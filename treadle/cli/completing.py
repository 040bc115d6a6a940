"""Shell completion of values: models, models that can be fetched, backends, targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from glob import escape, glob
from os.path import isdir


def complete_model(incomplete: str) -> list[str]:
    """Return the names of the zoo and of fetched models, and paths."""
    from treadle.fetching import fetched_model
    from treadle.models.registry import family_names
    from treadle.wheels.pinned_models import PINNED

    names = [*family_names(), *(name for name in PINNED if fetched_model(name) is not None)]
    return [*_beginning(names, incomplete), *_paths(incomplete)]


def complete_fetched(incomplete: str) -> list[str]:
    """Return the names of models that can be fetched."""
    from treadle.wheels.pinned_models import PINNED

    return _beginning(PINNED, incomplete)


def complete_backend(incomplete: str) -> list[str]:
    """Return the names of backends, including those of other packages."""
    from treadle.backends.registry import backend_names

    return _beginning(["auto", *backend_names()], incomplete)


def complete_target(incomplete: str) -> list[str]:
    """Return the names of targets."""
    from treadle.ir.hardware import HARDWARE

    return _beginning(HARDWARE, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str) -> Iterator[str]:
    for path in sorted(glob(f"{escape(incomplete)}*")):
        if isdir(path):
            yield f"{path}/"
        elif path.endswith((".py", ".gguf", ".onnx", ".treadle")):
            yield path
