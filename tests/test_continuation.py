"""Text generation with a model and its tokenizer: the same text as Hugging Face's, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle as t
from tests.task_models import byte_level
from treadle.cli import app
from treadle.continuation import GrowingText, TextWriter, need_for_text
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, FrontendError, Hint, UsageError
from treadle.runtime.beams import Beams
from treadle.runtime.sampling import Sampling
from treadle.runtime.stop_strings import StopStrings
from treadle.runtime.token_rules import TokenRules

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = ["the cat sat on the mat and the dog sat on the log", "a café is a naïve façade", "what is the name of the cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with random weights and a byte-level tokenizer trained on a few lines."""
    place = tmp_path_factory.mktemp("model")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXT, vocab_size=300, special_tokens=["<end>"])
    made.save(str(place / "tokenizer.json"))
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=made.get_vocab_size(), n_positions=40, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # far from uniform logits, so that a continuation is not arbitrary
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_greedy_continues_as_hugging_face_does(folder: Path, backend: str) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    writer = TextWriter.open(folder, backend=backend)
    assert writer.end == (0,)
    prompts = ["the cat", "a", "what is the name"]
    pieces = list(writer.continued(prompts, most=12))
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        mask = torch.ones_like(ids)
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = wanted[0, ids.shape[1] :].tolist()
        assert [p.id for p in pieces if p.row == row] == new
        assert "".join(p.text for p in pieces if p.row == row) == tokenizer.decode(new)


def said_by_file(folder: Path, place: Path, **said: Any) -> Path:
    """Return the folder with another generation_config.json."""
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **said}))
    return place


RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": [int(n) for n in range(1, 250)]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [int(n) for n in range(1, 250)]},
    "bad_words_ids": {"bad_words_ids": [[0], *([n] for n in range(1, 200)), *([250, n] for n in range(200, 270))]},
    "min_new_tokens": {"min_new_tokens": 7, "eos_token_id": list(range(200))},
    "min_length": {"min_length": 9, "eos_token_id": list(range(200))},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "all": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [5], "bad_words_ids": [[4], [6, 9]],
        "min_new_tokens": 4, "forced_eos_token_id": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_token_rules_of_a_folder_match_hugging_face(folder: Path, name: str, tmp_path: Path) -> None:
    place, prompts = said_by_file(folder, tmp_path, **RULES[name]), ["the cat", "a", "what is the name"]
    model = transformers.GPT2LMHeadModel.from_pretrained(place).eval()
    writer = TextWriter.open(place)
    greedy = list(writer.continued(prompts, most=12))
    plain = list(TextWriter.open(folder).continued(prompts, most=12))
    assert [p.id for p in greedy] != [p.id for p in plain], "the option changes something"
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(writer.tokens([prompt]))
        mask, count = torch.ones_like(ids), ids.shape[1]
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(ids, **options)[0, count:].tolist()
        assert [p.id for p in greedy if p.row == row] == wanted
    beams = Beams(3)
    for prompt, (best, *_) in zip(prompts, writer.searched(prompts, most=8, beams=beams), strict=True):
        ids = torch.tensor(writer.tokens([prompt]))
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert list(best.tokens) == model.generate(ids, num_beams=3, **options)[0, ids.shape[1] :].tolist()


def test_rules_of_the_caller_go_before_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    place = said_by_file(folder, tmp_path, repetition_penalty=1.8, suppress_tokens=[], forced_bos_token_id=3)
    writer, plain = TextWriter.open(place), TextWriter.open(folder)
    assert writer.asked.options == {"repetition_penalty": 1.8}, "what changes nothing is not among them"
    one, other = (list(w.continued(["the cat"], most=9, rules=TokenRules())) for w in (writer, plain))
    assert one == other
    assert writer.asked.but(repetition_penalty=None).rules == TokenRules(repetition_penalty=1.8)
    changed = writer.asked.but(repetition_penalty=1.2, presence_penalty=0.5)
    assert (changed.rules, changed.options) == (TokenRules(1.2, 0.5), {})


def test_the_command_says_what_the_folder_asks(folder: Path, tmp_path: Path) -> None:
    place = said_by_file(folder, tmp_path, repetition_penalty=1.8, suppress_tokens=[5, 6])
    done = CliRunner().invoke(app, ["generate", str(place), "the cat", "--tokens", "5"])
    assert "from generation_config.json: repetition_penalty 1.8, suppress_tokens [5, 6]\n" in done.stderr
    call = ["generate", str(place), "the cat", "--tokens", "5", "--repetition-penalty", "1.0"]
    assert "from generation_config.json: suppress_tokens [5, 6]\n" in CliRunner().invoke(app, call).stderr
    report = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert report["from_folder"] == {"file": "generation_config.json", "options": {"suppress_tokens": [5, 6]}}
    assert report["sampling"]["repetition_penalty"] == 1.0
    report = json.loads(CliRunner().invoke(app, ["generate", str(place), "the cat", "--tokens", "5", "--json"]).stdout)
    assert report["sampling"]["repetition_penalty"] == 1.8
    plain = CliRunner().invoke(app, ["generate", str(folder), "the cat", "--tokens", "5"])
    assert "generation_config" not in plain.stderr


def test_a_list_of_prompts_gives_a_list_of_texts(folder: Path) -> None:
    model = t.load(folder)
    alone = [model.generate(prompt, most=6) for prompt in ("the cat", "a dog")]
    assert model.generate(["the cat", "a dog"], most=6) == alone
    assert model.generate(["a dog"], most=6) == alone[1:]
    beams = Beams(2, best=2)
    assert model.search(["the cat", "a dog"], most=4, beams=beams)[1] == model.search("a dog", most=4, beams=beams)
    assert model.search("a dog", most=4, beams=2) == model.search("a dog", most=4, beams=Beams(2))
    assert model.search("a dog", most=4) == model.search("a dog", most=4, beams=Beams())
    wrong: Any = [["the cat", "a dog"]]
    with pytest.raises(UsageError, match="prompts must be a string or a list of strings"):
        model.generate(wrong)
    with pytest.raises(UsageError, match="prompt must be a string"):
        model.stream(wrong[0])


def test_models_that_are_not_causal_are_named_as_what_they_are(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="does not continue text: it is not a causal language model") as caught:
        TextWriter.open(tmp_path)
    hint = caught.value.hint
    assert isinstance(hint, Hint) and "the methods embed, classify" in hint and "treadle embed" in hint.command


def test_packages_that_are_missing_are_named_together_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no GGUF file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FrontendError, match="needs the packages tokenizers, gguf, jinja2") as caught:
        need_for_text(tmp_path / "a.gguf", chat=True)
    assert str(caught.value.hint) == "pip install '.[text,gguf,chat]'"
    with pytest.raises(FrontendError, match="needs the package tokenizers"):
        TextWriter.open(folder)
    done = CliRunner().invoke(app, ["chat", str(folder)], input="hi\n")
    assert done.exit_code == 2 and ".[text,chat]" in done.stderr


def test_text_streams_in_whole_characters(folder: Path) -> None:
    writer = TextWriter.open(folder)
    for seed in range(5):
        pieces = list(writer.continued(["a caf"], most=20, sampling=Sampling(temperature=2.0, seed=seed)))
        text = writer.tokenizer.text([p.id for p in pieces])
        assert "".join(p.text for p in pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in p.text for p in pieces if not p.last and p.text not in text)


def test_the_same_seed_writes_the_same_text(folder: Path) -> None:
    writer = TextWriter.open(folder)

    def written(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return "".join(p.text for p in writer.continued(["the"], most=16, sampling=sampling))

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(4)}) > 1


def test_a_prompt_that_fills_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="the model takes 40"):
        list(TextWriter.open(folder).continued(["the cat sat on the mat " * 20], most=1))


def test_an_end_token_that_is_no_id(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "zero"}')
    with pytest.raises(CheckpointError, match="eos_token_id must be a token id"):
        TextWriter.open(tmp_path)


def test_the_command_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app, ["generate", str(folder), "the cat", "a", "--tokens", "5", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["tokens_per_second"] > 0
    assert report["seconds_to_first_token"] > 0
    writer = TextWriter.open(folder)
    for row, text in enumerate(report["texts"]):
        wanted = [p for p in writer.continued(["the cat", "a"], most=5) if p.row == row]
        assert text["tokens"] == [p.id for p in wanted]
        assert text["text"] == "".join(p.text for p in wanted)
    refused = CliRunner().invoke(app, ["generate", str(folder), "x", "--temperature", "-1"])
    assert refused.exit_code == 2


# -- the command -----------------------------------------------------------------------------------------------


def generated(*words: str) -> Any:
    return CliRunner().invoke(app, ["generate", *words])


def test_a_prompt_that_is_refused_is_not_echoed(folder: Path) -> None:
    for prompt, what in (("", "has no tokens"), ("the cat sat on the mat " * 20, "the model takes 40")):
        done = generated(str(folder), prompt)
        assert (done.exit_code, done.stdout) == (2, "")
        assert what in done.stderr
        report = generated(str(folder), "a", prompt, "--json")
        assert what in json.loads(report.stdout)["error"]["what"]
        assert "prompt 2 of 2" in json.loads(report.stdout)["error"]["what"]


def test_a_line_ends_before_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UsageError("no token can be chosen")

    monkeypatch.setattr(Sampling, "choose", fail)
    done = generated(str(folder), "the cat")
    assert done.exit_code == 2
    assert done.output == "the cat\nno token can be chosen\n"


@pytest.mark.parametrize(
    ("prompt", "words", "ending", "reason"),
    [
        ("the cat", ["--tokens", "3"], "count", "stopped after 3 tokens: the limit of --tokens"),
        ("a " * 19, ["--tokens", "40"], "context", "the model's context is full"),
        ("the cat", ["--tokens", "40"], "end", "the model ended the text"),
    ],
)
def test_it_says_why_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, words: list[str], ending: str, reason: str
) -> None:
    choose = Sampling.choose

    def chosen(self: Sampling, scores: object, *, row: int = 0, step: int = 0) -> int:
        # 0 is the end token
        return 0 if ending == "end" and step == 2 else choose(self, scores, row=row, step=step) or 1

    monkeypatch.setattr(Sampling, "choose", chosen)
    done = generated(str(folder), prompt, *words)
    assert done.exit_code == 0
    assert reason in done.stderr
    assert "tokens per second" in done.stderr
    assert "stopped" not in done.stdout
    assert json.loads(generated(str(folder), prompt, *words, "--json").stdout)["texts"][0]["ending"] == ending
    both = generated(str(folder), prompt, prompt, *words)
    assert "text 2: stopped after" in both.stderr


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_model_that_ends_at_once_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
    (tmp_path / place).write_text(text, encoding="utf-8")
    monkeypatch.setattr(Sampling, "choose", lambda *_, **__: 0)
    assert "It is a chat model: --chat puts the prompt into its chat template, which adds <end>" in (
        generated(str(tmp_path), "the cat").stderr
    )
    assert json.loads(generated(str(tmp_path), "the cat", "--json").stdout)["chat_template"] is True
    assert "chat" not in generated(str(folder), "the cat").stderr


def test_unknown_families_are_reported_before_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for file in folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "model_type is 'strange'" in generated(str(tmp_path), "the cat").stderr
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "strange")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "general.architecture is not supported" in generated(str(tmp_path / "m.gguf"), "the cat").stderr


def test_a_folder_with_an_older_vocabulary_says_how_to_make_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if the kind of the tokenizer were unknown
    monkeypatch.setattr("treadle.frontends.vocabularies.folder_vocabulary.build_older_tokenizer", lambda *_: None)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertConfig(vocab_size=len(words)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json") as refused:
        TextTokenizer.open(tmp_path)
    assert refused.value.received == "vocab.txt"
    first, *program = refused.value.hint.splitlines()
    assert "transformers" in first
    exec("\n".join(program), {})
    assert TextTokenizer.open(tmp_path).batch(["cat sat"]).ids.tolist() == [[2, 5, 6, 3]]


# -- choosing tokens -----------------------------------------------------------------------------------------------


def test_a_stop_string_ends_a_text_and_is_held_back_while_it_may_come(folder: Path) -> None:
    writer = TextWriter.open(folder)
    (whole,) = ["".join(p.text for p in writer.continued(["the cat"], most=20))]
    assert len(whole) > 6
    for stop in (whole[3:6], whole[2:5], whole[4]):
        pieces = list(writer.continued(["the cat", "a"], most=20, stop=["\0", stop]))
        first = [p for p in pieces if p.row == 0]
        assert "".join(p.text for p in first) == whole[: whole.index(stop)]
        assert first[-1].ending == "stop"
        report = ""
        for piece in first:
            report += piece.text
            assert whole[: whole.index(stop)].startswith(report)
    alone = [p.text for p in writer.continued(["a"], most=20)]
    assert "".join(alone) == "".join(
        p.text for p in writer.continued(["the cat", "a"], most=20, stop=[whole[3:6] + "\0"]) if p.row == 1
    )


def test_probabilities_are_those_of_the_whole_text(folder: Path) -> None:
    done = json.loads(generated(str(folder), "the cat", "--tokens", "4", "--logprobs", "3", "--json").stdout)
    (text,) = done["texts"]
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    writer = TextWriter.open(folder)
    (prompt,) = writer.tokens(["the cat"])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text["tokens"]])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits, -1)
    assert len(text["logprobs"]) == 4
    for report, row, token in zip(text["logprobs"], wanted, text["tokens"], strict=True):
        assert report["token"] == token
        assert report["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        best = torch.topk(row, 3)
        assert [each["token"] for each in report["likely"]] == best.indices.tolist()
        assert [each["logprob"] for each in report["likely"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    shown = generated(str(folder), "the cat", "--tokens", "4", "--logprobs", "1").stdout.splitlines()
    assert f"{text['logprobs'][0]['logprob']:.4f}" in shown[-5]


def test_beams_of_the_command_are_those_of_hugging_face(folder: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    words = ["the cat", "--tokens", "8", "--beams", "4", "--best", "3", "--length-penalty", "0.5"]
    (text,) = json.loads(generated(str(folder), *words, "--json").stdout)["texts"]
    (prompt,) = TextWriter.open(folder).tokens(["the cat"])
    ids = torch.tensor([prompt])
    wanted = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.5,
        do_sample=False,
        pad_token_id=0,
    )
    for found, row in zip(text["found"], wanted[:, len(prompt) :].tolist(), strict=True):
        assert found["tokens"] == row[: len(found["tokens"])]
        assert set(row[len(found["tokens"]) :]) <= {0}
    assert "score" in generated(str(folder), *words).stderr
    assert "only --beams accepts --best" in generated(str(folder), "the", "--best", "2").stderr
    assert "only --chat accepts --system" in generated(str(folder), "the", "--system", "x").stderr
    assert "does not accept --stop" in generated(str(folder), *words, "--stop", "x").stderr


def test_speculation_gives_the_same_text_and_says_what_was_right(folder: Path) -> None:
    prompt = "the cat sat on the mat and the cat sat on"
    plain = json.loads(generated(str(folder), prompt, "--tokens", "20", "--json").stdout)
    for words in (["--speculate"], ["--draft", str(folder)]):
        report = json.loads(generated(str(folder), prompt, "--tokens", "20", "--json", *words).stdout)
        assert report["texts"] == plain["texts"]
        assert report["speculation"]["accepted"] <= report["speculation"]["guessed"]
        assert report["speculation"]["made"] == len(report["texts"][0]["tokens"])
        assert "of the model" in generated(str(folder), prompt, "--tokens", "20", *words).stderr
    assert report["speculation"]["accepted_length"] > 1, "guesses of a model for itself are right"


def test_a_draft_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["strange"] = data["model"]["vocab"].pop("!")
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert "must have the same vocabulary" in generated(str(folder), "the", "--draft", str(tmp_path)).stderr


def test_penalties_of_the_command_are_those_of_hugging_face(folder: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    (prompt,) = TextWriter.open(folder).tokens(["the cat"])
    ids = torch.tensor([prompt])
    wanted = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        repetition_penalty=1.4,
        do_sample=False,
        pad_token_id=0,
    )
    words = ["the cat", "--tokens", "12", "--repetition-penalty", "1.4", "--json"]
    (text,) = json.loads(generated(str(folder), *words).stdout)["texts"]
    assert text["tokens"] == wanted[0, len(prompt) :].tolist()
    plain = json.loads(generated(str(folder), "the cat", "--tokens", "12", "--json").stdout)
    assert plain["texts"][0]["tokens"] != text["tokens"]


def test_the_command_chooses_tokens_on_the_device(folder: Path) -> None:
    options = ["--backend", "torch", "--tokens", "6", "--temperature", "0.9", "--seed", "3"]
    host, device = (
        CliRunner().invoke(app, ["generate", str(folder), "the cat", "a", *options, *more])
        for more in ([], ["--device-sampling"])
    )
    assert device.exit_code == 0, device.output
    assert device.stdout == host.stdout
    for more in (["--logprobs", "0"], ["--speculate"], ["--beams", "2"]):
        refused = CliRunner().invoke(app, ["generate", str(folder), "a", "--device-sampling", *more])
        assert refused.exit_code == 2 and "device" in refused.output, refused.output


class CountedTokenizer:
    """A tokenizer that records the number of tokens of each call of `text`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.sizes: list[int] = []

    def text(self, ids: Any) -> str:
        self.sizes.append(len(ids))
        return str(self.tokenizer.text(ids))


@pytest.mark.parametrize("seed", range(6))
def test_a_growing_text_decodes_its_tail_only(folder: Path, seed: int) -> None:
    """The pieces of a text, of characters of several bytes and of random ids, are the decoded text. The number of
    tokens decoded at a time does not grow with the text.
    """
    tokenizer = TextTokenizer.open(folder, cut=False)
    rng = np.random.default_rng(seed)
    letters = np.concatenate([np.arange(32, 127), np.arange(0x400, 0x430), np.arange(0x1F600, 0x1F640)])
    text = "".join(map(chr, rng.choice(letters, 300)))
    ids = rng.integers(1, 200, 600).tolist() if seed % 2 else tokenizer.ids([text])[0]
    counted = CountedTokenizer(tokenizer)
    growing, found = GrowingText(counted, StopStrings(["~~~~"])), ""  # type: ignore[arg-type]
    for number, token in enumerate(ids, 1):
        assert not growing.add(token)
        found += growing.tell(number == len(ids))
    assert found == tokenizer.text(ids)
    assert len(ids) > 250
    assert max(counted.sizes) < 60


def test_a_stop_string_that_begins_in_settled_text_is_found(folder: Path) -> None:
    tokenizer = TextTokenizer.open(folder, cut=False)
    stop = "z" * 90  # longer than the tail
    ids = tokenizer.ids(["a" * 100 + stop[1:] + "b" + stop + "c"])[0]
    growing, found = GrowingText(tokenizer, StopStrings([stop])), ""
    for token in ids:
        ends = growing.add(token)
        found += growing.tell(ends)
        if ends:
            break
    assert found == "a" * 100 + stop[1:] + "b"


class ByteTokenizer:
    """A tokenizer of bytes. If the bytes are not valid UTF-8 together, each becomes a replacement character, as in a
    vocabulary with byte fallback.
    """

    def text(self, ids: Any) -> str:
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(ids)


def test_characters_of_a_vocabulary_with_byte_fallback_are_whole() -> None:
    text = "".join(chr(0x1F600 + n % 64) + "é" * (n % 3) for n in range(80))
    growing = GrowingText(ByteTokenizer(), StopStrings())  # type: ignore[arg-type]
    found = []
    for token in text.encode():
        growing.add(token)
        found.append(growing.tell(False))
    assert "".join(found) == text
    assert max(map(len, found)) == 1, "each character is returned with its last byte"
