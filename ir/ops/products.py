"""Sums of products: matmul, linear and einsum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Op, Operand, Primitive
from treadle.ir.ops.along_axes import wide_array
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.samples import S
from treadle.ir.types import DType, Type, f32
from treadle.ir.wording.marked_text import marked, marked_name


class MixedProduct(Op):
    """Base of products with weights. The result may have another dtype than the operands.

    to   the dtype of the result and the bias, in which products are summed; None: the dtype of the operands
    """

    to: DType | None

    def multiplies(self, count: int) -> tuple[int, ...]:
        """Return the positions, among `count` operands, of the matrices by which the first operand is multiplied."""
        return (1,)

    def dtype_rule(self, factors: int, biases: int, results: int = 1) -> str:
        """Return the dtype rule for these numbers of multiplied operands, biases and results, in this order."""
        to = "f" if self.to is None else str(self.to)
        return f"{', '.join(['f'] * factors + [to] * biases)} -> {', '.join([to] * results)}"

    def summed(self, x: Any) -> Any:
        """Return the NumPy dtype of the result for a first operand x."""
        return x.dtype if self.to is None else self.to.numpy or np.float32

    def wide(self, operands: Sequence[Expr]) -> list[Expr]:
        """Return the operands cast to the result's dtype, in which gradients are computed."""
        return [x if self.to is None or x.dtype is self.to else x.cast(self.to) for x in operands]

    def narrowed(self, grads: Sequence[Expr], operands: Sequence[Expr]) -> list[Expr]:
        """Return gradients cast to their operands' dtypes."""
        return [g if g.dtype is x.dtype else g.cast(x.dtype) for g, x in zip(grads, operands, strict=True)]


def contraction_gradient(
    b: Builder, application: Application, grad: Expr, operands: Sequence[Expr | None]
) -> list[Expr]:
    """Return the gradient of a sum of products by each operand: the sum of `grad` times the other operands.

    application is the op's rule applied to the operands; each dimension in it must be a single factor. If the result
    lacks an axis of only one operand, the axis is broadcast in that operand's gradient.
    """
    dotted = [name for name in application.factors if name.startswith("...")]
    names = {name: name for name in application.factors}
    names |= dict(zip(dotted, axis_letters(len(dotted), names), strict=True))
    result = _names(application.results[0], names)
    axes = [_names(dims or (), names) for dims in application.operands]
    present = [(x, held) for x, held in zip(operands, axes, strict=False) if x is not None]
    terms = [(_squeezed(b, x, held), [n for n in held if n != "1"]) for x, held in present]

    def one(position: int) -> Expr:
        x, wanted = present[position]
        factors = [(grad, result), *terms[:position], *terms[position + 1 :]]
        reached = {n for _, held in factors for n in held}
        made, kept = grad, result
        if len(factors) > 1:
            kept = [n for n in wanted if n in reached]
            left = ", ".join(" ".join(held) for _, held in factors)
            made = b.einsum(*[y for y, _ in factors], equation=f"{left} -> {' '.join(kept)}")
        if kept != wanted:
            made = b.rearrange(
                made, pattern=f"{' '.join(kept)} -> {' '.join(n if n in reached else '1' for n in wanted)}"
            )
        return made if made.type == x.type else b.expand(made, shape=x.shape)

    return [one(position) for position in range(len(present))]


def _names(dims: Sequence[AxisDim], names: dict[str, str]) -> list[str]:
    """Return the name of each dimension. It is "1" for a broadcast dimension, which lacks the axis."""
    return [names[d.factors[0]] if d.factors else "1" for d in dims]


def _squeezed(b: Builder, x: Expr, held: list[str]) -> Expr:
    if "1" not in held:
        return x
    return b.rearrange(x, pattern=f"{' '.join(held)} -> {' '.join(n for n in held if n != '1')}")


@op("matmul", axes="... m k, ... k n -> ... m n", linear="x | y", flops=2)
class MatMul(MixedProduct, Primitive):
    """z[..., m, n] = sum_k x[..., m, k] y[..., k, n]

    Leading dimensions broadcast. A vector needs an explicit second axis: use rearrange, or einsum.

    to   the result's dtype, in which floats are summed; None: the dtype of x and y
    """

    x = Operand()
    y = Operand()
    to: DType | None = None
    accumulates = f32

    def dtypes(self) -> str:
        return "n, n -> n" if self.to is None else self.dtype_rule(2, 0)

    def reference(self, x: Any, y: Any) -> Any:
        return np.matmul(wide_array(x), wide_array(y)).astype(self.summed(x))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,) = grads
        made = contraction_gradient(b, self.apply([x.type for x in inputs]), g, self.wide(inputs))
        return self.narrowed(made, inputs)

    samples = [
        S("f32[2,3]", "f32[3,4]"),
        S("f32[2,3,4]", "f32[2,4,5]"),
        S("f32[2,1,3,4]", "f32[5,4,2]"),
        S("f32[3,1]", "f32[2,1,3]"),
        S("i64[2,3]", "i64[3,2]"),
        S("f16[2,3]", "f16[3,4]", to="f32"),
    ]
    errors = [
        (S("i64[2,3]", "i64[3,2]", to="f32"), "x must be a float"),
        (S("f32[2,3]", "f32[4,5]"), "axis k sizes disagree: 3 in x, 4 in y"),
        (S("f32[3]", "f32[3,4]"), "x must have rank 2 or more"),
        (S("f32[2,3]", "f64[3,4]"), "dtypes disagree"),
    ]


@op("linear", axes="... k, n k, n -> ... n", linear="x bias | weight bias", flops=2)
class Linear(MixedProduct, Primitive):
    """y[..., n] = sum_k x[..., k] weight[n, k] + bias[n]

    The weight is [out, in], as in PyTorch checkpoints (torch.nn.functional.linear).

    to   the dtype of the result and the bias, in which products are summed; None: the dtype of x and the weight
    """

    x = Operand()
    weight = Operand()
    bias = Operand(optional=True)
    to: DType | None = None
    accumulates = f32

    def dtypes(self) -> str:
        return self.dtype_rule(2, 1)

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        y = np.matmul(wide_array(x), wide_array(weight).T)
        return (y if bias is None else y + bias).astype(self.summed(x))

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x, weight, bias) = grads, inputs
        application = self.apply([None if v is None else v.type for v in inputs])
        made = self.narrowed(contraction_gradient(b, application, g, self.wide([x, weight])), [x, weight])
        if bias is None:
            return [*made, None]
        return [*made, b.reduce_sum(g, axes=tuple(range(g.rank - 1)), keep=False) if g.rank > 1 else g]

    samples = [
        S("f32[2,3,4]", "f32[5,4]", "f32[5]"),
        S("f32[3,4]", "f32[5,4]", None),
        S("f32[4]", "f32[5,4]", "f32[5]"),
        S("f16[2,3,4]", "f16[5,4]", "f32[5]", to="f32"),
    ]
    errors = [
        (S("f16[2,3]", "f16[4,3]", "f16[4]", to="f32"), "bias must be f32, is f16"),
        (S("f32[2,3]", "f32[3,4]", None), "axis k sizes disagree: 3 in x, 4 in weight"),
        (S("f32[2,3]", "f32[4,3]", "f32[3]"), "axis n sizes disagree: 4 in weight, 3 in bias"),
    ]


def _operands(count: int) -> str:
    return f"{count} operand" + "s" * (count != 1)


def _refuse_letters(equation: str, types: Sequence[Type | None]) -> None:
    """Raise RuleError for adjacent letters, which NumPy reads as one axis each. Here they are one name."""
    left, arrow, right = equation.partition("->")
    terms = [term.strip() for term in left.split(",")]
    ranks = [None if type is None else type.rank for type in types]
    if arrow and [len(term) for term in terms] == ranks and max(map(len, terms)) > 1 and "".join(terms).isalpha():
        spaced = f"{', '.join(map(' '.join, terms))} -> {' '.join(right.replace(' ', ''))}".rstrip()
        raise RuleError("axes must be separated by spaces", within=marked(equation, 1), hint=f'equation="{spaced}"')


@op("einsum", dtypes="n* -> n", flops=2)
class Einsum(Primitive):
    """z = the product of the operands, summed over all axes that the result does not name

    equation   "b h s d, b h t d -> b h s t": one name per axis, separated by spaces, as in einops (Rogozhnikov
               2022); `...` stands for leading dimensions that broadcast. A name occurs only once in an operand:
               diagonals are not supported.
    """

    x = Operand(variadic=True)
    equation: str
    accumulates = f32

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        return self.equation

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        """The op is linear in each operand alone."""
        count = len(self.equation.partition("->")[0].split(","))
        return tuple(frozenset([name]) for name in self.operand_names(count))

    def check(self, types: Sequence[Type | None]) -> None:
        text = self.equation
        _refuse_letters(text, types)
        rule = parse_rule(text)
        if len(rule.results) != 1:
            raise RuleError(
                "an equation must have exactly one result", within=marked(text, text.index(",", text.index("->")))
            )
        if len(rule.operands) != len(types):
            raise RuleError(
                f"before '->' the equation has {_operands(len(rule.operands))}, but {len(types)} are passed",
                within=marked(text, text.index("->")),
                hint='separate operands by commas, and their axes by spaces: "b s d, b t d -> b s t"',
            )
        plain = all(f.role is Role.MAPPED or f.monoid == "sum" for f in rule.factors.values())
        for pattern in (*rule.operands, *rule.results):
            dims = [d for d in pattern if isinstance(d, AxisDim)]
            if rule.known_sizes or not plain or any(len(d.factors) != 1 for d in dims):
                raise RuleError(
                    "an equation consists of names and `...` only",
                    within=self.equation,
                    hint="rearrange splits and joins axes",
                )
            names = [d.factors[0] for d in dims]
            repeated = [n for n in names if names.count(n) > 1]
            if repeated:
                raise RuleError(f"axis {repeated[0]} occurs twice in one operand", within=self._repeated(repeated[0]))

    def _repeated(self, name: str) -> str:
        """Return the location where an operand, or the result, repeats a name."""
        start = 0
        for part in re.split(r",|->", self.equation):
            if len(re.findall(rf"(?<!\w){name}(?!\w)", part)) > 1:
                break
            start = self.equation.index(part, start) + len(part)
        return marked_name(self.equation, name, of=1, after=start)

    def reference(self, *operands: Any) -> Any:
        application = self.apply([f32[x.shape] for x in operands])
        numbers = {name: number for number, name in enumerate(application.factors)}
        arguments: list[Any] = []
        for x, dims in zip(operands, application.operands, strict=True):
            held = [(numbers[d.factors[0]], n) for d, n in zip(dims or (), x.shape, strict=True) if d.factors]
            arguments += [wide_array(x).reshape([n for _, n in held]), [number for number, _ in held]]
        made = np.einsum(*arguments, [numbers[d.factors[0]] for d in application.results[0]])
        return made.astype(operands[0].dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,) = grads
        return contraction_gradient(b, self.apply([x.type for x in inputs]), g, inputs)

    samples = [
        S("f32[2,3,4,5]", "f32[2,3,6,5]", equation="b h s d, b h t d -> b h s t"),
        S("f32[2,3]", "f32[3,4]", "f32[4,2]", equation="i j, j k, k l -> i l"),
        S("f32[2,3,4]", equation="i j k -> k i"),
        S("f32[3,4]", "f32[3]", equation="i j, i -> i"),
        S("f32[3]", "f32[3]", equation="i, i ->"),
        S("f32[2,1,3]", "f32[4,3,5]", equation="... d, ... d e -> ... e"),
        S("f32[2,3,4]", "f32[4,5]", equation="b ... d, d e -> b ... e"),
        S("f32[3]", equation="i ->"),
        S("i64[2,3]", "i64[3]", equation="i j, j -> i"),
        S("f32[2,3]", equation="i j -> j i"),
    ]
    errors = [
        (S("f32[2,3]", "f32[4,5]", equation="i j, j k -> i k"), "axis j sizes disagree"),
        (S("f32[2,2]", equation="i i -> i"), "axis i occurs twice in one operand"),
        (S("f32[2,3]", equation="i [j] -> i [j]"), "names and `...` only"),
        (S("f32[2,3]", equation="i j -> i k"), "axis k is after '->', and in no operand"),
    ]
