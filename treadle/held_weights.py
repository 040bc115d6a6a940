"""A read-only mapping of a compiled model's weights, with read-only arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from treadle.files.converted_arrays import ConvertedArray
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import UsageError
from treadle.ir.source_lines import user_line

Array = np.ndarray[Any, Any]
_SHOWN = 4  # maximum number of names in an error


class UnknownWeightError(UsageError, KeyError):
    """The error for a weight that a model lacks. The class is also a KeyError, so that `get` returns its default."""


class HeldWeights(Mapping[str, Array]):
    """A mapping of weights by name to read-only views. Nothing is copied, but a `ConvertedArray` is computed when it is
    first accessed.

    stored  the same weights, without views: an array that is computed from a file is still a `ConvertedArray`

    The executable may hold copies of weights in other layouts, so a write would change the results only in part. To use
    other weights, compile again: `t.compile(model, weights={**exe.weights, "wte.weight": other})`.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.stored: dict[str, Any] = {name: _unwritable(array) for name, array in stored_weights(arrays).items()}

    def __getitem__(self, name: str) -> Array:
        if name not in self.stored:
            near = [each for each in self.stored if each.startswith(f"{name}.")] or NearestNames(self.stored).of(
                str(name)
            )
            raise UnknownWeightError(
                f"the model has no weight {printable(str(name))}",
                source=str(user_line() or "") or None,
                hint="one of " + ", ".join((near or list(self.stored))[:_SHOWN]),
            )
        array = self.stored[name]
        return array.array if isinstance(array, ConvertedArray) else array

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __repr__(self) -> str:
        held = sum(array.nbytes for array in self.stored.values())
        return f"<{len(self)} weight{'s' * (len(self) != 1)}, {held:,} bytes>"

    def __setitem__(self, name: str, value: object) -> NoReturn:
        """Raise UsageError: the weights of a compiled model are fixed."""
        self._refuse(name)

    def __delitem__(self, name: str) -> NoReturn:
        """Raise UsageError: the weights of a compiled model are fixed."""
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise UsageError(
            "the weights of a compiled model cannot be changed",
            received=printable(str(name)),
            source=str(user_line() or "") or None,
            hint=f"treadle.compile(model, weights={{**exe.weights, {name!r}: array}})",
        )


def stored_weights(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return weights for a backend, which reads a `ConvertedArray` itself."""
    return weights.stored if isinstance(weights, HeldWeights) else weights


def _unwritable(array: Any) -> Any:
    """Return a read-only view of a NumPy array. Return any other object, such as a torch tensor, unchanged."""
    if not isinstance(array, np.ndarray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view
