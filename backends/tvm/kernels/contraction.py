"""Sums of products in any dtype, element by element, for sums that the matrix product kernels do not support."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DTYPES, DType, f32, f64, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter


@dataclass(frozen=True)
class Contraction(Kernel):
    """y[o...] = sum over r... of the product of the operands at [o..., r...]

    dtype     dtype of y. Sums are accumulated in float32; for float32 and float64 in float64, if the device has it; for
              integers in int64
    operands  dtypes of the operands by name
    kept      number of dimensions o of y
    summed    number of dimensions r

    Arguments: the operands, y; the sizes of o and r; each operand's strides of o and r, y's of o.
    """

    dtype: str
    operands: tuple[str, ...]
    kept: int
    summed: int
    generic = True

    def emit(self, k: Emitter) -> None:
        dtype = DTYPES[self.dtype]
        inner = _summed_in(dtype) if k.has_f64 or not dtype.is_float else f32
        pointers = [k.pointer(f"x{i}", DTYPES[name]) for i, name in enumerate(self.operands)]
        pointers.append(k.pointer("y", dtype))
        sizes = [k.size(f"o{i}") for i in range(self.kept)] + [k.size(f"r{i}") for i in range(self.summed)]
        strides = [[k.size(f"{p.name}_{i}") for i in range(len(sizes))] for p in pointers[:-1]]
        strides.append([k.size(f"y_{i}") for i in range(self.kept)])
        views = [k.view(p, sizes[: len(s)], s) for p, s in zip(pointers, strides, strict=True)]
        with ExitStack() as outer:  # nested loops: LLVM would take minutes to divide a flat index by every size
            at = [
                outer.enter_context((k.loop if i else k.parallel)(size, f"o{i}"))
                for i, size in enumerate(sizes[: self.kept])
            ]
            held = k.registers(1, inner, "total")
            k.store(held, [0], k.number(0, inner))
            with ExitStack() as loops:
                over = [loops.enter_context(k.loop(size, "r")) for size in sizes[self.kept :]]
                made = None
                for view in views[:-1]:
                    factor = k.load(view, [*at, *over])
                    factor = factor if view.dtype is inner else k.cast(factor, inner)
                    made = factor if made is None else made * factor
                k.store(held, [0], k.load(held, [0]) + made)
            value = k.load(held, [0])
            k.store(views[-1], at, value if dtype is inner else k.cast(value, dtype))


def _summed_in(dtype: DType) -> DType:
    if dtype.name in ("f16", "bf16"):
        return f32
    return f64 if dtype.is_float else i64
