"""Causal language models in ONNX files continue text, have a perplexity and train, as other models do."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from typer.testing import CliRunner

import treadle as t
from tests.onnx_exports import draw
from tests.onnx_exports import export as export_family
from tests.onnx_models import runtime
from tests.task_models import save, without_specials
from treadle.cli import app
from treadle.continuation import TextWriter
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.stepped import open_stepped
from treadle.tasks.perplexity import PerplexityMeter, log_probabilities
from treadle.training.text_training import TextTraining
from treadle.training.training_settings import TrainingSettings

VOCAB, DIM, HEADS = 401, 16, 4
LEAST = float(np.finfo(np.float32).min)
LARGEST_ERROR = 2e-6


class SmallGPT(nn.Module):  # type: ignore[misc]
    """A causal language model of one layer, whose scores are masked in one of the forms of exported models."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.words, self.places = nn.Embedding(VOCAB, DIM), nn.Embedding(64, DIM)
        self.qkv, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, VOCAB)
        self.register_buffer("kept", torch.tril(torch.ones(64, 64, dtype=torch.bool)))
        self.register_buffer("positions", torch.arange(64)[None])

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        rows, length = input_ids.shape
        places = self.positions[:, :length]
        if self.form == "positions from the mask":
            places = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        x = self.words(input_ids) + (0 if "slopes" in self.form else self.places(places))
        q, k, v = (y.view(rows, length, HEADS, DIM // HEADS).transpose(1, 2) for y in self.qkv(x).split(DIM, 2))
        scores = self.masked(q @ k.transpose(-2, -1) * 0.5, attention_mask, length)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, DIM)
        return self.head(x + mixed)

    def masked(self, scores: Any, mask: Any, length: int) -> Any:
        places = torch.arange(length)
        later = torch.triu(torch.full((length, length), LEAST), diagonal=1)
        if mask is not None:
            hidden = 1.0 - mask[:, None, None, :].float()
        match self.form:
            case "subtracted from 1":
                return torch.where(self.kept[:length, :length], scores, -1e4) + hidden * LEAST
            case "clipped":
                return torch.max(scores + (hidden.masked_fill(hidden.bool(), LEAST) + later), torch.tensor(LEAST))
            case "a product of two masks":
                both = later * (places > places.reshape(-1, 1))
                both = both[None, None].expand(scores.shape[0], 1, -1, -1)
                return scores + both.masked_fill(both + mask[:, None, None, :] == 0, LEAST)
            case "filled twice":
                kept = (torch.triu(torch.ones(length, length)) == 1).transpose(0, 1)
                return scores + kept.float().masked_fill(kept == 0, -torch.inf).masked_fill(kept == 1, 0.0)
            case "slopes times positions":
                slopes = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]).view(1, HEADS, 1, 1)
                return scores + slopes * places[None, None, None].float() + later
        return scores + later


WITH_MASK = ("subtracted from 1", "clipped", "a product of two masks", "positions from the mask")
FORMS = (*WITH_MASK, "filled twice", "slopes times positions")


def export(module: Any, path: Path, axes: Mapping[str, Mapping[int, str]], *, dynamo: bool = False) -> Path:
    """Write a module as an ONNX file, with inputs of these dynamic axes, and return its path."""
    rows, length, before = 2, 5, 3
    sizes = {"B": rows, "S": length, "P": before, "P + S": before + length}
    shapes = {name: [sizes[dims[0]], *([HEADS] if len(dims) > 1 and 2 in dims else [])] for name, dims in axes.items()}
    example = []
    for name, dims in axes.items():
        if name.startswith("past"):
            example.append(torch.randn(*shapes[name], before, DIM // HEADS))
        else:
            example.append(torch.ones(rows, sizes[dims[1]], dtype=torch.long))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options: dict[str, Any] = {"input_names": list(axes), "dynamo": dynamo}
    if dynamo:
        options |= {"dynamic_shapes": {name: dict(dims) for name, dims in axes.items()}, "verbose": False}
    else:
        options |= {"dynamic_axes": {**axes, "logits": {0: "B", 1: "S"}}, "opset_version": 18}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), tuple(example), str(path), output_names=["logits"], **options)
    return path


TOKENS = {"input_ids": {0: "B", 1: "S"}}
MASKED = {**TOKENS, "attention_mask": {0: "B", 1: "S"}}


def exported(form: str, folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    module = SmallGPT(form).eval()
    return module, export(module, folder / "model.onnx", MASKED if form in WITH_MASK else TOKENS)


def logits_of(path: Path, ids: Any) -> Any:
    """Return the logits [S, vocab] of one row in ONNX Runtime, without padding."""
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return runtime(str(path), inputs)["logits"][0]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of the vocabulary."""
    folder = tmp_path_factory.mktemp("words")
    save(folder, "GPT2LMHeadModel", without_specials())
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_session_has_the_logits_of_the_whole_text(form: str, tmp_path: Path) -> None:
    _, path = exported(form, tmp_path)
    ids = np.array([[5, 9, 2, 11, 4, 7]])
    whole = logits_of(path, ids)
    padded = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 1, 0, 0]])}
    exe = t.compile(path, backend="numpy")
    got = exe(**{port.name: padded[port.name] for port in exe.inputs})["logits"]
    np.testing.assert_allclose(got, runtime(str(path), padded)["logits"], rtol=0, atol=LARGEST_ERROR)
    for model in (exe, open_stepped(ModelSource.open(str(path)).for_text(), backend="numpy")):
        session = model.session(rows=1, capacity=8)
        row = session.open()
        found = [session.prefill({row: ids[0, :3].tolist()})[row]]
        found += [session.step({row: int(token)})[row] for token in ids[0, 3:]]
        np.testing.assert_allclose(np.stack(found), whole[2:], rtol=0, atol=LARGEST_ERROR)


@pytest.mark.parametrize(("name", "attention"), [("llama", "eager"), ("gpt2", "sdpa")])
def test_a_session_of_a_model_of_transformers(name: str, attention: str, tmp_path: Path) -> None:
    path = export_family(name, tmp_path, dynamo=False, attention=attention)
    inputs = draw(name, 1, B=1, S=6)
    inputs["attention_mask"][:] = 1
    (whole,) = runtime(str(path), inputs)["y"]
    session = t.compile(path, backend="numpy").session(rows=1, capacity=8)
    row = session.open()
    ids = inputs["input_ids"][0]
    found = [session.prefill({row: ids[:3].tolist()})[row], *(session.step({row: int(i)})[row] for i in ids[3:])]
    np.testing.assert_allclose(np.stack(found), whole[2:], rtol=0, atol=2e-5)


def test_a_file_continues_text_and_has_a_perplexity(words: Path, tmp_path: Path) -> None:
    _, path = exported("subtracted from 1", tmp_path)
    writer = TextWriter.open(path, tokenizer=words, backend="numpy")
    (ids,) = writer.tokens(["the cat sits"])
    expected = list(ids)
    for _ in range(4):
        expected.append(int(logits_of(path, np.array([expected]))[-1].argmax()))
    pieces = list(writer.continued(["the cat sits"], most=4))
    assert [piece.id for piece in pieces] == expected[len(ids) :]

    model = t.load(path, tokenizer=words, backend="numpy")
    assert model.generate("the cat sits", most=4) == "".join(piece.text for piece in pieces)
    chances = log_probabilities(logits_of(path, np.array([ids])))[:-1]
    loss = -np.take_along_axis(chances, np.array(ids)[1:, None], 1).mean()
    assert model.perplexity("the cat sits").perplexity == pytest.approx(np.exp(loss), rel=1e-5)


def test_the_window_of_a_perplexity_fits_the_table_of_positions(words: Path, tmp_path: Path) -> None:
    _, path = exported("subtracted from 1", tmp_path)
    meter = PerplexityMeter.open(Program.of(path, tokenizer=words, backend="numpy"))
    assert meter.window == 64
    text = tmp_path / "text.txt"
    text.write_text("the cat sits under the old tree. " * 40)
    settings = TrainingSettings(steps=1, batch=2)
    training = TextTraining.open(str(path), [str(text)], settings, CompileOptions.of("train", {"tokenizer": words}))
    assert training.data.length == 64


def test_a_file_is_trained_on_texts(words: Path, tmp_path: Path) -> None:
    _, path = exported("subtracted from 1", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the cat sits under the old tree. " * 40)
    options = ["--tokenizer", str(words), "--backend", "numpy", "--length", "16", "--learning-rate", "0.01"]
    done = CliRunner().invoke(app, ["train", str(path), str(text), *options, "--steps", "12", "--every", "1", "--json"])
    assert done.exit_code == 0, done.output
    losses = [line["loss"] for line in json.loads(done.stdout)["lines"]]
    assert losses[-1] < 0.8 * losses[0]


class PastGPT(SmallGPT):
    """A model whose keys and values are appended to those of earlier tokens, in the form that Optimum exports."""

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        rows, length = input_ids.shape
        x = self.words(input_ids) + self.places(position_ids)
        q, k, v = (y.view(rows, length, HEADS, DIM // HEADS).transpose(1, 2) for y in self.qkv(x).split(DIM, 2))
        k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        later = torch.arange(k.shape[2]) > position_ids[:, None, :, None]
        hidden = later | (attention_mask == 0)[:, None, None, :]
        scores = (q @ k.transpose(-2, -1) * 0.5).masked_fill(hidden, LEAST)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, DIM)
        return self.head(x + mixed), k, v


def test_a_file_with_a_past_continues_text_with_the_tokenizer_next_to_it(words: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = PastGPT("past").eval()
    past = {name: {0: "B", 2: "P"} for name in ("past_key_values.0.key", "past_key_values.0.value")}
    axes = {**TOKENS, "attention_mask": {0: "B", 1: "P + S"}, "position_ids": {0: "B", 1: "S"}, **past}
    path = export(module, tmp_path / "model.onnx", axes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, tmp_path / name)

    ids, nothing = torch.tensor([[5, 9, 2, 11]]), torch.zeros(1, HEADS, 0, DIM // HEADS)
    logits, *present = module(ids, torch.ones(1, 4), torch.arange(4)[None], nothing, nothing)
    later, mask = torch.tensor([[7, 3]]), torch.ones(1, 6, dtype=torch.long)
    inputs = [later, mask, torch.tensor([[4, 5]]), *present]
    exe = t.compile(path, backend="numpy")
    got = exe(**{name: x.detach().numpy() for name, x in zip(axes, inputs, strict=True)})
    np.testing.assert_allclose(got["logits"], module(*inputs)[0].detach(), rtol=0, atol=LARGEST_ERROR)

    session = exe.session(rows=1, capacity=8)
    row = session.open()
    first = session.prefill({row: ids[0].tolist()})[row]
    np.testing.assert_allclose(first, logits[0, -1].detach(), rtol=0, atol=LARGEST_ERROR)
    np.testing.assert_allclose(session.step({row: 7})[row], got["logits"][0, 0], rtol=0, atol=LARGEST_ERROR)

    text = t.load(path, backend="numpy").generate("the cat", most=3)
    assert text == t.load(path, tokenizer=words, backend="numpy").generate("the cat", most=3)
    exe.save(tmp_path / "model.treadle")
    assert t.load(tmp_path / "model.treadle").generate("the cat", most=3) == text


def test_a_module_with_a_mask_has_a_perplexity(words: Path) -> None:
    torch.manual_seed(0)
    example = {name: torch.ones(2, 5, dtype=torch.long) for name in MASKED}
    module = t.from_torch(SmallGPT("clipped").eval(), example, dynamic=dict.fromkeys(MASKED, "B S"))
    model = t.load(module, tokenizer=words, backend="numpy")
    assert model.generate("the cat", most=3)
    assert model.perplexity("the cat sits").tokens > 1


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    _, path = exported("filled twice", tmp_path)
    with pytest.raises(t.UsageError) as error:
        t.load(path)
    assert error.value.what == f"{path} is an ONNX file, without a tokenizer"
    assert str(error.value.hint).startswith('tokenizer="FOLDER"')


def test_other_tasks_name_what_they_need(words: Path, tmp_path: Path) -> None:
    _, path = exported("filled twice", tmp_path)
    model = t.load(path, tokenizer=words, backend="numpy")
    for task in ("classify", "fill", "embed"):
        with pytest.raises(t.UsageError, match=r"config\.json|reads no \.onnx files"):
            getattr(model, task)("the cat")
