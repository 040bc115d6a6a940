"""Imported modules and graphs that are loaded for tasks: the tasks that work, and hints that work for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

import treadle as t
from tests.task_models import byte_level, save, without_specials
from treadle.backends.registry import backend_names
from treadle.frontends.torch_export.model import TorchModel
from treadle.training.weight_files import write_weights

EXAMPLE = {"tokens": torch.tensor([[1, 2, 3], [4, 5, 6]])}


class SmallGPT(nn.Module):  # type: ignore[misc]
    """A causal language model of one layer, with the vocabulary of `without_specials`."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, 16), nn.Embedding(32, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, vocab)

    def forward(self, tokens: Any) -> Any:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        rows, length = tokens.shape
        q, k, v = (y.view(rows, length, 2, 8).transpose(1, 2) for y in self.qkv(x).split(16, 2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(rows, length, 16)
        return {"logits": self.head(x)}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    save(folder, "GPT2LMHeadModel", without_specials())
    return folder


@pytest.fixture(scope="module")
def module(words: Path) -> TorchModel:
    from transformers import AutoConfig

    torch.manual_seed(0)
    made = SmallGPT(AutoConfig.from_pretrained(words).vocab_size).eval()
    return t.from_torch(made, EXAMPLE, dynamic={"tokens": "B S"})


def refused(task: Any) -> t.UsageError:
    with pytest.raises(t.UsageError) as error:
        task()
    return error.value


def test_an_imported_module_continues_text_with_another_tokenizer(module: TorchModel, words: Path) -> None:
    error = refused(lambda: t.load(module, backend="numpy"))
    assert error.what == "SmallGPT is an imported module, without a tokenizer"
    assert (error.hint or "").startswith('tokenizer="FOLDER"')
    model = t.load(module, backend="numpy", tokenizer=words)
    text = model.generate("the cat", most=4)
    assert text
    assert model.perplexity("the cat sits under the old tree").tokens > 4
    ids = np.array([[1, 2, 3]])
    assert t.compile(module, backend="numpy")(ids)["logits"].shape[:2] == (1, 3)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_modules_of_transformers_continue_text(family: str, words: Path) -> None:
    """Their masks of packed texts are recognized as causal, and they branch on one row and one token."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(words)
    if family == "Llama":
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=config.vocab_size, **sizes, **heads)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    module.config.use_cache = False
    ids = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])
    imported = t.from_torch(module, (ids,), dynamic={"input_ids": "B S"})
    model = t.load(imported, backend="numpy", tokenizer=words)
    assert model.generate("the cat", most=4)
    session = t.compile(imported, backend="numpy").session(rows=1, capacity=8)
    row = session.open()
    session.prefill({row: ids[0, :3].tolist()})
    last = session.step({row: int(ids[0, 3])})[row]
    np.testing.assert_allclose(last, module(ids).logits[0, -1].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_graph_takes_weights_from_a_folder(module: TorchModel, words: Path, tmp_path: Path) -> None:
    error = refused(lambda: t.load(module.graph, backend="numpy", tokenizer=words))
    assert error.what == "SmallGPT is a graph, without weights"
    assert 'weights="FOLDER"' in (error.hint or "")
    (tmp_path / "trained").mkdir()
    write_weights(tmp_path / "trained" / "weights.safetensors", module.weights)
    graph = t.load(module.graph, backend="numpy", weights=tmp_path / "trained", tokenizer=words)
    same = t.load(module, backend="numpy", tokenizer=words)
    assert graph.generate("the cat", most=4) == same.generate("the cat", most=4)


@pytest.mark.parametrize("task", ["label", "translate", "transcribe"])
def test_other_tasks_name_what_they_need_and_the_call_with_arrays(task: str, module: TorchModel, words: Path) -> None:
    error = refused(lambda: getattr(t.load(module, backend="numpy", tokenizer=words), task)("the cat"))
    assert "SmallGPT" in str(error)
    assert "t.compile(model)" in (error.hint or "")
    assert "without weights" not in error.what


class Head(nn.Module):
    """An embedding table and a head; the output is hidden states, labels of tokens, or labels of a text."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.words, self.labels = kind, nn.Embedding(500, 16), nn.Linear(16, 2)

    def forward(self, tokens: Any) -> Any:
        x = self.words(tokens)
        if self.kind == "hidden":
            return {"hidden": x}
        return {"logits": self.labels(x.mean(1) if self.kind == "text" else x)}


def test_the_outputs_of_a_module_decide_its_tasks(words: Path, module: TorchModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {
        kind: t.load(
            t.from_torch(Head(kind).eval(), EXAMPLE, dynamic={"tokens": "B S"}), backend="numpy", tokenizer=words
        )
        for kind in ("hidden", "token", "text")
    }
    assert {each.label for each in models["text"].classify("the cat").scores} == {"0", "1"}
    assert models["token"].answer("the cat", "the old cat sits") is not None
    byte_level().save_pretrained(tmp_path)  # with <mask> as a special token
    assert len(t.load(module, backend="numpy", tokenizer=tmp_path).fill("the <mask>", top=3).masks[0]) == 3
    ids = models["hidden"].embedder.tokenizer.ids(["the cat"])[0]
    mean = np.asarray(models["hidden"].embedder.model(tokens=[ids])["hidden"])[0].mean(0)
    np.testing.assert_allclose(models["hidden"].embed("the cat"), mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
    for kind, task, what in (
        ("token", "classify", "has no head to classify texts"),
        ("token", "tag", "have no names"),
        ("text", "embed", "does not embed sentences"),
        ("text", "generate", "does not continue text: it is not a causal"),
        ("token", "generate", "does not continue text: its output is not the logits of all tokens"),
        ("hidden", "generate", "does not continue text: its output is not the logits of all tokens"),
        ("token", "perplexity", "has no perplexity: its output is not the logits of all tokens"),
        ("hidden", "perplexity", "has no perplexity: its output is not the logits of all tokens"),
    ):
        assert what in refused(lambda kind=kind, task=task: getattr(models[kind], task)("the cat")).what, (kind, task)


class MaskedMean(nn.Module):
    """A classifier as transformers writes them: a mean over the tokens of a mask, and one tensor as output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.labels = nn.Embedding(500, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        kept = attention_mask[..., None].float()
        return self.labels((self.words(input_ids) * kept).sum(1) / kept.sum(1))


def test_a_classifier_with_a_mask_of_padding_takes_texts(words: Path) -> None:
    module, ids = MaskedMean().eval(), torch.zeros(2, 5, dtype=torch.long)
    axes = dict.fromkeys(("input_ids", "attention_mask"), "B S")
    imported = t.from_torch(module, (ids, torch.ones_like(ids)), dynamic=axes)
    texts = ["the cat", "the old cat sits"]
    found = t.load(imported, backend="numpy", tokenizer=words).classify(texts)
    for text, each in zip(texts, found, strict=True):
        given = torch.tensor(t.ModelSource.open(imported, tokenizer=words).tokenizer().ids([text]))
        wanted = module(given, torch.ones_like(given)).softmax(-1)[0].tolist()
        scores = {scored.label: scored.score for scored in each.scores}
        np.testing.assert_allclose([scores[label] for label in "012"], wanted, rtol=1e-5)


@pytest.mark.parametrize("backend", backend_names())
def test_a_module_that_is_trained_further_changes_no_compiled_model(backend: str, tmp_path: Path) -> None:
    """Weights come from the import, or from the caller as tensors or arrays; artifacts have the same."""
    module, x = nn.Linear(4, 3).eval(), np.ones((1, 4), np.float32)
    imported = t.from_torch(module, (torch.zeros(2, 4),), dynamic={"input": "B 4"})
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    given: list[Any] = [None, module.state_dict(), arrays]
    compiled = [t.compile(imported, backend=backend, weights=weights) for weights in given]
    before = module(torch.from_numpy(x)).detach().numpy()
    with torch.no_grad():
        module.weight += 1
        module.bias += 10
    for exe in compiled:
        exe.save(tmp_path / "m.treadle")
        for each in (exe, t.load_artifact(tmp_path / "m.treadle", backend=backend)):
            np.testing.assert_allclose(each(input=x)["output"], before, rtol=1e-5)
    again = t.compile(imported, backend=backend, weights=compiled[0].weights)
    assert np.shares_memory(again.weights["weight"], compiled[0].weights["weight"]), "read-only weights are not copied"


def test_training_on_texts_needs_another_tokenizer(module: TorchModel, words: Path) -> None:
    error = refused(lambda: t.ModelSource.open(module).tokenizer())
    assert error.what == "SmallGPT is an imported module, without a tokenizer"
    assert t.ModelSource.open(module, tokenizer=words).tokenizer().size > 0
