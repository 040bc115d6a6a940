"""Pickles of opened models, for processes that open them again: files stay closed in a copy."""

from __future__ import annotations

from functools import cached_property
from typing import Any


def state_without_caches(instance: Any) -> dict[str, Any]:
    """Return an object's attributes without the values of cached properties, which are computed again when needed."""
    return {
        name: value
        for name, value in vars(instance).items()
        if not isinstance(getattr(type(instance), name, None), cached_property)
    }
