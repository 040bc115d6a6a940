"""Guards of torch.export: the sizes for which an export is valid.

An export is one path through the module's Python code. Its guards are the conditions on sizes that chose the path. A
guard that bounds a symbol becomes a bound of the graph's symbol, so that a call outside the bound is refused. If a
guard cannot be expressed this way, the import is refused, because for other sizes the module would compute something
else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from treadle.frontends.torch_export.lines import guarded_at
from treadle.frontends.torch_export.sizes import Symbols, env_hint
from treadle.ir.errors import FrontendError, SizeError
from treadle.ir.sizing.size_bounds import INFINITY, Bounds, quotient_interval
from treadle.ir.sizing.sizes import Size, product

_MOST_TRIED = 1 << 19
"""Maximum number of values of a symbol for which a guard is evaluated."""


def bounds_of(symbols: Symbols) -> dict[str, Bounds]:
    """Return the bounds of each of our symbols, from the guards of an export; `symbols.bounds` holds them too.

    Conditions on a single symbol become bounds. Conditions on several symbols must then hold for all values within the
    bounds.

    Raises FrontendError, with the line of the condition, for a guard that bounds cannot express.
    """
    env = symbols.env
    if env is None:
        return {}
    found = symbols.bounds
    ranges = env.var_to_range if symbols.traced is None else symbols.traced.ranges
    for symbol, range in ranges.items():
        name = symbols.names.get(symbol.name)
        if name is not None:
            found[name] = found.get(name, Bounds()).intersect(_of_range(range))
    on_several = []
    for guard, expr in _conditions(symbols, env):
        free = sorted({s.name for s in expr.free_symbols})
        ours = {symbols.names.get(n) for n in free}
        if None in ours:
            if all(n in symbols.names or n.startswith(("u", "zuf")) for n in free):
                continue  # the size depends on data; its operator is refused
            raise _unexpressed(guard, symbols, expr)
        if len(ours) == 1 and free:
            (name,) = ours
            assert name is not None
            held = _values(expr, free, env, symbols, guard)
            found[name] = found.get(name, Bounds()).intersect(held)
        elif free:
            on_several.append((guard, expr))
    for guard, expr in on_several:
        if not _always(expr, found, symbols):
            raise _unexpressed(guard, symbols, expr, known=_fails_somewhere(expr, found, symbols))
    for name, bounds in found.items():
        if bounds.upper is not None and bounds.upper < bounds.lower:
            raise FrontendError(
                f"no size {name} satisfies all the module's conditions on it", received=bounds.around(name)
            )
    return found


def _conditions(symbols: Symbols, env: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the guards of an export with their conditions, split into parts that must all hold."""
    asserted = [a for held in env.deferred_runtime_asserts.values() for a in held]
    for position, guard in enumerate((*env.guards, *asserted)):
        late = symbols.traced is not None and symbols.traced.guards <= position < len(env.guards)
        if not _is_of_one_op(guard, late) and not (late and _is_of_guards(guard)):
            yield from ((guard, part) for part in _all_of(env.replace(guard.expr)))


def _all_of(expr: Any) -> Iterator[Any]:
    """Yield the conditions whose conjunction is the expression: for `x*y != 0`, the conditions `x != 0` and `y !=
    0`.
    """
    kind = type(expr).__name__
    if kind == "And":
        for part in expr.args:
            yield from _all_of(part)
    elif kind == "Unequality" and type(expr.args[0]).__name__ == "Mul" and expr.args[1].is_zero:
        for part in expr.args[0].args:
            yield from _all_of(expr.func(part, 0))
    else:
        yield expr


def _of_range(range: Any) -> Bounds:
    def finite(x: Any) -> int | None:
        return int(x) if getattr(x, "is_Integer", False) else None

    upper = finite(range.upper)
    return Bounds(max(finite(range.lower) or 1, 1), None if upper is None or upper >= 2**40 else upper)


_SHAPE_RULES = re.compile(
    r"torch/(_ops\.py|_refs/|_decomp/|_prims_common/|_meta_registrations\.py|_subclasses/|_export/non_strict_utils\.py)"
)
"""Files with the operators' own shape rules. The last one calls operators; C++ operators have no lines of their own.
Newer versions of PyTorch (2.15) find the shape of attention through the decompositions in `_decomp`.
"""


def _is_of_one_op(guard: Any, late: bool) -> bool:
    """Return True if an operator's own shape rule took its general case, in which sizes differ or are not 1.

    The operator's result does not depend on the case. (The shape of squeeze does; its handler checks the case itself.)
    """
    general = type(guard.expr).__name__ == "Unequality"
    return general and (late or _SHAPE_RULES.search(_place(guard)) is not None)


def _is_of_guards(guard: Any) -> bool:
    """Return True if a guard was added by evaluating another one, as an exported program does when it is decomposed:
    S <= 32, in the form `S == min(32, S)`, compares S < 32.
    """
    return "nn/modules/module.py" in _place(guard)


def _place(guard: Any) -> str:
    """Return the line of PyTorch that added a guard."""
    return str(getattr(getattr(guard, "sloc", None), "framework_loc", "")).replace("\\", "/")


def _values(expr: Any, free: Sequence[str], env: Any, symbols: Symbols, guard: Any) -> Bounds:
    """Return the interval around the example's own size in which a condition on one symbol holds.

    For linear terms, minima, maxima and divisions by numbers, a condition is constant or periodic beyond a point that
    the numbers in it bound. So it is enough to try values.
    """
    numbers, divisors = [1], [1]
    for part in _parts(expr):
        if part.is_Integer:
            numbers.append(abs(int(part)))
        if type(part).__name__ in ("FloorDiv", "Mod", "PythonMod", "CleanDiv") and part.args[1].is_Integer:
            divisors.append(abs(int(part.args[1])))
    period = int(np.prod(divisors))
    settled = (sum(numbers) + 2) * period
    hint = env_hint(env, free[0])
    settled = max(settled, hint + 1)
    last = settled + 2 * period + 2
    if last > _MOST_TRIED:
        raise _unexpressed(guard, symbols, expr)
    values = np.arange(last + 1)
    try:
        held = np.broadcast_to(_evaluated(expr, dict.fromkeys(free, values)), values.shape)
    except KeyError:
        raise _unexpressed(guard, symbols, expr) from None
    if not held[hint]:
        raise _unexpressed(guard, symbols, expr)
    if bool(held[settled:].any()) != bool(held[settled:].all()):
        raise _unexpressed(guard, symbols, expr)  # e.g. S % 2 == 0
    wrong = np.flatnonzero(~held)
    below, above = wrong[wrong < hint], wrong[wrong > hint]
    return Bounds(max(int(below[-1]) + 1 if below.size else 1, 1), int(above[0]) - 1 if above.size else None)


def _parts(expr: Any) -> list[Any]:
    found = [expr]
    for part in found:
        found.extend(getattr(part, "args", ()))
    return found


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda *x: reduce(np.add, x),
    "Mul": lambda *x: reduce(np.multiply, x),
    "Pow": lambda x, y: np.power(x, y),
    "FloorDiv": lambda x, y: x // np.where(y == 0, 1, y),
    "CleanDiv": lambda x, y: x // np.where(y == 0, 1, y),
    "Mod": lambda x, y: x % np.where(y == 0, 1, y),
    "PythonMod": lambda x, y: x % np.where(y == 0, 1, y),
    "Min": lambda *x: reduce(np.minimum, x),
    "Max": lambda *x: reduce(np.maximum, x),
    "Equality": np.equal,
    "Unequality": np.not_equal,
    "StrictGreaterThan": np.greater,
    "GreaterThan": np.greater_equal,
    "StrictLessThan": np.less,
    "LessThan": np.less_equal,
    "And": lambda *x: reduce(np.logical_and, x),
    "Or": lambda *x: reduce(np.logical_or, x),
    "Not": np.logical_not,
}


def _evaluated(expr: Any, values: Mapping[str, Any]) -> Any:
    """Return an expression's value. Raises KeyError for an unknown function."""
    if expr.is_Symbol:
        return values[expr.name]
    if getattr(expr, "is_Integer", False):
        return np.int64(int(expr))
    return _OPERATIONS[type(expr).__name__](*(_evaluated(x, values) for x in expr.args))


def _always(expr: Any, bounds: Mapping[str, Bounds], symbols: Symbols) -> bool:
    """Return True if a comparison is known to hold for all sizes within bounds."""
    kind = type(expr).__name__
    if kind in ("And", "Or"):
        return (all if kind == "And" else any)(_always(x, bounds, symbols) for x in expr.args)
    if kind not in _HOLDS:
        return False
    left, right = expr.args
    if _HOLDS[kind](*_interval(left - right, bounds, symbols)):
        return True
    try:
        return _HOLDS[kind](*(symbols.size(left) - symbols.size(right)).interval(bounds))
    except (FrontendError, ValueError):
        return False


_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "Equality": lambda low, high: low == high == 0,
    "Unequality": lambda low, high: low > 0 or high < 0,
    "StrictGreaterThan": lambda low, high: low > 0,
    "GreaterThan": lambda low, high: low >= 0,
    "StrictLessThan": lambda low, high: high < 0,
    "LessThan": lambda low, high: high <= 0,
}
"""For each comparison, a function that returns True if it holds whenever left - right is from `low` to `high`."""


def _interval(expr: Any, bounds: Mapping[str, Bounds], symbols: Symbols) -> tuple[float, float]:
    """Return a lower and an upper bound of an expression. The bounds are sound, but not always tight.

    A sum of products is rewritten in terms of the excess of each part over its minimum. For example, let W = w + 1 and
    L = l + 1 with w, l >= 0. Then 9*W*L - 6*W - 6*L + 4 is 9*w*l + 3*w + 3*l + 1, so it is at least 1.
    """
    kind = type(expr).__name__
    if kind in ("Min", "Max"):
        extreme = min if kind == "Min" else max
        lows, highs = zip(*(_interval(x, bounds, symbols) for x in expr.args), strict=True)
        return extreme(lows), extreme(highs)
    if kind in ("FloorDiv", "CleanDiv"):
        low, high = (_interval(x, bounds, symbols) for x in expr.args)
        return quotient_interval(low, high)
    if expr.is_Symbol:
        known = expr.name in symbols.expressions or expr.name in symbols.names
        return symbols.size(expr).interval(bounds) if known else (-INFINITY, INFINITY)
    if not (expr.is_Integer or kind in ("Add", "Mul", "Pow")):
        return -INFINITY, INFINITY
    parts: dict[Any, tuple[Size, Bounds]] = {}

    def polynomial(x: Any) -> Size:
        if x.is_Integer:
            return Size.of(int(x))
        if x.is_Add or x.is_Mul:
            terms = [polynomial(each) for each in x.args]
            return reduce(lambda a, b: a + b, terms) if x.is_Add else product(terms)
        if x.is_Pow and x.args[1].is_Integer and 0 < int(x.args[1]) <= 8:
            return product([polynomial(x.args[0])] * int(x.args[1]))
        if x not in parts:
            low, high = (-INFINITY, INFINITY) if x.is_Pow else _interval(x, bounds, symbols)
            if low == -INFINITY:
                raise SizeError("a subexpression of the size has no lower bound", received=str(x))
            more = Size.symbol(f"more{len(parts)}")
            parts[x] = more + int(low), Bounds(0, None if high == INFINITY else int(high - low))
        return parts[x][0]

    try:
        total = polynomial(expr)
    except SizeError:
        return -INFINITY, INFINITY
    return total.interval({f"more{at}": held for at, (_, held) in enumerate(parts.values())})


def _fails_somewhere(expr: Any, bounds: Mapping[str, Bounds], symbols: Symbols) -> bool:
    """Return True if a condition on several symbols is known to fail for small sizes within bounds."""
    names = sorted(s.name for s in expr.free_symbols)
    held = [bounds.get(symbols.names[name], Bounds()) for name in names]
    count = int(_MOST_TRIED ** (1 / len(names)))
    tried = [range(b.lower, b.lower + count if b.upper is None else min(b.lower + count, b.upper + 1)) for b in held]
    try:
        return not np.all(_evaluated(expr, dict(zip(names, np.meshgrid(*tried), strict=True))))
    except KeyError:
        return False


def _unexpressed(guard: Any, symbols: Symbols, expr: Any, *, known: bool = True) -> FrontendError:
    """Return the error for a guard that no bounds express. `known` is False if it may hold for all sizes."""
    return FrontendError(
        "the module's code branches on a size, and "
        + ("that branch is valid only for some sizes" if known else "that branch may not be valid for all sizes"),
        received=symbols.named(expr),
        source=guarded_at(guard),
        hint="leave that dimension out of dynamic=, or trace the module once for each case",
    )
