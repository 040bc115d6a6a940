"""Tasks with model families newer than BERT. Results equal those of Hugging Face's pipelines; each runs on one
backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import treadle as t
from tests.task_models import byte_level, mpnet, save, texts, without_specials, without_types, wordpiece
from tests.test_tasks import NAMES, pipeline, reference_answer
from treadle.backends.registry import find_backend
from treadle.program.program import Program
from treadle.tasks.tagging import TokenTagger

BACKEND = "numpy" if find_backend("tvm").available() else "tvm"

FAMILIES = [
    ("Electra", wordpiece, {}),
    ("MPNet", mpnet, {}),
    ("ModernBert", without_types, {"local_attention": 8}),
    ("Camembert", byte_level, {}),
]
DECODERS = [("GPT2", without_specials, {})]


@pytest.mark.parametrize(("family", "tokenizer", "config"), [*FAMILIES, *DECODERS])
def test_classifies_as_hugging_face(family: str, tokenizer: Any, config: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, f"{family}ForSequenceClassification", tokenizer(), num_labels=3, **config)
    first, second = texts(50), texts(50, seed=1)
    pairs = list(zip(first, second, strict=True))
    model = t.load(tmp_path, backend=BACKEND)
    theirs = pipeline("text-classification", tmp_path, top_k=None)
    expected = [*theirs(first), *theirs([{"text": a, "text_pair": b} for a, b in pairs])]
    for ours, wanted in zip(model.classify([*first, *pairs]), expected, strict=True):
        assert [each.label for each in ours.scores] == [each["label"] for each in wanted]
        np.testing.assert_allclose([each.score for each in ours.scores], [each["score"] for each in wanted], atol=1e-5)


@pytest.mark.parametrize(("family", "tokenizer", "config"), [*FAMILIES, *DECODERS])
def test_tags_as_hugging_face(family: str, tokenizer: Any, config: dict[str, Any], tmp_path: Path) -> None:
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    save(tmp_path, f"{family}ForTokenClassification", tokenizer(), **labels, **config)
    tagger, given = TokenTagger.open(Program.of(tmp_path, backend=BACKEND)), texts(50)
    theirs = pipeline("token-classification", tmp_path, aggregation_strategy="simple")
    for text, ours, wanted in zip(given, tagger.tag(given), theirs(given), strict=True):
        assert [(span.label, span.start, span.end, span.text) for span in ours] == [
            (each["entity_group"], each["start"], each["end"], each["word"]) for each in wanted
        ], text
        np.testing.assert_allclose([s.score for s in ours], [each["score"] for each in wanted], atol=1e-5)


@pytest.mark.parametrize(("family", "tokenizer", "config"), [*FAMILIES, ("Bert", wordpiece, {"pretraining": True})])
def test_fills_as_hugging_face(family: str, tokenizer: Any, config: dict[str, Any], tmp_path: Path) -> None:
    made, config = tokenizer(), dict(config)
    head = "ForPreTraining" if config.pop("pretraining", False) else "ForMaskedLM"
    save(tmp_path, family + head, made, **config)
    mask = made.mask_token
    given = [f"{text} {mask}" for text in texts(25)] + [f"{mask} {text}" for text in texts(25, seed=1)]
    found = t.load(tmp_path, backend=BACKEND).fill(given, top=4)
    theirs = pipeline("fill-mask", tmp_path, top_k=4)
    for text, ours, wanted in zip(given, found, map(theirs, given), strict=True):
        (mine,) = ours.masks
        assert [(f.id, f.token, f.text) for f in mine] == [
            (each["token"], each["token_str"], each["sequence"]) for each in wanted
        ], text
        np.testing.assert_allclose([f.score for f in mine], [each["score"] for each in wanted], atol=1e-5)


@pytest.mark.parametrize(("family", "tokenizer", "config"), [*FAMILIES, *DECODERS])
def test_answers_by_the_best_span(family: str, tokenizer: Any, config: dict[str, Any], tmp_path: Path) -> None:
    made = tokenizer()
    theirs = save(tmp_path, f"{family}ForQuestionAnswering", made, **config)
    asked = list(zip(texts(20, longest=5), texts(20, seed=2, longest=40), strict=True))
    for (question, text), ours in zip(asked, t.load(tmp_path, backend=BACKEND).answer(asked), strict=True):
        score, start, end = reference_answer(theirs, made, question, text, 15)
        assert ours is not None
        assert ours.score == pytest.approx(score, abs=1e-5)
        assert (ours.start, ours.end, ours.text) == (start, end, text[start:end]), (question, text)
