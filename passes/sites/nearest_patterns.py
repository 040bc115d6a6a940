"""The pattern that comes nearest to a candidate site that no rule recognized, and the edge at which it fails.

The log of a pass lists near misses only: patterns of which at least half matched. A site that an expert would name may
be farther from every pattern, such as relu(rearrange(linear(x, w))), of which only the relu matches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from treadle.ir.graph import Node, Value
from treadle.passes.framework.pattern import Pattern
from treadle.passes.framework.pattern_search import Miss, Search
from treadle.passes.framework.rewrite import Rewrite, RewriteSet
from treadle.passes.pipelines import DEFAULT

_BEFORE = {
    "fuse-attention": ("fuse-softmax",),
    "fuse-activated-linear": ("fuse-gelu",),
    "fuse-gated-linear": ("fuse-gelu",),
    "fuse-residual-norm": ("fuse-normalization",),
}
"""For a pass, the passes that must have recognized a part of its site."""


def nearest_miss(name: str, nodes: Collection[Node]) -> tuple[Rewrite, Miss] | None:
    """Return the rule whose pattern got furthest at these nodes, and its mismatch, or None if no pattern starts there.

    name   a pass of the default pipeline; the rules of the passes that it depends on are tried, too
    nodes  the nodes that do the work of a site, in program order

    Of patterns that got equally far, the one with the fewest operands that do not fit is preferred, then one that
    failed inside the site, then the largest, and then the last in the program.
    """
    best: tuple[tuple[object, ...], Rewrite, Miss] | None = None
    for rule in _rules((name, *_BEFORE.get(name, ()))):
        pattern = Pattern.trace(rule.pattern)
        for node in nodes:
            if node.op.name in pattern.root_ops:
                search = Search(pattern)
                if next(search.run(node), None) is not None or search.miss is None:
                    continue  # it matches, and was refused or does not fit
                miss = search.miss
                key = (*miss.progress, -miss.unfit, _is_inside(miss.edge.found, nodes), pattern.size)
                if best is None or key >= best[0]:
                    best = key, rule, miss
    return None if best is None else best[1:]


def _rules(names: Collection[str]) -> Iterator[Rewrite]:
    for each in DEFAULT:
        if each.name in names:
            yield from each.rules if isinstance(each, RewriteSet) else (each,) if isinstance(each, Rewrite) else ()


def _is_inside(value: object, nodes: Collection[Node]) -> bool:
    return isinstance(value, Value) and value.node in nodes
