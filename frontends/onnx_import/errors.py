"""Errors of the ONNX importer that a caller may want to distinguish."""

from __future__ import annotations

from treadle.ir.errors import FrontendError


class UnsupportedOnnx(FrontendError):
    """A node, a type or an attribute that the importer does not support.

    op       the operator; with its domain, unless it is in ONNX's own domain
    version  the operator's version, or None if it is unknown
    """

    op: str = ""
    version: int | None = None


class StaticArgumentNeeded(FrontendError):
    """Raised if a shape, an axis or a bound depends on the values of an input, so that the import needs these values.

    argument   the input's name; pass `static={argument: value}`
    """

    argument: str = ""
