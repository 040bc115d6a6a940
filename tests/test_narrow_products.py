"""Products with weights in bf16: the ops, the pass, and whole models on every backend that supports bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.backend_checks import graph_of, needs_torch, needs_tvm
from tests.op_checks import EPSILON
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.registry import find_backend
from treadle.cli import app
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError, RuleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.types import DTYPES, bf16, f16, f32
from treadle.models.llama import llama
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.merge_projections import MergeProjections
from treadle.passes.products.narrow_products import NarrowProducts
from treadle.passes.products.patches_as_products import PatchesAsProducts
from treadle.program.options import CompileOptions

with_bf16 = pytest.mark.parametrize(
    "backend", [pytest.param("torch", marks=needs_torch), pytest.param("tvm", marks=needs_tvm)]
)
SMALL = {"layers": 2, "dim": 64, "heads": 4, "hidden": 96, "vocab": 80}
TOKENS = np.arange(1, 14)[None]


def narrowed(graph: Graph) -> Optimized:
    return PassManager([NarrowProducts()], certify=True).run(graph)


def rounds(x: np.ndarray) -> np.ndarray:
    return widened(rounded(x))


def two_products(b: Builder) -> Expr:
    x = b.input("x", f32["B", 8])
    y = b.linear(x, b.parameter("w", f32[6, 8]), b.parameter("bias", f32[6]))
    return y + b.matmul(x, b.parameter("v", f32[8, 6]))


def test_both_factors_are_rounded_and_what_two_products_read_is_rounded_once() -> None:
    made = narrowed(graph_of(two_products))
    text = print_graph(made.graph)
    assert [line.split("#")[0].strip() for line in text.splitlines() if " = " in line and "(" in line] == [
        "x_bf16 = cast(x, to=bf16)",
        "w_bf16 = cast($w, to=bf16)",
        "linear = linear(x_bf16, w_bf16, $bias, to=f32)",
        "v_bf16 = cast($v, to=bf16)",
        "matmul = matmul(x_bf16, v_bf16, to=f32)",
        "x_2 = add(linear, matmul)",
    ]
    assert parse_graph(text) == made.graph
    assert made.log[-1].certificates, "the rewrite was tried"


def test_the_interpreter_sums_products_of_bf16_numbers_in_float32() -> None:
    graph = narrowed(graph_of(two_products)).graph
    rng = np.random.default_rng(0)
    x, w, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (6, 8), (8, 6)))
    bias = rng.standard_normal(6).astype(np.float32)
    got = interpret(graph, {"x": x}, {"w": w, "v": v, "bias": bias})["y"]
    exact = rounds(x).astype(np.float64) @ (rounds(w).T.astype(np.float64) + rounds(v)) + bias
    np.testing.assert_allclose(got, exact, rtol=0, atol=32 * EPSILON["f32"] * np.abs(exact).max())
    assert np.abs(got - (x @ (w.T + v) + bias)).max() > 32 * EPSILON["f32"], "the operands were rounded"


def patches(size: int, stride: int) -> Callable[[Builder], Expr]:
    def build(b: Builder) -> Expr:
        x, w = b.input("x", f32["B", 3, 9, 8]), b.parameter("w", f32[5, 3, size, size])
        return b.conv(x, w, b.parameter("bias", f32[5]), strides=(stride, stride))

    return build


def test_a_convolution_over_patches_is_such_a_product() -> None:
    graph = graph_of(patches(2, 2))
    made = PassManager([PatchesAsProducts(), NarrowProducts()], certify=True).run(graph)
    assert [node.op.name for _, node in made.graph.walk() if node.op.attributes.get("to") is f32] == ["linear"]
    assert made.log[0].certificates, "the rewrite was tried"
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((2, 3, 9, 8)).astype(np.float32)}
    weights = {"w": rng.standard_normal((5, 3, 2, 2)).astype(np.float32), "bias": np.ones(5, np.float32)}
    wanted = interpret(graph, {"x": rounds(given["x"])}, {**weights, "w": rounds(weights["w"])}, float64=True)["y"]
    np.testing.assert_allclose(interpret(made.graph, given, weights)["y"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (1, 1)])
def test_other_convolutions_stay_as_they_are(size: int, stride: int) -> None:
    graph = graph_of(patches(size, stride))
    made = PassManager([PatchesAsProducts(), NarrowProducts()]).run(graph)
    assert made.graph == graph
    assert "its windows are not patches: they overlap, or have one element" in made.log.explain()


@with_bf16
def test_a_vision_transformers_patches_are_narrow(backend: str) -> None:
    options = {"layers": 1, "dim": 32, "heads": 2, "hidden": 48, "height": 32, "width": 32, "patch": 8}
    whole, exe = (treadle.compile("vit", backend=backend, dtype=dtype, seed=1, **options) for dtype in (None, "bf16"))
    assert not any(node.op.name == "conv" for _, node in exe.graph.walk())
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    got, wanted = (each(pixels=pixels).hidden for each in (exe, whole))
    assert 0 < np.abs(got - wanted).max() < 0.05


def refused(build: Callable[[Builder], Expr]) -> str:
    return narrowed(graph_of(build)).log.explain()


def test_matrices_that_are_no_weights_are_left_alone() -> None:
    def scores(b: Builder) -> Expr:
        x = b.input("x", f32["S", 8])
        return b.matmul(x, b.rearrange(b.sin(x), pattern="s d -> d s"))

    def given(b: Builder) -> Expr:
        return b.linear(b.input("x", f32["B", 8]), b.input("w", f32[4, 8]))

    def stack(b: Builder) -> Expr:
        return b.matmul(b.input("x", f32[3, "B", 8]), b.parameter("w", f32[3, 8, 4]))

    def fixed(b: Builder) -> Expr:
        return b.linear(b.input("x", f32["B", 2]), b.constant(np.ones((4, 2), np.float32)))

    assert "the matrix is computed by rearrange, not a weight" in refused(scores)
    assert "the matrix is an input, not a weight" in refused(given)
    assert "the matrices are a batch" in refused(stack)
    assert "the matrix is a constant" in refused(fixed)


def test_values_of_weights_alone_are_weights() -> None:
    def scaled(b: Builder) -> Expr:
        return b.linear(b.input("x", f32["B", 8]), b.parameter("w", f32[4, 8]) * b.parameter("scale", f32[8]))

    (product,) = [n for n in narrowed(graph_of(scaled)).graph.main.nodes if n.op.name == "linear"]
    assert product.inputs[1].type.dtype is bf16
    assert product.result.type.dtype is f32


def test_the_pass_comes_back_with_nothing_to_do() -> None:
    once = narrowed(graph_of(two_products)).graph
    assert narrowed(once).graph == once


def test_merged_projections_keep_the_dtype_of_their_sums() -> None:
    def apart(b: Builder) -> dict[str, Expr]:
        x = b.input("x", bf16["B", 8])
        made = {n: b.linear(x, b.parameter(n, bf16[4, 8]), to="f32") for n in "qk"}
        return {**made, "v": b.linear(x, b.parameter("v", bf16[4, 8]))}

    graph = PassManager([MergeProjections()]).run(graph_of(apart)).graph
    assert sorted(node.op.name for node in graph.main.nodes) == ["linear", "projections"]
    assert [v.type.dtype for v in graph.main.outputs.values()] == [f32, f32, bf16]


def test_a_bias_has_the_dtype_of_the_sum() -> None:
    b = Builder(Graph("wrong"))
    x, w = b.input("x", bf16[2, 8]), b.input("w", bf16[4, 8])
    with pytest.raises(RuleError, match="bias must be f32, is bf16"):
        b.linear(x, w, b.input("bias", bf16[4]), to="f32")


@with_bf16
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_model_is_near_its_float32_self_and_has_float32_results(backend: str, family: str) -> None:
    """About ten products in a row round their factors by at most half of bf16's spacing each."""
    whole = treadle.compile(family, backend=backend, **SMALL)(tokens=TOKENS)
    exe = treadle.compile(family, backend=backend, dtype="bf16", **SMALL)
    for name, wanted in whole.items():
        got = exe(tokens=TOKENS)[name]
        assert got.dtype == np.float32
        off = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert 0 < off < 8 * EPSILON["bf16"]


@with_bf16
def test_a_model_is_near_the_meaning_of_its_own_graph(backend: str) -> None:
    """TVM sums in the dtype that the reference uses; PyTorch rounds the results of packed products once more."""
    exe = treadle.compile("bert", backend=backend, dtype="bf16", **SMALL)
    wanted = interpret(exe.graph, {"tokens": TOKENS}, exe.weights)["hidden"]
    off = np.abs(exe(tokens=TOKENS)["hidden"] - wanted).max() / np.abs(wanted).max()
    assert off < 4 * EPSILON["bf16"]


@with_bf16
def test_weights_are_rounded_once_when_they_are_bound(backend: str) -> None:
    exe = treadle.compile("bert", backend=backend, dtype="bf16", **SMALL)
    lowered = exe.optimized.lowered
    assert lowered is not None
    casts = [node for _, node in lowered.graph.walk() if node.op.name == "cast" and node.inputs[0].kind == "parameter"]
    assert lowered.graph.bind is not None
    inside = {id(n) for f in lowered.graph.needed_by(lowered.graph.bind) for n in f.nodes}
    assert casts
    assert all(id(node) in inside for node in casts)


def test_numpy_says_that_it_has_no_bf16() -> None:
    with pytest.raises(BackendError, match="cannot run bert") as caught:
        treadle.compile("bert", dtype="bf16", **SMALL)
    assert 'no dtype="bf16"' in str(caught.value)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown computation dtype 'f8'"):
        treadle.compile("bert", dtype="f8", **SMALL)


def test_an_option_takes_a_dtype_or_its_name() -> None:
    """A dtype is not iterable, so that code that expects a list of names ends."""
    assert CompileOptions.of("compile", {"dtype": bf16}).dtype == "bf16"
    assert CompileOptions.of("compile", {"widen": bf16}).widen == "bf16"
    assert CompileOptions.of("compile", {"widen": [bf16, "f16"]}).widen == ["bf16", "f16"]
    assert CompileOptions.of("load", {"cache": f16}).cache == "f16"
    assert CompileOptions.of("load", {"dtype": np.float32, "cache": np.dtype("f2")}).cache == "f16"
    torch = pytest.importorskip("torch")
    assert CompileOptions.of("compile", {"dtype": torch.bfloat16, "widen": (torch.half,)}).widen == ("f16",)
    with pytest.raises(TypeError, match="not iterable"):
        list(bf16)  # type: ignore[call-overload]


@needs_torch
def test_a_bf16_model_computes_the_rest_in_float32() -> None:
    """The model's own weights, widened and rounded again, are bitwise identical."""
    exe = treadle.compile(llama, backend="torch", dtype="bf16", **{**SMALL, "heads": 4})
    dtypes = {v.type.dtype for _, node in exe.graph.walk() for v in node.results}
    assert dtypes <= {DTYPES["f32"], DTYPES["bf16"], DTYPES["i64"], DTYPES["bool"]}
    sums = [node for _, node in exe.graph.walk() if node.op.attributes.get("to") is f32]
    assert sums
    assert PassManager((*DEFAULT, NarrowProducts())).run(exe.graph).graph == exe.graph


@needs_torch
def test_an_artifact_keeps_it(tmp_path: Path) -> None:
    exe = treadle.compile("bert", backend="torch", dtype="bf16", **SMALL)
    exe.save(tmp_path / "m.treadle")
    loaded = treadle.load_artifact(tmp_path / "m.treadle")
    assert loaded.graph == exe.graph
    np.testing.assert_array_equal(loaded(tokens=TOKENS)["hidden"], exe(tokens=TOKENS)["hidden"])


@needs_torch
def test_on_the_command_line() -> None:
    sizes = [part for name, n in SMALL.items() for part in ("--set", f"{name}={n}")]
    made = CliRunner().invoke(app, ["compile", "bert", "--backend", "torch", "--dtype", "bf16", *sizes])
    assert made.exit_code == 0, made.output
    assert "narrow-products" in made.output


@with_bf16
@pytest.mark.parametrize("to", ["f64", "f16", "f32"])
@pytest.mark.parametrize("held", ["bf16", "f32"])
def test_a_weight_may_be_summed_in_any_float(backend: str, held: str, to: str) -> None:
    dtype = DTYPES[held]
    graph = graph_of(lambda b: b.linear(b.input("x", dtype["B", 64]), b.parameter("w", dtype[40, 64]), to=to))
    x, w = (rounds(np.random.default_rng(n).standard_normal((9, 64)).astype(np.float32)) for n in (0, 1))
    w = np.concatenate([w] * 5)[:40]
    got = find_backend(backend).compile(graph, Target("cpu"), {"w": w})(x=x)["y"]
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    spacing = EPSILON["bf16"] if (backend, held, to) == ("torch", "bf16", "f32") else max(EPSILON["f32"], EPSILON[to])
    np.testing.assert_allclose(got, exact, rtol=0, atol=16 * spacing * np.abs(exact).max())
    assert got.dtype == DTYPES[to].numpy


# -- any two matrices -------------------------------------------------------------------------------------------------


def of_any(build: Callable[[Builder], Expr]) -> Optimized:
    return PassManager([NarrowProducts(computed=True)], certify=True).run(graph_of(build))


def lines(graph: Graph) -> list[str]:
    """Return the lines of all ops except casts."""
    text = [line.split("#")[0].strip() for line in print_graph(graph).splitlines() if " = " in line and "(" in line]
    return [line for line in text if "cast(" not in line]


EINSUMS: list[tuple[str, tuple[object, ...], tuple[object, ...], list[str]]] = [
    # the equation, the shapes of g and x, and the resulting ops
    ("b a n, n k -> b a k", ("B", "S", 6), (6, 4), ["matmul = matmul(g_bf16, x_bf16, to=f32)"]),
    (
        "b a n, b a k -> n k",
        ("B", "S", 6),
        ("B", "S", 4),
        [
            'rearrange = rearrange(g_bf16, pattern="b a n -> n (b a)")',
            'rearrange_2 = rearrange(x_bf16, pattern="b a k -> (b a) k")',
            "matmul = matmul(rearrange, rearrange_2, to=f32)",
        ],
    ),
    ("b a k, n k -> b a n", ("B", "S", 4), (6, 4), ["linear = linear(g_bf16, x_bf16, to=f32)"]),
    ("n k, a k -> a n", (6, 4), ("S", 4), ["linear = linear(x_bf16, g_bf16, to=f32)"]),
    ("k a, k n -> n a", (4, "S"), (4, 6), [
        'rearrange = rearrange(x_bf16, pattern="k n -> n k")',
        "matmul = matmul(rearrange, g_bf16, to=f32)",
    ]),
    ("a h d, n h d -> a n", ("S", 2, 3), (6, 2, 3), [
        'rearrange = rearrange(g_bf16, pattern="a h d -> a (h d)")',
        'rearrange_2 = rearrange(x_bf16, pattern="n h d -> n (h d)")',
        "linear = linear(rearrange, rearrange_2, to=f32)",
    ]),
    ("... n, n k -> ... k", ("B", "S", 6), (6, 4), ["matmul = matmul(g_bf16, x_bf16, to=f32)"]),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "g", "x", "wanted"), EINSUMS)
def test_an_einsum_is_the_product_that_it_is(
    equation: str, g: tuple[object, ...], x: tuple[object, ...], wanted: list[str]
) -> None:
    """Its numbers are those of the einsum on rounded factors."""

    def build(b: Builder) -> Expr:
        return b.einsum(b.input("g", f32[g]), b.input("x", f32[x]), equation=equation)

    graph, made = graph_of(build), of_any(build)
    assert lines(made.graph) == wanted
    assert parse_graph(print_graph(made.graph)) == made.graph
    assert made.log[-1].certificates, "the rewrite was tried"
    sizes, rng = {"B": 3, "S": 5}, np.random.default_rng(0)
    given = {
        name: rng.standard_normal([sizes.get(n, n) for n in shape]).astype(np.float32)  # type: ignore[call-overload]
        for name, shape in (("g", g), ("x", x))
    }
    rough = {name: widened(rounded(v)) for name, v in given.items()}
    np.testing.assert_allclose(
        interpret(made.graph, given, {})["y"], interpret(graph, rough, {}, float64=True)["y"], rtol=0, atol=1e-5
    )


def test_an_operand_of_several_products_is_rounded_once() -> None:
    """The gradients of a linear are g times the weight, and g times x; g is rounded once."""

    def build(b: Builder) -> Expr:
        g, x, w = b.input("g", f32["M", 6]), b.input("x", f32["M", 4]), b.input("w", f32[6, 4])
        by_x = b.einsum(g, w, equation="m n, n k -> m k")
        return by_x + b.matmul(b.linear(x, w), b.einsum(g, x, equation="m n, m k -> n k"))

    made = of_any(build).graph
    cast = [node.inputs[0].name for _, node in made.walk() if node.op.name == "cast"]
    assert len(cast) == len(set(cast)) == 5, "g, w, x, and what the last product reads"
    assert all(node.op.attributes["to"] is f32 for _, node in made.walk() if node.op.name in ("linear", "matmul"))


def test_a_computed_matrix_is_one_that_may_be_narrow() -> None:
    def scores(b: Builder) -> Expr:
        x = b.input("x", f32["S", 8])
        return b.matmul(x, b.rearrange(b.sin(x), pattern="s d -> d s"))

    (product,) = [node for _, node in of_any(scores).graph.walk() if node.op.name == "matmul"]
    assert [v.type.dtype for v in (*product.inputs, product.result)] == [bf16, bf16, f32]


def einsum(equation: str, *shapes: tuple[int, ...]) -> Callable[[Builder], Expr]:
    return lambda b: b.einsum(*[b.input(f"x{i}", f32[s]) for i, s in enumerate(shapes)], equation=equation)


STAY: list[tuple[str, Callable[[Builder], Expr]]] = [
    ("it is a batch of products, over b h", einsum("b h s d, b h t d -> b h s t", (2, 3, 4, 5), (2, 3, 6, 5))),
    ("it does not multiply two factors", einsum("a b, b c, c d -> a d", (2, 3), (3, 4), (4, 5))),
    ("it does not multiply two factors", einsum("a b -> b a", (2, 3))),
    ("an axis of only one factor is summed", einsum("a b c, b d -> a d", (2, 3, 4), (3, 5))),
    ("it does not multiply two matrices", einsum("a b, b -> a", (2, 3), (3,))),
    ("it does not multiply two matrices", einsum("a b, c d -> a b c d", (2, 3), (4, 5))),
    ("it does not multiply two matrices", einsum("a b, a b ->", (2, 3), (2, 3))),
    ("its columns have several axes, c d", einsum("a b, b c d -> a c d", (2, 3), (3, 4, 5))),
    ("its columns have several axes, c d", einsum("a b, b c d -> c a d", (2, 3), (3, 4, 5))),
    ("an axis is repeated", einsum("... a, ... a b -> ... b", (1, 3), (4, 3, 5))),
    ("the matrix is a constant", lambda b: b.einsum(b.input("x", f32[2, 3]), b.constant(np.ones((3, 4), np.float32)),
                                                    equation="a b, b c -> a c")),
    ("the matrices are a batch", lambda b: b.matmul(b.input("x", f32[2, 3, 4]), b.input("y", f32[2, 4, 5]))),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "build"), STAY)
def test_other_products_stay_unchanged(reason: str, build: Callable[[Builder], Expr]) -> None:
    made = of_any(build)
    assert made.graph == graph_of(build)
    assert reason in made.log.explain()


def test_without_being_asked_it_narrows_products_with_weights_alone() -> None:
    graph = graph_of(einsum("a b, b c -> a c", (2, 3), (3, 4)))
    assert PassManager([NarrowProducts()]).run(graph).graph == graph
