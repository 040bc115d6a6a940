"""The graph of a program at every stage: as declared, and after each pass. A node keeps its number from stage to stage.

    for stage in stages_of(exe.optimized):
        print(stage.name, stage.graph, stage.replaced)

The pass manager numbers the nodes (`treadle.passes.framework.lineage.NodeHistory`). A backend's passes number them
again, starting from their input graph, and an artifact has no numbers. In these cases, and if a pass rebuilds a node
without recording the replacement, two nodes count as the same if their ops, types, scopes, lines and names are equal.
A node that replaced a single node with equal attributes as well differs from it in the source of an operand alone: it
keeps the number of that node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.ir.graph import Graph, Node
from treadle.passes.framework.lineage import NodeHistory
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import PassRecord

DECLARED = "declared"
"""The name of the first stage."""
OPTIMIZED = "optimized"
"""The name of the second stage of an artifact, which does not contain the graphs of single passes."""


@dataclass(frozen=True, eq=False)
class ProgramStage:
    """A graph, with a number for each node that is the same in all stages.

    name      the pass that led to it, or `DECLARED`
    numbers   by function, the number of each node in program order
    replaced  for a node that replaced others in this pass, the numbers of the replaced nodes
    record    the log entry of the pass; None for a graph that is not the result of a recorded pass
    """

    name: str
    graph: Graph
    numbers: Mapping[str, Sequence[int]]
    replaced: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    record: PassRecord | None = None

    @property
    def changed(self) -> bool:
        """True if its pass changed the graph."""
        return self.record is None or self.record.changed

    def walk(self) -> Iterator[tuple[str, Node, int]]:
        """Yield the function, the node and its number, for every node."""
        for name, function in self.graph.functions.items():
            yield from ((name, node, number) for node, number in zip(function.nodes, self.numbers[name], strict=True))


def stages_of(optimized: Optimized, first: str = DECLARED) -> list[ProgramStage]:
    """Return the stages of a pipeline and of the backend's passes that follow it.

    first   the name of the stage before the first pass
    """
    numbering = _Numbering(optimized.source, first)
    numbering.follow(optimized)
    if optimized.lowered is not None:
        numbering.follow(optimized.lowered)
    return numbering.stages


class _Numbering:
    def __init__(self, graph: Graph, first: str) -> None:
        self.count = 0
        numbers = {name: [self._new() for _ in f.nodes] for name, f in graph.functions.items()}
        self.stages = [ProgramStage(first, graph, numbers)]

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def follow(self, optimized: Optimized) -> None:
        """Add a stage for each pass of a pipeline. The pipeline's numbers start at its source graph."""
        before = self.stages[-1].graph
        sizes = [[len(f.nodes) for f in graph.functions.values()] for graph in (optimized.source, before)]
        if sizes[0] != sizes[1]:
            self._add("adapted", optimized.source, _positions(optimized.source), {}, None)
        numbers = self.stages[-1].numbers.values()
        known = dict(enumerate(number for held in numbers for number in held))
        if any(record.graph is None for record in optimized.log):  # the log was read from an artifact
            self._add(OPTIMIZED, optimized.graph, _positions(optimized.graph), {}, None)
            return
        for record in optimized.log:
            assert record.graph is not None
            if record.changed and record.history.numbers.keys() == record.graph.functions.keys():
                self._add(record.name, record.graph, record.history, known, record)
            elif record.changed:  # a backend built it itself, without a history
                self._add(record.name, record.graph, _positions(record.graph), {}, record)
            else:
                last = self.stages[-1]
                self.stages.append(ProgramStage(record.name, last.graph, last.numbers, record=record))

    def _add(
        self, name: str, graph: Graph, history: NodeHistory, numbering: dict[int, int], record: PassRecord | None
    ) -> None:
        self._match(self.stages[-1], graph, history, numbering)
        numbers = {name: [self._global(numbering, number) for number in held] for name, held in history.numbers.items()}
        replaced: dict[int, tuple[int, ...]] = {}
        for number, held in history.replaced.items():
            made = self._global(numbering, number)
            old = tuple([numbering[each] for each in held if numbering.get(each, made) != made])
            if old:
                replaced[made] = old
        self.stages.append(ProgramStage(name, graph, numbers, replaced, record))

    def _global(self, numbering: dict[int, int], number: int) -> int:
        if number not in numbering:
            numbering[number] = self._new()
        return numbering[number]

    def _match(self, before: ProgramStage, graph: Graph, history: NodeHistory, numbering: dict[int, int]) -> None:
        """Give each new node that equals a removed node the number of the removed node."""
        left = {numbering[n] for held in history.numbers.values() for n in held if n in numbering}
        removed: dict[object, list[int]] = {}
        gone: dict[int, tuple[str, Node]] = {}
        for name, node, number in before.walk():
            if number not in left:
                gone[number] = name, node
                for key in (_key(node, name), _key(node, "")):
                    removed.setdefault(key, []).append(number)
        taken: set[int] = set()
        for name, held in history.numbers.items() if history.replaced else ():
            for node, number in zip(graph.functions[name].nodes, held, strict=True):
                old = [numbering[each] for each in history.replaced.get(number, ()) if each in numbering]
                if number in numbering or len(old) != 1 or old[0] in taken or old[0] not in gone:
                    continue
                home, before_pass = gone[old[0]]
                if node.op == before_pass.op and _key(node, name) == _key(before_pass, home):
                    taken.add(old[0])
                    numbering[number] = old[0]
        places: tuple[Callable[[str], str], ...] = (lambda name: name, lambda name: "")
        for place in places if removed else ():
            for name, held in history.numbers.items():
                for node, number in zip(graph.functions[name].nodes, held, strict=True):
                    if number in numbering or number in history.replaced:
                        continue
                    for other in removed.get(_key(node, place(name)), ()):
                        if other not in taken:
                            taken.add(other)
                            numbering[number] = other
                            break


def _positions(graph: Graph) -> NodeHistory:
    """Number the nodes of a graph by their position."""
    numbers, at = {}, 0
    for name, function in graph.functions.items():
        numbers[name] = range(at, at + len(function.nodes))
        at += len(function.nodes)
    return NodeHistory(numbers)


def _key(node: Node, function: str) -> object:
    types = tuple([(value.name, value.type.text) for value in node.results])
    return function, node.op.name, node.op.callee, node.scope, str(node.source or ""), types
