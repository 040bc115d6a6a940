"""Random nodes: matrix products and Einsum."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


def _stacks(d: Draw) -> tuple[list[int], list[int]]:
    """Shapes of two operands of a matrix product, of any ranks."""
    m, k, n, lead = d.int(1, 4), d.int(1, 5), d.int(1, 4), d.shape(0, 2)
    left = [k] if d.maybe(0.2) else [*d.like(lead), m, k]
    return left, [k] if d.maybe(0.2) else [*d.like(lead), k, n]


@draws("MatMul")
def _matmul(d: Draw) -> None:
    whole = d.version >= 9 and d.maybe(0.2)
    for shape in _stacks(d):
        d.x(d.ints(shape, dtype=np.int32) if whole else d.floats(shape), d.maybe(0.3))


@draws("MatMulInteger")
def _matmul_integer(d: Draw) -> None:
    left, right = _stacks(d)
    signed = d.of(np.int8, np.uint8)
    d.x(d.ints(left, 0, 255, np.uint8))
    d.x(d.ints(right, *((-128, 127) if signed is np.int8 else (0, 255)), signed))
    if d.maybe():
        d.x(d.ints([], 0, 255, np.uint8))
        if d.maybe():
            d.x(d.ints(right[-1:] if len(right) == 2 and d.maybe() else [], 0, 100, signed))


@draws("Gemm")
def _gemm(d: Draw) -> None:
    m, k, n, turned = d.int(1, 4), d.int(1, 4), d.int(1, 4), [d.int(0, 1), d.int(0, 1)]
    d.x(d.floats([k, m] if turned[0] else [m, k]))
    d.x(d.floats([n, k] if turned[1] else [k, n]), d.maybe())
    if d.version < 11 or d.maybe():
        d.x(d.floats(d.of([m, n], [n], [1, n], [m, 1], [1], [])))
    d.set(transA=turned[0] or None, transB=turned[1] or None)
    d.perhaps(alpha=0.5, beta=d.of(0.0, 2.0))


@draws("Einsum")
def _einsum(d: Draw) -> None:
    sizes = {letter: d.int(1, 4) for letter in "abcij"}
    text = d.of("ij,jk->ik", "bij,bjc->bic", "ij->ji", "ij->i", "ij->", "i,i->", "ii->i", "...ij,...jc->...ic", "ij,j")
    terms = text.replace("k", "c").split("->")[0].split(",")
    for term in terms:
        lead = [2] if "..." in term else []
        d.x(d.floats([*lead, *(sizes[letter] for letter in term.replace(".", ""))]))
    d.set(equation=text.replace("k", "c"))
