"""The scanner that the parser uses: positions, limits, and the syntax of names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from treadle.files.limits import MORE, limit_hint
from treadle.ir.errors import ParseError, TreadleError
from treadle.ir.types import Type, parse_type

RESERVED = frozenset({"false", "inf", "nan", "none", "return", "true", "with"})
"""Words that cannot be the name of a value. An input with such a name is written in quotes."""

_BARE_NAME = re.compile(r"[A-Za-z_]\w*")
_BARE_PATH = re.compile(r"\w+(?:\.\w+)*")
_STRING = re.compile(r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"')
_SKIP = re.compile(r"(?:\s++|#[^\n]*+)*+")
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"-?(?:inf|nan|\d{1,40}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,5})?)(?![\w.])")
TYPE = r"[a-z]\w*\[[^\]\n]*\](?: as [a-z]\w*(?:\([^()\n]{0,40}\))?)?"
"""A regular expression for a type, and an encoding after one space."""
_TYPE = re.compile(TYPE)
_EXPRESSION_PIECE = re.compile(r'[^()\[\]{},"#\n]++|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"')


_CHARACTERS_OF_WORK = 64
"""The number of characters in names and comments that take as long to scan as one piece of other text."""
_TYPE_WORK = 15


@dataclass(frozen=True)
class TextLimits:
    """Limits of a text. A text that exceeds one is refused with a ParseError.

    operands               operands of all nodes together
    symbols                symbols of the graph
    arguments              inputs, outputs and weights of all functions together, in addition to main's parameters
    items                  items in one bracket of an attribute, and operands of one op (not of a call)
    nesting                depth of brackets in an attribute
    name_characters        length of a name, a path, or a text in quotes; not of constants
    type_characters        length of one type, written or inferred
    expression_characters  length of a size or a term among the attributes
    work                   total work of parsing, in units of about a microsecond: see `Scanner.spend`
    """

    characters: int = 256 * 2**20
    functions: int = 10_000
    nodes: int = 1_000_000
    operands: int = 20_000_000
    parameters: int = 1_000_000
    literal_bytes: int = 128 * 2**20
    rank: int = 64
    items: int = 1024
    nesting: int = 32
    type_characters: int = 4_000
    expression_characters: int = 100_000
    symbols: int = 100_000
    arguments: int = 10_000_000
    name_characters: int = 1_000_000
    work: int = 1_000_000_000


# -- how names are written -----------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """Return text in double quotes with JSON's escapes; printable letters of any script are not escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


@lru_cache(maxsize=16384)
def name_text(name: str) -> str:
    """Return a name as text: bare if it is unambiguous, else in quotes."""
    return name if _BARE_NAME.fullmatch(name) and name not in RESERVED else quoted(name)


@lru_cache(maxsize=16384)
def path_text(path: str) -> str:
    """Return a path such as `h.0.ln_1.weight` as text, in quotes if it contains anything but words and dots."""
    return path if _BARE_PATH.fullmatch(path) else quoted(path)


@lru_cache(maxsize=8192)
def _read_back(text: str) -> Type | None:
    try:
        return parse_type(text)
    except TreadleError:
        return None


def type_text(type: Type) -> str:
    """Return a type as text that `parse_type` reads: with factors and labels, or without them if they cannot be
    written.
    """
    return type.text if _read_back(type.text) == type else type.plain_text


def _shortened(text: str) -> str:
    """Shorten text that may quote the input, for an error message."""
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-60:]}"


# -- reading -------------------------------------------------------------------------------------------------------


class Scanner:
    """A text and a position in the text, right after the last piece that was read."""

    def __init__(self, text: str, limits: TextLimits) -> None:
        self.text, self.limits, self.at = text, limits, 0
        self.left = limits.work - len(text) // _CHARACTERS_OF_WORK
        self._looked = self._next = -1  # the last position passed to `ahead`, and its result
        self._types: dict[str, Type] = {}
        if len(text) > limits.characters:
            raise ParseError(f"the text is too long: {len(text)} characters", hint=f"at most {limits.characters}")

    # -- errors ----------------------------------------------------------------------------------------------------

    def error(
        self, what: str, at: int | None = None, *, received: str | None = None, hint: str | None = None
    ) -> ParseError:
        """Return a ParseError that shows the line at a position (by default the next piece) with a mark below the
        column.
        """
        if at is None:
            at = self.ahead()
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        line, column = self.text[start : end if end >= 0 else len(self.text)], at - start
        shown_from = max(0, column - 80)
        shown = line[shown_from : shown_from + 120].replace("\t", " ")
        number = self.text.count("\n", 0, at) + 1
        within = f"line {number}, column {column + 1}\n{shown}\n{' ' * (column - shown_from)}^"
        return ParseError(_shortened(what), received=received and _shortened(received), within=within, hint=hint)

    @contextmanager
    def located(self, at: int) -> Iterator[None]:
        """Convert errors of the TreadleError family that arise inside to ParseErrors at this position."""
        try:
            yield
        except TreadleError as error:
            if isinstance(error, ParseError) and error.within:
                raise
            raise self.error(error.what, at, received=error.received, hint=_in_text(error.hint)) from None
        except ValueError as error:  # a number with more digits than Python can parse
            raise self.error(f"cannot be read: {error}", at) from None

    def found(self) -> str:
        """Return a description of the next piece, for an error message."""
        at = self.ahead()
        if at >= len(self.text):
            return "the end of the text"
        match = _STRING.match(self.text, at) or _WORD.match(self.text, at)
        return repr(match[0][:40] if match else self.text[at])

    # -- pieces ----------------------------------------------------------------------------------------------------

    def ahead(self) -> int:
        """Return the start of the next piece, which follows any white space and comments."""
        if self._looked != self.at:
            match = _SKIP.match(self.text, self.at)
            self._looked = self.at
            self._next = match.end() if match is not None else self.at
            self.left -= 1
            if self.left < 0:
                self.spend(0, self._next)
        return self._next

    def spend(self, work: int, at: int) -> None:
        """Count the work of a read, in addition to a unit for each piece of text. Raises ParseError if the limit is
        exceeded.
        """
        self.left -= work
        if self.left < 0:
            self.left = 0  # 0 now, because building the error scans text
            raise self.error("the text takes too long to read", at, hint=limit_hint("work", MORE * self.limits.work))

    def skip(self) -> int:
        """Move to the start of the next piece, and return it."""
        self.at = self._looked = self.ahead()
        return self.at

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Read a piece if the text continues with the pattern, and return the match. Otherwise return None; the
        position then stays before any comment.
        """
        found = pattern.match(self.text, self.ahead())
        if found is not None:
            self.at = found.end()
        return found

    def sees(self, pattern: re.Pattern[str]) -> bool:
        """Return True if the text continues with the pattern."""
        return pattern.match(self.text, self.ahead()) is not None

    def accept(self, sign: str) -> bool:
        """Read this punctuation if it comes next. Return True if it was read."""
        at = self.ahead()
        if not self.text.startswith(sign, at):
            return False
        self.at = at + len(sign)
        return True

    def expect(self, sign: str) -> None:
        """Read this punctuation. Raises ParseError if something else comes next."""
        if not self.accept(sign):
            raise self.error(f"expected {sign!r}, found {self.found()}")

    def accept_word(self, word: str) -> bool:
        """Read this word if it comes next. Return True if it was read."""
        match = _WORD.match(self.text, self.ahead())
        if match is None or match[0] != word:
            return False
        self.at = match.end()
        return True

    def expect_word(self, word: str) -> None:
        """Read this word. Raises ParseError if something else comes next."""
        if not self.accept_word(word):
            raise self.error(f"expected {word!r}, found {self.found()}")

    def accept_name(self) -> str | None:
        """Read and return a name, bare or in quotes, if one comes next, else None."""
        at = self.ahead()
        match = _BARE_NAME.match(self.text, at)
        if match is None:
            return self.string() if self.text.startswith('"', at) else None
        if match[0] in RESERVED:
            return None
        return self._named(match)

    def name(self, what: str) -> str:
        """Read and return a name. `what` describes it in errors. Raises ParseError if no name comes next."""
        found = self.accept_name()
        if found is None:
            raise self.error(f"expected {what}, found {self.found()}")
        return found

    def path(self, what: str) -> str:
        """Read and return a path, bare or in quotes. Raises ParseError if no path comes next."""
        match = self.match(_BARE_PATH)
        if match is not None:
            return self._named(match)
        if self.text.startswith('"', self.ahead()):
            return self.string()
        raise self.error(f"expected {what}, found {self.found()}")

    def string(self) -> str:
        """Read and return text in quotes. Raises ParseError if it is malformed."""
        start = self.skip()
        match = self.match(_STRING)
        if match is None:
            raise self.error(f"expected text in quotes, found {self.found()}")
        try:
            return str(json.loads(self._named(match)))
        except ValueError:
            raise self.error("malformed text in quotes", start, hint="only JSON's escapes are allowed") from None

    def _named(self, match: re.Match[str]) -> str:
        """Return the text of a match, and move the position after it. Raises ParseError if the text is too long for a
        name.
        """
        self.at = match.end()
        text = match[0]
        if len(text) > self.limits.name_characters:
            most = f"at most {self.limits.name_characters} characters"
            raise self.error("a name or text is too long", match.start(), received=text, hint=most)
        return text

    def integer(self, what: str) -> int:
        """Read and return an integer. Raises ParseError if none comes next."""
        start = self.at
        number = self.accept_number()
        if not isinstance(number, int):
            self.at = start
            raise self.error(f"expected {what}, found {self.found()}")
        return number

    def accept_number(self) -> int | float | None:
        """Read and return an integer or (with `.`, `e`, or as `inf` and `nan`) a float, if a number comes next, else
        None.
        """
        start = self.skip()
        match = self.match(_NUMBER)
        if match is None:
            return None
        text = match[0]
        if text.lstrip("-").isdigit():
            return int(text)
        number = float(text)
        if number in (float("inf"), float("-inf")) and not text.endswith("inf"):
            raise self.error(f"{text} is out of range", start)
        return number

    def type(self) -> Type:
        """Read and return a type. Raises ParseError if none comes next."""
        start = self.skip()
        match = self.match(_TYPE)
        if match is None:
            raise self.error(f"expected a type, found {self.found()}", hint="such as f32[B, S, 768]")
        return self.type_of(match[0], start)

    def type_of(self, text: str, at: int) -> Type:
        """Parse a type in a part of the text. `at` is the position of that part."""
        found = self._types.get(text)
        if found is None:
            self._claim_type(text, at)
            with self.located(at):
                found = parse_type(text)
            if found.rank > self.limits.rank:
                raise self.error(f"rank {found.rank} is too high", at, hint=f"at most {self.limits.rank}")
            self._types[text] = found
            self._claim_sizes(found, at)
            self.inferred(found, at)  # the inferred type may be longer than the text
        return found

    def inferred(self, type: Type, at: int) -> None:
        """Check a type that was inferred, not read, against the limits."""
        if type.text not in self._types:
            self._claim_type(type.text, at)
            self._claim_sizes(type, at)
            self._types[type.text] = type

    def _claim_type(self, text: str, at: int) -> None:
        self._refuse_long_type(len(text), at)
        self.spend(_TYPE_WORK + 2 * len(text), at)

    def _claim_sizes(self, type: Type, at: int) -> None:
        """Count the work of a size that is a product of sums: multiplied out, the size is longer than its text."""
        length = sum(len(str(d.size)) for d in type.dims if len(d.factors) > 1)
        self._refuse_long_type(length, at)
        self.spend(length, at)

    def _refuse_long_type(self, length: int, at: int) -> None:
        if length > self.limits.type_characters:
            raise self.error("the type is too long", at, hint=f"at most {self.limits.type_characters} characters")

    def expression(self) -> str:
        """Read and return the text up to the next comma or closing bracket outside brackets and quotes: a size, or an
        attention term.
        """
        start = self.skip()
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if depth == 0 and char in ",)]}":
                break
            if char in "()[]{},":
                self.spend(1, self.at)
                depth += (char in "([{") - (char in ")]}")
                self.at += 1
                continue
            match = _EXPRESSION_PIECE.match(self.text, self.at)
            if match is None:
                break
            self.at = match.end()
        text = self.text[start : self.at].strip()
        if not text:
            raise self.error(f"expected an expression, found {self.found()}", start)
        if len(text) > self.limits.expression_characters:
            raise self.error("the expression is too long", start)
        self.spend(len(text), start)
        return text


def _in_text(hint: str | None) -> str | None:
    """Return a hint in the syntax of a graph's text: without Python's `t.`, and with `bool` as the name of the
    dtype.
    """
    return hint and re.sub(r"\bt\.(?=[a-z])", "", hint.replace("t.boolean", "bool"))
