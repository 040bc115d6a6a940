"""Options that a command refuses before it reads anything: the whole texts are in tests/golden/errors/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import treadle.cli

HOW = "--set n=1 --dtype bf16 --quantize int4"

REFUSED = [
    ("compile m.py:small -o small.onnx", "the name of an artifact must end in .treadle"),
    ("compile m.py:small --memory much", "memory must be a number of bytes"),
    ("compile m.py:small --sizes B=2", "`sizes=` only applies together with `memory=`"),
    ("inspect m.py:small --raw --after dead-code", "--raw and --after select two"),
    ("inspect m.py:small --entry step --raw", "--entry prints a graph derived"),
    ("inspect m.py:small --entry step --after dead-code", "--entry prints a graph derived"),
    ("inspect m.py:small --entry step --source", "--entry prints a graph derived"),
    ("inspect m.py:small --entry step --follow B", "--entry prints a graph derived"),
    ("inspect m.py:small --follow B --source", "--follow prints neither"),
    ("inspect m.py:small --follow B --unfold", "--follow prints neither"),
    ("inspect m.py:small --source --unfold", "--unfold unfolds the graph"),
    ("inspect m.py:small --backend numpy", "--backend, --target and --threads change neither"),
    ("inspect m.py:small --backend nump", "there is no backend 'nump'"),
    (f"inspect m.treadle --inputs y --widen bf16 --after dead-code {HOW}", "an artifact is already compiled"),
    ("inspect m.treadle --after dead-code", "an artifact has no graphs after single passes"),
    ("explain m.py:small fushion", "unknown subject to explain"),
    ("explain fusion m.py:small", "unknown subject to explain"),
    ("run m.py:small --inputs x=1,2", "--inputs has names of optional inputs"),
    ("run m.py:small --backend cuda", "there is no backend 'cuda'"),
    ("run m.py:small --backend gpu", "there is no backend 'gpu'"),
    ("launch -n 2 -- nope.py", "there is no file nope.py"),
    ("compile m.py:small -o small.tredle", "the name of an artifact must end in .treadle"),
    ("export m.py:small -o small.onnnx", "the name of an ONNX model must end in .onnx"),
    ("explain m.py:small fusion --cache f16", "explain fusion does not take cache"),
    ("explain m.py:small fusion --sizes B=2", "explain fusion does not take sizes"),
    ("explain m.py:small layouts --sizes B=2", "`sizes=` only applies together with `memory=`"),
    ("explain m.py:small storage --svg a.svg", "--svg applies to memory and sharding only"),
    ("explain m.py:small sharding --donate x", "explain sharding does not take donate"),
    ("explain m.py:small step --against a.json", "--against applies to memory only"),
    ("explain m.py:small memory --against a.json --json", "--against prints text"),
    ("explain m.py:small memory --mesh tp=2", "--mesh, --recipe, --axis and --device apply to sharding only"),
    ("explain m.py:small step --recipe dp", "--mesh, --recipe, --axis and --device apply to sharding only"),
    ("explain m.py:small fusion --axis ffn=tp", "--mesh, --recipe, --axis and --device apply to sharding only"),
    ("explain m.py:small layouts --device h100", "--mesh, --recipe, --axis and --device apply to sharding only"),
    ("explain m.py:small layouts --expect linear=1", "--expect applies to fusion only"),
    ("explain m.py:small step --donate x", "explain step does not take donate"),
    ("explain m.py:small sharding --recipe dp", "sharding needs a mesh"),
    ("explain m.py:small fusion --expect linear", "an expected count must be OP=NUMBER"),
    (f"explain m.py:small fusion --expect linear={'1' * 13}", "an expected count must be OP=NUMBER"),
    ("explain m.treadle fusion", "an artifact does not record how it was compiled"),
    ("explain m.treadle quantization", "an artifact does not record how it was compiled"),
    ("run m.py:small --recipe dp", "sharding options need a mesh"),
    ("run m.py:small --axis ffn=tp --axis vocab=tp", "sharding options need a mesh"),
    (f"run m.treadle {HOW}", "an artifact is already compiled"),
    ("launch -n 2 -- run gpt2", "ranks run a model that is split over a mesh"),
    (f"launch -n 3 -- generate gpt2 {'a' * 100}", "ranks run a model that is split over a mesh"),
    (f"launch -n 2 -- dance {'a' * 100} --mesh tp=2", "unknown command 'dance'"),
    (f"verify m.treadle --inputs y --widen bf16 {HOW}", "an artifact is already compiled"),
    ("shard m.py:small", "sharding needs a mesh"),
    ("shard m.py:small --mesh tp=2 -o small.onnx", "the name of an artifact must end in .treadle"),
    (
        "shard m.treadle --mesh tp=2 --recipe dp --axis ffn=tp --device h100 --sizes B=2 -o b.treadle",
        "the file of a sharded model has its plan",
    ),
    (
        f"shard m.treadle --inputs y --widen bf16 {HOW}",
        "an artifact is already compiled, and does not accept --inputs or --widen or --dtype or --quantize or --set",
    ),
    ("export m.py:small -o small", "the name of an ONNX model must end in .onnx"),
    ("export m.py:small --to model-explorer -o small.json --times times.csv", "the name of a file of times must end"),
    ("report m.py:small -o small.txt", "the name of an HTML page must end in .html or .htm"),
    ("report m.py:small -o small", "the name of an HTML page must end in .html or .htm"),
    ("diff m.py:small --report small.htlm", "the name of an HTML page must end in .html or .htm"),
    ("explain m.py:small memory --svg small.png", "the name of a drawing must end in .svg"),
    ("explain m.py:small sharding --mesh tp=2 --recipe dp --svg small.png", "the name of a drawing must end in .svg"),
    ("roofline m.py:small --svg small.png", "the name of a drawing must end in .svg"),
    ("export m.treadle -o small.onnx --set n=1 --inputs y --widen bf16", "an artifact is already compiled"),
    (f"bench m.treadle --inputs y {HOW}", "an artifact is already compiled"),
    (f"roofline m.treadle --inputs y {HOW}", "an artifact is already compiled"),
    (
        "generate m a --beams 2 --temperature 1 --top-k 1 --top-p 0.5 --min-p 0.5 --stop x --logprobs 0 --speculate "
        "--draft d",
        "a beam search does not accept",
    ),
    ("generate m a --best 2 --length-penalty 2", "only --beams accepts"),
    ("generate m a --system x", "only --chat accepts"),
    ("generate m a --recipe dp", "sharding options need a mesh"),
    ("classify m a b --pair c", "2 texts, but 1 values of --pair"),
    ("summarize m a --length-penalty 2", "only --beams accepts --length-penalty"),
    ("embed m a --file b", "sentences were given both as arguments and in a file"),
    ("tag m a --file b", "sentences were given both as arguments and in a file"),
    ("fetch minilmm", "there is no model 'minilmm' to fetch"),
    ("inspect gpt2 --entry begin", "unknown entry 'begin'"),
    (
        "explain m.treadle memory --dtype bf16 --inputs x",
        "an artifact is already compiled, and does not accept --inputs or --dtype",
    ),
    (
        "explain m.treadle step --set dim=4 --quantize int8",
        "an artifact is already compiled, and does not accept --quantize or --set",
    ),
    ("generate gpt2 a --axis heads=tp", "sharding options need a mesh"),
    ("serve gpt2 --key-file empty", "empty has no key"),
    ("serve gpt2 --key-file words", "words has no key"),
    ("serve gpt2 --key-file accents", "accents has no key"),
    ("generate gpt2 a --tokens 3 --tokens 5", "Usage: treadle generate"),
    ("serve =gpt2", "a model needs a name to be served under"),
]


@pytest.mark.parametrize(("words", "what"), REFUSED, ids=[words for words, _ in REFUSED])
def test_a_command_refuses(
    words: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text("import treadle as t\n\n\n@t.model\ndef small(x: t.f32['B 4']):\n    return t.relu(x)\n")
    for name, text in (("empty", " \n"), ("words", "a key"), ("accents", "clé")):
        Path(name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["treadle", *words.split()])
    with pytest.raises(SystemExit) as ended:
        treadle.cli.main()
    assert ended.value.code == 2
    report = capsys.readouterr()
    if "--json" in words:
        assert (json.loads(report.out)["error"]["what"].startswith(what), report.err) == (True, "")
    else:
        assert (report.err.startswith(what), report.out) == (True, "")


def test_a_long_line_of_an_error_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        treadle.cli.app(["inspect", "gpt3"])
    assert max(map(len, capsys.readouterr().err.splitlines())) > 200
