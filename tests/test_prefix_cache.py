"""The cache of prefixes in host memory: shared blocks, the limit in bytes, and rows that resume from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.compiled import Compiled
from treadle.ir.errors import UsageError
from treadle.runtime.prefix_cache import BLOCK, PrefixCache

BYTES = BLOCK * 8


class Reads:
    """A function that returns the positions it is called with, and counts its calls."""

    def __init__(self, base: int = 0) -> None:
        self.base, self.calls = base, 0

    def __call__(self, start: int, stop: int) -> list[Any]:
        self.calls += 1
        return [self.base + np.arange(start, stop, dtype=np.int64)]


def values(cache: PrefixCache, tokens: list[int]) -> list[int]:
    return [int(x) for (part,) in cache.find(tokens).parts for x in part]


def test_the_longest_prefix_of_complete_blocks_is_found() -> None:
    cache, text = PrefixCache(10**6), list(range(100))
    assert (cache.length(text), cache.find(text).parts) == (0, ())
    cache.store(text, Reads())
    assert cache.nbytes == 6 * BYTES
    assert values(cache, text) == list(range(96))
    for count, length in ((97, 96), (96, 80), (95, 80), (17, 16), (16, 0), (0, 0)):
        assert cache.length(text[:count]) == length, "the logits after the last token must be computed"
    assert cache.length([*text[:50], 7, *text[51:]]) == 48


def test_texts_share_the_blocks_of_a_prefix() -> None:
    cache, first, second = PrefixCache(10**6), Reads(), Reads(1000)
    cache.store(list(range(64)), first)
    cache.store([*range(32), *range(200, 232)], second)
    cache.store(list(range(40)), second)
    assert (first.calls, second.calls, cache.nbytes) == (4, 2, 6 * BYTES)
    assert values(cache, [*range(32), *range(200, 240)])[:33] == [*range(32), 1032]


def test_the_least_recently_used_blocks_are_dropped_from_the_end_of_a_text() -> None:
    cache = PrefixCache(6 * BYTES + 5)
    texts = [[n] * 16 + [n + 1] * 16 + [9] for n in (10, 20, 30)]
    for text in texts:
        cache.store(text, Reads())
    cache.find(texts[0])
    cache.store([40] * 16, Reads())
    assert [cache.length(text) for text in texts] == [32, 16, 32]
    cache.store([50] * 32, Reads())
    assert [cache.length(text) for text in texts] == [32, 0, 16]
    cache.store([60] * 1000, Reads())
    assert cache.length([60] * 1000) == 6 * BLOCK, "a text that is larger than the cache is stored up to the limit"
    assert cache.nbytes == 6 * BYTES
    assert [cache.length(text) for text in texts] == [0, 0, 0]
    PrefixCache(3).store(texts[0], Reads())


def test_random_stores_keep_the_limit_and_the_values() -> None:
    rng, cache = np.random.default_rng(0), PrefixCache(20 * BYTES)
    for _ in range(300):
        text = np.repeat(rng.integers(0, 3, 8), BLOCK)[: rng.integers(1, 128)].tolist()
        cache.store(text, lambda a, b, text=text: [np.array([hash(tuple(text[:b]))])])  # type: ignore[misc]
        found = cache.find(text)
        for number, (part,) in enumerate(found.parts, 1):
            assert part[0] == hash(tuple(text[: number * BLOCK]))
        assert found.length == cache.length(text) >= (len(text) - 1) // BLOCK * BLOCK
        assert cache.nbytes <= cache.limit
        assert cache.nbytes == sum(block.nbytes for block in cache._used)


@pytest.fixture(scope="module")
def model() -> Compiled:
    return t.compile("gpt2", seed=3, vocab=61, dim=32, heads=4, layers=2, context=128)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_row_resumes_from_host_memory(backend: str) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    model = t.compile("gpt2", backend=backend, seed=3, vocab=61, dim=32, heads=4, layers=2, context=128)
    session, text = model.session(rows=1, resumes=True), [i % 61 for i in range(100)]
    session.cache_prefixes(1 << 20)
    row = session.open()
    wanted = session.prefill({row: text})[row]
    session.close(row, keep=True)
    other = session.resume([5] * 40)
    session.close(other)
    assert session.prefix_length(session.prompt(text)) == 96
    assert session.cached_bytes == 96 * 2 * 2 * 32 * 4, "keys and values of two layers"
    row = session.resume(text)
    assert session.tokens(row) == tuple(text[:96])
    np.testing.assert_allclose(session.prefill({row: text[96:]})[row], wanted, rtol=1e-4, atol=1e-5)


def test_a_text_that_is_truncated_in_its_slot_is_stored(model: Compiled) -> None:
    session, text = model.session(rows=1, resumes=True), list(range(60))
    session.cache_prefixes(1 << 20)
    row = session.open()
    session.prefill({row: text})
    session.close(row, keep=True)
    row = session.resume([*text[:20], 1, 2, 3])
    assert session.length(row) == 20
    session.close(row)
    assert session.prefix_length(session.prompt([*text, 1])) == 48


def test_sessions_that_cannot_resume_have_no_prefix_cache(model: Compiled) -> None:
    with pytest.raises(UsageError, match="cannot resume from prefixes in host memory"):
        model.session(rows=1, resumes=False).cache_prefixes(1)
    with pytest.raises(UsageError, match="limit must be 1 or more"):
        model.session(rows=1, resumes=True).cache_prefixes(0)
    windowed = t.compile("llama", seed=1, vocab=61, dim=32, heads=4, kv_heads=2, layers=1, hidden=64, window=8)
    with pytest.raises(UsageError, match="cannot resume from prefixes") as caught:
        windowed.session(rows=1, capacity=64, resumes=True).cache_prefixes(1)
    assert caught.value.received == "the model has windows, running sums or further inputs"
