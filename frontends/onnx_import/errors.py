"""Errors of the ONNX importer that a caller may want to tell apart."""

from __future__ import annotations

from treadle.ir.errors import FrontendError


class UnsupportedOnnx(FrontendError):
    """A node, a type or an attribute that the importer does not take: named, and refused.

    op       the operator, with its domain where that is not ONNX's own
    version  the operator's version, or None where it has none that is known
    """

    op: str = ""
    version: int | None = None


class StaticArgumentNeeded(FrontendError):
    """A shape, an axis or a bound depends on the values of an input: import asks for them.

    argument   the input's name; give `static={argument: value}`
    """

    argument: str = ""
