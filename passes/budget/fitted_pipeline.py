"""The stage `budget`: search for a graph and a plan with which a run fits into a memory limit, and the pipeline that
applies them.

    start, fit = fit_within(backend, graph, target, MemoryLimit(1_000_000, {"S": 512}))
    passes = with_fit(backend.pipeline(target), fit)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Graph
from treadle.ir.ops.merged_products import Projections
from treadle.ir.target import Target
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.fixing import fix_single_sizes
from treadle.passes.budget.candidates import Variant
from treadle.passes.budget.computing_again import compute_again
from treadle.passes.budget.fit_memory import FitMemory
from treadle.passes.budget.fitting import SECONDS, Fitting, reached
from treadle.passes.budget.memory_fit import MemoryFit
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import Optimized, Pass
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.memory.frames import Frame
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import StoragePlan
from treadle.passes.stages import Custom, Lower, run

_APART = Decompose((Projections.name,))
"""The pass that replaces merged products of one value by separate products."""


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on the memory of a run, without weights, states, inputs and outputs. It holds up to the given sizes."""

    bytes: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{self.bytes:,} bytes" + (f" at {where}" if where else "")


class PlansMemory(Protocol):
    """A backend that plans memory, as the search for a plan uses it; see `treadle.backends.staged.StagedBackend`."""

    name: ClassVar[str]

    def pipeline(self, target: Target) -> Sequence[Pass]: ...

    def frames(self, graph: Graph, target: Target, plan: StoragePlan) -> Mapping[str, Frame]: ...


def check_limit(backend: PlansMemory, lowered: Optimized, target: Target, budget: MemoryLimit) -> None:
    """Raise BackendError if the lowered graph needs more memory than the budget, although the search predicted that it
    fits.
    """
    plan = lowered.plan
    assert plan is not None  # fit_within refuses a backend that plans no storage
    frames = backend.frames(lowered.graph, target, plan)
    peak = reached(lowered.graph, plan, frames, budget.sizes).bytes
    if peak > budget.bytes:
        raise BackendError(
            "a run needs more memory than the search for a plan predicted",
            received=f"{peak:,} bytes, and the budget is {budget}",
            hint=Hint("certify=False: passes then do not change the graph that was fitted", "leave out --certify"),
        )


def fit_within(
    backend: PlansMemory, graph: Graph, target: Target, budget: MemoryLimit, donated: tuple[str, ...] = ()
) -> tuple[Graph, MemoryFit]:
    """Return the graph to lower, and the plan with which a run then fits into the budget.

    graph    the symbols are bounded by the budget's sizes
    donated  inputs of the last entry that callers donate

    Raises BackendError if no plan fits, with the smallest memory that was reached and a lower bound.
    """
    search, sources = search_of(backend, graph, target, budget.sizes, donated)
    try:
        fit = search.fit(budget.bytes)
        if fit is None:
            raise _does_not_fit(search, graph, budget)
    except OverflowError as error:  # the offsets exceed 64 bits
        where = ", ".join(f"{name}={size}" for name, size in budget.sizes.items())
        raise BackendError(
            "these sizes need more memory than is addressable", received=where, within=graph.name, hint="smaller sizes"
        ) from error
    chosen = next(each for each in search.variants if (each.apart, each.again) == (fit.apart, fit.again))
    return sources[chosen], fit


def with_fit(passes: Sequence[Pass], fit: MemoryFit) -> tuple[Pass, ...]:
    """Return a backend's passes with the pass that applies a plan, before storage is planned. Parts of ops are
    legalized again.
    """
    before, plan = before_planning(passes)
    return (*before, FitMemory(fit), *legalizing(before), *([] if plan is None else [plan]))


def with_donated(passes: Sequence[Pass], names: Sequence[str]) -> tuple[Pass, ...]:
    """Return a backend's passes for inputs that callers donate."""
    return tuple([replace(each, donated=tuple(names)) if isinstance(each, PlanStorage) else each for each in passes])


def before_planning(passes: Sequence[Pass]) -> tuple[list[Pass], PlanStorage | None]:
    """Return a backend's passes without the one that plans storage, and that pass, None if there is none."""
    plan = next((each for each in passes if isinstance(each, PlanStorage)), None)
    return [each for each in passes if each is not plan], plan


def legalizing(passes: Sequence[Pass]) -> list[Pass]:
    """Return the passes that legalize, which also apply to the parts of ops."""
    return [each for each in passes if isinstance(each, Legalize)]


def search_of(
    backend: PlansMemory, graph: Graph, target: Target, sizes: Mapping[str, int], donated: tuple[str, ...] = ()
) -> tuple[Fitting, dict[Variant, Graph]]:
    """Return the search for a plan that fits a graph into a budget at some sizes, and the start graph of each variant.

    Raises BackendError if the backend does not plan memory, or if the graph has states or several entries.
    """
    before, plan = before_planning(with_donated(backend.pipeline(target), donated))
    if plan is None:
        raise BackendError(f"backend {backend.name} does not plan memory", hint="PlanStorage as the last pass")
    if graph.states or len(graph.later_entries) > 1:
        raise BackendError("a budget needs a graph with one entry and no states", received=graph.name)

    def lowered(of: Graph) -> Graph:
        made = run(of, [Lower(tuple(before))], certify=False, target=target).graph
        fix_single_sizes(made)
        return made

    sources = {Variant(lowered(graph)): graph}
    apart = run(graph, [Custom((_APART,))], certify=False)
    if apart.log[-1].changes:
        sources[Variant(lowered(apart.graph), apart=True)] = apart.graph
    last = list(sources)[-1]
    again = clone_graph(last.graph)
    compute_again(again, sizes)
    sources[Variant(again, apart=last.apart, again=True)] = sources[last]
    frames = partial(_frames, backend, target)
    return Fitting(list(sources), plan, legalizing(before), frames, target, sizes), sources


def _frames(backend: PlansMemory, target: Target, graph: Graph, plan: StoragePlan) -> Mapping[str, Frame]:
    return backend.frames(graph, target, plan)


def _does_not_fit(search: Fitting, graph: Graph, budget: MemoryLimit) -> BackendError:
    whole, (least, left) = search.whole, search.least(SECONDS)
    cut = f"; {left} other ways to split it were not tried, since {SECONDS:.0f} s had passed" if left else ""
    if search.left_out:
        cut += f"; {search.left_out} ways were left out, since at most {len(search.candidates)} are tried"
    bound = min(search.bound, least)
    # At smaller sizes, an output may be too small for the temporaries that it holds at these sizes.
    alone = f", {whole.here:,} at these sizes alone" if whole.here < whole.bytes else ""
    smaller = ", or smaller sizes" if graph.symbols else ""
    return BackendError(
        "a run does not fit into its memory limit",
        received=f"{budget}, without weights, inputs and outputs",
        within=f"{graph.name}: {whole.bytes:,} bytes without a budget{alone}; the least that was reached is {least:,}"
        + (f"; no plan of this kind needs less than {bound:,}" if bound else "")
        + cut,
        hint=Hint(f"memory={least}{smaller}", f"--memory {least}{smaller and ', or smaller --sizes'}"),
    )
