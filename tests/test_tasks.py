"""Tasks on encoders with heads: labels, scores, spans and offsets equal the results of Hugging Face's pipelines."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import treadle as t
from tests.task_models import byte_level, save, texts, wordpiece
from treadle.backends.registry import find_backend
from treadle.cli import COMMANDS, app
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.program import Program
from treadle.tasks.heads import task_of
from treadle.tasks.loaded import LoadedModel
from treadle.tasks.tagging import GROUPINGS, TokenTagger

BACKENDS = ("numpy", "torch", "tvm")
NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := find_backend(request.param).available():
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


Folders = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function that creates a folder with a model once, for the tests of all backends."""
    made: dict[str, tuple[Path, Any]] = {}

    def folder_of(architecture: str, tokenizer: Any, **config: Any) -> tuple[Path, Any]:
        key = json.dumps([architecture, tokenizer.__name__, config])
        if key not in made:
            place = tmp_path_factory.mktemp(architecture)
            made[key] = place, save(place, architecture, tokenizer(), **config)
        return made[key]

    return folder_of


def pipeline(task: str, place: Path, **options: Any) -> Any:
    return transformers.pipeline(task, model=str(place), device="cpu", **options)


_ANSWERS: dict[str, Any] = {}


def answered(task: str, place: Path, given: Any, **options: Any) -> Any:
    """Return the result of Hugging Face's pipeline for one of the shared folders. Each is computed once."""
    key = json.dumps([task, str(place), given, options])
    if key not in _ANSWERS:
        _ANSWERS[key] = pipeline(task, place, **options)(given)
    return _ANSWERS[key]


def invoked(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


# -- classify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "config"),
    [
        ("BertForSequenceClassification", wordpiece, {"id2label": {0: "bad", 1: "fair", 2: "good"}}),
        ("BertForSequenceClassification", wordpiece, {"num_labels": 4, "problem_type": "multi_label_classification"}),
        ("DistilBertForSequenceClassification", wordpiece, {"num_labels": 1, "problem_type": "regression"}),
        ("RobertaForSequenceClassification", byte_level, {"num_labels": 3}),
        ("AlbertForSequenceClassification", wordpiece, {"num_labels": 1}),
    ],
)
def test_classifies_as_hugging_face(
    architecture: str, tokenizer: Any, config: dict[str, Any], backend: str, kept: Folders
) -> None:
    place, _ = kept(architecture, tokenizer, **config)
    first, second = texts(50), texts(50, seed=1)
    model = t.load(place, backend=backend)
    theirs = answered("text-classification", place, first, top_k=None)
    for ours, wanted in zip(model.classify(first), theirs, strict=True):
        assert [each.label for each in ours.scores] == [each["label"] for each in wanted]
        np.testing.assert_allclose([each.score for each in ours.scores], [each["score"] for each in wanted], atol=1e-5)
    pairs = [{"text": a, "text_pair": b} for a, b in zip(first, second, strict=True)]
    theirs = answered("text-classification", place, pairs, top_k=None)
    for ours, wanted in zip(model.classify(list(zip(first, second, strict=True))), theirs, strict=True):
        assert [each.label for each in ours.scores] == [each["label"] for each in wanted]
        np.testing.assert_allclose([each.score for each in ours.scores], [each["score"] for each in wanted], atol=1e-5)
    assert model.classify(first[0]).label == model.classify(first)[0].label


def test_a_text_that_is_too_long_loses_its_end(tmp_path: Path) -> None:
    save(tmp_path, "BertForSequenceClassification", wordpiece())
    model = t.load(tmp_path)
    long, short = model.classify(["the cat " * 40, "the cat"])
    assert (long.cut, long.tokens, short.cut) == (True, 40, False)
    assert model.classify("the cat " * 80).scores == pytest.approx(long.scores)


# -- tag -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [("BertForTokenClassification", wordpiece), ("RobertaForTokenClassification", byte_level)],
)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words:UserWarning")  # Hugging Face's, of byte-level
def test_tags_as_hugging_face(architecture: str, tokenizer: Any, backend: str, kept: Folders) -> None:
    place, _ = kept(architecture, tokenizer, id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    tagger = TokenTagger.open(Program.of(place, backend=backend))
    for grouping in GROUPINGS:
        given = texts(50 if grouping == GROUPINGS[0] else 10)
        theirs = answered("token-classification", place, given, aggregation_strategy=grouping)
        for text, ours, wanted in zip(given, tagger.tag(given, grouping=grouping), theirs, strict=True):
            named = [each.get("entity", each.get("entity_group")) for each in wanted]
            assert [(span.label, span.start, span.end) for span in ours] == [
                (name, each["start"], each["end"]) for name, each in zip(named, wanted, strict=True)
            ], (grouping, text)
            assert [span.text for span in ours] == [each["word"] for each in wanted], (grouping, text)
            np.testing.assert_allclose([s.score for s in ours], [each["score"] for each in wanted], atol=1e-5)


# -- fill ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "mask"),
    [
        ("BertForMaskedLM", wordpiece, "[MASK]"),
        ("RobertaForMaskedLM", byte_level, "<mask>"),
        ("AlbertForMaskedLM", wordpiece, "[MASK]"),
        ("DistilBertForMaskedLM", wordpiece, "[MASK]"),
    ],
)
def test_fills_as_hugging_face(architecture: str, tokenizer: Any, mask: str, backend: str, kept: Folders) -> None:
    place, _ = kept(architecture, tokenizer)
    draw = np.random.default_rng(3)
    given = []
    for number, text in enumerate(texts(50)):
        words = text.split(" ")
        for at in draw.choice(len(words), min(len(words), 1 + number % 2), replace=False):
            words[at] = mask
        given.append(" ".join(words))
    found = t.load(place, backend=backend).fill(given, top=4)
    theirs = answered("fill-mask", place, given, top_k=4)
    for text, ours, wanted in zip(given, found, theirs, strict=True):
        rows = wanted if isinstance(wanted[0], list) else [wanted]
        assert len(ours.masks) == len(rows) == text.count(mask)
        for mine, row in zip(ours.masks, rows, strict=True):
            assert [f.id for f in mine] == [each["token"] for each in row], text
            assert [f.token for f in mine] == [each["token_str"] for each in row]
            assert [f.text for f in mine] == [each["sequence"] for each in row]
            np.testing.assert_allclose([f.score for f in mine], [each["score"] for each in row], atol=1e-5)


def test_among_some_tokens(tmp_path: Path) -> None:
    save(tmp_path, "BertForMaskedLM", wordpiece())
    words = ["cat", "dog", "house"]
    asked = ["fill", str(tmp_path), "the [MASK] runs", *(w for word in words for w in ("--among", word))]
    report = json.loads(invoked(*asked, "--json").stdout)
    wanted = pipeline("fill-mask", tmp_path)("the [MASK] runs", targets=words)
    assert [each["id"] for each in report["texts"][0]["masks"][0]] == [each["token"] for each in wanted]
    assert [each["score"] for each in report["texts"][0]["masks"][0]] == pytest.approx(
        [each["score"] for each in wanted], abs=1e-5
    )
    (row,) = report["texts"][0]["masks"]
    shown = ", ".join(f"{each['token'].strip()} {each['score']:.4f}" for each in row[:2])
    assert invoked(*asked, "--top", "2").stdout == f"the [MASK] runs\n  {shown}\n"
    assert "must be tokens of the vocabulary" in invoked("fill", str(tmp_path), "a [MASK]", "--among", "zebra").stderr
    assert "a text has no [MASK]" in invoked("fill", str(tmp_path), "a cat").stderr
    with pytest.raises(UsageError, match="a text has no") as caught:
        t.load(tmp_path).fill("a cat " * 99)
    assert caught.value.received == ("a cat " * 99)[:200]


# -- answer ----------------------------------------------------------------------------------------------------


def reference_answer(model: Any, tokenizer: Any, question: str, text: str, longest: int) -> tuple[float, int, int]:
    """Return (score, start, end) of the best span by trying all spans, over windows from Hugging Face's tokenizer."""
    best = (-1.0, 0, 0)
    encoded = tokenizer(
        question,
        text,
        truncation="only_second",
        max_length=40,
        stride=20,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for n, ids in enumerate(encoded["input_ids"]):
        encoding = encoded.encodings[n]
        given = {"input_ids": torch.tensor([ids])}
        if "token_type_ids" in encoded:
            given["token_type_ids"] = torch.tensor([encoded["token_type_ids"][n]])
        with torch.no_grad():
            out = model(**given)
        of_text = [part == 1 for part in encoding.sequence_ids]
        known = torch.tensor(of_text)
        known[0] |= encoding.sequence_ids[0] is None  # the first token stands for "no answer"
        start, end = (
            torch.softmax(logits[0].double().masked_fill(~known, -torch.inf), -1)
            for logits in (out.start_logits, out.end_logits)
        )
        for i in range(len(ids)):
            for j in range(i, min(i + longest, len(ids))):
                score = float(start[i] * end[j])
                if of_text[i] and of_text[j] and score > best[0]:
                    first, last = (encoding.word_to_chars(encoding.word_ids[k], 1) for k in (i, j))
                    best = (score, first[0], last[1])
    return best


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [
        ("BertForQuestionAnswering", wordpiece),
        ("DistilBertForQuestionAnswering", wordpiece),
        ("RobertaForQuestionAnswering", byte_level),
    ],
)
def test_answers_by_the_best_span(architecture: str, tokenizer: Any, backend: str, kept: Folders) -> None:
    """transformers 5 has no question-answering pipeline, so results are compared with the definition in transformers
    4.
    """
    made = tokenizer()
    place, theirs = kept(architecture, tokenizer)
    questions, given = texts(50, longest=5), texts(50, seed=2, longest=60)
    model = t.load(place, backend=backend)
    windows = 0
    for question, text, ours in zip(
        questions, given, model.answer(list(zip(questions, given, strict=True))), strict=True
    ):
        key = json.dumps([architecture, question, text])
        if key not in _ANSWERS:
            _ANSWERS[key] = reference_answer(theirs, made, question, text, 15)
        score, start, end = _ANSWERS[key]
        assert ours.score == pytest.approx(score, abs=1e-5)
        assert (ours.start, ours.end, ours.text) == (start, end, text[start:end]), (question, text)
        windows += len(made(question, text)["input_ids"]) > 40
    assert windows > 5, "some texts are read in several windows"
    several = model.answerer.answer([(questions[0], given[0])], top=3)[0]
    assert [each.score for each in several] == sorted((each.score for each in several), reverse=True)
    assert len({(each.start, each.end) for each in several}) == len(several)


def test_a_question_that_leaves_no_room(tmp_path: Path) -> None:
    save(tmp_path, "BertForQuestionAnswering", wordpiece())
    model = t.load(tmp_path)
    with pytest.raises(UsageError, match="leaves no room for the text in the 40 tokens"):
        model.answer("cat " * 60, "the cat sits")
    with pytest.raises(UsageError, match="a question needs a text"):
        model.answer("", "the cat sits")
    with pytest.raises(UsageError, match="a question needs a text"):
        model.answer("where?")  # type: ignore[call-overload]


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_head_that_the_task_has_no_use_for(tmp_path: Path) -> None:
    save(tmp_path, "BertForMaskedLM", wordpiece())
    model = t.load(tmp_path)
    with pytest.raises(UsageError, match="has no head to classify texts") as refused:
        model.classify("the cat")
    assert refused.value.received == "BertForMaskedLM"
    assert "ends in ForSequenceClassification" in str(refused.value.hint)
    for words in (["answer", "what"], ["tag"], ["translate"], ["summarize"]):
        done = invoked(words[0], str(tmp_path), *words[1:], "the cat")
        assert done.exit_code == 2
        assert "has no head to" in done.stderr


@pytest.mark.parametrize(
    "labels", [{"0": "a", "2": "b"}, {"0": "a", "1": 3}, {"x": "a"}, {"0": "a", "1": "b", "2": "c", "3": "d"}]
)
def test_labels_that_do_not_fit_the_head(labels: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "BertForSequenceClassification", wordpiece(), num_labels=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": labels}))
    with pytest.raises(CheckpointError):
        t.load(tmp_path).classify("the cat")


def test_options_of_the_other_kind(tmp_path: Path) -> None:
    save(tmp_path, "BertForMaskedLM", wordpiece())
    with pytest.raises(UsageError, match="does not take memory"):
        t.load(tmp_path, memory="1MB")
    for wrong, what in ((["--grouping", "some"], "there is no grouping 'some'"),):
        save(tmp_path / "tags", "BertForTokenClassification", wordpiece())
        assert what in invoked("tag", str(tmp_path / "tags"), "the cat", *wrong).stderr


def test_the_commands_tell_what_the_methods_give(tmp_path: Path) -> None:
    save(tmp_path / "c", "BertForSequenceClassification", wordpiece(), id2label={0: "bad", 1: "good"})
    file = tmp_path / "texts.txt"
    file.write_text("the cat sits\n\nthe dog runs\n", encoding="utf-8")
    report = json.loads(invoked("classify", str(tmp_path / "c"), "--file", str(file), "--json", "--top", "2").stdout)
    model = t.load(tmp_path / "c")
    for each, ours in zip(report["texts"], model.classify(["the cat sits", "the dog runs"]), strict=True):
        assert each["labels"] == [{"label": s.label, "score": s.score} for s in ours.scores]
    shown = invoked("classify", str(tmp_path / "c"), "the cat sits").stdout
    assert shown == f"{model.classify('the cat sits').label} {model.classify('the cat sits').score:.4f}  the cat sits\n"
    assert invoked("classify", str(tmp_path / "c"), "the cat " * 40).stdout.endswith(f"  {'the cat ' * 40} (cut)\n")
    paired = invoked("classify", str(tmp_path / "c"), "the cat sits", "--pair", "a dog", "--json")
    assert json.loads(paired.stdout)["texts"][0]["pair"] == "a dog"
    assert (
        "1 texts, but 2 values of --pair"
        in invoked("classify", str(tmp_path / "c"), "x", "--pair", "a", "--pair", "b").stderr
    )

    save(tmp_path / "q", "BertForQuestionAnswering", wordpiece())
    report = json.loads(invoked("answer", str(tmp_path / "q"), "where?", "Ada lived in London.", "--json").stdout)
    (answer,) = report["texts"][0]["answers"]
    assert answer["text"] == "Ada lived in London."[answer["start"] : answer["end"]]
    place = f"({answer['score']:.4f}, characters {answer['start']} to {answer['end']})"
    shown = invoked("answer", str(tmp_path / "q"), "where?", "Ada lived in London.").stdout
    assert shown == f"{answer['text']}  {place}\n"

    save(tmp_path / "t", "BertForTokenClassification", wordpiece(), id2label=NAMES)
    report = json.loads(invoked("tag", str(tmp_path / "t"), "Ada lived in London", "--json").stdout)
    spans = [
        f"  {each['label']:10} {each['score']:.4f}  {each['text']}  (characters {each['start']} to {each['end']})\n"
        for each in report["texts"][0]["spans"]
    ]
    assert spans
    assert invoked("tag", str(tmp_path / "t"), "Ada lived in London").stdout == "".join(
        ["Ada lived in London\n", *spans]
    )


WRONG_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("generate", {"sampling": {"temperature": 1}}, "sampling must be t.Sampling(...)"),
    ("stream", {"rules": 1.2}, "rules must be t.TokenRules(...)"),
    ("generate", {"most": "3"}, "most must be an integer"),
    ("fill", {"top": 2.5}, "top must be an integer"),
    ("perplexity", {"window": True}, "window must be an integer"),
    ("generate", {"stop": 3}, "stop must be a list of strings"),
    ("search", {"beams": "2"}, "beams must be t.Beams(...)"),
    ("search", {"beams": True}, "beams must be t.Beams(...)"),
]


@pytest.mark.parametrize(("method", "options", "what"), WRONG_VALUES)
def test_an_option_of_another_type_is_refused(method: str, options: dict[str, Any], what: str) -> None:
    """The error is raised before the model is read. A hint is a value of the right type."""
    model = LoadedModel(Program.of("no-such-folder"))
    with pytest.raises(UsageError, match=re.escape(what)) as caught:
        getattr(model, method)("the cat", **options)
    name, _, code = str(caught.value.hint).partition("=")
    if caught.value.hint is not None:
        with pytest.raises(UsageError, match="no-such-folder"):
            getattr(model, method)("the cat", **{name: eval(code, {"t": t})})


@pytest.mark.parametrize("texts", [3, None, [1, 2], ["a", b"b"]])
@pytest.mark.parametrize("method", ["embed", "perplexity"])
def test_a_text_is_a_string(method: str, texts: Any) -> None:
    with pytest.raises(UsageError, match="must be a string"):
        getattr(LoadedModel(Program.of("no-such-folder")), method)(texts)


OTHER_NAMES = [
    ("generate", "max_new_tokens", "most=1"),
    ("generate", "max_length", "most=1"),
    ("generate", "max_new_token", "most=1"),
    ("generate", "temperature", "sampling=t.Sampling(temperature=1)"),
    ("generate", "do_sample", "sampling=t.Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=1)"),
    ("generate", "num_beams", "search(prompts, beams=t.Beams(count=1))"),
    ("generate", "repetition_penalty", "rules=t.TokenRules(repetition_penalty=1)"),
    ("generate", "stop_strings", 'stop=["."]'),
    ("generate", "samplng", "sampling=..."),
    ("summarize", "max_new_tokens", "most=1"),
    ("summarize", "temperature", "summarize(texts, *, most=None)"),
    ("tag", "groupng", "grouping=..."),
]


@pytest.mark.parametrize(("method", "option", "tried"), OTHER_NAMES)
def test_an_option_of_another_name_is_told_as_it_is_called_here(method: str, option: str, tried: str) -> None:
    """The error is raised before the model is read, and its hint has the method's own name of the option."""
    model = LoadedModel(Program.of("no-such-folder"))
    with pytest.raises(UsageError, match=f"{method} has no option '{option}'") as caught:
        getattr(model, method)("the cat", **{option: 1})
    assert str(caught.value.hint).startswith(tried)
    called = tried if "(" in tried.partition("=")[0] else f"{method}(prompts, {tried})"
    if "..." not in tried and "*" not in tried:
        call: Any = ast.parse(called, mode="eval").body
        words = {word.arg: eval(ast.unparse(word.value), {"t": t}) for word in call.keywords if word.arg}
        signature = inspect.signature(getattr(model, call.func.id))
        signature.bind("the cat", **words)


def test_a_hint_has_the_numbers_of_the_call() -> None:
    model = LoadedModel(Program.of("no-such-folder"))
    with pytest.raises(UsageError) as caught:
        model.generate("the cat", do_sample=True, temperature=0.5, top_k=9, max_new_tokens=5)  # type: ignore[call-overload]
    assert caught.value.hint == "sampling=t.Sampling(temperature=0.5, top_k=9)"
    with pytest.raises(UsageError) as caught:
        model.generate("the cat", max_new_tokens=5)  # type: ignore[call-overload]
    assert caught.value.hint == "most=5"


def test_missing_files_are_reported_with_existing_ones() -> None:
    with pytest.raises(UsageError, match="there is no model 'nope'"):
        t.load("nope")
    with pytest.raises(UsageError, match="bert is a declaration of the zoo"):
        t.load("bert")
    with pytest.raises(CheckpointError, match="the file does not exist"):
        t.load_artifact("nope.treadle")


@pytest.mark.parametrize(
    ("architecture", "command"),
    [
        ("BertForTokenClassification", "tag"),
        ("BertForQuestionAnswering", "answer"),
        ("BertForMaskedLM", "fill"),
        ("GPT2LMHeadModel", "generate"),
        ("MistralForCausalLM", "generate"),
        ("BertModel", "embed"),
        ("T5ForConditionalGeneration", "translate"),
        ("WhisperForConditionalGeneration", "transcribe"),
    ],
)
def test_a_folder_without_a_head_leads_to_the_task_of_its_class(architecture: str, command: str) -> None:
    assert task_of({"architectures": [architecture], "vocab_size": 9}) == command
    assert command in COMMANDS


def test_the_task_of_a_vision_language_model_and_of_an_image_encoder() -> None:
    assert task_of({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}) == "describe"
    assert task_of({"architectures": ["ViTModel"]}) is None


@pytest.mark.parametrize("text", ["the <mask> runs", "the [mask] runs", "the ___ runs", "the cat"])
def test_a_text_without_a_mask_is_kept_in_the_hint(text: str, tmp_path: Path) -> None:
    save(tmp_path, "BertForMaskedLM", wordpiece())
    model = t.load(tmp_path)
    with pytest.raises(UsageError, match=r"has no \[MASK\]") as caught:
        model.fill(text)
    assert str(caught.value.hint) == ("the cat [MASK]" if text == "the cat" else "the [MASK] runs")
    model.fill(str(caught.value.hint))
