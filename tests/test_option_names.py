"""Options under the names of other tools lead to ours, in all commands and in Python; an option has one value."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import treadle as t
from tests.error_texts import raises_freely
from treadle.cli import COMMANDS, app
from treadle.cli.command_options import options_by_name
from treadle.compiled import Compiled
from treadle.models.registry import find_family
from treadle.program.option_table import declared_options
from treadle.program.options import CompileOptions
from treadle.program.other_names import OTHER_COMMANDS, OTHER_NAMES

GROUP: Any = typer.main.get_command(app)


def refusal(command: str, *words: str) -> str:
    """Return typer's error for the words of a command."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  its class depends on typer's version
        GROUP.commands[command].make_context(command, [*words])
    return str(caught.value.format_message())


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "launch"])
def test_another_name_of_an_option_leads_to_ours(command: str) -> None:
    params = GROUP.commands[command].params
    known = options_by_name(params)
    for other, ours in OTHER_NAMES.items():
        meant = next((each for each in ours if each in known), None)
        if meant is None or other in known:
            continue
        for spelled in {f"--{other}", f"--{other.replace('_', '-')}"}:
            what = refusal(command, spelled, "3")
            wanted = f"has {known[meant]}: " if known[meant][0] == "-" else f"{known[meant]} is an argument"
            if command == "embed" and meant == "sizes":
                wanted = "leave it out: texts are batched by length"
            if command in ("compile", "run") and meant == "sizes":  # their --sizes are refused without --memory
                wanted = "leave it out: a compiled model takes every size"
            assert what.startswith(f"No such option: {spelled}; ") and wanted in what


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", "--lr", "--learning-rate"),
        ("train", "--epochs", "--steps: Total number of updates of the weights."),
        ("train", "--learning_rate", "--learning-rate"),
        ("train", "--batch-size", "--batch"),
        ("generate", "--temp", "--temperature"),
        ("generate", "--n-predict", "--tokens"),
        ("generate", "--max-tokens", "--tokens"),
        ("generate", "-n", "--tokens"),
        ("serve", "--model", "MODEL... is an argument of treadle serve"),
        ("generate", "--prompt", "TEXTS is an argument of treadle generate"),
        ("chat", "--ctx-size", "--context"),
        ("serve", "--max-model-len", "--context"),
        ("serve", "--device", "--target"),
        ("compile", "--batch-size", "leave it out"),
        ("report", "--batch-size", "--sizes"),
        ("compile", "--trget", "--target"),
        ("classify", "--top-k", "--top"),
        ("compile", "-q", "has --quantize"),
        ("compile", "-b", "has --backend"),
        ("serve", "-p", "has --port, --prefix-cache, --passes"),
        ("train", "-lr", "has --learning-rate"),
        ("run", "-o", "has --output"),
        ("explain", "-o", "has --svg"),
        ("inspect", "-o", "prints its result: --json > FILE"),
        ("inspect", "--output", "prints its result: --json > FILE"),
        ("inspect", "--fp16", "--dtype"),
        ("inspect", "--format", "--json"),
        ("inspect", "--verbose", "TREADLE_DEBUG=1"),
        ("inspect", "--input", "is an option of treadle run"),
        ("train", "--new-weight", "--new-weights"),
        ("compile", "--new-weights", "is an option of treadle train"),
        ("run", "--cache", "is an option of treadle chat"),
        ("run", "--prompt", "treadle generate, embed and classify take texts"),
        ("generate", "--do-sample", "--temperature"),
        ("generate", "--stop-sequence", "--stop"),
        ("tag", "--aggregation-strategy", "--grouping"),
        ("translate", "--src", "--from"),
        ("match", "--candidate-labels", "--text"),
    ],
)
def test_names_that_one_reaches_for(command: str, given: str, meant: str) -> None:
    assert meant in refusal(command, given, "3")


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("run", "--text-only"),
        ("generate", "--stream"),
        ("compile", "--mode"),
        ("train", "--quantize"),
        ("run", "--loss"),
    ],
)
def test_an_option_that_is_not_similar_is_not_named(command: str, given: str) -> None:
    assert refusal(command, given, "3").rstrip(".") == f"No such option: {given}"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("inspect models.py mine", "models.py:mine names the function"),
        ("inspect models.py:mine kernel=3", "kernel is an option of the model: --set kernel=3"),
        ("inspect models.py:mine --set kernel 3", "kernel is an option of the model: --set kernel=3"),
        ("inspect models.py:mine n_head=3", "heads is an option of the model: --set heads=3"),
        ("run models.py:mine x=1,2", "--input x=1,2"),
        ("run models.py:mine 1,2", "--input NAME=1,2"),
        ("run models.py:mine ids.npy", "--input NAME=ids.npy"),
        ("run models.py:mine --input x=1 2 3", "--input x=1,2,3"),
        ("run models.py:mine text", "treadle generate, embed and classify take texts"),
    ],
)
def test_an_argument_without_its_option(
    words: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text("@t.model\ndef mine(x, *, kernel=3, heads=2): ...\n")
    command, *rest = words.split()
    assert meant in refusal(command, *rest)


@pytest.mark.parametrize(
    ("family", "other", "ours"),
    [
        ("llama", "num_hidden_layers", "layers"),
        ("llama", "hidden_size", "dim"),
        ("llama", "intermediate_size", "hidden"),
        ("gpt2", "n_embd", "dim"),
        ("gpt2", "n_positions", "context"),
        ("bert", "num_labels", "labels"),
    ],
)
def test_names_of_a_configuration_in_transformers(family: str, other: str, ours: str) -> None:
    with raises_freely(t.FrontendError) as caught:
        t.compile(family, config={other: 2})
    assert str(caught.value.hint).startswith(f"did you mean {ours}? ")
    assert ours in find_family(family).model.defaults
    assert f"--set {ours}=" in refusal("inspect", family, f"--{other.replace('_', '-')}", "2")


def test_names_of_inputs_in_transformers() -> None:
    for other, ours in (("input_ids", "tokens"), ("attention_mask", "lengths"), ("token_type_ids", "token_types")):
        with raises_freely(t.FrontendError) as caught:
            t.compile("bert", inputs=[other])
        assert str(caught.value.hint).startswith(f"did you mean {ours}? ")


def test_an_option_of_the_model_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text("@t.model\ndef mine(x, *, kernel=3, heads=2): ...\n\n\nraise SystemExit\n")
    for model, option in {"models.py:mine": "kernel", "gpt2": "layers"}.items():
        what = refusal("inspect", model, f"--{option}", "3")
        assert what == f"No such option: --{option}; {option} is an option of the model: --set {option}=..."
    assert "--set heads=..." in refusal("generate", "models.py:mine", "Once", "--heads=4")
    assert "--set" not in refusal("inspect", "models.py:other", "--kernel", "3")
    assert "--set" not in refusal("doctor", "--layers", "3")


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["help"], "treadle --help"), (["help", "train"], "treadle train --help"), (["version"], "treadle --version")],
)
def test_help_and_version_are_options(words: list[str], meant: str) -> None:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 2 and f"No such command '{words[0]}'; {meant} " in done.output
    assert CliRunner().invoke(app, meant.split()[1:]).exit_code == 0


def test_a_model_in_the_place_of_the_command(tmp_path: Path) -> None:
    for model in ("models.py:gpt", str(tmp_path)):
        done = CliRunner().invoke(app, [model, "x"], env={"COLUMNS": "300"})
        assert done.exit_code == 2 and f"a command comes first: treadle inspect {model}" in done.output
    assert "Missing option '-o' / '--output'. File to write" in refusal("export", "gpt2")


def test_an_option_with_no_similar_name_is_unknown_without_a_guess() -> None:
    assert refusal("generate", "--foobar", "3") == "No such option: --foobar"


def test_every_name_of_ours_is_an_option_of_a_command_or_of_a_function() -> None:
    ours = {name for each in GROUP.commands.values() for name in options_by_name(each.params)}
    ours |= {
        *declared_options(),
        *inspect.signature(t.Trainer).parameters,
        *inspect.signature(Compiled.session).parameters,
    }
    assert {each for names in OTHER_NAMES.values() for each in names} <= ours


def test_names_of_other_libraries_in_python() -> None:
    with raises_freely(t.FrontendError, match="has no option lr") as caught:
        t.Trainer("gpt2", lr=0.1)
    assert str(caught.value.hint) == "did you mean learning_rate=, an option of Trainer?"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "gpt2", "a", "--tokens", "3", "--tokens", "5"],
        ["generate", "gpt2", "a", "--tokens=3", "--tokens=3"],
        ["serve", "gpt2", "--reuse", "--no-reuse"],
        ["compile", "gpt2", "-o", "a.treadle", "--output", "b.treadle"],
    ],
)
def test_an_option_has_one_value(words: list[str]) -> None:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 2 and "it is given 2 times, and has one value" in done.output


def test_repeatable_options_and_flags_are_repeated() -> None:
    sizes = ["--set", "layers=1", "--set", "dim=8", "--set", "heads=2", "--set", "vocab=9"]
    assert CliRunner().invoke(app, ["inspect", "gpt2", *sizes, "--json", "--json"]).exit_code == 0


def test_a_batch_and_a_block_that_the_texts_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hint is followed, until the model is trained."""
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abcdefgh " * 9, encoding="utf-8")
    model = ["--set", "layers=1", "--set", "dim=8", "--set", "heads=2", "--set", "vocab=300", "--set", "context=128"]
    words = ["train", "gpt2", "text.txt", *model, "--vocab", "260", "--steps", "1", "--backend", "numpy"]
    tried = []
    while (done := CliRunner().invoke(app, words)).exit_code == 2:
        hint = done.output.partition("  try       ")[2].partition(",")[0]
        tried.append(hint.split()[0])
        words += hint.split()
        assert len(tried) < 3, done.output
    assert done.exit_code == 0 and tried == ["--length", "--batch"]


@pytest.mark.parametrize("other", OTHER_COMMANDS)
def test_another_name_of_a_command_leads_to_ours(other: str) -> None:
    assert other not in COMMANDS and OTHER_COMMANDS[other] in COMMANDS
    done = CliRunner().invoke(app, [other, "gpt2"], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and f"No such command '{other}'; treadle {OTHER_COMMANDS[other]}: " in done.output


@pytest.mark.parametrize(
    ("options", "python", "command"),
    [
        ({"dtype": "float32"}, "dtype='f32'", "--dtype f32"),
        ({"dtype": "torch.bfloat16"}, "dtype='bf16'", "--dtype bf16"),
        ({"dtype": "fp16"}, "dtype='f32' or 'bf16'", "--dtype f32 or bf16"),
        ({"dtype": "int8"}, "quantize='int8'", "--quantize int8"),
        ({"quantize": "4bit"}, "quantize='int4'", "--quantize int4"),
        ({"quantize": "Q4_K_M"}, "quantize='int4'", "--quantize int4"),
        ({"quantize": "q8_0"}, "quantize='int8-weights'", "--quantize int8-weights"),
        ({"quantize": "int8-weight"}, "quantize='int8-weights'", "--quantize int8-weights"),
        ({"quantize": "bf16"}, "dtype='bf16'", "--dtype bf16"),
    ],
)
def test_another_name_of_a_value_leads_to_ours(options: dict[str, str], python: str, command: str) -> None:
    with raises_freely(t.UsageError, match="^unknown ") as caught:
        t.compile("gpt2", backend="numpy", **options)
    assert (str(caught.value.hint), getattr(caught.value.hint, "command", None)) == (python, command)
    if " or " not in python:
        stages = CompileOptions.of("compile", {python.partition("=")[0]: python.partition("'")[2][:-1]}).stages()
        assert len(stages) == 3


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"warmup": 10}, 'learning_rate=t.Schedule(3e-4, warmup=100, steps=1000, shape="cosine")'),
        ({"weight_decay": 0.1}, "optimizer=t.AdamW(weight_decay=0.1)"),
        ({"momentum": 0.9}, "optimizer=t.SGD(momentum=0.9)"),
        ({"bf16": True}, 'dtype="bf16"'),
        ({"accumulate": 4}, "gradient_accumulation_steps=4"),
    ],
)
def test_options_of_other_trainers(options: dict[str, Any], hint: str) -> None:
    """The hint is an argument of t.Trainer, and is followed."""
    pytest.importorskip("torch")  # NumPy has no bf16
    with raises_freely(t.TreadleError) as caught:
        t.Trainer("gpt2", backend="numpy", layers=1, dim=8, heads=2, vocab=20, **options)
    assert str(caught.value.hint) == hint
    eval(f't.Trainer("gpt2", backend="torch", layers=1, dim=8, heads=2, vocab=20, {hint})', {"t": t})


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"batch_size": 2}, "leave it out: a model is one graph"),
        ({"input_shapes": {"x": (2, 8)}}, "leave it out: a model is one graph"),
        ({"mesh": "tp=2"}, "leave it out: the command `treadle launch` starts ranks"),
        ({"shapes": {"B": 2}, "memory": "1GB"}, "did you mean sizes="),
    ],
)
def test_sizes_and_meshes_of_other_compilers(options: dict[str, Any], hint: str) -> None:
    with raises_freely(t.TreadleError) as caught:
        t.compile("gpt2", backend="numpy", layers=1, **options)
    assert str(caught.value.hint).startswith(hint)
