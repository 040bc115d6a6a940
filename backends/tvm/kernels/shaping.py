"""Shape operations that are not views: enumeration of integers, and sums of windows at their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.backends.tvm.kernels.arithmetic.conversions import working
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter


@dataclass(frozen=True)
class Iota(Kernel):
    """y[i] = i

    Arguments: y; the number of elements; y's stride.
    """

    dtype: str

    def emit(self, k: Emitter) -> None:
        dtype = DTYPES[self.dtype]
        pointer = k.pointer("y", dtype)
        count = k.size("n")
        stride = k.size("y_stride")
        y = k.view(pointer, [count], [stride])
        with k.parallel(count, "i") as i:
            value = k.cast(i, f32) if dtype.bytes == 2 and dtype.is_float else i
            k.store(y, [i], k.cast(value, dtype))


@dataclass(frozen=True)
class FoldWindows(Kernel):
    """y[p, i stride + e dilation, d] += x[p, i, d, e], where y starts as zeros

    Every element of y sums the window elements at its position, in the order of e.

    Arguments: x, y; the sizes p, n, d, i, e, where n is the size of y's axis; stride, dilation; x's strides over p, i,
    d and e; y's strides over p, n and d.
    """

    dtype: str
    generic = True

    def emit(self, k: Emitter) -> None:
        dtype = DTYPES[self.dtype]
        inner = working(dtype)
        pointers = [k.pointer("x", dtype), k.pointer("y", dtype)]
        p, n, d, i, e = (k.size(name) for name in "pndie")
        stride, dilation = k.size("stride"), k.size("dilation")
        strides = [k.size(f"x_{a}") for a in "pide"], [k.size(f"y_{a}") for a in "pnd"]
        x, y = k.view(pointers[0], [p, i, d, e], strides[0]), k.view(pointers[1], [p, n, d], strides[1])
        with k.parallel(p * n, "task") as task:
            at = [k.let(k.floor_divide(task, n), "outer"), k.let(k.floor_mod(task, n), "place")]
            with k.loop(d, "d") as c:
                total = k.registers(1, inner, "total")
                k.store(total, [0], k.number(0, inner))
                with k.loop(e, "e") as element:
                    reach = k.let(at[1] - element * dilation, "reach")
                    with k.when(reach >= k.index(0)):
                        window = k.let(k.floor_divide(reach, stride), "window")
                        with k.when(k.both(window * stride >= reach, window < i)):
                            value = k.load(x, [at[0], window, c, element])
                            value = value if inner is dtype else k.cast(value, inner)
                            k.store(total, [0], k.load(total, [0]) + value)
                value = k.load(total, [0])
                k.store(y, [*at, c], value if inner is dtype else k.cast(value, dtype))
