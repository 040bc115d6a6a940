"""`predict_roofline`: the least time of each kernel on hardware that need not be here, from its record of hardware.

    print(predict_roofline("bert", {"B": 1, "S": 128}, target="h100"))
    print(predict_step_roofline("smollm2", rows=16, past=128, target="h100"))

No weight is read and no kernel is compiled. Operations and bytes of a kernel are counted as in
`treadle.benching.roofline`. Its least time is the larger of two times (Williams et al. 2009):

    operations divided by the hardware's rate for float32: no kernel for devices uses a matrix unit
    bytes divided by the bandwidth of the hardware's memory: caches are not modelled

The result is a lower bound, which no run confirms. The time between launches is not included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from treadle.backends.staged import needed_plan
from treadle.backends.tvm.backend import TvmBackend
from treadle.backends.tvm.lowering.program import kernels_of
from treadle.backends.tvm.placed_calls import FixedSpaces, place_calls
from treadle.backends.tvm.profiling import TimedCall
from treadle.benching.roofline import KernelRow, no_kernels, past_of_step, rows_of_calls
from treadle.explaining.layouts import lowered_for, optimized_for
from treadle.ir.errors import UsageError
from treadle.ir.hardware import Hardware
from treadle.ir.target import Target
from treadle.passes.framework.manager import Optimized
from treadle.passes.stages import DeriveStep, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.budgets import choose_sizes, step_sizes
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.reporting.counts import human, rate_text, sizes_text


@dataclass(frozen=True)
class PredictedRoofline:
    """All kernels of a run with their least times on a device, the longest first.

    hardware  the record of the device
    rows      the kernels; `seconds` and `least` of a row are the predicted time of a launch
    """

    model: str
    target: str
    sizes: Mapping[str, int]
    hardware: Hardware
    rows: tuple[KernelRow, ...]

    @property
    def seconds(self) -> float:
        """The least seconds of all launches."""
        return sum(row.total for row in self.rows)

    @property
    def launches(self) -> int:
        """The number of launches of a run."""
        return sum(row.calls for row in self.rows)

    def bound(self, row: KernelRow) -> str:
        """Return the part of the device that determines a kernel's time: `compute` or `memory`."""
        return "compute" if row.flops / self.hardware.rates["f32"] > row.bytes / self.hardware.bandwidth else "memory"

    def as_dict(self) -> dict[str, Any]:
        """Return the prediction as plain data."""
        names = ("kernel", "what", "calls", "flops", "bytes", "least", "source")
        return {
            "model": self.model,
            "target": self.target,
            "sizes": dict(self.sizes),
            "predicted": True,
            "rates": dict(self.hardware.rates),
            "bandwidth": self.hardware.bandwidth,
            "launches": self.launches,
            "least": self.seconds,
            "kernels": [
                {**{name: getattr(row, name) for name in names}, "bound": self.bound(row)} for row in self.rows
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        hardware = self.hardware
        at = f" at {sizes_text(self.sizes)}" if self.sizes else ""
        least = f"{self.seconds * 1e3:.3g} ms in {self.launches} launches"
        yield f"{self.model}{at} on {self.target}, predicted, not measured: at least {least}"
        yield f"{hardware.description}: {human(hardware.bandwidth, 'B')}/s, {rate_text(hardware.rates['f32'], 'f32')}"
        if not Target(self.target).is_elsewhere:
            yield "these figures are orders of magnitude, not those of this machine's device"
        units = {dtype: rate for dtype, rate in hardware.rates.items() if dtype != "f32"}
        if units:
            peaks = ", ".join(rate_text(rate, dtype) for dtype, rate in units.items())
            yield f"the matrix unit, which kernels do not use yet: {peaks}"
        yield "the time between launches is not included"
        yield ""
        head = ("share", "launches", "us", "FLOP", "bytes", "bound by", "kernel")
        cells = [head, *map(self._cells, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head) - 1)]
        sources = ["", *(f"{row.what}  {row.source}".rstrip() for row in self.rows)]
        for row, source in zip(cells, sources, strict=True):
            numbers = [text.rjust(width) for text, width in zip(row, widths, strict=False)]
            yield "  ".join([*numbers, row[-1], source]).rstrip()

    def _cells(self, row: KernelRow) -> tuple[str, ...]:
        share = f"{row.total / self.seconds:.1%}" if self.seconds else ""
        numbers = f"{row.seconds * 1e6:.3g}", human(row.flops), human(row.bytes), self.bound(row)
        return share, str(row.calls), *numbers, row.kernel


def predict_roofline(model: AnyModel, sizes: Mapping[str, int] | None = None, **options: Any) -> PredictedRoofline:
    """Predict the least times of the kernels of a run. Options as in `treadle.compile`; the backend is tvm.

    sizes  sizes of the symbolic axes, also for a budget `memory`; by default 1 for a leading axis and 128 for others

    Raises as `compile` does; UsageError for another backend.
    """
    of_budget = {"sizes": sizes} if "memory" in options else {}
    chosen = CompileOptions.of("compile", {"backend": "tvm", **options, **of_budget})
    backend, name, lowered = lowered_for(model, chosen)
    if not isinstance(backend, TvmBackend):
        raise no_kernels(backend.name)
    found = choose_sizes(lowered.graph, sizes or {})
    return _predicted(name, backend, lowered, chosen, lowered.graph.main.name, found, found)


def predict_step_roofline(
    model: AnyModel, *, rows: int = 1, past: int | None = None, **options: Any
) -> PredictedRoofline:
    """Predict the least times of the kernels of a decoding step. Options as in `treadle.compile`.

    rows  number of rows, each of which gets one token
    past  number of tokens that each row has already; all kernels read caches of this length. None: see
          `past_of_step`

    Raises as `compile` does; UsageError for another backend, and for more tokens than the model takes.
    """
    chosen = CompileOptions.of("compile", {"backend": "tvm", **options})
    if chosen.backend != "tvm":
        raise no_kernels(chosen.backend)
    if chosen.memory is not None:
        raise UsageError("a decoding step takes no memory budget", hint="leave memory out")
    name, optimized = optimized_for(model, chosen)
    derived = run(optimized, [DeriveStep()]).products[DerivedStep]
    past = past_of_step(derived.context, past)
    backend = TvmBackend()
    lowered = backend.lower(derived.graph, chosen.where)
    asked = {"rows": rows, "past": past}
    return _predicted(f"a step of {name}", backend, lowered, chosen, "step", step_sizes(derived, rows, past), asked)


def _predicted(
    name: str,
    backend: TvmBackend,
    lowered: Optimized,
    options: CompileOptions,
    entry: str,
    sizes: Mapping[str, int],
    title_sizes: Mapping[str, int],
) -> PredictedRoofline:
    target = options.where
    plan = needed_plan(lowered.plan, backend.name)
    program = backend.program_of(lowered.graph, target, plan)
    spaces: dict[Any, int] = {}
    calls = []
    for call in place_calls(program.entries[entry], sizes, FixedSpaces(program).of(program.entries[entry])).calls:
        addresses = tuple((spaces.setdefault(p.space, len(spaces)) << 50) + p.at for p in call.pointers)
        moved = sum(p.storage.nbytes.evaluate(sizes) for p in {p.storage: p for p in call.pointers}.values())
        seconds = target.seconds(call.step.kernel.flops(call.sizes), moved)
        calls.append(TimedCall(call.step, seconds, sizes, addresses))
    hardware = target.hardware
    rows = []
    for row in rows_of_calls(plan, kernels_of(program), calls):
        least = target.seconds(row.flops, row.bytes)
        rows.append(replace(row, seconds=least, least=least))
    ordered = tuple(sorted(rows, key=lambda row: -row.total))
    return PredictedRoofline(name, str(target), dict(title_sizes), hardware, ordered)
