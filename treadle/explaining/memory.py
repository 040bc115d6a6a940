"""`explain_memory`: the peak memory of a run, the storages that are alive at the peak and why, and how to lower it.

    print(explain_memory("gpt2", backend="tvm", sizes={"B": 8, "S": 512}))

The report follows from the storage plan and, on TVM, from the workspaces of single kernels. Weights, states, inputs and
outputs are counted separately, since they outlive the run or belong to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.explaining.layouts import lowered_for
from treadle.files.contained_files import read_regular
from treadle.files.shown_names import shown_path
from treadle.files.strict_json import read_json_object
from treadle.ir.builder import describe_source
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.storage.views import Storage
from treadle.ir.target import Target
from treadle.ir.wording.checked_calls import with_checked_methods
from treadle.passes.framework.manager import Optimized
from treadle.passes.memory.frame_placement import PlacedFrame, place_frames
from treadle.passes.memory.frames import ALIGNMENT, Frame, aligned, live_at, parts_of, peaks_of
from treadle.passes.memory.storage_plan import FunctionPlan, StoragePlan
from treadle.passes.memory.storage_plan import aligned as columns
from treadle.program.budgets import choose_sizes
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.reporting.counts import human, sizes_text


@dataclass(frozen=True)
class Alive:
    """A storage that is alive at the peak.

    function  the function that it belongs to
    name      the storage's name
    bytes     its size in bytes
    size      its size as an expression of the symbols
    why       the op that produces it, and the op that reads it last
    line      the user's line and the scope of the op that produces it
    saves     number of bytes by which the peak would be lower without it
    """

    function: str
    name: str
    bytes: int
    size: str
    why: str
    line: str
    saves: int

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@with_checked_methods()
@dataclass(frozen=True, eq=False)
class MemoryReport:
    """The memory that a run of a model needs at some sizes.

    peak      the maximum number of bytes alive at once; each storage is rounded up to a multiple of `unit` bytes
    arena     the size of the arena that holds all or some storages. None if a library allocates everything
    host      the output whose memory holds storages that die before it is written, or None
    foreign   the maximum number of bytes alive at once that a library allocates outside the arena
    at        the place of the peak: the functions and steps that lead to it
    step      the op that runs at the peak, with the user's line
    formula   expressions in bytes; the largest one is the peak, before storages are rounded
    alive     the storages that are alive at the peak, the largest first
    apart     bytes of weights, states, inputs and outputs
    storages  the bytes of every storage, by function and name
    donated   for each donated input, the storages that reuse its memory
    reorders  the savings of other orders of the ops than the program's
    frames    the storages and lifetimes of each function, with offsets if there is an arena
    target    the target; for a GPU, the report has the bytes of its memory
    """

    model: str
    backend: str
    sizes: Mapping[str, int]
    unit: int
    peak: int
    arena: int | None
    host: str | None
    foreign: int
    at: tuple[tuple[str, int], ...]
    step: str
    formula: tuple[str, ...]
    alive: tuple[Alive, ...]
    apart: Mapping[str, int]
    storages: Mapping[str, int]
    donated: tuple[str, ...]
    reorders: tuple[str, ...]
    frames: Mapping[str, Frame]
    placed: Mapping[str, PlacedFrame] | None
    target: Target

    @property
    def total(self) -> int:
        """Bytes of the device's memory: the peak, and weights, states, inputs and outputs."""
        return self.peak + sum(self.apart.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "backend": self.backend,
            "sizes": dict(self.sizes),
            "peak": self.peak,
            "arena": self.arena,
            "host": self.host,
            "foreign": self.foreign,
            "lower_bound": self.peak if self.host is None or self.placed is None else self.placed[self.at[0][0]].bound,
            "at": [list(each) for each in self.at],
            "step": self.step,
            "formula": list(self.formula),
            "alive": [each.as_dict() for each in self.alive],
            "apart": dict(self.apart),
            "storages": dict(self.storages),
            "donated": list(self.donated),
            "reordered": list(self.reorders),
            "target": str(self.target),
            "total": self.total,
        }

    def __str__(self) -> str:
        where = f" at {sizes_text(self.sizes)}" if self.sizes else ""
        lines = [f"{self.model} for {self.backend}{where}: {human(self.peak, 'B')} at the peak ({self.peak:,} bytes)"]
        if self.arena is None:
            lines.append(f"{self.backend} allocates each array by itself: the memory alive at once, and its cache")
        elif self.foreign:
            lines.append(f"one arena of {self.arena:,} bytes for results that are written at planned offsets")
            theirs = f"{self.foreign:,} bytes at once"
            lines.append(f"outside it, calls of {self.backend} allocate their results: at most {theirs}")
        elif self.host is not None:
            lines.append(
                f"one arena of {self.arena:,} bytes for values that are alive when {self.host} is written, or later"
            )
            lines.append(f"values that die earlier share the memory of {self.host}, which a run allocates anyway")
        else:
            over = "equal to" if self.arena == self.peak else f"{self.arena / self.peak - 1:.2%} above"
            lines.append(f"one arena of {self.arena:,} bytes, {over} the peak, the lower bound")
        parts = [f"{name} {human(count, 'B')}" for name, count in self.apart.items() if count]
        lines.append("not included: " + ", ".join(parts))
        if self.target.kind == "cuda":
            has = f" of its {human(self.target.hardware.memory, 'B')}" if self.target.is_elsewhere else ""
            lines.append(f"in the memory of {self.target}: {human(self.total, 'B')}{has} ({self.total:,} bytes)")
        several = "the largest of " if len(self.formula) > 1 else ""
        lines.append(f"at any sizes the peak is {several}{', '.join(self.formula)} bytes")
        lines += [*self.donated, *self.reorders]
        steps = ", ".join(f"step {at} of {name}" for name, at in self.at)
        lines += ["", f"alive at {steps}: {self.step}"]
        head = ("storage", "of", "bytes", "share", "without it the peak is lower by", "why")
        rows = [head] + [
            (
                each.name,
                each.function,
                f"{each.bytes:,}",
                f"{each.bytes / max(self.peak, 1):.0%}",
                f"{each.saves:,}",
                each.why,
            )
            for each in self.alive
        ]
        sources = ["", *(each.line for each in self.alive)]
        lines += ["  " + "  ".join([*row, source]).rstrip() for row, source in zip(columns(rows), sources, strict=True)]
        return "\n".join(lines)


def explain_memory(model: AnyModel, **options: Any) -> MemoryReport:
    """Describe the memory of a run of the model that MODEL names. Options as in `treadle.compile`.

    `sizes` are the sizes of the run, by default 1 for a batch and 128 for other axes. With `memory`, the run is the one
    that fits that budget.

    Raises as `compile` does; UsageError for a backend that does not plan storage, and for sizes outside their bounds.
    """
    options = {**options, "sizes": options.get("sizes") or None}
    chosen = CompileOptions.of("explain memory", options)
    backend, name, lowered = lowered_for(model, chosen if chosen.memory is not None else chosen.but(sizes=None))
    return memory_of_lowered(name, backend.name, lowered, chosen.where, chosen.sizes or {})


def memory_of_lowered(
    name: str, backend: str, lowered: Optimized | None, target: Target, sizes: Mapping[str, int]
) -> MemoryReport:
    """Describe the memory of a run of a backend's program at sizes of its symbols.

    Raises UsageError for a backend that does not plan storage, and for sizes outside their bounds.
    """
    found = None if lowered is None or lowered.plan is None else find_backend(backend)
    if lowered is None or lowered.plan is None or not isinstance(found, StagedBackend):
        raise UsageError(f"backend {backend} does not plan storage", hint="numpy, torch or tvm")
    frames, chosen = found.frames(lowered.graph, target, lowered.plan), choose_sizes(lowered.graph, sizes)
    return memory_of(name, backend, lowered.graph, lowered.plan, frames, chosen, target)


def memory_of(
    model: str,
    backend: str,
    graph: Graph,
    plan: StoragePlan,
    frames: Mapping[str, Frame],
    sizes: Mapping[str, int],
    target: Target,
) -> MemoryReport:
    """Describe the memory of a run of a lowered graph at sizes for all of its symbols."""
    unit = ALIGNMENT if plan.strided else 1
    entry = graph.main.name
    live = live_at(frames, entry, sizes, unit)
    at, peak = max(live, key=lambda each: each[1], default=(((entry, 0),), 0))
    alive = []
    for name, step in at:
        for life in frames[name].alive(step):
            count = aligned(life.storage.nbytes.evaluate(sizes), unit)
            without = max((n for _, n in live_at(frames, entry, sizes, unit, life.storage)), default=0)
            why, node = _why(life.storage, plan.functions[name], frames[name])
            line = "" if node is None else describe_source(node.source, node.scope) or ""
            size = str(life.storage.nbytes)
            alive.append(Alive(name, life.storage.name, count, size, why, line, peak - without))
    inside, beside = parts_of(frames)
    placed = place_frames(inside, sizes) if plan.strided or any(frame.lives for frame in inside.values()) else None
    return MemoryReport(
        model,
        backend,
        sizes,
        unit,
        peak,
        None if placed is None else placed[entry].size,
        None if placed is None else _host(placed[entry], plan.functions[entry]),
        max((count for _, count in live_at(beside, entry, sizes, 1)), default=0),
        at,
        _step(frames[at[-1][0]], at[-1][1]),
        tuple(str(size) for size in _largest_first(peaks_of(frames, graph.symbols)[entry], sizes)),
        tuple(sorted((each for each in alive if each.bytes), key=lambda each: -each.bytes)),
        _apart(graph, sizes),
        {
            f"{name}.{life.storage.name}": life.storage.nbytes.evaluate(sizes)
            for name, frame in frames.items()
            for life in frame.lives
        },
        tuple(_donated(plan.functions[entry])),
        tuple(f"{name}: {each.reordered}" for name, each in plan.functions.items() if each.reordered is not None),
        frames,
        placed,
        target,
    )


def _largest_first(sizes: Sequence[Any], at: Mapping[str, int]) -> list[Any]:
    return sorted(sizes, key=lambda size: -size.evaluate(at))


def _apart(graph: Graph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of weights, states, inputs and outputs."""

    def total(values: Sequence[Value]) -> int:
        return sum(value.type.bytes_at(sizes) for value in values)

    main = graph.main
    return {
        "weights": total(list(graph.entry_parameters.values())),
        "states": total(list(graph.states.values())),
        "inputs": total(main.inputs),
        "outputs": total(list(main.outputs.values())),
    }


def _host(placed: PlacedFrame, plan: FunctionPlan) -> str | None:
    return next((name for name, storage in plan.results.items() if storage is placed.host), None)


def _donated(plan: FunctionPlan) -> Iterator[str]:
    """Yield a line of text for each donated input, on the values that are written over it."""
    for value in plan.donated:
        storage = plan.places[value].storage
        over = [plan.names[v] for v, place in plan.places.items() if place.storage is storage and place.is_written]
        back = [name for name, given in plan.given_back.items() if given is value]
        back += list(plan.results) if value in plan.reuses[:1] else []
        reasons = "; ".join(
            [
                f"{' and '.join(over)} written over it" if over else "nothing is written over it",
                *(f"it is returned as output {name}" for name in back),
            ]
        )
        yield f"input {plan.names[value]} is donated: {reasons}"


def _step(frame: Frame, at: int) -> str:
    """Describe the op that runs at a step, with the user's line."""
    node = frame.steps[at] if at < len(frame.steps) else None
    if node is None:
        return "outputs are returned"
    return f"{_named(node)}  {describe_source(node.source, node.scope) or ''}".rstrip()


def _why(storage: Storage, plan: FunctionPlan, frame: Frame) -> tuple[str, Node | None]:
    """Return text on a storage's producer and last reader, and the node that produces it."""
    held = [value for value, place in plan.places.items() if place.storage is storage and value.node is not None]
    if not held:
        life = next(each for each in frame.lives if each.storage is storage)
        node = frame.steps[life.first]
        return ("a kernel's workspace" if node is None else f"a kernel of {node.op.name} needs it"), node
    made = min(held, key=lambda value: plan.places[value].first)
    last = max(held, key=lambda value: plan.places[value].last)
    assert made.node is not None
    end = plan.places[last].last
    if end >= plan.end:
        return f"produced by {_named(made.node)}, returned", made.node
    reader = plan.steps[end].root
    through = "" if last is made else f" as {plan.names[last]}"
    return f"produced by {_named(made.node)}, read last{through} by {_named(reader)}", made.node


def _named(node: Node) -> str:
    """Return an op's name; for a call, the name of the callee's scope."""
    return node.op.name if node.op.callee is None else f"the call {node.scope or node.op.callee}"


_MOST_BYTES = 64 << 20  # limit on a file to compare with

# -- two builds ----------------------------------------------------------------------------------------------------


def read_memory(path: Path) -> dict[str, Any]:
    """Read the output of `explain memory --json` from a file. Raises CheckpointError if it is not a JSON object."""
    return read_json_object(read_regular(path, _MOST_BYTES), shown_path(path), nesting=16, values=1_000_000)


def compare_memory(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Describe the differences between two reports, each as returned by `MemoryReport.as_dict` (or written by
    `--json`): what grew and what shrank.

    Raises UsageError if a report has another form, or if their sizes differ.
    """
    for each in (before, after):
        counts = (
            [each.get("peak"), *storages.values()] if isinstance(storages := each.get("storages"), dict) else [None]
        )
        if not all(isinstance(count, int) for count in counts):
            raise UsageError("this is not the output of explain memory --json", received=", ".join(map(str, each))[:80])
    if before.get("sizes") != after.get("sizes"):
        raise UsageError(
            "two builds must be compared at the same sizes",
            received=f"{before.get('sizes')} and {after.get('sizes')}",
            hint=Hint("the same sizes as before", "the same --sizes as before"),
        )
    was, now = before["storages"], after["storages"]
    lines = [f"peak {before['peak']:,} -> {after['peak']:,} bytes ({after['peak'] - before['peak']:+,})"]
    changed = [(now.get(name, 0) - was.get(name, 0), name) for name in {**was, **now}]
    for change, name in sorted((each for each in changed if each[0]), key=lambda each: (-each[0], each[1])):
        count_text = "new" if name not in was else "gone" if name not in now else f"{was[name]:,} -> {now[name]:,}"
        lines.append(f"  {name}  {change:+,} bytes  {count_text}")
    return "\n".join(lines)
