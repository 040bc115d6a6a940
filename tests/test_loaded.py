"""`t.load(MODEL)`: one input returns a result, a list returns a list, and the arguments of a task reach its
implementation.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle as t
from tests.test_part_loading import written
from treadle.cli.application import app
from treadle.ir.errors import TreadleError, UsageError
from treadle.loading import load
from treadle.program.program import Program
from treadle.runtime.beams import Beams
from treadle.tasks.answering import Answer, QuestionAnswerer
from treadle.tasks.filling import Filled, Filling
from treadle.tasks.loaded import LoadedModel
from treadle.tasks.matching import Matched
from treadle.tasks.rewriting import Rewritten, TextRewriter
from treadle.tasks.scoring import Scored
from treadle.training.weight_files import write_weights

BEAMS = Beams(2)


class Asked:
    """A stand-in for the compiled task: it returns, for each input in turn, the method and its other arguments."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __getattr__(self, method: str) -> Any:
        def ask(inputs: list[Any], *more: Any, **given: Any) -> list[Any]:
            self.given = given
            return [(method, each, *more) for each in inputs]

        return ask


@pytest.mark.parametrize(
    ("method", "holder", "one", "given"),
    [
        ("classify", "classifier", "a", {}),
        ("classify", "classifier", ("a", "b"), {}),
        ("tag", "tagger", "a", {"grouping": "first"}),
        ("fill", "filler", "a", {"top": 3}),
        ("label", "labeller", "a.png", {}),
    ],
)
def test_one_gives_one_and_a_list_a_list(method: str, holder: str, one: Any, given: dict[str, Any]) -> None:
    model, asked = LoadedModel(Program.of("m")), Asked()
    model.__dict__[holder] = asked
    assert getattr(model, method)(one, **given) == (method, one)
    assert asked.given == given
    assert getattr(model, method)([one, one], **given) == [(method, one)] * 2
    assert getattr(model, method)([one], **given) == [(method, one)]


@pytest.mark.parametrize(
    ("method", "given"), [("translate", {"source": "en", "target": "de", "most": 9}), ("summarize", {"most": 4})]
)
def test_texts_that_become_texts(method: str, given: dict[str, Any]) -> None:
    model, said = LoadedModel(Program.of("m")), list[Any]()

    def rewrite(texts: list[str], **options: Any) -> list[Rewritten]:
        said.append(options)
        return [Rewritten(text.upper(), (), "end", False) for text in texts]

    model.__dict__["rewriter"] = SimpleNamespace(translate=rewrite, summarize=rewrite)
    assert getattr(model, method)("a", **given) == "A"
    assert getattr(model, method)(["a", "b"], **given) == ["A", "B"]
    assert said == [given] * 2


def test_questions_vectors_images_and_searches() -> None:
    model = LoadedModel(Program.of("m"))
    answer = Answer("Ada", 0.5, 0, 3)
    model.__dict__["answerer"] = SimpleNamespace(
        answer=lambda asked: [[answer, answer] if q == "who" else [] for q, _ in asked]
    )
    assert model.answer("who", "Ada") == answer
    assert model.answer([("who", "Ada"), ("when", "Ada")]) == [answer, None]
    with pytest.raises(UsageError, match="a question needs a text that may contain the answer"):
        model.answer("who")  # type: ignore[call-overload]
    model.__dict__["embedder"] = SimpleNamespace(embed=lambda texts: np.ones((len(texts), 3)))
    assert model.embed("a").shape == (3,)
    assert model.embed(["a"]).shape == (1, 3)
    model.__dict__["matcher"] = SimpleNamespace(match=lambda images, texts: [(image, tuple(texts)) for image in images])
    assert model.match("a.png", ["x", "y"]) == ("a.png", ("x", "y"))
    assert model.match(["a.png"], ["x"]) == [("a.png", ("x",))]
    found = [SimpleNamespace(text="b"), SimpleNamespace(text="c")]
    searched = {"most": 5, "beams": BEAMS}
    model.__dict__["writer"] = SimpleNamespace(
        searched=lambda prompts, **how: [found] * len(prompts) * (how == searched)
    )
    assert model.search("a", most=5, beams=BEAMS) == ["b", "c"]
    assert model.search(["a", "d"], most=5, beams=BEAMS) == [["b", "c"]] * 2


def test_pieces_of_several_texts_are_put_together() -> None:
    model, said = LoadedModel(Program.of("m")), list[Any]()

    def continued(prompts: list[str], **how: Any) -> Any:
        said.append((prompts, how))
        return iter(
            [SimpleNamespace(row=row, text=f"{prompts[row]}{n}") for n in range(2) for row in range(len(prompts))]
        )

    model.__dict__["writer"] = SimpleNamespace(continued=continued)
    assert model.generate("a") == "a0a1"
    assert model.generate(["a", "b"], most=3, stop=("c",)) == ["a0a1", "b0b1"]
    assert [piece.text for piece in model.stream("a", most=2)] == ["a0", "a1"]
    plain = {"sampling": None, "rules": None}
    assert [how for _, how in said] == [{**plain, "most": m, "stop": s} for m, s in ((128, ()), (3, ("c",)), (2, ()))]
    assert repr(model) == "<model m for tasks, backend auto>"


def test_the_best_is_the_first() -> None:
    first, second = Filling("a", 1, 0.7, "a b"), Filling("c", 2, 0.2, "c b")
    assert Filled(((first, second), (second, first))).best is first
    fits = Scored("x", 0.9), Scored("y", 0.1)
    assert Matched(fits, (0.5, 0.2)).best is fits[0]


def test_explanations_match_compilation() -> None:
    """Nothing is read before the first call."""
    assert load("minilm").program == Program.of("minilm")
    how: dict[str, Any] = {"backend": "torch", "target": "cuda", "dtype": "bf16", "quantize": "int4", "cache": "f16"}
    made = load("minilm", **how, limits={"nodes": 7}, widen="bf16", layers=2)
    assert made.program == Program.of("minilm", limits={"nodes": 7}, config={"layers": 2}, widen="bf16", **how)
    with pytest.raises(UsageError, match="a model that is loaded for tasks does not accept check"):
        load("minilm", check=False)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"backend": "onnxruntime"}, "there is no backend 'onnxruntime'"),
        ({"quantize": "int3"}, "unknown quantization scheme 'int3'"),
        ({"dtype": "f8"}, "unknown computation dtype 'f8'"),
        ({"widen": "f8"}, "'f8' is not a dtype that can be widened"),
        ({"without": ["fuse-all"]}, "the pipeline has no pass 'fuse-all'"),
        ({"cache": "f64"}, "a cache cannot store f64"),
    ],
)
def test_a_value_that_no_model_accepts_is_an_error_of_load(option: dict[str, Any], what: str) -> None:
    with pytest.raises(TreadleError, match=what):
        load("minilm", **option)


def test_check_is_an_option_of_artifacts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not accept check") as caught:
        load("minilm", check=False)
    assert caught.value.hint == "leave it out"
    path = str(tmp_path / "two.treadle")
    t.compile(two, backend="numpy").save(path)
    with pytest.raises(UsageError, match="does not accept check") as caught:
        load(path, check=False)
    assert caught.value.hint == f"treadle.load_artifact({path!r}, check=False)"
    assert t.load_artifact(path, check=False).name == "two"


@t.model
def two(x: Annotated[t.Tensor, t.f32["B 2"]]):  # type: ignore[no-untyped-def]
    return {"y": x * 2}


def test_a_call_names_the_task_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "vocab_size": 9}', encoding="utf-8")
    write_weights(tmp_path / "model.safetensors", {})
    with pytest.raises(UsageError, match="a loaded model is called by its tasks") as caught:
        LoadedModel(Program.of(str(tmp_path)))("a cat")
    assert caught.value.hint == "model.embed(...), the task of its class"


def test_an_option_that_an_artifact_does_not_accept_is_an_error_of_load(tmp_path: Path) -> None:
    path = tmp_path / "gpt2.treadle"
    t.compile("gpt2", vocab=20, dim=8, heads=2, layers=1, context=16, backend="numpy").save(path)
    with pytest.raises(UsageError, match="an artifact is already compiled, and does not accept --quantize"):
        load(str(path), quantize="int4")


# -- commands ------------------------------------------------------------------------------------------------------


def test_summaries_and_answers_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def summarize(texts: list[str], **given: Any) -> list[Rewritten]:
        assert (given["most"], given["beams"]) == (4, Beams(3, 2.0))
        return [Rewritten(text.upper(), (), "end", False) for text in texts]

    def answer(asked: list[tuple[str, str]], **given: Any) -> list[list[Answer]]:
        assert (given["top"], given["longest"], asked) == (2, 6, [("who?", "Ada and Bob"), ("who?", "nobody")])
        return [[Answer("Ada", 0.75, 0, 3), Answer("Bob", 0.125, 8, 11)], []]

    monkeypatch.setattr(TextRewriter, "open", lambda options: SimpleNamespace(summarize=summarize))
    monkeypatch.setattr(QuestionAnswerer, "open", lambda options: SimpleNamespace(answer=answer))
    words = ["summarize", "m", "a", "b", "--tokens", "4", "--beams", "3", "--length-penalty", "2"]
    assert CliRunner().invoke(app, words).stdout == "A\nB\n"
    words = ["answer", "m", "who?", "Ada and Bob", "nobody", "--top", "2", "--longest", "6"]
    report = "Ada  (0.7500, characters 0 to 3)\nBob  (0.1250, characters 8 to 11)\nno answer\n"
    assert CliRunner().invoke(app, words).stdout == report


def test_a_pickled_model_is_opened_again(tmp_path: Path) -> None:
    written(tmp_path, "f32")
    model = load(tmp_path)
    graph = str(model.program.declared().graph)  # files are open now
    assert str(pickle.loads(pickle.dumps(model)).program.declared().graph) == graph
