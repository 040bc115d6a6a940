"""Functions of lanes in LLVM text, for operations that TVM cannot express: wraparound, bits of a narrow float.

    call_lanewise(k, "wrap_add_i32", "int32", 16, (x, y), "i32 i32 -> i32", "%r = add {i32} %x0, %x1")

In the body, `{i32}` is a vector of i32 with the given number of lanes, `[i32 7]` is a constant in every lane, and
`{.f32}` is the suffix of an intrinsic's name. Operands are `%x0`, `%x1`, ...; the result is `%r`. The text is the same
for every instruction set.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from treadle.ir.types import DType

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_TYPES = {"i1": "i1", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64", "f16": "half", "f32": "float"}
_TYPES |= {"f64": "double"}


def call_lanewise(
    k: Emitter, name: str, result: str, lanes: int, operands: Sequence[Expr], types: str, body: str
) -> Expr:
    """Call a function with this body. `result` is TVM's dtype of the result; `types` are LLVM's types of operands and
    result.
    """
    taken, _, given = types.partition("->")
    full = f"treadle_{name}_{lanes}"

    def text() -> str:
        arguments = ", ".join(f"{_type(t, lanes)} %x{i}" for i, t in enumerate(taken.split()))
        made = _type(given.strip(), lanes)
        lines = _filled(body, lanes)
        return f"define {made} @{full}({arguments}) alwaysinline {{\n{lines}\nret {made} %r\n}}\n"

    return k.llvm(full, text, result + (f"x{lanes}" if lanes > 1 else ""), *operands)


def compare(k: Emitter, how: str, x: Expr, y: Expr, dtype: DType, lanes: int) -> Expr:
    """Compare lane by lane, and return bools. `how`: eq, ne, lt, le, gt or ge. A NaN differs from every value.

    TVM would fold x == x to true, and evaluates == only at its use.
    """
    t = llvm_type(dtype)
    if dtype.is_float:
        said = f"fcmp {'u' if how == 'ne' else 'o'}{how}"
    else:
        said = f"icmp {how}" if how in ("eq", "ne") else f"icmp {'u' if dtype.name == 'u8' else 's'}{how}"
    body = f"%r = {said} {{{t}}} %x0, %x1"
    return call_lanewise(k, f"{how}_{dtype.name}", "bool", lanes, [x, y], f"{t} {t} -> i1", body)


def llvm_type(dtype: DType) -> str:
    """Return LLVM's name of a dtype: integers are named by their width, signed or not; bool is i1."""
    return {"u8": "i8", "bool": "i1", "bf16": "i16"}.get(dtype.name, dtype.name)


def tvm_type(dtype: DType) -> str:
    """Return TVM's name of a dtype; see `treadle.backends.tvm.kernels.emitter.tvm_dtype`, which also handles lanes."""
    if dtype.is_float:
        return f"float{8 * dtype.bytes}"
    return dtype.name if dtype.name == "bool" else ("u" if dtype.name == "u8" else "") + f"int{8 * dtype.bytes}"


def by_lane(k: Emitter, name: str, dtype: DType, lanes: int, *operands: Expr) -> Expr:
    """Call a function of C's math library (`Emitter.libm`) for each lane."""
    if lanes == 1:
        return k.libm(name, dtype, *operands)
    held = [k.let(x) for x in operands]
    made = [k.let(k.libm(name, dtype, *(k.shuffle([x], [i]) for x in held))) for i in range(lanes)]
    return k.shuffle(made, range(lanes))


def hexadecimal(value: float) -> str:
    """Return a float constant that LLVM reads exactly, in the precision of float32 or float64."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def _type(name: str, lanes: int) -> str:
    return f"<{lanes} x {_TYPES[name]}>" if lanes > 1 else _TYPES[name]


def _filled(body: str, lanes: int) -> str:
    body = re.sub(r"\{\.(\w+)\}", lambda m: f".v{lanes}{m[1]}" if lanes > 1 else f".{m[1]}", body)
    body = re.sub(r"\{(\w+)\}", lambda m: _type(m[1], lanes), body)
    return re.sub(r"\[(\w+) ([^\]]+)\]", lambda m: f"splat ({_TYPES[m[1]]} {m[2]})" if lanes > 1 else m[2], body)
