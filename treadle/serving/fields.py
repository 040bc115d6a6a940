"""Fields of a request's body. Each is read once with its type. Fields that were not read are errors that name the
field.

    fields = Fields({"model": "smollm2", "max_tokens": 16})
    fields.text("model"); fields.whole("max_tokens", least=0); fields.end()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from treadle.files.nearest_names import NearestNames
from treadle.serving.refusals import RequestRefusal

X = TypeVar("X")


class Fields:
    """The members of a JSON object, read one by one. A member that is null counts as absent.

    within  the path of the object in the body; "" for the body itself
    """

    def __init__(self, members: Mapping[str, Any], within: str = "") -> None:
        self.within = within
        self._left = {name: value for name, value in members.items() if value is not None}
        self._names = frozenset(self._left)
        self._known: set[str] = set()

    def refuse(self, name: str, message: str) -> RequestRefusal:
        """Return an error response about a field. The message continues after the field's name."""
        place = f"{self.within}.{name}" if self.within else name
        return RequestRefusal(400, f"{place} {message}", field=place)

    def take(self, name: str) -> Any:
        """Return a member unchanged, or None if it is absent."""
        self._known.add(name)
        return self._left.pop(name, None)

    def is_absent(self, name: str) -> bool:
        """Return True if the object had no such member."""
        return name not in self._names

    def text(self, name: str, *, longest: int = 1 << 20) -> str | None:
        """Return a string of at most `longest` characters, or None if it is absent."""

        def holds(x: Any) -> bool:
            return isinstance(x, str) and len(x) <= longest

        found: str | None = self._checked(name, holds, f"must be a string of at most {longest} characters")
        return found

    def truth(self, name: str, otherwise: bool = False) -> bool:
        """Return a boolean, or `otherwise` if it is absent."""
        found = self._checked(name, lambda x: isinstance(x, bool), "must be true or false")
        return otherwise if found is None else bool(found)

    def whole(self, name: str, *, least: int = 0, most: int = 2**31 - 1) -> int | None:
        """Return an integer in the range, or None if it is absent."""

        def holds(x: Any) -> bool:
            return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most

        found: int | None = self._checked(name, holds, f"must be an integer from {least} to {most}")
        return found

    def ids(self, name: str, *, most: int) -> tuple[int, ...]:
        """Return a list of at most `most` token ids; empty if it is absent."""

        def holds(x: Any) -> bool:
            return isinstance(x, list) and len(x) <= most and all(map(is_id, x))

        return tuple(self._checked(name, holds, f"must be a list of at most {most} token ids") or ())

    def biases(self, name: str, *, most: int, bound: float) -> tuple[tuple[int, float], ...]:
        """Return an object from token ids, as decimal text, to numbers from -bound to bound, as pairs; empty if it is
        absent.
        """

        def holds(x: Any) -> bool:
            return (
                isinstance(x, dict)
                and len(x) <= most
                and all(token.isascii() and token.isdecimal() and len(token) <= 10 and is_id(int(token)) for token in x)
                and all(_is_number(bias, -bound, bound) for bias in x.values())
            )

        wanted = f"must be an object of at most {most} token ids with numbers from {-bound:g} to {bound:g}"
        return tuple([(int(token), float(bias)) for token, bias in (self._checked(name, holds, wanted) or {}).items()])

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object; empty if it is absent."""
        return dict(self._checked(name, lambda x: isinstance(x, dict), "must be an object") or {})

    def number(self, name: str, *, least: float, most: float) -> float | None:
        """Return a finite number in the range, or None if it is absent."""

        found = self._checked(
            name, lambda x: _is_number(x, least, most), f"must be a number from {least:g} to {most:g}"
        )
        return None if found is None else float(found)

    def texts(self, name: str, *, most: int, longest: int = 1 << 20) -> list[str]:
        """Return a list of at most `most` nonempty strings. The member may be a single string."""
        found = self.take(name)
        listed = [found] if isinstance(found, str) else found
        if listed is None:
            return []
        fits = isinstance(listed, list) and len(listed) <= most
        if not fits or not all(isinstance(x, str) and 0 < len(x) <= longest for x in listed):
            raise self.refuse(name, f"must be a nonempty string, or a list of at most {most} nonempty strings")
        return list(listed)

    def objects(self, name: str, *, most: int) -> list[Fields]:
        """Return a list of 1 to `most` objects."""
        found = self.take(name)
        if found is None and (near := NearestNames(self._left).of(name)):
            raise self.refuse(near[0][:80], f"is not a supported field; did you mean {name}?")
        if not isinstance(found, list) or not 1 <= len(found) <= most or not all(isinstance(x, dict) for x in found):
            raise self.refuse(name, f"must be a list of 1 to {most} objects")
        place = f"{self.within}.{name}" if self.within else name
        return [Fields(each, f"{place}[{i}]") for i, each in enumerate(found)]

    def only(self, name: str, values: Sequence[Any], why: str) -> None:
        """Raise RequestRefusal if a field has a value that is not in `values`, the supported values. `why` is the
        reason.
        """
        found = self.take(name)
        if found is not None and not any(type(found) is type(value) and found == value for value in values):
            raise self.refuse(name, why)

    def ignored(self, *names: str) -> None:
        """Skip fields that have no effect on this server."""
        for name in names:
            self.take(name)

    def end(self) -> None:
        """Raise RequestRefusal if there is a field that was not read."""
        for name in self._left:
            near = NearestNames(self._known).of(name)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise self.refuse(name[:80], f"is not a supported field{hint}")

    def _checked(self, name: str, holds: Callable[[Any], bool], wanted: str) -> Any:
        found = self.take(name)
        if found is not None and not holds(found):
            raise self.refuse(name, wanted)
        return found


def is_id(value: Any) -> bool:
    """Return True for an integer that can be a token id of some vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
