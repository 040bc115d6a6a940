"""What an import of an ONNX file gives: a graph, its weights, and notes of what was done."""

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
    """What an import did.

    opsets      the model's, by domain
    producer    the program that wrote the file, as it says
    inputs      the element type of each input in the file; `carrier` is its dtype in the graph
    outputs     the same of each output
    static      the static arguments that were given
    symbols     the symbol, or the size, that stands for each name of an axis in the file
    operators   how many nodes of each operator were imported, those of functions included
    folded      how many of them were evaluated at import
    opaque      the nodes whose reshapes could not be told apart into axes
    dead        how many nodes no output needs
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
    dead: int = 0


class Imported(NamedTuple):
    """A graph, its weights by name, and what the import did."""

    graph: Graph
    weights: dict[str, Array]
    notes: ImportNotes
