"""On the TVM backend, the bits of a row depend only on that row. Products are rounded so that this holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest

pytest.importorskip("tvm")

import treadle
from tests.backend_checks import graph_of
from tests.fuzz.row_bits import ROWS, Case, differing, draw, instruction_sets
from tests.op_checks import Array
from treadle.backends.tvm.kernels.arithmetic.vector_math import formula
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.encoded.block_words import word_form
from treadle.backends.tvm.kernels.encoded.wide_block_product import WideBlockProduct
from treadle.backends.tvm.kernels.host.cache import compile_module
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, host_isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.matmul import Matmul
from treadle.backends.tvm.kernels.narrow.byte_product import QuadProduct
from treadle.backends.tvm.kernels.normalization import Normalize
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.backends.tvm.kernels.rotary import Rotary
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.graph import Graph
from treadle.ir.types import f32

HERE = instruction_sets()
SOME = [HERE[0], *(name for name in HERE[1:] if name == "x86-64-v3")]
each_isa = pytest.mark.parametrize("isa", HERE)


def case_of(graph: Graph, **options: object) -> Case:
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...]) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {name: normal(v.type.evaluate({})) for name, v in graph.parameters.items()}
    inputs = {v.name: normal(v.type.evaluate({"M": ROWS})) for v in graph.main.inputs}
    return Case("", graph, weights, inputs, dict(options))


@pytest.mark.parametrize("columns", [17, 24])
def test_a_scaled_product_with_a_residual_has_bits_of_its_own_row(columns: int) -> None:
    def build(b: Builder) -> Expr:
        y = b.linear(b.input("y", f32["M", 19]), b.parameter("w", f32[columns, 19]))
        return b.input("x", f32["M", columns]) + y * 0.1

    for isa in SOME:
        assert differing(case_of(graph_of(build), target=isa), Random(0))[1] == []


def test_a_quantized_product_with_bias_and_activation_has_bits_of_its_own_row() -> None:
    def build(b: Builder) -> Expr:
        w, bias = b.parameter("w", f32[24, 64]), b.parameter("bias", f32[24])
        return b.activated_linear(b.input("x", f32["M", 64]), w, bias, activation="gelu")

    for isa in SOME:
        assert differing(case_of(graph_of(build), target=isa, quantize="int8-weights"), Random(0))[1] == []


def test_products_of_bytes_with_a_bias_have_the_same_bits_on_every_instruction_set() -> None:
    def build(b: Builder) -> Expr:
        y = b.linear(b.input("y", f32["M", 64]), b.parameter("w", f32[24, 64]), b.parameter("bias", f32[24]))
        return b.input("x", f32["M", 24]) - y * 0.3

    case = case_of(graph_of(build))
    first, *others = (
        treadle.compile(case.graph, backend="tvm", weights=case.weights, quantize="int8", target=isa)(**case.inputs)
        for isa in (HERE[0], HERE[-1])
    )
    for other in others:
        np.testing.assert_array_equal(other["y"], first["y"])


@pytest.mark.parametrize("seed", [10, 41, 73, 105])
def test_drawn_programs_have_bits_of_their_own_rows(seed: int) -> None:
    """A small sample; tests/fuzz/row_bits.py draws any number of programs."""
    case = draw(seed, HERE)
    compared, wrong = differing(case, Random(seed), 5)
    assert compared >= 5 and wrong == [], case.title


# -- one rounding or two ---------------------------------------------------------------------------------------------

NUMBERS = np.random.default_rng(0).uniform(1, 2, (3, 64)).astype(np.float32)


def once(x: Array, y: Array, z: Array) -> Array:
    """Return x * y + z, rounded to float32 once.

    A product of float32 numbers is exact in float64, and the additional rounding of the sum to float64 is negligible.
    """
    return (x.astype(np.float64) * y + z).astype(np.float32)


@dataclass(frozen=True)
class Sums(Kernel):
    """A kernel for a * b +- c on vectors of `lanes` elements: one expression (FMA), or a named product (no FMA)."""

    how: str
    lanes: int

    def emit(self, k: Emitter) -> None:
        pointers = [k.pointer(name, f32) for name in ("x0", "x1", "x2", "y")]
        n, lanes = k.size("n"), self.lanes
        *read, y = [k.view(p, [n]) for p in pointers]
        with k.parallel(k.floor_divide(n, lanes), "i") as i:
            a, b, c = (k.load(x, [i * lanes], lanes) for x in read)
            if self.how == "named":
                product = k.let(a * b)
                made = product - c
            elif self.how == "lanes":
                made = formula(lambda a, b, c: a * b - c)(k, f32, lanes, a, b, c)
            else:
                made = {"a b - c": a * b - c, "c - a b": c - a * b, "c + a b": c + a * b}[self.how]
            k.store(y, [i * lanes], made, lanes)


@each_isa
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_a_product_is_fused_with_the_sum_of_its_own_expression_alone(isa: str, lanes: int) -> None:
    x, y, z = NUMBERS[0], NUMBERS[1], NUMBERS[0] * NUMBERS[1] * np.float32(0.999)
    signs = {"named": (1, -1), "lanes": (1, -1), "a b - c": (1, -1), "c - a b": (-1, 1), "c + a b": (1, 1)}
    for how, (of_product, of_z) in signs.items():
        found = np.zeros_like(x)
        bind(Sums(how, lanes), [x, y, z, found], [x.size], ISAS[isa])()
        fused, apart = once(of_product * x, y, of_z * z), of_product * (x * y) + of_z * z
        assert (fused != apart).any() or how == "c + a b"
        expected = fused if ISAS[isa].fused and how != "named" else apart
        np.testing.assert_array_equal(found, expected, err_msg=how)


CHAIN = Chain(
    ("f32", "f32", "f32"), (Instruction("mul", (0, 1), "f32"), Instruction("add", (3, 2), "f32"))
)  # as an epilogue: the sum times a vector, plus a matrix
WORDS = word_form(parse_encoding("q4_k"))
assert WORDS is not None
KERNELS: list[Kernel] = [
    Matmul(16, CHAIN, ("n", "mn")),
    QuadProduct(CHAIN, ("n", "mn")),
    WideBlockProduct(WORDS, CHAIN, ("n", "mn")),
    Normalize(True, True, True, 1e-5, "f32"),
    Softmax(False, "f32"),
    Rotary(False, 4, "f32", "i64"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.title)
def test_no_sum_has_a_product_left_to_fuse(kernel: Kernel) -> None:
    """The test reads the code from which LLVM selects instructions: each product is followed by a fence, or already
    fused.
    """
    text = str(compile_module(kernel, host_isa()).inspect_source("ll"))
    fenced = 0
    for function in text.split("\ndefine "):
        lines = [line for line in function.splitlines() if "#dbg" not in line]
        for name in re.findall(r"(%\S+) = fmul ", function):
            readers = [line for line in lines if re.search(re.escape(name) + r"(?![\w.]| =)", line)]
            assert all("@llvm.arithmetic.fence" in line for line in readers), readers
            fenced += len(readers)
    assert (fenced and "@llvm.fmuladd" in text) or isinstance(kernel, QuadProduct)
