"""The formats of files that Treadle writes, by the suffix of the name: the code and the command for each."""

from __future__ import annotations

import shlex
from pathlib import Path

from treadle.files.contained_files import PathLike
from treadle.files.shown_names import shown_path
from treadle.frontends.safetensors_file import PICKLE_SUFFIXES
from treadle.ir.errors import Hint, UsageError

OF_PROGRAMS = ("--backend", "--target", "--threads")
"""Options of a program for a device, which an ONNX file does not contain."""


def refuse_other_format(path: PathLike, what: str, *own: str, instead: str | None = None) -> None:
    """Raise UsageError for a name with the suffix of another format than `own`, with the code that writes that format.

    what     the content to write, for the error: "an artifact"
    instead  a hint in place of that code
    """
    suffix = Path(path).suffix.lower()
    hint = None if suffix in own else writing_hint(path, "MODEL")
    if hint is not None:
        raise UsageError(f"the name of {what} cannot end in {suffix}", received=shown_path(path), hint=instead or hint)


def writing_hint(path: PathLike, model: str, *, of: str = "compile") -> Hint | None:
    """Return the code that writes the compiled model `exe` in the format of the path's suffix, and the command for
    `model`; None for the suffix of no format.

    of  the command that got the path
    """
    file, suffix = shown_path(path), Path(path).suffix.lower()
    artifact = f"{file.removesuffix(Path(path).suffix)}.treadle"
    quoted, model = shlex.quote(file), shlex.quote(model)
    hint: Hint | None = None

    def in_place(code: str, command: str, *more: str) -> Hint:
        """Return the hint for another command in place of `of`, which keeps the options of the command line."""
        text = shlex.join(["treadle", command, *more])
        without = OF_PROGRAMS if (command, *more) == ("export",) else ()
        return Hint(code, f"{text} {model} -o {quoted}", replaces=of, words=(command, *more), without=without)

    def artifact_in_place(code: str, after: str = "") -> Hint:
        """Return the hint for an artifact in place of the file, which keeps the options of the command line."""
        if of == "compile":
            return Hint(code, artifact + after)
        text = f"treadle compile {model} -o {shlex.quote(artifact)}{after}"
        return Hint(code, text, replaces=of, words=("compile",), renamed=(file, artifact), after=after)

    if suffix == ".treadle" and not model.endswith(".treadle"):
        hint = in_place(f"exe.save({file!r})", "compile")
    elif suffix == ".onnx":
        code = f"from treadle.backends.onnx.exporter import export_onnx; export_onnx(exe.graph, exe.weights, {file!r})"
        hint = in_place(code, "export")
    elif suffix == ".gguf":
        export = f"`treadle export FOLDER --to gguf -o {quoted}`, for a model of the Llama family"
        hint = artifact_in_place(f"exe.save({artifact!r}); or {export}", f"; or {export}")
    elif suffix == ".safetensors":
        code = f"from treadle.training.weight_files import write_weights; write_weights({file!r}, exe.weights)"
        hint = artifact_in_place(code)
    elif suffix in (".html", ".htm"):
        hint = in_place(f"exe.report().save({file!r})", "report")
    elif suffix in (".dot", ".gv"):
        hint = in_place(f"exe.save({artifact!r}); `treadle export` draws", "export", "--to", "dot")
    elif suffix == ".json":
        hint = in_place(f"exe.save({artifact!r}); `treadle export` writes JSON", "export", "--to", "json")
    elif suffix in PICKLE_SUFFIXES:
        hint = artifact_in_place(f"exe.save({artifact!r}): no pickle is ever written")
    return hint
