"""The quantization settings of a model folder: `quantization_config` of config.json, or an older file of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.encodings.encoding import MOST_IN_LINE
from treadle.ir.errors import CheckpointError

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json with the settings: the current one, and the one of older compressed-tensors files."""
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files with the settings, read if config.json has none, and the method of a file that names none."""
_SHOWN = 80
_LONGEST_PATTERN, _MOST_REPEATS, _LONGEST_NAME = 300, 4, 300
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_LOOKING = re.compile(r"\(\?(?!:)")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


class QuantizationSettings:
    """The settings, whose keys are recorded when they are read.

    content  the settings' JSON object
    method   `quant_method`
    within   the file and the key, in errors
    """

    def __init__(self, content: Mapping[str, Any], within: str, method: str | None = None) -> None:
        self.content, self.within = content, within
        self._read = {"quant_method"}
        self._inside: dict[str, QuantizationSettings] = {}
        named = content.get("quant_method", method)
        if not isinstance(named, str):
            raise self.error("quant_method", named, "it must be the name of a method")
        self.method = named.lower()

    def get(self, key: str, default: Any = None, aliases: Sequence[str] = ()) -> Any:
        """Return the value of a key under the first of its names that the settings have."""
        self._read.update((key, *aliases))
        return next((self.content[name] for name in (key, *aliases) if self.content.get(name) is not None), default)

    def inside(self, *path: str) -> QuantizationSettings:
        """Return the settings of an object inside; their unread keys count as keys of these settings. Raises
        CheckpointError for a value that is not an object.
        """
        content: object = self.content
        for key in path:
            content = content.get(key) if isinstance(content, Mapping) else None
        within = ", ".join([self.within, *map(printable, path)])
        if not isinstance(content, Mapping):
            received = printable(repr(content))[:_SHOWN]
            raise CheckpointError(f"{printable(path[-1])} must be an object", received=received, within=within)
        self._read.add(path[0])
        return self._inside.setdefault(".".join(path), QuantizationSettings(content, within, self.method))

    def integer(self, key: str, allowed: Sequence[int] | None = None, *, aliases: Sequence[str] = ()) -> int:
        """Return an integer. Raises CheckpointError for another value, and for one that is not allowed."""
        value = self.get(key, None, aliases)
        if not isinstance(value, int) or isinstance(value, bool) or (allowed is not None and value not in allowed):
            wanted = "an integer" if allowed is None else "one of " + ", ".join(map(str, allowed))
            raise self.error(key, value, wanted)
        return value

    def flag(self, key: str, default: bool, *, aliases: Sequence[str] = ()) -> bool:
        """Return a boolean. Raises CheckpointError for another value."""
        value = self.get(key, default, aliases)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """Return one of the allowed texts, in lower case. Raises CheckpointError for any other value."""
        value = self.get(key, default)
        if not isinstance(value, str) or value.lower() not in allowed:
            raise self.error(key, value, "one of " + ", ".join(allowed))
        return value.lower()

    def group(self, length: int) -> int:
        """Check the number of inputs in a group. Raises CheckpointError unless it is positive, or -1: a whole row."""
        if length != -1 and not 0 < length <= MOST_IN_LINE:
            raise self.error("group_size", length, "a positive number, or -1 for whole rows")
        return length

    def refuse(self, **keys: str) -> None:
        """Raise CheckpointError for the first of these keys that is neither absent, null, false nor empty. The values
        are the reasons.
        """
        for key, why in keys.items():
            value = self.get(key)
            if value not in (None, False, [], {}, ""):
                raise self.error(key, value, f"the option is not supported: {why}")

    def unread(self, irrelevant: frozenset[str]) -> tuple[str, ...]:
        """Return the keys that are not null, were not read, and are not known to be irrelevant. Keys of objects inside
        have dots.
        """
        return tuple(f"{KEYS[0]}.{key}" for key in self._unread(irrelevant))

    def _unread(self, irrelevant: frozenset[str]) -> Iterator[str]:
        known = self._read | irrelevant
        yield from (key for key, value in self.content.items() if value is not None and key not in known)
        for path, inside in self._inside.items():
            yield from (f"{path}.{key}" for key in inside._unread(irrelevant))

    def error(self, key: str, received: object, hint: str) -> CheckpointError:
        """Return the error for the value of a key."""
        shown = printable(repr(received))[:_SHOWN]
        return CheckpointError(f"unsupported value of {key}", received=shown, within=self.within, hint=hint)


def find_settings(folder: ModelFolder) -> QuantizationSettings | None:
    """Return the quantization settings of a folder, or None if it has none. Raises CheckpointError for settings that
    are not a JSON object, and for settings of a part of the model only.
    """
    config = folder.config if folder.has("config.json") else {}
    shown = folder.show("config.json")
    for key in KEYS:
        if (content := config.get(key)) is not None:
            return _settings(content, f"{shown}: {key}")
    for part, inside in config.items():
        if isinstance(inside, Mapping) and any(inside.get(key) is not None for key in KEYS):
            raise CheckpointError(
                f"{printable(part)} has quantization settings of its own, which are not read",
                within=shown,
                hint=f"{KEYS[0]} at the top of config.json",
            )
    for name, method in _FILES.items():
        if folder.has(name):
            return _settings(folder.read_settings(name), folder.show(name), method)
    return None


def _settings(content: object, within: str, method: str | None = None) -> QuantizationSettings:
    if not isinstance(content, Mapping):
        received = printable(repr(content))[:_SHOWN]
        raise CheckpointError("quantization settings must be an object", received=received, within=within)
    return QuantizationSettings(content, within, method)


def matches_pattern(pattern: str, name: str, within: str) -> bool:
    """Return True if a regular expression of a settings file matches the start of a module's name.

    The expression is untrusted. Raises CheckpointError for one whose matching could take exponential time, or that is
    not valid: repeated groups, assertions, more than four repetitions, and more than 300 characters are refused.
    """
    bad = _REPEATED_GROUP.search(pattern) or _LOOKING.search(pattern) or len(_REPEAT.findall(pattern)) > _MOST_REPEATS
    reason = "it repeats a group, or is too long or too complex"
    if not (bad or max(len(pattern), len(name)) > max(_LONGEST_PATTERN, _LONGEST_NAME)):
        try:
            return re.compile(pattern).match(name) is not None
        except (re.error, ValueError, OverflowError, RecursionError) as error:  # Python's texts differ by its version
            place = f", from character {error.pos}" if isinstance(error, re.error) and error.pos is not None else ""
            reason = f"it is not a regular expression{place}"
    raise CheckpointError(
        "a pattern of module names cannot be read",
        received=f"{printable(pattern)[:_SHOWN]}: {reason}",
        within=within,
        hint="the names of the modules",
    )
