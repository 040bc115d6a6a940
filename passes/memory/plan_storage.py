"""Where every value lies, from when to when: one plan, which backends spell. `storage_plan.py` says what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import View
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.memory.argument_reuse import reused_arguments
from treadle.passes.memory.frames import frame_of, peak_of
from treadle.passes.memory.library_places import LibraryPlanning, Workspaces, allocates, nothing_beside
from treadle.passes.memory.ordering import choices, have_one_order, must_precede, needs_less
from treadle.passes.memory.storage_plan import FunctionPlan, How, Step, StoragePlan
from treadle.passes.memory.strided_places import Parts, StridedPlanning
from treadle.passes.memory.value_places import Over, PlacedFunction

Grouping = Callable[[Function], Sequence[Step]]
"""Which nodes of a function are computed together, in order; each node is in one step."""


def each_alone(function: Function) -> Sequence[Step]:
    """Every node is a step."""
    return [Step((node,)) for node in function.nodes]


def every_part(step: Step, view: View) -> bool:
    """Every step writes through any view."""
    return True


def over_nothing(step: Step) -> Sequence[Value]:
    """No step writes over what it reads."""
    return ()


@dataclass(frozen=True)
class PlanStorage(Pass):
    """y = op(x, ...)   -->   y lies in s, from step i to step j

    s is, the first that there is:
      that of a state, where y is the update of it: nobody reads what was before
      that of x, where op is a view of it and strides can say so
      the caller's, where y is an output
      z's, where the one reader z of y would only move y to where it lies by then: a part of a concat, what is padded
      that of an operand which dies at this step, where the backend writes over it; of a call, where its callee may
      of its own, in the order in which the one reader wants it: "b s (h d) -> b h s d" is then a view

    strided  kernels read and write by strides, as the plan says. Otherwise a library chooses strides, and allocates
             what it gives: all that is no view has a storage of its own, or that of an operand which dies
    grouped  which nodes the backend computes together, so that only the last of them needs a storage
    parts    whether a step writes its result where it is a part of another
    over     the operands over which a step may write its result, element by element
    placed   where a library allocates: of which nodes it writes the result where it is told to
    workspaces  what calls of these need beside their result: memory of the plan, while the step runs
    copies   where a library allocates: the result of a view that no strides can say is a copy, which is placed
    donated  inputs of the last entry, by name, that the caller gives away: a step may write over them as over a value
             that the run made, and kernels that write by strides the one output
    in_results  what dies before a result of an entry is written may lie there, where kernels write by strides
    ordered  steps run in the order that needs the least memory, where it is proven to need no more than program order
             at any sizes, and less at some

    Else the order is that of the nodes, groups at the place of their last one. A storage lives from the first step that
    writes it to the last that reads what lies in it, in views too. The graph stays as it is.
    """

    rewrites: ClassVar[bool] = False
    strided: bool = False
    grouped: Grouping = field(default=each_alone, repr=False)
    parts: Parts = field(default=every_part, repr=False)
    over: Over = field(default=over_nothing, repr=False)
    placed: Callable[[Node], bool] = field(default=allocates, repr=False)
    workspaces: Workspaces = field(default=nothing_beside, repr=False)
    copies: bool = False
    donated: tuple[str, ...] = ()
    in_results: bool = False
    ordered: bool = True

    @property
    def options(self) -> str:
        said = (("strided", self.strided), ("in program order", not self.ordered))
        words = [word for word, holds in said if holds]
        return ", ".join([*words, *(f"{name} donated" for name in self.donated)])

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        functions: dict[str, FunctionPlan] = {}
        peaks: dict[str, tuple[Size, ...]] = {}
        for function in graph.needed_by(*graph.later_entries):
            given_away = self.donated if function is graph.main else ()
            planned = PlacedFunction(function, functions, function in graph.entries, given_away)
            over = self._over(functions)
            plan = self._plan(planned, self.grouped(function), over)
            if self.ordered:
                plan = self._reordered(plan, planned, over, peaks, graph.symbols)
            if self.strided:
                reuses = reused_arguments(plan, functions)
                own = plan.donated if function in graph.entries else reuses
                plan = replace(plan, reuses=tuple([v for v in reuses if v in own and not plan.given_back]))
            functions[function.name] = plan
            if function not in graph.entries:  # which nobody calls
                peaks[function.name] = self._peak(plan, planned, peaks, graph.symbols)
            if plan.reordered is not None:
                log.notes.append(f"{function.name}: {plan.reordered}")
        log.plan = StoragePlan(functions, self.strided, self.in_results, self.copies)
        log.notes.insert(0, log.plan.note)
        log.touched = set()
        return 0

    def _plan(self, planned: PlacedFunction, steps: Sequence[Step], over: Over) -> FunctionPlan:
        """The plan of these steps in this order."""
        if self.strided:
            return StridedPlanning(planned, steps, self.parts, over).plan()
        return LibraryPlanning(planned, steps, over, self.placed, self.workspaces, self.copies).plan()

    def _over(self, callees: Mapping[str, FunctionPlan]) -> Over:
        """Over what a step may write; of a call, what its callee may write over."""

        def over(step: Step) -> Sequence[Value]:
            callee = step.root.op.called_in(callees)
            if callee is None:
                return self.over(step)
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
        """The plan in the first order that needs less; else the plan as it is."""
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
