"""ONNX operators that are sums of products: MatMul, Gemm, Einsum, Conv."""

from __future__ import annotations

import re
from functools import reduce

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.windows import kernel_sizes, windows_of
from treadle.frontends.recipes.matrix_products import matmul
from treadle.ir.builder import Expr
from treadle.ir.ops.axis_names import axis_letters


@operator("MatMul", latest=13)
def _matmul(site: OnnxSite) -> Made:
    return matmul(site.b, site.x(0), site.x(1))


@operator("Gemm", latest=13, first=7)
def _gemm(site: OnnxSite) -> Made:
    """alpha a b + beta c"""
    b, x, y, c = site.b, site.x(0), site.x(1), site.maybe(2)
    alpha, beta = site.float("alpha", 1.0), site.float("beta", 1.0)
    if x.rank != 2 or y.rank != 2:
        site.malformed("the operands must have rank 2")
    if site.int("transA", 0):
        x = b.rearrange(x, pattern="k m -> m k")
    turned = site.int("transB", 0)
    if not x.dtype.is_float and (alpha != 1 or beta != 1):
        site.refuse("integers with alpha or beta are not supported")
    plain = turned and alpha == 1 and x.dtype.is_float
    if plain and (c is None or (beta == 1 and c.rank == 1 and c.shape == y.shape[:1])):
        return b.linear(x, y, c)
    if plain:
        z = b.linear(x, y, None)
    else:
        z = b.matmul(x, b.rearrange(y, pattern="n k -> k n") if turned else y)
        z = z if alpha == 1 else z * alpha
    if c is None or beta == 0:
        return z
    return z + (c if beta == 1 else c * beta)


@operator("Einsum", latest=28)
def _einsum(site: OnnxSite) -> Made:
    """Einsum, with letters and `...`. A letter that is repeated in an operand takes its diagonal."""
    b, text = site.b, site.text("equation").replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(site.inputs) or not re.fullmatch(r"[A-Za-z,.]*(->[A-Za-z.]*)?", text):
        site.malformed(f"the equation {text[:80]!r} does not fit {len(site.inputs)} operands")
    if not arrow:
        letters = re.sub(r"[^A-Za-z]", "", left)
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if not any(terms):
        return reduce(lambda x, y: x * y, site.all())
    operands, spelled = [], []
    for position, term in enumerate(terms):
        x, names = site.x(position), re.findall(r"\.\.\.|[A-Za-z]", term)
        for name in {n for n in names if names.count(n) > 1}:
            x, names = _diagonal(site, x, names, name)
        operands.append(x)
        spelled.append(" ".join(names))
    result = " ".join(re.findall(r"\.\.\.|[A-Za-z]", right))
    if "..." in left and "..." not in right:
        site.refuse("an equation that sums over `...` is not supported")
    return b.einsum(*operands, equation=f"{', '.join(spelled)} -> {result}")


def _diagonal(site: OnnxSite, x: Expr, names: list[str], name: str) -> tuple[Expr, list[str]]:
    """Return the elements of x whose positions along two axes are equal. The second axis is summed away."""
    b = site.b
    dots = x.rank - len(names) + 1 if "..." in names else 0
    spread = [n for name in names for n in (["..."] * dots if name == "..." else [name])]
    first = spread.index(name)
    second = spread.index(name, first + 1)
    if x.shape[first] != x.shape[second]:
        site.mismatched("the axes of a diagonal differ in size", x.shape[first], x.shape[second])
    place = b.iota(size=x.shape[first])
    row, column = ([n if i == k else "1" for i, n in enumerate(axis_letters(x.rank))] for k in (first, second))
    at_row = b.rearrange(place, pattern=f"{row[first]} -> {' '.join(row)}")
    at_column = b.rearrange(place, pattern=f"{column[second]} -> {' '.join(column)}")
    kept = b.where(b.equal(at_row, at_column), x, b.constant(0, x.dtype))
    again = names.index(name, names.index(name) + 1)
    return b.reduce_sum(kept, axes=(second,)), [*names[:again], *names[again + 1 :]]


@operator("Conv", latest=22)
def _conv(site: OnnxSite) -> Made:
    return convolution(site, site.x(0), site.x(1), site.maybe(2))


def convolution(site: OnnxSite, x: Expr, weight: Expr, bias: Expr | None) -> Expr:
    """Return a convolution with the windows and groups that a node's attributes specify."""
    found = windows_of(site, x, kernel_sizes(site, weight))
    padded, padding = found.apart(x)
    made: Expr = site.b.conv(
        padded,
        weight,
        bias,
        strides=found.strides,
        dilations=found.dilations,
        padding=padding or (0,) * (2 * len(found.strides)),
        groups=site.int("group", 1),
    )
    return made
