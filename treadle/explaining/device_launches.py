"""The program of a model for a device of the tvm backend: kernels, launches, copies and memory. No device is needed.

    print(explain_launches("gpt2", target="h100"))

Launches, thread blocks and bytes are those of the table that a run uses, at one set of sizes. Registers and spills are
ptxas's, if the compilers of CUDA are installed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from treadle.backends.staged import needed_plan
from treadle.backends.tvm.backend import TvmBackend
from treadle.backends.tvm.kernels.devices.cuda_compiler import architecture_of, compile_cuda, missing_compiler
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel
from treadle.backends.tvm.kernels.isa import isa_of
from treadle.backends.tvm.lowering.listing import unique_titles
from treadle.backends.tvm.runtimes.device_program import DeviceProgram
from treadle.backends.tvm.runtimes.plan_limits import bytes_by_kind
from treadle.explaining.layouts import optimized_for
from treadle.ir.builder import describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.transforms.fixing import bounded
from treadle.passes.stages import DeriveStep, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.budgets import budget_of, choose_sizes, step_sizes
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.reporting.counts import counted, human, sizes_text


@dataclass(frozen=True)
class KernelForm:
    """A kernel of a device.

    threads    number of threads of a block
    why_slow   the reason why each thread runs a task of its own; empty if a group of threads runs a task
    shared     bytes of shared memory of a block
    buffers    number of buffers that it accesses
    registers  registers of a thread; None if no compiler has compiled the kernel
    spilled    bytes that a thread spills to memory; None if no compiler has compiled the kernel
    readers    the functions that call it, each with the op and the user's line
    """

    name: str
    threads: int
    why_slow: str
    shared: int
    buffers: int
    registers: int | None
    spilled: int | None
    readers: tuple[str, ...]

    def __str__(self) -> str:
        form = f"one task for each thread, because of {self.why_slow}" if self.why_slow else "a group of threads"
        facts = [f"{form}, {self.threads} in a block", counted(self.buffers, "buffer")]
        facts += [f"{human(self.shared, 'B')} of shared memory"] if self.shared else []
        if self.registers is not None:
            spills = f"{self.spilled} bytes spilled" if self.spilled else "none spilled"
            facts.append(f"{self.registers} registers, {spills}")
        more = f" and {len(self.readers) - 1} more" if len(self.readers) > 1 else ""
        return f"{self.name}: {', '.join(facts)}    {self.readers[0] if self.readers else ''}{more}"


@dataclass(frozen=True)
class EntryLaunches:
    """A call of an entry at one set of sizes.

    launches     number of launches by kernel, in the order of the first ones
    blocks       number of thread blocks of all launches
    collectives  number of collectives, each of which waits for the device
    inputs       inputs that are copied to the device, each with its type
    outputs      outputs that are copied to the host together, with one wait
    reports      True if status words are copied with the outputs: some kernel reports an index out of range
    memory       bytes of device memory by kind
    exceeded     a line for each limit of the device that the call exceeds, before anything is launched
    """

    name: str
    sizes: Mapping[str, int]
    launches: Mapping[str, int]
    blocks: int
    collectives: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reports: bool
    memory: Mapping[str, int]
    exceeded: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.name} at {sizes_text(self.sizes)}" if self.sizes else self.name


@dataclass(frozen=True)
class LaunchReport:
    """The program of a model for a device of the tvm backend.

    compiler  what compiled the kernels, or what to install; empty for a device whose kernels its driver compiles
    """

    model: str
    target: str
    compiler: str
    kernels: tuple[KernelForm, ...]
    entries: tuple[EntryLaunches, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.model} on {self.target}, with the tvm backend"
        yield from self._titled("kernels", map(str, self.kernels))
        if self.compiler:
            yield f"  registers: {self.compiler}"
        yield from self._titled("launches", map(_launches, self.entries))
        yield from self._titled("copies in a call", map(_copies, self.entries))
        yield from self._titled("device memory", map(_memory, self.entries))
        exceeded = [f"{entry.title}: {line}" for entry in self.entries for line in entry.exceeded]
        yield from self._titled("limits that are exceeded", exceeded)

    def _titled(self, title: str, rows: Any) -> Iterator[str]:
        lines = [f"  {row}" for row in rows]
        yield from ["", f"{title}:", *lines] if lines else []


def _launches(entry: EntryLaunches) -> str:
    total, blocks = sum(entry.launches.values()), counted(entry.blocks, "block")
    collectives = f", {counted(entry.collectives, 'collective')} between them" if entry.collectives else ""
    by_kernel = ", ".join(f"{name} {count}" for name, count in entry.launches.items())
    return f"{entry.title}: {counted(total, 'launch')}, {blocks}{collectives}: {by_kernel}"


def _copies(entry: EntryLaunches) -> str:
    read = [*entry.outputs, *["status words"] * entry.reports]
    waits = "one wait" if not entry.collectives else f"{1 + entry.collectives} waits"
    return f"{entry.name}: in {', '.join(entry.inputs) or 'nothing'}; out {', '.join(read) or 'nothing'}; {waits}"


def _memory(entry: EntryLaunches) -> str:
    parts = ", ".join(f"{kind} {human(nbytes, 'B')}" for kind, nbytes in entry.memory.items())
    return f"{entry.title}: {human(sum(entry.memory.values()), 'B')}: {parts}"


def explain_launches(model: AnyModel, options: CompileOptions) -> LaunchReport:
    """Describe the program of a model for a device of the tvm backend. No device is opened, and no weight is read.

    Raises as `compile` does, but lists kernels that the device refuses and limits that a call exceeds.
    """
    target = options.where
    device = isa_of(target)
    assert isinstance(device, Device)
    name, graph = optimized_for(model, options)
    budget = budget_of(options.memory, options.sizes if options.memory is not None else None, graph)
    sizes = choose_sizes(graph, options.sizes or {})
    backend = TvmBackend()
    fitting = graph if budget is None else bounded(graph, budget.sizes)
    lowered = backend.lower(fitting, target, budget=budget, donate=options.donate)
    parts = [(lowered, {graph.main.name: sizes})]
    try:
        derived = run(graph, [DeriveStep()]).products[DerivedStep]
        parts.append((backend.lower(derived.graph, target), _step_sizes(derived)))
    except PassError:
        pass
    programs = {}
    for each, at in parts:
        routines = backend.program_of(each.graph, target, needed_plan(each.plan, backend.name))
        programs[DeviceProgram(name, routines, device)] = each.graph, at
    titles = unique_titles(list(dict.fromkeys(kernel for program in programs for kernel in program.titles)))
    for program in programs:
        program.titles = titles  # one name for a kernel of both programs
    entries = [
        _entry(program, graph, entry, sizes) for program, (graph, at) in programs.items() for entry, sizes in at.items()
    ]
    forms, compiler = _forms(list(programs), target, device)
    return LaunchReport(name, str(target), compiler, tuple(forms), tuple(entries))


PAST = 128
"""Number of tokens in each cache, and of tokens that an entry other than `step` gets."""


def _step_sizes(derived: DerivedStep) -> dict[str, dict[str, int]]:
    """Return the sizes of one row for each entry that a session calls."""
    step = step_sizes(derived, 1, PAST)
    bounds = derived.graph.symbols[derived.axis]
    prefill = {**step, derived.axis: PAST if bounds.upper is None else min(PAST, bounds.upper)}
    return {each.name: step if each.name == "step" else prefill for each in derived.graph.later_entries}


def _entry(program: DeviceProgram, graph: Graph, name: str, sizes: Mapping[str, int]) -> EntryLaunches:
    entry, plan = program.entries[name], program.plan(name, sizes)
    on_host = [step.kernel.on_host for step in plan.steps]
    launches = [launch for launch, host in zip(plan.table.launches, on_host, strict=True) if not host]
    function = graph.functions[name]
    return EntryLaunches(
        name,
        {symbol: size for symbol, size in sizes.items() if symbol in entry.symbols},
        dict(Counter(launch.kernel for launch in launches)),
        sum(launch.blocks for launch in launches),
        sum(on_host),
        tuple(f"{v.name} {v.type}" for v in function.arguments if v.name in entry.inputs),
        tuple(f"{output} {v.type}" for output, v in function.outputs.items()),
        bool(plan.tellers),
        bytes_by_kind(plan),
        tuple(program.exceeded(plan)),
    )


def _forms(programs: Sequence[DeviceProgram], target: Target, device: Device) -> tuple[list[KernelForm], str]:
    """Return the form of each kernel, and what compiled them."""
    readers: dict[str, dict[str, None]] = {}
    kernels: dict[str, DeviceKernel] = {}
    for program in programs:
        kernels |= program.kernels()
        for routine in program.routines:
            for step in routine.walk():
                place = "" if step.node is None else describe_source(step.node.source, step.node.scope)
                op = "" if step.node is None else f": {step.node.op.name}"
                line = f"{routine.name}{op}" + (f" ({place})" if place else "")
                readers.setdefault(program.titles[step.kernel], {})[line] = None
    compiler, resources = "", {}
    if device.limits.language == "cuda":
        missing = missing_compiler()
        compiler = missing or ""
        if missing is None:
            architecture = architecture_of(target.hardware.capability)
            compiler = f"as ptxas reports them for {architecture}"
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                texts = [kernel.text for kernel in kernels.values()]
                made = pool.map(lambda text: compile_cuda(text, architecture).resources, texts)
                resources = dict(zip(kernels, made, strict=True))
    forms = []
    for title, kernel in kernels.items():
        group, taken = kernel.group_kernel, resources.get(title)
        forms.append(
            KernelForm(
                title,
                group.device.threads,
                kernel.why_slow,
                group.shared_bytes,
                len(group.pointers),
                taken.registers if taken else None,
                taken.spilled if taken else None,
                tuple(readers.get(title, ())),
            )
        )
    return forms, compiler
