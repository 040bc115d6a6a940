"""SmolLM2 from its GGUF file: greedy continuations equal Hugging Face's with the same weights.

This is the short form of benchmarks/smollm2_greedy.py, which continues ten prompts by 32 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.fetching import fetched_model
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.vocabularies.gguf_tokenizer import build_gguf_tokenizer, gguf_end_tokens
from treadle.resolving import resolve

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.smollm2_greedy import (
    NEAR,
    PROMPTS,
    Continuation,
    continue_ours,
    continue_theirs,
    divergence,
    hugging_face,
    open_smollm2,
)

TOKENS = 16


@pytest.fixture(scope="module")
def path() -> Path:
    found = fetched_model("smollm2")
    if found is None:
        pytest.skip("smollm2 was not fetched: treadle fetch smollm2")
    return found


@pytest.fixture(scope="module", params=["torch", "tvm"])
def opened(request: pytest.FixtureRequest, path: Path) -> tuple[Compiled, Any]:
    reason = find_backend(request.param).available()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return open_smollm2(path, request.param)


@pytest.fixture(scope="module")
def theirs(path: Path) -> list[Continuation]:
    """Return Hugging Face's continuations of the prompts, with the weights of the same file."""
    import torch

    tokenizer = build_gguf_tokenizer(GGUFFile.open(path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads wait for each other if tests run in parallel
    try:
        model = hugging_face(resolve(path, widen="blocks").weights or {})
        return [continue_theirs(model, tokenizer.encode(text).ids, TOKENS) for text in PROMPTS[:3]]
    finally:
        torch.set_num_threads(threads)


def test_continues_as_hugging_face_does(opened: tuple[Compiled, Any], theirs: list[Continuation]) -> None:
    model, tokenizer = opened
    ours = continue_ours(model, [tokenizer.encode(text).ids for text in PROMPTS[:3]], TOKENS)
    assert tokenizer.decode(ours[0]).startswith(" Paris")
    for found, wanted in zip(ours, theirs, strict=True):
        split = divergence(found, wanted)
        assert split is None or split[1] < NEAR, tokenizer.decode(found)


def test_vocabulary(path: Path, opened: tuple[Compiled, Any]) -> None:
    tokenizer = opened[1]
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    chat = tokenizer.encode("<|im_start|>user\nHi 20<|im_end|>").ids
    assert chat[0] == 1
    assert gguf_end_tokens(GGUFFile.open(path)) == (2,) == (chat[-1],)
    assert tokenizer.encode(" 20").ids == [216, 34, 32]  # each digit separately
    for text in ("  two  spaces\n\n\ttab", "naïve café, Привет, 你好 \U0001f600", "don't 3.14 x=f(a[0])"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_types_of_blocks_are_kept(path: Path) -> None:
    resolved = resolve("smollm2")
    assert resolved.unused == ()
    assert resolved.source.path == path
    assert resolved.blocks["embed.weight"] == "q8_0"
    assert resolved.blocks["layer.29.attn.q.weight"] == "q4_1"
    assert resolved.blocks["norm.weight"] == "f32"
    assert resolved.blocks.keys() == resolved.graph.parameters.keys()
