"""Structural identity: one canonical text per graph, without names of values, scopes and source lines.

Two graphs are equal if their canonical forms are equal. A structural hash is the SHA-256 of a canonical form, the same
in every process. It covers ops, attributes, types, wiring, constants' content, the names of inputs, outputs and
functions, and the order of nodes. The hash of a graph also covers its parameters and states by name, initial values,
its symbols' bounds, and the values of inputs for generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from treadle.ir.graph import Function, Graph, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.text.attributes import attribute_fields, attribute_text
from treadle.ir.types import Type

_IN_PLACE = 64


def canonical_form(graph: Graph) -> str:
    """Return the canonical text of a graph. Two graphs have the same text exactly if they are structurally equal."""
    symbols = ",".join(f"{b.lower}<={quote(s)}<={b.upper}" for s, b in sorted(graph.symbols.items()))
    initial = ",".join(
        f"{quote(n)}={quote(i.kind)}({attribute_text(i.scale)})" for n, i in sorted(graph.initial.items())
    )
    drawn = ",".join(f"{quote(n)}={v}" for n, v in sorted(graph.generated.items()))
    entries = graph.entries
    several = len(entries) > 1  # several entries may read the same weights, which are listed once
    functions = (
        line
        for f in graph.functions.values()
        for line in _lines(f, in_order=f not in entries, only_read=several and f in entries, made=f is graph.bind)
    )
    weights = ",".join(f"{quote(n)}:{type_key(v.type)}" for n, v in sorted(graph.parameters.items()))
    when = [f"entries {','.join(graph.entry_names)}", f"weights {weights}"] if several else []
    if drawn:
        when.append(f"generated {drawn}")
    if states := graph.states:
        when.append("states " + ",".join(f"{quote(n)}:{type_key(v.type)}" for n, v in sorted(states.items())))
    return "\n".join([f"symbols {symbols}", f"initial {initial}", *when, *functions])


def structural_hash(of: Function | Graph) -> str:
    """Return 64 hexadecimal digits that are equal for structurally equal graphs, or functions.

    A function's hash covers the name and signature of the functions that it calls, not their nodes. So use it to
    compare functions of different graphs only if they call no function, or equal functions.
    """
    text = canonical_form(of) if isinstance(of, Graph) else "\n".join(_lines(of, in_order=True))
    return sha256(text.encode()).hexdigest()


def function_key(function: Function) -> str:
    """Return a structural hash in which inputs, parameters and outputs count by position, not by name.

    Two functions of one graph with the same key compute the same results from their arguments: one may replace the
    other.
    """
    return sha256("\n".join(_lines(function, in_order=True, names=False)).encode()).hexdigest()


def _lines(
    function: Function, *, in_order: bool, names: bool = True, only_read: bool = False, made: bool = False
) -> Iterator[str]:
    """Yield one line per argument and node.

    in_order   True if the order of parameters and states counts, as it does for calls
    only_read  True if parameters and states count only if they are read
    made       True if outputs are derived weights, whose order does not count
    """
    ids: dict[Value | None, str] = {None: "-"}
    if names:
        yield f"function {quote(function.name)}"
    for number, value in enumerate(function.inputs):
        ids[value] = f"i{number}"
        yield f"input {quote(value.name) if names else ''}:{type_key(value.type)}"
    parameters = list(function.parameters.items()) if in_order else sorted(function.parameters.items())
    states = list(function.states.items()) if in_order else sorted(function.states.items())
    if only_read:
        read = {*function.results, *(v for node in function.nodes for v in node.operands)}
        parameters = [(name, value) for name, value in parameters if value in read]
        states = [(name, value) for name, value in states if value in read]
    for number, (name, value) in enumerate(parameters):
        ids[value] = f"p{number}"
        lies_in = f" in {value.lies_in}" if value.lies_in is not None else ""
        yield f"parameter {quote(name) if names else ''}:{type_key(value.type)}{lies_in}"

    for number, (name, value) in enumerate(states):
        ids[value] = f"s{number}"
        yield f"state {quote(name) if names else ''}:{type_key(value.type)}"

    def reference(value: Value | None) -> str:
        found = ids.get(value)
        if found is None:
            literal = value.literal if value is not None else None
            found = literal_key(literal) if literal is not None else "?"  # "?": not defined yet
        return found

    for number, node in enumerate(function.nodes):
        operands = ",".join([reference(v) for v in node.operands])
        results = node.results
        if len(results) == 1:
            ids[results[0]] = str(number)
            types = type_key(results[0].type)
        else:
            for value in results:
                ids[value] = f"{number}.{value.index}"
            types = ",".join([type_key(v.type) for v in results])
        yield f"{op_key(node.op)}({operands}){types}"
    for name, value in sorted(function.outputs.items()) if made else function.outputs.items():
        yield f"output {quote(name) if names else ''}:{reference(value)}:{type_key(value.type)}"
    for value in function.states.values() if in_order else sorted(function.states.values(), key=lambda v: v.name):
        if value.name in function.updated:
            yield f"updated {ids.get(value, '?')}:{reference(function.updated[value.name])}"


# -- keys of the parts ---------------------------------------------------------------------------------------------


def op_key(op: Op) -> str:
    """Return the op with all its attributes, as text. It is cached per op object, not by equality, which would match
    0.0 with -0.0.
    """
    key: str | None = op.__dict__.get("_structural_key")
    if key is None:
        values = [(field, getattr(op, name)) for name, field in attribute_fields(type(op)).items()]
        while values and values[-1][1] == () and values[-1][0].default == ():
            values.pop()
        attributes = ",".join([attribute_key(value) for _, value in values])
        key = op.__dict__["_structural_key"] = f"{op.name}[{attributes}]"
    return key


def attribute_key(value: Any) -> str:
    """Return an attribute's value as text. Types are given by their sizes, since their labels do not count."""
    if isinstance(value, Type):
        return type_key(value)
    if isinstance(value, tuple | list):
        return f"[{','.join(map(attribute_key, value))}]"
    return attribute_text(value)


@lru_cache(maxsize=16384)
def type_key(type: Type) -> str:
    """Return a type as text, without its factors and labels."""
    encoding = "" if type.encoding is None else f" as {type.encoding}"
    return f"{type.dtype.name}[{','.join(map(str, type.shape))}]{encoding}"


def literal_key(literal: Literal) -> str:
    """Return a constant's content as text, or its hash if it is long."""
    data = literal.data.hex() if len(literal.data) <= _IN_PLACE else sha256(literal.data).hexdigest()
    encoding = "" if literal.encoding is None else f" as {literal.encoding}"
    return f"{literal.dtype.name}{literal.shape}{encoding}{len(literal.data)}:{data}"
