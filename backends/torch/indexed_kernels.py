"""PyTorch kernels with indices: rows of tables, elements at positions, states of caches.

PyTorch's error for an index out of bounds names neither the index nor the bound, and on a GPU its assertion makes the
device unusable. So indices are checked first. With `report`, the host does not read indices back from the device: a
failed check is recorded (`treadle.backends.torch.status`), and the index is replaced by one in range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.backends.outside_axis import NoRoom, OutsideAxis, StatusKind
from treadle.backends.torch.counting import counted
from treadle.backends.torch.status import At, record

_MOST = 2**63 - 1


def within(indices: Tensor, size: int, report: At | None = None) -> Tensor:
    """Return the indices. Raises OutsideAxis for an index out of the bounds of an axis of this size; with `report`,
    records it, and returns an index in range in its place.
    """
    if report is not None and not indices.numel():
        return indices
    if (known := on_host(indices, report)) is not None:
        _limit(indices, 0, size - 1)
        _refuse_outside(known, size)
        return indices
    if report is not None and size:
        inside = indices.clamp(0, size - 1)
        record(report, StatusKind.OUTSIDE_AXIS, size, indices, inside != indices)
        return inside
    outside = (indices < 0) | (indices >= size)
    if bool(outside.any()):
        raise OutsideAxis(int(indices[outside][0]), size)
    return indices


def embedding(indices: Tensor, table: Tensor, out: Tensor | None = None, report: At | None = None) -> Tensor:
    """Return rows of a table."""
    checked = within(indices, table.shape[0], report)
    if out is None:
        return F.embedding(checked, table)
    torch.index_select(table, 0, checked.reshape(-1), out=out.view(checked.numel(), table.shape[1]))
    return out


def take_along_axis(x: Tensor, indices: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Return elements of x along an axis, at indices in the result's layout."""
    return x.gather(axis, within(indices, x.shape[axis], report))


def scatter_add(target: Tensor, indices: Tensor, updates: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Add updates to target: the transpose of `take_along_axis`."""
    checked = within(indices, target.shape[axis], report)
    return in_sum_dtype(target).scatter_add(axis, checked, in_sum_dtype(updates)).to(target.dtype)


def take(x: Tensor, indices: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Return slices of x along an axis, at indices of any rank."""
    axis %= x.dim()
    picked = x.index_select(axis, within(indices, x.shape[axis], report).reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def index_add(target: Tensor, indices: Tensor, updates: Tensor, axis: int, report: At | None = None) -> Tensor:
    """Add updates to target: the transpose of `take`."""
    axis %= target.dim()
    rows = updates.reshape((*target.shape[:axis], indices.numel(), *target.shape[axis + 1 :]))
    checked = within(indices, target.shape[axis], report).reshape(-1)
    return in_sum_dtype(target).index_add(axis, checked, in_sum_dtype(rows)).to(target.dtype)


def append(
    state: Tensor, x: Tensor, rows: Tensor, start: Tensor, axis: int, *, ring: bool, report: At | None = None
) -> Tensor:
    """Write x into a state, from each row's start, and return the state. Raises OutsideAxis or NoRoom before anything
    is written.

    With `report`, a failed check of values that the host does not know is recorded, and nothing is written for the row.
    """
    capacity, count = state.shape[axis], x.shape[axis]
    last = None if ring else capacity - count  # the greatest start
    slots, first, lost = within(rows, state.shape[0], report), start, None
    if (known := on_host(start, report)) is not None:
        _limit(start, 0, _MOST if last is None else last)
        for row, at in enumerate(known):
            if at < 0 or (last is not None and at > last):
                raise NoRoom(row, at, capacity)
    elif start.numel():
        without = (start < 0) if last is None else (start < 0) | (start > last)
        if report is not None:
            record(report, StatusKind.NO_ROOM, capacity, start, without)
            first, lost = start.clamp(0, last), without
        elif bool(without.any()):
            row = int(without.nonzero()[0])
            raise NoRoom(row, int(start[row]), capacity)
    if slots is not rows:
        lost = slots != rows if lost is None else lost | (slots != rows)
    places = first[:, None] + (counted(count, start.device) if report else torch.arange(count, device=start.device))
    where = slots[:, None], places % capacity if ring else places
    written, moved = x.movedim(axis, 1), state.movedim(axis, 1)
    if lost is not None:
        written = torch.where(lost.view(-1, *[1] * (x.dim() - 1)), moved[where], written)
    moved[where] = written
    return state


def on_host(x: Tensor, report: At | None) -> list[int] | None:
    """Return the values of an input that the host keeps besides the device; None if it does not, or need not."""
    return None if report is None else getattr(x, "on_host", None)


def _limit(x: Tensor, low: int, high: int) -> None:
    """Report limits of an input's values that the host checks, for calls that repeat this one without its checks."""
    limits: list[tuple[int, int]] | None = getattr(x, "limits", None)
    if limits is not None:
        limits.append((low, high))


def _refuse_outside(indices: Sequence[int], size: int) -> None:
    for index in indices:
        if not 0 <= index < size:
            raise OutsideAxis(index, size)


def in_sum_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype of sums, which is float32 for 16-bit dtypes: PyTorch rounds after every in-place
    addition.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
