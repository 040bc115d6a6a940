"""The runner: a flat table of kernel calls, run in one call, so that nothing of Python stands between two kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.backends.kernels.kernel import Kernel
from treadle.ir.types import i64

if TYPE_CHECKING:
    from treadle.backends.kernels.emitter import Emitter

RECORD = 4
"""A call in the table, in 8-byte words: the function's address, its first argument, where its arguments are, how many."""

_TEXT = """
define i64 @treadle_run(ptr %table, i64 %count) {
entry:
  %result = alloca { i32, i32, i64 }
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %done
body:
  %record = getelementptr { ptr, ptr, ptr, i64 }, ptr %table, i64 %i
  %self_at = getelementptr { ptr, ptr, ptr, i64 }, ptr %record, i32 0, i32 1
  %arguments_at = getelementptr { ptr, ptr, ptr, i64 }, ptr %record, i32 0, i32 2
  %number_at = getelementptr { ptr, ptr, ptr, i64 }, ptr %record, i32 0, i32 3
  %function = load ptr, ptr %record
  %self = load ptr, ptr %self_at
  %arguments = load ptr, ptr %arguments_at
  %number = load i64, ptr %number_at
  %short = trunc i64 %number to i32
  %code = call i32 %function(ptr %self, ptr %arguments, i32 %short, ptr %result)
  %next = add i64 %i, 1
  %good = icmp eq i32 %code, 0
  br i1 %good, label %head, label %failed
failed:
  ret i64 %i
done:
  ret i64 -1
}
"""


@dataclass(frozen=True)
class Runner(Kernel):
    """Passed: the table, where to put the result; how many calls. The result is -1, or the number of the failed call."""

    def emit(self, k: Emitter) -> None:
        table, result = k.pointer("table", i64), k.pointer("result", i64)
        count = k.size("count")
        done = k.view(result, [1])
        with k.loop(1):
            k.store(done, [0], k.llvm("treadle_run", lambda: _TEXT, "int64", table.handle, count))
