"""Small programs whose kernels the emulator runs: vectors, tails, exchanges between threads, and shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from tests.backend_checks import graph_of
from tests.support.gpu_emulator.emulator_runtime import EmulatorRuntime, emulated, runtime_of
from treadle.entry_functions import compile
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.attention.attention_terms import Causal
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret

Array = np.ndarray[Any, Any]


def _linear(b: Builder, x: Expr) -> Expr:
    return b.gelu(b.linear(x, b.input("w", "f32[50, 70]"), b.input("v", "f32[50]")))


def _attention(b: Builder, x: Expr) -> Expr:
    q, k, v = (b.input(name, "f32[B, 2, S, 40]") for name in "qkv")
    return b.attention(q, k, v, terms=(Causal(),))


def _turned(b: Builder, x: Expr) -> Expr:
    return b.rotary(
        b.input("q", "f32[B, 2, S, 64]"), b.input("p", "i64[B, S]"), b.input("f", "f32[32]"), layout="interleaved"
    )


PROGRAMS: Mapping[str, Callable[[Builder, Expr], Expr]] = {
    "softmax": lambda b, x: b.softmax(x, axis=-1),
    "layer_norm": lambda b, x: b.layer_norm(x, b.input("w", "f32[70]"), b.input("v", "f32[70]")),
    "linear": _linear,
    "matmul": lambda b, x: b.matmul(x, b.input("y", "f32[70, 40]")),
    "attention": _attention,
    "rows": lambda b, x: b.reduce_max(x, axes=(-1,)),
    "columns": lambda b, x: b.reduce_sum(x, axes=(0,)),
    "running": lambda b, x: b.cumsum(x, axis=-1),
    "argmax": lambda b, x: b.argmax(x, axis=-1),
    "embedding": lambda b, x: b.embedding(x, b.input("i", "i64[S]")),
    "slice": lambda b, x: b.exp(b.slice(x, axis=-1, start=3, stop=67)),
    "strided": lambda b, x: b.tanh(b.rearrange(x, pattern="b c -> c b")),
    "division": lambda b, x: b.floor_divide(b.input("i", "i32[B, 70]"), b.input("j", "i32[70]")),
    "f16": lambda b, x: b.add(b.input("h", "f16[B, 70]"), b.cast(b.input("g", "bf16[70]"), to="f16")),
    "rotary": _turned,
}
"""Programs by name: functions of a builder and of the input x, f32[B, 70]."""

SIZES = {"B": 5, "S": 37}


def program_inputs(name: str) -> tuple[Graph, Mapping[str, Array], Mapping[str, Array]]:
    """Return a program, its inputs, and its results as the interpreter computes them."""
    graph = graph_of(lambda b: PROGRAMS[name](b, b.input("x", "f32[B, 70]")))
    inputs = draw_inputs(graph, {s: n for s, n in SIZES.items() if s in graph.symbols}, [0])
    return graph, inputs, interpret(graph, inputs)


def build(name: str, target: str = "cuda") -> tuple[Any, Mapping[str, Array], Mapping[str, Array]]:
    """Return a program compiled for the emulator, its inputs, and its results as the interpreter computes them."""
    graph, inputs, wanted = program_inputs(name)
    return emulated(compile(graph, backend="tvm", target=target)), inputs, wanted


program = cache(build)


def runs(name: str) -> tuple[EmulatorRuntime, Callable[[], Mapping[str, Array]]]:
    exe, inputs, _ = program(name)
    return runtime_of(exe), lambda: exe(**inputs)
