"""Operands ("sides") of a product of two bf16 matrices that are computed or are inputs, such as weights and gradients
in training.

    y = linear(x, w, to=f32)     x rounded in rows, w in pairs like a bound weight, and the kernel of a bound weight

Each side is packed before the product, once for all products that read it in the same form. If a cast has no other
consumers, its result is not written: the sides are packed directly from the operand of the cast.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width, pairs_for
from treadle.backends.tvm.kernels.narrow.round_rows import form_for, held_elements
from treadle.backends.tvm.kernels.narrow.round_squares import RoundSquares
from treadle.backends.tvm.lowering.matrix_product import rounded_rows
from treadle.backends.tvm.lowering.routine_writer import RoutineWriter
from treadle.ir.graph import Node, Value
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.sizing.sizes import ONE
from treadle.ir.storage.views import View
from treadle.ir.types import bf16, f32
from treadle.passes.lowering.read_blocks import unpacking
from treadle.passes.memory.storage_plan import How


@dataclass(frozen=True)
class NarrowSide:
    """An operand of a product.

    view   view with two dimensions: rows (or columns for the right operand), and the summed dimension. One of them is
           contiguous
    right  True if it is the right operand
    """

    view: View
    right: bool

    @staticmethod
    def of(view: View, right: bool) -> NarrowSide | None:
        """Return the side, or None if elements are contiguous along neither dimension."""
        near = any(n == ONE or stride == ONE for n, stride in zip(view.shape, view.strides, strict=True))
        return NarrowSide(view, right) if near else None

    def made(self, w: RoutineWriter, node: Node) -> View:
        """Return the side in the form that kernels read. It is packed at the first call."""
        ready = w.sides.get(self)
        return self.laid_out(w, node) if ready is None else ready

    def laid_out(self, w: RoutineWriter, node: Node) -> View:
        """Add the step that packs the side from its view, unless it was added before. Return the packed side."""
        (rows, k), (apart, step) = self.view.shape, self.view.strides
        along = step == ONE or k == ONE
        if along and not self.right:
            return rounded_rows(w, self.view, rows, k, apart, node)
        flat = not w.isa.multiplies_tiles
        kernel = RoundSquares(self.view.dtype.name, along, narrow_width(w.isa) if self.right else 0, flat)

        def make() -> View:
            own = pairs_for(w.isa).elements((rows, k)) if self.right else held_elements(form_for(w.isa), rows, k)
            to = w.scratch(bf16, (own,), f"{self.view.storage.name}_{'pairs' if self.right else 'rows'}")
            w.step(kernel, [self.view, to], [rows, k, apart if along else step], node)
            return to

        return w.made_once(self.view, kernel, make)


def narrow_sides(w: RoutineWriter, node: Node) -> tuple[NarrowSide, NarrowSide] | None:
    """Return both operands of a product of bf16 matrices, neither of which is stored in pairs already; None for any
    other node.
    """
    if not w.isa.multiplies_pairs or not isinstance(node.op, (Linear, MatMul)):
        return None
    x, y = node.inputs[:2]
    if node.result.type.dtype not in (f32, bf16):  # float64 is summed in float64
        return None
    if x.type.dtype is not bf16 or x.type.rank < 2 or y.type.rank != 2 or _is_bound(x) or _is_bound(y):
        return None
    left, right = (_side(node, at, w.view(v)) for at, v in enumerate((x, y)))
    return None if left is None or right is None else (left, right)


def _is_bound(value: Value) -> bool:
    """Return True if a value is stored in the layout of its kernels, or if its kernel decodes it."""
    return value.layout is not None or unpacking(value) is not None


def _side(node: Node, at: int, view: View) -> NarrowSide | None:
    """Return the side of a product whose operand `at` has its elements in this view, or None."""
    if at == 1:
        return NarrowSide.of(view if isinstance(node.op, Linear) else view.permuted((1, 0)), right=True)
    rows = view.merged(0, view.rank - 1)
    return None if rows is None else NarrowSide.of(rows, right=False)


def rounds_sides(w: RoutineWriter, node: Node) -> bool:
    """Lower a cast to bf16 that only such products read: add steps that pack the sides from the operand of the cast.

    Return False and add nothing for any other node.
    """
    if not isinstance(node.op, Cast) or node.op.to is not bf16 or node.inputs[0].type.dtype is not f32:
        return False
    place = w.place(node.result)
    sides = _sides_of(w, node.result, w.view(node.inputs[0])) if place.how is How.OWN else None
    if not sides or place.storage is None:
        return False
    w.rounded[place.storage] = None  # this storage is never written
    for side, of in sides.items():
        w.sides[side] = of.laid_out(w, node)
    return True


def _sides_of(w: RoutineWriter, value: Value, source: View) -> dict[NarrowSide, NarrowSide] | None:
    """Return the sides that products read of a cast value and of its views. Each is mapped to the corresponding side of
    `source`, the operand of the cast.

    Return None if the value has other consumers.
    """
    if value in w.plan.function.outputs.values():
        return None
    found: dict[NarrowSide, NarrowSide] = {}
    for reader, at in w.uses.get(value, []):
        if reader.op.is_view and w.place(reader.result).how is How.VIEW:
            shown = reader.op.viewed(source, [value.type.storage_type])
            inner = None if shown is None else _sides_of(w, reader.result, shown)
            if inner is None:
                return None
            found |= inner
            continue
        sides, of = narrow_sides(w, reader), _side(reader, at, source) if at < 2 else None
        if sides is None or of is None:
            return None
        found[sides[at]] = of
    return found
