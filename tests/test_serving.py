"""The server over HTTP: requests of OpenAI's client, their responses, and error responses to invalid requests."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")

from typer.testing import CliRunner

import treadle as t
from tests.task_models import byte_level
from treadle.cli.application import app
from treadle.continuation import TextWriter
from treadle.ir.errors import UsageError
from treadle.runtime.generation import Token
from treadle.runtime.sampling import Sampling
from treadle.runtime.scheduler import Ended, TextOrder, Ticket
from treadle.runtime.token_rules import TokenRules
from treadle.serving.application import Server
from treadle.serving.models import ServedEmbedder, ServedWriter
from treadle.serving.refusals import RequestRefusal

TEMPLATE = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no such talk') }}{% endif %}"
TEMPLATE += "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if mood %}({{ mood }}){% endif %}assistant:"
KEY = "a-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny GPT-2, a byte-level tokenizer and a chat template."""
    place = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = byte_level()
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # makes logits far from uniform, so that continuations differ
    model.generation_config.repetition_penalty = 1.3  # the folder's rules apply to replies, too
    model.save_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "encoder"
    tokenizer = byte_level()
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).eval().save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


class Running:
    """A server in a separate process."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "treadle", "serve", *words, "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = "".join(iter(self.process.stdout.readline, "}\n")) + "}"
        self.facts: dict[str, Any] = json.loads(said)
        self.address = self.facts["address"]
        self.place = urlsplit(self.address)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """End the server by a signal. Return its exit code and its standard error."""
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=60)
        return self.process.returncode, error

    def post(self, path: str, body: bytes | object, **headers: str) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of the response to a POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, **{"content-type": "application/json", **headers})

    def ask(self, method: str, path: str, data: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self.place.netloc, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/v1{path}", data, named)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text) if text else {}

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=self.address, api_key=options.pop("api_key", "none"), max_retries=0, **options)

    def metrics(self) -> str:
        connection = http.client.HTTPConnection(self.place.netloc, timeout=60)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


@pytest.fixture(scope="module")
def server(folder: Path, encoder: Path) -> Iterator[Running]:
    made = Running(
        str(folder),
        f"vectors={encoder}",
        "--rows",
        "4",
        "--context",
        "64",
        "--body",
        "20000",
        "--queue",
        "40",
        "--reuse",
    )
    yield made
    code, error = made.end()
    assert (code, error) == (0, "")


@pytest.fixture(scope="module")
def writer(folder: Path) -> TextWriter:
    return TextWriter.open(folder)


def said(writer: TextWriter, prompt: str, most: int, **options: Any) -> str:
    return "".join(piece.text for piece in writer.continued([prompt], most=most, **options))


def test_completions_are_the_ones_alone(server: Running, writer: TextWriter) -> None:
    client = server.client()
    prompts = [f"the cat {i} sat" for i in range(24)]

    def ask(number: int) -> Any:
        return client.completions.create(model="tiny", prompt=prompts[number], max_tokens=4 + number, temperature=0)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(len(prompts))))
    for number, each in enumerate(found):
        (choice,) = each.choices
        assert choice.text == said(writer, prompts[number], 4 + number)
        assert choice.finish_reason in ("length", "stop")
        assert each.usage.prompt_tokens == len(writer.tokens([prompts[number]])[0])
        assert each.usage.completion_tokens <= 4 + number
        assert each.model == "tiny"


def test_no_tokens_are_a_text_of_that_length(server: Running) -> None:
    found = server.client().completions.create(model="tiny", prompt="a", max_tokens=0)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "length")


def test_a_stream_gives_the_same_text_in_pieces(server: Running, writer: TextWriter) -> None:
    options = {"model": "tiny", "prompt": "the dog", "max_tokens": 12, "temperature": 0.8, "seed": 5}
    pieces = list(server.client().completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(each.choices[0].text for each in pieces if each.choices)
    assert text == server.client().completions.create(**options).choices[0].text
    assert text == said(writer, "the dog", 12, sampling=Sampling(temperature=0.8, seed=5))
    assert pieces[-1].usage.completion_tokens <= 12
    assert [each.choices[0].finish_reason for each in pieces if each.choices][-1] in ("length", "stop")
    assert len({each.id for each in pieces}) == 1


def test_several_prompts_and_choices_are_told_apart(server: Running, writer: TextWriter) -> None:
    found = server.client().completions.create(
        model="tiny", prompt=["the cat", "a dog"], n=2, max_tokens=6, temperature=1, seed=3
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    first = said(writer, "a dog", 6, sampling=Sampling(temperature=1.0, seed=3))
    assert found.choices[2].text == first
    assert found.choices[0].text != found.choices[1].text
    ids = writer.tokens(["a dog"])[0]
    again = server.client().completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=1, seed=3)
    assert again.choices[0].text == first


def test_shared_prefixes_are_computed_once_and_reported(server: Running, writer: TextWriter) -> None:
    def counted(kind: str) -> int:
        line = next(x for x in server.metrics().splitlines() if x.startswith(f'treadle_tokens_total{{kind="{kind}"'))
        return int(float(line.split()[-1]))

    prompt = "a prompt that several texts go on from"
    before = counted("reused")
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "temperature": 1, "seed": 3}
    found = server.client().completions.create(prompt=[prompt, prompt], n=2, **options)
    size = len(writer.tokens([prompt])[0])
    assert found.usage.prompt_tokens == 2 * size
    assert found.usage.prompt_tokens_details.cached_tokens == size, "of the second time it is given"
    assert counted("reused") - before == 3 * size
    pieces = server.client().completions.create(
        prompt=prompt, stream=True, stream_options={"include_usage": True}, **options
    )
    report = list(pieces)
    assert report[-1].usage.prompt_tokens_details.cached_tokens == size - 1, "the last one's logits are wanted"
    assert "".join(each.choices[0].text for each in report if each.choices) == found.choices[0].text


def test_penalties_stops_and_logarithms(server: Running, writer: TextWriter) -> None:
    whole = said(writer, "the log", 10, rules=TokenRules(presence_penalty=1.5, repetition_penalty=1.2))
    options: dict[str, Any] = {"model": "tiny", "prompt": "the log", "max_tokens": 10, "temperature": 0}
    options |= {"presence_penalty": 1.5, "extra_body": {"repetition_penalty": 1.2}}
    found = server.client().completions.create(**options, logprobs=2).choices[0]
    assert found.text == whole
    report = found.logprobs
    assert len(report.tokens) == len(report.token_logprobs) == len(report.top_logprobs) == len(report.text_offset)
    assert all(p <= 0 for p in report.token_logprobs)
    assert all(len(each) <= 2 for each in report.top_logprobs)
    stop = whole[4:6]
    cut = server.client().completions.create(**options, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_chat_renders_the_folders_template(server: Running, writer: TextWriter) -> None:
    talk = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
    ]
    wanted = said(writer, "system: be kind\nuser: the cat\nassistant:", 8, special=False)
    options: dict[str, Any] = {"model": "tiny", "messages": talk, "max_completion_tokens": 8, "temperature": 0}
    found = server.client().chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert found.message.content == wanted
    assert found.message.role == "assistant"
    assert all(len(each.top_logprobs) == 3 for each in found.logprobs.content)
    assert found.logprobs.content[0].logprob == found.logprobs.content[0].top_logprobs[0].logprob
    pieces = list(server.client().chat.completions.create(**options, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == wanted


def test_embeddings_are_those_of_the_embedder(server: Running, encoder: Path) -> None:
    from treadle.sentence_embedding import SentenceEmbedder

    texts = ["the cat sat", "a dog"]
    wanted = SentenceEmbedder.open(encoder).embed(texts)
    found = server.client().embeddings.create(model="vectors", input=texts)  # the client decodes base64
    np.testing.assert_allclose([each.embedding for each in found.data], wanted, rtol=0, atol=1e-6)
    status, plain = server.post("/embeddings", {"model": "vectors", "input": texts})
    assert status == 200
    np.testing.assert_allclose([each["embedding"] for each in plain["data"]], wanted, rtol=0, atol=1e-6)
    _, packed = server.post("/embeddings", {"model": "vectors", "input": texts, "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(packed["data"][1]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, wanted[1], rtol=0, atol=1e-6)


def test_embeddings_of_token_ids_are_those_of_their_text(server: Running, encoder: Path) -> None:
    """A request has several lists of ids, or a single one."""
    tokens = byte_level()
    texts = ["the cat sat", "a dog", "b"]
    ids = [tokens(text)["input_ids"] for text in texts]
    wanted = server.client().embeddings.create(model="vectors", input=texts)
    found = server.client().embeddings.create(model="vectors", input=ids)
    np.testing.assert_allclose(
        [each.embedding for each in found.data], [each.embedding for each in wanted.data], rtol=0, atol=1e-6
    )
    assert found.usage == wanted.usage
    single = server.client().embeddings.create(model="vectors", input=ids[1])
    np.testing.assert_allclose(single.data[0].embedding, wanted.data[1].embedding, rtol=0, atol=1e-6)


def test_models_are_listed(server: Running) -> None:
    assert [each.id for each in server.client().models.list()] == ["tiny", "vectors"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other' is served"):
        server.client().models.retrieve("other")
    assert server.facts["models"] == [{"name": "tiny", "writes": True}, {"name": "vectors", "writes": False}]


COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "a"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
EMBEDDING: dict[str, Any] = {"model": "vectors", "input": "a"}
WRONG: list[tuple[str, Any, int, str | None, str]] = [
    ("/completions", b"", 400, "invalid_json", "not a JSON object"),
    ("/completions", b"[1]", 400, "invalid_json", "not a JSON object"),
    ("/completions", b'{"model": "tiny"', 400, "invalid_json", "not a JSON object"),
    ("/completions", b"\xff\xfe", 400, "invalid_json", "UTF-8"),
    ("/completions", b'{"a":' * 40 + b"1" + b"}" * 40, 400, "invalid_json", "not a JSON object"),
    ("/completions", {"prompt": "a"}, 400, "model", "model must be the name"),
    ("/completions", {**COMPLETION, "model": "other"}, 404, "model", "no model 'other'"),
    (
        "/completions",
        {**COMPLETION, "model": "vectors"},
        400,
        "model",
        "computes embeddings, and does not generate text",
    ),
    ("/completions", {**COMPLETION, "max_token": 3}, 400, "max_token", "did you mean max_tokens"),
    ("/completions", {**COMPLETION, "max_tokens": -1}, 400, "max_tokens", "max_tokens must be an integer"),
    ("/completions", {**COMPLETION, "max_tokens": True}, 400, "max_tokens", "max_tokens must be an integer"),
    ("/completions", {**COMPLETION, "temperature": 3}, 400, "temperature", "temperature must be a number from 0 to 2"),
    (
        "/completions",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        400,
        "temperature",
        "temperature must be a number",
    ),
    ("/completions", {**COMPLETION, "top_p": "1"}, 400, "top_p", "top_p must be a number"),
    ("/completions", {**COMPLETION, "prompt": [[]]}, 400, "prompt", "prompt must be a string"),
    ("/completions", {**COMPLETION, "prompt": []}, 400, "prompt", "prompt must be a string"),
    ("/completions", {**COMPLETION, "prompt": ["a", 1]}, 400, "prompt", "prompt must be a string"),
    ("/completions", {**COMPLETION, "prompt": [99999]}, 400, "prompt", "not in the vocabulary"),
    ("/completions", {**COMPLETION, "prompt": "the cat " * 80}, 400, "prompt", "a row of the session takes 64"),
    ("/completions", {**COMPLETION, "n": 1000}, 400, "n", "n must be an integer"),
    ("/completions", {**COMPLETION, "prompt": ["a"] * 100, "n": 2}, 400, "n", "asks for 200 texts"),
    (
        "/completions",
        {**COMPLETION, "prompt": ["a"] * 60},
        400,
        None,
        "60 texts at once, and at most 44 may be generated or wait",
    ),
    ("/completions", {**COMPLETION, "best_of": 3}, 400, "best_of", "best_of selects among"),
    ("/completions", {**COMPLETION, "echo": True, "logprobs": 1}, 400, "echo", "echo with logprobs asks for"),
    ("/completions", {**COMPLETION, "logit_bias": {"99999": 1}}, 400, "logit_bias", "token 99999 is not in the voc"),
    ("/completions", {**COMPLETION, "logit_bias": {"5": 101}}, 400, "logit_bias", "numbers from -100 to 100"),
    ("/completions", {**COMPLETION, "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids with numbers"),
    ("/completions", {**COMPLETION, "frequency_penalty": 2.5}, 400, "frequency_penalty", "a number from -2 to 2"),
    ("/completions", {**COMPLETION, "stop_token_ids": [99999]}, 400, "stop_token_ids", "token 99999 is not in the"),
    ("/completions", {**COMPLETION, "stop_token_ids": 5}, 400, "stop_token_ids", "a list of at most 128 token ids"),
    ("/completions", {**COMPLETION, "min_tokens": 5, "max_tokens": 4}, 400, "min_tokens", "at most max_tokens, 4"),
    ("/completions", {**COMPLETION, "ignore_eos": "yes"}, 400, "ignore_eos", "ignore_eos must be true or false"),
    ("/completions", {**COMPLETION, "max_tokens": 65}, 400, "max_tokens", "leaves room for 62: tiny takes 64 tokens"),
    ("/chat/completions", {**CHAT, "max_completion_tokens": 64}, 400, "context_length_exceeded", "leaves room for"),
    ("/chat/completions", {**CHAT, "reasoning_effort": "low"}, 400, "reasoning_effort", "no such variable"),
    (
        "/chat/completions",
        {**CHAT, "chat_template_kwargs": {"thinking": True}},
        400,
        "chat_template_kwargs",
        "chat_template_kwargs.thinking is not supported",
    ),
    (
        "/chat/completions",
        {**CHAT, "chat_template_kwargs": {"messages": []}},
        400,
        "chat_template_kwargs",
        "chat_template_kwargs.messages is not supported",
    ),
    ("/chat/completions", {**CHAT, "chat_template_kwargs": []}, 400, "chat_template_kwargs", "must be an object"),
    ("/completions", {**COMPLETION, "stop": ["a", ""]}, 400, "stop", "nonempty strings"),
    ("/completions", {**COMPLETION, "stream": 1}, 400, "stream", "stream must be true or false"),
    ("/completions", {**COMPLETION, "stream_options": {}}, 400, "stream_options", "needs stream to be true"),
    (
        "/completions",
        {**COMPLETION, "stream": True, "stream_options": {"x": 1}},
        400,
        "stream_options.x",
        "stream_options.x is not a supported field",
    ),
    ("/chat/completions", {"model": "tiny", "messages": []}, 400, "messages", "messages must be a list"),
    ("/chat/completions", {"model": "tiny", "message": CHAT["messages"]}, 400, "message", "did you mean messages"),
    (
        "/chat/completions",
        {**CHAT, "messages": [{"role": "cat", "content": "a"}]},
        400,
        "messages[0].role",
        "messages[0].role must be",
    ),
    (
        "/chat/completions",
        {**CHAT, "messages": [{"role": "user"}]},
        400,
        "messages[0].content",
        "messages[0].content must be a string",
    ),
    (
        "/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        400,
        "messages[0].content[0]",
        "messages[0].content[0] must be of type text or image_url",
    ),
    (
        "/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0].image_url",
        "messages[0].content[0].image_url must be an object with a url",
    ),
    ("/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "bad"}]}, 400, "messages", "no such talk"),
    (
        "/chat/completions",
        {**CHAT, "tools": [{"type": "function"}]},
        400,
        "tools",
        "tools lets the model call functions",
    ),
    (
        "/chat/completions",
        {**CHAT, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "response_format must be text",
    ),
    ("/chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ("/embeddings", {"model": "vectors"}, 400, "input", "input must be a string"),
    ("/embeddings", {**EMBEDDING, "input": [1, "a"]}, 400, "input", "input must be a string, token ids, or a list"),
    ("/embeddings", {**EMBEDDING, "input": [[]]}, 400, "input", "input must be a string, token ids, or a list"),
    ("/embeddings", {**EMBEDDING, "input": ["a", ""]}, 400, "input", "input has an empty text"),
    ("/embeddings", {**EMBEDDING, "input": [1, 10**6]}, 400, "input", "token 1000000 is not in the vocabulary"),
    ("/embeddings", {**EMBEDDING, "input": "the cat sat " * 300}, 400, "input", "a text has more than 40 tokens"),
    ("/embeddings", {**EMBEDDING, "input": ["a", "the cat " * 400]}, 400, "input", "received text number 1"),
    ("/embeddings", {**EMBEDDING, "input": [[2], [1] * 513]}, 400, "input", "a text has more than 40 tokens"),
    ("/embeddings", {**EMBEDDING, "model": "tiny"}, 400, "model", "generates text, and has no embeddings"),
    ("/embeddings", {**EMBEDDING, "dimensions": 8}, 400, "dimensions", "dimensions asks for shorter"),
    ("/embeddings", {**EMBEDDING, "encoding_format": "hex"}, 400, "encoding_format", "float or base64"),
    ("/completions", {**COMPLETION, "prompt": "a" * 30000}, 413, "body_too_large", "more than 20000 bytes"),
]


@pytest.mark.parametrize(("path", "body", "status", "place", "report"), WRONG)
def test_impossible_values_are_refused_with_the_field(
    server: Running, path: str, body: Any, status: int, place: str | None, report: str
) -> None:
    """The error names the invalid field. If no single field is wrong, it has a code."""
    found, answer = server.post(path, body)
    assert found == status, answer
    assert report in answer["error"]["message"]
    assert answer["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert place in (answer["error"]["param"], answer["error"]["code"])
    assert server.post("/completions", {**COMPLETION, "max_tokens": 1})[0] == 200


def test_a_text_that_cannot_be_embedded_is_refused_and_waits_no_longer() -> None:
    class Failing:
        width = 3

        def embed_reporting(self, texts: list[str], truncate: bool) -> Any:
            with pytest.raises(RequestRefusal, match="0 requests are waiting; try again later") as late:
                served.embed(texts)
            assert (late.value.status, late.value.code, late.value.headers) == (429, "queue_full", {"Retry-After": "1"})
            raise UsageError("no such text", received="a", hint="another")

    served = ServedEmbedder("vectors", Failing(), queue=0)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(RequestRefusal, match=r"^no such text; received a; another$") as error:
            served.embed(["a"])
        assert (error.value.status, error.value.field) == (400, "input")


def test_addresses_methods_and_types_that_are_not_there(server: Running) -> None:
    assert server.ask("GET", "/nothing")[0] == 404
    status, answer = server.ask("GET", "/completions")
    assert (status, answer["error"]["message"]) == (405, "this path does not support this method")
    status, answer = server.post("/completions", COMPLETION, **{"content-type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


def test_fields_that_end_a_text(server: Running, writer: TextWriter) -> None:
    """Token ids, a least number of tokens, and texts that go on after the model's end token."""
    client, plain = server.client(), {"model": "tiny", "prompt": "the dog", "max_tokens": 12, "temperature": 0}
    pieces = list(writer.continued(["the dog"], most=12))
    found = client.completions.create(**plain, extra_body={"stop_token_ids": [pieces[4].id]})
    at = next(n for n, piece in enumerate(pieces) if piece.id == pieces[4].id)
    assert found.choices[0].text == "".join(piece.text for piece in pieces[:at]), "without the token that ends it"
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("stop", at + 1)
    later = client.completions.create(**plain, extra_body={"stop_token_ids": [pieces[4].id], "min_tokens": 11})
    assert later.usage.completion_tokens >= 11
    to_end = {**plain, "logit_bias": {"0": 100}}
    assert client.completions.create(**to_end).usage.completion_tokens == 1
    assert client.completions.create(**to_end, extra_body={"min_tokens": 3}).usage.completion_tokens == 4
    on = client.completions.create(**to_end, extra_body={"ignore_eos": True, "repetition_penalty": 1})
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (12, "length")


def test_penalties_by_count_and_biases(server: Running, writer: TextWriter) -> None:
    client, plain = server.client(), {"model": "tiny", "prompt": "the log", "max_tokens": 16, "temperature": 0}
    rules = TokenRules(repetition_penalty=1.3, frequency_penalty=1.9)
    found = client.completions.create(**plain, frequency_penalty=1.9)
    assert found.choices[0].text == said(writer, "the log", 16, rules=rules)
    assert found.choices[0].text != client.completions.create(**plain).choices[0].text
    token = 40
    biased = client.completions.create(
        **plain, logit_bias={str(token): 100}, extra_body={"repetition_penalty": 1}, logprobs=0
    )
    assert biased.choices[0].text == writer.tokenizer.text([token] * 16)
    assert biased.choices[0].logprobs.token_logprobs[0] < -1, "the model's own probability"
    talk = client.chat.completions.create(
        model="tiny", messages=CHAT["messages"], max_tokens=3, logit_bias={str(token): 100}, temperature=0,
        frequency_penalty=0.5, extra_body={"repetition_penalty": 1},
    )  # fmt: skip
    assert talk.choices[0].message.content == writer.tokenizer.text([token] * 3)


@pytest.mark.parametrize("ids", [False, True])
def test_a_completion_repeats_its_prompt(server: Running, writer: TextWriter, ids: bool) -> None:
    prompts: Any = ["the cat", "a dog"]
    options = {"model": "tiny", "max_tokens": 4, "temperature": 0, "echo": True, "n": 2}
    options["prompt"] = [list(row) for row in writer.tokens(prompts)] if ids else prompts
    wanted = [prompt + said(writer, prompt, 4) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in server.client().completions.create(**options).choices] == wanted
    found = dict.fromkeys(range(4), "")
    for piece in server.client().completions.create(**options, stream=True):
        found[piece.choices[0].index] += piece.choices[0].text
    assert list(found.values()) == wanted
    alone = server.client().completions.create(model="tiny", prompt="the cat", max_tokens=0, echo=True)
    assert (alone.choices[0].text, alone.usage.completion_tokens) == ("the cat", 0)


def test_fields_without_effect_and_variables_of_the_template(server: Running, writer: TextWriter) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": CHAT["messages"], "max_completion_tokens": 5}
    options |= {"temperature": 0, "prompt_cache_key": "k", "safety_identifier": "s", "store": False, "user": "u"}
    plain = server.client().chat.completions.create(**options, reasoning_effort="none").choices[0].message.content
    assert plain == said(writer, "user: a\nassistant:", 5, special=False)
    loud = server.client().chat.completions.create(**options, extra_body={"chat_template_kwargs": {"mood": "loud"}})
    assert loud.choices[0].message.content == said(writer, "user: a\n(loud)assistant:", 5, special=False)


def test_tokens_of_texts_and_texts_of_tokens(server: Running, writer: TextWriter) -> None:
    def post(path: str, body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(server.place.netloc, timeout=60)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    ids = list(writer.tokens(["the cat"])[0])
    expected = {"count": len(ids), "max_model_len": 64, "tokens": ids}
    assert post("/tokenize", {"model": "tiny", "prompt": "the cat"}) == (200, expected)
    assert post("/detokenize", {"model": "tiny", "tokens": ids}) == (200, {"prompt": "the cat"})
    assert post("/detokenize", {"model": "tiny", "tokens": []}) == (200, {"prompt": ""})
    rendered = list(writer.tokens(["user: a\nassistant:"], special=False)[0])
    assert post("/tokenize", {"model": "tiny", "messages": CHAT["messages"]})[1]["tokens"] == rendered
    for path, body, field in (
        ("/tokenize", {"model": "tiny"}, "messages"),
        ("/tokenize", {"model": "vectors", "prompt": "a"}, "model"),
        ("/detokenize", {"model": "tiny"}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [99999]}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [1], "other": 1}, "other"),
    ):
        status, answer = post(path, body)
        assert (status, answer["error"]["param"]) == (400, field)


def test_each_answer_has_an_id(server: Running) -> None:
    client = server.client()
    given = client.completions.with_raw_response.create(
        model="tiny", prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "abc-1"}
    )
    assert given.headers["x-request-id"] == "abc-1"
    drawn = [client.completions.create(model="tiny", prompt="a", max_tokens=1)._request_id for _ in range(2)]
    assert len({*drawn}) == 2
    assert all(len(each) == 32 for each in drawn)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=99, extra_headers={"X-Request-Id": "a b"})
    assert len(caught.value.request_id or "") == 32, "an id with a space is replaced"


def test_requests_beyond_the_queue_are_asked_to_retry(server: Running, writer: TextWriter) -> None:
    def size(seed: int) -> int:
        return len(list(writer.continued(["a"], most=60, sampling=Sampling(temperature=1.0, seed=seed))))

    seed = next(seed for seed in range(50) if size(seed) == 60)  # this seed's text does not end earlier by itself
    options = {**COMPLETION, "prompt": ["a"] * 40, "max_tokens": 60, "temperature": 1, "seed": seed}
    first = server.client().completions.create(**options, stream=True)
    next(iter(first))  # waits for the first token
    with pytest.raises(openai.RateLimitError, match="texts wait; try again later") as caught:
        server.client().completions.create(**options)
    assert caught.value.response.headers["retry-after"] == "1"
    assert len({each.choices[0].index for each in first}) == 40


def test_requests_of_closed_connections_are_cancelled(server: Running) -> None:
    """If the client disconnects, the request's rows are free before its texts would have ended."""

    def generated() -> float:
        line = next(x for x in server.metrics().splitlines() if x.startswith('treadle_tokens_total{kind="generated"'))
        return float(line.split()[-1])

    def rows() -> float:
        return next(float(x.split()[-1]) for x in server.metrics().splitlines() if x.startswith("treadle_rows{"))

    for stream in (True, False):
        data = json.dumps({**COMPLETION, "max_tokens": 60, "stream": stream, "prompt": ["a"] * 4, "n": 8}).encode()
        connection = socket.create_connection((server.place.hostname, server.place.port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        before = generated()
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        while generated() == before:
            time.sleep(0.002)
        connection.close()
        until = time.monotonic() + 30
        while rows() and time.monotonic() < until:
            time.sleep(0.01)
        assert rows() == 0
        assert generated() - before < 32 * 60


def test_events_that_are_ready_go_out_at_once_and_the_loop_has_turns(writer: TextWriter) -> None:
    """The event loop notices a disconnected client only between two parts of a body, so no two parts are sent in one
    turn of the loop.
    """
    served = ServedWriter("tiny", writer, rows=1, capacity=64, queue=4)

    def submit(orders: list[tuple[TextOrder, Any]]) -> list[Ticket]:
        """Report all tokens at once, like a scheduler that is faster than the event loop."""
        for _, tell in orders:
            for number in range(40):
                tell(Token(0, 5 + number, "count" if number == 39 else None))
            tell(Ended())
        return [Ticket(order, tell) for order, tell in orders]

    served.scheduler.submit = submit  # type: ignore[method-assign, assignment]
    turn, sent = 0, list[tuple[int, bytes]]()

    async def ask() -> None:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            nonlocal turn
            turn += 1
            loop.call_soon(tick)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and message["body"]:
                sent.append((turn, message["body"]))

        body = json.dumps({**CHAT, "n": 2, "stream": True, "stream_options": {"include_usage": True}}).encode()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return parts.pop() if parts else await asyncio.Event().wait()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "query_string": b"",
            "path": "/v1/chat/completions", "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        tick()
        await Server([served]).application()(scope, receive, send)

    asyncio.run(ask())
    events = b"".join(part for _, part in sent).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert len(events) == 2 + 2 * 40 + 1 + 1 + 1
    assert len(sent) == 2, "what was there at once, and the end"
    assert sent[0][0] < sent[1][0]


def test_a_key_is_asked_for_and_a_late_answer_is_cut(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    server = Running(str(folder), "--key-file", str(tmp_path / "key"), "--seconds", "0.1", "--rows", "1")
    with pytest.raises(openai.AuthenticationError, match="needs an API key"):
        server.client(api_key="another").models.list()
    assert server.ask("GET", "/models")[0] == 401
    client = server.client(api_key=KEY)
    assert client.models.list().data[0].id == "tiny"
    with pytest.raises(openai.APIStatusError, match="exceeded the time limit") as caught:
        client.completions.create(model="tiny", prompt=["a"] * 100, max_tokens=90)
    assert caught.value.status_code == 408
    assert server.end(signal.SIGINT)[0] == 0


def test_a_shutdown_lets_answers_end(folder: Path) -> None:
    server = Running(str(folder))
    pieces = server.client().completions.create(
        model="tiny", prompt="the cat", max_tokens=80, temperature=1, stream=True
    )
    next(iter(pieces))
    server.process.send_signal(signal.SIGTERM)
    last = [each.choices[0].finish_reason for each in pieces][-1]
    assert last in ("length", "stop")
    assert server.process.wait(30) == 0


def test_a_drain_refuses_new_requests_and_does_not_wait_for_idle_connections(folder: Path, tmp_path: Path) -> None:
    """While a stream ends after SIGTERM, the server is not ready. A connection without a request, and requests of
    which a part has arrived, do not delay the exit.
    """
    log = tmp_path / "requests.log"
    server = Running(str(folder), "--log", "json", "--log-file", str(log), "--cors", "https://example.org")
    place = (server.place.hostname, server.place.port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    half = [socket.create_connection(place, timeout=60) for _ in range(3)]
    half[1].sendall(head.encode())
    half[2].sendall(f"{head}\r\n{{".encode())
    ready = http.client.HTTPConnection(server.place.netloc, timeout=60)
    ready.request("GET", "/ready", headers={"Origin": "https://example.org"})
    response = ready.getresponse()
    assert (response.status, response.read()) == (200, b'{"status":"ready"}')
    assert response.headers["access-control-allow-origin"] == "https://example.org"
    ready.request("GET", "/version")
    assert json.loads(ready.getresponse().read()) == {"version": t.__version__}
    pieces = server.client().completions.create(
        model="tiny", prompt="the cat", max_tokens=80, temperature=0, stream=True, extra_body={"ignore_eos": True},
        extra_headers={"X-Request-Id": "last"},
    )  # fmt: skip
    next(iter(pieces))
    server.process.send_signal(signal.SIGTERM)
    assert half[2].recv(12) == b"HTTP/1.1 503"
    assert [each.choices[0].finish_reason for each in pieces][-1] == "length"
    code, error = server.end()
    assert (code, error) == (0, "")
    lines = {line["id"]: line for line in map(json.loads, log.read_text().splitlines())}
    facts = lines["last"]
    assert (facts["status"], facts["path"], facts["model"]) == (200, "/v1/completions", "tiny")
    assert (facts["completion_tokens"], facts["finish_reasons"]) == (80, ["count"])
    assert 0 <= facts["queue_seconds"] <= facts["first_token_seconds"] <= facts["seconds"]
    assert {line["status"] for line in lines.values()} == {200, 503}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_server_says_what_it_has_and_who_may_ask(
    folder: Path, encoder: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treadle.serving.running.serve", lambda *_, ready, **given: ready(f"http://{given['host']}/v1"))
    words = ["serve", str(folder), f"vectors={encoder}", "--rows", "3", "--context", "64", "--host", host]
    report = CliRunner().invoke(app, words).stderr.splitlines()
    assert report[0].startswith("tiny: 3 rows of 64 tokens, ")
    assert report[1] == "vectors: embeddings of 32 numbers"
    assert ("--key-file" in report[2]) == (host == "0.0.0.0")
    assert report[-1] == f"serving at http://{host}/v1"


@pytest.mark.parametrize(
    ("words", "report"),
    [
        (["{folder}", "{folder}"], "two models would be served as tiny"),
        (["={folder}"], "a model needs a name"),
        (["{folder}", "--host", "256.1.1.1"], "cannot listen at 256.1.1.1"),
        (["{folder}", "--key-file", "{empty}"], "has no key"),
        (["nothing-here"], "nothing-here"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(folder: Path, tmp_path: Path, words: list[str], report: str) -> None:
    (tmp_path / "empty").write_text("\n")
    given = [word.format(folder=folder, empty=tmp_path / "empty") for word in words]
    command = [sys.executable, "-m", "treadle", "serve", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert report in done.stderr


def test_changed_requests_are_answered_or_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Randomly changed requests are answered or rejected. A short version of tests/fuzz/requests.py."""
    from tests.fuzz import requests

    monkeypatch.setattr(sys, "argv", ["requests", "--count", "300"])
    code = requests.main()
    assert code == 0, capsys.readouterr().out
