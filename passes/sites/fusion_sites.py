"""Candidate sites: subgraphs that a fused op could compute, whether or not a rule recognises them.

    attention       a softmax between two products;  attention, attention_with_probabilities
    normalization   the mean of a square, and the division by its root;  layer_norm, rms_norm
    activation      erf, tanh + 1 or sigmoid, and the multiplication by it;  gelu, gelu_tanh, silu, quick_gelu
    rotary          halves that swap position and sign, x cos a + y sin a;  rotary
    linear          a product with a weight transposed, and a bias added to it;  linear
    gate            two products, one of them activated and multiplied by the other;  gated_linear
    epilogue        a product and the activation of it, unless it is a gate;  activated_linear
    residual        the sum of two computed values, and the norm of it;  add_layer_norm, add_rms_norm
    embedding       two embeddings or more in one sum;  embedding_sum
    projection      products of one value with several weights, none of them part of a gate or epilogue;  projections
    scale           a number that scales the result of a product or a norm;  linear, rms_norm, layer_norm

A product with a weight that is stored as [in, out] is not a site. Its op is matmul, and a backend that packs weights
also packs this weight, and adds the bias when it stores the product. Fusing it would gain nothing and cost a copy.

The search accepts more than the rules: it looks for sites that an expert would name, so that sites that the rules miss
are visible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.arithmetic import Add, Div, Maximum, Minimum, Mul, Pow, Sub
from treadle.ir.ops.elementwise import Cast, Cos, Erf, Exp, Neg, Reciprocal, Rsqrt, Sigmoid, Sin, Sqrt, Tanh
from treadle.ir.ops.logic import Where
from treadle.ir.ops.parts import Concat, Slice
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.ops.reductions import ReduceMean, ReduceSum
from treadle.ir.ops.shapes import Expand, Rearrange
from treadle.passes.cleanup.round_trips import counts_steps, round_trip_at, round_trip_from
from treadle.passes.fusion.attention.probabilities import softmax_at
from treadle.passes.sites.product_sites import epilogue_nodes, gate_nodes
from treadle.passes.sites.projection_sites import products_of_one_value, scale_nodes
from treadle.passes.sites.stream_sites import embedding_nodes, normed_value, residual_nodes

KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "projection": ("merge-projections", ("projections",)),
    "scale": ("fold-scale", ("linear", "rms_norm", "layer_norm")),
    "attention": ("fuse-attention", ("attention", "attention_with_probabilities")),
    "normalization": ("fuse-normalization", ("layer_norm", "rms_norm")),
    "activation": ("fuse-gelu", ("gelu", "gelu_tanh", "silu", "quick_gelu")),
    "rotary": ("fuse-rotary", ("rotary",)),
    "linear": ("fuse-linear", ("linear",)),
    "gate": ("fuse-gated-linear", ("gated_linear",)),
    "epilogue": ("fuse-activated-linear", ("activated_linear",)),
    "residual": ("fuse-residual-norm", ("add_layer_norm", "add_rms_norm")),
    "embedding": ("fuse-embedding-sum", ("embedding_sum",)),
}
"""The pass that fuses each kind of site, and the fused ops. An op belongs to the last kind that lists it."""

_SCALING = (Add, Sub, Mul, Div, Neg, Where, Tanh, Maximum, Minimum, Pow, Cast)
"""Ops between an argument and the value that its activation gates. exp is not among them, since exp(x) is a different
value than x.
"""
_MOST_STEPS = 24


@dataclass(frozen=True, eq=False)
class FusionSite:
    """A candidate site in one distinct function.

    anchor  the node that identifies the site: the softmax, the mean, the product
    nodes   the nodes of the site, the anchor first
    op      the fused op, if the site is already a single op
    """

    kind: str
    function: str
    anchor: Node
    nodes: tuple[Node, ...]
    op: str | None = None

    @property
    def anchors(self) -> tuple[Node, ...]:
        """The nodes that each identify the site, since a rule may fuse only some of several products, or a part of a
        sum.
        """
        return self.nodes if self.kind in ("projection", "embedding") else (self.anchor,)


def find_sites(graph: Graph, unfused: Collection[Node] = ()) -> list[FusionSite]:
    """Return every candidate site of every distinct function, callees first, in program order.

    unfused  anchors of gates and epilogues that were not fused, so their products may belong to other sites
    """
    return [site for function in graph.functions.values() for site in _Finder(function, unfused).sites()]


class _Finder:
    def __init__(self, function: Function, unfused: Collection[Node]) -> None:
        self.function, self.unfused = function, unfused
        self.weights = set(function.parameters.values())
        self.users: dict[Value, list[Node]] = {}
        for node in function.nodes:
            for value in dict.fromkeys(node.inputs):
                self.users.setdefault(value, []).append(node)
        self.gates = {node: found for node in function.nodes if (found := gate_nodes(node)) is not None}
        self.gated = {each for node, nodes in self.gates.items() if node not in unfused for each in nodes}
        self.norms: dict[Value, list[Node]] = {}
        """The nodes of the norms of each value that is normalized."""
        for node in function.nodes:
            spelled = self._normalization(node)
            normed = normed_value(node, spelled)
            if normed is not None:
                self.norms.setdefault(normed, []).extend([node, *(spelled or ())])

    def sites(self) -> Iterator[FusionSite]:
        fused = {op: kind for kind, (_, ops) in KINDS.items() for op in ops}
        finders = (
            *(self._attention, self._normalization, self._activation, self._rotary, self._linear),
            *(self._gate, self._epilogue, self._residual, self._embedding, self._projection, self._scale),
        )
        for node in self.function.nodes:
            if node.op.name in fused:
                yield FusionSite(fused[node.op.name], self.function.name, node, (node,), node.op.name)
            for find in finders:
                nodes = find(node)
                if nodes is not None:
                    kind = find.__name__.removeprefix("_")
                    yield FusionSite(kind, self.function.name, node, tuple(dict.fromkeys((node, *nodes))))

    # -- walking -----------------------------------------------------------------------------------------------

    def _readers(self, node: Node) -> list[Node]:
        return [user for value in node.results for user in self.users.get(value, ())]

    def _down(self, node: Node, through: tuple[type[Op], ...], stop: Callable[[Node], bool]) -> list[Node]:
        """Return the nodes from a node's readers down to the first for which `stop` returns True, or an empty list if
        there is none.
        """
        return self._search(self._readers(node), self._readers, lambda n: isinstance(n.op, through), stop)

    @staticmethod
    def _search(
        start: Iterable[Node | None],
        neighbours: Callable[[Node], Iterable[Node | None]],
        through: Callable[[Node], bool],
        stop: Callable[[Node], bool],
    ) -> list[Node]:
        """Return the path to the nearest node for which `stop` returns True, over nodes for which `through` returns
        True.
        """
        paths: dict[Node, list[Node]] = {}
        pending = [(node, [node], 0) for node in start if node is not None]
        while pending:
            node, path, depth = pending.pop(0)
            if node in paths:
                continue
            paths[node] = path
            if stop(node):
                return path
            if depth < _MOST_STEPS and through(node):
                pending += [(n, [*path, n], depth + 1) for n in neighbours(node) if n is not None]
        return []

    # -- the kinds ---------------------------------------------------------------------------------------------

    def _attention(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of a softmax, or of exp(x - max) / sum, between two products. Return None if there is no
        such site. A linear layer above gives no scores: its results are classes, or the experts of a router.
        """
        own: Sequence[Node]
        if (weighting := softmax_at(node)) is not None:
            scores, own = weighting.scores, weighting.nodes
        elif isinstance(node.op, Div) and (found := _spelled_softmax(node)) is not None:
            scores, own = found
        else:
            return None
        above = self._search([scores.node], _above_rounding, _keeps_scores_apart, lambda n: n.is_contraction)
        if above and isinstance(above[-1].op, Linear) and above[-1].inputs[1] in self.weights:
            return None
        below = self._search(
            self._readers_below_rounding(node),
            self._readers_below_rounding,
            _keeps_scores_apart,
            lambda n: n.is_contraction,
        )
        return [*own, *above, *below] if above and below else None

    def _readers_below_rounding(self, node: Node) -> list[Node]:
        """Return the readers of a node's results. If a quantizer rounds a result, return the last node of the rounding
        instead.
        """
        trips = [round_trip_from(value, lambda v: self.users.get(v, ())) for value in node.results]
        return [trip.nodes[0] for trip in trips if trip is not None] or self._readers(node)

    def _normalization(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of mean(x^2) with a root after it, or None."""
        if not isinstance(node.op, (ReduceMean, ReduceSum)) or (square := _square(node.inputs[0])) is None:
            return None
        root = self._down(node, (Add, Cast, Mul, Div, Maximum), _is_root)
        if not root:
            return None
        scaled = self._search(
            self._readers(root[-1]),
            self._readers,
            lambda n: isinstance(n.op, (Reciprocal, Div, Cast, Expand, Add, Maximum)),
            _is_scaling,
        )
        spread = [user for last in scaled[-1:] for user in self._readers(last) if isinstance(user.op, (Mul, Add, Cast))]
        spread += [user for last in spread[:1] for user in self._readers(last) if isinstance(user.op, (Mul, Add))]
        centered = [n for n in (square.inputs[0].node,) if n is not None and isinstance(n.op, Sub)]
        return [square, *centered, *root, *scaled, *spread]

    def _activation(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of erf(x), 1 + tanh(x), or x sigmoid(x), or None."""
        if not isinstance(node.op, (Erf, Tanh, Sigmoid)):
            return None
        below = self._down(node, (Add, Mul, Cast), lambda n: isinstance(n.op, Mul))
        if not below or (isinstance(node.op, Tanh) and not any(isinstance(n.op, Add) for n in below)):
            return None
        argument = node.inputs[0]
        origins = _origins(argument)
        gated = [v for v in below[-1].inputs if not (v.node is not None and v.node in (node, *below))]
        if not any(origins.intersection(_origins(v)) for v in gated):
            return None
        above = [n for n in (argument.node,) if n is not None and isinstance(n.op, (Mul, Div, Add))]
        more = [user for user in self._readers(below[-1]) if isinstance(user.op, Mul)]
        return [*above, *below, *more]

    def _rotary(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of x cos a + y sin a, or of concat(-x2, x1) times a factor, or None."""
        if isinstance(node.op, Add) and len(node.inputs) == 2:
            sides = [v.node for v in node.inputs if v.node is not None and isinstance(v.node.op, Mul)]
            waves = [[_waves(v) for v in side.inputs] for side in sides]
            if len(sides) == 2 and any({"cos"} in one and {"sin"} in other for one, other in (waves, waves[::-1])):
                return [*sides, *(n for side in sides for n in _makers(side) if n is not None)]
            return None
        if not isinstance(node.op, Concat):
            return None
        parts = [v.node for v in node.inputs]
        if not any(p is not None and isinstance(p.op, Neg) and _is_cut(p.inputs[0]) for p in parts):
            return None
        turned = [user for user in self._readers(node) if isinstance(user.op, Mul)]
        if any(w for user in turned for v in user.inputs for w in _waves(v)):
            return None  # the sum is the site
        return [p for p in parts if p is not None] + turned

    def _gate(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of act(x g) * (x u), or None."""
        return self.gates.get(node)

    def _epilogue(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of act(x w), unless it is a gate, or None."""
        if node in self.gated:
            return None
        return epilogue_nodes(node, self._activation(node))

    def _projection(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of x u, x v, ..., or None."""
        return self._projections.get(node)

    @cached_property
    def _projections(self) -> Mapping[Node, Sequence[Node]]:
        finished = set(self.gated)
        activated = (node for node in self.function.nodes if node not in self.unfused)
        finished.update(each for node in activated for each in self._epilogue(node) or ())
        return products_of_one_value(self.function, finished)

    def _scale(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of (x w) * c or norm(x) * c, or None. A quantizer's scale is excluded, since it cannot be
        folded.
        """
        return None if counts_steps(node, self._readers(node)) else scale_nodes(node)

    def _residual(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of norm(x + residual), or None."""
        return residual_nodes(node, self.norms)

    def _embedding(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of embedding(t, i) + embedding(u, j), or None."""
        return embedding_nodes(node, self.users)

    def _linear(self, node: Node) -> Sequence[Node] | None:
        """Return the nodes of matmul(x, transpose(w)) + bias, or None."""
        moved = node.inputs[1].node if isinstance(node.op, MatMul) else None
        if moved is None or not isinstance(moved.op, Rearrange):
            return None
        weight = moved.inputs[0]
        if weight.kind not in ("parameter", "constant") or weight.type.rank != 2:
            return None
        return [moved, *(user for user in self._readers(node) if isinstance(user.op, Add))]


def _makers(node: Node) -> list[Node | None]:
    return [v.node for v in node.inputs]


def _above_rounding(node: Node) -> list[Node | None]:
    """Return the nodes that compute a node's operands. For the last node of a quantizer's rounding, return the node
    that computes the rounded value.
    """
    trip = round_trip_at(node)
    return _makers(node) if trip is None else [trip.value.node]


def _keeps_scores_apart(node: Node) -> bool:
    """Return True if an op computes on scores one by one, or joins scores with others, such as those of attention
    sinks, or takes a part of them.
    """
    return _keeps_elements_apart(node) or isinstance(node.op, (Concat, Slice))


def _keeps_elements_apart(node: Node) -> bool:
    return node.is_elementwise or node.op.is_view


def _is_scaling(node: Node) -> bool:
    return isinstance(node.op, (Mul, Div)) and not any(v.literal is not None for v in node.inputs)


def _is_root(node: Node) -> bool:
    if isinstance(node.op, Pow):
        exponent = node.inputs[1].literal
        return exponent is not None and exponent.scalar in (0.5, -0.5)
    return isinstance(node.op, (Sqrt, Rsqrt))


def _square(value: Value) -> Node | None:
    node = value.node
    if node is None:
        return None
    if isinstance(node.op, Mul) and node.inputs[0] is node.inputs[1]:
        return node
    if isinstance(node.op, Pow) and node.inputs[1].literal is not None and node.inputs[1].literal.scalar == 2:
        return node
    return None


def _spelled_softmax(node: Node) -> tuple[Value, list[Node]] | None:
    """Return x and the nodes of exp(x - max(x)) / sum(exp(x - max(x))), or None."""
    above, below = (v.node for v in node.inputs)
    while below is not None and isinstance(below.op, (Where, Expand, Maximum, Add)):
        below = next((v.node for v in below.inputs if v.node is not None and v.type.dtype.is_float), None)
    if above is None or below is None or not isinstance(above.op, Exp) or not isinstance(below.op, ReduceSum):
        return None
    if below.inputs[0].node is not above:
        return None
    shifted = above.inputs[0]
    inner = shifted.node
    if inner is not None and isinstance(inner.op, Sub):
        return inner.inputs[0], [inner, above, below]
    return shifted, [above, below]


def _origins(value: Value) -> set[Value]:
    """Return the value, and the values from which it is computed by a few elementwise ops and moves."""
    found, pending = {value}, [(value, 0)]
    while pending:
        v, depth = pending.pop()
        if v.node is not None and isinstance(v.node.op, _SCALING) and depth < 6:
            new = [u for u in v.node.inputs if u.literal is None and u not in found]
            found.update(new)
            pending += [(u, depth + 1) for u in new]
    return found


def _waves(value: Value) -> set[str]:
    """Return "cos" and "sin" if a factor is computed from a cosine or a sine, possibly moved or joined."""
    found: set[str] = set()
    pending, depth = [value], 0
    while pending and depth < 32:
        node = pending.pop().node
        depth += 1
        if node is not None and isinstance(node.op, (Cos, Sin)):
            found.add(node.op.name)
        elif node is not None and (node.op.only_moves or isinstance(node.op, (Cast, Mul))):
            pending += node.inputs
    return found


def _is_cut(value: Value) -> bool:
    node = value.node
    return node is not None and node.op.only_moves
