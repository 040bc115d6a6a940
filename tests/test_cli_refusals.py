"""The command line: responses to bad input, and to damaged files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

import treadle.cli
from tests.command_line import MODEL, SMALL, Result, Treadle, commands_in, line_of, refused
from treadle.ir.errors import TreadleError


@pytest.fixture
def treadle_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Treadle:
    return commands_in(tmp_path, capsys, monkeypatch)


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
        (["inspect", "model.py"], ["named with its function", "one of model.py:small, "]),
        (["inspect", "none.py:small"], ["there is no file none.py"]),
        (["inspect", SMALL, "--set", "layer=2"], ["has no option layer", "layers"]),
        (["inspect", SMALL, "--set", "layers"], ["NAME=VALUE", "--set layers=VALUE"]),
        (["inspect", SMALL, "--set", "act=t.relo"], ["the DSL has no 'relo'", "t.relu"]),
        (["inspect", SMALL, "--inputs", "length"], ["has no input length", "lengths"]),
        (["inspect", SMALL, "--after", "dead-cod"], ["no pass 'dead-cod'", "dead-code?"]),
        (["inspect", SMALL, "--after", "gelu-erf"], ["a rule of the pass fuse-gelu", "try       --after fuse-gelu\n"]),
        (["inspect", SMALL, "--set", "act=relu"], ["is a function", "try       --set act=t.relu\n"]),
        (["inspect", SMALL, "--limit", "nodes=0"], ["the limit nodes must be a positive integer"]),
        (["inspect", SMALL, "--limit", "nodes=5"], ["limits apply to a model"]),
        (["inspect", SMALL, "--after", "dead-code", "--raw"], ["two different stages"]),
        (["inspect", SMALL, "--sizes", "Q=3"], ["no symbolic axis Q", "one of B, S"]),
        (["inspect", SMALL, "--sizes", "S=-3"], ["size of S must be a positive integer"]),
        (["inspect", "gpt2", "--sizes", "S=2000"], ["the size of S cannot be 2000", "S <= 1024"]),
        (["inspect", SMALL, "--follow", "Q"], ["there is no axis 'Q'"]),
        (["compile", SMALL, "--backend", "nump"], ["there is no backend 'nump'", "numpy"]),
        (["compile", SMALL, "--target", "abacus"], ["unknown target 'abacus'", "cpu"]),
        (["compile", SMALL, "--target", "cuda"], ["numpy backend runs on the CPU only"]),
        *[
            (
                ["inspect", SMALL, "--backend", "numpy", *words, *more],
                [f"the numpy backend {what}"],
            )
            for words, what in (
                (["--threads", "2"], "does not choose the number of threads"),
                (["--target", "cuda"], "runs on the CPU only"),
            )
            for more in ([], ["--source"])
        ],
        (["inspect", SMALL, "--threads", "2", "--target", "webgpu"], ["threads apply to CPUs, not to webgpu"]),
        *[
            (
                ["export", SMALL, "-o", file, "--to", format, *words],
                ["apply to other formats than onnx, gguf, compressed-tensors", "try       leave out "],
            )
            for file, format in (("small.onnx", "onnx"), ("small.gguf", "gguf"))
            for words in (["--target", "cuda"], ["--threads", "2"], ["--backend", "numpy"], ["--sizes", "S=2"])
        ],
        (["run", SMALL], ["no value for tokens", "try       --input tokens=...\n"]),
        (["run", SMALL, "--input", "token=1"], ["has no input token", "tokens"]),
        (["run", SMALL, "--input", "tokens=1,x"], ["neither a .npy file nor numbers", "tokens=1,2,3"]),
        (["run", SMALL, "--input", "tokens=[[1],[2,3]]"], ["the rows of input tokens differ in length"]),
        (["run", SMALL, "--input", "tokens=1.5"], ["tokens must be i64"]),
        (["run", SMALL, "--input", 'tokens=["__import__"]'], ["tokens must be i64"]),
        (
            ["run", SMALL, "--input", "tokens=1,99"],
            ["index 99", line_of("t.embed"), "99 in input tokens", "indices from 0 to 9"],
        ),
        (["run", SMALL, "--input", "tokens=none.npy"], ["the file does not exist", "none.npy"]),
        (
            ["run", SMALL, "--input", "tokens=1", "--output", "made/logits.npy"],
            ["logits.npy would be a folder", "--output made/logits, which writes made/logits/NAME.npy"],
        ),
        (
            ["embed", "none", "A sentence.", "--output", "made.npy"],
            ["made.npy would be a folder", "--output made, which writes made/embeddings.npy"],
        ),
        (["verify", SMALL, "--backend", "onnxruntime"], ["there is no backend 'onnxruntime'", "one of numpy"]),
        (["fetch", "minilmm"], ["there is no model 'minilmm' to fetch", "minilm"]),
        (["embed", "gpt2", "A sentence."], ["gpt2 does not embed sentences"]),
        (["embed", "gpt2", "A sentence.", "--file", "x"], ["given both as arguments"]),
    ],
)
def test_missing_files_are_refused(treadle_command: Treadle, words: list[str], parts: list[str]) -> None:
    refused(treadle_command(*words), *parts)


CALLS = {
    "inspect": "",
    "compile": "",
    "explain": "sharding --mesh tp=1",
    "report": "",
    "diff": "",
    "run": "--input tokens=1",
    "verify": "",
    "shard": "--mesh tp=1",
    "export": "-o small.onnx",
    "bench": "",
    "roofline": "",
    "train": "text.txt",
    "embed": "text",
    "generate": "text",
    "serve": "",
    "chat": "",
    "classify": "text",
    "answer": "text text",
    "tag": "text",
    "fill": "text",
    "label": "image.png",
    "match": "image.png --text text",
    "describe": "image.png",
    "translate": "text",
    "summarize": "text",
    "transcribe": "speech.wav",
    "perplexity": "text.txt",
}
"""Further required options of each command that takes --set."""


COMMANDS: Mapping[str, Any] = typer.main.get_command(treadle.cli.app).commands  # type: ignore[attr-defined]


def flags_of(command: str) -> dict[str, str]:
    """The flags of a command, by the names that --set would give them."""
    flags = [flag for param in COMMANDS[command].params for flag in param.opts if flag.startswith("--")]
    return {flag[2:].replace("-", "_"): flag for flag in flags if flag not in ("--set", "--help")}


def refused_freely(command: str, option: str, *parts: str) -> None:
    """Do the same as `refused`, without comparing the texts, which differ only by the command."""
    words = [command, SMALL, *CALLS[command].split(), "--set", f"{option}=1"]
    said = CliRunner().invoke(treadle.cli.app, words)
    refused(Result(said.exit_code, said.stdout, said.stderr), *parts)


NEIGHBOURS = {
    "run modle.py:scale --input x=1,2,3": "run model.py:scale --input x=1,2,3",
    "run model.py:scael --input x=1,2,3": "run model.py:scale --input x=1,2,3",
    "run flder/moedl.py:scale --input x=1,2,3": "run folder/model.py:scale --input x=1,2,3",
    "run scael.treadle --input x=1,2,3": "run scale.treadle --input x=1,2,3",
    "run scale.treadel --input x=1,2,3": "run scale.treadle --input x=1,2,3",
    "diff scale.treadle scael.treadle": "diff scale.treadle scale.treadle",
    "run folder/scal.treadle --input x=1,2,3": "run folder/scale.treadle --input x=1,2,3",
    "run model.py:scale --input x=arays.npy": "run model.py:scale --input x=arrays.npy",
    "explain model.py:scale memory --against memroy.json": "explain model.py:scale memory --against memory.json",
    "inspect model.py:small --weights wieghts": "inspect model.py:small --weights weights",
    "inspect ./wieghts": "inspect weights",
    "inspect ./folder/wieghts": "inspect folder/weights",
}


@pytest.mark.parametrize("line", NEIGHBOURS)
def test_a_misspelled_path_is_answered_with_its_neighbour(
    line: str, treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint is the same command, with an existing file. A file of another kind is not suggested."""
    monkeypatch.setenv("HF_HUB_CACHE", str(Path("cache").absolute()))
    Path("scale.json").touch()
    Path("modle.pyc").touch()
    for place in (Path(), Path("folder")):
        (place / "weights").mkdir(parents=True)
        (place / "model.py").write_text(MODEL, encoding="utf-8")
        treadle.compile("model.py:scale", backend="numpy").save(place / "scale.treadle")
    np.save("arrays.npy", np.ones((1, 3), np.float32))
    Path("memory.json").write_text(treadle_command("explain", "model.py:scale", "memory", "--json").out)
    said = treadle_command(*line.split())
    refused(said, f"try       treadle {NEIGHBOURS[line]}\n")
    if "weights" not in line + NEIGHBOURS[line]:
        assert treadle_command(*NEIGHBOURS[line].split()).code == 0


def test_a_path_without_a_similar_neighbour_is_answered_without_a_suggestion(treadle_command: Treadle) -> None:
    Path("other.onnx").touch()
    for line in ("run nothing.treadle", "run other.treadle", "run nothing/model.py:scale"):
        said = treadle_command(*line.split())
        refused(said, line.split()[1].partition(":")[0])
        assert "other.onnx" not in said.err and "?" not in said.err


def test_a_function_that_is_not_decorated_is_answered_with_the_decorator(treadle_command: Treadle) -> None:
    Path("model.py").write_text(f"{MODEL}\n\ndef plain(x):\n    return x\n", encoding="utf-8")
    refused(treadle_command("run", "model.py:plain"), "try       decorate it with @t.model\n")


@pytest.mark.parametrize("command", CALLS)
def test_an_option_of_compile_is_no_option_of_a_model(command: str, treadle_command: Treadle) -> None:
    """If the command has a flag for it, the error names the flag."""
    if command == "serve":
        pytest.importorskip("uvicorn")
        pytest.importorskip("prometheus_client")
    flags = {**flags_of(command), "limits": "--limit"}
    for name in ("quantize", "dtype", "backend", "target", "limits"):
        meant = f"{flags[name]}, an option of treadle {command}" if name in flags else "not part of a model"
        refused_freely(command, name, meant)


def test_every_command_that_takes_set_was_called() -> None:
    assert [name for name in treadle.cli.COMMANDS if "--set" in str([p.opts for p in COMMANDS[name].params])] == [
        *CALLS
    ]


@pytest.mark.parametrize(
    "command", ["inspect", "compile", "explain", "report", "run", "verify", "shard", "export", "bench"]
)
def test_a_flag_of_the_command_is_no_option_of_a_model(command: str, treadle_command: Treadle) -> None:
    """Every flag, with a model that has no option of its name."""
    for name, flag in flags_of(command).items():
        refused_freely(command, name, f"{flag}, an option of treadle {command}")


def test_a_model_may_have_an_option_of_the_name_of_a_flag(treadle_command: Treadle) -> None:
    text = "import treadle as t\n\n\n@t.model\ndef m(x: t.f32['B 8'], *, output=6):\n    return t.relu(x) * output\n"
    Path("named.py").write_text(text, encoding="utf-8")
    assert treadle_command("run", "named.py:m", "--set", "output=5", "--input", "x=1,1,1,1,1,1,1,1", "--json").code == 0


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


def test_a_fault_of_our_own_is_told_as_one(treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("treadle.program.source.ModelSource.resolve", fail)
    said = treadle_command("inspect", SMALL)
    assert said.code == 1
    assert "a fault of Treadle: KeyError: 'lost'" in said.err
    assert "TREADLE_DEBUG=1" in said.err
    assert "Traceback" not in said.err
    report = treadle_command("inspect", SMALL, "--json")
    assert report.code == 1
    assert report.json["error"]["kind"] == "InternalError"


# -- folders and files of others -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny GPT-2 in Hugging Face's format."""
    pytest.importorskip("transformers")
    from tests.hf_models import save

    save("gpt2", tmp_path / "folder")
    return tmp_path / "folder"


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
        (with_objects, "not hold an array of numbers"),
        (cut_short, "truncated"),
        (promising_too_much, "x.npy"),
        (no_array, "not a .npy file"),
        (with_fields, "not hold an array of numbers"),
    ],
)
def test_a_hostile_npy_file_is_refused(treadle_command: Treadle, make: Callable[[], None], part: str) -> None:
    make()
    refused(treadle_command("run", "model.py:scale", "--input", "x=x.npy"), part, "x.npy")
