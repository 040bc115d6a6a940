"""Cases of every operator, in the drawn versions, one after the other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper

import tests.fuzz.onnx_nodes.along_axes
import tests.fuzz.onnx_nodes.attention
import tests.fuzz.onnx_nodes.elementwise
import tests.fuzz.onnx_nodes.images
import tests.fuzz.onnx_nodes.products
import tests.fuzz.onnx_nodes.quantization
import tests.fuzz.onnx_nodes.shapes  # noqa: F401  (registers its rules)
from tests.fuzz.onnx_nodes.drawing import DRAWN, NEWEST, OLDEST, Case, Draw

Array = np.ndarray[Any, Any]


@lru_cache
def _history() -> list[Any]:
    return [schema for schema in defs.get_all_schemas_with_history() if schema.domain == ""]


@lru_cache
def opsets(name: str) -> list[int]:
    """Return an opset for each drawn version of an operator."""
    versions = sorted(s.since_version for s in _history() if s.name == name and not s.deprecated)
    return sorted({max(version, OLDEST) for version in versions if version <= NEWEST}) or [17]


def drawn(name: str, seed: int) -> Case:
    """Return the case of an operator for a seed."""
    r = random.Random(f"{name} {seed}")
    known = opsets(name)
    opset = r.choice(known)
    opset = r.randint(opset, min([v - 1 for v in known if v > opset], default=NEWEST))
    version = defs.get_schema(name, opset, "").since_version if defs.has(name) else 1
    d = Draw(r.randrange(2**32), name, version)
    DRAWN[name](d)
    return assembled(d, opset)


def assembled(d: Draw, opset: int) -> Case:
    """Build the model of the drawn node. Unknown sizes are named by their number: all axes of 3 elements share a
    symbol, n3.
    """
    inputs: list[Any] = []
    held: list[Any] = []
    names: list[str] = []
    given: dict[str, Array] = {}
    symbols = {n for n in range(2, 100) if d.maybe(0.7)} if d.maybe() else set()
    sizes: dict[str, int] = {}
    for position, (array, constant) in enumerate(d.operands):
        if array is None:
            names.append("")
            continue
        name = f"x{position}"
        names.append(name)
        if constant:
            held.append(numpy_helper.from_array(np.array(array, order="C"), name))
            continue
        given[name] = array
        dims: list[Any] = [f"n{n}" if n in symbols else n for n in array.shape]
        sizes.update({text: n for text, n in zip(dims, array.shape, strict=True) if isinstance(text, str)})
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), dims))
    made = [f"y{i}" for i in range(d.outputs)]
    node = helper.make_node(d.name, names, made, **d.attributes)
    outputs = [onnx.ValueInfoProto(name=name) for name in made]
    graph = helper.make_graph([node], "node", inputs, outputs, held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return Case(d.name, proto, given, sizes, d.rounding)


def attributes(name: str) -> set[str]:
    """Return the attributes of an operator, in the drawn versions."""
    return {a for opset in opsets(name) if defs.has(name) for a in defs.get_schema(name, opset, "").attributes}


def cases(seed: int) -> Iterator[Case]:
    """Yield cases without end: each operator in turn, once for each of its attributes."""
    turns = [(name, k) for name in DRAWN for k in range(max(len(attributes(name)), 1))]
    for n in itertools.count():
        for name, k in turns:
            yield drawn(name, (seed * 1_000_003 + n) * 100 + k)
