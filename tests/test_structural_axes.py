"""Axes that ops imply: recipes split models without labels, such as imported ones, as they split labelled ones."""

from __future__ import annotations

import re
from typing import Any

import pytest

import treadle as t
from tests.sharded_models import FAMILIES, recognized
from treadle.ir.analysis.structural_axes import IMPLIED, implied_places
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.passes.sharding.recipes import shard
from treadle.sharding import try_in_lab

LETTERS = {"heads": "n", "kv_heads": "m", "ffn": "f"}


def without_labels(graph: Graph) -> Graph:
    """Return a graph in which the three axes have no label: their sizes are numbers, and patterns name them by a
    letter.
    """

    def plain(match: re.Match[str]) -> str:
        if match[0].startswith('"'):
            return re.sub(r"\b(kv_heads|heads|ffn)\b", lambda m: LETTERS[m[0]], match[0])
        return ""

    return parse_graph(re.sub(r'"[^"]*"|\b(?:kv_heads|heads|ffn)=', plain, str(graph)))


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_split_models_without_labels_as_those_with_labels(family: str) -> None:
    labelled = recognized(family)
    plain = without_labels(labelled)
    assert not any(f"{name}=" in str(plain) for name in IMPLIED)
    for mesh, recipe in (("tp=2", "megatron"), ("tp=2", "sequence")):
        expected, found = shard(labelled, mesh, recipe=recipe), shard(plain, mesh, recipe=recipe)
        assert found.axes == expected.axes
        assert {n: p.text(found.mesh) for n, p in found.weights.items()} == {
            n: p.text(expected.mesh) for n, p in expected.weights.items()
        }
        assert [(c.op, c.scope, c.because) for c in found.collectives()] == [
            (c.op, c.scope, c.because) for c in expected.collectives()
        ]


def imported(torch: Any, kv_heads: int) -> Graph:
    """Return a decoder layer of PyTorch with grouped attention and a gated feed-forward network, no last norm."""
    nn, dim = torch.nn, 32

    class Layer(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.norm, self.norm_2 = nn.Embedding(64, dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.q, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.k, self.v = nn.Linear(dim, kv_heads * 8), nn.Linear(dim, kv_heads * 8)
            self.up, self.gate, self.down = nn.Linear(dim, 96), nn.Linear(dim, 96), nn.Linear(96, dim)

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids)
            h = self.norm(x)
            q, k, v = (each(h).unflatten(2, (-1, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != 4)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            h = self.norm_2(x)
            x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
            return {"logits": x @ self.tokens.weight.T}

    example = torch.zeros(2, 8, dtype=torch.long)
    graph: Graph = t.from_torch(Layer().eval(), (example,), dynamic={"ids": "B S"}).graph
    return graph


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_an_imported_module_is_split_by_megatron(kv_heads: int) -> None:
    from treadle.passes.stages import Recognize, run

    torch = pytest.importorskip("torch")
    plan = shard(run(imported(torch, kv_heads), [Recognize()]).graph, "tp=2", recipe="megatron")
    assert [(each.op, each.scope) for each in plan.collectives()] == [
        ("all_reduce", "tokens"),
        ("all_reduce", "out"),
        ("all_reduce", "down"),
    ]
    split = {name.removesuffix(".weight"): placed.text(plan.mesh) for name, placed in plan.weights.items()}
    assert {split[name] for name in ("tokens", "q", "k", "v", "up", "gate")} == {"[tp, -]"}
    assert {split[name] for name in ("out", "down")} == {"[-, tp]"}
    assert try_in_lab(plan).passed


def test_a_product_of_two_vectors_has_no_hidden_axis() -> None:
    """Spectral normalization divides a weight by u (W v)."""
    graph = parse_graph("""graph m {
      symbols B
      parameters {
        u: f32[8]
        v: f32[8]
      }
      main(x: f32[B, 8]) -> (y: f32[B, 8]) {
        n = einsum($u, $v, equation="i, i -> ")
        y = div(x, n)
        return y = y
      }
    }""")
    assert not [*implied_places(graph.main, "ffn")]
    assert try_in_lab(shard(graph, "tp=2", recipe="megatron")).passed


TEXT = """graph m {{
  symbols B
  parameters {{
    up: f32[8, 4]
    down: f32[4, 8]
    wide: f32[8, 4]
  }}
  main(x: f32[B, 4], z: f32[B, 8]) -> (y: f32[B, {size}]) {{
    u = linear(x, $up)
    {lines}
    return y = y
  }}
}}"""


@pytest.mark.parametrize(
    ("lines", "size", "count"),
    [
        ("g = gelu(u)\n    y = linear(g, $down)", 4, 1),
        ("w = linear(x, $wide)\n    g = silu(w)\n    m = mul(g, u)\n    y = linear(m, $down)", 4, 2),
        ("y = linear(u, $down)", 4, 0),  # two products in a row, as of a matrix of low rank
        ("a = add(u, z)\n    y = linear(a, $down)", 4, 0),  # a stream that other values are added to
        ("g = gelu(u)\n    n = softmax(g)\n    y = linear(n, $down)", 4, 0),
        ("y = gelu(u)", 8, 0),
        ("g = gelu(u)\n    d = linear(g, $down)\n    s = mul(d, d)\n    y = linear(s, $up)\n    o = add(y, g)", 8, 1),
    ],
)
def test_a_hidden_axis_is_between_products(lines: str, size: int, count: int) -> None:
    graph = parse_graph(TEXT.format(lines=lines, size=size))
    assert len(list(implied_places(graph.main, "ffn"))) == count


def test_an_axis_of_another_name_is_not_implied() -> None:
    graph = recognized("gpt2")
    assert not any(list(implied_places(function, "experts")) for function in graph.functions.values())
