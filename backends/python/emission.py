"""Code generation: a graph as the text of a Python module, one Python function per graph function and one line per
node.

    def h(
        x,  # f32[B, S, 768]
        ln_1_weight,  # f32[768]
        ...
    ):
        B, S, _ = x.shape
        ln_1 = F.layer_norm(x, (768,), ln_1_weight, ln_1_bias, 1e-05)   # f32[B, S, 768]  ln_1
        ...
        x_1 = torch.add(x, attn, out=memory.x_1)                        # f32[B, S, 768]

The dialect determines the expression of a node: it is a table from op names to Python expressions. This module does
everything else: names, sizes as expressions of symbols that are read from shapes, calls of blocks with their weights
and states, and `del` of values that no later line reads, so that memory is released as the program runs. A state is one
array under one name: ops that update the state write to the array in place. Values in the storage plan are written to
`memory.x_1` (`treadle.backends.python.arena`), the workspace of a call is `memory.x_1_work`, and a call of a block gets
the memory of its callee.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.backends.commented_lines import commented
from treadle.backends.python.spelled_line import Dialect, Line, symbols_of
from treadle.files.shown_names import on_one_line
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.hashing import op_key
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import StorageKind
from treadle.ir.types import Type
from treadle.passes.memory.storage_plan import FunctionPlan, How, StoragePlan

_BUILTINS = frozenset(dir(builtins))


@dataclass(frozen=True)
class EmittedProgram:
    """An emitted module and the objects that its text refers to.

    text        the module; an entry, such as `main`, takes its inputs in order, then `weights`, then `states` by name
                if it has any
    entries     by entry name, the name of its function in the text
    constants   the values of `constants[i]`
    bundles     for each `weights["scope.*"]`, the names of the weights in it, in the callee's order
    references  for each `reference.name(...)`, the node whose NumPy reference it is
    nodes       by line number of the text, the node of the line
    destinations  by function, for each name in its `memory` the value that is written there
    frames      by function, for each other name in its `memory` the step whose callee gets it as memory
    workspaces  by function, for each other name the step whose call gets these arrays as workspace, by their names
    reporters   the nodes that record errors in `status`, by their numbers in the text
    reporting   the functions with a parameter `status`
    """

    text: str
    entries: Mapping[str, str]
    constants: tuple[Literal, ...]
    bundles: Mapping[str, tuple[str, ...]]
    references: Mapping[str, Node]
    nodes: Mapping[int, Node]
    destinations: Mapping[str, Mapping[str, Value]]
    frames: Mapping[str, Mapping[str, int]]
    workspaces: Mapping[str, Mapping[str, int]]
    reporters: tuple[Node, ...]
    reporting: frozenset[str]

    def has_memory(self, function: str) -> bool:
        """Return True if a function has a parameter `memory`."""
        return any(table[function] for table in (self.destinations, self.frames, self.workspaces))


def emit(
    graph: Graph, dialect: Dialect, plan: StoragePlan, prepared: Sequence[str] = (), poison: bool = False
) -> EmittedProgram:
    """Write a graph as a Python module, with lines at its head on prepared weights.

    prepared  lines on derived weights, for the comment at the module's head
    plan      the graph's storage plan, with offsets and lifetimes
    poison    True: call `poison` on the memory of a storage when its lifetime ends (`treadle.backends.poison`)

    Raises BackendError if no dimension of an input determines a needed symbol.
    """
    return _ProgramWriter(graph, dialect, plan, prepared, poison).program()


class _Names:
    """Unique identifiers: `linear`, `linear_1`, ..."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = set(taken)
        self._counts: dict[str, int] = {}  # for each name, the numbers below this one are used

    def new(self, hint: str) -> str:
        base = re.sub(r"\W+", "_", hint, flags=re.ASCII).strip("_") or "value"
        base = f"v{base}" if base[0].isdigit() else base
        count = self._counts.get(base, 0)
        name = f"{base}_{count}" if count else base
        while name in self.taken or keyword.iskeyword(name) or name in _BUILTINS:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        self._counts[base] = count
        return name


@dataclass
class _Text:
    """The lines of a function; each may have a comment and a node."""

    lines: list[tuple[str, str, Node | None]] = field(default_factory=list)

    def add(self, code: str, comment: str = "", node: Node | None = None) -> None:
        self.lines.append((code, on_one_line(comment), node))

    def rendered(self) -> list[tuple[str, Node | None]]:
        shown = commented([(code, comment) for code, comment, _ in self.lines])
        return [(line, node) for line, (_, _, node) in zip(shown, self.lines, strict=True)]


class _ProgramWriter:
    def __init__(
        self, graph: Graph, dialect: Dialect, plan: StoragePlan, prepared: Sequence[str], poison: bool
    ) -> None:
        self.graph, self.dialect, self.plan, self.prepared, self.poison = graph, dialect, plan, prepared, poison
        self.constants: dict[Literal, int] = {}
        self.bundles: dict[str, tuple[str, ...]] = {}
        self.references: dict[str, Node] = {}
        self.reference_names = _Names(())
        self.named_ops: dict[tuple[str, tuple[Type, ...]], str] = {}
        entries = {entry.name for entry in graph.later_entries}
        names = _Names({*dialect.names, *entries})
        self.functions = graph.needed_by(*graph.later_entries)
        self.function_names = {f.name: f.name if f.name in entries else names.new(f.name) for f in self.functions}
        symbols = _Names({*names.taken, "_"})
        self.symbols = {s: symbols.new(s) for s in sorted(_all_symbols(graph, self.functions))}
        self.needs: dict[str, list[str]] = {}
        self.destinations: dict[str, dict[str, Value]] = {}
        self.frames: dict[str, dict[str, int]] = {}
        self.workspaces: dict[str, dict[str, int]] = {}
        self.reporters: list[Node] = []
        self.reporting: set[str] = set()

    def program(self) -> EmittedProgram:
        bodies = [FunctionWriter(self, function).write() for function in self.functions]
        lines: list[tuple[str, Node | None]] = [(line, None) for line in self._header()]
        for body in bodies:
            lines += [("", None), ("", None), *body.rendered()]
        return EmittedProgram(
            text="\n".join(line for line, _ in lines) + "\n",
            entries={entry.name: self.function_names[entry.name] for entry in self.graph.later_entries},
            constants=tuple(self.constants),
            bundles=self.bundles,
            references=self.references,
            nodes={at: node for at, (_, node) in enumerate(lines, 1) if node is not None},
            destinations=self.destinations,
            frames=self.frames,
            workspaces=self.workspaces,
            reporters=tuple(self.reporters),
            reporting=frozenset(self.reporting),
        )

    def _header(self) -> list[str]:
        title = f"# {on_one_line(self.graph.name)}, for the {self.dialect.name} backend."
        notes = []
        if self.bundles:
            notes.append(f'weights["{next(iter(self.bundles))}"]: all weights of that block, in its own order')
        notes += [f"computed once by bind: {line}" for line in self.prepared]
        notes += [f"constants[{i}]: {literal.type}" for literal, i in self.constants.items()]
        notes += [
            f"reference.{name}: the NumPy reference of {_op_text(node.op)}" for name, node in self.references.items()
        ]
        return [title, *self.dialect.imports, *([""] if notes else []), *(f"# {on_one_line(n)}" for n in notes)]

    def has_memory(self, function: str) -> bool:
        """Return True if a function that is already written has a parameter `memory`."""
        return bool(self.destinations[function] or self.frames[function] or self.workspaces[function])

    def constant(self, literal: Literal) -> str:
        return f"constants[{self.constants.setdefault(literal, len(self.constants))}]"

    def reference(self, node: Node) -> str:
        key = (op_key(node.op), tuple(v.type for v in node.results))
        if key not in self.named_ops:
            self.named_ops[key] = name = self.reference_names.new(node.op.name)
            self.references[name] = node
        return self.named_ops[key]


def _all_symbols(graph: Graph, functions: Sequence[Function]) -> set[str]:
    found = set(graph.symbols)
    for function in functions:
        for value in function.arguments:
            found |= value.type.symbols
    for node in (node for function in functions for node in function.nodes):
        for value in node.op.attributes.values():
            found |= symbols_of(value)
        for result in node.results:
            found |= result.type.symbols
    return found


def _op_text(op: Op) -> str:
    defaults = op.attribute_defaults()
    said = [f"{n}={v}" for n, v in op.attributes.items() if n not in defaults or defaults[n] != v]
    return f"{op.name}({', '.join(said)})"


class FunctionWriter:
    def __init__(self, program: _ProgramWriter, function: Function) -> None:
        self.program, self.function = program, function
        self.is_entry = function in program.graph.later_entries
        self.used: set[str] = set()
        self.names = _Names({*program.dialect.names, *program.symbols.values(), *program.function_names.values()})
        self.text: dict[Value, str] = {}
        named = function.inputs if self.is_entry else function.arguments
        for value in named:
            self.text[value] = self.names.new(value.name)
        if self.is_entry:
            self.text |= {v: f'weights["{_escaped(name)}"]' for name, v in function.parameters.items()}
            self.text |= {v: f'states["{_escaped(name)}"]' for name, v in function.states.items()}

    # -- for expressions ------------------------------------------------------------------------------------

    def read(self, value: Value) -> str:
        """Return a value as an array."""
        return self.program.constant(value.literal) if value.literal is not None else self.text[value]

    def size(self, size: Size) -> str:
        """Return a size as Python text, and record its symbols as needed."""
        self.used |= size.symbols
        renamed = {s: n for s, n in self.program.symbols.items() if s != n and s in size.symbols}
        return str(size.substitute(renamed) if renamed else size)

    def reporter(self, node: Node) -> int:
        """Return the number under which a node records errors. The function then has a parameter `status`."""
        self.program.reporting.add(self.function.name)
        self.program.reporters.append(node)
        return len(self.program.reporters) - 1

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self) -> _Text:
        body = self._body()
        head = self._head(self._bindings())  # records the symbols that the caller has to pass
        return _Text([*_aligned(head), *_aligned(body)])

    def _body(self) -> _Text:
        """Return the lines of the nodes, each followed by `poison` and `del` of the values that no later line reads."""
        body = _Text()
        plan = self.program.plan.functions[self.function.name]
        self.program.destinations[self.function.name] = {}
        self.program.frames[self.function.name] = {}
        self.program.workspaces[self.function.name] = {}
        poisoned = _owners_dead_after(plan) if self.program.poison else {}
        dead = {at: list(values) for at, values in plan.dead_after().items()}
        for at, owners in poisoned.items():  # these values keep their names until their storage dies
            dead = {n: [v for v in values if v not in owners] for n, values in dead.items()}
            dead[at] = [*dead.get(at, ()), *owners]
        for at, step in enumerate(plan.steps):
            self._add_node(body, plan, at, step.root)
            for value in poisoned.get(at, ()):
                body.add(f"    poison({self.text[value]})")
            if dead.get(at):
                body.add(f"    del {', '.join([self.text[v] for v in dead[at]])}")
        body.add(f"    return {self._returned()}")
        return body

    def _add_node(self, body: _Text, plan: FunctionPlan, at: int, node: Node) -> None:
        """Add the line of the node at a step, and name its results."""
        made = [r for r in node.results if r.state is None]
        self.text |= {r: self.read(r.before) for r in node.results if r.before is not None and r not in made}
        names = [self.names.new(result.name) for result in made]
        workspace: str | None = None
        if node.op.callee is None:
            if at in plan.workspaces:
                workspace = self.names.new(f"{names[0]}_work")
                self.program.workspaces[self.function.name][workspace] = at
            expression = self._spelled(plan, node, self._destination(plan, made, names), workspace)
        elif self.program.has_memory(node.op.callee):
            frame = names[0] if names else self.names.new(node.op.callee)
            self.program.frames[self.function.name][frame] = at
            expression = self._call(node, f"memory.{frame}")
        else:
            expression = self._call(node)
        self.text |= dict(zip(made, names, strict=True))
        target = ", ".join(names)
        types = ", ".join(str(r.type) for r in node.named_results) or "()"
        code = f"{target} = {expression}" if target else expression
        body.add(f"    {code}", f"{types}  {node.scope}".rstrip(), node)
        if workspace is not None and self.program.poison:
            body.add(f"    poison(*vars(memory.{workspace}).values())")

    def _head(self, bindings: Sequence[str]) -> _Text:
        """Return the parameters of the function, and the lines that read symbols from shapes."""
        head = _Text()
        head.add(f"def {self.program.function_names[self.function.name]}(")
        for value in self.function.inputs if self.is_entry else self.function.arguments:
            head.add(f"    {self.text[value]},", str(value.type))
        if self.is_entry:
            head.add("    weights,")
            if self.function.states:
                head.add("    states,")
        for symbol in self.program.needs[self.function.name]:
            head.add(f"    {self.program.symbols[symbol]},")
        if self.program.has_memory(self.function.name):
            head.add("    memory,")
        if self.function.name in self.program.reporting:
            head.add("    status,")
        head.add("):")
        for line in bindings:
            head.add(f"    {line}")
        return head

    def _destination(self, plan: FunctionPlan, made: Sequence[Value], names: Sequence[str]) -> str | None:
        """Return the destination of a node's result as text; None if the node allocates its result, or
        returns a view.
        """
        for value, name in zip(made, names, strict=True):
            place = plan.places[value]
            if isinstance(place.of, Value) and place.how is How.OVER:
                return self.text[place.of]
            if place.how is How.OWN and place.storage is not None and place.storage.kind is StorageKind.LOCAL:
                self.program.destinations[self.function.name][name] = value
                return f"memory.{name}"
        return None

    def _spelled(self, plan: FunctionPlan, node: Node, out: str | None, workspace: str | None) -> str:
        work = None if workspace is None else f"memory.{workspace}"
        copies = node.op.is_view and plan.places[node.results[0]].how is How.OWN
        line, dialect = Line(self, node, out, work, copies), self.program.dialect
        text = dialect.spell(line)
        if not line.updates_state or node.op.name in dialect.spellings:
            return text
        (before,) = [value.before for value in node.results]  # the reference does not change the state
        assert before is not None
        return f"{self.read(before)}[...] = {text}"

    def _returned(self) -> str:
        outputs = {name: self.read(value) for name, value in self.function.outputs.items()}
        if self.is_entry:
            return "{" + ", ".join(f'"{_escaped(name)}": {text}' for name, text in outputs.items()) + "}"
        return ", ".join(outputs.values())

    def _call(self, node: Node, memory: str | None = None) -> str:
        callee = self.program.graph.callee(node)
        assert callee is not None
        first, end = len(callee.inputs), len(callee.inputs) + len(callee.parameters)
        arguments = [self.read(v) for v in node.inputs[:first]]
        arguments += self._bundle(node, callee) or [self.read(v) for v in node.inputs[first:end]]
        arguments += [self.read(v) for v in node.inputs[end:]]
        needed = self.program.needs[callee.name]
        arguments += [f"{self.program.symbols[s]}={self.size(Size.symbol(s))}" for s in needed]
        arguments += [f"memory={memory}"] if memory is not None else []
        if callee.name in self.program.reporting:
            self.program.reporting.add(self.function.name)
            arguments.append("status=status")
        return f"{self.program.function_names[callee.name]}({', '.join(arguments)})"

    def _bundle(self, node: Node, callee: Function) -> list[str] | None:
        """Return `*weights["h.0.*"]` as an argument, if the call passes exactly the weights under its scope, in the
        callee's order; else None.

        Another callee under the same scope, with other weights, has its own bundle.
        """
        weights = node.inputs[len(callee.inputs) : len(callee.inputs) + len(callee.parameters)]
        names = tuple(f"{node.scope}.{name}" for name in callee.parameters)
        if not self.is_entry or not names or [self.function.parameters.get(n) for n in names] != list(weights):
            return None
        bundles, key = self.program.bundles, f"{node.scope}.*"
        if bundles.setdefault(key, names) != names:
            key = f"{node.scope}.* of {callee.name}"
            bundles[key] = names
        return [f'*weights["{_escaped(key)}"]']

    def _bindings(self) -> list[str]:
        """Return lines that read the needed symbols from the arguments' shapes. The caller passes all other symbols."""
        wanted = sorted(self.used)
        lines = []
        for value in self.function.arguments:
            symbols = [s.as_symbol for s in value.type.shape]
            new = [s for s in dict.fromkeys(symbols) if s in wanted]
            if not new:
                continue
            wanted = [s for s in wanted if s not in new]
            if len(new) == 1:
                lines.append(f"{self.program.symbols[new[0]]} = {self.text[value]}.shape[{symbols.index(new[0])}]")
            else:
                first = [s if s in new and symbols.index(s) == i else None for i, s in enumerate(symbols)]
                pattern = ", ".join("_" if s is None else self.program.symbols[s] for s in first)
                lines.append(f"{pattern} = {self.text[value]}.shape")
        if self.is_entry:
            solved = {symbol: text for symbol in wanted if (text := self._solved(symbol)) is not None}
            lines += [f"{self.program.symbols[symbol]} = {text}" for symbol, text in solved.items()]
            wanted = [symbol for symbol in wanted if symbol not in solved]
        self.program.needs[self.function.name] = wanted
        if wanted and self.is_entry:
            names = ", ".join(wanted)
            raise BackendError(
                f"{self.program.graph.name} needs the size of {names}, which no input's dimensions determine",
                received=", ".join(f"{v.name}: {v.type}" for v in self.function.inputs),
                hint=f"an input with a dimension {wanted[0]}",
            )
        return lines

    def _solved(self, symbol: str) -> str | None:
        """Return an expression that computes a symbol from a dimension c*S + d, or None if there is no such
        dimension.
        """
        for value in self.function.arguments:
            for position, size in enumerate(value.type.shape):
                if size.as_linear is not None and size.as_linear[0] == symbol:
                    _, coefficient, offset = size.as_linear
                    read = f"{self.text[value]}.shape[{position}]"
                    return f"({read} - {offset}) // {coefficient}" if offset else f"{read} // {coefficient}"
        return None


def _owners_dead_after(plan: FunctionPlan) -> dict[int, list[Value]]:
    """Return, by step, the values that own a storage of the function and die at this step."""
    last = {life.storage: life.last for life in plan.lives if life.storage.kind.is_own}
    dead: dict[int, list[Value]] = {}
    for value, place in plan.places.items():
        if place.how is How.OWN and place.storage in last and last[place.storage] < plan.end:
            dead.setdefault(last[place.storage], []).append(value)
    return dead


def _aligned(text: _Text) -> list[tuple[str, str, Node | None]]:
    return [(code, "", node) for code, node in text.rendered()]


def _escaped(name: str) -> str:
    """Return a name as the content of a string literal in double quotes. Names may come from a file, and must not end
    the literal early.
    """
    plain = name.isprintable()
    text = name.replace("\\", "\\\\") if plain else name.encode("unicode_escape").decode("ascii")
    return text.replace('"', '\\"')
