"""Beam search, compared with Hugging Face's `generate(num_beams=...)` token for token, and with all possible texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.backends.registry import find_backend
from treadle.ir.errors import UsageError
from treadle.runtime.beams import Beams, beam_search
from treadle.runtime.generation import generate
from treadle.runtime.token_rules import TokenRules, log_probabilities

TINY = {"vocab": 5, "dim": 16, "heads": 2, "layers": 2, "context": 16}


def test_with_all_beams_it_finds_the_best_of_all_texts() -> None:
    """With 125 beams and 5 tokens, no text is dropped in 3 steps. So the results are the best of all 125 texts and of
    all texts that ended earlier.
    """
    model = t.compile("gpt2", seed=6, **TINY)
    session = model.session(rows=125)
    (found,) = beam_search(session, [[1, 2]], most=3, beams=Beams(125, length_penalty=0.0, best=4, early="never"))
    scored = []
    for text in itertools.product(range(5), repeat=3):
        logits = model(tokens=np.array([[1, 2, *text[:-1]]]))["logits"][0, 1:]
        scored.append((sum(log_probabilities(row)[token] for row, token in zip(logits, text, strict=True)), text))
    scored.sort(reverse=True)
    assert [h.tokens for h in found] == [text for _, text in scored[:4]]
    np.testing.assert_allclose([h.score for h in found], [score for score, _ in scored[:4]], atol=1e-5)
    assert {h.ending for h in found} == {"count"}
    assert session.free == 125


def test_one_beam_is_greedy_and_prompts_do_not_depend_on_each_other() -> None:
    model = t.compile("gpt2", seed=3, vocab=30, dim=32, heads=4, layers=2, context=20)
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8]]
    greedy: list[list[int]] = [[] for _ in prompts]
    for token in generate(model.session(), prompts, most=6, stop=[7]):
        greedy[token.row].append(token.id)
    found = list(beam_search(model.session(rows=1), prompts, most=6, beams=Beams(1), stop=[7]))
    assert [list(each[0].tokens) for each in found] == greedy
    for rows in (4, 9, 12):
        together = list(beam_search(model.session(rows=rows), prompts, most=6, beams=Beams(4, best=2)))
        for prompt, each in zip(prompts, together, strict=True):
            (alone,) = beam_search(model.session(rows=4), [prompt], most=6, beams=Beams(4, best=2))
            assert [h.tokens for h in alone] == [h.tokens for h in each]
    (full,) = beam_search(model.session(rows=4), [[1] * 18], most=10, beams=Beams(4))
    assert (len(full[0].tokens), full[0].ending) == (3, "context")
    assert list(beam_search(model.session(rows=4), prompts, most=0)) == [[], [], []]


def test_rows_are_given_back_where_a_search_is_broken_off() -> None:
    session = t.compile("gpt2", seed=3, **TINY).session(rows=6)
    texts = beam_search(session, [[1], [2], [3]], most=4, beams=Beams(2))
    next(texts)
    texts.close()  # type: ignore[attr-defined]
    assert session.free == 6
    with pytest.raises(UsageError, match="exclude every token"):
        list(beam_search(session, [[1]], most=4, beams=Beams(2), rules=TokenRules(banned=(0, 1, 2, 3, 4))))
    assert session.free == 6


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"best": 5}, {"best": 0}, {"length_penalty": float("nan")}, {"early": "often"}]
)
def test_beams_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Beams(**options)


def test_more_beams_than_rows() -> None:
    session = t.compile("gpt2", seed=3, **TINY).session(rows=3)
    with pytest.raises(UsageError, match="4 beams need 4 rows, and 3 are free"):
        beam_search(session, [[1]], most=2)


# -- as Hugging Face ---------------------------------------------------------------------------------------------------

CASES: list[tuple[Beams, dict[str, Any], dict[str, Any]]] = [
    (Beams(4), {}, {}),
    (Beams(4, length_penalty=2.0, best=4), {}, {}),
    (Beams(5, length_penalty=0.0, best=3, early="never"), {}, {}),
    (Beams(3, length_penalty=-1.0, best=2, early=True), {}, {}),
    (Beams(4, length_penalty=0.6, best=2, early="never"), {"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    (Beams(2), {"repetition_penalty": 1.5, "fewest": 4}, {"repetition_penalty": 1.5, "min_new_tokens": 4}),
    (
        Beams(4, best=4),
        {"first": 9, "last": 3, "banned": (6, 16)},
        {"forced_bos_token_id": 9, "forced_eos_token_id": 3, "suppress_tokens": [6, 16]},
    ),
]


Texts = list[tuple[list[int], float]]
"""The tokens after the first, and the score of each text, the best text first."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Callable[..., Texts]]]:
    """Return a function of a model's name: its folder, and a function that returns Hugging Face's result for a source
    and a case. Results are computed once for all backends.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_models import save

    @cache
    def made(name: str) -> tuple[Path, Callable[..., Texts]]:
        place = tmp_path_factory.mktemp(name)
        theirs = save(name, place)

        @cache
        def found(case: int, *source: int) -> Texts:
            beams, _, options = CASES[case]
            tokens = torch.tensor([source])
            with torch.no_grad():
                wanted = theirs.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    decoder_start_token_id=START,
                    eos_token_id=END,
                    pad_token_id=1,
                    num_beams=beams.count,
                    num_return_sequences=beams.best,
                    length_penalty=beams.length_penalty,
                    early_stopping=beams.early,
                    max_new_tokens=14,
                    do_sample=False,
                    **{"forced_eos_token_id": None, **options},
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            return [
                (row[1:], float(score))
                for row, score in zip(wanted.sequences.tolist(), wanted.sequences_scores, strict=True)
            ]

        return place, found

    return made


START, END = 2, [3, 11, 16, 20]


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_token_for_token_as_hugging_face(name: str, backend: str, kept: Callable[..., Any]) -> None:
    from tests.hf_models import VOCAB

    if reason := find_backend(backend).available():
        pytest.skip(f"backend {backend}: {reason}")
    place, theirs = kept(name)
    session = t.compile(place, backend=backend).session(rows=10, capacity=20, memory={"S": 20})
    draw = np.random.default_rng(8)
    sources = [draw.integers(4, VOCAB, (n,)) for n in (3, 9, 17, 6, 1, 13, 4, 20)]
    sources = sources if backend == "numpy" else sources[:7:2]
    lengths = set()
    for case, (beams, rules, options) in enumerate(CASES):
        ours = beam_search(
            session,
            [[START]] * len(sources),
            most=14,
            beams=beams,
            rules=TokenRules(**rules),
            stop=END,
            inputs=[{"tokens": source} for source in sources],
        )
        for source, found in zip(sources, ours, strict=True):
            assert len(found) == beams.best
            for text, (made, score) in zip(found, theirs(case, *source.tolist()), strict=True):
                assert list(text.tokens) == made[: len(text.tokens)], (beams, options)
                assert set(made[len(text.tokens) :]) <= {1}
                assert text.score == pytest.approx(score, rel=1e-5)
                lengths.add((len(text.tokens), text.ending))
    assert len(lengths) > 5, "texts need many lengths to compare the rules of ending"
