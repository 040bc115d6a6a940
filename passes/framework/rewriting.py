"""The engine of all passes that find sites and replace them: patterns (`treadle.passes.framework.rewrite`) and sites.

    @dataclass(frozen=True)
    class FuseDoubleNegation(SiteRewrite[Site]):
        \"\"\"-(-x)   -->   x\"\"\"

        def sites(self, work):
            for node in work.walk():
                above = node.inputs[0].node if isinstance(node.op, Neg) else None
                if above is not None and isinstance(above.op, Neg):
                    yield Site(node, (above,))

        def build(self, b, site):
            return b.expr(site.nodes[0].inputs[0])

A pass decides which sites it finds and refuses, and builds the replacements. This module does the rest for all passes:
it builds the replacement separately, under the scope and the source line of the replaced node, checks that the types
are equal, redirects all readers to the replacement, removes nodes that become unused, and writes the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from treadle.ir.builder import Builder, Expr, describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import Event, PassRecord
from treadle.passes.framework.returned_values import readers_of

NEAR_MISSES_KEPT = 20
"""The greatest number of near misses that a pass logs for one function."""


@dataclass(frozen=True)
class Refusal:
    """The reason why something is not rewritten, and the node that prevents the rewrite (the root, if none is
    named).

    hint     the smallest change that would allow the rewrite, if the rule knows it
    matched  the nodes that matched, in order, if only a part of the rule's form was checked
    """

    reason: str
    at: Node | Expr | None = None
    hint: str = ""
    matched: tuple[Node, ...] = ()

    @property
    def node(self) -> Node | None:
        return self.at.value.node if isinstance(self.at, Expr) else self.at


@dataclass(frozen=True, eq=False)
class Site:
    """A site that a pass will replace. A pass that needs more data adds fields.

    root      the node that is replaced, whose scope and source line the replacement takes
    nodes     the other nodes that are replaced
    replaced  the values that are replaced: by default the root's results
    place     the node whose position the replacement takes, if that is not the root
    rule      the rule's name in the log: by default the pass's name
    reason    the outcome, if the pass reports it
    """

    root: Node
    nodes: tuple[Node, ...] = ()
    replaced: tuple[Value, ...] = field(default=(), kw_only=True)
    place: Node | None = field(default=None, kw_only=True)
    rule: str = field(default="", kw_only=True)
    reason: str = field(default="", kw_only=True)

    @property
    def stands_at(self) -> Node:
        return self.place or self.root


@dataclass(frozen=True)
class Replacement:
    """New nodes, and the values that they replace.

    replaced  the old values; `results` are the new values, of the same types
    made      the new nodes, in order
    """

    root: Node
    replaced: Sequence[Value]
    results: Sequence[Value]
    made: list[Node]


FoundSite = TypeVar("FoundSite", bound=Site)


@dataclass(frozen=True)
class SiteRewrite(Pass, Generic[FoundSite]):
    """A pass that finds sites that no pattern can express. Subclasses define `sites` and `build`."""

    tidying: ClassVar[Pass | None] = None
    """A pass that cleans up nodes that remain between a replacement and its neighbours."""

    def sites(self, work: Rewriting) -> Iterator[FoundSite]:
        """Yield the sites to replace. A site is replaced, or refused by `build`, before the next one is requested."""
        raise PassError(f"pass {self.name} finds no sites")

    def build(self, b: Builder, site: FoundSite) -> Any:
        """Build the replacements of a site's values: an Expr for each of them, or a Refusal."""
        raise PassError(f"pass {self.name} has no replacement")

    def record(self, work: Rewriting, site: FoundSite, made: Sequence[Node]) -> None:
        """Log a site that was replaced."""
        work.log.match(site.rule or self.name, work.function, site.root, site.nodes, made, site.reason)

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        work = Rewriting(function, graph, log)
        for site in self.sites(work):
            self._replace(work, site)
        applied = work.finish()
        if applied:
            function.nodes = needed_nodes(function.nodes, function.results)
            if self.tidying is not None:
                self.tidying.run(function, graph, log)
        return applied

    def _replace(self, work: Rewriting, site: FoundSite) -> None:
        built = work.build(self.name, site.root, lambda b: self.build(b, site), site.replaced)
        if isinstance(built, Refusal):
            work.refuse(self.name, built, site.root)
            return
        self.record(work, site, built.made)
        work.put(built, site.nodes, site.stands_at)


class Rewriting:
    """One function while a pass replaces sites in it.

    Until `finish`, the function's list of nodes stays unchanged, and a node keeps its old operands until `walk` reaches
    it.
    """

    def __init__(self, function: Function, graph: Graph, log: PassRecord) -> None:
        self.function, self.graph, self.log = function, graph, log
        self.builder = Builder(graph, Function("scratch"))
        self.gone: set[Node] = set()
        """Nodes that were replaced and no longer have readers."""
        self.applied = 0
        self._now: dict[Value, Value] = {}
        self._stale: set[Node] = set()
        self._made: dict[Node, list[Node]] = {}
        self._beside: list[tuple[Node | None, Node]] = []
        """The other nodes whose values were replaced together with a root's, each with the node whose position the
        replacement takes.
        """
        self._near_misses: list[tuple[Node, Event]] = []

    @cached_property
    def _readers(self) -> dict[Value, list[Node | None]]:
        """The readers of each result. They are computed on first use, since most functions have no site."""
        return readers_of(self.function)

    # -- looking -----------------------------------------------------------------------------------------------

    def walk(self, *, into: bool = False) -> Iterator[Node]:
        """Yield the function's nodes in order. Each node has its current operands when it is yielded.

        into   True to also yield new nodes, when the node that they replace is reached
        """
        pending = self.function.nodes[::-1]
        while pending:
            node = pending.pop()
            if node in self._stale:
                self._bring_up_to_date(node)
            yield node
            if into and node in self._made:
                pending.extend(reversed(self._made[node]))

    def readers(self, value: Value) -> list[Node | None]:
        """Return the current readers of a node's result. None stands for an output."""
        return [node for node in self._readers.get(value, ()) if node not in self.gone]

    def is_replaced(self, value: Value) -> bool:
        """Return True if another value has replaced this one."""
        return value in self._now

    # -- logging -----------------------------------------------------------------------------------------------

    def refuse(self, rule: str, refusal: Refusal, root: Node | None = None, nodes: Iterable[Node] = ()) -> None:
        """Log that a rule was about to replace nodes, and refused."""
        at = refusal.node or root
        assert at is not None, "a refusal must have a node or a root"
        self.log.refuse(rule, self.function, at, refusal.reason, refusal.hint, nodes, refusal.matched)

    def near_miss(
        self, rule: str, root: Node, at: Node, reason: str, hint: str = "", matched: Sequence[Node] = (), edge: str = ""
    ) -> None:
        """Log that a rule nearly matched at a root. The event is dropped if the root is replaced after all."""
        given = self.log.lineage.of((at, *matched))
        names = tuple([node.op.name for node in matched])
        event = Event.at(rule, self.function, at, reason, hint, matched=names, edge=edge, original_nodes=given)
        self._near_misses.append((root, event))

    # -- replacing ---------------------------------------------------------------------------------------------

    def build(
        self, rule: str, root: Node, make: Callable[[Builder], Any], replaced: Sequence[Value] = ()
    ) -> Replacement | Refusal:
        """Build a replacement of values (by default, the root's results) separately from the function.

        Raises PassError for a replacement of another type.
        """
        scratch = self.builder.function
        with self.builder.placed_as(root):
            given = make(self.builder)
        made, scratch.nodes = scratch.nodes, []
        if isinstance(given, Refusal):
            return given
        for node in made:
            node.source = root.source
        given = given if isinstance(given, tuple | list) else (given,)
        results = [r.value if isinstance(r, Expr) else r for r in given]
        replaced = replaced or root.results
        wanted, got = [v.type for v in replaced], [v.type for v in results]
        if wanted != got:
            raise PassError(
                f"rule {rule} replaces {root.op.name} by a value of another type",
                received=f"{', '.join(map(str, got))} for {', '.join(map(str, wanted))}",
                source=describe_source(root.source, root.scope),
            )
        return Replacement(root, replaced, results, made)

    def put(self, built: Replacement, nodes: Iterable[Node] = (), place: Node | None = None) -> None:
        """Redirect all readers to a replacement, at the position of its root or of another node.

        nodes   replaced nodes other than the root; they are removed if they become unused
        """
        root, made = built.root, built.made
        for node in made:
            for value in dict.fromkeys(node.inputs):
                if value in self._now:  # this value was replaced after the site was found
                    self._stale.add(node)
                self._readers.setdefault(self._current(value), []).append(node)
        self._made[place or root] = made
        self.applied += 1
        for old, new in zip(built.replaced, built.results, strict=True):
            readers = self.readers(old)
            self._now[old] = new
            if old.node is not root:
                self._beside.append((old.node, place or root))
            self._stale.update([node for node in readers if node is not None])
            self._readers.setdefault(self._current(new), []).extend(readers)
            self._readers[old] = []
            nameless = new.node is not None and (new.node in made or new.name == new.node.op.name)
            if nameless and old.node is not None and old.name != old.node.op.name:
                new.name = old.name  # keep a name that the author chose
        taken = [root, *nodes]
        while unread := [node for node in taken if not self._is_read(node)]:
            self.gone.update(unread)
            taken = [node for node in taken if node not in self.gone]

    def _is_read(self, node: Node) -> bool:
        for value in node.results:
            for reader in self._readers.get(value, ()):
                if reader not in self.gone:
                    return True
        return False

    def finish(self) -> int:
        """Update the function's nodes and the near misses in the log. Return the number of replaced sites."""
        if self.applied:
            for node in list(self._stale):
                self._bring_up_to_date(node)
            self.function.nodes = self._ordered()
            self.function.replace_results(self._current)
        missed = [event for root, event in self._near_misses if root not in self.gone]
        self.log.near_misses.extend(missed[:NEAR_MISSES_KEPT])
        if len(missed) > NEAR_MISSES_KEPT:
            self.log.notes.append(f"{len(missed) - NEAR_MISSES_KEPT} more near misses in {self.function.name}")
        return self.applied

    def _current(self, value: Value) -> Value:
        while value in self._now:
            value = self._now[value]
        return value

    def _bring_up_to_date(self, node: Node) -> None:
        node.operands = tuple([None if v is None else self._current(v) for v in node.operands])
        self._stale.discard(node)

    def _ordered(self) -> list[Node]:
        """Return the remaining and the new nodes in order. A node whose operand is computed later is moved after it."""
        groups = [self._in_place_of(n) if n in self._made else [n] for n in self.function.nodes]
        nodes = [node for group in groups for node in group if node not in self.gone]
        at = {node: position for position, node in enumerate(self.function.nodes)} if self._beside else {}
        if all(giver in at and place in at and at[giver] >= at[place] for giver, place in self._beside):
            return nodes  # nothing to sort: no replacement has a reader before it
        to_come = set(nodes)
        ordered: list[Node] = []
        waiting: list[Node] = []

        def append(nodes: Iterable[Node]) -> list[Node]:
            """Append the nodes whose operands are computed, and return the others."""
            early = []
            for node in nodes:
                if any(v.node in to_come for v in node.inputs):
                    early.append(node)
                else:
                    ordered.append(node)
                    to_come.discard(node)
            return early

        for group in groups:
            early = append(node for node in group if node not in self.gone)
            if waiting or early:
                waiting = append([*waiting, *early])
        return ordered + waiting

    def _in_place_of(self, node: Node) -> list[Node]:
        """Return the nodes that replace a node, followed by the node itself. Replacements that were themselves replaced
        are expanded.
        """
        found: list[Node] = []
        pending = [(node, False)]
        while pending:
            each, opened = pending.pop()
            if each in self._made and not opened:
                pending.append((each, True))
                pending.extend((node, False) for node in reversed(self._made[each]))
            else:
                found.append(each)
        return found
