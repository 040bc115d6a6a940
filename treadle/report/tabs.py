"""The tabs of the report. Each tab shows the result of a report of `treadle.explaining` or `treadle.reporting`.

A tab is {"data": ...}, {"missing": reason, "command": text} if nothing was measured or planned, or {"error": text} if
its report failed. A failed report does not affect the other tabs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.explaining.fusion_verdicts import ALREADY, FUSED, STATUSES, UNFUSED, judge
from treadle.explaining.layouts import layouts_of
from treadle.explaining.memory import memory_of
from treadle.explaining.sharding import ShardingReport
from treadle.explaining.step import step_of
from treadle.ir.analysis.cost import node_cost
from treadle.ir.analysis.run_counts import count_calls, count_run_ops
from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.attention.attention_terms import MaskTerm, Term
from treadle.ir.attention.seen_keys import live_pairs, reach_of
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.target import Target
from treadle.ir.transforms.encoded_weights import encoding_errors
from treadle.passes.budget.memory_fit import MemoryFit
from treadle.passes.sharding.timetable import Busy
from treadle.passes.sites.fusion_sites import KINDS
from treadle.passes.stepping.derivation import DerivedStep
from treadle.report.memory_tab import memory_facts
from treadle.report.programs import ReportProgram
from treadle.reporting.graphs import graph_facts

MOST_BUSY = 20_000
"""Limit on the entries of a timetable that are drawn."""

Tab = dict[str, Any]


def tab(make: Callable[[], Any]) -> Tab:
    """Return a tab with the result of `make`, or with its error."""
    try:
        return {"data": make()}
    except TreadleError as error:
        return {"error": str(error)}


def missing(reason: str, command: str) -> Tab:
    """Return a tab without data: the reason, and the command that would produce the data."""
    return {"missing": reason, "command": command}


def overview(program: ReportProgram, target: Target, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the facts of the model: parameters, cost, inputs and outputs, and the ops of a run.

    The ops are counted at three stages: as declared, after the last pass before the backend's, and as they run.
    """
    optimized = program.optimized
    fit = next((fit for record in optimized.stages if (fit := record.product(MemoryFit)) is not None), None)
    last = len(program.stages) - 1
    counts = {0: optimized.source, program.optimized_stage: optimized.graph, last: program.graph}
    runs = {at: count_run_ops(graph) for at, graph in counts.items()}
    names = sorted(set().union(*runs.values()), key=lambda name: (-runs[last][name], name))
    return {
        **graph_facts(optimized.graph, sizes),
        "backend": program.backend,
        "target": str(target),
        "cores": target.cores(),
        "passes": last,
        "stages": [[at, program.stages[at].name, count.total()] for at, count in runs.items()],
        "ops": {name: [count[name] for count in runs.values()] for name in names},
        **({} if fit is None else {"memory": fit.as_dict()}),
    }


def cost_facts(program: ReportProgram, sizes: Mapping[str, int], times: Mapping[Node, float]) -> dict[str, Any]:
    """Return the FLOPs, the bytes and, if timed, the seconds of every op that runs, in all its calls of a run.

    Ops that depend on weights alone are left out: they are computed once, when weights are bound.
    """
    numbers, calls = program.numbers(), count_calls(program.graph)
    rows: list[tuple[int, int, int, int, float | None]] = []
    for function in program.graph.functions.values():
        once, count = weight_only_nodes(function), calls[function.name]
        for node in function.nodes:
            if node.op.callee is None and node not in once and node in numbers:
                cost = node_cost(node, sizes)
                rows.append((numbers[node], count * cost.flops, count * cost.bytes, count, times.get(node)))
    rows.sort(key=lambda row: -row[1])
    return {"ops": rows, "flops": sum(r[1] for r in rows), "bytes": sum(r[2] for r in rows), "timed": bool(times)}


_ORDER = (*UNFUSED, FUSED, ALREADY)


def fusion_facts(program: ReportProgram) -> dict[str, Any]:
    """Return every candidate site with its verdict, the numbers of its ops, and the number of times that it occurs in a
    run. A fused site has the stage of its fusion, and the numbers of the ops that stand in its place there.
    """
    numbers, calls = program.declared_numbers(), count_calls(program.optimized.source)
    made = _made_by_pass(program)
    sites = []
    totals = dict.fromkeys(STATUSES, 0)
    for site, verdict in judge(program.optimized):
        count = calls[site.function]
        totals[verdict.status] += count
        facts = verdict.as_dict() | {"function": site.function, "calls": count}
        facts["nodes"] = [numbers[node] for node in site.nodes if node in numbers]
        if verdict.stop in numbers:
            facts["stop"] = numbers[verdict.stop]
        if verdict.status == FUSED:
            anchors = {numbers[node] for node in site.anchors if node in numbers}
            held = [each for each in made.get(KINDS[site.kind][0], ()) if not anchors.isdisjoint(each.work)]
            held = [each for each in held if each.op == verdict.op] or held
            if held:
                stage = held[-1].stage
                facts |= {"stage": stage, "made": [each.number for each in held if each.stage == stage]}
        del facts["sites"]
        sites.append(facts)
    sites.sort(key=lambda each: _ORDER.index(each["status"]))
    return {"sites": sites, "totals": totals, "unfused": list(UNFUSED)}


class _Made(NamedTuple):
    """A node that replaced others at a stage: `work` has the numbers of the declared nodes whose work it does."""

    stage: int
    number: int
    op: str
    work: frozenset[int]


def _made_by_pass(program: ReportProgram) -> dict[str, list[_Made]]:
    """Return the nodes that replaced others, by the name of the pass."""
    work: dict[int, frozenset[int]] = {}
    found: dict[str, list[_Made]] = {}
    for at, stage in enumerate(program.stages):
        if not stage.replaced:
            continue
        ops = {number: node.op.name for _, node, number in stage.walk()}
        before = dict(work)
        for made, old in stage.replaced.items():
            work[made] = frozenset().union(*(before.get(each, frozenset((each,))) for each in (*old, made)))
            found.setdefault(stage.name, []).append(_Made(at, made, ops.get(made, ""), work[made]))
    return found


def memory_tab_facts(program: ReportProgram, frames: Any, sizes: Mapping[str, int], target: Target) -> dict[str, Any]:
    """Return the memory report of the program that runs."""
    last = program.last
    assert last.plan is not None
    report = memory_of(program.optimized.graph.name, program.backend, last.graph, last.plan, frames, sizes, target)
    return memory_facts(report, last.graph, last.plan, program.numbers())


def storage_facts(program: ReportProgram) -> dict[str, Any]:
    """Return the storage of each value, with the number of the op that computes it, and the layouts of weights."""
    report, plan = program.storage(), program.last.plan
    assert report is not None
    assert plan is not None
    numbers = program.numbers()
    facts = report.as_dict()
    for function, rows in zip(facts["functions"], plan.functions.values(), strict=True):
        for value, (held, _) in zip(function["values"], rows.rows(), strict=True):
            if held.node in numbers:
                value["node"] = numbers[held.node]
    facts["layouts"] = layouts_of(report.model, program.backend, program.graph).as_dict()
    return facts


def weight_facts(program: ReportProgram, originals: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return every weight with its stored encoding, the reason and its first reader, the largest first, and the report
    of the quantization.

    originals  the weights before they are encoded: the relative RMS error of each encoding is measured against them
    """
    graph, stage = program.optimized.graph, program.optimized_stage
    errors = {} if originals is None else encoding_errors(graph, originals)
    numbers = program.numbers_in(graph, program.stages[stage])
    readers: dict[str, int] = {}
    for _, node in graph.walk():
        for value in node.inputs:
            if value.kind == "parameter" and node in numbers:
                readers.setdefault(value.name, numbers[node])
    notes = [note for record in program.optimized.log if record.name == "quantize-weights" for note in record.notes]
    reasons = _reasons(notes)
    weights: list[dict[str, Any]] = []
    for name, value in graph.parameters.items():
        encoding = value.type.encoding
        count, elements = value.type.bytes_at({}), value.type.elements.evaluate({})
        weights.append(
            {
                "name": name,
                "type": value.type.text,
                "encoding": None if encoding is None else str(encoding),
                "bytes": count,
                "bits": 8 * count / elements if elements else 0,
                "error": errors.get(name),
                "reason": reasons.get(name, ""),
                "reader": readers.get(name),
            }
        )
    weights.sort(key=lambda each: (-each["bytes"], each["name"]))
    return {
        "weights": weights,
        "bytes": sum(each["bytes"] for each in weights),
        "stage": stage,
        "notes": notes,
        "measured": bool(errors),
    }


def _reasons(notes: Sequence[str]) -> dict[str, str]:
    """Return the reason for the encoding of each weight, from the table in the notes of the quantization."""
    found: dict[str, str] = {}
    columns: tuple[int, int] | None = None
    for line in notes:
        if line.startswith("weight ") and "  why" in line:
            columns = line.index("type"), line.index("why")
        elif not line:
            columns = None
        elif columns is not None:
            found[line[: columns[0]].strip()] = line[columns[1] :].strip()
    return found


def attention_facts(program: ReportProgram, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return every attention op of the optimized graph: its mask and bias terms, its sizes, and the number of query-key
    pairs that it computes.
    """
    graph = program.optimized.graph
    numbers = program.numbers_in(graph, program.stages[program.optimized_stage])
    calls = count_calls(graph)
    found = []
    for function, node in graph.walk():
        if _terms(node) or "attention" in node.op.name:
            found.append(_attention(node, numbers, sizes) | {"function": function.name, "calls": calls[function.name]})
    return found


def _terms(node: Node) -> list[Term]:
    """Return the mask and bias terms of an attention op; none for other ops."""
    terms = node.op.attributes.get("terms", ())
    return [term for term in terms if isinstance(term, Term)] if isinstance(terms, tuple) else []


def _attention(node: Node, numbers: Mapping[Node, int], sizes: Mapping[str, int]) -> dict[str, Any]:
    names = node.op.operand_names(len(node.operands))
    types = {n: v.type for n, v in zip(names, node.operands, strict=True) if v is not None}
    terms = _terms(node)
    facts: dict[str, Any] = {
        "op": node.op.name,
        "node": numbers.get(node),
        "scope": node.scope,
        "line": str(node.source or ""),
        "terms": [str(term) for term in terms],
        "operands": {name: type.text for name, type in types.items()},
        "flops": node_cost(node, sizes).flops,
    }
    q, k = types.get("q"), types.get("k")
    if q is not None and k is not None and q.rank == 4 and k.rank == 4:
        queries, keys = (type.shape[2].evaluate(sizes) for type in (q, k))
        facts |= {
            "heads": q.shape[1].evaluate(sizes),
            "key_heads": k.shape[1].evaluate(sizes),
            "width": q.shape[3].evaluate(sizes),
            "queries": queries,
            "keys": keys,
            "live": live_pairs(terms, queries, keys),
            "reach": list(reach_of(terms)),
            "by_values": [str(t) for t in terms if isinstance(t, MaskTerm) and t.operands],
        }
    return facts


def step_facts(name: str, derived: DerivedStep, graph: Graph | None = None) -> dict[str, Any]:
    """Return the derived step: its states, and the form of each op of the graph at a step, if the graph is known."""
    return step_of(name, derived, graph).as_dict()


def sharding_facts(report: ShardingReport) -> dict[str, Any]:
    """Return the sharding report, with the timetable of a rank and the mesh."""
    facts = report.as_dict()
    times = report.needs.times
    facts["timetable"] = {
        "seconds": times.seconds,
        "calls": list(times.calls),
        "busy": [_busy(each) for each in times.busy[:MOST_BUSY]],
        "left_out": max(len(times.busy) - MOST_BUSY, 0),
    }
    facts["axes_of_mesh"] = [list(axis) for axis in report.plan.devices.axes]
    facts["node"] = report.plan.machine.node
    facts["text"] = str(report).splitlines()
    return facts


def _busy(each: Busy) -> list[Any]:
    return [each.op, each.over, each.because, each.scope, each.line, each.start, each.seconds, each.sent, each.limit]


def log_facts(program: ReportProgram) -> dict[str, Any]:
    """Return the pass log with the times of this compilation."""
    return {"passes": [record.as_dict(times=True) for record in program.optimized.stages]}


def frames_of_program(program: ReportProgram, target: Target) -> Any:
    """Return the frames of the graph that runs, including the workspaces of kernels. Raises UsageError for a backend
    that does not plan storage.
    """
    backend, last = find_backend(program.backend), program.last
    if last.plan is None or not isinstance(backend, StagedBackend):
        raise UsageError(f"backend {program.backend} does not plan storage", hint="numpy, torch or tvm")
    return backend.frames(last.graph, target, last.plan)
