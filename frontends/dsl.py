"""The DSL: a model is a Python function whose calls, when traced, add ops to a graph.

    @t.model
    def tiny(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 1000, dim: int = 64) -> t.Tensor:
        x = t.embed(tokens, vocab, dim, name="wte")
        for _ in t.stack("h", 2):
            x += t.mlp(t.layer_norm(x, name="ln"), 4 * dim, name="mlp")
        return t.unembed(x, tied="wte")

Positional arguments are inputs and say their types; `t.i64["B S"]` alone does where no type checker reads it
(docs/decisions/0009-types-that-checkers-read.md). Keyword-only arguments are the configuration. An axis that is named
as an integer of the configuration has that size: `t.f32["B channels height width"]`. Tracing runs plain Python: there
is no parser of Python source, and no control flow in a graph beyond calls of repeated blocks.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Self, overload

from treadle.files.nearest_names import NearestNames
from treadle.frontends.call_errors import call_hint
from treadle.frontends.input_types import DeclaredInput, read_input
from treadle.ir.builder import Builder, Expr, ExprLike, describe_source
from treadle.ir.call_spelling import spelled_call
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import FrontendError, Hint, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.initial_values import Init
from treadle.ir.outline import RepeatedRegion, outline_regions
from treadle.ir.sizes import Bounds, Size, SizeLike
from treadle.ir.source_lines import SourceLine, raising_line, user_line
from treadle.ir.types import Dim, DType, Type, f32, parse_type

Tensor = Expr
"""A value of the graph: what a model's function receives and returns."""
TensorLike = ExprLike
"""What an op takes: a tensor, or a number or array, which becomes a constant."""

if TYPE_CHECKING:  # with defaults, so that `t.Model` may stand without parameters
    from typing_extensions import ParamSpec, TypeVar

    P = ParamSpec("P", default=...)
    R = TypeVar("R", default=Any)
else:
    from typing import ParamSpec, TypeVar

    P, R = ParamSpec("P"), TypeVar("R")


class Trace(Builder):
    """A builder that also remembers what the model's text says once.

    regions   the nodes that the repetitions of each stack added
    declared  the parameters that may not be declared again, each with its line; a repetition of a shared stack may
              declare the others'
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.regions: list[RepeatedRegion] = []
        self.depth = 0
        self.declared: dict[str, SourceLine | None] = {}


_current: ContextVar[Trace | None] = ContextVar("treadle_trace", default=None)


def trace() -> Trace:
    """The trace under way. Raises FrontendError outside a model."""
    found = _current.get()
    if found is None:
        raise FrontendError(
            "this can only be used while a model is traced",
            source=describe_source(user_line(), ""),
            hint="call it inside a function decorated with @t.model",
        )
    return found


# -- inside a model --------------------------------------------------------------------------------------------


def stack(name: str, count: int | Size, *, shared: bool = False) -> Iterator[int]:
    """`for i in t.stack("h", 12):` repeats a block under the scopes h.0, h.1, ...

    Repetitions with the same structure become one function of the graph. If `shared`, all of them are under the one
    scope h, and so have the same parameters.
    """
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


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Name the parameters and ops inside: `with t.scope("encoder"): ...`"""
    with trace().scoped(name):
        yield


def parameter(name: str, *shape: SizeLike | Dim, init: Init | str = "normal", dtype: DType = f32) -> Tensor:
    """Declare the parameter `name` under the current scope.

    init is `"zeros"`, `"ones"`, `"normal"` (standard deviation 0.02) or an `Init`. Raises FrontendError for another
    word, for a name that is declared already, and for a shape that is not known while tracing.
    """
    tracing, line = trace(), user_line()
    full = f"{tracing.scope}.{name}" if tracing.scope else name
    if full in tracing.declared:
        raise FrontendError(
            f"parameter {full} is declared twice",
            received=f"first at {tracing.declared[full]}, now at {line}",
            source=describe_source(line, tracing.scope),
            hint=_apart(tracing, full, name, line),
        )
    tracing.declared[full] = line
    start = _INITS.get(init) if isinstance(init, str) else init
    if start is None:
        raise FrontendError(
            f"parameter {full}: unknown initial value {init!r}",
            source=describe_source(user_line(), tracing.scope),
            hint="one of " + ", ".join(_INITS) + ", or an Init",
        )
    text = f"{dtype!s}[{', '.join([str(d) for d in shape])}]"
    type = _type_of_a_weight(text)
    if type is None:
        raise FrontendError(
            f"the shape of parameter {full} must be of numbers from 0 on",
            received=text,
            source=describe_source(user_line(), tracing.scope),
            hint="a weight has one size for all calls: give the axis a number" if parse_type(text).symbols else None,
        )
    return tracing.parameter(full, type, start)


def _apart(tracing: Trace, full: str, name: str, line: SourceLine | None) -> str:
    """How two parameters of one name come apart: two stacks of one name, a loop of Python's, or two layers."""
    stacks = [r for r in tracing.regions if f"{tracing.scope}.".startswith(f"{r.scope}.")]
    again = f"t.shared_parameter({full!r}) uses it again"
    if stacks:
        stack = max(stacks, key=lambda region: len(region.scope))
        return (
            f't.stack("{stack.name}_2", ...): a name of its own for one of the two stacks; '
            f't.stack(f"{stack.name}_{{i}}", ...) for one in a loop; {again}'
        )
    layer = tracing.scope.rpartition(".")[2] or name
    if tracing.declared[full] == line:
        return (
            f'for i in t.stack("layers", 2): around a block that repeats, or a name for each time, '
            f'name=f"{layer}_{{i}}"; {again}'
        )
    return f'name="{layer}_2" for one of the two, or with t.scope("second"): around it; {again}'


@lru_cache(maxsize=4096)  # layers repeat
def _type_of_a_weight(text: str) -> Type | None:
    """The type, or None where its shape holds a symbol or a negative size. Raises as `parse_type` does."""
    type = parse_type(text)
    sizes = type.static_shape
    return None if sizes is None or min(sizes, default=0) < 0 else type


_INITS = {"normal": Init("normal", 0.02), "zeros": Init("zeros"), "ones": Init("ones")}


def shared_parameter(path: str) -> Tensor:
    """A parameter declared earlier, by its path from the current scope or one around it; the innermost counts.

    So a model that ties its weights does so inside another as well. Raises FrontendError with the nearest names.
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
    """The table of the embedding under that scope, for `tied=`. Raises FrontendError with the nearest embedding."""
    tracing = trace()
    try:
        return shared_parameter(f"{tied}.weight")
    except FrontendError as error:
        tables = [name.removesuffix(".weight") for name in tracing.function.parameters if name.endswith(".weight")]
        wanted = tied.removesuffix(".weight")
        near = [t for t in tables if t.rpartition(".")[2] == wanted.rpartition(".")[2]]
        near = near or NearestNames(tables).of(wanted, 1, 0.5)
        raise FrontendError(
            f"{layer}: tied= names no embedding that is declared before",
            received=f"tied={tied!r}",
            source=error.source,
            hint=f"tied={near[0]!r}"
            if near
            else 'the name= of an embedding above: t.embed(tokens, 100, 16, name="wte")',
        ) from None


def constant(value: Any, dtype: DType | None = None) -> Tensor:
    """A constant from a number, nested list or NumPy array."""
    return trace().constant(value, dtype)


def bound(symbol: str, *, lower: int = 1, upper: int | None = None) -> None:
    """Promise that a symbolic axis stays within bounds; calls outside them are refused.

    Raises FrontendError for a symbol that no input has, GraphError for a lower bound below 1 or where no size is left.
    """
    graph = trace().graph
    if symbol not in graph.symbols:
        raise FrontendError(f"no input has an axis {symbol!r}", hint="one of " + ", ".join(graph.symbols))
    graph.bound(symbol, Bounds(lower, upper))


def size_of(x: Tensor, axis: int) -> Size:
    """The size of an axis: an integer, a symbol or an expression."""
    return x.shape[axis]


# -- models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model(Generic[P, R]):
    """A model declaration with its configuration; made by `@t.model`.

    function  the traced function, whose signature calls have inside other models
    config    configuration values that differ from the declaration's defaults
    given     names of the optional inputs that are present
    """

    function: Callable[P, R]
    config: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):  # for `inspect` and a notebook's `?`
            object.__setattr__(self, name, getattr(self.function, name, None))
        object.__setattr__(self, "__wrapped__", self.function)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def description(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """The text of the declaration."""
        return textwrap.dedent(inspect.getsource(self.function))

    @cached_property
    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.function, eval_str=True)
        except Exception as error:  # whatever an annotation in quotes raises
            raise FrontendError(
                f"the inputs' types of model {self.name} cannot be read: {type(error).__name__}: {error}",
                source=_definition(self.function),
            ) from error

    @cached_property
    def declared_inputs(self) -> tuple[DeclaredInput, ...]:
        """All inputs, optional ones included, in the sizes of the configuration.

        Raises FrontendError for one without a type, with a default, or with a negative size.
        """
        sizes = {n: v for n, v in {**self.defaults, **self.config}.items() if type(v) is int}
        try:
            return tuple(
                read_input(p, self.name, sizes)
                for p in self._signature.parameters.values()
                if p.kind is not inspect.Parameter.KEYWORD_ONLY
            )
        except FrontendError as error:
            error.source = _definition(self.function)
            raise

    @property
    def defaults(self) -> dict[str, Any]:
        """The configuration's names and default values."""
        found = self._signature.parameters.values()
        return {p.name: p.default for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def configure(self, /, *, inputs: Sequence[str] | None = None, **config: Any) -> Model[P, R]:
        """The model with some configuration changed, or with those optional inputs present that `inputs` names.

        `inputs` may name required ones too, which are always present. Raises FrontendError for an unknown name.
        """
        if isinstance(inputs, str):
            raise FrontendError("inputs= is a list of names", received=repr(inputs), hint=f"inputs=[{inputs!r}]")
        for kind, asked, known in (
            ("option", config, [*self.defaults]),
            ("input", inputs or (), [i.name for i in self.declared_inputs]),
        ):
            if unknown := [n for n in asked if n not in known]:
                raise self._lacks(kind, unknown, known)
        for name, value in config.items():
            default = self.defaults[name]
            if type(default) is int and type(value) is not int and not (value is None or callable(value)):
                raise FrontendError(
                    f"option {name} of model {self.name} must be an integer, as its default {default} is",
                    received=repr(value),
                    source=_definition(self.function),
                )
            if callable(default) and isinstance(value, str):
                raise FrontendError(
                    f"option {name} of model {self.name} is a function",
                    received=repr(value),
                    source=_definition(self.function),
                    hint=Hint(f"{name}=t.{value}", f"--set {name}=t.{value}"),
                )
        optional = [i.name for i in self.declared_inputs if i.optional]
        given = self.given if inputs is None else tuple(n for n in optional if n in inputs)
        return Model(self.function, {**self.config, **config}, given)

    def _lacks(self, kind: str, unknown: Sequence[str], known: Sequence[str]) -> FrontendError:
        near = NearestNames(known).of(unknown[0], 1, 0.5)
        one_of = "one of " + ", ".join(known) if known else f"it has no {kind}s"
        return FrontendError(
            f"model {self.name} has no {kind} {', '.join(unknown)}",
            source=_definition(self.function),
            hint=f"did you mean {near[0]}? {one_of}" if near else one_of,
        )

    def graph(self) -> Graph:
        """Trace the declaration into a graph. Raises the error of the line at fault."""
        with collection_paused():
            return self._trace()

    def _trace(self) -> Graph:
        g = Graph(self.name)
        tracing = Trace(g)
        token = _current.set(tracing)
        try:
            arguments = {
                i.name: tracing.input(i.name, i.type) if not i.optional or i.name in self.given else None
                for i in self.declared_inputs
            }
            function: Callable[..., Any] = self.function
            tracing.outputs(**_name_outputs(self, function(**arguments, **self._configuration())))
        except TreadleError as error:
            error.source = error.source or self._line_of(error, tracing)
            raise
        except Exception as error:  # Python's own, from the model's code: a misspelt attribute, a wrong argument
            raise FrontendError(
                f"model {self.name} cannot be traced: {type(error).__name__}: {error}",
                source=self._line_of(error, tracing),
                hint=call_hint(error),
            ) from error
        finally:
            _current.reset(token)
        outline_regions(g, tracing.regions)
        return g

    def _line_of(self, error: Exception, tracing: Trace) -> str:
        return describe_source(raising_line(error), tracing.scope) or _definition(self.function)

    def _configuration(self) -> dict[str, Any]:
        values = {**self.defaults, **self.config}
        missing = [n for n, v in values.items() if v is inspect.Parameter.empty]
        if missing:
            raise FrontendError(
                f"model {self.name} needs a value for {', '.join(missing)}",
                source=_definition(self.function),
                hint=f"{self.name}.configure({missing[0]}=...)",
            )
        return values

    def __call__(self, /, *inputs: P.args, **config: P.kwargs) -> R:
        """Use the model inside another: its ops and parameters go under the current scope.

        Inputs go by position or name. Optional ones may be left out at the end.
        """
        if _current.get() is None:
            raise FrontendError(
                f"model {self.name} is declared, not compiled",
                hint=f"treadle.compile({self.name}) gives something that runs",
            )
        names = {i.name: i.optional for i in self.declared_inputs}
        options: dict[str, Any] = {name: value for name, value in config.items() if name not in names}
        named = {name: value for name, value in config.items() if name in names}
        if unknown := [name for name in options if name not in self.defaults]:
            raise self._lacks("input or option", unknown, [*names, *self.defaults])
        missing = [name for name in list(names)[len(inputs) :] if not names[name] and name not in named]
        if missing or len(inputs) > len(names):
            called = inspect.signature(self.function)
            raise FrontendError(
                f"model {self.name} is called {f'without {missing[0]}' if missing else 'with too many inputs'}",
                received=f"{len(inputs)} inputs by position" + (f", and {', '.join(config)}" if config else ""),
                source=describe_source(user_line(), trace().scope),
                hint=spelled_call(self.name, called),
            )
        inner = self.configure(**options)
        absent = {name: None for name in list(names)[len(inputs) :] if names[name] and name not in named}
        function: Callable[..., R] = inner.function
        return function(*inputs, **named, **absent, **inner._configuration())

    # It is not changed once it is made. Pickle names it by its module, as it does a function.

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Raises FrontendError for a model that its module does not hold under its name."""
        module, path = self.function.__module__, self.function.__qualname__
        try:
            declared = _declared(module, path)
        except (KeyError, AttributeError):
            declared = None
        if not isinstance(declared, Model) or declared.function is not self.function:
            raise FrontendError(
                f"model {self.name} cannot be pickled: its module has no {path}",
                received=repr(self),
                source=_definition(self.function),
                hint=f'declare it at the top of a file; or t.compile({self.name}).save("model.treadle") and '
                't.load("model.treadle")',
            )
        return _pickled, (module, path, dict(self.config), self.given)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v.__name__ if inspect.isfunction(v) else repr(v)}" for k, v in self.config.items())
        return f"<model {self.name}({shown})>"


@overload
def model(function: Callable[P, R]) -> Model[P, R]: ...
@overload
def model() -> Callable[[Callable[P, R]], Model[P, R]]: ...
def model(function: Callable[..., Any] | None = None) -> Any:
    """Declare a model: decorate a function whose positional arguments are typed inputs."""
    return Model if function is None else Model(function)


def _declared(module: str, path: str) -> Any:
    """What a module holds under a dotted name. Raises KeyError or AttributeError."""
    found: Any = sys.modules[module]
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _pickled(module: str, path: str, config: Mapping[str, Any], given: tuple[str, ...]) -> Model:
    """The model that a pickle names."""
    import_module(module)
    return Model(_declared(module, path).function, config, given)


def _definition(function: Callable[..., Any]) -> str:
    code = function.__code__
    return f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}, model {function.__name__}"


def _name_outputs(declared: Model, returned: Any) -> dict[str, Expr]:
    named: dict[str, Any]
    if isinstance(returned, Expr):
        node, hint = returned.value.node, returned.value.name
        named = {"output" if node is None or hint in (node.op.name, "x") else hint: returned}  # x: an operator's
    elif isinstance(returned, Mapping):
        named = dict(returned)
    elif isinstance(returned, tuple | list):
        named = {f"output{i}": value for i, value in enumerate(returned)}
    else:
        named = {"output": returned}
    if not named or not all(isinstance(name, str) for name in named):
        raise FrontendError(
            f"model {declared.name} returns {'outputs whose names are no text' if named else 'no outputs'}",
            received=", ".join(map(repr, named)) or None,
            source=_definition(declared.function),
            hint='return a tensor, or a dict of them such as {"hidden": x}',
        )
    if returned is None:
        raise FrontendError(
            f"model {declared.name} returns nothing",
            source=_definition(declared.function),
            hint="is a `return` missing?",
        )
    for name, value in named.items():
        if not isinstance(value, Expr):
            which = "what model" if value is returned else f"output {name} of model"
            raise FrontendError(
                f"{which} {declared.name}{' returns' if value is returned else ''} is not a tensor of it",
                received=type(value).__name__,
                source=_definition(declared.function),
                hint="return a tensor, a dict of them by name, or a tuple of them",
            )
    return named
