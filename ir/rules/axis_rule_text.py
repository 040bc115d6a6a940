"""Parser of axis rules. docs/axis-rules.md has the grammar; `treadle.ir.axes` defines the meaning of a rule."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache

from treadle.ir.axes import MONOIDS, AxisDim, AxisFactor, DimPattern, LeadingDims, Role, Rule
from treadle.ir.errors import RuleError, SizeError
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import Size, sum_of_symbols
from treadle.ir.wording.marked_text import marked

# -- parsing ---------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<dots>\.\.\.) | (?P<open>\() | (?P<close>\))
    | (?P<whole>\[[^\[\]]*\])
    | (?P<mark>[>@^]?)(?P<name>[A-Za-z_]\w*)(?::(?P<monoid>[a-z]+)|(?P<sized>=)(?=[^\s,)]))?
    | (?P<one>1)(?!\w)
    )""",
    re.VERBOSE,
)
_NAMES = re.compile(r"[A-Za-z_]\w*(?:\+[A-Za-z_]\w*)+", re.ASCII)
_MARKS = {"": Role.MAPPED, ">": Role.SCANNED, "@": Role.INDEXED, "^": Role.GENERATED}


@lru_cache(maxsize=8192)
def parse_rule(text: str) -> Rule:
    """Parse one axis rule. If it is malformed, raises RuleError with the column."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError("'->' is missing", within=marked(text, len(text.rstrip())), hint="operands -> result")
    reader = _RuleReader(text)
    operands = tuple(reader.pattern(part, False) for part in left.split(",")) if left.strip() else ()
    reader.start = len(left) + len(arrow)
    results = tuple(reader.pattern(part, True) for part in right.split(","))
    return reader.rule(operands, results)


def _size_end(text: str, at: int) -> int:
    """Return the position after a size that begins at `at`: of a space, or of a parenthesis that the size did not
    open.
    """
    depth = 0
    while at < len(text) and not text[at].isspace() and (depth or text[at] != ")"):
        depth += (text[at] == "(") - (text[at] == ")")
        at += 1
    return at


class _RuleReader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.start = 0
        """The start of the pattern that is parsed next."""
        self.at: int | None = 0
        """The start of the current piece; None for the rule as a whole."""
        self.places: dict[str, int] = {}
        """The last location of each name."""
        self.marked: dict[str, AxisFactor] = {}
        self.given: dict[str, Size] = {}
        self.in_operands: list[str] = []
        self.in_results: list[str] = []

    def error(self, why: str, hint: str | None = None) -> RuleError:
        within = self.text[:200] if self.at is None else marked(self.text, self.at)
        return RuleError(why, within=within, hint=hint)

    def pattern(self, part: str, is_result: bool) -> DimPattern:
        dims: list[AxisDim | LeadingDims] = []
        group: list[str] | None = None
        opened = 0
        start, self.start = self.start, self.start + len(part) + 1
        at, part = 0, part.rstrip()
        while at < len(part):
            self.at = start + len(part) - len(part[at:].lstrip())
            match = _TOKEN.match(part, at)
            if match is None:
                raise self.error(f"cannot read {part[at:].strip()!r}")
            at = match.end()
            size = None
            if match["sized"]:
                size, at = part[at : (end := _size_end(part, at))], end
            if match["dots"]:
                if any(isinstance(d, LeadingDims) for d in dims) or group is not None:
                    raise self.error("... may occur once in an operand, outside parentheses")
                dims.append(LeadingDims())
            elif match["open"]:
                if group is not None:
                    raise self.error("parentheses do not nest")
                group, opened = [], self.at
            elif match["close"]:
                if group is None:
                    raise self.error("')' without '('")
                dims.append(AxisDim(tuple(group)))
                group = None
            elif match["one"]:
                if group is None:
                    dims.append(AxisDim())
            elif match["whole"]:
                if group is not None:
                    raise self.error("a whole axis must be outside parentheses")
                dims.append(self.whole(match["whole"][1:-1].replace(" ", ""), is_result))
            else:
                name = self.factor(match, size, is_result)
                if group is None:
                    dims.append(AxisDim((name,)))
                else:
                    group.append(name)
        if group is not None:
            self.at = opened
            raise self.error("'(' without ')'")
        return tuple(dims)

    def mark(self, factor: AxisFactor, is_result: bool) -> str:
        self.places[factor.name] = self.at or 0
        known = self.marked.get(factor.name)
        if known is None or known.role is Role.MAPPED:
            self.marked[factor.name] = factor
        elif factor.role is not Role.MAPPED and factor.role is not known.role:
            raise self.error(f"{factor.name} is both {known.role.value} and {factor.role.value}")
        elif factor.role is not Role.MAPPED and factor != known:
            if (known.monoid or known.limit) and (factor.monoid or factor.limit):
                raise self.error(f"{known} cannot also be {factor}")
            self.marked[factor.name] = factor if factor.limit else known
        (self.in_results if is_result else self.in_operands).append(factor.name)
        return factor.name

    def factor(self, match: re.Match[str], size_text: str | None, is_result: bool) -> str:
        name, monoid = match["name"], match["monoid"]
        if monoid is not None and monoid not in MONOIDS:
            raise self.error(f"unknown reduction {monoid!r}, expected one of {', '.join(MONOIDS)}")
        if size_text is not None:
            size = self.size(size_text)
            if self.given.setdefault(name, size) != size:
                raise self.error(f"{name} has two sizes, {self.given[name]} and {size}")
        return self.mark(AxisFactor(name, Role.REDUCED if monoid else _MARKS[match["mark"]], monoid), is_result)

    def whole(self, inner: str, is_result: bool) -> AxisDim:
        name, limited, limit = inner.partition("<=")
        if name.isidentifier():
            return AxisDim((self.mark(AxisFactor(name, Role.WHOLE, limit=limit if limited else None), is_result),))
        if not is_result:
            raise self.error(f"a whole axis of an operand must be a name, not {inner!r}")
        return AxisDim((), self.size(inner))

    def size(self, text: str) -> Size:
        if _NAMES.fullmatch(text):  # for a concatenation: one term per part, possibly more than an expression may have
            return sum_of_symbols(text.split("+"))
        try:
            return parse_size(text)
        except SizeError as error:
            raise self.error(error.what) from None

    def rule(self, operands: tuple[DimPattern, ...], results: tuple[DimPattern, ...]) -> Rule:
        factors: dict[str, AxisFactor] = {}
        for name, factor in self.marked.items():
            role, self.at = factor.role, self.places[name]
            if name not in self.in_operands and role is not Role.GENERATED:
                near = difflib.get_close_matches(name, self.in_operands, n=1)
                raise self.error(
                    f"axis {name} is after '->', and in no operand", f"did you mean {near[0]}?" if near else None
                )
            if role is Role.GENERATED and (name in self.in_operands or name not in self.given):
                raise self.error(f"a generated axis is in results only and has a size: ^{name}=4")
            if role is Role.REDUCED and name in self.in_results:
                raise self.error(f"{name} is reduced, so no result can hold it")
            if role is Role.MAPPED and name not in self.in_results:
                factor = AxisFactor(name, Role.REDUCED, "sum")
            factors[name] = factor
        self.at = None
        for factor in factors.values():
            if factor.limit is not None and factor.limit not in factors:
                raise self.error(f"{factor.name} is limited by {factor.limit}, which is not an axis of the rule")
        dots = [any(isinstance(d, LeadingDims) for d in p) for p in (*operands, *results)]
        if any(dots[: len(operands)]) != any(dots) or (any(dots) and not all(dots[len(operands) :])):
            raise self.error("'...' must be in an operand and in every result, or nowhere")
        return Rule(self.text, operands, results, factors, self.given)
