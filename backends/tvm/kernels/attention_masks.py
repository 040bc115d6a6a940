"""What attention does with the scores of a query beside their scale: soft-cap, masks and biases, vector by vector.

A mask by position (causal, window, padding) is no term here: it is a first and a last key of each query, which the
kernel in `treadle.backends.tvm.kernels.attention` takes as sizes. The terms that are left read operands of their own:

    segments   query_segments[b, i] == key_segments[b, j]
    mask       a boolean tensor, along some of b, h, s and t
    bias       a float32 tensor, likewise
    offsets    values[h, j - i], which `RelativeBias` lays out in a row for each head
    alibi      slopes[h] * (j - i)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DType, boolean, f32, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

Read = Callable[[Any, Sequence[Any]], Any]
"""A vector of a view's elements along its last dimension, from an index on; past the last key it reads nothing."""

_POINTERS: dict[str, tuple[DType, ...]] = {
    "segments": (i64, i64),
    "mask": (boolean,),
    "bias": (f32,),
    "offsets": (f32,),
    "alibi": (f32,),
}


@dataclass(frozen=True)
class Term:
    """A term of the kernel.

    kind     one of those above
    by_key   of a mask or bias: whether it varies along t
    """

    kind: str
    by_key: bool = True

    @property
    def code(self) -> str:
        """As text, for a kernel's key."""
        return self.kind if self.by_key else f"{self.kind} of a query"

    @staticmethod
    def of(code: str) -> Term:
        kind, _, by_query = code.partition(" ")
        return Term(kind, not by_query)

    @property
    def pointers(self) -> tuple[DType, ...]:
        """The dtypes of its operands."""
        return _POINTERS[self.kind]

    @property
    def strides(self) -> int:
        """How many strides it is passed: of a mask or bias those over b, h and s."""
        return 3 if self.kind in ("mask", "bias") else 0

    @property
    def is_mask(self) -> bool:
        return self.kind in ("segments", "mask")


class TermWriter:
    """Writes one term.

    kind, by_key   as in `Term`
    """

    def __init__(self, k: Emitter, term: Term, number: int) -> None:
        self.k, self.term = k, term
        self.pointers = [k.pointer(f"{term.kind}{number}_{i}", d) for i, d in enumerate(term.pointers)]
        self.strides: list[Any] = []
        self.views: list[Any] = []
        self.row: Any = None

    def ask(self, number: int) -> None:
        """Ask for the sizes: strides."""
        self.strides = [self.k.size(f"{self.term.kind}{number}_stride{i}") for i in range(self.term.strides)]

    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr, slack: int) -> None:
        """Say what the pointers point at. `slack`: how many offsets past the last there are."""
        k, term = self.k, self.term
        match term.kind:
            case "segments":
                shapes: list[tuple[list[Any], list[Any] | None]] = [([b, s], None), ([b, t], None)]
            case "mask" | "bias":
                shapes = [([b, h, s, t], [*self.strides, 1 if term.by_key else 0])]
            case "offsets":
                shapes = [([h, s + t + slack], None)]
            case _:
                shapes = [([h], None)]
        self.views = [k.view(p, *shape) for p, shape in zip(self.pointers, shapes, strict=True)]
        self.queries = s

    def begin(self, b: Expr, h: Expr, i: Expr) -> None:
        """Read what holds for all keys of a query."""
        k = self.k
        self.at = (b, h, i)
        match self.term.kind:
            case "segments":
                self.row = k.let(k.load(self.views[0], [b, i]), "segment")
            case "mask" | "bias" if not self.term.by_key:
                self.row = k.let(k.load(self.views[0], [b, h, i, 0]), self.term.kind)
            case "alibi":
                self.row = k.let(k.load(self.views[0], [h]), "slope")

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        """The term at keys j, j + 1, ...: which are kept, or what is added."""
        k = self.k
        b, h, i = self.at
        match self.term.kind:
            case "segments":
                return k.equal(read(self.views[1], [b, j]), k.splat(self.row, lanes))
            case "offsets":
                return k.load(self.views[0], [h, j + (self.queries - 1 - i)], lanes)
            case "alibi":
                # Whole numbers below 2^24: exact.
                return k.splat(self.row, lanes) * (k.splat(k.cast(j - i, f32), lanes) + lane_numbers(k, f32, lanes))
        return read(self.views[0], [b, h, i, j]) if self.term.by_key else k.splat(self.row, lanes)


def lane_numbers(k: Emitter, dtype: DType, lanes: int) -> Expr:
    """0, 1, ... as a vector. (TVM's simplifier stumbles over a ramp that is cast.)"""
    held = k.registers(lanes, dtype, "numbers")
    for lane in range(lanes):
        k.store(held, [lane], k.number(lane, dtype))
    return k.let(k.load(held, [0], lanes), "numbers")


@dataclass(frozen=True)
class RelativeBias(Kernel):
    """y[h, o] = table[bucket(o - (s - 1)), h]: a bias by the distance of key and query, for every distance.

    Row i of the bias then is the window of y that begins at s - 1 - i. Distances beyond `far` have far's bucket.

    Passed: table [buckets, h], the buckets of -far ... far, y [h, n]; h, n, s, far; the table's strides.
    """

    def emit(self, k: Emitter) -> None:
        table, bucket, y = k.pointer("table", f32), k.pointer("bucket", i64), k.pointer("y", f32)
        h, n, s, far = k.size("h"), k.size("n"), k.size("s"), k.size("far")
        strides = [k.size("table_bucket"), k.size("table_h")]
        table = k.view(table, [far + far + 1, h], strides)
        bucket, y = k.view(bucket, [far + far + 1]), k.view(y, [h, n])
        with k.parallel(h, "head") as head, k.loop(n, "o") as o:
            apart = k.let(k.greatest(k.least(o - (s - 1), far), k.index(0) - far), "apart")
            row = k.let(k.load(bucket, [apart + far]), "row")
            k.store(y, [head, o], k.load(table, [row, head]))
