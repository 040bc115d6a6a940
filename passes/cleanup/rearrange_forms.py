"""A normal form of rearranges: equal rearranges have equal forms, and two consecutive rearranges become one.

    b s (heads=12 d) -> b heads s d        (0)(1)(2 3) -> (0)(2)(1)(3)

A form lists, for each dimension before and after, the atoms whose product it is, outermost first. Atoms of size 1 are
left out. Atoms that stay neighbours are one atom, so that splitting and joining again is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from treadle.ir.axes import AxisDim
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.ops.shapes import Rearrange
from treadle.ir.rules.axis_splitting import common_pieces
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.types import Type

Atoms = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RearrangeForm:
    """The normal form of a rearrange.

    before, after   the atoms of each dimension, numbered in the order before
    sizes, names    the size and the name of each atom; a name is None if the composed rearranges do not agree on one
    given           the atoms whose size the pattern states
    """

    before: Atoms
    after: Atoms
    sizes: tuple[Size, ...] = field(compare=False)
    names: tuple[str | None, ...] = field(compare=False)
    given: frozenset[int] = field(compare=False)

    @property
    def is_identity(self) -> bool:
        return self.before == self.after

    @property
    def is_transposition(self) -> bool:
        """True if the form swaps the two axes of a matrix."""
        return len(self.before) == len(self.after) == 2 and self.after == self.before[::-1]

    @property
    def inferred(self) -> frozenset[int]:
        """The atoms whose size a pattern may omit, one for each dimension."""
        return frozenset(
            max(dim, key=lambda a: (len(self.sizes[a].symbols), a not in self.given)) for dim in self.before if dim
        )

    @property
    def pattern(self) -> str:
        """The form as the pattern of a rearrange."""
        symbols = {s for size in self.sizes for s in size.symbols}
        taken = symbols | {n for n in self.names if n}
        letters = iter(axis_letters(len(self.names), taken))
        names = [n if n and n not in symbols else next(letters) for n in self.names]
        given = {a: f"{names[a]}={self.sizes[a]}" for dim in self.before for a in dim if a not in self.inferred}
        left = [_side([given.get(a, names[a]) for a in dim]) for dim in self.before]
        right = [_side([names[a] for a in dim]) for dim in self.after]
        return f"{' '.join(left)} -> {' '.join(right)}".strip()


@lru_cache(maxsize=2048)
def form_of(pattern: str, type: Type) -> RearrangeForm:
    """Return the form of one rearrange, applied to an operand of this type."""
    before, after, atoms = _read(pattern, type)
    return normal_form(before, after, atoms)


@lru_cache(maxsize=2048)
def composed(first: str, second: str, type: Type) -> RearrangeForm | None:
    """Return the form of two rearranges in a row, or None if their splits of one dimension do not divide each other."""
    before, between, atoms = _read(first, type)
    (middle,) = Rearrange(pattern=first).infer([type])
    taken, after, others = _read(second, middle)
    atoms |= {f"second {name}": atom for name, atom in others.items()}
    pieces: dict[str, list[str]] = {}
    for ours, theirs in zip(between, taken, strict=True):
        refined_dim = _refined(ours, [f"second {n}" for n in theirs], atoms)
        if refined_dim is None:
            return None
        pieces |= refined_dim

    def refined(dims: Sequence[Sequence[str]], prefix: str = "") -> list[list[str]]:
        return [[piece for name in dim for piece in pieces.get(prefix + name, [prefix + name])] for dim in dims]

    return normal_form(refined(before), refined(after, "second "), atoms)


@lru_cache(maxsize=2048)
def reshaping_pattern(type: Type, shape: tuple[Size, ...]) -> str | None:
    """Return the pattern of a rearrange that reshapes a type to another shape with the same number of elements.

    Return None if an axis of one side is not a product of whole axes of the other, or if patterns cannot express a
    size.
    """
    factors = [[f.size for f in dim.factors if f.size != ONE] for dim in type.dims]
    atoms = {f"x{i} {k}": PatternAtom(size) for i, dim in enumerate(factors) for k, size in enumerate(dim)}
    atoms |= {f"y{i}": PatternAtom(size) for i, size in enumerate(shape) if size != ONE}
    if any(atom.size.constant == 0 for atom in atoms.values()):
        return None
    ours, theirs = ([n for n in atoms if n.startswith(side)] for side in "xy")
    pieces = _refined(ours, theirs, atoms)
    if pieces is None:
        return None
    before = [[p for k in range(len(dim)) for p in pieces[f"x{i} {k}"]] for i, dim in enumerate(factors)]
    after = [pieces.get(f"y{i}", []) for i in range(len(shape))]
    form = normal_form(before, after, atoms)
    given = [form.sizes[a] for dim in form.before for a in dim if a not in form.inferred]
    if any(size.constant is None and size.as_symbol is None for size in given):
        return None
    return form.pattern


@dataclass(frozen=True)
class PatternAtom:
    """A factor of a dimension: its size, its name in a pattern, and True if the pattern states its size."""

    size: Size
    name: str | None = None
    given: bool = False


def _read(pattern: str, type: Type) -> tuple[list[list[str]], list[list[str]], dict[str, PatternAtom]]:
    """Parse a rearrange pattern. Return the input and the output dimensions, each as lists of factor names, and the
    factors by name. Factors of size 1 are omitted.
    """
    application = Rearrange(pattern=pattern).apply([type])
    sized = {n: d.size for n, d in application.dims.items() if not d.is_one}
    given = Rearrange(pattern=pattern).rule([type.rank]).known_sizes
    atoms = {n: PatternAtom(size, n if n.isidentifier() else None, n in given) for n, size in sized.items()}

    def dims(side: Sequence[AxisDim]) -> list[list[str]]:
        return [[n for n in d.factors if n in sized] for d in side]

    return dims(application.operands[0] or ()), dims(application.results[0]), atoms


def _refined(ours: Sequence[str], theirs: Sequence[str], atoms: dict[str, PatternAtom]) -> dict[str, list[str]] | None:
    """Return the common pieces of each factor of two equal products. Return None if a factor of one product would end
    inside a piece of the other.

    A piece that is a whole factor keeps its name: the name in `ours` if a pattern states its size, else the name in
    `theirs`. Other pieces get new names.
    """
    found = common_pieces([atoms[n].size for n in ours], [atoms[n].size for n in theirs])
    if found is None:
        return None
    wholes = [
        {axis[0]: name for name, axis in zip(names, axes, strict=True) if len(axis) == 1}
        for names, axes in ((ours, found.before), (theirs, found.after))
    ]
    named: list[str] = []
    for piece, size in enumerate(found.sizes):
        a, b = (whole.get(piece) for whole in wholes)
        name = a if a is not None and (b is None or atoms[a].name) else b
        if name is None:
            name = f"piece {len(atoms)}"
            atoms[name] = PatternAtom(size)
        named.append(name)
    both = ((ours, found.before), (theirs, found.after))
    return {name: [named[p] for p in axis] for names, axes in both for name, axis in zip(names, axes, strict=True)}


def normal_form(before: list[list[str]], after: list[list[str]], atoms: dict[str, PatternAtom]) -> RearrangeForm:
    """Return the form of dimensions in named atoms. Atoms that are neighbours in the same order on both sides become
    one atom.
    """
    follower = {pair for dim in after for pair in pairwise(dim)}
    groups: list[list[str]] = []
    numbered: list[tuple[int, ...]] = []
    for dim in before:
        start = len(groups)
        for name in dim:
            if len(groups) > start and (groups[-1][-1], name) in follower:
                groups[-1].append(name)
            else:
                groups.append([name])
        numbered.append(tuple(range(start, len(groups))))
    number = {group[0]: i for i, group in enumerate(groups)}
    names = [atoms[group[0]].name if len(group) == 1 else None for group in groups]
    return RearrangeForm(
        before=tuple(numbered),
        after=tuple(tuple(number[n] for n in dim if n in number) for dim in after),
        sizes=tuple(product(atoms[n].size for n in group) for group in groups),
        names=tuple(n if n not in names[:i] else None for i, n in enumerate(names)),
        given=frozenset(i for i, group in enumerate(groups) if all(atoms[n].given for n in group)),
    )


def _side(names: Sequence[str]) -> str:
    return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"
