"""`treadle.load`: load a model for tasks. `treadle.load_artifact` loads a compiled one.

treadle.load("folder").classify("I like it.").label
treadle.load("smollm2").generate("The capital of France is")
"""

from __future__ import annotations

import os
from typing import Any

from treadle.artifacts import is_artifact
from treadle.files.contained_files import PathLike
from treadle.ir.errors import UsageError
from treadle.program.options import describe_options
from treadle.program.places import GGUF_SUFFIX, is_fetched
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.tasks.loaded import LoadedModel


def load(model: PathLike | ModelSource, **options: Any) -> LoadedModel:
    """Load a checkpoint folder with its tokenizer, a GGUF file, or a fetched model's name. Return an object whose
    methods are the model's tasks: classify, answer, translate, ...

    OPTIONS
    config    configuration of the model, which overrides the checkpoint's

    The model is compiled when its first task runs. Raises UsageError if there is no such model, for an artifact, and
    for an option that only artifacts have.
    """
    name = model.label if isinstance(model, ModelSource) else os.fspath(model)
    if is_artifact(name) and os.path.exists(name):
        raise UsageError(
            "an artifact is one compiled function, not a model for tasks",
            received=name,
            hint=f"treadle.load_artifact({name!r})",
        )
    if "check" in options:
        what = "a model that is loaded for tasks does not accept check"
        raise UsageError(what, received=name, hint=f"treadle.load_artifact({name!r}, check=False)")
    program = Program.of(model if isinstance(model, ModelSource) else name, **options)
    if isinstance(model, ModelSource) or not is_fetched(name):  # a fetched model is looked up at its first task
        place = program.source.place
        if not place.is_dir() and place.suffix != GGUF_SUFFIX:
            what = "a model for tasks is a folder or a GGUF file"
            raise UsageError(what, received=name, hint=f"treadle.compile({name!r})")
    return LoadedModel(program)


describe_options(load, "load")
