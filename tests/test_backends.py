"""Backends: every op on every sample against its reference, and what executables promise."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from tests.golden import Golden
from treadle.backends import numpy_kernels, registry
from treadle.backends.axis_spelling import einsum_letters
from treadle.backends.protocol import Executable
from treadle.backends.registry import backend_names, find_backend
from treadle.ir.attention_terms import BooleanMask, Causal, MaskTerm, Padding, Term, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import body_of
from treadle.ir.error_function import erf
from treadle.ir.errors import BackendError, UsageError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op import OPS, Operand, Primitive, op
from treadle.ir.samples import Sample, SampleOperand
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, DType, i64

torch = pytest.importorskip("torch")

CPU = Target("cpu")
ROOT = Path(__file__).parent.parent
CASES = [(name, sample) for name, cls in OPS.items() for sample in cls.samples]
IDS = [f"{name}-{sample.text}" for name, sample in CASES]
TOLERANCE = 64 * 2.0**-23
"""64 roundings of float32, relative to the greatest element: a sample's sums have at most 60 terms."""

both = pytest.mark.parametrize("backend", ["numpy", "torch"])


def single_op(name: str, sample: Sample) -> Graph:
    b = Builder(Graph(name))
    operands = [None if t is None else b.input(f"x{i}", t) for i, t in enumerate(sample.types)]
    made = b.apply(name, *operands, **sample.attributes)
    b.outputs(**{f"y{i}": y for i, y in enumerate(made if isinstance(made, tuple) else (made,))})
    return b.graph


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


# -- every op --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("name", "sample"), CASES, ids=IDS)
def test_every_op_equals_its_reference(name: str, sample: Sample, backend: str) -> None:
    graph = single_op(name, sample)
    (node,) = graph.main.nodes
    if backend == "numpy" and any(r.type.dtype.numpy is None for r in node.results):
        with pytest.raises(BackendError, match="NumPy has no bf16"):
            compiled(backend, graph)
        return
    values = sample.draw(0, None)
    wide = [x.astype(np.float64) if x is not None and x.dtype.kind == "f" else x for x in values]
    expected = node.op.in_float64().reference(*wide) if name != "cast" else node.op.reference(*values)
    out = compiled(backend, graph)(**{f"x{i}": x for i, x in enumerate(values) if x is not None})
    for got, wanted, value in zip(
        out.values(), expected if isinstance(expected, tuple) else (expected,), node.results, strict=True
    ):
        assert got.dtype == (value.type.dtype.numpy or np.float32)
        assert got.shape == np.shape(wanted)
        assert_near(got, np.asarray(wanted, np.float64))


@both
@pytest.mark.parametrize("dtype", ["f64", "f16", "bf16", "i32", "i16", "i8", "u8"])
def test_results_have_the_inferred_dtype(dtype: str, backend: str) -> None:
    """NumPy's and PyTorch's own promotions (sums of int8, Python numbers beside arrays) must not show."""
    wanted = DTYPES[dtype]
    if backend == "numpy" and wanted.numpy is None:
        pytest.skip("NumPy has no bf16")
    seen = 0
    for name, sample in CASES:
        kind = DTYPES["f32"] if wanted.is_float else i64
        graph = single_op(name, _with_dtype(sample, kind, wanted)) if _takes(sample, kind) else None
        if graph is None:
            continue
        given = {v.name: torch.ones([s.constant for s in v.type.shape]) for v in graph.main.inputs}
        given = {v.name: given[v.name].to(_torch_dtype(v.type.dtype)) for v in graph.main.inputs}
        if name in ("gather", "take_along_axis", "index_add", "scatter_add", "embedding"):
            given = {n: x if x.is_floating_point() or not wanted.is_float else x * 0 for n, x in given.items()}
        out = compiled(backend, graph)(**given)
        for got, value in zip(out.values(), graph.main.outputs.values(), strict=True):
            assert str(got.dtype).removeprefix("torch.") == _torch_name(value.type.dtype), name
            seen += 1
    assert seen > 20


def _takes(sample: Sample, kind: DType) -> bool:
    types = [t for t in sample.types if t is not None]
    return bool(types) and types[0].dtype is kind and "to" not in sample.attributes


def _with_dtype(sample: Sample, kind: DType, dtype: DType) -> Sample:
    """A sample with other numbers; what selects by position stays i64."""
    first = next(o for o in sample.operands if o is not None)

    def changed(operand: SampleOperand | None, position: int) -> SampleOperand | None:
        indexes = operand is not None and operand.below is not None and position > 0
        if operand is None or operand.type.dtype is not kind or (indexes and kind is i64 and operand is not first):
            return operand
        return replace(operand, type=operand.type.with_dtype(dtype))

    made = Sample(**sample.attributes)
    made.operands = tuple(changed(o, i) for i, o in enumerate(sample.operands))
    made.text = sample.text
    return made


def _torch_name(dtype: DType) -> str:
    return "bfloat16" if dtype.numpy is None else dtype.numpy.name


def _torch_dtype(dtype: DType) -> Any:
    return getattr(torch, _torch_name(dtype))


# -- symbols, blocks, weights ----------------------------------------------------------------------------------------


def block_model(layers: int = 2) -> tuple[Graph, dict[str, Any]]:
    """x = h(x) with its own weights a layer: enough of a transformer to see every kind of line."""
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


@both
def test_one_compilation_serves_every_size(backend: str) -> None:
    graph, weights = block_model()
    exe = compiled(backend, graph, weights)
    for rows, length in ((1, 1), (3, 5), (2, 17), (1, 1)):
        ids = np.arange(rows * length).reshape(rows, length) % 11
        expected = interpret(graph, {"tokens": ids}, weights, float64=True)
        assert_near(exe(tokens=ids).logits, expected["logits"])


@both
def test_source_reads_well(backend: str, golden: Golden) -> None:
    graph, weights = block_model()
    golden(f"backends/{backend}_source.txt", compiled(backend, graph, weights).source)


@both
def test_sizes_are_expressions_of_symbols(backend: str) -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[B, 2*S+1]")
        padded = b.pad(b.input("y", "f32[S]"), axis=0, before="S//2", after=1)
        strided = b.slice(x, axis=1, start="S", stride=2)
        return b.concat(strided, b.expand(padded, shape=("B", None)), axis=1)

    graph = graph_of(build)
    exe = compiled(backend, graph)
    for rows, size in ((1, 1), (2, 4), (3, 7)):
        given = {
            "x": np.arange(rows * (2 * size + 1), dtype=np.float32).reshape(rows, -1),
            "y": np.ones(size, np.float32),
        }
        np.testing.assert_array_equal(exe(**given).y, interpret(graph, given)["y"])


@both
def test_a_block_is_passed_the_symbols_that_its_arguments_do_not_tell(backend: str) -> None:
    graph = Graph("example")
    h = Function("h")
    graph.add_function(h)
    b = Builder(graph, h)
    b.outputs(y=b.rearrange(b.input("x", "f32[2*S]"), pattern="(s=S two) -> s two") * 2.0)
    main = Builder(graph)
    x = main.input("x", "f32[S]")
    (y,) = main.call(h, [main.concat(x, x, axis=0)])
    main.outputs(y=y)
    exe = compiled(backend, graph)
    assert "S=S" in exe.source
    x_value = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(exe(x=x_value).y, np.tile(x_value, 2).reshape(3, 2) * 2)


@both
def test_a_symbol_that_no_input_tells_is_refused(backend: str) -> None:
    with pytest.raises(BackendError, match="needs the size of S, which no input has as a dimension"):
        compiled(backend, graph_of(lambda b: b.rearrange(b.input("x", "f32[2*S]"), pattern="(s=S two) -> s two")))


@both
def test_names_clash_with_nothing(backend: str) -> None:
    """Inputs, outputs and symbols may be called what the emitted text calls its own."""

    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("weights", "f32[np, F]")
        y = b.input("class", "f32[np, F]")
        return {"main": b.expand(b.reduce_sum(x + y, axes=(0, 1)), shape=("np+F",)), 'say "y"': x * y}

    graph = graph_of(build, "np")
    given = {"weights": np.full((2, 3), 2, np.float32), "class": np.ones((2, 3), np.float32)}
    out = compiled(backend, graph)(**given)
    np.testing.assert_array_equal(out.main, np.full(5, 18))
    np.testing.assert_array_equal(out['say "y"'], given["weights"])


@both
def test_weights_that_no_scope_names_are_passed_one_by_one(backend: str) -> None:
    graph, _ = block_model(0)
    h = graph.functions["h"]
    main = Builder(graph)
    main.function.nodes.clear()
    x = main.input("x", "f32[B, S, 8]")
    main.function.inputs.pop(0)
    shared = [main.parameter(f"shared.{name}", v.type) for name, v in h.parameters.items()]
    for i in range(2):
        with main.scoped(f"h.{i}"):
            (x,) = main.call(h, [x, *shared])
    main.outputs(y=x)
    weights = {n: np.full(v.type.static_shape, 0.5, np.float32) for n, v in graph.parameters.items()}
    exe = compiled(backend, graph, weights)
    assert 'weights["shared.ln.weight"], weights["shared.ln.bias"]' in exe.source
    given = {"x": np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)}
    assert_near(exe(**given).y, interpret(graph, given, weights, float64=True)["y"])


@both
def test_memory_falls_as_the_program_runs(backend: str) -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[N]")
        for _ in range(12):
            x = b.exp(x)
        return x

    exe = compiled(backend, graph_of(build))
    assert exe.source.count("    del ") == 11
    if backend == "numpy":  # whose memory Python counts
        x = np.full(1 << 18, -1e3, np.float32)
        tracemalloc.start()
        exe(x=x)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * x.nbytes  # a value, the next one, and small change; not twelve


@both
def test_the_same_bits_twice(backend: str) -> None:
    graph, weights = block_model()
    first, second = compiled(backend, graph, weights), compiled(backend, graph, weights)
    ids = np.arange(24).reshape(2, 12) % 11
    assert first.source == second.source
    assert (
        first(tokens=ids).logits.tobytes() == first(tokens=ids).logits.tobytes() == second(tokens=ids).logits.tobytes()
    )


@both
def test_weights_stay_where_they_are(backend: str, tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype=np.float32, shape=(4,))
    mapped[:] = 1
    read_only = np.lib.format.open_memmap(tmp_path / "w.npy", mode="r")
    graph = graph_of(lambda b: b.input("x", "f32[4]") * b.parameter("w", "f32[4]"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exe = compiled(backend, graph, {"w": read_only})
    mapped[:] = 3
    mapped.flush()
    np.testing.assert_array_equal(exe(x=np.ones(4, np.float32)).y, np.full(4, 3))


@both
def test_results_are_the_callers_own(backend: str) -> None:
    """A result is never a view of an input, a weight or a constant, nor one element that stands for many."""

    def build(b: Builder) -> dict[str, Expr]:
        x, w = b.input("x", "f32[2,3]"), b.parameter("w", "f32[2,3]")
        y = x + w
        return {
            "input": x,
            "weight": b.rearrange(w, pattern="a b -> b a"),
            "constant": b.constant([1.0, 2.0], DTYPES["f32"]),
            "expanded": b.expand(b.reduce_sum(x, axes=(0, 1)), shape=(4,)),
            "one": y,
            "part": b.slice(y, axis=0, stop=1),
        }

    weights = {"w": np.ones((2, 3), np.float32)}
    weights["w"].flags.writeable = False
    x = np.zeros((2, 3), np.float32)
    exe = compiled(backend, graph_of(build), weights)
    out = exe(x=x)
    before = {name: array.copy() for name, array in exe(x=x).items()}
    for array in out.values():
        array[0] += 7
        assert np.count_nonzero(array == array.flat[0]) <= array[0].size
    np.testing.assert_array_equal(x, np.zeros((2, 3)))
    for name, array in exe(x=x).items():
        np.testing.assert_array_equal(array, before[name])


def test_tensors_in_tensors_out() -> None:
    graph, weights = block_model()
    exe = compiled("torch", graph, weights)
    ids = torch.arange(6).reshape(2, 3)
    out = exe(tokens=ids).logits
    assert isinstance(out, torch.Tensor)
    assert isinstance(exe(tokens=ids.numpy()).logits, np.ndarray)
    np.testing.assert_array_equal(out.numpy(), exe(tokens=ids.numpy()).logits)
    assert isinstance(compiled("numpy", graph, weights)(tokens=ids).logits, np.ndarray)


def test_bf16_runs_on_torch() -> None:
    """Its weights come from checkpoints as float32, since NumPy has no bf16; so do its results go."""
    graph = graph_of(lambda b: b.input("x", "bf16[3]") * b.parameter("w", "bf16[3]"))
    exe = compiled("torch", graph, {"w": np.array([0.5, 1.0, 2.0], np.float32)})
    x = np.array([1.5, -2.0, 3.0], np.float32)
    assert exe(x=torch.from_numpy(x).bfloat16()).y.dtype == torch.bfloat16
    np.testing.assert_array_equal(exe(x=x).y, x * [0.5, 1.0, 2.0])
    with pytest.raises(BackendError, match="a float32 that bf16 does not hold"):
        exe(x=np.full(3, 0.1, np.float32))


# -- meanings that libraries leave open ------------------------------------------------------------------------------


def attention_graph(*terms: Term) -> Graph:
    def build(b: Builder) -> Expr:
        q, k, v = (b.input(n, t) for n, t in (("q", "f32[2,4,S,8]"), ("k", "f32[2,2,T,8]"), ("v", "f32[2,2,T,4]")))
        types = {"lengths": "i64[2]", "mask": "bool[2,4,S,T]"}
        extra = [b.input(o.name, types[o.name]) for term in terms for o in term.operands]
        made: Expr = b.attention(q, k, v, *extra, terms=terms)
        return made

    return graph_of(build, "attention")


def attention_inputs(queries: int, keys: int, **extra: Any) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shapes = {"q": (2, 4, queries, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | extra


MASKED = {
    "padding": ((Padding(),), attention_inputs(3, 5, lengths=np.array([0, 5])), (0, slice(None))),
    "window": ((Causal(), Window(2)), attention_inputs(6, 3), (slice(None), slice(5, 6))),
    "mask": ((BooleanMask(),), attention_inputs(3, 3, mask=np.zeros((2, 4, 3, 3), bool)), (slice(None), slice(None))),
}


@both
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_no_key_gets_zeros(case: str, softcap: float | None, backend: str) -> None:
    terms, given, (row, query) = MASKED[case]
    graph = attention_graph(*terms)
    (node,) = graph.main.nodes
    node.op = replace(node.op, softcap=softcap)  # type: ignore[type-var]
    out = compiled(backend, graph)(**given).y
    np.testing.assert_array_equal(out[row, :, query], np.zeros_like(out[row, :, query]))
    assert_near(out, interpret(graph, given, float64=True)["y"])


@dataclass(frozen=True, repr=False)
class EveryOther(MaskTerm):
    """A term that no backend knows: keys at even positions."""

    name = "every_other"

    def reference(self, i: Any, j: Any, *operands: Any) -> Any:
        return j % 2 == 0

    def body(self, grid: Any, *operands: Expr) -> Expr:
        kept: Expr = grid.b.equal(grid.b.mod(grid.j, 2), 0)
        return kept


@both
def test_attention_with_an_unknown_term_is_run_by_its_body(backend: str) -> None:
    graph = attention_graph(EveryOther())
    exe = compiled(backend, graph)
    assert "kernels.attention" not in exe.source
    given = attention_inputs(3, 5)
    assert_near(exe(**given).y, interpret(graph, given, float64=True)["y"])


def test_numpy_attention_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    exe = compiled("numpy", attention_graph(Causal(), Padding()))
    given = attention_inputs(7, 5, lengths=np.array([2, 5]))
    whole = exe(**given).y
    for scores in (1, 4 * 5 * 2, 4 * 5 * 7):
        monkeypatch.setattr(numpy_kernels, "_SCORES", scores)
        assert_near(exe(**given).y, whole.astype(np.float64))


@both
def test_ties_go_to_the_lower_index(backend: str) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[N]")
        values, indices = b.top_k(x, k=4)
        return {"values": values, "indices": indices, "first": b.argmax(x, axis=0)}

    x = np.zeros(100, np.float32)
    x[[70, 90]] = 1
    out = compiled(backend, graph_of(build))(x=x)
    np.testing.assert_array_equal(out.indices, [70, 90, 0, 1])
    np.testing.assert_array_equal(out["values"], [1, 1, 0, 0])
    assert out.first == 70


@both
def test_integers_are_divided_towards_minus_infinity(backend: str) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        x, y = b.input("x", "i64[4]"), b.input("y", "i64[4]")
        return {"quotient": b.floor_divide(x, y), "rest": b.mod(x, y), "by_constant": b.floor_divide(x, 2)}

    x, y = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])
    out = compiled(backend, graph_of(build))(x=x, y=y)
    np.testing.assert_array_equal(out.quotient, [3, -4, -4, 3])
    np.testing.assert_array_equal(out.rest, [1, 1, -1, -1])
    np.testing.assert_array_equal(out.by_constant, [3, -4, 3, -4])


@both
@pytest.mark.parametrize("value", [0.1, -0.0, float("inf"), float("-inf"), 1e30, 3.0])
def test_scalar_constants_keep_the_dtype(value: float, backend: str) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[2]")
        both_constant = b.where(x > 0.0, b.constant(value, x.dtype), b.constant(1.0, x.dtype))
        power = b.pow(b.constant(value, x.dtype), x)
        return {"sum": x + value, "power": power, "chosen": both_constant}

    x = np.array([1.0, -2.0], np.float32)
    out = compiled(backend, graph_of(build))(x=x)
    single = np.float32(value)
    assert {array.dtype for array in out.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(out.sum, x + single)
    np.testing.assert_array_equal(out.chosen, np.array([single, 1], np.float32))
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(out.power, np.power(single, x), rtol=2.0**-21)


EQUATIONS = ["bhsd,bhtd->bhst", "ij,jk->ki", "ab,cd->dbca", "abc,cb->a", "ij,kj->", "i,i->i", "abx,bcy->ca"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_numpy_einsum_through_matmul(equation: str) -> None:
    rng = np.random.default_rng(0)
    sizes = {c: 2 + i for i, c in enumerate(sorted(set(equation) - set(",->")))}
    operands = [rng.standard_normal([sizes[c] for c in term]) for term in equation.split("->")[0].split(",")]
    np.testing.assert_allclose(
        numpy_kernels.einsum(equation, *operands), np.einsum(equation, *operands), rtol=1e-13, atol=1e-13
    )


def test_einsum_names_become_letters() -> None:
    assert einsum_letters("b heads s d, b heads t d -> b heads s t") == "bhsd,bhtd->bhst"
    assert einsum_letters("... head h, h -> ... head") == "...ha,a->...h"


def test_float32_erf() -> None:
    x = np.linspace(-6, 6, 100_001, dtype=np.float32)
    made = numpy_kernels.erf(x)
    assert made.dtype == np.float32
    assert np.max(np.abs(made - erf(x.astype(np.float64)))) < 3.2e-7  # under three of float32's roundings at 1


# -- what is refused -------------------------------------------------------------------------------------------------


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(BackendError) as caught:
        call()
    return str(caught.value)


def test_what_a_call_says_of_wrong_inputs(golden: Golden) -> None:
    def build(b: Builder) -> Expr:
        graph = b.graph
        ids, mask = b.input("ids", "i64[B, S]"), b.input("mask", "f32[B, S]")
        pairs = b.input("pairs", "u8[2*S]")
        graph.symbols["S"] = replace(graph.symbols["S"], upper=8)
        with b.scoped("tail"):
            short = b.slice(mask, axis=1, start=0, stop="S-3")
        return (
            b.reduce_sum(short, axes=(0, 1))
            + b.cast(b.reduce_sum(ids, axes=(0, 1)), to="f32")
            + 0 * pairs_sum(b, pairs)
        )

    def pairs_sum(b: Builder, pairs: Expr) -> Expr:
        return b.cast(b.reduce_sum(pairs, axes=(0,)), to="f32")

    graph = graph_of(build, "scores")
    for node in graph.main.nodes:
        node.source = None
    good: dict[str, Any] = {
        "ids": np.ones((2, 4), np.int64),
        "mask": np.ones((2, 4), np.float32),
        "pairs": np.ones(8, np.uint8),
    }
    wrong: dict[str, dict[str, Any]] = {
        "an unknown name": good | {"idz": good["ids"]},
        "a near name": {"ids": good["ids"], "mask": good["mask"], "pair": good["pairs"]},
        "missing": {"ids": good["ids"]},
        "another kind of number": good | {"ids": good["mask"]},
        "a dtype that may not fit": good | {"mask": np.ones((2, 4))},
        "a list of floats for integers": good | {"ids": [[1.5, 2, 3, 4]]},
        "a number that is too great": good | {"pairs": [1, 2, 3, 300, 5, 6, 7, 8]},
        "rows of several lengths": good | {"ids": [[1, 2], [3]]},
        "text": good | {"ids": [["a"]]},
        "another rank": good | {"ids": good["ids"][0]},
        "one symbol, two sizes": good | {"mask": np.ones((2, 5), np.float32)},
        "a size that follows from a symbol": good | {"pairs": np.ones(7, np.uint8)},
        "past a bound": {
            "ids": np.ones((1, 9), np.int64),
            "mask": np.ones((1, 9), np.float32),
            "pairs": np.ones(18, np.uint8),
        },
        "no row": {
            "ids": np.ones((0, 4), np.int64),
            "mask": np.ones((0, 4), np.float32),
            "pairs": np.ones(8, np.uint8),
        },
        "a negative size": {
            "ids": np.ones((1, 2), np.int64),
            "mask": np.ones((1, 2), np.float32),
            "pairs": np.ones(4, np.uint8),
        },
    }
    for backend in ("numpy", "torch"):
        exe = compiled(backend, graph)
        assert exe(**good).y == 10.0
        texts = [f"{title}\n\n{message(partial(exe, **given))}\n" for title, given in wrong.items()]
        golden("backends/wrong_inputs.txt", "\n".join(texts))


@both
def test_what_is_converted(backend: str) -> None:
    exe = compiled(backend, graph_of(lambda b: b.input("x", "i64[N]").cast("f32") + b.input("y", "f32[N]")))
    y = np.array([0.5, 0.5], np.float32)
    for x in (np.array([1, 2], np.int32), np.array([1, 2], np.uint8), [1, 2], (1, 2), np.array([1, 2], ">i8")):
        for other in (y, y.astype(np.float16), [0.5, 0.5], y[::-1]):
            np.testing.assert_array_equal(exe(x=x, y=other).y, [1.5, 2.5])
    tensors = {"x": torch.tensor([1, 2], dtype=torch.int16), "y": torch.tensor([0.5, 0.5], dtype=torch.float16)}
    np.testing.assert_array_equal(exe(**tensors).y, [1.5, 2.5])
    assert "x must be i64, is float32" in message(lambda: exe(x=torch.ones(2), y=y))


@both
def test_a_failing_node_names_its_line(backend: str) -> None:
    def build(b: Builder) -> Expr:
        with b.scoped("wte"):
            made: Expr = b.embedding(b.parameter("w", "f32[5,3]"), b.input("ids", "i64[N]"))
        return made

    graph = graph_of(build)
    exe = compiled(backend, graph, {"w": np.ones((5, 3), np.float32)})
    for index in (5, -1):
        text = message(lambda i=index: exe(ids=np.array([0, i])))
        assert text.startswith("embedding: failed while running\n")
        assert 'weights["w"]' in text
        assert "test_backends.py:" in text
        assert "scope wte" in text


@both
def test_missing_and_misshapen_weights(backend: str) -> None:
    graph, weights = block_model()
    text = message(lambda: compiled(backend, graph, {k: v for k, v in weights.items() if "ln" not in k}))
    assert "h.0.ln.weight: f32[8]" in text
    assert "h.1.ln.bias: f32[8]" in text
    name = "h.0.out.weight"
    for wrong in (weights[name][:4], weights[name].astype(np.float64)):
        assert f"weight {name} must be f32[8, 8]" in message(
            lambda w=wrong: compiled(backend, graph, weights | {name: w})
        )


def test_torch_refuses_a_primitive_that_it_cannot_spell() -> None:
    try:

        @op("triple", axes="... -> ...", dtypes="f -> f")
        class Triple(Primitive):
            """y = 3 x"""

            x = Operand()

            def reference(self, x: Any) -> Any:
                return 3 * x

        graph = graph_of(lambda b: b.triple(b.input("x", "f32[N]")))
    finally:
        OPS.pop("triple", None)
    assert "triple has no form in PyTorch" in message(lambda: compiled("torch", graph))
    exe = compiled("numpy", graph)  # which runs it by its reference
    assert "reference.triple(x)" in exe.source
    assert exe(x=np.ones(2, np.float32)).y.tolist() == [3, 3]


def test_every_primitive_of_every_body_has_a_form_in_torch() -> None:
    torch_backend = find_backend("torch")
    refused = []
    for name, sample in CASES:
        (node,) = single_op(name, sample).main.nodes
        bodies = [node] if not hasattr(node.op, "body") else [node, *body_of(node.op, sample.types).nodes]
        refused += [why for n in bodies if (why := torch_backend.supports(n)) is not None]
    assert refused == []


# -- targets and the registry ----------------------------------------------------------------------------------------


def test_targets() -> None:
    assert str(CPU) == CPU.kind == "cpu"
    assert (CPU.cores() or 0) >= 1
    assert Target("cuda").cores() is None
    with pytest.raises(UsageError, match="unknown target 'tpu'"):
        Target("tpu")
    graph, weights = block_model()
    assert "runs on the CPU only" in message(lambda: find_backend("numpy").compile(graph, Target("cuda"), weights))
    if not torch.cuda.is_available():
        text = message(lambda: find_backend("torch").compile(graph, Target("cuda"), weights))
        assert "PyTorch finds no CUDA device" in text


class Recorded:
    """A third party's backend."""

    name = "mine"

    def available(self) -> str | None:
        return "no device"

    def supports(self, node: Any) -> str | None:
        return None

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Any:
        raise NotImplementedError


@pytest.fixture
def third_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    here = __name__
    monkeypatch.setitem(sys.modules, "a_third_party", sys.modules[here])
    points = [
        EntryPoint("mine", "a_third_party:Recorded", registry.GROUP),
        EntryPoint("broken", "no_such_module:Backend", registry.GROUP),
        EntryPoint("odd", "a_third_party:Path", registry.GROUP),
        EntryPoint("numpy", "a_third_party:Recorded", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.mark.usefixtures("third_parties")
def test_third_parties_register_by_entry_point() -> None:
    assert backend_names() == ["numpy", "torch", "broken", "mine", "odd"]
    assert find_backend("mine").available() == "no device"
    assert type(find_backend("numpy")).__name__ == "NumpyBackend"
    text = message(lambda: find_backend("broken"))
    assert "backend 'broken' cannot be loaded" in text
    assert "ModuleNotFoundError" in text
    assert "entry point broken = no_such_module:Backend" in text
    assert "backend 'odd' is not a backend" in message(lambda: find_backend("odd"))
    assert "numpy, or another of: " in message(lambda: find_backend("numpi"))


def test_torch_is_imported_only_when_it_is_used() -> None:
    program = (
        "import sys, numpy as np\n"
        "import treadle, treadle.ir.ops\n"
        "from treadle.backends.registry import backend_names, find_backend\n"
        "from treadle.ir.builder import Builder\n"
        "from treadle.ir.graph import Graph\n"
        "from treadle.ir.target import Target\n"
        "b = Builder(Graph('g'))\n"
        "b.outputs(y=b.gelu(b.input('x', 'f32[N]')))\n"
        "find_backend('numpy').compile(b.graph, Target('cpu'), {})(x=np.ones(2, np.float32))\n"
        "torch = find_backend('torch')\n"
        "torch.available(), torch.supports(b.graph.main.nodes[0])\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr


def test_without_torch_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'treadle[torch]'" in str(find_backend("torch").available())
    assert "torch backend is not available" in message(lambda: compiled("torch", block_model()[0]))


def test_an_executable_tells_its_signature() -> None:
    graph, weights = block_model()
    exe = compiled("numpy", graph, weights)
    (tokens,), (logits,) = exe.inputs, exe.outputs
    assert (tokens.name, str(tokens.dtype), tokens.axes) == ("tokens", "i64", ("B", "S"))
    assert str(logits) == "logits: f32[B, S, 11]"
    out = exe(tokens=[[1, 2]])
    assert list(out) == ["logits"]
    with pytest.raises(AttributeError, match="no output 'logit'; there are logits"):
        _ = out.logit
