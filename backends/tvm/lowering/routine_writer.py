"""Lowering to kernels: a graph as a kernel program, node by node, by a table of rules.

    program = lower(graph, isa)

What a rule sees is a `RoutineWriter`: operands come as views, results get a place to be written to, steps are added.
Rules live in `rules` and the modules beside it; a rule is a function of the writer and the
node. What is done here, once: which memory a value has, views in place of copies, where a result is
written so that the rearrange after it is a view, layouts of parameters, calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.pointwise import Chain, Pointwise
from treadle.backends.tvm.lowering.grouping import Group, group
from treadle.backends.tvm.lowering.program import (
    Buffer,
    BufferKind,
    KernelProgram,
    KernelStep,
    ProgramEntry,
    Routine,
    RoutineStep,
    View,
)
from treadle.backends.tvm.lowering.rearranged_views import Rearranged
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.layouts import Layout
from treadle.ir.operation import Op
from treadle.ir.ops.shapes import Rearrange
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.types import DType, Type

Rule = Callable[["RoutineWriter", Node], None]
"""Emits a node: reads its operands' views, adds steps, says where its results are."""

Keeps = Callable[[Op, Sequence[Type | None]], bool]
"""Whether a rule covers a composite on operands of these types; else its body is lowered."""


def lower(graph: Graph, isa: Isa, rules: Mapping[str, Rule]) -> KernelProgram:
    """A legalized graph as kernels. Raises BackendError for an op that no rule is there for."""
    routines: dict[str, RoutineWriter] = {}
    for function in graph.needed_by(*graph.later_entries):
        writer = RoutineWriter(function, isa, rules, routines)
        writer.write()
        routines[function.name] = writer
    entries = {}
    for entry in graph.later_entries:
        own = routines[entry.name]
        outputs = {
            name: View.contiguous(buffer, value.type.shape)
            for (name, value), buffer in zip(entry.outputs.items(), own.routine.results, strict=True)
        }
        entries[entry.name] = ProgramEntry(
            tuple(routines[function.name].routine for function in graph.needed_by(entry)),
            {value.name: own.views[value].buffer for value in entry.inputs},
            {name: own.views[value].buffer for name, value in entry.parameters.items()},
            {name: own.views[value].buffer for name, value in entry.states.items()},
            outputs,
        )
    return KernelProgram(tuple(w.routine for w in routines.values()), entries)


# -- a function ----------------------------------------------------------------------------------------------


class RoutineWriter:
    """Writes one function as a routine.

    views   where each value is
    """

    def __init__(
        self,
        function: Function,
        isa: Isa,
        rules: Mapping[str, Rule],
        routines: Mapping[str, RoutineWriter],
    ) -> None:
        self.function, self.isa, self.rules, self.routines = function, isa, rules, routines
        self.routine = Routine(function.name)
        self.views: dict[Value, View] = {}
        self.uses = function.uses()
        self.groups: dict[Node, Group] = group(function)
        self._results: dict[Value, Buffer] = {}
        self._direct: set[Value] = set()  # results of the routine that the operand of their rearrange is written to
        self._names: dict[str, int] = {}
        for value in function.arguments:
            self.views[value] = View.contiguous(self._argument(value), value.type.shape)

    def _argument(self, value: Value) -> Buffer:
        shape, layout = value.type.shape, value.layout
        elements = product(shape) if layout is None else layout.elements(shape)
        buffer = Buffer(self._new_name(value.name), value.type.dtype, elements, BufferKind.ARGUMENT, layout)
        self.routine.arguments.append(buffer)
        return buffer

    def _new_name(self, hint: str) -> str:
        count = self._names.get(hint, 0)
        self._names[hint] = count + 1
        return f"{hint}_{count}" if count else hint

    # -- what rules use --------------------------------------------------------------------------------------

    def view(self, value: Value) -> View:
        """Where a value is. One in panels only is given as such: see `View.panels`."""
        if value not in self.views:
            assert value.literal is not None, value
            buffer = Buffer(
                self._new_name("constant"),
                value.type.dtype,
                value.type.elements,
                BufferKind.CONSTANT,
                literal=value.literal,
            )
            self.views[value] = View.contiguous(buffer, value.type.shape)
        return self.views[value]

    def panels(self, value: Value, layout: Layout) -> View | None:
        """A value in panels, if it lies in this layout."""
        return self.view(value) if value.layout == layout else None

    def contiguous(self, view: View) -> View:
        """The same elements in row-major order without gaps: the view itself, or a copy."""
        return view if view.is_contiguous else self.copied(view)

    def copied(self, view: View) -> View:
        """A copy in row-major order."""
        made = self.scratch(view.dtype, view.shape, f"{view.buffer.name}_copy")
        self.copy(view, made, None)
        return made

    def copy(self, source: View, to: View, node: Node | None) -> None:
        """Add a step that copies elements between two views of one shape."""
        self.pointwise(Chain((source.dtype.name,), ()), [source], to, node)

    def pointwise(self, chain: Chain, operands: Sequence[View], to: View, node: Node | None) -> None:
        """Add a step that computes a chain; operands broadcast to the result's shape."""
        views = _collapsed([*(v.broadcast(to.shape) for v in operands), to])
        shape = views[-1].shape
        inner = "".join(_how(view) for view in views)
        kernel = Pointwise(chain, len(shape), inner)
        strides = [stride for view in views for stride in view.strides]
        self.step(kernel, views, [*shape, *strides], node)

    def scratch(self, dtype: DType, shape: Sequence[Size], hint: str = "scratch") -> View:
        """New memory of the routine's own."""
        buffer = Buffer(self._new_name(hint), dtype, product(shape), BufferKind.LOCAL)
        return View.contiguous(buffer, shape)

    def destination(self, value: Value) -> View:
        """Where to write a result: the routine's own result, or so that the rearrange that reads it is a view."""
        if value in self._results:
            self.views[value] = View.contiguous(self._results[value], value.type.shape)
            return self.views[value]
        readers = self.uses.get(value, [])
        view = None
        if len(readers) == 1 and isinstance(readers[0][0].op, Rearrange):
            view = self._before_rearrange(value, readers[0][0])
        if view is None:
            buffer = Buffer(self._new_name(value.name), value.type.dtype, value.type.elements, BufferKind.LOCAL)
            view = View.contiguous(buffer, value.type.shape)
        self.views[value] = view
        return view

    def set(self, value: Value, view: View) -> None:
        """Say that a result is what a view shows; nothing is computed."""
        if value in self._results:
            to = View.contiguous(self._results[value], value.type.shape)
            self.copy(view, to, value.node)
            view = to
        self.views[value] = view

    def updated(self, node: Node, index: int) -> View:
        """Where to write an update: the state itself; of a value that is no state, a copy in row-major order."""
        value, before = node.results[index], node.operands[node.op.updates[index]]
        assert before is not None
        if value.state is not None:
            self.views[value] = self.view(before)
            return self.views[value]
        to = self.destination(value)
        if not to.is_contiguous:  # so that a rearrange after it is a view
            buffer = Buffer(self._new_name(value.name), value.type.dtype, value.type.elements, BufferKind.LOCAL)
            to = self.views[value] = View.contiguous(buffer, value.type.shape)
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
        """Add a step. The last `writes` pointers are written."""
        exact = tuple([Size.of(s) for s in sizes])
        self.routine.steps.append(KernelStep(kernel, tuple(pointers), exact, node, writes, note))

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self) -> None:
        """All steps."""
        for name, value in self.function.outputs.items():
            buffer = Buffer(self._new_name(f"out_{name}"), value.type.dtype, value.type.elements, BufferKind.RESULT)
            self.routine.results.append(buffer)
            if value.node is not None:
                self._results.setdefault(value, buffer)
        for node in self.function.nodes:
            part = self.groups.get(node)
            if part is not None and part.root is not node:
                continue  # computed where its group is
            if node.op.callee is not None:
                self._call(node)
                continue
            name = node.op.name if part is None else "pointwise" if part.product is None else part.product.op.name
            rule = self.rules.get(name)
            if rule is None:
                raise BackendError(f"the tvm backend has no kernel for op {node.op.name!r}")
            rule(self, node)
        for value, buffer in zip(self.function.outputs.values(), self.routine.results, strict=True):
            if self._results.get(value) is not buffer:  # an argument, a constant, or an output under two names
                self.copy(self.view(value), View.contiguous(buffer, value.type.shape), value.node)

    def _call(self, node: Node) -> None:
        callee = self.routines[str(node.op.callee)]
        views = [self.view(v) for v in node.inputs]
        arguments = [view if view.panels is not None else self.contiguous(view) for view in views]
        results = [self.destination(result) for result in node.named_results]
        for result in node.results[len(results) :]:  # states, which lie where they lay
            assert result.before is not None
            self.views[result] = self.view(result.before)
        spilled = [(r, self.scratch(r.dtype, r.shape)) if not r.is_contiguous else (r, r) for r in results]
        self.routine.steps.append(RoutineStep(callee.routine, tuple(arguments), tuple(to for _, to in spilled), node))
        for wanted, made in spilled:
            if wanted is not made:
                self.copy(made, wanted, node)

    def packed(self, view: View, layout: Layout) -> View:
        """A matrix that is computed, or a constant, in panels: packed by a step."""
        from treadle.backends.tvm.kernels.matmul import Pack

        n, k = (1, 0) if layout.transposed else (0, 1)
        elements = layout.elements(view.shape)
        buffer = Buffer(self._new_name(f"{view.buffer.name}_panels"), view.dtype, elements, BufferKind.LOCAL, layout)
        made = View.contiguous(buffer, view.shape)
        sizes: list[Size | int] = [view.shape[n], view.shape[k], view.strides[n], view.strides[k], 1, 1, 0, 0]
        self.step(Pack(layout.width), [view, made], sizes, None)
        return made

    def _before_rearrange(self, value: Value, node: Node) -> View | None:
        """A view to write a value to, such that the rearrange of it is contiguous; None where strides cannot say it."""
        moved = Rearranged.of(node, value.type)
        buffer = self._results.get(node.result)
        if buffer is None:
            buffer = Buffer(self._new_name(node.result.name), value.type.dtype, value.type.elements, BufferKind.LOCAL)
        whole = View.contiguous(buffer, [moved.sizes[f] for f in moved.after])
        view: View | None = whole.permuted([moved.after.index(f) for f in moved.before])
        for axis, factors in enumerate(moved.operand):
            view = view.merged(axis, len(factors)) if view is not None else None
        if view is not None and node.result in self._results:
            self._direct.add(node.result)
        return view

    def rearranged(self, node: Node) -> None:
        """The rule of rearrange: a view if strides can say it, else a copy."""
        (value,) = node.inputs
        result = node.result
        source = self.view(value)
        moved = Rearranged.of(node, value.type)
        view = moved.view(source)
        if view is None:
            self.copy(moved.factored(source), moved.split(self.destination(result), moved.result), node)
            return
        if result in self._direct and view.buffer is self._results.get(result):
            self.views[result] = view
            return
        self.set(result, view)


def _collapsed(views: Sequence[View]) -> list[View]:
    """Views of one shape with as few dimensions as possible: those of size 1 dropped, neighbours merged."""
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
    """How a view moves along its last dimension; see `Pointwise.inner`."""
    if not view.strides:
        return "0"
    return {0: "0", 1: "1"}.get(view.strides[-1].constant if view.strides[-1].constant is not None else -1, "s")


def steps_of(program: KernelProgram) -> Iterator[KernelStep]:
    """Every step of every routine, once."""
    for routine in program.routines:
        yield from routine.walk()
