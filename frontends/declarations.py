"""Model declarations: functions that are configured, called in other models, and traced when a graph is requested."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Self, overload

from treadle.files.nearest_names import NearestNames
from treadle.frontends.call_errors import call_hint
from treadle.frontends.dsl import CURRENT, Trace, trace
from treadle.frontends.input_types import DeclaredInput, read_input
from treadle.frontends.neighbor_modules import importing_neighbors
from treadle.ir.builder import Expr, describe_source
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import FrontendError, Hint, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.source_lines import raising_line, user_line
from treadle.ir.transforms.outline import outline_regions
from treadle.ir.wording.call_spelling import spelled_call
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.ir.wording.other_interfaces import MODEL_ATTRIBUTES
from treadle.ir.wording.other_spellings import MODEL_NAMES
from treadle.ir.wording.unknown_attributes import with_attribute_hints

if TYPE_CHECKING:  # defaults, so that `t.Model` is valid without parameters
    from typing_extensions import ParamSpec, TypeVar

    P = ParamSpec("P", default=...)
    R = TypeVar("R", default=Any)
else:
    from typing import ParamSpec, TypeVar

    P, R = ParamSpec("P"), TypeVar("R")


class UnknownInputError(FrontendError):
    """The error for a requested input that the declaration lacks."""


# -- models ----------------------------------------------------------------------------------------------------


@with_attribute_hints("a declaration", MODEL_ATTRIBUTES)
@dataclass(frozen=True)
class Model(Generic[P, R]):
    """A model declaration with its configuration; `@t.model` returns it.

    function  the traced function; calls of the model inside other models have its signature
    config    configuration values that differ from the declaration's defaults
    optional_inputs  names of the optional inputs that are present
    """

    function: Callable[P, R]
    config: Mapping[str, Any] = field(default_factory=dict)
    optional_inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):  # for `inspect` and a notebook's `?`
            object.__setattr__(self, name, getattr(self.function, name, None))
        object.__setattr__(self, "__wrapped__", self.function)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def description(self) -> str:
        """The first line of the declaration's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """The source text of the declaration."""
        return textwrap.dedent(inspect.getsource(self.function))

    @cached_property
    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.function, eval_str=True)
        except Exception as error:  # anything that a quoted annotation raises
            raise FrontendError(
                f"the inputs' types of model {self.name} cannot be read: {type(error).__name__}: {error}",
                source=_definition(self.function),
            ) from error

    @cached_property
    def declared_inputs(self) -> tuple[DeclaredInput, ...]:
        """All inputs, including optional inputs, with the configuration's sizes.

        Raises FrontendError for an input without a type, with a default, or with a negative size.
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

    @with_checked_call(examples={"inputs": 'inputs=["lengths"]'})
    def configure(self, /, *, inputs: Sequence[str] | None = None, **config: Any) -> Model[P, R]:
        """Return the model with changed configuration, or with the optional inputs that `inputs` names.

        `inputs` may also name required inputs, which are always present. Raises FrontendError for an unknown name.
        """
        for kind, asked, known in (
            ("option", config, [*self.defaults]),
            ("input", inputs or (), [i.name for i in self.declared_inputs]),
        ):
            if unknown := [n for n in asked if n not in known]:
                error = self._lacks(kind, unknown, known)
                if kind == "option" and any(unknown[0] in each.type.symbols for each in self.declared_inputs):
                    axis = f"leave it out: {unknown[0]} is an axis of the inputs, of the size of"
                    costs = f"`treadle inspect` takes --sizes {unknown[0]}={config[unknown[0]]} for costs at that size"
                    error.hint = Hint(f"{axis} the arrays of a call", f"{axis} the inputs; {costs}")
                raise error
        for name, value in config.items():
            default = self.defaults[name]
            if type(default) is int and type(value) is not int and not (value is None or callable(value)):
                raise FrontendError(
                    f"option {name} of model {self.name} must be an integer, as its default {default} is",
                    received=repr(value),
                    source=_definition(self.function),
                )
            if callable(default) and default is not inspect.Parameter.empty and isinstance(value, str):
                raise FrontendError(
                    f"option {name} of model {self.name} is a function",
                    received=repr(value),
                    source=_definition(self.function),
                    hint=Hint(f"{name}=t.{value}", f"--set {name}=t.{value}"),
                )
        optional = [i.name for i in self.declared_inputs if i.optional]
        given = self.optional_inputs if inputs is None else tuple(n for n in optional if n in inputs)
        return Model(self.function, {**self.config, **config}, given)

    def _lacks(self, kind: str, unknown: Sequence[str], known: Sequence[str]) -> FrontendError:
        others = MODEL_NAMES.get(unknown[0])
        near = [each for each in others if each in known] if others else NearestNames(known).of(unknown[0], 1, 0.5)
        one_of = "one of " + ", ".join(known) if known else f"it has no {kind}s"
        return (UnknownInputError if kind == "input" else FrontendError)(
            f"model {self.name} has no {kind} {', '.join(unknown)}",
            source=_definition(self.function),
            hint=f"did you mean {near[0]}? {one_of}" if near else one_of,
            option=unknown[0] if kind == "option" else None,
        )

    @with_checked_call(instead="model.configure(...).graph(), with the options in place of ...")
    def graph(self) -> Graph:
        """Trace the declaration into a graph. Raises the error of the line at fault."""
        with collection_paused():
            return self._trace()

    def _trace(self) -> Graph:
        g = Graph(self.name)
        tracing = Trace(g)
        token = CURRENT.set(tracing)
        try:
            arguments = {
                i.name: tracing.input(i.name, i.type) if not i.optional or i.name in self.optional_inputs else None
                for i in self.declared_inputs
            }
            named = [i for i in self.declared_inputs if arguments[i.name] is not None]
            g.generated = {i.name: i.generated for i in named if i.generated is not None}
            function: Callable[..., Any] = self.function
            with importing_neighbors(function):
                results = function(**arguments, **self._configuration())
            tracing.check_scopes()
            tracing.outputs(**_name_outputs(self, results))
        except TreadleError as error:
            error.source = error.source or self._line_of(error, tracing)
            raise
        except (Exception, SystemExit) as error:  # the model's own code may raise anything: a misspelt attribute
            raise FrontendError(
                f"model {self.name} cannot be traced: {type(error).__name__}: {error}",
                source=self._line_of(error, tracing),
                hint=call_hint(error),
            ) from error
        finally:
            CURRENT.reset(token)
        outline_regions(g, tracing.regions)
        return g

    def _line_of(self, error: BaseException, tracing: Trace) -> str:
        return describe_source(raising_line(error), tracing.scope) or _definition(self.function)

    def _configuration(self) -> dict[str, Any]:
        values = {**self.defaults, **self.config}
        missing = [n for n, v in values.items() if v is inspect.Parameter.empty]
        if missing:
            raise FrontendError(
                f"model {self.name} needs a value for {', '.join(missing)}",
                source=_definition(self.function),
                hint=Hint(
                    f"{self.name}.configure({', '.join(f'{name}=...' for name in missing)})",
                    " ".join(f"--set {name}=..." for name in missing),
                ),
            )
        return values

    def __call__(self, /, *inputs: P.args, **config: P.kwargs) -> R:
        """Call the model inside another model: its ops and parameters are added under the current scope.

        Inputs are passed by position or name. Optional inputs may be left out at the end.
        """
        if CURRENT.get() is None:
            chosen = [f"{name}={_expression(value)}" for name, value in config.items() if name in self.defaults]
            raise FrontendError(
                f"model {self.name} is declared, not compiled",
                hint=f"treadle.compile({', '.join([self.name, *chosen])}), which returns an executable",
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

    # A model is immutable. Pickle stores a model as it stores a function: by module and name.

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle stores. Raises FrontendError if the module does not hold the model under its name."""
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
                't.load_artifact("model.treadle")',
            )
        return _pickled, (module, path, dict(self.config), self.optional_inputs)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v.__name__ if inspect.isfunction(v) else repr(v)}" for k, v in self.config.items())
        return f"<model {self.name}({shown})>"


@overload
def model(function: Callable[P, R]) -> Model[P, R]: ...
@overload
def model() -> Callable[[Callable[P, R]], Model[P, R]]: ...
@with_checked_call()
def model(function: Any = None) -> Any:
    """Declare a model: decorate a function whose positional arguments are typed inputs.

    Raises FrontendError for a class, and for an object that is not a function.
    """
    if function is None:
        return model
    if inspect.isclass(function) or not callable(function) or not hasattr(function, "__name__"):
        raise FrontendError(
            "@t.model decorates a function of tensors",
            received=f"{function!r}"[:80],
            source=str(user_line() or "") or None,
            hint='def net(x: t.f32["B S 8"]): return t.linear(x, 8, name="f"); a module of PyTorch is '
            "t.from_torch(module, example_inputs)",
        )
    return Model(function)


def _expression(value: object) -> str:
    """Return an option's value as Python code: a function by its name, with `t.` for a function of the DSL."""
    import treadle.frontends.language as language

    if not callable(value):
        return repr(value)
    name = getattr(value, "__name__", "")
    return "t." * (getattr(language, name, None) is value) + name if name.isidentifier() else "..."


def _declared(module: str, path: str) -> Any:
    """Return a module's attribute of a dotted name. Raises KeyError or AttributeError."""
    found: Any = sys.modules[module]
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _pickled(module: str, path: str, config: Mapping[str, Any], given: tuple[str, ...]) -> Model:
    """Return the model that a pickle refers to."""
    import_module(module)
    return Model(_declared(module, path).function, config, given)


def _definition(function: Callable[..., Any]) -> str:
    code = function.__code__
    return f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}, model {function.__name__}"


def _name_outputs(declared: Model, returned: Any) -> dict[str, Expr]:
    named: dict[str, Any]
    if isinstance(returned, Expr):
        node, hint = returned.value.node, returned.value.name
        named = {
            "output" if node is None or hint in (node.op.name, "x") else hint: returned
        }  # x: the operand of an operator
    elif isinstance(returned, Mapping):
        named = dict(returned)
    elif isinstance(returned, tuple | list):
        named = {f"output{i}": value for i, value in enumerate(returned)}
    else:
        named = {"output": returned}
    if not named or not all(isinstance(name, str) for name in named):
        raise FrontendError(
            f"model {declared.name} returns {'outputs whose names are not strings' if named else 'no outputs'}",
            received=", ".join(map(repr, named)) or None,
            source=_definition(declared.function),
            hint='return a tensor, or a dict of them such as {"hidden": x}',
        )
    if returned is None:
        raise FrontendError(
            f"model {declared.name} returns nothing",
            source=_definition(declared.function),
            hint="a `return` with the outputs of the model",
        )
    for name, value in named.items():
        if not isinstance(value, Expr):
            which = "the output of model" if value is returned else f"output {name} of model"
            raise FrontendError(
                f"{which} {declared.name} is not one of its tensors",
                received=type(value).__name__,
                source=_definition(declared.function),
                hint="return a tensor, a dict of them by name, or a tuple of them",
            )
    return named
