"""Errors for attributes that an object of the public API lacks: the equivalent of another library's, or the nearest."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from treadle.ir.errors import UsageError
from treadle.ir.source_lines import calling_line, user_line

Class = TypeVar("Class", bound=type)

_SIMILAR = 0.75


class UnknownAttributeError(UsageError, AttributeError):
    """The error for an attribute that an object of the public API lacks. The class is also an AttributeError, so that
    `hasattr` returns False.
    """


def with_attribute_hints(
    what: str, equivalents: Mapping[str, str], *, creation: str | None = None, settings: Collection[str] | None = None
) -> Callable[[Class], Class]:
    """Decorate a class: an unknown attribute without a leading _ raises UnknownAttributeError. So does an assignment to
    an attribute in the user's code, if `creation` is passed.

    what         the object in the error: "a session"
    equivalents  hints for attributes of other libraries, by name
    creation     the call that creates an object, with {} in place of a setting: "t.Trainer(model, {})"
    settings     names of the settings of this call; None: any name
    """

    def decorate(cls: Class) -> Class:
        def __getattr__(self: Any, name: str) -> Any:
            missing = object()
            if name.startswith("_") or inspect.getattr_static(type(self), name, missing) is not missing:
                return object.__getattribute__(self, name)  # raises the error of Python, or of the property again
            known = [each for each in dir(type(self)) if not each.startswith("_")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=_SIMILAR)
            raise UnknownAttributeError(
                f"{what} has no .{name}",
                source=str(user_line() or "") or None,
                hint=equivalents.get(name) or (f"did you mean .{near[0]}?" if near else f"it has {', '.join(known)}"),
            )

        def __setattr__(self: Any, name: str, value: Any) -> None:
            if not name.startswith("_") and type(self) is cls and (line := calling_line()) is not None:
                raise UnknownAttributeError(
                    f"{what} has fixed settings: .{name} cannot be set",
                    received=f"{value!r}"[:80],
                    source=str(line),
                    hint=str(creation).format(f"{name}=..." if settings is None or name in settings else "..."),
                )
            object.__setattr__(self, name, value)

        setattr(cls, "__getattr__", __getattr__)  # noqa: B010  mypy refuses the assignment
        if creation is not None:
            setattr(cls, "__setattr__", __setattr__)  # noqa: B010
        return cls

    return decorate
