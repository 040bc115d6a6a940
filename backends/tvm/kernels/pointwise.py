"""Elementwise chains: any number of elementwise ops as one kernel. Each element is read once and written once.

    y = tanh(x + b) * s     -->     one loop; x and y contiguous, b and s with stride 0 where they repeat

A `Chain` is a small program in SSA form. It is also used as the epilogue of a product
(`treadle.backends.tvm.kernels.matmul`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic import vector_math
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.types import DTYPES, DType

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

BLOCK = 4096  # number of elements of a flat array in one task


@dataclass(frozen=True)
class Instruction:
    """One op of a chain. Operands are numbers: first come the chain's inputs, then the results of earlier instructions.

    attributes  (name, value) pairs; `constant` has one, its value
    dtype       dtype of the result, by name
    """

    op: str
    operands: tuple[int, ...]
    dtype: str
    attributes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Chain:
    """A program over elements: the dtypes of the inputs by name, and the instructions. The result of the last
    instruction is the chain's result.
    """

    inputs: tuple[str, ...]
    instructions: tuple[Instruction, ...]

    @property
    def dtype(self) -> DType:
        """Dtype of the result."""
        return DTYPES[self.instructions[-1].dtype if self.instructions else self.inputs[0]]

    def emit(self, k: Emitter, values: Sequence[Expr], lanes: int) -> Expr:
        """Emit the chain on these inputs, which are vectors of `lanes` lanes. Return the result."""
        held = list(values)
        dtypes = [DTYPES[name] for name in self.inputs]
        for step in self.instructions:
            operands = [(held[i], dtypes[i]) for i in step.operands]
            made = vector_math.emit(k, step.op, operands, DTYPES[step.dtype], lanes, **dict(step.attributes))
            dtypes.append(DTYPES[step.dtype])
            last = len(held) == len(values) + len(self.instructions) - 1
            plain = last or step.op == "constant"
            held.append(k.let(made, step.op) if plain else k.kept(made, dtypes[-1], lanes, step.op))
        return held[-1]

    @property
    def width(self) -> int:
        """Number of bytes of the widest element in the computation. A vector register of such elements is one step."""
        computed = [DTYPES[step.dtype] for step in self.instructions]
        read = [DTYPES[name] for name in self.inputs]
        widths = [vector_math.working(d).bytes if self.instructions else d.bytes for d in (*read, *computed)]
        if any(step.op in vector_math.DIVISIONS for step in self.instructions):
            widths.append(4)  # computed lane by lane, so more lanes are not faster
        return max(widths)

    @property
    def title(self) -> str:
        """Names of the chain's ops, for a kernel's name."""
        return "_".join(step.op for step in self.instructions if step.op != "constant") or "copy"


@dataclass(frozen=True)
class Pointwise(Kernel):
    """y[i...] = chain(x0[i...], x1[i...], ...), where each operand and y have their own strides

    chain    the computation
    rank     number of loops, the last one innermost
    inner    for each operand, and then y, the stride class of the last loop: `1` contiguous, `0` broadcast, `s` any
             other stride
    over     number of the operand that y overwrites in memory; None: no operand

    Arguments: the operands, y; the loops' sizes; for each operand, then y, one stride for each loop (also for the
    last). Kernels assume that no two pointers refer to the same memory, so an operand that y overwrites is read through
    y's pointer and has none of its own.
    """

    chain: Chain
    rank: int
    inner: str
    over: int | None = None

    @property
    def title(self) -> str:
        return self.chain.title if self.over is None else f"{self.chain.title}_over"

    def emit(self, k: Emitter) -> None:
        read = [(i, DTYPES[name]) for i, name in enumerate(self.chain.inputs) if i != self.over]
        pointers = [*(k.pointer(f"x{i}", d) for i, d in read), k.pointer("y", self.chain.dtype)]
        sizes = [k.size(f"n{i}") for i in range(self.rank)]
        strides = [[k.size(f"{p.name}_stride{i}") for i in range(self.rank)] for p in pointers]
        inner = [how for i, how in enumerate(self.inner) if i != self.over]
        for stride, how in zip(strides, inner, strict=True):
            if how != "s" and stride:
                stride[-1] = int(how)
        views = [k.view(p, sizes, s) for p, s in zip(pointers, strides, strict=True)]
        if self.over is not None:
            views.insert(self.over, views[-1])
        if self.rank == 0:
            with k.parallel(1):
                self._point(k, views, [])
        elif self.rank == 1:
            blocks = k.floor_divide(sizes[0] + (BLOCK - 1), BLOCK)
            with k.parallel(blocks, "block") as block:
                first = k.let(block * BLOCK, "first")
                self._run(k, views, [], first, k.let(k.least(sizes[0] - first, k.index(BLOCK)), "count"))
        else:
            with k.parallel(sizes[0], "i0") as i0:
                self._nest(k, views, sizes, [i0])

    def _nest(self, k: Emitter, views: Sequence[Any], sizes: Sequence[Expr], outer: list[Expr]) -> None:
        if len(outer) == self.rank - 1:
            self._run(k, views, outer, k.index(0), sizes[-1])
            return
        with k.loop(sizes[len(outer)], f"i{len(outer)}") as i:
            self._nest(k, views, sizes, [*outer, i])

    def _run(self, k: Emitter, views: Sequence[Any], outer: list[Expr], first: Expr, count: Expr) -> None:
        """Emit the computation of `count` elements along the last loop, from `first` on."""
        if "s" in self.inner:
            with k.loop(count, "i") as i:
                self._point(k, views, [*outer, first + i])
            return
        lanes = k.isa.lanes(self.chain.width)
        vectors = k.let(k.floor_divide(count, lanes), "vectors")
        with k.loop(vectors, "v") as v:
            at = [*outer, first + v * lanes]
            read = [
                k.load(x, at, lanes) if how == "1" else k.splat(k.load(x, at), lanes)
                for x, how in zip(views[:-1], self.inner, strict=False)
            ]
            k.store(views[-1], at, self.chain.emit(k, read, lanes), lanes)
        # The rest goes through the same vector code, so that an element's bits do not depend on its position.
        rest = k.let(count - vectors * lanes, "rest")
        with k.when(rest > k.index(0)):
            start = k.let(first + vectors * lanes, "start")
            tails = []
            for x, how in zip(views[:-1], self.inner, strict=False):
                if how == "0":
                    tails.append(k.splat(k.load(x, [*outer, start]), lanes))
                    continue
                padded = k.registers(lanes, x.dtype, "tail")
                k.store(padded, [0], k.number(0, x.dtype, lanes), lanes)
                with k.loop(rest, "r") as r:
                    k.store(padded, [r], k.load(x, [*outer, start + r]))
                tails.append(k.load(padded, [0], lanes))
            made = k.registers(lanes, views[-1].dtype, "made")
            k.store(made, [0], self.chain.emit(k, tails, lanes), lanes)
            with k.loop(rest, "r") as r:
                k.store(views[-1], [*outer, start + r], k.load(made, [r]))

    def _point(self, k: Emitter, views: Sequence[Any], at: list[Expr]) -> None:
        k.store(views[-1], at, self.chain.emit(k, [k.load(x, at) for x in views[:-1]], 1))
