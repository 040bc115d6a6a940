"""The runner: a flat table of kernel calls, run in one call, without Python between two kernels.

For each call it also decides whether a kernel's parallel loop runs on the thread pool or on the calling thread: waking
the pool costs more than a small kernel takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.backends.tvm.kernels.kernel import Kernel

RECORD = 5
"""Length of a call's record in 8-byte words: the function's address, its first argument, the address of its arguments,
their number, and 1 if it runs on the calling thread alone.
"""

CONNECT = "connect"
"""A function of the runner's module, which connects it with TVM's thread pool. Its argument is the address of TVM's
function for parallel loops. Its result is the address of the function that kernels call in place of that one; both have
the same signature.
"""

# TVM checks the result before it calls a function that it loaded into memory, so its type index is set to 0 (empty).
#
# The switch is shared by all threads of a process. If two programs run at once and change each other's switch, a loop
# may use the pool or the calling thread contrary to its record; results do not depend on it.
_TEXT = f"""
%record = type {{ ptr, ptr, ptr, i64, i64 }}
%argument = type {{ i32, i32, i64 }}
@treadle_alone = internal global i64 0
@treadle_pool_launch = internal global ptr null

define internal i32 @treadle_launch(ptr %body, ptr %data, i32 %tasks) {{
entry:
  %group = alloca {{ ptr, i32 }}
  %alone = load i64, ptr @treadle_alone
  %here = icmp ne i64 %alone, 0
  br i1 %here, label %serial, label %parallel
serial:
  %count = getelementptr {{ ptr, i32 }}, ptr %group, i32 0, i32 1
  store ptr null, ptr %group
  store i32 1, ptr %count
  %done = call i32 %body(i32 0, ptr %group, ptr %data)
  ret i32 %done
parallel:
  %pool = load ptr, ptr @treadle_pool_launch
  %shared = call i32 %pool(ptr %body, ptr %data, i32 %tasks)
  ret i32 %shared
}}

define dllexport i32 @__tvm_ffi_{CONNECT}(ptr %unused, ptr %given, i32 %given_count, ptr %returned) {{
entry:
  %pool_at = getelementptr %argument, ptr %given, i64 0, i32 2
  %pool = load ptr, ptr %pool_at
  store ptr %pool, ptr @treadle_pool_launch
  %launch_at = getelementptr %argument, ptr %returned, i64 0, i32 2
  store ptr @treadle_launch, ptr %launch_at
  store i32 1, ptr %returned
  ret i32 0
}}

define dllexport i32 @__tvm_ffi_kernel(ptr %unused, ptr %given, i32 %given_count, ptr %returned) {{
entry:
  %result = alloca {{ i32, i32, i64 }}
  %table_at = getelementptr %argument, ptr %given, i64 0, i32 2
  %failed_at = getelementptr %argument, ptr %given, i64 1, i32 2
  %count_at = getelementptr %argument, ptr %given, i64 2, i32 2
  %table = load ptr, ptr %table_at
  %failed_to = load ptr, ptr %failed_at
  %count = load i64, ptr %count_at
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %finished
body:
  %record = getelementptr %record, ptr %table, i64 %i
  %self_at = getelementptr %record, ptr %record, i32 0, i32 1
  %arguments_at = getelementptr %record, ptr %record, i32 0, i32 2
  %number_at = getelementptr %record, ptr %record, i32 0, i32 3
  %alone_at = getelementptr %record, ptr %record, i32 0, i32 4
  %function = load ptr, ptr %record
  %self = load ptr, ptr %self_at
  %arguments = load ptr, ptr %arguments_at
  %number = load i64, ptr %number_at
  %alone = load i64, ptr %alone_at
  store i64 %alone, ptr @treadle_alone
  %short = trunc i64 %number to i32
  store i32 0, ptr %result
  %code = call i32 %function(ptr %self, ptr %arguments, i32 %short, ptr %result)
  %next = add i64 %i, 1
  %good = icmp eq i32 %code, 0
  br i1 %good, label %head, label %failed
failed:
  store i64 %i, ptr %failed_to
  ret i32 0
finished:
  store i64 -1, ptr %failed_to
  ret i32 0
}}
"""


@dataclass(frozen=True)
class Runner(Kernel):
    """Runs a table of calls. Arguments: the table, the result's address; the number of calls.

    The result is -1, or the number of the failed call.
    """

    @property
    def llvm(self) -> str:
        return _TEXT
