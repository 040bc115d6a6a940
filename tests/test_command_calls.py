"""Calls of commands and methods into the library: each option reaches its parameter, and omitted options keep defaults.

A command runs up to the call that its case ends with; every call before that returns a stand-in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import treadle as t
import treadle.cli
from tests.golden import Golden
from treadle.ir.graph import Graph
from treadle.passes.sharding.plan import ShardingPlan
from treadle.tasks.loaded import LoadedModel
from treadle.tasks.options import ModelOptions

MODEL = """
import treadle as t


@t.model
def small(x: t.f32["B 4"], y: t.f32["B 4"] | None, *, n=1):
    return {"y": t.linear(x, 4, name="w") if y is None else y}
"""


class Asked(BaseException):
    """Raised by the last call of a case."""


class Recorder:
    """A stand-in for something of the library: it records its calls, and returns another stand-in."""

    def __init__(self, name: str, lines: list[str], last: str) -> None:
        self._name, self._lines, self._last = name, lines, last

    def __call__(self, *args: Any, **options: Any) -> Recorder:
        given = [*map(self._told, args), *(f"{name}={self._told(value)}" for name, value in options.items())]
        self._lines.append(f"  {self._name}({', '.join(given)})")
        if self._name.endswith(self._last):
            raise Asked
        return Recorder(f"{self._name}()", self._lines, self._last)

    @staticmethod
    def _told(value: Any) -> str:
        if isinstance(value, Graph | ShardingPlan):
            return f"<{type(value).__name__}>"
        if isinstance(value, dict) and any(isinstance(each, np.ndarray) for each in value.values()):
            return f"<arrays {', '.join(value)}>"
        if is_dataclass(value) and not isinstance(value, type):
            chosen = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
            return f"{type(value).__name__}({', '.join(f'{name}={each!r}' for name, each in chosen)})"
        return "<function>" if callable(value) and not isinstance(value, Recorder) else repr(value)

    def __getattr__(self, name: str) -> Recorder:
        if name.startswith("__"):  # such as __signature__
            raise AttributeError(name)
        return Recorder(f"{self._name}.{name}", self._lines, self._last)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __repr__(self) -> str:
        return f"<{self._name}>"


HOW = "--set layers=2 --limit nodes=7 --dtype bf16 --quantize int4"
WHERE = "--backend torch --target cuda --threads 3"
M = "m.py:small"

CASES: list[tuple[str, str, str]] = [  # the command line, the replaced name, and the call that ends it
    (f"inspect {M} --inputs y --outputs y[:,0] --widen bf16,f16 {HOW}", "treadle.resolving.resolve", "resolve"),
    ("inspect m.treadle --limit nodes=7 --json", "treadle.artifacts.open_artifact", "open_artifact"),
    (f"compile {M} --json", "treadle.compile", "compile"),
    (
        f"compile {M} --inputs y --outputs y[:,0],x --widen bf16 --seed 5 --memory 3MB --sizes B=2 --certify {HOW} "
        f"{WHERE}",
        "treadle.compile",
        "compile",
    ),
    (f"explain {M} fusion --json", "treadle.explaining.fusion.explain_fusion", "fusion"),
    (
        f"explain {M} fusion --inputs y --widen bf16 --expect linear=1 --certify {HOW}",
        "treadle.explaining.fusion.explain_fusion",
        "fusion",
    ),
    (f"explain {M} layouts --json", "treadle.explaining.layouts.explain_layouts", "layouts"),
    (f"explain {M} layouts --backend torch {HOW}", "treadle.explaining.layouts.explain_layouts", "layouts"),
    (f"explain {M} storage --json", "treadle.explaining.storage.explain_storage", "storage"),
    (f"explain {M} storage --backend torch {HOW}", "treadle.explaining.storage.explain_storage", "storage"),
    (f"explain {M} memory --json", "treadle.explaining.memory.explain_memory", "memory"),
    (
        f"explain {M} memory --donate x --sizes B=2 --set S=3 --backend torch {HOW}",
        "treadle.explaining.memory.explain_memory",
        "memory",
    ),
    (f"explain {M} quantization --json", "treadle.explaining.quantization.explain_quantization", "quantization"),
    (f"explain {M} quantization {HOW}", "treadle.explaining.quantization.explain_quantization", "quantization"),
    (f"explain {M} step --json", "treadle.explaining.step.explain_step", "step"),
    (f"explain {M} step --cache f16 {HOW}", "treadle.explaining.step.explain_step", "step"),
    (
        f"explain {M} sharding --mesh tp=2 --recipe dp --json",
        "treadle.explaining.sharding.explain_sharding",
        "sharding",
    ),
    (
        f"explain {M} sharding --mesh tp=2 --axis ffn=tp --device a100 --sizes B=2 --widen bf16 --inputs y {HOW}",
        "treadle.explaining.sharding.explain_sharding",
        "sharding",
    ),
    (f"diff {M} --json", "treadle.comparing.builds.open_build", "open_build"),
    (
        f"diff {M} other.py:m --a=--quantize=int8 --fail-if peak>1 --backend torch --inputs y --outputs y[:,0] "
        f"--widen bf16 {HOW}",
        "treadle.comparing.builds.open_build",
        "open_build",
    ),
    (f"run {M} --json", "treadle.compile", "compile"),
    (f"run {M} --input y=1 --outputs y[0] --widen bf16 --seed 5 {HOW} {WHERE}", "treadle.compile", "compile"),
    (f"run {M} --json", "treadle.compile", "compile()"),
    (f"run {M}", "treadle.compile", "compile()"),
    ("run m.treadle --json", "treadle.artifacts.load", "load"),
    (
        "run m.treadle --limit nodes=7 --widen bf16 --backend torch --threads 3 --target cuda",
        "treadle.artifacts.load",
        "load",
    ),
    ("run m.treadle --limit nodes=7 --threads 3", "treadle.artifacts.open_artifact", "open_artifact"),
    (f"run {M} --mesh tp=2", "treadle.sharding.rank_models.compile_rank", "compile_rank"),
    (f"run {M} --mesh tp=2 --timeout 2", "treadle.runtime.distributed.ranks.join", "join"),
    (
        f"run {M} --mesh tp=2 --recipe dp --axis ffn=tp --input y=1 --widen bf16 --seed 5 {HOW} {WHERE}",
        "treadle.sharding.rank_models.compile_rank",
        "compile_rank",
    ),
    ("launch -n 3 -- run gpt2 --mesh=tp=3", "treadle.runtime.distributed.launching.launch_ranks", "launch_ranks"),
    ("launch -n 2 -- a.py --x", "treadle.runtime.distributed.launching.launch_ranks", "launch_ranks"),
    (f"verify {M} --json", "treadle.verifying.verify_model", "verify_model"),
    (
        f"verify {M} --backend numpy --backend torch --sizes B=2 --sizes B=3 --inputs y --widen bf16 --target cuda "
        f"--seed 5 {HOW}",
        "treadle.verifying.verify_model",
        "verify_model",
    ),
    (f"shard {M} --mesh tp=2 --recipe dp --json", "treadle.sharding.shard_model", "shard_model"),
    (
        f"shard {M} --mesh tp=2 --axis ffn=tp --device a100 --sizes B=2 --inputs y --widen bf16 {HOW}",
        "treadle.sharding.shard_model",
        "shard_model",
    ),
    (
        f"shard {M} --mesh tp=2 --recipe dp -o m.treadle --seed 5",
        "treadle.sharding.sharded_models.sharded",
        "sharded",
    ),
    ("shard m.treadle --limit nodes=7 --json", "treadle.sharding.sharded_models.load_sharded", "load_sharded"),
    (f"shard {M} --mesh dp=2 --recipe dp --lab --seed 5 --json", "treadle.sharding.try_in_lab", "try_in_lab"),
    (f"shard {M} --mesh dp=2 --recipe dp --lab", "treadle.sharding.try_in_lab", "try_in_lab"),
    (
        f"export {M} -o m.onnx --inputs y --outputs y[:,0] --widen bf16 --set n=2",
        "treadle.resolving.resolve",
        "resolve",
    ),
    ("export m.treadle -o m.onnx --limit nodes=7 --json", "treadle.artifacts.open_artifact", "open_artifact"),
    (f"export {M} -o m.onnx --json", "treadle.backends.onnx.exporter.export_onnx", "export_onnx"),
    (
        f"export {M} -o m.onnx --opset 22 --external-above 5",
        "treadle.backends.onnx.exporter.export_onnx",
        "export_onnx",
    ),
    (
        f"export {M} --to json -o m.json --backend torch --inputs y --outputs y[:,0] --widen bf16 --set n=2 "
        "--limit nodes=7",
        "treadle.comparing.builds.open_build",
        "open_build",
    ),
    (f"bench {M} --json", "treadle.benching.benchmark.bench_model", "bench_model"),
    (
        f"bench {M} --against eager,openvino --sizes B=2 --backend torch --threads 3 --rounds 4 --python other "
        f"--inputs y --seed 5 --widen bf16 {HOW}",
        "treadle.benching.benchmark.bench_model",
        "bench_model",
    ),
    (f"roofline {M} --json", "treadle.compile", "compile"),
    (f"roofline {M} --threads 3 --inputs y --seed 5 --widen bf16 {HOW}", "treadle.compile", "compile"),
    ("roofline m.treadle --threads 3 --widen bf16 --limit nodes=7", "treadle.artifacts.load", "load"),
    ("embed minilm one two --json", "treadle.embedding.SentenceEmbedder.open", "embed_reporting"),
    (f"embed minilm one {HOW} {WHERE}", "treadle.embedding.SentenceEmbedder.open", "embed_reporting"),
    ("generate some one --json", "treadle.continuation.TextWriter.open", "continued"),
    ("generate some one --tokens 3", "treadle.continuation.TextWriter.open", "continued"),
    (
        "generate some one two --tokens 3 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.25 --seed 5 --stop . "
        f"--logprobs 2 --repetition-penalty 1.5 --presence-penalty 0.5 --speculate --cache f16 --widen blocks,f16 "
        f"{HOW} {WHERE}",
        "treadle.continuation.TextWriter.open",
        "continued",
    ),
    (
        f"generate some one --chat --system two --draft other --cache f16 {WHERE}",
        "treadle.continuation.TextWriter.open",
        "continued",
    ),
    (
        "generate some one --beams 4 --best 2 --length-penalty 0.5 --repetition-penalty 1.5 --tokens 3 --json",
        "treadle.continuation.TextWriter.open",
        "searched",
    ),
    ("generate some one --beams 4 --chat", "treadle.continuation.TextWriter.open", "searched"),
    ("generate some one --mesh tp=2 --recipe dp --timeout 2", "treadle.runtime.distributed.ranks.join", "join"),
    ("chat some --json", "treadle.chatting.conversation.Conversation.open", "say"),
    (
        "chat some --system two --tokens 3 --context 50 --temperature 0.5 --top-p 0.75 --min-p 0.25 "
        "--repetition-penalty 1.5 --seed 5",
        "treadle.chatting.conversation.Conversation.open",
        "say",
    ),
    ("chat some", "treadle.continuation.TextWriter.open", "open"),
    (f"chat some --cache f16 --widen blocks,f16 {HOW} {WHERE}", "treadle.continuation.TextWriter.open", "open"),
    ("classify some one two --json", "treadle.tasks.classifying.TextClassifier.open", "classify"),
    (f"classify some one --pair two {HOW} {WHERE}", "treadle.tasks.classifying.TextClassifier.open", "classify"),
    ("answer some what one two --json", "treadle.tasks.answering.QuestionAnswerer.open", "answer"),
    (
        f"answer some what one --top 3 --longest 4 {HOW} {WHERE}",
        "treadle.tasks.answering.QuestionAnswerer.open",
        "answer",
    ),
    ("tag some one two --json", "treadle.tasks.tagging.TokenTagger.open", "tag"),
    (f"tag some one --grouping max {HOW} {WHERE}", "treadle.tasks.tagging.TokenTagger.open", "tag"),
    ("fill some one two --json", "treadle.tasks.filling.MaskFiller.open", "fill"),
    (f"fill some one --top 3 --among a --among b {HOW} {WHERE}", "treadle.tasks.filling.MaskFiller.open", "fill"),
    ("perplexity some m.py --json", "treadle.tasks.perplexity.PerplexityMeter.open", "tokens"),
    (
        f"perplexity some m.py --window 8 --tokens 9 --alone --widen blocks,f16 {HOW} {WHERE}",
        "treadle.tasks.perplexity.PerplexityMeter.open",
        "tokens",
    ),
    ("label some a.png b.png --json", "treadle.tasks.labelling.ImageLabeller.open", "label"),
    (f"label some a.png {HOW} {WHERE}", "treadle.tasks.labelling.ImageLabeller.open", "label"),
    ("match some a.png b.png --text one --json", "treadle.tasks.matching.ImageMatcher.open", "match"),
    (f"match some a.png --text one --text two {HOW} {WHERE}", "treadle.tasks.matching.ImageMatcher.open", "match"),
    ("translate some one two --json", "treadle.tasks.rewriting.TextRewriter.open", "translate"),
    (
        f"translate some one --from en --to de --tokens 3 --beams 4 --length-penalty 0.5 {HOW} {WHERE}",
        "treadle.tasks.rewriting.TextRewriter.open",
        "translate",
    ),
    ("summarize some one two --json", "treadle.tasks.rewriting.TextRewriter.open", "summarize"),
    (
        f"summarize some one --tokens 3 --beams 4 --length-penalty 0.5 {HOW} {WHERE}",
        "treadle.tasks.rewriting.TextRewriter.open",
        "summarize",
    ),
    ("transcribe some a.wav b.wav --json", "treadle.tasks.transcribing.Transcriber.open", "transcribe"),
    (
        f"transcribe some a.wav --language en {HOW} {WHERE}",
        "treadle.tasks.transcribing.Transcriber.open",
        "transcribe",
    ),
]


@pytest.mark.parametrize("command", sorted({words.split()[0] for words, _, _ in CASES}))
def test_an_option_reaches_what_it_is_for(
    command: str, golden: Golden, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also, progress messages do not mix with the object of --json."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL, encoding="utf-8")
    lines: list[str] = []

    @contextmanager
    def report(what: str, *numbers: int, shown: bool = True) -> Iterator[Any]:
        lines.append(f"  {' of '.join([what, *map(str, numbers)])}{'' if shown else ', unseen'}")
        yield Recorder("progress", [], "-")

    for name in ("working", "counting", "downloading"):
        monkeypatch.setattr(f"treadle.progress.{name}", report)
    monkeypatch.setattr("treadle.continuation.need_for_text", Recorder("need_for_text", lines, "-"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: "a line\n", isatty=lambda: False))
    for words, replaced, last in [case for case in CASES if case[0].split()[0] == command]:
        lines += ["", f"treadle {words}"]
        with monkeypatch.context() as patch:
            if "--mesh" in words and words.startswith(("run", "generate")):
                patch.setattr("treadle.runtime.distributed.ranks.join", Recorder("join", lines, "-"))
            if words.startswith("chat") and "chatting" in replaced:
                patch.setattr("treadle.continuation.TextWriter.open", Recorder("TextWriter.open", [], "-"))
            owner, _, name = replaced.rpartition(".")
            patch.setattr(resolve_name(owner), name, Recorder(name, lines, last))
            with pytest.raises(Asked):
                treadle.cli.app(words.split(), standalone_mode=False)
    golden(f"calls/{command}.txt", "\n".join(lines[1:]).replace(sys.executable, "PYTHON"))


METHODS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [  # the class, the method, and its arguments
    ("classify", "classifier", ("one",), {}),
    ("classify", "classifier", (["one", "two"],), {}),
    ("answer", "answerer", ("what", "one"), {}),
    ("tag", "tagger", ("one",), {}),
    ("tag", "tagger", (["one"],), {"grouping": "max"}),
    ("fill", "filler", ("one",), {}),
    ("fill", "filler", (["one"],), {"top": 3}),
    ("embed", "embedder", ("one",), {}),
    ("translate", "rewriter", ("one",), {}),
    ("translate", "rewriter", (["one"],), {"source": "en", "target": "de"}),
    ("summarize", "rewriter", ("one",), {}),
    ("summarize", "rewriter", (["one"],), {"most": 3}),
    ("generate", "writer", ("one",), {}),
    (
        "generate",
        "writer",
        (["one"],),
        {"most": 3, "sampling": t.Sampling(0.5), "rules": t.TokenRules(), "stop": ["."]},
    ),
    ("perplexity", "meter", ("one",), {}),
    ("perplexity", "meter", ("one",), {"window": 8, "most": 9}),
    ("stream", "writer", ("one",), {}),
    ("stream", "writer", ("one",), {"most": 3, "sampling": t.Sampling(0.5), "rules": t.TokenRules(), "stop": ["."]}),
    ("search", "writer", ("one",), {"beams": t.Beams(4)}),
    ("search", "writer", (["one"],), {"beams": t.Beams(4), "most": 3}),
    ("transcribe", "transcriber", ("a.wav",), {}),
    ("transcribe", "transcriber", ("a.wav",), {"language": "en"}),
    ("label", "labeller", ("a.png",), {}),
    ("match", "matcher", ("a.png", ["one"]), {}),
]


def test_what_a_loaded_model_asks(golden: Golden) -> None:
    lines: list[str] = []
    for method, part, args, options in METHODS:
        model = LoadedModel(ModelOptions("some"))
        lines.append(f"{method}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in options.items())])})")
        vars(model)[part] = Recorder(part, lines, "")
        with pytest.raises(Asked):
            getattr(model, method)(*args, **options)
    golden("pages/methods.txt", "\n".join(lines))
