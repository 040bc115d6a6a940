"""ONNX's own node tests: the list of cases, and functions that import a case, run it and compare its results.

Every case is imported once and run on each backend. If the importer needs an input to be static, the case's value of
that input is passed as a static argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.registry import find_backend
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded, UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.notes import Imported
from treadle.frontends.onnx_import.rules.elements import carried, restored
from treadle.ir.target import Target

Array = np.ndarray[Any, Any]

_CORE_NAMES = """
    MatMul Gemm Add Sub Mul Div Pow Sqrt Exp Log Erf Tanh Sigmoid Relu Gelu Softmax LogSoftmax LayerNormalization
    RMSNormalization Attention RotaryEmbedding Gather GatherND Reshape Transpose Slice Concat Split Squeeze Unsqueeze
    Expand Where Equal Greater Less GreaterOrEqual LessOrEqual And Or Not Cast Shape Constant ConstantOfShape Range
    ReduceMean ReduceSum ReduceMax ReduceMin Trilu CumSum Neg Abs Cos Sin Identity Tile Pad Conv ArgMax TopK Einsum Clip
    Min Max Sign Reciprocal Swish TensorScatter Flatten Mod Floor Ceil
"""
CORE = frozenset(_CORE_NAMES.split())
"""The operators of transformers: a case that uses no other operator is a core case."""

QUANTIZATION = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
    }
)


LISTED = "1.23"
"""The onnx release whose node tests are listed."""

_LIST = Path(__file__).with_name("onnx_refused.txt")


@lru_cache(maxsize=1)
def listed() -> dict[str, str]:
    """Return the cases that are known to be refused, each with the reason."""
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def write_list() -> None:
    """Rewrite the list. Raises AssertionError if a case is neither right nor refused."""
    found = {name: verdict(case) for name, case in sorted(cases().items())}
    wrong = {name: v.why for name, v in found.items() if v.outcome == "wrong"}
    assert not wrong, wrong
    refused = [f"{name}: {v.why}" for name, v in found.items() if v.outcome == "refused"]
    head = f"# Node tests of onnx {LISTED} that are refused at import: {len(refused)} of {len(found)}, with the reason."
    _LIST.write_text("\n".join([head, *refused]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case: "passes", "refused" (with a named error at import) or "wrong"; and the reason."""

    outcome: str
    why: str = ""


@lru_cache(maxsize=1)
def cases() -> dict[str, Any]:
    """Return the node tests by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return {case.name: case for case in collect_testcases()}


def operators(case: Any) -> set[str]:
    """Return the operators of a case's graph."""
    return {node.op_type for node in case.model.graph.node}


def is_core(case: Any) -> bool:
    return operators(case) <= CORE


def imported(case: Any, inputs: dict[str, Any], *, bf16_in_f32: bool) -> Imported:
    """Return the case's graph, with the values of inputs that must be static."""
    static: dict[str, Any] = {}
    while True:
        try:
            return import_onnx(case.model, static=static, bf16_in_f32=bf16_in_f32)
        except StaticArgumentNeeded as error:
            if error.argument in static or error.argument not in inputs:
                raise
            static[error.argument] = inputs[error.argument]


def verdict(case: Any, backends: Sequence[str] = ("numpy", "torch")) -> Verdict:
    """Import the case and run it on each backend."""
    uses_bf16 = "elem_type: 16" in str(case.model.graph.input) + str(case.model.graph.output) + str(
        case.model.graph.node
    )
    for given, wanted in case.data_sets:
        given, wanted = ([_array(x) for x in side] for side in (given, wanted))
        inputs = dict(zip([v.name for v in case.model.graph.input], given, strict=False))
        try:
            graph, weights, notes = imported(case, inputs, bf16_in_f32=uses_bf16 or "bfloat16" in case.name.lower())
        except UnsupportedOnnx as error:
            return Verdict("refused", error.what)
        arrays = {name: carried(kind, inputs[name]) for name, kind in notes.inputs.items()}
        for name in backends:
            found = find_backend(name).compile(graph, Target("cpu"), weights)(**arrays)
            for (output, array), expected in zip(found.items(), wanted, strict=True):
                wrong = difference(restored(notes.outputs[output], array), expected, case.rtol, case.atol)
                if wrong:
                    return Verdict("wrong", f"{name}: {output} {wrong}")
    return Verdict("passes")


def _array(x: Any) -> Any:
    import onnx

    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


_SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next larger number, for 16-bit floats."""


def difference(found: Array, expected: Any, rtol: float, atol: float) -> str | None:
    """Describe the difference between a result and the expected value, or return None.

    Values of types that NumPy lacks are compared in float32, which holds them exactly.

    Expected values in 16 bits were rounded after each step of ONNX's own computation. A result that was rounded at
    other steps, or only once, may differ by two units in the last place of that type.
    """
    expected = np.asarray(expected)
    rtol = max(rtol, 2 * _SPACING.get(expected.dtype.name, 0))
    if found.shape != expected.shape:
        return f"has shape {found.shape}, not {expected.shape}"
    native = expected.dtype.isbuiltin == 1
    if native and found.dtype != expected.dtype:
        return f"is {found.dtype}, not {expected.dtype}"
    if not native:
        expected = expected.astype(np.float32)
        found = found.astype(np.float32)
    if expected.dtype.kind in "biu":
        apart = found != expected
    else:
        apart = ~np.isclose(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not np.any(apart):
        return None
    at = tuple(int(i) for i in np.argwhere(apart)[0])
    return f"at {at} is {found[at]}, not {expected[at]}"


if __name__ == "__main__":
    write_list()
