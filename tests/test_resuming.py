"""Texts with a common prefix: the session continues a slot, and the logits equal those of each text alone. Prompts are
forked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.stepped_models import MODELS
from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.ir.errors import UsageError
from treadle.runtime.generation import generate
from treadle.runtime.sampling import Sampling
from treadle.runtime.session import Session
from treadle.runtime.speculation import PromptLookup, speculate

Array = np.ndarray[Any, Any]
SMALL = {"vocab": 50, "dim": 32, "heads": 4, "layers": 2, "context": 128}


@pytest.fixture(scope="module")
def exe() -> Compiled:
    return t.compile("gpt2", seed=3, **SMALL)


def drawn(count: int, seed: int = 0, most: int = 50) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, most, count)]


def read(session: Session, tokens: list[int]) -> tuple[int, int, Array]:
    """Resume a text; return the row, the number of tokens that the row already held, and the logits after the text."""
    row = session.resume(tokens)
    held = session.length(row)
    assert session.tokens(row) == tuple(tokens[:held])
    return row, held, session.prefill({row: tokens[held:]})[row]


def alone(exe: Compiled, tokens: list[int], inputs: dict[str, Any] | None = None, **options: Any) -> Array:
    session = exe.session(**{"rows": 1, "capacity": 128, **options})
    row = session.open(**inputs or {})
    return session.prefill({row: tokens})[row]


def near(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))


def test_the_longest_beginning_is_gone_on_from_and_the_others_stay(exe: Compiled) -> None:
    session = exe.session(rows=4, capacity=128, chunk=32, resumes=True)
    system, one, other = drawn(40), drawn(30, 1), drawn(30, 2)
    first, held, _ = read(session, system + one)
    assert held == 0
    second, held, logits = read(session, system + other)  # from a row that still grows
    assert held == 40
    near(logits, alone(exe, system + other))
    near(session.step({first: 7})[first], alone(exe, [*system, *one, 7]))
    session.close(first, keep=True)
    session.close(second, keep=True)
    third, held, logits = read(session, [*system, *one, 7, 8, 9])  # all of the text: the slot itself is continued
    assert (third, held) == (first, 71)
    near(logits, alone(exe, [*system, *one, 7, 8, 9]))
    fourth, held, logits = read(session, system + other[:10] + one[:5])  # a prefix: the slot is copied and truncated
    assert fourth != second
    assert held == 50
    near(logits, alone(exe, system + other[:10] + one[:5]))
    _, held, logits = read(session, system + other)  # all tokens except the last, whose logits are requested
    assert held == 69
    near(logits, alone(exe, system + other))
    assert session.prefix_length(session.prompt([*system[:15], 49, *one])) == 0, "15 tokens are too few"


def test_the_text_that_was_used_least_recently_is_forgotten(exe: Compiled) -> None:
    session = exe.session(rows=3, capacity=128, resumes=True)
    texts = [drawn(30, seed) for seed in range(4)]
    rows = [read(session, text)[0] for text in texts[:3]]
    for row in rows:
        session.close(row, keep=True)
    assert session.free == 3
    row, held, _ = read(session, [*texts[0][:20], 1, 2])  # copied to the second text's former slot
    assert (row, held) == (rows[1], 20)
    session.close(row)
    assert [session.prefix_length(session.prompt([*text, 1])) for text in texts] == [30, 0, 30, 0]
    opened = [session.open() for _ in range(2)]
    assert opened == [rows[1], rows[2]], "an empty slot first, then that of the text that was not used again"
    assert [session.prefix_length(session.prompt([*text, 1])) for text in texts] == [30, 0, 0, 0]
    near(read(session, [*texts[0], 1])[2], alone(exe, [*texts[0], 1]))
    with pytest.raises(UsageError, match="all 3 rows are open"):
        session.resume(texts[0])


def test_a_text_that_slid_is_held_from_what_it_still_knows(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=48, full="slide", resumes=True)
    tokens = drawn(60)
    row = session.resume(tokens)
    session.prefill({row: tokens[:48]})
    for token in tokens[48:]:
        session.step({row: token})
    known = session.length(row)
    assert known == 36
    session.close(row, keep=True)
    _, held, logits = read(session, [*tokens[-known:], 1, 2])
    assert held == known
    near(logits, alone(exe, [*tokens[-known:], 1, 2]))


@pytest.mark.parametrize(("name", "cache"), [("gpt2", None), ("gpt2", "f16"), ("llama, windows", None)])
def test_on_tvm_the_bits_are_those_of_the_text_alone(name: str, cache: str | None) -> None:
    """The text is prefilled in other chunks, after steps and speculation, forked, and truncated."""
    if reason := find_backend("tvm").available():
        pytest.skip(reason)
    made = (
        t.compile("gpt2", backend="tvm", seed=3, **SMALL)
        if name == "gpt2"
        else t.compile(MODELS[name], backend="tvm", seed=2)
    )
    options: dict[str, Any] = {"capacity": 128 if name == "gpt2" else 320, "chunk": 32, "cache": cache}
    session = made.session(rows=3, **options)
    assert session.resumes
    tokens = drawn(100, most=11)
    row = session.open()
    session.prefill({row: tokens[:37]})
    session.step({row: tokens[37]})
    session.verify(row, tokens[38:50])
    session.accept(row, tokens[38:44])
    session.prefill({row: tokens[44:61]})
    fork = session.fork(row)
    both = session.step({row: 3, fork: 4})
    for each, last in ((row, 3), (fork, 4)):
        np.testing.assert_array_equal(both[each], alone(made, [*tokens[:61], last], **options))
    session.close(fork)
    for length in (60, 39, 17):
        text = [*tokens[:length], *drawn(30, length, 11)]
        if text[length] == tokens[length]:
            text[length] = (text[length] + 1) % 11
        again, held, logits = read(session, text)
        assert held == length
        np.testing.assert_array_equal(logits, alone(made, text, **options))
        session.close(again)


def test_a_ring_is_cut_back_as_far_as_it_holds() -> None:
    made = t.compile(MODELS["llama, windows"], seed=2)
    session = made.session(rows=2, capacity=600, chunk=8, resumes=True)
    tokens = drawn(300, most=11)
    row, *_ = read(session, tokens)
    for length, held in ((290, 290), (200, 200), (100, 0)):  # the ring has 128 positions
        text = [*tokens[:length], (tokens[length] + 1) % 11, 1, 2]
        again, found, logits = read(session, text)
        assert found == held
        near(logits, alone(made, text, capacity=600, chunk=8))
        session.close(again)
    session.close(row, keep=True)
    row, *_ = read(session, [*tokens, 1])
    assert session.prefix_length(session.prompt([*tokens[:170], 5, 5])) in (0, 170)
    session.close(row, keep=True)


def test_prefixes_are_not_reused_if_bits_would_change(exe: Compiled) -> None:
    session = exe.session(rows=2)
    assert not session.resumes, "a row of NumPy's has other bits where it is cut otherwise"
    text = drawn(40)
    row, *_ = read(session, text)
    session.close(row, keep=True)
    assert read(session, text)[1] == 0
    made = t.compile(MODELS["summed"], seed=1)
    session = made.session(rows=2, capacity=60, resumes=True)
    text = drawn(40, most=11)
    session.close(read(session, text)[0], keep=True)
    prompts = [session.prompt(ids) for ids in (text, [*text[:30], 1])]
    assert [session.prefix_length(prompt) for prompt in prompts] == [0, 0], "sums are not cut back"
    _, held, logits = read(session, [*text, 1, 2])
    assert held == 40
    near(logits, alone(made, [*text, 1, 2]))
    with pytest.raises(UsageError, match="begins with nothing"):
        exe.session(rows=1, resumes=True).resume([1, 2], picture=1)


def test_rows_that_begin_alike_share_prefixes() -> None:
    made = t.compile(MODELS["t5"], seed=1)
    session = made.session(rows=3, capacity=40, memory={"S": 5}, resumes=True)
    source, other = ({"tokens": np.array(ids), "lengths": 3} for ids in ([1, 2, 3], [1, 2, 4]))
    text = drawn(30, most=11)
    row = session.resume(text, **source)
    session.prefill({row: text})
    session.close(row, keep=True)
    assert session.prefix_length(session.prompt([*text, 5], **other)) == 0, "another source"
    row = session.resume([*text, 5], **source)
    assert session.length(row) == 30
    near(session.prefill({row: [5]})[row], alone(made, [*text, 5], memory={"S": 5}, inputs=source))


# -- generation --------------------------------------------------------------------------------------------------


class Counted:
    """A session that counts the tokens that it prefills."""

    def __init__(self, session: Session) -> None:
        self.count, prefill = 0, session.prefill

        def counted(tokens: dict[int, list[int]]) -> dict[int, Array]:
            self.count += sum(map(len, tokens.values()))
            return prefill(tokens)

        session.prefill = counted  # type: ignore[method-assign, assignment]


def report(session: Session, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for token in generate(session, prompts, **options):
        found[token.row].append(token.id)
    return found


def test_on_tvm_sums_go_on_with_the_bits_of_the_text_alone() -> None:
    if reason := find_backend("tvm").available():
        pytest.skip(reason)
    made = t.compile(MODELS["summed"], backend="tvm", seed=2)
    options: dict[str, Any] = {"capacity": 128, "chunk": 32}
    session = made.session(rows=2, **options)
    tokens = drawn(80, most=11)
    row, *_ = read(session, tokens[:37])
    session.step({row: tokens[37]})
    again, held, logits = read(session, tokens)
    assert held == 38
    np.testing.assert_array_equal(logits, alone(made, tokens, **options))
    session.close(again, keep=True)
    np.testing.assert_array_equal(read(session, [*tokens, 1])[2], alone(made, [*tokens, 1], **options))


@pytest.mark.parametrize("name", ["gpt2", "summed", "t5"])
def test_a_prompt_that_is_given_several_times_is_prefilled_once(exe: Compiled, name: str) -> None:
    made = exe if name == "gpt2" else t.compile(MODELS[name], seed=2)
    given: dict[str, Any] = {"tokens": np.array([1, 2, 3]), "lengths": np.array(3)} if name == "t5" else {}
    sampling, prompt, other = Sampling(temperature=1.5, seed=5), drawn(20, most=11), drawn(9, 1, 11)
    prompts = [prompt, other, prompt, prompt, other]
    options: dict[str, Any] = {"most": 6, "sampling": sampling, "inputs": [given] * 5}
    sizes: dict[str, Any] = {"capacity": 40, "memory": {"S": 4} if given else None}
    session = made.session(rows=5, **sizes)
    counted = Counted(session)
    found = report(session, prompts, **options)
    assert counted.count == len(prompt) + len(other)
    assert found == report(made.session(rows=1, **sizes), prompts, **options), "each alone"
    assert session.free == 5
    assert len({tuple(found[n]) for n in (0, 2, 3)}) == 3, "draws differ"


def test_prompts_that_begin_alike_go_on_from_one_of_them(exe: Compiled) -> None:
    system = drawn(40)
    prompts = [[*system, *drawn(8, seed)] for seed in (1, 2, 3)] + [drawn(12, 4)]
    prompts += [prompts[1], [*prompts[2], 5]]
    wanted = report(exe.session(rows=1), prompts, most=5)
    session = exe.session(rows=6, resumes=True)
    counted = Counted(session)
    assert report(session, prompts, most=5) == wanted
    assert counted.count == 48 + 8 + 8 + 12 + 0 + 1
    few = exe.session(rows=2, resumes=True)  # texts that wait for a row reuse the prefixes of others
    counted = Counted(few)
    assert report(few, prompts, most=5) == wanted
    assert counted.count < sum(map(len, prompts)) - 3 * 40
    guessing = exe.session(rows=1, resumes=True)
    counted = Counted(guessing)
    found: list[list[int]] = [[] for _ in prompts]
    for token in speculate(guessing, prompts, most=5, guess=PromptLookup()):
        found[token.row].append(token.id)
    assert found == wanted
    assert counted.count < sum(map(len, prompts)) - 40


def test_rows_that_wait_for_one_that_fails_stay_open_no_more_than_it(exe: Compiled) -> None:
    session = exe.session(rows=4, resumes=True)
    with pytest.raises(UsageError, match="token 99 is not in the vocabulary"):
        list(generate(session, [drawn(20), [*drawn(20), 99]], most=2))
    assert session.free == 4
