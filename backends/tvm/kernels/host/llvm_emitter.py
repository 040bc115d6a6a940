"""The emitter of LLVM code for CPUs. Only this module, `cache` and `fused_products` import TVM.

It is a thin layer over TVM's IRBuilder. Expressions are TVM's own, so operators such as `+ - * < &` work on them. The
layer adds methods for operations that are verbose in TVM, or that kernels need in another form: the words of
`treadle.backends.tvm.kernels.emitter.Emitter`. Index arithmetic is in int64.

The layer handles these properties of TVM and LLVM:
- buffers are declared with an alignment of 4 bytes, or the element's own if smaller, so that any pointer may be passed
- a register tile needs an annotation, or it becomes an allocation inside the loop
- LLVM keeps a tile in registers only if every index into it is a constant: unroll the loops over it (`k.unroll`)
- `(x + magic) - magic` is folded away: round with `k.nearest`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from treadle.backends.bfloat16 import rounded
from treadle.backends.tvm.kernels.arithmetic.comparisons import compare
from treadle.backends.tvm.kernels.arithmetic.conversions import narrow_cast
from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction, tvm_type
from treadle.backends.tvm.kernels.emitter import Emitter, Expr
from treadle.backends.tvm.kernels.fused_products import with_fused_products
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DType, bf16, boolean, f32, i64, u8

_NAMES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "uint16", "i64": "int64", "i32": "int32"}
_NAMES |= {"i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool"}


def tvm_dtype(dtype: DType, lanes: int = 1) -> str:
    """Return TVM's name of a dtype. A bool is stored as uint8 (`Emitter.load`), a bf16 as bits (`conversions`)."""
    return _NAMES[dtype.name] + (f"x{lanes}" if lanes > 1 else "")


def primfunc(kernel: Kernel, isa: Isa, name: str) -> Any:
    """Return a kernel as TVM's PrimFunc of that name."""
    emitter = LlvmEmitter(isa)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        kernel.emit(emitter)
    made = ib.get()
    if not emitter.imported:
        return made
    text = tvm.ir.StringImm("\n".join(emitter.imported.values()))  # must precede every reference to the text
    body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", text, made.body)
    return tirx.PrimFunc(made.params, body, made.ret_type, made.attrs)


class LlvmEmitter(Emitter):
    """An emitter of one kernel for one instruction set. See `treadle.backends.tvm.kernels.emitter.Emitter`."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.imported: dict[str, str] = {}  # LLVM text that the kernel refers to, by function

    # -- arguments -------------------------------------------------------------------------------------------

    def pointer(self, name: str, dtype: DType) -> Expr:
        handle = T.arg(f"{name}_ptr", T.handle(_stored(dtype)))
        return _Pointer(name, handle, dtype)

    def size(self, name: str) -> Expr:
        return T.arg(name, T.int64())

    def view(self, pointer: Any, shape: Sequence[Expr], strides: Sequence[Expr] | None = None) -> Any:
        width = min(4, pointer.dtype.bytes)
        shape = [_index(n) for n in shape] or [_index(1)]
        made = T.decl_buffer(
            shape,
            _stored(pointer.dtype),
            data=pointer.handle,
            strides=None if strides is None else [_index(s) for s in strides],
            align=width,
        )
        IRBuilder.name(pointer.name, made)
        return _View(made, pointer.dtype, pointer.name)

    # -- loops and names -------------------------------------------------------------------------------------

    @contextmanager
    def parallel(self, count: Expr, name: str = "p") -> Iterator[Expr]:
        with T.parallel(_index(0), _index(count)) as i:
            yield self.name(name, i)

    @contextmanager
    def loop(self, count: Expr, name: str = "i") -> Iterator[Expr]:
        with T.serial(_index(0), _index(count)) as i:
            yield self.name(name, i)

    @contextmanager
    def unroll(self, count: int, name: str = "u") -> Iterator[Expr]:
        with T.unroll(_index(0), _index(count)) as i:
            yield self.name(name, i)

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        with T.If(with_fused_products(condition)), T.Then():
            yield

    def name(self, name: str, value: Expr) -> Expr:
        IRBuilder.name(name, value)
        return value

    def let(self, value: Expr, name: str = "t") -> Expr:
        bound = T.Bind(with_fused_products(value))
        IRBuilder.name(name, bound)
        return bound

    def opaque(self, value: Expr, name: str = "t") -> Expr:
        return self.kept(_index(value), i64, 1, name)

    def kept(self, value: Expr, dtype: DType, lanes: int = 1, name: str = "t") -> Expr:
        place = self.registers(lanes, dtype, f"{name}_cell")
        self.store(place, [0], value, lanes)
        if dtype is not boolean:
            return self.let(self.load(place, [0], lanes), name)
        byte = _View(place.buffer, u8, place.name)  # TVM cannot analyze a comparison with a byte in the byte's own type
        return self.let(compare(self, "ne", self.load(byte, [0], lanes), self.number(0, u8, lanes), u8, lanes), name)

    # -- memory ----------------------------------------------------------------------------------------------

    def registers(self, count: int, dtype: DType, name: str = "acc") -> Any:
        made = T.alloc_buffer((count,), _stored(dtype), scope="local", annotations={"disable_lower_builtin": True})
        IRBuilder.name(name, made)
        return _View(made, dtype, name)

    def load(self, view: Any, index: Sequence[Expr], lanes: int = 1) -> Expr:
        *outer, last = [_index(i) for i in index] or [_index(0)]
        found = view.buffer[(*outer, _ramp(last, lanes))] if lanes > 1 else view.buffer[(*outer, last)]
        return tirx.NE(found, _filled(tirx.const(0, "uint8"), lanes)) if view.dtype is boolean else found

    def store(self, view: Any, index: Sequence[Expr], value: Expr, lanes: int = 1) -> None:
        *outer, last = [_index(i) for i in index] or [_index(0)]
        value = with_fused_products(value)
        if view.dtype is boolean:
            value = tirx.Cast("uint8" + (f"x{lanes}" if lanes > 1 else ""), value)
        T.buffer_store(view.buffer, value, [*outer, _ramp(last, lanes) if lanes > 1 else last])

    def address(self, view: Any, index: Sequence[Expr]) -> Expr:
        return tirx.address_of(view.buffer[tuple(_index(i) for i in index)])

    # -- values ----------------------------------------------------------------------------------------------

    def number(self, value: float | int | bool, dtype: DType, lanes: int = 1) -> Expr:
        name = tvm_dtype(dtype)
        if dtype is bf16:
            made = tirx.IntImm(name, int(rounded(np.asarray(value, np.float32))))
        elif dtype.is_float:
            if value != value or value in (float("inf"), float("-inf")):  # an immediate cannot hold these
                made = _not_finite(value, name)
            else:
                made = tirx.FloatImm(name, float(value))
        else:
            made = tirx.const(bool(value), "bool") if dtype is boolean else tirx.IntImm(name, int(value))
        return _filled(made, lanes)

    def index(self, value: Expr) -> Expr:
        return _index(value)

    def splat(self, value: Expr, lanes: int) -> Expr:
        return _filled(value, lanes)

    def lane_indices(self, first: Expr, lanes: int) -> Expr:
        return _ramp(_index(first), lanes) if lanes > 1 else _index(first)

    def cast(self, value: Expr, dtype: DType, lanes: int = 1) -> Expr:
        made = narrow_cast(self, value, re.sub(r"x\d+$", "", str(value.ty)), dtype, lanes)
        return tirx.Cast(tvm_dtype(dtype, lanes), value) if made is None else made

    def select(self, condition: Expr, then: Expr, otherwise: Expr) -> Expr:
        return tirx.Select(condition, then, otherwise)

    def either(self, condition: Expr, then: Expr, otherwise: Expr) -> Expr:
        return tirx.if_then_else(condition, then, otherwise)

    def both(self, x: Expr, y: Expr) -> Expr:
        return tirx.And(x, y)

    def any_of(self, x: Expr, y: Expr) -> Expr:
        return tirx.Or(x, y)

    def equal(self, x: Expr, y: Expr) -> Expr:
        return tirx.EQ(x, y)

    def is_nan(self, x: Expr) -> Expr:
        return tirx.isnan(x)

    def least(self, x: Expr, y: Expr) -> Expr:
        return tirx.min(x, y)

    def greatest(self, x: Expr, y: Expr) -> Expr:
        return tirx.max(x, y)

    def nearest(self, x: Expr) -> Expr:
        return tirx.nearbyint(x)

    def floor(self, x: Expr) -> Expr:
        return tirx.floor(x)

    def sqrt(self, x: Expr) -> Expr:
        return tirx.sqrt(x)

    def absolute(self, x: Expr) -> Expr:
        return tirx.abs(x)

    def floor_divide(self, x: Expr, y: Expr) -> Expr:
        return tirx.floordiv(_index(x), _index(y))

    def floor_mod(self, x: Expr, y: Expr) -> Expr:
        return tirx.floormod(_index(x), _index(y))

    def bits(self, value: Expr, dtype: DType, lanes: int = 1) -> Expr:
        return tirx.reinterpret(tvm_dtype(dtype, lanes), value)

    def shift_left(self, x: Expr, y: Expr) -> Expr:
        return tirx.shift_left(x, y)

    def libm(self, name: str, dtype: DType, lanes: int, *operands: Expr) -> Expr:
        if lanes == 1:
            return tirx.call_pure_extern(tvm_dtype(dtype), name + ("f" if dtype.name == "f32" else ""), *operands)
        vectors = [self.let(x) for x in operands]
        return self.shuffle(
            [self.let(self.libm(name, dtype, 1, *(self.shuffle([x], [i]) for x in vectors))) for i in range(lanes)],
            range(lanes),
        )

    def shuffle(self, vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
        return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", lane) for lane in lanes])

    # -- LLVM ------------------------------------------------------------------------------------------------

    def llvm(self, name: str, text: Callable[[], str], result: str, *operands: Expr) -> Expr:
        if name not in self.imported:
            self.imported[name] = text()
        return tirx.call_pure_extern(result, name, *operands)

    def effect(self, name: str, declared: str, call: str, *operands: Expr, constant: str = "") -> None:
        if constant:
            self.imported.setdefault(constant.partition(" ")[0], constant)
        self.imported.setdefault(f"declare {declared}", f"declare {declared}")  # a module may have each only once
        kinds = ["i64" if str(x.ty).startswith("int64") else "ptr" for x in operands]
        taken = ", ".join(f"{kind} %x{i}" for i, kind in enumerate(kinds))
        body = f"define i32 @{name}({taken}) alwaysinline {{\n  call {call}\n  ret i32 0\n}}"
        self.imported.setdefault(name, body)
        T.evaluate(tirx.call_extern("int32", name, *operands))

    def prefetch(self, view: Any, index: Sequence[Expr]) -> None:
        declared = "void @llvm.prefetch.p0(ptr, i32, i32, i32)"
        called = "void @llvm.prefetch.p0(ptr %x0, i32 0, i32 2, i32 1)"
        self.effect("treadle_prefetch", declared, called, self.address(view, index))

    def lane_function(self, function: LaneFunction, lanes: int, *operands: Expr) -> Expr:
        wide = lanes == 16 and "avx512f" in self.isa.needs
        result = tvm_type(function.result) + (f"x{lanes}" if lanes > 1 else "")
        return self.llvm(f"{function.symbol}_{lanes}", lambda: function.llvm(lanes, wide), result, *operands)

    def any_of_lanes(self, condition: Expr, lanes: int) -> Expr:
        return self._across(condition, lanes, "or", "i1", "bool")

    def sum_of_lanes(self, x: Expr, lanes: int, dtype: DType = f32) -> Expr:
        if dtype is f32:
            return self._across(x, lanes, "fadd", "float", "float32", "reassoc nsz ", "float -0.0, ")
        return self._across(x, lanes, "add", "i32", "int32")

    def maximum_of_lanes(self, x: Expr, lanes: int, dtype: DType = f32) -> Expr:
        if dtype is f32:
            return self._across(x, lanes, "fmax", "float", "float32", "nnan nsz ")
        return self._across(x, lanes, "smax", "i32", "int32")

    def _across(
        self, x: Expr, lanes: int, kind: str, scalar: str, result: str, flags: str = "", start: str = ""
    ) -> Expr:
        if lanes == 1:
            return x
        name, vector = f"treadle_{kind}_{scalar}_{lanes}", f"<{lanes} x {scalar}>"
        suffix = "f32" if scalar == "float" else scalar

        def text() -> str:
            return f"""
define {scalar} @{name}({vector} %x) alwaysinline {{
  %r = call {flags}{scalar} @llvm.vector.reduce.{kind}.v{lanes}{suffix}({start}{vector} %x)
  ret {scalar} %r
}}
"""

        return self.llvm(name, text, result, x)


class _Pointer:
    def __init__(self, name: str, handle: Any, dtype: DType) -> None:
        self.name, self.handle, self.dtype = name, handle, dtype


class _View:
    def __init__(self, buffer: Any, dtype: DType, name: str) -> None:
        self.buffer, self.dtype, self.name = buffer, dtype, name


def _stored(dtype: DType) -> str:
    return "uint8" if dtype is boolean else tvm_dtype(dtype)


def _index(value: Expr) -> Expr:
    if isinstance(value, tvm.ir.Expr):
        return value if str(value.ty).startswith("int64") else tirx.Cast("int64", value)
    return tirx.IntImm("int64", value)


def _ramp(first: Expr, lanes: int) -> Expr:
    return tirx.Ramp(first, tirx.IntImm("int64", 1), lanes)


def _filled(value: Expr, lanes: int) -> Expr:
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def _not_finite(value: float, name: str) -> Expr:
    if value != value:
        return tirx.Cast(name, tirx.reinterpret("float32", tirx.IntImm("int32", 0x7FC00000)))
    return tirx.Cast(name, tirx.reinterpret("float32", tirx.IntImm("int32", 0x7F800000 if value > 0 else -0x800000)))
