"""ONNX export: write a graph as a model of standard operators, which ONNX Runtime and other tools read.

    made = treadle.compile("gpt2")
    export_onnx(made.graph, made.weights, "gpt2.onnx", opset=17)

Repeated blocks are inlined. Model-local functions need opset 15, many readers do not support them, and ONNX Runtime
inlines them before it optimizes. In addition, a node of a block could not have the scope of its layer. See
docs/onnx-export.md for details.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.made_weights import as_numpy_weight
from treadle.backends.onnx.kept_composites import keeps
from treadle.backends.onnx.quantized_weights import quantized_parts, quantized_tensors
from treadle.backends.onnx.schemas import CODES, code_of
from treadle.backends.onnx.spelled_line import OnnxNode, Tensor, plain
from treadle.backends.onnx.spelling import spell
from treadle.backends.onnx.writer import OnnxWriter, refusal
from treadle.backends.refusals import refuse_misfit, refuse_missing
from treadle.files.installation import pip_install
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.ir.encodings.plain_integers import IntegerParts
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Graph, Value
from treadle.ir.literals import Literal
from treadle.ir.ops.blocks import Encode
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.transforms.encoded_weights import decode_parameters, decode_weights
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import Type, bf16
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassLog
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.stages import Lower, run

Array = np.ndarray[Any, Any]

OLDEST_OPSET, DEFAULT_OPSET, NEWEST_OPSET = 13, 23, 28
"""The default is the first opset with operators for attention, rotary positions and RMS norm."""

EXTERNAL_ABOVE = 2**20
ALIGNMENT = 4096
"""Alignment of external weights in bytes: a page, so that readers can memory-map the weights."""

_LARGEST_MESSAGE = 2**31 - 1


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    path            the model file
    data            the external file with the large weights, or None if there are none
    opset           the version of the standard's operators
    operators       number of nodes of each operator
    external_bytes  bytes of the weights in `data`
    inputs          the name in the file of each input; `outputs`: of each output. A name changes only if an input and
                    an output share it, or if it is not valid text
    log             the log of the passes that lowered the graph to operators
    """

    path: Path
    data: Path | None
    opset: int
    operators: Mapping[str, int]
    external_bytes: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    log: PassLog = field(repr=False, compare=False)


def export_onnx(
    graph: Graph,
    weights: Mapping[str, Any],
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    external_above: int = EXTERNAL_ABOVE,
) -> Exported:
    """Write a graph, with its weights by name, as an ONNX model.

    graph           a graph after any pass: a fused op becomes an operator if the opset has one with the same meaning,
                    else the operators of its body
    weights         arrays or tensors; bf16 arrays as float32, since NumPy has no bf16
    path            FILE.onnx; weights of more than `external_above` bytes are written to FILE.onnx.data next to it
    opset           13 to 28
    external_above  a number of bytes

    Quantized weights keep their integers, as operands of DequantizeLinear; a form that it cannot read at the opset is
    written as float32 values. Symbolic axes keep their names. Equal arguments produce equal
    bytes. The files are written atomically, and replace files of the same names. Raises BackendError if the package
    onnx is missing, the opset is not supported, a weight is missing or has another type, or an op or a dtype cannot be
    expressed at the opset; UsageError if the file cannot be written; GraphError if the graph with inlined blocks is too
    large.
    """
    _refuse_opset(opset)
    _refuse_states(graph)
    target = Path(path)
    graph, weights, quantized = _in_numbers(graph, weights, opset)
    model = _Model(graph, opset, quantized)
    tensors = model.held(weights)
    outside = [t for t in tensors if t.size > external_above]
    _refuse_size(graph, sum(t.size for t in tensors if t.size <= external_above), external_above)
    data = target.parent / f"{target.name}.data"
    places = _places(outside)
    proto = model.proto(tensors, places, data.name)
    _refuse_size(graph, proto.ByteSize(), external_above)
    with reporting_failed_writes("the ONNX file", target, hint="another path"):
        _write(target, proto.SerializeToString(deterministic=True), data, outside, places)
    return Exported(
        target,
        data if outside else None,
        opset,
        dict(sorted(Counter(node.op_type for node in model.w.nodes).items())),
        sum(t.size for t in outside),
        {v.name: model.tensors[v].name for v in model.main.inputs},
        {name: tensor.name for name, tensor in model.outputs.items()},
        model.lowered.log,
    )


def _in_numbers(
    graph: Graph, weights: Mapping[str, Any], opset: int
) -> tuple[Graph, Mapping[str, Any], Mapping[str, IntegerParts]]:
    """Return a graph and its weights, and the integers of the weights that stay quantized. All others are decoded,
    since ONNX has none of our encodings.
    """
    encoded = {name: v.type for name, v in graph.parameters.items() if v.type.encoding is not None}
    if not encoded and not any(node.op.decodes for _, node in graph.walk()):
        return graph, weights, {}
    for name, type in encoded.items():
        if name in weights:
            refuse_misfit(name, type, weights[name])
    for _, node in graph.walk():
        if isinstance(node.op, Encode):
            raise refusal(node, "rounds computed values to blocks, which have no form in ONNX", weights_alone(graph))
    whole = inline_calls(graph)
    kept = quantized_parts(whole, weights, opset)
    return decode_parameters(whole, kept), decode_weights(graph, weights, kept), kept


def _refuse_states(graph: Graph) -> None:
    """Raise BackendError for a graph with states or several entries: an ONNX file is one function of its inputs."""
    entries = [entry.name for entry in graph.later_entries]
    if graph.states or len(entries) > 1:
        raise BackendError(
            f"{graph.name} has {'states' if graph.states else 'several entries'}, which an ONNX file cannot hold",
            received=f"entries {', '.join(entries)}; {len(graph.states)} states",
            hint="the model as declared, over a whole sequence",
        )


def weights_alone(graph: Graph) -> Hint:
    """Return the hint to quantize the weights of a graph as it does, but not the activations, which no file holds."""
    encodings = [value.type.encoding for value in graph.parameters.values()]
    found = [encoding for encoding in encodings if encoding is not None]
    if not all(encoding.block.encodes for encoding in found):  # a file's own blocks, which are quantized already
        return Hint("without quantize", "without --quantize")
    scheme = "int4" if any("int4" in encoding.form for encoding in found) else "int8-weights"
    stored = "for weights that a file stores in blocks"
    return Hint(f"quantize={scheme!r}; none {stored}", f"--quantize {scheme}; no --quantize {stored}")


def _refuse_opset(opset: int) -> None:
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            "ONNX export needs the package onnx", received=str(error), hint=pip_install("onnx")
        ) from error
    newest = min(NEWEST_OPSET, onnx.defs.onnx_opset_version())
    if not _is_integer(opset) or not OLDEST_OPSET <= opset <= newest:
        raise BackendError(
            f"ONNX export writes opsets {OLDEST_OPSET} to {newest}",
            received=f"opset {opset!r}, onnx {onnx.__version__}",
            hint=Hint(f"opset={DEFAULT_OPSET}", f"--opset {DEFAULT_OPSET}"),
        )


def _refuse_size(graph: Graph, size: int, external_above: int) -> None:
    if size > _LARGEST_MESSAGE:
        raise BackendError(
            f"{graph.name} is {size:,} bytes without external weights, but a protobuf message is less than 2 GiB",
            received=f"external_above={external_above}",
            hint=Hint("a smaller external_above", "a smaller --external-above"),
        )


def _is_integer(opset: object) -> bool:
    return isinstance(opset, int) and not isinstance(opset, bool)


# -- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A weight or constant of the model: its tensor, its shape, and its elements."""

    tensor: Tensor
    shape: tuple[int, ...]
    elements: Array | bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.elements.nbytes if isinstance(self.elements, np.ndarray) else len(self.elements)

    @property
    def data(self) -> memoryview:
        """The elements' bytes, little-endian, row-major; a view if the array has this layout."""
        if isinstance(self.elements, bytes):
            return memoryview(self.elements)
        array = self.elements.astype(self.elements.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _weight(name: str, wanted: Type, value: Any) -> Array | bytes:
    """Return the elements of a weight. Raises BackendError if the weight does not match its type."""
    refuse_misfit(name, wanted, value)
    array = as_numpy_weight(value)
    return Literal.of(array, bf16).data if wanted.dtype is bf16 else array


def _places(held: Sequence[_Held]) -> dict[Tensor, int]:
    """Return the offset of each weight in the external file."""
    places, end = {}, 0
    for each in held:
        places[each.tensor] = -(-end // ALIGNMENT) * ALIGNMENT
        end = places[each.tensor] + each.size
    return places


def _write(target: Path, proto: bytes, data: Path, held: Sequence[_Held], places: Mapping[Tensor, int]) -> None:
    """Write the model and the external file. Both are written completely before they are renamed, so that either both
    or none exist.

    The weights are renamed first, so that the model never exists without them. Raises OSError if a file cannot be
    written.
    """
    for path in (target, data):
        if path.is_dir():
            raise IsADirectoryError(0, f"{path.name or path} is a folder")
    with replacing(target) as model:
        model.write(proto)
        model.flush()
        if held:
            with replacing(data) as file:
                for each in held:
                    file.write(bytes(places[each.tensor] - file.tell()))
                    file.write(each.data)


# -- the model -----------------------------------------------------------------------------------------------------


class _Model:
    """The ONNX nodes of a graph, and the protobuf message of the model."""

    def __init__(self, graph: Graph, opset: int, quantized: Mapping[str, IntegerParts]) -> None:
        self.graph, self.quantized = graph, quantized
        self.w = OnnxWriter(graph, opset, keeps(opset), spell)
        self.lowered = run(inline_calls(graph), [Lower(self.pipeline())])
        self.main = self.lowered.graph.main
        self.tensors: dict[Value, Tensor] = {}
        self.outputs = self._write()

    def pipeline(self) -> tuple[Pass, ...]:
        """Return the passes that follow the portable ones: ops without an operator are replaced by their bodies."""
        return (Legalize(Capabilities(keeps=self.w.keeps)),)

    def _write(self) -> dict[str, Tensor]:
        for value in self.main.inputs:
            self.tensors[value] = Tensor(self.w.name(value.name), value.type.dtype)
        wanted = {name: self.w.name(name) for name in self.main.outputs}
        for name, value in self.main.parameters.items():
            self.tensors[value] = Tensor(self.w.name(name), value.type.dtype)
            if name in self.quantized and value.type.encoding is not None:
                parts = self.quantized[name]
                self.w.quantized[value] = quantized_tensors(name, value.type.encoding, parts, self.w.name)
        self.w.sources = [(self.tensors[v], v.type.shape) for v in self.main.arguments]
        self.w.write(self.main, self.tensors)
        return self._named_outputs(wanted)

    def _named_outputs(self, wanted: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the tensor of each output under the requested name. A tensor that already has another fixed name is
        copied by an Identity.
        """
        free = {t for node in self.w.nodes for t in node.outputs}
        found = {}
        for name, value in self.main.outputs.items():
            tensor = self.w.tensor(value, self.tensors)
            if tensor in free:
                free.discard(tensor)
                tensor.name = wanted[name]
            else:
                tensor = self.w.handed_on(tensor, wanted[name])
            found[name] = tensor
        return found

    # -- weights and constants -------------------------------------------------------------------------------

    def held(self, weights: Mapping[str, Any]) -> list[_Held]:
        """Return the weights that a node reads, and the constants, in the order in which they are first read."""
        parameters = {self.tensors[v]: (name, v) for name, v in self.main.parameters.items()}
        constants = {tensor: literal for literal, tensor in self.w.constants.items()}
        read = dict.fromkeys(t for node in self.w.nodes for t in node.inputs if t is not None)
        quantized = {t: held for each in self.w.quantized.values() for t, held in each.elements.items()}
        refuse_missing(self.graph.name, dict(parameters[t] for t in read if t in parameters), weights)
        found = []
        for tensor in read:
            if tensor in parameters:
                name, value = parameters[tensor]
                elements = _weight(name, value.type, weights[name])
                shape = np.shape(weights[name])
                found.append(_Held(tensor, tuple(map(int, shape)), elements))
            elif tensor in quantized:
                found.append(_Held(tensor, *quantized[tensor]))
            elif tensor in constants:
                literal = constants[tensor]
                found.append(_Held(tensor, literal.shape, literal.data))
        return found

    # -- as a message ----------------------------------------------------------------------------------------

    def proto(self, held: Sequence[_Held], places: Mapping[Tensor, int], data: str) -> Any:
        """Return the ModelProto; weights with an offset are stored in the file `data`."""
        import onnx

        imports = [onnx.helper.make_opsetid("", self.w.opset)]
        model = onnx.ModelProto(ir_version=onnx.helper.find_min_ir_version_for(imports), producer_name="treadle")
        model.opset_import.extend(imports)
        graph = model.graph
        graph.name = plain(self.graph.name) or "graph"  # the standard requires a name
        graph.node.extend(map(_node_proto, self.w.nodes))
        graph.initializer.extend(_tensor_proto(each, places.get(each.tensor), data) for each in held)
        graph.input.extend(_value_info(self.tensors[v].name, v.type) for v in self.main.inputs)
        graph.output.extend(_value_info(self.outputs[name].name, v.type) for name, v in self.main.outputs.items())
        outputs = set(self.outputs.values())
        inner = {t: type for t, type in self.w.types.items() if t not in outputs}
        graph.value_info.extend(_value_info(t.name, type) for t, type in inner.items())
        bounds = [bound.around(s) for s, bound in sorted(self.graph.symbols.items()) if bound != Bounds()]
        if bounds:
            model.metadata_props.add(key="treadle.sizes", value=", ".join(bounds))
        return model


def _node_proto(node: OnnxNode) -> Any:
    import onnx

    made = onnx.NodeProto(
        op_type=node.op_type,
        name=node.name,
        input=["" if t is None else t.name for t in node.inputs],
        output=[t.name for t in node.outputs],
    )
    if node.line:
        made.doc_string = node.line
    for key, value in (("treadle.scope", node.scope), ("treadle.line", node.line)):
        if value:
            made.metadata_props.add(key=key, value=value)
    made.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in node.attributes.items())
    return made


def _tensor_proto(held: _Held, place: int | None, data: str) -> Any:
    import onnx

    made = onnx.TensorProto(name=held.tensor.name, data_type=code_of(held.tensor.dtype), dims=held.shape)
    if place is None:
        made.raw_data = bytes(held.data)
        return made
    made.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", data), ("offset", place), ("length", held.size)):
        made.external_data.add(key=key, value=str(value))
    return made


def _value_info(name: str, type: Type) -> Any:
    import onnx

    shape = [size.constant if size.constant is not None else str(size) for size in type.shape]
    return onnx.helper.make_tensor_value_info(name, CODES[type.dtype.name][0], shape)
