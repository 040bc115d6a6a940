"""The composites that ONNX expresses by an operator: the first opset, and the conditions for the exact meaning.

All other composites are replaced by their bodies before `treadle.backends.onnx.spelling` emits them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.ir.operation import Op
from treadle.ir.types import Type, f32, f64, i8, u8

EIGHT_BITS = {(-128, 127): i8, (0, 255): u8}
"""The dtypes of 8 bits, by the range of their integers."""


@dataclass(frozen=True)
class Form:
    """The condition for emitting the operator of a composite: the first opset, and `fits`, a test of the op and its
    types.
    """

    since: int = 13
    fits: Callable[[Any, Sequence[Type | None]], bool] = lambda op, types: True


def _of_known_width(op: Any, types: Sequence[Type | None]) -> bool:
    """Return True if the operator can compute a normalization: not f64, and if the weight is absent, a width that is
    known, for a weight of ones.
    """
    x = types[0]
    assert x is not None
    return x.dtype is not f64 and (types[1] is not None or x.shape[-1].constant is not None)


def _not_f64(op: Any, types: Sequence[Type | None]) -> bool:
    """Return False for f64: ONNX Runtime has no kernel, or the operator's definition rounds to f32."""
    return types[0] is not None and types[0].dtype is not f64


def _from_the_first(op: Any, types: Sequence[Type | None]) -> bool:
    """Return True if queries are counted from 0 and all dtypes are equal, as the operator requires."""
    return not op.begins_later and getattr(op, "to", None) is None


def _to_8_bits(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True for the steps of an 8-bit integer, with one scale: QuantizeLinear and DequantizeLinear."""
    whole = (op.attributes["least"], op.attributes["greatest"]) in EIGHT_BITS
    x, *steps = types
    return whole and x is not None and x.dtype is f32 and all(t is not None and t.rank == 0 for t in steps)


FORMS: dict[str, Form] = {
    "softmax": Form(),
    "log_softmax": Form(),
    "reduce_mean": Form(),
    "embedding": Form(),
    "conv": Form(fits=_not_f64),
    "attention": Form(fits=_from_the_first),
    "attention_with_probabilities": Form(fits=_from_the_first),
    "layer_norm": Form(17, _of_known_width),
    "gelu": Form(20, _not_f64),
    "gelu_tanh": Form(20, _not_f64),
    "softplus": Form(fits=_not_f64),
    "rms_norm": Form(23, _of_known_width),
    "rotary": Form(23, _not_f64),
    "fake_quantize": Form(fits=_to_8_bits),
}
"""Swish, of opset 24, is missing: ONNX Runtime supports it at that opset, but not at later ones."""


def keeps(opset: int) -> Callable[[Op, Sequence[Type | None]], bool]:
    """Return a predicate that is True for a composite with an operator at this opset. Other composites are replaced by
    their bodies.
    """

    def kept(op: Op, types: Sequence[Type | None]) -> bool:
        form = FORMS.get(op.name)
        return form is not None and opset >= form.since and form.fits(op, types)

    return kept
