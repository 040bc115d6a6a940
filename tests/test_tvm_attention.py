"""Attention on the TVM backend: one kernel for every term, compared with the reference in float64. Also: the bits of
its results.

A score is a sum of d products, and a result is a sum of t products, in float32 with fused or separate roundings. At the
sizes here, a tolerance of 64 roundings relative to the greatest element suffices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import assert_near, graph_of
from tests.op_checks import EPSILON, assert_close
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.attention.attention_masks import RelativeBias
from treadle.backends.tvm.kernels.attention.flash_attention import FlashAttention
from treadle.backends.tvm.kernels.attention.scratch import BLOCK, GROUP, SPAN, tile_rows
from treadle.backends.tvm.kernels.host.cache import assembly
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.backends.tvm.lowering.routine_writer import steps_of
from treadle.backends.tvm.lowering.rules import keeps
from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Grid,
    MaskTerm,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.attention import Attention
from treadle.ir.target import Target
from treadle.ir.types import Type, parse_type

_missing = find_backend("tvm").available()
if _missing is not None:
    pytest.skip(_missing, allow_module_level=True)

Array = np.ndarray[Any, Any]
ROUNDINGS = 16  # as in the op suite
SMALL = [name for name in ("x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])]


def compiled(graph: Graph, target: str = "cpu") -> KernelExecutable:
    made = find_backend("tvm").compile(graph, Target(target), {})
    assert isinstance(made, KernelExecutable)
    return made


def kernels_of(exe: KernelExecutable) -> list[str]:
    return [type(kernel).__name__ for kernel in exe.kernels]


SYMBOLS = {"b": "B", "h": "6", "s": "S", "t": "T"}


def attention_graph(*terms: Term, heads: int = 6, groups: int = 2, d: int = 24, e: int = 20, **options: Any) -> Graph:
    """Return attention over B rows, S queries and T keys."""

    def build(b: Builder) -> Expr:
        sizes = SYMBOLS | {"h": str(heads)}
        types = {"q": f"f32[B,{heads},S,{d}]", "k": f"f32[B,{groups},T,{d}]", "v": f"f32[B,{groups},T,{e}]"}
        given = [b.input(name, type) for name, type in types.items()]
        dtypes = {"f": "f32", "i64": "i64", "bool": "bool"}
        for n, operand in enumerate(o for term in terms for o in term.operands):
            axes = [sizes.get(axis, axis.removeprefix("buckets")) for axis in operand.axes.split()]
            given.append(b.input(f"x{n}", f"{dtypes[operand.dtype]}[{','.join(axes)}]"))
        made: Expr = b.attention(*given, terms=terms, **options)
        return made

    return graph_of(build, "attention")


def drawn(graph: Graph, seed: int = 0, **sizes: int) -> dict[str, Array]:
    """Draw inputs: normal floats, small integers, booleans that are true in three of four cases; lengths up to one and
    a half times the axis.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in graph.main.inputs:
        shape = tuple(size.evaluate(sizes) for size in value.type.shape)
        if value.type.dtype.is_float:
            made[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif value.type.dtype.name == "bool":
            made[value.name] = rng.random(shape) < 0.75
        else:
            most = sizes["T"] * 3 // 2 if len(shape) == 1 else 3
            made[value.name] = rng.integers(0, most, shape)
    return made


def check(graph: Graph, sizes: Mapping[str, int], target: str = "cpu", exe: KernelExecutable | None = None) -> None:
    given = drawn(graph, **sizes)
    exe = exe or compiled(graph, target)
    assert "FlashAttention" in kernels_of(exe)
    assert_near(exe(**given).y, interpret(graph, given, float64=True)["y"])


# -- meaning -------------------------------------------------------------------------------------------------


POSITIONAL: dict[str, tuple[Term, ...]] = {
    "any": (),
    "causal": (Causal(),),
    "window": (Window(9),),
    "causal window": (Window(140), Causal()),
}
OTHER: dict[str, Term] = {
    "padding": Padding(),
    "segments": Segments(),
    "mask": BooleanMask(),
    "bias": TensorBias("h s t"),
    "t5": T5Relative(8, 6, True),
    "alibi": Alibi(),
}
ALL = (Causal(), Window(100), *OTHER.values())
# numbers of queries and keys: across blocks, and parts of tiles and of vectors
SIZES = [(13, 150), (150, 13), (1, 40), (35, 129)]


TOGETHER: list[tuple[str, str | None]] = [(position, None) for position in POSITIONAL]
TOGETHER += [(position, other) for position in ("any", "causal window") for other in OTHER]


@pytest.mark.parametrize(("position", "other"), TOGETHER)
def test_a_term_at_many_sizes_from_one_compilation(position: str, other: str | None) -> None:
    graph = attention_graph(*POSITIONAL[position], *([OTHER[other]] if other else []))
    exe = compiled(graph)
    for queries, keys in SIZES:
        check(graph, {"B": 2, "S": queries, "T": keys}, exe=exe)


SPANNING: list[tuple[Term, ...]] = [
    (),
    (Causal(), Window(SPAN + 99)),
    (Padding(), T5Relative(8, 40, True), TensorBias("b t")),
]


@pytest.mark.parametrize("terms", SPANNING, ids=str)
def test_parts_of_several_spans_merge(terms: tuple[Term, ...]) -> None:
    """This also holds if a query sees no key of the first span, and for any span that has the largest score."""
    graph = attention_graph(*terms, heads=2, groups=1, d=8)
    exe = compiled(graph)
    for queries, keys in [(3, SPAN), (3, SPAN + 1), (20, 3 * SPAN - 7), (2 * SPAN + 30, 2 * SPAN + 30)]:
        check(graph, {"B": 2, "S": queries, "T": keys}, exe=exe)


@pytest.mark.parametrize("first", [0, 1])
def test_terms_together(first: int) -> None:
    """Each set has every other term; together the sets cover operands of all three kinds."""
    check(attention_graph(*list(OTHER.values())[first::2]), {"B": 2, "S": 37, "T": 41})


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_all_terms_twice(softcap: float | None) -> None:
    graph = attention_graph(*ALL, *reversed(ALL), softcap=softcap)
    exe = compiled(graph)
    for queries, keys in ((140, 150), (20, 9)):
        check(graph, {"B": 2, "S": queries, "T": keys}, exe=exe)


@pytest.mark.parametrize("kind", [BooleanMask, TensorBias])
def test_any_axes_of_a_tensor(kind: type[Any]) -> None:
    for axes in ("b", "h", "s", "t", "b s", "h t", "s t", "b h s", "b h s t"):
        check(attention_graph(kind(axes)), {"B": 2, "S": 5, "T": 21})


@pytest.mark.parametrize(("d", "e"), [(64, 64), (1, 80), (7, 130)])
def test_widths_and_shared_heads(d: int, e: int) -> None:
    for heads, groups in ((4, 4), (6, 1)):
        check(attention_graph(Causal(), heads=heads, groups=groups, d=d, e=e), {"B": 1, "S": 21, "T": 33})


def test_any_number_of_queries() -> None:
    graph = attention_graph(heads=2, groups=1)
    exe = compiled(graph)
    for queries in (*range(1, 2 * GROUP + 2), 300):
        check(graph, {"B": 1, "S": queries, "T": 7}, exe=exe)


def test_views_are_read_and_written_in_place() -> None:
    """Heads that are split from rows and merged into rows are not copied: the kernel is the only step."""

    def build(b: Builder) -> Expr:
        x, y = b.input("x", "f32[B,S,12]"), b.input("y", "f32[B,T,6]")
        q = b.rearrange(x, pattern="b s (h=4 d) -> b h s d")
        k = b.rearrange(y, pattern="b t (g=2 d) -> b g t d")
        made: Expr = b.rearrange(b.attention(q, k, k), pattern="b h s d -> b s (h d)")
        return made

    graph = graph_of(build)
    exe = compiled(graph)
    assert kernels_of(exe) == ["FlashAttention"]
    check(graph, {"B": 3, "S": 9, "T": 20}, exe=exe)


def test_elements_that_are_apart_are_copied_first() -> None:
    def build(b: Builder) -> Expr:
        q, k = b.input("q", "f32[B,2,4,S]"), b.input("k", "f32[B,2,T,4]")
        bias = b.rearrange(b.input("x", "f32[T,S]"), pattern="t s -> s t")
        heads = b.rearrange(q, pattern="b h d s -> b h s d")
        made = b.attention(heads, k, k, bias, terms=(TensorBias("s t"),), scale=0.5)
        turned: Expr = b.rearrange(made, pattern="b h s d -> b h d s")
        return turned

    graph = graph_of(build)
    exe = compiled(graph)
    assert kernels_of(exe).count("Pointwise") == 3  # for the queries, the bias, and the result
    check(graph, {"B": 2, "S": 9, "T": 20}, exe=exe)


# -- rows that see nothing, numbers that are not finite ---------------------------------------------------------


MASKED: dict[str, tuple[tuple[Term, ...], dict[str, int], dict[str, Array], tuple[Any, Any]]] = {
    "padding": ((Padding(),), {"S": 3, "T": 5}, {"x0": np.array([0, 5])}, (0, slice(None))),
    "negative length": ((Padding(),), {"S": 3, "T": 5}, {"x0": np.array([-2, 5])}, (0, slice(None))),
    "window": ((Causal(), Window(2)), {"S": 6, "T": 3}, {}, (slice(None), slice(5, 6))),
    "far window": ((Window(2),), {"S": 300, "T": 3}, {}, (slice(None), slice(5, 300))),
    "mask": ((BooleanMask("b t"),), {"S": 3, "T": 3}, {"x0": np.zeros((2, 3), bool)}, (slice(None), slice(None))),
    "bias": ((TensorBias("t"),), {"S": 3, "T": 3}, {"x0": np.full(3, -np.inf, np.float32)}, (0, slice(None))),
}


@pytest.mark.parametrize(("case", "softcap"), [*((case, None) for case in MASKED), ("window", 2.0)])
def test_a_query_that_sees_no_key_gets_zeros(case: str, softcap: float | None) -> None:
    terms, sizes, operands, (row, query) = MASKED[case]
    graph = attention_graph(*terms, softcap=softcap)
    given = drawn(graph, B=2, **sizes) | operands
    out = np.asarray(compiled(graph)(**given).y)
    np.testing.assert_array_equal(out[row, :, query], np.zeros_like(out[row, :, query]))
    assert_near(out, interpret(graph, given, float64=True)["y"])


@pytest.mark.parametrize("name", "qk")
def test_not_a_number_is_not_lost(name: str) -> None:
    """A NaN shows in every query that sees it. (A NaN among values may show in other queries as well, because 0 times
    NaN is NaN.)
    """
    graph = attention_graph(Causal())
    given = drawn(graph, B=1, S=40, T=40)
    given[name][0, :, 30] = np.nan
    out = np.isnan(np.asarray(compiled(graph)(**given).y)).all((0, 1, 3))
    np.testing.assert_array_equal(out, [i == 30 if name == "q" else i >= 30 for i in range(40)])


def test_large_scores_and_the_lowest_number_as_a_mask() -> None:
    """Scores that differ by 10^4, and a finite bias of float32's lowest number: if all keys have this bias, all keys
    count.
    """
    graph = attention_graph(TensorBias("b t"))
    given = drawn(graph, B=2, S=4, T=30)
    given["q"] *= np.float32(1e4)
    given["x0"] = np.zeros((2, 30), np.float32)
    given["x0"][0, 20:] = np.finfo(np.float32).min
    given["x0"][1] = np.finfo(np.float32).min
    out = np.asarray(compiled(graph)(**given).y)
    assert np.all(np.isfinite(out))
    mean = np.repeat(given["v"][1].astype(np.float64).mean(1), 3, 0)[:, None]
    assert_near(out[1], np.broadcast_to(mean, out[1].shape))


@pytest.mark.parametrize("terms", [(Causal(),), (Window(5),), (Padding(),)], ids=str)
def test_blocks_that_no_query_sees_are_not_read(terms: tuple[Term, ...]) -> None:
    """If such blocks were read, their NaN would reach the result, because 0 times NaN is NaN."""
    graph = attention_graph(*terms)
    given = drawn(graph, B=2, S=BLOCK - 20, T=3 * BLOCK) | ({"x0": np.array([7, 90])} if terms == (Padding(),) else {})
    exe = compiled(graph)
    out = exe(**given).y
    for name in "kv":
        given[name][:, :, BLOCK:] = np.nan
    assert np.all(np.isfinite(out))
    np.testing.assert_array_equal(exe(**given).y, out)


# -- bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", *SMALL])
@pytest.mark.parametrize("terms", [(), (Window(40), Padding())], ids=str)
def test_a_row_does_not_depend_on_the_batch(terms: tuple[Term, ...], target: str) -> None:
    graph = attention_graph(*terms)
    exe = compiled(graph, target)
    given = drawn(graph, B=3, S=45, T=200)
    whole = exe(**given).y
    for row in range(3):
        alone = {name: x[row : row + 1] for name, x in given.items()}
        np.testing.assert_array_equal(exe(**alone).y[0], whole[row])


@pytest.mark.parametrize("target", ["cpu", *SMALL])
def test_a_query_does_not_depend_on_the_others(target: str) -> None:
    graph = attention_graph()
    exe = compiled(graph, target)
    given = drawn(graph, B=1, S=290, T=150)
    whole = exe(**given).y
    for first, last in ((0, 1), (7, 9), (3, 40), (31, 290)):
        part = given | {"q": given["q"][:, :, first:last]}
        np.testing.assert_array_equal(exe(**part).y, whole[:, :, first:last])


@pytest.mark.parametrize("target", ["cpu", *SMALL])
def test_a_causal_query_does_not_depend_on_later_keys(target: str) -> None:
    graph = attention_graph(Causal())
    exe = compiled(graph, target)
    given = drawn(graph, B=1, S=300, T=300)
    whole = exe(**given).y
    for queries, keys in ((1, 1), (17, 17), (130, 130), (130, 260), (257, 300)):
        part = {"q": given["q"][:, :, :queries]} | {n: given[n][:, :, :keys] for n in "kv"}
        np.testing.assert_array_equal(exe(**part).y, whole[:, :, :queries])


@pytest.mark.parametrize("name", OTHER)
def test_a_part_of_the_queries_has_the_bits_that_it_has_among_all(name: str) -> None:
    """Positions begin at the position of the part's first query, for every term that the kernel supports."""
    terms = (Causal(), Window(100), OTHER[name])
    graph, part = attention_graph(*terms), attention_graph(*terms, start=7)
    exe = compiled(part)
    given = drawn(graph, B=2, S=150, T=150)
    whole = compiled(graph)(**given).y
    axes = [type.split() for type in ("b h s", "b", "b")] + [o.axes.split() for term in terms for o in term.operands]
    for last in (8, 150):
        own = {n: x[(slice(None),) * a.index("s") + (slice(7, last),)] if "s" in a else x
               for (n, x), a in zip(given.items(), axes, strict=True)}  # fmt: skip
        assert "FlashAttention" in kernels_of(exe)
        np.testing.assert_array_equal(exe(**own).y, whole[:, :, 7:last])


def test_threads_do_not_change_bits() -> None:
    graph = attention_graph(Causal(), heads=2, groups=1)
    given = drawn(graph, B=1, S=700, T=700)
    one, two = (find_backend("tvm").compile(graph, Target("cpu", threads=n), {})(**given).y for n in (1, 2))
    np.testing.assert_array_equal(one, two)


# -- instruction sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", SMALL)
def test_other_instruction_sets_of_this_machine(target: str) -> None:
    graph = attention_graph(*ALL, softcap=2.0)
    exe = compiled(graph, target)
    for queries, keys in SIZES:
        check(graph, {"B": 2, "S": queries, "T": keys}, exe=exe)
    check(attention_graph(Causal()), {"B": 2, "S": 21, "T": 140}, target)


@pytest.mark.parametrize("terms", [(), ALL], ids=["plain", "all terms"])
def test_arm64_is_assembled(terms: tuple[Term, ...]) -> None:
    exe = compiled(attention_graph(*terms, d=64, e=64), "arm64")
    (title,) = [kernel.title for kernel in exe.kernels if isinstance(kernel, FlashAttention)]
    assert "fmla" in exe.assembly(title)


def test_a_group_is_made_of_tiles() -> None:
    for isa in ISAS.values():
        assert GROUP % tile_rows(isa) == 0
        assert BLOCK % (2 * isa.lanes()) == 0


# -- attention computed by its body --------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class EveryOther(MaskTerm):
    """A term that no backend supports: keys at even positions."""

    name = "every_other"

    def reference(self, i: Array, j: Array, *operands: Array) -> Array:
        return np.asarray(j % 2 == 0)

    def body(self, grid: Grid, *operands: Expr) -> Expr:
        kept: Expr = grid.b.equal(grid.b.mod(grid.j, 2), 0)
        return kept


def test_cases_without_a_kernel_run_by_the_body() -> None:
    """Float64, and a term that no backend supports, with a row that sees no key, at several sizes with one compilation.

    The op suite also runs its samples in float64 and in 16 bits, and their gradients, by the body.
    """

    def build(b: Builder) -> Expr:
        types = {"q": "f64[B,4,S,8]", "k": "f64[B,2,T,8]", "v": "f64[B,2,T,6]", "lengths": "i64[B]"}
        made: Expr = b.attention(*(b.input(name, t) for name, t in types.items()), terms=(Padding(), EveryOther()))
        return made

    graph = graph_of(build)
    exe = compiled(graph)
    assert "FlashAttention" not in kernels_of(exe)
    for queries, keys in ((5, 9), (1, 20)):
        given = drawn(graph, B=2, S=queries, T=keys) | {"lengths": np.array([0, keys - 1])}
        given = {n: x.astype(v.type.dtype.numpy) for (n, x), v in zip(given.items(), graph.main.inputs, strict=True)}
        out = np.asarray(exe(**given).y)
        assert_close(out, interpret(graph, given, float64=True)["y"], ROUNDINGS * EPSILON["f64"], "attention")
        assert not out[0].any()


# -- with its probabilities, by the body ------------------------------------------------------------------------


def with_probabilities(*terms: Term, groups: int = 2, dtype: str = "f32") -> Graph:
    """Return attention of 4 heads over `groups` key heads, and its probabilities, on rows whose heads are views."""

    def build(b: Builder) -> Mapping[str, Expr]:
        q = b.rearrange(b.input("q", f"{dtype}[B,S,32]"), pattern="b s (h=4 d) -> b h s d")
        keys = f"{dtype}[B,T,{8 * groups}]"
        k, v = (b.rearrange(b.input(n, keys), pattern=f"b t (g={groups} d) -> b g t d") for n in "kv")
        dtypes = {"f": dtype, "i64": "i64", "bool": "bool"}
        sizes = SYMBOLS | {"h": "4"}
        given = [
            b.input(f"x{n}", f"{dtypes[operand.dtype]}[{','.join(sizes[axis] for axis in operand.axes.split())}]")
            for n, operand in enumerate(o for term in terms for o in term.operands)
        ]
        out, p = b.attention_with_probabilities(q, k, v, *given, terms=terms)
        return {"y": b.rearrange(out, pattern="b h s d -> b s (h d)"), "p": p}

    return graph_of(build)


def titles(graph: Graph) -> list[str]:
    """Return the titles of the steps of a graph, without epilogues and the width of panels."""
    return [step.kernel.title.split("_batch")[0] for step in steps_of(compiled(graph).program)]


EMPTYING: dict[str, Term] = {
    "padding": Padding(),
    "mask": BooleanMask("b s t"),
    "bias": TensorBias("b t"),
    "segments": Segments(),
    "window": Window(3),
}


@pytest.mark.parametrize("case", EMPTYING)
def test_probabilities_of_rows_that_may_be_empty_are_one_kernel(case: str) -> None:
    """Except for the steps that compute a mask, the number of steps is the same as without rows that may be empty.

    The kernel of the product scales, masks and adds biases.
    """
    assert titles(with_probabilities(groups=4)) == ["pack", "matmul", "softmax_f32", "pack", "matmul"]
    made = titles(with_probabilities(EMPTYING[case], groups=4))
    assert made[-5:] == ["pack", "matmul", "masked_softmax_f32", "pack", "matmul"]
    masks = {"padding": ["iota", "less"], "segments": ["equal"], "mask": [], "bias": []}
    assert case not in masks or made[:-5] == masks[case]


def test_queries_of_heads_that_share_keys_are_laid_out_as_they_are_scaled() -> None:
    """The queries that share a key head are rows of one product. Neither keys nor masks are copied."""
    made = titles(with_probabilities(TensorBias("b t")))
    assert made == ["mul", "pack", "matmul", "masked_softmax_f32", "pack", "matmul", "copy"]  # the result's heads


def test_probabilities_in_float64_are_those_of_primitives() -> None:
    made = titles(with_probabilities(Padding(), dtype="f64"))
    assert not any("softmax" in title for title in made) and "sum_rows_f64" in made


def test_queries_in_float16_are_scaled_before_the_product() -> None:
    """Only the product would overflow here: 8 times 100^2 is beyond float16, but not after scaling by 1/sqrt(8)."""
    graph = with_probabilities(Padding(), groups=4, dtype="f16")
    exe = compiled(graph)
    given = {name: np.full((1, 3, 32), 100, np.float16) for name in "qkv"} | {"x0": np.array([2])}
    assert float(np.finfo(np.float16).max) < 8 * 100**2
    assert "masked_softmax_f16" in titles(graph)
    np.testing.assert_array_equal(np.asarray(exe(**given).p), np.broadcast_to(np.float16([0.5, 0.5, 0]), (1, 4, 3, 3)))


@pytest.mark.parametrize("target", ["cpu", *SMALL])
@pytest.mark.parametrize("case", EMPTYING)
def test_probabilities_at_many_sizes(case: str, target: str) -> None:
    graph = with_probabilities(EMPTYING[case], groups=4 if case in ("mask", "window") else 2)
    exe = compiled(graph, target)
    assert any(kernel.title == "masked_softmax_f32" for kernel in exe.kernels)
    for queries, keys in ((13, 70), (37, 5), (1, 16)):
        given = drawn(graph, B=2, S=queries, T=keys)
        if case == "padding":
            given["x0"] = np.array([0, keys])
        elif case == "mask":
            given["x0"][1, 0] = False
        elif case == "bias":
            given["x0"][1] = -np.inf
        elif case == "segments":
            given["x0"][0, 0] = 7  # no key has this segment
        got, expected = exe(**given), interpret(graph, given, float64=True)
        assert_near(got.y, expected["y"])
        assert_near(got.p, expected["p"])
        empty = ~expected["p"].any(-1)
        assert empty.any() == (case != "window" or queries >= keys + 3)
        assert not np.asarray(got.p)[empty].any()


@pytest.mark.parametrize("target", ["cpu", *SMALL])
def test_probabilities_of_a_row_do_not_depend_on_the_others(target: str) -> None:
    graph = with_probabilities(Padding(), Window(40))
    exe = compiled(graph, target)
    given = drawn(graph, B=3, S=45, T=70) | {"x0": np.array([70, 0, 33])}
    whole = exe(**given)
    for row in range(3):
        alone = exe(**{name: x[row : row + 1] for name, x in given.items()})
        np.testing.assert_array_equal(alone.y[0], whole.y[row])
        np.testing.assert_array_equal(alone.p[0], whole.p[row])
    part = exe(**(given | {"q": given["q"][:, :9]}))
    np.testing.assert_array_equal(part.p, np.asarray(whole.p)[:, :, :9])


def test_threads_do_not_change_bits_of_probabilities() -> None:
    graph = with_probabilities(BooleanMask("b s t"))
    given = drawn(graph, B=2, S=70, T=90)
    one, two = (find_backend("tvm").compile(graph, Target("cpu", threads=n), {})(**given) for n in (1, 2))
    np.testing.assert_array_equal(one.p, two.p)
    np.testing.assert_array_equal(one.y, two.y)


def kept(*types: str, **attributes: Any) -> bool:
    parsed: Sequence[Type] = [parse_type(t) for t in types]
    return keeps(Attention(**attributes), parsed)


def test_cases_that_the_kernel_covers() -> None:
    own = ("f32[B,4,S,8]", "f32[B,2,T,8]", "f32[B,2,T,6]")
    assert kept(*own)
    assert not kept(*own, terms=(EveryOther(),))
    assert not kept(*(t.replace("f32", "f64") for t in own))
    assert not kept(*(t.replace("f32", "bf16") for t in own))
    assert not kept("f32[B,4,S,D]", "f32[B,2,T,D]", "f32[B,2,T,6]", scale=1.0)
    assert not kept("f32[B,4,S,8192]", "f32[B,2,T,8192]", "f32[B,2,T,6]")


def test_the_bias_by_distance_is_one_row_a_head() -> None:
    exe = compiled(attention_graph(T5Relative(8, 6)))
    assert [type(kernel) for kernel in exe.kernels] == [RelativeBias, FlashAttention]


def test_keys_of_the_next_head_are_prefetched() -> None:
    """A cache line of each of the head's queries, keys and values, and of each written row, is prefetched. Heads of 16
    have one line.
    """
    text = assembly(FlashAttention(16, 16, 1.0), ISAS["x86-64-v4"])
    assert text.count("prefetch") >= 4
    assert assembly(FlashAttention(32, 16, 1.0), ISAS["x86-64-v4"]).count("prefetch") > text.count("prefetch")
