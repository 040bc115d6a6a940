"""Fused attentions in Hugging Face's exports, compared with ONNX Runtime's optimizer on the same files.

    python benchmarks/fusion.py [--only bert-dynamo,script] [--folder exports] [--json]
    python benchmarks/fusion.py --scale [--profile]

The files are those of benchmarks/hf_exports.py: 18 models, two exporters, two of Hugging Face's attentions, two opsets.
Each is imported, optimized, run on PyTorch, and compared with ONNX Runtime on the file itself: at two sets of sizes,
and with padding on the right, on the left, and of a whole sequence. Attentions that are not fused are listed with the
pass's reason. --folder keeps the files for the next run.

--scale times import and optimization of deep models: 24 layers of about 3,000 nodes in under 5 s, and 30,000 nodes in
under 60 s.

Exit status 1 if numbers differ, an export or an import fails, more attentions are not fused than EXPECTED_MISSING says,
or a target of --scale is missed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import dataclasses
import hashlib
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.hf_exports import EXAMPLE, Array, Case, answers, cases, draw, export, quiet
from treadle.backends.registry import find_backend
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.notes import Imported
from treadle.frontends.onnx_import.rules.elements import carried, restored
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.call import Call
from treadle.ir.target import Target
from treadle.passes.framework.manager import Optimized
from treadle.passes.sites.fusion_sites import find_sites
from treadle.passes.stages import MergeOps, Recognize, run

TOLERANCE = 2e-5
"""Relative to the largest number: float32 sums of some dozens of terms, through a few layers, in another order."""

OTHER = {"B": 3, "S": 9, "T": 4}
DRAWS = ((EXAMPLE, "right"), (OTHER, "right"), (EXAMPLE, "left"), (EXAMPLE, "all"))
"""The sizes of the axes, and the padded part of the last sequence; with padding on the left causal rows have no key."""

ZEROS = frozenset(("t5-encoder-dynamo-sdpa-23", "t5-decoder-dynamo-sdpa-23"))
"""Files in which all scores are the lowest number, which softmax averages, in ONNX's reference and in Hugging Face's
model; ONNX Runtime's Attention gives zeros there, and is not compared.
"""

EXPECTED_MISSING: Mapping[str, int] = {}
"""Cases in which some attentions are not fused today, and their number."""

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
HIDDEN = ("hidden_size", "n_embd", "dim", "d_model")
"""Names in configurations of the number of heads and the width."""

ORT_FUSED = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention")


@dataclass
class Row:
    """The results of one case.

    fused       attentions that are one op after our pipeline; `given` of these were one in the file already
    terms       the masks and biases of the fused ones, with their counts
    reasons     the reasons why the others are not fused, with their counts
    beside      unfused sites of other kinds, with their counts: rotary, linear, ...
    runtime     nodes of ONNX Runtime's fused attention operators after its optimizer, or -1 if it fails
    difference  from ONNX Runtime on the unchanged file, the largest over all sizes, relative to the largest number
    instead     why ONNX Runtime cannot run the file; the numbers are then compared with Hugging Face's model
    error       the failure, on our side or the exporter's
    """

    case: str
    expected: int
    fixed: bool = False
    nodes: int = 0
    fused: int = 0
    given: int = 0
    terms: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    runtime: int = -1
    runtime_error: str = ""
    difference: float = float("nan")
    instead: str = ""
    error: str = ""
    export_s: float = 0.0
    import_s: float = 0.0
    optimize_s: float = 0.0

    @property
    def missing(self) -> int:
        return self.expected - self.fused

    @property
    def bad(self) -> str:
        """Descriptions of the results that are worse than expected."""
        if self.error:
            return self.error
        if not self.difference <= TOLERANCE:
            return f"numbers differ by {self.difference:.1e}"
        known = EXPECTED_MISSING.get(self.case, 0)
        return f"{self.missing} are not fused, {known} expected" if self.missing > known else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains one of these words, separated by commas")
    parser.add_argument("--folder", type=Path, help="folder of kept exports (a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--profile", action="store_true", help="with --scale: where the time goes")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        kept = options.folder and options.folder / fingerprint()
        folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if options.scale:
            return scale(folder, options.profile)
        return recall(folder, [w for w in options.only.split(",") if w], options.json)


def fingerprint() -> str:
    """Return a fingerprint of the exports' inputs: the models' file and the exporters' versions.

    A kept file with another one is not read.
    """
    import onnxscript
    import torch
    import transformers

    source = Path(__file__).with_name("hf_exports.py").read_bytes()
    versions = f"{torch.__version__} {transformers.__version__} {onnxscript.__version__}"
    return hashlib.sha256(source + versions.encode()).hexdigest()[:12]


# -- recall -----------------------------------------------------------------------------------------------------


def recall(folder: Path, words: list[str], as_json: bool) -> int:
    chosen = [c for c in cases() if not words or any(w in str(c) for w in words)]
    rows = []
    if not as_json:
        print(
            f"{'model, exporter, attention, opset':36} {'nodes':>5} {'of':>3} {'ours':>5} {'ort':>5}  difference  terms"
        )
    for case in chosen:
        row = measure(case, folder)
        rows.append(row)
        if not as_json:
            print(line(row), flush=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        summary(rows)
    return 1 if any(row.bad for row in rows) else 0


def line(row: Row) -> str:
    """Return a row of the table, with a line below it for each reason."""
    runtime = "fails" if row.runtime < 0 else str(row.runtime)
    first = f"{row.case:36} {row.nodes:5} {row.expected:3} {row.fused:5} {runtime:>5}  {row.difference:10.1e}"
    first += "  " + "; ".join(f"{count} x {text or 'no terms'}" for text, count in row.terms.items())
    lines = [first]
    if row.given:
        lines.append(f"    {row.given} are one op in the file")
    if row.fixed:
        lines.append("    fixed sizes: the exporter failed with dynamic ones")
    if row.instead:
        lines.append(f"    held against Hugging Face, since ONNX Runtime cannot run the file: {row.instead}")
    if row.beside:
        lines.append("    open beside: " + ", ".join(f"{count} {kind}" for kind, count in row.beside.items()))
    if row.error:
        lines.append(f"    error: {row.error}")
    lines += [f"    {count} x {reason}" for reason, count in row.reasons.items()]
    if row.runtime_error:
        lines.append(f"    ONNX Runtime's optimizer: {row.runtime_error}")
    return "\n".join(lines)


def summary(rows: list[Row]) -> None:
    groups = {"all": rows}
    for row in rows:
        groups.setdefault(Case.parse(row.case).exporter, []).append(row)
    heads = ("", "files", "attentions", "given", "treadle", "ONNX Runtime")
    print("\n{:8} {:>5} {:>10} {:>6} {:>8} {:>13}    given: one op in the file".format(*heads))
    for name, part in groups.items():
        sums = [len(part), sum(r.expected for r in part), sum(r.given for r in part), sum(r.fused for r in part)]
        print("{:8} {:5} {:10} {:6} {:8} {:13}".format(name, *sums, sum(max(r.runtime, 0) for r in part)))
    held = [row.difference for row in rows if not row.error and not row.instead]
    if held:
        print(f"largest difference from ONNX Runtime {max(held):.1e} in {len(held)} files", end="")
        others = [row.difference for row in rows if row.instead]
        print(f"; from Hugging Face {max(others):.1e} in {len(others)}" if others else "")
    reasons: collections.Counter[str] = collections.Counter()
    for row in rows:
        reasons.update(row.reasons)
    for reason, count in reasons.most_common():
        print(f"  {count:4} x {reason}")
    for row in rows:
        if row.bad:
            print(f"  WORSE THAN EXPECTED  {row.case}: {row.bad}")
        elif row.missing < EXPECTED_MISSING.get(row.case, 0):
            print(f"  better than EXPECTED_MISSING says  {row.case}: {row.missing} are not fused")


def measure(case: Case, folder: Path) -> Row:
    """Export, import, optimize, run and count one case; a failure is recorded in the row."""
    row = Row(str(case), case.attentions)
    path, marker = folder / f"{case}.onnx", folder / f"{case}.fixed"
    try:
        if not path.exists():
            started = time.perf_counter()
            row.fixed = export(case, folder).fixed
            row.export_s = time.perf_counter() - started
            if row.fixed:
                marker.touch()
        row.fixed = marker.exists()
    except Exception as error:  # from torch's exporter, which raises all kinds
        row.error = f"export: {in_a_line(error)}"
        return row
    try:
        started = time.perf_counter()
        found = import_onnx(path)
        row.import_s = time.perf_counter() - started
        started = time.perf_counter()
        optimized = run(found.graph, [Recognize(), MergeOps()])
        row.optimize_s = time.perf_counter() - started
        row.nodes = sum(found.notes.operators.values())
        row.given = attentions(found.graph)
        row.fused = attentions(optimized.graph)
        row.terms = dict(collections.Counter(terms(optimized.graph)))
        row.reasons = reasons(optimized)
        sites = find_sites(optimized.graph)
        row.beside = dict(collections.Counter(s.kind for s in sites if s.op is None and s.kind != "attention"))
        row.instead = runtime_refuses(case, path)
        draws = [d for d in DRAWS if d[0] is EXAMPLE or not row.fixed]
        row.difference = difference(case, path, found, optimized.graph, draws, with_runtime=not row.instead)
    except TreadleError as error:
        row.error = in_a_line(error)
    except Exception as error:  # a crash of ours: a row of the table, and a failure, but the others continue
        row.error = f"crash: {in_a_line(error)}"
    row.runtime, row.runtime_error = runtime_fuses(case, path)
    return row


def attentions(graph: Graph) -> int:
    """Count the attention ops in one run of the graph."""
    counts: dict[str, int] = {}

    def count(function: Function) -> int:
        if function.name not in counts:
            counts[function.name] = sum(
                count(graph.functions[node.op.function])
                if isinstance(node.op, Call)
                else int(isinstance(node.op, Attention))
                for node in function.nodes
            )
        return counts[function.name]

    return count(graph.main)


def terms(graph: Graph) -> list[str]:
    """The masks and biases of every attention in the graph's text, in program order: `causal, mask(b t)`."""
    return [", ".join(map(str, node.op.terms)) for _, node in graph.walk() if isinstance(node.op, Attention)]


def reasons(optimized: Optimized) -> dict[str, int]:
    """Return the pass's reasons why attentions were not fused. A site without a refusal counts as unexplained."""
    refusals: collections.Counter[str] = collections.Counter()
    for record in optimized.log:
        if record.name == "fuse-attention":
            refusals.update(e.reason for e in record.refusals if not e.reason.startswith("the mask "))
    open_sites = [site for site in find_sites(optimized.graph) if site.kind == "attention" and site.op is None]
    unexplained = len(open_sites) - refusals.total()
    return dict(refusals) | ({"no reason is given": unexplained} if unexplained > 0 else {})


def difference(
    case: Case,
    path: Path,
    found: Imported,
    graph: Graph,
    draws: Sequence[tuple[Mapping[str, int], str]] = DRAWS,
    *,
    with_runtime: bool = True,
) -> float:
    """Return the difference of our optimized graph on PyTorch from ONNX Runtime on the file.

    If ONNX Runtime cannot run the file, Hugging Face's model takes its place.

    It is the largest over all draws, each relative to the largest number there; infinite if only one side has NaN.
    """
    executable = find_backend("torch").compile(graph, Target("cpu"), found.weights)
    largest = 0.0
    for seed, (sizes, padding) in enumerate(draws, 1):
        inputs = draw(case, seed, sizes, padding)
        given = {name: carried(kind, inputs[name]) for name, kind in found.notes.inputs.items()}
        got = restored(found.notes.outputs["y"], executable(**given)["y"])
        asked = with_runtime and not (padding == "all" and str(case) in ZEROS)
        wanted = runtime_answers(path, inputs) if asked else answers(case, inputs)
        known = ~np.isnan(wanted)
        if got.shape != wanted.shape or not (known == ~np.isnan(got)).all() or not known.any():
            return float("inf")
        largest = max(largest, float(np.abs(got - wanted)[known].max() / np.abs(wanted)[known].max()))
    return largest


# -- ONNX Runtime -----------------------------------------------------------------------------------------------


def runtime_answers(path: Path, inputs: Mapping[str, Array]) -> Array:
    """Return ONNX Runtime's results for the unchanged file, without optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    known = {i.name for i in session.get_inputs()}
    (answer,) = session.run(["y"], {name: x for name, x in inputs.items() if name in known})
    return np.asarray(answer)


def runtime_refuses(case: Case, path: Path) -> str:
    """Return the reason why ONNX Runtime cannot run a file at the sizes of its export; empty if it can."""
    try:
        runtime_answers(path, draw(case, 1, EXAMPLE))
    except Exception as error:  # from ONNX Runtime, which has a class for each status
        return in_a_line(error)
    return ""


def runtime_fuses(case: Case, path: Path) -> tuple[int, str]:
    """Return the number of fused attention nodes after ONNX Runtime's optimizer, the best over its model types."""
    from onnxruntime.transformers import optimizer

    config = case.small.config
    heads = next(config[key] for key in HEADS if key in config)
    hidden = next(config[key] for key in HIDDEN if key in config)
    best, error = -1, ""
    for kind in case.small.ort:
        try:
            with quiet():
                model = optimizer.optimize_model(str(path), model_type=kind, num_heads=heads, hidden_size=hidden)
            best = max(best, sum(node.op_type in ORT_FUSED for node in model.nodes()))
        except Exception as raised:  # from the optimizer, which raises all kinds
            error = in_a_line(raised)
    return best, error if best < 0 else ""


def in_a_line(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# -- scale ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deep:
    """A deep model: its case, its configuration, its least number of nodes, and its time limit in seconds."""

    case: Case
    config: Mapping[str, Any]
    nodes: int
    limit_s: float


DEEP = (
    Deep(Case("bert", "script", "sdpa", 14), {"num_hidden_layers": 24}, 2900, 5.0),
    Deep(Case("llama", "script", "sdpa", 18), {"num_hidden_layers": 120}, 30000, 60.0),
)


def scale(folder: Path, profile: bool) -> int:
    """Time import and optimization of deep models; their weights are small."""
    failed = False
    for deep in DEEP:
        layers = deep.config["num_hidden_layers"]
        kept = folder / f"{deep.case}-{layers}-layers.onnx"
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=folder) as apart:
                export(deep.case, Path(apart), **deep.config).path.rename(kept)
        profiler = cProfile.Profile()
        processor, started = time.process_time(), time.perf_counter()
        if profile:
            profiler.enable()
        found = import_onnx(kept)
        imported = time.perf_counter()
        optimized = run(found.graph, [Recognize(), MergeOps()], certify=False)
        profiler.disable()
        done, processor = time.perf_counter(), time.process_time() - processor
        nodes, fused = sum(found.notes.operators.values()), attentions(optimized.graph)
        print(f"{deep.case}, {layers} layers, {nodes} nodes, {fused} attentions fused")
        print(
            f"  {'all':20} {done - started:6.2f} s   {processor:.2f} s of processor; under {deep.limit_s:.0f} s wanted"
        )
        print(f"  {'import':20} {imported - started:6.2f} s")
        for record in optimized.log:
            print(f"  {record.name:20} {record.seconds:6.2f} s   {record.before.total()} -> {record.after.total()} ops")
        rest = done - imported - sum(record.seconds for record in optimized.log)
        print(f"  {'copies, first check':20} {rest:6.2f} s")
        failed |= done - started > deep.limit_s or fused < layers or nodes < deep.nodes
        if profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
