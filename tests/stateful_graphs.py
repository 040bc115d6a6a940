"""Graphs with states that tests share, as text and as functions of NumPy arrays."""

from __future__ import annotations

from treadle.ir.graph import Graph
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
"""A block with a cache that `prefill` calls twice, and a `step` with a counter beside one of the caches."""


def blocks() -> Graph:
    return parse_graph(BLOCKS)
