"""Small ONNX models written as text, and their results in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import parser

from treadle.backends.registry import find_backend
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.notes import Imported
from treadle.frontends.onnx_import.rules.elements import carried, restored
from treadle.ir.target import Target

Array = np.ndarray[Any, Any]


def model(signature: str, body: str, *, opset: int = 18, more: str = "") -> onnx.ModelProto:
    """Build a model from ONNX's own text form: `model("(float[B,4] x) => (float[B,4] y)", "y = Abs(x)")`."""
    domains = f'"": {opset}, "com.microsoft": 1, "here": 1'
    return parser.parse_model(f"<ir_version: 9, opset_import: [{domains}]> test {signature} {{ {body} }} {more}")


def ops(found: Imported) -> list[str]:
    """Return the names of an imported graph's ops, in order."""
    return [node.op.name for node in found.graph.main.nodes]


def prepared(
    found: Imported, backends: tuple[str, ...] = ("numpy", "torch")
) -> Callable[[Mapping[str, Array]], list[dict[str, Array]]]:
    """Prepare an imported model on each backend, to be run on several inputs; the results have the file's own types."""
    graph, weights, notes = found
    made = [find_backend(name).compile(graph, Target("cpu"), weights) for name in backends]

    def answer(inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        given = {name: carried(kind, inputs[name]) for name, kind in notes.inputs.items()}
        return [{name: restored(notes.outputs[name], x) for name, x in run(**given).items()} for run in made]

    return answer


def answers(
    found: Imported, inputs: Mapping[str, Array], backends: tuple[str, ...] = ("numpy", "torch")
) -> list[dict[str, Array]]:
    """Return an imported model's results on each backend, in the file's own types."""
    return prepared(found, backends)(inputs)


def runtime(proto: onnx.ModelProto | str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model in ONNX Runtime without optimizations, so that fused operators run in the form in which they are
    written.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = proto if isinstance(proto, str) else proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, options)
    known = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {n: x for n, x in inputs.items() if n in known}), strict=True))


def same_as_runtime(
    proto: onnx.ModelProto, *inputs: Mapping[str, Array], tolerance: float = 2e-6, **options: Any
) -> Imported:
    """Import a model, run it on both backends, and compare every output with ONNX Runtime's.

    The difference is relative to the output's largest number.

    One import and one compilation serve all the inputs.
    """
    found = import_onnx(proto, **options)
    run = prepared(found)
    for given in inputs:
        assert_as_runtime(proto, given, run(given), tolerance)
    return found


def assert_as_runtime(
    proto: onnx.ModelProto, inputs: Mapping[str, Array], made: list[dict[str, Array]], tolerance: float = 2e-6
) -> None:
    """Compare every output of every backend with ONNX Runtime's, relative to its largest number."""
    wanted = runtime(proto, inputs)
    for got in made:
        for name, expected in wanted.items():
            assert got[name].shape == expected.shape, name
            assert got[name].dtype == expected.dtype, name
            scale = max(float(np.abs(expected).max(initial=0)), 1.0)
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)
