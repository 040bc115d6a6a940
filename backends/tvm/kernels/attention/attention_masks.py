"""Terms of attention that are applied to the scaled scores of a query: soft-cap, masks and biases, as vectors.

A mask of positions (causal, window, padding) is not a term here. It determines the first and the last key of each
query, and the kernel in `treadle.backends.tvm.kernels.attention.flash_attention` takes these as sizes. Each other term
has its own operands and a writer:

    segments   query_segments[b, i] == key_segments[b, j]
    mask       a boolean tensor, along some of b, h, s and t
    bias       a float32 tensor, likewise
    offsets    values[h, j - i], which `RelativeBias` stores in a row for each head
    alibi      slopes[h] * (j - p), p the position of query i
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.backends.tvm.kernels.attention.scratch import PANEL
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DType, boolean, f32, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

Read = Callable[[Any, Sequence[Any]], Any]
"""A function that reads a vector of a view's elements along the last dimension, from an index on, but nothing after the
last key.
"""


class TermWriter(ABC):
    """A writer of the code for one term of the kernel.

    kind        the term's name in titles
    code        the term's name in a kernel's spec: the kind, or more specific
    dtypes      dtypes of the operands
    strides     number of sizes among the arguments, most of them strides
    is_mask     True if the term selects keys; otherwise it is added to scores
    reads_keys  True if an operand has an element for each key, and none after the last key
    """

    kind: ClassVar[str]
    code: ClassVar[str]
    dtypes: ClassVar[tuple[DType, ...]]
    strides: ClassVar[int] = 0
    is_mask: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False

    def __init__(self, k: Emitter, number: int) -> None:
        """Declare the pointers to the operands."""
        self.k, self.name = k, f"{self.kind}{number}"
        self.pointers = [k.pointer(f"{self.name}_{i}", dtype) for i, dtype in enumerate(self.dtypes)]
        self.passed: list[Any] = []
        self.row: Any = None

    def ask(self) -> None:
        """Declare the sizes: strides of the operands."""
        self.passed = [self.k.size(f"{self.name}_stride{i}") for i in range(self.strides)]

    @abstractmethod
    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr) -> None:
        """Set the shapes of the operands."""

    def begin(self, b: Expr, h: Expr, i: Expr, position: Expr) -> None:
        """Read the values that apply to all keys of the query with this index and position."""
        self.at, self.position = (b, h, i), position

    @abstractmethod
    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        """Return the term for keys at positions j, j + 1, ...: a mask of the keys, or values to add."""


class SegmentsWriter(TermWriter):
    """query_segments[b, i] == key_segments[b, j]"""

    kind = code = "segments"
    dtypes = (i64, i64)
    is_mask = reads_keys = True

    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr) -> None:
        of_queries, of_keys = self.pointers
        self.of_queries, self.of_keys = self.k.view(of_queries, [b, s]), self.k.view(of_keys, [b, t])

    def begin(self, b: Expr, h: Expr, i: Expr, position: Expr) -> None:
        super().begin(b, h, i, position)
        self.row = self.k.let(self.k.load(self.of_queries, [b, i]), "segment")

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        return self.k.equal(read(self.of_keys, [self.at[0], j]), self.k.splat(self.row, lanes))


class _TensorWriter(TermWriter):
    """A tensor with an element for each key. It may also vary along b, h and s; strides of other axes are 0."""

    strides = 3
    reads_keys = True

    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr) -> None:
        (pointer,) = self.pointers
        self.view = self.k.view(pointer, [b, h, s, t], [*self.passed, 1 if self.reads_keys else 0])

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        return read(self.view, [*self.at, j])


class _QueryTensorWriter(_TensorWriter):
    """A tensor that is the same for all keys."""

    reads_keys = False

    def begin(self, b: Expr, h: Expr, i: Expr, position: Expr) -> None:
        super().begin(b, h, i, position)
        self.row = self.k.let(self.k.load(self.view, [b, h, i, 0]), self.kind)

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        return self.k.splat(self.row, lanes)


class MaskWriter(_TensorWriter):
    """mask[b, h, i, j]"""

    kind = code = "mask"
    dtypes = (boolean,)
    is_mask = True


class QueryMaskWriter(_QueryTensorWriter):
    """mask[b, h, i]"""

    kind, code = "mask", "mask of a query"
    dtypes = (boolean,)
    is_mask = True


class BiasWriter(_TensorWriter):
    """+ bias[b, h, i, j]"""

    kind = code = "bias"
    dtypes = (f32,)


class QueryBiasWriter(_QueryTensorWriter):
    """+ bias[b, h, i]"""

    kind, code = "bias", "bias of a query"
    dtypes = (f32,)


class OffsetsWriter(TermWriter):
    """+ values[h, j - i], stored from j - i = 1 - s on; i counts from the kernel's first query"""

    kind = code = "offsets"
    dtypes = (f32,)

    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr) -> None:
        (pointer,) = self.pointers
        self.view, self.queries = self.k.view(pointer, [h, row_of_offsets(s, t, self.k.isa)]), s

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        _, h, i = self.at
        return self.k.load(self.view, [h, j + (self.queries - 1 - i)], lanes)


class NearOffsetsWriter(TermWriter):
    """+ values[h, j - p] of a query at position p, stored for j - p from -reach to reach; farther keys use the last
    value

    Used for a cache: positions are not known in advance, so only distances at which values differ are stored.
    """

    kind, code = "offsets", "near offsets"
    dtypes = (f32,)
    strides = 1  # the reach; the array has one more vector on either side

    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr) -> None:
        (pointer,), (self.reach,) = self.pointers, self.passed
        self.view = self.k.view(pointer, [h, near_offsets(self.reach, self.k.isa)])

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        k, (_, h, _) = self.k, self.at
        apart = k.opaque(k.greatest(k.least(j - self.position, self.reach), k.index(0) - self.reach), "apart")
        return k.load(self.view, [h, apart + self.reach], lanes)


def row_of_offsets(queries: Any, keys: Any, isa: Isa) -> Any:
    """Return the number of values per head that `OffsetsWriter` reads: a panel of vectors after the last offset."""
    return queries + keys + PANEL * isa.widest


def near_offsets(reach: Any, isa: Isa) -> Any:
    """Return the number of values per head that `NearOffsetsWriter` reads."""
    return reach + reach + isa.widest


class AlibiWriter(TermWriter):
    """+ slopes[h] * (j - p) of a query at position p"""

    kind = code = "alibi"
    dtypes = (f32,)
    strides = 1  # the position of the first query; 0 for a cache

    def bind(self, b: Expr, h: Expr, s: Expr, t: Expr) -> None:
        (pointer,) = self.pointers
        self.view = self.k.view(pointer, [h])

    def begin(self, b: Expr, h: Expr, i: Expr, position: Expr) -> None:
        super().begin(b, h, i, position + self.passed[0])
        self.row = self.k.let(self.k.load(self.view, [h]), "slope")

    def vector(self, j: Expr, lanes: int, read: Read) -> Expr:
        k = self.k
        # These are integers below 2^24, which float32 represents exactly.
        apart = k.splat(k.cast(j - self.position, f32), lanes) + lane_numbers(k, f32, lanes)
        return k.splat(self.row, lanes) * apart


WRITERS: Mapping[str, type[TermWriter]] = {
    writer.code: writer
    for writer in (
        SegmentsWriter,
        MaskWriter,
        QueryMaskWriter,
        BiasWriter,
        QueryBiasWriter,
        OffsetsWriter,
        NearOffsetsWriter,
        AlibiWriter,
    )
}
"""The classes of writers, by code."""


def lane_numbers(k: Emitter, dtype: DType, lanes: int) -> Expr:
    """Return 0, 1, ... as a vector. (TVM's simplifier fails on a ramp that is cast.)"""
    held = k.registers(lanes, dtype, "numbers")
    for lane in range(lanes):
        k.store(held, [lane], k.number(lane, dtype))
    return k.let(k.load(held, [0], lanes), "numbers")


@dataclass(frozen=True)
class RelativeBias(Kernel):
    """y[h, o] = table[bucket(o - (s - 1)), h]: a bias that depends on the distance of key and query, for every
    distance.

    s - 1 is the position of the last query. The bias of a query at position p is the window of y that begins at s - 1 -
    p. Distances beyond `far` use the bucket of `far`.

    Arguments: table [buckets, h], the buckets of distances -far to far, y [h, n]; h, n, s, far; the table's strides.
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
