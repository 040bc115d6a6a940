"""Status words of PyTorch programs on an asynchronous device: indices out of range, recorded without a wait.

A kernel that reads an index from the device cannot raise an error: the host would have to wait for the value. Instead,
it replaces the index by one in range, and adds a record. After the program, all records are copied to the host together
with the outputs. The words have the meaning of `treadle.backends.outside_axis.error_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from treadle.backends.outside_axis import StatusKind


class Record(NamedTuple):
    """A check on the device.

    line     number of the line that made the check, among the lines that make checks
    report   the kind of error
    size     the size of the axis, or the capacity
    failed   i32[]: 1 if the check failed, else 0
    value    i64[] or i32[]: the first index that is out of range; otherwise undefined
    row      i64[]: its position among the indices
    words    the words of all records of the call, in the first record of a captured graph; see `packed`
    """

    line: int
    report: StatusKind
    size: int
    failed: Tensor
    value: Tensor
    row: Tensor
    words: Tensor | None = None


Status = list[Record]
"""All records of a call, in the order of the checks."""

At = tuple[Status, int]
"""A line's access to the status: the records, and the line's number."""


def record(at: At, report: StatusKind, size: int, values: Tensor, failed: Tensor) -> None:
    """Record a check of values on the device. `failed` has the shape of `values`, which must not be empty."""
    status, line = at
    any_failed, row = failed.reshape(-1).to(torch.int32).max(0)  # Inductor has no such code for bool
    status.append(Record(line, report, size, any_failed, values.reshape(-1).index_select(0, row.view(1))[0], row))


def packed(status: Status) -> Tensor:
    """Return i64[n, 3] for n records: 1 if the check failed, the index, and the row."""
    if status[0].words is not None:
        return status[0].words
    return torch.stack([word for each in status for word in (each.failed, each.value, each.row)]).view(-1, 3)


def first_failure(status: Status, words: Sequence[Sequence[int]]) -> tuple[int, tuple[int, int, int, int]] | None:
    """Return the line of the first failed check and its four status words, or None. `words` is `packed` on the host."""
    for each, (failed, index, row) in zip(status, words, strict=True):
        if failed:
            return each.line, (each.report, index, each.size, row)
    return None
