"""The emitter: the vocabulary in which kernel generators write loops.

A specification (`treadle.backends.tvm.kernels.kernel.Kernel.emit`) calls the words of an `Emitter`. There are two
emitters: `host.llvm_emitter` for CPUs, where the lanes of a vector are those of a register, and
`devices.group_emitter` for devices, where they are the threads of a group.

Values are expressions, on which operators such as `+ - * < &` work; indices may be Python integers. A value has a
number of lanes:

- a scalar has one. Loops, branches and indices take scalars only. On a device, all threads of a group have the same one
- a vector has `lanes` lanes. Words and operators work lane by lane, except the words below "across lanes"

An expression is evaluated where it is used, and again at each use; `let` evaluates it once. A product that is added in
the same expression is rounded with the sum, any other product before it: docs/kernels.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.isa import Isa
from treadle.ir.types import DType, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.arithmetic.lane_function import LaneFunction

Expr = Any
"""An expression of an emitter; indices may be Python integers."""


class Emitter(ABC):
    """An emitter of one kernel for one instruction set or device.

    isa             the lanes, registers and features for which the kernel is written
    integer_angles  True to reduce the arguments of sin and cos in integers, instead of f64 and C's math library
    has_f64         True if float64 sums can be computed
    """

    isa: Isa
    integer_angles = False
    has_f64 = True

    # -- arguments -------------------------------------------------------------------------------------------

    @abstractmethod
    def pointer(self, name: str, dtype: DType) -> Any:
        """Declare the next pointer argument of the kernel. On a device, it is a buffer and an element offset."""

    @abstractmethod
    def size(self, name: str) -> Expr:
        """Declare the next size argument of the kernel, an int64."""

    @abstractmethod
    def view(self, pointer: Any, shape: Sequence[Expr], strides: Sequence[Expr] | None = None) -> Any:
        """Return the memory at a pointer as an array; strides are in elements, row-major by default."""

    # -- loops and names -------------------------------------------------------------------------------------

    @abstractmethod
    def parallel(self, count: Expr, name: str = "p") -> AbstractContextManager[Expr]:
        """A loop whose iterations, the tasks, are divided among threads, or on a device among groups.

        It must be the outermost loop, and there is at most one in a kernel. Tasks are independent of each other.
        """

    @abstractmethod
    def loop(self, count: Expr, name: str = "i") -> AbstractContextManager[Expr]:
        """A loop from 0 to count - 1."""

    @abstractmethod
    def unroll(self, count: int, name: str = "u") -> AbstractContextManager[Expr]:
        """A loop that the code generator unrolls, so that indices into registers are constants."""

    @abstractmethod
    def when(self, condition: Expr) -> AbstractContextManager[None]:
        """A block that runs only if the condition, a scalar, holds."""

    def name(self, name: str, value: Expr) -> Expr:
        """Name a variable in the printed source."""
        return value

    @abstractmethod
    def let(self, value: Expr, name: str = "t") -> Expr:
        """Bind a value to a variable, so that it is computed once."""

    @abstractmethod
    def opaque(self, value: Expr, name: str = "t") -> Expr:
        """Bind an index to a variable that the code generator does not analyze. Analyzing nested divisions would take
        TVM minutes.
        """

    @abstractmethod
    def kept(self, value: Expr, dtype: DType, lanes: int = 1, name: str = "t") -> Expr:
        """Bind a value to a variable whose expression the code generator does not analyze.

        TVM expands a value of `let` at every use, with all variables in it. If each of n values is used twice by the
        next one, this takes 2^n expansions.
        """

    # -- memory ----------------------------------------------------------------------------------------------

    @abstractmethod
    def registers(self, count: int, dtype: DType, name: str = "acc") -> Any:
        """Allocate a tile of `count` elements, which stays in registers if every index is a constant.

        On a device, it is private to a thread if it is accessed by scalars only, or only by vectors whose first
        elements are multiples of the number of lanes. Otherwise it is shared memory.
        """

    @abstractmethod
    def load(self, view: Any, index: Sequence[Expr], lanes: int = 1) -> Expr:
        """Load an element, or `lanes` contiguous elements along the last index. A bool is True if it is not 0."""

    @abstractmethod
    def store(self, view: Any, index: Sequence[Expr], value: Expr, lanes: int = 1) -> None:
        """Store an element, or `lanes` contiguous elements along the last index.

        On a device, the first thread stores a scalar, and the first threads a vector with fewer lanes than threads.
        """

    @abstractmethod
    def address(self, view: Any, index: Sequence[Expr]) -> Expr:
        """Return the address of an element, for an intrinsic. Not on devices."""

    @abstractmethod
    def prefetch(self, view: Any, index: Sequence[Expr]) -> None:
        """Prefetch the cache line of an element into the second-level cache; an invalid address has no effect. Nothing
        on devices.
        """

    # -- values ----------------------------------------------------------------------------------------------

    @abstractmethod
    def number(self, value: float | int | bool, dtype: DType, lanes: int = 1) -> Expr:
        """Return a constant, in every lane."""

    @abstractmethod
    def index(self, value: Expr) -> Expr:
        """Return a value as an int64 index."""

    @abstractmethod
    def splat(self, value: Expr, lanes: int) -> Expr:
        """Return a vector with a scalar in every lane."""

    @abstractmethod
    def lane_indices(self, first: Expr, lanes: int) -> Expr:
        """Return first, first + 1, ... as an int64 vector."""

    @abstractmethod
    def cast(self, value: Expr, dtype: DType, lanes: int = 1) -> Expr:
        """Convert a value as C does: a float to an integer by dropping its fraction. See `conversions`."""

    @abstractmethod
    def select(self, condition: Expr, then: Expr, otherwise: Expr) -> Expr:
        """Select lane by lane. Both sides are computed, so both must be safe to compute."""

    @abstractmethod
    def either(self, condition: Expr, then: Expr, otherwise: Expr) -> Expr:
        """Select between scalars; only the selected side is computed."""

    @abstractmethod
    def both(self, x: Expr, y: Expr) -> Expr:
        """Return an expression that is true in each lane in which both conditions hold."""

    @abstractmethod
    def any_of(self, x: Expr, y: Expr) -> Expr:
        """Return an expression that is true in each lane in which one of the conditions holds."""

    @abstractmethod
    def equal(self, x: Expr, y: Expr) -> Expr:
        """Compare lane by lane. Return an expression, whereas `x == y` in TVM is evaluated only at its use."""

    @abstractmethod
    def is_nan(self, x: Expr) -> Expr:
        """Test for NaN lane by lane, in float32 or float64. `x != x` would be folded away."""

    @abstractmethod
    def least(self, x: Expr, y: Expr) -> Expr:
        """Return the smaller value; the result for a NaN is unspecified."""

    @abstractmethod
    def greatest(self, x: Expr, y: Expr) -> Expr:
        """Return the larger value; the result for a NaN is unspecified."""

    @abstractmethod
    def nearest(self, x: Expr) -> Expr:
        """Round to the nearest integer, ties to even."""

    @abstractmethod
    def floor(self, x: Expr) -> Expr:
        """Round down to an integer."""

    @abstractmethod
    def sqrt(self, x: Expr) -> Expr:
        """Return the square root, correctly rounded."""

    @abstractmethod
    def absolute(self, x: Expr) -> Expr:
        """Return the absolute value."""

    @abstractmethod
    def floor_divide(self, x: Expr, y: Expr) -> Expr:
        """Divide indices, rounding towards minus infinity. On a device, x must not be negative."""

    @abstractmethod
    def floor_mod(self, x: Expr, y: Expr) -> Expr:
        """Return the remainder of `floor_divide`, with the sign of y."""

    @abstractmethod
    def bits(self, value: Expr, dtype: DType, lanes: int = 1) -> Expr:
        """Reinterpret the bits as another dtype: `lanes` lanes of it, as many bytes as the value has.

        On a device, several elements become a wider one only in a value that was just loaded.
        """

    @abstractmethod
    def shift_left(self, x: Expr, y: Expr) -> Expr:
        """Shift the bits of integers to the left."""

    @abstractmethod
    def libm(self, name: str, dtype: DType, lanes: int, *operands: Expr) -> Expr:
        """Call a function of C's math library for each lane, by its float64 name: `exp` is `expf` for f32."""

    @abstractmethod
    def lane_function(self, function: LaneFunction, lanes: int, *operands: Expr) -> Expr:
        """Call a lane function on vectors of `lanes` lanes. Equal names of functions must mean equal functions."""

    # -- across lanes ----------------------------------------------------------------------------------------

    @abstractmethod
    def shuffle(self, vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
        """Return a vector of the given lanes of the concatenated vectors. On a device, threads exchange values."""

    @abstractmethod
    def any_of_lanes(self, condition: Expr, lanes: int) -> Expr:
        """Return a scalar that is true if the condition holds in any lane."""

    @abstractmethod
    def sum_of_lanes(self, x: Expr, lanes: int, dtype: DType = f32) -> Expr:
        """Return the sum of a vector's lanes: floats in f32, which are added by halves, or integers in i32."""

    @abstractmethod
    def maximum_of_lanes(self, x: Expr, lanes: int, dtype: DType = f32) -> Expr:
        """Return the maximum of a vector's lanes, in f32 or i32. If one of them is NaN, the result is unspecified."""

    def folded_lanes(self, x: Expr, lanes: int, dtype: DType, combine: Callable[[Expr, Expr, int], Expr]) -> Expr:
        """Fold the lanes of a vector into a scalar, by halves. `combine` takes two values and their number of lanes."""
        while lanes > 1:
            pair = self.registers(lanes, dtype, "lanes")
            self.store(pair, [0], x, lanes)
            lanes //= 2
            x = self.let(combine(self.load(pair, [0], lanes), self.load(pair, [lanes], lanes), lanes))
        return x

    def transposed(self, rows: Sequence[Expr]) -> list[Expr]:
        """Transpose a square with one vector for each lane: swap its halves, then the halves of each, and so on."""
        lanes = len(rows)
        held = [self.let(row, "row") for row in rows]
        size = lanes // 2
        while size:
            made: list[Any] = [None] * lanes
            for x in range(lanes):
                if x & size:
                    continue
                pair = [held[x], held[x + size]]
                low = [e if not e & size else lanes + e - size for e in range(lanes)]
                high = [e + size if not e & size else lanes + e for e in range(lanes)]
                made[x] = self.let(self.shuffle(pair, low), "low")
                made[x + size] = self.let(self.shuffle(pair, high), "high")
            held, size = made, size // 2
        return held

    # -- CPUs only -------------------------------------------------------------------------------------------

    @abstractmethod
    def llvm(self, name: str, text: Callable[[], str], result: str, *operands: Expr) -> Expr:
        """Call a function that is defined by LLVM text, which is inlined. `result` is TVM's dtype. Not on devices.

        Use this only for instructions of an instruction set.
        """

    @abstractmethod
    def effect(self, name: str, declared: str, call: str, *operands: Expr, constant: str = "") -> None:
        """Emit a call of an LLVM intrinsic for its side effect. Operands are addresses and int64 indices. Not on
        devices.

        declared  the intrinsic's declaration, `void @llvm.x86.tilestored64(i8 immarg, ptr, i64)`
        call      the call, in which operand i is %x<i>: `void @llvm.x86.tilestored64(i8 0, ptr %x0, i64 %x1)`
        constant  definition of a constant that the call reads, equal in all calls of a kernel
        """
