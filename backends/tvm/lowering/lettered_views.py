"""Views whose dimensions have letters, as the operands of an einsum have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.backends.tvm.lowering.routine_writer import RoutineWriter
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.storage.views import View


@dataclass(frozen=True)
class LetteredView:
    """A view whose dimensions have letters. Dimensions of size 1 have no letter and are omitted."""

    letters: tuple[str, ...]
    view: View

    @staticmethod
    def of(view: View, letters: Sequence[str | None]) -> LetteredView:
        """Create a view from the letter of each dimension; None stands for a dimension of size 1."""
        kept = [axis for axis, letter in enumerate(letters) if letter is not None]
        shape, strides = tuple(view.shape[a] for a in kept), tuple(view.strides[a] for a in kept)
        return LetteredView(tuple(str(letters[a]) for a in kept), replace(view, shape=shape, strides=strides))

    def stride(self, letter: str | None) -> Size:
        """Return the stride of a letter; 0 if the view does not have this letter."""
        return self.view.strides[self.letters.index(letter)] if letter in self.letters else ZERO

    def over(self, order: Sequence[str], sizes: Mapping[str, Size]) -> View:
        """Return the view with the dimensions of these letters. It is repeated along letters that it does not have."""
        shape = tuple(sizes[letter] for letter in order)
        return replace(self.view, shape=shape, strides=tuple(self.stride(letter) for letter in order))

    def joined(self, order: Sequence[str], sizes: Mapping[str, Size]) -> Size | None:
        """Return the stride of these letters merged into one dimension, or None if they cannot be merged."""
        found = self.over(order, sizes).merged(0, len(order))
        return None if found is None else found.strides[0]

    def copied(self, w: RoutineWriter, order: Sequence[str], sizes: Mapping[str, Size]) -> LetteredView:
        """Add a copy with these letters in this order, without gaps, and return it."""
        return LetteredView(tuple(order), w.copied(self.over(order, sizes)))
