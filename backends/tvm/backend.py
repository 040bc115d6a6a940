"""The TVM backend: our own kernels. TVM generates their code and runs their loops; what is computed how is ours.

graph -> legalized graph and storage plan -> kernel program (`lowering`) -> compiled kernels (`kernels.cache`) -> tables
of calls (`executable`). TVM is imported only when a kernel has to be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from treadle.backends.made_weights import is_decoded_once, notes_on, recipes_of
from treadle.backends.protocol import Executable
from treadle.backends.refusals import refuse_nodes, unavailable
from treadle.backends.staged import StagedBackend, needed_plan
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.host_calls import HostCall
from treadle.backends.tvm.kernels import tvm_runtime
from treadle.backends.tvm.kernels.cache import KernelCache
from treadle.backends.tvm.kernels.isa import isa_of, refused_here, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.meeting import Meet
from treadle.backends.tvm.kernels.runner import Runner
from treadle.backends.tvm.lowering.chains import PLAN
from treadle.backends.tvm.lowering.encoded_rules import takes_blocks
from treadle.backends.tvm.lowering.program import kernels_of
from treadle.backends.tvm.lowering.routine_writer import lower
from treadle.backends.tvm.lowering.rules import RULES, keeps, supported
from treadle.backends.tvm.weight_packing import multiplies_rows, pack_weights, wants, wants_blocks
from treadle.ir.graph import Graph, Node
from treadle.ir.target import Target
from treadle.ir.types import Type
from treadle.passes.framework.manager import Pass
from treadle.passes.lowering.assign_layouts import AssignLayouts
from treadle.passes.lowering.decode_last import DecodeLast, DecodeNarrow
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize, primitives
from treadle.passes.lowering.multiply_blocks import MultiplyBlocks
from treadle.passes.lowering.read_blocks import DecodeWhereRead, ReadBlocks, in_blocks
from treadle.passes.lowering.round_sooner import RoundSooner
from treadle.passes.memory.frames import Frame
from treadle.passes.memory.storage_plan import StoragePlan


class TvmBackend(StagedBackend):
    """Runs graphs on the CPU by kernels of our own. A call takes NumPy arrays or tensors, and gives the same kind."""

    name = "tvm"

    def available(self) -> str | None:
        """None, or that TVM is not installed."""
        return tvm_runtime.missing()

    def supports(self, node: Node) -> str | None:
        """None, or the reason why the node cannot be run."""
        if node.op.callee is not None or is_decoded_once(node):
            return None
        types: list[Type | None] = [None if v is None else v.type for v in node.operands]
        for op, operands in primitives(node.op, types, keeps):
            why = supported(op, operands)
            if why is not None:
                return why if op is node.op else f"{why}, which is in the body of {node.op.name}"
        return None

    def refuse(self, graph: Graph, target: Target) -> None:
        """Raise BackendError without TVM, for a target without code, or for a refused node."""
        missing = self.available()
        if missing is not None:
            raise unavailable(self.name, missing)
        isa_of(target)
        refuse_nodes(graph, self.name, self.supports)

    def pipeline(self, target: Target) -> Sequence[Pass]:
        """What has kernels, panels for weights that products read, what is done once, and where each value lies."""
        isa = isa_of(target)
        layouts = (ReadBlocks(wants_blocks(isa), partial(multiplies_rows, isa=isa)), AssignLayouts(wants(isa)))
        products = (Legalize(keeps), DecodeNarrow(), DecodeLast(), MultiplyBlocks(takes_blocks), RoundSooner())
        return (*products, *layouts, HoistWeights(in_blocks), DecodeWhereRead(), PLAN)

    def frames(self, graph: Graph, target: Target, plan: StoragePlan) -> dict[str, Frame]:
        """By the steps of each routine, with what single kernels need beside."""
        program = lower(graph, plan, isa_of(target), RULES, target.cores())
        return {routine.name: routine.frame for routine in program.routines}

    def emit(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, Any],
        declared: Graph,
        plan: StoragePlan | None,
    ) -> Executable:
        """Write the program, compile or load its kernels, and lay its weights out.

        For another machine's target the executable can be read (`source`, `assembly`) but not called.
        Raises BackendError for a missing weight.
        """
        isa = isa_of(target)
        made = recipes_of(graph)
        program = lower(graph, needed_plan(plan, self.name), isa, RULES, target.cores())
        cache = KernelCache(isa)
        threads = target.cores() or 1
        needed = kernels_of(program)
        kernels = [Runner(), *[k for k in needed if not k.on_host]] if runs_here(isa) else []
        calls: dict[Kernel, HostCall] = {k: HostCall(k) for k in needed if isinstance(k, Meet)}
        with ThreadPoolExecutor(max_workers=1) as pool:  # weights are laid out while kernels are compiled
            entries = pool.submit(cache.entries, kernels) if kernels else None
            packed = pack_weights(graph, made, weights, threads=threads)
            found = entries.result() if entries is not None else {}
        notes = tuple(notes_on(made))
        executable = KernelExecutable(declared, program, cache, packed, threads, found, notes, plan, calls)
        refused = refused_here(isa)
        if refused is not None:
            executable.notes = (refused, *executable.notes)
        return executable
