"""Several products of one value, computed as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Operand
from treadle.ir.ops.products import MixedProduct
from treadle.ir.ops.shapes import zeros
from treadle.ir.ops.weight_layouts import multiplied, refuse_weight_axes, rows_of
from treadle.ir.samples import S
from treadle.ir.types import DType, Type, f32

MOST_PROJECTIONS = 16


@op("projections")
class Projections(MixedProduct, Composite):
    """y_i[..., n_i] = sum_k x[..., k] weight_i[n_i, k] + bias_i[n_i], for each i

    Query, key and value of an attention (Vaswani et al. 2017, 3.2.2), for example. Operands: x, then the weights, then
    the bias of each product; the bias is absent if a product has none. Each weight keeps its name and its axes, so that
    heads can be split. At run time there is one product with all weights concatenated, which a backend concatenates
    once, and the result of the product is split.

    count        the number of products, 2 to 16
    weight_axes  "n k", as the weight of linear, or "k n", as the weight of matmul
    to           the dtype of results and biases, in which products are summed; None: the dtype of x and the weights
    """

    x = Operand()
    operand = Operand(optional=True, variadic=True)
    count: int = 2
    weight_axes: str = "n k"
    to: DType | None = None
    accumulates = f32

    def multiplies(self, count: int) -> tuple[int, ...]:
        return tuple(range(1, 1 + self.count))

    def operand_names(self, count: int) -> list[str]:
        names = ["x", *(f"{name}{n}" for name in ("weight", "bias") for n in range(self.count))]
        return [*names, *(f"operand{n}" for n in range(len(names), count))][:count]

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        """The op is linear in x and the biases together, and in the weights and the biases together."""
        _, *others = self.operand_names(1 + 2 * self.count)
        weights, biases = others[: self.count], others[self.count :]
        return frozenset(("x", *biases)), frozenset((*weights, *biases))

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        rows = rows_of(self.weight_axes)
        outs = [f"n{i}" for i in range(self.count)]
        weights = [f"{n} [k]" if self.weight_axes == "n k" else f"[k] {n}" for n in outs]
        return f"{', '.join([f'{rows} [k]', *weights, *outs])} -> {', '.join(f'{rows} {n}' for n in outs)}"

    def dtypes(self) -> str:
        return self.dtype_rule(1 + self.count, self.count, self.count)

    def check(self, types: Sequence[Type | None]) -> None:
        if not 2 <= self.count <= MOST_PROJECTIONS:
            raise RuleError(f"computes 2 to {MOST_PROJECTIONS} products, not {self.count}")
        refuse_weight_axes(self.weight_axes)
        if len(types) != 1 + 2 * self.count:
            raise RuleError(
                f"takes x, {self.count} weights and {self.count} biases, received {len(types)} operands",
                hint="none for an absent bias",
            )
        if None in types[1 : 1 + self.count]:
            raise RuleError("a weight is missing")

    def body(self, b: Builder, x: Expr, *operands: Expr | None) -> Any:
        weights, biases = operands[: self.count], operands[self.count :]
        pairs = zip(weights, biases, strict=True)
        return tuple([multiplied(b, x, w, bias, self.weight_axes, self.to) for w, bias in pairs if w is not None])

    def lowering(self, b: Builder, x: Expr, *operands: Expr | None) -> Any:
        """Build slices of one product: x (w_0 | w_1 | ...) + (b_0 | b_1 | ...)"""
        weights = [w for w in operands[: self.count] if w is not None]
        biases = operands[self.count :]
        axis = self.weight_axes.split().index("n")
        bias = None
        if any(v is not None for v in biases):
            known = [
                zeros(b, (self.to or w.dtype)[w.shape[axis]]) if v is None else v
                for w, v in zip(weights, biases, strict=True)
            ]
            bias = b.concat(*known, axis=0, name="bias")
        y = multiplied(b, x, b.concat(*weights, axis=axis, name="weight"), bias, self.weight_axes, self.to)
        made, start = [], weights[0].shape[axis] * 0
        for weight in weights:
            stop = start + weight.shape[axis]
            made.append(b.slice(y, axis=-1, start=start, stop=stop))
            start = stop
        return tuple(made)

    samples = [
        S("f32[2,3,4]", "f32[5,4]", "f32[2,4]", "f32[5]", "f32[2]"),
        S("f32[3,4]", "f32[5,4]", "f32[2,4]", "f32[2,4]", "f32[5]", None, "f32[2]", count=3),
        S("f32[4]", "f32[5,4]", "f32[2,4]", None, None),
        S("f32[2,3,4]", "f32[4,5]", "f32[4,2]", "f32[5]", None, weight_axes="k n"),
        S("f32[3,4]", "f32[4,5]", "f32[4,5]", "f32[4,1]", None, None, None, count=3, weight_axes="k n"),
        S("f16[3,4]", "f16[5,4]", "f16[2,4]", "f32[5]", None, to="f32"),
    ]
    errors = [
        (S("f32[2,3]", "f32[4,3]", "f32[4,2]", None, None), "axis k sizes disagree"),
        (S("f32[2,3]", "f32[4,3]", "f32[5,3]", "f32[5]", None), "axis n0 sizes disagree"),
        (S("f32[2,3]", "f32[4,3]", None, None, None), "a weight is missing"),
        (S("f32[2,3]", "f32[4,3]", None, count=1), "computes 2 to 16 products, not 1"),
        (S("f32[2,3]", "f32[4,3]", "f32[4,3]"), "takes x, 2 weights and 2 biases, received 3 operands"),
        (S("f32[2,3]", "f32[3,4]", "f32[3,4]", None, None, weight_axes="k"), "unknown weight_axes 'k'"),
    ]
