"""Each of our kernels compared with its lower bound on one core: operations over the unit's peak, or bytes over the
bandwidth.

    python benchmarks/kernels.py [--json]

The bounds are measured in the same run: the peak as the best product that fits the first caches, the bandwidth by
summing an array that fits no cache. Times are thread CPU time, the least of many calls.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np

from treadle.backends.registry import find_backend
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import host_isa
from treadle.backends.tvm.kernels.matmul import Matmul, panel_width
from treadle.backends.tvm.weight_packing import pack
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.layouts import panels
from treadle.ir.target import Target

PRODUCTS = ((128, 768, 768), (128, 768, 3072), (128, 3072, 768), (37, 768, 768), (512, 768, 768), (1, 768, 30522))


def least(call: Callable[[], object], seconds: float = 0.4) -> float:
    """Return the least CPU time of a call, in seconds."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.thread_time()
        call()
        best = min(best, time.thread_time() - started)
    return best


def product(m: int, k: int, n: int) -> Callable[[], None]:
    """Measure one product of random matrices, the right one in panels."""
    rng = np.random.default_rng(0)
    width = panel_width(n, host_isa())
    a, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    c = np.empty((m, n), np.float32)
    kernel = Matmul(width, whole=n % width == 0)
    return bind(kernel, [a, pack(w, panels(width)), c], [m, k, n, k, n])


def op(build: Callable[[Builder], Expr], **arrays: np.ndarray) -> Callable[[], object]:
    """Measure one op as a program of its own, including the cost of a call from Python."""
    b = Builder(Graph("one"))
    b.outputs(y=build(b))
    exe = find_backend("tvm").compile(b.graph, Target("cpu", threads=1), {})
    return lambda: exe(**arrays)


def main() -> int:
    tvm_runtime.set_threads(1)
    rng = np.random.default_rng(0)
    peak = 2 * 96 * 256 * 192 / least(product(96, 256, 192))
    large = rng.standard_normal(1 << 26, np.float32)
    total = op(lambda b: b.reduce_sum(b.input("x", "f32[N]"), axes=(0,)), x=large)
    bandwidth = large.nbytes / least(total, 2.0)
    rows: list[dict[str, object]] = []

    def row(name: str, seconds: float, flops: float, moved: float) -> None:
        floor = max(flops / peak, moved / bandwidth)
        rows.append({"kernel": name, "us": seconds * 1e6, "floor_us": floor * 1e6, "of_the_floor": floor / seconds})

    for m, k, n in PRODUCTS:
        # A weight that stays in a cache from call to call does not count as moved bytes.
        moved = 4 * k * n if 4 * k * n > 32 << 20 else 0
        row(f"product {m} x {k} x {n}", least(product(m, k, n)), 2 * m * k * n, moved)
    for length, causal in ((128, False), (512, False), (512, True)):
        x = [rng.standard_normal((1, 12, length, 64), np.float32) for _ in range(3)]
        row(
            f"attention 12 heads, {length} tokens" + ", causal" * causal,
            least(attention(causal, *x)),
            4 * 12 * 64 * length * length / (2 if causal else 1),
            0,
        )
    x = rng.standard_normal((128, 768), np.float32)
    norm = op(lambda b: b.layer_norm(b.input("x", "f32[N, 768]"), b.input("w", "f32[768]"), b.input("b", "f32[768]")),
              x=x, w=x[0], b=x[1])  # fmt: skip
    row("layer_norm 128 x 768", least(norm), 8 * x.size, 0)
    wide = rng.standard_normal((128, 3072), np.float32)
    row("gelu 128 x 3072", least(op(lambda b: b.gelu(b.input("x", "f32[N, 3072]")), x=wide)), 25 * wide.size, 0)
    row("softmax 128 x 3072", least(op(lambda b: b.softmax(b.input("x", "f32[N, 3072]")), x=wide)), 20 * wide.size, 0)
    if "--json" in sys.argv:
        print(json.dumps({"gflops": peak / 1e9, "gbytes": bandwidth / 1e9, "kernels": rows}))
        return 0
    print(f"{host_isa()}, one core: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    for found in rows:
        print("  {kernel:38} {us:9.1f} us   floor {floor_us:9.1f} us   {of_the_floor:6.1%}".format(**found))
    return 0


def attention(causal: bool, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Callable[[], object]:
    from treadle.ir.attention.attention_terms import Causal

    terms = (Causal(),) if causal else ()

    def build(b: Builder) -> Expr:
        made: Expr = b.attention(*(b.input(name, "f32[B, 12, S, 64]") for name in "qkv"), terms=terms)
        return made

    return op(build, q=q, k=k, v=v)


if __name__ == "__main__":
    sys.exit(main())
