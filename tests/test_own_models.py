"""A model of one's own: the commands of docs/own-models.md, the folder that training writes, and bad input."""

from __future__ import annotations

import io
import json
import os
import py_compile
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import treadle as t
from tests import first_hour
from tests.command_line import Result, Treadle, commands_in, refused
from tests.task_models import save, without_specials
from tests.test_part_loading import CONFIG, shapes
from treadle.frontends.model_folder import MemoryFolder
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.trained_vocabularies import END, train_tokenizer
from treadle.ir.errors import CheckpointError, TreadleError, UsageError
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.serving.models import Opening, ServedWriter
from treadle.training.saving import saver_for
from treadle.training.text_data import TextData, TextFiles

pytestmark = pytest.mark.usefixtures("quickly_planned")

DECLARATION = dict(first_hour.steps())["models.py"]
TRAIN = "--vocab 300 --steps 2 --length 16 --batch 2 --learning-rate 0.01 --backend numpy"
OWN = "models.py:my_gpt"


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training writes it, with weights that were drawn."""
    place = tmp_path_factory.mktemp("own")
    (place / "models.py").write_text(DECLARATION, encoding="utf-8")
    (place / "corpus.txt").write_text(first_hour.CORPUS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        resolved = resolve(OWN)
        data = TextData.open(["corpus.txt"], resolved, vocab=300, length=16, batch=2)
        assert data.texts is not None
        saver_for(resolved, "out").with_texts(data.texts).save(t.compile(OWN, seed=5).weights)
    return place / "out"


@pytest.fixture
def treadle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    """Run a command line in a folder with the page's models.py and corpus.txt."""
    (tmp_path / "models.py").write_text(DECLARATION, encoding="utf-8")
    (tmp_path / "corpus.txt").write_text(first_hour.CORPUS, encoding="utf-8")
    run = commands_in(tmp_path, capsys, monkeypatch)
    return lambda *lines: run(*shlex.split(" ".join(lines)))


@pytest.fixture
def trained(treadle_command: Treadle, own_folder: Path) -> Treadle:
    """The same, with the folder `out` of a model."""
    shutil.copytree(own_folder, "out")
    return treadle_command


def hint_of(said: Result) -> str:
    """Return the suggestion of an error."""
    return said.err.partition("  try       ")[2].strip()


# -- the page ------------------------------------------------------------------------------------------------------


def served(words: list[str]) -> None:
    """Start a server on a free port, request a completion, and interrupt the server."""
    pytest.importorskip("uvicorn")
    words[words.index("--port") + 1] = "0"
    command = [sys.executable, "-m", "treadle", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        try:
            said = "".join(iter(server.stdout.readline, "}\n"))
            assert said, server.stderr.read()
            ready = json.loads(said + "}")
            asked = {"model": ready["models"][0]["name"], "prompt": "the cat", "max_tokens": 3, "temperature": 0}
            request = urllib.request.Request(
                f"{ready['address']}/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] >= 1
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)


def test_every_command_of_the_page_runs(
    treadle_command: Treadle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("jinja2", "onnx", "torch", "tvm"):
        pytest.importorskip(name)
    count = 0
    for kind, text in first_hour.steps():
        if kind != "sh":
            Path(kind).write_text(text, encoding="utf-8")
            continue
        count += 1
        program, *words = shlex.split(text)
        if program == "python":
            runpy.run_path(words[0])
            printed = capsys.readouterr().out.splitlines()
            assert text != "python use.py" or {"(32,)", "(1, 3, 300)"} <= set(printed)
        elif program != "treadle":
            assert program in {"git", "python3", ".", "pip", "curl"}, text  # run by tests/first_hour.py
        elif words[0] == "serve":
            served(words)
        elif words[0] not in ("bench", "launch"):  # these take seconds; tests/first_hour.py runs them
            if words[0] == "chat":
                monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
            said = treadle_command(shlex.join(words))
            assert said.code == 0, f"{text}\n{said.out}{said.err}"
    assert count >= 40


def test_the_page_is_a_shell_script() -> None:
    """Its syntax is checked here; `make first-hour` runs it."""
    text = first_hour.script(8123)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert text.count("\n$ ") == 0
    assert "127.0.0.1:8123/" in text
    assert "--port 8123" in text


# -- the folder ----------------------------------------------------------------------------------------------------


def test_a_trained_folder_has_all_that_a_command_reads(treadle_command: Treadle) -> None:
    assert treadle_command(f"train {OWN} corpus.txt -o out {TRAIN}").code == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "weights.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads(Path("out", "config.json").read_text())
    said = config["declaration"]
    assert (said["file"], said["function"], config["model_type"]) == ("models.py", "my_gpt", "treadle")
    tokenizer = TextTokenizer.open("out")
    assert config["eos_token_id"] == [tokenizer.id_of(END)]
    assert tokenizer.text(tokenizer.ids(["the cat, Œuvre"])[0]) == "the cat, Œuvre"


def test_the_configuration_of_training_applies(treadle_command: Treadle) -> None:
    assert treadle_command(f"train {OWN} corpus.txt -o out {TRAIN} --set layers=1 --set dim=16").code == 0
    source = ModelSource.open(OWN, weights="out")
    made = source.resolve().model
    assert made is not None and (made.config["layers"], made.config["dim"]) == (1, 16)
    assert treadle_command(f"generate {OWN} the --weights out --tokens 2").code == 0
    refused(treadle_command(f"generate {OWN} the --weights out --set dim=32"), "wpe.weight")
    text = Path("models.py").read_text()
    Path("models.py").write_text(text.replace("layers=2", "depth=2").replace("layers)", "depth)"))
    said = treadle_command(f"generate {OWN} the --weights out")
    refused(said, "is not the declaration with which these weights were trained", "has no option layers")


def test_the_tokenizer_of_another_model_is_saved_with_its_template(treadle_command: Treadle, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save(tmp_path / "gpt2", "GPT2LMHeadModel", without_specials(), scale=1.0)
    (tmp_path / "gpt2" / "chat_template.jinja").write_text("{{ messages }}")
    how = TRAIN.replace("--vocab 300", "--tokenizer gpt2")
    how += " " + hint_of(treadle_command(f"train {OWN} corpus.txt {how}"))
    assert how.endswith("--set vocab=401")
    assert treadle_command(f"train {OWN} corpus.txt -o out {how}").code == 0
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert Path("out", name).read_bytes() == Path("gpt2", name).read_bytes()
    assert ModelSource.open(OWN, weights="out").chat_template == "{{ messages }}"


def test_a_checkpoint_that_is_trained_with_another_tokenizer_gets_that_one(trained: Treadle, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save(tmp_path / "gpt2", "GPT2LMHeadModel", without_specials(), scale=1.0)
    how = TRAIN.replace("--vocab 300", "--tokenizer out")
    assert trained(f"train gpt2 corpus.txt -o tuned {how}").code == 0
    assert Path("tuned", "tokenizer.json").read_bytes() == Path("out", "tokenizer.json").read_bytes()
    assert json.loads(Path("tuned", "generation_config.json").read_text()) == {"eos_token_id": [0]}
    assert not {"vocab.json", "merges.txt"} & {path.name for path in Path("tuned").iterdir()}
    assert trained("generate tuned the --tokens 2").code == 0


def test_weights_of_the_zoo_need_no_file(treadle_command: Treadle) -> None:
    sizes = "--set vocab=300 --set context=32 --set dim=16 --set heads=2 --set layers=1"
    assert treadle_command(f"train gpt2 corpus.txt -o out {TRAIN} {sizes}").code == 0
    said = treadle_command("generate out the --tokens 2 --json")
    assert said.code == 0 and said.json["model"] == "gpt2"
    again = treadle_command("generate gpt2 the --weights out --tokens 2 --json")
    assert again.json["texts"] == said.json["texts"]
    refused(treadle_command(f"generate {OWN} the --weights out"), f"{OWN} is not the declaration", "recorded gpt2")
    assert treadle_command(f"train out corpus.txt -o more {TRAIN.replace('--vocab 300', '')}").code == 0


def test_a_vocabulary_is_the_same_for_the_same_texts() -> None:
    one, two = (train_tokenizer([first_hour.CORPUS, "Œuvre"], 290) for _ in range(2))
    assert one.serialized() == two.serialized()
    assert len(one.vocabulary()) == 290
    assert train_tokenizer([first_hour.CORPUS], 290, mask=True).mask == "<mask>"
    again = TextTokenizer.open(MemoryFolder.of(one.text_files("{{ messages }}"), "memory"))
    assert again.ids(["the cat"]) == one.ids(["the cat"])
    with pytest.raises(UsageError, match="257 tokens or more"):
        train_tokenizer([first_hour.CORPUS], 256)


# -- Python code runs only if its file is named --------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "generate out the --tokens 2",
        "embed out the",
        "verify out --backend numpy",
        "run out --input tokens=1,2",
        "inspect out",
        "compile out",
        "explain out fusion",
        "explain out step",
        "perplexity out corpus.txt",
        "export out -o a.onnx",
        "diff out out",
        "report out -o a.html",
        f"train out corpus.txt -o more {TRAIN.replace('--vocab 300', '')}",
    ],
)
def test_a_folder_alone_says_which_command_works(command: str, trained: Treadle) -> None:
    text = Path("models.py").read_text()
    Path("models.py").write_text("raise SystemExit('the file was run')")
    said = trained(command)
    refused(said, f"out has the weights of {OWN}", "never runs code")
    Path("models.py").write_text(text)
    words = shlex.split(hint_of(said))
    assert words[:2] == ["treadle", command.split()[0]] and "--weights" in words
    again = trained(shlex.join(words[1:]))
    assert again.code == 0, again.err


def test_hints_for_two_folders_lead_to_their_comparison(trained: Treadle) -> None:
    """Each folder's weights belong to its own side."""
    shutil.copytree("out", "other")
    command = "diff out other"
    for folder in ("out", "other"):
        said = trained(command)
        refused(said, f"{folder} has the weights of {OWN}")
        command = hint_of(said).removeprefix("treadle ")
    assert trained(command).code == 0


def test_a_folder_alone_is_refused_in_python(trained: Treadle) -> None:
    model = t.load("out")
    with pytest.raises(UsageError, match="a declaration in Python") as caught:
        model.generate("the")
    arguments, _, instead = str(caught.value.hint).partition(" in place of ")
    assert instead == "'out'"
    assert eval(f"t.load({arguments})", {"t": t}).generate("the", most=2) is not None


def test_a_declaration_without_a_file(trained: Treadle, tmp_path: Path) -> None:
    """A declaration of a notebook has no file: the folder names the function alone."""
    namespace: dict[str, Any] = {}
    exec(DECLARATION, namespace)
    model = namespace["my_gpt"]
    saver_for(resolve(model), tmp_path / "to").save(t.compile(model).weights)
    with pytest.raises(UsageError, match="has the weights of my_gpt") as caught:
        t.compile(tmp_path / "to")
    arguments = str(caught.value.hint).partition(" in place of ")[0]
    assert eval(f"t.compile({arguments})", {"t": t, "my_gpt": model}).seed is None


def test_a_changed_declaration_is_refused(trained: Treadle) -> None:
    text = Path("models.py").read_text()
    Path("models.py").write_text("# a comment\n" + text)
    assert trained(f"generate {OWN} the --weights out --tokens 2").code == 0, "the graph is the same"
    Path("other.py").write_text(text.replace("my_gpt", "renamed"))
    assert trained("generate other.py:renamed the --weights out --tokens 2").code == 0, "the graph is the same"
    Path("other.py").write_text(text.replace("my_gpt", "renamed").replace("4 * dim", "2 * dim"))
    said = trained("generate other.py:renamed the --weights out --tokens 2")
    refused(said, "other.py:renamed is not the declaration", f"recorded {OWN}: graph ")
    assert hint_of(said).startswith(f"{OWN}, or --weights out/weights.safetensors")
    for old, new in (("4 * dim", "4 * dim, act=t.relu"), ("layers=2", "layers=3"), ("context=64", "context=32")):
        Path("models.py").write_text(text.replace(old, new))  # some of the same size, within a second
        said = trained(f"generate {OWN} the --weights out --tokens 2")
        refused(said, "is not the declaration with which these weights were trained", "out/config.json")
        assert "--weights out/weights.safetensors" in hint_of(said)
    Path("models.py").write_text(text.replace("4 * dim", "4 * dim, act=t.relu"))
    assert trained(f"generate {OWN} the --weights out/weights.safetensors --tokens 2").code == 0


def test_no_bytecode_runs_in_place_of_the_file(trained: Treadle) -> None:
    """A __pycache__ next to the file may come from someone else, like the file's time."""
    source, text = Path("models.py"), Path("models.py").read_text()
    other = "raise SystemExit('the bytecode was run')"
    source.write_text(other + " " * (len(text.encode()) - len(other)))
    cached = py_compile.compile("models.py", doraise=True)
    assert cached is not None and Path(cached).exists()
    stamp = source.stat()
    source.write_text(text)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert trained(f"generate {OWN} the --weights out --tokens 2").code == 0
    shutil.rmtree("__pycache__")
    assert trained(f"generate {OWN} the --weights out --tokens 2").code == 0
    assert not Path("__pycache__").exists(), "nothing is written next to the user's file"


DAMAGED: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "no function": {"file": "models.py", "graph_sha256": "0" * 64},
    "no hash": {"file": "models.py", "function": "my_gpt"},
    "a hash of another form": {"file": "models.py", "function": "my_gpt", "graph_sha256": "0"},
    "a flag as a file": {"file": "--help.py", "function": "my_gpt", "graph_sha256": "0" * 64},
    "no file of Python": {"file": "models.sh", "function": "my_gpt", "graph_sha256": "0" * 64},
    "control characters": {"file": "\x1b[2Jmodels.py", "function": "my_gpt", "graph_sha256": "0" * 64},
    "a command as a function": {"file": "models.py", "function": "f; rm -rf x", "graph_sha256": "0" * 64},
    "an unknown family": {"family": "os"},
    "a configuration that is a list": {"family": "gpt2", "config": []},
    "too many layers": {"family": "gpt2", "config": {"layers": 10**9}},
    "no word of the language": {"family": "gpt2", "config": {"act": "t.nothing"}},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_reference_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "treadle", "declaration": DAMAGED[name]}))
    (tmp_path / "weights.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(TreadleError) as caught:
        t.compile(tmp_path)
    assert "\x1b" not in str(caught.value) and "internal" not in str(caught.value).lower()
    if "family" not in str(DAMAGED[name]) or name == "an unknown family":
        assert isinstance(caught.value, CheckpointError)


def test_a_command_that_works_is_quoted(tmp_path: Path, treadle_command: Treadle) -> None:
    reference = {"file": "a b;$(touch gone).py", "function": "f", "graph_sha256": "0" * 64}
    (tmp_path / "o'ut").mkdir()
    (tmp_path / "o'ut" / "config.json").write_text(json.dumps({"model_type": "treadle", "declaration": reference}))
    said = treadle_command("generate", shlex.quote("o'ut"), "'a prompt'")
    assert shlex.split(hint_of(said)) == [
        *("treadle", "generate", "a b;$(touch gone).py:f", "--weights", "o'ut", "a prompt"),
    ]


def test_the_target_of_an_artifact_is_replaced_by_the_cpu(trained: Treadle) -> None:
    """The CPU is the default target of other models, and still a choice for an artifact that has another target."""
    torch = pytest.importorskip("torch")
    trained(f"compile {OWN} --weights out --backend torch --target cuda -o cuda.treadle")
    if not torch.cuda.is_available():
        said = trained("generate cuda.treadle x --tokens 2")
        refused(said, "PyTorch finds no CUDA device")
        assert hint_of(said) == "--target cpu"
    assert trained("generate cuda.treadle x --tokens 2 --target cpu").code == 0
    assert isinstance(t.load("cuda.treadle", target="cpu").generate("x", most=2), str)
    threads = trained("generate cuda.treadle x --tokens 2 --target cpu --threads 1")
    assert threads.code == 0


def test_a_page_for_a_browser_is_refused_for_the_cpu(treadle_command: Treadle) -> None:
    said = treadle_command(f"export {OWN} --to web -o page --target cpu")
    refused(said, "a page needs --target webgpu", "--target cpu")


# -- models that do not continue text -----------------------------------------------------------------------------

OTHER_TASKS = (
    DECLARATION.partition("@t.model")[0]
    + """
@t.model
def my_encoder(tokens: Tokens, lengths: Lengths | None = None, *, vocab=300, dim=16, heads=2):
    x = t.embed(tokens, vocab, dim, name="tok")
    mask = None if lengths is None else t.padding(lengths)
    x += t.self_attention(t.layer_norm(x, name="norm"), heads, mask=mask, name="attn")
    return {"logits": t.unembed(x, tied="tok"), "hidden": x}


@t.model
def without_lengths(tokens: Tokens, *, vocab=300, dim=16, heads=2):
    x = t.embed(tokens, vocab, dim, name="tok")
    return t.linear(x + t.self_attention(x, heads, name="attn"), vocab, name="logits")


@t.model
def my_tagger(tokens: Tokens, lengths: Lengths | None = None, *, vocab=300, dim=16, labels=3):
    return {"logits": t.linear(t.embed(tokens, vocab, dim, name="tok"), labels, name="head")}


@t.model
def my_classifier(tokens: Tokens, *, vocab=300, dim=16, labels=3):
    x = t.embed(tokens, vocab, dim, name="tok")
    return {"logits": t.linear(x.mean(1), labels, name="head"), "hidden": x}
"""
)
ZOO = "bert --set vocab=300 --set layers=1 --set dim=16 --set heads=2 --set hidden=32"


def loading_command(said: Result) -> str:
    """Return the command that the end of a training run names."""
    assert said.code == 0, said.err
    return (said.out + said.err).partition("load it by treadle ")[2].strip()


@pytest.mark.parametrize("model", ["models.py:my_encoder", "models.py:without_lengths", f"{ZOO} --set head=masked_lm"])
def test_the_command_at_the_end_of_masked_training_works(model: str, treadle_command: Treadle) -> None:
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    said = treadle_command(f"train {model} corpus.txt --objective masked-token -o out {TRAIN}")
    command = loading_command(said)
    assert command.startswith("fill ")
    texts = ["the <mask> sees the <mask>.", "a <mask>"]
    found = treadle_command(command, *map(shlex.quote, texts), "--top 400 --backend numpy --json")
    assert found.code == 0, found.err
    assert [len(each["masks"]) for each in found.json["texts"]] == [1, 2, 1]
    for each in found.json["texts"]:
        for fillings in each["masks"]:
            assert 0.9 < sum(filling["score"] for filling in fillings) < 1, "ids without a token have the rest"
    alone = treadle_command(command.partition(' "')[0], shlex.quote(texts[1]), "--top 400 --backend numpy --json")
    (masks,) = (each["masks"] for each in found.json["texts"] if each["text"] == texts[1])
    scores = [{f["id"]: f["score"] for f in of[0]} for of in (masks, alone.json["texts"][0]["masks"])]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6), "no result depends on the other texts"


def test_labels_of_tokens_are_not_trained_on_texts(treadle_command: Treadle) -> None:
    """Neither objective has their targets, so the hint is the trainer."""
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    for objective in ("next-token", "masked-token"):
        said = treadle_command(f"train models.py:my_tagger corpus.txt -o out --objective {objective} {TRAIN}")
        refused(said, "cannot be trained on texts: its logits are not of all tokens", "3 classes, 300 tokens")
        assert "t.Trainer with batches and targets of your own" in hint_of(said)


SHIFTED = (
    DECLARATION.partition("@t.model")[0]
    + """
@t.model
def shifted(tokens: Tokens, *, vocab=300, dim=16):
    x = t.embed(tokens, vocab, dim, name="tok")
    before = t.pad(x, axis=1, before=1)[:, :-1]
    return {"logits": t.unembed(t.linear(x + before, dim, name="mix"), tied="tok")}
"""
)


def test_a_causal_model_without_a_step_trains_and_has_a_perplexity(treadle_command: Treadle) -> None:
    """A token shift reads the previous position: no command says that the model is not causal."""
    Path("models.py").write_text(SHIFTED, encoding="utf-8")
    command = loading_command(treadle_command(f"train models.py:shifted corpus.txt -o out {TRAIN}"))
    assert command == "perplexity models.py:shifted --weights out FILE"
    found = treadle_command(command.replace("FILE", "corpus.txt"), "--backend numpy --json")
    assert found.code == 0 and 1 < found.json["perplexity"] < 400
    reason = "shifted has no axis that may be stepped: S is causal, but a step keeps no state"
    said = treadle_command("generate models.py:shifted x --weights out")
    refused(said, "does not continue text: it has no decoding step", reason, "slice: the axis is sliced", "models.py:")
    assert "treadle run and perplexity compute all positions" in hint_of(said)
    said = treadle_command("explain models.py:shifted step")
    refused(said, reason)
    run = treadle_command(
        hint_of(said).partition(",")[0].removeprefix("treadle ").replace("MODEL", "models.py:shifted")
    )
    assert "--input tokens=..." in hint_of(run)
    assert treadle_command("run models.py:shifted --input tokens=1,2,3 --weights out --backend numpy").code == 0


def test_a_declaration_classifies(trained: Treadle) -> None:
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    trainer = t.Trainer("models.py:my_classifier", tokenizer="out", backend="numpy")
    trainer.step(tokens=[[1, 2, 3]], targets=[2])
    saved = trainer.save("cls")
    assert ' classify models.py:my_classifier --weights cls "A text"' in getattr(saved.loading, "command", "")
    command = "classify models.py:my_classifier 'the cat' 'the dog sees' --weights cls --top 3 --backend numpy --json"
    tokens = TextTokenizer.open("out").ids(["the cat"])
    logits = trainer.compiled()(tokens=np.array(tokens))["logits"][0].astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum()
    scores = trained(command).json["texts"][0]["labels"]
    assert {each["label"]: each["score"] for each in scores} == pytest.approx(
        {str(label): wanted[label] for label in range(3)}, abs=1e-5
    )
    config = json.loads(Path("cls", "config.json").read_text())
    for names, count in ((["cat", "dog", "bird"], 3), (["cat", "dog"], 2)):
        config["id2label"] = dict(enumerate(names))
        Path("cls", "config.json").write_text(json.dumps(config))
        said = trained(command)
        if count == 3:
            assert {each["label"] for each in said.json["texts"][0]["labels"]} == set(names)
        else:
            refused(
                trained(command.replace(" --json", "")),
                "id2label must name all labels of the model",
                "2 names, 3 labels",
            )


@pytest.mark.parametrize(
    ("command", "report", "hint"),
    [
        ("tag models.py:my_classifier the --weights cls", "no head to tag tokens", "logits [B, S, labels]"),
        ("tag models.py:my_encoder the --weights enc", "have no names", '"id2label"'),
        ("answer models.py:my_encoder the cat --weights enc", "no head to answer questions", "logits [B, S, 2]"),
        ("classify models.py:my_encoder the --weights enc", "no head to classify texts", "logits [B, labels]"),
        ("fill models.py:my_classifier the --weights cls", "no head to fill masks", "logits [B, S, vocab]"),
        ("fill models.py:my_encoder the", "is a declaration, without weights", "--weights FOLDER"),
        ("classify models.py:my_classifier the", "is a declaration, without weights", "t.Trainer"),
        ("fill models.py:my_encoder the --weights enc --tokenizer out", "no mask token", "--objective masked-token"),
    ],
)
def test_a_declaration_with_another_head(command: str, report: str, hint: str, trained: Treadle) -> None:
    said = of_other_tasks(trained)(command)
    refused(said, report)
    assert hint in hint_of(said)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ("--set dim=64", "--set dim=64"),
        ("--set layers=3", "--set layers=3"),
        ("--set heads=4 --set dim=64", "--set dim=64"),
        ("--set layers=3 --set dim=64", "--set layers=3 --set dim=64"),
    ],
)
def test_a_configuration_that_the_weights_contradict(settings: str, wrong: str, trained: Treadle) -> None:
    """The hint names the settings without which the weights fit, and leaves the others."""
    for command in (f"run {OWN} --weights out --input tokens=1,2", f"generate {OWN} the --weights out --tokens 2"):
        said = trained(f"{command} {settings} --backend numpy")
        refused(said, "the checkpoint ")
        assert hint_of(said) == f"leave out {wrong}, and the weights fit"
        followed = f"{command} {settings} --backend numpy"
        for each in wrong.split(" --set "):
            followed = followed.replace(f"--set {each.removeprefix('--set ')}", "")
        assert trained(followed).code == 0
    options = dict(each.split("=") for each in settings.replace("--set", "").split())
    with pytest.raises(CheckpointError) as caught:
        t.compile(OWN, weights="out", **{name: int(value) for name, value in options.items()})
    assert str(caught.value.hint).startswith("leave out " + wrong.removeprefix("--set ").replace(" --set ", ", "))


def test_weights_that_fit_no_configuration_keep_their_hint(trained: Treadle) -> None:
    text = Path("models.py").read_text()
    Path("other.py").write_text(text.replace('name="ln_f"', 'name="final"'))
    said = trained("run other.py:my_gpt --weights out/weights.safetensors --set layers=1 --input tokens=1,2")
    refused(said, "the checkpoint lacks 2 of")
    assert "leave out" not in hint_of(said)


def test_a_folder_that_is_a_model_is_named(treadle_command: Treadle) -> None:
    """Weights of a checkpoint's folder do not fit a declaration with other sizes; the hint names the folder."""
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps({**CONFIG, "vocab_size": 8}))
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes(8).items()}
    pytest.importorskip("safetensors.numpy").save_file(arrays, "folder/model.safetensors")
    said = treadle_command("run llama --weights folder --set layers=1 --input tokens=1,2 --backend numpy")
    refused(said, "the checkpoint ")
    assert hint_of(said) == "folder in place of llama: the folder is a model"
    assert treadle_command("run folder --input tokens=1,2 --backend numpy").code == 0


def test_a_configuration_that_fits_but_differs_from_training_is_noted(
    trained: Treadle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note is printed in a pipe, too; and beside the output of --json, not in it."""
    monkeypatch.setattr("treadle.progress._announced", set())
    said = trained(f"run {OWN} --weights out --input tokens=1,2 --backend numpy --set context=64")
    assert (said.code, said.err) == (0, "")
    said = trained(f"compile {OWN} --weights out --backend numpy --set heads=4 --set layers=1 --explain")
    note = "the weights of out were trained with heads=2, layers=2, not with heads=4, layers=1"
    assert (said.code, said.err) == (0, f"{note}\n") and note in " ".join(said.out.split())
    said = trained(f"run {OWN} --weights out --input tokens=1,2 --backend numpy --set layers=1 --json")
    assert said.err == f"{note.partition(' with')[0]} with layers=2, not with layers=1\n" and said.json


@pytest.mark.parametrize("model", [OWN, f"{OWN} --weights out", "out", "whisper", "out.treadle"])
@pytest.mark.parametrize(
    ("command", "task", "ends"),
    [
        ("label MODEL a.png", "label images", "ForImageClassification"),
        ("match MODEL a.png --text cat", "match images and texts", "CLIPModel"),
        ("transcribe MODEL a.wav", "transcribe speech", "WhisperForConditionalGeneration"),
        ("translate MODEL the", "rewrite texts", "ForConditionalGeneration"),
        ("summarize MODEL the", "rewrite texts", "ForConditionalGeneration"),
    ],
)
def test_tasks_that_need_a_checkpoint_ask_for_nothing_else(
    model: str, command: str, task: str, ends: str, trained: Treadle
) -> None:
    """Weights for a declaration would not help, nor would the declaration of an artifact."""
    if model == "out.treadle":
        assert trained(f"compile {OWN} --weights out --backend numpy -o out.treadle").code == 0
    name, *options = model.split(" ", 1)
    said = trained(command.replace("MODEL", name) + "".join(f" {each}" for each in options))
    refused(said, f"to {task} needs a checkpoint folder, not a")
    hint = hint_of(said)
    assert "a folder of a class whose name ends in " in hint and ends in hint
    assert "--weights" not in hint and "py:" not in hint.partition("; `treadle run ")[0]
    assert ("`treadle fetch whisper-tiny`" in hint) == command.startswith("transcribe")
    if name == OWN:
        (run,) = re.findall("`treadle (run [^`]*)` runs the declaration on arrays", hint)
        np.save("ids.npy", np.array([[1, 2]]))
        assert trained(run.replace("NAME=FILE.npy", "tokens=ids.npy") + " --backend numpy").code == 0


@pytest.mark.parametrize("model", [OWN, f"{OWN} --weights out", "out", "gpt2", "idefics3", "out.treadle"])
@pytest.mark.parametrize("command", ["describe MODEL a.png", "chat MODEL --image a.png"])
def test_models_that_read_no_images_are_refused_before_anything_else(
    model: str, command: str, trained: Treadle
) -> None:
    """Weights or a chat template, which other errors ask for, would not help."""
    if model == "out.treadle":
        assert trained(f"compile {OWN} --weights out --backend numpy -o out.treadle").code == 0
    name, *options = model.split(" ", 1)
    said = trained(command.replace("MODEL", name) + "".join(f" {each}" for each in options))
    refused(said, f"{name} reads no images")
    assert hint_of(said).startswith("the folder of a model that reads images, such as SmolVLM's or LLaVA's; or a GGUF")
    if options or name.startswith("out"):  # others have no weights
        loaded = t.load(name, weights="out") if options else t.load(name)
        with pytest.raises(UsageError, match=f"{name} reads no images"):
            loaded.describe("a.png")


def of_other_tasks(trained: Treadle) -> Treadle:
    """Return `trained` after other models were written, with the folders of their weights."""
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    for name, folder in (("encoder", "enc"), ("classifier", "cls"), ("tagger", "tags")):
        saver_for(resolve(f"models.py:my_{name}"), folder).save(t.compile(f"models.py:my_{name}").weights)
    for place in ("enc", "cls", "tags"):
        shutil.copy("out/tokenizer.json", place)
    config = json.loads(Path("tags", "config.json").read_text())
    Path("tags", "config.json").write_text(json.dumps(config | {"id2label": {"0": "O", "1": "B-A", "2": "I-A"}}))
    return trained


@pytest.mark.parametrize(
    "command",
    [
        "classify models.py:my_classifier {} --weights cls",
        "embed models.py:my_encoder {} --weights enc",
        "tag models.py:my_tagger {} --weights tags",
    ],
)
def test_an_empty_text_is_refused_if_it_has_no_tokens(command: str, trained: Treadle) -> None:
    """Also among other texts. Special tokens that a tokenizer adds are tokens."""
    run = of_other_tasks(trained)
    for texts, number in (("''", "1 of 1"), ("'the cat' ''", "2 of 2")):
        said = run(command.format(texts), "--backend numpy")
        refused(said, f"{number} has no tokens")
        assert "of at least one token" in hint_of(said)
    assert run(command.format("'the cat'"), "--backend numpy").code == 0
    config = Path("out", "tokenizer.json")
    added = json.loads(config.read_text())
    piece = {"SpecialToken": {"id": END, "type_id": 0}}
    added["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    for place in ("enc", "cls", "tags"):
        Path(place, "tokenizer.json").write_text(json.dumps(added))
    assert run(command.format("''"), "--backend numpy").code == 0


@pytest.mark.parametrize("how", ["--tokenizer out", "--vocab 300", "--vocab 300 --objective masked-token"])
def test_a_model_without_logits_of_tokens_is_not_trained_on_texts(how: str, trained: Treadle) -> None:
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    options = TRAIN.replace("--vocab 300", "")
    said = trained(f"train models.py:my_classifier corpus.txt -o new {how} {options}")
    refused(said, "it has no logits for each token", "logits: f32[B, 3]")
    assert "t.Trainer" in hint_of(said) and "docs/training.md" in hint_of(said)
    said = trained(f"train {ZOO} corpus.txt -o new {how} {options}")
    refused(said, "it has no logits for each token")
    assert hint_of(said) == "--set head=masked_lm --objective masked-token"


LINEAR = """
from typing import Annotated
import treadle as t

@t.model
def linear(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 300) -> t.Tensor:
    x = t.embed(tokens, vocab, 8, name="e")
    return t.unembed((x @ x.mT).tril() @ x, tied="e")

@t.model
def leaking(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 300) -> t.Tensor:
    x = t.embed(tokens, vocab, 8, name="e")
    return t.unembed((x @ x.mT).tril(1) @ x, tied="e")
"""


def test_a_model_is_causal_if_runs_show_it(trained: Treadle) -> None:
    """Linear attention has no rule that shows it, and no decoding step."""
    Path("linear.py").write_text(LINEAR, encoding="utf-8")
    options = "corpus.txt --vocab 300 --steps 1 --length 16 -o linear"
    refused(trained(f"train linear.py:leaking {options}"), "sees the tokens that it must predict", "masked-token")
    said = trained(f"train linear.py:linear {options}")
    assert said.code == 0 and "treadle perplexity linear.py:linear --weights linear FILE" in said.out
    assert trained("perplexity linear.py:linear --weights linear corpus.txt").code == 0
    refused(
        trained("generate linear.py:linear a --weights linear"), "it has no decoding step", "treadle run and perplex"
    )


def test_hints_for_a_vocabulary_without_a_mask_work(trained: Treadle) -> None:
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    start, options = "train models.py:my_encoder corpus.txt -o new", TRAIN.replace("--vocab 300", "")
    said = trained(f"{start} {options} --tokenizer out")
    assert hint_of(said) == "--objective masked-token"
    said = trained(f"{start} {options} --tokenizer out --objective masked-token")
    refused(said, "the vocabulary has no mask token")
    assert hint_of(said).startswith("--vocab 300 in place of --tokenizer")
    assert trained(f"{start} {options} --vocab 300 --objective masked-token").code == 0
    text = Path("new", "tokenizer.json").read_text().replace("<mask>", "<|mask|>")
    Path("new", "tokenizer.json").write_text(text)
    Path("new", "tokenizer_config.json").write_text("{}")
    masked = f"{start.replace('new', 'again')} {options} --tokenizer new --objective masked-token"
    said = trained(masked)
    refused(said, "no file names the mask token")
    assert hint_of(said) == '"mask_token": "<|mask|>" in tokenizer_config.json'
    Path("new", "tokenizer_config.json").write_text('{"mask_token": "<|mask|>"}')
    assert "<|mask|>" in loading_command(trained(masked))


# -- what is missing, and the flag that gives it -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate OWN the", "generate OWN the --tokenizer out", "chat OWN", "serve OWN"])
def test_missing_weights(command: str, trained: Treadle) -> None:
    said = trained(command.replace("OWN", OWN))
    refused(said, f"{OWN} is a declaration, without weights")
    assert hint_of(said).startswith("--weights FOLDER")


def test_a_declaration_tags_and_answers(trained: Treadle) -> None:
    Path("models.py").write_text(OTHER_TASKS, encoding="utf-8")
    tokenizer, text = TextTokenizer.open("out"), "the cat sees the dog."
    ((encoded,),) = tokenizer.encode([text])
    inside = [text[start:end].strip() in ("cat", "dog") for start, end in encoded.offsets]
    trainer = t.Trainer("models.py:my_tagger", tokenizer="out", backend="numpy", learning_rate=0.1)
    for _ in range(20):
        trainer.step(tokens=[encoded.ids], targets=[[int(is_animal) for is_animal in inside]])
    loading = getattr(trainer.save("tags").loading, "command", "")
    command = f"{loading.partition('treadle ')[2].replace('A text', text)} --backend numpy --json"
    said = trained(command)
    refused(trained(command.replace(" --json", "")), "the labels of models.py:my_tagger have no names")
    assert said.code == 2
    config = json.loads(Path("tags", "config.json").read_text())
    Path("tags", "config.json").write_text(json.dumps({**config, "id2label": {"0": "O", "1": "B-x", "2": "I-x"}}))
    spans = trained(command).json["texts"][0]["spans"]
    assert [(span["label"], span["text"].strip()) for span in spans] == [
        ("x", text[start:end].strip())
        for (start, end), is_animal in zip(encoded.offsets, inside, strict=True)
        if is_animal
    ]
    saver_for(resolve("models.py:my_tagger", labels=2), "qa").save(t.compile("models.py:my_tagger", labels=2).weights)
    found = t.load("models.py:my_tagger", weights="qa", tokenizer="out", backend="numpy").answer("cat", text)
    assert found is not None
    assert text[found.start : found.end] == found.text


def test_weights_are_those_of_one_model(trained: Treadle) -> None:
    """A declaration becomes a model with its weights, to be used next to another model."""
    drafted = f"generate {OWN} the --weights out --tokens 4 --draft "
    taught = f"train {OWN} corpus.txt --weights out -o student --steps 2 --length 16 --teacher "
    for option, command in (("draft", drafted), ("teacher", taught)):
        for name, received in ((OWN, f"{OWN}, a declaration"), ("out", f"out, weights of {OWN}")):
            said = trained(command + name)
            refused(said, f"a {option} is a model with its weights", f"--{option} {received}")
            written = re.search(r"`treadle (compile .*)`", hint_of(said))
            assert written is not None
        assert trained(written[1]).code == 0
        assert trained(f"{command}{option}.treadle").code == 0


@pytest.mark.parametrize(
    ("models", "declared"),
    [
        (f"a={OWN} b=models.py:my_second --weights out", [OWN, "models.py:my_second"]),
        (f"a={OWN} b=models.py:my_second", [OWN, "models.py:my_second"]),
        (f"whole.treadle {OWN} --weights out", [OWN]),
        ("out b=second", [OWN, "models.py:my_second"]),
        (f"a={OWN} b=second --weights out", [OWN, "models.py:my_second"]),
        (f"{OWN} gpt2 --weights out", [OWN, "gpt2"]),
    ],
)
def test_several_served_models_have_their_weights_in_their_own_files(
    models: str, declared: list[str], trained: Treadle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained(f"compile {OWN} --weights out -o whole.treadle --backend numpy").code == 0
    Path("models.py").write_text(DECLARATION + DECLARATION.replace("my_gpt", "my_second").partition("\n\n")[2])
    second = "models.py:my_second"
    texts = TextFiles(t.ModelSource.open(OWN, weights="out").text_files())
    saver_for(resolve(second), "second").with_texts(texts).save(t.compile(second).weights)
    monkeypatch.setattr("treadle.serving.running.serve", lambda *_, **__: None)
    said = trained(f"serve {models} --backend numpy --port 0")
    refused(said, "--weights names the weights of one model")
    commands = re.findall(r"`treadle (.*?)`", hint_of(said))
    assert [command.split()[:2] for command in commands[:-1]] == [["compile", name] for name in declared]
    if "gpt2" in declared:  # its FOLDER is a model that this test does not have
        return
    for command in commands[:-1]:
        folder = "second" if second in command else "out"
        assert trained(command.replace("FOLDER", folder)).code == 0
    assert commands[-1].startswith("serve ")
    for model in commands[-1].split()[1:]:
        assert isinstance(Opening(rows=1).open(model, backend="numpy"), ServedWriter)


def test_one_declaration_is_served_under_two_names(trained: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("treadle.serving.running.serve", lambda served, **_: names.extend(each.name for each in served))
    assert trained(f"serve a={OWN} b={OWN} --weights out --backend numpy --rows 1").code == 0
    assert names == ["a", "b"]


def test_a_served_model_of_ones_own_embeds_too(trained: Treadle) -> None:
    served = Opening(rows=1).open(f"mine={OWN}", weights="out", backend="numpy")
    assert isinstance(served, ServedWriter)
    texts = ["the cat", "the dog sees the cat"]
    embedded = served.embedder().embed(texts).vectors
    np.testing.assert_array_equal(embedded, t.load(OWN, weights="out", backend="numpy").embed(texts))
    assert not np.allclose(embedded[0], embedded[1])


def test_a_missing_tokenizer(trained: Treadle) -> None:
    Path("out", "tokenizer.json").rename("tokenizer.json")
    said = trained(f"generate {OWN} the --weights out --tokens 2")
    refused(said, f"the weights of {OWN} are in a folder without a tokenizer")
    assert hint_of(said).startswith("--tokenizer FOLDER")
    Path("words").mkdir()
    Path("tokenizer.json").rename("words/tokenizer.json")
    assert trained(f"generate {OWN} the --weights out --tokens 2 --tokenizer words").code == 0
    with pytest.raises(UsageError, match="the tokenizer of an opened model is chosen"):
        ModelSource.open(ModelSource.open(OWN, weights="out"), tokenizer="words")


def test_a_model_without_lengths_embeds_each_text_alone(trained: Treadle) -> None:
    wanted = t.load(OWN, weights="out", backend="numpy").embed(["the cat", "the dog sees the cat"])
    text = Path("models.py").read_text()
    plain = text.replace("lengths: Lengths | None = None, ", "")
    Path("models.py").write_text(plain.replace("None if lengths is None else t.padding(lengths)", "None"))
    model = t.load(OWN, weights="out/weights.safetensors", backend="numpy")
    assert [port.name for port in model.embedder.model.inputs] == ["tokens"]
    np.testing.assert_allclose(model.embed(["the cat", "the dog sees the cat"]), wanted, rtol=0, atol=1e-6)
    Path("models.py").write_text(Path("models.py").read_text().replace(', "hidden": x', ""))
    said = trained(f"embed {OWN} the --weights out/weights.safetensors")
    refused(said, f"{OWN} does not embed sentences", "(tokens: i64[B, S]) -> (logits: f32[B, S, 300])")


@pytest.mark.parametrize(
    ("how", "report"),
    [
        ("", "has no folder, and so no tokenizer"),
        ("--vocab 100", "257 tokens or more"),
        ("--vocab 300 --tokenizer out", "a new vocabulary is trained for a declaration without weights"),
        ("--vocab 300 --weights out", "a new vocabulary is trained for a declaration without weights"),
        ("--vocab 400 --set vocab=280", "the tokenizer has tokens that my_gpt does not have"),
        ("--weights out -o out --replace", "the model's own folder cannot be overwritten"),
    ],
)
def test_training_that_cannot_work(how: str, report: str, trained: Treadle) -> None:
    options = TRAIN.replace("--vocab 300", "")
    refused(trained(f"train {OWN} corpus.txt {how} {options}" + (" -o new" if "-o" not in how else "")), report)


@pytest.mark.parametrize(
    ("command", "report"),
    [
        ("inspect corpus.txt", "a file is a model only if it ends in .gguf, .onnx or .treadle"),
        ("inspect out/weights.safetensors", "a file is a model only if it ends in .gguf, .onnx or .treadle"),
        (f"generate {OWN} the --weights corpus.txt", "weights are a folder or a .safetensors file"),
        ("embed model.gguf the", "embed reads no .gguf files"),
        ("embed model.onnx the", "embed reads no .onnx files"),
    ],
)
def test_a_file_of_another_kind(command: str, report: str, trained: Treadle) -> None:
    for name in ("model.gguf", "model.onnx"):
        Path(name).touch()
    said = trained(command)
    refused(said, report)
    assert "a folder" in hint_of(said) or hint_of(said) == "treadle inspect out"


# -- artifacts -----------------------------------------------------------------------------------------------------


def test_an_artifact_continues_text_as_its_model_does(trained: Treadle) -> None:
    Path("out", "chat_template.jinja").write_text("{{ messages }}")
    Path("out", "generation_config.json").write_text('{"repetition_penalty": 1.5, "eos_token_id": 0}')
    for how in ("", "--quantize int4"):
        assert trained(f"compile {OWN} --weights out -o a.treadle {how}").code == 0
        wanted = trained(f"generate {OWN} 'the cat' --weights out --tokens 6 --json {how}").json
        Path("out").rename("away")  # the file needs no other
        found = trained("generate a.treadle 'the cat' --tokens 6 --json").json
        assert found["texts"] == wanted["texts"] and found["sampling"] == wanted["sampling"]
        assert found["from_folder"]["options"] == {"repetition_penalty": 1.5}
        Path("away").rename("out")
    assert t.load("a.treadle").generate("the cat", most=6) == wanted["texts"][0]["text"]
    assert ModelSource.open("a.treadle").chat_template == "{{ messages }}"
    t.load_artifact("a.treadle").save("b.treadle")
    assert Path("a.treadle").read_bytes() == Path("b.treadle").read_bytes()


def test_an_artifact_has_the_perplexity_of_its_model(trained: Treadle) -> None:
    wanted = trained(f"perplexity {OWN} corpus.txt --weights out --backend numpy --json").json
    assert trained(f"compile {OWN} --weights out -o a.treadle --backend numpy").code == 0
    found = trained("perplexity a.treadle corpus.txt --json").json
    assert found["perplexity"] == wanted["perplexity"] and found["tokens"] == wanted["tokens"]
    refused(trained("perplexity a.treadle corpus.txt --quantize int8"), "does not accept --quantize")


def test_the_perplexity_of_a_file_is_that_of_its_text(trained: Treadle) -> None:
    model = t.load(OWN, weights="out", backend="numpy")
    with pytest.raises(UsageError, match="takes a text, not the name of a file") as caught:
        model.perplexity("corpus.txt")
    found = eval(f"model.{caught.value.hint}", {"model": model, "Path": Path})
    assert found.tokens > 100


def test_an_artifact_has_its_own_backend(trained: Treadle) -> None:
    pytest.importorskip("torch")
    assert trained(f"compile {OWN} --weights out -o a.treadle --backend torch").code == 0
    assert trained("generate a.treadle the --tokens 2 --json").json["backend"] == "torch"


@pytest.mark.parametrize("command", ["generate m.onnx the --tokens 2", "chat m.onnx", "perplexity m.onnx corpus.txt"])
def test_an_onnx_file_without_a_tokenizer_says_so(command: str, trained: Treadle) -> None:
    pytest.importorskip("onnx")
    assert trained(f"export {OWN} --weights out -o m.onnx").code == 0
    said = trained(command)
    refused(said, "is an ONNX file, without a tokenizer")
    assert hint_of(said).startswith("--tokenizer FOLDER")


def test_an_artifact_without_a_tokenizer_says_so(trained: Treadle) -> None:
    assert trained(f"compile {OWN} -o a.treadle").code == 0
    said = trained("generate a.treadle the --tokens 2")
    refused(said, "the artifact a.treadle has no tokenizer")
    assert hint_of(said).startswith("--tokenizer FOLDER")
    assert trained("generate a.treadle the --tokens 2 --tokenizer out").code == 0
    with pytest.raises(UsageError, match=r"the artifact a\.treadle has no tokenizer"):
        t.load("a.treadle")
    refused(trained("generate a.treadle the --tokenizer out --quantize int4"), "does not accept --quantize")
    said = trained("compile a.treadle")
    refused(said, "an artifact is compiled already")
    assert hint_of(said).startswith("the model that it was compiled from")
    refused(trained("perplexity a.treadle corpus.txt"), "the artifact a.treadle has no tokenizer")
    refused(trained("classify a.treadle the"), "a.treadle has no head to classify texts")


@pytest.mark.parametrize(
    ("name", "folder", "task", "tasks"),
    [
        ("classifier", "cls", "classify", "`embed`, `classify` and `serve` take"),
        ("tagger", "tags", "tag", "`tag` takes"),
        ("encoder", "enc", "embed", "`embed`, `fill` and `serve` take"),
    ],
)
def test_an_artifact_of_a_head_has_the_task_of_its_declaration(
    name: str, folder: str, task: str, tasks: str, trained: Treadle
) -> None:
    run, model = of_other_tasks(trained), f"models.py:my_{name} --weights {folder} --backend numpy"
    said = run(f"compile {model} -o a.treadle")
    assert f"its tokenizer is in the file: {tasks} it as MODEL" in said.out
    texts = "'the cat' 'the dog sees' --json"
    wanted = run(f"{task} {model} {texts}").json
    Path(folder).rename("away")
    found = run(f"{task} a.treadle {texts}").json
    key = "sentences" if task == "embed" else "texts"
    assert found[key] == wanted[key] and len(wanted[key]) == 2


def test_a_model_without_a_task_for_texts_stores_no_tokenizer(trained: Treadle) -> None:
    assert not t.compile(OWN, weights="out", outputs=("hidden[:, 0]",)).task_files
    assert t.compile(OWN, weights="out", inputs=("lengths",), outputs=("hidden",)).task_files
    assert t.compile(OWN, weights="out").task_files


@pytest.mark.parametrize(
    "damage", [{"tokenizer.json": b"{}"}, {"tokenizer.json": b""}, {"tokenizer_config.json": b"["}]
)
def test_a_damaged_tokenizer_in_an_artifact(damage: dict[str, bytes], trained: Treadle) -> None:
    exe = t.compile(OWN, weights="out")
    texts = {**exe.task_files, **damage, "../outside": b"x"}
    replace(exe, _stored_files=lambda graph: texts).save("a.treadle")
    refused(trained("generate a.treadle the"), "a.treadle")
    assert trained("run a.treadle --input tokens=1,2").code == 0
    assert not Path("..", "outside").exists()


def test_an_artifact_holds_no_path_of_the_machine(trained: Treadle) -> None:
    place = Path("out", "tokenizer_config.json")
    place.write_text(json.dumps({**json.loads(place.read_text()), "name_or_path": "/home/someone/model"}))
    t.compile(OWN, weights="out").save("a.treadle")
    assert b"/home/someone" not in Path("a.treadle").read_bytes()
    assert t.load("a.treadle").generate("the", most=2) == t.load(OWN, weights="out").generate("the", most=2)


def test_weights_are_the_trained_ones(trained: Treadle) -> None:
    held, alone = (t.compile(OWN, weights=name) for name in ("out", "out/weights.safetensors"))
    drawn = t.compile(OWN)
    tokens = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(held(tokens=tokens)["logits"], alone(tokens=tokens)["logits"])
    assert not np.allclose(held(tokens=tokens)["logits"], drawn(tokens=tokens)["logits"])


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    """Forget the modules of the declarations."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("treadle_model_"):
            del sys.modules[name]


def test_a_folder_without_weights_lists_their_names(trained: Treadle) -> None:
    Path("out", "weights.safetensors").unlink()
    refused(trained(f"inspect {OWN} --weights out"), "the folder has none of weights.safetensors, model.safetensors")


def test_a_declaration_is_served_under_its_own_name(trained: Treadle) -> None:
    assert Opening(rows=1).open(OWN, weights="out", backend="numpy").name == "my_gpt"
