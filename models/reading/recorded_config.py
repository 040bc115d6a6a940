"""A config.json that records which of its keys are read, so that the unread keys can be reported."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any, cast

from treadle.files.shown_names import printable
from treadle.ir.errors import CheckpointError

Names = Mapping[str, str]

_SHOWN = 80  # maximum number of characters of a value in an error


def layered(*configs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a view of several configs. A key has the value of the first config that has it, and only that one is
    queried.
    """
    return ChainMap(*cast("tuple[dict[str, Any], ...]", configs))


class RecordedConfig(Mapping[str, Any]):
    """The content of a config.json, or of an object inside it. Looking up a key records that it is read.

    aliases  other names of keys: {"num_hidden_layers": "n_layer"}. A key is found under each of its names
    asked    the keys that were looked up, whether the file has them or not

    Looking up a key raises CheckpointError if the file has it under two names with different values.
    """

    def __init__(self, content: Mapping[str, Any], aliases: Names | None = None) -> None:
        self._content = content
        self._aliases = aliases or {}
        self._names: dict[str, list[str]] = {}
        for name in content:
            self._names.setdefault(self._aliases.get(name, name), []).append(name)
        self._read: set[str] = set()
        self.asked: set[str] = set()
        self._inside: dict[str, RecordedConfig] = {}

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        first, *others = self._names[self._aliases.get(key, key)]
        self._read.update((first, *others))
        value = self._content[first]
        for other in others:
            if self._content[other] != value:
                shown = f"{printable(repr(value))[:_SHOWN]} and {printable(repr(self._content[other]))[:_SHOWN]}"
                raise CheckpointError(
                    f"config.json: {first} and {other} are two names of one option and differ",
                    received=shown,
                    hint="keep the one that belongs to the weights",
                )
        if isinstance(value, Mapping):
            return self._inside.setdefault(first, RecordedConfig(value, self._aliases))
        return value

    def __contains__(self, key: object) -> bool:
        return self._aliases.get(str(key), key) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __eq__(self, other: object) -> bool:
        return self._content == (other._content if isinstance(other, RecordedConfig) else other)

    __hash__ = None  # type: ignore[assignment]  # as of a dict

    def __repr__(self) -> str:
        return repr(self._content)

    def unread(self) -> list[tuple[str, ...]]:
        """Return the keys that were not looked up and are not null, each with the keys of the enclosing objects.

        An object that was looked up, but none of its keys, is a value and counts as read.
        """
        found: list[tuple[str, ...]] = []
        for name, value in self._content.items():
            if name not in self._read:
                found += [(name,)] if value is not None else []
            elif name in self._inside and self._inside[name].asked:
                found += [(name, *rest) for rest in self._inside[name].unread()]
        return found
