"""`measure_roofline`: compare each distinct kernel of a run with the machine's limits (Williams et al. 2009).

    found = measure_roofline(t.compile("bert", backend="tvm"), {"B": 1, "S": 128})
    print(found)

A kernel's operations are the operations of its nodes. Its bytes are the bytes of its operands and results, each counted
once. Its minimum time is the larger of two times:

    operations divided by the rate of the unit that multiplies their dtype, measured without loads (`measure_unit`)
    bytes divided by the rate of a plain read of a buffer as large as the model's weights and arena

A kernel whose operands are in a near cache may be faster than this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import isa_of
from treadle.backends.tvm.kernels.unit_rate import measure_unit
from treadle.backends.tvm.lowering.listing import unique_titles
from treadle.backends.tvm.lowering.program import KernelStep
from treadle.backends.tvm.profiling import TimedCall, time_calls
from treadle.benching.serving import measured_read
from treadle.compiled import Compiled
from treadle.ir.analysis.cost import node_cost
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.builder import describe_source
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Node
from treadle.ir.storage.views import StorageKind
from treadle.reporting.counts import human, rate_text, sizes_text

DTYPES = ("f32", "bf16", "int8")
"""The dtypes of products. Each has its own rate."""


@dataclass(frozen=True)
class KernelRow:
    """A kernel at its sizes.

    calls     number of calls in a run
    seconds   median seconds of one call
    flops     operations of one call
    bytes     bytes of one call
    dtype     the dtype of its products: f32, bf16 or int8
    least     the minimum seconds of one call at the machine's rates
    source    the user's line of the last node that it computes
    """

    kernel: str
    what: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    dtype: str
    least: float
    source: str

    @property
    def total(self) -> float:
        """Total seconds of its calls."""
        return self.calls * self.seconds


@dataclass(frozen=True)
class Roofline:
    """All kernels of a run, the longest first.

    rates  operations per second of each dtype, on the same number of threads: the multiply unit's, or a faster kernel's
    read   bytes per second of a plain read of `held` bytes
    held   bytes of the model's weights and arena
    """

    model: str
    target: str
    threads: int
    sizes: Mapping[str, int]
    rows: tuple[KernelRow, ...]
    rates: Mapping[str, float]
    read: float
    held: int

    @property
    def seconds(self) -> float:
        """Seconds of all calls."""
        return sum(row.total for row in self.rows)

    @property
    def least(self) -> float:
        """The minimum seconds of all calls at these rates."""
        return sum(row.calls * row.least for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the roofline as plain data."""
        names = ("kernel", "what", "calls", "seconds", "flops", "bytes", "dtype", "least", "source")
        return {
            "model": self.model,
            "target": self.target,
            "threads": self.threads,
            "sizes": dict(self.sizes),
            "rates": dict(self.rates),
            "read": self.read,
            "held": self.held,
            "kernels": [{name: getattr(row, name) for name in names} for row in self.rows],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        total = self.seconds
        at = f" at {sizes_text(self.sizes)}" if self.sizes else ""
        plural = "s" * (self.threads != 1)
        yield f"{self.model}{at} on {self.target}, {self.threads} thread{plural}: {total * 1e3:.3g} ms in kernels"
        peaks = [rate_text(rate, dtype) for dtype, rate in self.rates.items()]
        reads = f"a plain read of the {human(self.held, 'B')} that it holds {human(self.read, 'B')}/s"
        yield f"this machine multiplies {' and '.join(peaks)}, {reads}"
        yield ""
        head = ("share", "calls", "us", "FLOP", "bytes", "FLOP/s", "B/s", "of least", "kernel")
        cells = [head, *(self._cells(row, total) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head) - 1)]
        sources = ["", *(f"{row.what}  {row.source}".rstrip() for row in self.rows)]
        for row, source in zip(cells, sources, strict=True):
            numbers = [text.rjust(width) for text, width in zip(row, widths, strict=False)]
            yield "  ".join([*numbers, row[-1], source]).rstrip()
        yield ""
        yield f"at these rates the same calls would take {self.least * 1e3:.3g} ms, {self.least / total:.0%}"

    def _cells(self, row: KernelRow, total: float) -> tuple[str, ...]:
        return (
            f"{row.total / total:.1%}",
            str(row.calls),
            f"{row.seconds * 1e6:.1f}",
            human(row.flops),
            human(row.bytes),
            human(row.flops / row.seconds),
            human(row.bytes / row.seconds),
            f"{row.least / row.seconds:.0%}",
            row.kernel,
        )


def measure_roofline(model: Compiled, sizes: Mapping[str, int], *, rounds: int = 9, seed: int = 0) -> Roofline:
    """Run a model of the TVM backend kernel by kernel, at sizes for its symbols, on random inputs. Compare with the
    machine.

    Raises UsageError for another backend, and for a model with states.
    """
    exe = model.executable
    if not isinstance(exe, KernelExecutable):
        raise UsageError(
            f"a roofline needs kernels, and the {model.backend} backend calls a library",
            hint=Hint('backend="tvm"', "--backend tvm"),
        )
    if model.graph.states:
        raise UsageError(f"{model.name} has states, and a roofline needs a model without states")
    return roofline_of(model, sizes, time_calls(exe, draw_inputs(model.graph, sizes, [seed]), rounds))


def roofline_of(model: Compiled, sizes: Mapping[str, int], calls: list[TimedCall]) -> Roofline:
    """Compare the timed calls of a run of a model of the TVM backend with the machine's limits."""
    exe = model.executable
    assert isinstance(exe, KernelExecutable)
    held = exe.nbytes
    rows = list(_rows(model, calls))
    isa = isa_of(model.target)
    rates = {d: measure_unit(d, isa, exe.threads) for d in DTYPES if any(row.dtype == d for row in rows)}
    for row in rows:  # if a kernel was faster, the measured rate was too low, as on a busy machine
        rates[row.dtype] = max(rates[row.dtype], row.flops / row.seconds)
    read = measured_read(held)
    bounded = [replace(row, least=max(row.flops / rates[row.dtype], row.bytes / read)) for row in rows]
    return Roofline(model.name, str(model.target), exe.threads, dict(sizes), tuple(bounded), rates, read, held)


def _rows(model: Compiled, calls: list[TimedCall]) -> Iterator[KernelRow]:
    """Yield a row for each kernel at its sizes. Minimum times are not set yet."""
    lowered = model.optimized.lowered
    assert lowered is not None
    assert lowered.plan is not None
    groups = {step.root: step.nodes for plan in lowered.plan.functions.values() for step in plan.steps}
    exe = model.executable
    assert isinstance(exe, KernelExecutable)
    titles = unique_titles(exe.kernels)
    alike: dict[tuple[str, tuple[int, ...], Node | None], list[TimedCall]] = {}
    for call in calls:
        sizes = tuple([size.evaluate(call.sizes) for size in call.step.sizes])
        alike.setdefault((titles[call.step.kernel], sizes, call.step.node), []).append(call)
    longest: dict[Node, float] = {}
    for (_, _, node), found in alike.items():
        if node is not None:
            longest[node] = max(longest.get(node, 0.0), _middle(found))
    rows: dict[tuple[str, str, int, int], KernelRow] = {}
    for (title, _, node), found in alike.items():
        step, at = found[0].step, found[0].sizes
        seconds = _middle(found)
        nodes = groups.get(node, ()) if node is not None and seconds == longest[node] else ()
        flops = sum(node_cost(each, at).flops for each in nodes)
        moved, dtype = _bytes(step, at), step.kernel.multiplies
        if nodes:  # a gather reads only some rows of its table
            moved = min(moved, sum(node_cost(each, at).bytes for each in nodes))
        what = "+".join(dict.fromkeys(n.op.name for n in nodes)) or (node.op.name if node is not None else "")
        source = describe_source(node.source, "") or "" if node is not None else ""
        row = KernelRow(title, what, len(found), seconds, flops, moved, dtype, 0.0, source)
        key = (title, what, flops, moved)
        rows[key] = _joined(rows.get(key), row)
    return iter(sorted(rows.values(), key=lambda row: -row.total))


def _joined(other: KernelRow | None, row: KernelRow) -> KernelRow:
    """Return the row of two places of the model that call the same kernel at the same sizes."""
    if other is None:
        return row
    calls = row.calls + other.calls
    return replace(other, calls=calls, seconds=(row.total + other.total) / calls, source=other.source or row.source)


def _middle(calls: list[TimedCall]) -> float:
    return float(np.median([call.seconds for call in calls]))


def _bytes(step: KernelStep, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a kernel's operands and results. Each storage counts once, with its largest view."""
    found: dict[int, int] = {}
    for view in step.pointers:
        if view.storage.kind is not StorageKind.STATUS:
            held = view.storage.elements.evaluate(sizes)
            shown = held
            if view.panels is None:
                shown = min(held, int(np.prod([n.evaluate(sizes) for n in view.shape], dtype=np.int64)))
            taken = shown * view.dtype.bytes
            found[id(view.storage)] = max(found.get(id(view.storage), 0), taken)
    return sum(found.values())
