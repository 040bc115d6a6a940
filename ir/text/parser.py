"""Parser of graphs, the inverse of `treadle.ir.text.printer`. docs/ir-grammar.md has the grammar.

The text may be untrusted. It is read in one pass, without recursion on its contents, under `TextLimits`. Every error in
the text is a ParseError with the line, the column and the expected syntax. Types are inferred again and compared with
the types in the text. A parsed graph passes the verifier.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.files.limits import limits_of
from treadle.ir.entry_order import ENTRIES, ONCE
from treadle.ir.errors import GraphError
from treadle.ir.generated_values import generated
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

_PARAMETER_WORK = 20  # in addition to the work in `treadle.ir.text.statements`


def parse_graph(text: str, limits: TextLimits | Mapping[str, int] | None = None) -> Graph:
    """Parse a graph. Raises ParseError, with the position in the text."""
    return _Parser(text, limits_of(TextLimits, limits)).graph()


class _Parser(StatementReader):
    """A parser of everything outside statements: symbols, parameters, states, functions."""

    def __init__(self, text: str, limits: TextLimits) -> None:
        super().__init__(text, limits)
        self.held: dict[str, dict[str, Type]] = {"parameter": {}, "state": {}}
        """The types of the graph's parameters and states, by name."""
        self.entries_read: list[str] = []

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
        if s.accept_word("generated"):
            self.generated_value()
            while s.accept(","):
                self.generated_value()
        if s.accept_word("parameters"):
            self.named_types("parameter")
        if s.accept_word("states"):
            self.named_types("state")
        while s.accept_word("block"):
            self.block()
        self.entries()
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
            raise s.error(f"the bounds of {name} allow no size", start)
        if name in self.result.symbols:
            raise s.error(f"{name} is declared twice", start)
        if len(self.result.symbols) >= self.limits.symbols:
            raise s.error("too many symbols", start, hint=f"at most {self.limits.symbols}")
        self.result.symbols[name] = Bounds(lower, upper)

    def generated_value(self) -> None:
        s = self.s
        start = s.skip()
        name = s.name("an input")
        if name in self.result.generated:
            raise s.error(f"the value of {name} is declared twice", start)
        if len(self.result.generated) >= self.limits.symbols:
            raise s.error("too many values of inputs", start, hint=f"at most {self.limits.symbols}")
        s.expect("=")
        value = s.ahead()
        try:
            self.result.generated[name] = generated("next" if s.accept_word("next") else s.integer("an integer"))
        except GraphError as error:
            raise s.error(error.what, value) from None

    def declared_type(self) -> Type:
        s = self.s
        start = s.skip()
        found = s.type()
        self.declared(found.symbols, start)
        return found

    # -- parameters and states -------------------------------------------------------------------------------------

    def named_types(self, kind: str) -> None:
        """Read the graph's parameters or states with their types."""
        s = self.s
        s.expect("{")
        run: tuple[str, int, int] | None = None
        tails: list[tuple[str, Type, Init | None, int]] = []

        def expand() -> None:
            if run is not None:
                head, first, last = run
                if (last - first + 1) * len(tails) > self.limits.parameters:
                    raise s.error(f"too many {kind}s", tails[0][3], hint=f"at most {self.limits.parameters}")
                for number in range(first, last + 1):
                    for tail, type, init, at in tails:
                        self.named_type(kind, f"{head}{number}{tail}", type, init, at)
            tails.clear()

        while not s.accept("}"):
            start = s.skip()
            match = s.match(_RUN)
            if match is None:
                expand()
                run = None
                name = s.path(f"a {kind}'s name")
                self.named_type(kind, name, *self.type_and_init(kind), start)
                continue
            s.spend(_PARAMETER_WORK, start)
            this = (match[1], int(match[2]), int(match[3]))
            if this != run:
                expand()
                run = this
            tails.append((match[4], *self.type_and_init(kind), start))
        expand()

    def type_and_init(self, kind: str) -> tuple[Type, Init | None]:
        s = self.s
        s.expect(":")
        type, init = self.declared_type(), None
        if kind == "parameter" and s.accept("="):
            start = s.ahead()
            word, scale = s.name("an initial value"), None
            if s.accept("("):
                scale = s.accept_number()
                if scale is None:
                    raise s.error(f"expected a number, found {s.found()}")
                s.expect(")")
            try:
                init = Init(word, scale)
            except GraphError as error:
                raise s.error(error.what, start, hint=error.hint) from None
        return type, init

    def named_type(self, kind: str, name: str, type: Type, init: Init | None, at: int) -> None:
        held = self.held[kind]
        if any(name in known for known in self.held.values()):
            other = "two parameters and states" if name not in held else f"two {kind}s"
            raise self.s.error(f"there are {other} {name}", at)
        if sum(map(len, self.held.values())) >= self.limits.parameters:
            raise self.s.error(f"too many {kind}s", at, hint=f"at most {self.limits.parameters}")
        self.s.spend(_PARAMETER_WORK, at)
        held[name] = type
        if init is not None:
            self.result.initial[name] = init

    # -- entries ---------------------------------------------------------------------------------------------------

    def entries(self) -> None:
        """Read the entry functions; each may read all parameters and derived weights."""
        while (name := self.entry_name()) is not None:
            function = self.current = self.result.functions[name] if name == "main" else self.result.add_entry(name)
            made = self.result.derived_weights if name != "bind" else {}
            held = {**self.held["parameter"], **{n: v.type for n, v in made.items()}}
            function.parameters = {n: Value("parameter", type, n) for n, type in held.items()}
            for n, value in made.items():
                function.parameters[n].lies_in = value.layout
            if name == "bind":
                self.bind()
            else:
                function.states = {n: Value("state", type, n) for n, type in self.held["state"].items()}
                self.function(function)
        if len(self.result.entry_names) > 1:
            self.share()

    def entry_name(self) -> str | None:
        """Read and return the name of the entry that comes next, or None if no entry follows."""
        s, known = self.s, self.entries_read
        is_called = any(name not in ONCE for name in known)
        for name in ENTRIES[ENTRIES.index(known[-1]) + 1 if known else 0 :]:
            start = s.ahead()
            if is_called and "main" in (*known, name):  # another function calls it, so it is not an entry
                continue
            if s.accept_word(name):
                if name != "main" and name in self.result.functions:
                    raise s.error(f"a block has the name of the entry {name}", start)
                known.append(name)
                return name
        if not is_called:
            s.expect_word("main")
        return None

    def bind(self) -> None:
        """Read the body of the entry that runs once, whose statements assign derived weights."""
        s = self.s
        self.values, self.versions = {}, {}
        s.expect("{")
        while not s.accept("}"):
            self.statement()

    def share(self) -> None:
        """Reduce each entry's parameters and states to those that it reads. The last entry also keeps the unused
        ones.
        """
        entries = self.result.entries
        read = {v for f in entries for v in (*f.results, *(v for node in f.nodes for v in node.inputs))}
        named = {n for f in entries for held in (f.parameters, f.states) for n, v in held.items() if v in read}
        alone = {n for held in self.held.values() for n in held if n not in named}
        for entry in entries:
            left = alone if entry is self.result.main else ()
            for values in entry.parameters, entry.states:
                for name in [n for n, v in values.items() if v not in read and n not in left]:
                    del values[name]

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
        self.function(function, is_block=True)
        self.result.add_function(function)

    def function(self, function: Function, *, is_block: bool = False) -> None:
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
        for kind in ("weight", "state") if is_block else ():
            if s.accept_word(f"{kind}s"):
                self.held_value(kind)
                while s.accept(","):
                    self.held_value(kind)
        self.versions = dict(function.states)
        s.expect("{")
        while not s.accept_word("return"):
            self.statement()
        start = s.skip()
        self.outputs()
        given = [(name, v.type) for name, v in function.outputs.items()]
        if given != [(name, type) for name, type, _ in promised]:
            raise s.error(
                f"{function.name} does not return the values in its signature",
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

    def held_value(self, kind: str) -> None:
        """Read a weight, which may have a layout, or a state of a block."""
        s, function = self.s, self.current
        start = s.skip()
        name = s.path(f"a {kind}'s name")
        s.expect(":")
        if name in function.parameters or name in function.states:
            raise s.error(
                f"there are two weights or states {name}" if kind == "state" else f"there are two weights {name}", start
            )
        self.argument(start)
        if kind == "state":
            function.states[name] = Value("state", self.declared_type(), name)
            return
        value = function.parameters[name] = Value("parameter", self.declared_type(), name)
        if s.accept_word("in"):
            at = s.skip()
            match = s.match(_LAYOUT)
            with s.located(at):
                value.lies_in = parse_layout(match[0] if match is not None else "")
            if value.type.rank != 2:
                raise s.error(f"only a matrix can have a layout, and {name} has rank {value.type.rank}", at)

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
            if value.layout is not None and self.current in self.result.entries:
                entry = self.current.name
                what = f"output {name} of {entry} has layout {value.layout}"
                raise s.error(what, start, hint="outputs must be row-major")
            if value.state is not None:
                raise s.error(f"output {name} is a state", start, hint="the caller has the state itself")
            self.argument(start)
            outputs[name] = value


def _signature(outputs: Iterable[tuple[str, Type]]) -> str:
    return ", ".join(f"{name}: {type}" for name, type in outputs)
