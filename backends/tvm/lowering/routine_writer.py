"""Lowering to kernels: a graph becomes a kernel program, node by node, by a table of rules.

    program = lower(graph, plan, isa, RULES)

A rule is a function of a `RoutineWriter` and a node. The writer provides operands as views, the place of each result,
and methods that add steps. Rules are in `rules` and its sibling modules. The storage plan determines where each value
is stored. A rule requests workspace with `scratch`; the workspace is alive while the step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from treadle.backends.tvm.kernels.arithmetic.vector_math import is_pointwise
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.pointwise import Chain, Pointwise
from treadle.backends.tvm.lowering.program import (
    KernelProgram,
    KernelStep,
    ProgramEntry,
    Routine,
    RoutineStep,
)
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.layouts import Layout
from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.types import DType, Type
from treadle.passes.memory.storage_plan import FunctionPlan, How, Life, Step, StoragePlan, ValuePlace

Rule = Callable[["RoutineWriter", Node], None]
"""A function that lowers a node: it reads the views of operands, and adds steps that write the results."""

Keeps = Callable[[Op, Sequence[Type | None]], bool]
"""A function that returns True if a rule supports a composite on operands of these types. Otherwise the composite's
body is lowered.
"""


SLOTS = 32
"""Maximum number of shares of a kernel's tasks, if each share has its own workspace."""


def lower(
    graph: Graph, plan: StoragePlan, isa: Isa, rules: Mapping[str, Rule], threads: int | None = None
) -> KernelProgram:
    """Lower a legalized graph to kernels, for this number of threads (None: any number).

    Raises BackendError for an op without a rule.
    """
    routines: dict[str, RoutineWriter] = {}
    for name, planned in plan.functions.items():
        writer = RoutineWriter(planned, isa, rules, routines, threads)
        writer.write()
        routines[name] = writer
    entries = {}
    for entry in graph.later_entries:
        own = routines[entry.name]
        outputs = {
            name: View.contiguous(storage, value.type.storage_type.shape)
            for (name, value), storage in zip(entry.outputs.items(), own.routine.results, strict=True)
        }
        over = _given_back(plan.functions[entry.name])
        entries[entry.name] = ProgramEntry(
            tuple(routines[function.name].routine for function in graph.needed_by(entry)),
            {value.name: own.view(value).storage for value in entry.inputs},
            {name: own.view(value).storage for name, value in entry.parameters.items()},
            {name: own.view(value).storage for name, value in entry.states.items()},
            outputs,
            over,
        )
        if plan.in_results:
            own.routine.handed_out = [view.storage for name, view in outputs.items() if name not in over]
    return KernelProgram(tuple(w.routine for w in routines.values()), entries)


def _given_back(plan: FunctionPlan) -> dict[str, str]:
    """Return the outputs that are stored in the memory of a donated input: the names of both."""
    found = {name: value.name for name, value in plan.given_back.items()}
    return found | {name: value.name for value in plan.reuses[:1] for name in plan.results}


# -- a function ----------------------------------------------------------------------------------------------


class RoutineWriter:
    """A writer of one function as a routine.

    groups   the step of each group of nodes, by the last node of the group
    uses     consumers of each value
    rounded  storages that exist only in the form that bf16 products read, with their elements; None until written
    sides    views that replace such a storage if there are several: see `product_sides`
    encoded  for values that integer products read, by the form of the right operand: rows as kernels read them, and
             scales
    threads  number of threads of a kernel; None: any number
    """

    def __init__(
        self,
        plan: FunctionPlan,
        isa: Isa,
        rules: Mapping[str, Rule],
        routines: Mapping[str, RoutineWriter],
        threads: int | None = None,
    ) -> None:
        self.plan, self.isa, self.rules, self.routines, self.threads = plan, isa, rules, routines, threads
        self.routine = Routine(plan.function.name, [], list(plan.results.values()))
        self.groups = {step.root: step for step in plan.steps}
        self.uses = plan.function.uses()
        self.rounded: dict[Storage, View | None] = {}
        self.sides: dict[Hashable, View] = {}
        self.encoded: dict[tuple[Value, tuple[int, int]], tuple[View, View]] = {}
        self._made: dict[Storage, dict[Hashable, View]] = {}
        self._names = {life.storage.name for life in plan.lives}
        self._begins: list[int] = []
        for value in plan.function.arguments:
            self.routine.arguments.append(self.view(value).storage)

    def _new_name(self, hint: str) -> str:
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    @property
    def slots(self) -> int:
        """Number of shares of a kernel's tasks, each with its own workspace: `threads`, or `SLOTS` if it is None."""
        return SLOTS if self.threads is None else min(self.threads, SLOTS)

    # -- what rules use --------------------------------------------------------------------------------------

    def place(self, value: Value) -> ValuePlace:
        """Return the place of a value in the storage plan."""
        return self.plan.places[value]

    def view(self, value: Value) -> View:
        """Return the view of a value, for reading or writing. For a value that is stored only in panels, use
        `panels`.
        """
        view = self.place(value).view
        assert view is not None, value
        return view

    def is_part(self, value: Value, node: Node) -> bool:
        """Return True if an operand is already stored in its part of the node's result."""
        place = self.place(value)
        return place.how is How.INTO and place.of is node.result

    def over(self, node: Node) -> Value | None:
        """Return the operand that a node's result overwrites, or None."""
        place = self.place(node.result)
        return place.of if place.how is How.OVER and isinstance(place.of, Value) else None

    def panels(self, value: Value, layout: Layout) -> View | None:
        """Return a value in panels if it is stored in this layout, else None."""
        return self.view(value) if value.layout == layout else None

    def contiguous(self, view: View) -> View:
        """Return the same elements in row-major order without gaps: the view itself, or a copy."""
        return view if view.is_contiguous else self.copied(view)

    def copied(self, view: View) -> View:
        """Add a step that copies the elements of a view, and return the copy, in row-major order."""
        made = self.scratch(view.dtype, view.shape, f"{view.storage.name}_copy")
        self.copy(view, made, None)
        return made

    def copy(self, source: View, to: View, node: Node | None) -> None:
        """Add a step that copies elements between two views of one shape."""
        self.pointwise(Chain((source.dtype.name,), ()), [source], to, node)

    def pointwise(
        self, chain: Chain, operands: Sequence[View], to: View, node: Node | None, over: int | None = None
    ) -> None:
        """Add a step that computes a chain. Operands broadcast to the result's shape.

        over  number of the operand whose memory the result overwrites
        """
        views = _collapsed([*(v.broadcast(to.shape) for v in operands), to])
        shape = views[-1].shape
        inner = "".join(_how(view) for view in views)
        kernel = Pointwise(chain, len(shape), inner, over)
        passed = [view for i, view in enumerate(views) if i != over]
        strides = [stride for view in passed for stride in view.strides]
        self.step(kernel, passed, [*shape, *strides], node)

    def scratch(self, dtype: DType, shape: Sequence[Size], hint: str = "scratch") -> View:
        """Allocate workspace that is local to the routine."""
        storage = Storage(self._new_name(hint), dtype, product(shape), StorageKind.LOCAL)
        return View.contiguous(storage, shape)

    def made_once(self, of: View, what: Hashable, make: Callable[[], View]) -> View:
        """Return the result of `make`, which adds steps and is called at the first request. `of` and `what` must
        determine the result.

        If a later step writes into the storage of `of`, the next request calls `make` again.
        """
        known, key = self._made.setdefault(of.storage, {}), (of, what)
        if key not in known:
            known[key] = make()
        return known[key]

    def updated(self, node: Node, index: int) -> View:
        """Return the view to update: the state itself, or a copy of a value that is not a state."""
        value, before = node.results[index], node.operands[node.op.updates[index]]
        assert before is not None
        to = self.view(value)
        if self.place(value).how is not How.UPDATE:
            self.copy(self.view(before), to, node)
        return to

    def step(
        self,
        kernel: Kernel,
        pointers: Sequence[View],
        sizes: Sequence[Size | int],
        node: Node | None,
        *,
        writes: int = 1,
        note: str = "",
    ) -> None:
        """Add a step. The kernel writes to the last `writes` pointers."""
        exact = tuple([Size.of(s) for s in sizes])
        self.routine.steps.append(KernelStep(kernel, tuple(pointers), exact, node, writes, note))
        self._forget(pointers[len(pointers) - writes :])

    def _forget(self, written: Iterable[View]) -> None:
        """Discard the results of `made_once` that were computed from these storages, which are overwritten."""
        for view in written:
            self._made.pop(view.storage, None)

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Add the steps of all nodes."""
        for step in self.plan.steps:
            self._begins.append(len(self.routine.steps))
            if any(self.place(value).is_written for value in step.root.results):
                self._write(step)
        self._begins.append(len(self.routine.steps))
        for name in self.plan.copied:
            value = self.plan.function.outputs[name]
            to = View.contiguous(self.plan.results[name], value.type.storage_type.shape)
            self.copy(self.view(value), to, value.node)
        self._begins.append(len(self.routine.steps))
        self.routine.lives = self._lives()

    def _write(self, step: Step) -> None:
        node = step.root
        if node.op.callee is not None:
            self._call(node)
            return
        name = step.product.op.name if step.product is not None else node.op.name
        rule = self.rules.get("pointwise" if step.product is None and is_pointwise(name) else name)
        if rule is None:
            raise BackendError(f"the tvm backend has no kernel for op {node.op.name!r}")
        rule(self, node)

    def _lives(self) -> list[Life]:
        """Return the lifetimes of local storages, in steps of the routine: storages of the plan, then workspaces of
        steps.

        If a step of the plan becomes several kernels, a storage may be alive only from a later or up to an earlier one
        of them.
        """
        touched: dict[Storage, list[int]] = {}
        for at, step in enumerate(self.routine.steps):
            for storage in dict.fromkeys(view.storage for view in step.views):
                touched.setdefault(storage, []).append(at)
        local = [life for life in self.plan.lives if life.storage.kind is StorageKind.LOCAL]
        planned = [life for life in local if life.storage not in self.rounded]  # no kernel accesses `rounded` storages
        found = {life.storage: self._narrowed(life, touched.get(life.storage, [])) for life in planned}
        for storage, steps in touched.items():
            if storage.kind is StorageKind.LOCAL and storage not in found:
                found[storage] = steps[0], steps[-1]
        return [Life(storage, first, last) for storage, (first, last) in found.items()]

    def _narrowed(self, life: Life, touched: Sequence[int]) -> tuple[int, int]:
        """Return a lifetime of the plan in steps of the routine. Of the plan's first and last step, only kernels that
        use the storage count.
        """
        begin, end = self._begins[life.first], self._begins[life.last + 1]
        if touched and not begin <= touched[0] <= touched[-1] < end:
            raise BackendError(
                "a kernel needs a storage that the plan has already freed",
                received=f"{life.storage}, steps {life.first} to {life.last}",
                within=self.plan.function.name,
            )
        first = next((at for at in touched if at < self._begins[life.first + 1]), begin)
        last = next((at for at in reversed(touched) if at >= self._begins[life.last]), end - 1)
        return first, max(first, last)

    def _call(self, node: Node) -> None:
        callee = self.routines[str(node.op.callee)]
        views = [self.view(v) for v in node.inputs]
        arguments = [view if view.panels is not None else self.contiguous(view) for view in views]
        results = [self.view(result) for result in node.named_results]
        self.routine.steps.append(RoutineStep(callee.routine, tuple(arguments), tuple(results), node))
        self._forget(results)

    def pack(self, view: View, to: View, layout: Layout | None = None) -> None:
        """Add a step that packs a matrix: into `layout`, or by default into the layout of the storage of `to`."""
        from treadle.backends.tvm.kernels.matmul import Pack
        from treadle.backends.tvm.kernels.narrow.packing import PackBlocks, PackPairs, PackQuads

        layout = layout or to.panels
        assert layout is not None
        n, k = (1, 0) if layout.transposed else (0, 1)
        sizes: list[Size | int] = [view.shape[n], view.shape[k], view.strides[n], view.strides[k]]
        if layout.kind in ("pairs", "quads"):
            kernel = (PackPairs if layout.kind == "pairs" else PackQuads)(layout.width, layout.flat)
            self.step(kernel, [view, to], sizes, None)
        elif layout.kind == "blocks":
            how = layout.width, layout.block, layout.head, layout.tail, layout.runs
            self.step(PackBlocks(*how), [view, to], sizes, None)
        else:
            self.step(Pack(layout.width), [view, to], [*sizes, 1, 1, 0, 0], None)


def _collapsed(views: Sequence[View]) -> list[View]:
    """Return views of one shape with as few dimensions as possible: dimensions of size 1 are dropped, and neighbors
    merged.
    """
    rank = views[0].rank
    kept = [axis for axis in range(rank) if views[0].shape[axis] != ONE]
    found = [
        replace(v, shape=tuple(v.shape[a] for a in kept), strides=tuple(v.strides[a] for a in kept)) for v in views
    ]
    axis = len(kept) - 2
    while axis >= 0:
        merged = [v.merged(axis, 2) for v in found]
        if all(v is not None for v in merged):
            found = [v for v in merged if v is not None]
        axis -= 1
    return found


def _how(view: View) -> str:
    """Return the stride class of a view's last dimension: `1` contiguous, `0` broadcast, `s` any other stride.

    See `Pointwise.inner`.
    """
    if not view.strides:
        return "0"
    return {0: "0", 1: "1"}.get(view.strides[-1].constant if view.strides[-1].constant is not None else -1, "s")


def steps_of(program: KernelProgram) -> Iterator[KernelStep]:
    """Yield every step of every routine, once."""
    for routine in program.routines:
        yield from routine.walk()
