"""Errors of the ONNX importer that a caller may want to distinguish."""

from __future__ import annotations

from treadle.ir.errors import FrontendError


class UnsupportedOnnx(FrontendError):
    """A node, a type or an attribute that the importer does not support.

    op       the operator, with its domain unless it is ONNX's own
    version  the operator's version, or None if it is unknown
    """

    op: str = ""
    version: int | None = None


class StaticArgumentNeeded(FrontendError):
    """A shape, an axis or a bound depends on the values of an input, which import needs.

    argument   the input's name; pass `static={argument: value}`
    """

    argument: str = ""
