"""MODEL, as the command line and `compile` take it: `file.py:function`, a zoo name, or a folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.frontends.binding import bind
from treadle.frontends.dsl import Model
from treadle.frontends.huggingface import Checkpoint, open_checkpoint
from treadle.ir.errors import FrontendError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.models.registry import family_names, family_of, find_family

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Resolved:
    """A traced model with its weights, and where it came from.

    weights  None where no checkpoint gives any: they start at their initial values
    unused   tensors of the checkpoint that the model does not take
    folder   the checkpoint's folder, if there is one
    """

    name: str
    graph: Graph
    model: Model | None = None
    weights: Mapping[str, Array] | None = None
    unused: tuple[str, ...] = ()
    folder: Path | None = None


def resolve(model: Model | Graph | str | Path, *, inputs: tuple[str, ...] | None = None, **config: Any) -> Resolved:
    """Trace what MODEL names.

    inputs   optional inputs of the declaration to include
    config   configuration that overrides the declaration's or the checkpoint's

    Raises UsageError where there is no such model, FrontendError or CheckpointError where it cannot be read.
    """
    if isinstance(model, Graph):
        if config or inputs:
            raise UsageError("a graph takes no configuration", received=", ".join([*config, *(inputs or ())]))
        return Resolved(model.name, model)
    if isinstance(model, Model):
        configured = model.configure(inputs=inputs, **config)
        return Resolved(model.name, configured.graph(), configured)
    text = str(model)
    path, colon, function = text.rpartition(":")
    if colon and path.endswith(".py"):
        declared = _load_declaration(Path(path), function).configure(inputs=inputs, **config)
        return Resolved(declared.name, declared.graph(), declared)
    if text in family_names() and not Path(text).is_dir():
        declared = find_family(text).model.configure(inputs=inputs, **config)
        return Resolved(text, declared.graph(), declared)
    if Path(text).is_dir():
        return _from_folder(Path(text), inputs, config)
    raise UsageError(
        f"there is no model {text!r}",
        hint="file.py:function, a folder with config.json and model.safetensors, or one of "
        + ", ".join(family_names()),
    )


def load_weights(graph: Graph, checkpoint: Checkpoint) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The graph's weights out of a checkpoint, memory-mapped, and the tensors that it leaves unused."""
    family = family_of(checkpoint.config)
    wanted = {name: (v.type.static_shape or (), v.type.dtype) for name, v in graph.parameters.items()}
    binding = bind(wanted, family.checkpoint(checkpoint.config), checkpoint, prefixes=family.prefixes)
    return binding.arrays, binding.unused


def _from_folder(folder: Path, inputs: tuple[str, ...] | None, config: Mapping[str, Any]) -> Resolved:
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.config)
    declared = family.from_config(checkpoint.config).configure(inputs=inputs, **config)
    graph = declared.graph()
    weights, unused = load_weights(graph, checkpoint)
    return Resolved(family.name, graph, declared, weights, unused, folder)


def _load_declaration(path: Path, function: str) -> Model:
    """Import a user's file and take a model from it."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    name = f"treadle_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except TreadleError:
        raise
    except Exception as error:
        at = _line_in(error, path)
        raise FrontendError(f"{path.name} cannot be imported: {type(error).__name__}: {error}", source=at) from error
    models = {n: v for n, v in vars(module).items() if isinstance(v, Model)}
    if function not in models:
        raise UsageError(
            f"{path.name} declares no model {function!r}",
            hint="one of " + ", ".join(models) if models else "decorate it with @t.model",
        )
    return models[function]


def _line_in(error: BaseException, path: Path) -> str | None:
    if isinstance(error, SyntaxError):
        return f"{path.name}:{error.lineno}"
    frame, found = error.__traceback__, None
    while frame is not None:
        if Path(frame.tb_frame.f_code.co_filename) == path:
            found = f"{path.name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found
