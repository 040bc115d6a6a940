"""Perplexity of a language model on a text: equal to the loss of Hugging Face's model for each window, and compared
with low-bit weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import treadle as t
import treadle.cli
from tests.task_models import texts
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.program import Program
from treadle.tasks.perplexity import PerplexityMeter, log_probabilities, windows

TEXT = " ".join(texts(12, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny GPT-2 with 40 positions and drawn weights, and a byte-level tokenizer."""
    place = tmp_path_factory.mktemp("gpt2")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(100, 7), vocab_size=300)
    made.save(str(place / "tokenizer.json"))
    torch.manual_seed(4)
    sizes = {"vocab_size": made.get_vocab_size(), "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # far from uniform logits
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def ids(folder: Path) -> list[int]:
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert len(found) > 100
    return list(found)


def losses(folder: Path, row: list[int]) -> np.ndarray:
    """Return -ln p of each token except the first, from Hugging Face's logits."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        report = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1)
    found: np.ndarray = -report[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_of_one_window_it_is_what_hugging_faces_losses_say(folder: Path, ids: list[int], backend: str) -> None:
    meter = PerplexityMeter.open(Program.of(folder, backend=backend))
    assert meter.tokens(TEXT) == ids and meter.tokens(TEXT, 30) == ids[:30]
    found, wanted = meter.measure(ids[:30], window=40), losses(folder, ids[:30])
    assert (found.tokens, found.windows, found.beside) == (29, 1, None)
    assert found.perplexity == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
    assert found.error == pytest.approx(found.perplexity * wanted.std(ddof=1) / math.sqrt(29), rel=1e-4)


def test_of_several_each_token_is_counted_once(folder: Path, ids: list[int]) -> None:
    """Each token counts in the first window that contains it with at least half a window before it."""
    model = t.load(folder)
    found = model.perplexity(TEXT, window=16, most=45)
    parts = [losses(folder, ids[:16])]
    for begin, end, first in ((8, 24, 16), (16, 32, 24), (24, 40, 32), (29, 45, 40)):
        parts.append(losses(folder, ids[begin:end])[first - begin - 1 :])
    wanted = np.concatenate(parts)
    assert (found.tokens, found.windows) == (44, 5) and len(wanted) == 44
    assert found.perplexity == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
    assert model.meter is model.meter, "compiled once"


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_windows_have_each_token_but_the_first_once(window: int) -> None:
    for count in range(2, 40):
        counted: list[int] = []
        for number, (begin, end, first) in enumerate(windows(count, window)):
            assert 0 <= begin < first < end <= count and end - begin <= window
            assert number == 0 or first - begin >= window - window // 2
            counted += range(first, end)
        assert counted == list(range(1, count))


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"dtype": "bf16"}])
def test_fewer_bits_stand_beside_the_model_without_them(folder: Path, ids: list[int], how: dict[str, str]) -> None:
    backend = "torch" if "dtype" in how else "numpy"
    meter = PerplexityMeter.open(Program.of(folder, backend=backend, **how))
    done: list[int] = []
    found = meter.measure(ids[:60], window=32, progress=done.append)
    whole = PerplexityMeter.open(Program.of(folder, backend=backend)).measure(ids[:60], window=32)
    assert done == [1, 2, 3] and found.windows == 3
    assert found.beside is not None and found.beside.perplexity == whole.perplexity != found.perplexity
    assert meter.beside is not None
    apart, alike = [], []
    for begin, end, first in windows(60, 32):
        row = {"tokens": np.array([ids[begin:end]])}
        q, p = (
            torch.log_softmax(torch.tensor(exe(**row)["logits"][0]).double(), -1)[first - begin - 1 : -1]
            for exe in (meter.model, meter.beside)
        )
        apart.append((p.exp() * (p - q)).sum(-1).numpy())
        alike.append((p.argmax(-1) == q.argmax(-1)).numpy())
    far = np.concatenate(apart)
    assert found.beside.divergence == pytest.approx(far.mean(), rel=1e-6) and far.mean() > 0
    assert found.beside.largest == pytest.approx(np.quantile(far, 0.99), rel=1e-6)
    assert found.beside.alike == np.concatenate(alike).mean()
    alone = PerplexityMeter.open(Program.of(folder, backend=backend, **how), alone=True)
    assert alone.beside is None and alone.measure(ids[:60], window=32).perplexity == found.perplexity


def test_fewer_bits_of_a_files_own_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--widen blocks` turns a GGUF file's blocks into numbers, which --quantize rounds. Without it, there are no
    numbers to round.
    """
    pytest.importorskip("gguf")
    from tests.fuzz.gguf_files import Sizes, tensors, write_model

    place, text = tmp_path / "m.gguf", tmp_path / "text.txt"
    write_model(place, Sizes(), tensors(Sizes()), "Q4_1")
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(UsageError, match=r"int4 quantizes nothing of .*: its matrices are in blocks already"):
        PerplexityMeter.open(Program.of(place, quantize="int4"))
    asked = ["perplexity", str(place), str(text), "--tokens", "40", "--window", "32", "--quantize", "int4", "--json"]
    treadle.cli.app([*asked, "--widen", "blocks"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    own = PerplexityMeter.open(Program.of(place, widen="blocks"))
    assert {v.type.encoding for v in own.model.graph.parameters.values()} == {None}
    whole = own.measure(own.tokens(TEXT, 40), window=32)
    assert found["beside"]["perplexity"] == whole.perplexity != found["perplexity"]


def test_logarithms_are_of_large_numbers_too() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32)
    wanted = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    np.testing.assert_allclose(log_probabilities(logits), wanted, rtol=1e-12)
    assert log_probabilities(logits).dtype == np.float64


@pytest.mark.parametrize(
    ("count", "window", "report", "received"),
    [
        (30, 1, "a window must have at least 2 tokens and at most 40, the model's maximum", "1"),
        (30, 41, "a window must have at least 2 tokens and at most 40, the model's maximum", "41"),
        (1, 16, "perplexity needs a text of two tokens or more", "1"),
        (0, 16, "perplexity needs a text of two tokens or more", "0"),
    ],
)
def test_what_has_no_perplexity(
    folder: Path, ids: list[int], count: int, window: int, report: str, received: str
) -> None:
    meter = PerplexityMeter.open(Program.of(folder))
    with pytest.raises(UsageError, match=report) as caught:
        meter.measure(ids[:count], window=window)
    assert caught.value.received == received
    assert meter.measure(ids[:40], window=40).windows == 1 and meter.measure(ids[:2], window=2).tokens == 1


def test_one_token_has_no_error_and_sizes_may_be_open(folder: Path, ids: list[int]) -> None:
    """If the model takes any number of tokens, a window may have any length."""
    rows = SimpleNamespace(shape=[SimpleNamespace(as_symbol=None)])

    class Model:
        inputs, name = [SimpleNamespace(name="tokens", type=rows)], "m"

        def __call__(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
            return {"logits": np.full((1, tokens.shape[1], 8), self.fill, np.float32)}

        def __init__(self, fill: float) -> None:
            self.fill = fill

    made: Any = PerplexityMeter(Model(0.5), None, None)  # type: ignore[arg-type]
    found = made.measure(range(2), window=10**6)
    assert found.perplexity == pytest.approx(8) and found.error is None
    assert made.measure([3] * 1000, window=100).error == pytest.approx(0, abs=1e-12)
    with pytest.raises(UsageError, match=r"^a window must have at least 2 tokens\n"):
        made.measure(range(2), window=1)
    steep: Any = Model(0.0)
    # the probability of all tokens except token 0 is below float's resolution
    steep.fill = np.array([1e30, *[0] * 7], np.float32)
    assert PerplexityMeter(steep, None, None).measure([0, 1]).perplexity == math.exp(700)  # type: ignore[arg-type]
    for wrong in (math.nan, math.inf):
        made = PerplexityMeter(Model(wrong), None, None)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="logits of m contain NaN or infinity"):
            made.measure(range(2))


def test_a_model_that_is_not_causal_has_none(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(100, 7), vocab_size=300)
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="has no perplexity: it is not a causal language model of tokens alone"):
        PerplexityMeter.open(Program.of(tmp_path))
    with pytest.raises((UsageError, CheckpointError)):
        PerplexityMeter.open(Program.of(tmp_path / "nothing"))
