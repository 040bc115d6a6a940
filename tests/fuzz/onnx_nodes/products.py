"""Products and convolutions, as drawn."""

from __future__ import annotations

from collections.abc import Sequence
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


def _windows(d: Draw, kernel: Sequence[int], transposed: bool = False, dilated: bool = True) -> None:
    """Strides, dilations and padding. Where the padding is automatic ONNX Runtime knows no dilations, and a stride past
    the kernel only as an error: those are left out."""
    automatic = d.of("SAME_UPPER", "SAME_LOWER") if d.maybe(0.3) else d.of(None, None, "NOTSET", "VALID")
    same = automatic is not None and automatic.startswith("SAME")
    d.perhaps(strides=[d.int(1, k if same else 3) for k in kernel])
    if dilated and not same:
        d.perhaps(dilations=[d.int(1, 2) for _ in kernel])
    d.set(auto_pad=automatic)
    if automatic in (None, "NOTSET") and d.maybe(0.7):
        d.set(pads=[d.int(0, k - 1) for _ in range(2) for k in kernel])


def _image(d: Draw, channels: int, kernel: Sequence[int]) -> Array:
    """An x in which one window fits at least."""
    return d.floats([d.int(1, 2), channels, *(2 * k + d.int(0, 4) for k in kernel)])


@draws("Conv", "ConvInteger")
def _conv(d: Draw) -> None:
    kernel, groups = [d.int(1, 3) for _ in range(d.int(1, 2))], d.int(1, 2)
    c, o = d.int(1, 2), d.int(1, 3)
    x, weight = _image(d, groups * c, kernel), d.floats([groups * o, c, *kernel])
    if d.name == "Conv":
        d.x(x)
        d.x(weight, d.maybe())
        if d.maybe():
            d.x(d.floats([groups * o]))
    else:
        d.x(d.ints(x.shape, 0, 255, np.uint8))
        d.x(d.ints(weight.shape, 0, 255, np.uint8), d.maybe())
        if d.maybe():
            d.x(d.ints([], 0, 255, np.uint8))
            if d.maybe():
                d.x(d.ints([], 0, 255, np.uint8))
    _windows(d, kernel)
    d.set(group=groups if groups > 1 else None)
    d.perhaps(kernel_shape=kernel)


@draws("ConvTranspose")
def _conv_transpose(d: Draw) -> None:
    kernel, groups = [d.int(1, 3) for _ in range(d.int(1, 2))], d.int(1, 2)
    c, o = d.int(1, 2), d.int(1, 3)
    x = d.x(_image(d, groups * c, kernel))
    d.x(d.floats([groups * c, o, *kernel]), d.maybe())
    if d.maybe():
        d.x(d.floats([groups * o]))
    _windows(d, kernel)
    d.set(group=groups if groups > 1 else None)
    d.perhaps(kernel_shape=kernel)
    strides = d.attributes.get("strides", [1] * len(kernel))
    assert x is not None
    if d.attributes.get("auto_pad") is None and "pads" not in d.attributes and d.maybe(0.3):
        reach = zip(x.shape[2:], strides, d.attributes.get("dilations", [1] * len(kernel)), kernel, strict=True)
        whole = [(n - 1) * stride + (k - 1) * dilation + 1 for n, stride, dilation, k in reach]
        d.set(output_shape=[size - d.int(0, k - 1) for size, k in zip(whole, kernel, strict=True)])
    elif not (d.attributes.get("auto_pad") or "").startswith("SAME"):
        d.perhaps(output_padding=[d.int(0, stride - 1) for stride in strides])
