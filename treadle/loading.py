"""`treadle.load`: load a model for tasks. `treadle.load_artifact` loads a compiled one.

treadle.load("folder").classify("I like it.").label
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

from treadle.artifacts import is_artifact, load_artifact
from treadle.files.contained_files import PathLike
from treadle.ir.errors import UsageError
from treadle.ir.target import Target
from treadle.program.places import GGUF_SUFFIX, is_fetched
from treadle.program.source import ModelSource
from treadle.tasks.loaded import LoadedModel
from treadle.tasks.options import ModelOptions


def load(
    model: PathLike | ModelSource,
    *,
    backend: str = "numpy",
    target: str | Target = "cpu",
    limits: Mapping[str, int] | None = None,
    widen: str | Iterable[str] = (),
    dtype: str | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    **config: Any,
) -> LoadedModel:
    """Load a checkpoint folder with its tokenizer, a GGUF file, or a fetched model's name. The result classifies,
    answers, translates, ...

    limits  limits on the files
    cache   the dtype of keys and values, as in sessions
    config  configuration that overrides the folder's; other options are those of `compile`

    A model is compiled when its first task runs. Raises UsageError if there is no such model, for an artifact, and for
    an option of artifacts.
    """
    named = model if isinstance(model, ModelSource) else os.fspath(model)
    name = str(named)
    if is_artifact(name) and os.path.exists(name):
        raise UsageError(
            "an artifact is one compiled function, not a model for tasks",
            received=name,
            hint=f"treadle.load_artifact({name!r})",
        )
    given = [option for option in config if option in inspect.signature(load_artifact).parameters]
    if given:
        what = f"a model that is loaded for tasks does not accept {given[0]}"
        raise UsageError(what, received=name, hint=f"treadle.compile({name!r}, ...)")
    if isinstance(model, ModelSource) or not is_fetched(name):  # a fetched model is found at its first task
        place = ModelSource.open(named, limits=limits).place
        if not place.is_dir() and place.suffix != GGUF_SUFFIX:
            hint = f"treadle.compile({name!r})"
            raise UsageError("a model for tasks is a folder or a GGUF file", received=name, hint=hint)
    widen = widen if isinstance(widen, str) else tuple(widen)
    return LoadedModel(ModelOptions(named, backend, target, dtype, quantize, limits, cache, config, widen))
