"""Resolve MODEL, the argument of the command line and `compile`.

    file.py:function    a declaration in a Python file, which is imported
    path/to/folder      config.json and weights, or model.bin in CTranslate2's layout
    path/to/file.gguf   metadata and weights in one file
    gpt2                a family of the zoo, with the default configuration of its declaration
    minilm              a fetched model, see `treadle.fetch`

An existing path takes precedence over a name of the zoo, which takes precedence over the name of a fetched model.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from treadle.fetch import fetched_model
from treadle.files.shown_names import printable
from treadle.frontends.binding import bind
from treadle.frontends.ctranslate2_file import CTranslate2File, find_ctranslate2
from treadle.frontends.declarations import Model
from treadle.frontends.deferred_arrays import DeferredArray
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.huggingface import open_checkpoint
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.errors import FrontendError, Hint, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.source_lines import raising_line
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.ir.transforms.widening import narrow_dtypes, widen_graph
from treadle.ir.types import DType
from treadle.models.registry import family_names, family_of, find_family, read_gguf
from treadle.wheels.pinned_models import PINNED

Array = np.ndarray[Any, Any]
Limits = Mapping[str, int] | None

BLOCKS = "blocks"
"""A value of `widen` in addition to narrow dtypes."""

GGUF_SUFFIX = ".gguf"
ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class Resolved:
    """A traced model with its weights and their origin.

    weights  None if there is no checkpoint: weights get initial values
    unused   tensors of the checkpoint that the model does not use
    unread   keys of config.json that the family does not know (`ReadConfig.unread`)
    folder   the checkpoint's folder, or its GGUF file, if there is one
    blocks   the type in which each weight is stored in a GGUF file: "q4_1", "f32", ...
    padding  rows of embedding tables that get no gradient when they are looked up, by the weights' names
    learned  the weights that training changes by default; None: all
    """

    name: str
    graph: Graph
    model: Model | None = None
    weights: Mapping[str, Array] | None = None
    unused: tuple[str, ...] = ()
    folder: Path | None = None
    blocks: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    padding: Mapping[str, int] = field(default_factory=dict)
    learned: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OpenedOnnx:
    """A parsed ONNX file with its configuration.

    static  values of inputs that determine shapes
    dims    sizes, or other names, of axes
    narrow  dtypes that are widened to f32
    outputs outputs to return; None: all
    """

    path: Path
    file: OnnxFile
    static: Mapping[str, Any]
    dims: Mapping[str, Any]
    narrow: frozenset[DType] = frozenset()
    outputs: Sequence[str] | None = None

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], limits: Limits = None) -> OpenedOnnx:
        """Parse a file. A key of config is the name of an input with its value, or of an axis. Raises as `import_onnx`
        does.
        """
        file = OnnxFile.open(path, limits)
        known = {value.name for value in file.proto.graph.input}
        static = {name: value for name, value in config.items() if name in known}
        return cls(path, file, static, {name: value for name, value in config.items() if name not in static})

    def inputs(self) -> Graph:
        """Return a graph of the inputs alone, including inputs that determine shapes but not inputs with a given
        value.
        """
        from treadle.frontends.onnx_import.importer import declared_inputs

        return widen_graph(declared_inputs(self.file, static=self.static, dims=self.dims), self.narrow)

    def resolve(self, static: Mapping[str, Any] | None = None) -> Resolved:
        """Import the model with these values of inputs and the configuration. Raises as `import_onnx` does."""
        from treadle.frontends.onnx_import.importer import import_opened

        made = import_opened(self.file, static={**self.static, **(static or {})}, dims=self.dims)
        found = _widened(Resolved(made.graph.name, made.graph, None, made.weights, (), self.path), self.narrow)
        return _giving(found, self.outputs)


class StaticInputNeeded(StaticArgumentNeeded):
    """The configuration lacks the value of an input that determines shapes.

    opened  the file, which can be imported for each value
    """

    opened: OpenedOnnx


def resolve(
    model: Model | Graph | TorchModel | str | Path,
    *,
    inputs: Sequence[str] | None = None,
    widen: str | Iterable[str] = (),
    limits: Limits = None,
    deferred: bool = False,
    outputs: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Resolved:
    """Trace the model that MODEL names.

    inputs   optional inputs of the declaration to include
    outputs  outputs to return, whole or in part (`treadle.ir.transforms.chosen_outputs`); None: all
    widen    narrow dtypes, "bf16" or "f16", whose values become f32 (`treadle.ir.transforms.widening`); "blocks":
             weights that a GGUF file stores in blocks are decoded to f32 when they are read
    limits   limits on what a file may contain: {"tensors": 1_000_000}
    deferred True if weights of a safetensors or GGUF file are converted only when a part of them is read
    config   configuration that overrides the declaration's or the checkpoint's; `more` is the same, as keywords

    Raises UsageError if there is no such model, FrontendError or CheckpointError if it cannot be read,
    StaticInputNeeded for an ONNX file with an input that determines shapes and whose value config lacks.
    """
    names = [widen] if isinstance(widen, str) else list(widen)
    config = {**more, **(config or {})}
    narrow = narrow_dtypes([name for name in names if name != BLOCKS], also=[BLOCKS])
    try:
        found = _widened(_resolve(model, inputs, config, limits, BLOCKS not in names, deferred), narrow)
    except StaticInputNeeded as needed:
        needed.opened = replace(needed.opened, narrow=narrow, outputs=outputs)
        raise
    return _giving(found, outputs)


def _giving(resolved: Resolved, outputs: Sequence[str] | None) -> Resolved:
    """Return the model with these outputs only."""
    return resolved if outputs is None else replace(resolved, graph=choose_outputs(resolved.graph, outputs))


def _widened(resolved: Resolved, narrow: frozenset[DType]) -> Resolved:
    """Return the model with values of narrow dtypes, including weights, in f32."""
    held = {name for name, value in resolved.graph.parameters.items() if value.type.dtype in narrow}
    weights = resolved.weights
    if weights is not None and held:
        weights = {name: _as_f32(array) if name in held else array for name, array in weights.items()}
    return replace(resolved, graph=widen_graph(resolved.graph, narrow), weights=weights) if narrow else resolved


def _as_f32(array: Any) -> Any:
    """Return a weight in float32; bf16 weights are float32 already."""
    if isinstance(array, DeferredArray):
        return array.then(lambda part: np.asarray(part, np.float32), np.dtype(np.float32))
    return np.asarray(array, np.float32)


def _resolve(
    model: Model | Graph | TorchModel | str | Path,
    inputs: Sequence[str] | None,
    config: Mapping[str, Any],
    limits: Limits,
    keep_blocks: bool,
    deferred: bool,
) -> Resolved:
    text = str(model) if isinstance(model, str | Path) else ""
    path, colon, function = text.rpartition(":")
    in_python = bool(colon) and path.endswith(".py")
    in_zoo = text in family_names() and not Path(text).exists()
    if limits is not None and (not text or in_python or in_zoo):
        raise UsageError(
            "limits apply to a model that is read from a file",
            received=text or f"a {type(model).__name__}",
            hint="leave it out",
        )
    if isinstance(model, Graph | TorchModel):
        if config or inputs:
            raise UsageError("a graph takes no configuration", received=", ".join([*config, *(inputs or ())]))
        if isinstance(model, TorchModel):
            return Resolved(model.name, model.graph, None, model.weights, learned=model.learned)
        return Resolved(model.name, model)
    if isinstance(model, Model):
        configured = model.configure(inputs=inputs, **config)
        return Resolved(model.name, configured.graph(), configured)
    if not isinstance(model, str | Path):
        raise UsageError(
            "a model must be a declaration, a graph, a name or a path",
            received=f"{model!r}"[:80],
            hint=_instead_of(model),
        )
    if in_python:
        declared = _load_declaration(Path(path), function).configure(inputs=inputs, **config)
        return Resolved(declared.name, declared.graph(), declared)
    if in_zoo:
        declared = find_family(text).model.configure(inputs=inputs, **config)
        return Resolved(text, declared.graph(), declared)
    resolved = _from_place(find_folder(text), inputs, config, limits, keep_blocks, deferred)
    return _called(text, resolved) if text in PINNED and not Path(text).exists() else resolved


def _called(name: str, resolved: Resolved) -> Resolved:
    """Return a model renamed from its family's name to the name that the user gave."""
    resolved.graph.name = name
    return replace(resolved, name=name)


def _from_place(
    place: Path,
    inputs: Sequence[str] | None,
    config: Mapping[str, Any],
    limits: Limits,
    keep_blocks: bool,
    deferred: bool,
) -> Resolved:
    """Read the model in a folder or a file."""
    if place.suffix == GGUF_SUFFIX and not place.is_dir():
        return _from_gguf(place, inputs, config, limits, keep_blocks, deferred)
    if place.suffix == ONNX_SUFFIX and not place.is_dir():
        return _from_onnx(place, inputs, config, limits)
    converted = find_ctranslate2(place, limits)
    if converted is not None:
        return _from_ctranslate2(converted, place, inputs, config)
    return _from_folder(place, inputs, config, limits, deferred)


def _instead_of(model: object) -> str | None:
    """Return a hint for an object that is not a model: another library's object, or an undecorated function."""
    torch, onnx = (sys.modules.get(name) for name in ("torch", "onnx"))
    if torch is not None and isinstance(model, torch.nn.Module):
        return (
            "t.compile(t.from_torch(module, example_inputs)), where example_inputs is a tuple of the arguments of its "
            "forward, such as (tokens,)"
        )
    if onnx is not None and isinstance(model, onnx.ModelProto):
        return 'onnx.save(model, "model.onnx"), and t.compile("model.onnx")'
    return "decorate the function with @t.model" if inspect.isfunction(model) else None


def find_folder(model: str | Path) -> Path:
    """Return the folder that MODEL names: a path, or a fetched model's name. Raises UsageError if there is none."""
    name = str(model)
    if Path(name).exists():
        if name.endswith(".py"):
            raise UsageError(
                "a model in a Python file is named with its function", received=name, hint=f"{name}:FUNCTION"
            )
        if name.endswith(".treadle"):
            hint = Hint(f"treadle.load({name!r})", f"treadle run {name}")
            raise UsageError("an artifact is compiled already", received=name, hint=hint)
        return Path(name)
    if name in family_names():
        raise UsageError(
            f"{name} is a declaration of the zoo, without weights",
            hint="a folder with a checkpoint of it, or a fetched model",
        )
    if Path(name).suffix in (GGUF_SUFFIX, ONNX_SUFFIX, ".treadle"):
        raise UsageError(f"there is no file {name}")
    if name not in PINNED:
        known = [*family_names(), *PINNED]
        near = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"there is no model {name!r}",
            hint=(f"{near[0]}? " if near else "")
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


def _from_folder(
    folder: Path, inputs: Sequence[str] | None, config: Mapping[str, Any], limits: Limits, deferred: bool
) -> Resolved:
    checkpoint = open_checkpoint(folder, limits)
    family = family_of(checkpoint.config)
    read = family.read(checkpoint.config)
    declared = read.model.configure(inputs=inputs, **config)
    graph = declared.graph()
    wanted = {name: (v.type.static_shape or (), v.type.dtype) for name, v in graph.parameters.items()}
    binding = bind(wanted, read.table, checkpoint, prefixes=family.prefixes, deferred=deferred)
    learned = tuple(name for name in graph.parameters if name not in family.buffers)
    return Resolved(
        family.name,
        graph,
        declared,
        binding.arrays,
        binding.unused,
        folder,
        unread=read.unread,
        padding=family.padding(checkpoint.config),
        learned=learned,
    )


def _from_gguf(
    path: Path,
    inputs: Sequence[str] | None,
    config: Mapping[str, Any],
    limits: Limits,
    keep_blocks: bool,
    deferred: bool,
) -> Resolved:
    file = GGUFFile.open(path, limits)
    model, table = read_gguf(file)
    declared = model.configure(inputs=inputs, **config)
    graph = declared.graph()
    wanted = {name: (v.type.static_shape or (), v.type.dtype) for name, v in graph.parameters.items()}
    binding = bind(wanted, table, file, blocks=file if keep_blocks else None, deferred=deferred)
    graph = encode_parameters(graph, binding.encodings)
    blocks = {name: file.record(source.name).blocks for name, source in binding.sources.items()}
    unused = tuple(name for name in binding.unused if name != "rope_freqs.weight")  # it is in the configuration
    return Resolved(declared.name, graph, declared, binding.arrays, unused, path, blocks)


def _from_onnx(path: Path, inputs: Sequence[str] | None, config: Mapping[str, Any], limits: Limits) -> Resolved:
    opened = OpenedOnnx.open(path, config, limits)
    if inputs:  # an ONNX model always has all its inputs
        takes = [value.name for value in opened.inputs().main.inputs]
        unknown = [name for name in inputs if name not in takes]
        if unknown:
            received = ", ".join(map(printable, unknown))
            hint = "its inputs are " + ", ".join(map(printable, takes))
            raise UsageError("an ONNX file has no optional inputs", received=received, within=path.name, hint=hint)
    try:
        return opened.resolve()
    except StaticArgumentNeeded as error:
        hint = Hint(f"{error.argument}=VALUE as an argument", f"--set {error.argument}=VALUE")
        needed = StaticInputNeeded(error.what, received=error.received, within=error.within, hint=hint)
        needed.argument, needed.opened = error.argument, opened
        raise needed from error


def _from_ctranslate2(
    file: CTranslate2File, folder: Path, inputs: Sequence[str] | None, config: Mapping[str, Any]
) -> Resolved:
    from treadle.models.whisper import ctranslate2_table, from_ctranslate2  # the only family that uses it so far

    model = from_ctranslate2(file)
    declared = model.configure(inputs=inputs, **config)
    graph = declared.graph()
    wanted = {name: (v.type.static_shape or (), v.type.dtype) for name, v in graph.parameters.items()}
    binding = bind(wanted, ctranslate2_table(model.config["dim"]), file)
    unused = tuple(
        name for name in binding.unused if file.record(name).shape
    )  # a tensor without dimensions is an option
    return Resolved(declared.name, graph, declared, binding.arrays, unused, folder)


def _load_declaration(path: Path, function: str) -> Model:
    """Import a user's file and return a model that it declares."""
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
    except SyntaxError as error:
        at = f"{Path(error.filename or path).name}:{error.lineno}"
        raise FrontendError(f"{path.name} is not Python: {error.msg}", source=at) from error
    except Exception as error:
        at = str(raising_line(error) or path.name)
        raise FrontendError(f"{path.name} cannot be imported: {type(error).__name__}: {error}", source=at) from error
    models = {n: v for n, v in vars(module).items() if isinstance(v, Model)}
    if function not in models:
        raise UsageError(
            f"{path.name} declares no model {function!r}",
            hint="one of " + ", ".join(models) if models else "decorate it with @t.model",
        )
    return models[function]
