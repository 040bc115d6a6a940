"""The TVM backend's elementwise functions beyond the op suite: accuracy, extreme values, bits, and all instruction
sets.

All functions of a kind are compiled as one kernel (`Each`), so that more inputs cost no further compilations.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.tvm.kernels.arithmetic.exponentials import LEAST_NORMAL, exp_for_pairs, exp_nonpositive
from treadle.backends.tvm.kernels.arithmetic.vector_math import FUNCTIONS
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.cache import assembly, compile_module
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, Isa, host_isa, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.pointwise import BLOCK, Chain, Instruction, Pointwise
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import OPS
from treadle.ir.ops.error_function import erf
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.types import DTYPES, Type, bf16, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

Array = np.ndarray[Any, Any]

pytestmark = [
    pytest.mark.skipif(tvm_runtime.missing() is not None, reason=str(tvm_runtime.missing())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's warnings about infinities and NaNs in the inputs
]

OPERANDS = {"cast": 1, "where": 3, "round_to": 1}
FLOATS, INTS = ("f64", "f32", "f16", "bf16"), ("i64", "i32", "i16", "i8", "u8")
SPACING = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
LEAST = {"f64": 2.0**-1074, "f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}
"""The smallest number above 0 of each float dtype."""

ROUNDING = 2.0**-24
"""The largest relative change of a number by one rounding to float32."""


# -- running ops -----------------------------------------------------------------------------------------------


def levels() -> list[Isa]:
    """Return the distinct instruction sets of this machine: its best, one without AVX-512, one without F16C and FMA."""
    named = [ISAS[name] for name in ("x86-64-v3", "x86-64-v2")]
    return list(dict.fromkeys([host_isa(), *(isa for isa in named if runs_here(isa))]))


LEVELS = levels() if tvm_runtime.missing() is None else []
each_level = pytest.mark.parametrize("isa", LEVELS, ids=str)
best_and_least = pytest.mark.parametrize("isa", [isa for isa in LEVELS if isa.name != "x86-64-v3"], ids=str)


@dataclass(frozen=True)
class Each(Kernel):
    """y_j[i] = chain_j(x_j0[i], x_j1[i], ...) for every chain j

    alone   True for code that runs element by element; otherwise in vectors, as in `Pointwise`

    Arguments of the kernel: operands and result of one chain after another, then the number of elements of each chain.
    """

    chains: tuple[Chain, ...]
    alone: bool = False

    def lanes(self, j: int, isa: Isa) -> int:
        return 1 if self.alone else isa.lanes(self.chains[j].width)

    def emit(self, k: Emitter) -> None:
        pointers = [
            [k.pointer(f"x{j}_{i}", d) for i, d in enumerate([*(DTYPES[n] for n in chain.inputs), chain.dtype])]
            for j, chain in enumerate(self.chains)
        ]
        counts = [k.size(f"n{j}") for j in range(len(self.chains))]
        with k.parallel(1):
            for j, chain in enumerate(self.chains):
                lanes = self.lanes(j, k.isa)
                *operands, y = (k.view(p, [counts[j]]) for p in pointers[j])
                with k.loop(k.floor_divide(counts[j], lanes), "v") as v:
                    read = [k.load(x, [v * lanes], lanes) for x in operands]
                    k.store(y, [v * lanes], chain.emit(k, read, lanes), lanes)


def run(chains: Sequence[Chain], operands: Sequence[Sequence[Array]], isa: Isa, alone: bool = False) -> list[Array]:
    """Run each chain on its own operands; arrays have one length and are padded to whole vectors."""
    kernel = Each(tuple(chains), alone)
    arrays: list[Array] = []
    counts = []
    made = []
    for j, (chain, given) in enumerate(zip(chains, operands, strict=True)):
        n = len(given[0])
        counts.append(-(-n // kernel.lanes(j, isa)) * kernel.lanes(j, isa))
        padded = [np.concatenate([x, np.ones(counts[j] - n, x.dtype)]) for x in given]
        arrays += [stored(x, d) for x, d in zip(padded, chain.inputs, strict=True)]
        arrays.append(np.zeros(counts[j], chain.dtype.numpy or np.uint16))
        made.append((arrays[-1], n, chain.dtype is bf16))
    bind(kernel, arrays, counts, isa)()
    return [widened(y[:n]) if narrow else y[:n] for y, n, narrow in made]


def chain(name: str, dtype: str, **attributes: Any) -> Chain:
    """Return a chain of one op on operands of one dtype (and a condition)."""
    op = OPS[name](**attributes)
    count = operands_of(name)
    inputs = ("bool", dtype, dtype) if name == "where" else (dtype,) * count
    (result,) = op.infer([Type(DTYPES[d]) for d in inputs])
    held = () if name == "cast" else tuple(op.attributes.items())
    return Chain(inputs, (Instruction(name, tuple(range(count)), result.dtype.name, held),))


def operands_of(name: str) -> int:
    return OPERANDS.get(name) or len(OPS[name].samples[0].types)


def taken_by(dtype: str) -> list[str]:
    """Return the ops without attributes that are defined on a dtype."""
    names = []
    for name in sorted(FUNCTIONS.keys() - {"round_to", "fake_quantize"}):
        try:
            chain(name, dtype)
        except RuleError:
            continue
        names.append(name)
    return names


def stored(x: Array, dtype: str) -> Array:
    return rounded(x) if dtype == "bf16" else np.ascontiguousarray(x, DTYPES[dtype].numpy)


def held(x: Array, dtype: str) -> Array:
    """Return the array rounded to a dtype."""
    with np.errstate(all="ignore"):
        return np.asarray(OPS["cast"](to=DTYPES[dtype]).reference(np.asarray(x)))  # type: ignore[call-arg]


def meaning(name: str, operands: Sequence[Array], **attributes: Any) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(OPS[name](**attributes).reference(*operands))


# -- numbers to try ----------------------------------------------------------------------------------------------

_SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e30, -1e30, 2.0**27, -(2.0**40)]
_ENDS = [1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38, -3.4028235e38]
_OF_EXP = [88.72283, 88.72284, -87.33655, -103.97, -103.98]
_TURNS = [np.pi * n / 2 for n in (1, 2, 3, 1e3, 1e7, 1e12)]
EDGES = np.array([*_SPECIAL, *_ENDS, *_OF_EXP, *_TURNS], np.float32)


def random_bits(count: int, seed: int = 0) -> Array:
    """Draw float32 numbers of every magnitude, including infinities and NaNs."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def singles(low: float, high: float) -> Array:
    return np.concatenate([EDGES, random_bits(10_000), np.linspace(low, high, 30_001).astype(np.float32)])


def extremes(dtype: str) -> Array:
    """Return the numbers at which a dtype's arithmetic may fail."""
    if dtype == "bool":
        return np.array([False, True])
    if dtype in FLOATS:
        return held(np.array([0.0, 1.0, 0.1, 0.5, 2.5, 3.0, 1e20, 1e-30, np.inf]), dtype)
    bounds = np.iinfo(DTYPES[dtype].numpy)
    values = {bounds.min, bounds.min + 1, -7, -2, -1, 0, 1, 2, 7, bounds.max - 1, bounds.max}
    return np.array(sorted(v for v in values if bounds.min <= v <= bounds.max), bounds.dtype)


def pairs(dtype: str, count: int) -> tuple[Array, Array]:
    """Return two operands: every pair of extremes, with both signs, and numbers of many magnitudes."""
    values = extremes(dtype)
    if dtype in FLOATS:
        values = np.concatenate([values, -values, np.array([np.nan], values.dtype)])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2):
        if dtype == "bool":
            drawn.append(rng.integers(0, 2, count).astype(np.bool_))
        elif dtype in FLOATS:
            drawn.append(held(rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count), dtype))
        else:
            low, high = values.min(), values.max()
            wide = rng.integers(low, high, count // 2, dtype=values.dtype, endpoint=True)
            near = rng.integers(max(low, -9), 9, count - count // 2).astype(values.dtype)
            drawn.append(rng.permutation(np.concatenate([wide, near])))
    x, y = np.repeat(values, len(values)), np.tile(values, len(values))
    return np.concatenate([x, drawn[0]]), np.concatenate([y, drawn[1]])


def operands_for(name: str, x: Array, y: Array) -> list[Array]:
    condition = np.arange(len(x)) % 3 == 0
    return [condition, x, y] if name == "where" else [x, y][: operands_of(name)]


# -- float32 against float64 -------------------------------------------------------------------------------------


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# name: the function in float64, the interval of a dense grid, the maximal error in units in the last place. tanh and
# erf round the argument's square (which counts in each of two polynomials), the polynomials, a product and a division.
# The errors of the square and of the polynomials partly cancel; from 1/2 to 1, a rounding may be a whole unit.
EXACT: Mapping[str, tuple[Callable[..., Array], float, float, float]] = {
    "exp": (np.exp, -110, 95, 1.1),
    "log": (np.log, 0.2, 5, 1.1),
    "expm1": (np.expm1, -20, 95, 4),
    "log1p": (np.log1p, -1, 9, 4),
    "softplus": (lambda x: np.logaddexp(x, 0), -110, 110, 6),
    "tanh": (np.tanh, -10, 10, 7),
    "erf": (erf, -5, 5, 7),
    "sin": (np.sin, -100, 100, 0.7),
    "cos": (np.cos, -100, 100, 0.7),
    "sqrt": (np.sqrt, 0, 9, 0.5),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 0, 9, 1.5),
    "reciprocal": (np.reciprocal, -9, 9, 0.5),
    "floor": (np.floor, -9, 9, 0),
    "round": (np.rint, -9, 9, 0),
    "relu": (lambda x: np.maximum(x, 0), -9, 9, 0),
    "abs": (np.abs, -9, 9, 0),
    "neg": (np.negative, -9, 9, 0),
    "sign": (np.sign, -9, 9, 0),
}

# name: the smallest number whose result is exactly 1
ONE = {"tanh": 9.02, "erf": 3.93}

# name: the function, the exponent of e in it, and the exponent's error in its own roundings. quick_gelu: the constant,
# off by 0.22 of a rounding, and one product. gelu_tanh: two constants, each off by about half a rounding, a square,
# and, if not fused, a product, a sum and a product.
EXPONENT: Mapping[str, tuple[Callable[[Array], Array], Callable[[Array], Array], float]] = {
    "sigmoid": (_sigmoid, lambda x: -x, 0),
    "silu": (lambda x: x * _sigmoid(x), lambda x: -x, 0),
    "quick_gelu": (lambda x: x * _sigmoid(1.702 * x), lambda x: -1.702 * x, 1.25),
    "gelu_tanh": (
        lambda x: x * _sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
        lambda x: -2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3),
        4.6,
    ),
}


def quietly(function: Callable[..., Array], *operands: Array) -> Array:
    """Apply a function in float64, without NumPy's warnings."""
    with np.errstate(all="ignore"):
        return np.asarray(function(*(x.astype(np.float64) for x in operands)))


@cache
def on_singles(isa: Isa) -> dict[str, tuple[Array, Array]]:
    """Return inputs and outputs of each function of a single float32."""
    grids = {name: singles(low, high) for name, (_, low, high, _) in EXACT.items()}
    grids |= {name: singles(-20, 20) for name in (*EXPONENT, "gelu")}
    made = run([chain(name, "f32") for name in grids], [[x] for x in grids.values()], isa)
    return {name: (x, y) for (name, x), y in zip(grids.items(), made, strict=True)}


def units_off(got: Array, expected: Array) -> float:
    """Return the largest distance in units in the last place; inf if infinities or NaNs are at other elements than
    expected.
    """
    with np.errstate(over="ignore"):
        nearest = expected.astype(np.float32)
    finite = np.isfinite(nearest)
    np.testing.assert_array_equal(got[~finite], nearest[~finite])
    assert np.all(np.isfinite(got[finite]))
    wide, right = got[finite].astype(np.float64), expected[finite]
    return float(np.max(np.abs(wide - right) / np.spacing(np.abs(nearest[finite])).astype(np.float64)))


@each_level
@pytest.mark.parametrize("name", EXACT)
def test_float32_is_within_units_in_the_last_place(name: str, isa: Isa) -> None:
    function, _, _, most = EXACT[name]
    x, y = on_singles(isa)[name]
    assert units_off(y, quietly(function, x)) <= most


@each_level
@pytest.mark.parametrize("name", ONE)
def test_functions_that_tend_to_one_reach_one(name: str, isa: Isa) -> None:
    x, y = on_singles(isa)[name]
    far = np.abs(x) >= ONE[name]
    assert np.count_nonzero(far) > 1000
    np.testing.assert_array_equal(y[far], np.sign(x[far]))


@each_level
@pytest.mark.parametrize("name", EXPONENT)
def test_errors_of_an_exponential_grow_with_its_exponent(name: str, isa: Isa) -> None:
    """x / (1 + e^u) has five roundings (two in e^u, the sum, the division, the result), and |u| times the error of
    u.
    """
    function, exponent, roundings = EXPONENT[name]
    x, got = on_singles(isa)[name]
    kept = np.isfinite(x)  # x / (1 + e^-x) at -inf is inf / inf
    x, got = x[kept], got[kept].astype(np.float64)
    expected, u = quietly(function, x), np.abs(quietly(exponent, x))
    overflow = quietly(exponent, x) > 88.722
    bound = (5 + roundings * np.minimum(u, 89)) * ROUNDING * np.abs(expected) + 2.0**-149
    # where e^u is inf in float32, the result is 0, which is within |x| 2^-126 of the exact result
    bound = np.where(overflow, np.maximum(np.abs(x.astype(np.float64)), 1) * 2.0**-126, bound)
    assert np.all(np.abs(got - expected) <= bound), x[np.abs(got - expected) > bound]


@each_level
def test_gelu_is_off_by_roundings_of_its_argument(isa: Isa) -> None:
    """x (Phi(x) - 1/2) + x/2: 7 roundings of the quotient, which is at most 1/2, count half; so does its approximation;
    plus two terms and a sum.
    """
    x, got = on_singles(isa)["gelu"]
    kept = np.isfinite(x)
    x, got = x[kept].astype(np.float64), got[kept].astype(np.float64)
    expected = quietly(lambda x: x * (0.5 + 0.5 * erf(x * np.sqrt(0.5))), x)
    assert np.all(np.abs(got - expected) <= 6 * ROUNDING * np.abs(x) + 2.0**-149)


@each_level
def test_powers_are_rounded_once(isa: Isa) -> None:
    rng = np.random.default_rng(1)
    grid = np.array(
        [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, np.inf, -np.inf, np.nan, 1e-45, 2.0**25 + 4]
    )
    x = np.concatenate([np.repeat(grid, len(grid)), random_bits(9_000, 2), rng.uniform(0, 3, 20_000)])
    y = np.concatenate([np.tile(grid, len(grid)), rng.uniform(-3, 3, 9_000), rng.uniform(-140, 140, 20_000)])
    x, y = x.astype(np.float32), y.astype(np.float32)
    (made,) = run([chain("pow", "f32")], [[x, y]], isa)
    assert units_off(made, quietly(np.power, x, y)) <= 0.51


@dataclass(frozen=True)
class NonpositiveExp(Kernel):
    """y[i] = e^x[i] by a function for x <= 0; in vectors. Arguments: x, y; the number of elements."""

    for_pairs: bool = False

    def emit(self, k: Emitter) -> None:
        pointers, n, lanes = [k.pointer(name, f32) for name in "xy"], k.size("n"), k.isa.lanes()
        x, y = (k.view(p, [n]) for p in pointers)
        exp = exp_for_pairs if self.for_pairs else exp_nonpositive
        with k.parallel(k.floor_divide(n, lanes), "v") as v:
            k.store(y, [v * lanes], exp(k, lanes, k.load(x, [v * lanes], lanes)), lanes)


@each_level
def test_the_shorter_exponential_is_as_good_where_it_is_not_subnormal(isa: Isa) -> None:
    least = np.float32(LEAST_NORMAL)
    edges = [0.0, -0.0, -1e-45, least, np.nextafter(least, np.float32(-1e9)), -1e30, -np.inf, np.nan]
    x = np.concatenate([np.array(edges, np.float32), -np.abs(random_bits(4088)), np.linspace(-88, 0, 20_480)])
    x = x.astype(np.float32)
    y = np.full_like(x, -1)
    bind(NonpositiveExp(), [x, y], [len(x)], isa)()
    assert units_off(y[~(x < least)], quietly(np.exp, x[~(x < least)])) <= 1.1
    assert not y[x < least].any()


@pytest.mark.skipif("avx512f" not in host_isa().needs, reason="no AVX-512 here")
def test_the_exponential_of_weights_that_are_rounded_is_right_to_what_they_keep() -> None:
    x = np.concatenate([np.array([0.0, -0.0, -1e30, -np.inf]), np.linspace(-87, 0, 40_960)])[: 16 * 2560]
    x = x.astype(np.float32)
    y = np.full_like(x, -1)
    bind(NonpositiveExp(for_pairs=True), [x, y], [len(x)], host_isa())()
    assert list(y[:4]) == [1, 1, 0, 0]
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y - exact) <= (4e-6 + 1e-7 * np.abs(x)) * exact)[4:].all()


# -- every op and dtype ------------------------------------------------------------------------------------------


@best_and_least
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_is_as_numpy_has_it(dtype: str, isa: Isa) -> None:
    """Integers and bools must be equal: they wrap around, and division rounds down. Floats must agree within roundings
    of the dtype.
    """
    names = taken_by(dtype)
    x, y = pairs(dtype, 997)
    operands = [operands_for(name, x, y) for name in names]
    for name, given, got in zip(names, operands, run([chain(n, dtype) for n in names], operands, isa), strict=True):
        wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in given]
        expected = meaning(name, wide)
        if name == "gelu_tanh":  # at -inf the formula is 0 * inf; here inf / inf
            expected = np.where(np.isinf(wide[0]), got, expected)
        if expected.dtype.kind != "f":
            np.testing.assert_array_equal(got, expected, err_msg=name)
            continue
        expected = held(expected, dtype)
        if name in ("floor_divide", "mod") and dtype in ("f32", "f64"):
            # in its own dtype, because the last digits of a quotient decide the result of rounding down
            expected = meaning(name, given)
        np.testing.assert_array_less(
            distances(got, expected), bounds(name, dtype, wide[0], expected), err_msg=f"{name} of {dtype}"
        )


def distances(got: Array, expected: Array) -> Array:
    """Return distances: 0 if both are the same, including NaN and infinities, inf if only one is NaN or infinite."""
    with np.errstate(invalid="ignore"):
        off = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(same, 0, np.where(np.isnan(off), np.inf, off))


def bounds(name: str, dtype: str, x: Array, expected: Array) -> Array:
    """Return the bounds of `distances`: one spacing if 16-bit results are rounded once from f32, otherwise several, as
    computed above.

    If e^-x overflows, a nonzero result becomes 0; if gelu's digits cancel, its bound is relative to x.
    """
    narrow = dtype in ("f16", "bf16")
    own = "f64" if dtype == "f64" else "f32"
    size, argument = (np.where(np.isfinite(a), np.abs(a), 0).astype(np.float64) for a in (expected, x))
    bound = (1.01 if narrow else 8) * SPACING[dtype] * size + 1.01 * LEAST[dtype]
    if name in EXPONENT:
        bound = bound + argument * (2.0**-126 if own == "f32" else 2.0**-1022) + 2.0**-126 * (own == "f32")
        bound = bound + 50 * 4.6 * SPACING[own] * size  # exponents up to 100
    if name in ("gelu", "gelu_tanh"):  # in gelu_tanh's formula, digits cancel as well, in the reference and in f64
        bound = bound + 4 * SPACING[own if name == "gelu" else "f64"] * argument
    return np.asarray(bound)


@best_and_least
@pytest.mark.parametrize("to", DTYPES)
def test_casts_are_as_the_reference_has_them(to: str, isa: Isa) -> None:
    """Casts from every dtype, on numbers that both dtypes represent; every f16 and bf16 number is widened."""
    operands = []
    for dtype in DTYPES:
        x = pairs(dtype, 500)[0]
        if dtype in ("f16", "bf16") and to == "f32":
            bits = np.arange(2**16, dtype=np.uint16)
            x = bits.view(np.float16) if dtype == "f16" else widened(bits)
        if dtype in FLOATS and to in INTS:
            limits = np.iinfo(DTYPES[to].numpy)
            x = x[np.isfinite(x) & (x >= limits.min) & (x <= limits.max)]
        operands.append([x])
    made = run([chain("cast", dtype, to=DTYPES[to]) for dtype in DTYPES], operands, isa)
    for dtype, (x,), got in zip(DTYPES, operands, made, strict=True):
        np.testing.assert_array_equal(got, meaning("cast", [x], to=DTYPES[to]), err_msg=dtype)


@best_and_least
def test_casts_call_nothing_of_a_compilers_library(isa: Isa, tmp_path: Path) -> None:
    """For a missing instruction, LLVM calls a function such as __truncdfhf2, which does not exist in every process."""
    linker = shutil.which("ld")
    if linker is None:
        pytest.skip("ld is not installed")
    chains = [chain("cast", dtype, to=DTYPES[to]) for dtype in DTYPES for to in DTYPES]
    for alone in (False, True):
        compile_module(Each(tuple(chains), alone), isa).write_to_file(str(tmp_path / "casts.o"), "o")
        command = [linker, "-shared", "-z", "defs", "-o", str(tmp_path / "casts.so"), str(tmp_path / "casts.o")]
        done = subprocess.run(command, env={"LC_ALL": "C"}, capture_output=True, text=True, check=False)
        called = set(re.findall(r"undefined (?:reference to|symbol:?) [`']?(\w+)", done.stderr))
        assert done.returncode == 0 or called, done.stderr
        # every process has these
        assert {name for name in called if not name.startswith("TVM")} <= {"memcpy", "memset"}


@best_and_least
def test_values_beyond_an_integer_become_its_minimum(isa: Isa) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, 2.0**63, 3.9, -3.9], np.float32)
    narrow, wide = run([chain("cast", "f32", to=DTYPES[to]) for to in ("i32", "i64")], [[x], [x]], isa)
    np.testing.assert_array_equal(narrow, [-(2**31)] * 7 + [3, -3])
    np.testing.assert_array_equal(wide, [-(2**63)] * 5 + [2**31, -(2**63), 3, -3])


@best_and_least
def test_narrow_floats_are_rounded_to_nearest_even(isa: Isa) -> None:
    """Inputs are numbers of the dtype, midpoints of two of them, and their neighbours in float32 and float64."""
    kinds = list(itertools.product(("f16", "bf16"), ("f32", "f64")))
    operands = []
    for to, dtype in kinds:
        near = np.float32 if dtype == "f32" else np.float64
        bits = np.arange(2**16, dtype=np.uint16)
        own = bits.view(np.float16).astype(np.float64) if to == "f16" else widened(bits).astype(np.float64)
        own = np.sort(own[np.isfinite(own)])
        middle = ((own[1:] + own[:-1]) / 2).astype(near)
        moved = [np.nextafter(middle, near(np.inf)), np.nextafter(middle, near(-np.inf))]
        operands.append([np.concatenate([own.astype(near), middle, *moved, EDGES.astype(near)])])
    made = run([chain("cast", dtype, to=DTYPES[to]) for to, dtype in kinds], operands, isa)
    for (to, dtype), (x,), got in zip(kinds, operands, made, strict=True):
        expected = meaning("cast", [x], to=DTYPES[to])
        np.testing.assert_array_equal(got, expected, err_msg=f"{dtype} to {to}")
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected), err_msg=f"{dtype} to {to}")


@best_and_least
def test_rounding_to_a_format_is_as_the_reference_has_it(isa: Isa) -> None:
    x = np.concatenate([EDGES, random_bits(2000), np.linspace(-500, 500, 5001), np.linspace(-0.02, 0.02, 2001)])
    kinds = list(itertools.product(FORMATS, (False, True), ("f32", "f64")))
    operands = [[held(x, dtype)] for _, _, dtype in kinds]
    chains = [chain("round_to", dtype, format=format, saturate=saturate) for format, saturate, dtype in kinds]
    for (format, saturate, _), given, got in zip(kinds, operands, run(chains, operands, isa), strict=True):
        np.testing.assert_array_equal(got, meaning("round_to", given, format=format, saturate=saturate))


# -- bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_an_element_has_the_same_bits_in_a_vector_and_alone(dtype: str) -> None:
    isa = host_isa()
    names = taken_by(dtype)
    operands = [operands_for(name, *pairs(dtype, 203)) for name in names]
    chains = [chain(name, dtype) for name in names]
    alone = run(chains, operands, isa, alone=True)
    for name, got, expected in zip(names, alone, run(chains, operands, isa), strict=True):
        assert got.tobytes() == expected.tobytes(), name


@each_level
def test_lanes_of_another_width_have_the_same_bits(isa: Isa) -> None:
    """A chain that ends in f64 uses half as many lanes as a chain in f32."""
    x = singles(-100, 100)
    names = ("exp", "tanh", "silu", "log", "sin", "gelu")
    single = [chain(name, "f32") for name in names]
    double = [Chain(("f32",), (*c.instructions, Instruction("cast", (1,), "f64"))) for c in single]
    assert {c.width for c in single} == {4}
    assert {c.width for c in double} == {8}
    made = run([*single, *double], [[x]] * (2 * len(names)), isa)
    for name, expected, got in zip(names, made[: len(names)], made[len(names) :], strict=True):
        np.testing.assert_array_equal(got, expected.astype(np.float64), err_msg=name)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "bool"])
def test_an_elements_place_does_not_matter(dtype: str) -> None:
    """The element is in a whole vector, in an incomplete last vector, at the end of a task, at a stride, or next to a
    repeated operand.
    """
    op = "logical_or" if dtype == "bool" else "sub"
    first = Instruction(op, (0, 1), dtype)
    what = Chain((dtype, dtype), (first,) if dtype == "bool" else (first, Instruction("silu", (2,), dtype)))
    count = 2 * BLOCK + 77
    x, y = (stored(np.resize(a, count), dtype) for a in pairs(dtype, 999))
    whole = by_loop(what, "111", x, y)
    assert whole.tobytes() == run([what], [[unstored(x, dtype), unstored(y, dtype)]], host_isa())[0].tobytes()
    for start, stop in ((1, count), (5, 12), (64, 65), (BLOCK - 3, BLOCK + 3)):
        np.testing.assert_array_equal(by_loop(what, "111", x[start:stop], y[start:stop]), whole[start:stop])
    np.testing.assert_array_equal(by_loop(what, "s11", np.repeat(x, 3), y, x_stride=3), whole)
    repeated = by_loop(what, "101", x[:203], y[4:5])
    np.testing.assert_array_equal(repeated, by_loop(what, "111", x[:203], np.repeat(y[4:5], 203)))


@pytest.mark.parametrize("count", [1, 77, 2 * BLOCK + 77])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_an_operand_that_is_written_over_gives_the_same_bits(dtype: str, count: int) -> None:
    """The operand has no separate pointer, because kernels assume that no two pointers refer to the same memory."""
    what = Chain((dtype, dtype), (Instruction("sub", (0, 1), dtype), Instruction("silu", (2,), dtype)))
    x, y = (stored(np.resize(a, count), dtype) for a in pairs(dtype, 999))
    apart = by_loop(what, "111", x, y)
    for over, (written, other) in enumerate(((x.copy(), y), (y.copy(), x))):
        kernel = Pointwise(what, 1, "111", over)
        assert kernel != Pointwise(what, 1, "111") and "over" in kernel.key
        bind(kernel, [other, written], [count, 1, 1])()
        np.testing.assert_array_equal(unstored(written, dtype), apart)


def by_loop(what: Chain, inner: str, x: Array, y: Array, x_stride: int = 1) -> Array:
    """Return the result of a chain of two operands, computed by `Pointwise` in one loop."""
    count = len(x) // x_stride
    made = np.zeros(count, what.dtype.numpy or np.uint16)
    bind(Pointwise(what, 1, inner), [x, y, made], [count, x_stride, int(inner[1]), 1])()
    return unstored(made, what.dtype.name)


def unstored(x: Array, dtype: str) -> Array:
    return widened(x) if dtype == "bf16" else x


# -- constants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_constants_are_what_they_are(dtype: str) -> None:
    """Constants must not be folded away: x * 0 is not 0 if x is inf, x + 0 is not x if x is -0, and x == x is false if
    x is NaN.
    """
    x = np.array([1.0, -1.0, 0.0, -0.0, np.inf, -np.inf, np.nan])
    chains, expected = [], []
    for value in (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45):
        constant = Instruction("constant", (), dtype, (("value", value),))
        rest = held(np.full(len(x), value), dtype)
        for name in ("add", "mul", "maximum", "equal"):
            chains.append(Chain((dtype,), (constant, Instruction(name, (0, 1), chain(name, dtype).dtype.name))))
            expected.append(meaning(name, [held(x, dtype), rest]))
    for name in ("equal", "not_equal", "less_equal", "sub", "div"):
        chains.append(Chain((dtype,), (Instruction(name, (0, 0), chain(name, dtype).dtype.name),)))
        expected.append(meaning(name, [x, x]))
    for what, got, right in zip(chains, run(chains, [[x]] * len(chains), host_isa()), expected, strict=True):
        wanted = right if what.dtype.name == "bool" else held(right, dtype)
        np.testing.assert_array_equal(got, wanted, err_msg=str(what.instructions))


def test_a_selection_by_a_constant_condition() -> None:
    x, y = np.arange(40, dtype=np.float32), -np.arange(40, dtype=np.float32)
    conditions = [Instruction("constant", (), "bool", (("value", value),)) for value in (True, False)]
    chains = [Chain(("f32", "f32"), (c, Instruction("where", (2, 0, 1), "f32"))) for c in conditions]
    for got, expected in zip(run(chains, [[x, y], [x, y]], host_isa()), (x, y), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_narrow_integers_take_all_lanes() -> None:
    assert chain("logical_and", "bool").width == 1
    assert chain("add", "i16").width == 2
    assert chain("add", "bf16").width == 4  # computed in f32
    assert Chain(("bf16",), ()).width == 2  # a copy


# -- assembly ----------------------------------------------------------------------------------------------------


def calls(text: str) -> Iterable[str]:
    """Yield the calls in code, except for TVM's functions, functions for an error's message, and the loop's body."""
    for line in text.splitlines():
        if line.split()[:1] in (["callq"], ["bl"], ["call"]) and not any(
            w in line for w in ("TVM", "tvm", "*", "kernel")
        ):
            yield line.split()[1]


# this instruction set has no instruction that rounds
@pytest.mark.parametrize("name", [name for name in ISAS if name != "x86-64"])
def test_vector_code_calls_nothing(name: str) -> None:
    """The code calls no function of the math library, and no conversion function of a compiler."""
    names = ("exp", "tanh", "gelu", "gelu_tanh", "silu", "sigmoid", "log", "erf", "pow")
    text = assembly(Each(tuple(chain(n, d) for n in names for d in ("f32", "f16"))), ISAS[name])
    assert not set(calls(text)) - {"memcpy"}


def test_there_is_code_for_arm() -> None:
    chains = [chain(name, dtype) for dtype in ("bf16", "i32") for name in taken_by(dtype)]
    text = assembly(Each(tuple(chains)), ISAS["arm64"])
    for instruction in ("fmul", "fdiv", "fsqrt", "fcmgt", "mul", "cmgt"):
        assert re.search(rf"\t{instruction}\tv\d+\.4s", text) or re.search(rf"\t{instruction}\.4s", text), instruction
    assert set(calls(text)) <= {"fmodf", "sinf", "cosf", "memcpy"}


@pytest.mark.parametrize("op", ["mul", "logical_or"])
def test_a_chain_whose_values_are_all_read_twice(op: str) -> None:
    """If an expression were copied to each of its uses, compilation would take 2^40 steps."""
    steps = [Instruction("mul", (i, i), "f32") for i in range(40)]
    if op == "logical_or":
        steps = [Instruction("less", (0, 0), "bool"), *(Instruction(op, (i, i), "bool") for i in range(1, 40))]
    kernel = Pointwise(Chain(("f32",), tuple(steps)), 1, "11")
    x = np.linspace(0.5, 1.0, 37, dtype=np.float32)
    y = np.ones(37, np.bool_ if op == "logical_or" else np.float32)
    bind(kernel, [x, y], [37, 1, 1])()
    assert np.array_equal(y, np.where(x == 1, x, 0) if op == "mul" else np.zeros(37, np.bool_))
