"""Leftovers of the TVM backend: nodes that run element by element are named in the log. The zoo's models have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import treadle.frontends.language as t
from tests.backend_checks import graph_of
from treadle.backends.tvm.capabilities import capabilities, planning
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.backends.tvm.lowering.leftovers import find_leftovers
from treadle.backends.tvm.lowering.routine_writer import lower
from treadle.backends.tvm.lowering.rules import RULES, keeps
from treadle.entry_functions import compile
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.models.registry import find_family
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.pipelines import DEFAULT
from treadle.resolving import resolve

PLAN = planning(capabilities(ISAS["x86-64-v3"]))

pytest.importorskip("tvm")


def notes(graph: Graph) -> tuple[str, ...]:
    """Return the leftovers of a graph without further passes; nothing is compiled."""
    lowered = PassManager((Legalize(Capabilities(keeps=keeps)), PLAN)).run(graph)
    assert lowered.plan is not None
    return find_leftovers(lower(lowered.graph, lowered.plan, ISAS["x86-64-v3"], RULES), graph.symbols)


@t.model
def counting(x: t.f32["B S 8"]):
    x = t.cumsum(x, axis=1)
    return t.cumsum(x, axis=2)


def test_it_is_told_with_its_cost_and_its_line() -> None:
    """A running sum along the last axis is a leftover; along another axis it is computed in vectors."""
    exe = compile(counting, backend="tvm")
    (note,) = exe.executable.notes  # type: ignore[attr-defined]
    # 128 x 128 x 8 elements, each with one addition
    report, _, place = note.partition("    ")
    assert report == "cumsum runs element by element, 0.131 MFLOPs at B=128, S=128"
    path, _, line = place.split()[0].rpartition(":")
    assert path.endswith("test_leftovers.py")
    assert "axis=2" in Path(__file__).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    *_, last = exe.log
    assert (last.name, last.notes) == ("lower-to-tvm", [note])
    assert note in exe.log.explain()


CASES: dict[str, tuple[Callable[[Builder, Expr], Any], list[str]]] = {
    "argmax along rows": (lambda b, x: b.argmax(x, axis=-1), []),
    "argmax elsewhere": (lambda b, x: b.argmax(x, axis=1), ["argmax"]),
    "top_k elsewhere": (lambda b, x: b.top_k(x, k=2, axis=1)[0], ["top_k"]),
    "cumsum along columns": (lambda b, x: b.cumsum(x, axis=1), []),
    "windows": (lambda b, x: b.fold_windows(b.windows(x, axis=2, size=2), axis=2, size=8), ["fold_windows"]),
    "einsum of three": (lambda b, x: b.einsum(x, x, x, equation="b s d, b t d, b u d -> s t u"), []),
    "a product in f64": (lambda b, x: b.matmul(x.cast("f64"), b.input("y", "f64[8, 3]")), ["matmul"]),
    "softmax along rows": (lambda b, x: b.softmax(x, axis=-1), []),
}


@pytest.mark.parametrize("case", CASES)
def test_which_forms_have_a_fast_kernel(case: str) -> None:
    build, names = CASES[case]
    graph = graph_of(lambda b: {"y": build(b, b.input("x", "f32[B, 5, 8]"))})
    assert [line.split()[0] for line in notes(graph)] == names


def test_the_costliest_comes_first() -> None:
    def build(b: Builder) -> dict[str, Expr]:
        small, large = b.input("x", "f32[4, 5]"), b.input("z", "f32[B, 5, 8]")
        return {"y": b.cumsum(small, axis=1), "z": b.cumsum(large, axis=2), "a": b.argmax(small, axis=0)}

    lines = notes(graph_of(build))
    assert [line.split()[0] for line in lines] == ["cumsum", "cumsum", "argmax"]
    assert "at B=128" in lines[0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "whisper"])
def test_the_zoo_has_none(family: str) -> None:
    """After the default passes, at the models' default sizes. Weights are not drawn."""
    graph = PassManager(DEFAULT).run(resolve(find_family(family).model).graph).graph
    assert notes(graph) == ()
