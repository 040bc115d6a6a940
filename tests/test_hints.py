"""Names in the `try` of an error exist: commands, options, arguments, words. Hints are read in the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import treadle
from tests.command_line import commands_in, refused
from tests.many_cases import every_case
from treadle.cli import COMMANDS, app
from treadle.ir.errors import CheckpointError
from treadle.ir.op_registry import OPS
from treadle.models.family import OTHER_WAYS
from treadle.models.registry import family_of

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("files", "ir", "frontends", "passes", "backends", "models", "runtime", "treadle")
THEIRS = {"export", "pip", "ensurepip", "pretrained"}  # names of other libraries and tools that hints use


ON_THE_COMMAND_LINE = " | on the command line: "
FOR_COMMANDS = (  # reached only by commands
    "treadle/cli/",
    "treadle/program/flag_values.py",
    "treadle/program/given_texts.py",
    "treadle/explaining/fusion.py",
    "treadle/training/text_training.py",
    "treadle/training/training_settings.py",
)


def shown(node: ast.AST) -> str:
    """Return the text of an expression, with … for parts that are computed at run time."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(shown(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return shown(left) + shown(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{shown(body)} | {shown(orelse)}"
        case ast.Call(func=ast.Name(id="Hint"), args=[text, command]):
            return f"{shown(text)}{ON_THE_COMMAND_LINE}{shown(command)}"
        case ast.BoolOp(values=values):
            return " | ".join(map(shown, values))
    return "…"


@cache
def sources() -> dict[Path, str]:
    """The text of every module."""
    paths = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
    return {path: path.read_text(encoding="utf-8") for path in paths}


def hints_in_sources() -> Iterator[tuple[str, str]]:
    """Yield every text that is used as a hint, also under another name, with its location."""
    for path, source in sources().items():
        if not any(name in source for name in ("hint", *KNOWN)):
            continue
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.keyword(arg="hint", value=value):
                    yield f"{place}:{value.lineno}", shown(value)
                case ast.Assign(targets=[ast.Name(id="hint") | ast.Attribute(attr="hint")], value=value):
                    yield f"{place}:{node.lineno}", shown(value)
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                    if name.strip("_") in KNOWN:
                        yield f"{place}:{node.lineno}", shown(value)


KNOWN = {"WITHOUT_BF16", "OTHER_WAYS", "CONVERSION", "DAMAGED", "SAME_AXES", "INCLUDED"}


@cache
def hints() -> list[tuple[str, str]]:
    """Every hint with its location. Reading them takes seconds, so it waits for the first test."""
    return list(hints_in_sources())


GROUP: Any = typer.main.get_command(app)
OPTIONS = {name: {o for p in GROUP.commands[name].params for o in p.opts} for name in COMMANDS}


@cache
def callables() -> dict[str, list[Callable[..., Any]]]:
    """Functions, methods and classes of ours by their bare names."""
    found: dict[str, list[Callable[..., Any]]] = {}
    for path in sources():
        dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        module = dotted if dotted.startswith("treadle") else f"treadle.{dotted}"
        if module.endswith(("__init__", "__main__")):
            continue
        for name, value in vars(import_module(module)).items():
            if callable(value) and getattr(value, "__module__", "").startswith("treadle"):
                found.setdefault(name, []).append(value)
                for inner, method in vars(value).items() if inspect.isclass(value) else ():
                    if inspect.isfunction(method):
                        found.setdefault(inner, []).append(method)
    return found


def test_there_are_hints_to_look_at() -> None:
    assert len(hints()) > 200
    assert sum("--" in text for _, text in hints()) > 5


def test_commands_and_options_are_there() -> None:
    with every_case() as case:
        for place, text in hints():
            if "treadle " not in text and "--" not in text:
                continue
            with case(place):
                named = re.findall(r"(?:^|[`\s])treadle (\w+)", text)
                assert all(command in COMMANDS for command in named), text
                ours = [OPTIONS[command] for command in named] or list(OPTIONS.values())
                for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"pip install.*|… -m .*", "", text)):
                    assert any(option in options for options in ours), f"{option} of {text!r}"


def test_python_is_told_no_options_of_the_command_line_and_commands_no_arguments() -> None:
    wrong = []
    for place, text in hints():
        python, _, command = text.partition(ON_THE_COMMAND_LINE)
        if not place.startswith(FOR_COMMANDS) and re.search(
            r"(?<![\w-])--[a-z]", re.sub(r"pip install.*|… -m .*", "", python)
        ):
            wrong.append(f"{place}: {python}")
        if re.search(
            r"\b(dims|sizes|static|limits|widen|inputs|backend|target)=[\[{(\"]|\b(t|exe|treadle)\.\w+\(", command
        ):
            wrong.append(f"{place}: {command}")
    assert wrong == []


FOR_PYTHON = (  # raised for objects and calls that only Python code has, or for the code of a model
    "backends/entries.py",
    "backends/tvm/executable.py",
    "frontends/attention_layers.py",
    "frontends/declarations.py",
    "frontends/dsl.py",
    "frontends/layers.py",
    "ir/analysis/following.py",
    "frontends/safetensors_file.py",  # a script that converts the file
    "frontends/torch_export/",
    "ir/attention/masking.py",
    "ir/expressions.py",
    "ir/initial_values.py",
    "ir/literals.py",
    "ir/ops/",
    "ir/transforms/chosen_outputs.py",
    "ir/transforms/training_losses.py",
    "ir/types.py",
    "models/family.py",  # with the command for the file
    "passes/memory/placement.py",
    "passes/sharding/",
    "runtime/",
    "treadle/artifacts/reading.py",  # load_artifact; commands open other models
    "treadle/compiled.py",
    "treadle/held_weights.py",
    "treadle/loading.py",
    "treadle/program/budgets.py",
    "treadle/program/forms/graph_form.py",  # a graph or an imported module
    "treadle/program/options.py",
    "treadle/program/places.py",
    "treadle/specializing.py",
    "treadle/training/trainer.py",
)


IN_PYTHON = re.compile(
    r"\b(?:t|exe|treadle)\.\w+\(|\bTarget\(|(?<!-)\b[a-z_]+=[\[{(\"'…]|\b(?:target|backend) [a-z]", re.MULTILINE
)
"""Calls and arguments of Python, and values of options that are named without a dash."""


def test_hints_that_commands_print_have_a_form_for_the_command_line() -> None:
    assert IN_PYTHON.search("compile for Target('cpu')") and IN_PYTHON.search('target="cpu"')
    wrong = [
        f"{place}: {text}"
        for place, text in hints()
        if ON_THE_COMMAND_LINE not in text and not text.startswith("in Python: ")
        if not place.startswith((*FOR_PYTHON, *FOR_COMMANDS))
        if IN_PYTHON.search(re.sub(r"(?<![\w-])--[a-z][\w=-]*…?", "", text))
    ]
    assert wrong == []


def test_arguments_are_those_of_what_is_called() -> None:
    """`Name(argument=...)`: a function of that name is ours, and takes the argument."""
    wrong = []
    for place, text in hints():
        for name, inside in re.findall(r"(?<!torch\.)\b([A-Za-z_]\w*)\(([^()]*)\)?", text):
            given = re.findall(r"(?:^|,\s*)(\w+)=", inside)
            if not given or name in THEIRS:
                continue
            takers = [inspect.signature(each).parameters for each in callables().get(name, []) if _has_signature(each)]
            takers += [{f.name: f for f in dataclasses.fields(OPS[name])}] if name in OPS else []  # type: ignore[arg-type]
            if not any(all(g in taker or _takes_any(taker) for g in given) for taker in takers):
                wrong.append(f"{place}: {name}({inside})")
    assert wrong == []


def test_words_after_t_and_treadle_are_there() -> None:
    for place, text in hints():
        for package, word in re.findall(r"(?<![\w.'])(t|treadle)\.([a-z]\w*)(?![\w.])", text):
            assert hasattr(treadle, word), f"{place}: {package}.{word}"


def test_variables_are_read() -> None:
    source = "".join(sources().values())
    for place, text in hints():
        for name in re.findall(r"\bTREADLE_[A-Z]+", text):
            assert re.search(rf'environ[^\n]*"{name}"', source), f"{place}: {name}"


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = 0
    for path, source in sources().items():
        assert "pip install 'treadle[" not in source, f"{path}: there may be no package of this name"
        for called in re.findall(r"\bpip_install\((.*?)\)", source):
            named = re.findall(r"""(?:^|, )["'](\w+)["']""", called)
            calls += len(named)
            assert set(named) <= set(extras), path
    assert calls > 10


def _has_signature(each: Callable[..., Any]) -> bool:
    try:
        inspect.signature(each)
    except (TypeError, ValueError):
        return False
    return True


def _takes_any(taker: Any) -> bool:
    return any(getattr(p, "kind", None) is inspect.Parameter.VAR_KEYWORD for p in taker.values())


# -- followed to the letter ------------------------------------------------------------------------------------


# The exporter of PyTorch copies a graph, which constructs a class that PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_a_model_of_no_family_comes_in_by_the_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    with pytest.raises(CheckpointError, match="which no family of the zoo reads") as refused:
        family_of({"model_type": "mamba"})
    assert (refused.value.hint or "").endswith(OTHER_WAYS)
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "treadle": treadle, "module": torch.nn.Linear(4, 2).eval(), "example": (torch.ones(1, 4),)}
    x = np.float32([[1, 2, 3, 4]])
    expected = names["module"](torch.from_numpy(x)).detach().numpy()
    compiles = re.findall(r"treadle\.compile\((?:[^()]|\([^()]*\))*\)", OTHER_WAYS)
    eval(re.findall(r"torch\.onnx\.export\(.*?\)", OTHER_WAYS)[0], names)
    assert len(compiles) == 2
    for text in compiles:
        exe = eval(text, names)
        (value,) = exe(**{exe.inputs[0].name: x}).values()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert "`treadle compile model.onnx`" in OTHER_WAYS


def test_a_parameter_that_cannot_be_drawn_names_what_draws_it() -> None:
    from tests.backend_checks import graph_of
    from treadle.ir.errors import UsageError
    from treadle.program.weights import initial_weights

    graph = graph_of(lambda b: b.input("x", "bf16[3]") * b.parameter("w", "bf16[3]"))
    with pytest.raises(UsageError, match="cannot be drawn") as refused:
        initial_weights(graph)
    assert 'widen="bf16"' in (refused.value.hint or "")
    assert treadle.compile(graph, widen="bf16").seed == 0


def test_a_program_for_another_machine_is_read_or_compiled_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    from treadle.backends.tvm.kernels.host.platforms import this_platform

    other = "arm64" if this_platform().machine == "x86_64" else "x86-64"
    run = commands_in(tmp_path, capsys, monkeypatch)
    line = ["run", "model.py:scale", "--input", "x=1,2,3", "--backend", "tvm"]
    said = run(*line, "--target", other)
    refused(said, f"kernels for {other} do not run on this machine")
    hint = said.err.partition("  try       ")[2].strip()
    assert hint.startswith("--target cpu; or `treadle inspect MODEL --source --target ")
    assert run(*line, *hint.partition(";")[0].split()).code == 0
    (shown,) = re.findall("`treadle (.*)`", hint)
    printed = run(*shown.replace("MODEL", "model.py:scale").split(), "--backend", "tvm")
    assert printed.code == 0 and f"for the tvm backend on {other}" in printed.out


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_a_step_with_too_many_tokens_names_the_flag(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    run = commands_in(tmp_path, capsys, monkeypatch)
    small = "roofline gpt2 --set layers=1 --set dim=32 --set heads=2 --set vocab=60 --set context=20 --rounds 1"
    line = [*(small if target == "cpu" else small.removesuffix(" --rounds 1")).split(), "--entry", "step"]
    said = run(*line, "--target", target, "--past", "20")
    refused(said, "the model takes 20 positions", "try       --past 19 or less")
    assert run(*line, "--target", target, "--past", "19").code == 0


def test_an_axis_after_set_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commands_in(tmp_path, capsys, monkeypatch)
    for line in (["compile", "model.py:scale"], ["explain", "model.py:scale", "fusion"]):
        said = run(*line, "--set", "B=3")
        refused(said, "model scale has no option B", "try       leave it out: B is an axis of the inputs")
        assert run(*line).code == 0
    ((command, sizes),) = re.findall(r"`treadle (\w+)` takes (--sizes \w+=3)", said.err)
    assert "at B=3" in run(command, "model.py:scale", *sizes.split()).out


MODULES = """\
import torch

class Net(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, query, key, scale=1.0):
        return self.layer(query + key)

layer = torch.nn.Linear(4, 2)
"""


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", ["Net", "layer"])
def test_a_module_in_place_of_a_declaration_is_imported_in_python(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    run = commands_in(tmp_path, capsys, monkeypatch)
    (tmp_path / "modules.py").write_text(MODULES, encoding="utf-8")
    said = run("inspect", f"modules.py:{name}")
    refused(said, f"modules.py declares no model '{name}'")
    names: dict[str, Any] = dict.fromkeys(("query", "key", "input"), torch.ones(1, 4)) | {"treadle": treadle}
    exec(MODULES, names)
    (called,) = re.findall(r"in Python: (treadle\.compile\(.*\)), with tensors", said.err)
    exe = eval(called, names)
    assert exe(**dict.fromkeys((port.name for port in exe.inputs), np.ones((1, 4), np.float32))).output.shape == (1, 2)


def test_several_numbers_that_determine_a_shape_are_set_as_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    run = commands_in(tmp_path, capsys, monkeypatch)
    body = "agraph (float[6] x, int64[2] wanted) => (float[N, M] y) { y = Reshape(x, wanted) }"
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    onnx.save(onnx.parser.parse_model(header + body), "model.onnx")
    refused(run("inspect", "model.onnx"), "try       --set wanted=VALUE")
    said = run("inspect", "model.onnx", "--set", "wanted=2,3")
    refused(said, "try       --set wanted=[NUMBER,...], a value of INT64[2]")
    assert "f32[2, 3]" in run("inspect", "model.onnx", "--set", "wanted=[2,3]").out
