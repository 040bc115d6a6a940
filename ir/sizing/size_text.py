"""Parser of sizes.

sum   = term (("+" | "-") term)*
term  = power (("*" | "//") power)*
power = int | name | (sum)
"""

from __future__ import annotations

import re
from functools import lru_cache

from treadle.ir.errors import SizeError
from treadle.ir.sizing.sizes import VARIABLE, Size

_TOKEN = re.compile(r"\s*(//|[-+*()]|\d+|[A-Za-z_]\w*)", re.ASCII)
MOST_TOKENS = 200


@lru_cache(maxsize=4096)
def parse_size(text: str) -> Size:
    """Parse a size such as `S`, `2*S+1`, `(n + 2*p - k)//s + 1`. Raises SizeError with the column."""
    tokens: list[tuple[str, int]] = []
    at = 0
    stripped = text.rstrip()
    while at < len(stripped):
        match = _TOKEN.match(stripped, at)
        if match is None:
            at += len(stripped[at:]) - len(stripped[at:].lstrip())
            hint = VARIABLE if text.strip() in ("?", ":") else None
            raise SizeError(f"not a size: {_shortened(text)}", within=f"column {at + 1}", hint=hint)
        tokens.append((match.group(1), match.start(1)))
        at = match.end()
        if len(tokens) > MOST_TOKENS:
            raise SizeError(
                "a size expression is too long", received=_shortened(text), hint=f"at most {MOST_TOKENS} tokens"
            )
    reader = _SizeReader(text, tokens)
    size = reader.sum()
    if reader.at != len(tokens):
        raise reader.error()
    return size


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:100]!r} ... {text[-40:]!r}"


class _SizeReader:
    def __init__(self, text: str, tokens: list[tuple[str, int]]) -> None:
        self.text, self.tokens, self.at = text, tokens, 0

    def error(self) -> SizeError:
        column = self.tokens[self.at][1] + 1 if self.at < len(self.tokens) else len(self.text) + 1
        return SizeError(f"not a size: {_shortened(self.text)}", within=f"column {column}")

    def take(self, *wanted: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at][0] in wanted:
            self.at += 1
            return self.tokens[self.at - 1][0]
        return None

    def sum(self) -> Size:
        negative = self.take("-")
        total = -self.term() if negative else self.term()
        while sign := self.take("+", "-"):
            term = self.term()
            total = total + term if sign == "+" else total - term
        return total

    def term(self) -> Size:
        total = self.power()
        while sign := self.take("*", "//"):
            right = self.power()
            total = total * right if sign == "*" else total // right
        return total

    def power(self) -> Size:
        if self.take("("):
            inner = self.sum()
            if not self.take(")"):
                raise self.error()
            return inner
        if self.at >= len(self.tokens) or not re.match(r"\w", self.tokens[self.at][0]):
            raise self.error()
        self.at += 1
        token = self.tokens[self.at - 1][0]
        if not token.isdigit():
            return Size.symbol(token)
        if len(token) > 18:
            raise SizeError("a number in a size is too large", received=token[:40], hint="at most 18 digits")
        return Size.of(int(token))
