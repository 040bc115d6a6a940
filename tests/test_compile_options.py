"""Options of compilation: flags, signatures and refusals follow from the declarations in `program.option_table`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import treadle as t
from tests.error_texts import raises_freely
from tests.golden import FOLDER, Golden
from treadle.benching.workload import Workload
from treadle.cli import COMMANDS, app
from treadle.compiling import compile_program
from treadle.continuation import TextWriter
from treadle.explaining.device import explain_device
from treadle.explaining.fusion import explain_fusion
from treadle.explaining.layouts import explain_layouts
from treadle.explaining.memory import explain_memory
from treadle.explaining.quantization import explain_quantization
from treadle.explaining.sharding import explain_sharding
from treadle.explaining.step import explain_step
from treadle.explaining.storage import explain_storage
from treadle.ir.errors import FrontendError, UsageError
from treadle.ir.target import Target
from treadle.program.option_declarations import Option
from treadle.program.option_table import EXPLAINED, declared_options, taken_by
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.sentence_embedding import SentenceEmbedder
from treadle.sharding import shard_model
from treadle.stepped import open_stepped, stepped_program
from treadle.verifying import verify_model

ROOT = Path(__file__).parents[1]
GROUP: Any = typer.main.get_command(app)

TASKS = ["classify", "answer", "tag", "fill", "label", "match", "translate", "summarize", "transcribe", "perplexity"]
ENTRIES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("inspect", "compile", "verify", "shard", "export", "bench", "train", "embed")},
    **dict.fromkeys(("run", "roofline", "report"), ("compile",)),
    "diff": ("inspect",),
    **dict.fromkeys(("generate", "serve", "chat", "describe"), ("generate",)),
    **dict.fromkeys(TASKS, ("task",)),
    "explain": tuple(f"explain {subject}" for subject in EXPLAINED),
}
"""The entry functions whose options a command has."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {"target": None},
    **{name: {"target": None} for name in ("explain", "export", "generate", "serve", "chat", "describe")},
    "roofline": {"backend": "tvm"},
}
OWN = {("verify", "backend"), ("verify", "sizes"), ("roofline", "sizes"), ("report", "sizes")}
"""Options with another meaning in a command."""

ARGUMENTS = {
    **dict.fromkeys(ENTRIES, "gpt2"),
    "shard": "gpt2 --mesh tp=2 --recipe megatron",
    "export": "gpt2 -o a.json --to json",
    "explain": "gpt2 fusion",
    **dict.fromkeys(("embed", "generate", "train", "describe", *TASKS), "gpt2 text"),
    "answer": "gpt2 question text",
    "match": "gpt2 a.png --text a",
}

SAMPLES: dict[str, tuple[str, Any]] = {
    "inputs": ("lengths, token_types", ("lengths", "token_types")),
    "outputs": ("pooled,hidden[:, 0]", ("pooled", "hidden[:, 0]")),
    "widen": ("bf16,f16", ("bf16", "f16")),
    "limits": ("tensors=7", {"tensors": 7}),
    "tokenizer": ("gpt2", "gpt2"),
    "mmproj": ("none", "none"),
    "weights": ("trained", "trained"),
    "new_weights": ("logits.*", ("logits.*",)),
    "seed": ("7", 7),
    "certify": ("", True),
    "passes": ("fuse-gelu, fuse-linear", "fuse-gelu, fuse-linear"),
    "without": ("fuse-gelu", ("fuse-gelu",)),
    "dtype": ("f32", "f32"),
    "quantize": ("int8-weights", "int8-weights"),
    "backend": ("torch", "torch"),
    "target": ("cuda", "cuda"),
    "memory": ("300MB", "300MB"),
    "sizes": ("B=2,S=3", {"B": 2, "S": 3}),
    "donate": ("tokens", ("tokens",)),
    "cache": ("f16", "f16"),
    "torch_compile": ("", True),
}
"""A text and a value of each option that has a flag."""

VALUES = {name: value for name, (_, value) in SAMPLES.items()} | {"device_sampling": "greedy"}


def flagged(*entries: str) -> list[Option]:
    """Return the options of these entry functions that have a flag."""
    return [each for each in taken_by(*entries) if each.flag is not None]


def own_parameters(command: str) -> set[str]:
    """Return the parameters that a command declares itself."""
    return {*inspect.signature(inspect.unwrap(GROUP.commands[command].callback)).parameters}


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_another_type_is_refused_with_the_option(name: str) -> None:
    entry = sorted(declared_options()[name].takers)[0]
    CompileOptions.of(entry, {name: VALUES[name]})
    with pytest.raises(UsageError, match=f"^{name}= must be ") as caught:
        CompileOptions.of(entry, {name: 1.5})
    assert caught.value.received == "1.5"
    option, equals, example = (caught.value.hint or "").partition("=")
    if equals and option == name:
        CompileOptions.of(entry, {name: eval(example)})
    else:
        assert declared_options()[name].about.startswith(str(caught.value.hint))


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ({"sizes": "B=1,S=2"}, "sizes={'B': 1, 'S': 2}"),
        ({"seed": "7"}, "seed=7"),
        ({"limits": "tensors=7"}, "limits={'tensors': 7}"),
        ({"seed": "a"}, "an integer, 0 or more"),
        ({"seed": True}, "an integer, 0 or more"),
        ({"certify": "yes"}, "test every rewrite on random values before it is accepted"),
        ({"config": 3}, 'config={"layers": 2}'),
    ],
)
def test_a_text_that_the_flag_would_read_is_shown_as_python_writes_it(options: dict[str, Any], tried: str) -> None:
    with pytest.raises(UsageError, match=r"^\w+= must be ") as caught:
        t.compile("gpt2", **options)
    assert (caught.value.hint or "").startswith(tried)
    name, _, code = tried.partition("=")
    if name in VALUES:
        CompileOptions.of("compile", {name: eval(code)})


def test_numbers_of_numpy_are_integers() -> None:
    assert CompileOptions.of("compile", {"seed": np.int64(7)}).seed == 7


@pytest.mark.parametrize("name", ["threads", "num_threads"])
def test_threads_belong_to_the_target(name: str) -> None:
    with pytest.raises(FrontendError, match=f"no option {name}") as caught:
        t.compile("gpt2", **{name: 2})
    hint = caught.value.hint
    assert (str(hint), getattr(hint, "command", None)) == ('target=t.Target("cpu", threads=2)', "--threads 2")
    assert CompileOptions.of("compile", {"target": eval(str(hint).partition("=")[2])}).where.threads == 2


@pytest.mark.parametrize("name", [3, None, t.f32])
def test_the_name_of_a_target_is_text(name: Any) -> None:
    with pytest.raises(UsageError, match="the name of a target is text") as caught:
        Target(name)
    for code in re.findall(r"t\.Target\([^)]*\)", caught.value.hint or ""):
        assert isinstance(eval(code), Target)


def test_every_command_and_every_option_is_in_these_tests() -> None:
    assert set(COMMANDS) - set(ENTRIES) == {"launch", "models", "fetch", "doctor", "targets"}
    assert set(SAMPLES) == {each.name for each in declared_options().values() if each.flag is not None}
    assert set(VALUES) == set(declared_options())
    for name, each in declared_options().items():
        assert each.about and each.takers and each.is_set(VALUES[name]) and not each.is_set(each.default), name
        assert each.flag is None or each.help[0].isupper() or each.help.startswith(("auto", "cpu")), name


# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ENTRIES)
def test_a_command_has_the_flags_of_its_options(command: str) -> None:
    own = own_parameters(command)
    wanted = {each.name: each for each in flagged(*ENTRIES[command]) if each.name not in own}
    assert {(command, each.name) for each in flagged(*ENTRIES[command]) if each.name in own} <= OWN
    found = {p.name: p for p in GROUP.commands[command].params if p.name in declared_options() and p.name not in own}
    settings = {
        name for name in found if found[name].help != declared_options()[name].help
    }  # of a run, such as a drawing's seed
    assert settings <= {"seed"}
    assert [name for name in found if name not in settings] == list(wanted)
    for name, option in wanted.items():
        shown, flag = found[name], option.flag
        assert flag is not None
        assert (shown.opts, shown.help, shown.multiple) == ([f"--{flag.name}"], option.help, flag.many)
        assert (shown.is_flag, shown.metavar or "") == (not flag.metavar, flag.metavar)
        plain = option.default if isinstance(option.default, int | str) else None
        assert (shown.default or None) == (DEFAULTS.get(command, {}).get(name, plain) or None)
        assert (shown.min, shown.max) == (flag.least, flag.most)
    params = {p.name: p for p in GROUP.commands[command].params}
    assert ("threads" in params) == ("target" in wanted or command == "bench")
    assert params["config"].opts == ["--set"]


class Reached(BaseException):
    """The options with which a command began to read its model."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[CompileOptions]]:
    """Run a command up to where its model is read, and return the options of all entry functions that it called."""
    found: list[CompileOptions] = []
    of = CompileOptions.of.__func__  # type: ignore[attr-defined]

    def recorded(cls: type, entry: str, given: Mapping[str, Any], **defaults: Any) -> CompileOptions:
        found.append(of(cls, entry, given, **defaults))
        return found[-1]

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    def run(words: str) -> list[CompileOptions]:
        found.clear()
        try:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 2, (words, done.output, done.exception)
        except Reached:
            pass
        return found

    monkeypatch.setattr(CompileOptions, "of", classmethod(recorded))
    monkeypatch.setattr(CompileOptions, "resolve", reached)
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("a text")
    return run


@pytest.mark.parametrize("command", ENTRIES)
def test_a_flag_reaches_the_entry_function(command: str, made: Callable[[str], list[CompileOptions]]) -> None:
    own = own_parameters(command)
    for option in flagged(*ENTRIES[command]):
        if option.name in own:
            continue
        assert option.flag is not None
        text, value = SAMPLES[option.name]
        words = f"{command} {ARGUMENTS[command]} --{option.flag.name} " + (f"'{text}'" if option.flag.metavar else "")
        if command == "explain":
            subject = min(option.takers & {*ENTRIES[command]})
            words = words.replace(" fusion", subject.removeprefix("explain"))
            words += " --mesh tp=2 --recipe megatron" * (subject == "explain sharding")
        found = [each for each in made(words) if each.entry in option.takers]
        assert found, words
        for each in found:
            assert getattr(each, option.name) == value, (words, each.entry)


@pytest.mark.parametrize("command", [name for name in ENTRIES if "target" in {o.name for o in flagged(*ENTRIES[name])}])
def test_threads_are_part_of_the_target(command: str, made: Callable[[str], list[CompileOptions]]) -> None:
    subject = ARGUMENTS[command].replace("fusion", "layouts")
    for each in made(f"{command} {subject} --threads 3"):
        assert each.where == Target("cpu", 3)


def test_the_budget_of_a_roofline_is_for_its_sizes(made: Callable[[str], list[CompileOptions]]) -> None:
    (found,) = made("roofline gpt2 --memory 300MB --sizes B=2,S=9")
    assert (found.memory, found.sizes) == ("300MB", {"B": 2, "S": 9})
    (found,) = made("roofline gpt2 --sizes B=2,S=9")
    assert (found.memory, found.sizes) == (None, None)


def test_configuration_reaches_the_declaration(made: Callable[[str], list[CompileOptions]]) -> None:
    for command, words in ARGUMENTS.items():
        found = made(f"{command} {words} --set layers=2 --set act=t.relu --set name=a=b")
        wanted = {"layers": 2, "act": t.relu, "name": "a=b"}
        assert found and all(each.config == wanted for each in found), command


@pytest.mark.parametrize("entry", ["task", "generate"])
def test_a_task_passes_its_options_on(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[CompileOptions] = []

    def reached(self: CompileOptions, *_: Any, **__: Any) -> Any:
        found.append(self)
        raise Reached

    monkeypatch.setattr(CompileOptions, "resolve", reached)
    monkeypatch.setattr(CompileOptions, "open", lambda self, model: ModelSource.open(model))
    for option in flagged(entry):
        asked = Program.of("gpt2", entry, **{option.name: VALUES[option.name], "config": {"layers": 2}})
        for start in (stepped_program,) if option.name == "cache" else (compile_program, stepped_program):
            with pytest.raises(Reached):
                start(asked)
            assert (getattr(found[-1], option.name), found[-1].config) == (VALUES[option.name], {"layers": 2})


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ENTRIES)
def test_an_option_is_no_configuration(command: str) -> None:
    """`--set` with an option's name is refused with the same words by all commands, which then name the flag."""
    flags = {flag for param in GROUP.commands[command].params for flag in param.opts}
    for name, option in declared_options().items():
        done = CliRunner().invoke(app, f"{command} {ARGUMENTS[command]} --set {name}=int4")
        assert done.exit_code == 2, (name, done.output)
        first, hint = done.stderr.splitlines()
        assert first == f"--set {name}= is not part of a model's configuration"
        flag = option.flag and f"--{option.flag.name}"
        if flag in flags:
            assert hint == f"  try       {flag}, an option of treadle {command}"


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "compile": lambda **given: t.compile("gpt2", **given),
    "train": lambda **given: t.Trainer("gpt2", **given),
    "session": lambda **given: open_stepped("gpt2", **given),
    "generate": lambda **given: TextWriter.open("gpt2", **given),
    "embed": lambda **given: SentenceEmbedder.open("gpt2", **given),
    "verify": lambda **given: verify_model("gpt2", **given),
    "bench": lambda **given: Workload("gpt2", 1, given).options,
    "shard": lambda **given: shard_model("gpt2", "tp=2", **given),
    "explain fusion": lambda **given: explain_fusion("gpt2", **given),
    "explain layouts": lambda **given: explain_layouts("gpt2", **given),
    "explain storage": lambda **given: explain_storage("gpt2", **given),
    "explain memory": lambda **given: explain_memory("gpt2", **given),
    "explain quantization": lambda **given: explain_quantization("gpt2", **given),
    "explain sharding": lambda **given: explain_sharding("gpt2", mesh="tp=2", **given),
    "explain step": lambda **given: explain_step("gpt2", **given),
    "explain device": lambda **given: explain_device("gpt2", **given),
}


@pytest.mark.parametrize("entry", FUNCTIONS)
def test_an_option_that_is_not_taken_is_refused(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileOptions, "resolve", None)  # nothing is read before
    for name, option in declared_options().items():
        if entry not in option.takers and (entry, name) not in OWN:
            shown = "generation" if entry == "session" else entry
            with raises_freely(UsageError, match=f"^{shown} does not take {name}\n"):
                FUNCTIONS[entry](**{name: VALUES[name]})
            assert CompileOptions.of(entry, {name: option.default, "layers": 2}).config == {"layers": 2}


def test_a_command_names_the_option_that_its_subject_does_not_take() -> None:
    for subject in EXPLAINED:
        for option in flagged(*ENTRIES["explain"]):
            if f"explain {subject}" not in option.takers:
                assert option.flag is not None
                words = ["explain", "gpt2", subject, f"--{option.flag.name}", SAMPLES[option.name][0]]
                done = CliRunner().invoke(app, words if option.flag.metavar else words[:-1])
                assert done.exit_code == 2
                assert done.stderr.startswith(f"explain {subject} does not take {option.name}\n")


# -- values ----------------------------------------------------------------------------------------------------------


@t.model
def named_alike(x: t.f32["B 4"], *, seed=2, deferred=3, widen=4):  # type: ignore[no-untyped-def]
    """A model whose options have the names of arguments."""
    return x * (seed + 10 * deferred + 100 * widen)


def test_configuration_may_have_the_name_of_an_option() -> None:
    made = t.compile(named_alike, seed=5, config={"seed": 7, "widen": 6})
    ones = np.ones((1, 4), np.float32)
    (found,) = made(x=ones).values()
    assert found.tolist() == [[7 + 30 + 600] * 4]
    (found,) = t.compile(named_alike, deferred=1)(x=ones).values()
    assert found[0, 0] == 412
    for name in ("model", "config", "self"):
        with raises_freely(t.FrontendError, match=f"model named_alike has no option {name}"):
            t.compile(named_alike, config={name: 1})


def test_a_misspelled_option_of_load_is_reported_before_a_task_runs() -> None:
    with raises_freely(t.FrontendError, match="model named_alike has no option weihgts") as refused:
        t.load(named_alike, weihgts="folder")
    assert "did you mean weights=, an option of load?" in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "name", "option"),
    [
        ("Trainer", "lr", "learning_rate"),
        ("Trainer", "learningrate", "learning_rate"),
        ("Trainer", "optimiser", "optimizer"),
        ("Trainer", "criterion", "loss"),
        ("Trainer", "device", "target"),
        ("compile", "device", "target"),
        ("compile", "state_dict", "weights"),
        ("load", "torch_dtype", "dtype"),
    ],
)
def test_an_option_of_another_library_names_ours(entry: str, name: str, option: str) -> None:
    with raises_freely(t.FrontendError, match=f"model named_alike has no option {name}") as refused:
        getattr(t, entry)(named_alike, **{name: 1})
    assert f"did you mean {option}=, an option of" in str(refused.value.hint)
    with raises_freely(t.FrontendError, match="model named_alike has no option lr") as refused:
        t.compile(named_alike, lr=0.1)
    assert "did you mean" not in str(refused.value.hint)


def test_a_mapping_counts_over_keywords() -> None:
    chosen = CompileOptions.of("compile", {"layers": 2, "dim": 8, "config": {"layers": 3}})
    assert chosen.config == {"layers": 3, "dim": 8}


def test_keywords_give_the_same_options() -> None:
    for entry in sorted({taker for each in declared_options().values() for taker in each.takers}):
        given = {each.name: VALUES[each.name] for each in taken_by(entry)}
        for part in ({}, given, *({name: value} for name, value in given.items())):
            chosen = CompileOptions.of(entry, {**part, "layers": 2})
            assert chosen.keywords() == {**part, "config": {"layers": 2}}
            again = CompileOptions.of(entry, chosen.keywords())
            assert all(getattr(again, name) is getattr(chosen, name) for name in declared_options())
            assert (again.entry, again.config) == (entry, {"layers": 2})


def test_none_is_every_default() -> None:
    chosen = CompileOptions.of("bench", dict.fromkeys(declared_options()), backend="tvm")
    assert chosen.backend == "tvm"
    assert chosen.but(backend="auto").keywords() == {}


# -- derived texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "entry"), [(t.compile, "compile"), (t.Trainer, "train")])
def test_a_signature_has_the_options(function: Any, entry: str) -> None:
    found = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    taken = {each.name: each for each in taken_by(entry)}
    assert {name for name in found if name in declared_options()} == set(taken)
    for name, each in taken.items():
        assert (found[name].default, found[name].annotation) == (each.default, each.type)
        assert found[name].kind is inspect.Parameter.KEYWORD_ONLY
    last = [*found.values()][-1]
    assert (last.name, last.kind) == ("config", inspect.Parameter.VAR_KEYWORD)


def test_an_option_is_declared_once() -> None:
    """Apart from the stubs, which are generated."""
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "treadle").rglob("*.py*")
        if path.suffix in (".py", ".pyi")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bquantize: ", line)
    ]
    assert len(lines) <= 3, "\n".join(lines)


START, END = "<!-- options of compilation: written by `make golden` -->\n", "<!-- end of the options -->\n"


def test_the_page_of_commands_has_the_options(golden: Golden) -> None:
    path = FOLDER / "../../docs/cli.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    assert end, "docs/cli.md has the two comments around the table"
    golden("../../docs/cli.md", f"{before}{START}{option_table()}{END}{after}")


def option_table() -> str:
    """Return the table of options, with the commands that have each."""
    lines = ["", "| option | effect | commands |", "|---|---|---|"]
    for option in declared_options().values():
        if option.flag is None:
            continue
        names = [name for name in COMMANDS if name in ENTRIES and option in flagged(*ENTRIES[name])]
        names = [name for name in names if (name, option.name) not in OWN]
        few = [name for name in COMMANDS if name in ENTRIES and name not in names]
        shown = "all" if not few else f"all but {', '.join(few)}" if len(few) < len(names) else ", ".join(names)
        python = "" if option.name == option.flag.name else f", in Python `{option.name}=`"
        flag = f"--{option.flag.name} {option.flag.metavar}".strip()
        lines.append(f"| `{flag}`{python} | {option.help} | {shown} |")
    return "\n".join([*lines, ""]) + "\n"
