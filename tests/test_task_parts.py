"""Parts of tasks, compared with results computed by hand: windows and spans of answers, tags of tokens and words,
tokens for masks, pieces of recordings.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import EncodedText
from treadle.ir.errors import CheckpointError, UsageError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.types import parse_type
from treadle.runtime.token_rules import TokenRules
from treadle.tasks import answering, tagging, transcribing
from treadle.tasks.answering import Answer, QuestionAnswerer
from treadle.tasks.classifying import TextClassifier
from treadle.tasks.filling import MaskFiller
from treadle.tasks.labelling import ImageLabeller
from treadle.tasks.opening import OpenedModel, token_positions
from treadle.tasks.tagging import TaggedSpan, TokenTagger

# -- answers -----------------------------------------------------------------------------------------------------------


class Cut:
    """A stand-in for a tokenizer of words that records its truncation settings."""

    def __init__(self, most: int | None) -> None:
        self.max_tokens, self.asked = most, ()

    def encode(self, texts: list[Any], windows: Any = ()) -> Any:
        self.asked = windows
        return [[text.split()] if isinstance(text, str) else [] for text in texts]


@pytest.mark.parametrize(
    ("most", "words", "windows"),
    [
        (None, 3, (384, 128)), (500, 3, (384, 128)), (383, 3, (383, 128)), (40, 3, (40, 20)), (40, 17, (40, 20)),
        (40, 18, (40, 19)), (40, 37, (40, 0)),
    ],
)  # fmt: skip
def test_windows_share_a_third_unless_the_question_is_long(
    most: int | None, words: int, windows: tuple[int, int]
) -> None:
    """A pair has two more special tokens than a single text, and the window's part of the text must be at least one
    token longer than the overlap.
    """
    cut = Cut(most)
    opened: Any = SimpleNamespace(tokenizer=cut)
    QuestionAnswerer(opened)._windows(("w " * words, "text"))
    assert cut.asked == windows


def test_a_question_needs_a_place_for_one_token() -> None:
    opened: Any = SimpleNamespace(tokenizer=Cut(40))
    with pytest.raises(UsageError, match="leaves no room for the text in the 40 tokens") as caught:
        QuestionAnswerer(opened)._windows(("w " * 38, "text"))
    assert (caught.value.received, caught.value.hint) == ("38 tokens", "a shorter question")


def window(*words: str, question: int = 1) -> EncodedText:
    """Return a window whose tokens are single words: special token, question, special token, text, special token."""
    text, at = [], 0
    for word in words:
        text.append((at, at + len(word)))
        at += len(word) + 1
    count = len(words)
    return EncodedText(
        ids=tuple(range(question + count + 3)),
        types=(0,) * (question + count + 3),
        cut=False,
        offsets=((0, 0), *[(0, 1)] * question, (0, 0), *text, (0, 0)),
        parts=(None, *[0] * question, None, *[1] * count, None),
        words=(None, *range(question), None, *range(count), None),
    )


def test_spans_of_a_window_are_the_likeliest_pairs() -> None:
    """The end of a span is not before its start, and the span is not longer than `longest`. The first token has a
    score, but no span begins or ends there.
    """
    asked, logits = window("a", "b", "c"), np.full((7, 2), -1e9)
    logits[[0, 3, 5], 0] = np.log([0.5, 0.25, 0.25])
    logits[[3, 4, 5], 1] = np.log([0.25, 0.25, 0.5])
    found = answering._best_spans("a b c", asked, logits, top=9, longest=3)
    assert [(each.text, each.start, each.end) for each in found] == [
        ("a b c", 0, 5),
        ("c", 4, 5),
        ("a", 0, 1),
        ("a b", 0, 3),
    ]
    assert [each.score for each in found] == pytest.approx([0.125, 0.125, 0.0625, 0.0625])
    assert [each.text for each in answering._best_spans("a b c", asked, logits, top=9, longest=2)] == ["c", "a", "a b"]
    assert [each.text for each in answering._best_spans("a b c", asked, logits, top=2, longest=1)] == ["c", "a"]
    assert answering._best_spans("", window(), logits[:4], top=1, longest=1) == []


def test_an_answer_of_two_windows_is_told_once_with_its_better_score() -> None:
    asked, counts = window("a", "b"), list[int]()
    better = np.full((6, 2), -1e9)
    better[3] = 0.0
    worse = better.copy()
    worse[0] = 0.0
    other = np.full((6, 2), -1e9)
    other[4] = other[0] = 0.0
    opened: Any = SimpleNamespace(run=lambda windows: enumerate([worse, better, other]))
    reader = QuestionAnswerer(opened)
    object.__setattr__(reader, "_windows", lambda pair: [[asked] * 3])
    found = reader.answer([("what", "a b")], top=5, progress=counts.append)
    assert found == [[Answer("a", 1.0, 0, 1), Answer("b", 0.25, 2, 3)]]
    assert counts == [1, 2, 3]
    assert reader.answer([("what", "a b")]) == [found[0][:1]]
    for top, longest in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="top and longest must be 1 or more") as caught:
            reader.answer([("what", "a b")], top=top, longest=longest)
        assert caught.value.received == f"top={top}, longest={longest}"
    for wrong in ([], [("what", " ")], [(" ", "a")]):
        with pytest.raises(UsageError, match="a question needs a text that may contain the answer"):
            reader.answer(wrong)


def test_progress_is_told_input_by_input() -> None:
    """Progress counts finished inputs, although the task computes them in another order."""
    scores = np.array([1.0, 2.0])
    opened: Any = SimpleNamespace(
        config={"num_labels": 2, "id2label": {"0": "a", "1": "b"}},
        tokenizer=SimpleNamespace(encode=lambda texts: [[window("a")] for _ in texts]),
        run=lambda texts: ((n, scores * n) for n in (1, 0)),
    )
    counts: list[int] = []
    found = TextClassifier(opened, ("a", "b")).classify(["x", "y"], progress=counts.append)
    assert counts == [1, 2]
    assert [each.label for each in found] == ["a", "b"]
    assert found[0].scores[0].score == 0.5
    assert (found[0].tokens, found[0].cut) == (5, False)
    with pytest.raises(UsageError, match="there is no text to classify"):
        TextClassifier(opened, ("a", "b")).classify([])
    with pytest.raises(UsageError, match="there is no image to label"):
        ImageLabeller(opened, opened, (), {}).label([])


# -- tags --------------------------------------------------------------------------------------------------------------


def tagger(**tokenizer: Any) -> TokenTagger:
    """Return a tagger with a vocabulary in which token i has the name "ti". Names are joined with +."""
    parts = {"unknown": 99, "word_prefix": None, "name_of": "t{}".format, "join": "+".join, **tokenizer}
    opened: Any = SimpleNamespace(tokenizer=SimpleNamespace(**parts))
    return TokenTagger(opened, ("O", "B-X", "I-X", "I-Y"))


def scored(*best: int) -> Any:
    """Return scores [rows, labels]. The maximum of row i is at label best[i]: 0.9 in the first row, and 0.1 less in
    each further row.
    """
    rows = np.zeros((len(best), 4))
    for n, label in enumerate(best):
        rows[n, label] = 0.9 - n / 10
    return rows


def test_tokens_that_continue_a_word() -> None:
    """With a word-piece prefix, a token continues a word if its name is longer than its text. Without a prefix, a token
    continues a word if there is no space before it or at its start.
    """
    text = "ab c-d"
    asked = EncodedText((1, 2, 99, 3), (0,) * 4, ((0, 2), (3, 4), (4, 5), (5, 6)), (0, 0, 0, 0), (0, 1, 1, 1), False)
    pieces = list(tagger()._pieces(text, asked, scored(1, 1, 1, 1)))
    assert [(p.name, p.continues) for p in pieces] == [("t1", False), ("t2", False), ("-", False), ("t3", True)]
    pieces = list(tagger(word_prefix="##")._pieces(text, asked, scored(1, 1, 1, 1)))
    assert [(p.name, p.continues) for p in pieces] == [("t1", False), ("t2", True), ("-", False), ("t3", True)]
    special = EncodedText((1, 2), (0, 0), ((0, 0), (0, 2)), (None, 0), (None, 0), False)
    assert [p.name for p in tagger()._pieces(text, special, scored(1, 1))] == ["t2"]


@pytest.mark.parametrize(
    ("grouping", "spans"),
    [
        (
            "none",
            [("B-X", 0.9, "t0", 0, 1), ("I-X", 0.8, "t1", 1, 2), ("B-X", 0.7, "t2", 2, 3), ("I-Y", 0.6, "t3", 3, 4)],
        ),
        ("simple", [("X", 0.85, "t0+t1", 0, 2), ("X", 0.7, "t2", 2, 3), ("Y", 0.6, "t3", 3, 4)]),
        ("first", [("X", 0.9, "t0+t1", 0, 2), ("X", 0.7, "t2+t3", 2, 4)]),
        ("max", [("X", 0.9, "t0+t1", 0, 2), ("X", 0.7, "t2+t3", 2, 4)]),
        ("average", [("X", 0.45, "t0+t1", 0, 2), ("X", 0.35, "t2+t3", 2, 4)]),
    ],
)
def test_ways_to_make_spans(grouping: str, spans: list[tuple[str, float, str, int, int]]) -> None:
    """The input has two words of two tokens each, with the labels B-X I-X and B-X I-Y."""
    pieces = [tagging._Piece(f"t{n}", row, n, n + 1, n % 2 == 1) for n, row in enumerate(scored(1, 2, 1, 3))]
    found = tagger()._grouped(pieces, grouping)
    assert [(s.label, s.text, s.start, s.end) for s in found] == [(label, *rest) for label, _, *rest in spans]
    assert [s.score for s in found] == pytest.approx([score for _, score, *_ in spans])


def test_a_word_that_begins_with_what_continues_one_is_one() -> None:
    pieces = [tagging._Piece("a", scored(1)[0], 0, 1, True)]
    assert tagger()._grouped(pieces, "first") == [TaggedSpan("X", 0.9, "a", 0, 1)]
    assert tagger()._grouped([], "simple") == []


# -- masks -------------------------------------------------------------------------------------------------------------


def test_keys_that_a_mask_leaves_visible() -> None:
    ids = {"cat": 3, "[MASK]": 9}
    opened: Any = SimpleNamespace(tokenizer=SimpleNamespace(id_of=ids.get, encode=lambda texts: []))
    filler = MaskFiller(opened, "[MASK]")
    assert filler._ids(["cat"]) == [3]
    for names, received in ((["cat", "dog", "cow"], "dog"), ([], "no name")):
        with pytest.raises(UsageError, match="must be tokens of the vocabulary") as caught:
            filler._ids(names)
        assert caught.value.received == received
    with pytest.raises(UsageError, match="top must be 1 or more") as caught:
        filler.fill(["a"], top=0)
    assert caught.value.received == "0"
    with pytest.raises(UsageError, match="there is no text to fill"):
        filler.fill([])


# -- recordings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "vocabulary", "several"),
    [
        (None, 51_864, False), (None, 51_865, True), ({}, 51_865, True), ({"is_multilingual": False}, 51_865, False),
        ({"is_multilingual": True}, 5, True), ({"is_multilingual": "yes"}, 51_864, False),
    ],
)  # fmt: skip
def test_whether_a_model_knows_several_languages(said: Any, vocabulary: int, several: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert transcribing._knows_several(ModelFolder.find(tmp_path), vocabulary) == several


def test_tokens_of_languages_stand_between_two_others() -> None:
    names = [
        "<|before|>",
        "<|de|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|haw|>",
        "<|x|>",
        "<|long|>",
        "<|translate|>",
        "<|fr|>",
    ]
    ids = {name: n for n, name in enumerate(names)}
    tokenizer: Any = SimpleNamespace(id_of=ids.get, special_tokens=lambda: names)
    assert transcribing._languages(tokenizer) == {"en": 3, "haw": 4}
    tokenizer = SimpleNamespace(id_of=lambda name: None, special_tokens=lambda: names)
    assert transcribing._languages(tokenizer) == {}


@pytest.mark.parametrize(
    ("ids", "good"), [([0, 2**31 - 1], True), ([2**31], False), ([-1], False), ("x", False)], ids=str
)
def test_tokens_that_a_converted_whisper_never_says(ids: Any, good: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"suppress_ids": [4], "suppress_ids_begin": ids}))
    place = ModelFolder.find(tmp_path)
    if good:
        assert transcribing._converted_rules(place) == TokenRules(banned=(4,), banned_first=tuple(ids))
        return
    with pytest.raises(CheckpointError, match="suppress_ids_begin must be a list of ids"):
        transcribing._converted_rules(place)


def test_a_recording_is_cut_at_the_middle_of_the_quietest_tenth_of_a_second() -> None:
    """The quietest tenth of a second is searched in the last five seconds of the piece, or in the last half if the
    maximum length is below ten seconds.
    """
    rate = 16_000
    samples = np.ones(31 * rate)
    quiet = 26 * rate + 100
    samples[quiet : quiet + 1600] = 0
    samples[24 * rate : 24 * rate + 4000] = 0  # quiet, but too early
    assert list(transcribing._pieces(samples, 30 * rate)) == [(0, quiet + 800), (quiet + 800, 31 * rate)]
    assert list(transcribing._pieces(np.ones(30 * rate), 30 * rate)) == [(0, 30 * rate)]
    short = np.ones(9)
    short[[2, 6]] = 0
    assert next(transcribing._pieces(short, 8)) == (0, 6)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "bounds", "positions"),
    [
        ("i64[B, S]", {"B": Bounds(1, 9), "S": Bounds(1, 40)}, 40),
        ("i64[B, S]", {"S": Bounds(1)}, None),
        ("i64[B, 7]", {}, None),
    ],
)
def test_how_many_tokens_a_model_takes(tokens: str, bounds: dict[str, Bounds], positions: int | None) -> None:
    ports = [
        SimpleNamespace(name="lengths", type=parse_type("i64[B]")),
        SimpleNamespace(name="tokens", type=parse_type(tokens)),
    ]
    model: Any = SimpleNamespace(inputs=ports, graph=SimpleNamespace(symbols=bounds, functions={}))
    assert token_positions(model) == positions


def test_rows_go_through_the_model_in_batches_of_like_lengths() -> None:
    """An output with a value per token is sliced to the text's length. Only inputs that the model has are passed."""
    taken: list[dict[str, Any]] = []

    def run(**given: Any) -> Any:
        taken.append(given)
        return {"logits": given["tokens"][:, :, None] * 2.0, "pooled": given["tokens"][:, 0]}

    run.inputs = [SimpleNamespace(name=name) for name in ("tokens", "lengths")]  # type: ignore[attr-defined]
    model: Any = run
    opened, asked = OpenedModel("m", {}, model, model), [window("a"), window("a", "b", "c")]
    found = dict(opened.run(asked))
    assert {n: row[:, 0].tolist() for n, row in found.items()} == {0: [0, 2, 4, 6, 8], 1: [0, 2, 4, 6, 8, 10, 12]}
    assert [(list(each), each["lengths"].tolist()) for each in taken] == [(["tokens", "lengths"], [7, 5])]
    assert dict(opened.run(asked, output="pooled")) == {0: 0, 1: 0}
