"""Artifacts of models that compute in bf16: weights that are read in bf16 alone are stored so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

import treadle as t
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.analysis.narrow_reads import read_only_in
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.types import bf16, f32


def narrow_model(tokens: Annotated[t.Tensor, t.i64["B S"]]) -> t.Tensor:
    """A table that is gathered, one that is gathered and multiplied, and matrices of products, one of them returned."""
    x = t.embed(tokens, 50, 32, name="gathered") + t.embed(tokens, 60, 32, name="tied")
    x = t.linear(x, 512, name="up")
    x = t.linear(t.gelu(x), 32, name="down")
    return t.unembed(x, tied="tied")


@pytest.mark.parametrize("backend", ["tvm", "torch"])
def test_weights_that_are_read_in_bf16_alone_are_stored_so(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    whole, narrow = tmp_path / "whole.treadle", tmp_path / "narrow.treadle"
    model = t.model(narrow_model)
    t.compile(model, backend=backend).save(whole)
    exe = t.compile(model, backend=backend, dtype="bf16")
    exe.save(narrow)
    file = SafetensorsFile.open(narrow)
    stored = {name.removeprefix("weight/"): file[name].dtype for name in file if name.startswith("weight/")}
    assert {name for name, dtype in stored.items() if dtype == "bf16"} == {"up.weight", "down.weight"}
    tables = (50 + 60) * 32 * 4
    assert narrow.stat().st_size - tables < 0.55 * (whole.stat().st_size - tables) + 2000  # and both graphs
    tokens = np.arange(12).reshape(2, 6)
    again = t.load_artifact(narrow)
    (made,), (reloaded,) = exe(tokens=tokens).values(), again(tokens=tokens).values()
    assert made.tobytes() == reloaded.tobytes()
    again.save(tmp_path / "again.treadle")
    assert (tmp_path / "again.treadle").read_bytes() == narrow.read_bytes()


def test_a_weight_that_is_read_in_float32_may_not_be_stored_in_bf16(tmp_path: Path) -> None:
    b = Builder(Graph("reads"))
    names = ("cast", "moved", "both", "returned", "plain", "unused")
    w = {name: b.parameter(name, "f32[4, 4]") for name in names}
    x = b.input("x", "f32[N, 4]")
    made = [b.matmul(b.cast(x, to=bf16), b.cast(w["cast"], to=bf16), to=f32)]
    made.append(b.matmul(b.cast(x, to=bf16), b.cast(b.rearrange(w["moved"], pattern="a b -> b a"), to=bf16), to=f32))
    made.append(b.matmul(b.cast(x, to=bf16), b.cast(w["both"], to=bf16), to=f32) + b.matmul(x, w["both"]))
    made.append(b.matmul(b.cast(x, to=bf16), b.cast(w["returned"], to=bf16), to=f32))
    made.append(b.matmul(x, w["plain"]))
    b.outputs(**{f"y{i}": each for i, each in enumerate(made)}, w=w["returned"])
    assert read_only_in(bf16, b.graph) == {"cast", "moved"}
