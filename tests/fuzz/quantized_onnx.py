"""Fuzzing the import of quantized ONNX models: a damaged file is refused with our error, or computes.

    python -m tests.fuzz.quantized_onnx [--count 10000] [--seed 0] [--compared] [--tvm]

Each file is a small model of QuantizeLinear and DequantizeLinear nodes: rounded inputs, quantized weights of one of
several kinds, and a bias in 32-bit integers. Most mutations know the format: they change the data, dtype or shape of a
tensor, an attribute, the operands or the place of a node, or the opset; the others change bytes of the file. The file
is imported, compiled for NumPy or TVM, and run. A mutation fails the run if that raises anything but TreadleError. With
--compared, a mutation also fails if ONNX Runtime accepts the file, without optimizations, and computes other finite
numbers. Exit status 1 if any fails.
"""

from __future__ import annotations

import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.campaign import Tally, options_of, scrambled
from tests.onnx_models import runtime
from treadle.backends.registry import find_backend
from treadle.files.errors import TreadleError
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.target import Target
from treadle.passes.framework.manager import BrokenPassError

Array = np.ndarray[Any, Any]

I8, U8, I4, U4, I16 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT16
RANGES = {I8: (-128, 127), U8: (0, 255), I4: (-8, 7), U4: (0, 15), I16: (-32768, 32767)}
ROWS, COLUMNS = 64, 32
KINDS = [
    (I8, "tensor"),
    (I8, "channels"),
    (U8, "channels"),
    (I4, "blocks"),
    (U4, "blocks"),
    (I8, "blocks"),
    (I16, "tensor"),
]
DTYPES = [
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16, TensorProto.INT8,
    TensorProto.UINT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING,
    TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, 0, 99,
]  # fmt: skip
NUMBERS = (0, 1, -1, 2, -2, 3, 16, 32, 127, 128, 255, 1 << 31, -(1 << 31), (1 << 63) - 1)
FLOATS = (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e-45, 1e38, 3.4e38)
DIFFERENCE = 0.02
"""Largest difference from ONNX Runtime, relative to the largest element: a value may be rounded to another step."""


def tensor(name: str, kind: int, values: Array) -> Any:
    return helper.make_tensor(name, kind, values.shape, values.ravel().tolist())


def base(rng: np.random.Generator) -> Any:
    """Return a valid model: two products of rounded inputs and quantized weights, with an activation between them."""
    held, nodes = [], []

    def rounded(x: str, kind: int) -> str:
        scale = numpy_helper.from_array(np.float32(rng.uniform(0.02, 0.1)), f"{x}_scale")
        held.extend([scale, tensor(f"{x}_zero", kind, np.asarray(rng.integers(0, 9)))])
        steps = [f"{x}_scale", f"{x}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [x, *steps], [f"{x}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{x}_q", *steps], [f"{x}_r"]))
        return f"{x}_r"

    def weight(name: str, rows: int, columns: int) -> str:
        kind, by = KINDS[int(rng.integers(len(KINDS)))]
        low, high = RANGES[kind]
        shape = {"tensor": (), "channels": (columns,), "blocks": (rows // 16, columns)}[by]
        held.append(tensor(f"{name}_quantized", kind, rng.integers(low, high + 1, (rows, columns))))
        largest = max(high, 1)
        held.append(
            numpy_helper.from_array(
                rng.uniform(0.1, 0.2, shape).astype(np.float32) / np.float32(largest), f"{name}_scale"
            )
        )
        operands = [f"{name}_quantized", f"{name}_scale"]
        if rng.random() < 0.6:
            middle = (low + high + 1) // 2
            zeros = np.full(shape, middle) if rng.random() < 0.5 else rng.integers(low, high + 1, shape)
            held.append(tensor(f"{name}_zero", kind, np.asarray(zeros)))
            operands.append(f"{name}_zero")
        options = {"tensor": {}, "channels": {"axis": 1}, "blocks": {"axis": 0, "block_size": 16}}[by]
        nodes.append(helper.make_node("DequantizeLinear", operands, [name], **options))
        return name

    activation = (I8, U8, I16)[int(rng.integers(3))]
    nodes.append(helper.make_node("MatMul", [rounded("x", activation), weight("w", ROWS, COLUMNS)], ["product"]))
    held.append(tensor("b_quantized", TensorProto.INT32, rng.integers(-999, 999, COLUMNS)))
    held.append(numpy_helper.from_array(np.full(COLUMNS, 0.0005, np.float32), "b_scale"))
    nodes.append(helper.make_node("DequantizeLinear", ["b_quantized", "b_scale"], ["b"], axis=0))
    nodes.append(helper.make_node("Add", ["product", "b"], ["sum"]))
    nodes.append(helper.make_node(("Relu", "Softmax", "Tanh")[int(rng.integers(3))], [rounded("sum", U8)], ["h"]))
    nodes.append(helper.make_node("MatMul", [rounded("h", activation), weight("v", COLUMNS, COLUMNS)], ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", k]) for n, k in (("x", ROWS), ("y", COLUMNS))]
    graph = helper.make_graph(nodes, "quantized", ports[:1], ports[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


# -- mutations ---------------------------------------------------------------------------------------------------------


def change_data(rng: random.Random, proto: Any) -> str:
    """Fill a tensor, change some of its elements, or cut or extend its data."""
    chosen = rng.choice(proto.graph.initializer)
    data = bytearray(chosen.raw_data or numpy_helper.to_array(chosen).tobytes())
    kind = rng.choice(("fill", "element", "cut", "more"))
    if chosen.data_type == TensorProto.FLOAT and kind in ("fill", "element"):
        values = np.frombuffer(bytes(data), np.float32).copy()
        values[slice(None) if kind == "fill" else rng.randrange(len(values))] = rng.choice(FLOATS)
        data = bytearray(values.tobytes())
    elif kind == "fill":
        data = bytearray([rng.randrange(256)]) * len(data)
    elif kind == "element":
        data[rng.randrange(len(data))] = rng.randrange(256)
    else:
        data = data[: rng.randrange(len(data))] if kind == "cut" else data + bytes(rng.randrange(1, 9))
    del chosen.int32_data[:], chosen.float_data[:], chosen.int64_data[:]
    chosen.raw_data = bytes(data)
    return f"{kind} {chosen.name}"


def change_type(rng: random.Random, proto: Any) -> str:
    """Change a tensor's dtype or shape."""
    chosen = rng.choice(proto.graph.initializer)
    if rng.random() < 0.5 or not chosen.dims:
        chosen.data_type = rng.choice(DTYPES)
        return f"dtype {chosen.data_type} of {chosen.name}"
    kind = rng.choice(("size", "drop", "add", "turn"))
    dims = list(chosen.dims)
    if kind == "size":
        dims[rng.randrange(len(dims))] = rng.choice((0, 1, 2, 3, 31, 33, 64, -1, 1 << 40))
    elif kind == "drop":
        dims.pop()
    else:
        dims = [1, *dims] if kind == "add" else dims[::-1]
    chosen.dims[:] = dims
    return f"shape {dims} of {chosen.name}"


def change_attribute(rng: random.Random, proto: Any) -> str:
    """Set or drop an attribute of a quantizing node."""
    node = rng.choice([n for n in proto.graph.node if "quantize" in n.op_type.lower()])
    name = rng.choice(("axis", "block_size", "output_dtype", "saturate", "precision", "unknown"))
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if rng.random() < 0.8:
        value = rng.choice((*NUMBERS, 1.5, "text", [1, 2]))
        node.attribute.append(helper.make_attribute(name, value))
        return f"{name} = {value} of {node.output[0]}"
    return f"no {name} of {node.output[0]}"


def change_operands(rng: random.Random, proto: Any) -> str:
    """Drop, empty, exchange or replace an operand of a node."""
    node = rng.choice(proto.graph.node)
    names = list(node.input)
    at, kind = rng.randrange(len(names)), rng.choice(("drop", "empty", "swap", "other", "unknown", "more"))
    known = [v.name for v in (*proto.graph.initializer, *proto.graph.input)]
    known += [name for n in proto.graph.node for name in n.output]
    if kind == "drop":
        names.pop(at)
    elif kind == "swap":
        other = rng.randrange(len(names))
        names[at], names[other] = names[other], names[at]
    elif kind == "more":
        names.append(rng.choice(known))
    else:
        names[at] = {"empty": "", "unknown": "absent", "other": rng.choice(known)}[kind]
    node.input[:] = names
    return f"{kind} operand {at} of {node.output[0]}"


def change_nodes(rng: random.Random, proto: Any) -> str:
    """Drop, copy or move a node, or change its operator or domain."""
    nodes = [type(n).FromString(n.SerializeToString()) for n in proto.graph.node]
    at = rng.randrange(len(nodes))
    kind = rng.choice(("drop", "copy", "move", "operator", "domain"))
    if kind == "drop":
        nodes.pop(at)
    elif kind in ("copy", "move"):
        moved = nodes[at] if kind == "copy" else nodes.pop(at)
        nodes.insert(rng.randrange(len(nodes) + 1), moved)
    elif kind == "operator":
        quantizing = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul")
        nodes[at].op_type = rng.choice(quantizing)
    else:
        nodes[at].domain = rng.choice(("com.microsoft", "ai.onnx", "unknown"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return f"{kind} node {at}"


def change_ports(rng: random.Random, proto: Any) -> str:
    """Drop a tensor, read it as an input, give it another name, or change the opset."""
    kind = rng.choice(("drop", "input", "name", "opset"))
    if kind == "opset":
        proto.opset_import[0].version = rng.choice((0, 9, 10, 12, 13, 18, 19, 22, 23, 24, 40, -1))
        return f"opset {proto.opset_import[0].version}"
    held = list(proto.graph.initializer)
    chosen = rng.choice(held)
    name = chosen.name
    if kind == "name":
        chosen.name = rng.choice(held).name
        return f"{name} is called {chosen.name}"
    proto.graph.initializer.remove(chosen)
    if kind == "input":
        proto.graph.input.append(helper.make_tensor_value_info(name, chosen.data_type, list(chosen.dims)))
    return f"{kind} {name}"


MUTATIONS: tuple[Callable[[random.Random, Any], str], ...] = (
    change_data, change_data, change_type, change_attribute, change_operands, change_nodes, change_ports,
)  # fmt: skip


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """Return a description of a mutation, and the damaged file."""
    proto = base(np.random.default_rng(rng.randrange(1 << 30)))
    if rng.random() < 0.15:
        return scrambled(rng, proto.SerializeToString(), 1 << 30, bytes(range(256)))
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            done.append(rng.choice(MUTATIONS)(rng, proto))
        except (ValueError, IndexError, KeyError, TypeError) as error:  # an earlier mutation left no valid tensor
            done.append(f"nothing ({type(error).__name__})")
    return "; ".join(done), proto.SerializeToString()


# -- outcomes ----------------------------------------------------------------------------------------------------------


def inputs_of(proto: Any) -> dict[str, Array]:
    """Return an array for each input of a model; 3 for a size that is not fixed."""
    rng, held = np.random.default_rng(0), {each.name for each in proto.graph.initializer}
    found = {}
    for port in proto.graph.input:
        kind = port.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else 3 for d in kind.shape.dim]
        if port.name not in held:
            values = rng.standard_normal(shape)
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            found[port.name] = np.abs(values if port.name == "x" else values * 0.1).astype(dtype)
    return found


def outcome(
    data: bytes, folder: Path, *, compared: bool = False, backend: str = "numpy"
) -> tuple[str, str, str | None]:
    """Return what became of a file: an outcome, its reason, and a failure or None."""
    path = folder / "model.onnx"
    path.write_bytes(data)
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        proto = None
    try:
        graph, weights, _ = import_onnx(path)
        executable = find_backend(backend).compile(graph, Target("cpu"), weights)
        if proto is None:
            return "failed", "", "an unreadable file is read"
        given = inputs_of(proto)
        found = executable(**{port.name: given[port.name] for port in executable.inputs})
    except BrokenPassError as error:
        return "failed", "", str(error)
    except TreadleError as error:
        return "refused", type(error).__name__, None
    except Exception:
        return "failed", "", traceback.format_exc(limit=-6)
    if not compared:
        return "computed", "", None
    try:
        expected = runtime(proto, given)
    except Exception:
        return "computed", "ONNX Runtime refuses it", None
    for name, y in expected.items():
        if np.issubdtype(y.dtype, np.floating) and np.isfinite(y).all():
            far = float(np.abs(np.asarray(found[name], np.float64) - y).max(initial=0))
            if not far <= DIFFERENCE * max(float(np.abs(y).max(initial=0)), 1e-3):
                return "differs", "", f"{name} differs by {far:g} of {float(np.abs(y).max()):g}"
    return "computed", "as ONNX Runtime", None


def main() -> int:
    options = options_of(__doc__ or "", compared="compare results with ONNX Runtime", tvm="compile for TVM")
    backend = "tvm" if options.tvm else "numpy"
    tally, rng = Tally(), random.Random(options.seed)
    with np.errstate(all="ignore"), tempfile.TemporaryDirectory() as folder:
        for _ in range(options.count):
            what, data = mutated(rng)
            tally.add(what, *outcome(data, Path(folder), compared=options.compared, backend=backend))
    return tally.close(options)


if __name__ == "__main__":
    sys.exit(main())
