"""Find the form of the model that MODEL names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote

from treadle.files.shown_names import printable
from treadle.frontends.declaration_files import load_declaration, python_file
from treadle.frontends.declarations import Model
from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.models.registry import family_names, find_family
from treadle.program.forms.artifact_form import ArtifactForm
from treadle.program.forms.declaration_form import DeclarationForm
from treadle.program.forms.folder_form import FolderForm
from treadle.program.forms.gguf_form import GGUFForm
from treadle.program.forms.graph_form import GraphForm
from treadle.program.forms.model_form import Limits, ModelForm
from treadle.program.forms.onnx_form import OnnxForm
from treadle.program.places import ARTIFACT_SUFFIX, GGUF_SUFFIX, ONNX_SUFFIX, find_place, refuse_object

Unopened = Model | Graph | TorchModel | str | Path
"""The argument MODEL before it is opened."""


def compiling_with_weights(model: str, file: str, folder: str = "FOLDER") -> str:
    """Return the command that writes a declaration and its weights to one file, which then is a model."""
    return f"treadle compile {quote(printable(model))} --weights {quote(printable(folder))} -o {file}"


def find_form(model: Unopened, weights: str | Path | None, limits: Limits) -> ModelForm:
    """Find the form of the model that MODEL names: see `ModelSource.open`, whose arguments these are.

    Raises UsageError if there is no such model, and for weights or limits that do not apply to it.
    """
    text = str(model) if isinstance(model, str | Path) else ""
    path, colon, function = text.rpartition(":")
    in_python = bool(colon) and path.endswith(".py")
    declared = isinstance(model, Model) or in_python or (text in family_names() and not Path(text).exists())
    if limits is not None and weights is None and (declared or not text):
        raise UsageError(
            "limits apply to a model that is read from a file",
            received=text or f"a {type(model).__name__}",
            hint="leave it out",
        )
    if isinstance(model, Graph | TorchModel):
        return GraphForm(model, weights, limits)
    if not isinstance(model, Model | str | Path):
        raise refuse_object(model)
    if weights is not None and not declared:
        raise UsageError(
            "only a declaration or a graph takes its weights from a folder",
            received=text,
            hint=Hint(
                "file.py:function, or a family of the zoo; or leave weights= out: this model has weights",
                "file.py:function, or a family of the zoo; or leave --weights out: this model has weights",
            ),
        )
    if isinstance(model, Model):
        return DeclarationForm(model.name, model, python_file(model), weights, limits)
    if in_python:
        loaded = load_declaration(Path(path), function)
        return DeclarationForm(text, loaded, Path(path), weights, limits)
    if declared:
        return DeclarationForm(text, find_family(text).model, None, weights, limits)
    place = find_place(text)
    return _FILES.get("" if place.is_dir() else place.suffix, FolderForm)(text, place, limits)


_FILES: Mapping[str, Callable[[str, Path, Limits], ModelForm]] = {
    ARTIFACT_SUFFIX: ArtifactForm,
    GGUF_SUFFIX: GGUFForm,
    ONNX_SUFFIX: OnnxForm,
}
"""The forms of files by suffix."""
