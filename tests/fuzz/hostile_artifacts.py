"""Artifacts designed to be expensive to read. Each must be refused with our error, or load, in bounded time.

`SHAPES` maps their names to their shapes and outcomes: files that load are just within the limits of `ArtifactLimits`,
the others are far beyond one of them. Their hashes and seals are correct, so nothing else stops them.
tests/fuzz/artifacts.py times them, tests/test_hostile_artifacts.py checks their outcomes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

X = "x: f32[B, 8]"
Section = tuple[str, list[int], bytes]


@dataclass(frozen=True)
class Shape:
    """One hostile file.

    text     a function that returns the graph's text; the file holds this text twice, as declared and as optimized
    refusal  the expected text of the error, or None if the file loads
    weights  the names of its weights, f32[0] each
    passes   the pass log's passes
    """

    text: Callable[[], str]
    refusal: str | None
    weights: Sequence[str] = ()
    passes: Sequence[Any] = field(default=(), repr=False)

    def sections(self) -> dict[str, Section]:
        """Return the sections of the file: each section's dtype, shape and bytes."""
        text, log = self.text().encode(), json.dumps({"passes": self.passes}).encode()
        sections: dict[str, Section] = {name: ("U8", [len(text)], text) for name in ("graph", "declared")}
        sections["log"] = ("U8", [len(log)], log)
        return sections | {f"weight/{name}": ("F32", [0], b"") for name in self.weights}


METADATA: Mapping[str, str] = {
    "format": "treadle artifact",
    "version": "2",
    "name": "g",
    "backend": "numpy",
    "target": "cpu",
    "passes": "",
    "seed": "",
    "options": "{}",
}


# -- texts ---------------------------------------------------------------------------------------------------------


def graph(
    body: str = "",
    *,
    symbols: str = "B",
    inputs: str = X,
    parameters: str = "",
    blocks: str = "",
    result: str = "x",
    after: str = "",
) -> str:
    """Return a graph's text that contains these statements."""
    return (
        f"graph g {{\nsymbols {symbols}\nparameters {{\n{parameters}\n}}\n{blocks}\n"
        f"main({inputs}) -> (y: f32[B, 8]) {{\n{body}\nreturn y = {result}\n}}\n{after}}}\n"
    )


def lines(count: int, line: Callable[[int], str]) -> str:
    return "\n".join(map(line, range(count)))


def listed(count: int, item: Callable[[int], str], sign: str = ", ") -> str:
    return sign.join(map(item, range(count)))


def chain(count: int, op: str, note: str = "") -> str:
    """Return statements of the form `op`. Each reads the result of the preceding statement: `add({before}, x)`."""
    read = ("x", *(f"v{i}" for i in range(count)))
    body = lines(count, lambda i: f"v{i} = {op.format(before=read[i], i=i)}{note.format(i=i)}")
    return graph(body, result=read[-1])


def inputs(count: int, type: Callable[[int], str]) -> str:
    return f"{X}, {listed(count, lambda i: f'x{i}: {type(i)}')}"


def symbols(count: int) -> str:
    return f"B, {listed(count, lambda i: f's{i}')}"


def sums(count: int, sign: str, terms: int = 2) -> str:
    """Return a size expression `(s0+s1)*(s2+s3)*...`: a product of sums, each with separate symbols."""
    return listed(count, lambda k: "(" + listed(terms, lambda j: f"s{terms * k + j}", "+") + ")", sign)


def calling(count: int) -> str:
    """Return blocks that each call the preceding block twice: the last one expands to 2^count ops."""
    callees = ("op neg", *(f"f{i}" for i in range(count)))
    return lines(count, lambda i: f"block f{i}({X}) -> (x: f32[B, 8]) {{ {_twice(callees[i])} return x = b }}")


def _twice(callee: str) -> str:
    return f"a = {callee}(x) b = {callee}(a)"


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"p.{i}" for i in range(count))


def _declared(names: Sequence[str]) -> str:
    return "\n".join(f"{name}: f32[0]" for name in names)


# -- shapes --------------------------------------------------------------------------------------------------------

_LONG = "the text takes too long to read"
_TYPE = "the type is too long"
_FEW, _MANY = _numbered(980), _numbered(4_990)
_PASS = {
    "pass": "p", "options": "", "ops": {"before": 0, "after": 0, "changes": {}}, "changes": 0,
    "matches": [], "refusals": [], "near_misses": [], "notes": [],
}  # fmt: skip
_EIGHT = "f32[8]{{1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, {i}.0}}"

_ONES = listed(70, lambda j: f"c{j}=1", " ")
_SQUARED = 'e{i} = einsum(z{i}, z{i}, equation="a,b -> a b")\nz{j} = rearrange(e{i}, pattern="a b -> (a b)")'

SHAPES: Mapping[str, Shape] = {
    # Nodes.
    "the most nodes allowed": Shape(lambda: chain(4_000, "add({before}, x)"), None),
    "with notes": Shape(lambda: chain(4_000, "add({before}, x)", "  # f32[B, 8]  a.py:{i}  a.b.{i}"), None),
    "too many nodes": Shape(lambda: chain(8_000, "add({before}, x)"), "too many nodes"),
    "nodes with long notes": Shape(lambda: chain(2_500, "add(x, x)", f" # f32[B, 8]  a.py:1  {'a.' * 1400}b"), _LONG),
    "nodes with long names": Shape(lambda: graph(lines(3_000, lambda i: f"v{i}{'_' * 900} = add(x, x)")), None),
    "no two nodes alike": Shape(lambda: graph(lines(4_000, lambda i: f"v{i} = iota(size={i})")), _LONG),
    "no two patterns alike": Shape(
        lambda: graph(lines(4_000, lambda i: f'v{i} = rearrange(x, pattern="a{i} b -> a{i} b")')), _LONG
    ),
    "patterns of many factors": Shape(
        lambda: graph(
            lines(
                1_000,
                lambda i: f'v{i} = rearrange(x, pattern="a{i} (b {_ONES}) -> a{i} (b {_ONES.replace("=1", "")})")',
            )
        ),
        _LONG,
    ),
    "the most operands allowed": Shape(
        lambda: graph(lines(390, lambda i: f"v{i} = concat({listed(50, lambda _: 'x')}, axis=0)")), None
    ),
    "too many results": Shape(lambda: graph(f"{listed(600_000, lambda i: f'a{i}')} = exp(x)"), _LONG),
    # Constants.
    "constants": Shape(lambda: chain(2_000, f"add({{before}}, {_EIGHT})"), None),
    "too many constants": Shape(lambda: chain(4_000, f"add({{before}}, {_EIGHT})"), _LONG),
    "a long constant": Shape(lambda: graph(f"v = add(x, f32[1000000]{{{listed(10**6, lambda _: '1.0')}}})"), _LONG),
    "data in small pieces": Shape(lambda: graph(after="data { @0: " + '"AAAA" ' * 1_100_000 + "}"), None),
    "many data": Shape(lambda: graph(after="data { " + lines(500_000, lambda i: f'@{i}: "AAAA"') + "}"), _LONG),
    # Names, numbers, white space.
    "a long name": Shape(lambda: graph(f"y = add(x, {'a' * 4_000_000})"), "a name or text is too long"),
    "a long text": Shape(
        lambda: graph('y = rearrange(x, pattern="' + "a " * 2_000 + '")'), "a name or text is too long"
    ),
    "comments": Shape(lambda: graph("# a\n" * 2_000_000), None),
    "brackets": Shape(lambda: graph(lines(3_000, lambda i: f"v{i} = iota(size={'(' * 90}B{')' * 90})")), _LONG),
    # Types and sizes.
    "nothing but types": Shape(lambda: graph(inputs=inputs(60_000, lambda i: f"f32[{'1, ' * 15}{i}]")), _LONG),
    "short types": Shape(lambda: graph(inputs=inputs(4_900, lambda i: f"f32[{i}]")), None),
    "types of many factors": Shape(lambda: graph(inputs=inputs(800, lambda i: f"f32[({'1 ' * 1_900}{i})]")), _TYPE),
    "a product of sums": Shape(
        lambda: graph(symbols=symbols(24), inputs=inputs(1, lambda i: f"f32[{sums(6, '*', 4)}{'*B' * 70}]")),
        "a size expression has too many terms",
    ),
    "factors whose product is long": Shape(
        lambda: graph(symbols=symbols(14), inputs=inputs(1_000, lambda i: f"f32[({sums(7, ' ')} {i})]")), _TYPE
    ),
    "long sums": Shape(
        lambda: graph(
            symbols=symbols(60), inputs=inputs(800, lambda i: f"f32[{listed(60, lambda j: f's{j}', '+')}+{i}]")
        ),
        _LONG,
    ),
    "a product that is divided": Shape(
        lambda: graph(symbols=symbols(14), inputs=inputs(1, lambda i: f"f32[({sums(7, '*')})//(s0+s1)]")),
        "a size expression has too many terms to be divided",
    ),
    "nested quotients": Shape(
        lambda: graph(inputs=inputs(1_000, lambda i: f"f32[{'(' * 40}B+{i}{')//3' * 40}]")), _LONG
    ),
    "sizes that double": Shape(lambda: chain(4_000, "concat({before}, {before}, axis=0)"), "a size is too large"),
    "sizes that square": Shape(
        lambda: graph(lines(60, lambda i: _SQUARED.format(i=i, j=i + 1)), inputs="x: f32[B, 8], z0: f32[B]"),
        "a term of a size has too many factors",
    ),
    "quotients that nest": Shape(lambda: chain(4_000, "slice({before}, axis=0, start=0, stride=2)"), _TYPE),
    "symbols in every type": Shape(
        lambda: graph(symbols=symbols(490), inputs=inputs(4_000, lambda i: f"f32[s{i % 490}, s{i * 7 % 490}]")),
        None,
    ),
    "too many symbols": Shape(lambda: graph(symbols=symbols(20_000)), "too many symbols"),
    # Functions, arguments, parameters.
    "too many functions": Shape(
        lambda: graph(blocks=lines(9_999, lambda i: f"block f{i}() -> () {{ return }}")), "too many functions"
    ),
    "functions that call twice": Shape(lambda: graph("y = f489(x)", blocks=calling(490), result="y"), None),
    "too many arguments": Shape(lambda: graph(inputs=inputs(100_000, lambda i: "f32[B]")), "too many arguments"),
    "calls with many weights": Shape(
        lambda: graph(
            lines(20, lambda i: f"v{i} = f(x) with p"),
            parameters=_declared(_FEW),
            blocks=f"block f({X}) -> (x: f32[B, 8]) weights {listed(980, lambda i: f'{i}: f32[0]')} {{ return x = x }}",
        ),
        None,
        _FEW,
    ),
    "the most weights allowed": Shape(lambda: graph(parameters=_declared(_MANY)), None, _MANY),
    "too many parameters": Shape(lambda: graph(parameters="p.{0..900000000}.w: f32[0]"), "too many parameters"),
    "runs of nothing": Shape(lambda: graph(parameters=lines(90_000, lambda i: f"p{i}.{{9..0}}.w: f32[0]")), _LONG),
    # The header and the log.
    "too many sections": Shape(
        graph, "the metadata has more members than the limit", tuple(f"w{i}" for i in range(20_000))
    ),
    "a log of many passes": Shape(graph, "the text holds more values than the limit", (), [_PASS] * 9_000),
    "a log of many ops": Shape(
        graph,
        "the pass log counts more ops than the limit",
        (),
        [
            _PASS | {"ops": {"before": 0, "after": 0, "changes": {f"{n}.{i}": 0 for i in range(300)}}}
            for n in range(150)
        ],
    ),
    # A file that is slightly below each limit.
    "everything": Shape(
        lambda: graph(lines(1_100, lambda i: f"v{i} = add(x, {_EIGHT.format(i=i)})"), parameters=_declared(_MANY)),
        None,
        _MANY,
        [_PASS | {"ops": {"before": 1_100, "after": 1_100, "changes": {}}, "notes": ["a"] * 5_000}] * 9,
    ),
}
