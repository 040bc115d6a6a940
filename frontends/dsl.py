"""The DSL: a model is a Python function whose calls, when traced, add ops to a graph.

    @t.model
    def tiny(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 1000, dim: int = 64) -> t.Tensor:
        x = t.embed(tokens, vocab, dim, name="wte")
        for _ in t.stack("h", 2):
            x += t.mlp(t.layer_norm(x, name="ln"), 4 * dim, name="mlp")
        return t.unembed(x, tied="wte")

Positional arguments are inputs and declare their types; `t.i64["B S"]` alone is enough if no type checker is used
(docs/decisions/0009-types-that-checkers-read.md). Keyword-only arguments are the configuration. An axis that is named
as an integer of the configuration has that size: `t.f32["B channels height width"]`. Tracing runs plain Python, and
does not parse its source. The only control flow of a graph is the calls of repeated blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from treadle.files.nearest_names import NearestNames
from treadle.ir.attribute_values import coerced
from treadle.ir.builder import Builder, Expr, ExprLike, describe_source
from treadle.ir.errors import FrontendError
from treadle.ir.graph import Graph
from treadle.ir.initial_values import Init
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size, SizeLike
from treadle.ir.source_lines import SourceLine, user_line
from treadle.ir.transforms.outline import RepeatedRegion
from treadle.ir.types import Dim, DType, Type, f32, parse_type
from treadle.ir.wording.other_spellings import dtype_word
from treadle.ir.wording.typed_calls import other_meaning

Tensor = Expr
"""A value of the graph: the inputs and outputs of a model's function."""
Function = TypeVar("Function", bound=Callable[..., Any])
TensorLike = ExprLike
"""An operand of an op: a tensor, or a number or array, which becomes a constant."""


class Trace(Builder):
    """A builder that also records a declaration's stacks and parameters.

    regions   the nodes that the repetitions of each stack added
    unentered  the scopes that no `with` statement has entered
    declared  the parameters that may not be declared again, each with its line; a repetition of a shared stack may
              declare the parameters of the other repetitions
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.regions: list[RepeatedRegion] = []
        self.depth = 0
        self.declared: dict[str, SourceLine | None] = {}
        self.unentered: list[NamedScope] = []

    def check_scopes(self) -> None:
        """Raise FrontendError for a scope that was never entered."""
        for each in self.unentered:
            raise FrontendError(
                f"scope {each.name!r} names nothing: it was not entered",
                source=describe_source(each.source, ""),
                hint=f'with t.scope("{each.name}"):',
            )


CURRENT: ContextVar[Trace | None] = ContextVar("treadle_trace", default=None)


def trace() -> Trace:
    """Return the active trace. Raises FrontendError outside a model."""
    found = CURRENT.get()
    if found is None:
        raise FrontendError(
            "this can only be used while a model is traced",
            source=describe_source(user_line(), ""),
            hint="call it inside a function decorated with @t.model",
        )
    return found


MOST_REPETITIONS = 10_000
"""The maximum number of repetitions of a stack: the time of tracing and of compiling is proportional to it."""


# -- inside a model --------------------------------------------------------------------------------------------


class Repetitions(Iterator[int]):
    """The repetitions of `stack`, as an iterator. In a `with` statement it raises FrontendError."""

    def __init__(self, name: str, count: int | Size, numbers: Iterator[int]) -> None:
        self._name, self._count, self._numbers = name, count, numbers

    def __next__(self) -> int:
        return next(self._numbers)

    def __enter__(self) -> NoReturn:
        """Raise FrontendError: a stack is a loop."""
        raise FrontendError(
            f"stack {self._name!r} is a loop, not a block",
            source=describe_source(user_line(), trace().scope),
            hint=f'for i in t.stack("{self._name}", {self._count}):',
        )

    def __exit__(self, *_: object) -> None: ...


def stack(name: str, count: int | Size, *, shared: bool = False) -> Iterator[int]:
    """Repeat a block `count` times, under the scopes `name`.0, `name`.1, ...: `for i in t.stack("h", 12):`

    Repetitions with the same structure become one function of the graph. If `shared`, all repetitions use the single
    scope h, and so have the same parameters. Raises FrontendError for a name that is not text, and for a count that is
    not an integer from 0 to MOST_REPETITIONS.
    """
    if not isinstance(name, str):
        raise FrontendError(
            "stack repeats a block under a name",
            received=type(name).__name__,
            source=describe_source(user_line(), trace().scope),
            hint=other_meaning("stack") + 'for i in t.stack("layer", 12):',
        )
    return Repetitions(name, count, _repeated(name, count, shared))


def _repeated(name: str, count: int | Size, shared: bool) -> Iterator[int]:
    tracing = trace()
    source = user_line()
    fixed = count.constant if isinstance(count, Size) else count
    if type(fixed) is not int or fixed < 0:
        raise FrontendError(
            f"stack {name!r} needs a number of repetitions, 0 or more",
            received=str(count) if isinstance(count, Size | Expr) else repr(count),
            source=describe_source(source, tracing.scope),
            hint="an integer that is known while the model is traced, such as an option of the configuration",
        )
    if fixed > MOST_REPETITIONS:
        raise FrontendError(
            f"stack {name!r} has more than {MOST_REPETITIONS:,} repetitions, each of which is traced",
            received=f"{fixed:,}",
            source=describe_source(source, tracing.scope),
            hint="fewer repetitions of a larger block",
        )
    before, declared = dict(tracing.declared), dict(tracing.declared)
    for i in range(fixed):
        if shared:
            tracing.declared = dict(before)
        outer, start = tracing.scope, len(tracing.function.nodes)
        tracing.scope = ".".join(filter(None, (outer, name, "" if shared else str(i))))
        tracing.depth += 1
        scope, depth = tracing.scope, tracing.depth
        try:
            yield i
        finally:
            tracing.scope = outer
            tracing.depth -= 1
            if shared:
                declared |= tracing.declared
                tracing.declared = declared
            nodes = tracing.function.nodes[start:]
            tracing.regions.append(RepeatedRegion(name, scope, nodes, source, depth))


class NamedScope(ContextDecorator):
    """The scope of a `with` statement, or of a function that it decorates."""

    def __init__(self, name: str, source: SourceLine | None) -> None:
        self.name, self.source = name, source
        self._entered: list[AbstractContextManager[None]] = []
        if (tracing := CURRENT.get()) is not None:
            tracing.unentered.append(self)

    def __call__(self, function: Function) -> Function:
        self._used()
        return super().__call__(function)

    def __enter__(self) -> None:
        self._used()
        self._entered.append(trace().scoped(self.name))
        self._entered[-1].__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)

    def _used(self) -> None:
        tracing = CURRENT.get()
        if tracing is not None and self in tracing.unentered:
            tracing.unentered.remove(self)


def scope(name: str) -> NamedScope:
    """Prefix the names of parameters and ops inside with `name`: `with t.scope("encoder"): ...`"""
    return NamedScope(name, user_line())


def parameter(
    name: str,
    *shape: SizeLike | Dim | Sequence[SizeLike | Dim],
    init: Init | str = "normal",
    dtype: DType = f32,
) -> Tensor:
    """Declare the parameter `name` with a shape and a dtype under the current scope.

    The shape is a size for each axis, or one sequence of sizes: `32, 3` or `(32, 3)`. init is `"zeros"`, `"ones"`,
    `"normal"` (standard deviation 0.02) or an `Init`. Raises FrontendError for another init, for a name that is not
    text or is already declared, for another dtype, and for a shape that is not known while tracing.
    """
    sizes: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    return declare(trace(), name, sizes, init, dtype, user_line(beyond=1))


def declare(
    tracing: Trace,
    name: object,
    shape: Sequence[Any],
    init: object,
    dtype: object,
    line: SourceLine | None,
) -> Tensor:
    """Declare a parameter as `parameter` does, for a caller that has the trace and the user's line."""

    def refusal(what: str, received: str | None = None, hint: str | None = None) -> FrontendError:
        return FrontendError(what, received=received, source=describe_source(line, tracing.scope), hint=hint)

    if not isinstance(name, str):
        raise refusal("the name of a parameter is text", f"{name!r:.80}", 't.parameter("w", 32, 3)')
    full = f"{tracing.scope}.{name}" if tracing.scope else name
    if full in tracing.declared:
        received = f"first at {tracing.declared[full]}, now at {line}"
        raise refusal(f"parameter {full} is declared twice", received, _apart(tracing, full, name, line))
    tracing.declared[full] = line
    start = _INITS.get(init) if isinstance(init, str) else init
    if not isinstance(start, Init):
        words = ", ".join(_INITS) + ', or an Init such as t.Init("normal", 0.02)'
        numeric = isinstance(init, int | float) and not isinstance(init, bool)
        number = f't.Init("normal", {init}), a standard deviation, or t.Init("constant", {init})'
        what = f"parameter {full}: unknown initial value {init!r:.80}"
        raise refusal(what, hint=number if numeric else f"one of {words}")
    if not isinstance(dtype, DType):
        what = f"parameter {full}: dtype must be a dtype of Treadle"
        raise refusal(what, f"{dtype!r:.80}", f"dtype={dtype_word(dtype) or 't.f32, t.f16, t.bf16 or t.f64'}")
    sizes: list[SizeLike] = []
    for each in shape:
        size = each if type(each) is int or type(each) is Size else _size_of_a_weight(each)
        if size is None:
            example = 't.parameter("w", 32, 3) or t.parameter("w", (32, 3)); without sizes, it is a scalar'
            raise refusal(f"the shape of parameter {full} must consist of sizes", f"{each!r:.80}", example)
        sizes.append(size)
    wanted = _type_of_a_weight(dtype.name, *sizes)
    if wanted is None:
        text = _weight_text(dtype.name, sizes)
        example = "a number as the size: a weight has one size for all calls"
        what = f"the shape of parameter {full} must consist of numbers, 0 or more"
        raise refusal(what, text, example if parse_type(text).symbols else None)
    return tracing.parameter(full, wanted, start)


def _apart(tracing: Trace, full: str, name: str, line: SourceLine | None) -> str:
    """Return the hint for two parameters with one name. They may come from two stacks of one name, a Python loop, or
    two layers.
    """
    stacks = [r for r in tracing.regions if f"{tracing.scope}.".startswith(f"{r.scope}.")]
    again = f"t.shared_parameter({full!r}) uses it again"
    if stacks:
        stack = max(stacks, key=lambda region: len(region.scope))
        return (
            f't.stack("{stack.name}_2", ...): another name for one of the two stacks; '
            f't.stack(f"{stack.name}_{{i}}", ...) for a stack in a loop; {again}'
        )
    layer = tracing.scope.rpartition(".")[2] or name
    if tracing.declared[full] == line:
        return (
            f'for i in t.stack("layers", 2): around a block that repeats, or a separate name each time, '
            f'name=f"{layer}_{{i}}"; {again}'
        )
    return f'name="{layer}_2" for one of the two, or with t.scope("second"): around it; {again}'


def _size_of_a_weight(size: object) -> SizeLike | None:
    """Return a size of a shape as an integer or as text, or None for another value. Sizes are compared by their text,
    because equality ignores a label.
    """
    if isinstance(size, Size | Dim | str):
        return str(size)
    if isinstance(size, bool | Expr):
        return None
    try:
        return operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        return None


@lru_cache(maxsize=4096)  # layers repeat the same shapes
def _type_of_a_weight(dtype: str, *shape: SizeLike) -> Type | None:
    """Return the type, or None if its shape contains a symbol or a negative size. Raises as `parse_type` does."""
    type = parse_type(_weight_text(dtype, shape))
    sizes = type.static_shape
    return None if sizes is None or min(sizes, default=0) < 0 else type


def _weight_text(dtype: str, shape: Sequence[SizeLike | Dim]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


_INITS = {"normal": Init("normal", 0.02), "zeros": Init("zeros"), "ones": Init("ones")}


def shared_parameter(path: str) -> Tensor:
    """Return a parameter declared earlier, by its path from the current or an enclosing scope; the innermost match
    counts.

    So a model that ties its weights also works inside another model. Raises FrontendError with the nearest names.
    """
    tracing = trace()
    known = tracing.function.parameters
    around = tracing.scope.split(".") if tracing.scope else []
    for depth in range(len(around), -1, -1):
        full = ".".join([*around[:depth], path])
        if full in known:
            return tracing.expr(known[full])
    near = NearestNames(known).of(path, 3)
    raise FrontendError(
        f"there is no parameter {path!r} to share",
        source=describe_source(user_line(), tracing.scope),
        hint=f"did you mean {' or '.join(near)}?" if near else "declare it first",
    )


def shared_table(layer: str, tied: str) -> Tensor:
    """Return the table of the embedding under that scope, for `tied=`. Raises FrontendError with the nearest
    embedding.
    """
    tracing = trace()
    try:
        return shared_parameter(f"{tied}.weight")
    except FrontendError as error:
        tables = [name.removesuffix(".weight") for name in tracing.function.parameters if name.endswith(".weight")]
        wanted = tied.removesuffix(".weight")
        near = [t for t in tables if t.rpartition(".")[2] == wanted.rpartition(".")[2]]
        near = near or NearestNames(tables).of(wanted, 1, 0.5)
        raise FrontendError(
            f"{layer}: tied= does not name an embedding that is declared before",
            received=f"tied={tied!r}",
            source=error.source,
            hint=f"tied={near[0]!r}"
            if near
            else 'the name= of an embedding above: t.embed(tokens, 100, 16, name="wte")',
        ) from None


def constant(value: Any, dtype: DType | None = None) -> Tensor:
    """Return a constant from a value: a number, a nested list or a NumPy array. `dtype` converts it; None: as it is."""
    return trace().constant(value, coerced("DType | None", dtype))


def bound(symbol: str, *, lower: int = 1, upper: int | None = None) -> None:
    """Promise that a symbolic axis has a size from `lower` to `upper`; calls with other sizes raise an error.

    Raises FrontendError for a symbol that no input has, GraphError for a lower bound below 1, or if the bounds allow no
    size.
    """
    graph = trace().graph
    if symbol not in graph.symbols:
        known = "one of " + ", ".join(graph.symbols) if graph.symbols else "leave it out: all axes have fixed sizes"
        raise FrontendError(f"no input has an axis {symbol!r}", hint=known)
    graph.bound(symbol, Bounds(lower, upper))


def size_of(x: Tensor, axis: int) -> Size:
    """Return the size of an axis of x: an integer, a symbol or an expression."""
    return x.shape[axis]
