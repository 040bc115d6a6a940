"""Peak memory of a run, compared with PyTorch's, ONNX Runtime's and that of TVM's own planner.

    python benchmarks/peaks.py [FAMILY ...] [--json]

Each family of the zoo at its own widths, with two layers (a stack's peak is that of one block), at three sizes. Counted
is the memory that a run allocates in addition to weights and inputs: outputs, intermediate values, and workspaces of
kernels.

    treadle      the arena that is planned for the TVM backend, one thread, and the outputs, whose memory also stores
                 values that die before they are written; the lower bound is the arena's peak of live bytes, and the
                 outputs
    PyTorch      the declared graph, op by op in PyTorch's own functions, each value freed after its last use: the
                 tensors' memory according to torch.profiler
    ONNX Runtime on the files that we export, with operators of opset 23, in which attention is one operator, and of 17,
                 where it fuses attention itself: the better of both. One thread; its arena and its memory pattern are
                 off, which would only add to the live bytes: the allocations of the C library (counted by a preloaded
                 library of ours, which needs a C compiler)
    TVM          on the file of opset 17, at these sizes, in which ONNX Runtime first folds sums of sizes, which TVM's
                 importer does not support, and ops on weights alone; then fusion as in its "zero" pipeline, and
                 StaticPlanBlockMemory: its planned storages, which `relax.analysis.estimate_memory_usage` adds up
                 as well, and the outputs

Each of the others runs in a process of its own. Ratios are ours divided by theirs: below 1, ours is smaller. A side
that cannot run a model reports why. Exit status 1 if ours is not the smallest; these rows are listed at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = ((1, 16), (1, 128), (8, 384))
"""Sizes of a leading axis and of all others, within their bounds."""
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"text": {"layers": 2}, "vision": {"layers": 2}},
    "llama": {"layers": 2, "dim": 2048, "hidden": 5632, "heads": 32},
    **{name: {"encoder_layers": 2, "decoder_layers": 2} for name in ("bart", "marian")},
    **{name: {"layers": 2, "decoder_layers": 2} for name in ("t5", "whisper")},
}
"""Options in addition to a family's defaults; llama's widths are those of a model of 1.1 billion weights."""
OTHERS = ("torch", "onnxruntime", "tvm")
NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "tvm": "TVM's planner"}
_SECONDS = 900
_SMALL = 1024
"""Bytes of a constant that the file itself holds: a larger one is a weight."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families of the zoo (all)")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--side", choices=OTHERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        print(json.dumps(SIDES[given.side](json.load(sys.stdin))))
        return 0
    from treadle.models.registry import family_names

    rows = []
    for name in given.families or family_names():
        rows += rows_of(name)
        if not given.json:
            for row in rows[-len(SIZES) :]:
                print(line(row), flush=True)
    larger = [(row, side) for row in rows for side in OTHERS if ratio(row, side) is not None and ratio(row, side) > 1]
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"\nours is the smallest in {len(rows) - len({id(row) for row, _ in larger})} of {len(rows)} rows")
        for row, side in larger:
            print(f"  not so: {row['model']} at {sizes_of(row['sizes'])}, {NAMES[side]}: {ratio(row, side):.3f}")
    return bool(larger)


def sizes_of(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())


def ratio(row: Mapping[str, Any], side: str) -> float | None:
    """Return our peak divided by theirs."""
    theirs = row[side]
    return None if isinstance(theirs, str) else row["peak"] / max(theirs, 1)


def line(row: Mapping[str, Any]) -> str:
    """Return a row as text."""
    cells = [
        f"{row['model']:<11} {sizes_of(row['sizes']):<22} {row['peak'] / 1e6:8.1f} MB,"
        f" at least {row['bound'] / 1e6:.1f}"
    ]
    for side in OTHERS:
        found = ratio(row, side)
        cells.append(
            f"{NAMES[side]} {row[side]}" if found is None else f"{NAMES[side]} {row[side] / 1e6:.1f} ({found:.3f})"
        )
    return "   ".join(cells)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a family."""
    from treadle.backends.onnx.exporter import export_onnx
    from treadle.backends.tvm.backend import TvmBackend
    from treadle.benching.workload import Workload, opened
    from treadle.ir.target import Target
    from treadle.passes.memory.frame_placement import place_frames
    from treadle.passes.stages import MergeOps, Recognize, run

    config = SETTINGS.get(name, {"layers": 2})
    declared, weights = opened(Workload(name, keywords={"config": config}))
    graph = run(declared, [Recognize(), MergeOps()]).graph
    target = Target("cpu", threads=1)
    lowered = TvmBackend().lower(graph, target)
    assert lowered.plan is not None
    frames = TvmBackend().frames(lowered.graph, target, lowered.plan)
    leading = {v.type.shape[0].as_symbol for v in graph.main.inputs if v.type.rank}
    rows: list[dict[str, Any]] = []
    for first, other in SIZES:
        sizes = {}
        for symbol, bounds in graph.symbols.items():
            size = max(bounds.lower, first if symbol in leading else other)
            sizes[symbol] = size if bounds.upper is None else min(size, bounds.upper)
        placed = place_frames(frames, sizes)["main"]
        outputs = sum(v.type.bytes_at(sizes) for v in graph.main.outputs.values())
        row = {"model": name, "sizes": sizes, "outputs": outputs}
        rows.append(row | {"peak": placed.size + outputs, "bound": placed.bound + outputs})
    with tempfile.TemporaryDirectory() as folder:
        made = export_onnx(graph, weights, Path(folder) / "model.onnx")
        plain = export_onnx(graph, weights, Path(folder) / "plain.onnx", opset=17, external_above=_SMALL)
        inputs = [
            [
                {
                    "name": value.name,
                    "onnx": made.inputs.get(value.name, value.name),
                    "shape": [size.evaluate(row["sizes"]) for size in value.type.shape],
                    "integer": value.type.dtype.is_int,
                }
                for value in graph.main.inputs
            ]
            for row in rows
        ]
        spec = {"model": name, "config": config, "files": [str(made.path), str(plain.path)], "inputs": inputs}
        spec["sizes"] = [row["sizes"] for row in rows]
        del weights
        for side in OTHERS:
            for row, found in zip(rows, in_child(side, spec, Path(folder)), strict=True):
                row[side] = found + row["outputs"] if side == "tvm" and not isinstance(found, str) else found
    return rows


def in_child(side: str, spec: Mapping[str, Any], folder: Path) -> list[int | str]:
    """Return the bytes of a side at each size, or the reason why there are none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if side == "onnxruntime":
        library = folder / "counted_allocations.so"
        source = Path(__file__).with_name("counted_allocations.c")
        try:
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return [f"needs a C compiler: {error}"] * len(spec["inputs"])
        environment |= {"LD_PRELOAD": str(library), "COUNTED": str(library)}
    command = [sys.executable, __file__, "--side", side]
    try:
        made = subprocess.run(
            command, input=json.dumps(spec), env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"took more than {_SECONDS} s"] * len(spec["inputs"])
    if made.returncode:
        last = (made.stderr.strip().splitlines() or [f"exit status {made.returncode}"])[-1]
        return [f"cannot: {last[:120]}"] * len(spec["inputs"])
    found: list[int | str] = json.loads(made.stdout.strip().splitlines()[-1])
    return found


def drawn(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draw arrays for each set of sizes, by the names of our inputs."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        {
            port["name"]: rng.integers(0, 100, port["shape"])
            if port["integer"]
            else rng.standard_normal(port["shape"]).astype(np.float32)
            for port in ports
        }
        for ports in spec["inputs"]
    ]


def torch_peaks(spec: Mapping[str, Any]) -> list[int | str]:
    """Measure PyTorch's peaks, each after a run that is not counted."""
    import torch

    from treadle.backends.python.executable import PythonExecutable
    from treadle.backends.staged import build
    from treadle.backends.torch.backend import PlainTorch
    from treadle.benching.workload import Workload, opened
    from treadle.ir.target import Target

    torch.set_num_threads(1)
    graph, weights = opened(Workload(spec["model"], keywords={"config": spec["config"]}))
    exe, _ = build(PlainTorch(), graph, Target("cpu", threads=1), weights)
    assert isinstance(exe, PythonExecutable)
    found: list[int | str] = []
    for arrays in drawn(spec):
        tensors = [torch.from_numpy(arrays[port.name]) for port in exe.inputs]
        with torch.inference_mode():
            exe.function(*tensors, exe.weights)
            kinds = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
                exe.function(*tensors, exe.weights)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        found.append(most)
    return found


def onnxruntime_peaks(spec: Mapping[str, Any]) -> list[int | str]:
    """Measure ONNX Runtime's peaks, each after a run that is not counted, on the file with the smaller peak."""
    import onnxruntime

    counter = ctypes.CDLL(os.environ["COUNTED"])
    counter.peak_begin.restype = counter.peak_bytes.restype = ctypes.c_long
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    files = [onnxruntime_of(path, options, spec, counter) for path in spec["files"]]
    return [min(each) for each in zip(*files, strict=True)]


def onnxruntime_of(path: str, options: Any, spec: Mapping[str, Any], counter: ctypes.CDLL) -> list[int]:
    """Measure the peaks of one file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = []
    for ports, arrays in zip(spec["inputs"], drawn(spec), strict=True):
        taken = 0
        for _ in range(2):
            binding = session.io_binding()
            for port in ports:
                binding.bind_cpu_input(port["onnx"], arrays[port["name"]])
            for output in session.get_outputs():
                binding.bind_output(output.name, "cpu")
            before = counter.peak_begin()
            session.run_with_iobinding(binding)
            taken = counter.peak_bytes() - before
            del binding
        found.append(taken)
    return found


def tvm_peaks(spec: Mapping[str, Any]) -> list[int | str]:
    """Return TVM's planned bytes for its own graph of the file, without the outputs."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    passes = [
        *(relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps()),
        *(relax.transform.FuseTIR(), relax.transform.LegalizeOps(), relax.transform.RewriteDataflowReshape()),
        *(relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking(), relax.transform.CallTIRRewrite()),
        relax.transform.StaticPlanBlockMemory(),
    ]
    found: list[int | str] = []
    for ports, sizes in zip(spec["inputs"], spec["sizes"], strict=True):
        try:
            shapes = {port["onnx"]: port["shape"] for port in ports}
            model = at_sizes(spec["files"][1], sizes)
            module = from_onnx(model, shape_dict=shapes, keep_params_in_input=True)
            with tvm.target.Target("llvm"):
                module = tvm.transform.Sequential(passes)(module)
            found.append(planned_storages(relax, module["main"]))
        except Exception as error:  # a failed import or lowering is reported in the row
            found.append(f"cannot: {type(error).__name__}: {str(error).strip().splitlines()[-1][:100]}")
    return found


def at_sizes(path: str, sizes: Mapping[str, int]) -> Any:
    """Return an ONNX model at numeric sizes, with all values folded that follow from these and from weights.

    Weights are inputs.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = f"{path}.at_sizes.onnx"
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "at_sizes.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(_SMALL))
    for symbol, size in sizes.items():
        options.add_free_dimension_override_by_name(symbol, size)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    outside = [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    for each in outside:
        model.graph.input.append(onnx.helper.make_tensor_value_info(each.name, each.data_type, list(each.dims)))
        model.graph.initializer.remove(each)
    return model


def planned_storages(relax: Any, function: Any) -> int:
    """Return the bytes of all storages that a function allocates."""
    sizes: list[int] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call) and getattr(expression.op, "name", "") == "relax.memory.alloc_storage":
            sizes.append(int(expression.args[0].values[0]))

    relax.analysis.post_order_visit(function, visit)
    return sum(sizes)


SIDES = {"torch": torch_peaks, "onnxruntime": onnxruntime_peaks, "tvm": tvm_peaks}


if __name__ == "__main__":
    sys.exit(main())
