"""The Transformer of 2017, compared with the paper's equations, written with PyTorch's primitives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import treadle.frontends.language as t
from treadle.backends.registry import backend_names
from treadle.ir.analysis.following import follow
from treadle.ir.errors import CheckpointError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.models.bart import bart
from treadle.models.marian import marian
from treadle.models.transformer import encode, transformer
from treadle.resolving import resolve

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tests.test_huggingface_models import SIZES, assert_close, draw, prepare

Array = np.ndarray[Any, Any]
SMALL = {"vocab": 37, "dim": 24, "heads": 4, "layers": 2, "hidden": 40}


# -- the paper, in torch ---------------------------------------------------------------------------------------


class Paper:
    """Sections 3.1 to 3.5, one method for each equation, with weights under our names."""

    def __init__(self, weights: Mapping[str, Array], heads: int, layers: int) -> None:
        self.w = {name: torch.from_numpy(x) for name, x in weights.items()}
        self.heads, self.layers = heads, layers

    def __call__(self, tokens: Array, decoder_tokens: Array, lengths: Array | None = None) -> Any:
        source, target = torch.from_numpy(tokens), torch.from_numpy(decoder_tokens)
        seen = torch.ones(source.shape, dtype=torch.bool)
        if lengths is not None:
            seen = torch.arange(source.shape[1]) < torch.from_numpy(lengths)[:, None]
        after = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()
        memory, y = self.embed(source), self.embed(target)
        for i in range(self.layers):
            at = f"encoder.layer.{i}"
            memory = self.add_norm(
                memory, self.multi_head(memory, memory, seen[:, None, None], f"{at}.attn"), at, "attn"
            )
            memory = self.add_norm(memory, self.feed_forward(memory, at), at, "mlp")
        for i in range(self.layers):
            at = f"decoder.layer.{i}"
            y = self.add_norm(y, self.multi_head(y, y, after, f"{at}.attn"), at, "attn")
            y = self.add_norm(y, self.multi_head(y, memory, seen[:, None, None], f"{at}.cross"), at, "cross")
            y = self.add_norm(y, self.feed_forward(y, at), at, "mlp")
        return {"logits": (y @ self.w["shared.weight"].T).numpy()}

    def embed(self, ids: Any) -> Any:
        table = self.w["shared.weight"]
        dim = table.shape[1]
        encoding = [
            [
                math.sin(p / 10000 ** (j / dim)) if j % 2 == 0 else math.cos(p / 10000 ** ((j - 1) / dim))
                for j in range(dim)
            ]
            for p in range(ids.shape[1])
        ]
        return torch.nn.functional.embedding(ids, table) * math.sqrt(dim) + torch.tensor(encoding)

    def multi_head(self, x: Any, context: Any, mask: Any, at: str) -> Any:
        q, k, v = (source @ self.w[f"{at}.{n}.weight"].T for source, n in ((x, "q"), (context, "k"), (context, "v")))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        heads = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1) @ v
        return heads.transpose(1, 2).flatten(-2) @ self.w[f"{at}.out.weight"].T

    def feed_forward(self, x: Any, at: str) -> Any:
        inner = torch.relu(x @ self.w[f"{at}.mlp.up.weight"].T + self.w[f"{at}.mlp.up.bias"])
        return inner @ self.w[f"{at}.mlp.down.weight"].T + self.w[f"{at}.mlp.down.bias"]

    def add_norm(self, x: Any, y: Any, at: str, part: str) -> Any:
        weight, bias = (self.w[f"{at}.{part}_norm.{kind}"] for kind in ("weight", "bias"))
        return torch.nn.functional.layer_norm(x + y, weight.shape, weight, bias)


def draw_weights(graph: Graph) -> dict[str, Array]:
    """Draw every weight at random, norms near one, so that swapped weights would show."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(0.0, 0.2, value.type.static_shape) + ("norm.weight" in name)).astype(np.float32)
        for name, value in graph.parameters.items()
    }


@pytest.mark.parametrize("runner", ["interpreter", *backend_names()])
@pytest.mark.parametrize("inputs", [(), ("lengths",)])
def test_equals_the_paper(runner: str, inputs: tuple[str, ...]) -> None:
    graph = transformer.configure(inputs=inputs, **SMALL).graph()
    weights = draw_weights(graph)
    run, paper = prepare(runner, graph, weights), Paper(weights, heads=4, layers=2)
    for sizes in SIZES:
        given = draw(graph, sizes)
        assert_close(run(**given), paper(**given), f"{', '.join(given)} at {sizes}")


# -- positions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 7])
@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoidal_positions(dim: int, interleaved: bool) -> None:
    """Positions are compared with the formula in float64, also far positions, where an angle in float32 would be off by
    2e-3.
    """

    @t.model
    def positions(p: t.i64["N"]):
        return {"out": t.sinusoidal_positions(p, dim, interleaved=interleaved)}

    p = np.array([0, 1, 2, 511, 65_537])
    angles = p[:, None] / 10000.0 ** (2 * (np.arange(dim) // 2) / dim)
    sines, cosines = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    wanted = np.concatenate([sines, cosines], axis=1)
    if interleaved:
        wanted[:, 0::2], wanted[:, 1::2] = sines, cosines
    for runner in ("interpreter", *backend_names()):
        out = prepare(runner, positions.graph(), {})(p=p)["out"]
        assert np.abs(out - wanted).max() < 1e-7  # a float32 near 1 is 6e-8 from its neighbour below


def test_follow() -> None:
    """A decoder's positions may be generated one by one, also with sinusoids; an encoder's inputs may be packed."""
    for model in (transformer.configure(**SMALL), bart, marian):
        graph = model.configure(inputs=("lengths",)).graph()
        step = follow(graph, "T").step()
        assert step, str(step)
        assert not follow(graph, "S").step()

    @t.model
    def encoder(tokens: t.i64["B S"], lengths: t.i64["B"]):
        x = t.embed(tokens, 37, 24, name="tokens") + t.sinusoidal_positions(t.positions(tokens), 24)
        return encode(x, 2, 40, t.relu, t.padding(lengths), heads=4)

    pack = follow(encoder.graph(), "S").pack()
    assert pack, str(pack)


# -- a model in a folder ---------------------------------------------------------------------------------------


def test_a_folder_under_our_names(tmp_path: Path) -> None:
    weights = draw_weights(transformer.configure(**SMALL).graph())
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transformer", **SMALL}))
    resolved = resolve(tmp_path)
    assert resolved.weights is not None
    assert not resolved.unused
    inputs = draw(resolved.graph, SIZES[1])
    assert_close(interpret(resolved.graph, inputs, resolved.weights), Paper(weights, 4, 2)(**inputs), "the folder's")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transformer", **SMALL, "heads": "many"}))
    with pytest.raises(CheckpointError, match=r"config.json: heads must be a positive integer"):
        resolve(tmp_path)
