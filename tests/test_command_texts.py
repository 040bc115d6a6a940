"""Output of commands for fixed results, in words and as JSON: the models are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from treadle.cli import app
from treadle.continuation import FoundText, Piece, TextWriter
from treadle.ir.target import Target
from treadle.runtime.speculation import SpeculationTally
from treadle.sentence_embedding import Embedded, SentenceEmbedder
from treadle.tasks.classifying import Classified, TextClassifier
from treadle.tasks.filling import Filling, MaskFiller
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.scoring import Scored

OWN: Any = SimpleNamespace(name="m", backend="numpy")
BEST = (Scored("good", 0.75), Scored("bad", 0.1875), Scored("fair", 0.0625))


def embedder(cut: int) -> Any:
    def embed(texts: list[str]) -> Embedded:
        vectors = np.eye(len(texts), 3, dtype=np.float32) * 0.1
        return Embedded(vectors, (4,) * len(texts), tuple(range(1, 1 + cut)))

    return SimpleNamespace(model=OWN, tokenizer=SimpleNamespace(max_tokens=8), embed_reporting=embed)


class Writer:
    """A writer that continues each prompt with the same two tokens, the second one last."""

    def __init__(self, ending: str = "end", *, text: str = " b", template: str | None = None, marks: Any = ()) -> None:
        self.model, self.ending, self.text, self.template, self.marks = OWN, ending, text, template, list(marks)
        self.tokenizer = SimpleNamespace(token="t{}".format, has=lambda number: True)
        self.asked = FolderRules(options={"suppress_tokens": [1, 2]})

    def continued(self, prompts: list[str], *, tally: SpeculationTally | None, **_: Any) -> Iterator[Piece]:
        for row in range(len(prompts)):
            yield Piece(row, " a" * bool(self.text.strip()), 3, None, -0.25, ((3, -0.25), (4, -2.5)))
            yield Piece(row, self.text, 5, self.ending, -1.5, ((6, -0.125),))  # type: ignore[arg-type]
        if tally is not None:
            tally.calls, tally.guessed, tally.accepted, tally.made = 2, 4, 3, 5

    def searched(self, prompts: list[str], **_: Any) -> list[list[FoundText]]:
        found = FoundText(" a b", (3, 5), -0.5, "end"), FoundText(" a", (3,), -1.23456, "count")
        return [list(found) for _ in prompts]

    def chat_template(self) -> Any:
        return SimpleNamespace(render=lambda messages: f"<{'|'.join(m['content'] for m in messages)}>")


class Clock:
    """A clock that advances half a second with each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.5
        return self.now


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any, str], Any]:
    """Run a command for which a class opens this stand-in, and return its result."""

    def run(kind: Any, opened: Any, words: str) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("treadle.tasks.text_generation.need_for_text", lambda *_, **__: None)
            patch.setattr("treadle.tasks.text_generation.time", Clock())
            patch.setattr(kind, "open", lambda *_, **__: opened)
            done = CliRunner().invoke(app, words.split())
        assert done.exit_code == 0, (words, done.output, done.exception)
        return done

    return run


FROM_FOLDER = "from generation_config.json: suppress_tokens [1, 2]\n"
PACE = "first token after 0.50 s, then 2.0 tokens per second\n"
LIKELY = [
    "  -0.2500  't3'                 't3' -0.2500  't4' -2.5000",
    "  -1.5000  't5'                 't6' -0.1250",
]


@pytest.mark.parametrize(
    ("words", "writer", "out", "err"),
    [
        ("one", Writer(), "one a b\n", ["stopped after 2 tokens: the model ended the text"]),
        (
            "one two",
            Writer("count"),
            "one a b\n\ntwo a b\n\n",
            [f"text {i}: stopped after 2 tokens: the limit of --tokens" for i in (1, 2)],
        ),
        (
            "one --logprobs 2",
            Writer("context"),
            "\n".join(["one a b", *LIKELY, "", ""]),
            ["stopped after 2 tokens: the model's context is full"],
        ),
        ("one", Writer("stop"), "one a b\n", ["stopped after 2 tokens: --stop appeared"]),
        (
            "one",
            Writer(text="", template="<s>", marks=["<s>", "<e>"]),
            "one\n",
            [
                "stopped after 2 tokens: the model ended the text at once. It is a chat model: --chat puts the prompt "
                "into its chat template, which adds <s>, <e>"
            ],
        ),
        (
            "one --chat --system be",
            Writer(template="<s>"),
            " a b\n",
            ["stopped after 2 tokens: the model ended the text"],
        ),
    ],
)
def test_texts_are_printed_with_their_endings(
    words: str, writer: Writer, out: str, err: list[str], said: Callable[..., Any]
) -> None:
    done = said(TextWriter, writer, f"generate m {words}")
    assert done.stdout == out
    assert done.stderr == "".join(f"{line}\n" for line in err) + FROM_FOLDER + PACE


def test_speculation_and_beams_are_reported(said: Callable[..., Any]) -> None:
    speculated = said(TextWriter, Writer(), "generate m one --speculate").stderr.splitlines()
    assert speculated[-1] == "3 of 4 guessed tokens accepted, 1.50 per call of the model"
    searched = said(TextWriter, Writer(), "generate m one --beams 2 --best 2")
    assert searched.stdout == "one a b\n\none a\n\n"
    assert searched.stderr == f"score -0.5000, 2 tokens\nscore -1.2346, 1 token\n{FROM_FOLDER}"


def test_generated_texts_as_json(said: Callable[..., Any]) -> None:
    facts = json.loads(said(TextWriter, Writer("count"), "generate m one --json --logprobs 1 --speculate").stdout)
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    likely = [{"token": 3, "text": "t3", "logprob": -0.25}, {"token": 4, "text": "t4", "logprob": -2.5}]
    tally = {"calls": 2, "guessed": 4, "accepted": 3, "made": 5, "margin": None, "unused": 0, "accepted_length": 1.5}
    (text,) = facts.pop("texts")
    assert facts == {
        "model": "m",
        "backend": "numpy",
        "from_folder": {"file": "generation_config.json", "options": {"suppress_tokens": [1, 2]}},
        "sampling": {**sampling, "repetition_penalty": 1.0, "presence_penalty": 0.0},
        "chat_template": False,
        "seconds_to_first_token": 0.5,
        "tokens_per_second": 2.0,
        "speculation": tally,
    }
    first, second = text.pop("logprobs")
    assert text == {"prompt": "one", "text": " a b", "tokens": [3, 5], "ending": "count"}
    assert first == {"token": 3, "text": "t3", "logprob": -0.25, "likely": likely}
    assert second == {**second, "token": 5, "logprob": -1.5}
    searched = json.loads(said(TextWriter, Writer(), "generate m one --beams 2 --json").stdout)
    assert searched["beams"] == {"count": 2, "length_penalty": 1.0, "best": 1, "early": False}
    assert searched["texts"][0]["found"][1] == {"text": " a", "tokens": [3], "score": -1.23456, "ending": "count"}


def test_embedded_sentences(said: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(SentenceEmbedder, embedder(0), "embed m a").stdout == "0.1 0.0 0.0\n"
    written = said(SentenceEmbedder, embedder(2), "embed m a b --output out")
    assert written.stdout == "wrote out/embeddings.npy\n"
    assert written.stderr == "truncated to 8 tokens: sentences 2, 3\n"
    many = " ".join(map(str, range(1, 13)))
    for cut, end in ((10, "10, 11\n"), (11, "10, 11, ...\n")):
        table = said(SentenceEmbedder, embedder(cut), f"embed m {many} --similarity")
        assert table.stderr == f"truncated to 8 tokens: sentences 2, 3, 4, 5, 6, 7, 8, 9, {end}"
        assert table.stdout.splitlines()[2].split()[:4] == ["1", "1", "0.01", "0.00"]
    facts = json.loads(said(SentenceEmbedder, embedder(1), "embed m a b --json --similarity").stdout)
    assert facts == {
        "model": "m",
        "backend": "numpy",
        "sentences": [
            {"text": "a", "tokens": 4, "cut": False, "vector": [0.1, 0.0, 0.0]},
            {"text": "b", "tokens": 4, "cut": True, "vector": [0.0, 0.1, 0.0]},
        ],
        "files": [],
        "similarity": [[0.010000001, 0.0], [0.0, 0.010000001]],
    }


def test_classified_texts(said: Callable[..., Any]) -> None:
    found = [Classified(BEST, 4, False), Classified(BEST, 9, True)]
    classifier = SimpleNamespace(
        classify=lambda texts, *_, **__: found[: len(texts)], opened=SimpleNamespace(name="m", model=OWN)
    )
    lines = "good 0.7500, bad 0.1875  a\ngood 0.7500, bad 0.1875  b (cut)\n"
    assert said(TextClassifier, classifier, "classify m a b --top 2").stdout == lines
    facts = json.loads(said(TextClassifier, classifier, "classify m a b --pair c --pair d --json").stdout)
    assert facts["texts"][1] == {
        "text": "b",
        "pair": "d",
        "labels": [{"label": "good", "score": 0.75}],
        "tokens": 9,
        "cut": True,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "one: writes\ntwo: embeds\nserving at http://here\n"),
        ("--host localhost", "one: writes\ntwo: embeds\nserving at http://here\n"),
        ("--host ::1", "one: writes\ntwo: embeds\nserving at http://here\n"),
        ("--host 0.0.0.0 --key-file key", "one: writes\ntwo: embeds\nserving at http://here\n"),
        (
            "--host 0.0.0.0",
            "one: writes\ntwo: embeds\n"
            "anyone who can reach this address can send requests: --key-file sets an API key\n"
            "serving at http://here\n",
        ),
    ],
)
def test_responses_of_a_server(words: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from treadle.serving.models import Opening, ServedWriter

    monkeypatch.chdir(tmp_path)
    Path("key").write_text("secret\n")
    asked: list[Any] = []

    def opened(self: Opening, model: str, *, prefers_own: bool, **options: Any) -> Any:
        asked.append((self, model, options))
        made = object.__new__(ServedWriter) if model == "a" else SimpleNamespace()
        vars(made).update(name="one", description="writes", notes=[]) if model == "a" else vars(made).update(
            name="two", description="embeds", notes=[]
        )
        return made

    def served(models: Any, *, ready: Callable[[str], None], **options: Any) -> None:
        asked.append((len(models), options))
        ready("http://here")

    @contextmanager
    def working(what: str, *, shown: bool) -> Iterator[None]:
        seen.append((what, shown))
        yield

    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr("treadle.progress.working", working)
    monkeypatch.setattr(Opening, "open", opened)
    monkeypatch.setattr("treadle.cli.serve._refuse_declarations_together", lambda *models: None)
    for each in ("name", "description"):
        monkeypatch.delattr(ServedWriter, each, raising=False)
    monkeypatch.setattr("treadle.serving.running.serve", served)
    done = CliRunner().invoke(app, ["serve", "a", "b", *words.split()])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", expected), done.exception
    opening, (count, options) = asked[0][0], asked[-1]
    assert (opening.rows, opening.capacity, opening.queue, opening.resumes, count) == (None, None, 256, None, 2)
    assert (options["port"], options["key"]) == (8000, "secret" if "key" in words else None)
    assert (options["limits"].body, options["limits"].seconds) == (2**20, 600.0)
    assert asked[0][1:] == ("a", {})
    assert seen == [("compiling a", True), ("compiling b", True)]
    as_json = CliRunner().invoke(app, ["serve", "a", "b", "--json", *words.split()])
    assert seen[2:] == [("compiling a", False), ("compiling b", False)]
    assert json.loads(as_json.stdout) == {
        "address": "http://here",
        "models": [{"name": "one", "writes": True}, {"name": "two", "writes": False}],
    }
    assert as_json.stderr == ""
    how = "--widen bf16,f16 --dtype bf16 --quantize int4 --set n=1 --limit nodes=7 --rows 2 --context 3 --queue 4"
    how = f"{how} --cache f16 --reuse --port 1 --body 5 --seconds 6 --threads 2"
    CliRunner().invoke(app, ["serve", "a", *how.split()])
    opening, _, given = asked[-2]
    computed = {"dtype": "bf16", "quantize": "int4", "widen": ("bf16", "f16"), "cache": "f16"}
    assert given == {**computed, "config": {"n": 1}, "limits": {"nodes": 7}, "target": Target("cpu", 2)}
    assert (opening.rows, opening.capacity, opening.queue, opening.resumes) == (2, 3, 4, True)
    assert (asked[-1][1]["port"], asked[-1][1]["limits"].body, asked[-1][1]["limits"].seconds) == (1, 5, 6.0)
    twice = CliRunner().invoke(app, ["serve", "b", "c"])
    assert (twice.exit_code, "two models would be served as two" in twice.stderr) == (2, True)


def test_a_table_keeps_to_a_pipe_s_width_and_a_path_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/" + "a-long-folder/" * 20
    fetched = [{"name": "minilm", "about": "a model " * 40, "download_bytes": 5, "path": path}]
    monkeypatch.setattr("treadle.reporting.zoo.zoo_facts", lambda: {"zoo": [], "fetched": fetched})
    lines = CliRunner().invoke(app, ["models"]).stdout.splitlines()
    assert f"minilm  {path}" in lines
    assert max(len(line) for line in lines if path not in line) <= 120


def test_a_token_of_white_space_is_quoted(said: Callable[..., Any]) -> None:
    fillings = [Filling(token, at, 0.5, "") for at, token in enumerate([" a", " ", "\n"])]
    filler = SimpleNamespace(fill=lambda texts, **_: [SimpleNamespace(masks=[fillings])])
    assert said(MaskFiller, filler, "fill m [MASK]").stdout == "[MASK]\n  a 0.5000, ' ' 0.5000, '\\n' 0.5000\n"
