"""Parts of generation, tested without a model: choice of tokens, reasons for the end of a row, slots, and session
calls.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treadle.ir.errors import UsageError
from treadle.passes.stepping.functions import CAPACITY, SLOTS
from treadle.runtime import scheduler, session
from treadle.runtime.beams import Beams, _Search, _Task, beam_search
from treadle.runtime.generation import Choosing, Token, checked_prompts, count_of, generate, is_full, prompt_ahead
from treadle.runtime.row_inputs import RowPrompt
from treadle.runtime.sampling import Sampling
from treadle.runtime.scheduler import Cut, Ended, Load, QueueFull, Scheduler, TextOrder, Ticket
from treadle.runtime.session import Session
from treadle.runtime.slots import LEAST, Ring, Row, Slots
from treadle.runtime.speculation import DraftModel, PromptLookup, SpeculationTally, _margin, speculate
from treadle.runtime.token_rules import TokenRules, log_probabilities

# -- selected tokens ---------------------------------------------------------------------------------------------------


def test_defaults_of_missing_settings() -> None:
    assert Sampling() == Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0, min_p=0.0)
    assert TokenRules() == TokenRules(1.0, 0.0, 0, (), (), 0, 0, None, None, ())
    assert Token(1, 2) == Token(1, 2, None, None, ())
    assert Choosing(3) == Choosing(3, Sampling(), None, frozenset(), None, None)
    assert Beams() == Beams(4, 1.0, 1, early=False)
    assert PromptLookup() == PromptLookup(3, 8)
    assert SpeculationTally() == SpeculationTally(0, 0, 0, 0, math.inf)
    assert Row() == Row([], 0, [], is_lost=False, written=0)
    assert Load() == Load(0, 0, 0, 0, 0, 0, 0, 0)
    assert TextOrder((1,), Choosing(3)) == TextOrder((1,), Choosing(3), 0, None)
    assert (session.CHUNK, LEAST) == (256, 16)


@pytest.mark.parametrize(
    ("kind", "takes", "refuses"),
    [
        (Sampling, {"temperature": 0}, {"temperature": -1e-9}),
        (Sampling, {"temperature": 1e300}, {"temperature": math.inf}),
        (Sampling, {"top_k": 0}, {"top_k": -1}),
        (Sampling, {"top_p": 1e-9}, {"top_p": 0}),
        (Sampling, {"top_p": 1}, {"top_p": 1.0000001}),
        (Sampling, {"min_p": 0}, {"min_p": -1e-9}),
        (Sampling, {"min_p": 1}, {"min_p": 1.0000001}),
        (Sampling, {"seed": 0}, {"seed": -1}),
        (TokenRules, {"repetition_penalty": 1e-9}, {"repetition_penalty": 0}),
        (TokenRules, {"repetition_penalty": 1e300}, {"repetition_penalty": math.inf}),
        (TokenRules, {"presence_penalty": -1e300}, {"presence_penalty": -math.inf}),
        (TokenRules, {"presence_penalty": 1e300}, {"presence_penalty": math.inf}),
        (TokenRules, {"no_repeat_ngram": 0}, {"no_repeat_ngram": -1}),
        (TokenRules, {"fewest": 0}, {"fewest": -1}),
        (Beams, {"count": 1}, {"count": 0}),
        (Beams, {"count": 2, "best": 2}, {"count": 2, "best": 3}),
        (Beams, {"best": 1}, {"best": 0}),
        (Beams, {"length_penalty": -99.9}, {"length_penalty": -100}),
        (Beams, {"length_penalty": 99.9}, {"length_penalty": 100}),
        (Beams, {"early": "never"}, {"early": "late"}),
        (Beams, {"early": True}, {"early": None}),
        (PromptLookup, {"longest": 1}, {"longest": 0}),
        (PromptLookup, {"count": 1}, {"count": 0}),
    ],
)
def test_options_are_taken_to_their_limits(kind: Any, takes: dict[str, Any], refuses: dict[str, Any]) -> None:
    kind(**takes)
    with pytest.raises(UsageError) as error:
        kind(**refuses)
    assert error.value.received


def test_draws_depend_on_seed_row_and_step_alone() -> None:
    logits = np.log(np.arange(1.0, 9.0))
    sampling = Sampling(temperature=1.0, seed=5)
    order, shares = sampling.distribution(logits)
    assert order.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    for row, step in ((0, 0), (3, 0), (0, 3), (1, 2)):
        drawn = np.random.default_rng([5, row, step]).random()
        wanted = int(order[np.searchsorted(np.cumsum(shares), drawn, side="right")])
        assert sampling.choose(logits, row=row, step=step) == wanted
    assert sampling.choose(logits) == sampling.choose(logits, row=0, step=0)
    drawn_of = [Sampling(temperature=1.0, seed=5).choose(logits, row=r, step=s) for r in range(3) for s in range(3)]
    assert len(set(drawn_of)) > 3


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [-np.inf, -np.inf]])
def test_of_no_numbers_none_is_chosen(logits: list[float]) -> None:
    with pytest.raises(UsageError, match="no token can be chosen: the logits are not finite"):
        Sampling().choose(np.array(logits))
    assert Sampling().choose(np.array([-np.inf, 1.0])) == 1


@pytest.mark.parametrize(
    "asks", [{"banned": (2,)}, {"banned_first": (2,)}, {"first": 2}, {"last": 2}, {"first": -1}, {"banned": (0, -1)}]
)
def test_rules_name_ids_of_the_vocabulary(asks: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not in the vocabulary") as error:
        TokenRules(**asks).apply(np.zeros(2), prompt=[], generated=[])
    assert error.value.received == "ids are 0 to 1"
    TokenRules(**{name: (0,) if isinstance(ids, tuple) else 1 for name, ids in asks.items()}).apply(
        np.zeros(2), prompt=[], generated=[]
    )


def test_an_end_that_the_model_has_no_logit_of_is_no_matter() -> None:
    found = TokenRules(fewest=1).apply(np.zeros(3), prompt=[], generated=[], end=[2, 3])
    assert found.tolist() == [0, 0, -np.inf]
    none = np.full(2, -np.inf)
    assert np.isneginf(TokenRules(banned=(0,)).apply(none, prompt=[], generated=[])).all(), "the model allows no token"


@pytest.mark.parametrize(
    ("chosen", "made", "full", "ending"),
    [
        (1, 1, False, None),
        (1, 3, False, "count"),
        (1, 3, True, "context"),
        (2, 3, True, "stop"),
        (3, 3, True, "end"),
        (4, 1, False, "end"),
    ],
)
def test_why_a_row_ends(chosen: int, made: int, full: bool, ending: str | None) -> None:
    """If several reasons apply, the first one in order is reported. `until` is called for every token."""
    asked: list[tuple[int, int]] = []

    def until(number: int, token: int) -> bool:
        asked.append((number, token))
        return token in (2, 4)

    choosing = Choosing(3, stop=frozenset({3, 4}), until=until, likely=2)
    logits = np.array([0.5, 1.0, 1.0, -1.0, 0.0])
    scores = log_probabilities(logits)
    token = choosing.token(logits, 9, [0] * (made - 1) + [chosen], full)
    assert token == Token(9, chosen, ending, float(scores[chosen]), ((1, float(scores[1])), (2, float(scores[2]))))  # type: ignore[arg-type]
    assert token.last == (ending is not None)
    assert asked == [(9, chosen)]
    assert Choosing(3).token(logits, 9, [1], full) == Token(9, 1, "context" if full else None)
    assert Choosing(3, likely=0).token(logits, 9, [1], full).logprob == float(scores[1])


def test_the_last_token_may_be_a_given_one() -> None:
    choosing = Choosing(2, rules=TokenRules(last=0, fewest=2), stop=frozenset({1}))
    assert choosing.choose(np.array([1.0, 3.0, 2.0]), 0, [], []) == 2
    assert choosing.choose(np.array([1.0, 3.0, 2.0]), 0, [], [2]) == 0


@pytest.mark.parametrize("rules", [None, TokenRules(banned=(0,))])
def test_a_draw_is_told_its_row_and_step(rules: TokenRules | None) -> None:
    asked: list[Any] = []
    draws: Any = SimpleNamespace(choose=lambda scores, **how: asked.append((scores.tolist(), how)) or 1)
    assert Choosing(9, draws, rules).choose(np.zeros(2), 5, [1], [1, 1, 1]) == 1
    assert asked == [([-np.inf if rules else 0.0, 0.0], {"row": 5, "step": 3})]


def test_default_rules_of_all_texts() -> None:
    def defaults(function: Any) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}

    nothing = {"sampling": None, "rules": None, "stop": (), "until": None, "likely": None, "inputs": None}
    assert defaults(generate) == nothing
    assert defaults(speculate) == {**nothing, "tally": None, "pace": None}
    assert defaults(beam_search) == {"beams": None, "rules": None, "stop": (), "inputs": None}


@pytest.mark.parametrize("most", [-1, True, 1.5, "3"])
def test_a_number_of_tokens_is_whole(most: Any) -> None:
    with pytest.raises(UsageError, match="most must be a number of tokens, 0 or more") as error:
        count_of(most)
    assert error.value.received == repr(most)
    assert [count_of(0), count_of(np.int64(3))] == [0, 3]


def held(full: str = "error", **more: Any) -> Any:
    """Return a stand-in for a session, with these properties."""
    facts = {"capacity": 4, "full": full, "who_takes": "the model", "free": 0, "length": lambda row: row}
    facts["prompt"] = lambda ids, **inputs: RowPrompt(ids, prologue=inputs)
    return SimpleNamespace(derived=SimpleNamespace(sampling=None), **{**facts, **more})


def test_prompts_fill_a_row_at_most() -> None:
    assert [p.tokens for p in checked_prompts(held(), [(1, 2, 3, 4), [5]], None)] == [[1, 2, 3, 4], [5]]
    assert checked_prompts(held(), [[1]], [{"x": 2}])[0].prologue == {"x": 2}
    for prompts, inputs in (([[1], []], None), ([[1], [1] * 5], None), ([[1], [2]], [{}])):
        with pytest.raises(UsageError):
            checked_prompts(held(), prompts, inputs)
    with pytest.raises(UsageError, match="the session has no free row"):
        generate(held(), [[1]], most=1)
    assert list(generate(held(), [], most=1)) == []
    assert list(generate(held(free=1), [[1]], most=0)) == []
    assert [is_full(held(), row) for row in (3, 4)] == [False, True]
    assert not is_full(held("slide"), 4)


def test_a_prompt_waits_for_the_one_that_shares_most() -> None:
    shared = {(5,): 3, (6,): 7, (7,): 7}
    made = held(prefix_length=lambda prompt: 3, shared=lambda prompt, other: shared[tuple(other.tokens)])
    prompt, five, six, seven = (RowPrompt(ids) for ids in ([1] * 9, [5], [6], [7]))
    assert prompt_ahead(made, prompt, {1: five}) is None, "at most the stored tokens"
    assert prompt_ahead(made, prompt, {1: five, 2: six, 3: seven}) == (2, 7)
    assert prompt_ahead(made, prompt, {2: six, 4: RowPrompt([1] * 9)}) == (4, 9)


# -- guesses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lookup", "tokens", "most", "guessed"),
    [
        (PromptLookup(), [1, 2, 3, 4, 1, 2, 3], 9, [4, 1, 2, 3]),
        (PromptLookup(), [9, 3, 5, 1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        (PromptLookup(longest=1), [3, 4, 3, 5, 3], 9, [5, 3]),
        (PromptLookup(count=1), [3, 4, 3, 5, 3], 9, [5]),
        (PromptLookup(), [*range(20), *range(3)], 9, [3, 4, 5, 6, 7, 8, 9, 10]),
        (PromptLookup(), [1, 2], 9, []),
        (PromptLookup(), [1], 9, []),
        (PromptLookup(), [1, 1], 9, [1]),
    ],
)
def test_tokens_that_followed_before_are_proposed(
    lookup: PromptLookup, tokens: list[int], most: int, guessed: list[int]
) -> None:
    assert lookup.follow(tokens, most) == guessed


def test_how_near_the_second_was() -> None:
    logits = np.array([1.0, 4.0, 2.5], np.float32)
    assert [_margin(logits, 1), _margin(logits, 2)] == [1.5, math.inf]
    assert SpeculationTally().accepted_length == 0
    assert SpeculationTally(calls=4, accepted=6).accepted_length == 1.5


class _Draft:
    """A stand-in for a draft model's session. Its most likely next token is the last token plus one."""

    capacity, chunk, free = 20, 8, 1
    derived = SimpleNamespace(carries=False, graph=SimpleNamespace(name="m"))

    def __init__(self, length: int = 0) -> None:
        self.calls: list[Any] = []
        self.at = length

    def open(self) -> int:
        return 7

    def length(self, row: int) -> int:
        return self.at

    def prefill(self, tokens: dict[int, list[int]]) -> None:
        self.calls.append(("prefill", tokens))

    def verify(self, row: int, tokens: Sequence[int]) -> Any:
        return np.eye(60)[[*tokens[:-1], tokens[-1] + 1]]

    def accept(self, row: int, tokens: Sequence[int]) -> None:
        self.calls.append(("accept", row, list(tokens)))

    def close(self, row: int) -> None:
        self.calls.append(("close", row))


@pytest.mark.parametrize(
    ("count", "given", "most", "length", "guessed", "read"),
    [
        (4, 3, 9, 0, [3, 4, 5, 6], False),
        (4, 3, 2, 0, [3, 4], False),
        (4, 18, 9, 17, [18, 19], False),
        (4, 20, 9, 19, [], False),
        (9, 1, 9, 0, [1, 2, 3, 4, 5, 6, 7], False),
        (4, 4, 9, 0, [4, 5, 6, 7], False),
        (4, 5, 9, 0, [5, 6, 7, 8], True),
        (1, 3, 9, 0, [3], False),
        (1, 4, 9, 0, [4], True),
        (4, 3, 9, 3, [], False),
    ],
)
def test_a_draft_guesses_as_much_as_its_row_takes(
    count: int, given: int, most: int, length: int, guessed: list[int], read: bool
) -> None:
    """If the new tokens and the drafted tokens do not fit into one call, all new tokens but the last are prefilled
    first.
    """
    own: Any = _Draft(length)
    draft = DraftModel(own, count=count)
    draft.begin()
    assert draft.follow(range(given), most) == guessed
    new = list(range(length, given))
    wanted: list[Any] = [("prefill", {7: new[:-1]})] if read else []
    assert own.calls == [*wanted, *([("accept", 7, new[-1:] if read else new)] if guessed else [])]
    draft.end()
    draft.end()
    assert own.calls[-1] == ("close", 7)
    assert own.calls.count(("close", 7)) == 1
    assert DraftModel(own).count == 4


@pytest.mark.parametrize(("ends", "shares"), [((0,), (0.9, 0.0)), ((0, 5), (0.45, 0.4))])
def test_the_number_of_beams_stays_if_each_may_end(ends: tuple[int, ...], shares: tuple[float, float]) -> None:
    """Each continuation needs a row. The first continuation of a beam takes the beam's row, the others take forks. The
    row of a beam without a continuation is closed.
    """
    rows, closed = iter(range(1, 99)), list[int]()
    own: Any = SimpleNamespace(capacity=99, full="error", fork=lambda row: next(rows), close=closed.append)
    task = _Task(own, Beams(3, early="never"), TokenRules(), frozenset(ends))
    search = _Search(task, [1], 10, 0)
    logits = np.log([shares[0], 0.04, 0.03, 0.02, 0.01, shares[1] or 1e-9])
    search.logits = {0: logits}
    assert search.advance() == {0: 1, 1: 2, 2: 3}
    search.logits = dict.fromkeys(range(3), logits)
    assert search.advance() == {0: 1, 3: 2, 1: 1}
    assert [beam.made for beam in search.going] == [(1, 1), (1, 2), (2, 1)]
    assert closed == [2]
    if len(ends) == 1:
        assert [text.tokens for text in search.finished] == [(0,), (1, 0), (2, 0)]
    assert search.best() == search.finished[:1]
    search.close()
    assert closed == [2, 0, 3, 1]


# -- slots -------------------------------------------------------------------------------------------------------------


def slots(count: int = 2, *, whole: bool = False, rings: Sequence[Ring] = ()) -> Slots:
    states: Any = SimpleNamespace(kinds=SimpleNamespace(ports=()))
    return Slots(states, count, rings, capacity=CAPACITY, whole=whole)


@pytest.mark.parametrize(
    ("tokens", "other", "whole", "worth"),
    [
        (range(20), range(16), False, 16),
        (range(20), range(15), False, 0),
        (range(16), range(16), False, 0),  # the logits of the last token must be computed
        (range(17), range(17), False, 16),
        (range(20), [*range(18), 99], False, 18),
        (range(20), [*range(18), 99], True, 0),
        (range(20), range(18), True, 18),
        (range(20), [99, *range(19)], False, 0),
    ],
)
def test_value_of_a_cached_text(tokens: Any, other: Any, whole: bool, worth: int) -> None:
    assert slots(whole=whole).worth(RowPrompt(list(tokens)), RowPrompt(list(other))) == worth


@pytest.mark.parametrize(
    ("written", "length", "holds"),
    [(8, 1, True), (9, 1, False), (9, 4, True), (9, 3, False), (10, 4, False), (10, 5, True)],
)
def test_a_ring_holds_what_no_write_took_away(written: int, length: int, holds: bool) -> None:
    assert Ring(8, 3).holds(Row(written=written), length) == holds


def test_slots_are_given_out_from_the_first_and_the_longest_unused() -> None:
    made = slots(3)
    assert [made.take(), made.take()] == [0, 1]
    assert made.free == 1
    made.rows |= {0: Row([1] * 20), 1: Row([2] * 20)}
    made.close(1, keep=True)
    made.close(0, keep=True)
    assert made.free == 3
    assert [made.take(), made.take(), made.take()] == [2, 1, 0]
    with pytest.raises(UsageError, match="all 0 rows are open"):
        made.take()
    for row, keep in ((Row([1] * 20, is_lost=True), True), (Row([]), True), (Row([1] * 20), False)):
        made.rows = {0: row}
        made.close(0, keep=keep)
        assert made.held(RowPrompt([1] * 30)) == 0
        assert made.take() == 0


def test_a_text_goes_on_in_its_own_slot_or_in_a_copy() -> None:
    made, text = slots(2), list(range(30))
    made.rows[made.take()] = Row(text, written=40)
    made.close(0, keep=True)
    assert made.held(RowPrompt([*text, 7])) == 30
    assert made.resume(RowPrompt([*text[:20], 7, 8])) == 1, "a copy: the whole text may be continued as well"
    assert made.rows[1] == Row(text[:20], written=40)
    assert made.resume(RowPrompt([*text, 7])) == 0
    assert made.rows[0] == Row(text, written=40)
    made.close(1, keep=False)
    assert made.fork(0) == 1
    assert made.rows[1] == made.rows[0]
    assert made.rows[1].tokens is not made.rows[0].tokens
    made.close(0, keep=False)
    made.close(1, keep=False)
    assert made.resume(RowPrompt([9] * 20)) is None
    assert not made.rows


def test_the_own_slot_is_truncated_if_no_other_is_free() -> None:
    made, text = slots(1), list(range(30))
    made.rows[made.take()] = Row(text, written=30)
    made.close(0, keep=True)
    assert made.resume(RowPrompt([*text[:20], 7])) == 0
    assert made.rows == {0: Row(text[:20], written=30)}


# -- a session's calls -------------------------------------------------------------------------------------------------


class _Model:
    """A stand-in for a stepped model that records calls. The logits of each token encode the id before it."""

    def __init__(self, **facts: Any) -> None:
        entry = SimpleNamespace(inputs=())
        graph = SimpleNamespace(name="m", states={}, symbols={}, functions={"verify": entry, "prologue": entry})
        port_names = {name: name for name in ("rows", "start", "last")}
        self.derived: Any = SimpleNamespace(
            **{"context": 100, "windows": {}, "memories": {}, "slots": SLOTS, "capacity": CAPACITY, "graph": graph,
               "port_names": port_names, "prologue": (), "has_prologue": False, "carries": False, "generated": {},
               "may_be_empty": (), "sampling": None, **facts}
        )  # fmt: skip
        self.calls: list[tuple[str, Any]] = []
        self.exact_rows = True

    def new_states(self, **sizes: int) -> Any:
        return SimpleNamespace(kinds=SimpleNamespace(ports=()), nbytes=2_500_000)

    def entry(self, name: str) -> Any:
        def call(states: Any, tokens: Any, **inputs: Any) -> Any:
            self.calls.append((name, (tokens.shape, inputs["start"].tolist())))
            last = inputs.get("last")
            wide = tokens[:, :, None].repeat(2, 2)
            return {"logits": wide if last is None else wide[np.arange(len(wide)), last][:, None]}

        return call


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    ports = SimpleNamespace(tokens="tokens", dtype=np.int64, vocabulary=60, logits="logits")
    monkeypatch.setattr(session, "token_ports", lambda derived: ports)

    def made(model: _Model | None = None, **how: Any) -> tuple[Any, Session]:
        model = model or _Model()
        return model, Session(model.derived, model, **how)  # type: ignore[arg-type]

    return made


def test_a_session_has_what_is_not_said(opened: Any) -> None:
    model, own = opened()
    assert (own.free, own.capacity, own.chunk, own.full, own.resumes) == (8, 100, 256, "error", True)
    assert (own.nbytes, own.vocabulary, own.who_takes) == (2_500_000, 60, "the model")
    assert opened(capacity=50)[1].who_takes == "a row of the session"
    model.exact_rows = False
    assert not opened(model)[1].resumes
    assert opened(model, resumes=True)[1].resumes
    row = own.open()
    own.prefill({row: [1, 2, 3]})
    assert repr(own) == "<session of m: 1 of 8 rows open (0: 3), 100 positions each, 2.5 MB>"


@pytest.mark.parametrize(
    ("window", "chunk", "capacity", "ring"),
    [(100, 28, 1000, 128), (100, 29, 1000, 256), (100, 256, 200, 256), (1, 1, 1000, 128)],
)
def test_a_ring_is_a_whole_number_of_blocks(window: int, chunk: int, capacity: int, ring: int, opened: Any) -> None:
    sizes: dict[str, int] = {}
    value = SimpleNamespace(type=SimpleNamespace(symbols=(SLOTS, CAPACITY, "W")))
    model = _Model(windows={"W": window}, context=None)
    model.derived.graph.states = {"k": value}
    model.new_states = lambda **given: sizes.update(given)  # type: ignore[assignment, method-assign]
    opened(model, rows=3, chunk=chunk, capacity=capacity)
    assert sizes == {SLOTS: 3, CAPACITY: capacity, "W": ring}


def test_prompts_are_cut_and_padded(opened: Any) -> None:
    model, own = opened(chunk=40, capacity=90)
    one, other = own.open(), own.open()
    found = own.prefill({one: range(50), other: range(3)})
    assert model.calls == [("prefill", ((1, 40), [0])), ("prefill", ((1, 16), [0])), ("prefill", ((1, 16), [40]))]
    assert {row: int(logits[0]) for row, logits in found.items()} == {one: 49, other: 2}
    assert own.tokens(one) == tuple(range(50))
    model.calls.clear()
    own.prefill({one: range(17), other: range(30)})
    assert model.calls == [("prefill", ((2, 32), [50, 3]))]
    model.calls.clear()
    own.prefill({one: range(17), other: range(17)})  # padded to one length, the tokens do not fit into the first row
    assert model.calls == [("prefill", ((1, 17), [67])), ("prefill", ((1, 32), [33]))]
    model.calls.clear()
    step = own.step({one: 5, other: 6})
    assert model.calls == [("step", ((2, 1), [84, 50]))]
    assert {row: int(logits[0]) for row, logits in step.items()} == {one: 5, other: 6}


def test_a_row_is_filled_to_its_last_position(opened: Any) -> None:
    _, own = opened(capacity=20)
    row = own.open()
    own.prefill({row: range(19)})
    with pytest.raises(UsageError, match="the cache of row 0 is full"):
        own.prefill({row: [1, 2]})
    own.step({row: 1})
    with pytest.raises(UsageError, match="the cache of row 0 is full"):
        own.step({row: 1})
    model, own = opened(capacity=20, full="slide")
    row = own.open()
    own.prefill({row: range(20)})
    model.calls.clear()
    own.prefill({row: range(10)})
    assert model.calls == [("prefill", ((1, 16), [0])), ("prefill", ((1, 10), [10]))]
    assert own.length(row) == 20
    with pytest.raises(UsageError, match="the cache of row 0 is full"):
        own.prefill({row: range(11)})


def test_verified_tokens_are_as_many_as_a_call_takes(opened: Any) -> None:
    _, own = opened(chunk=5, capacity=8)
    row = own.open()
    assert own.verify(row, range(5)).shape == (5, 2)
    own.accept(row, range(4))
    assert own.length(row) == 4
    assert len(own.verify(row, range(4))) == 4
    for count in (5, 6):
        with pytest.raises(UsageError, match=f"row 0 has no room for {count} tokens at once"):
            own.verify(row, range(count))


@pytest.mark.parametrize("token", [0, 59])
def test_ids_are_of_the_vocabulary(token: int, opened: Any) -> None:
    _, own = opened()
    row = own.open()
    own.prefill({row: [token]})
    for wrong in (60, -1):
        with pytest.raises(UsageError, match=f"token {wrong} is not in the vocabulary"):
            own.step({row: wrong})


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"rows": True}, {"capacity": 101}, {"chunk": 0}, {"capacity": 1.5}])
def test_sizes_of_a_session(sizes: dict[str, Any], opened: Any) -> None:
    with pytest.raises(UsageError):
        opened(**sizes)
    opened(rows=1, capacity=100, chunk=1)


def test_memory_of_a_size_that_rows_bring(opened: Any) -> None:
    sizes: dict[str, int] = {}
    model = _Model(memories={"C_S": "S"}, context=None, has_prologue=True, prologue=("source",))
    model.derived.graph.states = {"k": SimpleNamespace(type=SimpleNamespace(symbols=("C_S",)))}
    model.new_states = lambda **given: sizes.update(given)  # type: ignore[assignment, method-assign]
    opened(model, capacity=5, memory={"S": 7})
    assert sizes == {"C_S": 7}
    for how in ({}, {"memory": {"S": 0}}, {"memory": {"S": 7, "T": 1}}):
        with pytest.raises(UsageError):
            opened(model, capacity=5, **how)
    model.derived.graph.symbols = {"C_S": SimpleNamespace(upper=9)}
    assert opened(model, capacity=5)[1].resumes
    assert sizes == {"C_S": 9}
    with pytest.raises(UsageError, match="a row keeps at most 9 values along S") as caught:
        opened(model, capacity=5, memory={"S": 10})
    assert caught.value.hint == "memory={'S': 9}, or no memory="
    with pytest.raises(UsageError, match="a session needs a capacity"):
        opened(model)


# -- a scheduler -------------------------------------------------------------------------------------------------------


def test_a_scheduler_takes_as_many_as_may_wait(opened: Any) -> None:
    _, own = opened(chunk=9)
    assert (Scheduler(own).queue, Scheduler(own).budget) == (256, 64)
    made, events = Scheduler(own, queue=2), list[Any]()
    order = (TextOrder((1,), Choosing(3)), events.append)
    with pytest.raises(UsageError, match="11 texts at once, and at most 10 may be generated or wait"):
        made.submit([order] * 11)
    made.submit([order] * 9)
    made.submit([order])
    with pytest.raises(QueueFull, match="queue is full: 10 texts wait"):
        made.submit([order])
    assert made.load() == Load(waiting=10)
    made.close()
    assert events == [Ended(Cut.CLOSED)] * 10
    with pytest.raises(UsageError, match="the scheduler is closed"):
        made.submit([order])
    for prompt in ((0,) * 100, (59,)):
        made.check(prompt)
    for prompt in ((), (0,) * 101, (60,), (-1,)):
        with pytest.raises(UsageError):
            made.check(prompt)


def test_a_load_is_what_a_scheduler_does_and_has_done(opened: Any) -> None:
    """Loads are read when the second token of each text is reported, and after all texts have ended."""
    _, own = opened(rows=2, chunk=4)
    made, loads, ends = Scheduler(own, budget=6), list[Load](), list[Any]()

    def tell(event: Any) -> None:
        (ends if isinstance(event, Ended) else loads).append(made.load())

    made.submit([(TextOrder((1, 2, 3, 4, number), Choosing(2)), tell) for number in range(3)])
    assert made.load() == Load(waiting=3)
    made.start()
    assert made._thread is not None
    assert made._thread.daemon, "it does not keep the process alive"
    made.close(drain=60.0)
    assert len(ends) == 3
    assert loads[2] == Load(running=2, waiting=1, steps=1, prefilled=10, generated=2, filled=12)
    assert made.load() == Load(steps=2, prefilled=15, generated=6)


def test_an_order_is_late_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: 5.0))
    for until, cut in ((None, None), (5.0, None), (4.9, Cut.LATE), (0.0, Cut.LATE)):
        ticket = Ticket(TextOrder((1,), Choosing(3), until=until), lambda event: None)
        assert (ticket.cut, ticket.reused) == (cut, 0)
        ticket.cancel()
        assert ticket.cut is Cut.CANCELLED


def test_an_end_is_told_once_whatever_the_receiver_raises() -> None:
    events: list[Any] = []

    def fails(what: Any) -> None:
        events.append(what)
        raise RuntimeError

    ticket = Ticket(TextOrder((1,), Choosing(3)), fails)
    ticket.tell(Token(0, 1))
    assert ticket.cut is Cut.CANCELLED
    ticket.end()
    ticket.end(Cut.LATE)
    assert events == [Token(0, 1), Ended()]


def test_unexpected_errors_are_short() -> None:
    error = scheduler._failure(ValueError("e" * 300))
    assert (error.what, error.received) == ("a step failed", "ValueError: " + "e" * 288)
