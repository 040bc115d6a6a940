"""Backends as pipelines: passes lower the optimized graph to ops that the backend supports, then the backend emits
code.

    class Mine(StagedBackend):
        name = "mine"

        def capabilities(self, target):
            return Capabilities("mine", keeps=lambda op, types: op.name in ("linear", "softmax"))

        def pipeline(self, target):
            mine = self.capabilities(target)
            return (Legalize(mine), HoistWeights(mine), PlanStorage(mine))

        def emit(self, graph, target, weights, declared, plan): ...  # the lowered graph, as an `Executable`

The passes run under the pass manager, like the portable passes. Each is recorded, verified, printed by `inspect
--after`, and reported by `explain`. `emit` makes no decisions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from treadle.backends.donation import check_names
from treadle.backends.protocol import Backend, Executable, StatefulExecutable
from treadle.backends.refusals import refuse_nodes
from treadle.backends.registry import find_backend
from treadle.ir.errors import BackendError, Hint, UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.target import Target
from treadle.ir.transforms.fixing import bounded
from treadle.passes.budget.fitted_pipeline import (
    MemoryLimit,
    before_planning,
    check_limit,
    with_donated,
    with_fit,
)
from treadle.passes.budget.memory_fit import MemoryFit
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import Optimized, Pass
from treadle.passes.framework.pass_log import PassLog, PassRecord, count_ops
from treadle.passes.memory.frames import Frame, frames_of
from treadle.passes.memory.storage_plan import StoragePlan
from treadle.passes.stages import Budget, Lower, run


@dataclass(frozen=True)
class KernelUse:
    """A kernel that a function calls, and the node that it computes last.

    function            the function's name
    node                a node of the lowered graph; None if the kernel computes none
    kernel              the kernel's name, such as `matmul_48_gelu`
    element_by_element  True if it is correct for every case, but slow
    why                 the reason why no faster kernel computes the node; may be empty
    """

    function: str
    node: Node | None
    kernel: str
    element_by_element: bool
    why: str


class StagedBackend(ABC):
    """A backend that consists of a pipeline and a code generator; see `treadle.backends.protocol.Backend`."""

    name: ClassVar[str]
    first_run: ClassVar[str] = ""
    """Additional work of the first run of a model, for messages."""

    def available(self) -> str | None:
        """Return None if the backend can be used here, else the reason. By default return None."""
        return None

    def missing_device(self, target: Target) -> BackendError | None:
        """Return the error of a call if this machine lacks the target's device, else None. Programs for it can be
        compiled and inspected.

        By default return None.
        """
        return None

    def supports(self, node: Node) -> str | None:
        """Return None if the backend can run this node, else the reason. For a call, the nodes of the called function
        are not checked.

        By default return None.
        """
        return None

    def where_to_add(self, node: Node) -> Hint | None:
        """Return a hint with the table in which a refused node's op has no code; None if the node is refused for
        another reason. By default return None.
        """
        return None

    def refuse(self, graph: Graph, target: Target) -> None:
        """Raise BackendError if the backend is not available, does not support the target, or does not support a node.

        By default every target is accepted.
        """
        reason = self.available()
        if reason is not None:
            raise BackendError(f"backend {self.name} is not available", received=reason)
        refuse_nodes(graph, self.name, self.supports, hint=self.where_to_add)

    def capabilities(self, target: Target) -> Capabilities:
        """Return what the backend's kernels compute, read and write, for the passes of `pipeline`. By default, the
        backend emits primitives only.
        """
        return Capabilities(self.name)

    @abstractmethod
    def pipeline(self, target: Target) -> Sequence[Pass]:
        """Return the passes that follow the portable ones."""

    @abstractmethod
    def emit(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, Any],
        declared: Graph,
        plan: StoragePlan | None,
    ) -> Executable:
        """Generate code for a lowered graph, with its weights by name. Return the executable.

        declared   the graph before the pipeline: the user knows its ops, so errors of a call refer to it
                   (`treadle.backends.signature`)
        plan       the storage and lifetime of each value; None if the pipeline does not end with `PlanStorage`

        Raises BackendError for a weight that is missing or has another type.
        """

    def frames(self, graph: Graph, target: Target, plan: StoragePlan) -> dict[str, Frame]:
        """Return the frame of each function of a lowered graph, callees first.

        By default, frames follow from the plan; a backend may add the workspaces of its kernels.
        """
        return frames_of(plan)

    def kernel_uses(self, graph: Graph, target: Target, plan: StoragePlan) -> tuple[KernelUse, ...] | None:
        """Return the kernels that the functions of a lowered graph call, callees first, without compiling them.

        None, the default, means that the kernels are a library's.
        """
        return None

    def lower(
        self,
        graph: Graph,
        target: Target,
        *,
        certify: bool | None = None,
        budget: MemoryLimit | None = None,
        donate: Sequence[str] = (),
        verified: bool = False,
    ) -> Optimized:
        """Lower an optimized graph with the pipeline, within a budget if there is one. Return the result with its log.

        donate    inputs of the last entry that callers donate
        verified  True if a pass manager has verified the graph

        Raises BackendError as `refuse` does, and if no plan fits.
        """
        self.refuse(graph, target)
        donated = check_names(graph, donate)
        passes: Sequence[Pass] = self.pipeline(target)
        if donated and budget is None and before_planning(passes)[1] is None:
            raise BackendError(f"backend {self.name} does not plan storage, so no input can be donated")
        passes = with_donated(passes, donated)
        if budget is not None:
            start = run(graph, [Budget(budget, self, target, donated)])
            graph, verified = start.graph, False
            passes = with_fit(passes, start.products[MemoryFit])
        lowered = run(graph, [Lower(tuple(passes))], certify=certify, target=target, verified=verified)
        if budget is not None:
            check_limit(self, lowered, target, budget)
        return lowered

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Executable:
        """Lower a graph and generate code, with weights by name. Raises BackendError as `refuse` and `emit` do."""
        lowered = self.lower(graph, target)
        made = self.emit(lowered.graph, target, weights, graph, lowered.plan)
        _refuse_without_entries(made, graph, self.name)
        return made


def _refuse_without_entries(made: Executable, graph: Graph, backend: str) -> None:
    """Raise BackendError for a graph with states or several entries, if the backend's executables do not
    support them.
    """
    entries = [entry.name for entry in graph.later_entries]
    if (graph.states or len(entries) > 1) and not isinstance(made, StatefulExecutable):
        raise BackendError(
            f"the {backend} backend supports no states, and only one entry",
            received=f"{graph.name}: entries {', '.join(entries)}; {len(graph.states)} states",
            hint="an executable that is a treadle.backends.protocol.StatefulExecutable",
        )


def capabilities_of(backend: str, target: Target) -> Capabilities:
    """Return the capabilities of a backend on a target. Raises UsageError for an unknown backend, and for one without
    passes.
    """
    chosen = find_backend(backend)
    if not isinstance(chosen, StagedBackend):
        raise UsageError(f"backend {backend} has no passes", hint="numpy, torch or tvm")
    return chosen.capabilities(target)


def needed_plan(plan: StoragePlan | None, backend: str) -> StoragePlan:
    """Return the storage plan that `emit` needs. Raises BackendError if the pipeline created no plan."""
    if plan is None:
        raise BackendError(
            f"the {backend} backend needs a storage plan, but its pipeline created none",
            hint="PlanStorage as the last pass of the pipeline",
        )
    return plan


def build(
    backend: Backend,
    graph: Graph,
    target: Target,
    weights: Mapping[str, Any],
    *,
    certify: bool | None = None,
    budget: MemoryLimit | None = None,
    donate: Sequence[str] = (),
    verified: bool = False,
    why: str = "",
) -> tuple[Executable, Optimized]:
    """Return an executable of an optimized graph, and the graph after the backend's passes.

    budget    a memory budget; the executable then accepts the budget's sizes and smaller ones
    donate    names of inputs that callers donate
    verified  True if a pass manager has verified the graph
    why       the reason for the choice of the backend, for the log; may be empty

    The last record of the log has this reason and the executable's notes: lines that name slow steps and the reasons.
    A backend that is not a `StagedBackend` has no passes. Raises BackendError as the backend does.
    """
    if budget is not None:
        if not isinstance(backend, StagedBackend):
            raise BackendError(f"backend {backend.name} does not plan memory", hint="numpy, torch or tvm")
        graph, verified = bounded(graph, budget.sizes), False
    if isinstance(backend, StagedBackend):
        lowered = backend.lower(graph, target, certify=certify, budget=budget, donate=donate, verified=verified)
        executable = backend.emit(lowered.graph, target, weights, graph, lowered.plan)
    else:
        if donate:
            raise BackendError(f"backend {backend.name} does not plan storage, so no input can be donated")
        lowered = Optimized(graph, graph, PassLog(()))
        executable = backend.compile(graph, target, weights)
    _refuse_without_entries(executable, graph, backend.name)
    notes = [*filter(None, [why]), *getattr(executable, "notes", ())]
    if notes:
        ops = count_ops(lowered.graph)
        record = PassRecord(f"lower-to-{backend.name}", "", ops, ops, notes=notes, graph=lowered.graph)
        lowered = replace(lowered, log=PassLog([*lowered.log, record]))
    return executable, lowered
