"""Rules for the next tokens, as Hugging Face's logits processors apply them; and the tokens that may be sampled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from treadle.ir.errors import UsageError
from treadle.runtime.sampling import Sampling, most_likely
from treadle.runtime.stop_strings import StopStrings
from treadle.runtime.token_rules import TokenRules, log_probabilities

VOCAB = 12


def test_effects_of_each_rule() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0, 3.0])
    found = TokenRules(repetition_penalty=2.0).apply(logits, prompt=[0, 1, 0], generated=[])
    np.testing.assert_array_equal(found, [1, -4, 1, 0, 3])
    found = TokenRules(presence_penalty=0.5).apply(logits, prompt=[0], generated=[4, 4, 2])
    np.testing.assert_array_equal(found, [2, -2, 0.5, 0, 2.5])
    found = TokenRules(no_repeat_ngram=2).apply(logits, prompt=[1, 2, 1], generated=[3, 1])
    np.testing.assert_array_equal(np.isneginf(found), [False, False, True, True, False])
    found = TokenRules(no_repeat_ngram=1).apply(logits, prompt=[1], generated=[3])
    np.testing.assert_array_equal(np.isneginf(found), [False, True, False, True, False])
    assert np.isneginf(TokenRules(fewest=2).apply(logits, prompt=[], generated=[1], end=[4])).sum() == 1
    assert not np.isneginf(TokenRules(fewest=2).apply(logits, prompt=[], generated=[1, 1], end=[4])).any()
    rules = TokenRules(first=3, last=0, banned=(2,), banned_first=(1,))
    assert rules.apply(logits, prompt=[4], generated=[]).argmax() == 3
    assert np.isneginf(rules.apply(logits, prompt=[4], generated=[3])).nonzero()[0].tolist() == [1, 2]
    assert np.isneginf(rules.apply(logits, prompt=[4], generated=[3, 3])).nonzero()[0].tolist() == [2]
    assert rules.apply(logits, prompt=[4], generated=[3, 3], is_last=True).argmax() == 0
    np.testing.assert_array_equal(logits, [2, -2, 1, 0, 3])


def test_rules_that_leave_nothing_and_values_out_of_range() -> None:
    with pytest.raises(UsageError, match="exclude every token"):
        TokenRules(banned=(0, 1)).apply(np.zeros(2), prompt=[], generated=[])
    with pytest.raises(UsageError, match="token 7 is not in the vocabulary"):
        TokenRules(first=7).apply(np.zeros(2), prompt=[], generated=[])
    wrong: list[dict[str, Any]] = [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": float("inf")},
        {"no_repeat_ngram": -1},
        {"fewest": -1},
        {"shortest": -1},
        {"banned_runs": ((),)},
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            TokenRules(**options)


def test_rules_are_those_of_hugging_face() -> None:
    """All rules together, over random rows: scores are equal to float32's last bits."""
    torch = pytest.importorskip("torch")
    made_by = pytest.importorskip("transformers.generation.logits_process")
    draw = np.random.default_rng(0)
    rules = TokenRules(
        repetition_penalty=1.3,
        no_repeat_ngram=2,
        banned=(5,),
        banned_runs=((2, 6), (0, 2, 3)),
        fewest=3,
        shortest=5,
        first=2,
        last=1,
        banned_first=(4,),
    )
    most, start = 7, [0]
    theirs = made_by.LogitsProcessorList(
        [
            made_by.RepetitionPenaltyLogitsProcessor(1.3),
            made_by.NoRepeatNGramLogitsProcessor(2),
            made_by.NoBadWordsLogitsProcessor([[5], [2, 6], [0, 2, 3]], eos_token_id=None),
            made_by.MinLengthLogitsProcessor(5, torch.tensor([1]), device="cpu"),
            made_by.MinNewTokensLengthLogitsProcessor(len(start), 3, torch.tensor([1]), device="cpu"),
            made_by.ForcedBOSTokenLogitsProcessor(2),
            made_by.ForcedEOSTokenLogitsProcessor(len(start) + most, 1, device="cpu"),
            made_by.SuppressTokensAtBeginLogitsProcessor([4], len(start) + 1, device="cpu"),
        ]
    )
    for count in range(most):
        for _ in range(20):
            made = [int(i) for i in draw.integers(0, VOCAB, count)]
            made[-1:] = [2] * bool(made)  # so that banned runs occur
            logits = draw.normal(size=VOCAB).astype(np.float32)
            ours = rules.apply(logits, prompt=start, generated=made, end=[1], is_last=count + 1 == most)
            wanted = theirs(torch.tensor([[*start, *made]]), torch.from_numpy(logits.copy())[None])[0].numpy()
            np.testing.assert_allclose(ours, wanted, rtol=1e-6)


def sorted_draw(sampling: Sampling, logits: Any, step: int) -> int:
    """Return the token of a draw by the definition: sort all tokens, restrict them, and draw from the rest."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")[: sampling.top_k or None]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / sampling.temperature)
    before = np.cumsum(weights) - weights
    kept = (weights >= sampling.min_p) & (weights > 0) & (before < sampling.top_p * weights.sum() * (1 + 1e-12))
    kept[0] = True
    shares = np.cumsum(weights[kept]) / weights[kept].sum()
    drawn = np.random.default_rng([sampling.seed, 0, step]).random()
    return int(order[kept][min(int(np.searchsorted(shares, drawn, side="right")), kept.sum() - 1)])


@pytest.mark.parametrize("top_k", [0, 1, 7, 10**6])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (1e-9, 0.0), (1.0, 0.05), (0.93, 0.01)])
def test_a_draw_equals_the_draw_from_all_sorted_tokens(top_k: int, top_p: float, min_p: float) -> None:
    """Only a part of the tokens is sorted for a draw. The draw is the same as from the whole order: for peaked and flat
    distributions, with equal logits and excluded tokens.
    """
    rng = np.random.default_rng(7)
    for step in range(60):
        logits = (rng.standard_normal(3000) * rng.choice([0.1, 1.5, 5])).astype(np.float32)
        logits = np.round(logits * 8) / 8
        logits[rng.integers(0, 3000, 1000)] = -np.inf
        sampling = Sampling(float(rng.choice([0.3, 1, 2])), top_k, top_p, seed=3, min_p=min_p)
        assert sampling.choose(logits, step=step) == sorted_draw(sampling, logits, step)


def test_log_probabilities_of_a_few_tokens_have_the_same_bits() -> None:
    logits = np.random.default_rng(2).standard_normal(500).astype(np.float32)
    ids = [3, 499, 3, 0]
    assert log_probabilities(logits, ids).tolist() == log_probabilities(logits)[ids].tolist()


def test_most_likely_tokens_are_in_order_and_ties_go_to_the_lower_id() -> None:
    scores = np.array([1.0, 3.0, -np.inf, 3.0, 2.0, 1.0], np.float32)
    for count in range(1, 8):
        assert most_likely(scores, count).tolist() == [1, 3, 4, 0, 5, 2][:count]


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.26, 0.14, 0.1]))
    ids, shares = Sampling(temperature=1.0, min_p=0.27).distribution(logits)
    assert ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(shares, np.array([0.5, 0.26, 0.14]) / 0.9)
    assert Sampling(temperature=1.0, min_p=1.0).distribution(logits)[0].tolist() == [0]
    with pytest.raises(UsageError, match="min_p must lie between 0 and 1"):
        Sampling(min_p=1.1)


def test_log_probabilities() -> None:
    np.testing.assert_allclose(np.exp(log_probabilities(np.array([1e4, 1e4], np.float32))), [0.5, 0.5])


@pytest.mark.parametrize(
    ("strings", "text", "certain", "ends"),
    [
        (["User:"], "Hello. Us", "Hello. ", False),
        (["User:"], "Hello. Use it", "Hello. Use it", False),
        (["User:"], "Hello. User: what", "Hello. ", True),
        (["aab"], "xaaa", "xa", False),
        (["b", "ab"], "xab", "x", True),
        (["abca", "b"], "xabca", "xa", True),
        (["ab", "b"], "xa", "x", False),
        ([], "anything", "anything", False),
    ],
)
def test_stop_strings_hold_back_what_may_be_one(strings: list[str], text: str, certain: str, ends: bool) -> None:
    assert StopStrings(strings).split(text) == (certain, ends)


def test_streamed_text_is_never_retracted() -> None:
    """Random texts are read character by character. The emitted text only grows, and ends where a stop string is
    complete.
    """
    draw = np.random.default_rng(1)
    for _ in range(300):
        text = "".join(draw.choice(list("ab"), 12))
        watch = StopStrings(["".join(draw.choice(list("ab"), draw.integers(1, 5))) for _ in range(2)])
        report = ""
        for at in range(1, len(text) + 1):
            certain, ends = watch.split(text[:at])
            assert certain.startswith(report)
            report = certain
            if ends:
                break
        assert watch.split(text)[0] == report, "it does not matter in which pieces a text comes"
        assert ends == any(stop in text for stop in watch.strings)


@pytest.mark.parametrize("strings", [[""], "ab", [3]])
def test_stop_strings_that_are_none(strings: Any) -> None:
    with pytest.raises(UsageError, match="stop strings are texts"):
        StopStrings(strings)
