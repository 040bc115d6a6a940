"""Graphs with states that several tests use, as text and as functions of NumPy arrays."""

from __future__ import annotations

from treadle.ir.builder import Builder
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.text.parser import parse_graph

BLOCKS = """graph blocks {
  symbols B, S, R, C
  parameters {
    scale: f32[4] = ones
    h.{0..1}.w: f32[4, 4]
  }
  states {
    h.{0..1}.mem.k: f32[R, C, 4]
    seen: i64[R, 1]
  }

  block h(x: f32[B, S, 4], rows: i64[B], start: i64[B]) -> (y: f32[B, S, 4])
    weights w: f32[4, 4]
    states mem.k: f32[R, C, 4]
  {
    linear = linear(x, $w)                                      # f32[B, S, 4]  model.py:3  mem
    %mem.k = append(%mem.k, linear, rows, start, axis=1)        # f32[R, C, 4]  model.py:4  mem
    gather = gather(%mem.k, rows)                               # f32[B, C, 4]  model.py:5  mem
    reduce_sum = reduce_sum(gather, axes=[1], keep=true)        # f32[B, 1, 4]
    y = add(x, reduce_sum)                                      # f32[B, S, 4]
    return y = y
  }

  prefill(x: f32[B, S, 4], rows: i64[B], start: i64[B]) -> (y: f32[B, S, 4]) {
    y = h(x, rows, start) with h.0                              # f32[B, S, 4]  model.py:9  h.0
    y_2 = h(y, rows, start) with h.1                            # f32[B, S, 4]  model.py:9  h.1
    mul = mul(y_2, $scale)                                      # f32[B, S, 4]
    return y = mul
  }

  step(x: f32[B, 1, 4], rows: i64[B], start: i64[B]) -> (y: f32[B, 1, 4], seen: i64[B, 1]) {
    linear = linear(x, $h.0.w)                                  # f32[B, 1, 4]
    %h.0.mem.k = append(%h.0.mem.k, linear, rows, start, axis=1)  # f32[R, C, 4]
    gather = gather(%h.0.mem.k, rows)                           # f32[B, C, 4]
    y = reduce_sum(gather, axes=[1], keep=true)                 # f32[B, 1, 4]
    gather_2 = gather(%seen, rows)                              # i64[B, 1]
    add = add(gather_2, 1)                                      # i64[B, 1]
    mul = mul(start, 0)                                         # i64[B]
    %seen = append(%seen, add, rows, mul, axis=1)               # i64[R, 1]
    return y = y, seen = add
  }
}
"""
"""A block with a cache, called twice by `prefill`; `step` also updates a counter next to one of the caches."""


def blocks() -> Graph:
    return parse_graph(BLOCKS)


SUMS = """graph sums {
  symbols B, S, R
  states {
    sum: f32[R, 1, 4]
  }
  main(x: f32[B, S, 4], rows: i64[B]) -> (y: f32[B, S, 4]) {
    cumsum = cumsum(x, axis=1)                                # f32[B, S, 4]
    past = gather(%sum, rows)                                 # f32[B, 1, 4]
    y = add(cumsum, past)                                     # f32[B, S, 4]
    total = reduce_sum(x, axes=[1], keep=true)                # f32[B, 1, 4]
    now = add(past, total)                                    # f32[B, 1, 4]
    zero = mul(rows, 0)                                       # i64[B]
    %sum = append(%sum, now, rows, zero, axis=1)              # f32[R, 1, 4]
    return y = y
  }
}
"""
"""A sum that is continued from call to call."""

PRODUCT = """graph product {
  symbols B, S, R, C
  parameters {
    q.weight: f32[6, 6]
    k.weight: f32[6, 6]
  }
  states {
    k: DTYPE[R, 2, C, 3]
  }
  main(x: f32[B, S, 6], rows: i64[B], start: i64[B]) -> (y: f32[B, 2, S, C]) {
    q = linear(x, $q.weight)                                  # f32[B, S, 6]
    queries = rearrange(q, pattern="b s (h=2 d) -> b h s d")  # f32[B, 2, S, 3]
    k = linear(x, $k.weight)                                  # f32[B, S, 6]
    keys = rearrange(k, pattern="b s (h=2 d) -> b h s d")     # f32[B, 2, S, 3]
    narrow = cast(keys, to=DTYPE)                             # DTYPE[B, 2, S, 3]
    %k = append(%k, narrow, rows, start, axis=2, ring=RING)   # DTYPE[R, 2, C, 3]
    held = gather(%k, rows)                                   # DTYPE[B, 2, C, 3]
    wide = cast(held, to=f32)                                 # f32[B, 2, C, 3]
    y = einsum(queries, wide, equation="b h s d, b h c d -> b h s c")   # f32[B, 2, S, C]
    return y = y
  }
}
"""
"""Products of queries with all keys of a cache; the cache's axis of positions is an inner axis."""

OLD = """graph old {
  symbols B, R
  parameters {
    w: f32[5, 4]
  }
  states {
    k: f32[R, 3, 4]
  }
  block grown(rows: i64[B]) -> (y: f32[R, 3, 4])
    states k: f32[R, 3, 4]
  {
    y = add(%k, 0.5)                                          # f32[R, 3, 4]
    gather = gather(y, rows)                                  # f32[B, 3, 4]
    first = slice(gather, axis=1, start=0, stop=1)            # f32[B, 1, 4]
    zero = mul(rows, 0)                                       # i64[B]
    %k = append(%k, first, rows, zero, axis=1)                # f32[R, 3, 4]
    late = mul(y, 2.0)                                        # f32[R, 3, 4]
    return y = late
  }
  main(
    x: f32[B, 1, 4], rows: i64[B], start: i64[B]
  ) -> (
    y: f32[R, 3, 4], z: f32[R, 3, 5], g: f32[R, 3, 4], v: f32[4, R, 3]
  ) {
    twice = mul(%k, 2.0)                                      # f32[R, 3, 4]
    linear = linear(%k, $w)                                   # f32[R, 3, 5]
    %k = append(%k, x, rows, start, axis=1)                   # f32[R, 3, 4]
    y = add(twice, 1.0)                                       # f32[R, 3, 4]
    z = relu(linear)                                          # f32[R, 3, 5]
    g = grown(rows) with {k: %k}                              # f32[R, 3, 4]
    v = rearrange(%k, pattern="r c d -> d r c")               # f32[4, R, 3]
    return y = y, z = z, g = g, v = v
  }
}
"""
"""Reads of a state before its update whose results are used after the update: alone, in a product and in a block; and a
view of the state.
"""


def product(dtype: str = "f32", *, ring: bool = False) -> Graph:
    return parse_graph(PRODUCT.replace("DTYPE", dtype).replace("RING", str(ring).lower()))


def counter() -> Graph:
    """Return a graph whose `main` increments the slots named by its row argument."""
    b = Builder(Graph("counter"))
    rows = b.input("rows", "i64[B]")
    count = b.state("count", "i64[R, 1]")
    more = b.gather(count, rows) + 1
    b.append(count, more, rows, rows * 0, axis=1)
    b.outputs(count=more)
    return b.graph


# -- functions that tests use on them ---------------------------------------------------------------------------------


def node(graph: Graph, function: str, op: str, number: int = 0) -> Node:
    return [n for n in graph.functions[function].nodes if n.op.name == op][number]


def give(node: Node, position: int, value: Value | None) -> None:
    node.operands = (*node.operands[:position], value, *node.operands[position + 1 :])


def forget(graph: Graph, function: str, state: str) -> None:
    del graph.functions[function].updated[state]


def drop_update(graph: Graph) -> None:
    step = graph.functions["step"]
    step.nodes.remove(node(graph, "step", "append", 1))
