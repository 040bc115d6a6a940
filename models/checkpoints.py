"""A model as each form of checkpoint holds it: its configured declaration, graph, and tensors of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.frontends.binding import Binding, BlockStore, Table, TensorStore, bind
from treadle.frontends.ctranslate2_file import CTranslate2File
from treadle.frontends.declarations import Model
from treadle.frontends.deferred_arrays import DeferredArray
from treadle.frontends.huggingface import Checkpoint
from treadle.frontends.quantized.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.balances import vector_name
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.ir.transforms.rounded_inputs import AS_STORED, InputRounding, round_inputs
from treadle.ir.transforms.widening import widen_graph
from treadle.ir.types import DType
from treadle.models.family import Family, ReadConfig

if TYPE_CHECKING:
    from treadle.models.reading.llama_gguf import GGUFPart

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ReadOptions:
    """The choices of a caller that apply when a checkpoint is read.

    inputs       optional inputs of the declaration to include
    config       configuration that overrides the declaration's or the checkpoint's
    keep_blocks  True if weights that a GGUF file stores in blocks stay in blocks
    deferred     True if weights are converted only when a part of them is read
    as_stored    True if inputs of products are rounded as a quantized folder asks for it
    new_weights  patterns of names of weights that are drawn, and not read
    """

    inputs: Sequence[str] | None
    config: Mapping[str, Any]
    keep_blocks: bool
    deferred: bool
    as_stored: bool = False
    new_weights: Sequence[str] = ()

    def read_from_files(self, graph: Graph) -> dict[str, tuple[tuple[int, ...], DType]]:
        """Return the shapes and dtypes of the parameters that are read, by name."""
        drawn = {*names_of_new_weights(graph, self.new_weights)}
        return {name: wanted for name, wanted in _parameters(graph).items() if name not in drawn}


def names_of_new_weights(graph: Graph, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the parameters that match one of the patterns. Raises UsageError for a pattern that matches
    none.
    """
    names = list(graph.parameters)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = NearestNames(names).of(pattern.replace("*", ""), 3, 0) or names[:3]
            what = f"no weight matches {printable(pattern)!r} of new_weights"
            raise UsageError(what, hint=f"a pattern of names such as {', '.join(near)}")
    return tuple([name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)])


@dataclass(frozen=True)
class ReadModel:
    """A traced model with its weights.

    weights  None if there is no checkpoint: weights get initial values
    unused   tensors of the checkpoint that the model does not use
    unread   keys of config.json that the family does not know (`ReadConfig.unread`)
    blocks   the type in which each weight is stored in a GGUF file: "q4_1", "f32", ...
    notes    lines for the log: the weights that are decoded when they are read, with the reasons
    padding  rows of embedding tables that get no gradient when they are looked up, by the weights' names
    learned  the weights that training changes by default; None: all
    rounded  the roundings of inputs that a quantized folder asks for, by the names of weights
    new_weights  the weights that are drawn, although `weights` has the others
    """

    name: str
    graph: Graph
    model: Model | None = None
    weights: Mapping[str, Array] | None = None
    unused: tuple[str, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    padding: Mapping[str, int] = field(default_factory=dict)
    learned: tuple[str, ...] | None = None
    rounded: Mapping[str, InputRounding] = field(default_factory=dict)
    new_weights: tuple[str, ...] = ()

    def giving(self, outputs: Sequence[str] | None) -> ReadModel:
        """Return the model with these outputs only; None: all."""
        return self if outputs is None else replace(self, graph=choose_outputs(self.graph, outputs))

    def widened(self, narrow: frozenset[DType]) -> ReadModel:
        """Return the model with values of narrow dtypes, including weights, in f32."""
        if not narrow:
            return self
        held = {name for name, value in self.graph.parameters.items() if value.type.dtype in narrow}
        weights = self.weights
        if weights is not None and held:
            weights = {name: _as_f32(array) if name in held else array for name, array in weights.items()}
        return replace(self, graph=widen_graph(self.graph, narrow), weights=weights)


def read_declaration(name: str, model: Model, weights: Checkpoint | None, options: ReadOptions) -> ReadModel:
    """Trace a declaration. The tensors of its weights, if there are any, have the parameters' names.

    Raises UsageError for an unknown option, CheckpointError for a tensor that is missing or does not fit.
    """
    declared = model.configure(inputs=options.inputs, **options.config)
    if weights is None:
        return ReadModel(name, declared.graph(), declared)
    store = open_quantized(weights)
    graph, binding = _bound_folder(declared, {}, store, options)
    return ReadModel(
        name,
        graph,
        declared,
        binding.arrays,
        binding.unused,
        unread=_unread(store),
        notes=_notes(store, binding, options),
        rounded=_roundings(store, binding),
    )


def read_graph(model: ReadModel, weights: Checkpoint, options: ReadOptions) -> ReadModel:
    """Return a model whose graph is known with the tensors of a folder, which have the parameters' names.

    Raises CheckpointError for a tensor that is missing or does not fit.
    """
    found = bind(options.read_from_files(model.graph), {}, weights, deferred=options.deferred)
    return replace(model, weights=found.arrays, unused=found.unused)


def read_checkpoint(checkpoint: Checkpoint, family: Family, read: ReadConfig, options: ReadOptions) -> ReadModel:
    """Read a folder with safetensors; `read` is its configuration. Raises as `read_declaration` does."""
    declared = read.model.configure(inputs=options.inputs, **options.config)
    store = open_quantized(checkpoint)
    graph, binding = _bound_folder(declared, read.table, store, options, family.prefixes)
    learned = tuple(name for name in graph.parameters if name not in family.buffers)
    padding = family.padding(checkpoint.config)
    unread = (*read.unread, *_unread(store))
    return ReadModel(
        family.name,
        graph,
        declared,
        binding.arrays,
        binding.unused,
        unread=unread,
        notes=_notes(store, binding, options),
        padding=padding,
        learned=learned,
        rounded=_roundings(store, binding),
    )


def _bound_folder(
    declared: Model,
    table: Table,
    store: Checkpoint | QuantizedCheckpoint,
    options: ReadOptions,
    prefixes: Sequence[str] = ("",),
) -> tuple[Graph, Binding]:
    """Return a declaration's graph, with the quantized weights of a folder in blocks, and the tensors of its
    parameters.
    """
    if isinstance(store, Checkpoint):
        return _bound(declared, table, store, options, prefixes)
    graph, binding = _bound(declared, table, store, options, prefixes, store if options.keep_blocks else None)
    orders, weights = _orders(store, binding)
    graph = encode_parameters(graph, binding.encodings, orders=weights)
    steps: dict[str, Array] = {}
    if options.as_stored:
        roundings = _supported(_roundings(store, binding))
        static = {n: store.input_steps(binding.sources[n].name) for n, each in roundings.items() if each.static}
        graph, steps = round_inputs(graph, roundings, static)
    return graph, replace(binding, arrays={**binding.arrays, **orders, **steps})


def _orders(store: QuantizedCheckpoint, binding: Binding) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """Return the orders in which blocks hold the columns of weights, by the names of their parameters, and the weights
    of each. Weights with equal orders share one, so that their products share one gather.
    """
    found: dict[bytes, list[str]] = {}
    for name in binding.encodings:
        order = store.order(binding.sources[name].name)
        if order is not None:
            found.setdefault(order.tobytes(), []).append(name)
    orders, weights = dict[str, Array](), dict[str, list[str]]()
    for held, names in found.items():
        parameter = vector_name(names, lambda n: n in orders or n in binding.arrays, "order")
        orders[parameter], weights[parameter] = np.frombuffer(held, np.int32), names
    return orders, weights


def _unread(store: Checkpoint | QuantizedCheckpoint) -> tuple[str, ...]:
    return () if isinstance(store, Checkpoint) else store.unread


def _supported(roundings: Mapping[str, InputRounding]) -> Mapping[str, InputRounding]:
    """Return these roundings. Raises UsageError for one that is not supported."""
    for name, rounding in roundings.items():
        if rounding.why_not:
            raise UsageError(
                f"the inputs of {name} cannot be rounded as the file asks",
                received=f"{rounding}: {rounding.why_not}",
                hint=Hint('leave out quantize, or quantize="int8"', "leave out --quantize, or --quantize int8"),
            )
    return roundings


def _roundings(store: Checkpoint | QuantizedCheckpoint, binding: Binding) -> dict[str, InputRounding]:
    """Return the roundings of inputs that a folder asks for, by the names of parameters."""
    stored = {} if isinstance(store, Checkpoint) else store.roundings
    return {name: stored[source.name] for name, source in binding.sources.items() if source.name in stored}


def _notes(store: Checkpoint | QuantizedCheckpoint, binding: Binding, options: ReadOptions) -> tuple[str, ...]:
    """Return a line for each quantized weight that has been decoded, since it has no encoding, and for each rounding of
    inputs that is not applied.
    """
    whys = {} if isinstance(store, Checkpoint) else store.decoded()
    read = {name: source.name for name, source in binding.sources.items() if source.name in whys}
    lines = [f"{name} is decoded when it is read: {whys[held]}" for name, held in read.items()]
    kinds = Counter(str(each) for each in _roundings(store, binding).values() if not options.as_stored)
    lines += [
        f"inputs of {n} weights are not rounded as the file asks ({kind}); quantize {AS_STORED} rounds them"
        for kind, n in kinds.items()
    ]
    return tuple(lines)


def read_ctranslate2(file: CTranslate2File, options: ReadOptions) -> ReadModel:
    """Read a folder in CTranslate2's layout. Raises as `read_declaration` does, and CheckpointError for a model that is
    not supported.
    """
    from treadle.models.whisper import ctranslate2_table, from_ctranslate2  # the only family that uses it so far

    model = from_ctranslate2(file)
    declared = model.configure(inputs=options.inputs, **options.config)
    table = ctranslate2_table(model.config["dim"])
    graph, binding = _bound(declared, table, file, replace(options, deferred=False))
    unused = tuple(name for name in binding.unused if file.record(name).shape)  # one without dimensions is an option
    return ReadModel(declared.name, graph, declared, binding.arrays, unused)


def read_gguf_weights(model: Model, parts: Sequence[GGUFPart], options: ReadOptions) -> ReadModel:
    """Read the GGUF files of a model, whose configuration is `model`. Raises as `read_declaration` does."""
    declared = model.configure(inputs=options.inputs, **options.config)
    graph = declared.graph()
    parameters = _parameters(graph)
    arrays, encodings, blocks = dict[str, Any](), dict[str, Encoding](), dict[str, str]()
    unused: list[str] = []
    for part in parts:
        file, own = part.file, {n: wanted for n, wanted in parameters.items() if n.startswith(part.scopes)}
        held = file if options.keep_blocks else None
        binding = bind(own, part.table, file, blocks=held, deferred=options.deferred)
        arrays |= binding.arrays
        encodings |= binding.encodings
        blocks |= {name: file.record(source.name).blocks for name, source in binding.sources.items()}
        unused += [name for name in binding.unused if name != "rope_freqs.weight"]  # it is in the configuration
    graph = encode_parameters(graph, encodings)
    return ReadModel(declared.name, graph, declared, arrays, tuple(unused), blocks)


def _bound(
    declared: Model,
    table: Table,
    store: TensorStore,
    options: ReadOptions,
    prefixes: Sequence[str] = ("",),
    blocks: BlockStore | None = None,
) -> tuple[Graph, Binding]:
    """Return a declaration's graph, and the tensors of its parameters."""
    graph = declared.graph()
    wanted = options.read_from_files(graph)
    found = bind(wanted, table, store, prefixes=prefixes, blocks=blocks, deferred=options.deferred)
    return graph, found


def _parameters(graph: Graph) -> dict[str, tuple[tuple[int, ...], DType]]:
    """Return the shapes and dtypes of a graph's parameters, by name."""
    return {name: (v.type.static_shape or (), v.type.dtype) for name, v in graph.parameters.items()}


def _as_f32(array: Any) -> Any:
    """Return a weight in float32; bf16 weights are float32 already."""
    if isinstance(array, DeferredArray):
        return array.then(lambda part: np.asarray(part, np.float32), np.dtype(np.float32))
    return np.asarray(array, np.float32)
