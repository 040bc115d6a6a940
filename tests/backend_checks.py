"""Small graphs compiled for a backend, shared by the tests of backends and executables."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.backends.protocol import Executable
from treadle.backends.registry import find_backend
from treadle.ir.attention.attention_terms import Causal
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph
from treadle.ir.target import Target

CPU = Target("cpu")
TOLERANCE = 64 * 2.0**-23
"""64 float32 roundings, relative to the largest element: sums in these tests have at most 60 terms."""

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")
python_backends = pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs_torch)])
each_backend = pytest.mark.parametrize(
    "backend", ["numpy", pytest.param("torch", marks=needs_torch), pytest.param("tvm", marks=needs_tvm)]
)


def compiled(backend: str, graph: Graph, weights: Mapping[str, Any] | None = None) -> Executable:
    return find_backend(backend).compile(graph, CPU, weights or {})


def graph_of(build: Callable[[Builder], Mapping[str, Expr] | Expr], name: str = "example") -> Graph:
    b = Builder(Graph(name))
    made = build(b)
    b.outputs(**(made if isinstance(made, Mapping) else {"y": made}))
    return b.graph


def assert_near(got: Any, expected: Any) -> None:
    bound = TOLERANCE * max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=bound)


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(BackendError) as caught:
        call()
    return str(caught.value)


def block_model(layers: int = 2) -> tuple[Graph, dict[str, Any]]:
    """Return x = h(x) with separate weights for each layer: enough of a transformer for every kind of line in the
    output.
    """
    graph = Graph("tiny")
    h = Function("h")
    graph.add_function(h)
    b = Builder(graph, h)
    x = b.input("x", "f32[B, S, 8]")
    with b.scoped("ln"):
        n = b.layer_norm(x, b.parameter("ln.weight", "f32[8]"), b.parameter("ln.bias", "f32[8]"), name="ln")
    with b.scoped("attn"):
        q = b.rearrange(n, pattern="b s (heads=2 d) -> b heads s d", name="heads")
        a = b.rearrange(b.attention(q, q, q, terms=(Causal(),)), pattern="b heads s d -> b s (heads d)")
    b.outputs(x=x + b.linear(a, b.parameter("out.weight", "f32[8,8]"), name="out") * 0.5)

    main = Builder(graph)
    tokens = main.input("tokens", "i64[B, S]")
    x = main.embedding(main.parameter("wte.weight", "f32[11,8]"), tokens, name="wte")
    for i in range(layers):
        weights = [main.parameter(f"h.{i}.{name}", v.type) for name, v in h.parameters.items()]
        with main.scoped(f"h.{i}"):
            (x,) = main.call(h, [x, *weights])
    main.outputs(logits=main.linear(x, main.parameter("wte.weight", "f32[11,8]"), name="logits"))
    rng = np.random.default_rng(1)
    shapes = {name: v.type.static_shape for name, v in graph.parameters.items()}
    return graph, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
