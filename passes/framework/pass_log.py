"""The pass log: the changes, matches, refusals and near misses of each pass, with the reasons.

Everything but the times is a pure function of the graph and the pipeline: equal inputs give equal logs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.target import Target
from treadle.ir.wording.notebook_html import html_code, html_table
from treadle.passes.certificates.certificate import Certificate, Counterexample
from treadle.passes.certificates.certifying import certify
from treadle.passes.certificates.regions import Claim
from treadle.passes.framework.lineage import Lineage, NodeHistory

Product = TypeVar("Product")


@dataclass(frozen=True, slots=True)
class Event:
    """An event at one node: a match, a refusal or a near miss.

    rule      the rewrite's name
    function  the function that holds the node
    op        the node's op
    scope     the node's scope in the author's model ("h.0.mlp"), and `source`, the author's line; empty if
              unknown
    reason    the reason for a refusal; for a match, its outcome, if the rule reports it
    hint      the smallest change that would make the rule match, if the rule knows it
    matched   the ops that had matched before the rule stopped, by name, in the order in which the rule visited them;
              empty if the whole rule matched
    edge      the edge at which a near miss stopped: "operand 1 of div"; empty for a refusal, which is about the node
    original_nodes  the nodes of the original graph that the event is about
    created_ops     the ops that replaced them in a match, by name

    An artifact stores all fields but the last two.
    """

    rule: str
    function: str
    op: str
    scope: str
    source: str
    reason: str = ""
    hint: str = ""
    matched: tuple[str, ...] = ()
    edge: str = ""
    original_nodes: frozenset[Node] = field(default=frozenset(), repr=False, compare=False)
    created_ops: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @staticmethod
    def at(rule: str, function: Function, node: Node, reason: str = "", hint: str = "", **more: Any) -> Event:
        return Event(rule, function.name, node.op.name, node.scope, str(node.source or ""), reason, hint, **more)

    @property
    def place(self) -> str:
        """The location as text, such as `gpt2.py:41  h.0.mlp`, or the known part of it."""
        return "  ".join(part for part in (self.source, self.scope) if part) or self.function

    @property
    def description(self) -> str:
        """The reason, and how far the match got: `5 ops matched; operand 1 of div: expected ...`."""
        if self.edge:
            return f"{len(self.matched)} op{'s' * (len(self.matched) != 1)} matched; {self.edge}: {self.reason}"
        return self.reason + (f"; matched: {', '.join(self.matched)}" if self.matched else "")

    def __str__(self) -> str:
        return f"{self.rule} at {self.op}" + (f": {self.description}" if self.description else "") + f"    {self.place}"

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "rule": self.rule,
            "function": self.function,
            "op": self.op,
            "scope": self.scope,
            "source": self.source,
        }
        more = {"reason": self.reason, "hint": self.hint, "matched": list(self.matched), "edge": self.edge}
        return found | {name: said for name, said in more.items() if said}


@dataclass
class PassRecord:
    """The record of one pass over one graph. A pass writes its events here while it runs; the manager fills in the
    other fields.

    graph    the graph after the pass; not to be changed
    ops      the number of nodes of each op in the distinct functions, before and after
    notes    the pass's own lines: weights removed, folds skipped
    certificates  the certificates of the distinct rewrites, if certification is on
    products  what the pass made in addition to the graph, by type: a storage plan, the fit into a memory budget
    history  a number for each node of `graph`, and the nodes that the pass replaced, for a log of this process

    The pass reads these fields while it runs: certifying (True if each rewrite is certified before it is kept),
    differentiated (True if the graph will be differentiated, so that gradients must not change), shown (values and
    their replacements by certified rewrites), target (the hardware that the graph is compiled for) and lineage (the
    nodes of the original graph whose work each node does). The manager reads touched: the functions that a pass reports
    as changed, None if it does not report them. rules are the names of the rewrites that the pass tries, if it has
    several.
    """

    name: str
    options: str
    before: Counter[str]
    after: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    seconds: float = 0.0
    matches: list[Event] = field(default_factory=list)
    refusals: list[Event] = field(default_factory=list)
    near_misses: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)
    graph: Graph | None = None
    products: dict[type[Any], Any] = field(default_factory=dict)
    certifying: bool = field(default=False, repr=False, compare=False)
    differentiated: bool = field(default=False, repr=False, compare=False)
    display_values: dict[Value, Value] = field(default_factory=dict, repr=False, compare=False)
    target: Target = field(default=Target("cpu"), repr=False, compare=False)
    lineage: Lineage = field(default_factory=Lineage, repr=False, compare=False)
    history: NodeHistory = field(default_factory=NodeHistory, repr=False, compare=False)
    touched: set[str] | None = field(default=None, repr=False, compare=False)
    rules: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def product(self, kind: type[Product]) -> Product | None:
        """Return what the pass made of this type, or None."""
        return self.products.get(kind)

    def match(
        self,
        rule: str,
        function: Function,
        root: Node,
        nodes: Iterable[Node] = (),
        created: Sequence[Node] = (),
        reason: str = "",
    ) -> None:
        """Log that a rule replaced `nodes` (the root, if none are named) by the nodes `created`."""
        taken = (root, *nodes)
        ops = tuple([node.op.name for node in created])
        self.matches.append(
            Event.at(rule, function, root, reason, original_nodes=self.lineage.of(taken), created_ops=ops)
        )
        self.lineage.stand(created, taken)

    def refuse(
        self,
        rule: str,
        function: Function,
        at: Node,
        reason: str,
        hint: str = "",
        nodes: Iterable[Node] = (),
        matched: Iterable[Node] = (),
    ) -> None:
        """Log that a rule was about to replace nodes, and refused because of the node `at`.

        matched   the nodes that matched, if only a part of the rule's form was checked
        """
        matched = tuple(dict.fromkeys(matched))
        given = self.lineage.of((at, *nodes, *matched))
        names = tuple([node.op.name for node in matched])
        self.refusals.append(Event.at(rule, function, at, reason, hint, matched=names, original_nodes=given))

    def certify(self, rule: str, claim: Claim, graphs: tuple[Graph, Graph]) -> Counterexample | None:
        """Check a claim and store its certificate. Return the case in which the claim does not hold, or None."""
        found = certify(rule, claim, graphs, derivatives=self.differentiated)
        if isinstance(found, Certificate) and found not in self.certificates:
            self.certificates.append(found)
        return found if isinstance(found, Counterexample) else None

    def __repr__(self) -> str:
        counts = [
            (len(self.matches), "match" + "es" * (len(self.matches) != 1)),
            (len(self.refusals), "refused"),
            (len(self.near_misses), "nearly"),
        ]
        suffix = "".join(f", {count} {what}" for count, what in counts if count)
        return f"<pass {self.summary.removeprefix('after ')}{suffix}>"

    @property
    def changed(self) -> bool:
        return self.changes > 0 or self.before != self.after

    @property
    def op_changes(self) -> dict[str, int]:
        """The change in the number of nodes, by op name, for each op whose number changed."""
        deltas = {name: self.after[name] - self.before[name] for name in sorted({*self.before, *self.after})}
        return {name: delta for name, delta in deltas.items() if delta}

    @property
    def summary(self) -> str:
        """The change in one line: `after fuse-gelu: 14 -> 9 ops, 0.4 ms`."""
        left = self.after.total()
        ops = f"{self.before.total()} -> {left} op{'s' * (left != 1)}"
        return f"after {self.name}: {ops}, {self.seconds * 1e3:.1f} ms"

    def as_dict(self, *, times: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {
            "pass": self.name,
            "options": self.options,
            "changes": self.changes,
            "ops": {"before": self.before.total(), "after": self.after.total(), "changes": self.op_changes},
            "matches": [e.as_dict() for e in self.matches],
            "refusals": [e.as_dict() for e in self.refusals],
            "near_misses": [e.as_dict() for e in self.near_misses],
            "notes": list(self.notes),
        }
        if self.certificates:
            found["certificates"] = [c.as_dict() for c in self.certificates]
        return {**found, "seconds": self.seconds} if times else found


class PassLog(Sequence[PassRecord]):
    """The records of a pipeline, in order. Prints as a table; `as_dict` is for JSON."""

    def __init__(self, records: Sequence[PassRecord]) -> None:
        self._records = tuple(records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self._records)

    def as_dict(self, *, times: bool = False) -> dict[str, Any]:
        """Return the log as data for JSON. With `times`, the data differs from run to run."""
        return {"passes": [r.as_dict(times=times) for r in self._records]}

    def table(self, *, times: bool = True) -> str:
        """Return a table with a line per pass: its name, op counts, and the numbers of matches, refusals and near
        misses.
        """
        rows = self._rows(times)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _rows(self, times: bool) -> list[tuple[str, ...]]:
        """Return the rows of the table, the header first."""
        rows: list[tuple[str, ...]] = [("pass", "ops", "change", "refused", "nearly", "ms")]
        for r in self._records:
            ops = f"{r.before.total()} -> {r.after.total()}" if r.changed else f"{r.after.total()}"
            refused, nearly = (str(len(events) or "") for events in (r.refusals, r.near_misses))
            rows.append((r.name, ops, _signed(r.op_changes), refused, nearly, f"{r.seconds * 1e3:.1f}"))
        return rows if times else [row[:-1] for row in rows]

    def explain(self) -> str:
        """Return every refusal, near miss and note, one per line, under the name of its pass."""
        lines: list[str] = []
        for r in self._records:
            details = [f"  refused  {e}" for e in r.refusals] + [f"  nearly   {e}" for e in r.near_misses]
            details += [f"  note     {n}" for n in r.notes]
            lines += [r.name, *details] if details else []
        return "\n".join(lines)

    def certified(self) -> str:
        """Return every certificate, one per line, under the name of its pass."""
        return "\n".join("\n".join([r.name, *(f"  {c}" for c in r.certificates)]) for r in self if r.certificates)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the table, followed by the text of `explain`."""
        head, *rows = self._rows(True)
        explanation = self.explain()
        return html_table(head, rows) + (
            html_code("refused, nearly matched, noted", explanation) if explanation else ""
        )


def count_ops(graph: Graph) -> Counter[str]:
    """Count the nodes of each op in the graph's distinct functions."""
    return Counter(node.op.name for _, node in graph.walk())


def _signed(changes: Mapping[str, int]) -> str:
    return ", ".join(f"{delta:+d} {name}" for name, delta in changes.items())
