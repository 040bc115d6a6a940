"""The inputs of an ONNX file: they become inputs of the graph, or static arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.declared_axes import declared_sizes
from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.frontends.onnx_import.rules.elements import Element, carried
from treadle.frontends.onnx_import.scopes import Scope
from treadle.frontends.onnx_import.values import Known
from treadle.ir.errors import FrontendError, Hint
from treadle.ir.types import Dim, Type, boolean

if TYPE_CHECKING:
    from treadle.frontends.onnx_import.importer import Importer


def declare_inputs(work: Importer, proto: Any, scope: Scope) -> None:
    """Declare the graph's inputs, and add their names to the scope. Static arguments are added with their values."""
    given = set(work.static)
    weights = set(scope.values) | {t.name for t in proto.initializer}
    inputs = [v for v in proto.input if v.name not in weights]
    unknown = sorted(given - {v.name for v in inputs})
    if unknown:
        known = ", ".join(printable(v.name) for v in inputs[:20])
        raise FrontendError(
            f"static= names {unknown[0]!r}, which is not an input", received=known, within=work.file.shown
        )
    work.axes.check(inputs)
    for declared in inputs:
        if declared.name in work.static:
            _static_input(work, declared, scope)
    for declared in inputs:
        if declared.name in scope.values:
            if declared.name not in work.static:
                raise FrontendError(f"two inputs are named {printable(declared.name)}", within=work.file.shown)
            continue
        kind, type = _tensor_type(work, declared)
        dims = [work.axes.size(declared, position) for position in range(len(type.shape.dim))]
        expr = work.b.input(declared.name, Type(kind.carrier, tuple(map(Dim.of, dims))))
        roots = frozenset([declared.name]) if len(dims) <= 1 else frozenset()
        scope.values[declared.name] = Known(kind, expr=expr, name=declared.name, roots=roots)
        work.notes.inputs[declared.name] = kind


def _tensor_type(work: Importer, declared: Any) -> tuple[Element, Any]:
    where = f"input {printable(declared.name)}, {work.file.shown}"
    if declared.type.WhichOneof("value") != "tensor_type":
        held = declared.type.WhichOneof("value") or "no type"
        raise UnsupportedOnnx("an input must be a tensor", received=held, within=where)
    type = declared.type.tensor_type
    try:
        kind = work.element(type.elem_type)
    except FrontendError as error:
        raise UnsupportedOnnx(error.what, within=where) from None
    if not type.HasField("shape"):
        raise UnsupportedOnnx("an input's rank must be declared", within=where)
    if len(type.shape.dim) > work.file.limits.rank:
        raise FrontendError("an input has too many dimensions", received=str(len(type.shape.dim)), within=where)
    return kind, type


def _static_input(work: Importer, declared: Any, scope: Scope) -> None:
    kind, type = _tensor_type(work, declared)
    where = f"input {printable(declared.name)}, {work.file.shown}"
    sizes = declared_sizes(declared)
    value = f"a value of {kind}" + (f"[{printable(', '.join(sizes))}]" if sizes else ", a number")
    form = "[" * len(sizes) + "NUMBER,..." + "]" * len(sizes) if sizes else "NUMBER"
    hint = Hint(value, f"--set {printable(declared.name)}={form}, {value}")
    given = work.static[declared.name]
    try:
        fits, array = _holds(kind, given), carried(kind, given)
    except (TypeError, ValueError, OverflowError) as error:
        what, received = "a static argument's value is not a tensor", printable(str(error))
        raise FrontendError(what, received=received, within=where, hint=hint) from None
    if not fits:
        what = f"a static argument's value must be of type {kind}"
        raise FrontendError(what, received=printable(repr(given)), within=where, hint=hint)
    if not array.ndim and all(dim.dim_value == 1 for dim in type.shape.dim):
        array = array.reshape([1] * len(type.shape.dim))  # a number may be passed for a tensor of one element
    if array.ndim != len(type.shape.dim):
        what = f"a static argument must have rank {len(type.shape.dim)}, but has rank {array.ndim}"
        raise FrontendError(what, within=where, hint=hint)
    for size, dim in zip(array.shape, type.shape.dim, strict=True):
        if not work.axes.settle(dim, size):
            what = "a static argument's shape differs from the declared shape"
            raise FrontendError(what, received=str(array.shape), within=where, hint=hint)
    scope.values[declared.name] = Known(kind, content=array, name=declared.name)
    work.notes.static[declared.name] = array


def _holds(kind: Element, given: Any) -> bool:
    """Return True if the value's dtype fits the element type: integers or bools. Floating-point types accept any
    number.
    """
    array = np.asarray(given)
    if kind.carrier is boolean:
        return array.dtype.kind == "b"
    if kind.least is None or kind.greatest is None or not array.size:
        return True
    return array.dtype.kind in "iu" and kind.least <= array.min() and bool(array.max() <= kind.greatest)
