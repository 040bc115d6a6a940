"""Sentence embeddings compared with sentence-transformers, on small random folders and on MiniLM's real weights."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.backends.registry import find_backend
from treadle.fetching import fetch_model
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, FrontendError, TreadleError, UsageError
from treadle.sentence_embedding import SentenceEmbedder

pytest.importorskip("tokenizers")
pytest.importorskip("sentence_transformers")

import sentence_transformers
import tokenizers

from tests.hf_models import VOCAB, save

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""Tolerance for the cosine distance. float32's spacing below 1 is 6e-8. Six layers of sums in another order change it
by less than 1e-6; an additional or missing token, or another position, changes it by 1e-2.
"""

BACKENDS = ("numpy", "torch", "tvm")


def cosine_distances(a: Array, b: Array) -> Array:
    """Return 1 - cos of each row of a with the same row of b, in float64."""
    a, b = (x.astype(np.float64) for x in (a, b))
    return 1 - (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def theirs(folder: Path, sentences: list[str]) -> Array:
    """Return the embeddings of sentence-transformers."""
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    found: Array = model.encode(sentences)
    return found


def embedder(folder: Path | str, backend: str = "numpy") -> SentenceEmbedder:
    """Return our embedder; skip, with the reason, if the backend is not available."""
    reason = find_backend(backend).available()
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return SentenceEmbedder.open(folder, backend=backend)


# -- small folders ---------------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(VOCAB - 4)]
TEXTS = ["w0 w1 w2", "w3", "", "w5 w4 w3 w2 w1 nothing of this", "w9 " * 7, "w20 w21"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random BERT with a word tokenizer, in the form that sentence-transformers loads."""
    return prepared(tmp_path / "small", "bert")


def prepared(place: Path, name: str) -> Path:
    save(name, place)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=20)  # a file may specify a fixed length, which is ignored
    made.enable_truncation(max_length=5)
    made.save(str(place / "tokenizer.json"))
    write(place / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    write(place / "sentence_bert_config.json", {"max_seq_length": 8})
    modules("Transformer", "Pooling", "Normalize")(place)
    pooling(pooling_mode_mean_tokens=True)(place)
    return place


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


Change = Callable[[Path], None]


def modules(*kinds: str) -> Change:
    """Write modules.json."""
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    return lambda place: write(place / "modules.json", listed)


def pooling(**config: object) -> Change:
    """Write the settings of pooling."""
    return lambda place: write(place / "1_Pooling" / "config.json", {"word_embedding_dimension": 24, **config})


def text(name: str, content: str) -> Change:
    return lambda place: (place / name).write_text(content, encoding="utf-8") and None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(pooling(pooling_mode_mean_tokens=True, pooling_mode_cls_token=False), id="mean"),
        pytest.param(pooling(pooling_mode_cls_token=True), id="first"),
        pytest.param(pooling(pooling_mode="mean"), id="mean-as-named-now"),
        pytest.param(pooling(pooling_mode="cls"), id="first-as-named-now"),
        pytest.param(modules("Transformer", "Pooling"), id="any-length"),
    ],
)
def test_a_folder_is_pooled_as_it_says(folder: Path, change: Change, backend: str) -> None:
    change(folder)
    made = embedder(folder, backend)
    vectors = made.embed(TEXTS, batch_size=4)
    wanted = theirs(folder, TEXTS)
    assert vectors.shape == wanted.shape == (len(TEXTS), made.width)
    assert cosine_distances(vectors, wanted).max() < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(wanted, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["mpnet", "modernbert", "electra", "gpt2-hidden"])
def test_families_embed_as_sentence_transformers_does(name: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path / name, name)
    vectors = embedder(folder, "numpy" if find_backend("tvm").available() else "tvm").embed(TEXTS, batch_size=4)
    assert cosine_distances(vectors, theirs(folder, TEXTS)).max() < TOLERANCE


def test_truncation_is_reported(folder: Path) -> None:
    embedded = embedder(folder).embed_reporting(TEXTS)
    assert embedded.tokens == (5, 3, 2, 8, 8, 4)  # each with [CLS] and [SEP], and at most 8
    assert embedded.cut == (3, 4)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"model_max_length": 7}, 7),
        ({"model_max_length": 10**30}, 5),  # no limit: the limit of tokenizer.json applies
        ({}, 5),
        ({"model_max_length": 1000}, 24),  # the model has 24 positions
    ],
)
def test_the_limit_of_a_folder_that_says_none_is_the_tokenizers(
    folder: Path, settings: dict[str, int], limit: int
) -> None:
    write(folder / "sentence_bert_config.json", {})
    write(folder / "tokenizer_config.json", settings)
    assert embedder(folder).tokenizer.max_tokens == limit


def test_a_folder_without_modules_gets_the_mean_at_length_one(folder: Path) -> None:
    wanted = embedder(folder).embed(TEXTS)
    (folder / "modules.json").unlink()
    shutil.rmtree(folder / "1_Pooling")
    np.testing.assert_array_equal(embedder(folder).embed(TEXTS), wanted)


@pytest.mark.parametrize(
    ("change", "what", "place"),
    [
        (modules("Transformer", "Pooling", "Dense"), "unsupported", "modules.json"),
        (text("modules.json", '{"type": 1}'), "must list objects", "modules.json"),
        (text("modules.json", "[" * 100), "deep", "modules.json"),
        (text("modules.json", '[{"path": ""}, {"type": "P", "path": "1_Pooling"}]'), "with a type", "modules.json"),
        (text("modules.json", '[{"type": "m.Transformer"}, {"type": "m.P", "path": "x"}]'), "a path", "modules.json"),
        (text("modules.json", '[{"type": 3, "path": ""}]'), "with a type and a path", "modules.json"),
        (text("modules.json", '[{"type": "m.Transformer", "path": null}]'), "a path", "modules.json"),
        (text("modules.json", '["m.Transformer"]'), "must list objects", "modules.json"),
        (pooling(pooling_mode_max_tokens=True), "unsupported pooling", "config.json"),
        (pooling(pooling_mode_mean_tokens=True, pooling_mode_cls_token=True), "unsupported pooling", "config.json"),
        (text("sentence_bert_config.json", '{"max_seq_length": "long"}'), "positive integer", "sentence_bert_config"),
        (text("tokenizer_config.json", "{"), "not JSON", "tokenizer_config.json"),
        (text("tokenizer.json", "{"), "tokenizer is damaged", "tokenizer.json"),
        (text("tokenizer.json", '{"model": {"type": "Wizard"}}'), "tokenizer is damaged", "tokenizer.json"),
        (lambda place: (place / "tokenizer.json").unlink(), "the folder has no tokenizer.json", "small"),
    ],
)
def test_a_folder_that_is_damaged_or_unknown_is_refused(folder: Path, change: Change, what: str, place: str) -> None:
    write(folder / "sentence_bert_config.json", {})
    change(folder)
    with pytest.raises(CheckpointError, match=what) as caught:
        embedder(folder)
    assert place in str(caught.value.within)


def test_a_file_outside_the_folder_is_not_read(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")
    with pytest.raises(CheckpointError, match="leads out of the model's folder"):
        TextTokenizer.open(folder)
    write(folder / "modules.json", json.loads((folder / "modules.json").read_text().replace("1_Pooling", "../other")))
    with pytest.raises(CheckpointError, match="stay in the model's folder"):
        embedder(folder)


def test_a_tokenizer_longer_than_the_limit_is_not_read(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="longer than the limit"):
        TextTokenizer.open(folder, limit_bytes=100)


def test_a_model_without_hidden_states_is_refused(tmp_path: Path, folder: Path) -> None:
    save("bert-classifier", folder)
    with pytest.raises(UsageError, match="does not embed sentences"):
        embedder(folder)


def test_texts_that_cannot_be_read_are_refused(folder: Path) -> None:
    tokenizer = TextTokenizer.open(folder)
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.batch(["w1", "half a pair \ud800"])
    with pytest.raises(UsageError, match="no text"):
        tokenizer.batch([])
    with pytest.raises(UsageError, match="no sentence"):
        embedder(folder).embed([])


def test_rows_are_padded_at_their_end(folder: Path) -> None:
    batch = TextTokenizer.open(folder, max_tokens=8).batch(["w0 w1", "w2"])
    assert batch.ids.tolist() == [[2, 4, 5, 3], [2, 6, 3, 0]]
    assert batch.lengths.tolist() == [4, 3]
    assert batch.cut.tolist() == [False, False]


# -- the command -----------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def embed_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `treadle embed`, with bytes on standard input if given."""
    import treadle.cli

    def run(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["treadle", "embed", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            treadle.cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_the_command_prints_a_vector_a_line(folder: Path, embed_command: Run) -> None:
    code, out, err = embed_command(str(folder), "w0 w1", "w2")
    assert (code, err) == (0, "")
    found = np.array([[float(x) for x in line.split()] for line in out.splitlines()])
    np.testing.assert_allclose(found, embedder(folder).embed(["w0 w1", "w2"]), atol=1e-6)


def test_the_command_reads_lines(folder: Path, embed_command: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("w0 w1\n\n  w2 \n", encoding="utf-8")
    expected = embed_command(str(folder), "w0 w1", "w2")
    assert embed_command(str(folder), "--file", str(tmp_path / "lines.txt")) == expected
    assert embed_command(str(folder), stdin=b"w0 w1\nw2\n") == expected
    code, _, err = embed_command(str(folder), stdin=b"w0 \xff\n")
    assert code == 2
    assert "not UTF-8" in err
    code, _, err = embed_command(str(folder), stdin=b"\n")
    assert code == 2
    assert "there is no sentence" in err


def test_the_command_as_json_and_to_a_file(folder: Path, embed_command: Run, tmp_path: Path) -> None:
    code, out, _ = embed_command(
        str(folder), "w0", "w9 " * 10, "--json", "--similarity", "--output", str(tmp_path / "o")
    )
    assert code == 0
    report = json.loads(out)
    assert [(s["tokens"], s["cut"]) for s in report["sentences"]] == [(3, False), (8, True)]
    vectors = np.load(tmp_path / "o" / "embeddings.npy")
    np.testing.assert_array_equal(vectors, np.array([s["vector"] for s in report["sentences"]], np.float32))
    np.testing.assert_allclose(report["similarity"], vectors @ vectors.T, atol=1e-6)


def test_the_command_tells_which_sentences_were_cut(folder: Path, embed_command: Run) -> None:
    code, out, err = embed_command(str(folder), "w0", "w9 " * 10, "--similarity")
    assert code == 0
    assert err == "truncated to 8 tokens: sentence 2\n"
    assert "1.00" in out


# -- real weights ----------------------------------------------------------------------------------------------

_SUBJECTS = ("A cat", "The old compiler", "Nobody in Zürich", "My neighbour's daughter", "Every third planet")
_ENDINGS = (
    "sleeps on the warm roof.",
    "rewrites the whole program in a single pass!",
    "was late for the train to the coast, again.",
    "costs 1,299.00 dollars, or about 1.200 euros",
    "asked: why is there something rather than nothing?",
    "eats fish, fries and peas",
    "is 12% taller than it was in 2019",
    "sings",
)
SENTENCES = [
    *(f"{subject} {ending}" for subject in _SUBJECTS for ending in _ENDINGS),
    "",
    "word",
    "naïve café, 東京, Привет, \N{GRINNING FACE}",
    "ALL CAPITALS AND   many    spaces",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a, b; c: d - e / f",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "long " * 254,  # 256 tokens with [CLS] and [SEP], the limit
    "longer than the model reads " * 100,
    "<script>alert('x')</script> [MASK] [SEP]",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """MiniLM's folder; skips if it is neither in the cache nor available for download."""
    try:
        return fetch_model("minilm")
    except FrontendError as error:
        pytest.skip(f"minilm cannot be fetched: {error.received}")


@pytest.fixture(scope="module")
def wanted(minilm: Path) -> Array:
    return theirs(minilm, SENTENCES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minilm_embeds_as_sentence_transformers_does(wanted: Array, backend: str) -> None:
    assert len(SENTENCES) == 50
    embedded = embedder("minilm", backend).embed_reporting(SENTENCES)
    assert embedded.vectors.shape == (50, 384)
    assert cosine_distances(embedded.vectors, wanted).max() < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(embedded.vectors, axis=1), 1, rtol=1e-6)
    assert [SENTENCES[i][:6] for i in embedded.cut] == ["longer"]


def test_minilm_in_8_bits_is_near(wanted: Array) -> None:
    """With symmetric rows and no smoothing, the mean distance is 0.0026 (benchmarks/embeddings.py has 500
    sentences).
    """
    if (reason := find_backend("tvm").available()) is not None:
        pytest.skip(f"backend tvm: {reason}")
    few = slice(0, 16)
    made = SentenceEmbedder.open("minilm", backend="tvm", quantize="int8").embed(SENTENCES[few])
    assert cosine_distances(made, wanted[few]).mean() < 1e-3


def test_minilm_knows_what_is_alike(minilm: Path) -> None:
    vectors = embedder(minilm).embed(
        ["A cat is asleep on the sofa.", "A kitten naps on the couch.", "Rain is expected."]
    )
    near = vectors @ vectors.T
    assert near[0, 1] > 0.6
    assert abs(near[0, 2]) < 0.2


def test_the_demo_shows_each_step(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import treadle.demo

    treadle.demo.main()
    said, errors = capsys.readouterr()
    assert not errors
    shown = ("def bert(", "block layer(", "fuse-gelu", 'activation="gelu_tanh"', "agree: max", "1.00", "docs/dsl.md")
    for word in shown:
        assert word in said
    assert "type: ignore" not in said
    assert max(map(len, said.split("\n"))) > 150, "no terminal, so no line is fitted to its width"
    cosines = re.findall(r"agree: max \|difference\| \d\.\de-0[5-9], least cosine ([\d.]+)$", said, re.MULTILINE)
    assert len(cosines) == said.count("least cosine")
    assert all(abs(float(cosine) - 1) < 1e-6 for cosine in cosines)
    assert re.findall(r"^(\d+)  .* ─+$", said, re.MULTILINE) == [str(n + 1) for n in range(8)]


def test_the_demos_equations_are_a_feed_forward_part() -> None:
    import treadle as t
    from treadle.demo import feed_forward

    rng = np.random.default_rng(0)
    shapes = {"norm.weight": (64,), "norm.bias": (64,), "up.weight": (64, 8), "down.weight": (8, 64)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    (got,) = t.compile(feed_forward, weights=weights, hidden=8)(x=x).values()
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    y = (y * weights["norm.weight"] + weights["norm.bias"]) @ weights["up.weight"]
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    np.testing.assert_allclose(got, wide + y @ weights["down.weight"], rtol=1e-5, atol=1e-4)


def test_the_demo_tells_the_time_of_a_run_that_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    import treadle.demo

    now, lasts = [100.0], [90.0, 80.0, 4.0, 1.0, 70.0, 3.0, 2.0]

    def run() -> None:
        now[0] += lasts.pop(0)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert treadle.demo._warm_seconds(run) == 3.0, "the median of the last five times"
    assert not lasts


def test_the_demo_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import treadle.demo

    def unreachable(name: str) -> Path:
        raise FrontendError(f"{name}: cannot download it", hint="the network")

    monkeypatch.setattr("treadle.demo.fetch_model", unreachable)
    with pytest.raises(SystemExit) as ended:
        treadle.demo.main()
    assert ended.value.code == 2
    assert "minilm: cannot download it\n  try       the network" in capsys.readouterr().err


def test_a_model_that_was_not_fetched_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
    with pytest.raises(TreadleError, match="minilm has not been fetched yet") as caught:
        SentenceEmbedder.open("minilm")
    hint = caught.value.hint
    assert (hint, getattr(hint, "command", "")) == ("t.fetch_model('minilm')", "treadle fetch minilm")


def test_a_fetched_model_goes_by_the_name_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("treadle.program.places.fetched_model", {"minilm": folder}.get)
    named = embedder("minilm").model
    assert (named.name, named.graph.name, str(named.graph).split("{")[0].strip()) == (
        "minilm",
        "minilm",
        "graph minilm",
    )
    assert embedder(folder).model.name == "bert", "a folder's model is called by its family"
