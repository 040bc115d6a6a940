"""Hints of commands, followed to the letter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import treadle as t
from tests.error_texts import raises_freely
from treadle.benching import benchmark, sides
from treadle.benching.benchmark import bench_model
from treadle.benching.report import report_lines
from treadle.benching.workload import Workload
from treadle.cli import app
from treadle.frontends.declaration_files import load_declaration
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import BackendError, Hint
from treadle.ir.placement.mesh import Mesh
from treadle.passes.sharding.recipes import RECIPES
from treadle.passes.stages import left_out
from treadle.program.given_texts import read_sentences

SMALL = ["--set", "layers=1", "--set", "dim=32", "--set", "heads=2", "--set", "vocab=50", "--set", "context=64"]
TINY = {"layers": 1, "dim": 8, "heads": 2, "vocab": 9, "context": 32}
DECLARATION = """
from typing import Annotated
import treadle as t

@t.model
def p3(tokens: Annotated[t.Tensor, t.i64["B S"]], *, n: int, m: int) -> t.Tensor:
    return t.embed(tokens, n, m, name="e")
"""


def refused(*words: str) -> tuple[str, str]:
    """Return the first line of a command's error, and its hint."""
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 2, done.output
    (hint,) = re.findall(r"^  try +(.*)", done.output, re.MULTILINE)
    return done.output.splitlines()[0], hint


def runs(*words: str) -> str:
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, done.output
    return done.output


def test_missing_options_of_a_declaration(tmp_path: Path) -> None:
    place = tmp_path / "m.py"
    place.write_text(DECLARATION)
    what, hint = refused("inspect", f"{place}:p3")
    assert (what, hint) == ("model p3 needs a value for n, m", "--set n=... --set m=...")
    runs("inspect", f"{place}:p3", *shlex.split(hint.replace("...", "8")))
    with raises_freely(t.FrontendError) as caught:
        t.compile(load_declaration(place, "p3"))
    assert str(caught.value.hint) == "p3.configure(n=..., m=...)"


def test_a_symbol_as_an_option() -> None:
    what, hint = refused("inspect", "gpt2", *SMALL, "--set", "S=4")
    assert what == "model gpt2 has no option S" and hint.startswith("leave it out: S is an axis of the inputs")
    command, flags = re.findall(r"`treadle (\w+)` takes (--sizes S=4)", hint)[0]
    runs(command, "gpt2", *SMALL, *flags.split())
    assert "--sizes" not in refused("inspect", "gpt2", *SMALL, "--set", "T=4")[1]


def test_passes_left_out_of_none() -> None:
    what, hint = refused("inspect", "gpt2", *SMALL, "--without", "fuse-gelu", "--passes", "")
    assert hint == "leave out --without" and "fuse-gelu" in what
    for name in ("fuse-gelu", "none"):
        with raises_freely(t.UsageError) as caught:
            left_out([], [name])
        assert str(caught.value.hint) == "without=()"
    assert refused("inspect", "gpt2", *SMALL, "--without", "")[1].startswith("one of fold-constants")


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_a_roofline_of_a_step_of_a_short_model(target: str) -> None:
    words = ["roofline", "gpt2", *SMALL, "--target", target, "--entry", "step"]
    assert "past=63" in runs(*words, *["--rounds", "1"] * (target == "cpu"))
    what, hint = refused(*words, "--past", "64")
    assert what == "a step has one token more than the rows have already" and hint == "--past 63 or less"


def test_a_benchmark_runs_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers that read ONNX are listed with the reason, and the others run."""

    def fails(*given: object) -> None:
        raise BackendError("ONNX export needs the package onnx", hint="pip install onnx")

    monkeypatch.setattr(benchmark, "export_onnx", fails)
    work = Workload("gpt2", keywords={"backend": "numpy", "config": TINY})
    found = bench_model(work, ["eager", "onnxruntime", "openvino"], sizes={"S": 4}, rounds=1)
    assert [row.side for row in found.rows] == ["treadle", "eager"]
    reason = "the model cannot be exported: ONNX export needs the package onnx (pip install onnx)"
    assert found.missing == {"onnxruntime": reason, "openvino": reason}
    assert f"onnxruntime is missing: {reason}" in map(str, report_lines(found))
    assert {"onnxruntime", "openvino"} <= {*sides.PEERS}


def test_a_prefix_cache_of_a_session_that_does_not_resume() -> None:
    """NumPy's sessions do not reuse prefixes unless the caller asks for it."""
    made = t.compile("gpt2", backend="numpy", config=TINY)
    for resumes in (None, False):
        with raises_freely(t.UsageError, match="cannot resume from prefixes") as caught:
            made.session(rows=1, resumes=resumes).cache_prefixes(1 << 20)
        hint = caught.value.hint
        assert isinstance(hint, Hint) and hint.command.startswith("--reuse, which is off by default")
        assert str(hint) == "a session with resumes=True"
    made.session(rows=1, resumes=True).cache_prefixes(1 << 20)


@pytest.mark.parametrize("command", ["run", "generate"])
def test_a_rank_that_was_not_launched(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [command, "gpt2", *(["a"] if command == "generate" else []), "--mesh", "tp=2"]
    _, hint = refused(*words)
    launched = shlex.split(hint.partition(", or ")[0])
    assert launched[:6] == ["treadle", "launch", "-n", "2", "--", command]
    started: list[tuple[object, ...]] = []
    monkeypatch.setattr("treadle.runtime.distributed.launching.launch_ranks", lambda *given: started.append(given) or 0)
    runs(*launched[1:])
    assert len(started) == 1


def test_a_launch_without_torch_reports_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    monkeypatch.setattr("treadle.runtime.distributed.launching.launch_ranks", lambda *given: pytest.fail("started"))
    what, hint = refused("launch", "-n", "2", "--", "run", "gpt2", "--mesh", "tp=2")
    assert what == "ranks communicate through PyTorch, which is not installed" and "pip install" in hint


@pytest.mark.parametrize("missing", [False, True])
def test_a_pickle_is_converted_as_the_hint_says(missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.arange(3.0)}, "weights.bin")
    if missing:
        monkeypatch.setattr("treadle.frontends.safetensors_file.find_spec", lambda name: None)
    with raises_freely(t.CheckpointError) as caught:
        SafetensorsFile.open("weights.bin")
    first, _, code = str(caught.value.hint).partition("\n")
    pip = "pip install torch safetensors, and " if missing else ""
    assert first == f"if you trust the file, {pip}convert it:"
    exec(code, {"file": "weights.bin"})
    assert SafetensorsFile.open("model.safetensors").array("w").tolist() == [0, 1, 2]


@pytest.mark.parametrize("place", ["import", "trace"])
def test_a_declaration_that_ends_the_process(place: str, tmp_path: Path) -> None:
    """As a script does that calls sys.exit when it is imported, or a model that does so when it is traced."""
    file = tmp_path / "m.py"
    ends = "import sys\nsys.exit(3)\n"
    indented = ends.replace("\n", "\n    ").rstrip() + "\n"
    declared = DECLARATION.replace("    return", f"    {indented}    return")
    file.write_text(DECLARATION + ends if place == "import" else declared)
    done = CliRunner().invoke(app, ["inspect", f"{file}:p3", "--set", "n=4", "--set", "m=4"])
    assert done.exit_code == 2
    said = {"import": "m.py ends when it is imported: SystemExit: 3", "trace": "cannot be traced: SystemExit: 3"}
    assert said[place] in done.output and "m.py:" in done.output
    if place == "import":
        assert "__main__" in done.output
        file.write_text(DECLARATION + 'if __name__ == "__main__":\n    ' + indented)
        runs("inspect", f"{file}:p3", "--set", "n=4", "--set", "m=4")


@pytest.mark.parametrize("text", ["a text of words", "it's"])
def test_a_text_in_place_of_a_file_is_piped(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "gpt2", text, *SMALL, "--vocab", "9", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["treadle", *words])
    what, hint = refused(*words)
    assert what == "the file does not exist"
    echo, _, command = hint.partition(" | ")
    assert shlex.split(echo) == ["echo", text]
    assert shlex.split(command)[1:] == [*words[:2], "-", *words[3:]]
    done = CliRunner().invoke(app, shlex.split(command)[1:], input=text)
    assert "the file does not exist" not in done.output


def test_a_missing_file_of_texts_names_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "gpt2", "none.txt", *SMALL, "--vocab", "300"]
    assert refused(*words)[1] == "the path of a text file, or -, which is standard input"
    Path("nome.txt").write_text("a")
    monkeypatch.setattr("sys.argv", ["treadle", *words])
    assert shlex.split(refused(*words)[1])[1:4] == ["train", "gpt2", "nome.txt"]


def test_a_text_in_place_of_a_file_of_sentences_is_an_argument() -> None:
    with raises_freely(t.CheckpointError, match="the file does not exist") as caught:
        read_sentences([], "a text")
    assert str(caught.value.hint) == "'a text' without --file, as an argument"
    assert read_sentences(["a text"], None) == ["a text"]


def test_a_rank_is_launched_with_the_own_arguments_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "gpt2", "--mesh", "tp=2", "--input", "tokens=1,2"]
    monkeypatch.setattr("sys.argv", ["treadle", *words])
    assert refused(*words)[1] == f"treadle launch -n 2 -- {' '.join(words)}"


def test_a_file_in_place_of_a_model_is_exchanged_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["treadle", "label", "cat.jpg", "minilm"])
    assert refused("label", "cat.jpg", "minilm")[1] == "treadle label minilm cat.jpg: the model comes first"
    for command in ("diff", "serve"):  # their further arguments are models, too
        monkeypatch.setattr("sys.argv", ["treadle", command, "nothing", "gpt2"])
        assert "the model comes first" not in refused(command, "nothing", "gpt2")[1]


@pytest.mark.parametrize("command", ["embed", "classify", "summarize"])
def test_no_line_of_text_leads_to_an_argument(command: str) -> None:
    assert refused(command, "minilm")[1] == f'treadle {command} minilm "A sentence."'


def test_an_argument_is_added_to_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["embed", "m.py:encoder", "--weights", "out"]
    monkeypatch.setattr("sys.argv", ["treadle", *words])
    assert refused(*words)[1] == "treadle embed m.py:encoder 'A sentence.' --weights out"


@pytest.mark.parametrize(
    ("name", "meant"), [("gpu", "cuda"), ("mps", "webgpu"), ("avx2", "x86-64-v3"), ("A100", "a100")]
)
def test_other_names_of_targets(name: str, meant: str) -> None:
    assert refused("inspect", "gpt2", *SMALL, "--source", "--target", name)[1].startswith(f"{meant}? one of ")
    assert t.Target(meant).name == meant


def test_settings_of_another_option_name_it() -> None:
    text = ["generate", "minilm", "a"]
    assert refused(*text, "--system", "b")[1] == "--chat as well, or leave it out"
    assert refused(*text, "--best", "2")[1] == "--beams 4 as well, or leave it out"


@pytest.mark.parametrize(
    "chosen", [*([f"--recipe={name}"] for name in RECIPES), ["--axis=batch=dp", "--axis=heads=tp"], []]
)
def test_a_split_without_a_mesh_names_one_that_it_accepts(chosen: list[str]) -> None:
    for command in (["shard", "gpt2"], ["explain", "gpt2", "sharding"]):
        what, hint = refused(*command, *chosen)
        assert what == "sharding needs a mesh"
        runs(*command, *SMALL, *chosen, *hint.split())
    if chosen:
        for other in (["report", "gpt2"], ["run", "gpt2"], ["generate", "gpt2", "a"]):
            assert refused(*other, *chosen)[1] == f"{hint} as well"
    flags = refused("launch", "-n", "4", "run", "gpt2", *chosen)[1].split()
    assert Mesh.of(flags[1]).ranks == 4
    runs("shard", "gpt2", *SMALL, *chosen, *flags)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mesh_that_a_recipe_refuses_leads_to_one_that_it_accepts(recipe: str) -> None:
    mesh = "dp=2" if recipe != "dp" and recipe != "fsdp" else "tp=2"
    shard = ["shard", "gpt2", *SMALL, "--recipe", recipe]
    runs(*shard, *refused(*shard, "--mesh", mesh)[1].split())


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2", "tp=2,dp=2", "lanes=2"])
def test_a_mesh_without_a_split_names_those_that_it_accepts(mesh: str) -> None:
    what, hint = refused("shard", "gpt2", *SMALL, "--mesh", mesh)
    assert what == "the split of the model is not specified"
    flag, *values = hint.partition(", or")[0].replace(" or ", " ").split()
    for value in values:
        runs("shard", "gpt2", *SMALL, "--mesh", mesh, flag, value)


def test_ranks_without_a_command_get_a_mesh_of_their_number() -> None:
    for count in (2, 4):
        hint = refused("launch", "-n", str(count))[1]
        assert f"launch -n {count} -- run MODEL --mesh tp={count} " in hint


@pytest.mark.parametrize(
    ("options", "alternatives"),
    [
        ("", ["--source", "--after fuse-attention", ""]),
        ("--raw", ["--source", ""]),
        ("--unfold", ["--after fuse-attention", ""]),
        ("--follow S", [""]),
        ("--entry step", [""]),
    ],
)
def test_a_backend_that_changes_nothing_is_left_out_or_used(options: str, alternatives: list[str]) -> None:
    given = ["inspect", "gpt2", *SMALL, *options.split()]
    hint = refused(*given, "--backend", "numpy")[1]
    assert [flag for flag in ("--source", "--after") if flag in hint] == [a.split()[0] for a in alternatives if a]
    for alternative in alternatives:
        runs(*given, *(["--backend", "numpy", *alternative.split()] if alternative else []))


def test_values_of_heads_are_those_of_the_error() -> None:
    """`None` is a value of the list, also on the command line."""
    for value in refused("inspect", "gpt2", *SMALL, "--set", "head=nothing")[1].removeprefix("one of ").split(", "):
        runs("inspect", "gpt2", *SMALL, "--set", f"head={value}")
    vit = ["inspect", "vit", "--set", "layers=1", "--set", "head=distilled_classifier"]
    runs(*vit, *refused(*vit)[1].split())
    llama = ["inspect", "llama", "--set", "layers=1", "--set", "dim=32", "--set", "heads=3"]
    runs(*llama, *refused(*llama)[1].split())


def test_options_of_other_libraries_lead_to_no_python_on_the_command_line() -> None:
    for name in ("use_cache", "mode", "sess_options", "task", "local_files_only"):
        hint = refused("inspect", "gpt2", *SMALL, "--set", f"{name}=1")[1]
        assert not re.search(r"\bt\.\w|=[\"T]", hint), hint


def test_threads_are_left_out_of_a_page(tmp_path: Path) -> None:
    page = ["export", "gpt2", "--to", "web", "-o", str(tmp_path / "page"), "--threads", "2"]
    assert refused(*page)[1] == "leave out --target and --threads"


def test_a_text_to_fill_has_a_mask(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from tests.task_models import save, wordpiece

    save(tmp_path / "bert", "BertForMaskedLM", wordpiece())
    runs(*shlex.split(refused("fill", str(tmp_path / "bert"))[1])[1:])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "gpt2", "--batch-size", "4"], "leave it out: a compiled model takes every size"),
        (["compile", "gpt2", "--seq-len", "4"], "leave it out: a compiled model takes every size"),
        (["report", "gpt2", "--batch-size", "4"], "treadle report has --sizes"),
        (["run", "gpt2", "tokens=1", "2", "3"], "--input tokens=1,2,3"),
    ],
)
def test_sizes_and_values_of_inputs_that_no_option_names(words: list[str], hint: str) -> None:
    shown = CliRunner().invoke(app, words).output
    assert hint in re.sub(r"[│\s]+", " ", shown)


def test_the_configuration_has_no_size_of_a_batch() -> None:
    assert refused("run", "gpt2", *SMALL, "--set", "batch_size=4")[1].startswith("leave it out: ")
    assert refused("report", "gpt2", *SMALL, "--set", "batch_size=4")[1] == "--sizes, an option of treadle report"


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("translate MODEL the", "run MODEL --input NAME=FILE.npy"),
        ("generate gpt2 the --draft MODEL", "compile MODEL --weights FOLDER -o draft.treadle"),
        ("train ARTIFACT texts.txt -o new", "run ARTIFACT"),
    ],
)
def test_a_name_with_a_space_is_quoted_in_a_command(
    line: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my models.py").write_text(DECLARATION.replace(": int,", ": int = 9,").replace("m: int)", "m: int = 8)"))
    runs("compile", "my models.py:p3", "--backend", "numpy", "-o", "my model.treadle")
    names = {"MODEL": "my models.py:p3", "ARTIFACT": "my model.treadle"}
    _, hint = refused(*[names.get(word, word) for word in line.split()])
    (named,) = re.findall(r"`treadle ([^`]*)`", hint)
    assert shlex.split(named) == [names.get(word, word) for word in command.split()]
