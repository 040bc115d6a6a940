"""A model that is opened once: each of its files is opened at most once, changed files are refused, and a declaration
takes its weights from a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.opened_files import opened_in
from treadle.continuation import TextWriter
from treadle.explaining.fusion import explain_fusion
from treadle.fetching import fetched_model
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.sentence_embedding import SentenceEmbedder
from treadle.serving.models import Opening
from treadle.stepped import open_stepped
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.perplexity import PerplexityMeter
from treadle.training.saving import saver_for
from treadle.training.text_data import TextData
from treadle.training.trainer import Trainer
from treadle.verifying import verify_model

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from tests.decoder_models import DECODERS
from tests.task_models import byte_level, save, without_specials, wordpiece

MINE = """\
from typing import Annotated

import treadle as t


@t.model
def mine(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 11, dim: int = 4) -> t.Tensor:
    return t.unembed(t.embed(tokens, vocab, dim, name="wte"), tied="wte")
"""
TEXT = "the cat sat on the mat and the dog sat on the log. " * 8


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer and a generation_config.json."""
    place = tmp_path_factory.mktemp("gpt2")
    save(place, "GPT2LMHeadModel", without_specials())
    return place


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, which classifies and embeds."""
    place = tmp_path_factory.mktemp("bert")
    save(place, "BertForSequenceClassification", wordpiece())
    (place / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}])
    )
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return place


def words(place: Path, **options: Any) -> list[int]:
    return [piece.id for piece in TextWriter.open(place, **options).continued(["the cat"], most=4)]


# -- each file is opened once --------------------------------------------------------------------------------------


def perplexity(place: Path) -> object:
    meter = PerplexityMeter.open(Program.of(place, quantize="int8-weights"))
    return meter.measure(meter.tokens(TEXT, 20), window=8)


def train(place: Path) -> object:
    """Train for a step on texts, and save: the checkpoint is read for the weights, and again for its other tensors."""
    corpus = place.parent / "corpus.txt"
    corpus.write_text(TEXT)
    resolved = resolve(place, deferred=True)
    data = TextData.open([str(corpus)], resolved, length=8, batch=2)
    trainer = Trainer(resolved.source)
    for batch in data.batches.after(0):
        trainer.step(tokens=batch, targets=batch)
        break
    return saver_for(resolved, place.parent / "trained", replace=True).save(trainer.weights)


def two_tasks(place: Path) -> object:
    model = t.load(place)
    return model.generate("the cat", most=2), model.perplexity(TEXT, window=8, most=20), model.generate("a", most=1)


USES: dict[str, Callable[[Path], object]] = {
    "generate": words,
    "generate quantized": lambda place: words(place, quantize="int8-weights"),
    "chat tasks": two_tasks,
    "perplexity": perplexity,
    "serve": lambda place: Opening(rows=1, capacity=8).open(str(place)),
    "train": train,
}


@pytest.mark.parametrize("use", USES)
def test_a_language_model_opens_each_file_once(use: str, gpt2: Path, tmp_path: Path) -> None:
    place = shutil.copytree(gpt2, tmp_path / "model")
    with opened_in(place) as counts:
        USES[use](place)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= counts.keys()
    if use == "train":  # which copies the other files
        counts.subtract([name for name in counts if name != "model.safetensors" and counts[name] == 2])
    assert set(counts.values()) == {1}, counts


def test_longrope_is_resolved_twice_from_the_same_files(tmp_path: Path) -> None:
    tiny = DECODERS["phi3-long"]
    model = replace(tiny, config={**tiny.config, "vocab_size": 400, "original_max_position_embeddings": 8}).build()
    place = tmp_path / "models--a--b" / "snapshots" / "abc"
    model.save_pretrained(place)
    byte_level().save_pretrained(place)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("abc")
    root = tmp_path / "models--a--b"
    with opened_in(root) as counts:
        found = words(root)
    assert {"refs/main", "snapshots/abc/config.json", "snapshots/abc/model.safetensors"} <= counts.keys()
    assert set(counts.values()) == {1}, counts
    assert found == words(place)
    assert open_stepped(root).derived.context == 8


@pytest.mark.parametrize("use", ["classify", "embed", "serve"])
def test_an_encoder_opens_each_file_once(use: str, bert: Path) -> None:
    embedded = shutil.copytree(bert, bert.parent / use) if use != "classify" else bert
    if use != "classify":  # the head is left out, so that the model returns hidden states
        config = json.loads((embedded / "config.json").read_text())
        (embedded / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    uses: dict[str, Callable[[], object]] = {
        "classify": lambda: t.load(embedded).classify("the cat"),
        "embed": lambda: SentenceEmbedder.open(embedded).embed(["the cat"]),
        "serve": lambda: Opening().open(str(embedded)),
    }
    with opened_in(embedded) as counts:
        uses[use]()
    assert ("1_Pooling/config.json" in counts) == (use != "classify")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= counts.keys()
    assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_a_fetched_model_opens_each_file_once(name: str) -> None:
    place = fetched_model(name)
    if place is None:
        pytest.skip(f"treadle fetch {name} was not run")
    with opened_in(place) as counts:
        TextWriter.open(name) if name == "smollm2" else SentenceEmbedder.open(name).embed(["a cat"])
    assert set(counts.values()) == {1}, counts


def test_a_tokenizer_is_parsed_once_and_truncates_as_each_caller_asks(bert: Path) -> None:
    source = ModelSource.open(bert)
    with opened_in(bert) as counts:
        short, whole, own = source.tokenizer(max_tokens=4), source.tokenizer(cut=False), source.tokenizer()
    assert counts["tokenizer.json"] == 1
    texts = [" ".join(["cat"] * 60)]
    assert [len(each.encode(texts)[0][0]) for each in (short, whole, own)] == [4, 62, 40]
    assert own.encode(["the cat"]) == ModelSource.open(bert).tokenizer().encode(["the cat"])


# -- one source for every use --------------------------------------------------------------------------------------


def test_an_opened_model_is_taken_wherever_its_name_is(gpt2: Path) -> None:
    tokens = np.array([[1, 2, 3]])
    wanted = t.compile(gpt2)(tokens=tokens)["logits"]
    with opened_in(gpt2) as counts:
        source = ModelSource.open(gpt2)
        assert not counts
        assert words(source) == words(gpt2)  # type: ignore[arg-type]
        counts.clear()
        np.testing.assert_array_equal(t.compile(source)(tokens=tokens)["logits"], wanted)
        assert t.load(source).generate("the cat", most=4) == t.load(gpt2).generate("the cat", most=4)
        counts.clear()
        assert explain_fusion(source).counts["attention"] == 2
        assert verify_model(source, backends=["numpy"]).passed
        Trainer(source)
        assert FolderRules.read(source).end == (0,) or FolderRules.read(source).end
        assert not counts
    assert (str(source), repr(source)) == (str(gpt2), f"ModelSource({str(gpt2)!r})")


def test_limits_are_those_of_the_source(gpt2: Path) -> None:
    source = ModelSource.open(gpt2, limits={"tensors": 3})
    with pytest.raises(CheckpointError, match="more tensors than the limit"):
        t.compile(source)
    with pytest.raises(UsageError, match="limits of an opened model are chosen when it is opened"):
        t.compile(source, limits={"tensors": 4})
    assert ModelSource.open(source, limits={"tensors": 3}) is source


# -- files that change ---------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], object]] = {
    "written again": lambda file: os.utime(file, ns=(1, 1)),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "replaced": lambda file: os.replace(shutil.copy(file, file.with_name("new")), file),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_of_two_models_are_not_mixed(change: str, gpt2: Path, tmp_path: Path) -> None:
    """config.json was read, and changes before the tokenizer or the weights are."""
    for use in (lambda source: source.tokenizer(), lambda source: source.resolve()):
        source = ModelSource.open(shutil.copytree(gpt2, tmp_path / "model", dirs_exist_ok=True))
        assert source.config["model_type"] == "gpt2"
        CHANGES[change](tmp_path / "model" / "config.json")
        with pytest.raises(CheckpointError, match="the file has changed since it was opened") as caught:
            use(source)  # type: ignore[no-untyped-call]
        assert caught.value.within == str(tmp_path / "model" / "config.json")


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "removed"])
def test_weights_that_change_between_two_reads_are_refused(change: str, gpt2: Path, tmp_path: Path) -> None:
    source = ModelSource.open(shutil.copytree(gpt2, tmp_path / "model"))
    t.compile(source)
    CHANGES[change](tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match="the file has changed since it was opened") as caught:
        t.compile(source, quantize="int8-weights")
    assert caught.value.within == str(tmp_path / "model" / "model.safetensors")
    if change != "longer":
        t.compile(ModelSource.open(tmp_path / "model"))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_link_to_another_file_is_another_file(gpt2: Path, tmp_path: Path) -> None:
    place = shutil.copytree(gpt2, tmp_path / "model")
    (place / "config.json").rename(place / "one.json")
    shutil.copy(place / "one.json", place / "two.json")
    (place / "config.json").symlink_to("one.json")
    source = ModelSource.open(place)
    assert source.config
    (place / "config.json").unlink()
    (place / "config.json").symlink_to("two.json")
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        source.tokenizer()


# -- a declaration with weights of its own -------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "models.py").write_text(MINE)
    return f"{tmp_path / 'models.py'}:mine"


def test_a_declaration_takes_its_weights_from_a_folder(mine: str, tmp_path: Path) -> None:
    drawn = t.compile(mine, seed=3)
    saver_for(resolve(mine), tmp_path / "to").save(drawn.weights)
    tokens = np.array([[1, 2, 3]])
    for weights in (tmp_path / "to", str(tmp_path / "to" / "weights.safetensors")):
        source = ModelSource.open(mine, weights=weights)
        with opened_in(tmp_path / "to") as counts:
            exe = t.compile(source)
            again = t.compile(source, backend="numpy", passes=[])
        assert counts == {"weights.safetensors": 1, "config.json": 1}  # which may say how weights are quantized
        assert exe.seed is None, "nothing was drawn"
        np.testing.assert_array_equal(exe(tokens=tokens)["logits"], drawn(tokens=tokens)["logits"])
        np.testing.assert_array_equal(again.weights["wte.weight"], drawn.weights["wte.weight"])
        np.testing.assert_array_equal(
            t.compile(mine, weights=weights)(tokens=tokens)["logits"], drawn(tokens=tokens)["logits"]
        )
    with pytest.raises(CheckpointError, match=r"wte\.weight"):
        t.compile(mine, weights=tmp_path / "to", dim=8)


def test_a_declaration_with_a_folder_has_the_folders_tokenizer(gpt2: Path, tmp_path: Path) -> None:
    """The folder's tensors have the declaration's names, and its vocabulary cuts the texts."""
    exe = t.compile(gpt2)
    made = resolve(gpt2).model
    assert made is not None
    place = tmp_path / "own"
    shutil.copytree(gpt2, place, ignore=shutil.ignore_patterns("*.safetensors"))
    zoo = resolve("gpt2", **made.config)
    saver_for(zoo, place, replace=True).save(exe.weights)
    source = ModelSource.open(made, weights=place)
    assert words(source) == words(gpt2)  # type: ignore[arg-type]
    assert t.load(source).generate("the cat", most=4) == t.load(gpt2).generate("the cat", most=4)


def test_a_model_with_weights_takes_none_of_a_folder(gpt2: Path) -> None:
    with pytest.raises(UsageError, match="only a declaration or a graph takes its weights from a folder"):
        ModelSource.open(gpt2, weights=gpt2)


def test_models_without_files_have_no_tokenizer(mine: str) -> None:
    for model in (mine, "gpt2", resolve(mine).graph):
        with pytest.raises(UsageError, match=r"is a (declaration|graph)( of the zoo)?, without weights"):
            ModelSource.open(model).tokenizer()
