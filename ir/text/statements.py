"""Reader of the statements of a graph's text: results, applications, and notes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from treadle.ir.errors import GraphError, TreadleError
from treadle.ir.graph import Function, Node, Value
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.ops.call import Call
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.attributes import attribute_fields, attribute_symbols, default_texts
from treadle.ir.text.operands import OperandReader, nearest_names
from treadle.ir.text.scanner import RESERVED, TYPE, Scanner, TextLimits, path_text
from treadle.ir.types import DTYPES, Type

_NAME_START = re.compile(r'[A-Za-z_"]')
_ALL = re.compile(r"\.\*")
_OPEN = re.compile(r"\{")

_PLAIN_HEAD = re.compile(r"([A-Za-z_]\w*+) = ([A-Za-z_]\w*+)(?=\()")

_STRING = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"'
_NOTE = re.compile(
    rf"[ \t]*#[ \t]*(?P<types>{TYPE}(?:, {TYPE})*+|\(\))"
    rf"(?:[ \t]++(?P<file>{_STRING}|[\w./<>+-]++):(?P<line>-?\d{{1,9}})(?!\S))?"
    rf"(?:[ \t]++(?P<scope>{_STRING}|\w++(?:\.\w++)*+))?"
    r"[ \t]*+(?:\|[^\n]*+)?(?=\n|\Z)"
)
_NOTE_START = re.compile(r"[ \t]*#[ \t]*([a-z]\w*)\[")
_ONE_TYPE = re.compile(TYPE)

_PLAIN, _MADE, _ALL_MADE, _UPDATED = "a result", "a derived weight", "all results of a block", "an updated state"

# The work of a node. It includes the work after parsing: verification, and the work of a backend.
_NODE_WORK = 30
_APPLICATION_WORK = 60
_NOTE_CHARACTERS_OF_WORK = 16


class StatementReader(OperandReader):
    """A reader of statements, one after the other, into the function `current` of the graph `result`."""

    def __init__(self, text: str, limits: TextLimits) -> None:
        super().__init__(text, limits)
        self.nodes = 0
        self.operands = 0
        self.applied: dict[tuple[type[Op], str, tuple[str | None, ...]], tuple[Op, tuple[Type, ...], int]] = {}

    def declared(self, symbols: Iterable[str], at: int) -> None:
        unknown = sorted(set(symbols) - self.result.symbols.keys())
        if unknown:
            raise self.s.error(f"symbol {unknown[0]} is not declared", at, hint="add it to the graph's symbols")

    def statement(self) -> None:
        s = self.s
        start = s.skip()
        head = _PLAIN_HEAD.match(s.text, start)
        if head is not None and self.is_plain(head):
            names, at = [(_PLAIN, head[1])], head.start(2)
            s.at = head.end()
            node = self.apply(head[2], at)
        else:
            names = self.statement_names()
            at = s.skip()
            node = self.application()
        if names and names[0][0] is _ALL_MADE:
            names = self.all_made(names, node, at)
        results = node.named_results
        if len(names) != len(results):
            types = ", ".join(str(v.type) for v in results)
            raise s.error(
                f"{node.op.name} has {len(results)} results, but the statement names {len(names)}", at, received=types
            )
        if node.op.updates:
            self.update(node, dict(zip(results, names, strict=True)), start)
        for (kind, name), value in zip(names, results, strict=True):
            if kind is _MADE:
                self.make(name, value, start)
                continue
            if kind is _UPDATED:
                if value.state is None or value.state.name != name:
                    raise s.error(f"{node.op.name} does not update %{name}", start, hint=f"{value.name} = ...")
                continue
            if name in self.values:
                raise s.error(f"{name} is defined twice", start)
            value.name = name
            self.values[name] = value
        self.note(node)
        self.current.nodes.append(node)
        s.spend(_NODE_WORK + 2 * len(node.operands), start)
        self.nodes += 1
        self.operands += len(node.operands)
        if self.nodes > self.limits.nodes or self.operands > self.limits.operands:
            limits = f"at most {self.limits.nodes} with {self.limits.operands} operands"
            raise s.error("too many nodes", start, hint=limits)

    def make(self, name: str, value: Value, start: int) -> None:
        """Add the result of a statement of `bind` as the parameter of that name."""
        bind, s = self.current, self.s
        if bind is not self.result.bind:
            raise s.error(f"derived weight ${name} is assigned outside of bind", start, hint="a name without $")
        if name in bind.parameters or name in bind.outputs:
            raise s.error(f"there are two parameters {name}", start)
        self.argument(start)
        value.name = name.rpartition(".")[2]
        bind.outputs[name] = value

    def update(self, node: Node, names: Mapping[Value, tuple[str, str]], start: int) -> None:
        """Make the states that a node updates the current versions."""
        s = self.s
        for index, at in node.op.updates.items():
            value, before = node.results[index], node.operands[at]
            state = value.state
            if state is None:
                continue
            if node.operands.count(before) > 1:
                raise s.error(f"{node.op.name} both updates and reads %{state.name}", start)
            if value.type != before.type:  # type: ignore[union-attr]  # there is a state
                raise s.error(
                    f"{node.op.name} updates %{state.name} with a value of another type",
                    start,
                    received=str(value.type),
                )
            if value in names and names[value] != (_UPDATED, state.name):
                raise s.error(f"{node.op.name} updates a state", start, hint=f"%{path_text(state.name)} = ...")
            self.versions[state.name] = self.current.updated[state.name] = value

    def is_plain(self, head: re.Match[str]) -> bool:
        """Return True if `name = op` can be read without further checks: the name is not reserved, `op` is not the word
        "op", and neither name is too long.
        """
        return head[1] not in RESERVED and head[2] != "op" and len(head[0]) <= self.limits.name_characters

    def all_made(self, names: list[tuple[str, str]], node: Node, at: int) -> list[tuple[str, str]]:
        """Expand `$h.0.*` to the names of all outputs of the called block, under that path."""
        callee = self.result.callee(node)
        if callee is None or len(names) > 1:
            raise self.s.error(
                "$path.* must name all results of a call of a block", at, hint="$h.0.* = bind_h() with h.0"
            )
        return [(_MADE, f"{names[0][1]}.{output}") for output in callee.outputs]

    def statement_names(self) -> list[tuple[str, str]]:
        """Parse the names of a statement's results, and the `=` after them. If there is no `=`, consume nothing, and
        return an empty list.
        """
        s = self.s
        start = s.at
        names = [self.result_name("a statement or return")]
        while s.accept(","):
            names.append(self.result_name("a result's name"))
        if not s.accept("="):
            if len(names) > 1:
                raise s.error(f"expected '=', found {s.found()}")
            names, s.at = [], start
        return names

    def result_name(self, what: str) -> tuple[str, str]:
        """Read the name of a result: a name, `$` and the path of a derived weight, or `%` and the name of an updated
        state. Return the kind of result and its name.
        """
        s = self.s
        if s.accept("%"):
            return _UPDATED, s.path("a state")
        if not s.accept("$"):
            return _PLAIN, s.name(what)
        path = s.path("a derived weight")
        return (_ALL_MADE if s.match(_ALL) is not None else _MADE), path

    def application(self) -> Node:
        s = self.s
        start = s.at
        name = s.name("an op or a function")
        if name == "op" and s.sees(_NAME_START):
            return self.apply(s.name("an op"), start, is_op=True)
        return self.apply(name, start)

    def apply(self, name: str, start: int, *, is_op: bool = False) -> Node:
        """Read the operands and attributes after an op's or a function's name. Return the node."""
        callee = None if is_op or name in self.result.entry_names else self.result.functions.get(name)
        if callee is not None:
            return self.call(callee, start)
        cls = OPS.get(name)
        if cls is None and not is_op and name in self.result.entry_names:
            raise self.s.error(f"{name} is an entry, which cannot be called", start)
        if cls is None or cls is Call:
            raise self.s.error(
                f"unknown op or function {name!r}", start, hint=nearest_names(name, [*self.result.functions, *OPS])
            )
        return self.op(cls, start)

    def op(self, cls: type[Op], start: int) -> Node:
        operands, attributes, said = self.arguments(cls)
        # The same op is often applied to the same types. The text of a type also contains its labels.
        types = tuple([None if v is None else v.type.text for v in operands])
        key = (cls, said, types)
        found = self.applied.get(key)
        if found is None:
            self.s.spend(_APPLICATION_WORK + len(said) + sum([len(text) for text in types if text]), start)
            found = self.applied[key] = self.infer(cls, operands, attributes, start)
        op, results, absent = found
        return Node(op, [*operands, *[None] * absent], results)

    def infer(
        self, cls: type[Op], operands: list[Value | None], attributes: dict[str, Any], start: int
    ) -> tuple[Op, tuple[Type, ...], int]:
        """Return an op, its results' types, and the number of operands left out at the end."""
        s = self.s
        missing = [n for n in attribute_fields(cls).keys() - default_texts(cls).keys() if n not in attributes]
        if missing:
            raise s.error(f"{cls.name}: attribute {min(missing)} is missing", start)
        with s.located(start):
            try:
                arranged = cls.arrange(operands)
                op = cls.make(**attributes)
                types = op.infer([None if v is None else v.type for v in arranged])
            except TreadleError:
                raise
            except Exception as error:
                # An op's own code may rely on the checks of builders; text may contain anything.
                raise GraphError(f"{cls.name} cannot have these attributes and operands: {error}") from None
        self.declared(attribute_symbols(op), start)
        for type in types:
            s.inferred(type, start)
        return op, types, len(arranged) - len(operands)

    def call(self, callee: Function, start: int) -> Node:
        s = self.s
        inputs, *_ = self.arguments(None)
        if len(inputs) != len(callee.inputs):
            takes = f"{len(callee.inputs)} input{'s' * (len(callee.inputs) != 1)}"
            raise s.error(f"{callee.name} takes {takes}, received {len(inputs)}", start)
        weights = self.weights(callee, start) if s.accept_word("with") else {}
        formals = {**callee.parameters, **callee.states}
        if missing := [n for n in formals if n not in weights]:
            kind, sign = ("state", "%") if missing[0] in callee.states else ("weight", "$")
            hint = f"with a.path, or {{name: {sign}w}}"
            raise s.error(f"{callee.name}: no {kind} is passed for {missing[0]}", start, hint=hint)
        operands = [*inputs, *(weights[n] for n in formals)]
        for formal, value in zip(callee.arguments, operands, strict=True):
            if value is not None and (value.state is not None) != (formal.kind == "state"):
                raise s.error(f"a call of {callee.name} passes {value.name} as {formal.kind} {formal.name}", start)
        op = Call.of(callee)
        with s.located(start):
            types = op.infer([None if v is None else v.type for v in operands])
        for value, layout in zip(operands, op.takes_in or [None] * len(operands), strict=True):
            if value is not None and value.layout != layout:
                raise s.error(
                    f"a call of {callee.name} passes {value.name} in another layout than the callee reads",
                    start,
                    received=f"{value.layout or 'row-major'}, but the callee reads {layout or 'row-major'}",
                )
        return Node(op, operands, types)

    def weights(self, callee: Function, start: int) -> dict[str, Value | None]:
        """Parse the text after `with`: an optional name prefix for the callee's weights and states, and explicit
        bindings `{name: value}`, which take precedence. Return the passed value for each formal name.
        """
        s = self.s
        formals = {**callee.parameters, **callee.states}
        bound: dict[str, Value | None] = {}
        prefix = None if s.sees(_OPEN) else s.path("a path")
        if s.accept("{"):
            while not s.accept("}"):
                if bound:
                    s.expect(",")
                at = s.skip()
                name = s.path("a weight's name")
                if name not in formals or name in bound:
                    if name in bound:
                        raise s.error(f"{name} is given twice", at)
                    raise s.error(f"{name} is not a weight of {callee.name}", at, hint=nearest_names(name, formals))
                s.expect(":")
                bound[name] = self.operand()
        if prefix is not None:
            for name in formals:
                if name not in bound:
                    named = self.version_named if name in callee.states else self.weight_named
                    bound[name] = named(f"{prefix}.{name}", start)
        return bound

    # -- notes -----------------------------------------------------------------------------------------------------

    def note(self, node: Node) -> None:
        """Read the comment at the end of a statement's line: types, which must equal the inferred ones, source line and
        scope.
        """
        s = self.s
        match = _NOTE.match(s.text, s.at)
        if match is None:
            start = _NOTE_START.match(s.text, s.at)
            if start is not None and start[1] in DTYPES:
                raise s.error("malformed note", start.start(1), hint="# types  file:line  scope")
            return
        s.spend((match.end() - match.start()) // _NOTE_CHARACTERS_OF_WORK, match.start("types"))
        types = [s.type_of(text, match.start("types")) for text in _ONE_TYPE.findall(match["types"])]
        results = node.named_results
        if types != [v.type for v in results]:
            given = ", ".join(str(v.type) for v in results)
            raise s.error(
                f"{node.op.name} returns {given}, but the note specifies {match['types']}", match.start("types")
            )
        for value, type in zip(results, types, strict=True):
            value.type = type  # the same sizes, with the factors and labels in the text
        if match["file"] is not None:
            node.source = SourceLine(_plain(s, match, "file"), int(match["line"]))
        if match["scope"] is not None:
            node.scope = _plain(s, match, "scope")
        s.at = match.end()


def _plain(s: Scanner, match: re.Match[str], group: str) -> str:
    """Return a group of a match, without quotes."""
    if not match[group].startswith('"'):
        return match[group]
    s.at = match.start(group)
    return s.string()
