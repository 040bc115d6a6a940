"""The TVM backend's elementwise functions: every op and dtype against NumPy, on instruction sets old and new.

Float32 functions are held against float64 NumPy on dense grids, on random bit patterns and at their edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from tests.op_checks import Case, assert_close, resolution
from tests.test_op_suite import ROUNDINGS
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.kernels import tvm_runtime
from treadle.backends.kernels.cache import KernelCache, assembly
from treadle.backends.kernels.calling import bind
from treadle.backends.kernels.isa import ISAS, Isa, host_isa, runs_here
from treadle.backends.kernels.pointwise import Chain, Instruction, Pointwise
from treadle.backends.kernels.vector_math import POINTWISE
from treadle.backends.registry import find_backend
from treadle.ir.error_function import erf
from treadle.ir.errors import RuleError
from treadle.ir.operation import OPS
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, Type, bf16

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(tvm_runtime.missing() is not None, reason=str(tvm_runtime.missing()))

OPERANDS = {"cast": 1, "where": 3, "round_to": 1}
FLOATS, INTS = ("f64", "f32", "f16", "bf16"), ("i64", "i32", "i16", "i8", "u8")
MANTISSA = {"f64": 52, "f32": 23, "f16": 10, "bf16": 7}


# -- running one op ------------------------------------------------------------------------------------------


def levels() -> list[Isa]:
    """The instruction sets of this machine that differ: its best, one without AVX-512, one without F16C and FMA."""
    named = [ISAS[name] for name in ("x86-64-v3", "x86-64-v2")]
    return list(dict.fromkeys([host_isa(), *(isa for isa in named if runs_here(isa))]))


LEVELS = levels() if tvm_runtime.missing() is None else []
each_level = pytest.mark.parametrize("isa", LEVELS, ids=str)
best_and_least = pytest.mark.parametrize("isa", [isa for isa in LEVELS if isa.name != "x86-64-v3"], ids=str)


def chain(name: str, dtype: str, **attributes: Any) -> Chain:
    """One op on operands of one dtype (and a condition)."""
    op = OPS[name](**attributes)
    count = operands_of(name)
    inputs = ("bool", dtype, dtype) if name == "where" else (dtype,) * count
    types = [Type(DTYPES[d]) for d in inputs]
    (result,) = op.infer(types)
    held = () if name == "cast" else tuple(op.attributes.items())
    return Chain(inputs, (Instruction(name, tuple(range(count)), result.dtype.name, held),))


def operands_of(name: str) -> int:
    return OPERANDS.get(name) or len(OPS[name].samples[0].types)


def takes(name: str, dtype: str) -> bool:
    try:
        chain(name, dtype, **({"format": "bf16"} if name == "round_to" else {}))
    except RuleError:
        return False
    return True


@cache
def cache_of(isa: Isa) -> KernelCache:
    """The kernels of this file for an instruction set, compiled together."""
    found = KernelCache(isa)
    wanted = [(n, d) for n, d in TABLE if isa is host_isa() or isa.name == "x86-64-v2" or d == "f32"]
    found.entries([Pointwise(chain(name, dtype), 1, "1" * (operands_of(name) + 1)) for name, dtype in wanted])
    return found


TABLE = [(name, dtype) for name in sorted(POINTWISE - {"cast", "round_to"}) for dtype in DTYPES if takes(name, dtype)]


def run(what: Chain, operands: Sequence[Array], isa: Isa, *, strided: bool = False) -> Array:
    """A chain on arrays of one length; if strided, element by element, as the code is for strides."""
    arrays = [
        np.repeat(stored(x, d), 2) if strided else stored(x, d) for x, d in zip(operands, what.inputs, strict=True)
    ]
    n = len(operands[0])
    made = np.zeros(n, np.uint16 if what.dtype is bf16 else what.dtype.numpy)
    kernel = Pointwise(what, 1, ("s" if strided else "1") * len(arrays) + "1")
    bind(kernel, [*arrays, made], [n, *[2 if strided else 1] * len(arrays), 1], isa, cache_of(isa))()
    return widened(made) if what.dtype is bf16 else made


def stored(x: Array, dtype: str) -> Array:
    return rounded(x) if dtype == "bf16" else np.ascontiguousarray(x, DTYPES[dtype].numpy)


def held(x: Array, dtype: str) -> Array:
    """Numbers as the nearest that a dtype has."""
    with np.errstate(all="ignore"):
        return np.asarray(OPS["cast"](to=DTYPES[dtype]).reference(np.asarray(x)))


def meaning(name: str, operands: Sequence[Array], **attributes: Any) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(OPS[name](**attributes).reference(*operands))


# -- numbers to try ------------------------------------------------------------------------------------------


def random_bits(count: int, seed: int = 0) -> Array:
    """float32 of every magnitude, infinities and NaNs among them."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


EDGES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38, -3.4028235e38]
    + [
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        88.72283,
        88.72284,
        -87.33655,
        -103.97,
        -103.98,
        1e30,
        -1e30,
        2.0**27,
        -(2.0**40),
    ]
    + [np.float32(np.pi * n / 2) for n in (1, 2, 3, 1e3, 1e7, 1e12)],
    np.float32,
)


def singles(low: float, high: float) -> Array:
    return np.concatenate([EDGES, random_bits(50_000), np.linspace(low, high, 100_001).astype(np.float32)])


def numbers(dtype: str, count: int, seed: int) -> Array:
    """Operands of a dtype, its extremes among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, count).astype(np.bool_)
    if dtype in FLOATS:
        drawn = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count)
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 3.0, -2.0, 0.5]
        drawn[: len(special) * 10] = rng.permutation(np.repeat(special, 10))
        return held(rng.permutation(drawn), dtype)
    bounds = np.iinfo(DTYPES[dtype].numpy)  # type: ignore[arg-type]
    drawn = rng.integers(bounds.min, bounds.max, count, dtype=bounds.dtype, endpoint=True)
    drawn[: count // 2] = rng.integers(max(bounds.min, -9), 9, count // 2)
    drawn[-40:] = rng.choice(np.array([bounds.min, bounds.max, 0, 1], bounds.dtype), 40)
    return rng.permutation(drawn)


# -- float32 against float64 ---------------------------------------------------------------------------------


def _quiet(function: Callable[..., Array]) -> Callable[..., Array]:
    def quiet(*x: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(function(*x))

    return quiet


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


# name: the function in float64, the interval of a dense grid, units in the last place that it may be off
EXACT: Mapping[str, tuple[Callable[..., Array], float, float, float]] = {
    "exp": (np.exp, -110, 95, 1.1),
    "log": (np.log, 0.2, 5, 1.1),
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


@each_level
@pytest.mark.parametrize("name", EXACT)
def test_float32_is_within_units_in_the_last_place(name: str, isa: Isa) -> None:
    function, low, high, most = EXACT[name]
    x = singles(low, high)
    expected = _quiet(function)(x.astype(np.float64))
    assert units_off(run(chain(name, "f32"), [x], isa), expected) <= most


@each_level
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("sigmoid", _sigmoid),
        ("silu", lambda x: x * _sigmoid(x)),
        ("quick_gelu", lambda x: x * _sigmoid(1.702 * x)),
        ("gelu_tanh", _gelu_tanh),
        ("gelu", lambda x: x * (0.5 + 0.5 * erf(x * np.sqrt(0.5)))),
    ],
)
def test_activations_are_close_in_float32(name: str, function: Callable[..., Array], isa: Isa) -> None:
    """The exponent, of size up to 88, has two or three roundings: in the tail 88 of each are units of the result."""
    x = singles(-20, 20)
    with np.errstate(all="ignore"):
        expected = function(x.astype(np.float64)).astype(np.float32)
    got = run(chain(name, "f32"), [x], isa)
    same = np.isnan(expected) == np.isnan(got)
    assert np.all(same | np.isinf(x)), x[~same]  # x * sigmoid(x) at -inf is 0 * inf
    finite = np.isfinite(expected) & np.isfinite(x)
    np.testing.assert_array_equal(np.isfinite(got[finite]), True)
    wide, right = got[finite].astype(np.float64), expected[finite].astype(np.float64)
    error = np.abs(wide - right)
    size = np.abs(x[finite].astype(np.float64)) if name == "gelu" else np.abs(right)
    # where e^-x overflows in float32, from -88.7 on, they are 0: below 1e-36 as numbers go
    assert np.all(error <= (4e-7 if name == "gelu" else 300 * 2.0**-24) * size + 1e-36)
    near = np.abs(x[finite]) < 3
    if name != "gelu":
        assert np.max(error[near] / np.spacing(np.abs(expected[finite][near]))) <= 16


@each_level
def test_powers_are_rounded_once(isa: Isa) -> None:
    rng = np.random.default_rng(1)
    grid = np.array(
        [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, np.inf, -np.inf, np.nan, 1e-45, 2.0**25 + 4]
    )
    x = np.concatenate([np.repeat(grid, len(grid)), random_bits(20_000, 2), rng.uniform(0, 3, 50_000)])
    y = np.concatenate([np.tile(grid, len(grid)), rng.uniform(-3, 3, 20_000), rng.uniform(-140, 140, 50_000)])
    x, y = x.astype(np.float32), y.astype(np.float32)
    expected = _quiet(np.power)(x.astype(np.float64), y.astype(np.float64))
    assert units_off(run(chain("pow", "f32"), [x, y], isa), expected) <= 0.51


def units_off(got: Array, expected: Array) -> float:
    """The largest distance, in units in the last place; inf and NaN have to be where they are expected."""
    with np.errstate(over="ignore"):
        nearest = expected.astype(np.float32)
    finite = np.isfinite(nearest)
    np.testing.assert_array_equal(got[~finite], nearest[~finite])
    assert np.all(np.isfinite(got[finite]))
    wide, right = got[finite].astype(np.float64), expected[finite]
    return float(np.max(np.abs(wide - right) / np.spacing(np.abs(nearest[finite])).astype(np.float64)))


# -- every op and dtype --------------------------------------------------------------------------------------


@best_and_least
@pytest.mark.parametrize("name", sorted(POINTWISE - {"cast", "round_to"}))
def test_every_dtype_is_as_numpy_has_it(name: str, isa: Isa) -> None:
    """Integers, bools and exact operations to the bit; others to some spacings of the dtype."""
    for dtype in [d for n, d in TABLE if n == name]:
        what = chain(name, dtype)
        operands = [numbers(d, 1003, seed) for seed, d in enumerate(what.inputs)]
        got = run(what, operands, isa)
        wide = [x.astype(np.float64) if dtype in FLOATS and x.dtype.kind == "f" else x for x in operands]
        expected = meaning(name, wide)
        if name == "gelu_tanh":  # at -inf the formula is 0 * inf; here inf / inf
            expected = np.where(np.isinf(wide[0]), got, expected)
        if expected.dtype.kind != "f":
            np.testing.assert_array_equal(got, expected, err_msg=dtype)
            continue
        expected = held(expected, dtype) if dtype != "f32" else expected.astype(np.float32)
        spacing = 2.0 ** -MANTISSA[dtype]
        small = {"f16": 2.0**-24, "bf16": 1e-38, "f32": 1e-37}.get(dtype, 1e-300)
        if dtype in ("f32", "f64") or name in ("floor_divide", "mod"):
            units, slack = 8, 1e-6 if "gelu" in name or name == "silu" else small  # where e^-x is inf
        else:
            units, slack = 1.01, 1e-6 + small if "gelu" in name or name == "silu" else 2 * small
        if dtype == "f64" and "gelu" in name:
            slack = 1e-14
        np.testing.assert_allclose(
            got.astype(np.float64), expected.astype(np.float64), rtol=units * spacing, atol=slack, err_msg=dtype
        )


@best_and_least
@pytest.mark.parametrize("dtype", INTS)
def test_integers_wrap_and_divide_down(dtype: str, isa: Isa) -> None:
    bounds = np.iinfo(DTYPES[dtype].numpy)  # type: ignore[arg-type]
    values = np.array(sorted({bounds.min, bounds.min + 1, -7, -2, -1, 0, 1, 2, 7, bounds.max - 1, bounds.max}))
    values = values[(values >= bounds.min) & (values <= bounds.max)].astype(bounds.dtype)
    x, y = np.repeat(values, len(values)), np.tile(values, len(values))
    for name in ("add", "sub", "mul", "floor_divide", "mod", "maximum", "minimum", "less"):
        np.testing.assert_array_equal(run(chain(name, dtype), [x, y], isa), meaning(name, [x, y]), err_msg=name)
    for name in ("neg", "abs", "sign"):
        np.testing.assert_array_equal(run(chain(name, dtype), [values], isa), meaning(name, [values]), err_msg=name)


@best_and_least
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_float_division_rounds_down_exactly(dtype: str, isa: Isa) -> None:
    grid = [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 3.0, -3.0, 7.5, -7.5, 1e20, -1e20, 1e-30, np.inf, -np.inf, np.nan]
    values = np.array(grid).astype(DTYPES[dtype].numpy)
    x, y = np.repeat(values, len(values)), np.tile(values, len(values))
    for name in ("floor_divide", "mod"):
        np.testing.assert_array_equal(run(chain(name, dtype), [x, y], isa), meaning(name, [x, y]), err_msg=name)


# -- casts ---------------------------------------------------------------------------------------------------


@best_and_least
@pytest.mark.parametrize("to", DTYPES)
def test_casts_are_as_the_reference_has_them(to: str, isa: Isa) -> None:
    kernels = [Pointwise(chain("cast", dtype, to=DTYPES[to]), 1, "11") for dtype in DTYPES]
    cache_of(isa).entries(kernels)
    for dtype in DTYPES:
        x = numbers(dtype, 1003, 5)
        if dtype in FLOATS and to in INTS:
            bounds = np.iinfo(DTYPES[to].numpy)  # type: ignore[arg-type]
            x = x[np.isfinite(x) & (x >= bounds.min) & (x <= bounds.max)]
        got = run(chain("cast", dtype, to=DTYPES[to]), [x], isa)
        np.testing.assert_array_equal(got, meaning("cast", [x], to=DTYPES[to]), err_msg=dtype)


@best_and_least
def test_what_an_integer_cannot_hold_is_its_least_number(isa: Isa) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, 2.0**63, 3.9, -3.9], np.float32)
    got = run(chain("cast", "f32", to=DTYPES["i32"]), [x], isa)
    np.testing.assert_array_equal(got, [-(2**31)] * 7 + [3, -3])
    got = run(chain("cast", "f32", to=DTYPES["i64"]), [x], isa)
    np.testing.assert_array_equal(got, [-(2**63)] * 5 + [2**31, -(2**63), 3, -3])


@best_and_least
def test_every_f16_and_bf16_is_widened_exactly(isa: Isa) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    halves = bits.view(np.float16)
    np.testing.assert_array_equal(run(chain("cast", "f16", to=DTYPES["f32"]), [halves], isa), halves.astype(np.float32))
    wide = widened(bits)
    np.testing.assert_array_equal(run(chain("cast", "bf16", to=DTYPES["f32"]), [wide], isa), wide)


@best_and_least
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_narrow_floats_are_rounded_to_nearest_even(to: str, isa: Isa) -> None:
    """Numbers of the dtype, those halfway between two of them, and their neighbours in float32 and float64."""
    bits = np.arange(2**16, dtype=np.uint16)
    own = bits.view(np.float16).astype(np.float64) if to == "f16" else widened(bits).astype(np.float64)
    own = own[np.isfinite(own)]
    halfway = np.sort(own)
    halfway = (halfway[1:] + halfway[:-1]) / 2
    for dtype, near in (("f32", np.float32), ("f64", np.float64)):
        middle = halfway.astype(near)
        moved = [np.nextafter(middle, near(np.inf)), np.nextafter(middle, near(-np.inf))]
        x = np.concatenate([own.astype(near), middle, *moved, EDGES.astype(near), random_bits(20_000).astype(near)])
        got = run(chain("cast", dtype, to=DTYPES[to]), [x], isa)
        expected = meaning("cast", [x], to=DTYPES[to])
        np.testing.assert_array_equal(got, expected, err_msg=dtype)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected), err_msg=dtype)


@best_and_least
@pytest.mark.parametrize("format", FORMATS)
def test_rounding_to_a_format_is_as_the_reference_has_it(format: str, isa: Isa) -> None:
    x = np.concatenate([EDGES, random_bits(5000), np.linspace(-500, 500, 5001), np.linspace(-0.02, 0.02, 5001)])
    for saturate in (False, True):
        for dtype in ("f32", "f64"):
            operand = held(x, dtype)
            got = run(chain("round_to", dtype, format=format, saturate=saturate), [operand], isa)
            np.testing.assert_array_equal(got, meaning("round_to", [operand], format=format, saturate=saturate))


# -- lanes, chains, targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_an_element_has_the_same_bits_wherever_it_lies(dtype: str) -> None:
    """In a whole vector, in the rest that fills none, and alone, as code for strides computes it."""
    isa = host_isa()
    names = [n for n, d in TABLE if d == dtype]
    cache_of(isa).entries([Pointwise(chain(n, dtype), 1, "s" * operands_of(n) + "1") for n in names])
    for name in names:
        what = chain(name, dtype)
        operands = [numbers(d, 203, seed) for seed, d in enumerate(what.inputs)]
        whole = run(what, operands, isa)
        same_bits(run(what, operands, isa, strided=True), whole, f"{name} alone")
        for start, stop in ((1, 203), (5, 12), (64, 65)):
            same_bits(run(what, [x[start:stop] for x in operands], isa), whole[start:stop], f"{name} {start}")


def same_bits(got: Array, expected: Array, what: str) -> None:
    assert got.tobytes() == expected.tobytes(), what


def test_lanes_of_another_width_have_the_same_bits() -> None:
    """A chain that ends in f64 takes half as many lanes as one of f32 only."""
    x = singles(-100, 100)
    for name in ("exp", "tanh", "silu", "log", "sin", "gelu"):
        single = chain(name, "f32")
        double = Chain(("f32",), (*single.instructions, Instruction("cast", (1,), "f64")))
        assert (single.width, double.width) == (4, 8)
        got, expected = (run(c, [x], host_isa()) for c in (double, single))
        np.testing.assert_array_equal(got, expected.astype(np.float64), err_msg=name)


@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45])
@pytest.mark.parametrize("dtype", FLOATS)
def test_constants_are_what_they_are(value: float, dtype: str) -> None:
    """x * 0 is not 0 where x is inf, x + 0 is not x where x is -0, and x == x is not true where x is NaN."""
    x = np.array([1.0, -1.0, 0.0, -0.0, np.inf, -np.inf, np.nan])
    constant = Instruction("constant", (), dtype, (("value", value),))
    rest = held(np.full(len(x), value), dtype)
    for name in ("add", "mul", "maximum", "equal", "sub"):
        result = chain(name, dtype).dtype.name
        what = Chain((dtype,), (constant, Instruction(name, (0, 1), result)))
        got = run(what, [x], host_isa())
        expected = meaning(name, [held(x, dtype), rest])
        np.testing.assert_array_equal(got, expected if result == "bool" else held(expected, dtype), err_msg=name)
    for name in ("equal", "not_equal", "less_equal", "sub", "div"):
        result = chain(name, dtype).dtype.name
        got = run(Chain((dtype,), (Instruction(name, (0, 0), result),)), [x], host_isa())
        np.testing.assert_array_equal(got, meaning(name, [x, x]), err_msg=name)


def test_a_selection_by_a_constant_condition() -> None:
    x, y = np.arange(40, dtype=np.float32), -np.arange(40, dtype=np.float32)
    for value in (True, False):
        condition = Instruction("constant", (), "bool", (("value", value),))
        what = Chain(("f32", "f32"), (condition, Instruction("where", (2, 0, 1), "f32")))
        np.testing.assert_array_equal(run(what, [x, y], host_isa()), x if value else y)


def test_narrow_integers_take_all_lanes() -> None:
    assert chain("logical_and", "bool").width == 1
    assert chain("add", "i16").width == 2
    assert chain("add", "bf16").width == 4  # computed in f32
    assert Chain(("bf16",), ()).width == 2  # a copy


@pytest.mark.parametrize("name", sorted(POINTWISE - {"cast", "round_to"}))
def test_there_is_code_for_arm(name: str) -> None:
    for dtype in [d for n, d in TABLE if n == name and d in ("f32", "bf16", "i32", "bool")]:
        text = assembly(Pointwise(chain(name, dtype), 1, "1" * (operands_of(name) + 1)), ISAS["arm64"])
        assert ".v" in text or "q0" in text or "v0." in text, dtype


@pytest.mark.parametrize("name", ["exp", "tanh", "gelu", "gelu_tanh", "silu", "sigmoid", "log", "erf", "pow"])
def test_vector_code_calls_nothing(name: str) -> None:
    """No call of the mathematical library, on any instruction set, and none of a compiler's conversions."""
    for isa in ISAS.values():
        if isa.name == "x86-64":
            continue  # which has no instruction that rounds
        for dtype in ("f32", "f16"):
            text = assembly(Pointwise(chain(name, dtype), 1, "1" * (operands_of(name) + 1)), isa)
            called = [line for line in text.splitlines() if is_call(line)]
            of_tvm = ("TVM", "tvm", "*", "memcpy", "blr")  # an error's message, and the loop's body
            assert not [line for line in called if not any(word in line for word in of_tvm)], isa


def is_call(line: str) -> bool:
    return line.split()[:1] in (["callq"], ["bl"], ["call"])


def in_graphs() -> Iterable[tuple[str, int, str | None]]:
    for name in ("cast", "where", "mod", "gelu", "round_to"):
        for number in range(len(OPS[name].samples)):
            yield name, number, None


@pytest.mark.parametrize(("name", "number", "dtype"), list(in_graphs()))
def test_samples_run_as_graphs_without_f16c(
    name: str, number: int, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runs_here(ISAS["x86-64-v2"]):
        pytest.skip("x86-64-v2 is another machine's")
    monkeypatch.setattr("treadle.backends.kernels.isa.host_isa", lambda: ISAS["x86-64-v2"])
    case = Case.of(name, number, dtype)
    graph = case.forward_graph()
    made = find_backend("tvm").compile(graph, Target("cpu"), {})(**case.inputs)
    for n, expected in enumerate(case.widened.results):
        assert_close(np.asarray(made[f"y{n}"]), expected, ROUNDINGS * resolution(graph), f"result {n}")
