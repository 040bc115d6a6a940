"""A program of the report, such as the model or its decoding step: its graph at every stage, its code and its storage.

program_facts(ReportProgram("model", exe.optimized, exe.executable), sizes)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.backends.python.executable import PythonExecutable
from treadle.explaining.storage import StorageReport, storage_of
from treadle.ir.analysis.run_counts import count_calls
from treadle.ir.analysis.weight_only import weight_only_nodes
from treadle.ir.graph import Graph, Node
from treadle.ir.text.printer import print_graph
from treadle.passes.framework.manager import Optimized
from treadle.report.boxes import boxes_of
from treadle.report.nodes import NodeDetails
from treadle.report.stages import DECLARED, ProgramStage, stages_of

MOST_TEXT = 400_000
"""Limit on the lines of IR text of all stages together. Above it, only the first and the last stage have text."""


@dataclass(frozen=True, eq=False)
class ReportProgram:
    """A graph that passes change and a backend runs.

    name        the name in the page's list: "model", "step", "rank 3"
    optimized   the stages
    backend     the backend's name
    executable  its code; None if it was not compiled
    first       the name of the first stage
    """

    name: str
    optimized: Optimized
    backend: str
    executable: object = None
    first: str = DECLARED
    stages: list[ProgramStage] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stages_of(self.optimized, self.first))

    @property
    def last(self) -> Optimized:
        """The result of the last pipeline: the backend's, if the backend has passes."""
        return self.optimized.last

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        return self.last.graph

    @property
    def optimized_stage(self) -> int:
        """The position of the last stage before the backend's passes."""
        graph = self.optimized.graph
        found = (at for at, each in enumerate(self.stages) if each.graph is graph or _alike(each.graph, graph))
        return max(found)

    def numbers(self) -> dict[Node, int]:
        """Return the number of each node of the graph that runs."""
        return self.numbers_in(self.graph, self.stages[-1])

    def declared_numbers(self) -> dict[Node, int]:
        """Return the number of each node of the declared graph."""
        return self.numbers_in(self.optimized.source, self.stages[0])

    def numbers_in(self, graph: Graph, stage: ProgramStage) -> dict[Node, int]:
        """Return the number of each node of a graph that consists of nodes of this stage."""
        found: dict[Node, int] = {}
        for name, function in graph.functions.items():
            if len(stage.numbers.get(name, ())) == len(function.nodes):
                found |= zip(function.nodes, stage.numbers[name], strict=True)
        return found

    def storage(self) -> StorageReport | None:
        """Return the storage of the values of the graph that runs, or None if no storage was planned."""
        last = self.last
        return None if last.plan is None else storage_of(self.optimized.graph.name, self.backend, last.graph, last.plan)


def _alike(graph: Graph, other: Graph) -> bool:
    sizes = [{name: len(f.nodes) for name, f in each.functions.items()} for each in (graph, other)]
    return sizes[0] == sizes[1]


def program_facts(
    program: ReportProgram, sizes: Mapping[str, int], times: Mapping[Node, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the sections of a program: `graph`, `details` of its ops, `text` of its stages, and `source`.

    times   seconds of a run by node, if it was profiled
    """
    facts = NodeDetails(sizes)
    records = [facts.of(stage) for stage in program.stages]
    graph = boxes_of(program.stages, records)
    graph["nodes"] = facts.light
    graph["passes"] = list(_passes(program.stages, records))
    found = {
        "graph": graph,
        "details": {"nodes": facts.details, "final": _final(program, times or {})},
        "text": stage_texts(program.stages),
    }
    source = getattr(program.executable, "source", None)
    if source is not None:
        found["source"] = {"lines": source.splitlines(), "code": _code(program, source)}
    return found


_CHANGES = ("added", "removed", "altered", "replaced")


def _passes(stages: Sequence[ProgramStage], records: Sequence[Mapping[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield the changes of each pass: the numbers of added, removed and altered nodes, and the nodes that each new one
    replaced. With a graph that differs from the one before come `calls`, the functions that a run does not call once,
    and `once`, the nodes that depend on weights alone.
    """
    before: Mapping[int, int] = {}
    graph: Graph | None = None
    for at, (stage, held) in enumerate(zip(stages, records, strict=True)):
        found: dict[str, Any] = {"name": stage.name, "ops": sum(len(each) for each in stage.numbers.values())}
        if stage.graph is not graph:
            graph = stage.graph
            found["calls"] = {name: count for name, count in count_calls(graph).items() if count != 1}
            once = {node for function in graph.functions.values() for node in weight_only_nodes(function)}
            found["once"] = [number for _, node, number in stage.walk() if node in once]
        if at and held is not before:
            found["added"] = [number for number in held if number not in before]
            found["removed"] = [number for number in before if number not in held]
            found["altered"] = [n for n, index in held.items() if n in before and before[n] != index]
            found["replaced"] = [[number, list(old)] for number, old in stage.replaced.items()]
            found = {name: value for name, value in found.items() if value or name not in _CHANGES}
        yield found
        before = held


def stage_texts(stages: Sequence[ProgramStage]) -> dict[str, Any]:
    """Return the IR text of every stage that differs from the previous one: a table of distinct lines, and for each
    stage the numbers of its lines, as runs.

    A run [first, count] stands for consecutive lines of the table. A stage without changes has the position of the
    stage whose text it shares.
    """
    lines: dict[str, int] = {}
    found: list[Any] = []
    written, before = 0, None
    for at, stage in enumerate(stages):
        ends = at in (0, len(stages) - 1)
        if stage.graph is before:
            found.append(len(found) - 1 if not isinstance(found[-1], int) else found[-1])
            continue
        before = stage.graph
        if written > MOST_TEXT and not ends:
            found.append(None)
            continue
        text = print_graph(stage.graph).splitlines()
        written += len(text)
        runs: list[list[int]] = []
        for line in text:
            number = lines.setdefault(line, len(lines))
            if runs and runs[-1][0] + runs[-1][1] == number:
                runs[-1][1] += 1
            else:
                runs.append([number, 1])
        found.append([each for run in runs for each in run])
    return {"lines": list(lines), "stages": found}


def _final(program: ReportProgram, times: Mapping[Node, float]) -> dict[str, Any]:
    """Return facts of the ops that run, by number: the storage of their results, and their seconds if timed."""
    numbers = program.numbers()
    stored: dict[int, list[dict[str, Any]]] = {}
    report, plan = program.storage(), program.last.plan
    if report is not None and plan is not None:
        for function, rows in zip(report.functions, plan.functions.values(), strict=True):
            for value, (held, _) in zip(function.values, rows.rows(), strict=True):
                if held.node in numbers:
                    names = ("name", "storage", "form", "bytes", "first", "last", "why")
                    facts = {name: fact for name, fact in value.as_dict().items() if name in names and fact is not None}
                    stored.setdefault(numbers[held.node], []).append(facts)
    found: dict[str, Any] = {"storage": stored}
    if times:
        found["seconds"] = {numbers[node]: seconds for node, seconds in times.items() if node in numbers}
    return found


# -- code ------------------------------------------------------------------------------------------------------------


def _code(program: ReportProgram, source: str) -> dict[int, list[int]]:
    """Return the lines of code of each node, by its number: first and last line of each piece, counted from 0."""
    numbers = program.numbers()
    lines: dict[Node, list[int]] = {}
    if isinstance(program.executable, PythonExecutable):
        for line, node in program.executable.program.nodes.items():
            lines.setdefault(node, []).extend((line - 1, line - 1))
    elif hasattr(program.executable, "kernels"):
        lines = _kernel_lines(program.executable, source.splitlines())
    plan = program.last.plan
    for each in plan.functions.values() if plan is not None else ():
        for step in each.steps:  # one kernel computes all nodes of a step
            for node in step.nodes:
                if node not in lines and step.root in lines:
                    lines[node] = lines[step.root]
    return {numbers[node]: held for node, held in lines.items() if node in numbers}


def _kernel_lines(executable: Any, source: Sequence[str]) -> dict[Node, list[int]]:
    """Return for each step's node its line in the listing of a kernel program, and then the lines of its kernel."""
    from treadle.backends.tvm.lowering.listing import unique_titles

    starts = {match[1]: at for at, line in enumerate(source) if (match := _DEFINED.match(line))}
    titles = unique_titles(executable.kernels)
    found: dict[Node, list[int]] = {}
    for routine in executable.program.routines:
        first = starts.get(routine.name)
        for at, step in enumerate(routine.steps if first is not None else (), (first or 0) + 1):
            if step.node is None:
                continue
            found.setdefault(step.node, []).extend((at, at))
            kernel = getattr(step, "kernel", None)
            begin = None if kernel is None else starts.get(titles[kernel])
            if begin is not None:
                end = begin
                while end + 1 < len(source) and (source[end + 1].startswith(" ") or not source[end + 1]):
                    end += 1
                found[step.node] += (begin, end)
    return found


_DEFINED = re.compile(r"def ([A-Za-z_]\w*)\(")
