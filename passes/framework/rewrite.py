"""Rewrites: passes that find a pattern and replace it.

    @dataclass(frozen=True)
    class FuseSilu(Rewrite):
        \"\"\"x * sigmoid(x)   -->   silu(x)\"\"\"

        def pattern(self, p, x):
            return x * p.sigmoid(x)

        def rewrite(self, b, m):
            return b.silu(m.x)

`fits` may narrow the pattern by conditions that patterns cannot express; if it returns False, nothing is recorded.
`check` may refuse a match, with a reason that the pass log prints next to the author's line. A match is also refused in
these cases: a value inside it is used elsewhere and the pattern does not use `p.shared`; `slower` finds that the target
is faster without the rewrite; its certificate (`treadle.passes.certificates.certifying`) shows that it is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from treadle.ir.builder import Builder, describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.target import Target
from treadle.passes.certificates.regions import claim_of_match
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.framework.pattern import Pattern, Vocabulary
from treadle.passes.framework.pattern_search import Found, Miss, Search
from treadle.passes.framework.rewriting import Refusal as Refusal  # re-exported for modules with rules
from treadle.passes.framework.rewriting import Rewriting

LEAST_OPS_OF_NEAR_MISS = 3
"""The least number of ops that a near miss must have matched. It must also have matched half of the pattern's ops."""
_GENERATIONS = 50


class Match:
    """A pattern found in a graph. Captured values are attributes of the match, as Exprs; constants, as Python numbers.

    root   the node that the pattern's root matches; a rewrite replaces its result
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
        """The root's result."""
        return self.root.results[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._names:
            raise PassError(f"the pattern captures no {name!r}", received="captures " + ", ".join(sorted(self._names)))
        return self._captures.get(name)


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces one pattern by an equivalent expression.

    Subclasses define `pattern` and `rewrite`, and if needed `fits` and `check`.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    def pattern(self, p: Vocabulary, *wildcards: Any, **options: Any) -> Any:
        """Return the expression to find, over wildcards named by this method's parameters. See
        `treadle.passes.framework.pattern`.
        """
        raise PassError(f"rewrite {self.name} has no pattern")

    def fits(self, m: Match) -> bool:
        """Return True if this is a match at all. A subclass defines it for conditions that a pattern cannot express."""
        return True

    def check(self, m: Match) -> Refusal | None:
        """Return None if the match may be rewritten, else the reason for the refusal."""
        return None

    def slower(self, m: Match, target: Target) -> Refusal | None:
        """Return a refusal if a correct rewrite would be slower on the target, by `treadle.ir.analysis.cost`, else
        None.
        """
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """Build the replacement of the root's result: an Expr of its type (for several results, a tuple)."""
        raise PassError(f"rewrite {self.name} has no replacement")

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        return sweep((self,), function, graph, log)


@dataclass(frozen=True)
class RewriteSet(Pass):
    """A pass that applies several rewrites in one sweep; earlier ones are tried first."""

    requires: ClassVar[Facts] = BEFORE_LOWERING
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
    """Apply rules to a function until none matches, in one walk over its nodes. Return the number of applied rewrites.

    A replacement takes the root's position, scope and source line, and is itself searched; matched nodes that become
    unused are removed. Raises PassError for a replacement of another type, or for rules that keep rewriting their own
    output.
    """
    roots = {op for rule in rules for op in _traced(rule).root_ops}
    if not any(node.op.name in roots for node in function.nodes):
        return 0
    return _Sweep(rules, function, graph, log).run()


class _Sweep:
    def __init__(self, rules: Sequence[Rewrite], function: Function, graph: Graph, log: PassRecord) -> None:
        self.log = log
        self.work = Rewriting(function, graph, log)
        self.rules_by_root: dict[str, list[tuple[Rewrite, Pattern]]] = {}
        for rule in rules:
            pattern = _traced(rule)
            for op in pattern.root_ops:
                self.rules_by_root.setdefault(op, []).append((rule, pattern))
        self.generation: dict[Node, int] = {}

    def run(self) -> int:
        for node in self.work.walk(into=True):
            if node.op.name in self.rules_by_root:
                self._look(node)
        return self.work.finish()

    def _look(self, root: Node) -> None:
        """Apply the first rule that matches at this root, or log the refusals and the nearest misses."""
        nearest: tuple[Rewrite, Miss] | None = None
        refused = False
        for rule, pattern in self.rules_by_root[root.op.name]:
            search = Search(pattern)
            refusal: Refusal | None = None
            about: tuple[Node, ...] = ()
            for found in search.run(root):
                match = Match(self.work.builder, pattern, root, found)
                if not rule.fits(match):
                    continue
                why_not = self._used_elsewhere(match) or rule.check(match) or rule.slower(match, self.log.target)
                why_not = why_not or self._apply(rule, match)
                if why_not is None:
                    return
                if refusal is None:
                    refusal, about = why_not, match.nodes
            if refusal is not None:
                refused = True
                self.work.refuse(rule.name, refusal, root, about)
            miss = search.miss
            if miss is not None and miss.ops >= max(LEAST_OPS_OF_NEAR_MISS, (pattern.size + 1) // 2):
                nearest = max(nearest or (rule, miss), (rule, miss), key=lambda pair: pair[1].progress)
        if nearest is not None and not refused:
            rule, miss = nearest
            hint = miss.hint if miss.ops >= _traced(rule).size else ""
            self.work.near_miss(rule.name, root, miss.edge.node, miss.reason, hint, miss.nodes, str(miss.edge))

    def _used_elsewhere(self, match: Match) -> Refusal | None:
        inside = set(match.nodes)
        for node in match.nodes:
            if node is match.root or node in match.shared:
                continue
            for value in node.results:
                readers = self.work.readers(value)
                if None in readers:
                    return Refusal(f"the {node.op.name} is an output as well", node)
                for user in readers:
                    if user is not None and user not in inside:
                        line = f" ({user.source})" if user.source else ""
                        reason = f"the {node.op.name} is used elsewhere, by {user.op.name}{line}"
                        return Refusal(reason, node, f"let that {user.op.name} read another value")
        return None

    def _apply(self, rule: Rewrite, match: Match) -> Refusal | None:
        """Apply a rule to its match. Return a Refusal if a certificate is required and fails, else None."""
        root = match.root
        built = self.work.build(rule.name, root, lambda b: rule.rewrite(b, match))
        if isinstance(built, Refusal):
            return built
        if self.log.certifying:
            graphs = (self.work.graph, self.work.graph)
            against = self.log.certify(rule.name, claim_of_match(match.nodes, built.made, root, built.results), graphs)
            if against is not None:
                return Refusal(f"rolled back, since its certificate failed: {against}", root)
            self.log.display_values.update(zip(built.replaced, built.results, strict=True))
        generation = self.generation.get(root, 0) + 1
        if generation > _GENERATIONS:
            raise PassError(
                f"rule {rule.name} keeps rewriting its own output", source=describe_source(root.source, root.scope)
            )
        self.generation.update(dict.fromkeys(built.made, generation))
        taken = [n for n in match.nodes if n not in match.shared]
        self.log.match(rule.name, self.work.function, root, taken, built.made)
        self.work.put(built, match.nodes)
        return None
