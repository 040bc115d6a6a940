"""Output of commands for fixed results, in words and as JSON: the models are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from pprint import pformat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.golden import Golden
from treadle.cli import app
from treadle.continuation import FoundText, Piece
from treadle.embedding import Embedded
from treadle.runtime.speculation import SpeculationTally
from treadle.tasks.answering import Answer
from treadle.tasks.classifying import Classified
from treadle.tasks.filling import Filled, Filling
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.matching import Matched
from treadle.tasks.perplexity import Beside, Perplexity
from treadle.tasks.rewriting import Rewritten
from treadle.tasks.scoring import Scored
from treadle.tasks.tagging import TaggedSpan
from treadle.tasks.transcribing import Passage, Transcript

OWN: Any = SimpleNamespace(name="m")
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
        self.tokenizer = SimpleNamespace(token="t{}".format)
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


def asked(method: str, *results: Any) -> Any:
    """Return a stand-in with one method, which returns one result for each input."""

    def give(inputs: Any, *_: Any, **__: Any) -> Any:
        return list(results[: len(inputs)])

    return SimpleNamespace(**{method: give}, opened=OWN, model=OWN, mask="[MASK]")


def exported(data: bool) -> Callable[..., Any]:
    def export(graph: Any, weights: Any, path: Path, **_: Any) -> Any:
        path.write_bytes(b"x" * 1500)
        more = path.with_suffix(".onnx.data")
        more.write_bytes(b"x")
        operators = {"Add": 1, "MatMul": 3, "Relu": 2} if data else {"Relu": 1}
        ports: dict[str, Any] = {"inputs": {"x": "x_1"}, "outputs": {"y": "y"}}
        return SimpleNamespace(path=path, data=more if data else None, opset=22, operators=operators, **ports)

    return export


FILLINGS = Filling(" cat", 3, 0.5, "the cat"), Filling("dog", 4, 0.25, "the dog")
PASSAGES = Passage(" Hi", 0.0, 0.5, (1,), "en"), Passage(" you", 0.5, 1.0, (), None)


def cases() -> Iterator[tuple[str, str, Any]]:
    """Pairs of a command line and the replacements for names in the library."""
    many = " ".join(map(str, range(1, 13)))
    for words, cut in (
        ("a", 0), ("a b --similarity", 1), ("a b c --json", 1), ("a b --json --similarity", 0), ("a b --output out", 2),
        ("a --output out --json", 0), (f"{many} --similarity", 10), (f"{many} --similarity", 11),
    ):  # fmt: skip
        yield f"embed m {words}", "treadle.embedding.SentenceEmbedder.open", embedder(cut)
    for words, writer in (
        ("one", Writer()), ("one two", Writer("count")), ("one --logprobs 2", Writer("context")),
        ("one", Writer("stop")),
        ("one two --logprobs 0", Writer()), ("one --json", Writer()), ("one two --json --logprobs 1", Writer("count")),
        ("one --speculate", Writer()), ("one --speculate --json", Writer()), ("one", Writer(text=" ")),
        ("one", Writer(text=" ", template="<s>")), ("one", Writer(text="", template="<s>", marks=["<s>", "<e>"])),
        ("one --chat", Writer(template="<s>")), ("one two --chat --system be", Writer(template="<s>")),
        ("one --beams 2 --best 2", Writer()), ("one two --beams 2 --json", Writer()),
        ("one --beams 2 --chat", Writer()),
    ):  # fmt: skip
        yield f"generate m {words}", "treadle.continuation.TextWriter.open", writer
    classifier = asked("classify", Classified(BEST, 4, False), Classified(BEST, 9, True))
    for words in ("a b", "a b --top 2", "a --json", "a b --pair c --pair d --json --top 3"):
        yield f"classify m {words}", "treadle.tasks.classifying.TextClassifier.open", classifier
    for words in ("a b", "a b --json"):
        answerer, tagger = (
            asked("answer", [Answer("a", 0.5, 0, 1)], []),
            asked("tag", [TaggedSpan("X", 0.5, "a", 0, 1)], []),
        )
        yield f"answer m what {words}", "treadle.tasks.answering.QuestionAnswerer.open", answerer
        yield f"tag m {words}", "treadle.tasks.tagging.TokenTagger.open", tagger
    for words in ("a", "a --json"):
        filler = asked("fill", Filled((FILLINGS, FILLINGS[1:])))
        yield f"fill m {words}", "treadle.tasks.filling.MaskFiller.open", filler
        for task in ("translate", "summarize"):
            rewriter = asked(task, Rewritten("A", (1, 2), "end", False))
            yield f"{task} m {words}", "treadle.tasks.rewriting.TextRewriter.open", rewriter
    beside = Beside(19.5, 0.0125, 0.25, 0.875)
    for words, found in (("", beside), ("--window 4 --tokens 9 --json", beside), ("--alone", None)):
        meter = SimpleNamespace(model=OWN, tokens=lambda text, most: [1, 2, 3][:most])
        error = None if found is None else 0.5
        meter.measure = lambda ids, found=found, error=error, **_: Perplexity(len(ids) - 1, 1, 20.25, error, found)
        yield f"perplexity m m.py {words}", "treadle.tasks.perplexity.PerplexityMeter.open", meter
    for words in ("a.png b.png --top 2", "a.png --json --top 1"):
        yield f"label m {words}", "treadle.tasks.labelling.ImageLabeller.open", asked("label", BEST, BEST[::-1])
    for words in ("a.png --text x", "a.png --text x --json"):
        matcher = asked("match", Matched(BEST, (0.5, 0.25, 0.125)))
        yield f"match m {words}", "treadle.tasks.matching.ImageMatcher.open", matcher
    for words in ("a.wav b.wav", "a.wav --json"):
        transcriber = SimpleNamespace(model=OWN, transcribe=lambda path, **_: Transcript(PASSAGES))
        yield f"transcribe m {words}", "treadle.tasks.transcribing.Transcriber.open", transcriber
    for words, data in (("", True), ("", False), ("--json", True)):
        yield f"export m.py:small -o a.onnx {words}", "treadle.backends.onnx.exporter.export_onnx", exported(data)


class Clock:
    """A clock that advances half a second with each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.5
        return self.now


@pytest.mark.parametrize("command", sorted({words.split()[0] for words, _, _ in cases()}))
def test_what_commands_say(command: str, golden: Golden, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text("import treadle as t\n\n\n@t.model\ndef small(x: t.f32['B 4']):\n    return t.relu(x)\n")
    monkeypatch.setattr("treadle.continuation.need_for_text", lambda *_, **__: None)
    pages: list[str] = []
    for words, replaced, by in [
        case for case in cases() if case[0].split()[0] == command
    ]:  # standard error has ! before its lines
        with monkeypatch.context() as patch:
            patch.setattr("treadle.cli.generate.time", Clock())
            owner, _, name = replaced.rpartition(".")
            patch.setattr(resolve_name(owner), name, by if name == "export_onnx" else lambda *_, **__: by)  # noqa: B023
            done = CliRunner().invoke(app, words.split())
        assert done.exit_code == 0, (words, done.output, done.exception)
        out = f"{pformat(json.loads(done.stdout), width=118, sort_dicts=False)}\n" if "--json" in words else done.stdout
        pages.append(f"$ treadle {words}\n{out}" + "".join(f"! {line}\n" for line in done.stderr.splitlines()))
    golden(f"said/{command}.txt", "\n".join(pages))


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
def test_what_a_server_says(words: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from treadle.serving.models import Opening, ServedWriter

    monkeypatch.chdir(tmp_path)
    Path("key").write_text("secret\n")
    asked: list[Any] = []

    def opened(self: Opening, model: str, **options: Any) -> Any:
        asked.append((self, model, options))
        made = object.__new__(ServedWriter) if model == "a" else SimpleNamespace()
        vars(made).update(name="one", description="writes") if model == "a" else vars(made).update(
            name="two", description="embeds"
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
    for each in ("name", "description"):
        monkeypatch.delattr(ServedWriter, each, raising=False)
    monkeypatch.setattr("treadle.serving.running.serve", served)
    done = CliRunner().invoke(app, ["serve", "a", "b", *words.split()])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", expected), done.exception
    opening, (count, options) = asked[0][0], asked[-1]
    assert (opening.backend, str(opening.target), opening.rows, opening.capacity) == ("numpy", "cpu", 16, 2048)
    assert (opening.queue, opening.cache, opening.resumes, count) == (256, None, None, 2)
    assert (options["port"], options["key"]) == (8000, "secret" if "key" in words else None)
    assert (options["limits"].body, options["limits"].seconds) == (2**20, 600.0)
    assert asked[0][1:] == ("a", {"dtype": None, "quantize": None, "widen": ()})
    assert seen == [("compiling a", True), ("compiling b", True)]
    as_json = CliRunner().invoke(app, ["serve", "a", "b", "--json", *words.split()])
    assert seen[2:] == [("compiling a", False), ("compiling b", False)]
    assert json.loads(as_json.stdout) == {
        "address": "http://here",
        "models": [{"name": "one", "writes": True}, {"name": "two", "writes": False}],
    }
    assert as_json.stderr == ""
    how = "--widen bf16,f16 --dtype bf16 --quantize int4 --set n=1 --limit nodes=7 --rows 2 --context 3 --queue 4"
    how = f"{how} --cache f16 --reuse --port 1 --body 5 --seconds 6"
    CliRunner().invoke(app, ["serve", "a", *how.split()])
    opening, _, given = asked[-2]
    assert given == {"dtype": "bf16", "quantize": "int4", "n": 1, "limits": {"nodes": 7}, "widen": ("bf16", "f16")}
    assert (opening.rows, opening.capacity, opening.queue, opening.cache, opening.resumes) == (2, 3, 4, "f16", True)
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
