"""The pipeline of a backend for a run that must fit into a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import Optimized, Pass, PassManager
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.memory.plan_storage import PlanStorage

if TYPE_CHECKING:
    from treadle.backends.staged import StagedBackend  # only for types: it imports this module

_APART = Decompose((Projections.name,))
"""The pass that replaces merged products of one value by separate products."""


@dataclass(frozen=True)
class Budget:
    """A limit on the memory of a run, without weights, states, inputs and outputs. It holds up to the given sizes."""

    bytes: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{self.bytes:,} bytes" + (f" at {where}" if where else "")


def check_budget(backend: StagedBackend, lowered: Optimized, target: Target, budget: Budget) -> None:
    """Raise BackendError if the lowered graph needs more memory than the budget, although the search predicted that it
    fits.
    """
    plan = lowered.plan
    assert plan is not None  # pipeline_within refuses a backend that plans no storage
    frames = backend.frames(lowered.graph, target, plan)
    peak = reached(lowered.graph, plan, frames, budget.sizes).bytes
    if peak > budget.bytes:
        raise BackendError(
            "a run needs more memory than the search for a plan predicted",
            received=f"{peak:,} bytes, and the budget is {budget}",
            hint=Hint("certify=False: passes then do not change the graph that was fitted", "leave out --certify"),
        )


def pipeline_within(
    backend: StagedBackend, graph: Graph, target: Target, budget: Budget, donated: tuple[str, ...] = ()
) -> tuple[Graph, Sequence[Pass]]:
    """Return the graph with its symbols bounded by the budget's sizes, and the passes after which a run fits into the
    budget.

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
    *before, _ = backend.pipeline(target)
    chosen = next(each for each in search.variants if (each.apart, each.again) == (fit.apart, fit.again))
    return sources[chosen], (*before, FitMemory(fit), *search.after, search.plan)


def search_of(
    backend: StagedBackend, graph: Graph, target: Target, sizes: Mapping[str, int], donated: tuple[str, ...] = ()
) -> tuple[Fitting, dict[Variant, Graph]]:
    """Return the search for a plan that fits a graph into a budget at some sizes, and the start graph of each variant.

    Raises BackendError if the backend does not plan memory, or if the graph has states or several entries.
    """
    *before, plan = backend.pipeline(target)
    if not isinstance(plan, PlanStorage):
        raise BackendError(f"backend {backend.name} does not plan memory", hint="PlanStorage as the last pass")
    plan = replace(plan, donated=donated)
    if graph.states or len(graph.later_entries) > 1:
        raise BackendError("a budget needs a graph with one entry and no states", received=graph.name)
    after = [each for each in before if isinstance(each, Legalize)]

    def lowered(of: Graph) -> Graph:
        made = PassManager(before, certify=False, target=target).run(of).graph
        fix_single_sizes(made)
        return made

    sources = {Variant(lowered(graph)): graph}
    apart = PassManager((_APART,), certify=False).run(graph)
    if apart.log[-1].changes:
        sources[Variant(lowered(apart.graph), apart=True)] = apart.graph
    last = list(sources)[-1]
    again = clone_graph(last.graph)
    compute_again(again, sizes)
    sources[Variant(again, apart=last.apart, again=True)] = sources[last]
    return Fitting(list(sources), plan, after, lambda g, p: backend.frames(g, target, p), target, sizes), sources


def _does_not_fit(search: Fitting, graph: Graph, budget: Budget) -> BackendError:
    whole, (least, left) = search.whole, search.least(SECONDS)
    cut = f"; {left} other ways to split it were not tried, since {SECONDS:.0f} s had passed" if left else ""
    if search.left_out:
        cut += f"; {search.left_out} ways were left out, since at most {len(search.candidates)} are tried"
    bound = min(search.bound, least)
    # At smaller sizes, an output may be too small for the temporaries that it holds at these sizes.
    alone = f", {whole.here:,} at these sizes alone" if whole.here < whole.bytes else ""
    return BackendError(
        "a run does not fit into its memory limit",
        received=f"{budget}, without weights, inputs and outputs",
        within=f"{graph.name}: {whole.bytes:,} bytes without a budget{alone}; the least that was reached is {least:,}"
        + (f"; no plan of this kind needs less than {bound:,}" if bound else "")
        + cut,
        hint=Hint(f"memory={least}, or smaller sizes", f"--memory {least}, or smaller --sizes"),
    )
