"""Write an ONNX graph: nodes on tensors; unsupported dtypes are widened, equal nodes are written once.

    w = OnnxWriter(graph, opset=17)
    y = w.add("MatMul", x, w.add("Transpose", weight, perm=[1, 0]))

An operator's types are read from its schema at the opset. If it does not support a dtype, it is applied in a wider one
between two casts, which gives the same numbers: integers wrap around, and 16-bit floats are rounded once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.backends.onnx.quantized_weights import QuantizedTensors
from treadle.backends.onnx.schemas import CODES, NAMED, NARROW, WIDER, OperatorSchema, schema_of
from treadle.backends.onnx.spelled_line import OnnxLine, OnnxNode, Tensor, plain
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.sizing.sizes import Quotient, Size
from treadle.ir.source_lines import SourceLine
from treadle.ir.types import DType, Type, i64
from treadle.passes.capabilities import Keeps

NAMED |= {f"tensor(float{ours[1:]})": dtype for ours, (_, dtype) in NARROW.items()}


def refusal(node: Node, what: str, hint: str | None = None, *, within: Node | None = None) -> BackendError:
    """Return the error that a node has no form.

    within  the node of the user's that it is a part of, if that is another one
    """
    outer, types = within or node, ", ".join(str(v.type) for v in node.inputs)
    return BackendError(
        f"{node.op.name}: {what}",
        received=f"{node.op.name}({types})",
        source=describe_source(outer.source, outer.scope),
        hint=hint,
    )


def newer_opset(oldest: int) -> Hint:
    """Return the hint to write an operator set of this version or a newer one."""
    return Hint(f"opset={oldest}, or newer", f"--opset {oldest}, or newer")


class OnnxWriter:
    """Collects the nodes and constants of one ONNX graph.

    opset      the version of the standard's operators
    keeps      returns True for composites that `spell` emits themselves
    spell      adds a node of ours, and returns its results
    nodes      in order
    constants  the tensor of each constant, by its content
    types      our type of each tensor that is the result of a node of ours
    """

    def __init__(self, graph: Graph, opset: int, keeps: Keeps, spell: Callable[[OnnxLine], list[Tensor]]) -> None:
        self.graph, self.opset, self.keeps, self.spell = graph, opset, keeps, spell
        self.nodes: list[OnnxNode] = []
        self.constants: dict[Literal, Tensor] = {}
        self.symbols: dict[str, Tensor] = {}
        """The size of each requested symbol, i64[1]."""
        self.sources: list[tuple[Tensor, tuple[Size, ...]]] = []
        """The arguments of the graph, whose dimensions determine the symbols."""
        self.types: dict[Tensor, Type] = {}
        self.quantized: dict[Value, QuantizedTensors] = {}
        """The weights that DequantizeLinear reads."""
        self._names: set[str] = set()
        self._written: dict[tuple[Any, ...], OnnxNode] = {}
        self._writing: list[Node] = []
        """The node of the graph that is being written, and the nodes that its code writes, the innermost last."""

    # -- names -----------------------------------------------------------------------------------------------

    def name(self, wanted: str) -> str:
        """Return the name, or a similar one that is unused."""
        base = name = plain(wanted) or "value"
        count = 1
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def refusal(self, what: str, hint: str | None = None) -> BackendError:
        """Return the error that the node being written has no form."""
        if not self._writing:
            return BackendError(what, hint=hint)
        return refusal(self._writing[-1], what, hint, within=self._writing[0])

    # -- functions of ours -----------------------------------------------------------------------------------

    def write(self, function: Function, tensors: dict[Value, Tensor]) -> None:
        """Write the nodes of a function without calls, of kept ops and primitives, whose arguments are `tensors`.

        Adds its results to `tensors`. Raises BackendError for an op without a form.
        """
        for node in function.nodes:
            self._writing.append(node)
            known = len(self.nodes)
            made = self.spell(
                OnnxLine(self, node, [None if v is None else self.tensor(v, tensors) for v in node.operands])
            )
            fresh = {t for added in self.nodes[known:] for t in added.outputs}
            for value, tensor in zip(node.results, made, strict=True):
                tensors[value] = tensor
                if tensor in fresh and tensor not in self.types:
                    tensor.name = self.name(f"{self._scope}.{value.name}".lstrip("."))
                    self.types[tensor] = value.type
            self._writing.pop()

    def tensor(self, value: Value, tensors: Mapping[Value, Tensor]) -> Tensor:
        """Return the tensor of a value of ours."""
        return tensors[value] if value.literal is None else self.literal(value.literal)

    @property
    def _scope(self) -> str:
        return self._writing[0].scope if self._writing else ""

    # -- nodes -----------------------------------------------------------------------------------------------

    def add(self, op_type: str, *inputs: Tensor | None, dtype: DType | None = None, **attributes: Any) -> Tensor:
        """Apply an operator, and return its first result. See `add_all`."""
        return self.add_all(op_type, *inputs, dtype=dtype, results=1, **attributes)[0]

    def add_all(
        self, op_type: str, *inputs: Tensor | None, dtype: DType | None = None, results: int, **attributes: Any
    ) -> tuple[Tensor, ...]:
        """Apply an operator, and return its first `results` results.

        dtype  the dtype of the results, if it does not follow from the operator's inputs (Cast)

        Raises BackendError if the opset lacks the operator, or it supports no dtype that represents the inputs'.
        """
        schema = schema_of(op_type, self.opset)
        if schema is None:
            raise self.refusal(f"opset {self.opset} has no {op_type}")
        variables = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(inputs))]
        own = {v: x.dtype for v, x in zip(variables, inputs, strict=True) if x is not None}
        wide = {v: self._taken(op_type, schema, v, d) for v, d in own.items()}
        given = tuple(x if x is None else self.cast(x, wide[v]) for v, x in zip(variables, inputs, strict=True))
        made = []
        for variable in schema.outputs[:results]:
            only = schema.allowed.get(variable, frozenset())
            known = wide.get(variable) or NAMED.get(variable) or (next(iter(only)) if len(only) == 1 else dtype)
            assert known is not None, f"{op_type} needs dtype="
            made.append(known)
        node = self._placed(op_type, given, made, attributes)
        returned = [own.get(v, t.dtype) for v, t in zip(schema.outputs, node.outputs, strict=False)]
        return tuple(self.cast(t, d) for t, d in zip(node.outputs, returned, strict=True))

    def cast(self, x: Tensor, to: DType) -> Tensor:
        """Return x in another dtype; x itself if it has that dtype."""
        return x if x.dtype is to else self.add("Cast", x, dtype=to, to=CODES[to.name][0])

    def _taken(self, op_type: str, schema: OperatorSchema, variable: str, dtype: DType) -> DType:
        allowed = schema.allowed.get(variable)
        if allowed is None or dtype in allowed:
            return dtype
        for wider in WIDER.get(dtype, ()):
            if wider in allowed:
                return wider
        raise self.refusal(f"ONNX has no {op_type} of {dtype} at opset {self.opset}", hint="another dtype, or opset")

    def _placed(
        self, op_type: str, inputs: tuple[Tensor | None, ...], dtypes: Sequence[DType], attributes: Mapping[str, Any]
    ) -> OnnxNode:
        """Return the node of this content. All operators are functions, so an equal existing node is reused."""
        fixed = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(attributes.items()))
        key = (op_type, inputs, fixed, tuple(dtypes))
        found = self._written.get(key)
        if found is None:
            name = self.name(f"{self._scope}.{op_type}".lstrip("."))
            outputs = tuple(Tensor(name if i == 0 else self.name(f"{name}.{i}"), d) for i, d in enumerate(dtypes))
            line = _line_text(self._writing[0].source) if self._writing else ""
            scope = plain(self._scope)
            found = self._written[key] = OnnxNode(op_type, name, inputs, outputs, dict(fixed), line, scope)
            self.nodes.append(found)
        return found

    def handed_on(self, x: Tensor, name: str) -> Tensor:
        """Return x under another name, which is already reserved for it."""
        made = Tensor(name, x.dtype)
        self.nodes.append(OnnxNode("Identity", self.name(f"{name}.Identity"), (x,), (made,), {}))
        return made

    # -- constants -------------------------------------------------------------------------------------------

    def literal(self, literal: Literal) -> Tensor:
        """Return a constant; equal ones share a tensor."""
        found = self.constants.get(literal)
        if found is None:
            shown = f".{literal.scalar}" if literal.shape == () else ""
            found = self.constants[literal] = Tensor(self.name(f"constant{shown}"), literal.dtype)
        return found

    def constant(self, value: Any, dtype: DType) -> Tensor:
        """Return a number or an array as a constant."""
        return self.literal(Literal.of(value, dtype))

    def integers(self, *values: int) -> Tensor:
        """Return i64[n]: the axes, starts or sizes that an operator takes as an input. Raises BackendError for numbers
        past i64.
        """
        if any(not -(2**63) <= value < 2**63 for value in values):
            raise self.refusal(f"{max(values, key=abs)} is out of range for int64, the dtype of ONNX's axes and sizes")
        return self.constant(np.array(values, np.int64), i64)

    # -- sizes -----------------------------------------------------------------------------------------------

    def vector(self, sizes: Sequence[Size | int]) -> Tensor:
        """Return the sizes as i64[n], a constant if none contains a symbol."""
        pieces: list[Tensor] = []
        run: list[int] = []
        for size in map(Size.of, sizes):
            if size.constant is not None:
                run.append(size.constant)
                continue
            pieces += [self.integers(*run)] if run else []
            pieces.append(self._size(size))
            run = []
        if run or not pieces:
            pieces.append(self.integers(*run))
        return pieces[0] if len(pieces) == 1 else self.add("Concat", *pieces, axis=0)

    def scalar(self, size: Size, dtype: DType = i64) -> Tensor:
        """Return a size as a tensor of rank 0."""
        if size.constant is not None:
            return self.constant(size.constant, dtype)
        return self.cast(self.add("Squeeze", self._size(size), self.integers(0)), dtype)

    def counted(self, size: Size) -> Tensor:
        """Return i64[size]: the numbers from 0."""
        return self.add("Range", self.constant(0, i64), self.scalar(size), self.constant(1, i64))

    def may_be_empty(self, size: Size) -> bool:
        """Return True if the size is 0 for some values of the symbols."""
        return size.bounds(self.graph.symbols).lower < 1

    def _size(self, size: Size) -> Tensor:
        """Return a size as i64[1]."""
        if size.constant is not None:
            return self.integers(size.constant)
        total: Tensor | None = None
        for atoms, coefficient in size.terms:
            made: Tensor | None = None
            for atom in atoms:
                factor = self._quotient(atom) if isinstance(atom, Quotient) else self._symbol(atom)
                made = factor if made is None else self.add("Mul", made, factor)
            if made is None:
                made = self.integers(abs(coefficient))
            elif abs(coefficient) != 1:
                made = self.add("Mul", made, self.integers(abs(coefficient)))
            if total is None:
                total = made if coefficient > 0 else self.add("Neg", made)
            else:
                total = self.add("Add" if coefficient > 0 else "Sub", total, made)
        assert total is not None  # a size without terms is the constant 0
        return total

    def _quotient(self, atom: Quotient) -> Tensor:
        """Emit a floor division. ONNX divides towards zero, which is the floor if both are positive; else the
        remainder is subtracted first.
        """
        numerator, denominator = self._size(atom.numerator), self._size(atom.denominator)
        least = [s.bounds(self.graph.symbols).lower for s in (atom.numerator, atom.denominator)]
        if least[0] < 0 or least[1] < 1:
            numerator = self.add("Sub", numerator, self.add("Mod", numerator, denominator))
        return self.add("Div", numerator, denominator)

    def _symbol(self, symbol: str) -> Tensor:
        if symbol not in self.symbols:
            self.symbols[symbol] = self._solved(symbol)
        return self.symbols[symbol]

    def _solved(self, symbol: str) -> Tensor:
        """Return the size of a symbol from a dimension S of an argument, else from one of the form c*S + d."""
        for bare in (True, False):
            for tensor, shape in self.sources:
                for position, size in enumerate(shape):
                    linear = size.as_linear
                    if linear is None or linear[0] != symbol or bare != (linear[1:] == (1, 0)):
                        continue
                    _, coefficient, offset = linear
                    made = self._dimension(tensor, position)
                    made = self.add("Sub", made, self.integers(offset)) if offset else made
                    return self.add("Div", made, self.integers(coefficient)) if coefficient != 1 else made
        raise BackendError(
            f"{self.graph.name} needs the size of {symbol}, which no input's dimensions determine",
            received=", ".join(f"{v.name}: {v.type}" for v in self.graph.main.inputs),
            hint=f"an input with a dimension {symbol}",
        )

    def _dimension(self, tensor: Tensor, position: int) -> Tensor:
        if self.opset >= 15:
            return self.add("Shape", tensor, start=position, end=position + 1)
        return self.add("Gather", self.add("Shape", tensor), self.integers(position), axis=0)


def _line_text(source: SourceLine | None) -> str:
    """Return `gpt2.py:41`, never an absolute path: a file must not contain the place where it was exported."""
    if source is None:
        return ""
    absolute = os.path.isabs(source.file) or re.match(r"[A-Za-z]:[\\/]", source.file)
    file = re.split(r"[\\/]", source.file)[-1] if absolute else source.file
    return f"{plain(file)}:{source.line}"
