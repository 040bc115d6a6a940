"""Encodings of results: the result of an op that moves blocks has the operands' encoding, if the op's axis rule leaves
the axis of the blocks unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from treadle.ir.axes import Application, Role
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.types import Dim, DType, Type


def encoded_type(dtype: DType, dims: tuple[Dim, ...], encoding: Encoding | None) -> Type:
    """Return the type of an encoded result. Raises RuleError if a line is not an integer number of blocks."""
    if encoding is None:
        return Type(dtype, dims)
    try:
        return Type(dtype, dims, encoding)
    except GraphError as error:
        raise RuleError(error.what, received=error.received, hint=error.hint) from None


def unread_blocks(op: str, names: Sequence[str], types: Sequence[Type | None]) -> RuleError:
    """Return the error for an op that reads numbers and receives encoded blocks."""
    return RuleError(f"{_operands_text(names, types)}, but {op} reads numbers", hint="decode it first")


def moved_encoding(
    op: str,
    names: Sequence[str],
    types: Sequence[Type | None],
    found: Application,
    moved: Sequence[int],
    given: Collection[str],
) -> Encoding:
    """Return the encoding of the result of an op that moves blocks of the operands `moved`.

    given  factors whose sizes are attributes of the op; such a size would count numbers, not blocks

    Raises RuleError if these operands differ in encoding, or if the axis of the blocks is not one mapped axis of the
    result.
    """
    what = _operands_text(names, types)
    first = next(t.encoding for t in types if t is not None and t.encoding is not None)
    assert first is not None
    places = set()
    for i in moved:
        type, dims = types[i], found.operands[i]
        assert type is not None
        assert dims is not None
        if type.encoding is None or type.encoding.along(-1) != first.along(-1):
            raise RuleError(f"{what}, {names[i]} as {type.encoding or 'nothing'}", hint="decode both first")
        axis = dims[type.encoding.axis]
        alone = axis.size is None and len(axis.factors) == 1 and axis.factors[0] not in given
        whole = alone and found.factors[axis.factors[0]].role is Role.MAPPED
        places.add(found.results[0].index(axis) if whole and axis in found.results[0] else None)
    (place,) = places if len(places) == 1 else (None,)
    if place is None:
        raise RuleError(f"{what}, but {op} would split its blocks", hint="decode it first")
    return first.along(place)


def _operands_text(names: Sequence[str], types: Sequence[Type | None]) -> str:
    name, encoding = next((n, t.encoding) for n, t in zip(names, types, strict=True) if t is not None and t.encoding)
    return f"{name} is encoded as {encoding}"
