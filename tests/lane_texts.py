"""Lane functions as C and as LLVM, applied to the same numbers: for tests, and for tests/fuzz/lane_functions.py."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from treadle.backends.tvm.kernels.arithmetic import exponentials
from treadle.backends.tvm.kernels.arithmetic.c_text import prelude
from treadle.backends.tvm.kernels.arithmetic.conversions import F16_TO_F32, F32_TO_F16
from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction
from treadle.backends.tvm.kernels.arithmetic.vector_math import FUNCTIONS, emit
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.host.cache import tvm_script
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import OPS
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.types import DTYPES, DType, Type

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Expr

Array = np.ndarray[Any, Any]

_STORED = {"f16": "f16", "u16": "bf16"}
_PLAIN = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool")


# -- the functions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EveryOp(Kernel):
    """Every elementwise op on every dtype, and every cast, one lane at a time."""

    def emit(self, k: Emitter) -> None:
        pointers = {name: k.pointer(name, DTYPES[name]) for name in _PLAIN}
        n = k.size("n")
        views = {name: k.view(pointer, [n]) for name, pointer in pointers.items()}
        with k.parallel(n) as i:
            for op, dtype, result, attributes in _calls():
                operands = [(k.load(views[d], [i]), DTYPES[d]) for d in dtype]
                k.let(emit(k, op, operands, DTYPES[result], 1, **attributes))
            for function in (exponentials.exp_nonpositive, exponentials.exp_for_pairs):
                k.let(function(k, 1, k.load(views["f32"], [i])))


def _calls() -> Iterable[tuple[str, tuple[str, ...], str, Mapping[str, Any]]]:
    for op in sorted(FUNCTIONS.keys() - {"round_to"}):
        count = 3 if op == "where" else len(OPS[op].samples[0].types)
        for d in _PLAIN:
            operands = ("bool", d, d) if op == "where" else (d,) * count
            try:
                (result,) = OPS[op]().infer([Type(DTYPES[name]) for name in operands])
            except RuleError:
                continue
            yield op, operands, result.dtype.name, {}
    yield from (("cast", (d,), to, {}) for d in _PLAIN for to in _PLAIN if d != to)
    for format in FORMATS:
        for saturate in (False, True):
            yield from (("round_to", (d,), d, {"format": format, "saturate": saturate}) for d in ("f32", "f64"))


def lane_functions() -> dict[str, LaneFunction]:
    """Return every lane function of the elementwise ops, by name."""
    found = {f.name: f for f in (F16_TO_F32, F32_TO_F16)}

    def recorded(function: LaneFunction, k: Emitter, lanes: int, *operands: Expr) -> Expr:
        found[function.name] = function
        return k.lane_function(function, lanes, *operands)

    for integers in (False, True):
        with (
            mock.patch.object(LaneFunction, "__call__", recorded),
            mock.patch.object(Emitter, "integer_angles", integers),
        ):
            tvm_script(_EveryOp(), ISAS["x86-64"])
    return found


# -- LLVM --------------------------------------------------------------------------------------------------------

_BY_NAME: dict[str, LaneFunction] = {}
_TOGETHER = 24  # functions in one kernel: TVM descends one level for each buffer


@dataclass(frozen=True)
class _Applied(Kernel):
    """y[i] = f(x0[i], x1[i], ...) for each function of this name. Arguments: operands and result of one function after
    another; the number of elements, a multiple of `lanes`.
    """

    names: tuple[str, ...]
    lanes: int

    def emit(self, k: Emitter) -> None:
        functions = [_BY_NAME[name] for name in self.names]
        pointers = [
            [k.pointer(f"{f.name}_x{i}", dtype_of(t)) for i, t in enumerate((*f.operands, f.result))] for f in functions
        ]
        n = k.size("n")
        with k.parallel(k.floor_divide(n, self.lanes), "v") as v:
            at = [v * self.lanes]
            for f, own in zip(functions, pointers, strict=True):
                *operands, y = (k.view(p, [n]) for p in own)
                k.store(y, at, f(k, self.lanes, *(k.load(x, at, self.lanes) for x in operands)), self.lanes)


def dtype_of(type: str) -> DType:
    """Return the dtype that stores values of a lane function's type."""
    return DTYPES[_STORED.get(type, type)]


def array_of(type: str, count: int) -> Array:
    return np.zeros(count, dtype_of(type).numpy or np.uint16)


def by_llvm(
    functions: Sequence[LaneFunction], operands: Sequence[Sequence[Array]], isa: Isa, lanes: int
) -> list[Array]:
    """Return the results of functions on operands of one length, a multiple of 16, as compiled by LLVM."""
    _BY_NAME.update({f.name: f for f in functions})
    count = len(operands[0][0])
    results = [array_of(f.result, count) for f in functions]
    for first in range(0, len(functions), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        arrays = [x for own, y in zip(operands[part], results[part], strict=True) for x in (*own, y)]
        bind(_Applied(tuple(f.name for f in functions[part]), lanes), arrays, [count], isa)()
    return results


# -- C -----------------------------------------------------------------------------------------------------------

_C_TYPES = {"bool": "bool", "f16": "unsigned short", "f32": "float", "f64": "double", "i64": "long long"}
_C_TYPES |= {"i32": "int", "i16": "short", "u16": "unsigned short", "i8": "signed char", "u8": "unsigned char"}


FLUSHING = ("unsigned int mode = __builtin_ia32_stmxcsr(); __builtin_ia32_ldmxcsr(mode | 0x8040);",)
FLUSHING += ("__builtin_ia32_ldmxcsr(mode);",)
"""Statements before and after a loop on x86, to flush subnormal operands and results of the loop to zero."""


def c_program(
    functions: Sequence[LaneFunction], texts: Sequence[str], start: str, around: tuple[str, ...] = ("", "")
) -> str:
    """Return a C program with a loop for each function, named `apply_0`, `apply_1`, ..., between two statements."""
    lines = [start, *texts]
    for number, f in enumerate(functions):
        types = [_C_TYPES[t] for t in (*f.operands, f.result)]
        parameters = ", ".join(f"{t} *x{i}" for i, t in enumerate(types))
        arguments = ", ".join(f"x{i}[i]" for i in range(len(f.operands)))
        body = f"for (long i = 0; i < n; i++) x{len(f.operands)}[i] = {f.symbol}({arguments});"
        lines.append(f'extern "C" void apply_{number}(long n, {parameters}) {{ {around[0]} {body} {around[1]} }}')
    return "\n".join(lines) + "\n"


def by_c(
    functions: Sequence[LaneFunction],
    operands: Sequence[Sequence[Array]],
    folder: Path,
    language: str = "c",
    start: str | None = None,
    around: tuple[str, ...] = ("", ""),
) -> list[Array]:
    """Return the results of functions as compiled by GCC from their text in a language of C.

    start   the first lines of the program; by default, the prelude of plain C
    around  statements before and after each loop, such as `FLUSHING`
    """
    texts = [f.c(language) for f in functions]
    source, library = folder / f"{language}.cc", folder / f"{language}.so"
    source.write_text(c_program(functions, texts, prelude("c") if start is None else start, around))
    options = ["-O2", "-ffp-contract=off", "-mfma", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run(["g++", *options, "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    results = []
    for number, (f, own) in enumerate(zip(functions, operands, strict=True)):
        y = array_of(f.result, len(own[0]))
        pointers = [ctypes.c_void_p(int(x.__array_interface__["data"][0])) for x in (*own, y)]
        getattr(loaded, f"apply_{number}")(ctypes.c_long(len(y)), *pointers)
        results.append(y)
    return results


# -- numbers -----------------------------------------------------------------------------------------------------


def grid(type: str, count: int, seed: int) -> Array:
    """Return `count` numbers. Floats have every exponent of both signs, with drawn, lowest and highest mantissas.
    So they include zeros, subnormal numbers, infinities and NaNs. Half of the integers are extreme or small.
    """
    rng = np.random.default_rng(seed)
    numpy = array_of(type, 0).dtype
    if type == "bool":
        return rng.integers(0, 2, count).astype(numpy)
    if numpy.kind in "iu":
        info = np.iinfo(numpy)
        edges = np.array(
            [info.min, info.min + 1, 0, 1, 2, 7, info.max - 1, info.max, *([-1] if info.min else [])], numpy
        )
        wide = rng.integers(info.min, info.max, count, dtype=numpy, endpoint=True)
        return np.where(rng.random(count) < 0.5, rng.choice(edges, count), wide)
    width = 8 * numpy.itemsize
    bits = np.dtype(f"u{numpy.itemsize}")
    fraction = {16: 10, 32: 23, 64: 52}[width]
    mantissas = rng.integers(0, 1 << fraction, count, dtype=bits)
    ends = np.array([0, 1, (1 << fraction) - 1, 1 << (fraction - 1)], bits)
    mantissas = np.where(rng.random(count) < 0.25, rng.choice(ends, count), mantissas)
    exponents = (np.arange(count) % (1 << (width - fraction))).astype(bits) << bits.type(fraction)
    order = rng.permutation(count) if seed else np.arange(count)
    return (exponents | mantissas)[order].view(numpy)


def same(x: Array, y: Array) -> Array:
    """Return a mask of equal bits, or NaNs on both sides, whose sign and payload IEEE 754 leaves open."""
    equal = x.view(np.dtype(f"u{x.itemsize}")) == y.view(np.dtype(f"u{y.itemsize}"))
    return equal | ((x != x) & (y != y)) if x.dtype.kind == "f" else equal


def units_apart(x: Array, exact: Array) -> Array:
    """Return distances of float32 results from float64 results, in units in the last place of the exact result."""
    nearest = exact.astype(np.float32)
    spacing = np.spacing(np.maximum(np.abs(nearest), np.float32(2.0**-126))).astype(np.float64)
    return np.asarray(np.abs(x.astype(np.float64) - exact) / spacing)
