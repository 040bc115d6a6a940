"""The command line: what each command says, what `--json` prints, and what bad input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.cli
from treadle.artifacts import open_artifact
from treadle.ir.errors import TreadleError
from treadle.ir.text.parser import parse_graph
from treadle.reporting.counts import human
from treadle.resolving import resolve

ROOT = Path(__file__).resolve().parent.parent

MODEL = """\
import treadle as t


@t.model
def small(tokens: t.i64["B S"], lengths: t.i64["B"] | None, *, dim=8, layers=2, act=t.gelu):
    \"\"\"A small encoder.\"\"\"
    x = t.embed(tokens, 10, dim, name="wte")
    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("h", layers):
        x += t.self_attention(x, 2, mask=mask, name="attn")
        x += t.mlp(x, 16, act=act, name="mlp")
    return {"hidden": x}


@t.model
def wrong_axis(x: t.f32["B S 8"]):
    for _ in t.stack("h", 2):
        y = t.linear(x, 6, name="proj")
        x = x + y
    return x


@t.model
def unknown_op(x: t.f32["B S 8"]):
    return t.sofmax(x)


@t.model
def unknown_attribute(x: t.f32["B S 8"]):
    return t.softmax(x, axs=1)


@t.model
def python_error(x: t.f32["B S 8"]):
    return t.mlp(x)


@t.model
def branches(x: t.f32["B S 8"]):
    return x if x > 0 else -x


@t.model
def scale(x: t.f32["B 3"]):
    return {"y": x * 2, "total": t.reduce_sum(x, axes=(0, 1))}
"""


def line_of(code: str) -> str:
    """Where a piece of MODEL stands, as errors say it."""
    return f"model.py:{MODEL[: MODEL.index(code)].count(chr(10)) + 1}"


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        return json.loads(self.out)


Treadle = Callable[..., Result]


@pytest.fixture
def treadle_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Treadle:
    """Run a command in a folder that holds model.py, as the entry point would."""
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TREADLE_DEBUG", raising=False)

    def run(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["treadle", *words])
        with pytest.raises(SystemExit) as ended:
            treadle.cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        assert "\x1b[" not in said.out, "colour codes without a terminal"
        return Result(code if isinstance(code, int) else 0, said.out, said.err)

    return run


SMALL = "model.py:small"


# -- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_prints_a_graph_that_reads_back(treadle_command: Treadle) -> None:
    said = treadle_command("inspect", SMALL, "--raw")
    assert said.code == 0
    assert parse_graph(said.out) == resolve(SMALL).graph


def test_inspect_says_parameters_and_the_sizes_of_its_costs(treadle_command: Treadle) -> None:
    header = treadle_command("inspect", SMALL).out.partition("graph")[0]
    assert "small optimized" in header
    assert "h is called 2 times" in header
    # 10 x 8 words, and two blocks of 4 (8 x 8 + 8) in attention, 16 x 8 + 16 + 8 x 16 + 8 after it
    assert f"{80 + 2 * (4 * 72 + 144 + 136):,} parameters" in header
    assert "at B=1, S=128" in header
    assert "at B=2, S=16" in treadle_command("inspect", SMALL, "--sizes", "B=2,S=16").out


def test_costs_grow_with_the_sizes(treadle_command: Treadle) -> None:
    one, two = (treadle_command("inspect", SMALL, "--sizes", s, "--json").json for s in ("B=1,S=16", "B=2,S=16"))
    assert two["flops"] == 2 * one["flops"] > 0
    assert one["sizes"] == {"B": 1, "S": 16}


def test_default_sizes_stay_within_bounds(treadle_command: Treadle) -> None:
    told = treadle_command("inspect", "gpt2", "--set", "layers=1", "--set", "context=40", "--json").json
    assert told["sizes"] == {"B": 1, "S": 40}


def test_unfolded_blocks_are_written_out(treadle_command: Treadle) -> None:
    folded, unfolded = (treadle_command("inspect", SMALL, *more).out for more in ((), ("--unfold",)))
    assert folded.count(" attention(") == 1
    assert unfolded.count(" attention(") == 2


def test_after_a_pass(treadle_command: Treadle) -> None:
    told = treadle_command("inspect", SMALL, "--after", "canonicalize", "--json").json
    assert told["stage"] == "after canonicalize"
    assert parse_graph(told["graph"]).name == "small"


def test_follow_names_what_stands_against_an_axis(treadle_command: Treadle) -> None:
    told = treadle_command("inspect", SMALL, "--follow", "S")
    assert (
        f"S may not be stepped\n  attention: the axis is whole  ({line_of('t.self_attention')}, scope h.0.attn"
        in told.out
    )
    facts = treadle_command("inspect", SMALL, "--follow", "S", "--json").json["follow"]
    assert facts["step"]["may"] is False
    assert facts["step"]["against"][0]["source"] == line_of("t.self_attention")
    assert facts["pack"]["may"] is True


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_source_is_the_backends(treadle_command: Treadle, backend: str) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    said = treadle_command("inspect", SMALL, "--source", "--backend", backend)
    assert said.code == 0
    compile(said.out, "emitted.py", "exec")
    assert f"import {backend}" in said.out


def test_configuration_and_optional_inputs(treadle_command: Treadle) -> None:
    said = treadle_command("inspect", SMALL, "--inputs", "lengths", "--set", "layers=3", "--set", "act=t.relu")
    assert "lengths: i64[B]" in said.out
    assert "h is called 3 times" in said.out
    assert 'activation="relu"' in said.out
    assert "gelu" not in said.out.split("graph ", 1)[1]


# -- compile, run ----------------------------------------------------------------------------------------------


def test_compile_tells_each_pass_and_what_runs_where(treadle_command: Treadle) -> None:
    said = treadle_command("compile", SMALL, "--explain")
    assert said.code == 0
    for word in ("fold-constants", "dead-code", "runs in numpy on cpu", "2 attention", "drawn from seed 0"):
        assert word in said.out


@pytest.mark.parametrize("command", [["compile", SMALL], ["explain", SMALL, "fusion"]], ids=["compile", "explain"])
def test_certify_asks_no_environment(
    treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("TREADLE_CERTIFY", "0")
    assert "largest error" in treadle_command(*command, "--certify").out
    assert "largest error" not in treadle_command(*command).out


def test_compile_as_json(treadle_command: Treadle) -> None:
    told = treadle_command("compile", SMALL, "--seed", "7", "--json").json
    assert told["weights"] == "drawn from seed 7"
    assert [p["name"] for p in told["inputs"]] == ["tokens"]
    assert told["outputs"] == [{"name": "hidden", "dtype": "f32", "axes": ["B", "S", "8"]}]
    assert "fold-constants" in [p["pass"] for p in told["passes"]]
    assert told["ops"]["attention"] == 2


def test_what_is_written_is_told(treadle_command: Treadle) -> None:
    said = treadle_command("compile", SMALL, "-o", "a.treadle")
    size, seal = human(Path("a.treadle").stat().st_size, "B"), open_artifact("a.treadle").seal
    assert said.out.splitlines()[-1] == f"wrote a.treadle, {size}, seal {seal}"
    told = treadle_command("compile", SMALL, "-o", "a.treadle", "--json").json
    assert (told["file"], told["seal"]) == ("a.treadle", seal)
    words = ["shard", SMALL, "--mesh", "tp=2", "--recipe", "megatron", "-o", "b.treadle"]
    said = treadle_command(*words)
    assert said.out.splitlines()[-1] == f"wrote b.treadle, {human(Path('b.treadle').stat().st_size, 'B')}"
    assert treadle_command(*words, "--json").json["mesh"] == "tp=2"


@pytest.mark.parametrize("backend", ["torch", "tvm"])
def test_threads_are_chosen(treadle_command: Treadle, backend: str) -> None:
    pytest.importorskip(backend)
    words = ["--backend", backend, "--threads", "1"]
    assert treadle_command("compile", SMALL, *words, "-o", "small.treadle", "--json").json["cores"] == 1
    at_tokens = ["--input", "tokens=1,2", "--output"]
    assert treadle_command("run", SMALL, *words, *at_tokens, "direct").code == 0
    assert treadle_command("run", "small.treadle", "--threads", "1", *at_tokens, "loaded").code == 0
    np.testing.assert_array_equal(np.load("direct/hidden.npy"), np.load("loaded/hidden.npy"))


@pytest.mark.parametrize("command", ["compile", "run"])
def test_numpy_refuses_threads(treadle_command: Treadle, command: str) -> None:
    given = ["--input", "tokens=1,2"] if command == "run" else []
    said = treadle_command(command, SMALL, "--threads", "2", *given)
    refused(said, "the numpy backend does not choose the number of threads", "received  threads=2")


def test_an_artifact_refuses_what_its_backend_does(treadle_command: Treadle) -> None:
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    said = treadle_command("run", "small.treadle", "--threads", "2", "--input", "tokens=1,2")
    refused(said, "the numpy backend does not choose the number of threads")


def test_no_threads_at_all_is_no_choice(treadle_command: Treadle) -> None:
    said = treadle_command("compile", SMALL, "--threads", "0")
    assert said.code == 2
    assert "--threads" in said.err


def test_run_on_numbers(treadle_command: Treadle) -> None:
    told = treadle_command("run", "model.py:scale", "--input", "x=[[1, 2, 3], [4, 5, 6]]", "--json").json["outputs"]
    assert told["y"]["values"] == [[2, 4, 6], [8, 10, 12]]
    assert told["total"]["values"] == 21
    assert (told["y"]["min"], told["y"]["mean"], told["y"]["max"]) == (2, 7, 12)


def test_what_a_run_tells_as_json(treadle_command: Treadle) -> None:
    words = ["run", "model.py:scale", "--input", "x=1,2,3", "--seed", "5"]
    told = treadle_command(*words, "--output", "out", "--json").json
    assert list(told) == ["model", "backend", "target", "weights", "seconds", "outputs", "files"]
    assert (told["model"], told["backend"], told["target"]) == ("scale", "numpy", "cpu")
    assert told["weights"] == "drawn from seed 5"
    assert told["seconds"] > 0
    assert sorted(told["files"]) == [os.path.join("out", "total.npy"), os.path.join("out", "y.npy")]
    assert list(told["outputs"]) == ["y", "total"]
    assert list(told["outputs"]["y"]) == ["dtype", "shape", "min", "mean", "max", "not_finite", "values"]
    assert (told["outputs"]["y"]["dtype"], told["outputs"]["y"]["shape"]) == ("float32", [1, 3])
    assert treadle_command(*words, "--json").json["files"] == []


def test_numbers_without_brackets_are_one_row(treadle_command: Treadle) -> None:
    told = treadle_command("run", "model.py:scale", "--input", "x=1,2,3", "--json").json
    assert told["outputs"]["y"]["values"] == [[2, 4, 6]]


def test_an_optional_input_that_is_given_is_included(treadle_command: Treadle) -> None:
    words = ["run", SMALL, "--input", "tokens=[[1,2,3],[4,5,6]]", "--input", "lengths=3,1", "--output", "out"]
    assert treadle_command(*words).code == 0
    hidden = np.load("out/hidden.npy")
    alone = treadle_command("run", SMALL, "--input", "tokens=[[4]]", "--output", "alone")
    assert alone.code == 0
    np.testing.assert_allclose(hidden[1, :1], np.load("alone/hidden.npy")[0], rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_counted_and_is_null(treadle_command: Treadle) -> None:
    told = treadle_command("run", "model.py:scale", "--input", "x=Infinity,1,2", "--json").json["outputs"]
    assert told["y"]["values"] == [[None, 2, 4]]
    assert told["y"]["not_finite"] == 1


def test_arrays_go_through_npy_files(treadle_command: Treadle) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3, order="F")
    np.save("x.npy", np.asfortranarray(x))
    said = treadle_command("run", "model.py:scale", "--input", "x=x.npy", "--output", "deep/er")
    assert said.code == 0
    np.testing.assert_array_equal(np.load("deep/er/y.npy"), 2 * x)
    assert sorted(os.listdir("deep/er")) == ["total.npy", "y.npy"]


def test_models_lists_the_zoo_and_what_can_be_fetched(
    treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    told = treadle_command("models", "--json").json
    gpt2 = next(each for each in told["zoo"] if each["name"] == "gpt2")
    assert gpt2["parameters"] == 124_439_808
    assert gpt2["defaults"]["act"] == "t.gelu_tanh"
    assert next(each for each in told["fetched"] if each["name"] == "minilm")["path"] is None
    assert "treadle fetch minilm" in treadle_command("models").out


# -- shard -----------------------------------------------------------------------------------------------------


def test_shard_tells_where_ranks_meet_and_tries_it(treadle_command: Treadle) -> None:
    said = treadle_command("shard", SMALL, "--mesh", "tp=2,dp=2", "--recipe", "megatron", "--lab")
    assert said.code == 0
    assert "2 x all_reduce over tp: the split of ffn is summed" in said.out
    assert "(model.py:11, h.*.mlp.down)" in said.out
    assert said.out.rstrip().endswith("equal")


def test_shard_by_hand_prints_the_program_of_a_rank(treadle_command: Treadle) -> None:
    options = ("--mesh", "tp=2", "--axis", "ffn=tp", "--axis", "vocab=tp")
    said = treadle_command("shard", SMALL, *options, "--rank", "1")
    assert said.code == 0
    assert 'all_reduce(down, over="tp", ways=2, because="the split of ffn is summed")' in said.out
    assert parse_graph(said.out).parameters["wte.weight"].type.static_shape == (5, 8)


def test_shard_as_json(treadle_command: Treadle) -> None:
    said = treadle_command("shard", SMALL, "--mesh", "dp=2", "--recipe", "dp", "--lab", "--json")
    assert said.json["mesh"] == "dp=2"
    assert said.json["collectives"] == []
    assert said.json["lab"]["passed"] is True


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--mesh", "tp"), "not a mesh: 'tp'"),
        (("--mesh", "tp=2"), "nothing says how to split the model"),
        (("--mesh", "tp=2", "--recipe", "dp"), "the mesh has not"),
        (("--mesh", "tp=2", "--axis", "heads"), "--axis heads=tp"),
        (("--mesh", "tp=2", "--axis", "experts=tp"), "has no axis 'experts'"),
        (("--mesh", "tp=2", "--axis", "heads=ep"), "has no axis 'ep'"),
        (("--mesh", "tp=2", "--recipe", "megatron", "--rank", "2"), "has no rank 2"),
        (("--mesh", "tp=2", "--recipe", "megatron", "--sizes", "Q=2"), "no symbolic axis Q"),
    ],
)
def test_shard_refuses_what_it_cannot_do(treadle_command: Treadle, options: tuple[str, ...], told: str) -> None:
    said = treadle_command("shard", SMALL, *options)
    assert said.code == 2
    assert told in said.err


# -- what bad input gets ---------------------------------------------------------------------------------------


def refused(said: Result, *parts: str) -> None:
    """Exit code 2, nothing on standard output, the house's form on standard error, no traceback."""
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("wrong_axis", ["add: sizes disagree: 8 in x, 6 in y", f"from      {line_of('x + y')}, scope h.0\n"]),
        ("unknown_op", ["the DSL has no 'sofmax'", line_of("t.sofmax"), "did you mean t.softmax"]),
        ("unknown_attribute", ["softmax", "axs", line_of("axs=1"), "softmax(x, *, axis=-1, name=None)"]),
        ("python_error", ["python_error cannot be traced", "'hidden'", line_of("t.mlp(x)")]),
        ("branches", ["no data-dependent branches", line_of("x if x"), "where(condition, a, b)"]),
        ("smal", ["declares no model 'smal'", "small"]),
    ],
)
def test_a_fault_in_a_model_names_its_line(treadle_command: Treadle, function: str, parts: list[str]) -> None:
    refused(treadle_command("inspect", f"model.py:{function}"), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["inspect", "gpt3"], ["there is no model 'gpt3'", "gpt2?"]),
        (["inspect", "model.py"], ["named with its function", "model.py:FUNCTION"]),
        (["inspect", "none.py:small"], ["there is no file none.py"]),
        (["inspect", SMALL, "--set", "layer=2"], ["has no option layer", "layers"]),
        (["inspect", SMALL, "--set", "layers"], ["NAME=VALUE", "--set layers=2"]),
        (["inspect", SMALL, "--set", "act=t.relo"], ["the DSL has no 'relo'", "t.relu"]),
        (["inspect", SMALL, "--inputs", "length"], ["has no input length", "lengths"]),
        (["inspect", SMALL, "--after", "fuse-everything"], ["no pass 'fuse-everything'", "dead-code"]),
        (["inspect", SMALL, "--after", "gelu-erf"], ["a rule of the pass fuse-gelu", "try       --after fuse-gelu\n"]),
        (["inspect", SMALL, "--set", "act=relu"], ["is a function", "try       --set act=t.relu\n"]),
        (["inspect", SMALL, "--limit", "nodes=0"], ["the limit nodes must be a positive integer"]),
        (["inspect", SMALL, "--limit", "nodes=5"], ["limits are of a file"]),
        (["inspect", SMALL, "--after", "dead-code", "--raw"], ["two stages"]),
        (["inspect", SMALL, "--sizes", "Q=3"], ["no symbolic axis Q", "one of B, S"]),
        (["inspect", SMALL, "--sizes", "S=-3"], ["size of S must be a positive integer"]),
        (["inspect", "gpt2", "--sizes", "S=2000"], ["S cannot be 2000", "S <= 1024"]),
        (["inspect", SMALL, "--follow", "Q"], ["there is no axis 'Q'"]),
        (["compile", SMALL, "--backend", "nump"], ["there is no backend 'nump'", "numpy"]),
        (["compile", SMALL, "--target", "abacus"], ["unknown target 'abacus'", "cpu"]),
        (["compile", SMALL, "--target", "cuda"], ["numpy backend runs on the CPU only"]),
        (["run", SMALL], ["no value for tokens", "try       --input tokens=...\n"]),
        (["run", SMALL, "--input", "token=1"], ["has no input token", "tokens"]),
        (["run", SMALL, "--input", "tokens=1,x"], ["neither a .npy file nor numbers", "tokens=1,2,3"]),
        (["run", SMALL, "--input", "tokens=[[1],[2,3]]"], ["input tokens must be i64"]),
        (["run", SMALL, "--input", "tokens=1.5"], ["tokens must be i64"]),
        (["run", SMALL, "--input", 'tokens=["__import__"]'], ["tokens must be i64"]),
        (
            ["run", SMALL, "--input", "tokens=1,99"],
            ["index 99", line_of("t.embed"), "99 in input tokens", "indices from 0 to 9"],
        ),
        (["run", SMALL, "--input", "tokens=none.npy"], ["there is no such file", "none.npy"]),
        (["fetch", "minilmm"], ["there is no model 'minilmm' to fetch", "minilm"]),
        (["embed", "gpt2", "A sentence."], ["gpt2 is a declaration of the zoo, without weights"]),
        (["embed", "gpt2", "A sentence.", "--file", "x"], ["given twice"]),
    ],
)
def test_what_does_not_exist_is_refused(treadle_command: Treadle, words: list[str], parts: list[str]) -> None:
    refused(treadle_command(*words), *parts)


def test_an_error_as_json_is_the_one_object(treadle_command: Treadle) -> None:
    said = treadle_command("inspect", "model.py:wrong_axis", "--json")
    assert said.code == 2
    assert said.err == ""
    assert said.json == {
        "error": {
            "kind": "RuleError",
            "what": "add: sizes disagree: 8 in x, 6 in y",
            "received": "x: f32[B, S, 8], y: f32[B, S, 6]",
            "from": f"{line_of('x + y')}, scope h.0",
        }
    }


@pytest.mark.parametrize(
    "words", [["nosuch"], ["inspect"], ["run", SMALL, "--nosuch"], ["compile", SMALL, "--seed", "x"]]
)
def test_wrong_usage_ends_with_2(treadle_command: Treadle, words: list[str]) -> None:
    said = treadle_command(*words)
    assert said.code == 2
    assert "Usage" in said.err


def test_a_file_that_is_no_python_names_the_line(treadle_command: Treadle) -> None:
    Path("syntax.py").write_text("import treadle as t\n\ndef f(:\n", encoding="utf-8")
    refused(treadle_command("inspect", "syntax.py:f"), "syntax.py is not Python", "syntax.py:3")
    Path("failing.py").write_text("import treadle as t\n\n\nt.nothing_of_this_name\n", encoding="utf-8")
    refused(treadle_command("inspect", "failing.py:f"), "nothing_of_this_name", "failing.py:4")


def test_debugging_shows_where_an_error_was_raised(treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_DEBUG", "1")
    said = treadle_command("inspect", "model.py:wrong_axis")
    assert said.code == 2
    assert "Traceback" in said.err


@pytest.mark.parametrize("level", ["9", "abc", "-1", "2.5", "²"])
def test_a_level_of_debugging_that_there_is_not_is_refused(
    treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("TREADLE_DEBUG", level)
    refused(
        treadle_command("inspect", SMALL), "TREADLE_DEBUG must be a number from 0 to 4", "try       TREADLE_DEBUG=4"
    )


@pytest.mark.parametrize("command", ["", *treadle.cli.COMMANDS])
def test_help_fits_80_columns_and_names_no_python_types(
    treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = treadle_command(*command.split(), "--help")
    assert said.code == 0
    assert max(map(len, said.out.splitlines())) <= 80
    for noise in ("<bool>", "<str>", "<int", "<float>", "list["):
        assert noise not in said.out


def test_a_limit_that_an_error_names_lets_the_file_be_read(treadle_command: Treadle) -> None:
    pytest.importorskip("onnx")
    assert treadle_command("export", "model.py:scale", "-o", "scale.onnx").code == 0
    said = treadle_command("inspect", "scale.onnx", "--limit", "nodes=1")
    refused(said, "more nodes than the limit", "try       --limit nodes=4, if you trust the file")
    assert treadle_command("inspect", "scale.onnx", "--limit", "nodes=4").code == 0
    with pytest.raises(TreadleError) as caught:
        treadle.compile("scale.onnx", limits={"nodes": 1})
    assert caught.value.hint == "limits={'nodes': 4}, if you trust the file"
    assert treadle.compile("scale.onnx", limits={"nodes": 4}).outputs
    refused(treadle_command("inspect", "scale.onnx", "--limit", "knots=4"), "no limit 'knots'", "one of bytes, nodes")


def test_verify_widens_as_compile_does(treadle_command: Treadle) -> None:
    said = treadle_command("verify", SMALL, "--backend", "numpy", "--widen", "bf16")
    assert said.code == 0
    refused(treadle_command("verify", SMALL, "--widen", "f8"), "no dtype that is widened")
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    refused(treadle_command("verify", "small.treadle", "--widen", "bf16"), "takes no --widen")
    refused(treadle_command("bench", "small.treadle", "--dtype", "bf16"), "takes no --dtype")


def test_numbers_of_float32_are_told_in_its_own_digits(treadle_command: Treadle) -> None:
    said = treadle_command("run", "model.py:scale", "--input", "x=0.05,0.1,0.2", "--json").json["outputs"]
    assert said["y"]["values"] == [[0.1, 0.2, 0.4]]
    assert (said["y"]["min"], said["y"]["max"]) == (0.1, 0.4)
    assert "[[0.1, 0.2, 0.4]]" in treadle_command("run", "model.py:scale", "--input", "x=0.05,0.1,0.2").out


def test_one_of_a_thing_is_no_plural(treadle_command: Treadle) -> None:
    lines = ["import treadle as t", "", "@t.model", 'def one(x: t.f32["B 1"]):', '    for _ in t.stack("h", 1):']
    text = "\n".join([*lines, '        x = x * t.parameter("w", 1)', '    return {"y": x}', ""])
    Path("one.py").write_text(text, encoding="utf-8")
    compiled, inspected, exported = (
        treadle_command(*words.split()).out
        for words in ("compile one.py:one", "inspect one.py:one --raw", "export one.py:one -o one.onnx")
    )
    assert "a run is 1 op: 1 mul\n1 parameter, drawn" in compiled
    assert "h is called 1 time\n# 1 parameter, 4 B" in inspected
    assert "1 node of opset" in exported


def test_a_fault_of_our_own_is_told_as_one(treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("treadle.resolving.resolve", fail)
    said = treadle_command("inspect", SMALL)
    assert said.code == 1
    assert "its own fault: KeyError: 'lost'" in said.err
    assert "TREADLE_DEBUG=1" in said.err
    assert "Traceback" not in said.err
    told = treadle_command("inspect", SMALL, "--json")
    assert told.code == 1
    assert told.json["error"]["kind"] == "InternalError"


# -- folders and files of others -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny GPT-2 in Hugging Face's form."""
    pytest.importorskip("transformers")
    from tests.hf_models import save

    save("gpt2", tmp_path / "folder")
    return tmp_path / "folder"


def test_a_folder_is_inspected_and_run(treadle_command: Treadle, folder: Path) -> None:
    said = treadle_command("compile", "folder")
    assert said.code == 0
    assert "read from the checkpoint" in said.out
    assert treadle_command("run", "folder", "--input", "tokens=1,2,3").code == 0


def test_tensors_that_are_missing_or_misshapen_are_all_listed(treadle_command: Treadle, folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    tensors[f"{prefix}ln_f.weigth"] = tensors.pop(f"{prefix}ln_f.weight")
    tensors[f"{prefix}wpe.weight"] = tensors[f"{prefix}wpe.weight"][:-1].copy()
    save_file(tensors, folder / "model.safetensors")
    refused(treadle_command("compile", "folder"), "ln_f.weight", "ln_f.weigth", "wpe.weight", "[23, 24]", "[24, 24]")


def truncated(data: bytes) -> bytes:
    return data[:-100]


def endless_header(data: bytes) -> bytes:
    return (2**63 - 1).to_bytes(8, "little") + data[8:]


def not_json(data: bytes) -> bytes:
    return data[:8] + b"[" + data[9:]


def empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("spoil", [truncated, endless_header, not_json, empty])
def test_a_hostile_safetensors_file_is_refused(
    treadle_command: Treadle, folder: Path, spoil: Callable[[bytes], bytes]
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    refused(treadle_command("run", "folder", "--input", "tokens=1"), "model.safetensors", "  in ")


def with_objects() -> None:
    np.save("x.npy", np.array([{"run": "me"}], dtype=object), allow_pickle=True)


def cut_short() -> None:
    np.save("x.npy", np.ones((2, 3), np.float32))
    Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:-4])


def promising_too_much() -> None:
    np.save("x.npy", np.ones((2, 3), np.float32))
    data = Path("x.npy").read_bytes()
    Path("x.npy").write_bytes(data.replace(b"(2, 3), }" + b" " * 12, b"(99999999, 99999999), }"[:21]))


def no_array() -> None:
    Path("x.npy").write_bytes(b"PK\x03\x04 and so on")


def with_fields() -> None:
    np.save("x.npy", np.zeros(2, dtype=[("a", "f4"), ("b", "f4")]))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (with_objects, "no plain numbers"),
        (cut_short, "truncated"),
        (promising_too_much, "x.npy"),
        (no_array, "not a .npy file"),
        (with_fields, "no plain numbers"),
    ],
)
def test_a_hostile_npy_file_is_refused(treadle_command: Treadle, make: Callable[[], None], part: str) -> None:
    make()
    refused(treadle_command("run", "model.py:scale", "--input", "x=x.npy"), part, "x.npy")


# -- as a process ----------------------------------------------------------------------------------------------


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TREADLE_DEBUG", None)
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, encoding="utf-8", check=False, **options
    )


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "treadle", "inspect", "gpt2", "--unfold", "--set", "layers=48"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    command.wait()


def test_help_loads_no_backend() -> None:
    code = """
import sys
sys.argv = ["treadle", "--help"]
import treadle.cli
try:
    treadle.cli.main()
except SystemExit:
    pass
heavy = {"torch", "networkx", "tokenizers", "transformers",
         "treadle.backends.python.emission", "treadle.passes.framework.manager"}
print("loaded", sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = process("-c", code)
    assert "loaded []" in done.stderr
    for command in ("compile", "inspect", "run", "embed", "models", "fetch"):
        assert command in done.stdout


def test_the_module_runs_and_tells_its_version() -> None:
    done = process("-m", "treadle", "--version")
    assert (done.returncode, done.stdout) == (0, f"treadle {treadle.__version__}\n")


def test_an_unknown_word_is_an_attribute_error_too() -> None:
    assert not hasattr(treadle, "sofmax")
    with pytest.raises(TreadleError, match="sofmax"):
        _ = treadle.sofmax  # type: ignore[attr-defined]
    with pytest.raises(TreadleError, match="sofmax"):
        _ = treadle.ops.sofmax
    assert "softmax" in dir(treadle)


def test_names_that_an_onnx_file_gives_may_be_any(treadle_command: Treadle, tmp_path: Path) -> None:
    """As a hint lists them: an axis called `?`, an input called `input.1`."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[A,2] x) => (float y) { y = Abs(x) }'
    )
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "?"
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "input.1"
    onnx.save(proto, str(tmp_path / "m.onnx"))
    refused(treadle_command("inspect", "m.onnx", "--set", "n=3"), "its axes are input.1_0, ?; its inputs input.1")
    for name in ("input.1_0", "?"):
        assert "f32[3, 2]" in treadle_command("inspect", "m.onnx", "--set", f"{name}=3").out
    ran = treadle_command("run", "m.onnx", "--set", "?=1", "--input", "input.1=[[-1, 2]]")
    assert (ran.code, "[[1" in ran.out) == (0, True), ran


def test_an_input_that_determines_shapes_must_be_set_to_compile(treadle_command: Treadle, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    text = '<ir_version: 9, opset_import: ["": 18]> top (float[B,9] x, int64[1] k) => (float[B,M] y, int64[B,M] i)'
    onnx.save(onnx.parser.parse_model(text + " { y, i = TopK(x, k) }"), str(tmp_path / "m.onnx"))
    refused(
        treadle_command("compile", "m.onnx"),
        "what is compiled depends on the value of k",
        "received  <compiled top on numpy, for each k: (x: f32[B, 9], k: i64[1])>",
        "--set k=VALUE",
    )
    assert treadle_command("compile", "m.onnx", "--set", "k=3").code == 0
