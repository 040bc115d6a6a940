"""Ops that read and write blocks: decoding, encoding, and products of blocks.

    decode           "... [k] -> ... [k]"      k is the axis of the blocks
    encode           "... [k], [k], , -> ... [k]"
    encoded_linear   "... [k], n [k], n -> ... n"
    group_linear     "... [k], n [k], n -> ... n"

Their references take and return held arrays (`treadle.ir.encodings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.attribute_values import attribute_codec
from treadle.ir.axes import Application
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.op_registry import find_op, op
from treadle.ir.operation import Composite, Grads, Operand, Primitive
from treadle.ir.ops.axis_names import axis_letters, place
from treadle.ir.types import DType, Type, bf16, f32


def _read(value: Encoding | str) -> Encoding:
    return value if isinstance(value, Encoding) else parse_encoding(value)


attribute_codec("Encoding", _read, "Encoding | str")


def _along_blocks(axis: int, ranks: Sequence[int | None]) -> str:
    names = list(axis_letters(ranks[0] or 0))
    axis = place(axis, len(names))
    names[axis] = f"[{names[axis]}]"
    return f"{' '.join(names)} -> {' '.join(names)}"


@op("decode", flops=0)
class Decode(Primitive):
    """y = the decoded numbers of the blocks of x

    of  the encoding of x (`treadle.ir.encodings`)
    to  the dtype of y, to which the numbers are rounded; None: the dtype of x

    Every pass treats a decoded weight as a weight. A backend with a kernel that reads the blocks keeps them; others
    decode once, when weights are bound.
    """

    is_word = False
    decodes = True
    x = Operand()
    of: Encoding
    to: DType | None = None

    def dtypes(self) -> str:
        return "f -> f" if self.to is None else f"f -> {self.to}"

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return _along_blocks(self.of.axis, ranks)

    def encodings(self, types: Sequence[Type | None], found: Application) -> Sequence[Encoding | None]:
        (x,) = types
        assert x is not None
        if x.encoding is None or x.as_encoded(self.of).encoding != x.encoding:
            raise RuleError(f"x is not encoded as {self.of}", received=str(x))
        return [None]

    def multiples(self, types: Sequence[Type | None], found: Application) -> Mapping[str, int]:
        """Return the number of elements in a block, for the axis of the blocks: each block is decoded independently.
        Return an empty mapping if a block is a whole line.
        """
        (dims,), elements = found.operands, self.of.block.elements
        return {} if elements is None or dims is None else dict.fromkeys(dims[self.of.axis].factors, elements)

    def reference(self, x: Any) -> Any:
        made = self.of.decode(x)
        return made if self.to is None else find_op("cast").make(to=self.to).reference(made)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        raise GraphError(
            f"a value encoded as {self.of} has no gradient: its blocks hold integers",
            hint="a model whose weights are not quantized",
        )


@op("encode", dtypes="f, f, f, f -> f")
class Encode(Primitive):
    """y = x by, encoded: each number is rounded to a value that the blocks can hold

    by     a vector over the axis of the blocks; None: all ones
    scale  the scale of every block of `uint8_rows`; None: each block has its own scale, from its numbers
    zero   the zero point that belongs to the scale, an integer from 0 to 255
    to     the encoding of the result (`treadle.ir.encodings`), of a form that can be encoded
    """

    is_word = False
    x = Operand()
    by = Operand(optional=True)
    scale = Operand(optional=True)
    zero = Operand(optional=True)
    to: Encoding

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        x, _, y = _along_blocks(self.to.axis, ranks).partition(" -> ")
        return f"{x}, {next(name for name in x.split() if name.startswith('['))}, , -> {y}"

    def encodings(self, types: Sequence[Type | None], found: Application) -> Sequence[Encoding | None]:
        x = types[0]
        assert x is not None
        if x.encoding is not None:
            raise RuleError(f"x is encoded as {x.encoding} already", hint="decode it first")
        if not self.to.block.encodes:
            raise RuleError(f"values cannot be encoded to {self.to.form}, which can only be read")
        scale, zero = (*types[2:], None, None)[:2]
        if (scale is None) != (zero is None):
            raise RuleError("a scale and a zero point belong together")
        if scale is not None and self.to.form != STEPS.form:
            raise RuleError(f"{self.to.form} takes no scale: each block has its own")
        return [self.to]

    def reference(self, x: Any, by: Any = None, scale: Any = None, zero: Any = None) -> Any:
        if by is not None:
            with np.errstate(all="ignore"):  # blocks with NaN or infinity are marked
                x = x * np.reshape(by, np.where(np.arange(x.ndim) == self.to.axis % x.ndim, -1, 1))
        if scale is not None:
            return _with_scale(x, self.to, np.float32(scale), np.float32(zero))
        return self.to.encode(x, computed=True)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        raise GraphError(f"rounding to {self.to} has no gradient", hint="a model whose weights are not quantized")


def _with_scale(x: Any, to: Encoding, scale: Any, zero: Any) -> Any:
    """Return values as `uint8_rows` of one scale and zero point. The scale of a row with a NaN is NaN."""
    lines = np.moveaxis(np.asarray(x, np.float32), to.axis, -1)
    made = np.empty(lines.shape[:-1], to.block.record(lines.shape[-1]))
    with np.errstate(all="ignore"):
        steps = np.minimum(np.maximum(np.rint(lines / scale) + zero, 0), 255)
    made["scale"] = np.where(np.isnan(lines).any(axis=-1), np.float32(np.nan), scale)
    made["zero"] = zero
    made["q"] = np.where(np.isnan(lines), zero, steps)
    held = made[..., None].view(np.uint8)
    return np.moveaxis(held, -1, to.axis)


ROWS = Encoding("int8_rows")
"""The encoding of weights in 8-bit rows, which `encoded_linear` multiplies with."""
STEPS = Encoding("uint8_rows")
"""The encoding of the other operand of weights in 8-bit rows, if that operand is computed."""
GROUPS_OF_4 = Encoding("int4_groups", 32)
GROUPS = Encoding("int8_groups", 32)
"""The encoding of the other operand of weights in blocks of other forms."""


def multiplied_with(weight: Encoding) -> tuple[Encoding, ...]:
    """Return the encodings in which the other operand may be multiplied with a weight in blocks along its last axis by
    integer products. The most precise encoding comes first.
    """
    block = weight.block
    if weight == ROWS:
        return STEPS, ROWS
    if not block.whole or weight.axis != -1:
        return ()
    return (GROUPS,) if block.elements is not None and block.elements % GROUPS.group == 0 else ()


def rounded_for(weight: Encoding) -> Encoding | None:
    """Return the encoding to which a pass rounds the other operand of a weight with this encoding. Return None if no
    pass rounds it.
    """
    return next(iter(multiplied_with(weight)), None)


@op("encoded_linear", axes="... [k], n [k], n -> ... n", dtypes="f, f, f -> f")
class EncodedLinear(Composite):
    """y[..., n] = sum_b s[..., b] (t[n, b] sum_k (q[..., k] - z) p[n, k] + c[n, b] sum_k q[..., k]) + bias[n]

    The inner sums are over k of the span b, for x = s (q - z) and weight = t p + c.

    of    the encoding of the weight: integers with scales, one per block, or per 16 or 32 elements of a block
    rows  the encoding of x: `int8_groups(32)`; for a weight in `int8_rows`, where a row is a block, x has the same
          encoding, or has rows with a zero point z (`uint8_rows`)

    Sums over elements that share all scales are sums of integers, and so exact in any order. They are rounded to
    float32 once; the sum of a whole row is multiplied by the product of the scales. The reference adds sums with
    different scales in float64, and rounds the total; kernels add them one after the other. Backends replace a linear
    of decoded operands by this op (`treadle.passes.lowering.multiply_blocks`), which has the same meaning.
    """

    is_word = False
    x = Operand()
    weight = Operand()
    bias = Operand(optional=True)
    of: Encoding = ROWS
    rows: Encoding = ROWS

    def encodings(self, types: Sequence[Type | None], found: Application) -> Sequence[Encoding | None]:
        if self.rows not in multiplied_with(self.of):
            raise RuleError(f"{self.rows} and {self.of} have no product of integers")
        of_x = (STEPS, ROWS) if self.rows == ROWS else (self.rows,)
        for name, taken, type in zip(("x", "weight"), (of_x, (self.of,)), types, strict=False):
            if type is None or type.encoding not in taken:
                raise RuleError(f"{name} is not encoded as {' or '.join(map(str, taken))}", received=str(type))
        return [None]

    def body(self, b: Builder, x: Expr, weight: Expr, bias: Expr | None) -> Any:
        return b.linear(b.apply(Decode, x, of=x.type.encoding), b.apply(Decode, weight, of=self.of), bias)

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        with np.errstate(invalid="ignore", over="ignore"):
            if self.of == ROWS:
                encoding = (
                    ROWS if x.shape[-1] == weight.shape[-1] else STEPS
                )  # rows with a zero point are a byte longer
                (q, s), (p, t) = _of_rows(x, encoding), _of_rows(weight, ROWS)
                y = (q @ p.T).astype(np.float32) * (s[..., None] * t)  # sums are exact below 2^53
            else:
                (q, s, _), (p, t, c) = _parts(x, self.rows), _parts(weight, self.of)
                y = _summed(q, s, p, t, c)
        return y if bias is None else y + bias


@op("group_linear", axes="... [k], n [k], n -> ... n", dtypes="bf16, f32, f32 -> f32")
class GroupLinear(Composite):
    """y[..., n] = sum_k x[..., k] bf16(w)[n, k] + bias[n]        for x in bf16 and a weight w in groups of 4 bits

    of   the encoding of the weight, `int4_groups`

    Backends with a kernel for it replace a linear of a decoded weight by this op
    (`treadle.passes.lowering.multiply_groups`). A kernel may round the scales to bf16 in place of the numbers.
    """

    is_word = False
    x = Operand()
    weight = Operand()
    bias = Operand(optional=True)
    of: Encoding = GROUPS_OF_4

    def encodings(self, types: Sequence[Type | None], application: Application) -> Sequence[Encoding | None]:
        weight = types[1]
        if self.of.form != GROUPS_OF_4.form or weight is None or weight.encoding != self.of:
            raise RuleError(f"weight is not encoded as {self.of}", received=str(weight))
        return [None]

    def body(self, b: Builder, x: Expr, weight: Expr, bias: Expr | None) -> Any:
        return b.linear(x, b.apply(Decode, weight, of=self.of, to=bf16), bias, to=f32)


def _of_rows(held: Any, encoding: Encoding) -> tuple[Any, Any]:
    """Return (q, s) of held rows: the integers minus their zero points, as float64, and the rows' scales."""
    lines = np.ascontiguousarray(held)
    record = lines.view(encoding.block.record(encoding.size(lines.shape[-1])))[..., 0]
    numbers = record["q"].astype(np.float64)
    return numbers if encoding == ROWS else numbers - record["zero"][..., None], record["scale"]


def _summed(q: Any, s: Any, p: Any, t: Any, c: Any) -> Any:
    """Return the sums of products of q [..., groups, 32] and p [n, k]. s are the scales of the groups of q; t and c [n,
    spans] are the scales and offsets of p.
    """
    k = p.shape[-1]
    span = k // max(1, t.shape[-1])
    step = max(1, min(span, q.shape[-1]))  # elements that share all scales
    y = np.zeros((*q.shape[:-2], len(p)), np.float64)
    q = q.reshape(*q.shape[:-2], k).astype(np.float64)
    for at in range(0, k, step):
        of_x = q[..., at : at + step]
        sums = (of_x @ p[:, at : at + step].astype(np.float64).T) * t[:, at // span].astype(np.float64)
        least = of_x.sum(axis=-1, keepdims=True) * c[:, at // span].astype(np.float64)
        y += s[..., at // GROUPS.group, None] * (sums + least)
    return y.astype(np.float32)


def _parts(held: Any, encoding: Encoding) -> tuple[Any, Any, Any]:
    """Split an array held in blocks along its last axis. Return its integers, [..., groups, 32] for rows and [n, k] for
    weights, their scales d, and their offsets c.
    """
    lines = np.ascontiguousarray(held)
    elements = encoding.elements(encoding.size(lines.shape[-1]))
    blocks = lines.view(encoding.block.record(elements))
    q, d, c = encoding.block.parts(blocks.reshape(-1))
    before = blocks.shape[:-1]
    q = q.reshape(*blocks.shape, elements) if encoding == GROUPS else q.reshape(*before, blocks.shape[-1] * elements)
    spans = blocks.shape[-1] * d.shape[-1]
    return q, d.reshape(*before, spans), c.reshape(*before, spans)
