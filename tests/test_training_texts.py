"""Batches of texts: no token is lost or repeated, targets are the next or the masked tokens, and a run resumes at any
step.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.ir.errors import UsageError
from treadle.training.texts import NOT_COUNTED, BlockBatches, blocks_of, mask_tokens, next_token_targets

DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=6)


# -- blocks --------------------------------------------------------------------------------------------------------


@given(DOCUMENTS, st.integers(1, 7), st.sampled_from([None, 0]))
def test_blocks_are_the_documents_one_after_another(documents: list[list[int]], length: int, end: int | None) -> None:
    wanted = [*documents[0]] if documents else []
    for document in documents[1:]:
        wanted += ([] if end is None else [end]) + document
    whole = len(wanted) // length
    if not whole:
        with pytest.raises(UsageError, match="too short for a block of"):
            blocks_of(documents, length, end=end)
        return
    found = blocks_of(documents, length, end=end)
    assert found.dtype == np.int64 and found.shape == (whole, length)
    assert found.ravel().tolist() == wanted[: whole * length]


def test_a_document_that_ends_with_the_end_of_text_gets_no_second() -> None:
    assert blocks_of([[1, 0], [2], [], [3, 0]], 1, end=0).ravel().tolist() == [1, 0, 2, 0, 0, 3, 0]


def test_short_values_are_refused_with_what_was_received() -> None:
    with pytest.raises(UsageError) as caught:
        blocks_of([[1, 2], [3]], 1024, end=None)
    assert str(caught.value) == (
        "the texts are too short for a block of 1,024 tokens\n"
        "  received  3 tokens in 2 documents\n"
        "  try       length=3, or more text"
    )
    assert len(blocks_of([[1, 2], [3]], 3, end=None)) == 1
    with pytest.raises(UsageError, match="a block must have 1 token or more"):
        blocks_of([[1, 2]], 0, end=None)


# -- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [np.array([[7, 1, 65535]], np.uint16), [[7, 1, 65535]]], ids=["uint16", "list"])
def test_tokens_of_any_integers_are_taken(tokens: Any) -> None:
    """Files of tokens are often uint16, which cannot hold the target -100."""
    wanted = np.array([[1, 65535, NOT_COUNTED]])
    found = next_token_targets(tokens)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, wanted)
    inputs, targets = mask_tokens(tokens, np.random.default_rng(0), mask=3, vocab=9, special=(7, 65535))
    assert (inputs.dtype, targets.dtype) == (np.int64, np.int64)
    np.testing.assert_array_equal(inputs[:, ::2], [[7, 65535]])
    np.testing.assert_array_equal(targets, [[NOT_COUNTED, 1, NOT_COUNTED]])


@given(st.integers(1, 4), st.integers(1, 9), st.data())
def test_a_target_is_the_next_token_of_its_row(rows: int, length: int, data: st.DataObject) -> None:
    tokens = np.arange(rows * length).reshape(rows, length)
    lengths = data.draw(st.none() | st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    found = next_token_targets(tokens, lengths)
    assert found.shape == tokens.shape and found.dtype == np.int64
    for row in range(rows):
        real = length if lengths is None else lengths[row]
        for at in range(length):
            assert found[row, at] == (tokens[row, at + 1] if at + 1 < real else NOT_COUNTED)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 30), st.floats(0.01, 1))
def test_masking_hides_some_of_each_row_and_asks_for_these_alone(
    seed: int, rows: int, length: int, rate: float
) -> None:
    tokens = np.random.default_rng(seed).integers(0, 20, (rows, length))
    special = {0, 1, 2, 3}
    inputs, targets = mask_tokens(tokens, np.random.default_rng(seed), mask=3, vocab=20, special=special, rate=rate)
    counted = targets != NOT_COUNTED
    np.testing.assert_array_equal(targets[counted], tokens[counted])
    np.testing.assert_array_equal(inputs[~counted], tokens[~counted])
    open_to = ~np.isin(tokens, list(special))
    assert not (counted & ~open_to).any()
    np.testing.assert_array_equal(counted.any(axis=1), open_to.any(axis=1))
    assert inputs.dtype == targets.dtype == np.int64 and inputs.min() >= 0 and inputs.max() < 20
    again = mask_tokens(tokens, np.random.default_rng(seed), mask=3, vocab=20, special=special, rate=rate)
    np.testing.assert_array_equal(inputs, again[0])
    np.testing.assert_array_equal(targets, again[1])


def test_of_the_masked_8_of_10_are_hidden_1_is_another_and_1_is_as_it_was() -> None:
    """160,000 tokens: 24,000 are chosen. The standard error of each fraction of the chosen tokens is below 0.003, a
    fifth of the tolerance.
    """
    tokens = np.full((400, 400), 7)
    inputs, targets = mask_tokens(tokens, np.random.default_rng(0), mask=3, vocab=1000, special=[3])
    chosen = targets != NOT_COUNTED
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    assert (inputs[chosen] == 3).mean() == pytest.approx(0.8, abs=0.015)
    assert (inputs[chosen] == 7).mean() == pytest.approx(0.1, abs=0.015)
    others = inputs[chosen & (inputs != 3) & (inputs != 7)]
    assert len(np.unique(others)) > 700, "drawn from all of the vocabulary"


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01])
def test_invalid_parts_are_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        mask_tokens(np.ones((1, 2), np.int64), np.random.default_rng(0), mask=0, vocab=2, special=(), rate=rate)


# -- batches -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.data(), st.integers(0, 9))
def test_an_epoch_has_each_block_once_and_another_order_than_the_one_before(
    count: int, data: st.DataObject, seed: int
) -> None:
    rows = data.draw(st.integers(1, count))
    batches = BlockBatches(np.arange(count)[:, None] * np.ones(3, np.int64), rows, seed)
    assert batches.epoch == count // rows
    epochs = list(islice(batches.after(), 3 * batches.epoch))
    assert all(batch.shape == (rows, 3) for batch in epochs)
    orders = [np.concatenate(epochs[i * batches.epoch : (i + 1) * batches.epoch])[:, 0].tolist() for i in range(3)]
    assert all(len({*order}) == len(order) == batches.epoch * rows for order in orders)
    if count > 12:
        assert orders[0] != orders[1] != orders[2]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 30))
def test_a_run_goes_on_at_any_step_with_what_it_would_have_seen(count: int, rows: int, steps: int) -> None:
    rows = min(rows, count)
    batches = BlockBatches(np.arange(count * 2).reshape(count, 2), rows, 5)
    whole = list(islice(batches.after(), steps + 4))
    rest = list(islice(BlockBatches(batches.blocks, rows, 5).after(steps), 4))
    np.testing.assert_array_equal(np.stack(whole[steps:]), np.stack(rest))


def test_the_seed_draws_the_order() -> None:
    blocks = np.arange(40).reshape(20, 2)
    first, second = (np.concatenate([*islice(BlockBatches(blocks, 4, seed).after(), 5)]) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("rows", [0, 4])
def test_fewer_blocks_than_a_batch_are_refused(rows: int) -> None:
    with pytest.raises(UsageError, match=f"a batch of {rows} rows cannot be formed from 3 blocks") as caught:
        BlockBatches(np.zeros((3, 2), np.int64), rows)
    assert str(caught.value.hint) == "rows=3, or more text"
    assert BlockBatches(np.zeros((3, 2), np.int64), 3).epoch == 1
