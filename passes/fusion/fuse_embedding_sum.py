"""Fusion of sums of embeddings into one op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Node, Value
from treadle.ir.ops.arithmetic import Add, Div, Mul
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.elementwise import Cast, Neg
from treadle.ir.ops.embedding_sums import MOST_TABLES, EmbeddingSum
from treadle.ir.ops.indexing import Embedding, Gather
from treadle.passes.framework.facts import BEFORE_LOWERING, UNMERGED, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite

_SCALINGS = (Mul, Div, Cast, Neg)
_MOST_STEPS = 8


@dataclass(frozen=True)
class FuseEmbeddingSum(SiteRewrite["_Sum"]):
    """embedding(t, i) + embedding(u, j) + ...   -->   embedding_sum(t, u, ..., i, j, ...)

    The additions may nest in any way and order; indices may broadcast. A gather of rows of a weight is also an
    embedding. One chain of additions keeps its order, so its results are bitwise identical; (a + b) + (c + d) becomes
    one chain, whose last digits may differ.

    Refuses: a term that is not an embedding, or that is scaled or cast before it is added (the sum of the others is
    fused without it if they are added to each other first); an embedding, or a partial sum, that is used elsewhere;
    embeddings of different widths; more than eight embeddings.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING
    ends: ClassVar[Facts] = frozenset({UNMERGED})

    def sites(self, work: Rewriting) -> Iterator[_Sum]:
        if sum(lookup_of(node) is not None for node in work.function.nodes) < 2:
            return iter(())
        return _Sums(self.name, work).sites()

    def build(self, b: Builder, site: _Sum) -> Expr:
        operands = [b.expr(v) for v in (*site.lookup.tables, *site.lookup.indices)]
        return b.embedding_sum(*operands, tables=len(site.lookup.tables))


@dataclass(frozen=True)
class Lookup:
    """The operands of one embedding, or of a sum of them: tables, and the indices of each."""

    tables: tuple[Value, ...]
    indices: tuple[Value, ...]

    def __add__(self, other: Lookup) -> Lookup:
        return Lookup(self.tables + other.tables, self.indices + other.indices)


def lookup_of(node: Node | None) -> Lookup | None:
    """Return the lookup that a node performs, or None if it performs none."""
    if node is None:
        return None
    if isinstance(node.op, EmbeddingSum):
        return Lookup(node.inputs[: node.op.tables], node.inputs[node.op.tables :])
    if isinstance(node.op, Embedding):
        return Lookup((node.inputs[0],), (node.inputs[1],))
    if isinstance(node.op, Gather) and node.result.type.dtype.kind != "bool":
        table, indices = node.inputs
        if table.kind in ("parameter", "constant") and table.type.rank == 2 and place(node.op.axis, 2) == 0:
            return Lookup((table,), (indices,))
    return None


def is_of_embeddings(value: Value, depth: int = 0) -> bool:
    """Return True if a term of a sum is an embedding, possibly scaled, cast or moved, or a sum of these."""
    node = value.node
    if node is None or depth > _MOST_STEPS:
        return False
    if lookup_of(node) is not None:
        return True
    if isinstance(node.op, Add):
        return all(is_of_embeddings(v, depth + 1) for v in node.inputs)
    scaled = node.op.is_view or isinstance(node.op, _SCALINGS)
    return scaled and any(is_of_embeddings(v, depth + 1) for v in node.inputs)


@dataclass
class _Tree:
    """The terms of a sum, in the order in which they are added, and all additions of the sum except the last, the
    root.
    """

    terms: list[Value]
    inner: list[Node] = field(default_factory=list)


def _readers_of_sums(function: Function) -> dict[Value, list[Node | None]]:
    """Return the readers of each embedding and each sum, with None for an output. Other values, of which there may be
    many, are left out.
    """
    found: dict[Value, list[Node | None]] = {
        node.results[0]: [] for node in function.nodes if isinstance(node.op, Add) or lookup_of(node) is not None
    }
    for node in function.nodes:
        for value in node.operands:
            if value in found:
                found[value].append(node)
    for value in function.results:
        if value in found:
            found[value].append(None)
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sum(Site):
    """The last of several additions, with the tables and indices of the embeddings in the sum."""

    lookup: Lookup


class _Sums:
    def __init__(self, rule: str, work: Rewriting) -> None:
        self.rule, self.work = rule, work
        self.readers = _readers_of_sums(work.function)
        self.refused: set[Value] = set()

    def sites(self) -> Iterator[_Sum]:
        """Yield the sums, the largest first. A sum within a fused sum is not a separate site."""
        within: set[Node] = set()
        for node in reversed(self.work.function.nodes):
            if not isinstance(node.op, Add) or node in within:
                continue
            tree = self._tree(node)
            if sum(map(is_of_embeddings, tree.terms)) < 2 or self._is_refused(node, tree.terms):
                continue
            within.update(tree.inner)
            taken = (*tree.inner, *(v.node for v in tree.terms if v.node is not None))
            yield _Sum(root=node, nodes=taken, lookup=sum(map(self._lookup, tree.terms), Lookup((), ())))

    def _tree(self, root: Node) -> _Tree:
        left, right = (self._branch(v) for v in root.inputs)
        if len(right.terms) > 1 == len(left.terms):
            left, right = right, left
        return _Tree(left.terms + right.terms, left.inner + right.inner)

    def _branch(self, value: Value) -> _Tree:
        node = value.node
        if node is None or not isinstance(node.op, Add) or len(self.readers[value]) > 1:
            return _Tree([value])
        tree = self._tree(node)
        return _Tree(tree.terms, [node, *tree.inner])

    def _is_refused(self, root: Node, terms: Sequence[Value]) -> bool:
        """Return True if some term prevents the fusion. The refusal is logged once for each term."""
        against = [(value, why) for value in terms if (why := self._why_not(value))]
        for value, why in against:
            if value not in self.refused:
                self.refused.add(value)
                hint = "add the embeddings to each other first" if why.endswith(", not an embedding") else ""
                self._refuse(value.node or root, why, hint, root)
        if against:
            return True
        tables = [table for value in terms for table in self._lookup(value).tables]
        other = next((t for t in tables if t.type.shape[1] != tables[0].type.shape[1]), None)
        if other is not None:
            self._refuse(root, f"tables are of different widths: {tables[0].type} and {other.type}")
            return True
        if len(tables) > MOST_TABLES:
            self._refuse(root, f"{len(tables)} embeddings are added, but embedding_sum takes at most {MOST_TABLES}")
            return True
        return False

    def _refuse(self, node: Node, why: str, hint: str = "", root: Node | None = None) -> None:
        self.work.refuse(self.rule, Refusal(why, node, hint), nodes=() if root is None else (root,))

    def _why_not(self, value: Value) -> str:
        node = value.node
        if node is None:
            return f"a term is {value.name}, not an embedding"
        if len(self.readers.get(value, ())) > 1:
            if None in self.readers[value]:
                return f"the {node.op.name} is an output as well"
            other = next((n for n in self.readers[value] if n is not None and not isinstance(n.op, Add)), None)
            by = "" if other is None else f", by {other.op.name}" + (f" ({other.source})" if other.source else "")
            return f"the {node.op.name} is used elsewhere{by}"
        if lookup_of(node) is not None:
            return ""
        if is_of_embeddings(value):
            return f"a term is {node.op.name} of an embedding, not the embedding itself"
        return f"a term is {node.op.name}, not an embedding"

    @staticmethod
    def _lookup(value: Value) -> Lookup:
        found = lookup_of(value.node)
        assert found is not None
        return found
