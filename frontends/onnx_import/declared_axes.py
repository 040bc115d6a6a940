"""Axes of an ONNX file's inputs: their names in the file, the sizes that the caller gives, and their symbols.

A file declares an axis by a name (`dim_param`), a size (`dim_value`), or neither. A size of -1, and a name without a
letter or a digit such as `?`, are ignored: exporters write them for unknown axes, and two such axes may differ in size.
Such an axis is named after its position: `x_0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.ir.errors import FrontendError, TreadleError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.sizing.sizes import Size

_UNKNOWN = -1
"""The value of `dim_value` for an unknown size."""
_LARGEST = 2**40


def number_of(dim: Any) -> int | None:
    """Return the size that a file declares for an axis, or None."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value != _UNKNOWN else None


def name_of(dim: Any) -> str | None:
    """Return the name that a file declares for an axis. None if there is none, or if it does not identify the axis."""
    return dim.dim_param if _is_a_name(dim.dim_param) else None


def _is_a_name(text: str) -> bool:
    return re.search(r"[^\W_]", text) is not None


def _placed(declared: Any, position: int) -> str:
    return f"{declared.name}_{position}"


def _names(declared: Any) -> list[str]:
    """Return the names that a caller may use for an input's axes: their names, the names in an expression, or names by
    position (`x_0`).
    """
    found = []
    for position, dim in enumerate(declared.type.tensor_type.shape.dim):
        if (name := name_of(dim)) is not None:
            expression = _expression(name)
            found += [name, *(sorted(expression.symbols) if expression else ())]
        elif number_of(dim) is None:
            found += [_placed(declared, position), *filter(None, [dim.dim_param])]
    return found


def _spelled(name: str) -> str:
    """Return a valid symbol name for a name of the file: letters, digits and _."""
    base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:64] or "n"
    return f"n{base}" if base[0].isdigit() else base


def _expression(name: str) -> Size | None:
    """Parse a name such as `past + seq` as an expression of other axes. None if it is not one."""
    if not re.search(r"[-+*/]", name):
        return None
    try:
        return parse_size(name)
    except TreadleError:
        return None


class DeclaredAxes:
    """The axes of one import.

    dims     for names of axes, a size or the name of an equal axis: the `dims` of `import_onnx`
    shown    the file's name in errors
    symbols  the size of each name requested so far
    bounds   the bounds of the graph's symbols
    """

    def __init__(
        self, dims: Mapping[str, Any], shown: str, symbols: dict[str, Size], bounds: MutableMapping[str, Bounds]
    ) -> None:
        self.dims = {name: int(size) if isinstance(size, np.integer) else size for name, size in dims.items()}
        self.shown, self.symbols, self.bounds = shown, symbols, bounds

    def check(self, inputs: Sequence[Any]) -> None:
        """Convert the caller's names to the file's. Raises FrontendError for a name that is not an axis of the file,
        and for a value that is neither a name nor a size.
        """
        axes = dict.fromkeys(axis for declared in inputs for axis in _names(declared))
        for name, value in list(self.dims.items()):
            if name not in axes:
                meant = [a for a in axes if _is_a_name(a) and _spelled(a) == name and a not in self.dims]
                if len(meant) == 1:
                    self.dims[meant[0]] = self.dims.pop(name)
                    name = meant[0]
                elif name not in self.dims.values():
                    raise FrontendError(
                        f"the file has no axis and no input {printable(name)}",
                        received=f"{printable(name)}={printable(repr(value), 60)}",
                        within=self.shown,
                        hint=f"one of its axes ({_listed(axes)}) or of its inputs ({_listed(v.name for v in inputs)})",
                        option=name,
                    )
            if not isinstance(value, str) and (type(value) is not int or value < 0):
                raise FrontendError(
                    f"the size of axis {printable(name)} must be an integer, 0 or more",
                    received=printable(repr(value), 60),
                    within=self.shown,
                    hint=f"leave {printable(name)} out for every size, or set it to the name of an equal axis",
                )

    def size(self, declared: Any, position: int) -> Size:
        """Return the size of an input's axis. Raises FrontendError for a negative or too large size."""
        dim = declared.type.tensor_type.shape.dim[position]
        if (name := name_of(dim)) is not None:
            return self.named(name)
        number = number_of(dim)
        if number is None:
            place = _placed(declared, position)
            return self.named(dim.dim_param if place not in self.dims and dim.dim_param in self.dims else place)
        if not 0 <= number < _LARGEST:
            raise FrontendError(
                "a dimension is impossible",
                received=str(number),
                within=f"input {printable(declared.name)}, {self.shown}",
            )
        return Size.of(number)

    def settle(self, dim: Any, size: int) -> bool:
        """Return True if the file and the caller allow this size for an axis. If the axis has a name, the name gets
        this size.
        """
        if (name := name_of(dim)) is not None:
            known = self.dims.setdefault(name, size)
            return not isinstance(known, int) or known == size
        number = number_of(dim)
        return number is None or number == size

    def named(self, name: str) -> Size:
        """Return the size for a name: a number, a symbol, or an expression of several symbols."""
        found = self.symbols.get(name)
        if found is None:
            found = self.symbols[name] = self._new(name)
            for symbol in found.symbols:
                self.bounds.setdefault(symbol, Bounds())
        return found

    def _new(self, text: str) -> Size:
        value = self.dims.get(text)
        if value is not None:
            return (
                Size.of(value) if isinstance(value, int) else self.named(value) if value != text else Size.symbol(value)
            )
        expression = _expression(text)
        if expression is not None:
            return expression.substitute({s: self.named(s) for s in sorted(expression.symbols)})
        name, count = _spelled(text), 1
        taken = {s for size in self.symbols.values() for s in size.symbols}
        while name in taken:
            count += 1
            name = f"{_spelled(text)}_{count}"
        return Size.symbol(name)


def declared_sizes(declared: Any) -> list[str]:
    """Return the sizes of an input as the file declares them, for an error message."""
    sizes = []
    for dim in declared.type.tensor_type.shape.dim:
        number = number_of(dim)
        sizes.append(name_of(dim) or ("any" if number is None else str(number)))
    return sizes


def _listed(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    return ", ".join(shown[:8] + ["..."] * (len(shown) > 8)) or "none"
