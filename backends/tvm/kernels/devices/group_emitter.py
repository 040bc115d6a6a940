"""The group emitter: the words of specifications for a device whose lanes are threads.

`write_kernel` runs a specification once and returns a `GroupKernel`: arguments, memory, and a tree of statements. What
a word means for lanes is documented at `treadle.backends.tvm.kernels.emitter.Emitter`; this module documents what it
means for threads. The emitter has two parameters, in `Device`: the number of lanes of a group and the number of tasks
of a block, 32 and 1 in the normal form, 1 and 64 in the slow form.

Scalars are the same in all threads of a group, and only scalars control loops and branches, so a barrier is legal at
any place of a specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import rounded
from treadle.backends.tvm.kernels.arithmetic.conversions import narrow_cast
from treadle.backends.tvm.kernels.arithmetic.wgsl_text import narrowed
from treadle.backends.tvm.kernels.devices.barriers import place_barriers, place_registers
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel, LackingWord, refuse_dtype
from treadle.backends.tvm.kernels.devices.group_memory import GroupPointer, GroupView, LoadedVector, count_parts, loaded
from treadle.backends.tvm.kernels.devices.statements import (
    GLOBAL,
    Access,
    Declare,
    Exchange,
    Let,
    Loop,
    Memory,
    Statement,
    Store,
    When,
    lane_of,
    walk,
)
from treadle.backends.tvm.kernels.devices.values import (
    INDEX,
    LANE,
    GroupValue,
    ThreadNode,
    constant,
    index_node,
    is_constant,
    operation,
    table,
)
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.errors import BackendError
from treadle.ir.types import DTYPES, DType, bf16, boolean, f16

_TVM = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "uint16"}


def write_kernel(kernel: Kernel, device: Device, name: str) -> GroupKernel:
    """Return a kernel for a device.

    Raises BackendError if the kernel uses a word that the device lacks, or more shared memory than it has. The number
    of buffers depends on a launch, since pointers into one buffer share it.
    """
    emitter = GroupEmitter(device, GroupKernel(kernel, device, name))
    kernel.emit(emitter)
    made = emitter.finished()
    if name in made.functions:  # `logical_and` is a kernel and a lane function
        made.name = f"{name}_kernel"
    if made.shared_bytes > device.limits.shared:
        raise LackingWord("registers", f"{made.shared_bytes} bytes of shared memory, of {device.limits.shared}")
    return made


class GroupEmitter(Emitter):
    """An emitter of one kernel for a group of threads. See `treadle.backends.tvm.kernels.emitter.Emitter`."""

    integer_angles = True  # sin and cos reduce every argument by integer arithmetic, without C's library

    def __init__(self, device: Device, kernel: GroupKernel) -> None:
        self.isa: Device = device
        self.has_f64 = "f64" not in device.limits.lacks
        self.made = kernel
        self._blocks = [kernel.body]
        self._names: dict[str, int] = {}
        self._has_tasks = False

    def finished(self) -> GroupKernel:
        """Return the kernel with its registers placed and its barriers."""
        body = self.made.body
        if not self._has_tasks:  # one task
            zero = ThreadNode("variable", INDEX, (), self._named("task"))
            self.made.body = body = [Loop(zero, constant(1, INDEX), list(body), tasks=True)]
        _refuse_stores_after_tasks(body)
        self.made.shared = place_registers(body, self.isa)
        self.made.body = place_barriers(body, self.isa)
        return self.made

    def _count(self, lanes: int) -> int:
        return count_parts(lanes, self.isa.group)

    def _add(self, statement: Statement) -> None:
        self._blocks[-1].append(statement)

    def _named(self, name: str) -> str:
        """Return a name that is unique in the kernel."""
        name = re.sub(r"\W", "_", name)
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}_{count}"

    def _let(self, value: ThreadNode, name: str) -> ThreadNode:
        if is_constant(value) or value.op == "variable":
            return value
        made = ThreadNode("variable", value.type, (), self._named(name), value)
        self._add(Let(made, value))
        return made

    # -- arguments -------------------------------------------------------------------------------------------

    def pointer(self, name: str, dtype: DType) -> GroupPointer:
        refuse_dtype(self.isa, "pointer", dtype)
        memory = Memory(self._named(name), dtype, place=GLOBAL)
        self.made.pointers.append(memory)
        made = GroupPointer(memory)
        made.name = name
        return made

    def size(self, name: str) -> GroupValue:
        made = self._named(name)
        self.made.sizes.append(made)
        return GroupValue([ThreadNode("variable", INDEX, (), made)])

    def view(self, pointer: GroupPointer, shape: Sequence[Any], strides: Sequence[Any] | None = None) -> GroupView:
        sizes = [index_node(n) for n in shape] or [constant(1, INDEX)]
        if strides is None:
            row_major: list[ThreadNode] = [constant(1, INDEX)]
            for n in sizes[:0:-1]:
                row_major.append(operation("*", row_major[-1], n))
            steps = row_major[::-1]
        else:
            steps = [index_node(s) for s in strides] or [constant(1, INDEX)]
        made = GroupView(pointer.memory, steps, sizes)
        made.name = pointer.name
        return made

    # -- loops and names -------------------------------------------------------------------------------------

    @contextmanager
    def _body(self, statement: Loop | When) -> Iterator[None]:
        self._add(statement)
        self._blocks.append(statement.body)
        yield
        self._blocks.pop()

    @contextmanager
    def _loop(self, count: Any, name: str, *, unrolled: bool = False, tasks: bool = False) -> Iterator[GroupValue]:
        size = self._let(index_node(count), f"{name}_count")  # computed once
        variable = ThreadNode("variable", INDEX, (), self._named(name))
        with self._body(Loop(variable, size, unrolled=unrolled, tasks=tasks)):
            yield GroupValue([variable])

    @contextmanager
    def parallel(self, count: Any, name: str = "p") -> Iterator[GroupValue]:
        """The loop over tasks. Blocks take tasks in turn, so that any number of blocks computes the same."""
        self._has_tasks = True
        with self._loop(count, name, tasks=True) as i:
            yield i

    @contextmanager
    def loop(self, count: Any, name: str = "i") -> Iterator[GroupValue]:
        with self._loop(count, name) as i:
            yield i

    @contextmanager
    def unroll(self, count: int, name: str = "u") -> Iterator[GroupValue]:
        with self._loop(count, name, unrolled=True) as i:
            yield i

    @contextmanager
    def when(self, condition: GroupValue) -> Iterator[None]:
        if condition.lanes != 1:
            raise BackendError("a branch depends on the lane", hint="use any_of_lanes or select")
        with self._body(When(condition.node)):
            yield

    def name(self, name: str, value: Any) -> Any:
        return value

    def let(self, value: Any, name: str = "t") -> Any:
        if not isinstance(value, GroupValue):
            return value
        return GroupValue([self._let(part, name) for part in value.parts], value.lanes)

    def opaque(self, value: Any, name: str = "t") -> GroupValue:
        made: GroupValue = self.let(self.index(value), name)
        return made

    def kept(self, value: GroupValue, dtype: DType, lanes: int = 1, name: str = "t") -> GroupValue:
        made: GroupValue = self.let(value, name)
        return made

    # -- memory ----------------------------------------------------------------------------------------------

    def registers(self, count: int, dtype: DType, name: str = "acc") -> GroupView:
        refuse_dtype(self.isa, "registers", dtype)
        memory = Memory(self._named(name), dtype, count)
        self._add(Declare(memory))
        return GroupView(memory, [constant(1, INDEX)])

    def load(self, view: GroupView, index: Sequence[Any], lanes: int = 1) -> GroupValue:
        base = view.flat_index(index)
        if lanes > 1:
            return LoadedVector(view.memory, base, lanes, self.isa.group)
        return GroupValue([loaded(view.memory, base, 1, 0, self.isa.group)])

    def store(self, view: GroupView, index: Sequence[Any], value: Any, lanes: int = 1) -> None:
        """Store a vector. Of a vector with fewer lanes than the group has threads, the first threads store; of a
        scalar, the first thread, unless it goes to registers.
        """
        base = view.flat_index(index)
        if not isinstance(value, GroupValue):
            value = self.number(value, view.dtype, lanes)
        if value.lanes != lanes or value.type != view.dtype.name:
            raise BackendError(
                f"a kernel stores {value.type} x {value.lanes} to {view.name}, {view.dtype} x {lanes}",
            )
        view.memory.is_written = True
        for part, node in enumerate(value.parts):
            access = Access(view.memory, base, lanes, part, self.isa.group)
            self._add(Store(access, node, lanes if lanes < self.isa.group else None))

    def address(self, view: GroupView, index: Sequence[Any]) -> GroupValue:
        raise LackingWord("address", "an intrinsic of an instruction set takes it")

    def prefetch(self, view: GroupView, index: Sequence[Any]) -> None:
        """Do nothing: a device has many groups at work while one waits for memory."""

    # -- values ----------------------------------------------------------------------------------------------

    def number(self, value: float | int | bool, dtype: DType, lanes: int = 1) -> GroupValue:
        if dtype is bf16:
            made: float | int | bool = int(rounded(np.asarray(value, np.float32)))
        elif dtype is f16:
            made = int(np.asarray(value, np.float16).view(np.uint16))
        elif dtype.is_float:
            made = float(value)
        else:
            made = bool(value) if dtype is boolean else int(value)
        if dtype.name == "i64" in self.isa.limits.lacks and narrowed(int(made)) is None:
            raise LackingWord("number", f"{value:,}, which does not fit in 32 bits")
        return self.splat(GroupValue([constant(made, dtype.name)]), lanes)

    def index(self, value: Any) -> GroupValue:
        return GroupValue([index_node(value)])

    def splat(self, value: GroupValue, lanes: int) -> GroupValue:
        return GroupValue([value.node] * self._count(lanes), lanes)

    def lane_indices(self, first: Any, lanes: int) -> GroupValue:
        at = index_node(first)
        return GroupValue(
            [operation("+", at, lane_of(lanes, p, self.isa.group)) for p in range(self._count(lanes))], lanes
        )

    def cast(self, value: GroupValue, dtype: DType, lanes: int = 1) -> GroupValue:
        if value.type == dtype.name:
            return value
        refuse_dtype(self.isa, "cast", dtype)
        made = narrow_cast(self, value, _TVM.get(value.type, value.type), dtype, lanes)
        if made is not None:
            assert isinstance(made, GroupValue)
            return made
        return value.mapped(lambda x: ThreadNode("cast", dtype.name, (x,)))

    def select(self, condition: GroupValue, then: GroupValue, otherwise: GroupValue) -> GroupValue:
        parts = zip(condition.parts, then.parts, otherwise.parts, strict=True)
        return GroupValue([ThreadNode("select", a.type, (c, a, b)) for c, a, b in parts], then.lanes)

    def either(self, condition: GroupValue, then: Any, otherwise: Any) -> GroupValue:
        return self.select(condition, _scalar(then), _scalar(otherwise))

    def both(self, x: GroupValue, y: GroupValue) -> GroupValue:
        return x.joined("&&", y)

    def any_of(self, x: GroupValue, y: GroupValue) -> GroupValue:
        return x.joined("||", y)

    def equal(self, x: GroupValue, y: GroupValue) -> GroupValue:
        return x.joined("==", y)

    def is_nan(self, x: GroupValue) -> GroupValue:
        return self._called("is_nan", x, type="bool")

    def least(self, x: Any, y: Any) -> GroupValue:
        return self._extremum("min", x, y)

    def greatest(self, x: Any, y: Any) -> GroupValue:
        return self._extremum("max", x, y)

    def _extremum(self, op: str, x: Any, y: Any) -> GroupValue:
        if not isinstance(x, GroupValue):
            return self._extremum(op, y, x)
        return x.joined(op, y)

    def nearest(self, x: GroupValue) -> GroupValue:
        return self._called("rint", x)

    def floor(self, x: GroupValue) -> GroupValue:
        return self._called("floor", x)

    def sqrt(self, x: GroupValue) -> GroupValue:
        return self._called("sqrt", x)

    def absolute(self, x: GroupValue) -> GroupValue:
        return self._called("abs", x)

    def _called(self, name: str, x: GroupValue, type: str | None = None) -> GroupValue:
        return x.mapped(lambda part: ThreadNode("math", type or part.type, (part,), name))

    def floor_divide(self, x: Any, y: Any) -> GroupValue:
        """Divide indices, which are never negative, so that the quotient is truncated."""
        return GroupValue([operation("/", index_node(x), index_node(y))])

    def floor_mod(self, x: Any, y: Any) -> GroupValue:
        return GroupValue([operation("%", index_node(x), index_node(y))])

    def bits(self, value: GroupValue, dtype: DType, lanes: int = 1) -> GroupValue:
        """Reinterpret bits. Several elements become one wider element only if they are loaded from memory."""
        held = DTYPES[value.type]
        if held.bytes != dtype.bytes:
            if not isinstance(value, LoadedVector) or dtype.bytes < held.bytes:
                raise LackingWord(
                    "bits", f"{value.lanes} x {held} as {lanes} x {dtype}, which is not loaded from memory"
                )
            if dtype.name in self.isa.limits.lacks:
                raise LackingWord("bits", f"elements are read together as {dtype}")
            return value.as_words(dtype.name, dtype.bytes // held.bytes)
        return value.mapped(lambda x: ThreadNode("bits", dtype.name, (x,)))

    def shift_left(self, x: GroupValue, y: GroupValue) -> GroupValue:
        return x.joined("<<", y)

    def lane_function(self, function: Any, lanes: int, *operands: GroupValue) -> GroupValue:
        if function.symbol not in self.made.functions:
            try:
                _ = function.wgsl() if self.isa.limits.language == "wgsl" else function.c(self.isa.limits.language)
            except BackendError as lacking:  # a type that the language lacks
                raise LackingWord("lane_function", str(lacking.what)) from None
        self.made.functions.setdefault(function.symbol, function)
        type = _DTYPE.get(function.result, function.result)
        parts = zip(*(x.parts for x in operands), strict=True)
        return GroupValue([ThreadNode("call", type, tuple(part), function.symbol) for part in parts], lanes)

    def libm(self, name: str, dtype: DType, lanes: int, *operands: GroupValue) -> GroupValue:
        language = self.isa.limits.language
        here = language in ("cuda", "opencl") or (language == "wgsl" and name == "fmod")
        if not here or dtype.name in self.isa.limits.lacks:
            raise LackingWord("libm", f"{language} has no {name} of {dtype} with defined accuracy")
        parts = zip(*(x.parts for x in operands), strict=True)
        return GroupValue([ThreadNode("math", dtype.name, tuple(part), name) for part in parts], lanes)

    # -- words across lanes ----------------------------------------------------------------------------------

    def exchanged(self, value: ThreadNode, thread: ThreadNode, name: str = "other") -> ThreadNode:
        """Return the value that the thread of the group with this number has."""
        if self.isa.group == 1 or is_constant(value):
            return value
        value = self._let(value, name)
        if self.isa.limits.subgroups:
            made = ThreadNode("variable", value.type, (), self._named(name))
            self._add(Exchange(made, value, thread))
            return made
        group = self.isa.group
        cells = self.registers(group, DTYPES[value.type], "exchanged")
        self.store(cells, [0], GroupValue([value], group), group)
        return self._let(loaded(cells.memory, constant(0, INDEX), group, 0, group, offset=thread), name)

    def shuffle(self, vectors: Sequence[GroupValue], lanes: Sequence[int]) -> GroupValue:
        """Return lanes of the concatenated vectors: each thread reads the parts of other threads."""
        group, wide = self.isa.group, vectors[0].lanes
        made = []
        for part in range(self._count(len(lanes))):
            picked = [lanes[(part * group + t) % len(lanes)] for t in range(group)]
            places = [self._place_of(lane % wide, wide) for lane in picked]
            sources = [(lane // wide, q) for lane, (q, _) in zip(picked, places, strict=True)]
            thread = table([t for _, t in places])
            result = None
            for source in dict.fromkeys(sources):
                node = vectors[source[0]].parts[source[1]]
                other = node if wide == 1 else self.exchanged(node, thread)
                if result is None:
                    result = other
                else:
                    chosen = operation("==", table([int(s == source) for s in sources]), constant(1, INDEX))
                    result = ThreadNode("select", other.type, (chosen, other, result))
            assert result is not None
            made.append(self._let(result, "shuffled"))
        return GroupValue(made, len(lanes))

    def _place_of(self, lane: int, wide: int) -> tuple[int, int]:
        """Return the part and the thread that have a lane of a vector."""
        return divmod(lane, self.isa.group) if wide >= self.isa.group else (0, lane)

    def transposed(self, rows: Sequence[GroupValue]) -> list[GroupValue]:
        """Transpose a square of vectors in shared memory."""
        lanes, group = len(rows), self.isa.group
        if group == 1:
            return [GroupValue([row.parts[x] for row in rows], lanes) for x in range(lanes)]
        if lanes != group:
            raise LackingWord("transposed", f"{lanes} vectors in a group of {group} threads")
        dtype, pitch = DTYPES[rows[0].type], group + 1  # so that the reads of a column are in different banks
        square = self.registers(group * pitch, dtype, "square")
        for i, row in enumerate(rows):
            self.store(square, [i * pitch], row, lanes)
        down = operation("*", LANE, constant(pitch, INDEX))
        return [
            self.let(GroupValue([loaded(square.memory, constant(j, INDEX), lanes, 0, group, offset=down)], lanes))
            for j in range(lanes)
        ]

    def folded_lanes(self, x: GroupValue, lanes: int, dtype: DType, combine: Any) -> GroupValue:
        """Fold the lanes into a scalar by halves; every thread gets the first thread's result."""
        parts, group = list(x.parts), self.isa.group
        while len(parts) > 1:
            half = len(parts) // 2
            pairs = zip(parts[:half], parts[half:], strict=True)
            parts = [self._let(combine(GroupValue([a]), GroupValue([b]), 1).node, "half") for a, b in pairs]
        made, size = self._let(parts[0], "folded"), min(lanes, group)
        if size == 1:
            return GroupValue([made])
        while size > 1:
            size //= 2
            thread = operation("%", operation("+", LANE, constant(size, INDEX)), constant(group, INDEX))
            other = self.exchanged(made, thread)
            made = self._let(combine(GroupValue([made]), GroupValue([other]), 1).node, "half")
        return GroupValue([self.exchanged(made, constant(0, INDEX), "folded")])

    def sum_of_lanes(self, x: GroupValue, lanes: int, dtype: DType = DTYPES["f32"]) -> GroupValue:
        return self.folded_lanes(x, lanes, dtype, lambda a, b, _: a + b)

    def maximum_of_lanes(self, x: GroupValue, lanes: int, dtype: DType = DTYPES["f32"]) -> GroupValue:
        return self.folded_lanes(x, lanes, dtype, lambda a, b, _: a.joined("max", b))

    def any_of_lanes(self, condition: GroupValue, lanes: int) -> GroupValue:
        return self.folded_lanes(condition, lanes, boolean, lambda a, b, _: a.joined("||", b))

    # -- LLVM ------------------------------------------------------------------------------------------------

    def llvm(self, name: str, text: Any, result: str, *operands: Any) -> GroupValue:
        raise LackingWord("llvm", f"the function {name} is LLVM text")

    def effect(self, name: str, declared: str, call: str, *operands: Any, constant: str = "") -> None:
        raise LackingWord("effect", f"the intrinsic of {name}")


def _refuse_stores_after_tasks(body: list[Statement]) -> None:
    """Raise LackingWord if a kernel writes to a buffer after its loop over tasks: every block would do it, while others
    still run tasks.
    """
    after = False
    for statement in body:
        inside = list(walk([statement]))
        if any(isinstance(each, Loop) and each.tasks for each in inside):
            after = True
        elif after and any(isinstance(each, Store) and each.access.memory.place == GLOBAL for each in inside):
            raise LackingWord("parallel", "blocks do not wait for each other, and a store follows the loop over tasks")


_DTYPE = {"u16": "bf16"}  # 16-bit numbers are their bits


def _scalar(value: Any) -> GroupValue:
    return value if isinstance(value, GroupValue) else GroupValue([constant(value, INDEX)])
