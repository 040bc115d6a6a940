"""The first lines of a kernel's text in each C dialect: what memory, threads and barriers are called there.

A kernel's text uses these names, and the functions of `treadle.backends.tvm.kernels.arithmetic.c_text.prelude`:

    TREADLE_KERNEL(n)         qualifiers of a kernel with blocks of n threads
    TREADLE_GLOBAL(T) x       parameter: a buffer of elements T, which another parameter may share
    TREADLE_SHARED(T, x, n)   memory of a block; TREADLE_PRIVATE the same for a thread
    TREADLE_CONSTANT T        qualifiers of a constant table
    TREADLE_WIDE(T, x, i)     elements of x from i on, read together as one T
    TREADLE_BLOCK, _BLOCKS, _THREAD   number of this block, number of blocks, number of this thread in its block
    TREADLE_SHUFFLE(v, t)     v of thread t of the group
    TREADLE_JOINED(x, y)      in Metal: a 64-bit integer of two halves
    TREADLE_BARRIER           all threads of the block wait for each other
    TREADLE_DIVIDE(x, y), TREADLE_MODULO(x, y)    of indices, which are not negative
    TREADLE_UNROLL            before a loop that is to be unrolled
"""

from __future__ import annotations

_COMMON = """
#define TREADLE_PRIVATE(T, x, n) T x[n]
#define TREADLE_DIVIDE(x, y) ((x) / (y))
#define TREADLE_MODULO(x, y) ((x) % (y))
"""
_FUNCTIONS = "".join(
    f"TREADLE_FUNCTION {c} treadle_min_{t}({c} x, {c} y) {{ return x < y ? x : y; }}\n"
    f"TREADLE_FUNCTION {c} treadle_max_{t}({c} x, {c} y) {{ return x > y ? x : y; }}\n"
    for t, c in (
        ("i64", "treadle_i64"),
        ("i32", "int"),
        ("i16", "short"),
        ("i8", "signed char"),
        ("u8", "unsigned char"),
    )
)
_FLOATS = "".join(
    f"TREADLE_FUNCTION {c} treadle_min_{t}({c} x, {c} y) {{ return x < y ? x : y; }}\n"
    f"TREADLE_FUNCTION {c} treadle_max_{t}({c} x, {c} y) {{ return x > y ? x : y; }}\n"
    for t, c in (("f32", "float"), ("f64", "double"))
)

_CUDA = """
#define TREADLE_KERNEL(n) extern "C" __global__ void __launch_bounds__(n)
#define TREADLE_GLOBAL(T) T*
#define TREADLE_SHARED(T, x, n) __shared__ T x[n]
#define TREADLE_CONSTANT __constant__ const
#define TREADLE_WIDE(T, x, i) (*(const T*)((x) + (i)))
#define TREADLE_BLOCK ((treadle_i64)blockIdx.x)
#define TREADLE_BLOCKS ((treadle_i64)gridDim.x)
#define TREADLE_THREAD ((treadle_i64)threadIdx.x)
#define TREADLE_SHUFFLE(v, t) __shfl_sync(0xffffffffu, v, t)
#define TREADLE_BARRIER __syncthreads()
#define TREADLE_UNROLL _Pragma("unroll")
"""
_OPENCL = """
#define TREADLE_KERNEL(n) __kernel __attribute__((reqd_work_group_size(n, 1, 1))) void
#define TREADLE_GLOBAL(T) __global T*
#define TREADLE_SHARED(T, x, n) __local T x[n]
#define TREADLE_CONSTANT __constant
#define TREADLE_WIDE(T, x, i) (*(__global const T*)((x) + (i)))
#define TREADLE_BLOCK ((treadle_i64)get_group_id(0))
#define TREADLE_BLOCKS ((treadle_i64)get_num_groups(0))
#define TREADLE_THREAD ((treadle_i64)get_local_id(0))
#define TREADLE_BARRIER barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
#define TREADLE_UNROLL
"""
_METAL = """
#define TREADLE_KERNEL(n) [[kernel, max_total_threads_per_threadgroup(n)]] void
#define TREADLE_GLOBAL(T) device T*
#define TREADLE_SHARED(T, x, n) threadgroup T x[n]
#define TREADLE_CONSTANT constant
#define TREADLE_WIDE(T, x, i) (*(device const T*)((x) + (i)))
#define TREADLE_BLOCK ((treadle_i64)treadle_block)
#define TREADLE_BLOCKS ((treadle_i64)treadle_blocks)
#define TREADLE_THREAD ((treadle_i64)treadle_thread)
#define TREADLE_SHUFFLE(v, t) metal::simd_shuffle(v, (unsigned short)(t))
#define TREADLE_JOINED(low, high) \\
  ((treadle_i64)((treadle_u64)(unsigned int)(high) << 32 | (treadle_u64)(unsigned int)(low)))
#define TREADLE_BARRIER \\
  metal::threadgroup_barrier(metal::mem_flags::mem_device | metal::mem_flags::mem_threadgroup)
#define TREADLE_UNROLL _Pragma("clang loop unroll(full)")
"""

PRELUDES = {"cuda": _CUDA + _COMMON, "opencl": _OPENCL + _COMMON, "metal": _METAL + _COMMON}
"""The macros of each C dialect."""


def functions(*, f64: bool = True) -> str:
    """Return the functions that kernels call, besides those of lane functions' prelude."""
    return _FUNCTIONS + "".join(line for line in _FLOATS.splitlines(keepends=True) if f64 or "double" not in line)
