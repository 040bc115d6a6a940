"""The roofline of a run: compare each distinct kernel with the machine's limits (Williams et al. 2009).

A kernel's operations are the operations of its nodes. Its bytes are the bytes of its operands and results, each counted
once. Its minimum time is the larger of two times:

    operations divided by the rate of the unit that multiplies their dtype, measured without loads (`measure_unit`)
    bytes divided by the rate of plain reads (`measure_read`)

Most activations are still in a cache, while weights come from memory. So the rate for an operand is the rate of a plain
read of as many bytes as the run has touched since it last touched this operand: the reuse distance.
`treadle.benching.measured_roofline` runs a model and times its kernels; `predicted_roofline` needs no run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import isa_of
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.read_rate import LEAST, measure_read
from treadle.backends.tvm.kernels.unit_rate import measure_unit
from treadle.backends.tvm.lowering.listing import unique_titles
from treadle.backends.tvm.profiling import TimedCall
from treadle.ir.analysis.cost import kernel_cost
from treadle.ir.builder import describe_source
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Node
from treadle.ir.storage.views import StorageKind
from treadle.ir.target import Target
from treadle.passes.memory.storage_plan import StoragePlan
from treadle.reporting.counts import human, rate_text, sizes_text

DTYPES = ("f32", "bf16", "int8")
"""The dtypes of products. Each has its own rate."""


@dataclass(frozen=True)
class KernelRow:
    """A kernel at its sizes.

    calls     number of calls in a run
    seconds   median seconds of one call
    flops     operations of one call
    traffic   bytes of one call by their reuse distance (`reuse_distances`); of the call with the shortest distances
    dtype     the dtype of its products: f32, bf16 or int8
    least     the minimum seconds of one call at the machine's rates
    source    the user's line of the last node that it computes
    """

    kernel: str
    what: str
    calls: int
    seconds: float
    flops: int
    traffic: Mapping[int, int]
    dtype: str
    least: float
    source: str

    @property
    def bytes(self) -> int:
        """The bytes of one call."""
        return sum(self.traffic.values())

    @property
    def total(self) -> float:
        """Total seconds of its calls."""
        return self.calls * self.seconds


@dataclass(frozen=True)
class Roofline:
    """All kernels of a run, the longest first.

    rates  operations per second of each dtype, on the same number of threads: the multiply unit's, or a faster kernel's
    reads  bytes per second by reuse distance, on the same number of threads: of a plain read of as many bytes, or a
           faster kernel's
    held   bytes of the model's weights and arena
    """

    model: str
    target: str
    threads: int
    sizes: Mapping[str, int]
    rows: tuple[KernelRow, ...]
    rates: Mapping[str, float]
    reads: Mapping[int, float]
    held: int

    @property
    def read(self) -> float:
        """Bytes per second of a plain read of the bytes that a run touches."""
        return self.reads[max(self.reads)]

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
            "reads": {str(count): rate for count, rate in self.reads.items()},
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
        yield f"this machine multiplies {' and '.join(peaks)}"
        reads = ", ".join(f"{human(rate, 'B')}/s of {human(count, 'B')}" for count, rate in self.reads.items())
        yield f"it reads, by the bytes since the same values were last read: {reads}"
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


def roofline_of(
    name: str,
    target: Target,
    plan: StoragePlan,
    executable: KernelExecutable,
    sizes: Mapping[str, int],
    calls: Sequence[TimedCall],
) -> Roofline:
    """Compare the timed calls of a run with the machine's limits.

    name   the model's name, for the title
    plan   the storage plan of the executable's graph
    sizes  the sizes of the run, for the title
    """
    isa, threads = isa_of(target), executable.threads
    rows = list(rows_of_calls(plan, executable.kernels, calls))
    rates = {d: measure_unit(d, isa, threads) for d in DTYPES if any(row.dtype == d for row in rows)}
    for row in rows:  # if a kernel was faster, the measured rate was too low, as on a busy machine
        rates[row.dtype] = max(rates[row.dtype], row.flops / row.seconds)
    distances = sorted({distance for row in rows for distance in row.traffic})
    reads = _raised({distance: measure_read(distance, isa, threads) for distance in distances}, rows)
    bounded = [replace(row, least=max(row.flops / rates[row.dtype], _moving(row, reads))) for row in rows]
    return Roofline(name, str(target), threads, dict(sizes), tuple(bounded), rates, reads, executable.nbytes)


def _raised(reads: Mapping[int, float], rows: Sequence[KernelRow]) -> dict[int, float]:
    """Return the rates by distance, in order. A rate is raised to the rate at a longer distance, and so far that no
    kernel moves its bytes faster: on a busy machine the measured rates may be too low.
    """
    found: dict[int, float] = {}
    for count in sorted(reads, reverse=True):
        found[count] = max(reads[count], *found.values(), *(_far(row, count) / row.seconds for row in rows))
    return dict(reversed(found.items()))


def _far(row: KernelRow, distance: int) -> int:
    """Return the bytes of a kernel whose reuse distance is this or longer."""
    return sum(count for reach, count in row.traffic.items() if reach >= distance)


def _moving(row: KernelRow, reads: Mapping[int, float]) -> float:
    """Return the least seconds to move a kernel's bytes. At each distance, these are the bytes that are as far or
    farther, at the rate of this distance.
    """
    return max((_far(row, distance) / reads[distance] for distance in row.traffic), default=0.0)


def reuse_distances(touched: Sequence[Mapping[int, int]]) -> list[dict[int, int]]:
    """Return for each call of a run the bytes of its operands and results by their reuse distance.

    touched  for each call, the bytes at each address

    The distance is the number of bytes that calls have touched since the last call that touched an operand, and the
    operand's own bytes. It is rounded down to a power of two. Runs follow each other, so that the first call follows
    the last.
    """
    recent: dict[int, tuple[int, int]] = {}  # by address, the bytes and the call; the last touched last
    found: list[dict[int, int]] = []
    for number, spans in enumerate([*touched, *touched]):
        traffic: dict[int, int] = {}
        for start, count in spans.items():
            passed: dict[int, int] = {}
            for at in reversed(recent):
                length, call = recent[at]
                if start < at + length and at < start + count:
                    passed.pop(call, None)  # a call touches its operands at the same time
                    break
                passed[call] = passed.get(call, 0) + length
            distance = 1 << (max(sum(passed.values()) + count, LEAST).bit_length() - 1)
            traffic[distance] = traffic.get(distance, 0) + count
        for start, count in spans.items():
            recent.pop(start, None)
            recent[start] = count, number
        if number >= len(touched):
            found.append(traffic)
    return found


_PAST = 128
"""Tokens that the rows of a step have already, by default."""


def past_of_step(context: int | None, past: int | None) -> int:
    """Return the number of tokens that the rows of a step have already.

    context  the maximum number of tokens of a row; None: any number
    past     None: 128, or context - 1 if that is less

    Raises UsageError for a number below 1, and for one that leaves no room for the step's token.
    """
    past = min(_PAST, _PAST if context is None else context - 1) if past is None else past
    if past < 1:
        what = "rows of a step have 1 token or more"
        raise UsageError(what, received=f"past={past}", hint=Hint("past=1", "--past 1"))
    if context is not None and past >= context:
        raise UsageError(
            "a step has one token more than the rows have already",
            received=f"past={past}, and the model takes {context} positions",
            hint=Hint(f"past={context - 1} or less", f"--past {context - 1} or less"),
        )
    return past


def no_kernels(backend: str) -> UsageError:
    return UsageError(
        f"a roofline needs kernels, and the {backend} backend calls a library",
        hint=Hint('backend="tvm"', "--backend tvm"),
    )


def rows_of_calls(plan: StoragePlan, kernels: Sequence[Kernel], calls: Sequence[TimedCall]) -> Iterator[KernelRow]:
    """Yield a row for each kernel of a run at its sizes, the longest first. Minimum times are not set yet.

    The nodes that several kernels of the run compute count for the kernel that takes longest.
    """
    groups = {step.root: step.nodes for each in plan.functions.values() for step in each.steps}
    titles = unique_titles(kernels)
    alike: dict[tuple[str, tuple[int, ...], Node | None], list[int]] = {}
    for number, call in enumerate(calls):
        sizes = tuple([size.evaluate(call.sizes) for size in call.step.sizes])
        alike.setdefault((titles[call.step.kernel], sizes, call.step.node), []).append(number)
    seconds = {key: float(np.median([calls[n].seconds for n in numbers])) for key, numbers in alike.items()}
    longest: dict[Node, float] = {}
    for (_, _, node), taken in seconds.items():
        if node is not None:
            longest[node] = max(longest.get(node, 0.0), taken)
    computed = {
        key: groups.get(key[2], ()) if key[2] is not None and seconds[key] == longest[key[2]] else () for key in alike
    }
    touched = [dict[int, int]()] * len(calls)
    for key, numbers in alike.items():
        for number in numbers:
            touched[number] = touched_bytes(calls[number], computed[key])
    traffic = reuse_distances(touched)
    rows: dict[tuple[str, str, int, int], KernelRow] = {}
    for key, numbers in alike.items():
        (title, _, node), nodes = key, computed[key]
        step, at = calls[numbers[0]].step, calls[numbers[0]].sizes
        flops = kernel_cost(nodes, at).flops
        what = "+".join(dict.fromkeys(n.op.name for n in nodes)) or (node.op.name if node is not None else "")
        source = describe_source(node.source, "") or "" if node is not None else ""
        nearest = min((traffic[number] for number in numbers), key=_reach)
        row = KernelRow(title, what, len(numbers), seconds[key], flops, nearest, step.kernel.multiplies, 0.0, source)
        place = (title, what, flops, row.bytes)
        rows[place] = _joined(rows.get(place), row)
    return iter(sorted(rows.values(), key=lambda row: -row.total))


def _joined(other: KernelRow | None, row: KernelRow) -> KernelRow:
    """Return the row of two places of the model that call the same kernel at the same sizes."""
    if other is None:
        return row
    calls, nearest = row.calls + other.calls, min(other.traffic, row.traffic, key=_reach)
    seconds, source = (row.total + other.total) / calls, other.source or row.source
    return replace(other, calls=calls, seconds=seconds, traffic=nearest, source=source)


def _reach(traffic: Mapping[int, int]) -> int:
    """Return a number that orders the bytes of calls of one kernel by their reuse distances."""
    return sum(distance * count for distance, count in traffic.items())


def touched_bytes(call: TimedCall, nodes: Sequence[Node]) -> dict[int, int]:
    """Return the bytes of a kernel's operands and results by their addresses; each storage counts once, by its largest
    view.

    nodes  the nodes that the kernel computes. A gather among them reads only some rows of its table
    """
    found: dict[int, tuple[int, int]] = {}
    for view, address in zip(call.step.pointers, call.addresses, strict=True):
        if view.storage.kind is not StorageKind.STATUS:
            shown = view.storage.elements.evaluate(call.sizes)
            if view.panels is None:
                shown = min(shown, int(np.prod([n.evaluate(call.sizes) for n in view.shape], dtype=np.int64)))
            start, count = found.get(id(view.storage), (address, 0))
            found[id(view.storage)] = min(start, address), max(count, shown * view.dtype.bytes)
    spans = dict(found.values())
    if nodes and spans:
        largest = max(spans, key=lambda start: spans[start])
        unread = sum(spans.values()) - kernel_cost(nodes, call.sizes).bytes
        spans[largest] -= min(max(unread, 0), spans[largest])
    return spans
