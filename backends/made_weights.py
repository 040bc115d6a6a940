"""Derived weights: the results of the entry `bind`, computed once, when the weights are available.

    made = recipes_of(graph)            the recipe of each derived parameter, by name
    made["h.0.q_k_v_weight"].make(weights)

`bind` calls blocks, and computes parameters in no particular order. This module extracts a recipe for each derived
parameter. So a parameter can be computed separately, in any order, from the weights that it needs, and stored in a file
under a key that describes its computation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import rounded, widened
from treadle.files.available_memory import free_memory
from treadle.files.shown_names import on_one_line, printable
from treadle.ir.analysis.weight_only import is_made_of_weights
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError, Hint, TreadleError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.hashing import op_key
from treadle.ir.layouts import Layout
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.layout import Relayout
from treadle.ir.text.attributes import attribute_text
from treadle.ir.transforms.inline import inline_function
from treadle.ir.types import bf16, f32

Array = np.ndarray[Any, Any]

_LONGEST_OPERAND = 160  # maximum number of characters of an operand in a listing


@dataclass(frozen=True, eq=False)
class Recipe:
    """The computation of one derived parameter.

    result   the parameter's value in `bind`, row-major
    nodes    the nodes that compute it, in order
    sources  the weights that these nodes read, by name
    layout   the parameter's final layout; None for row-major
    """

    result: Value
    nodes: tuple[Node, ...]
    sources: Mapping[str, Value]
    layout: Layout | None = None

    def make(self, weights: Mapping[str, Any]) -> Array:
        """Return the parameter as a row-major NumPy array. A bf16 parameter is returned as float32.

        Raises BackendError if a node fails on these weights.
        """
        values: dict[Value, Any] = {v: _stored(as_numpy_weight(weights[name]), v) for name, v in self.sources.items()}
        for node in self.nodes:
            operands = [
                None if v is None else _constant(v) if v.literal is not None else values[v] for v in node.operands
            ]
            try:
                with np.errstate(all="ignore"):
                    made = operands[0] if _only_rounds(node) else node.op.at({}).reference(*operands)
            except Exception as error:
                raise BackendError(
                    f"{node.op.name}: failed on the weights that it reads",
                    received=error.what if isinstance(error, TreadleError) else f"{type(error).__name__}: {error}",
                    within=f"{self.result.name} = {self}",
                    source=describe_source(node.source, node.scope),
                ) from error
            for value, array in zip(node.results, made if isinstance(made, tuple) else (made,), strict=True):
                values[value] = _stored(array, value)
        found: Array = values[self.result]
        return found

    @cached_property
    def key(self) -> str:
        """A text that is equal for two recipes exactly if they compute the same function of the weights in `sources`,
        in this order.
        """
        ids: dict[Value, str] = {value: f"w{i}" for i, value in enumerate(self.sources.values())}
        digest = hashlib.sha256("".join(f"{value.type}\n" for value in self.sources.values()).encode())
        for node in self.nodes:
            read = []
            for v in node.operands:
                literal = v.literal if v is not None else None
                content = None if literal is None else hashlib.sha256(literal.data).hexdigest()
                read.append("-" if v is None else ids[v] if literal is None else f"{literal.type}:{content}")
            digest.update(f"{op_key(node.op)}({','.join(read)})\n".encode())
            for value in node.results:
                ids[value] = f"v{len(ids)}"
        return f"{ids[self.result]}:{digest.hexdigest()}"

    def __str__(self) -> str:
        return self.expression()

    def expression(self, within: str = "") -> str:
        """Return an expression of weights: `concat(q.weight, k.weight, axis=0)`, with names relative to the scope
        `within`.
        """
        texts = {value: name.removeprefix(f"{within}.") for name, value in self.sources.items()}
        text = next(iter(texts.values()), "") if not self.nodes else ""
        for node in self.nodes:
            read = [_operand(v, texts) for v in node.operands if v is not None]
            given = [f"{name}={attribute_text(value)}" for name, value in node.op.attributes.items()]
            text = f"{node.op.name}({', '.join(read + given)})"
            # A value that is read twice would be written twice, and so would its operands, so the text could grow
            # exponentially.
            short = text if len(text) <= _LONGEST_OPERAND else f"{node.op.name}(...)"
            texts |= dict.fromkeys(node.results, short)
        return text


def is_decoded_once(node: Node) -> bool:
    """Return True if a node decodes quantized weights, or concatenates or slices them: `bind` does that without a
    kernel.

    Return False for constants, which are not hoisted.
    """
    encoded = any(v.type.encoding is not None for v in (*node.inputs, *node.results))
    return encoded and all(map(is_made_of_weights, node.results)) and any(v.kind == "parameter" for v in _sources(node))


def _sources(node: Node) -> set[Value]:
    """Return the values that a node depends on and that no node of its function produces."""
    seen: set[Value] = set()
    waiting = list(node.inputs)
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += each.node.inputs if each.node is not None else ()
    return {value for value in seen if value.node is None}


def recipes_of(graph: Graph) -> dict[str, Recipe]:
    """Return the recipe of each parameter that `bind` derives for other entries, by name, in the order of their
    parameters.
    """
    if graph.bind is None:
        return {}
    bind = inline_function(graph, graph.bind)
    position: dict[Node | Value, int] = {node: i for i, node in enumerate(bind.nodes)}
    position |= {value: i for i, value in enumerate(bind.parameters.values())}
    read = graph.entry_parameters
    return {name: _recipe(bind.outputs[name], position) for name in read if name in bind.outputs}


def notes_on(made: Mapping[str, Recipe]) -> Iterator[str]:
    """Yield a line for each derived parameter, except weights that only have another layout."""
    for name, recipe in made.items():
        if recipe.nodes:
            yield on_one_line(f"{name} = {recipe}")


def refuse_large(graph: Graph, recipes: Mapping[str, Recipe]) -> None:
    """Raise BackendError if less memory is free than the numbers of derived weights need, such as weights that a
    backend without kernels for their blocks decodes.
    """
    needed = sum(recipe.result.type.storage_type.bytes_at({}) for recipe in recipes.values() if recipe.nodes)
    free = free_memory() if needed else None  # reading the system's files takes a part of compiling a small model
    if free is not None and needed > free:
        decodes = any(node.op.decodes for recipe in recipes.values() for node in recipe.nodes)
        raise BackendError(
            f"the weights that are derived for {printable(graph.name)} need more memory than is free",
            received=f"{needed:,} bytes are required, {free:,} are free",
            hint=Hint('backend="tvm", which reads quantized weights', "--backend tvm, which reads quantized weights")
            if decodes
            else "a smaller configuration of the model",
        )


def _recipe(value: Value, position: Mapping[Node | Value, int]) -> Recipe:
    layout = value.layout
    if value.node is not None and isinstance(value.node.op, Relayout):
        (value,) = value.node.inputs
    needed: set[Node] = set()
    waiting = [value]
    sources: set[Value] = set()
    while waiting:
        each = waiting.pop()
        if each.kind == "parameter":
            sources.add(each)
        elif each.node is not None and each.node not in needed:
            needed.add(each.node)
            waiting.extend(each.node.inputs)
    nodes = tuple(sorted(needed, key=position.__getitem__))
    return Recipe(value, nodes, {v.name: v for v in sorted(sources, key=position.__getitem__)}, layout)


def as_numpy_weight(value: Any) -> Array:
    """Return a weight as a NumPy array in CPU memory; a bf16 tensor as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _constant(value: Value) -> Array:
    assert value.literal is not None
    return value.literal.array


def _only_rounds(node: Node) -> bool:
    """Return True if a node is a cast from float32 to bf16. The cast happens when its result is stored."""
    return isinstance(node.op, Cast) and node.op.to is bf16 and node.inputs[0].type.dtype is f32


def _stored(array: Any, value: Value) -> Array:
    if value.type.dtype is bf16:
        return widened(rounded(np.asarray(array, np.float32)))
    return np.asarray(array, value.type.storage_type.dtype.numpy)


def _operand(value: Value, texts: Mapping[Value, str]) -> str:
    if value.literal is None:
        return texts[value]
    return str(value.literal.scalar) if value.literal.shape == () else str(value.literal.type)
