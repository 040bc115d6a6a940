"""Ops that read and write blocks: from an encoding to the numbers that it means, and back.

    decode       "... [k] -> ... [k]"      k is the axis along which blocks lie
    encode       "... [k] -> ... [k]"

Their references take and give held arrays (`treadle.ir.encodings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.ir.attribute_values import attribute_codec
from treadle.ir.axes import Application
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Operand, Primitive
from treadle.ir.ops.axis_names import axis_letters, place
from treadle.ir.types import Type


def _read(value: Encoding | str) -> Encoding:
    return value if isinstance(value, Encoding) else parse_encoding(value)


attribute_codec("Encoding", _read, "Encoding | str")


def _along_blocks(axis: int, ranks: Sequence[int | None]) -> str:
    names = list(axis_letters(ranks[0] or 0))
    axis = place(axis, len(names))
    names[axis] = f"[{names[axis]}]"
    return f"{' '.join(names)} -> {' '.join(names)}"


@op("decode", dtypes="f -> f")
class Decode(Primitive):
    """y = the numbers that the blocks of x mean

    of  the encoding of x (`treadle.ir.encodings`)

    A weight that is decoded is a weight to every pass. A backend whose kernel reads the blocks keeps them; others
    decode once, when weights are bound.
    """

    is_word = False
    decodes = True
    x = Operand()
    of: Encoding

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return _along_blocks(self.of.axis, ranks)

    def encodings(self, types: Sequence[Type | None], found: Application) -> Sequence[Encoding | None]:
        (x,) = types
        assert x is not None
        if x.encoding is None or x.as_encoded(self.of).encoding != x.encoding:
            raise RuleError(f"x is not encoded as {self.of}", received=str(x))
        return [None]

    def multiples(self, types: Sequence[Type | None], found: Application) -> Mapping[str, int]:
        """Blocks are decoded one by one; a form whose block is a whole line has no parts."""
        (dims,), elements = found.operands, self.of.block.elements
        return {} if elements is None or dims is None else dict.fromkeys(dims[self.of.axis].factors, elements)

    def reference(self, x: Any) -> Any:
        return self.of.decode(x)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        raise GraphError(
            f"what is encoded as {self.of} has no gradient: its blocks hold whole numbers",
            hint="a model whose weights are not quantized",
        )


@op("encode", dtypes="f -> f")
class Encode(Primitive):
    """y = x in blocks: each number is one near to x that the blocks can hold

    to  the encoding of the result (`treadle.ir.encodings`), of a form that can be written
    """

    is_word = False
    x = Operand()
    to: Encoding

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return _along_blocks(self.to.axis, ranks)

    def encodings(self, types: Sequence[Type | None], found: Application) -> Sequence[Encoding | None]:
        (x,) = types
        assert x is not None
        if x.encoding is not None:
            raise RuleError(f"x is encoded as {x.encoding} already", hint="decode it first")
        if not self.to.block.encodes:
            raise RuleError(f"{self.to.form} is read, and not written")
        return [self.to]

    def reference(self, x: Any) -> Any:
        return self.to.encode(x)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        raise GraphError(f"rounding to {self.to} has no gradient", hint="a model whose weights are not quantized")
