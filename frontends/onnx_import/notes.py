"""The result of an ONNX import: a graph, its weights, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import treadle.frontends.onnx_import.rules.tables  # noqa: F401  (registers the operators)
from treadle.frontends.onnx_import.rules.elements import Element
from treadle.frontends.onnx_import.values import Array
from treadle.ir.graph import Graph
from treadle.ir.sizing.sizes import Size


@dataclass(frozen=True)
class ImportNotes:
    """Notes of an import.

    opsets      the model's opset for each domain
    producer    the program that wrote the file, as the file records it
    inputs      the element type of each input in the file; `carrier` is its dtype in the graph
    outputs     the element type of each output
    static      the static arguments
    symbols     the symbol, or the size, for each name of an axis in the file
    operators   number of imported nodes of each operator, including the nodes of functions
    folded      number of imported nodes that were evaluated at import
    opaque      the nodes whose reshapes could not be resolved into axes
    decoded     quantized matrices that are decoded when the file is read, with the reasons
    dead        number of nodes that no output needs
    """

    opsets: Mapping[str, int]
    producer: str
    inputs: dict[str, Element] = field(default_factory=dict)
    outputs: dict[str, Element] = field(default_factory=dict)
    static: dict[str, Array] = field(default_factory=dict)
    symbols: dict[str, Size] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)
    folded: Counter[str] = field(default_factory=Counter)
    opaque: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    dead: int = 0


class Imported(NamedTuple):
    """A graph, its weights by name, and the notes of the import."""

    graph: Graph
    weights: dict[str, Array]
    notes: ImportNotes
