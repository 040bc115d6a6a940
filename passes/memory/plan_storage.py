"""Plan the storage of every value and its lifetime. There is one plan, for which backends emit code. `storage_plan.py`
defines its contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from treadle.ir.graph import Graph, Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.passes.capabilities import PRIMITIVES, Capabilities, over_nothing
from treadle.passes.framework.facts import PORTABLE, UNPLANNED, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.memory.argument_reuse import reused_arguments
from treadle.passes.memory.frames import frame_of, peak_of
from treadle.passes.memory.library_places import LibraryPlanning
from treadle.passes.memory.ordering import choices, have_one_order, must_precede, needs_less
from treadle.passes.memory.storage_checking import check_storage
from treadle.passes.memory.storage_plan import FunctionPlan, How, Step, StoragePlan
from treadle.passes.memory.strided_places import StridedPlanning
from treadle.passes.memory.value_places import Over, PlacedFunction


@dataclass(frozen=True)
class PlanStorage(Pass):
    """y = op(x, ...)   -->   y is stored in s, from step i to step j

    s is the first possible of these storages:
      the state's, if y is its update: the old state is not read again
      x's, if op is a view of x that strides can express
      the caller's, if y is an output
      z's, if z is the only reader of y and would only move y to its destination: a part of a concat, a padded value
      the storage of an operand that is dead after this step, if the backend overwrites it, or for a call its callee
      a new one, in the order in which y's only reader needs it: "b s (h d) -> b h s d" is then a view

    backend  the backend: the nodes that it computes together, the operands that it overwrites, its workspaces
    strided  kernels read and write by strides, as planned. Otherwise a library chooses strides and allocates its
             results: a value that is not a view has its own storage, or the storage of an operand that is dead by then
    copies   with a library: the result of a view that strides cannot express is a copy, which is placed
    donated  inputs of the last entry, by name, that the caller donates: a step may overwrite them like a value of the
             run, and kernels that write by strides may write the one output there
    in_results  storages that are dead before an entry's result is written may be placed in the result, if kernels write
             by strides
    ordered  steps run in the order that needs the least memory, if it is proven to need no more than program order
             at any sizes, and less at some

    Otherwise steps are in the order of the nodes, with groups at the position of their last node. A storage is live
    from the first step that writes it to the last step that reads it, also through views. The graph is unchanged.
    """

    rewrites: ClassVar[bool] = False
    ends: ClassVar[Facts] = frozenset({UNPLANNED, PORTABLE})
    backend: Capabilities = PRIMITIVES
    strided: bool = False
    copies: bool = False
    donated: tuple[str, ...] = ()
    in_results: bool = False
    ordered: bool = True

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        functions: dict[str, FunctionPlan] = {}
        peaks: dict[str, tuple[Size, ...]] = {}
        for function in graph.needed_by(*graph.later_entries):
            given_away = self.donated if function is graph.main else ()
            planned = PlacedFunction(function, functions, function in graph.entries, given_away)
            over = self._over(functions)
            plan = self._plan(planned, self.backend.grouped(function), over)
            if self.ordered:
                plan = self._reordered(plan, planned, over, peaks, graph.symbols)
            if self.strided:
                reuses = reused_arguments(plan, functions)
                own = plan.donated if function in graph.entries else reuses
                plan = replace(plan, reuses=tuple([v for v in reuses if v in own and not plan.given_back]))
            functions[function.name] = plan
            if function not in graph.entries:  # entries are never called
                peaks[function.name] = self._peak(plan, planned, peaks, graph.symbols)
            if plan.reordered is not None:
                log.notes.append(f"{function.name}: {plan.reordered}")
        made = StoragePlan(functions, self.strided, self.in_results, self.copies)
        log.products[StoragePlan] = made
        log.notes.insert(0, made.note)
        log.touched = set()
        return 0

    def check_products(self, graph: Graph, log: PassRecord) -> Sequence[str]:
        """Check the plan against the graph (`treadle.passes.memory.storage_checking`). Return notes."""
        return check_storage(graph, log.products[StoragePlan])

    def _plan(self, planned: PlacedFunction, steps: Sequence[Step], over: Over) -> FunctionPlan:
        """Return the plan of a function with these steps in this order."""
        if self.strided:
            return StridedPlanning(planned, steps, self.backend.parts, over).plan()
        mine = self.backend
        return LibraryPlanning(planned, steps, over, mine.placed, mine.workspaces, self.copies).plan()

    def _over(self, callees: Mapping[str, FunctionPlan]) -> Over:
        """Return the operands that each step may overwrite; for a call, the operands that its callee may overwrite."""

        def over(step: Step) -> Sequence[Value]:
            callee = step.root.op.called_in(callees)
            if callee is None:
                return self.backend.over(step)
            given = step.root.operands
            operands = zip(callee.function.arguments, given, strict=True)
            return [v for formal, v in operands if v is not None and formal in callee.reuses and given.count(v) == 1]

        return over

    def _reordered(
        self,
        plan: FunctionPlan,
        planned: PlacedFunction,
        over: Over,
        peaks: Mapping[str, tuple[Size, ...]],
        symbols: Mapping[str, Bounds],
    ) -> FunctionPlan:
        """Return the plan in the first order that needs less memory. Return the plan unchanged if there is none."""
        before = must_precede(plan.function, plan.steps)
        if have_one_order(before):
            return plan
        over_some = any(place.how is How.OVER for place in plan.places.values())
        apart = self._plan(planned, plan.steps, over_nothing) if over_some else plan
        frame = frame_of(apart, planned.callees, self.strided)
        peak: tuple[Size, ...] | None = None
        for choice in choices(apart, frame, before, over, peaks, symbols):
            if peak is None:
                peak = self._peak(plan, planned, peaks, symbols)
            other = self._plan(planned, choice.steps, over)
            saved = needs_less(peak, self._peak(other, planned, peaks, symbols), choice, symbols)
            if saved is not None:
                return replace(other, reordered=saved)
        return plan

    def _peak(
        self,
        plan: FunctionPlan,
        planned: PlacedFunction,
        peaks: Mapping[str, tuple[Size, ...]],
        symbols: Mapping[str, Bounds],
    ) -> tuple[Size, ...]:
        return peak_of(frame_of(plan, planned.callees, self.strided), peaks, symbols)
