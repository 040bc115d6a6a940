"""Attentions in Hugging Face's exports are fused, with their masks, and the numbers equal those of the file.

This is a part of the measurement of benchmarks/fusion.py: one export of each kind of attention, by both exporters.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.fusion import TOLERANCE, Row, attentions, difference, reasons, terms
from benchmarks.hf_exports import Case, export
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.sites.fusion_sites import find_sites

PADDED = "mask(b t)"
CAUSAL = "causal, mask(b t)"
AVERAGING = "bias(b t)"
"""Padding by a large negative number that is added: a row without keys averages over all keys."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bert-script-eager-14", [AVERAGING] * 2),
        ("gpt2-script-sdpa-18", [CAUSAL] * 2),
        ("vit-script-sdpa-14", [""] * 2),
        ("clip-text-script-sdpa-18", [CAUSAL] * 2),
        ("t5-decoder-script-sdpa-18", ["causal, t5_relative(8, 12)", AVERAGING] * 2),
        ("marian-script-sdpa-14", [PADDED] * 2 + ["causal", PADDED] * 2),
        ("mistral-script-sdpa-18", ["causal, window(4), mask(b t)"] * 2),
        ("gemma-script-sdpa-14", [CAUSAL] * 2),
        ("whisper-decoder-script-sdpa-18", [CAUSAL, ""] * 2),
        ("t5-encoder-dynamo-sdpa-18", [f"{AVERAGING}, t5_relative(8, 9, bidirectional)"] * 2),
    ],
)
def test_every_attention_is_fused(text: str, expected: list[str], tmp_path: Path) -> None:
    case = Case.parse(text)
    exported = export(case, tmp_path)
    assert not exported.fixed
    found = import_onnx(exported.path)
    optimized = PassManager(DEFAULT).run(found.graph)
    assert reasons(optimized) == {}
    assert attentions(optimized.graph) == case.attentions
    assert terms(optimized.graph) == expected
    assert {site.kind for site in find_sites(optimized.graph) if site.op is None} == set()
    assert difference(case, exported.path, found, optimized.graph) <= TOLERANCE


def test_the_measure_sees_what_is_missing(tmp_path: Path) -> None:
    """Without the pass, every site stays unfused and unexplained. With other weights, the numbers differ greatly."""
    case = Case("distilbert", "script", "eager", 18)
    exported = export(case, tmp_path)
    found = import_onnx(exported.path)
    without = PassManager([p for p in DEFAULT if p.name != "fuse-attention"]).run(found.graph)
    assert attentions(without.graph) == 0
    assert reasons(without) == {"no reason is given": case.attentions}
    row = Row(str(case), case.attentions, difference=0.0)
    assert row.bad == "2 are not fused, 0 expected"
    assert not dataclasses.replace(row, fused=2).bad
    name = next(n for n, w in found.weights.items() if w.ndim == 2)
    wrong = found._replace(weights={**found.weights, name: np.roll(found.weights[name], 1, axis=0)})
    assert difference(case, exported.path, wrong, without.graph) > 1000 * TOLERANCE
