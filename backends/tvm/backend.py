"""The TVM backend. Treadle writes the kernels; TVM generates their machine code and runs their parallel loops.

graph -> legalized graph and storage plan -> kernel program (`lowering`) -> compiled kernels (`kernels.host.cache`) ->
tables of calls (`executable`). TVM is imported only when a kernel has to be compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from treadle.backends.made_weights import is_decoded_once, notes_on, recipes_of
from treadle.backends.protocol import Executable
from treadle.backends.refusals import code_hint, refuse_nodes, unavailable
from treadle.backends.staged import KernelUse, StagedBackend, needed_plan
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.host_calls import HostCall
from treadle.backends.tvm.host_machine import HostMachine
from treadle.backends.tvm.kernel_abilities import capabilities, planning
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import refuse_kernels
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.cache import KernelCache
from treadle.backends.tvm.kernels.host.runner import Runner
from treadle.backends.tvm.kernels.isa import isa_of, refused_here, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.meeting import Meet
from treadle.backends.tvm.lowering.program import KernelProgram, kernels_of
from treadle.backends.tvm.lowering.routine_writer import lower
from treadle.backends.tvm.lowering.rules import RULES, keeps, supported
from treadle.backends.tvm.runtimes.device_machine import DeviceMachine
from treadle.backends.tvm.runtimes.runtime import find_runtime
from treadle.backends.tvm.weight_packing import pack_weights
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Graph, Node
from treadle.ir.operation import Op
from treadle.ir.target import Target
from treadle.ir.types import Type
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import Pass
from treadle.passes.lowering.assign_layouts import AssignLayouts
from treadle.passes.lowering.decode_last import DecodeLast, DecodeNarrow
from treadle.passes.lowering.encode_roundings import EncodeRoundings
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize, primitives
from treadle.passes.lowering.multiply_blocks import MultiplyBlocks
from treadle.passes.lowering.read_blocks import DecodeWhereRead, ReadBlocks
from treadle.passes.lowering.round_sooner import RoundSooner
from treadle.passes.memory.frames import ALIGNMENT, Frame
from treadle.passes.memory.storage_plan import StoragePlan


class TvmBackend(StagedBackend):
    """The TVM backend. It runs graphs on the CPU with our own kernels. A call takes NumPy arrays or tensors and returns
    the same kind.
    """

    name = "tvm"
    first_run = "the first run of a model compiles its kernels, which are cached"

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Graph], StoragePlan, Target, KernelProgram] | None = None

    def available(self) -> str | None:
        """Return None if TVM is installed, else a message."""
        return tvm_runtime.missing()

    def missing_device(self, target: Target) -> BackendError | None:
        """Return the error of a call if this machine lacks the target's device or instruction set, else None. A device
        is opened.
        """
        isa = isa_of(target)
        try:
            if isinstance(isa, Device):
                find_runtime(target)
            elif not runs_here(isa):
                KernelCache(isa).refuse_other_machine()
        except BackendError as error:
            return error
        return None

    def supports(self, node: Node) -> str | None:
        """Return None if the node can be run, else the reason."""
        op, why = _without_kernel(node)
        return why if op is None or op is node.op else f"{why}, which is in the body of {node.op.name}"

    def where_to_add(self, node: Node) -> Hint | None:
        """Return a hint with the table of TVM's kernels."""
        op, _ = _without_kernel(node)
        if op is None:
            return None
        ranks = [None if v is None else v.type.rank for v in node.operands]
        if op.name in RULES:
            place = f"a case in the rule of backends/tvm/lowering/{RULES[op.name].__module__.rpartition('.')[2]}.py"
        elif op is node.op and op.is_elementwise(ranks):
            place = "a line in FUNCTIONS of backends/tvm/kernels/arithmetic/vector_math.py"
        else:
            place = "a rule in RULES of a module of backends/tvm/lowering, see docs/kernels.md"
        return code_hint(op.name, place)

    def refuse(self, graph: Graph, target: Target) -> None:
        """Raise BackendError if TVM is not installed, the target is unsupported, or a node is unsupported."""
        missing = self.available()
        if missing is not None:
            raise unavailable(self.name, missing, target)
        isa_of(target)
        refuse_nodes(graph, self.name, self.supports, hint=self.where_to_add)

    def capabilities(self, target: Target) -> Capabilities:
        """Return the ops that our kernels compute, the layouts in which they read operands, and their chains."""
        return capabilities(isa_of(target))

    def pipeline(self, target: Target) -> Sequence[Pass]:
        """Return the passes: legalize, choose weight layouts, move computations on weights into `bind`, plan
        storage.
        """
        mine = self.capabilities(target)
        rounded = (EncodeRoundings(), Legalize(mine), DecodeNarrow(), DecodeLast())
        products = (*rounded, MultiplyBlocks(mine), RoundSooner())
        layouts = (ReadBlocks(mine), AssignLayouts(mine), HoistWeights(mine), DecodeWhereRead())
        return (*products, *layouts, planning(mine))

    def program_of(self, graph: Graph, target: Target, plan: StoragePlan) -> KernelProgram:
        """Return the calls of kernels of a lowered graph.

        The last program is kept until it is emitted, since a memory limit is checked on it before.
        """
        if self._last is not None:
            of, planned, on, program = self._last
            if of() is graph and planned is plan and on == target:
                return program
        program = lower(graph, plan, isa_of(target), RULES, target.cores())
        self._last = weakref.ref(graph), plan, target, program
        return program

    def frames(self, graph: Graph, target: Target, plan: StoragePlan) -> dict[str, Frame]:
        """Return the frame of each function by its steps, including the workspaces of single kernels."""
        program, isa = self.program_of(graph, target, plan), isa_of(target)
        alignment = isa.limits.alignment if isinstance(isa, Device) else ALIGNMENT
        return {routine.name: replace(routine.frame, alignment=alignment) for routine in program.routines}

    def kernel_uses(self, graph: Graph, target: Target, plan: StoragePlan) -> tuple[KernelUse, ...]:
        """Return the kernels that each routine calls."""
        program = self.program_of(graph, target, plan)
        return tuple(
            [
                KernelUse(routine.name, step.node, step.kernel.title, step.kernel.generic, step.note)
                for routine in program.routines
                for step in routine.walk()
            ]
        )

    def emit(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, Any],
        declared: Graph,
        plan: StoragePlan | None,
    ) -> Executable:
        """Generate the program, compile or load its kernels, and pack its weights.

        If the target is another machine, the executable can be inspected (`source`, `assembly`) but not called. A
        device is opened by the first call, which raises BackendError, with what to install, if there is none. Raises
        BackendError if a weight is missing.
        """
        isa = isa_of(target)
        made = recipes_of(graph)
        program = self.program_of(graph, target, needed_plan(plan, self.name))
        self._last = None
        if isinstance(isa, Device):
            refuse_kernels(program, isa)
        cache = KernelCache(isa)
        threads = target.cores() or 1
        needed = kernels_of(program)
        calls: dict[Kernel, HostCall] = {k: HostCall(k) for k in needed if isinstance(k, Meet)}
        machine: HostMachine | DeviceMachine
        if isinstance(isa, Device):
            packed = pack_weights(graph, made, weights, threads=threads)
            machine = DeviceMachine(declared.name, program, target, isa, packed, calls)
        else:
            kernels = [Runner(), *[k for k in needed if not k.on_host]] if runs_here(isa) else []
            with ThreadPoolExecutor(max_workers=1) as pool:  # weights are packed while kernels are compiled
                entries = pool.submit(cache.entries, kernels) if kernels else None
                packed = pack_weights(graph, made, weights, threads=threads)
                found = entries.result() if entries is not None else {}
            machine = HostMachine(declared.name, program, cache, packed, threads, found, calls)
        executable = KernelExecutable(declared, program, cache, machine, threads, tuple(notes_on(made)), plan)
        refused = refused_here(isa)
        executable.notes = (*([refused] if refused else []), *cache.notes, *executable.notes)
        return executable


def _without_kernel(node: Node) -> tuple[Op | None, str | None]:
    """Return the first op of a node's body that no kernel computes, and the reason; None and None if there is none."""
    if node.op.callee is None and not is_decoded_once(node):
        types: list[Type | None] = [None if v is None else v.type for v in node.operands]
        for op, operands in primitives(node.op, types, keeps):
            why = supported(op, operands)
            if why is not None:
                return op, why
    return None, None
