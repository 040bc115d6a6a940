"""Strict JSON: a reader that parses only what the caller requests, and reports the byte offset of an error.

Source: RFC 8259. The reader is stricter than the standard library, since files are untrusted: it refuses duplicate
keys, lone surrogates, and integers beyond 64 bits, and limits nesting. If the caller knows the expected grammar (a
safetensors header), the reader raises an error at the first byte that differs from it, before any later value is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from treadle.files.errors import CheckpointError
from treadle.files.shown_names import printable

_SPACE = re.compile(rb"[ \t\n\r]*")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(rb"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# Infinity and NaN are not JSON, but Python's writer emits them and some config.json files contain them.
_WORDS: tuple[tuple[bytes, Any], ...] = (
    (b"true", True),
    (b"false", False),
    (b"null", None),
    (b"Infinity", float("inf")),
    (b"-Infinity", float("-inf")),
    (b"NaN", float("nan")),
)
_INT64 = 2**63


class JsonReader:
    """A reader of one JSON text in `data`, from front to back.

    shown     the text's name in errors, such as `model.safetensors: header`
    nesting   maximum nesting depth of objects and arrays
    values    maximum number of values that `value` may build
    base      file offset of the text's first byte, added to the offsets in errors
    place     the part being read; set by the caller, printed in errors after the byte offset

    Every method raises CheckpointError, with the byte offset in `within`, if the text is not as requested.
    """

    def __init__(self, data: bytes, shown: str, *, nesting: int, values: int, base: int = 0) -> None:
        self.data = data
        self.shown = shown
        self.nesting = nesting
        self.values = values
        self.base = base
        self.place = ""
        self.position = 0
        self._depth = 0
        self._built = 0
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail("the text is not UTF-8", received=f"byte 0x{data[error.start]:02x}", at=error.start)

    def fail(
        self, what: str, *, received: str | None = None, at: int | None = None, hint: str | None = None
    ) -> NoReturn:
        """Raise CheckpointError about the byte at `at`, or at the current position."""
        offset = self.base + (self.position if at is None else at)
        within = f"{self.shown}, byte {offset}" + (f", {self.place}" if self.place else "")
        raise CheckpointError(what, received=received, within=within, hint=hint)

    def next_byte(self) -> bytes:
        """Return the next byte that is not white space, without consuming it; b"" at the end."""
        data, at = self.data, self.position
        if data[at : at + 1] in (b" ", b"\n", b"\t", b"\r"):
            self.position = at = _SPACE.match(data, at).end()  # type: ignore[union-attr]
        return data[at : at + 1]

    def take(self, byte: bytes) -> bool:
        """Consume `byte` if it is next; return True if it was."""
        if self.next_byte() != byte:
            return False
        self.position += 1
        return True

    def take_null(self) -> bool:
        """Consume `null` if it is next; return True if it was."""
        self.next_byte()
        if not self.data.startswith(b"null", self.position):
            return False
        self.position += 4
        return True

    def expect(self, byte: bytes, meaning: str) -> None:
        """Consume `byte`, which must be next."""
        if not self.take(byte):
            self._unexpected(f"{byte.decode()!r} {meaning}")

    def end(self) -> None:
        """Check that only white space is left."""
        if self.next_byte():
            self._unexpected("the end of the text")

    def string(self, meaning: str = "a string") -> str:
        """Return the string that must be next."""
        start = self.position
        if not self.take(b'"'):
            self._unexpected(meaning)
        start = self.position
        data, at = self.data, start
        escaped = False
        while True:
            at = _PLAIN.match(data, at).end()  # type: ignore[union-attr]
            stop = data[at : at + 1]
            if stop == b'"':
                break
            if stop != b"\\":
                what = "a string is not closed" if not stop else "a string holds a control character"
                self.fail(what, received=f"byte 0x{stop[0]:02x}" if stop else None, at=at)
            escaped = True
            at += 2
        self.position = at + 1
        if not escaped:
            return data[start:at].decode("utf-8")
        try:
            text: str = json.loads(data[start - 1 : at + 1])
            text.encode("utf-8")
        except ValueError:  # a bad escape, or half of a surrogate pair
            self.fail("a string holds an invalid escape", at=start - 1)
        return text

    def size(self, meaning: str) -> int:
        """Return the integer from 0 to 2^63 - 1 that must be next, written in digits only."""
        if not self.next_byte():
            self._unexpected(meaning)
        match = _NUMBER.match(self.data, self.position)
        digits = match.group(0) if match else b""
        if not digits.isdigit() or len(digits) > 19 or int(digits) >= _INT64:
            self._unexpected(f"{meaning}, an integer from 0 to 2^63 - 1", len(digits))
        self.position += len(digits)
        return int(digits)

    def members(self, meaning: str = "an object") -> Iterator[str]:
        """Yield the keys of the object that must be next; the caller reads each value before the next key."""
        self._enter(b"{", meaning)
        seen: set[str] = set()
        if self.next_byte() != b"}":
            while True:
                self.next_byte()
                at = self.position
                key = self.string("a key in quotes")
                if key in seen:
                    self.fail("an object has a duplicate key", received=printable(key), at=at)
                seen.add(key)
                self.expect(b":", "after a key")
                yield key
                if not self.take(b","):
                    break
        self._leave(b"}", "or ',' after a member of an object")

    def items(self, meaning: str = "an array") -> Iterator[int]:
        """Yield the indices of the array that must be next; the caller reads each item before the next index."""
        self._enter(b"[", meaning)
        if self.next_byte() != b"]":
            count = 0
            while True:
                yield count
                count += 1
                if not self.take(b","):
                    break
        self._leave(b"]", "or ',' after an item of an array")

    def value(self) -> Any:
        """Return the next value, of any kind, as Python's own dict, list, str, int, float, bool or None."""
        first = self.next_byte()
        if self._built == self.values:
            self.fail("the text holds more values than the limit", received=f"limit {self.values}")
        self._built += 1
        if first == b"{":
            return {key: self.value() for key in self.members()}
        if first == b"[":
            return [self.value() for _ in self.items()]
        if first == b'"':
            return self.string()
        for word, meant in _WORDS:
            if self.data.startswith(word, self.position):
                self.position += len(word)
                return meant
        match = _NUMBER.match(self.data, self.position)
        if match is None:
            self._unexpected("a value")
        whole, fraction, exponent = match.groups()
        if fraction or exponent:
            self.position = match.end()
            return float(match.group(0))
        if len(whole) > 20 or not -_INT64 <= int(whole) < 2 * _INT64:
            self._unexpected("an integer of at most 64 bits", len(whole))
        self.position = match.end()
        return int(whole)

    def _enter(self, opening: bytes, meaning: str) -> None:
        if self.next_byte() != opening:
            self._unexpected(meaning)
        if self._depth == self.nesting:
            self.fail(f"objects and arrays are nested more than {self.nesting} deep")
        self._depth += 1
        self.position += 1

    def _leave(self, closing: bytes, meaning: str) -> None:
        self.expect(closing, meaning)
        self._depth -= 1

    def _unexpected(self, wanted: str, length: int = 1) -> NoReturn:
        self.next_byte()
        found = self.data[self.position : self.position + max(length, 1)]
        received = printable(found.decode("utf-8", "replace"), 40) if found else "the end of the text"
        self.fail(f"expected {wanted}", received=received)


def read_json_object(data: bytes, shown: str, *, nesting: int, values: int) -> dict[str, Any]:
    """Return the JSON object in `data`; duplicate keys are refused.

    Raises CheckpointError with the byte offset if the text is not one JSON object in UTF-8.
    """
    reader = JsonReader(data, shown, nesting=nesting, values=values)
    result = {key: reader.value() for key in reader.members("a JSON object")}
    reader.end()
    return result
