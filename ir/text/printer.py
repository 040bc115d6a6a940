"""A graph as readable text, with repeated blocks folded. `treadle.ir.text.parser` parses it to an equal graph.

    block h(x: f32[B, S, 8]) -> (x: f32[B, S, 8])
      weights ln_1.weight: f32[8]
    {
      ln_1 = rms_norm(x, $ln_1.weight, eps=1e-05)   # f32[B, S, 8]  gpt2.py:41  ln_1
      return x = ln_1
    }

docs/ir-grammar.md has the grammar. The text depends only on the graph, and printing a parsed text reproduces it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.attributes import attribute_text, default_texts
from treadle.ir.text.constants import DataSection, constant_text
from treadle.ir.text.scanner import RESERVED, name_text, path_text, quoted, type_text

Annotate = Callable[[Node], str | None]
"""A function that returns a remark on a node, such as its FLOPs, for the end of its line. The parser ignores remarks.
"""

_WIDTH = 100
_CODE_COLUMN = 72
_TYPE_COLUMN = 28


def print_graph(graph: Graph, *, unfold: bool = False, sources: bool = True, annotate: Annotate | None = None) -> str:
    """Return the whole graph as text.

    unfold    replace calls of blocks by their bodies (see `treadle.ir.transforms.inline`)
    sources   print each node's source line and scope, after its types
    annotate  returns a remark for the end of a node's line
    """
    if unfold:
        from treadle.ir.transforms.inline import inline_calls

        graph = inline_calls(graph)
    data = DataSection()
    lines = [f"graph {name_text(graph.name)} {{"]
    if graph.symbols:
        lines.append("  symbols " + ", ".join(b.around(name_text(s)) for s, b in graph.symbols.items()))
    if graph.generated:
        lines.append("  generated " + ", ".join(f"{name_text(n)} = {v}" for n, v in graph.generated.items()))
    if graph.parameters:
        inits = {name: _init_text(graph, name) for name in graph.parameters}
        lines += ["  parameters {", *(f"    {line}" for line in _folded_lines(graph.parameters, inits)), "  }"]
    if graph.states:
        lines += ["  states {", *(f"    {line}" for line in _folded_lines(graph.states, {})), "  }"]
    for function in graph.functions.values():
        text = FunctionText(graph, function, data=data, sources=sources, annotate=annotate)
        lines += [""] if len(lines) > 1 else []
        lines += [f"  {line}" for line in text.lines()]
    if section := data.lines():
        lines += ["", *(f"  {line}" for line in section)]
    return "\n".join([*lines, "}", ""])


def print_function(graph: Graph, function: Function, *, sources: bool = True, annotate: Annotate | None = None) -> str:
    """Return one function of a graph as text. All constants are written in place, completely."""
    return "\n".join(FunctionText(graph, function, sources=sources, annotate=annotate).lines()) + "\n"


def excerpt(graph: Graph, function: Function, index: int) -> str:
    """Return the lines of a node, which is marked, and of three nodes on either side. The graph need not pass the
    verifier.
    """
    text = FunctionText(graph, function)
    first = max(0, index - 3)
    rows = text.rows(function.nodes[first : index + 4])
    numbered = zip(range(first, len(function.nodes)), rows, strict=False)
    return "\n".join(f"{'>' if n == index else ' '} op {n}: {row}"[:160] for n, row in numbered)


# -- names ---------------------------------------------------------------------------------------------------------


def value_names(graph: Graph, function: Function) -> dict[Value, str]:
    """Return a name for each input and result. Inputs keep their names; a result's name is its hint, made unique by a
    number.

    A call's results without a hint of their own are named after the function's outputs. An update of a state has the
    name of the state.
    """
    names: dict[Value, str] = {v: v.name for v in function.inputs}
    taken = set(names.values())
    next_number: Counter[str] = Counter()
    for node in function.nodes:
        callee = graph.functions.get(node.op.callee) if node.op.callee is not None else None
        outputs = list(callee.outputs) if callee is not None else []
        for value in node.results:
            if value.index in node.op.updates and value.state is not None:
                continue
            hint = value.name
            if hint == node.op.callee and value.index < len(outputs):
                hint = outputs[value.index]
            base = name = _as_name(hint)
            while name in taken:
                next_number[base] += 1
                name = f"{base}_{next_number[base] + 1}"
            taken.add(name)
            names[value] = name
    return names


def _as_name(hint: str) -> str:
    """Return the hint as a bare name of at most 60 characters."""
    word = re.sub(r"\W", "_", hint)[:60]
    if not re.match(r"[A-Za-z_]", word):
        word = f"_{word}"
    return f"{word}_" if word in RESERVED else word


# -- one function --------------------------------------------------------------------------------------------------


class FunctionText:
    """The text of one function, line by line. Without a data section, constants are written in place."""

    def __init__(
        self,
        graph: Graph,
        function: Function,
        *,
        data: DataSection | None = None,
        sources: bool = True,
        annotate: Annotate | None = None,
    ) -> None:
        self.graph, self.function, self.data = graph, function, data
        self.sources, self.annotate = sources, annotate
        self.names = value_names(graph, function)
        self.is_bind = function is graph.bind
        self.made = {v: f"${path_text(n)}" for n, v in function.outputs.items()} if self.is_bind else {}

    def lines(self) -> list[str]:
        """Return the function's lines, including the signature."""
        outputs = [f"{path_text(n)} = {self.operand(v)}" for n, v in self.function.outputs.items()]
        returned = [] if self.is_bind else _wrapped(outputs, "return ", "       ")
        body = [*self.rows(self.function.nodes), *returned]
        return [*self.signature(), *(f"  {line}" for line in body), "}"]

    def signature(self) -> list[str]:
        """Return the lines before the body. The last of them opens the body."""
        function = self.function
        if self.is_bind:
            return ["bind {"]
        inputs = [f"{name_text(v.name)}: {type_text(v.type)}" for v in function.inputs]
        outputs = [f"{path_text(n)}: {type_text(v.type)}" for n, v in function.outputs.items()]
        is_entry = function in self.graph.entries
        lead = function.name if is_entry else f"block {name_text(function.name)}"
        lines = [f"{lead}({', '.join(inputs)}) -> ({', '.join(outputs)})"]
        if len(lines[0]) > _WIDTH:
            opened = [f"{lead}(", *_wrapped(inputs, "  ", "  "), ") -> ("] if inputs else [f"{lead}() -> ("]
            lines = [*opened, *_wrapped(outputs, "  ", "  "), ")"]
        if is_entry or not (function.parameters or function.states):
            return [*lines[:-1], f"{lines[-1]} {{"]
        for lead, held in ("  weights ", function.parameters), ("  states ", function.states):
            items = [f"{path_text(n)}: {type_text(v.type)}{_in_layout(v)}" for n, v in held.items()]
            lines += _wrapped(items, lead, " " * len(lead)) if items else []
        return [*lines, "{"]

    def rows(self, nodes: Sequence[Node]) -> list[str]:
        """Return one line per node, with notes aligned in columns. A few long lines do not shift the columns."""
        rows = [(self.statement(node), *self.note(node)) for node in nodes]
        code = max((len(c) for c, *_ in rows if len(c) <= _CODE_COLUMN), default=0)
        type = max((len(t) for _, t, _ in rows if len(t) <= _TYPE_COLUMN), default=0)
        return [f"{c:<{code}}   # {t:<{type}}  {rest}".rstrip() for c, t, rest in rows]

    def note(self, node: Node) -> tuple[str, str]:
        """Return the two parts of the note after a statement: the types of its results, and its source line, scope and
        remark.
        """
        types = ", ".join(type_text(v.type) for v in node.named_results) or "()"
        rest: list[str] = []
        if self.sources:
            rest += [source_text(node.source)] if node.source is not None else []
            rest += [path_text(node.scope)] if node.scope else []
        if self.annotate is not None and (remark := self.annotate(node)):
            rest.append("| " + " ".join(remark.split()))
        return types, "  ".join(rest)

    def statement(self, node: Node) -> str:
        """Return a node's statement, such as `a, b = op(x, k=5)`."""
        results = self.all_made(node) or ", ".join(map(self.operand, node.named_results))
        application = self.call(node) or self.application(node)
        return f"{results} = {application}" if results else application

    def all_made(self, node: Node) -> str | None:
        """Return `$h.0.*` if the results of a call are all outputs of its block, assigned under one path, else None."""
        callee = self.graph.functions.get(node.op.callee) if node.op.callee is not None else None
        if callee is None or not callee.outputs or not self.made:
            return None
        names = {v: name for name, v in self.function.outputs.items()}
        paths = [(names.get(v, ""), output) for v, output in zip(node.results, callee.outputs, strict=False)]
        prefix = paths[0][0].removesuffix(f".{paths[0][1]}")
        return f"${path_text(prefix)}.*" if prefix and all(n == f"{prefix}.{o}" for n, o in paths) else None

    def application(self, node: Node) -> str:
        """Return the right side of a node's statement, such as `op(x, 0.5, none, $w, k=5)`."""
        op = node.op
        fixed = sum(not o.variadic for o in op.operands.values())
        operands = list(node.operands)
        while operands and operands[-1] is None and len(operands) <= fixed:
            operands.pop()
        unsaid = default_texts(type(op))
        attributes = ((n, attribute_text(v)) for n, v in op.attributes.items())
        inside = [*map(self.operand, operands), *(f"{n}={t}" for n, t in attributes if unsaid.get(n) != t)]
        mark = "op " if op.name in self.graph.functions or op.callee is not None else ""
        return f"{mark}{name_text(op.name)}({', '.join(inside)})"

    def call(self, node: Node) -> str | None:
        """Return a call as text, such as `h(x) with h.3`, or None if the node does not call a function of the graph."""
        callee = self.graph.functions.get(node.op.callee) if node.op.callee is not None else None
        if callee is None or len(node.operands) != len(callee.arguments):
            return None
        inputs = node.operands[: len(callee.inputs)]
        formals = (*callee.parameters, *callee.states)
        weights = dict(zip(formals, node.operands[len(inputs) :], strict=True))
        prefixes = Counter(p for n, v in weights.items() if (p := _prefix(v, n)) is not None)
        prefix = prefixes.most_common(1)[0][0] if prefixes else None
        others = {n: v for n, v in weights.items() if _prefix(v, n) != prefix or prefix is None}
        text = f"{name_text(callee.name)}({', '.join(map(self.operand, inputs))})"
        text += " with" if weights else ""
        text += f" {path_text(prefix)}" if prefix is not None else ""
        bound = ", ".join(f"{path_text(n)}: {self.operand(v)}" for n, v in others.items())
        return f"{text} {{{bound}}}" if bound else text

    def operand(self, value: Value | None) -> str:
        """Return a value as an operand's text."""
        if value is None:
            return "none"
        if value.literal is not None:
            return constant_text(value.literal, self.data)
        if value.kind == "parameter":
            return f"${path_text(value.name)}"
        if value in self.made:
            return self.made[value]
        if (state := value.state) is not None:
            return f"%{path_text(state.name)}"
        return name_text(self.names[value]) if value in self.names else f"<undefined {value.name}>"


def _prefix(value: Value | None, formal: str) -> str | None:
    """Return the path before the formal name of a weight or state: `h.3` if $h.3.attn.weight is passed as
    attn.weight.
    """
    held = None if value is None else value.state or value
    if held is None or held.kind not in ("parameter", "state") or not held.name.endswith(f".{formal}"):
        return None
    return held.name[: -len(formal) - 1]


def _in_layout(value: Value) -> str:
    return f" in {value.layout}" if value.layout is not None else ""


def source_text(source: SourceLine) -> str:
    """Return a source line as text: `gpt2.py:41`, with the file in quotes if it contains unusual characters."""
    bare = re.fullmatch(r"[\w./<>+-]+", source.file)
    return f"{source.file if bare else quoted(source.file)}:{source.line}"


def _wrapped(items: Iterable[str], first: str, rest: str) -> Iterator[str]:
    """Yield lines of limited width with the items separated by commas. `first` and `rest` begin the lines."""
    line, filled = first, False
    for item in items:
        if filled and len(line) + len(item) > _WIDTH:
            yield line.rstrip()
            line, filled = rest, False
        line += f"{item}, "
        filled = True
    yield line.removesuffix(", ").rstrip()


# -- parameters and states -------------------------------------------------------------------------------------------


def _folded_lines(values: Mapping[str, Value], remarks: Mapping[str, str]) -> list[str]:
    """Return one line per parameter or state. Names that repeat under consecutive integers are folded:
    `h.{0..11}.ln_1.weight`.

    Consecutive lines with the same integers mean: for each integer, these values in this order. Remarks follow the
    types.
    """
    names = list(values)
    rights = [f": {type_text(v.type)}{remarks.get(name, '')}" for name, v in values.items()]
    split = [_split_at_integer(name) for name in names]
    ends = list(range(1, len(names) + 1))  # for each name, the end of the names with the same head and integer
    for at in range(len(names) - 2, -1, -1):
        here, after = split[at], split[at + 1]
        if here is not None and after is not None and here[:2] == after[:2]:
            ends[at] = ends[at + 1]

    lines: list[str] = []
    at, last_run = 0, ""
    while at < len(names):
        first = split[at]
        length = ends[at] - at
        stop = at + length
        if first is not None:
            head, number, _ = first
            while stop + length <= len(names) and all(
                split[stop + k] == (head, number + (stop - at) // length, (split[at + k] or first)[2])
                and rights[stop + k] == rights[at + k]
                for k in range(length)
            ):
                stop += length
            last = number + (stop - at) // length - 1
            run = f"{head}{{{number}..{last}}}"
            if last > number and run != last_run:
                lines += [f"{run}{(split[at + k] or first)[2]}{rights[at + k]}" for k in range(length)]
                at, last_run = stop, run
                continue
        lines.append(path_text(names[at]) + rights[at])
        at, last_run = at + 1, ""
    return lines


def _split_at_integer(name: str) -> tuple[str, int, str] | None:
    """Split `h.3.attn.weight` into ("h.", 3, ".attn.weight"), at the first part of the path that is an integer."""
    if len(name) > 200:  # the pattern takes quadratic time if it does not match
        return None
    match = re.fullmatch(r"((?:\w+\.)*?)(0|[1-9][0-9]{0,8})((?:\.\w+)*)", name, re.ASCII)
    return (match[1], int(match[2]), match[3]) if match else None


def _init_text(graph: Graph, name: str) -> str:
    init = graph.initial.get(name)
    if init is None:
        return ""
    scale = f"({attribute_text(init.scale)})" if init.scale is not None else ""
    return f" = {name_text(init.kind)}{scale}"
