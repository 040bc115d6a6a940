"""An ONNX file and its external data: opened, limited in size, and checked for the requirements of every graph.

    model.onnx            a ModelProto
    model.onnx.data       the bytes of tensors; the ModelProto refers to them by location, offset and length

Reading runs no code of the file. External data is mapped, not copied. It must be a regular file in the model's own
folder, not behind a link (in a hub cache: inside its `models--org--name`), and contain every byte that a tensor claims.

Sources: onnx.proto; https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import FileState, PathLike, canonical, contained, open_regular, read_whole
from treadle.files.limits import limits_of
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.onnx_import.rules.elements import Element, decode, element
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.ir.types import bf16

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_ANOTHER_FILE = "export the file again, or fetch it again: it is damaged, or not an ONNX file"
_WORTH_HOLDING = 1 << 12  # bytes of a tensor; a smaller one is usually a constant of the graph
_DATA_FIELDS = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data")


@dataclass(frozen=True)
class OnnxLimits:
    """Limits on a file's contents. A file that exceeds a limit is refused.

    bytes     size of the ModelProto, without external data
    nodes     total number of nodes, with functions inlined and branches taken
    nesting   depth of nested functions and subgraphs
    rank      number of dimensions of a tensor
    """

    bytes: int = 2**31 - 1
    nodes: int = 200_000
    nesting: int = 32
    rank: int = 24


Limits = OnnxLimits | Mapping[str, int] | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its type, its shape, and its elements, which are read on access.

    name    its name in errors
    type    its element type
    shape   its sizes
    """

    name: str
    type: Element
    shape: tuple[int, ...]
    _proto: Any
    _file: OnnxFile
    _array: Array | None = None

    @property
    def count(self) -> int:
        return prod(self.shape)

    def array(self) -> Array:
        """Return the elements in the carrier's dtype (bf16 as float32). The result is a view of the file if possible.

        Raises FrontendError if the bytes are missing, too few or too many.
        """
        if self._array is not None:
            return self._array
        made = decode(self.type, self._bytes(), self.count).reshape(self.shape)
        return made if self.type.carrier is not bf16 or made.dtype == np.float32 else made.astype(np.float32)

    def _bytes(self) -> Array:
        size = (self.count * self.type.bits + 7) // 8
        if self._proto.data_location == 1:
            return self._file.external(self, size)
        if self._proto.HasField("raw_data"):
            data = np.frombuffer(self._proto.raw_data, np.uint8)
            if data.size != size:
                raise self.error("a tensor's number of bytes does not match its shape", f"{data.size}, not {size}")
            return data
        return self._typed(size)

    def _typed(self, size: int) -> Array:
        """Return the bytes of elements that are stored in a typed field: int32_data, float_data, ..."""
        given = np.asarray(getattr(self._proto, self.type.field))
        bits = self.type.bits
        if self.type.field == "int32_data":
            given = given.astype(np.int32)
            # Elements smaller than a byte are packed: each number in the field contains the elements of one byte.
            data = given.astype(f"<i{max(bits, 8) // 8}").view(np.uint8)
        elif self.type.field == "uint64_data":
            data = given.astype(f"<u{bits // 8}").view(np.uint8)
        else:
            data = given.astype({"float_data": "<f4", "double_data": "<f8", "int64_data": "<i8"}[self.type.field])
            data = data.view(np.uint8)
        if data.size != size:
            per = max(bits, 8) // 8
            received = f"{data.size // per} in {self.type.field}, not {size // per}"
            raise self.error("a tensor's number of elements does not match its shape", received)
        return data

    def error(self, what: str, received: str | None = None, hint: str | None = None) -> FrontendError:
        shape = ", ".join(map(str, self.shape))
        return FrontendError(
            what,
            received=received,
            within=f"tensor {printable(self.name)}: {self.type}[{shape}], {self._file.shown}",
            hint=hint,
        )


class OnnxFile:
    """A ModelProto with its location.

    proto         the model
    display_name  its name in errors and in source lines
    folder        the canonical folder of external data, or None if there is none
    held          initializers that are read once for all imports, see `hold_weights`
    """

    def __init__(self, proto: onnx.ModelProto, display_name: str, folder: Path | None, limits: OnnxLimits) -> None:
        self.proto, self.shown, self.folder, self.limits = proto, display_name, folder, limits
        self.held: dict[str, Array] = {}
        self._maps: dict[str, Array] = {}
        self._states: list[FileState] = []
        if not all(isinstance(text, str) for text in _texts(proto)):
            raise FrontendError("a name in the file is not UTF-8", within=display_name)
        self.opsets = self._read_opsets()

    @staticmethod
    def open(model: PathLike | onnx.ModelProto, limits: Limits = None, folder: PathLike | None = None) -> OnnxFile:
        """Read a file, or take a model in memory, for which `folder` holds the external data.

        Raises FrontendError if the package onnx is missing or the bytes are not a ModelProto, CheckpointError if the
        file does not exist or exceeds the limit.
        """
        known = limits_of(OnnxLimits, limits)
        try:
            import onnx
        except ImportError as error:
            raise FrontendError(
                "reading ONNX files needs the package onnx", received=str(error), hint="pip install 'treadle[onnx]'"
            ) from None
        if isinstance(model, onnx.ModelProto):
            return OnnxFile(model, model.graph.name or "model", None if folder is None else canonical(folder), known)
        path = Path(os.fspath(model))
        with open_regular(path) as opened:
            data = read_whole(opened, known.bytes, shown_path(path), "bytes")
        try:
            proto = onnx.ModelProto.FromString(data)
        except Exception as error:  # DecodeError of the installed protobuf
            raise FrontendError(
                "the file is not an ONNX model",
                received=str(error)[:120],
                within=printable(path.name),
                hint=_ANOTHER_FILE,
            ) from None
        made = OnnxFile(
            proto, printable(path.name), canonical(path).parent if folder is None else canonical(folder), known
        )
        made._states.append(opened.state)
        return made

    def _read_opsets(self) -> dict[str, int]:
        if not self.proto.HasField("graph") or not self.proto.graph.output:
            raise FrontendError("the model has no graph with an output", within=self.shown, hint=_ANOTHER_FILE)
        found: dict[str, int] = {}
        for entry in self.proto.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if found.setdefault(domain, entry.version) != entry.version:
                raise FrontendError(f"two opsets for domain {printable(domain)!r}", within=self.shown)
        return found

    # -- tensors -----------------------------------------------------------------------------------------------

    def hold_weights(self) -> None:
        """Read the initializers once, so that several graphs built from the file share their arrays.

        The bytes are removed from the message, which would store them a second time. A tensor that cannot be read stays
        in the message, and is refused when a node needs it.
        """
        for tensor in self.proto.graph.initializer:
            try:
                array = self.tensor(tensor, tensor.name).array()
            except FrontendError:
                continue
            if array.nbytes >= _WORTH_HOLDING and tensor.name not in self.held:
                self.held[tensor.name] = array
                for field in _DATA_FIELDS:
                    tensor.ClearField(field)
        # A parsed message keeps all the bytes that it was parsed from. Serialize and parse it, to free the removed
        # bytes.
        self.proto = type(self.proto).FromString(self.proto.SerializeToString())

    def tensor(self, proto: Any, name: str, *, bf16_in_f32: bool = False, array: Array | None = None) -> StoredTensor:
        """Return a tensor with its type and shape checked. Its elements are read on access, unless `array` has them."""
        try:
            kind = element(proto.data_type, bf16_in_f32=bf16_in_f32)
        except FrontendError as error:
            error.within = f"tensor {printable(name)}, {self.shown}"
            raise
        shape = tuple(proto.dims)
        if len(shape) > self.limits.rank or any(n < 0 for n in shape) or prod(shape) >= 2**56:
            raise FrontendError(
                "a tensor's shape is impossible",
                received=str(list(shape[:32])),
                within=f"tensor {printable(name)}, {self.shown}",
            )
        if proto.HasField("segment"):
            raise FrontendError("tensors in segments are not supported", within=f"tensor {printable(name)}")
        return StoredTensor(name, kind, shape, proto, self, array)

    def external(self, tensor: StoredTensor, size: int) -> Array:
        """Map the bytes of a tensor that are in another file of the model's folder."""
        entries = {entry.key: entry.value for entry in tensor._proto.external_data}
        location = entries.get("location", "")
        offset, length = (self._number(tensor, entries, key) for key in ("offset", "length"))
        if length is not None and length != size:
            raise tensor.error("the length of external data does not match the tensor's shape", f"{length}, not {size}")
        data = self._map(tensor, location)
        start = offset or 0
        if start + size > data.size:
            raise tensor.error(
                "external data is past the end of its file",
                f"bytes {start} to {start + size} of {data.size} in {printable(location)}",
                "fetch the file again: it is not complete",
            )
        return data[start : start + size]

    def _number(self, tensor: StoredTensor, entries: Mapping[str, str], key: str) -> int | None:
        text = entries.get(key)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII):
            raise tensor.error(f"external data: {key} is not a number of bytes", printable(text))
        return int(text)

    def _map(self, tensor: StoredTensor, location: str) -> Array:
        found = self._maps.get(location)
        if found is None:
            try:
                path = self._external_path(tensor, location)
                with open_regular(path, printable(location)) as file:
                    self._states.append(file.state)
                    for state in self._states:
                        state.check(exists=True)
                    size = file.state.size
                    # An empty file cannot be mapped.
                    mapped = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
            except CheckpointError as error:
                error.within = f"tensor {printable(tensor.name)}, {self.shown}"
                raise
            except (OSError, ValueError) as error:
                raise tensor.error("external data cannot be mapped", str(error)) from None
            found = self._maps[location] = mapped.view(np.ndarray)
        return found

    def _external_path(self, tensor: StoredTensor, location: str) -> Path:
        if self.folder is None:
            raise tensor.error(
                "a model in memory has no folder for external data",
                printable(location),
                "pass folder=, or load the data into the model",
            )
        parts = re.split(r"[/\\]", location)
        if not location or {"", ".", ".."} & set(parts) or ":" in location or not location.isprintable():
            raise tensor.error(
                "external data must be in the model's folder", printable(location) if location else "no location"
            )
        root = next((p for p in (self.folder, *self.folder.parents) if p.name.startswith("models--")), None)
        if root is None:
            step = self.folder
            for part in parts:
                step = step / part
                if step.is_symlink():
                    raise tensor.error("external data must not be reached by a link", printable(location))
        return contained(self.folder.joinpath(*parts), root or self.folder, printable(location))


def _texts(proto: Any) -> Iterator[object]:
    """Yield every string of a model that the importer reads. Protobuf returns a string that is not UTF-8 as bytes."""
    for entry in proto.opset_import:
        yield entry.domain
    yield from (proto.producer_name, proto.producer_version)
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        for entry in function.opset_import:
            yield entry.domain
        for attribute in function.attribute_proto:
            yield attribute.name
        for node in function.node:
            yield from _texts_of_node(node)
    yield from _texts_of_graph(proto.graph)


def _texts_of_graph(graph: Any) -> Iterator[object]:
    yield graph.name
    for tensor in graph.initializer:
        yield from _texts_of_tensor(tensor)
    for value in (*graph.input, *graph.output):
        yield value.name
        for dim in value.type.tensor_type.shape.dim:
            yield dim.dim_param
    for node in graph.node:
        yield from _texts_of_node(node)


def _texts_of_node(node: Any) -> Iterator[object]:
    yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for entry in node.metadata_props:
        yield from (entry.key, entry.value)
    for attribute in node.attribute:
        yield from (attribute.name, attribute.ref_attr_name)
        if attribute.HasField("t"):
            yield from _texts_of_tensor(attribute.t)
    for graph in subgraphs(node):
        yield from _texts_of_graph(graph)


def _texts_of_tensor(tensor: Any) -> Iterator[object]:
    yield tensor.name
    for entry in tensor.external_data:
        yield from (entry.key, entry.value)


# -- requirements of every graph ------------------------------------------------------------------------------------


def describe(node: Any, index: int | None = None) -> str:
    """Return a node's description for errors: `node /encoder/MatMul (MatMul)`."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    name = printable(node.name) if node.name else f"{'' if index is None else index} making {printable(_first(node))}"
    return f"node {name} ({printable(domain + node.op_type)})"


def _first(node: Any) -> str:
    return next((o for o in node.output if o), "nothing")


def subgraphs(node: Any) -> Iterator[Any]:
    """Yield the graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def captured(node: Any, nesting: int) -> Iterator[str]:
    """Yield the names that a node reads: its inputs, and the outer values that its subgraphs read.

    Raises FrontendError if subgraphs nest deeper than `nesting`.
    """
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        if nesting <= 0:
            raise FrontendError("subgraphs nest too deep", within=describe(node))
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        for inner in graph.node:
            yield from (name for name in captured(inner, nesting - 1) if name not in own)
            own.update(inner.output)
        yield from (v.name for v in graph.output if v.name not in own)


def live_nodes(nodes: Any, outputs: Any, nesting: int) -> list[tuple[int, Any]]:
    """Return the nodes that the outputs need, with their positions, in order.

    Raises FrontendError if two nodes compute the same value, or if a value is used before the node that computes it: a
    cycle, or nodes out of order.
    """
    maker: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in maker:
                raise FrontendError(
                    f"two nodes compute the value {printable(name)}",
                    received=describe(nodes[maker[name]], maker[name]),
                    within=describe(node, index),
                )
            maker[name] = index
    wanted = [maker[name] for name in outputs if name in maker]
    live: set[int] = set()
    while wanted:
        index = wanted.pop()
        if index in live:
            continue
        live.add(index)
        for name in captured(nodes[index], nesting):
            source = maker.get(name)
            if source is None:
                continue
            if source >= index:
                raise FrontendError(
                    f"the value {printable(name)} is used before it is computed: a cycle, or nodes out of order",
                    received=describe(nodes[source], source),
                    within=describe(nodes[index], index),
                )
            wanted.append(source)
    return [(index, nodes[index]) for index in sorted(live)]
