"""What a request's body means to the server, at its limits and one beyond them; test_serving asks over HTTP."""

from __future__ import annotations

import json
import re
from pprint import pformat
from types import SimpleNamespace
from typing import Any

import pytest

from tests.golden import Golden
from treadle.runtime.scheduler import Load
from treadle.serving.refusals import RequestRefusal
from treadle.serving.requests import read_body, read_chat, read_completions, read_embeddings

READ = {"completions": read_completions, "chat": read_chat, "embeddings": read_embeddings}
PLAIN: dict[str, dict[str, Any]] = {
    "completions": {"model": "m", "prompt": "a", "seed": 3},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "a"}], "seed": 3},
    "embeddings": {"model": "m", "input": "a"},
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("completions", {}),
    ("completions", {"prompt": [1, 2], "max_tokens": 0, "temperature": 2, "top_p": 0, "logprobs": 20, "n": 128}),
    ("completions", {"prompt": [[1], [2, 2147483647]], "n": 64, "best_of": 64, "stop": "b", "stream": True}),
    ("completions", {"temperature": 2.1}),
    ("completions", {"logprobs": 21}),
    ("completions", {"n": 129}),
    ("completions", {"prompt": ["a", "b"], "n": 65}),
    ("completions", {"prompt": [[2147483648]]}),
    ("completions", {"seed": 2**63}),
    ("completions", {"stop": ["b"] * 17}),
    ("completions", {"stop": ["b" * 1000], "top_k": 5, "min_p": 1, "presence_penalty": -2, "repetition_penalty": 100}),
    ("completions", {"stop": "b" * 1001}),
    ("completions", {"presence_penalty": 2.1}),
    ("completions", {"repetition_penalty": 0.001}),
    ("completions", {"stream": True, "stream_options": {"include_usage": True}}),
    ("completions", {"model": "m" * 1001}),
    ("chat", {}),
    ("chat", {"messages": [{"role": "developer", "content": [{"type": "text", "text": part} for part in "ab"]}]}),
    ("chat", {"logprobs": True, "top_logprobs": 20, "max_tokens": 5, "max_completion_tokens": 6}),
    ("chat", {"logprobs": True, "max_tokens": 5, "response_format": {"type": "text"}, "tools": []}),
    ("chat", {"logprobs": True, "top_logprobs": 21}),
    ("chat", {"messages": [{"role": "user", "content": "a"}] * 1025}),
    ("embeddings", {}),
    ("embeddings", {"input": ["a", "b"], "encoding_format": "base64", "user": "u"}),
    ("embeddings", {"input": ["a"] * 2049}),
]


def test_what_bodies_mean(golden: Golden) -> None:
    lines: list[str] = []
    for kind, body in BODIES:
        lines.append(f"# {kind}: {json.dumps(body)[:200]}")
        try:
            lines.append(pformat(READ[kind](read_body(json.dumps(PLAIN[kind] | body).encode())), width=118))
        except RequestRefusal as refused:
            lines.append(f"{refused.status} {refused.body}")
    golden("serving/bodies.txt", re.sub(r"(b+|m+)(?=')", lambda m: m[0][:20], "\n".join(lines)))


def test_what_is_counted() -> None:
    """By name, route, model and kind; the library's own lines, such as when a counter was made, are left out."""
    pytest.importorskip("prometheus_client")
    from treadle.serving.metrics import Metrics

    load = Load(running=2, waiting=3, steps=6, prefilled=40, reused=30, generated=50)
    writer: Any = SimpleNamespace(name="m", scheduler=SimpleNamespace(load=lambda: load))
    metrics = Metrics([writer])
    for seconds in (0.2, 40.0):
        metrics.count("/v1/completions", 200, seconds)
    metrics.first("m", 0.05)
    lines = [
        line for line in metrics.text().decode().splitlines() if not line.startswith("#") and "_created" not in line
    ]
    assert {line for line in lines if "_bucket" not in line} == {
        'treadle_requests_total{route="/v1/completions",status="200"} 2.0',
        'treadle_request_seconds_count{route="/v1/completions"} 2.0',
        'treadle_request_seconds_sum{route="/v1/completions"} 40.2',
        'treadle_first_token_seconds_count{model="m"} 1.0',
        'treadle_first_token_seconds_sum{model="m"} 0.05',
        'treadle_rows{model="m"} 2.0',
        'treadle_waiting{model="m"} 3.0',
        'treadle_tokens_total{kind="prompt",model="m"} 40.0',
        'treadle_tokens_total{kind="reused",model="m"} 30.0',
        'treadle_tokens_total{kind="generated",model="m"} 50.0',
        'treadle_steps_total{model="m"} 6.0',
    }
    bounds = [line.split('le="')[1].split('"')[0] for line in lines if "first_token_seconds_bucket" in line]
    assert bounds == ["0.01", "0.03", "0.1", "0.3", "1.0", "3.0", "10.0", "30.0", "100.0", "300.0", "+Inf"]
