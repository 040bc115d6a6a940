"""A further model of a command: the draft of a model that generates, or the teacher of a model in training.

It is opened next to MODEL, whose weights, tokenizer and configuration the other options name. So one name stands for
all of these: a folder with a checkpoint, a GGUF file, or an artifact.
"""

from __future__ import annotations

from treadle.files.shown_names import printable
from treadle.frontends.vocabularies.folder_vocabulary import FILE
from treadle.ir.errors import Hint, UsageError
from treadle.program.forms.finding import compiling_with_weights
from treadle.program.source import ModelSource
from treadle.program.trained_folders import DeclarationReference


def open_further(name: str, option: str) -> ModelSource:
    """Find the model of an option, "draft" or "teacher".

    Raises UsageError for a declaration without weights, and for weights of a declaration in Python, with the command
    that writes both to one file; for a model without a tokenizer; and as `ModelSource.open` does.
    """
    source, file = ModelSource.open(name), f"{option}.treadle"
    found = compiled_apart(source, name, file)
    if found is None:
        if not source.has_tokenizer:
            raise UsageError(
                f"a {option} is a model with its tokenizer, which --tokenizer does not name",
                received=f"--{option} {printable(name)}",
                hint=f"a folder with {FILE}, or an artifact that was compiled from such a folder",
            )
        return source
    received, command = found
    raise UsageError(
        f"a {option} is a model with its weights, which --weights does not name",
        received=f"--{option} {printable(received)}",
        hint=Hint(f'{option}="{file}", which `{command}` writes', f"--{option} {file}, which `{command}` writes"),
    )


def compiled_apart(source: ModelSource, name: str, file: str, folder: str = "FOLDER") -> tuple[str, str] | None:
    """Return a description of a declaration, and the command that writes it with its weights to `file`; None for a
    model that one name stands for.

    folder  the folder of its weights, if `name` is the declaration
    """
    if source.kind not in ("declaration", "graph"):
        return None
    stored = None if source.path is None else DeclarationReference.read(source.folder)
    if stored is None:
        return f"{name}, a {source.kind}", compiling_with_weights(name, file, folder)
    if stored.is_family:
        return None
    if stored.file is None:
        command = f"t.compile({stored.function}, weights={name!r}).save({file!r})"
    else:
        command = compiling_with_weights(stored.label, file, name)
    return f"{name}, weights of {stored.label}", command
