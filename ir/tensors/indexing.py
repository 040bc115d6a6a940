"""Indexing of a model's tensors as in NumPy and PyTorch: x[:, 0], x[..., 1:], x[:, None], x[tokens].

A position or a slice becomes `slice`, an index tensor becomes `gather`, and one `rearrange` at the end drops and adds
axes. Positions may be sizes: x[:, x.shape[1] - 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from treadle.ir.builder import Expr
from treadle.ir.errors import GraphError
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE, Size

if TYPE_CHECKING:
    Index: TypeAlias = int | Size | slice | EllipsisType | Expr | np.ndarray[Any, Any] | Sequence[int] | None

_EXAMPLES = "x[:, 0], x[..., 1:], x[:, -1], x[:, ::2], x[:, None], x[:, positions]"


def indexed(x: Expr, index: Any) -> Expr:
    """Return x[index]. Raises GraphError for an index that has no meaning in a graph."""
    items = _full(x, index if isinstance(index, tuple) else (index,))
    picking = [i for i in items if not _is_basic(i)]
    if len(picking) > 1:
        raise _refusal(
            x,
            "only one axis may be indexed by a tensor at once",
            "x[:, positions] reads along one axis; t.take_along_axis(x, indices, axis=1) reads other positions for "
            "each element of the other axes",
        )
    left: list[str] = []  # the dimensions after slicing and gathering, "1" if an index drops or adds them
    right: list[str] = []
    names = iter(axis_letters(x.rank + sum(_index_rank(i) for i in picking)))
    axis = 0
    for item in items:
        if item is None:
            right.append("1")
        elif isinstance(item, int | Size):
            x = _position(x, axis, item)
            left.append("1")
            axis += 1
        else:
            count = 1
            if isinstance(item, slice):
                x = _span(x, axis, item)
            else:
                picked = _positions(x, axis, item)
                x, count = x.builder.gather(x, picked, axis=axis), picked.rank
            kept = [next(names) for _ in range(count)]
            left += kept
            right += kept
            axis += count
    return x if left == right else x.builder.rearrange(x, pattern=f"{' '.join(left)} -> {' '.join(right)}")


def _full(x: Expr, items: Sequence[Any]) -> list[Any]:
    """Return one item for each axis of x, and the items that add axes."""
    for at, item in enumerate(items):
        if _is_condition(item):
            further = ", ".join(["None"] * _axes_after(x, items, at))
            raise _refusal(
                x,
                "a condition cannot select elements: the size of the result would depend on data",
                f"t.where(condition{f'[..., {further}]' * bool(further)}, x, 0.0) keeps the shape",
            )
    items = [_plain(x, item) for item in items]
    spread = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(spread) > 1:
        raise _refusal(x, "an index may have one `...`", _EXAMPLES)
    missing = x.rank - sum(item is not None and item is not Ellipsis for item in items)
    if missing < 0:
        raise _refusal(x, f"the index has {x.rank - missing} items, but the tensor has {x.rank} axes", None)
    at = spread[0] if spread else len(items)
    return [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]


def _is_condition(item: Any) -> bool:
    """Return True for a tensor, an array or a list of booleans."""
    if isinstance(item, Expr):
        return item.dtype.kind == "bool"
    is_array = isinstance(item, list | np.ndarray | np.generic) or _is_foreign_array(item)
    return is_array and np.asarray(item).dtype.kind == "b"


def _axes_after(x: Expr, items: Sequence[Any], at: int) -> int:
    """Return the number of axes of x after those that a condition, which is an item of an index, refers to."""
    counts = [
        0 if item is None or item is Ellipsis else _index_rank(item) if _is_condition(item) else 1 for item in items
    ]
    if any(item is Ellipsis for item in items[:at]):
        return sum(counts[at + 1 :])
    return max(0, x.rank - sum(counts[: at + 1]))


def _plain(x: Expr, item: Any) -> Any:
    """Return an item of an index as None, Ellipsis, a slice, an integer, a Size, an Expr or an array of integers."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return item
    is_array = isinstance(item, list | np.ndarray) or _is_foreign_array(item)
    if isinstance(item, Expr) or is_array or (isinstance(item, np.generic) and item.dtype.kind != "i"):
        if isinstance(item, Expr):
            return item
        array = np.asarray(item)
        if array.dtype.kind not in "iu":
            raise _unreadable(x, item)
        return array
    return _edge(x, item)


def _is_foreign_array(item: object) -> bool:
    """Return True for a tensor of PyTorch, or another library's array, with one axis or more."""
    return hasattr(item, "__array__") and not isinstance(item, Expr | np.generic) and np.ndim(item) > 0


def _edge(x: Expr, item: Any) -> int | Size:
    """Return a slice bound as an integer or a symbolic size."""
    if isinstance(item, Size):
        return item if item.constant is None else item.constant
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
        return int(item)
    raise _unreadable(x, item)


def _unreadable(x: Expr, item: Any) -> GraphError:
    return _refusal(x, f"a tensor cannot be indexed by {repr(item)[:80]}", _EXAMPLES)


def _is_basic(item: Any) -> bool:
    return item is None or isinstance(item, int | Size | slice)


def _index_rank(item: Any) -> int:
    return int(item.rank if isinstance(item, Expr) else np.ndim(item))


def _position(x: Expr, axis: int, at: int | Size) -> Expr:
    stop = None if at == -1 else at + 1
    return x if x.shape[axis] == ONE and at in (0, -1) else x.builder.slice(x, axis=axis, start=at, stop=stop)


def _span(x: Expr, axis: int, span: slice) -> Expr:
    """Return a slice along one axis. On an axis of constant size, positions past its ends are clamped."""
    edges = (span.start, span.stop, span.step)
    if any(isinstance(edge, Expr) for edge in edges):
        raise _refusal(
            x,
            "the bounds of a slice cannot be a tensor: the size of the result would depend on data",
            f"t.gather(x, positions, axis={axis}) reads a fixed number of positions",
        )
    start, stop, step = (None if edge is None else _edge(x, edge) for edge in edges)
    step = 1 if step is None else step
    if not isinstance(step, int) or step == 0:
        raise _refusal(x, f"the step of a slice must be an integer other than 0, is {step}", f"x[{':, ' * axis}::2]")
    size = x.shape[axis]
    if step < 0:
        return _reversed_span(x, axis, start, stop, step)
    start = 0 if start is None else start
    stop = None if stop is not None and size == stop else stop
    if size.constant is not None and isinstance(start, int) and not isinstance(stop, Size):
        start, stop, _ = slice(start, stop).indices(size.constant)
        stop = None if stop == size.constant else max(start, stop)
    elif isinstance(start, int) and isinstance(stop, int) and (start < 0) == (stop < 0):
        stop = max(start, stop)
    if start == 0 and stop is None and step == 1:
        return x
    return x.builder.slice(x, axis=axis, start=start, stop=stop, stride=step)


def _reversed_span(x: Expr, axis: int, start: int | Size | None, stop: int | Size | None, step: int) -> Expr:
    """Return a slice with a negative step, as in NumPy: from `start` down to the position after `stop`."""
    size = x.shape[axis].constant
    if size is not None and not isinstance(start, Size) and not isinstance(stop, Size):
        positions = np.arange(size)[start:stop:step]
        return x.builder.gather(x, x.builder.constant(positions), axis=axis)
    if stop == -1:
        raise _refusal(x, "a slice that ends at the last position and goes down has no elements", None)
    low = None if stop is None else stop + 1
    high = None if start is None or start == -1 else start + 1
    return _span(_span(x, axis, slice(low, high)).flip(axis), axis, slice(None, None, -step))


def _positions(x: Expr, axis: int, item: Any) -> Expr:
    """Return the positions that an index tensor, a list or an array contains. Constant negative positions count from
    the end of the axis.
    """
    if isinstance(item, Expr):
        return item
    size = x.shape[axis].constant
    if (item < 0).any():
        if size is None:
            raise _refusal(
                x,
                f"negative positions on an axis whose size differs from call to call: {x.shape[axis]}",
                f"x[{':, ' * axis}-1] reads the last position",
            )
        item = np.where(item < 0, item + size, item)
    return x.builder.constant(item.astype(np.int64))


def _refusal(x: Expr, what: str, hint: str | None) -> GraphError:
    return x._refusal(what, hint)
