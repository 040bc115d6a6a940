"""Reports on a compilation: backend, target, times, and the changes of each pass, as facts, lines and a table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from treadle.backends.tvm.runtimes.machine_devices import list_devices, what_to_install
from treadle.compiled import Compiled
from treadle.files.shown_names import printable
from treadle.ir.analysis.cost import parameter_count
from treadle.ir.analysis.run_counts import count_run_ops
from treadle.ir.target import Target
from treadle.passes.framework.pass_log import PassLog
from treadle.passes.quantization.quantization_plan import QuantizationPlan
from treadle.reporting import Facts
from treadle.reporting.counts import counted
from treadle.reporting.graphs import port_facts
from treadle.reporting.tables import Items, plain_table


def compiled_facts(compiled: Compiled, seconds: float) -> Facts:
    """Return facts of a compilation: model, backend, target, times, and the changes of each pass."""
    ops = count_run_ops(compiled.graph)
    return {
        "model": compiled.name,
        "backend": compiled.backend,
        "target": str(compiled.target),
        "cores": compiled.target.cores(),
        "seconds": seconds,
        "inputs": [port_facts(p) for p in compiled.inputs],
        "outputs": [port_facts(p) for p in compiled.outputs],
        "parameters": parameter_count(compiled.graph),
        "weights": weights_text(compiled.seed),
        "unused": list(compiled.unused),
        "unread": list(compiled.unread),
        "ops": dict(ops.most_common()),
        **({} if compiled.memory_fit is None else {"memory": compiled.memory_fit.as_dict()}),
        **compiled.log.as_dict(times=True),
    }


def weights_text(seed: int | None) -> str:
    """Return where weights come from. seed: that of random weights, or None."""
    return "read from the checkpoint" if seed is None else f"drawn from seed {seed}"


def compiled_lines(compiled: Compiled, seconds: float) -> Iterable[str]:
    """Yield the lines that `compile` prints in addition to the pass table."""
    ops = count_run_ops(compiled.graph)
    yield f"{compiled.name}({', '.join(map(str, compiled.inputs))})"
    yield f"  -> ({', '.join(map(str, compiled.outputs))})"
    passes = sum(record.seconds for record in compiled.log)
    yield f"compiled in {seconds:.2f} s, of which {passes * 1e3:.0f} ms in passes"
    yield _place_text(compiled.backend, compiled.target)
    yield f"a run is {counted(ops.total(), 'op')}: " + ", ".join(f"{n} {name}" for name, n in ops.most_common())
    yield f"{counted(parameter_count(compiled.graph), 'parameter')}, {weights_text(compiled.seed)}"
    for record in compiled.log:
        plan = record.product(QuantizationPlan)
        yield from plan.summary if plan is not None else ()
    for names, kind, text in (
        (compiled.unused, "tensor", "of the checkpoint not used"),
        (compiled.unread, "key", f"of config.json that {compiled.name} does not know"),
    ):
        if names:
            shown = ", ".join(map(printable, names[:4])) + (", ..." if len(names) > 4 else "")
            yield f"{counted(len(names), kind)} {text}: {shown}"


def _place_text(backend: str, target: Target) -> str:
    """Return the device that a program runs on, or, if this machine has none, the hardware that its code is for."""
    if target.kind == "cpu":
        return f"all of it runs in {backend} on {target}, {target.description}, {counted(target.cores() or 1, 'core')}"
    code = f"all of it is compiled in {backend} for {target}, {target.description}"
    if target.is_elsewhere:
        return code
    devices = list_devices(target.kind)
    if len(devices) > (target.index or 0):
        return f"all of it runs in {backend} on {target}, {target.description} of this machine"
    missing = f"has no {target}" if devices else f"has none, which needs {what_to_install(target.kind)}"
    return f"{code}; this machine {missing}"


def pass_table(log: PassLog) -> Table:
    """Return a table with a line per pass: ops before and after, changes, refusals and near misses."""
    table = plain_table("pass", "ops", "change", "refused", "nearly", "ms", numbers={"ops", "refused", "nearly", "ms"})
    for r in log:
        ops = f"{r.before.total()} -> {r.after.total()}" if r.changed else str(r.after.total())
        changes = Items([f"{delta:+d} {name}" for name, delta in r.op_changes.items()])
        refused, nearly = (str(len(events) or "") for events in (r.refusals, r.near_misses))
        table.add_row(r.name, ops, changes, refused, nearly, f"{r.seconds * 1e3:.1f}", style="" if r.changed else "dim")
    return table
