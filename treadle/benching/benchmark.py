"""`bench_model`: compare a model with other tools. Outputs are compared first. Then all sides run in turns.

    found = bench_model("bert", ["eager", "onnxruntime"], sizes={"S": 128}, threads=1)
    print(found.rows[1].ratio)      # eager's time divided by Treadle's

On a busy machine every run is slower. So sides run in turns, and a ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.onnx.exporter import export_onnx
from treadle.backends.registry import find_backend
from treadle.benching.serving import read_arrays, save_arrays
from treadle.benching.sides import LIMITS, PEERS, Side, peers_of
from treadle.benching.workload import Workload, files_of, opened
from treadle.ir.analysis.cost import Cost, graph_cost
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.passes.cleanup.cut_sooner import CutSooner
from treadle.passes.stages import MergeOps, Recognize, left_out, run
from treadle.program.budgets import choose_sizes

Array = np.ndarray[Any, Any]

_FOR_OTHERS = left_out([Recognize(), MergeOps()], [CutSooner().name])
"""The passes for the ONNX file that other tools read: all outputs of the model, in ops that they support."""


@dataclass(frozen=True)
class BenchRow:
    """The results of one side: Treadle or another tool.

    seconds     the median of its runs
    ratio       its time divided by Treadle's: the median over turns; 1 for Treadle
    between     the quartiles of these ratios
    difference  the largest difference of its outputs from Treadle's, relative to the largest element of Treadle's;
                infinite if one is NaN or infinite and the other is not; None if no output has the same shape
    opened      seconds until the end of its first run
    peak        peak resident bytes of its process
    """

    side: str
    note: str
    seconds: float
    ratio: float
    between: tuple[float, float]
    difference: float | None
    opened: float
    peak: int


@dataclass(frozen=True)
class MachineLimits:
    """The limits of the machine, measured with the benchmark's number of threads.

    rates   operations per second of each dtype, by the unit that multiplies it; for a backend without own kernels,
            NumPy's rate in float32
    read    bytes per second of a plain read
    kernels the minimum seconds of Treadle's kernels at these rates; None if there are none
    """

    rates: Mapping[str, float]
    read: float
    kernels: float | None

    def least(self, cost: Cost) -> float:
        """Return the minimum seconds of a run at these rates: of Treadle's kernels, or else of the graph's float32
        operations.
        """
        return max(cost.flops / self.rates["f32"], cost.bytes / self.read) if self.kernels is None else self.kernels


@dataclass(frozen=True)
class Benchmark:
    """The results of all sides for one workload.

    rows     the results, Treadle's first
    missing  for each peer that did not run, the reason
    cost     the number of operations, and the minimum of bytes read and written, of the graph that Treadle's options
             give: quantized weights cost their blocks
    machine  the limits of the machine
    """

    workload: Workload
    graph: Graph
    sizes: Mapping[str, int]
    rows: Sequence[BenchRow]
    missing: Mapping[str, str]
    cost: Cost
    machine: MachineLimits
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """Return the results as plain data."""
        return {
            "model": self.graph.name,
            "backend": self.workload.options.backend,
            "dtype": self.workload.options.dtype or "as declared",
            "quantize": self.workload.options.quantize,
            "threads": self.workload.threads,
            "sizes": dict(self.sizes),
            "rounds": self.rounds,
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "machine": {
                "flops_per_second": dict(self.machine.rates),
                "bytes_per_second": self.machine.read,
                "least_seconds": self.machine.least(self.cost),
            },
            "rows": [
                {
                    "side": row.side,
                    "note": row.note,
                    "seconds": row.seconds,
                    "times_ours": row.ratio,
                    "times_ours_between": list(row.between),
                    "difference": "inf" if row.difference == math.inf else row.difference,
                    "opened_seconds": row.opened,
                    "peak_bytes": row.peak,
                }
                for row in self.rows
            ],
            "missing": dict(self.missing),
        }


def bench_model(
    workload: Workload,
    against: Sequence[str],
    *,
    sizes: Mapping[str, int] | None = None,
    rounds: int = 15,
    python: str = sys.executable,
    emit: Callable[[str], None] = lambda line: None,
) -> Benchmark:
    """Compare a model with peers.

    against  names of peers (`PEERS`)
    sizes    sizes of the symbols; small ones by default
    rounds   number of turns, after one turn for warmup
    python   the Python interpreter for peers that do not need Treadle (all but PyTorch's), if this one lacks them
    emit     called with a line of text when a side is opened

    Raises UsageError for an unknown peer, dtype, scheme, Python interpreter or size, or if Treadle's side does not run;
    and as `treadle.compile` does for the model and the backend.
    """
    names = peers_of(list(against))
    find_backend(workload.options.backend)
    workload.options.stages()  # refuses unknown names
    if shutil.which(python) is None:
        raise UsageError(
            "there is no such Python interpreter",
            received=python,
            hint="the path of an interpreter, such as python3",
        )
    graph, weights = opened(workload)
    chosen = choose_sizes(graph, sizes or {})
    with tempfile.TemporaryDirectory() as place:
        spec = _spec(workload, graph, chosen, Path(place))
        sides: dict[str, Side] = {}
        missing: dict[str, str] = {}
        if readers := [name for name in names if PEERS[name].reads == "onnx"]:
            try:
                made = export_onnx(run(graph, _FOR_OTHERS).graph, weights, Path(place) / "model.onnx")
                spec |= {"onnx": str(made.path), "renamed": dict(made.inputs)}
            except TreadleError as error:
                remedy = f" ({error.hint})" if error.hint else ""
                missing = dict.fromkeys(readers, f"the model cannot be exported: {error.what}{remedy}")
        try:
            for name in ("treadle", *(name for name in names if name not in missing)):
                emit(f"opening {name}")
                is_other = name in PEERS and PEERS[name].reads != "torch"
                outputs = str(Path(place) / f"{name}.npz")
                side = Side({**spec, "side": name, "outputs": outputs}, python if is_other else sys.executable)
                if "missing" in side.answer:
                    missing[name] = side.answer["missing"]
                    side.close()
                    if name == "treadle":
                        raise UsageError(f"{graph.name} did not run", received=missing[name])
                else:
                    sides[name] = side
            machine = _machine(spec)  # while all other sides wait
            emit("running")
            times = _in_turns(sides, rounds)
            rows = [_row(name, side, times, Path(place)) for name, side in sides.items()]
        finally:
            for side in sides.values():
                side.close()
    options = workload.options
    cost = graph_cost(run(graph, options.stages(), target=options.where).graph, chosen)
    return Benchmark(workload, graph, chosen, rows, missing, cost, machine, rounds)


def _machine(spec: Mapping[str, Any]) -> MachineLimits:
    """Measure the machine's limits. Raises UsageError if that fails."""
    side = Side({**spec, "side": "limits"}, script=LIMITS)
    side.close()
    if "missing" in side.answer:
        raise UsageError("the machine's limits were not measured", received=side.answer["missing"])
    return MachineLimits(side.answer["rates"], side.answer["read"], side.answer["least"])


def _spec(workload: Workload, graph: Graph, sizes: Mapping[str, int], place: Path) -> dict[str, Any]:
    """Return the specification that is passed to every side's process."""
    save_arrays(place / "inputs.npz", draw_inputs(graph, sizes, [workload.options.seed]))
    folder, gguf = files_of(workload.model)
    return {
        "folder": folder and str(folder.resolve()),
        "gguf": gguf and str(gguf.resolve()),
        **workload.as_dict(),
        "sizes": dict(sizes),
        "inputs": str(place / "inputs.npz"),
    }


def _in_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Run the sides in turns, one run of each side per turn. Return the seconds of each side's runs."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            (seconds,) = side.run()
            if number:
                times[name].append(seconds)
    return times


def _row(name: str, side: Side, times: Mapping[str, Sequence[float]], place: Path) -> BenchRow:
    own = times.get("treadle", times[name])
    ratios = sorted(theirs / ours for theirs, ours in zip(times[name], own, strict=True))
    quarter = len(ratios) // 4
    return BenchRow(
        name,
        side.answer["note"],
        statistics.median(times[name]),
        statistics.median(ratios),
        (ratios[quarter], ratios[-1 - quarter]),
        None if name == "treadle" else difference(place / "treadle.npz", place / f"{name}.npz"),
        side.answer["opened"],
        side.peak(),
    )


def difference(ours: Path, theirs: Path) -> float | None:
    """Return the largest difference between the outputs of two files, relative to the largest element of ours. None if
    no output corresponds.

    An output of theirs corresponds to an output of ours if it has the same name, or if it is the only one of the same
    shape.
    """
    if not ours.exists():
        return None
    wanted, given, found = read_arrays(ours), read_arrays(theirs), []
    for name, array in wanted.items():
        alike = [x for x in given.values() if x.shape == array.shape]
        other = given.get(name, alike[0] if len(alike) == 1 else None)
        if other is not None and other.shape == array.shape and array.size:
            found.append(_apart(array.astype(np.float64), other.astype(np.float64)))
    return max(found, default=None)


def _apart(ours: Array, theirs: Array) -> float:
    """Return the largest difference relative to the largest element of ours. NaN equals NaN, and its difference from
    any number is infinite.
    """
    alike = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    finite = np.abs(ours[np.isfinite(ours)])
    with np.errstate(invalid="ignore"):
        gap = np.abs(ours - theirs)[~alike]
    return float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0)) / max(float(finite.max(initial=0.0)), 1e-30)
