"""Sessions: rows open, grow, fork, fill up and close. Each row has the logits of its tokens alone."""

from __future__ import annotations

import re
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from tests.stepped_models import MODELS, Model, Tokens
from treadle.compiled import Compiled
from treadle.ir.errors import BackendError, Hint, PassError, UsageError
from treadle.runtime.generation import generate
from treadle.runtime.session import _ids

Array = np.ndarray[Any, Any]
CONTEXT = 64
SMALL = {"vocab": 50, "dim": 32, "heads": 4, "layers": 2, "context": CONTEXT}


@pytest.fixture(scope="module")
def exe() -> Compiled:
    return t.compile("gpt2", seed=3, **SMALL)


def whole(exe: Compiled, tokens: list[int]) -> Array:
    """Return the logits after each of the tokens, from a run over the whole text."""
    found: Array = exe(tokens=np.array([tokens]))["logits"][0]
    return found


def near(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))


def test_rows_of_different_lengths_grow_side_by_side(exe: Compiled) -> None:
    rng = np.random.default_rng(0)
    texts = {n: rng.integers(0, 50, length).tolist() for n, length in enumerate((3, 40, 1, 17))}
    session = exe.session(rows=3, capacity=50, chunk=16)
    rows = {n: session.open() for n in (0, 1, 2)}
    logits = session.prefill({rows[n]: texts[n] for n in rows})
    for n, row in rows.items():
        near(logits[row], whole(exe, texts[n])[-1])
    for step in range(4):
        given = {row: int(rng.integers(50)) for n, row in rows.items() if n != step}
        logits = session.step(given)
        for n, row in rows.items():
            if row in given:
                texts[n].append(given[row])
                near(logits[row], whole(exe, texts[n])[-1])
                assert session.tokens(row) == tuple(texts[n])
        if step == 1:  # one row closes, and another takes its slot
            session.close(rows.pop(2))
            rows[3] = session.open()
            near(session.prefill({rows[3]: texts[3]})[rows[3]], whole(exe, texts[3])[-1])


def test_a_fork_goes_on_by_itself(exe: Compiled) -> None:
    session = exe.session(rows=2, capacity=32)
    row = session.open()
    session.prefill({row: [1, 2, 3, 4, 5]})
    other = session.fork(row)
    logits = session.step({row: 6, other: 7})
    near(logits[row], whole(exe, [1, 2, 3, 4, 5, 6])[-1])
    near(logits[other], whole(exe, [1, 2, 3, 4, 5, 7])[-1])
    with pytest.raises(UsageError, match="all 2 rows are open"):
        session.fork(row)


def test_tokens_that_are_verified_are_appended_only_when_they_are_accepted(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=32)
    row = session.open()
    session.prefill({row: [1, 2, 3]})
    near(session.verify(row, [4, 5, 6]), whole(exe, [1, 2, 3, 4, 5, 6])[3:])
    assert session.length(row) == 3
    session.accept(row, [4])
    near(session.step({row: 9})[row], whole(exe, [1, 2, 3, 4, 9])[-1])


def test_other_tokens_than_were_verified_are_not_accepted(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=32)
    row = session.open()
    session.prefill({row: [1, 2, 3]})
    with pytest.raises(UsageError, match="accepts only tokens that were just verified"):
        session.accept(row, [4])
    session.verify(row, [4, 5, 6])
    with pytest.raises(UsageError, match="accepts only tokens that were just verified"):
        session.accept(row, [4, 6])
    session.accept(row, [])
    with pytest.raises(UsageError, match="where none were verified"):
        session.accept(row, [4])
    session.verify(row, [4, 5])
    session.step({row: 9})  # overwrites the tokens after it
    with pytest.raises(UsageError, match="where none were verified"):
        session.accept(row, [4])
    near(session.step({row: 8})[row], whole(exe, [1, 2, 3, 9, 8])[-1])


def test_a_row_that_is_full_says_so_and_others_go_on(exe: Compiled) -> None:
    session = exe.session(rows=2, capacity=8)
    full, other = session.open(), session.open()
    session.prefill({full: [1] * 8, other: [2, 3]})
    with pytest.raises(UsageError, match=f"the cache of row {full} is full") as refused:
        session.step({other: 4, full: 5})
    assert "8 of 8 positions" in str(refused.value)
    assert session.tokens(other) == (2, 3), "nothing was appended"
    near(session.step({other: 4})[other], whole(exe, [2, 3, 4])[-1])


@pytest.mark.parametrize(
    ("settings", "filled", "more", "ways"),
    [
        ({"capacity": 8}, 8, 1, ["capacity=9", "full='slide'"]),
        ({"capacity": 8}, 2, 7, ["capacity=9", "full='slide' at most 4"]),
        ({"capacity": 8, "full": "slide"}, 2, 7, ["capacity=9", "at most 4"]),
        ({}, CONTEXT, 1, ["full='slide'"]),
        ({"full": "slide"}, 0, CONTEXT + 1, [f"at most {CONTEXT // 2}"]),
    ],
)
def test_a_full_row_names_settings_that_it_has_not(
    settings: dict[str, Any], filled: int, more: int, ways: list[str], exe: Compiled
) -> None:
    """Each way of the hint, followed, makes room."""

    def filled_session(**chosen: Any) -> Any:
        session = exe.session(rows=1, **chosen)
        row = session.open()
        if filled:
            session.prefill({row: [1] * filled})
        return session

    with pytest.raises(UsageError, match="the cache of row 0 is full") as refused:
        filled_session(**settings).prefill({0: [2] * more})
    hint = str(refused.value.hint)
    found = [" ".join(re.findall(r"capacity=\d+|full='slide'|at most \d+", way)) for way in hint.split(", or ")]
    assert found == ways
    for way in ways:
        chosen = dict(settings)
        for name, value in re.findall(r"(\w+)=(\S+)", way):
            chosen[name] = eval(value)
        step = int(way.partition("at most ")[2] or more)
        session = filled_session(**chosen)
        for at in range(0, more, step):
            session.prefill({0: [2] * min(step, more - at)})


def test_a_row_that_slides_forgets_its_older_half(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=8, full="slide")
    row = session.open()
    tokens = np.random.default_rng(1).integers(0, 50, 30).tolist()
    session.prefill({row: tokens[:6]})
    for token in tokens[6:]:
        logits = session.step({row: token})[row]
        assert session.length(row) <= 8
    near(logits, whole(exe, tokens[-session.length(row) :])[-1])
    assert session.tokens(row) == tuple(tokens)


def test_numbers_may_be_those_of_numpy_and_rows_none(exe: Compiled) -> None:
    session = exe.session(rows=np.int64(2), capacity=np.int64(16))  # type: ignore[arg-type]
    row = session.open()
    session.prefill({row: np.array([1, 2])})  # type: ignore[dict-item]
    assert session.step({}) == session.prefill({}) == {}
    near(session.step({np.int64(row): np.int32(3)})[row], whole(exe, [1, 2, 3])[-1])  # type: ignore[dict-item]
    assert session.tokens(row) == (1, 2, 3)
    assert all(type(token) is int for token in session.tokens(row))


@t.model
def summing(tokens: Tokens) -> t.Tensor:
    """A model that updates sums before it looks up an id that is too large for the second table."""
    x = t.cumsum(t.embed(tokens, 40, 12, name="wte"), axis=1)
    return t.linear(x + t.embed(tokens * 2, 40, 12, name="twice"), 40, name="logits")


@t.model
def caching(tokens: Tokens) -> t.Tensor:
    """A model that caches keys and values before it looks up an id that is too large for the second table."""
    x = t.embed(tokens, 40, 12, name="wte")
    x = x + t.self_attention(x, 3, mask=t.causal, name="attn")
    return t.linear(x + t.embed(tokens * 2, 40, 12, name="twice"), 40, name="logits")


@pytest.mark.parametrize("model", [summing, caching])
def test_a_call_that_is_broken_off_changes_no_row_unseen(model: Model) -> None:
    exe = t.compile(model, seed=1)
    session = exe.session(rows=3, capacity=32)
    row, other = session.open(), session.open()
    session.prefill({row: [1, 2], other: [3]})
    with pytest.raises(BackendError, match="index 60 is outside"):
        session.step({row: 30})
    near(session.step({other: 4})[other], whole(exe, [3, 4])[-1])
    assert session.tokens(row) == (1, 2)
    if model is summing:
        for use in (lambda: session.step({row: 5}), lambda: session.fork(row)):
            with pytest.raises(UsageError, match=f"row {row} cannot continue"):
                use()
        session.close(row)
        row = session.open()
        session.prefill({row: [1, 2]})
    near(session.step({row: 5})[row], whole(exe, [1, 2, 5])[-1])


def test_a_row_that_is_broken_off_while_it_slides_keeps_its_text(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=8, full="slide")
    row = session.open()
    session.prefill({row: [1, 2, 3, 4, 5, 6, 7, 8]})

    def interrupted(*states: object, **given: object) -> None:
        raise KeyboardInterrupt

    session._prefill = interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        session.step({row: 9})
    assert session.tokens(row) == (1, 2, 3, 4, 5, 6, 7, 8)
    with pytest.raises(UsageError, match=f"row {row} cannot continue"):
        session.step({row: 9})


@t.model
def tagged(tokens: Tokens) -> dict[str, t.Tensor]:
    """A model with fewer classes than ids, and another output [B, S, width] before the logits."""
    x = t.embed(tokens, 40, 12, name="wte")
    x = x + t.self_attention(x, 3, mask=t.causal, name="attn")
    return {"hidden": x, "logits": t.linear(x, 5, name="head")}


@t.model
def unnamed(tokens: Tokens) -> dict[str, t.Tensor]:
    x = t.embed(tokens, 40, 12, name="wte")
    return {"hidden": x, "scores": t.linear(x, 5, name="head")}


@t.model
def of_vectors(x: Annotated[t.Tensor, t.f32["B S 12"]]) -> t.Tensor:
    return t.linear(x + t.self_attention(x, 3, mask=t.causal, name="attn"), 5, name="head")


@t.model
def oddly_named(rows: Tokens, start: Annotated[t.Tensor, t.f32["B 6"]]) -> t.Tensor:
    x = t.embed(rows, 40, 12, name="wte") * t.rearrange(t.linear(start, 12, name="seen"), pattern="b d -> b 1 d")
    return t.linear(x + t.self_attention(x, 3, mask=t.causal, name="attn"), 40, name="head")


def test_ids_are_those_of_the_table_and_logits_those_of_that_name() -> None:
    exe = t.compile(tagged, seed=1)
    session = exe.session(rows=1, capacity=8)
    row = session.open()
    near(session.prefill({row: [1, 39]})[row], whole(exe, [1, 39])[-1])
    with pytest.raises(UsageError, match="token 40 is not in the vocabulary"):
        session.step({row: 40})
    with pytest.raises(UsageError, match="returns hidden, scores for each token, and none is named logits"):
        t.compile(unnamed, seed=1).session(capacity=8)
    with pytest.raises(UsageError, match="feeds token ids, and of_vectors has no input for them") as caught:
        t.compile(of_vectors, seed=1).session(capacity=8)
    assert isinstance(caught.value.hint, Hint) and caught.value.hint.command.startswith("treadle run, ")


def test_inputs_may_be_named_as_a_step_names_its_rows() -> None:
    exe = t.compile(oddly_named, seed=1)
    session = exe.session(rows=2, capacity=8)
    start = np.arange(6, dtype=np.float32)
    session.open(start=-start)
    row = session.open(start=start)
    session.prefill({row: [1, 2]})
    (wanted,) = exe(rows=np.array([[1, 2, 3]]), start=start[None]).values()
    near(session.step({row: 3})[row], wanted[0, -1])


def test_errors_are_raised_before_anything_is_appended(exe: Compiled) -> None:
    session = exe.session(rows=2, capacity=16)
    row = session.open()
    session.prefill({row: [1, 2]})
    for wrong, what in (
        (lambda: session.step({row: 50}), "token 50 is not in the vocabulary"),
        (lambda: session.step({row: -1}), "token -1 is not in the vocabulary"),
        (lambda: session.prefill({row: []}), f"row {row} has no tokens to append"),
        (lambda: session.step({7: 1}), "row 7 is not open"),
        (lambda: session.close(7), "row 7 is not open"),
        (lambda: session.prefill({row: [1] * 15}), f"the cache of row {row} is full"),
        (lambda: session.open(picture=1), "begins with nothing"),
        (lambda: session.step({row: 2.5}), "a value that is not a token id"),
        (lambda: session.step({row: None}), "a value that is not a token id"),
        (lambda: session.prefill({row: 3}), "a value that is not a token id"),
        (lambda: session.prefill({row: np.array([[3]])}), "a value that is not a token id"),
        (lambda: session.prefill([[3]]), "tokens must be a mapping from integers to lists of integers"),
    ):
        with pytest.raises(UsageError, match=what):
            wrong()
    assert session.tokens(row) == (1, 2)
    near(session.step({row: 3})[row], whole(exe, [1, 2, 3])[-1])


def test_sizes_that_do_not_fit_are_refused(exe: Compiled) -> None:
    for options, what in (
        ({"capacity": 65}, "the model takes 64 positions"),
        ({"rows": 0}, "rows must be 1 or more"),
        ({"chunk": 0}, "chunk must be 1 or more"),
        ({"full": "stop"}, "'error' or 'slide'"),
        ({"memory": {"S": 5}}, "keep no value of a size S"),
    ):
        with pytest.raises(UsageError, match=what):
            exe.session(**options)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="not enough memory"):
        exe.session(rows=1 << 40)
    llama = t.compile("llama", vocab=50, dim=32, heads=4, layers=1, hidden=40)
    with pytest.raises(UsageError, match="needs a capacity"):
        llama.session()
    encoder = t.compile("bert", vocab=50, dim=32, heads=4, layers=1, hidden=40)
    with pytest.raises(PassError, match="attention: the axis is whole"):
        encoder.session(capacity=8)


def test_bytes_are_those_of_the_caches(exe: Compiled) -> None:
    session = exe.session(rows=3, capacity=20)
    assert session.nbytes == 2 * 2 * 3 * 20 * 32 * 4, "keys and values of two layers in float32"


def test_inputs_passed_once_belong_to_their_row() -> None:
    exe = t.compile(MODELS["t5"], seed=2)
    rng = np.random.default_rng(4)
    session = exe.session(rows=3, capacity=12, memory={"S": 9})
    sources = [rng.integers(0, 11, n) for n in (9, 2)]
    rows = [session.open(tokens=source, lengths=np.array(len(source))) for source in sources]
    texts = [[1, 2, 3], [4]]
    logits = session.prefill(dict(zip(rows, texts, strict=True)))
    logits |= session.step({rows[1]: 5})
    texts[1].append(5)
    for row, source, text in zip(rows, sources, texts, strict=True):
        wanted = exe(tokens=source[None], lengths=np.array([len(source)]), decoder_tokens=np.array([text]))["logits"]
        near(logits[row], wanted[0, -1])
    with pytest.raises(UsageError, match="begins with tokens, lengths"):
        session.open(tokens=sources[0])
    with pytest.raises(UsageError, match="room for 9 along S of tokens"):
        session.open(tokens=np.zeros(10, np.int64), lengths=np.array(10))
    with pytest.raises(UsageError, match="tokens of a row has no axis for the batch") as caught:
        session.open(tokens=sources[0][None], lengths=np.array(9))
    assert str(caught.value.hint) == "i64[S]; [0] of an array [B, S]"
    with pytest.raises(UsageError, match="lengths of a row has no axis for the batch") as caught:
        session.open(tokens=sources[0], lengths=np.array([9]))
    assert str(caught.value.hint) == "a number i64; [0] of an array [B]"
    session.close(session.open(tokens=sources[0][None][0], lengths=np.array([9])[0]))
    assert session.free == 1, "the row that could not begin took no slot"


def test_a_window_holds_ten_times_its_length_in_the_same_memory() -> None:
    exe = t.compile(MODELS["llama, windows"], seed=2)
    session = exe.session(rows=1, capacity=600, chunk=8)
    row = session.open()
    tokens = np.random.default_rng(5).integers(0, 11, 300).tolist()
    session.prefill({row: tokens[:280]})
    for token in tokens[280:]:
        logits = session.step({row: token})[row]
    near(logits, whole(exe, tokens)[-1])
    caches = [s for s in session.states.values() if s.shape[2] == 128]
    assert len(caches) == len(session.states), "every cache is a ring of one block"


def test_prompts_that_wait_join_as_others_finish(exe: Compiled) -> None:
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8], [10, 11], [12]]
    session = exe.session(rows=2, capacity=32)
    found: dict[int, list[int]] = {n: [] for n in range(5)}
    for token in generate(session, prompts, most=5):
        found[token.row].append(token.id)
    for n, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(5):
            text.append(int(whole(exe, text)[-1].argmax()))
        assert found[n] == text[len(prompt) :]
    assert session.free == 2


def test_probabilities_are_told(exe: Compiled) -> None:
    session = exe.session(rows=1, capacity=32)
    (token,) = generate(session, [[1, 2, 3]], most=1)
    assert token.logprob is None, "it was not requested"
    (token,) = generate(session, [[1, 2, 3]], most=1, likely=0)
    logits = whole(exe, [1, 2, 3])[-1].astype(np.float64)
    assert token.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), abs=1e-5)


def test_a_session_tells_its_rows() -> None:
    session = t.compile("gpt2", **SMALL).session(rows=3, capacity=8)
    mb = f"{session.nbytes / 1e6:.1f} MB"
    assert repr(session) == f"<session of gpt2: 0 of 3 rows open, 8 positions each, {mb}>"
    session.prefill({session.open(): [1, 2], session.open(): [1]})
    assert repr(session) == f"<session of gpt2: 2 of 3 rows open (0: 2, 1: 1), 8 positions each, {mb}>"


def test_axes_may_have_the_names_of_a_sessions_sizes() -> None:
    @t.model
    def rows_and_columns(tokens: Annotated[t.Tensor, t.i64["R C"]], *, vocab: int = 11, dim: int = 12) -> t.Tensor:
        x = t.embed(tokens, vocab, dim, name="wte")
        x = x + t.self_attention(x, 3, mask=t.causal & t.window(3), name="attn")
        return t.unembed(x, tied="wte")

    own = t.compile(rows_and_columns, backend="numpy")
    tokens = list(range(9))
    session = own.session(rows=1, capacity=16, chunk=4)
    near(session.prefill({(row := session.open()): tokens})[row], own(tokens=np.array([tokens]))["logits"][0, -1])


@pytest.mark.parametrize(
    ("token", "hint"),
    [
        ("a", "the ids of a text: tokenizer.ids"),
        ([3], "the ids of one row: tokens[0]"),
        (np.zeros(5, np.float32), "int(logits.argmax())"),
        (3.0, "integers"),
        (np.array(3.5), "integers"),
    ],
)
def test_the_hint_for_a_token_that_is_no_id(token: Any, hint: str) -> None:
    with pytest.raises(UsageError, match="not a token id") as caught:
        _ids("row 0", [token])
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize("tokens", [3, np.array(3), 4.5, np.array(4.5), None, {"input_ids": [1]}])
def test_the_hint_for_ids_that_are_no_list_names_one(tokens: Any) -> None:
    with pytest.raises(UsageError, match="not a token id") as caught:
        _ids("row 0", tokens)
    assert _ids("row 0", eval(str(caught.value.hint).replace("such as", ":").rpartition(":")[2]))
