"""Executables of kernels: weights in place, offsets chosen once for each set of sizes, each call one table of calls.

The first call with new sizes makes a plan (`treadle.backends.tvm.planning`). Later calls write the addresses of inputs
and outputs into its table and run it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, assert_never

import numpy as np

from treadle.backends.bfloat16 import bf16_given, bf16_taken
from treadle.backends.outside_axis import NoRoom, OutsideAxis
from treadle.backends.protocol import Outputs, Port, ports
from treadle.backends.signature import Signature, numpy_taken
from treadle.backends.tvm.arena import ALIGNMENT
from treadle.backends.tvm.kernels import tvm_runtime
from treadle.backends.tvm.kernels.cache import Entry, KernelCache, assembly
from treadle.backends.tvm.kernels.calling import INTEGER, POINTER, address, function_of
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.runner import Runner
from treadle.backends.tvm.lowering.leftovers import find_leftovers
from treadle.backends.tvm.lowering.listing import list_program, unique_titles
from treadle.backends.tvm.lowering.program import Buffer, KernelProgram, kernels_of
from treadle.backends.tvm.planning import Plan, Planner
from treadle.backends.tvm.spaces import Arena, Input, Output
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.types import DType

Array = np.ndarray[Any, Any]

PLANS = 32  # sets of sizes that are kept


class KernelExecutable:
    """A graph compiled to kernels. See `treadle.backends.protocol.Executable`.

    program   the steps
    threads   how many threads kernels use
    notes     what runs element by element, since no fast kernel covers it
    """

    def __init__(
        self,
        graph: Graph,
        program: KernelProgram,
        cache: KernelCache,
        weights: Mapping[str, Array],
        threads: int,
        entries: Mapping[Kernel, Entry],
        prepared: Sequence[str] = (),
    ) -> None:
        """Parameters of `main` by name, in their layouts, and kernels.

        entries   where the kernels' code is, and the runner's; none where this machine cannot run it
        prepared  what was computed from weights when they were bound, a line each
        """
        self._prepared = prepared
        self.name = graph.name
        self.signature = Signature(graph)
        self.inputs = self.signature.ports
        self.outputs = ports(graph.main.outputs)
        self.signature.refuse_untold(program.symbols)
        self.program, self.cache, self.threads = program, cache, threads
        self.notes = find_leftovers(program, graph.symbols)
        self.compiled = cache.compiled
        self._entries = entries
        self._weights = {program.weights[name]: array for name, array in weights.items()}
        self._constants: dict[Buffer, Array] = {}
        self._plans: OrderedDict[tuple[tuple[str, int], ...], Plan] = OrderedDict()
        self._arena = np.empty(0, np.uint8)
        self._lock = threading.Lock()
        self._runner = entries.get(Runner())
        self._result = np.zeros(1, np.int64)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The distinct kernels, in the order in which the program names them."""
        return kernels_of(self.program)

    @cached_property
    def source(self) -> str:
        """The program as a listing of its steps, then every distinct kernel as TVMScript."""
        return list_program(self.name, self.program, self.cache.isa, self._prepared)

    def assembly(self, title: str) -> str:
        """The assembly of a kernel, by its name in `source`. Raises BackendError where there is none of that name."""
        titles = {name: kernel for kernel, name in unique_titles(self.kernels).items()}
        if title not in titles:
            raise BackendError(f"there is no kernel {title!r}", hint="one of " + ", ".join(titles))
        return assembly(titles[title], self.cache.isa)

    # -- calling ---------------------------------------------------------------------------------------------

    def __call__(self, /, **given: Any) -> Outputs:
        """Run on arrays by name. Raises BackendError where they are not what `inputs` says."""
        if self._runner is None:
            self.cache.refuse_other_machine()
        taken = self.signature.bind(given, take)
        sizes = self.signature.sizes([array.shape for array in taken])
        arrays = dict(zip(self.program.inputs, taken, strict=True))
        with self._lock:
            plan = self._plan(sizes)
            made = {p.name: _allocated(plan.shapes[p.name], stored(p.dtype)) for p in self.outputs}
            self._run(plan, arrays, made)
        tensors = any(_is_tensor(value) for value in given.values())
        return Outputs({p.name: give(p, made[p.name], tensors) for p in self.outputs})

    def _plan(self, sizes: Mapping[str, int]) -> Plan:
        key = tuple(sorted(sizes.items()))
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        try:
            plan = Planner(self.program, sizes, self.threads, self._entries, self._held).plan()
        except OverflowError as error:  # of 64 bits
            told = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(f"{self.name}: no memory is as large as these sizes take", received=told) from error
        self._plans[key] = plan
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return plan

    def _run(self, plan: Plan, given: Mapping[str, Array], made: Mapping[str, Array]) -> None:
        if self._arena.nbytes < plan.arena + ALIGNMENT:
            self._arena = _allocated((plan.arena + ALIGNMENT,), np.dtype(np.uint8))
        values = plan.words[:, 1]
        for space, at, offsets in plan.moves:
            match space:
                case Arena():
                    begin = -(-address(self._arena) // ALIGNMENT) * ALIGNMENT
                case Input():
                    begin = address(given[space.name])
                case Output():
                    begin = address(made[space.name])
                case _:
                    assert_never(space)
            values[at] = offsets + begin
        tvm_runtime.set_threads(self.threads)
        assert self._runner is not None
        table = plan.table
        if tvm_runtime.pool_is_lost():
            table = table.copy()
            table[:, -1] = True
        failed = run_table(self._runner, table, self._result)
        if failed >= 0:
            plan.status[:] = 0  # of the kernels before
            step = plan.steps[failed]
            source = describe_source(step.node.source, step.node.scope) if step.node is not None else None
            raise BackendError(f"kernel {step.kernel.title}: failed while running", source=source)
        if plan.status.size and plan.status.any():
            raise _outside(plan)

    def _held(self, buffer: Buffer) -> Array:
        """The array of a weight or a constant."""
        if buffer.literal is None:
            return self._weights[buffer]
        if buffer not in self._constants:
            self._constants[buffer] = np.frombuffer(buffer.literal.data or b"\0", np.uint8).copy()
        return self._constants[buffer]

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, p)) for p in (self.inputs, self.outputs))
        return f"<executable {self.name}({takes}) -> {gives}>"


def _outside(plan: Plan) -> BackendError:
    """The error that the first kernel tells which met something outside; the words are cleared."""
    first = int(np.flatnonzero(plan.status[:, 0])[0])
    what, index, size, row = plan.status[first].tolist()
    plan.status[:] = 0
    teller = plan.tellers[first]
    error = OutsideAxis(index, size) if what == 1 else NoRoom(row, index, size)
    return error.located(teller.node, teller.kernel.title)


def run_table(runner: Entry, table: Array, result: Array) -> int:
    """Run a table's calls; -1, or the number of the call that failed."""
    words = np.array([[POINTER, address(table)], [POINTER, address(result)], [INTEGER, len(table)]], np.int64)
    ignored = np.zeros(2, np.int64)
    if function_of(runner)(address(words), len(words), address(ignored)):
        return 0
    return int(result[0])


# -- arrays --------------------------------------------------------------------------------------------------


def _allocated(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """New memory. Raises BackendError where there is not so much."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, OverflowError, ValueError) as error:
        gigabytes = math.prod(shape) * dtype.itemsize / 2**30
        raise BackendError("there is not enough memory", received=f"{gigabytes:.3g} GiB for {list(shape)}") from error


def stored(dtype: DType) -> np.dtype[Any]:
    """The NumPy dtype of an element's bytes; that of bf16 is uint16."""
    return dtype.numpy or np.dtype(np.uint16)


def take(port: Port, value: Any) -> Array:
    """What a caller passed, as a row-major array of the port's dtype: the same memory where it is one already."""
    array = numpy_taken(port, value) if port.dtype.numpy is not None else bf16_taken(port, value)
    return np.ascontiguousarray(array).reshape(array.shape)


def give(port: Port, array: Array, tensors: bool) -> Any:
    """A result for the caller: a tensor where one was passed."""
    if port.dtype.numpy is None:
        return bf16_given(array, tensors)
    if tensors:
        import torch

        return torch.from_numpy(array)
    return array


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "data_ptr")
