"""Products with concatenated weights, such as an exported query, key and value, as one product for each weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.literals import Literal
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.parts import Concat, Slice
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.ops.shapes import Rearrange
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.passes.cleanup.rearrange_forms import form_of
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class SplitProducts(SiteRewrite["_Joined"]):
    """slice(matmul(x, concat(v, w)) + concat(a, b), of v alone)   -->   matmul(x, v) + a        and linear, likewise

    Weights are concatenated along the axis of the product's columns, perhaps before a transposition. With one product
    for each weight, `FuseLinear` recognizes it, a quantization plan contains the weights, and sharding can place each
    of them. `MergeProjections` merges the products again. A part that is not read is not computed.

    Skips products that no slice reads. Refuses: a reader that is not a slice of exactly one part; a bias that is
    neither a constant nor concatenated of vectors of the same sizes; a part of it that is computed from inputs.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    def sites(self, work: Rewriting) -> Iterator[_Joined]:
        for node in work.walk():
            weight = _concatenated(node)
            if weight is None:
                continue
            found = _Joined.at(node, weight, work)
            if isinstance(found, Refusal):
                work.refuse(self.name, found, node)
            elif found is not None:
                yield found

    def build(self, b: Builder, site: _Joined) -> tuple[Expr, ...] | Refusal:
        products = {part: _product(b, site, part) for part in dict.fromkeys(site.parts)}
        made = tuple([products[part] for part in site.parts])
        if any(x.type != value.type for x, value in zip(made, site.replaced, strict=True)):
            return Refusal("the weights split their columns into other axes than the slices")
        return made


@dataclass(frozen=True)
class _Weight:
    """The concatenated weights of a product.

    parts    the weights
    turned   True if the concatenated weights are transposed before the product
    axis     the axis of a part whose size is its number of columns
    """

    parts: tuple[Value, ...]
    turned: bool
    axis: int

    @property
    def sizes(self) -> list[Size]:
        """The number of columns of each part."""
        return [part.type.shape[self.axis] for part in self.parts]

    @property
    def edges(self) -> list[tuple[Size, Size]]:
        """The first column of each part, and the column after its last one."""
        return list(pairwise(accumulate(self.sizes, initial=ZERO)))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Joined(Site):
    """A product with concatenated weights, of which the root's readers slice parts.

    weight  the weights
    biases  for each weight, the vectors that are added to its columns
    parts   for each replaced slice, the number of its weight
    """

    weight: _Weight
    biases: Sequence[Sequence[Value]]
    parts: Sequence[int]

    @staticmethod
    def at(product: Node, weight: _Weight, work: Rewriting) -> _Joined | Refusal | None:
        """Return the site at a product; None if no slice reads it."""
        biases = list[Sequence[Value]]()
        added, last = list[Node](), product
        unfit: Refusal | None = None
        if len(product.inputs) > 2:
            unfit = _add_bias(product.inputs[2], product, weight, biases)
        while (add := _addition(last, work)) is not None:
            (bias,) = [v for v in add.inputs if v is not last.result]
            unfit = unfit or _add_bias(bias, add, weight, biases)
            last = add
            added.append(add)
        readers = work.readers(last.result)
        slices = [node for node in readers if node is not None and isinstance(node.op, Slice)]
        if not slices:
            return None
        other = [node for node in readers if node not in slices]
        if other:
            what = other[0].op.name if other[0] is not None else "an output"
            return Refusal(f"{what} reads the product with all {len(weight.parts)} weights", other[0])
        edges, parts = weight.edges, list[int]()
        for node in slices:
            part = _part(node, edges)
            if part is None:
                return Refusal("the slice is not exactly the columns of one weight", node)
            parts.append(part)
        if unfit is not None:
            return unfit
        slices = list(dict.fromkeys(slices))
        return _Joined(
            root=product,
            nodes=(*added, *slices),
            replaced=tuple([node.result for node in slices]),
            place=last,
            weight=weight,
            biases=[tuple(column) for column in zip(*biases, strict=True)] if biases else [()] * len(weight.parts),
            parts=parts,
        )


def _concatenated(node: Node) -> _Weight | None:
    """Return the weights of a product with concatenated weights; None for any other node."""
    if not isinstance(node.op, (Linear, MatMul)):
        return None
    x, matrix = node.inputs[:2]
    turned = matrix.node is not None and isinstance(matrix.node.op, Rearrange)
    if turned:
        assert matrix.node is not None
        pattern, matrix = matrix.node.op.attributes["pattern"], matrix.node.inputs[0]
        if not form_of(pattern, matrix.type).is_transposition:
            return None
    if matrix.node is None or not isinstance(matrix.node.op, Concat) or matrix.type.rank != 2 or not x.type.rank:
        return None
    parts = matrix.node.inputs
    axis = place(matrix.node.op.axis, 2)
    columns = 0 if isinstance(node.op, Linear) is not turned else 1
    if axis != columns or len(parts) < 2 or not all(_is_stored(part) for part in parts):
        return None
    return _Weight(parts, turned, axis)


def _is_stored(value: Value) -> bool:
    """Return True for a weight, a constant, or a moved one."""
    while value.node is not None and isinstance(value.node.op, Rearrange):
        value = value.node.inputs[0]
    return value.weight is not None or value.kind == "constant"


def _addition(node: Node, work: Rewriting) -> Node | None:
    """Return the only reader of a node, if it adds a vector to each row."""
    readers = work.readers(node.result)
    if len(readers) != 1 or readers[0] is None or not isinstance(readers[0].op, Add):
        return None
    add = readers[0]
    others = [v for v in add.inputs if v is not node.result]
    return add if len(others) == 1 and others[0].type.rank <= 1 and add.result.type == node.result.type else None


def _add_bias(bias: Value, at: Node, weight: _Weight, biases: list[Sequence[Value]]) -> Refusal | None:
    """Append the part of a bias for each weight, or return the reason why the bias has no such parts."""
    if all(size.constant == 1 for size in bias.type.shape):
        biases.append([bias] * len(weight.parts))
        return None
    if bias.literal is not None:
        biases.append([_elements(bias.literal, start, stop) for start, stop in weight.edges])
        return None
    parts = bias.node.inputs if bias.node is not None and isinstance(bias.node.op, Concat) else ()
    if [part.type.shape[0] for part in parts] != weight.sizes:
        return Refusal("the bias is not concatenated of one vector for each weight", at)
    if not all(_is_stored(part) for part in parts):
        return Refusal("a part of the bias is computed from inputs", at)
    biases.append(parts)
    return None


def _elements(literal: Literal, start: Size, stop: Size) -> Value:
    return Value.constant(Literal.of(literal.array[start.constant : stop.constant], literal.dtype))


def _part(node: Node, edges: Sequence[tuple[Size, Size]]) -> int | None:
    """Return the number of the weight whose columns a slice of the product reads; None for any other slice."""
    op, x = node.op, node.inputs[0]
    assert isinstance(op, Slice)
    if op.stride != 1 or place(op.axis, x.type.rank) != x.type.rank - 1:
        return None
    span = op.span(x.type.shape[-1])
    return edges.index(span) if span in edges else None


def _product(b: Builder, site: _Joined, part: int) -> Expr:
    """Build the product of x with one weight, and add the biases of its columns."""
    x, weight, biases = site.root.inputs[0], b.expr(site.weight.parts[part]), site.biases[part]
    if site.weight.turned:
        weight = b.rearrange(weight, pattern="a b -> b a")
    held = len(site.root.inputs) - 2
    y = b.expr(b.emit(site.root.op, [x, weight.value, *(biases[:held] or site.root.operands[2:])]).result)
    for bias in biases[held:]:
        y = y + b.expr(bias)
    return y
