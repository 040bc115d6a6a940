"""Inputs of a session next to the tokens: declared values, shared prefixes, every loop; images in requests."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from treadle.ir.errors import GraphError, ParseError, UsageError
from treadle.ir.text.parser import parse_graph
from treadle.runtime.beams import Beams, beam_search
from treadle.runtime.generation import Choosing, Token, generate
from treadle.runtime.scheduler import Scheduler, TextOrder
from treadle.runtime.speculation import PromptLookup, speculate
from treadle.serving.refusals import RequestRefusal
from treadle.serving.requests import Fields, read_chat

Array = np.ndarray[Any, Any]


@t.model
def placed(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    index: Annotated[t.Tensor, t.i64["B S"], t.generated(0)],
    position_ids: Annotated[t.Tensor, t.i64["B S 2"], t.generated("next")],
    features: Annotated[t.Tensor, t.f32["B N-1 dim"]],
    *,
    dim: int = 8,
) -> dict[str, t.Tensor]:
    rows = t.concat(t.expand(t.constant(0.0), shape=(features.shape[0], 1, dim)), features, axis=1)
    index = t.rearrange(index, pattern="b s -> b s 1")
    found = t.take_along_axis(rows, t.expand(index, shape=(None, None, dim)), axis=1)
    x = t.where(t.equal(index, 0), t.embed(tokens, 40, dim, name="embed"), found)
    x += t.linear(position_ids.cast(t.f32) * 0.1, dim, name="place")
    for _ in t.stack("layer", 2):
        x += t.self_attention(t.layer_norm(x, name="norm"), 2, causal=True, name="attn")
    return {"logits": t.unembed(x, tied="embed")}


@pytest.fixture(scope="module")
def exe() -> Any:
    return t.compile(placed, seed=2)


def whole(exe: Any, tokens: list[int], inputs: dict[str, Array]) -> Array:
    """Return logits [S, vocab] of a text whose inputs along the sequence cover a prefix of its tokens."""
    index, places = np.zeros(len(tokens), np.int64), inputs["position_ids"]
    index[: len(inputs["index"])] = inputs["index"]
    for _ in range(len(tokens) - len(places)):
        places = np.concatenate([places, np.full((1, 2), places.max(initial=-1) + 1)])
    given = {"index": index, "position_ids": places, "features": inputs["features"]}
    found: Array = exe(tokens=np.array([tokens]), **{name: x[None] for name, x in given.items()})["logits"]
    return found[0]


def row_inputs(seed: int, tokens: int, features: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    index = np.zeros(tokens, np.int64)
    index[2 : 2 + features] = 1 + np.arange(features)
    places = rng.integers(0, 30, (tokens, 2))
    return {"index": index, "position_ids": places, "features": rng.standard_normal((features, 8)).astype(np.float32)}


def near(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("features", [0, 1, 5])
def test_generated_tokens_have_the_declared_values(exe: Any, features: int) -> None:
    session = exe.session(rows=3, capacity=60, memory={"N": 7}, chunk=16)
    tokens = [int(i) for i in np.random.default_rng(features).integers(0, 40, 30)]
    inputs = row_inputs(features, 20, features)
    row = session.open(**inputs)
    logits = [session.prefill({row: tokens[:20]})[row]]
    logits += [session.step({row: token})[row] for token in tokens[20:25]]
    checked = session.verify(row, tokens[25:28])
    near(checked, whole(exe, tokens[:28], inputs)[25:])
    session.accept(row, tokens[25:27])
    fork = session.fork(row)
    logits.append(session.step({row: tokens[27], fork: tokens[28]})[row])
    near(np.array(logits[:6]), whole(exe, tokens[:25], inputs)[19:])
    near(logits[6], whole(exe, tokens[:28], inputs)[-1])
    near(session.step({fork: 3})[fork], whole(exe, [*tokens[:27], tokens[28], 3], inputs)[-1])


def test_an_input_that_is_left_out_has_the_declared_values(exe: Any) -> None:
    session = exe.session(rows=1, capacity=20, memory={"N": 2})
    row = session.open()
    empty = {
        "index": np.zeros(0, np.int64),
        "position_ids": np.zeros((0, 2), np.int64),
        "features": np.zeros((0, 8), "f"),
    }
    near(session.prefill({row: [1, 2, 3]})[row], whole(exe, [1, 2, 3], empty)[-1])


def test_a_row_that_slides_keeps_the_values_of_its_tokens(exe: Any) -> None:
    session = exe.session(rows=1, capacity=24, full="slide", memory={"N": 7})
    tokens, inputs = [int(i) for i in np.random.default_rng(3).integers(0, 40, 25)], row_inputs(3, 20, 4)
    row = session.open(**inputs)
    session.prefill({row: tokens[:24]})
    logits = session.step({row: tokens[24]})[row]
    values = session.prompt(tokens, **inputs).along
    rest = {name: x[12:] for name, x in values.items()} | {"features": inputs["features"]}
    near(logits, whole(exe, tokens[12:], rest)[-1])


def test_prefixes_are_shared_if_all_inputs_agree(exe: Any) -> None:
    session = exe.session(rows=3, capacity=60, memory={"N": 7}, resumes=True)
    tokens, inputs = [int(i) for i in np.random.default_rng(4).integers(0, 40, 30)], row_inputs(4, 25, 3)
    row = session.resume(tokens, **inputs)
    session.prefill({row: tokens})
    session.close(row, keep=True)

    def held(**changed: Array) -> int:
        return int(session.prefix_length(session.prompt([*tokens, 1], **{**inputs, **changed})))

    assert held() == 30
    assert held(features=inputs["features"] + 1) == held(features=inputs["features"][:2]) == 0
    moved = inputs["position_ids"].copy()
    moved[20, 1] += 1
    assert held(position_ids=moved) == 20
    moved[3, 0] += 1
    assert held(position_ids=moved) == 0, "fewer than 16 tokens"
    row = session.resume([*tokens, 1], **inputs)
    assert session.length(row) == 30
    near(session.prefill({row: [1]})[row], whole(exe, [*tokens, 1], inputs)[-1])


def test_every_loop_passes_the_inputs_on(exe: Any) -> None:
    tokens, inputs = [int(i) for i in np.random.default_rng(5).integers(0, 40, 20)], row_inputs(5, 20, 3)
    text = list(tokens)
    for _ in range(6):
        text.append(int(whole(exe, text, inputs)[-1].argmax()))
    wanted = text[20:]

    def session() -> Any:
        return exe.session(rows=4, capacity=40, memory={"N": 7}, resumes=True)

    made: list[list[int]] = [[], []]
    for token in generate(session(), [tokens] * 2, most=6, inputs=[inputs, dict(inputs)]):
        made[token.row].append(token.id)
    assert made == [wanted, wanted]
    ((best,),) = beam_search(session(), [tokens], most=6, beams=Beams(1), inputs=[inputs])
    assert list(best.tokens) == wanted
    guessed = speculate(session(), [tokens], most=6, guess=PromptLookup(), inputs=[inputs])
    assert [token.id for token in guessed] == wanted
    told: list[int] = []
    scheduler = Scheduler(session())
    begin = scheduler.session.prompt(tokens, **inputs)
    order = TextOrder(tuple(tokens), Choosing(6), begin=begin)
    scheduler.submit([(order, lambda event: told.append(event.id) if isinstance(event, Token) else None)] * 2)
    scheduler.start()
    scheduler.close(drain=20.0)
    assert sorted(told) == sorted(wanted * 2)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"index": np.zeros((3, 1), np.int64)}, "index needs a value for each token"),
        ({"position_ids": np.zeros((3, 3), np.int64)}, "position_ids needs a value for each token"),
        ({"index": np.zeros(3, np.float32)}, "index needs a value for each token"),
        ({"features": np.zeros((7, 8), np.float32)}, "a row has room for 6 along N-1 of features"),
        ({"picture": 1}, "a row of placed begins with features, index, position_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(exe: Any, inputs: dict[str, Any], said: str) -> None:
    session = exe.session(rows=1, capacity=20, memory={"N": 7})
    with pytest.raises(UsageError, match=said):
        session.open(**inputs)
    assert session.free == 1


def test_declared_values_are_part_of_the_graph(exe: Any) -> None:
    text = str(exe.graph)
    assert "  generated index = 0, position_ids = next\n" in text
    assert parse_graph(text) == exe.graph
    assert parse_graph(text.replace("index = 0", "index = -1")) != exe.graph
    with pytest.raises(GraphError, match="must be an integer, or 'next'"):
        t.generated(1.5)  # type: ignore[arg-type]
    for wrong in ("index = 0, index = 0", "index = first", "index = 99999999999"):
        with pytest.raises(ParseError):
            parse_graph(text.replace("index = 0", wrong))


def chat_body(url: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
    return {"model": "m", "messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ({"url": "https://example.com/a.png"}, "the server fetches no addresses"),
        ({"url": "file:///etc/passwd"}, "the server fetches no addresses"),
        ({"url": "data:text/plain;base64,AAAA"}, "the server fetches no addresses"),
        ({"url": "data:image/png,AAAA"}, "the server fetches no addresses"),
        ({"url": "data:image/png;base64,A*"}, "is not valid base64"),
        ({"url": 3}, "must be an object with a url"),
        ("data:image/png;base64,AAAA", "must be an object with a url"),
        ({"url": "data:image/png;base64,AAAA", "size": 3}, "must be an object with a url"),
    ],
)
def test_urls_are_never_fetched(url: Any, said: str) -> None:
    with pytest.raises(RequestRefusal, match=said) as caught:
        read_chat(Fields(chat_body(url)))
    assert str(caught.value.field).startswith("messages[0].content[1].image_url")
