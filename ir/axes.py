"""Axis rules: one line that describes how an op maps axes. The compiler derives everything else about axes from it.

    matmul       "... m k, ... k n -> ... m n"
    softmax      "... [n] -> ... [n]"
    rearrange    "b s (heads=12 d) -> b heads s d"

A rule names factors. Each factor has one role in an application:

    n         mapped     in an operand and in a result: result element n reads operand element n alone
    n:max     reduced    in no result: combined by a reduction (by default, sum)
    [n]       whole      a result may read all of it; in a result also a size, as in `[n+m]`
    [t<=s]    whole, but the result at position s reads t only up to s
    >n        scanned    the result at n reads the operand up to n
    @v        indexed    read at positions that another operand holds
    ^n=S      generated  in results only, with its size
    n=12                 a factor whose size is an attribute of the op

`(h d)` is one dimension that is the product of two factors. `1` is a dimension of size one. `...` stands for any
leading dimensions, aligned at the right and broadcast: if an operand's dimension there is the constant 1, the operand
lacks that axis. docs/axis-rules.md is the reference page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from treadle.ir.errors import RuleError
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.types import Dim, Factor, Type


class Role(Enum):
    """The way in which an op uses a factor."""

    MAPPED = "mapped"
    REDUCED = "reduced"
    WHOLE = "whole"
    SCANNED = "scanned"
    INDEXED = "indexed"
    GENERATED = "generated"


MONOIDS = ("sum", "max", "min", "prod", "and", "or")


@dataclass(frozen=True, slots=True)
class AxisFactor:
    """A factor in one rule: its role, the reduction (`monoid`) if reduced, the factor that limits it if whole."""

    name: str
    role: Role
    monoid: str | None = None
    limit: str | None = None

    def __str__(self) -> str:
        detail = f" by {self.monoid}" if self.monoid else f" up to {self.limit}" if self.limit else ""
        return f"{self.name} is {self.role.value}{detail}"


@dataclass(frozen=True, slots=True)
class AxisDim:
    """One dimension of an operand or result, in terms of the rule's factors.

    A dimension without factors has size 1, or is a broadcast axis that this operand lacks. If `size` is set, the
    dimension is in a result, its size is an expression, and it belongs to no single factor.
    """

    factors: tuple[str, ...] = ()
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class LeadingDims:
    """A placeholder for `...` until the ranks are known."""


DimPattern = tuple[AxisDim | LeadingDims, ...]


@dataclass(frozen=True)
class Application:
    """A rule applied to operands of known types.

    factors   every factor by name; the factors of `...` are named `...1` (the last), `...2`, ...
    dims      each factor's dimension: its size, and its label or finer factors in the operand's type
    operands  for each operand its dimensions in factors, or None if the operand is absent
    results   for each result its dimensions in factors
    shapes    for each result its inferred dimensions
    """

    factors: Mapping[str, AxisFactor]
    dims: Mapping[str, Dim]
    operands: tuple[tuple[AxisDim, ...] | None, ...]
    results: tuple[tuple[AxisDim, ...], ...]
    shapes: tuple[tuple[Dim, ...], ...]

    @property
    def points(self) -> Size:
        """The product of all factors' sizes: the number of points in the op's iteration space."""
        return product(d.size for d in self.dims.values())


@dataclass(frozen=True)
class Rule:
    """A parsed rule. Use `parse_rule` to build one."""

    text: str
    operands: tuple[DimPattern, ...]
    results: tuple[DimPattern, ...]
    factors: Mapping[str, AxisFactor]
    known_sizes: Mapping[str, Size]

    def __str__(self) -> str:
        return self.text

    @property
    def is_elementwise(self) -> bool:
        """True if each element of a result depends on one element of each operand: `..., ... -> ...`."""
        patterns = (*self.operands, *self.results)
        return bool(self.operands) and all(pattern == (LeadingDims(),) for pattern in patterns)

    @property
    def sums_products(self) -> bool:
        """True if two operands share a factor that is summed, and all other factors are mapped."""
        roles = {factor.role for factor in self.factors.values()}
        dims = [[dim for dim in pattern if isinstance(dim, AxisDim)] for pattern in self.operands]
        held = [{name for dim in pattern for name in dim.factors} for pattern in dims]
        summed = [f.name for f in self.factors.values() if f.role is Role.REDUCED and f.monoid in (None, "sum")]
        shared = any(sum(name in names for names in held) > 1 for name in summed)
        return shared and roles <= {Role.MAPPED, Role.REDUCED}

    def apply(self, types: Sequence[Type | None], names: Sequence[str] | None = None) -> Application:
        """Match operands against the rule and infer the results' dimensions.

        names are the operands' names, for errors. Raises RuleError if a rank or a size disagrees.
        """
        names = names or [f"operand {i}" for i in range(len(types))]
        if len(types) != len(self.operands):
            raise RuleError(f"takes {len(self.operands)} operands, received {len(types)}", within=self.text[:200])
        return _Matching(self, types, names).application()


class _Matching:
    """State of one application: bind factors to sizes, then build the results."""

    def __init__(self, rule: Rule, types: Sequence[Type | None], names: Sequence[str]) -> None:
        self.rule, self.types, self.names = rule, types, names
        self.dims: dict[str, Dim] = {n: _split_factor(n, s) for n, s in rule.known_sizes.items()}
        self.seen_in: dict[str, str] = {}
        self.factors: dict[str, AxisFactor] = dict(rule.factors)

    def application(self) -> Application:
        spans = [self._ellipsis_rank(i) for i in range(len(self.types))]
        depth = max((s for s in spans if s is not None), default=0)
        self._bind_ellipsis(spans, depth)
        operands = tuple(
            None if t is None else self._expand(pattern, t, span)
            for pattern, t, span in zip(self.rule.operands, self.types, spans, strict=True)
        )
        products: list[tuple[int, int, AxisDim]] = []
        for i, (dims, t) in enumerate(zip(operands, self.types, strict=True)):
            for j, dim in enumerate(dims or ()):
                assert t is not None
                if len(dim.factors) == 1:
                    self._bind(dim.factors[0], t.dims[j], i)
                elif dim.factors:
                    products.append((i, j, dim))
                elif not t.dims[j].is_one and not self._is_ellipsis(i, j, spans[i]):
                    raise RuleError(f"dimension {j} of {self.names[i]} must be 1, is {t.dims[j].size}")
        self._solve(products)
        results = tuple(
            tuple(
                AxisDim((f"...{depth - k}",)) if isinstance(d, LeadingDims) else d
                for d in pattern
                for k in range(depth if isinstance(d, LeadingDims) else 1)
            )
            for pattern in self.rule.results
        )
        shapes = tuple(tuple(self._result_dim(d, operands) for d in dims) for dims in results)
        return Application(self.factors, self.dims, operands, results, shapes)

    # -- ellipsis ----------------------------------------------------------------------------------------------

    def _ellipsis_rank(self, i: int) -> int | None:
        """Return the number of dimensions of `...` in operand i, or None if it has no `...`. Checks the rank."""
        t = self.types[i]
        if t is None:
            return None
        pattern = self.rule.operands[i]
        fixed = sum(not isinstance(d, LeadingDims) for d in pattern)
        if fixed == len(pattern):
            if t.rank != fixed:
                raise RuleError(f"{self.names[i]} must have rank {fixed}, has rank {t.rank}")
            return None
        if t.rank < fixed:
            raise RuleError(f"{self.names[i]} must have rank {fixed} or more, has rank {t.rank}")
        return t.rank - fixed

    def _start(self, i: int) -> int:
        return next(k for k, d in enumerate(self.rule.operands[i]) if isinstance(d, LeadingDims))

    def _is_ellipsis(self, i: int, j: int, span: int | None) -> bool:
        return span is not None and self._start(i) <= j < self._start(i) + span

    def _bind_ellipsis(self, spans: Sequence[int | None], depth: int) -> None:
        for k in range(1, depth + 1):
            name = f"...{k}"
            self.factors[name] = AxisFactor(name, Role.MAPPED)
            unit: Dim | None = None
            for i, span in enumerate(spans):
                if span is None or span < k:
                    continue
                t = self.types[i]
                assert t is not None
                dim = t.dims[self._start(i) + span - k]
                if dim.is_one:
                    unit = unit or dim
                else:
                    self._bind(name, dim, i)
            if name not in self.dims:
                self.dims[name] = unit or Dim.of(1)

    def _expand(self, pattern: DimPattern, t: Type, span: int | None) -> tuple[AxisDim, ...]:
        out: list[AxisDim] = []
        for d in pattern:
            if isinstance(d, LeadingDims):
                for k in range(span or 0, 0, -1):
                    name, j = f"...{k}", len(out)
                    broadcast = t.dims[j].is_one and not self.dims[name].is_one
                    out.append(AxisDim() if broadcast else AxisDim((name,)))
            else:
                out.append(d)
        return tuple(out)

    # -- sizes -------------------------------------------------------------------------------------------------

    def _bind(self, name: str, dim: Dim, i: int) -> None:
        known = self.dims.get(name)
        if known is None:
            self.dims[name] = dim
            self.seen_in[name] = self.names[i]
        elif known.size != dim.size:
            where = f"in {self.seen_in[name]}" if name in self.seen_in else "in the op's attributes"
            axis = "" if name.startswith("...") else f"axis {name} "
            raise RuleError(
                f"{axis}sizes disagree: {known.size} {where}, {dim.size} in {self.names[i]}", hint=self._aligned()
            )
        elif _detail(dim) > _detail(known):
            self.dims[name] = dim

    def _aligned(self) -> str | None:
        """Return a hint for an operand of an elementwise op whose axes are the first ones of another operand, or None
        if there is none: the last axes are aligned.
        """
        shapes = [() if t is None else t.shape for t in self.types]
        longest = max(shapes, key=len, default=())
        for name, shape in zip(self.names, shapes, strict=True) if self.rule.is_elementwise else ():
            after = len(longest) - len(shape)
            if shape and after and all(n in (m, ONE) for n, m in zip(shape, longest, strict=False)):
                return f"{name}[..., {', '.join(['None'] * after)}], since axes are aligned at the last one"
        return None

    def _solve(self, products: list[tuple[int, int, AxisDim]]) -> None:
        """Bind the factors of product dimensions; a dimension with one unknown factor determines it."""
        waiting = products
        while waiting:
            left = [p for p in waiting if not self._solve_one(*p)]
            if len(left) == len(waiting):
                i, j, axis = left[0]
                unknown = [n for n in axis.factors if n not in self.dims]
                raise RuleError(
                    f"cannot infer the sizes of {' and '.join(unknown)} in dimension {j} of {self.names[i]}",
                    hint=f"sizes of all but one of them, such as ({unknown[0]}=2 {' '.join(unknown[1:])})",
                )
            waiting = left

    def _solve_one(self, i: int, j: int, axis: AxisDim) -> bool:
        t = self.types[i]
        assert t is not None
        dim = t.dims[j]
        unknown = [n for n in axis.factors if n not in self.dims]
        if len(dim.factors) == len(axis.factors) and all(
            n in unknown or self.dims[n].size == f.size for n, f in zip(axis.factors, dim.factors, strict=True)
        ):
            for name, factor in zip(axis.factors, dim.factors, strict=True):
                self._bind(name, Dim([factor]), i)
            return True
        if len(unknown) > 1:
            return False
        known = product(self.dims[n].size for n in axis.factors if n in self.dims)
        if unknown:
            rest = dim.size.divide(known)
            if rest is None:
                raise RuleError(f"dimension {j} of {self.names[i]} is {dim.size}, not a multiple of {known}")
            self.dims[unknown[0]] = _split_factor(unknown[0], rest)
            self.seen_in[unknown[0]] = self.names[i]
        elif known != dim.size:
            raise RuleError(
                f"dimension {j} of {self.names[i]} is {dim.size}, but ({' '.join(axis.factors)}) has size {known}"
            )
        return True

    def _result_dim(self, axis: AxisDim, operands: Sequence[tuple[AxisDim, ...] | None]) -> Dim:
        if axis.size is not None:
            return Dim.of(axis.size.substitute({n: d.size for n, d in self.dims.items() if n.isidentifier()}))
        if not axis.factors:
            return Dim.of(ONE)
        if len(axis.factors) == 1:
            return self.dims[axis.factors[0]]
        for dims, t in zip(operands, self.types, strict=True):
            for j, other in enumerate(dims or ()):
                if other.factors == axis.factors and t is not None:
                    return t.dims[j]
        return Dim(f for name in axis.factors for f in self.dims[name].factors)


def _detail(dim: Dim) -> int:
    return len(dim.factors) + sum(f.label is not None for f in dim.factors)


def _split_factor(name: str, size: Size) -> Dim:
    """Return the dimension of a factor that a rule splits off. A name of several letters becomes its label."""
    return Dim([Factor(size, name if len(name) > 1 else None)])
