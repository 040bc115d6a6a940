"""`treadle.load`: load a model for tasks. `treadle.load_artifact` loads a compiled one.

treadle.load("folder").classify("I like it.").label
treadle.load("smollm2").generate("The capital of France is")
treadle.load("models.py:my_gpt", weights="trained").generate("Once")
"""

from __future__ import annotations

import os
from typing import Any

from treadle.artifacts.reading import is_artifact, open_artifact
from treadle.artifacts.tasks import takes_text, tasks_of
from treadle.files.contained_files import PathLike
from treadle.ir.errors import UsageError
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.program.entry_signatures import describe_options
from treadle.program.forms.onnx_form import OnnxForm
from treadle.program.places import is_fetched
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.tasks.loaded import LoadedModel


@with_checked_call()
def load(model: PathLike | AnyModel, **options: Any) -> LoadedModel:
    """Load a checkpoint folder with its tokenizer, a GGUF file, a fetched model's name, or a declaration with
    `weights`: "file.py:function", or the function. Return an object whose methods are the model's tasks: classify,
    answer, ... A graph with `weights`, a module from `from_torch` and an ONNX file, with `tokenizer`, continue text.

    OPTIONS
    config    configuration of the model, which overrides the checkpoint's

    An artifact of a model that continues or embeds text is loaded, too, for these tasks. The model is compiled when its
    first task runs. Raises UsageError if there is no such model, for another artifact, and for an option that only
    artifacts have; BackendError for an unknown backend; and the errors of `compile` for a value of an option that no
    model accepts.
    """
    path = str(os.fspath(model)) if isinstance(model, str | os.PathLike) else None
    program = Program.of(model if path is None else path, **options)  # type: ignore[arg-type]
    name = program.source.label if path is None else path
    program.options.check_values()
    if "check" in options:
        what = "a model that is loaded for tasks does not accept check"
        hint = f"treadle.load_artifact({name!r}, check=False)" if is_artifact(name) else "leave it out"
        raise UsageError(what, received=name, hint=hint)
    if is_artifact(name):
        program.options.refuse_for_artifact(name, also=("cache", "tokenizer"))
    if program.options.doubtful:  # a misspelled option is reported here, not by the first task
        program = program.declared(deferred=True)
    if is_artifact(name) and os.path.exists(name) and not program.source.has_tokenizer:
        held = open_artifact(name, limits=program.options.limits, check=False)
        if not tasks_of(held.optimized.graph, held.files):
            if takes_text(held.optimized.graph):
                program.source.tokenizer()  # raises
            raise UsageError(
                "an artifact is one compiled function, not a model for tasks",
                received=name,
                hint=f"treadle.load_artifact({name!r}); or, for a model that continues text, tokenizer=FOLDER",
            )
    if path is None or not is_fetched(path):  # a fetched model is looked up at its first task
        source = program.source
        if not source.has_weights or (source.path is None and source.text_source is source):
            raise source.without_weights()
        if isinstance(source.form, OnnxForm) and source.text_source is source and not source.form.has_tokenizer:
            raise source.form.without_tokenizer()
    return LoadedModel(program)


describe_options(load, "load")
