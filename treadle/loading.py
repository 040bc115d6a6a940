"""`treadle.load`: load an artifact, or a model for tasks.

treadle.load("gpt2.treadle")(tokens=ids)
treadle.load("folder").classify("I like it.").label
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from treadle import artifacts
from treadle.files.contained_files import PathLike
from treadle.ir.errors import UsageError
from treadle.ir.target import Target
from treadle.resolving import GGUF_SUFFIX, find_folder
from treadle.tasks.loaded import LoadedModel
from treadle.tasks.options import ModelOptions
from treadle.wheels.pinned_models import PINNED


def load(
    model: PathLike,
    *,
    backend: str | None = None,
    target: str | Target | None = None,
    limits: artifacts.ArtifactLimits | Mapping[str, int] | None = None,
    check: bool = True,
    widen: str | Iterable[str] = (),
    memory: int | str | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: Sequence[str] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    **config: Any,
) -> Any:
    """Load a `.treadle` file as the saved `treadle.Compiled`. For a checkpoint folder with its tokenizer, a GGUF file,
    or a fetched model's name, return a `treadle.tasks.loaded.LoadedModel`, which classifies, answers, translates,
    ...

    backend, target         where to run; for an artifact, in place of those that it was compiled for
    limits                  limits on the file
    widen                   as in `compile`
    check, memory, sizes, donate    for an artifact; see `treadle.artifacts.load`
    dtype, quantize, cache  for a model, as in `compile` and sessions
    config                  for a model: configuration that overrides the folder's

    A model is compiled when its first task runs. Raises the errors of `treadle.artifacts.load`, and UsageError for an
    option of the other kind.
    """
    name = os.fspath(model)
    is_model = os.path.isdir(name) or Path(name).suffix == GGUF_SUFFIX or (name in PINNED and not os.path.exists(name))
    if not is_model and not os.path.exists(name) and Path(name).suffix != ".treadle":
        find_folder(name)  # which raises an error that lists the known names
    artifact: dict[str, Any] = {"memory": memory, "sizes": sizes, "donate": donate}
    of_model: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "cache": cache, **config}
    wrong = artifact if is_model else of_model
    given = [option for option, value in wrong.items() if value is not None]
    if not check and is_model:
        given.append("check")
    if given:
        kind = "a model that is loaded for tasks" if is_model else "an artifact, which is already compiled,"
        raise UsageError(f"{kind} does not accept {given[0]}", received=name, hint=f"treadle.compile({name!r}, ...)")
    if not is_model:
        planned: dict[str, Any] = {"memory": memory, "sizes": sizes, "donate": donate or ()}
        return artifacts.load(model, backend=backend, target=target, limits=limits, check=check, widen=widen, **planned)
    if isinstance(limits, artifacts.ArtifactLimits):
        raise UsageError(
            "limits of a model must be a mapping by name", received="ArtifactLimits", hint='{"tensors": 1_000_000}'
        )
    how: dict[str, Any] = {"backend": backend, "target": target, "limits": limits, "widen": widen}
    return LoadedModel(ModelOptions.of(name, **how, **of_model))
