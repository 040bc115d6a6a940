"""Parsing and validation of request bodies, at each limit and one past it. test_serving sends requests over HTTP."""

from __future__ import annotations

import json
import re
from pprint import pformat
from types import SimpleNamespace
from typing import Any

import pytest

from tests.golden import Golden
from treadle.runtime.scheduler import Load
from treadle.serving import requests
from treadle.serving.fields import Fields
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
    ("completions", {"model": "m" * 1000, "max_tokens": 2147483647, "min_p": 0, "stop": ["b"] * 16}),
    ("completions", {"max_tokens": 2147483648}),
    ("completions", {"prompt": [0, 1]}),
    ("completions", {"prompt": [[-1]]}),
    ("completions", {"prompt": [True]}),
    ("completions", {"prompt": ["a"] * 129}),
    ("completions", {"prompt": []}),
    ("completions", {"top_k": 1, "top_p": 1, "presence_penalty": 0, "repetition_penalty": 1.0, "min_p": None}),
    ("completions", {"repetition_penalty": 0.01, "temperature": 0, "user": "u"}),
    ("completions", {"echo": False, "suffix": "", "best_of": 1, "frequency_penalty": 0.0, "logit_bias": {}}),
    ("completions", {"echo": 0}),
    ("completions", {"suffix": "b"}),
    ("completions", {"n": 2, "best_of": 3}),
    ("completions", {"frequency_penalty": 1}),
    ("completions", {"logit_bias": {"5": 1}}),
    ("completions", {"top_p": 1.1}),
    ("completions", {"min_p": -0.1}),
    ("completions", {"temperature": True}),
    ("completions", {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": True}}),
    ("completions", {"stream": True, "stream_options": []}),
    ("completions", {"stream_options": {}}),
    ("completions", {"stream": True, "stream_options": {"include": True}}),
    ("completions", {"max_token": 5}),
    ("completions", {"z" * 81: 5}),
    ("completions", {"model": ""}),
    ("chat", {}),
    ("chat", {"messages": [{"role": "developer", "content": [{"type": "text", "text": part} for part in "ab"]}]}),
    ("chat", {"logprobs": True, "top_logprobs": 20, "max_tokens": 5, "max_completion_tokens": 6}),
    ("chat", {"logprobs": True, "max_tokens": 5, "response_format": {"type": "text"}, "tools": []}),
    ("chat", {"logprobs": True, "top_logprobs": 21}),
    ("chat", {"messages": [{"role": "user", "content": "a"}] * 1025}),
    ("chat", {"tool_choice": "auto", "function_call": "none", "functions": [], "modalities": ["text"], "store": True}),
    ("chat", {"tools": [{"type": "function"}]}),
    ("chat", {"tool_choice": "required"}),
    ("chat", {"function_call": "must"}),
    ("chat", {"response_format": {"type": "json_object"}}),
    ("chat", {"modalities": ["audio"]}),
    ("chat", {"top_logprobs": 0}),
    ("chat", {"parallel_tool_calls": True, "metadata": {}, "service_tier": "auto", "logprobs": False}),
    ("chat", {"messages": [{"role": "assistant", "content": "", "name": "n", "refusal": "r", "tool_calls": []}]}),
    ("chat", {"messages": [{"role": "tool", "content": "a"}]}),
    ("chat", {"messages": [{"role": "user", "content": 5}]}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("chat", {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}),
    ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "user", "contents": "a", "content": "b"}]}),
    ("chat", {"messages": []}),
    ("chat", {"messages": ["a"]}),
    ("chat", {"messages": None, "message": []}),
    ("embeddings", {}),
    ("embeddings", {"input": ["a", "b"], "encoding_format": "base64", "user": "u"}),
    ("embeddings", {"input": ["a"] * 2049}),
    ("embeddings", {"input": [], "encoding_format": "float"}),
    ("embeddings", {"input": ["a", ""]}),
    ("embeddings", {"input": ["a", 1]}),
    ("embeddings", {"encoding_format": "hex"}),
    ("embeddings", {"dimensions": 8}),
    ("embeddings", {"models": "m"}),
]


def test_bodies_equal_their_references(golden: Golden) -> None:
    lines: list[str] = []
    for kind, body in BODIES:
        lines.append(f"# {kind}: {json.dumps(body)[:200]}")
        try:
            lines.append(pformat(READ[kind](read_body(json.dumps(PLAIN[kind] | body).encode())), width=118))
        except RequestRefusal as refused:
            lines.append(f"{refused.status} {refused.body}")
    golden("serving/bodies.txt", re.sub(r"(b+|m+)(?=')", lambda m: m[0][:20], "\n".join(lines)))


def test_a_body_is_read_to_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_body(b'{"a":' + b"[" * 15 + b"]" * 15 + b"}").take("a")
    with pytest.raises(
        RequestRefusal, match=r"the body is not a JSON object: .* 16 deep, at the body, byte 20"
    ) as refused:
        read_body(b'{"a":' + b"[" * 16 + b"]" * 16 + b"}")
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")
    limits: dict[str, int] = {}
    monkeypatch.setattr(requests, "read_json_object", lambda data, shown, **given: limits.update(given) or {})
    read_body(b"{}")
    assert limits == {"nesting": 16, "values": 200_000}


def test_without_a_seed_one_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests.secrets, "randbits", lambda bits: (1 << bits) - 1)
    found = read_completions(read_body(b'{"model": "m", "prompt": "a"}'))
    assert found.how.sampling.seed == 2**62 - 1, "which what computes with it holds"


def test_texts_are_a_megabyte_long_at_most() -> None:
    """The limit holds for fields that set no other limit."""
    for length in (1 << 20, (1 << 20) + 1):
        fields = Fields({"text": "a" * length, "texts": ["a" * length], "flag": True})
        assert fields.truth("flag") and not fields.truth("gone") and fields.truth("gone", True)
        if length == 1 << 20:
            assert fields.text("text") and fields.texts("texts", most=1)
            fields.end()
            continue
        with pytest.raises(RequestRefusal, match="text must be a string of at most 1048576 characters"):
            fields.text("text")
        with pytest.raises(RequestRefusal, match="texts must be a nonempty string, or a list of at most 1 nonempty"):
            fields.texts("texts", most=1)


def test_counted_quantities() -> None:
    """Metrics by name, route, model and kind. The library's own lines, such as a counter's creation time, are left
    out.
    """
    pytest.importorskip("prometheus_client")
    from treadle.serving.metrics import Metrics

    load = Load(running=2, waiting=3, steps=6, prefilled=40, reused=30, generated=50, filled=60, cached=70)
    writer: Any = SimpleNamespace(name="m", scheduler=SimpleNamespace(load=lambda: load, positions=90))
    metrics = Metrics([writer])
    for seconds in (0.2, 40.0):
        metrics.count("/v1/completions", 200, seconds)
    metrics.first("m", 0.05)
    metrics.whole("/v1/completions", 1.5)
    metrics.queued("m", 0.25)
    metrics.between("m", 0.02)
    lines = [
        line for line in metrics.text().decode().splitlines() if not line.startswith("#") and "_created" not in line
    ]
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
    lines = [line for line in lines if not line.startswith("process_")]
    assert {line for line in lines if "_bucket" not in line} == {
        'treadle_requests_total{route="/v1/completions",status="200"} 2.0',
        'treadle_request_seconds_count{route="/v1/completions"} 2.0',
        'treadle_request_seconds_sum{route="/v1/completions"} 40.2',
        'treadle_first_token_seconds_count{model="m"} 1.0',
        'treadle_first_token_seconds_sum{model="m"} 0.05',
        'treadle_whole_request_seconds_count{route="/v1/completions"} 1.0',
        'treadle_whole_request_seconds_sum{route="/v1/completions"} 1.5',
        'treadle_queue_seconds_count{model="m"} 1.0',
        'treadle_queue_seconds_sum{model="m"} 0.25',
        'treadle_inter_token_seconds_count{model="m"} 1.0',
        'treadle_inter_token_seconds_sum{model="m"} 0.02',
        'treadle_cache_tokens{model="m"} 60.0',
        'treadle_cache_capacity_tokens{model="m"} 90.0',
        'treadle_prefix_cache_bytes{model="m"} 70.0',
        'treadle_rows{model="m"} 2.0',
        'treadle_waiting{model="m"} 3.0',
        'treadle_tokens_total{kind="prompt",model="m"} 40.0',
        'treadle_tokens_total{kind="reused",model="m"} 30.0',
        'treadle_tokens_total{kind="generated",model="m"} 50.0',
        'treadle_steps_total{model="m"} 6.0',
    }
    bounds = [line.split('le="')[1].split('"')[0] for line in lines if "first_token_seconds_bucket" in line]
    assert bounds == ["0.01", "0.03", "0.1", "0.3", "1.0", "3.0", "10.0", "30.0", "100.0", "300.0", "+Inf"]
