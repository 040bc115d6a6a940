"""The outcome of a case: imported with its sizes and without, run, and compared with ONNX Runtime."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from tests.fuzz.onnx_nodes.drawing import Case
from tests.numeric_gradients import at_edges, compared
from treadle.backends.registry import find_backend
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.notes import Imported
from treadle.frontends.onnx_import.rules.elements import carried, restored
from treadle.ir.errors import FrontendError, PassError, TreadleError
from treadle.ir.target import Target
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

Array = np.ndarray[Any, Any]


def in_runtime(case: Case) -> list[Array] | str:
    """Return the results of ONNX Runtime, or the reason why there are none."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = onnxruntime.InferenceSession(_with_types(case).SerializeToString(), options)
        return list(session.run(None, case.inputs))
    except Exception as error:  # its own errors have no common class
        return str(error).splitlines()[0]


def _with_types(case: Case) -> onnx.ModelProto:
    """Return the model with its axes' sizes, so that the shapes of outputs are known."""
    proto = onnx.ModelProto.FromString(case.proto.SerializeToString())
    for value in proto.graph.input:
        shape = case.inputs[value.name].shape
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
    return proto


def imported(case: Case, dims: dict[str, int] | None = None) -> Imported:
    """Import a case as a graph; values that determine shapes are passed on demand. Raises FrontendError."""
    static: dict[str, Any] = {}
    while True:
        try:
            return import_onnx(case.proto, static=static, dims=dims)
        except StaticArgumentNeeded as error:
            if error.argument in static:
                raise
            static[error.argument] = case.inputs[error.argument]


def answer(case: Case, made: Imported, backend: str) -> list[Array]:
    """Return a graph's results after the default pipeline. Raises TreadleError."""
    graph, weights, notes = made
    given = {name: carried(kind, case.inputs[name]) for name, kind in notes.inputs.items()}
    optimized = PassManager(DEFAULT).run(graph).graph
    results = find_backend(backend).compile(optimized, Target("cpu"), weights)(**given)
    return [restored(notes.outputs[v.name], results[v.name]) for v in case.proto.graph.output]


def difference(got: Sequence[Array], wanted: Sequence[Array], rounding: int) -> str | None:
    """Return the difference between results: in shape, dtype, or by more than `rounding` spacings of the largest
    number.
    """
    for n, (x, y) in enumerate(zip(got, wanted, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"result {n} is {x.dtype}{list(x.shape)}, should be {y.dtype}{list(y.shape)}"
        if y.dtype.kind != "f":
            if not np.array_equal(x, y):
                return f"result {n} is {x.flat[:8].tolist()}, should be {y.flat[:8].tolist()}"
            continue
        finite = np.abs(y[np.isfinite(y)])
        scale = max(1.0, float(finite.max(initial=0)))
        limit = rounding * scale * float(np.finfo(y.dtype).eps)
        if not np.allclose(x.astype(np.float64), y.astype(np.float64), rtol=0, atol=limit, equal_nan=True):
            return f"result {n} is {x.flat[:8].tolist()}, should be {y.flat[:8].tolist()}"
    return None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    verdict   same; wrong; refused (by the import, with its sizes); left (by ONNX Runtime, and not compared)
    symbolic  of the import without sizes: same, refused, or none if every size is known
    """

    verdict: str
    why: str = ""
    symbolic: str = "none"


def outcome(case: Case, backend: str = "numpy") -> Outcome:
    """Import and run a case, with its sizes and without, and compare.

    A refusal at import is an answer, unless it says that the node cannot be read. If sizes are unknown, a refusal at
    the call is an answer as well: for example, a slice that is past the end for some sizes. Any other error is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = in_runtime(case)
        found = [_one_way(case, backend, dims, wanted) for dims in ([case.sizes, None] if case.sizes else [{}])]
    symbolic = found[1].verdict if len(found) > 1 else "none"
    for one in found:
        if one.verdict == "wrong":
            return one
    if isinstance(wanted, str):
        return Outcome("left", wanted, symbolic)
    return Outcome(found[0].verdict, next((one.why for one in found if one.why), ""), symbolic)


def _one_way(case: Case, backend: str, dims: dict[str, int] | None, wanted: list[Array] | str) -> Outcome:
    """Return the outcome of a case with sizes for its axes, or (None) without."""
    without = " (without sizes)" if dims is None else ""
    try:
        made = imported(case, dims)
    except FrontendError as error:
        damaged = "cannot be read" in error.what
        return Outcome("wrong" if damaged else "refused", f"{error.what}{f': {error.received}' if damaged else ''}")
    try:
        got = answer(case, made, backend)
    except TreadleError as error:
        at_call = dims is None and not isinstance(error, PassError)
        return Outcome("refused" if at_call else "wrong", f"{error.what}{without}")
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}{without}")
    if isinstance(wanted, str):
        return Outcome("left")
    apart = difference(got, wanted, case.rounding)
    return Outcome("same") if apart is None else Outcome("wrong", apart + without)


def gradient_outcome(case: Case, seed: int, *, edges: bool) -> Outcome:
    """Compare the gradients of a case, in float64, with difference quotients: at its inputs, or at zeros, equal numbers
    and large numbers.

    The verdict is left for a node without a gradient: without float inputs, or with results that are not finite.
    """
    inputs = at_edges(case.inputs, seed) if edges else case.inputs
    if not any(x.dtype.kind == "f" for x in inputs.values()):
        return Outcome("left", "no float inputs")
    try:
        made = _in_float64(case)
        given = {name: carried(kind, inputs[name]) for name, kind in made.notes.inputs.items()}
        report = compared(made.graph, given, made.weights, seed)
        if report is None:  # the logarithm of a negative number, for example
            given = {name: np.abs(x) if x.dtype.kind == "f" else x for name, x in given.items()}
            report = compared(made.graph, given, made.weights, seed)
    except FrontendError as error:
        return Outcome("refused", error.what)
    if report is None:
        return Outcome("left", "results that are not finite floats")
    return Outcome("wrong" if report.errors else "same", "\n    ".join(report.errors))


def _in_float64(case: Case) -> Imported:
    """Import a case as a graph of float64, or of float32 if its operator has no double."""
    with contextlib.suppress(FrontendError):
        return imported(replace(case, proto=in_float64(case.proto)), case.sizes)
    return imported(case, case.sizes)


def in_float64(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose floats of 16 and 32 bits are doubles; attributes that are numbers stay float32."""
    made = onnx.ModelProto.FromString(proto.SerializeToString())
    graph, floats = made.graph, (TensorProto.FLOAT, TensorProto.FLOAT16)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in floats:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type in floats:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for attribute in (a for node in graph.node for a in node.attribute if a.name == "to" and a.i in floats):
        attribute.i = TensorProto.DOUBLE
    return made
