"""Models that return only the logits of the last token: their decoding step, and what they say of other uses."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from treadle.ir.text.parser import parse_graph
from treadle.passes.stepping.derivation import NoStep
from treadle.passes.stepping.last_position import with_all_positions

VOCAB, DIM = 40, 16


@t.model
def decoder(
    tokens: Annotated[t.Tensor, t.i64["B S"]], *, layers: int = 3, form: str = "one", mask: str = "causal"
) -> t.Tensor:
    """A decoder that returns the logits of its last token, in one of several forms."""
    terms = {"window": t.causal & t.window(3), "none": None}.get(mask, t.causal)
    bias = t.alibi([0.5, 0.25, 0.125, 0.0625]) if mask == "alibi" else None
    x = t.embed(tokens, VOCAB, DIM, name="wte")
    for _ in t.stack("h", layers):
        y = t.layer_norm(x, name="ln_1")
        q, k, v = (t.split_heads(t.linear(y, DIM, name=name), heads=4) for name in ("q", "k", "v"))
        x += t.linear(t.merge_heads(t.attention(q, k, v, mask=terms, bias=bias)), DIM, name="out")
        x += t.mlp(t.layer_norm(x, name="ln_2"), 4 * DIM, act=t.gelu_tanh, name="mlp")
    if form == "without an axis":
        x = x[:, -1]
    elif form == "after the head":
        return t.unembed(t.layer_norm(x, name="ln_f"), tied="wte")[:, -1:]
    elif form == "twice":
        return t.unembed(t.layer_norm(x[:, -1:], name="ln_f") + x[:, -1:], tied="wte")
    elif form == "beside a mean":
        x = x[:, -1:] + x.mean(1, keepdim=True)
    elif form == "subtracted":
        x = x - x[:, -1:]
    else:
        x = x[:, -1:]
    return t.unembed(t.layer_norm(x, name="ln_f"), tied="wte")


def assert_steps_equal_runs(exe: Any, tokens: list[int], output: str = "logits") -> None:
    """Assert that prefill and each step return what the model returns for all tokens so far."""
    session = exe.session(rows=1, capacity=16)
    row = session.open()
    found = session.prefill({row: tokens[:3]})[row]
    for end in range(3, len(tokens) + 1):
        expected = exe(np.array([tokens[:end]]))[output].reshape(-1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        if end < len(tokens):
            found = session.step({row: tokens[end]})[row]


FORMS = ["one", "without an axis", "after the head", "twice"]
MODELS = [*({"form": form} for form in FORMS), {"mask": "window"}, {"mask": "alibi"}]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_a_step_returns_the_logits_of_each_prefix(options: dict[str, Any]) -> None:
    exe = t.compile(decoder.configure(**options), backend="numpy")
    (output,) = (port.name for port in exe.outputs)
    assert_steps_equal_runs(exe, [3, 1, 4, 1, 5, 9], output)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_chosen_last_position_has_a_step(name: str) -> None:
    small = {"layers": 2, "vocab": VOCAB, "dim": DIM, "heads": 4}
    exe = t.compile(name, backend="numpy", outputs=["logits[:, -1]"], **small)
    assert [str(port.type) for port in exe.outputs] == [f"f32[B, {VOCAB}]"]
    assert_steps_equal_runs(exe, [3, 1, 4, 1, 5])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mask": "none"}, "attention"),
        ({"form": "beside a mean"}, "mean|reduce"),
        ({"form": "subtracted"}, "slice"),
    ],
    ids=str,
)
def test_a_model_that_reads_more_than_earlier_tokens_has_no_step(options: dict[str, Any], what: str) -> None:
    exe = t.compile(decoder.configure(**options), backend="numpy")
    with pytest.raises(NoStep, match=what):
        exe.session(rows=1, capacity=16)


def test_inputs_of_a_fixed_length_are_named() -> None:
    @t.model
    def fixed(tokens: Annotated[t.Tensor, t.i64["B 8"]]) -> t.Tensor:
        return t.unembed(t.embed(tokens, VOCAB, DIM, name="wte"), tied="wte")

    with pytest.raises(NoStep, match=r"(?s)the length of its inputs is fixed.*i64\[B, 8\].*dynamic="):
        t.compile(fixed, backend="numpy").session(rows=1)


NAMED = """graph m {{
  symbols B, S
  main(x: f32[B, S, 4], y: f32[B, 4]) -> (z: f32[{shape}]) {{
    last = slice(x, axis=1, start=-1)  # f32[B, 1, 4]
    {node}
    return z = {result}
  }}
}}"""


@pytest.mark.parametrize(
    ("node", "shape", "widened"),
    [
        ('z = rearrange(last, pattern="a 1 b -> b a 1")', "4, B, 1", "f32[4, B, S]"),
        ('z = rearrange(last, pattern="a 1 b -> a b")', "B, 4", "f32[B, S, 4]"),
        ('z = rearrange(last, pattern="a 1 (b=2 c) -> a c b")', "B, 2, 2", "f32[B, S, 2, 2]"),
        ("z = softmax(last, axis=2)", "B, 1, 4", "f32[B, S, 4]"),
        ('w = rearrange(last, pattern="a 1 b -> a b")\n    z = softmax(w, axis=-1)', "B, 4", "f32[B, S, 4]"),
        # The axis of these is another one of the widened value, and a shape of two rows is not one of S rows.
        ('w = rearrange(last, pattern="a 1 b -> a b")\n    z = softmax(w, axis=1)', "B, 4", None),
        ("z = softmax(last, axis=1)", "B, 1, 4", None),
        ('w = rearrange(last, pattern="a 1 b -> a b")\n    z = add(w, y)', "B, 4", None),
        ("z = add(last, x)", "B, S, 4", None),
        ('z = rearrange(last, pattern="a b c -> (a b) c")', "B, 4", None),
    ],
)
def test_ops_after_the_slice_map_the_axis_or_are_refused(node: str, shape: str, widened: str | None) -> None:
    graph = parse_graph(NAMED.format(node=node, shape=shape, result="z"))
    made = with_all_positions(graph, "S")
    assert (None if made is None else str(made.main.outputs["z"].type)) == widened
    assert str(graph) == str(parse_graph(NAMED.format(node=node, shape=shape, result="z"))), "the graph is unchanged"


def test_a_model_of_the_last_token_has_no_perplexity_and_says_why(tmp_path: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{n}": n for n in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch = pytest.importorskip("torch")
    loaded = t.load(_nano(torch, "list"), tokenizer=tmp_path, backend="numpy")
    with pytest.raises(t.TreadleError, match="it returns the logits of its last token alone"):
        loaded.perplexity("w1 w2 w3")
    assert loaded.generate("w1 w2 w3", most=2).split()


def _nano(torch: Any, form: str) -> Any:
    """Return an imported GPT that computes its head for the last token only, as nanoGPT does."""
    torch.manual_seed(0)

    class Nano(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = torch.nn.Embedding(VOCAB, DIM), torch.nn.Embedding(16, DIM)
            self.mixed, self.head = torch.nn.Linear(DIM, 3 * DIM), torch.nn.Linear(DIM, VOCAB, bias=False)

        def forward(self, idx: Any) -> Any:
            x = self.tokens(idx) + self.places(torch.arange(idx.shape[1], device=idx.device))
            for _ in range(2):
                q, k, v = (each.unflatten(2, (4, -1)).transpose(1, 2) for each in self.mixed(x).split(DIM, dim=2))
                mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + mixed.transpose(1, 2).flatten(2)
            if form == "list":
                return self.head(x[:, [-1], :])
            if form == "slice":
                return self.head(x[:, -1:, :])
            if form == "index":
                return self.head(x[:, -1])
            return self.head(x)[:, -1, :]

    example = torch.zeros(2, 8, dtype=torch.long)
    return t.from_torch(Nano().eval(), (example,), dynamic={"idx": "B S"})


@pytest.mark.parametrize("form", ["list", "slice", "index", "after the head"])
def test_pytorchs_forms_of_the_last_token_have_a_step(form: str) -> None:
    exe = t.compile(_nano(pytest.importorskip("torch"), form), backend="numpy")
    (output,) = (port.name for port in exe.outputs)
    assert_steps_equal_runs(exe, [3, 1, 4, 1, 5], output)
    assert "gather" not in str(exe.graph).split("main(")[1].replace("embedding", "")
