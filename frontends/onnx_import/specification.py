"""Operator specifications from the package onnx: types, and function bodies if there are any."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from treadle.frontends.onnx_import.file import describe, subgraphs
from treadle.frontends.onnx_import.rules.elements import Element, named
from treadle.frontends.onnx_import.values import Known
from treadle.ir.errors import FrontendError


@lru_cache(maxsize=2048)
def schema_of(name: str, opset: int, domain: str) -> Any:
    """Return the specification of an operator in an opset, or None if there is none."""
    import onnx

    try:
        return onnx.defs.get_schema(name, opset, domain)
    except onnx.defs.SchemaError:
        return None


@lru_cache(maxsize=2048)
def _formal_types(name: str, opset: int, domain: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the types of inputs and of outputs: concrete types, or type variables."""
    schema = schema_of(name, opset, domain)

    alone = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def side(formals: Any) -> tuple[str, ...]:
        """Return types by name. A type variable that allows only one type is replaced by that type."""
        names = [f.type_str for f in formals]
        return tuple(alone[n][0] if len(alone.get(n, ())) == 1 else n for n in names)

    return side(schema.inputs), side(schema.outputs)


def output_elements(schema: Any, node: Any, inputs: Sequence[Known | None]) -> list[Element | None]:
    """Return the element type of each output, if the operator's specification derives it from the types of the inputs.

    Raises FrontendError if inputs that must have the same type differ.
    """
    if schema is None:
        return [None] * len(node.output)
    taken, given = _formal_types(schema.name, schema.since_version, schema.domain)
    bound: dict[str, Element] = {}
    for i, value in enumerate(inputs):
        if value is not None and taken:
            variable = taken[min(i, len(taken) - 1)]
            known = bound.setdefault(variable, value.type)
            if known != value.type:
                raise FrontendError(
                    f"{schema.name}: two inputs must have the same type", received=f"{known} and {value.type}"
                )
    kinds: list[Element | None] = []
    for i in range(len(node.output)):
        text = given[min(i, len(given) - 1)]
        concrete = re.fullmatch(r"tensor\((\w+)\)", text)
        if concrete is not None:
            kinds.append(_CONCRETE.get(concrete[1]))
        else:
            kinds.append(bound.get(text))
    return kinds


_CONCRETE = {
    "int64": named("INT64"),
    "int32": named("INT32"),
    "float": named("FLOAT"),
    "bool": named("BOOL"),
    "uint8": named("UINT8"),
    "double": named("DOUBLE"),
}


def function_body(schema: Any, node: Any, opset: int, inputs: Sequence[Known | None]) -> Any:
    """Return the function body in the operator's specification, which expresses it by other operators. None if there is
    none.
    """
    import onnx

    if schema is None:
        return None
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        data = schema.get_function_with_opset_version(max(versions)) if versions else None
    elif schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        types = [onnx.TypeProto() if v is None else _type_proto(v) for v in inputs]
        data = (
            schema.get_context_dependent_function_with_opset_version(
                max(versions), node.SerializeToString(), [t.SerializeToString() for t in types]
            )
            if versions
            else None
        )
    else:
        return None
    return onnx.FunctionProto.FromString(data) if data else None


def _type_proto(value: Known) -> Any:
    import onnx

    made = onnx.TypeProto()
    made.tensor_type.elem_type = value.type.number
    made.tensor_type.shape.SetInParent()
    for size in value.shape:
        dim = made.tensor_type.shape.dim.add()
        if size.constant is not None:
            dim.dim_value = size.constant
    return made


def with_attributes(node: Any, given: Mapping[str, Any], absent: frozenset[str], nesting: int) -> Any:
    """Return a node of a function's body with references replaced by the call's attributes, without absent inputs."""
    inputs_absent = any(name in absent for name in node.input)
    refers = any(a.ref_attr_name for a in node.attribute)
    inner = list(subgraphs(node))
    if not (inputs_absent or refers or inner):
        return node
    if nesting <= 0:
        raise FrontendError("subgraphs nest too deep", within=describe(node))
    made = type(node)()
    made.CopyFrom(node)
    for position, name in enumerate(made.input):
        if name in absent:
            made.input[position] = ""
    kept = []
    for attribute in made.attribute:
        if attribute.ref_attr_name:
            found = given.get(attribute.ref_attr_name)
            if found is None:
                continue
            name = attribute.name
            attribute = type(attribute)()
            attribute.CopyFrom(found)
            attribute.name = name
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            replaced = [with_attributes(n, given, absent, nesting - 1) for n in graph.node]
            del graph.node[:]
            graph.node.extend(replaced)
        kept.append(attribute)
    del made.attribute[:]
    made.attribute.extend(kept)
    return made
