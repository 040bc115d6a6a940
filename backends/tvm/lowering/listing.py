"""Kernel programs as text: one line for each step, then every distinct kernel as TVMScript."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.backends.commented_lines import commented
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.host.cache import tvm_script
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.program import KernelProgram, KernelStep, Routine, RoutineStep, kernels_of
from treadle.files.shown_names import on_one_line
from treadle.ir.storage.views import Storage, StorageKind


def list_program(name: str, program: KernelProgram, isa: Isa, prepared: Sequence[str] = ()) -> str:
    """Return the listing of a program: notes on derived weights, then routines, then kernels."""
    kernels = kernels_of(program)
    titles = unique_titles(kernels)
    parts = [f"# {on_one_line(name)}, for the tvm backend on {isa}: {len(kernels)} kernels.\n"]
    if prepared:
        parts[0] += "\n".join(
            ["# Computed once, when weights are bound:", *(f"#   {on_one_line(line)}" for line in prepared), ""]
        )
    parts += [_routine(routine, titles) for routine in program.routines]
    parts += [
        f"# {kernel.key}\n" + ("" if kernel.on_host else _kernel_text(kernel, isa, titles[kernel]))
        for kernel in kernels
    ]
    return "\n\n".join(parts)


def _kernel_text(kernel: Kernel, isa: Isa, title: str) -> str:
    """Return a kernel as TVMScript, or in the language of a device."""
    if isinstance(isa, Device):
        made = device_kernel(kernel, isa, title)
        return (f"# one task for each thread, because of {made.why_slow}\n" if made.why_slow else "") + made.body
    return tvm_script(kernel, isa, title)


def unique_titles(kernels: Sequence[Kernel]) -> dict[Kernel, str]:
    """Return a unique name for each kernel."""
    counts: dict[str, int] = {}
    titles = {}
    for kernel in kernels:
        count = counts.get(kernel.title, 0)
        counts[kernel.title] = count + 1
        titles[kernel] = f"{kernel.title}_{count}" if count else kernel.title
    return titles


def _routine(routine: Routine, titles: dict[Kernel, str]) -> str:
    lines = [(f"def {routine.name}({', '.join(b.name for b in routine.arguments)}):", "")]
    read = {
        v.storage
        for s in routine.steps
        for v in (s.arguments if isinstance(s, RoutineStep) else s.pointers[: -s.writes])
    }
    lines += [_step(step, titles, read) for step in routine.steps]
    lines.append((f"    return {', '.join(b.name for b in routine.results)}", ""))
    # the texts contain names from the user's model
    return "\n".join(commented([(on_one_line(code), on_one_line(note)) for code, note in lines]))


def _step(step: KernelStep | RoutineStep, titles: dict[Kernel, str], read: set[Storage]) -> tuple[str, str]:
    """Return the line of a step and its comment. Workspaces that only the kernel itself uses are not listed."""
    if isinstance(step, RoutineStep):
        made = ", ".join(v.storage.name for v in step.results)
        given = ", ".join(v.storage.name for v in step.arguments)
        return f"    {made} = {step.routine.name}({given})", step.node.scope
    reads, writes = step.pointers[: -step.writes], step.pointers[-step.writes :]
    made = ", ".join(str(v) for v in writes if v.storage in read or v.storage.kind is StorageKind.RESULT)
    where = step.node.scope if step.node is not None else ""
    source = str(step.node.source) if step.node is not None and step.node.source is not None else ""
    code = f"    {made} = {titles[step.kernel]}({', '.join(v.storage.name for v in reads)})"
    return code, "  ".join(t for t in (source, where, step.note) if t)
