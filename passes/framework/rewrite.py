"""Rewrites: passes that find a pattern and put something else in its place.

    @dataclass(frozen=True)
    class FuseSilu(Rewrite):
        \"\"\"x * sigmoid(x)   -->   silu(x)\"\"\"

        def pattern(self, p, x):
            return x * p.sigmoid(x)

        def rewrite(self, b, m):
            return b.silu(m.x)

`fits` may narrow the pattern by what its notation cannot say, and nothing is recorded where it is false. `check` may
refuse a match, with a reason that the pass log keeps beside the user's line. A match is also refused when a value
inside it is used elsewhere, unless the pattern says `p.shared`; when `slower` says that the target is better off
without; and when its certificate (`treadle.passes.certificates.certifying`) shows that it is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from treadle.ir.builder import Builder, Expr, describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.target import Target
from treadle.passes.certificates.regions import claim_of_match
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import Event, PassRecord
from treadle.passes.framework.pattern import Pattern, Vocabulary
from treadle.passes.framework.pattern_search import Found, Miss, Search

NEAR_MISSES_KEPT = 20
"""How many near misses a pass keeps for one function."""
LEAST_OPS_OF_NEAR_MISS = 3
"""A near miss has matched this many ops at least, and half of the pattern's."""
_GENERATIONS = 50


@dataclass(frozen=True)
class Refusal:
    """Why a match is not rewritten, and the node that stands in the way (the match's root if none is named).

    hint   the smallest change that would let it be rewritten, where the rule can tell
    """

    reason: str
    at: Node | Expr | None = None
    hint: str = ""

    @property
    def node(self) -> Node | None:
        return self.at.value.node if isinstance(self.at, Expr) else self.at


class Match:
    """A pattern found in a graph. Captured values are its attributes, as Exprs; constants, as Python numbers.

    root   the node that the pattern's root fits; its result is what a rewrite replaces
    nodes  every matched node, the root first
    """

    def __init__(self, b: Builder, pattern: Pattern, root: Node, found: Found) -> None:
        self.root = root
        self.nodes = found.nodes
        self.shared = found.shared
        self._captures = {n: b.expr(v) if isinstance(v, Value) else v for n, v in found.captures.items()}
        self._names = pattern.captures

    @property
    def result(self) -> Value:
        """What the root gives."""
        return self.root.results[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._names:
            raise PassError(f"the pattern captures no {name!r}", hint="one of " + ", ".join(sorted(self._names)))
        return self._captures.get(name)


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces one pattern by something equal.

    Write `pattern` and `rewrite`, and where need be `fits` and `check`.
    """

    def pattern(self, p: Vocabulary, *wildcards: Any, **options: Any) -> Any:
        """The expression to find, over wildcards named by this method's parameters. See
        `treadle.passes.framework.pattern`.
        """
        raise PassError(f"rewrite {self.name} has no pattern")

    def fits(self, m: Match) -> bool:
        """Whether this is a match at all; write it for what the pattern's notation cannot say."""
        return True

    def check(self, m: Match) -> Refusal | None:
        """None if the match may be rewritten, else why not."""
        return None

    def slower(self, m: Match, target: Target) -> Refusal | None:
        """Why the target is better off without a rewrite that would be right, by what `treadle.ir.cost` counts."""
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """Build the replacement of the root's result: an Expr of its type (for several results, a tuple)."""
        raise PassError(f"rewrite {self.name} has no replacement")

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        return sweep((self,), function, graph, log)


@dataclass(frozen=True)
class RewriteSet(Pass):
    """A pass that applies several rewrites in one sweep; earlier ones are tried first."""

    rules: ClassVar[tuple[Rewrite, ...]] = ()

    @property
    def rule_names(self) -> tuple[str, ...]:
        return tuple([rule.name for rule in self.rules])

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        return sweep(self.rules, function, graph, log)


@lru_cache(maxsize=1024)
def _traced(rule: Rewrite) -> Pattern:
    return Pattern.trace(rule.pattern)


def sweep(rules: Sequence[Rewrite], function: Function, graph: Graph, log: PassRecord) -> int:
    """Apply rules to a function until none fits, in one walk down its nodes; returns how many were applied.

    A replacement stands where the root stood, with its scope and source, and is itself a place to look; nodes
    of the match that nobody reads any more are removed. Raises PassError for a replacement of another type,
    or for rules that keep rewriting their own output.
    """
    roots = {op for rule in rules for op in _traced(rule).root_ops}
    if not any(node.op.name in roots for node in function.nodes):
        return 0
    return _Sweep(rules, function, graph, log).run()


class _Sweep:
    def __init__(self, rules: Sequence[Rewrite], function: Function, graph: Graph, log: PassRecord) -> None:
        self.function, self.log = function, log
        self.scratch = Function("scratch")
        self.builder = Builder(graph, self.scratch)
        self.rules_by_root: dict[str, list[tuple[Rewrite, Pattern]]] = {}
        for rule in rules:
            pattern = _traced(rule)
            for op in pattern.root_ops:
                self.rules_by_root.setdefault(op, []).append((rule, pattern))
        self.outputs = set(function.outputs.values())
        self.replaced: dict[Value, Value] = {}
        self.gone: set[Node] = set()
        self.generation: dict[Node, int] = {}
        self.near_misses: list[tuple[Node, Event]] = []
        self.applied = 0

    @cached_property
    def users(self) -> dict[Value, list[Node]]:
        """Who reads a value. Found when first asked for: most functions hold nothing that matches."""
        return {v: [n for n, _ in uses] for v, uses in self.function.uses().items()}

    def run(self) -> int:
        kept: list[Node] = []
        pending = self.function.nodes[::-1]
        while pending:
            node = pending.pop()
            if self.replaced and any(v in self.replaced for v in node.inputs):
                node.operands = tuple(None if v is None else self._current(v) for v in node.operands)
            made = self._rewritten(node)
            if made is None:
                kept.append(node)
            else:
                pending.extend(reversed(made))
        self.function.nodes = [n for n in kept if n not in self.gone]
        self.function.outputs = {name: self._current(v) for name, v in self.function.outputs.items()}
        self._log_near_misses()
        return self.applied

    def _current(self, value: Value) -> Value:
        while value in self.replaced:
            value = self.replaced[value]
        return value

    def _live_users(self, value: Value) -> list[Node]:
        return [n for n in self.users.get(value, ()) if n not in self.gone]

    # -- one root ----------------------------------------------------------------------------------------------

    def _rewritten(self, root: Node) -> list[Node] | None:
        """The nodes to stand in this root's place, or None if no rule applies."""
        nearest: tuple[Rewrite, Miss] | None = None
        refused = False
        for rule, pattern in self.rules_by_root.get(root.op.name, ()):
            search = Search(pattern)
            refusal: Refusal | None = None
            about: tuple[Node, ...] = ()
            for found in search.run(root):
                match = Match(self.builder, pattern, root, found)
                if not rule.fits(match):
                    continue
                why_not = self._used_elsewhere(match) or rule.check(match) or rule.slower(match, self.log.target)
                made = self._apply(rule, match) if why_not is None else why_not
                if not isinstance(made, Refusal):
                    return made
                if refusal is None:
                    refusal, about = made, match.nodes
            if refusal is not None:
                refused = True
                at = refusal.node or root
                self.log.refuse(rule.name, self.function, at, refusal.reason, refusal.hint, about)
            miss = search.miss
            if miss is not None and miss.ops >= max(LEAST_OPS_OF_NEAR_MISS, (pattern.size + 1) // 2):
                nearest = max(nearest or (rule, miss), (rule, miss), key=lambda pair: pair[1].progress)
        if nearest is not None and not refused:
            rule, miss = nearest
            hint = miss.hint if miss.ops >= _traced(rule).size else ""
            matched, edge = tuple([node.op.name for node in miss.nodes]), str(miss.edge)
            given = self.log.lineage.of(miss.nodes)
            event = Event.at(
                *(rule.name, self.function, miss.edge.node, miss.reason, hint), matched=matched, edge=edge, given=given
            )
            self.near_misses.append((root, event))
        return None

    def _used_elsewhere(self, match: Match) -> Refusal | None:
        inside = set(match.nodes)
        for node in match.nodes:
            if node is match.root or node in match.shared:
                continue
            for value in node.results:
                if value in self.outputs:
                    return Refusal(f"the {node.op.name} is an output as well", node)
                for user in self._live_users(value):
                    if user not in inside:
                        line = f" ({user.source})" if user.source else ""
                        reason = f"the {node.op.name} is used elsewhere, by {user.op.name}{line}"
                        return Refusal(reason, node, f"let that {user.op.name} read something else")
        return None

    def _apply(self, rule: Rewrite, match: Match) -> list[Node] | Refusal:
        """The nodes to stand in the root's place; a Refusal if a certificate is asked for and cannot be had."""
        root = match.root
        with self.builder.placed_as(root):
            given = rule.rewrite(self.builder, match)
        results = [r.value if isinstance(r, Expr) else r for r in (given if isinstance(given, tuple) else (given,))]
        made, self.scratch.nodes = self.scratch.nodes, []
        self._expect_types(rule, root, results)
        if self.log.certifying:
            graphs = (self.builder.graph, self.builder.graph)
            against = self.log.certify(rule.name, claim_of_match(match.nodes, made, root, results), graphs)
            if against is not None:
                return Refusal(f"rolled back, since its certificate failed: {against}", root)
            self.log.shown.update(zip(root.results, results, strict=True))
        generation = self.generation.get(root, 0) + 1
        if generation > _GENERATIONS:
            raise PassError(f"rule {rule.name} keeps rewriting what it made", source=_from(root))
        for node in made:
            node.source = root.source
            self.generation[node] = generation
            for value in node.inputs:
                self.users.setdefault(value, []).append(node)
        self.log.match(rule.name, self.function, root, [n for n in match.nodes if n not in match.shared], made)
        self.applied += 1
        self._replace(root, results)
        while unread := [n for n in match.nodes if n not in self.gone and not self._is_read(n)]:
            self.gone.update(unread)
        return made

    def _is_read(self, node: Node) -> bool:
        return any(v in self.outputs or self._live_users(v) for v in node.results)

    def _replace(self, root: Node, results: Sequence[Value]) -> None:
        self.gone.add(root)
        for old, new in zip(root.results, results, strict=True):
            self.users.setdefault(new, []).extend(self._live_users(old))
            self.replaced[old] = new
            if old in self.outputs:
                self.outputs.discard(old)
                self.outputs.add(new)
            if old.name != root.op.name and new.node is not None and new.name == new.node.op.name:
                new.name = old.name  # a name that someone gave outlives the op

    def _expect_types(self, rule: Rewrite, root: Node, results: Sequence[Value]) -> None:
        wanted, got = [v.type for v in root.results], [v.type for v in results]
        if wanted != got:
            raise PassError(
                f"rule {rule.name} replaces {root.op.name} by another type",
                received=f"{', '.join(map(str, got))} for {', '.join(map(str, wanted))}",
                source=_from(root),
            )

    def _log_near_misses(self) -> None:
        missed = [event for root, event in self.near_misses if root not in self.gone]
        self.log.near_misses.extend(missed[:NEAR_MISSES_KEPT])
        if len(missed) > NEAR_MISSES_KEPT:
            self.log.notes.append(f"{len(missed) - NEAR_MISSES_KEPT} more near misses in {self.function.name}")


def _from(node: Node) -> str | None:
    return describe_source(node.source, node.scope)
