"""Masks as PyTorch's users and Hugging Face's models write them become terms, with every exporter and form of ops."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
nn: Any = pytest.importorskip("torch.nn")

from tests.onnx_models import answers, runtime
from tests.remembered_exports import remember_functions
from tests.test_from_torch import tokens
from tests.torch_modules import assert_equal, drawn
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.notes import Imported
from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.graph import Graph
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.pipelines import DEFAULT

F: Any = torch.nn.functional
TOLERANCE = 2e-5
"""Tolerance for numbers near 1: sums of some dozens of float32, added in another order."""


def terms(graph: Graph) -> list[str]:
    ops = [n.op for _, n in graph.walk() if n.op.name == "attention"]
    return [", ".join(term.text for term in op.terms) for op in ops]  # type: ignore[attr-defined]


def optimized(model: TorchModel | Imported) -> Optimized:
    return PassManager(DEFAULT, certify=True).run(model.graph)


def exported(
    module: Any, example: tuple[Any, ...], path: Path, names: str, axes: dict[int, str], dynamo: bool
) -> Imported:
    options: dict[str, Any] = {"input_names": names.split(), "output_names": ["y"], "opset_version": 18}
    if dynamo:
        shapes = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for _ in example)
        options |= {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": dict.fromkeys(names.split(), axes)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    remember_functions()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, example, str(path), **options)
    return import_onnx(path)


# -- triangles ---------------------------------------------------------------------------------------------------------


def _table(fill: float = 1.0) -> Any:
    return torch.full((64, 64), fill)


TRIANGLES: dict[str, Any] = {
    "triu, as bool": lambda m, n: torch.ones(n, n).triu(1).bool(),
    "triu of bool": lambda m, n: torch.ones(n, n, dtype=torch.bool).triu(1),
    "tril == 0": lambda m, n: torch.ones(n, n).tril() == 0,
    "tril of integers": lambda m, n: torch.ones(n, n, dtype=torch.long).tril() < 1,
    "1 - tril": lambda m, n: (1 - torch.ones(n, n).tril()).bool(),
    "nanoGPT's": lambda m, n: m.bias[:, :, :n, :n] == 0,
    "a whole table, cut": lambda m, n: torch.tril(_table())[:n, :n] == 0,
    "filled with -inf": lambda m, n: torch.full((n, n), -math.inf).triu(1),
    "zeros filled": lambda m, n: torch.zeros(n, n).masked_fill(torch.ones(n, n).triu(1) == 1, -math.inf),
    "times -1e9": lambda m, n: torch.ones(n, n).triu(1) * -1e9,
    "times the lowest": lambda m, n: (1.0 - torch.ones(n, n).tril()) * torch.finfo(torch.float32).min,
    "CLIP's": lambda m, n: m.attn_mask[:n, :n],
    "PyTorch's own": lambda m, n: nn.Transformer.generate_square_subsequent_mask(n),
}


class Triangular(nn.Module):  # type: ignore[misc]
    def __init__(self, made: Any, whole: bool) -> None:
        super().__init__()
        self.made, self.whole = made, whole
        self.register_buffer("bias", torch.tril(_table()).view(1, 1, 64, 64))
        self.register_buffer("attn_mask", _table(-math.inf).triu(1))

    def forward(self, x: Any) -> Any:
        mask = self.made(self, x.shape[-2])
        if self.whole:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=~mask if mask.dtype is torch.bool else mask)
        scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype is torch.bool else scores + mask
        return scores.softmax(-1) @ x


def states(length: int) -> tuple[Any]:
    return (torch.randn(2, 4, length, 8, generator=torch.Generator().manual_seed(length)),)


@pytest.mark.parametrize("whole", [False, True], ids=["spelled", "sdpa"])
@pytest.mark.parametrize("name", TRIANGLES)
def test_a_triangle_is_causal(name: str, whole: bool) -> None:
    module = Triangular(TRIANGLES[name], whole)
    model = treadle.from_torch(module, states(7), dynamic={"x": {2: "S"}})
    after = optimized(model)
    assert [(n.op.name, terms(after.graph)) for n in after.graph.main.nodes] == [("attention", ["causal"])]
    assert not model.weights
    assert_equal(model, module, states(7), states(12))


@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])
@pytest.mark.parametrize("name", ["triu of bool", "nanoGPT's", "filled with -inf", "CLIP's"])
def test_an_onnx_file_says_the_same(name: str, dynamo: bool, tmp_path: Path) -> None:
    path = tmp_path / "triangle.onnx"
    found = exported(Triangular(TRIANGLES[name], False), states(7), path, "x", {2: "S"}, dynamo)
    after = optimized(found)
    assert [(n.op.name, terms(after.graph)) for n in after.graph.main.nodes] == [("attention", ["causal"])]
    assert not found.weights
    inputs = {"x": states(12)[0].numpy()}
    (expected,) = runtime(str(path), inputs).values()
    for got in answers(found, inputs):
        np.testing.assert_allclose(next(iter(got.values())), expected, rtol=0, atol=TOLERANCE)


def test_a_triangle_one_off_says_so() -> None:
    module = Triangular(lambda m, n: torch.ones(n, n).triu(2).bool(), True)
    after = optimized(treadle.from_torch(module, states(7), dynamic={"x": {2: "S"}}))
    assert terms(after.graph) == ["mask(s t)"]
    (event,) = next(r for r in after.log if r.name == "refine-attention").refusals
    assert "it keeps keys up to 1 after the query" in event.reason
    assert event.source.startswith("tests/test_attention_imports.py:")


# -- Hugging Face's models ---------------------------------------------------------------------------------------------


def test_a_decoder_with_what_it_listens_to() -> None:
    config = transformers.WhisperConfig(
        **{"vocab_size": 37, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8},
        **{"max_source_positions": 10, "max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 3, "use_cache": False, "attn_implementation": "sdpa"},
    )
    module = drawn(transformers.WhisperModel(config)).decoder

    def example(batch: int, length: int) -> dict[str, Any]:
        return {**tokens(batch, length), "encoder_hidden_states": torch.randn(batch, 10, 32)}

    names = {"input_ids": "B T", "attention_mask": "B T", "encoder_hidden_states": {0: "B"}}
    model = treadle.from_torch(module, example(2, 7), dynamic=names)
    exe = assert_equal(model, module, example(2, 7), example(3, 9))
    assert terms(exe.graph) == ["causal, mask(b t)", ""]


# -- shifted windows ---------------------------------------------------------------------------------------------------


def swin(attention: str) -> Any:
    config = transformers.SwinConfig(
        **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4},
        **{"drop_path_rate": 0.0, "attn_implementation": attention},
    )
    return drawn(transformers.SwinModel(config, add_pooling_layer=False))


def images(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))}


WINDOWED = ["bias(h s t)", "bias(h s t), bias(b s t)"]
"""Terms of windows: windows that are not shifted, and shifted windows, which do not extend across the image's edges."""


@pytest.mark.parametrize(("attention", "batch"), [("eager", "B"), ("sdpa", "B"), ("eager", 2)])
def test_shifted_windows_are_fused(attention: str, batch: str | int) -> None:
    module = swin(attention)
    open_ = batch == "B"
    model = treadle.from_torch(module, images(2), dynamic={"pixel_values": {0: "B"}} if open_ else None)
    exe = assert_equal(model, module, images(2), *[images(3)] * open_)
    assert terms(exe.graph) == WINDOWED
    assert not [e for r in exe.optimized.log for e in r.refusals if "attention" in r.name]


@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])
def test_shifted_windows_of_a_file_are_fused(dynamo: bool, tmp_path: Path) -> None:
    class States(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = swin("eager")

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values).last_hidden_state

    path = tmp_path / "swin.onnx"
    found = exported(States(), tuple(images(2).values()), path, "pixel_values", {0: "B"}, dynamo)
    assert terms(optimized(found).graph) == WINDOWED
    inputs = {"pixel_values": images(3)["pixel_values"].numpy()}
    (expected,) = runtime(str(path), inputs).values()
    for got in answers(found, inputs):
        np.testing.assert_allclose(got["y"], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
