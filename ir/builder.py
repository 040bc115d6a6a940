"""Building graphs: a `Builder` adds nodes to a function; an `Expr` is a value with Python operators.

    b = Builder(Graph("example"))
    x = b.input("x", "f32[B, 8]")
    w = b.parameter("w", "f32[8]", Init("ones"))
    b.outputs(y=b.rms_norm(x, w, eps=1e-5) * 2.0)
    print(b.graph)

Every op is a method of the builder with the op's name, positional operands and keyword attributes
(`treadle.ir.op_methods`). Op bodies, gradients, patterns and the DSL use the same methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from treadle.ir.errors import GraphError, TreadleError
from treadle.ir.expressions import Expr as Expr
from treadle.ir.expressions import ExprLike as ExprLike
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.initial_values import Init
from treadle.ir.literals import Literal
from treadle.ir.op_methods import OpMethods
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Op
from treadle.ir.rules.dtype_rules import number_dtype, operand_entries
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.source_lines import SourceLine, user_line
from treadle.ir.types import DType, Type, i64, parse_type
from treadle.ir.wording.call_spelling import option_guess, spelled_call
from treadle.ir.wording.op_signatures import op_signature
from treadle.ir.wording.other_spellings import without_option
from treadle.ir.wording.typed_calls import other_meaning


class Builder(OpMethods):
    """Adds nodes to one function of a graph, and checks every op.

    scope    the path under which nodes are added ("h.3.attn"); see `scoped`
    source   the source line of added nodes; None: the user's line, from the stack
    """

    def __init__(self, graph: Graph, function: Function | None = None) -> None:
        self.graph = graph
        self.function = function or graph.main
        self.scope = ""
        self.source: SourceLine | None = None

    # -- arguments and results ---------------------------------------------------------------------------------

    def input(self, name: str, type: Type | str) -> Expr:
        """Add an input and return it. Symbols in its type become symbols of the graph. Raises GraphError if the name is
        taken.
        """
        value = Value("input", parse_type(type) if isinstance(type, str) else type, name)
        if any(v.name == name for v in self.function.inputs):
            raise GraphError(f"the function has an input {name!r} already")
        for symbol in sorted(value.type.symbols):
            self.graph.symbols.setdefault(symbol, Bounds())
        self.function.inputs.append(value)
        return Expr(self, value)

    def parameter(self, name: str, type: Type | str, init: Init | None = None) -> Expr:
        """Return the parameter of that name; add it if it is new. Raises GraphError if it exists with another type."""
        wanted = parse_type(type) if isinstance(type, str) else type
        known = self.function.parameters.get(name)
        if known is None:
            known = self.function.parameters[name] = Value("parameter", wanted, name)
            if init is not None and self.function in self.graph.entries:
                self.graph.initial[name] = init
        elif known.type != wanted:
            raise GraphError(
                f"parameter {name} is used with two types",
                received=f"{known.type}, then {wanted}",
                source=self.place(),
            )
        return Expr(self, known)

    def state(self, name: str, type: Type | str) -> Expr:
        """Return the current version of the state of that name; add the state if it is new. Symbols in its type become
        symbols of the graph.

        Raises GraphError if it exists with another type, or if a weight has the name.
        """
        wanted = parse_type(type) if isinstance(type, str) else type
        known = self.function.states.get(name)
        if name in self.function.parameters:
            raise GraphError(f"the function has a parameter {name!r} already", source=self.place())
        if known is None:
            known = self.function.states[name] = Value("state", wanted, name)
            for symbol in sorted(wanted.symbols):
                self.graph.symbols.setdefault(symbol, Bounds())
        elif known.type != wanted:
            raise GraphError(
                f"state {name} is used with two types",
                received=f"{known.type}, then {wanted}",
                source=self.place(),
            )
        return Expr(self, self.function.updated.get(name, known))

    def outputs(self, /, **outputs: Expr) -> Function:
        """Name the function's outputs, in order. Return the function."""
        self.function.outputs = {name: expr.value for name, expr in outputs.items()}
        return self.function

    def constant(self, value: Any, dtype: DType | None = None) -> Expr:
        """Add a constant from a number, nested list or array, and return it. A symbolic size becomes its value at each
        call.
        """
        if isinstance(value, Size):
            return self._size(value, dtype)
        return Expr(self, Value.constant(Literal.of(value, dtype)))

    # -- nodes -------------------------------------------------------------------------------------------------

    def emit(self, op: Op, operands: Sequence[Value | None], name: str | None = None) -> Node:
        """Append a node and return it. Raises RuleError, with the user's line and scope, if the operands do not match
        the op.
        """
        return self._append(op, operands, name, self.source or user_line())

    def _append(self, op: Op, operands: Sequence[Value | None], name: str | None, source: SourceLine | None) -> Node:
        try:
            types = op.infer_for(operands)
        except TreadleError as error:
            error.source = error.source or describe_source(source, self.scope)
            raise
        node = Node(op, operands, types, name, self.scope, source)
        self.function.nodes.append(node)
        if op.updates:
            self._take_updates(node)
        return node

    def _take_updates(self, node: Node) -> None:
        """Make the states that the node updates the function's current versions."""
        for index in node.op.updates:
            value = node.results[index]
            state = value.state
            if state is not None and self.function.states.get(state.name) is state:
                self.function.updated[state.name] = value

    def apply(self, kind: str | type[Op], *operands: Any, name: str | None = None, **attributes: Any) -> Any:
        """Apply an op: operands by position (Exprs, numbers or None), attributes by keyword.

        A number becomes a constant of the dtype that the op's rule requires with its other operands. Returns an Expr,
        or a tuple of Exprs for an op with several results. Raises GraphError for an unknown op or attribute, RuleError
        if operands do not match.
        """
        return self._add(find_op(kind) if isinstance(kind, str) else kind, operands, name, attributes)

    def _add(self, cls: type[Op], operands: Sequence[Any], name: str | None, attributes: dict[str, Any]) -> Any:
        """Apply an op for a caller in this file, whose frame can be skipped in the search for the user's line."""
        try:
            op = cls.make(**attributes)
            values: Sequence[Value | None] = [x.value if type(x) is Expr else None for x in operands]
            given = cls.arrange(operands) if None in values else ()  # absent operands (None), numbers, arrays
            if not given and len(values) != cls.arity[1]:
                values = cls.arrange(values)
        except TypeError as error:
            raise GraphError(
                _attribute_fault(cls, attributes) or f"{cls.name} cannot have these attributes: {error}",
                source=self.place(),
                hint=_by_keyword(cls, operands, attributes) or _call_hint(cls, attributes),
            ) from None
        except TreadleError as error:
            error.source = error.source or self.place()
            error.hint = error.hint or _by_keyword(cls, operands, attributes) or _call_hint(cls, attributes)
            raise
        try:
            values = self._values(op, given) if given else values
        except TreadleError as error:
            error.source = error.source or self.place()
            raise
        results = self._append(op, values, name, self.source or user_line(beyond=2)).results
        return Expr(self, results[0]) if len(results) == 1 else tuple(Expr(self, v) for v in results)

    def _values(self, op: Op, given: Sequence[Any]) -> list[Value | None]:
        """Convert operands to values. If the op's rule ties the dtype of a number to another operand, the number gets
        that dtype, otherwise its own (f32, i64, bool).
        """
        values = [x.value if type(x) is Expr else x if isinstance(x, Value) else None for x in given]
        numbers = [i for i, x in enumerate(given) if values[i] is None and x is not None]
        if numbers:
            entries = operand_entries(op.dtypes(), len(given))
            known = [v.type.dtype if v is not None else None for v in values]
            for i in numbers:
                if isinstance(given[i], Size):
                    size = self._size(given[i], number_dtype(entries, i, known))
                    values[i], known[i] = size.value, size.dtype
                    continue
                if isinstance(given[i], list | tuple) and any(isinstance(x, Expr) for x in given[i]):
                    fields = getattr(given[i], "_fields", ())
                    raise GraphError(
                        f"{op.name}: an operand must be a tensor, not a {type(given[i]).__name__} of tensors",
                        hint=f"one of its tensors: {', '.join(f'.{name}' for name in fields)}"
                        if fields
                        else f"tensors one by one, as in {op.name}(x, y), with the same options",
                    )
                literal = Literal.of(given[i], number_dtype(entries, i, known))
                values[i], known[i] = Value.constant(literal), literal.dtype
        return values

    def _size(self, size: Size, dtype: DType | None) -> Expr:
        """Return a size as an operand: a constant, or, if it is symbolic, its value at each call."""
        if size.constant is not None:
            return self.constant(size.constant, dtype or i64)
        return self.size(value=size, dtype=dtype or i64)

    def call(self, function: Function, arguments: Sequence[Expr | Value]) -> tuple[Expr, ...]:
        """Call a function of the graph with its inputs, its parameters, then its states. Return the function's outputs.

        If the function updates states, `state` returns their new versions afterwards. `call_updating` also returns
        them.
        """
        return self.call_updating(function, arguments)[0]

    def call_updating(
        self, function: Function, arguments: Sequence[Expr | Value]
    ) -> tuple[tuple[Expr, ...], dict[str, Expr]]:
        """Call a function as `call` does. Return its outputs and a dict of the updated states by the function's own
        names.
        """
        from treadle.ir.ops.call import Call

        op = Call.of(function)
        node = self.emit(op, [a.value if isinstance(a, Expr) else a for a in arguments], function.name)
        results = [Expr(self, v) for v in node.results]
        count = len(function.outputs)
        changed = [name for name in function.states if name in function.updated]
        return tuple(results[:count]), dict(zip(changed, results[count:], strict=True))

    # -- sources of nodes --------------------------------------------------------------------------------------

    def scoped(self, name: str, source: SourceLine | None = None) -> _Scoped:
        """Return a context, as in `with b.scoped("attn"):`, in which nodes are added under the scope `attn`. `source`,
        if not None, is their source line.
        """
        return _Scoped(self, name, source)

    @contextmanager
    def placed_as(self, node: Node) -> Iterator[None]:
        """Add the nodes of this context with the scope and the source line of `node`."""
        scope, source = self.scope, self.source
        self.scope, self.source = node.scope, node.source
        try:
            yield
        finally:
            self.scope, self.source = scope, source

    def place(self) -> str | None:
        """Return the source line and the scope of the next node, as errors print them."""
        return describe_source(self.source or user_line(), self.scope)

    def expr(self, value: Value) -> Expr:
        """Return an existing value as an Expr of this builder."""
        return Expr(self, value)


class _Scoped:
    """An open scope. It is a class because it is entered for every layer, and costs half as much as a generator."""

    __slots__ = ("builder", "name", "outer", "source")

    def __init__(self, builder: Builder, name: str, source: SourceLine | None) -> None:
        self.builder, self.name, self.source = builder, name, source

    def __enter__(self) -> None:
        b = self.builder
        outer, _ = self.outer = b.scope, b.source
        b.scope = f"{outer}.{self.name}" if outer and self.name else outer or self.name
        b.source = b.source or self.source

    def __exit__(self, *_: object) -> None:
        self.builder.scope, self.builder.source = self.outer


def _unknown_attribute(cls: type[Op], names: Iterable[str]) -> str | None:
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    return next((name for name in names if name not in known), None)


def _attribute_fault(cls: type[Op], names: Collection[str]) -> str | None:
    """Return the error for an unknown or missing attribute. Python's own text differs from version to version."""
    unknown = _unknown_attribute(cls, names)
    if unknown is not None:
        return f"{cls.name} got an unexpected keyword argument {unknown!r}"
    required = [field.name for field in fields(cls) if field.name not in cls.attribute_defaults()]  # type: ignore[arg-type]
    missing = next((name for name in required if name not in names), None)
    return None if missing is None else f"{cls.name}: attribute {missing} is missing"


def _by_keyword(cls: type[Op], operands: Sequence[Any], given: Mapping[str, Any]) -> str | None:
    """Return the call with attributes by keyword, after a call that has them behind the operands: softmax(x, -1)."""
    most = cls.arity[1]
    extra = [] if most is None else operands[most:]
    names = [field.name for field in fields(cls) if field.name not in given]  # type: ignore[arg-type]
    if not 0 < len(extra) <= len(names) or not all(isinstance(each, int | float | tuple | str) for each in extra):
        return None
    meant = {**dict(zip(names, extra, strict=False)), **given}
    try:
        cls.make(**meant)
    except (TreadleError, TypeError):
        return None
    spelled = [*list(cls.operands)[:most], *(f"{n}={value!r}" for n, value in meant.items())]
    return f"{'t.' * cls.is_word}{cls.name}({', '.join(spelled)})"


def _call_hint(cls: type[Op], given: Mapping[str, Any]) -> str:
    """Return a hint after a call with wrong attributes: the call to write instead, or the op's signature."""
    signature = op_signature(cls)
    unknown = _unknown_attribute(cls, given)
    if unknown is not None and (instead := without_option(cls.name, unknown, given[unknown])) is not None:
        return instead
    guess = other_meaning(cls.name) + (option_guess(unknown, signature) if unknown else "")
    if unknown is not None and isinstance(given[unknown], int) and not guess and "pattern" in signature.parameters:
        guess = f'a size is in the pattern, as "({unknown}={given[unknown]} d)": '
    return guess + spelled_call(cls.name, signature)


def describe_source(source: SourceLine | None, scope: str) -> str | None:
    """Return `gpt2.py:41, scope h.0.ln_1`, or the known part of it."""
    parts = [str(source)] if source else []
    if scope:
        parts.append(f"scope {scope}")
    return ", ".join(parts) or None
