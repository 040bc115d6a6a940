"""Reads a graph from text: the inverse of `treadle.ir.text.printer`; docs/ir-grammar.md is the grammar.

The text may come from anywhere. It is read in one pass, without recursion on its contents, under `TextLimits`; every
way in which it can be wrong is a ParseError with the line, the column and what was expected. Types are inferred again,
and compared with those that the text says. A graph that was read verifies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.files.limits import limits_of
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.initial_values import Init
from treadle.ir.layouts import parse_layout
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.text.scanner import TextLimits
from treadle.ir.text.statements import StatementReader
from treadle.ir.types import Type

_RUN = re.compile(r"((?:\w+\.)*?)\{(\d{1,9})\.\.(\d{1,9})\}((?:\.\w+)*)")
_LAYOUT = re.compile(r"[a-z]\w*(?:\([^()\n]{0,40}\))?")
_CLOSE = re.compile(r"\}")

_PARAMETER_WORK = 20  # see `treadle.ir.text.statements`, whose work is counted beside it


def parse_graph(text: str, limits: TextLimits | Mapping[str, int] | None = None) -> Graph:
    """Read a graph. Raises ParseError, with the place in the text."""
    return _Parser(text, limits_of(TextLimits, limits)).graph()


class _Parser(StatementReader):
    """Reads what statements stand in: symbols, parameters, functions."""

    # -- the graph -------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        s = self.s
        s.expect_word("graph")
        self.result = Graph(s.name("the graph's name"))
        s.expect("{")
        if s.accept_word("symbols"):
            self.symbol()
            while s.accept(","):
                self.symbol()
        if s.accept_word("parameters"):
            self.parameters()
        while s.accept_word("block"):
            self.block()
        weights = list(self.result.main.parameters.values())
        if s.accept_word("bind"):
            self.bind(weights)
        s.expect_word("main")
        self.function(self.result.main)
        if self.result.bind is not None:
            self.share(self.result.bind, weights)
        self.constants.read_data()
        s.expect("}")
        s.skip()
        if s.at != len(s.text):
            raise s.error(f"expected the end of the text, found {s.found()}")
        return self.result

    def symbol(self) -> None:
        s = self.s
        lower, upper = 1, None
        start = s.skip()
        number = s.accept_number()
        if number is not None:
            s.at = start
            lower = s.integer("a bound")
            s.expect("<=")
        name = s.name("a symbol")
        if s.accept("<="):
            upper = s.integer("a bound")
        if upper is not None and upper < lower:
            raise s.error(f"no size is left for {name}", start)
        if name in self.result.symbols:
            raise s.error(f"{name} is declared twice", start)
        if len(self.result.symbols) >= self.limits.symbols:
            raise s.error("too many symbols", start, hint=f"at most {self.limits.symbols}")
        self.result.symbols[name] = Bounds(lower, upper)

    def declared_type(self) -> Type:
        s = self.s
        start = s.skip()
        found = s.type()
        self.declared(found.symbols, start)
        return found

    # -- parameters ------------------------------------------------------------------------------------------------

    def parameters(self) -> None:
        s = self.s
        s.expect("{")
        run: tuple[str, int, int] | None = None
        tails: list[tuple[str, Type, Init | None, int]] = []

        def expand() -> None:
            if run is not None:
                head, first, last = run
                if (last - first + 1) * len(tails) > self.limits.parameters:
                    raise s.error("too many parameters", tails[0][3], hint=f"at most {self.limits.parameters}")
                for number in range(first, last + 1):
                    for tail, type, init, at in tails:
                        self.parameter(f"{head}{number}{tail}", type, init, at)
            tails.clear()

        while not s.accept("}"):
            start = s.skip()
            match = s.match(_RUN)
            if match is None:
                expand()
                run = None
                name = s.path("a parameter's name")
                self.parameter(name, *self.parameter_type(), start)
                continue
            s.spend(_PARAMETER_WORK, start)
            this = (match[1], int(match[2]), int(match[3]))
            if this != run:
                expand()
                run = this
            tails.append((match[4], *self.parameter_type(), start))
        expand()

    def parameter_type(self) -> tuple[Type, Init | None]:
        s = self.s
        s.expect(":")
        type, init = self.declared_type(), None
        if s.accept("="):
            kind, scale = s.name("an initial value"), None
            if s.accept("("):
                scale = s.accept_number()
                if scale is None:
                    raise s.error(f"expected a number, found {s.found()}")
                s.expect(")")
            init = Init(kind, scale)
        return type, init

    def parameter(self, name: str, type: Type, init: Init | None, at: int) -> None:
        parameters = self.result.main.parameters
        if name in parameters:
            raise self.s.error(f"there are two parameters {name}", at)
        if len(parameters) >= self.limits.parameters:
            raise self.s.error("too many parameters", at, hint=f"at most {self.limits.parameters}")
        self.s.spend(_PARAMETER_WORK, at)
        parameters[name] = Value("parameter", type, name)
        if init is not None:
            self.result.initial[name] = init

    # -- functions -------------------------------------------------------------------------------------------------

    def block(self) -> None:
        s = self.s
        start = s.skip()
        name = s.name("a block's name")
        if name in self.result.functions:
            raise s.error(f"there are two functions {name}", start)
        if len(self.result.functions) >= self.limits.functions:
            raise s.error("too many functions", start, hint=f"at most {self.limits.functions}")
        function = Function(name)
        self.function(function)
        self.result.add_function(function)

    def bind(self, weights: Sequence[Value]) -> None:
        """Read the entry that runs once, whose statements name what they make; `main` may read all of it."""
        s = self.s
        start = s.skip()
        if "bind" in self.result.functions:
            raise s.error("a block is called bind, and there is an entry of that name", start)
        self.current = self.result.add_bind()
        self.current.parameters = {v.name: Value("parameter", v.type, v.name) for v in weights}
        self.values = {}
        s.expect("{")
        while not s.accept("}"):
            self.statement()
        for name, value in self.current.outputs.items():
            made = self.result.main.parameters[name] = Value("parameter", value.type, name)
            made.lies_in = value.layout

    def share(self, bind: Function, weights: Sequence[Value]) -> None:
        """Leave to each entry the parameters that it reads; a weight that nobody reads is main's."""
        main = self.result.main
        read = {v for f in (bind, main) for node in f.nodes for v in node.inputs} | {*main.outputs.values()}
        alone = {v.name for v in weights if v not in read and bind.parameters[v.name] not in read}
        bind.parameters = {name: v for name, v in bind.parameters.items() if v in read}
        main.parameters = {name: v for name, v in main.parameters.items() if v in read or name in alone}

    def function(self, function: Function) -> None:
        s = self.s
        self.current = function
        self.values = {}
        for name, type, at in self.typed_names(s.name):
            if name in self.values:
                raise s.error(f"there are two inputs {name}", at)
            value = self.values[name] = Value("input", type, name)
            function.inputs.append(value)
        s.expect("->")
        promised = self.typed_names(s.path)
        if function is not self.result.main and s.accept_word("weights"):
            self.weight()
            while s.accept(","):
                self.weight()
        s.expect("{")
        while not s.accept_word("return"):
            self.statement()
        start = s.skip()
        self.outputs()
        given = [(name, v.type) for name, v in function.outputs.items()]
        if given != [(name, type) for name, type, _ in promised]:
            raise s.error(
                f"{function.name} returns other values than its signature says",
                start,
                received=f"({_signature(given)}), promised ({_signature((n, t) for n, t, _ in promised)})",
            )
        s.expect("}")

    def typed_names(self, read: Callable[[str], str]) -> list[tuple[str, Type, int]]:
        s = self.s
        found: list[tuple[str, Type, int]] = []
        s.expect("(")
        while not s.accept(")"):
            if found:
                s.expect(",")
            start = s.skip()
            name = read("a name")
            s.expect(":")
            found.append((name, self.declared_type(), start))
            self.argument(start)
        return found

    def weight(self) -> None:
        s = self.s
        start = s.skip()
        name = s.path("a weight's name")
        s.expect(":")
        if name in self.current.parameters:
            raise s.error(f"there are two weights {name}", start)
        self.argument(start)
        value = self.current.parameters[name] = Value("parameter", self.declared_type(), name)
        if s.accept_word("in"):
            at = s.skip()
            match = s.match(_LAYOUT)
            with s.located(at):
                value.lies_in = parse_layout(match[0] if match is not None else "")
            if value.type.rank != 2:
                raise s.error(f"a layout is one of matrices, {name} has rank {value.type.rank}", at)

    def outputs(self) -> None:
        s = self.s
        outputs = self.current.outputs
        while not s.sees(_CLOSE):
            if outputs:
                s.expect(",")
            start = s.skip()
            name = s.path("an output's name")
            s.expect("=")
            value = self.operand()
            if value is None:
                raise s.error("an output cannot be none", start)
            if name in outputs:
                raise s.error(f"there are two outputs {name}", start)
            if value.layout is not None and self.current is self.result.main:
                raise s.error(f"output {name} of main lies in {value.layout}", start, hint="outputs are row-major")
            self.argument(start)
            outputs[name] = value


def _signature(outputs: Iterable[tuple[str, Type]]) -> str:
    return ", ".join(f"{name}: {type}" for name, type in outputs)
