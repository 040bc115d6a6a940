"""Tracking of axes through ops that move elements: the correspondence between axes of two values, whatever their
layouts.

    scores     f32[B*H, S, T]     (0 1)(2)(3)
    rearranged f32[B, H, S, T]    (0)(1)(2)(3)

A value's layout lists, for each of its dimensions, the atoms whose product it is, outermost first. Atoms are numbers;
atoms of size 1 are left out. If an atom turns out to be a product, it is split in all layouts at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from treadle.ir.axes import AxisDim
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Node, Value
from treadle.ir.ops.shapes import Expand
from treadle.ir.rules.axis_splitting import common_pieces
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.passes.cleanup.rearrange_forms import Atoms, PatternAtom, form_of, normal_form

Layout = Atoms


class Axes:
    """The atoms of one search: their sizes, and the parts of atoms that were split."""

    def __init__(self) -> None:
        self.sizes: list[Size] = []
        self._parts: dict[int, tuple[int, ...]] = {}

    def new(self, size: Size) -> tuple[int, ...]:
        """Return a dimension that consists of one new atom of this size, or of no atoms if the size is 1."""
        if size == ONE:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def of(self, value: Value) -> Layout:
        """Return a layout for a value about which nothing is known: one atom per dimension."""
        return tuple(self.new(size) for size in value.type.shape)

    def flat(self, dim: Iterable[int]) -> tuple[int, ...]:
        """Return a dimension with its split atoms replaced by their parts."""
        found: list[int] = []
        for atom in dim:
            parts = self._parts.get(atom)
            if parts is None:
                found.append(atom)
            else:
                found += self.flat(parts)
        return tuple(found)

    def resolved(self, layout: Layout) -> Layout:
        """Return a layout in atoms that are not split."""
        return tuple(map(self.flat, layout))

    def size(self, atoms: Iterable[int]) -> Size:
        return product(self.sizes[atom] for atom in atoms)

    def cut(self, dim: Sequence[int], sizes: Sequence[Size]) -> list[tuple[int, ...]] | None:
        """Split a dimension into consecutive pieces of these sizes. Return None if its atoms do not allow it."""
        atoms = self.flat(dim)
        found = common_pieces([self.sizes[atom] for atom in atoms], sizes)
        if found is None:
            return None
        pieces: list[int] = []
        for atom, parts in zip(atoms, found.before, strict=True):
            pieces += [atom] if len(parts) == 1 else self._split(atom, [found.sizes[part] for part in parts])
        return [tuple(pieces[part] for part in parts) for parts in found.after]

    def _split(self, atom: int, sizes: Sequence[Size]) -> tuple[int, ...]:
        made = tuple(range(len(self.sizes), len(self.sizes) + len(sizes)))
        self.sizes += sizes
        self._parts[atom] = made
        return made

    # -- through ops -------------------------------------------------------------------------------------------

    def above(self, node: Node, layout: Layout) -> Layout | None:
        """Return the layout of the operand of a rearrange or an expand, from the layout of its result. Return None if
        it cannot be determined.
        """
        operand = node.inputs[0]
        if isinstance(node.op, Expand):
            return narrowed(operand, layout)
        return self._rearranged(node, layout, backward=True)

    def below(self, node: Node, layout: Layout) -> Layout | None:
        """Return the layout of the result of a rearrange, from the layout of its operand. Return None if it cannot be
        determined.
        """
        return self._rearranged(node, layout, backward=False)

    def _rearranged(self, node: Node, layout: Layout, backward: bool) -> Layout | None:
        form = form_of(node.op.pattern, node.inputs[0].type)  # type: ignore[attr-defined]
        known, wanted = (form.after, form.before) if backward else (form.before, form.after)
        pieces: dict[int, tuple[int, ...]] = {}
        for dim, atoms in zip(layout, known, strict=True):
            cut = self.cut(dim, [form.sizes[atom] for atom in atoms])
            if cut is None:
                return None
            pieces |= zip(atoms, cut, strict=True)
        return tuple(self.flat(a for atom in dim for a in pieces[atom]) for dim in wanted)

    def factors(self, node: Node, layout: Layout) -> tuple[list[Layout], dict[str, tuple[int, ...]]]:
        """Return the layouts of a contraction's operands, from the layout of its result, and the atoms of each summed
        factor.
        """
        application = node.op.apply([None if v is None else v.type for v in node.operands])
        known: dict[str, tuple[int, ...]] = {}
        for dim, atoms in zip(application.results[0], layout, strict=True):
            known |= dict.fromkeys(dim.factors, atoms)
        summed: dict[str, tuple[int, ...]] = {}

        def atoms_of(dim: AxisDim) -> tuple[int, ...]:
            if not dim.factors:
                return ()
            (name,) = dim.factors
            if name not in known:
                known[name] = summed[name] = self.new(application.dims[name].size)
            return known[name]

        layouts = [tuple(map(atoms_of, dims)) for dims in application.operands if dims is not None]
        return layouts, summed

    # -- building ----------------------------------------------------------------------------------------------

    def place(self, b: Builder, x: Expr, layout: Layout, wanted: Sequence[Sequence[int]]) -> Expr:
        """Rearrange x from its layout to another layout. x is repeated along atoms that it lacks."""
        held, goal = self.resolved(layout), tuple(map(self.flat, wanted))
        there = {atom for dim in held for atom in dim}
        missing = [atom for dim in goal for atom in dim if atom not in there]
        if missing:
            spread = tuple((atom,) if atom in there else () for dim in goal for atom in dim)
            x = self._moved(b, x, held, spread)
            held = tuple((atom,) for dim in goal for atom in dim)
            x = b.expand(x, shape=tuple(self.size(dim) for dim in held))
        return self._moved(b, x, held, goal)

    def _moved(self, b: Builder, x: Expr, held: Layout, goal: Layout) -> Expr:
        names = {atom: f"a{atom}" for dim in (*held, *goal) for atom in dim}
        before, after = ([[names[atom] for atom in dim] for dim in side] for side in (held, goal))
        form = normal_form(before, after, {name: PatternAtom(self.sizes[atom]) for atom, name in names.items()})
        if form.is_identity and len(held) == len(goal):
            return x
        return b.rearrange(x, pattern=form.pattern)


def narrowed(operand: Value, layout: Layout) -> Layout:
    """Return the layout of an operand that broadcasts to a result of this layout. Dimensions of size 1 have no
    atoms.
    """
    own = layout[len(layout) - operand.type.rank :]
    return tuple(() if size == ONE else dim for size, dim in zip(operand.type.shape, own, strict=True))
