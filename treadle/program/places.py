"""Find the file or the folder that MODEL names."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from treadle.fetching import fetched_model
from treadle.files.nearest_names import argument_hint, nearest_path, nearest_path_hint
from treadle.files.shown_names import shown_path
from treadle.frontends.declaration_files import declared_models
from treadle.frontends.model_folder import CONFIG
from treadle.frontends.safetensors_file import refuse_pickle
from treadle.hub_models import cached_hub_model, hub_name_in, is_hub_name
from treadle.ir.errors import Hint, UsageError
from treadle.models.registry import family_names, family_reading, find_family
from treadle.wheels.pinned_models import PINNED

GGUF_SUFFIX = ".gguf"
ONNX_SUFFIX = ".onnx"
ARTIFACT_SUFFIX = ".treadle"
MODEL_SUFFIXES = (GGUF_SUFFIX, ONNX_SUFFIX, ARTIFACT_SUFFIX)
"""The endings of files that are models."""


_MOST_FILES = 50
"""The number of Python files in the working directory in which a declaration is looked up."""


def is_fetched(name: str) -> bool:
    """Return True if MODEL is the name of a model to fetch, not a path."""
    return name in PINNED and not Path(name).exists()


class NoModelError(UsageError):
    """The error for a name that no model has and that is not similar to the name of a file, or for a file of another
    kind.

    name  the name, as the argument MODEL
    """

    def __init__(self, name: str, what: str, received: str | None = None, *, hint: str) -> None:
        super().__init__(what, received=received, hint=hint)
        self.name = name


def names_model(word: str) -> bool:
    """Return True if a word names a declaration, a folder, a file, a family of the zoo or a model to fetch."""
    file, _, function = word.rpartition(":")
    declared = file.endswith(".py") and function in declared_models(Path(file))
    folder = (Path(word) / CONFIG).is_file() or (Path(word).suffix in MODEL_SUFFIXES and Path(word).is_file())
    return declared or folder or word in family_names() or word in PINNED


def find_place(name: str) -> Path:
    """Return the path of the folder or file that MODEL names: a path, a fetched model's name, or a name of the Hugging
    Face hub, for a model in the user's cache. Raises UsageError if there is none, and as `cached_hub_model` does.
    """
    if name and Path(name).exists():
        if name.endswith(".py"):
            raise UsageError(
                "a model in a Python file is named with its function", received=name, hint=_functions_hint(name, name)
            )
        place = Path(name)
        if place.is_file() and place.suffix not in MODEL_SUFFIXES:
            refuse_pickle(place.name, shown_path(place))
            raise NoModelError(
                name,
                f"a file is a model only if it ends in {', '.join(MODEL_SUFFIXES[:-1])} or {MODEL_SUFFIXES[-1]}",
                shown_path(place),
                hint=argument_hint(name, os.path.dirname(name) or ".")
                if (place.parent / CONFIG).exists()
                else "a folder with config.json and model.safetensors, or such a file",
            )
        return place
    above, is_file = os.path.dirname(name), Path(name).suffix in (*MODEL_SUFFIXES, *_OTHER_SUFFIXES)
    of_folder = argument_hint(name, above) if above and os.path.isfile(os.path.join(above, CONFIG)) else None
    if is_file or of_folder is not None:
        nearest = nearest_path_hint(name) if is_file else None
        raise UsageError(f"there is no file {name}", hint=nearest or of_folder)
    if is_hub_name(name):
        try:
            return cached_hub_model(name)
        except UsageError as error:
            error.hint = _declaration_hint(name) or nearest_path_hint(name, _is_model) or error.hint
            raise
    if name not in PINNED:
        if (declared := _declaration_hint(name)) is not None:
            raise UsageError(f"there is no model {name!r}", hint=declared)
        known, path = [*family_names(), *PINNED], nearest_path(name, _is_model)
        paths = [] if path is None else [path]
        near, hub = difflib.get_close_matches(name.lower(), [*known, *paths], n=1), hub_name_in(name)
        meant, reader = f"{near[0]}? " if near else "", family_reading(name.lower())
        if reader is not None and reader != name.lower():
            meant = f"{reader}, the family that reads {name}; "
        if path is not None and path in near:
            raise UsageError(f"there is no model {name!r}", hint=argument_hint(name, path))
        raise NoModelError(
            name,
            f"there is no model {name!r}",
            hint=meant
            + (f"{hub}, for a model of the Hugging Face hub; " if hub is not None else "")
            + f"file.py:function, a folder with config.json and model.safetensors, or one of {', '.join(known)}",
        )
    folder = fetched_model(name)
    if folder is None:
        raise UsageError(
            f"{name} has not been fetched yet", hint=Hint(f"t.fetch_model({name!r})", f"treadle fetch {name}")
        )
    if not folder.is_dir() and folder.suffix not in (GGUF_SUFFIX, ONNX_SUFFIX):
        raise UsageError(
            f"{name} is in a format that Treadle cannot read", received=folder.name, within=str(folder.parent)
        )
    return folder


def _declaration_hint(name: str) -> str | None:
    """Return the hint for a declaration that is named as a module, `models:my_gpt`, `models.my_gpt` or `models`, or
    without its file, `my_gpt`, in place of `models.py:my_gpt`; None if there is no such file.
    """
    before, mark, function = name.rpartition(":") if ":" in name else name.rpartition(".")
    modules = {before.rstrip(":"): function} if mark else {}
    for module, declared in {**modules, name: ""}.items():
        stem = module.removesuffix(".py")
        for file in (f"{stem}.py", f"{stem.replace('.', '/')}.py"):
            if stem and Path(file).is_file():
                return argument_hint(name, f"{file}:{declared}") if declared else _functions_hint(name, file)
    if not name.isidentifier():
        return None
    files = (path for path in islice(sorted(Path().glob("*.py")), _MOST_FILES) if name in declared_models(path))
    return next((argument_hint(name, f"{path}:{name}") for path in files), None)


def _functions_hint(name: str, file: str) -> str:
    """Return the hint for a Python file in place of a model: the models that it declares. It is not run."""
    declared = [f"{file}:{function}" for function in declared_models(Path(file))]
    if len(declared) == 1:
        return argument_hint(name, declared[0])
    return f"one of {', '.join(declared)}" if declared else f"{file}:FUNCTION, a function with the decorator @t.model"


def declared_in(word: str) -> Collection[str]:
    """Return the names of the models that a Python file declares, which is not run. Empty for other words."""
    return declared_models(Path(word)) if word.endswith(".py") else []


def options_of(model: str) -> Collection[str]:
    """Return the names of the configuration of a declaration in a file, which is not run, or of a family of the zoo.
    Empty for other models.
    """
    file, _, function = model.rpartition(":")
    if file.endswith(".py"):
        return declared_models(Path(file)).get(function, [])
    return find_family(model).model.defaults if model in family_names() else []


_OTHER_SUFFIXES = (".py", ".safetensors", ".bin", ".pt", ".pth", ".h5")
"""Endings of files that are no models by themselves, but that no model's name has."""


def _is_model(path: str) -> bool:
    """Return True for a path that may be a model: a folder, or a file with the ending of one."""
    return Path(path).suffix in MODEL_SUFFIXES or os.path.isdir(path)


_OBJECTS = {
    **dict.fromkeys(
        ("Compiled", "Specializing"),
        "it is compiled already, and exe(...) runs it; for other options, or to train it, pass the model that was "
        "compiled to t.compile or t.Trainer, with weights=exe.weights for its weights, if they are not quantized",
    ),
    "LoadedModel": "the model that t.load loaded, by its name or path",
    "Trainer": "trainer.compiled() returns the compiled model",
    "dict": "t.compile(declaration, weights=...): arrays by name are weights of a declaration",
}
"""Hints for objects of Treadle that are not models, and for weights, by class name."""


def refuse_to_save(model: object) -> UsageError:
    """Return the error for an object that is not a compiled model, and cannot be written as an artifact."""
    hint = 't.save(t.compile(MODEL), "model.treadle")'
    if isinstance(model, str | os.PathLike):
        hint = 't.save(exe, "model.treadle"): the compiled model is the first argument'
    elif type(model).__name__ == "Trainer":
        hint = 't.save(trainer.compiled(), "model.treadle"), or trainer.save("folder") for the weights'
    return UsageError("save takes a compiled model", received=f"{model!r}"[:80], hint=hint)


def _is_class_of(model: object, base: type) -> bool:
    return isinstance(model, type) and issubclass(model, base)


def refuse_object(model: object) -> UsageError:
    """Return the error for an object that is not a model: another library's object, or an undecorated function."""
    torch, onnx = (sys.modules.get(name) for name in ("torch", "onnx"))
    kinds = [kind.__name__ for kind in type(model).__mro__]
    hint = next((_OBJECTS[kind] for kind in kinds if kind in _OBJECTS), 'a declaration, "folder", or "model.onnx"')
    if inspect.isfunction(model):
        hint = "decorate the function with @t.model"
    if torch is not None and (isinstance(model, torch.nn.Module) or _is_class_of(model, torch.nn.Module)):
        made = f", and module = {model.__name__}(...)" if isinstance(model, type) else ""
        hint = (
            "t.from_torch(module, example_inputs) in its place, where example_inputs is a tuple of the arguments of "
            f"its forward, such as (tokens,){made}"
        )
    if onnx is not None and isinstance(model, onnx.ModelProto):
        hint = '"model.onnx" in its place, after onnx.save(model, "model.onnx")'
    return UsageError("a model must be a declaration, a graph, a name or a path", received=f"{model!r}"[:80], hint=hint)
