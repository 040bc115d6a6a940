"""Fuzzing the server's requests: the answer to any request is either the requested result, or a 4xx with the reason.

    python -m tests.fuzz.requests [--count 10000] [--seed 0]

Valid bodies of completions, chats and embeddings are changed: members dropped, copied, renamed and given values of
other types, numbers made extreme, texts long or odd. Then some have bytes flipped, cut or copied, and some come with
other headers, methods and addresses. A request fails the run if it raises, or if the answer is 5xx or a body that is
not the server's JSON. The run also fails if a row of the cache stays occupied, or if valid requests in between get
other answers than at first. Exit status 1 if any fails.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.fuzz.campaign import Tally, options_of, scrambled
from tests.task_models import byte_level
from treadle.serving.application import Limits, Server
from treadle.serving.models import Opening, Served

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a dog"}], "max_tokens": 2}
EMBEDDING: dict[str, Any] = {"model": "vectors", "input": ["the cat", "a dog"]}
MORE: dict[str, Any] = {
    "n": 2, "stream": True, "stream_options": {"include_usage": True}, "stop": ["x", "yz"], "seed": 3, "top_p": 0.5,
    "top_k": 4, "min_p": 0.1, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 2, "echo": False,
    "logit_bias": {"5": 1.5}, "user": "u", "best_of": 1, "suffix": None, "frequency_penalty": 0.5, "ignore_eos": True,
    "min_tokens": 1, "stop_token_ids": [7], "prompt_cache_key": "k", "chat_template_kwargs": {},
    "reasoning_effort": "low",
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, "", "a", "\x00", "😀" * 3,
    "a" * 3000, [], [[]], {}, {"a": 1}, [None], ["", "a"], [1, "a"], [[1], [2]], [1, 2], [10**9], [[["a"]]],
    {"role": "user"}, [{"role": "user", "content": ["a"]}], "\ufeff", "NaN",
)  # fmt: skip
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/v1/embeddings": EMBEDDING}


def serve_tiny(place: Path) -> list[Served]:
    """Draw and open a tiny model that generates, and a tiny model that embeds."""
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    writes = transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, **sizes)
    embeds = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name, model in (("tiny", transformers.GPT2LMHeadModel(writes)), ("vectors", transformers.BertModel(embeds))):
        model.eval().save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    opening = Opening(rows=4, capacity=64, queue=64, resumes=True)
    return [opening.open(str(place / name)) for name in ("tiny", "vectors")]


def changed(rng: random.Random) -> tuple[str, str, str, bytes, list[tuple[bytes, bytes]]]:
    """Change a valid request. Return a description of the changes, and a method, an address, a body and headers."""
    path = rng.choice(list(ROUTES))
    body: dict[str, Any] = json.loads(json.dumps(ROUTES[path]))
    for name in rng.sample(list(MORE), rng.choice((0, 0, 1, 2, 4))):
        body[name] = MORE[name]
    changes = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(("drop", "odd", "rename", "copy", "odd"))
        name = rng.choice([*body] or ["model"])
        if kind == "drop":
            body.pop(name, None)
        elif kind == "odd":
            body[name] = rng.choice(ODD)
        elif kind == "rename":
            body[rng.choice((name + "s", name[:-1], "", name.upper(), "tools"))] = body.pop(name, None)
        else:
            body[name] = [body.get(name)] * rng.choice((1, 2, 130))
        changes.append(kind)
    data = json.dumps(body).encode()
    if rng.random() < 0.3:
        mutation, data = scrambled(rng, data, 1 << 20, b'{}[]",:0-e\\\x00\xff')
        changes.append(mutation)
    headers = [(b"content-type", b"application/json")]
    method = "POST"
    if rng.random() < 0.05:
        headers = rng.choice(([], [(b"content-type", b"text/plain")], [(b"content-type", b"\xff\xfe")], headers * 2))
        changes.append("headers")
    if rng.random() < 0.05:
        method, changes = rng.choice(("GET", "PUT", "DELETE", "HEAD", "POST")), [*changes, "method"]
        path = rng.choice((path, "/v1/models/" + rng.choice(("x", "%00", "a/b", "../..")), "/", "/v1/completions/"))
    return "+".join(changes), method, path, data, headers


async def asked(app: Any, method: str, path: str, data: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Send a request to an application; return status and body of the answer."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    parts = [data[: len(data) // 2], data[len(data) // 2 :]]
    status, body = 0, bytearray()
    ended = asyncio.Event()

    async def receive() -> MutableMapping[str, Any]:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        body.extend(message.get("body", b""))

    await app(scope, receive, send)
    ended.set()
    return status, bytes(body)


def failure_of(method: str, status: int, body: bytes) -> str | None:
    """Return the error in an answer, or None."""
    if not (200 <= status < 300 or 400 <= status < 500):
        return f"status {status}: {body[:200]!r}"
    if method == "HEAD":
        return None
    if body.startswith(b"data: "):
        lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
        parts = [json.loads(line) for line in lines if line != b"[DONE]"]
        return None if all("id" in part for part in parts) else f"a stream that broke off: {lines[-1][:200]!r}"
    said = json.loads(body)
    if status >= 400 and not said["error"]["message"]:
        return "an error without a word"
    return None


async def run(options: Any, served: list[Served], tally: Tally) -> None:
    """Send the requests, and count the outcomes."""
    server = Server(served, limits=Limits(body=16_000, seconds=60))
    app = server.application()
    rng = random.Random(options.seed)
    plain = [(b"content-type", b"application/json")]
    async with app.router.lifespan_context(app):
        _, first = await asked(app, "POST", "/v1/completions", json.dumps(COMPLETION).encode(), plain)
        wanted = json.loads(first)["choices"]
        for number in range(options.count):
            what, method, path, data, headers = changed(rng)
            try:
                status, body = await asked(app, method, path, data, headers)
                failure = failure_of(method, status, body)
                reason = json.loads(body)["error"]["message"][:60] if status >= 400 and body else ""
            except Exception as error:
                status, reason, failure = 0, "", f"{type(error).__name__}: {error}; {data[:300]!r}"
            tally.add(what, str(status), reason, failure)
            if number % 100 == 99:
                _, again = await asked(app, "POST", "/v1/completions", json.dumps(COMPLETION).encode(), plain)
                if json.loads(again)["choices"] != wanted:
                    tally.add("a valid request between", "other answer", "", f"{again[:200]!r}")
        for _ in range(100):  # the last request's row is released after its answer
            load = served[0].scheduler.load()  # type: ignore[union-attr]
            if not load.running and not load.waiting:
                break
            await asyncio.sleep(0.05)
        if load.running or load.waiting:
            tally.add("all", "rows left", "", f"{load.running} running, {load.waiting} waiting")


def main() -> int:
    options = options_of(__doc__)
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(run(options, serve_tiny(Path(place)), tally))
    return tally.close(options)


if __name__ == "__main__":
    sys.exit(main())
