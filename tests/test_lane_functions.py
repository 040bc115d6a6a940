"""Lane functions as C and WGSL: the same bits as LLVM, forms for languages without f64, refusals.

`tests/fuzz/lane_functions.py` compares every function on a wide grid, with any number of lanes, and runs the WGSL text.
"""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.backends.tvm.kernels.host import tvm_runtime

pytestmark = [
    pytest.mark.skipif(tvm_runtime.missing() is not None, reason=str(tvm_runtime.missing())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's warnings about infinities and NaNs in the inputs
]

if tvm_runtime.missing() is None:
    from tests.lane_texts import FLUSHING, by_c, by_llvm, grid, lane_functions, same, units_apart
    from treadle.backends.tvm.kernels.arithmetic.c_text import LANGUAGES, prelude
    from treadle.backends.tvm.kernels.arithmetic.exponentials import exp, log1p
    from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, LaneValue, number
    from treadle.backends.tvm.kernels.arithmetic.trigonometry import _TWO_OVER_PI
    from treadle.backends.tvm.kernels.arithmetic.wgsl_text import PRELUDE
    from treadle.backends.tvm.kernels.isa import host_isa
    from treadle.ir.errors import BackendError

    FUNCTIONS = lane_functions()

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

_DRAWN = re.compile(r".*_(f32|i8|u8|f16|bf16|to_i32|to_i64)|(abs|sub|mul|floor_divide|mod|lt|where)_(i64|f64)")
"""Names of the functions that the suite compares: other integers have the same text with another type."""


@needs_gcc
def test_c_has_the_bits_of_llvm(tmp_path: Path) -> None:
    drawn = [f for name, f in FUNCTIONS.items() if _DRAWN.fullmatch(name)]
    assert len(drawn) > 80
    operands = [[grid(t, 2048, seed) for seed, t in enumerate(f.operands)] for f in drawn]
    isa = host_isa()
    lanes = 4 if "avx512f" in isa.needs else isa.lanes()  # 16 lanes have forms of their own on AVX-512
    compiled = by_c(drawn, operands, tmp_path), by_llvm(drawn, operands, isa, lanes)
    if not isa.fused:
        drawn = [f for f in drawn if "fma" not in f.c().lower()]
    for f, x, y in zip(drawn, *compiled, strict=False):
        assert same(x, y).all(), f.name


@needs_gcc
def test_forms_without_f64_are_close(tmp_path: Path) -> None:
    """Rounding to narrow formats has the same bits in f32. x^y has errors in its exponent, in proportion to it."""
    drawn = [f for name, f in FUNCTIONS.items() if name.startswith("round_to") and name.endswith("f32")]
    drawn += [FUNCTIONS[name] for name in ("f16_to_f32", "power_f32")]
    operands = [[grid(t, 8192, seed) for seed, t in enumerate(f.operands)] for f in drawn]
    x, y = operands[-1]
    x[:4096], y[:4096] = np.linspace(0.1, 9, 4096), np.linspace(-30, 30, 4096)
    exact = by_c(drawn, operands, tmp_path)
    without = by_c(drawn, operands, tmp_path, "opencl", prelude("c"))
    for f, a, b in zip(drawn[:-1], exact, without, strict=False):
        assert same(a, b).all(), f.name
    a, b = exact[-1][:4096].astype(np.float64), without[-1][:4096].astype(np.float64)
    exponent = np.abs(y[:4096] * np.log(x[:4096]))
    assert np.all(np.abs(a - b) <= (4 + 4 * exponent) * 2.0**-24 * np.abs(a))
    assert np.all(np.isfinite(a) == np.isfinite(b))


@needs_gcc
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_integer_angles_are_within_units(name: str, tmp_path: Path) -> None:
    """All magnitudes up to the largest float32, and the floats nearest to multiples of pi/2."""
    turns = (np.arange(1, 2000) * (np.pi / 2)).astype(np.float32)
    closest = np.array([16367173 * 2.0**72], np.float32)  # 2^-30 from a multiple of pi/2
    x = np.concatenate([grid("f32", 16384, 0), np.linspace(-9, 9, 4096, dtype=np.float32), turns, closest])
    (y,) = by_c([FUNCTIONS[f"{name}_by_integers_f32"]], [[x]], tmp_path)
    expected = getattr(np, name)(x.astype(np.float64))
    finite = np.isfinite(x)
    assert np.isnan(y[~finite]).all()
    assert units_apart(y[finite], expected[finite]).max() <= 1.5


def test_the_words_of_two_over_pi_are_exact() -> None:
    """pi = 16 arctan(1/5) - 4 arctan(1/239), in integers        (Machin)"""

    def arctan(inverse: int) -> int:
        terms = [(1 << 400) // (inverse ** (2 * n + 1) * (2 * n + 1)) for n in range(100)]
        return sum(terms[::2]) - sum(terms[1::2])

    pi = 16 * arctan(5) - 4 * arctan(239)
    words = (2 << (400 + 224)) // pi
    assert tuple(words >> (224 - 32 * n) & 0xFFFFFFFF for n in range(8)) == _TWO_OVER_PI


@needs_gcc
@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the mode of x86's float arithmetic")
def test_conversions_of_f16_need_no_subnormal_numbers(tmp_path: Path) -> None:
    """Devices may flush subnormal numbers to zero. Every f16 is a normal number in f32."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    expected = halves.astype(np.float32)
    widening, rounding = FUNCTIONS["f16_to_f32"], FUNCTIONS["f32_to_f16"]
    wide, narrow = by_c([widening, rounding], [[halves], [expected]], tmp_path, "opencl", prelude("c"), FLUSHING)
    assert same(wide, expected).all()
    assert same(narrow, halves).all()


@pytest.mark.parametrize("language", ["c", "cuda", "opencl", "metal"])
def test_a_prelude_defines_every_name_of_the_texts(language: str) -> None:
    texts = []
    for f in FUNCTIONS.values():
        try:
            texts.append(f.c(language))
        except BackendError:
            assert LANGUAGES[language].lacks & {*f.operands, f.result} or f.name in ("sin_f32", "cos_f32")
    used = set(re.findall(r"TREADLE_\w+|treadle_[iu]64", "\n".join(texts)))
    defined = set(re.findall(r"#define (\w+)|(treadle_[iu]64);", prelude(language)))
    assert used <= {name for pair in defined for name in pair}
    assert len(texts) > 120


def test_wgsl_uses_only_its_own_types() -> None:
    """Texts have no type that WGSL lacks, no suffix of C, and only the functions of the prelude and of WGSL."""
    texts = []
    for f in FUNCTIONS.values():
        try:
            texts.append(f.wgsl())
        except BackendError:
            assert {*f.operands, f.result} & {"f64"} or f.name in ("sin_f32", "cos_f32")
    text = "\n".join(texts)
    assert set(re.findall(r": (\w+)", text)) == {"bool", "i32", "u32", "f32"}
    own = {"abs", "bitcast", "f32", "floor", "fma", "i32", "round", "select", "sqrt", "u32"}
    called = set(re.findall(r"(?<!fn )\b(\w+)(?:<\w+>)?\(", text)) - own
    assert called == {name for name in re.findall(r"fn (\w+)", PRELUDE) if name in called}


@pytest.mark.parametrize(
    ("name", "language", "text"),
    [
        ("sin_f32", "wgsl", "WGSL has no f64, which the function sin_f32 computes in"),
        ("mul_f64", "metal", "Metal has no f64, which the function mul_f64 computes in"),
    ],
)
def test_a_type_that_a_language_lacks_is_refused(name: str, language: str, text: str) -> None:
    with pytest.raises(BackendError, match=text):
        FUNCTIONS[name].wgsl() if language == "wgsl" else FUNCTIONS[name].c(language)


def test_wgsl_computes_integers_of_64_bits_in_32() -> None:
    """The extremes of i64 become those of i32; another constant that does not fit is refused."""
    assert "fn treadle_sub_i64(x0: i32, x1: i32) -> i32" in FUNCTIONS["sub_i64"].wgsl()
    for value, text in ((2**63 - 1, "2147483647i"), (-(2**63), "i32(-2147483648)"), (-7, "(-7i)")):
        assert f"return {text};" in LaneFunction("", (), "i64", lambda x=value: number(x, "i64")).wgsl()
    with pytest.raises(BackendError, match="WGSL has no i64, which the function constant computes in"):
        LaneFunction("constant", (), "i64", lambda: number(2**40, "i64")).wgsl()


def test_wgsl_rounds_without_a_sum_that_may_be_reassociated() -> None:
    assert "round(" in exp.wgsl()
    assert not re.search(r"- \(0x1\.8p\+23f\)", exp.wgsl())
    assert "TREADLE_ROUNDED_F32" in log1p.wgsl()


def test_a_name_determines_the_text() -> None:
    """Functions of equal names are one function of a kernel. A name that is a hash covers constants and types."""

    def named(factor: float, type: str) -> str:
        return LaneFunction("", (type,), type, lambda x: x * factor + 1.0).name

    assert named(2.0, "f32") == named(2.0, "f32")
    assert len({named(2.0, "f32"), named(3.0, "f32"), named(2.0, "f64")}) == 3
    again = lane_functions()
    assert {name: f.c() for name, f in again.items()} == {name: f.c() for name, f in FUNCTIONS.items()}


@pytest.mark.parametrize(
    ("value", "type", "c", "wgsl"),
    [
        (-(2**31), "i32", "(int)0x80000000u", "i32(-2147483648)"),
        (2**31, "i32", "(int)0x80000000u", "i32(-2147483648)"),
        (-1, "u8", "255u", "255u"),
        (-7, "i32", "(-7)", "(-7i)"),
        (1, "bool", "true", "true"),
        (0.1, "f32", "(0x1.99999ap-4f)", "(0x1.99999ap-4f)"),
        (-0.0, "f32", "(-0x0p+0f)", "(-0x0p+0f)"),
        (float("inf"), "f32", "TREADLE_OF_BITS_F32(0x7f800000u)", "TREADLE_INFINITY_F32()"),
        (float("nan"), "f32", "TREADLE_OF_BITS_F32(0x7fc00000u)", "TREADLE_NAN_F32()"),
    ],
)
def test_constants(value: Any, type: str, c: str, wgsl: str) -> None:
    f = LaneFunction("constant", (), type, lambda: number(value, type))
    assert f"return {c};" in f.c()
    assert f"return {wgsl};" in f.wgsl()


def test_a_product_is_fused_with_one_sum_only() -> None:
    """A product that is read twice is rounded where it is not added, and never in front of a form's parts."""
    f = LaneFunction("f", ("f32", "f32"), "f32", lambda x, y: (x * y + 1.0) * (x * y))
    assert f.c().count("TREADLE_FMA_F32") == 1
    assert f.c().count("TREADLE_MUL_F32") == 2
    f = LaneFunction("f", ("f32", "f32"), "f32", lambda x, y: x - x * y)
    assert "TREADLE_FMA_F32" in f.c() and "TREADLE_MUL_F32" not in f.c()

    def scaled(x: LaneValue) -> LaneValue:
        return LaneFunction("g", ("f32",), "f32", lambda x: x).formula(exp.body) + x

    assert "TREADLE_FMA_F32" in LaneFunction("h", ("f32",), "f32", scaled).c().splitlines()[-3]
