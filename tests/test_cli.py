"""The command line: the output of each command, in words and with `--json`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.cli
from tests.command_line import SMALL, Treadle, commands_in, line_of, refused
from treadle.artifacts.reading import open_artifact
from treadle.ir.errors import TreadleError
from treadle.ir.text.parser import parse_graph
from treadle.reporting.counts import human
from treadle.resolving import resolve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def treadle_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Treadle:
    return commands_in(tmp_path, capsys, monkeypatch)


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
    report = treadle_command("inspect", "gpt2", "--set", "layers=1", "--set", "context=40", "--json").json
    assert report["sizes"] == {"B": 1, "S": 40}


def test_unfolded_blocks_are_written_out(treadle_command: Treadle) -> None:
    folded, unfolded = (treadle_command("inspect", SMALL, *more).out for more in ((), ("--unfold",)))
    assert folded.count(" attention(") == 1
    assert unfolded.count(" attention(") == 2


def test_after_a_pass(treadle_command: Treadle) -> None:
    report = treadle_command("inspect", SMALL, "--after", "canonicalize", "--json").json
    assert report["stage"] == "after canonicalize"
    assert parse_graph(report["graph"]).name == "small"


def test_follow_names_what_stands_against_an_axis(treadle_command: Treadle) -> None:
    report = treadle_command("inspect", SMALL, "--follow", "S")
    assert (
        f"S may not be stepped\n  attention: the axis is whole  ({line_of('t.self_attention')}, scope h.0.attn"
        in report.out
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
    report = treadle_command("compile", SMALL, "--seed", "7", "--json").json
    assert report["weights"] == "drawn from seed 7"
    assert [p["name"] for p in report["inputs"]] == ["tokens"]
    assert report["outputs"] == [{"name": "hidden", "dtype": "f32", "axes": ["B", "S", "8"]}]
    assert "fold-constants" in [p["pass"] for p in report["passes"]]
    assert report["ops"]["attention"] == 2


def test_written_files_are_reported(treadle_command: Treadle) -> None:
    said = treadle_command("compile", SMALL, "-o", "a.treadle")
    size, seal = human(Path("a.treadle").stat().st_size, "B"), open_artifact("a.treadle").seal
    assert said.out.splitlines()[-1] == f"wrote a.treadle, {size}, seal {seal}"
    report = treadle_command("compile", SMALL, "-o", "a.treadle", "--json").json
    assert (report["file"], report["seal"]) == ("a.treadle", seal)
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
    report = treadle_command("run", "model.py:scale", "--input", "x=[[1, 2, 3], [4, 5, 6]]", "--json").json["outputs"]
    assert report["y"]["values"] == [[2, 4, 6], [8, 10, 12]]
    assert report["total"]["values"] == 21
    assert (report["y"]["min"], report["y"]["mean"], report["y"]["max"]) == (2, 7, 12)


def test_run_results_as_json(treadle_command: Treadle) -> None:
    words = ["run", "model.py:scale", "--input", "x=1,2,3", "--seed", "5"]
    report = treadle_command(*words, "--output", "out", "--json").json
    assert list(report) == ["model", "backend", "target", "weights", "seconds", "outputs", "files"]
    assert (report["model"], report["backend"], report["target"]) == ("scale", "numpy", "cpu")
    assert report["weights"] == "drawn from seed 5"
    assert report["seconds"] > 0
    assert sorted(report["files"]) == [os.path.join("out", "total.npy"), os.path.join("out", "y.npy")]
    assert list(report["outputs"]) == ["y", "total"]
    assert list(report["outputs"]["y"]) == ["dtype", "shape", "min", "mean", "max", "not_finite", "values"]
    assert (report["outputs"]["y"]["dtype"], report["outputs"]["y"]["shape"]) == ("float32", [1, 3])
    assert treadle_command(*words, "--json").json["files"] == []


def test_numbers_without_brackets_are_one_row(treadle_command: Treadle) -> None:
    report = treadle_command("run", "model.py:scale", "--input", "x=1,2,3", "--json").json
    assert report["outputs"]["y"]["values"] == [[2, 4, 6]]


def test_an_optional_input_that_is_given_is_included(treadle_command: Treadle) -> None:
    words = ["run", SMALL, "--input", "tokens=[[1,2,3],[4,5,6]]", "--input", "lengths=3,1", "--output", "out"]
    assert treadle_command(*words).code == 0
    hidden = np.load("out/hidden.npy")
    alone = treadle_command("run", SMALL, "--input", "tokens=[[4]]", "--output", "alone")
    assert alone.code == 0
    np.testing.assert_allclose(hidden[1, :1], np.load("alone/hidden.npy")[0], rtol=1e-5, atol=1e-6)


def test_nonfinite_numbers_are_counted_and_null_in_json(treadle_command: Treadle) -> None:
    report = treadle_command("run", "model.py:scale", "--input", "x=Infinity,1,2", "--json").json["outputs"]
    assert report["y"]["values"] == [[None, 2, 4]]
    assert report["y"]["not_finite"] == 1


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
    report = treadle_command("models", "--json").json
    gpt2 = next(each for each in report["zoo"] if each["name"] == "gpt2")
    assert gpt2["parameters"] == 124_439_808
    assert gpt2["defaults"]["act"] == "t.gelu_tanh"
    assert next(each for each in report["fetched"] if each["name"] == "minilm")["path"] is None
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
    ("options", "report"),
    [
        (("--mesh", "tp"), "not a mesh: 'tp'"),
        (("--mesh", "tp=2"), "the split of the model is not specified"),
        (("--mesh", "tp=2", "--recipe", "dp"), "the mesh does not have"),
        (("--mesh", "tp=2", "--axis", "heads"), "--axis heads=tp"),
        (("--mesh", "tp=2", "--axis", "experts=tp"), "has no axis 'experts'"),
        (("--mesh", "tp=2", "--axis", "heads=ep"), "has no axis 'ep'"),
        (("--mesh", "tp=2", "--recipe", "megatron", "--rank", "2"), "has no rank 2"),
        (("--mesh", "tp=2", "--recipe", "megatron", "--sizes", "Q=2"), "no symbolic axis Q"),
    ],
)
def test_shard_refuses_what_it_cannot_do(treadle_command: Treadle, options: tuple[str, ...], report: str) -> None:
    said = treadle_command("shard", SMALL, *options)
    assert said.code == 2
    assert report in said.err


# -- common rules ----------------------------------------------------------------------------------------------


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


def test_verify_widens_as_compile_does(treadle_command: Treadle) -> None:
    said = treadle_command("verify", SMALL, "--backend", "numpy", "--widen", "bf16")
    assert said.code == 0
    refused(treadle_command("verify", SMALL, "--widen", "f8"), "not a dtype that can be widened")
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    refused(treadle_command("verify", "small.treadle", "--widen", "bf16"), "does not accept --widen")
    refused(treadle_command("bench", "small.treadle", "--dtype", "bf16"), "does not accept --dtype")


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


def test_a_folder_is_inspected_and_run(treadle_command: Treadle, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.hf_models import save

    save("gpt2", tmp_path / "folder")
    said = treadle_command("compile", "folder")
    assert said.code == 0
    assert "read from the checkpoint" in said.out
    assert treadle_command("run", "folder", "--input", "tokens=1,2,3").code == 0


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
    """Names may be anything, in the form in which a hint lists them: an axis `?`, an input `input.1`."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[A,2] x) => (float y) { y = Abs(x) }'
    )
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "?"
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "input.1"
    onnx.save(proto, str(tmp_path / "m.onnx"))
    named = "one of its axes (input.1_0, ?) or of its inputs (input.1)"
    refused(treadle_command("inspect", "m.onnx", "--set", "n=3"), named)
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
        "the compiled graph depends on the value of k",
        "received  <compiled top on numpy, for each k: (x: f32[B, 9], k: i64[1])>",
        "--set k=VALUE",
    )
    assert treadle_command("compile", "m.onnx", "--set", "k=3").code == 0
