"""Hints for names, options and functions of other libraries (PyTorch, NumPy) compute the same when followed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from tests.error_texts import raises_freely
from tests.test_first_mistakes import Body, follow, refusal, traced
from treadle.entry_functions import compile
from treadle.ir.errors import FrontendError, TreadleError
from treadle.ir.op_registry import OPS
from treadle.ir.wording.call_spelling import option_guess, spelled_call
from treadle.ir.wording.other_interfaces import ENTRY_WORDS
from treadle.ir.wording.other_spellings import (
    LEFT_OUT_OPTIONS,
    OTHER_FUNCTIONS,
    OTHER_METHODS,
    OTHER_OPTIONS,
    OTHER_WORDS,
    without_option,
)

WITH_OPTIONS = {
    "gelu approximate='tanh'": ("tanh", "t.gelu_tanh(x)"),
    "gelu approximate='none'": ("none", "t.gelu(x)"),
    "gather dim": (-1, "t.take_along_axis(x, positions, axis=-1)  # or x.gather(-1, positions)"),
    "softplus beta": (2, "t.softplus(2 * x) / 2"),
}
SPELLED = sorted({*OTHER_METHODS.values(), *OTHER_FUNCTIONS.values(), *(hint for _, hint in WITH_OPTIONS.values())})


@pytest.mark.parametrize("spelled", [s for s in SPELLED if not s.startswith(("@", "t.compile"))])
def test_hints_for_other_libraries_names_work(spelled: str) -> None:
    follow(spelled.partition("  #")[0])


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_words_of_other_libraries_are_no_names_of_the_dsl(word: str) -> None:
    assert not hasattr(t, word)
    with pytest.raises(FrontendError) as caught:
        getattr(t, word)
    assert caught.value.hint == OTHER_WORDS[word]


@pytest.mark.parametrize(
    ("body", "own"),
    [
        (lambda x: t.softmax(x, dim=1), lambda x: t.softmax(x, axis=1)),
        (lambda x: t.concat(x, x, dim=1), lambda x: t.concat(x, x, axis=1)),
        (lambda x: t.reduce_mean(x, dim=-1), lambda x: t.reduce_mean(x, axes=(-1,))),
        (lambda x: t.reduce_max(x, dim=(0, 1), keepdim=True), lambda x: t.reduce_max(x, axes=(0, 1), keep=True)),
        (lambda x: t.argmax(x, dim=1, keepdim=True), lambda x: t.argmax(x, axis=1, keep=True)),
    ],
)
def test_ops_take_the_names_of_options_of_tensor_methods(body: Body, own: Body) -> None:
    assert traced(body) == traced(own)


def test_an_option_under_both_names_is_refused() -> None:
    assert refusal(lambda x: t.softmax(x, dim=1, axis=0)).what == "softmax got axis twice"


def test_an_axis_that_means_something_else_in_pytorch_is_not_taken() -> None:
    error = refusal(lambda x: t.gather(x, t.argmax(x, axis=-1), dim=1))
    assert (error.hint or "").startswith("t.take_along_axis(x, positions, axis=1)")


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda x: x.astype("f2"), "x.cast(t.f16)"),
        (lambda x: x.eq(0), "x == 0"),
        (lambda x: x.gt(x + 1), "x > (x + 1)"),
        (lambda x: t.lt(x, 0), "x < 0"),
        (lambda x: x.mm(x.mT), "x @ x.mT"),
        (lambda x: t.bmm(x, x.mT), "x @ x.mT"),
        (lambda x: t.max(x, x + 1), "x.max(x + 1)"),
        (lambda x: t.geglu(x, 8), 't.gated_mlp(x, 8, act=t.gelu, name="mlp")'),
        (lambda x: t.gelu_new(x), "t.gelu_tanh(x)"),
        (lambda x: t.mlp(x, 8, act="gelu_new"), "act=t.gelu_tanh"),  # type: ignore[arg-type]
        (lambda x: t.mlp(x, 8, act="swish"), "act=t.silu"),  # type: ignore[arg-type]
        (lambda x: t.concat([x, x], axis=1), "tensors one by one, as in concat(x, y), with the same options"),
        (lambda x: x.cuda(), "x  # leave it out: target="),
        (lambda x: x.numpy(), "t.compile(model)(...)"),
        (lambda x: x.byte(), "x.to(t.u8)"),
        (lambda x: x.nonzero(), "t.where(condition, x, 0.0)  # keeps the shape"),
        (lambda x: x.norm(), "t.sqrt((x * x).sum())"),
        (lambda x: t.permute(x, 2, 0, 1), "x.permute(2, 0, 1)"),
        (lambda x: t.dropout(x, 0.1), "x  # leave it out: a graph has no random numbers, also in training"),
        (lambda x: t.Softmax(x), "did you mean t.softmax"),
        (lambda x: t.reduce_mean(x, axes=(-1,), keepdims=True), "did you mean keep=?"),
        (lambda x: t.max_pool(x, kernel_size=3), "did you mean kernel=?"),
    ],
)
def test_words_that_one_reaches_for(body: Body, tried: str) -> None:
    assert (refusal(body).hint or "").startswith(tried)


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda x: t.cat([x, x + 1], dim=-1), "t.concat(x, x + 1, axis=-1)"),
        (lambda x: t.cat([x, x]), "t.concat(x, x, axis=0)"),
        (lambda x: t.concatenate((x, x), axis=2), "t.concat(x, x, axis=2)"),
        (lambda x: np.concatenate([x, x], -1), "t.concat(x, x, axis=-1)"),
        (lambda x: t.hstack([x, x]), "t.concat(x, x, axis=1)"),
        (lambda x: t.stack([x, x + 1], dim=1), "PyTorch's stack is t.concat(x.unsqueeze(1), (x + 1).unsqueeze(1), a"),
        (lambda x: t.stack([x, x], 1), "PyTorch's stack is t.concat(x.unsqueeze(1), x.unsqueeze(1), axis=1), and"),
        (lambda x: t.gather(x, 1, t.positions(x)), "PyTorch's gather is t.take_along_axis(x, t.positions(x), axis=1)"),
        (lambda x: t.embedding(x, 9, 4, name="e"), "PyTorch's embedding is t.embed(x, 9, 4, name='e')"),
        (lambda x: t.linear(x, 8, 4, name="f"), "leave out the size of x, which is known: t.linear(x, out, "),
        (lambda x: t.layer_norm(x, 8, name="f"), "leave out the size of x, which is known: t.layer_norm(x, *, "),
        (lambda x: t.self_attention(x, 8, 2), "leave out the size of x, which is known: t.self_attention(x, heads, "),
        (lambda x: t.diff(x, dim=1), "x.diff(dim=1)"),
        (lambda x: t.movedim(x * 2, 1, 0), "(x * 2).movedim(1, 0)"),
        (lambda x: t.transpose(x, 1, 2), "x.transpose(1, 2)"),
        (lambda x: t.mean(x, dim=(0, 1), keepdim=True), "x.mean(dim=(0, 1), keepdim=True)"),
        (lambda x: t.topk(x, 3), "x.topk(3)"),
        (lambda x: x.astype("float16"), "x.cast(t.f16)"),
        (lambda x: (x + 1).astype(np.int64), "(x + 1).cast(t.i64)"),
        (
            lambda x: x.argmax(-1).astype(float),  # a method of a call over several lines
            "x.argmax(-1).cast(t.f64)",
        ),
        (lambda x: t.norm(x, 2, 1), "t.sqrt((x * x).sum(dim=1))"),
        (lambda x: x.norm(p=1), "t.sqrt(t.reduce_sum(x * x, axes=(-1,)))"),
        (lambda x: x.unfold(1, 2, 3), "t.windows(x, axis=1, size=2, stride=3)"),
        (lambda x: x.narrow(1, 2, 3), "t.slice(x, axis=1, start=2, stop=2 + 3)"),
        (lambda x: x.select(1, -1), "x.movedim(1, 0)[-1]"),
        (lambda x: t.swiglu(x, 64), 't.gated_mlp(x, 64, act=t.silu, name="mlp")'),
        (lambda x: t.Linear(8, 3, bias=False)(x), 't.linear(x, 3, bias=False, name="f")'),
        (lambda x: t.Embedding(50, 8)(x), 't.embed(tokens, 50, 8, name="wte")'),
        (lambda x: t.max_pool2d(x, 2), "t.max_pool(x, kernel=(2, 2), strides=(2, 2))"),
        (lambda x: t.avg_pool1d(x, (3,), 1, padding=1), "t.average_pool(x, kernel=(3,), strides=(1,), padding=(1,))"),
        (lambda x: t.MaxPool1d(2)(x), "t.max_pool(x, kernel=(2,), strides=(2,))"),
        (lambda x: t.zeros(3, 4), "t.expand(t.constant(0.0, t.f32), shape=(3, 4))"),
        (lambda x: t.ones(32), "t.expand(t.constant(1.0, t.f32), shape=(32,))"),
        (lambda x: t.full((2, 3), 0.5, dtype=np.float16), "t.expand(t.constant(0.5, t.f16), shape=(2, 3))"),
        (lambda x: t.arange(2, 10), "2 + t.iota(size=10 - 2)"),
        (lambda x: t.one_hot(x.argmax(-1), 8), "(x.argmax(-1)[..., None] == t.iota(size=8)).long()"),
        (lambda x: t.rearrange(x, "b s (h d) -> b h s d", h=4), 'a size is in the pattern, as "(h=4 d)": rearrange('),
        (lambda x: t.rearrange(x, "b s (heads d) -> b s d", heads=4), 'a size is in the pattern, as "(heads=4 d)": '),
    ],
)
def test_a_hint_keeps_the_arguments_that_were_typed(body: Body, tried: str) -> None:
    with pytest.raises(TreadleError) as caught:
        traced(body)
    hint = caught.value.hint or ""
    assert hint.startswith(tried)
    if hint.startswith(("x", "t", "(")):
        follow(hint.partition("  #")[0])


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda x: t.Conv1d(3, 5, 3)(x), 't.convolution(x, 5, (3,), name="conv")'),
        (lambda x: t.Conv1d(3, 5, 4, 2), 't.convolution(x, 5, (4,), strides=(2,), name="conv")'),
        (lambda x: t.Conv1d(3, 5, 3, padding=1), 't.convolution(x, 5, (3,), padding=(1,), name="conv")'),
        (lambda x: t.Conv1d(3, 5, 3, padding="same"), "t.convolution(x, 5, (3,), padding='same', name=\"conv\")"),
    ],
)
def test_a_hint_for_a_convolution_keeps_its_arguments(body: Body, tried: str) -> None:
    assert refusal(body, shape="2 3 8").hint == tried
    traced(lambda x: eval(tried, {"t": t, "x": x}), shape="2 3 8")


def test_options_of_other_libraries_are_options_of_nothing_here_under_that_name() -> None:
    """Every suggested option is an option of some function."""
    words = [getattr(t, name) for name in dir(t) if name != "ops"]
    words += [getattr(t.Tensor, name) for name in dir(t.Tensor)]
    ours = {p for word in words if inspect.isfunction(word) for p in inspect.signature(word).parameters}
    assert {here.partition("=")[0] for meanings in OTHER_OPTIONS.values() for here in meanings} <= ours


@pytest.mark.parametrize("key", WITH_OPTIONS)
def test_an_option_of_another_library_comes_with_the_call_that_computes_it(key: str) -> None:
    function, _, option = key.partition(" ")
    value, spelled = WITH_OPTIONS[key]
    assert without_option(function, option.partition("=")[0], value) == spelled
    assert without_option("relu", option.partition("=")[0], value) is None


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda x: t.gelu(x, approximate="tanh"), "t.gelu_tanh(x)"),
        (lambda x: x.gelu(approximate="tanh"), "t.gelu_tanh(x)"),
        (lambda x: t.gelu(x, approximate="none"), "t.gelu(x)"),
        (lambda x: t.relu(x, inplace=True), "leave inplace= out, results are new values: relu(x, *"),
        (lambda x: x.relu(inplace=True), "leave inplace= out, results are new values: relu(x, *"),
        (lambda x: t.attention(x, x, x, is_causal=True), "mask=t.causal in place of is_causal=True: t.attention(q"),
        (lambda x: t.attention(x, x, x, causal=True), "mask=t.causal in place of causal=True: t.attention(q"),
        (lambda x: t.cross_attention(x, x, 2, is_causal=True), "mask=t.causal in place of is_causal=True: t.cross"),
        (lambda x: t.self_attention(x, 2, is_causal=True), "did you mean causal=? t.self_attention("),
        (lambda x: t.attention(x, x, x, dropout_p=0.1), "leave dropout_p= out, a graph has no random numbers"),
        (lambda x: t.attention(x, x, x, enable_gqa=True), "leave enable_gqa= out, fewer heads of k and v are"),
        (lambda x: t.linear(x, in_features=8, out_features=8, name="f"), "leave in_features= out, the size is that"),
        (lambda x: t.parameter("w", 8, requires_grad=True), "leave requires_grad= out, t.Trainer(model, trained="),
        (lambda x: t.embed(t.positions(x), num_embeddings=8, dim=8, name="f"), "did you mean count=? t.embed("),
        (lambda x: t.embed(t.positions(x), vocab=8, dim=8, name="f"), "did you mean count=? t.embed("),
        (lambda x: t.embed(t.positions(x), 8, embed_dim=8, name="f"), "did you mean dim=? t.embed("),
        (lambda x: t.embed(t.positions(x), 8, hidden_size=8, name="f"), "did you mean dim=? t.embed("),
        (lambda x: t.embed(t.positions(x), 8, 8, padding_idx=0, name="f"), "leave padding_idx= out, mask=t.padding("),
        (lambda x: t.self_attention(x, 2, bias=False), "projection_bias=False, for biases of the projections"),
        (lambda x: t.self_attention(x, 2, embed_dim=8), "leave embed_dim= out, the size is that of the last axis"),
        (lambda x: t.mlp(x, intermediate_size=8), "did you mean hidden=? t.mlp("),
        (lambda x: t.gated_mlp(x, dim_feedforward=8), "did you mean hidden=? t.gated_mlp("),
        (lambda x: t.unembed(x, vocab_size=8), "did you mean vocab=? t.unembed("),
        (lambda x: t.layer_norm(x, elementwise_affine=False, name="f"), "leave elementwise_affine= out, a norm has"),
        (
            lambda x: t.layer_norm(x, (8,), name="f"),
            "leave out the size of x, which is known: t.layer_norm(x, *, eps=1e-05, bias=True, name)",
        ),
        (
            lambda x: t.layer_norm(x, 8, name="f"),
            "leave out the size of x, which is known: t.layer_norm(x, *, eps=1e-05, bias=True, name)",
        ),
        (lambda x: t.group_norm(x, num_groups=2, name="f"), "did you mean groups=? t.group_norm("),
        (lambda x: t.softmax(x, stable=True), "softmax(x, *, axis=-1, name=None)"),
        (lambda x: t.stack([x, x]), "PyTorch's stack is t.concat(x.unsqueeze(0), x.unsqueeze(0), axis=0), and"),
        (lambda x: t.stack([x, x], 0), "PyTorch's stack is t.concat(x.unsqueeze(0), x.unsqueeze(0), axis=0), and"),
        (lambda x: t.stack([x, x], dim=0), "PyTorch's stack is t.concat(x.unsqueeze(0), x.unsqueeze(0), axis=0), and"),
        (lambda x: t.gather(x, -1, t.positions(x)), "PyTorch's gather is t.take_along_axis(x, t.positions(x)"),
    ],
)
def test_an_option_that_is_unknown_here(body: Body, tried: str) -> None:
    with pytest.raises(TreadleError) as caught:
        traced(body)
    assert (caught.value.hint or "").startswith(tried)


def test_the_type_of_tensors_makes_none() -> None:
    """As torch.Tensor([1, 2]) does. The hint's constant does."""
    with pytest.raises(FrontendError, match="makes none") as caught:
        t.Tensor([1.0, 2.0])  # type: ignore[arg-type]
    made, _, where = str(caught.value.hint).partition(", inside")
    assert where == " a model"
    graph = traced(lambda x: eval(made, {"treadle": t}))
    (output,) = graph.main.outputs.values()
    assert output.literal is not None and output.literal.array.tolist() == [1, 2]


def test_no_unrelated_name_is_suggested_for_an_option_of_pytorch() -> None:
    """A call with `name=` in place of another option would compile, without the option."""
    functional = pytest.importorskip("torch").nn.functional
    functions = [getattr(t, name) for name in dir(t)] + [getattr(t.Tensor, name) for name in dir(t.Tensor)]
    signatures = [inspect.signature(f) for f in functions if inspect.isfunction(f)]
    theirs = [inspect.signature(f) for f in vars(functional).values() if inspect.isfunction(f)]
    words = {*OTHER_OPTIONS, *LEFT_OUT_OPTIONS} | {word for signature in theirs for word in signature.parameters}
    assert len(words) > 100
    for word in words:
        if "name" in word.split("_"):
            continue
        assert not any(option_guess(word, s).startswith("did you mean name=") for s in signatures), word


@pytest.mark.parametrize("name", sorted(n for n, op in OPS.items() if op.is_word))
def test_the_hint_for_an_op_as_a_method_is_a_call_that_works_or_a_signature(name: str) -> None:
    """An op with further operands or attributes is not called with x alone."""

    def body(x: t.Tensor) -> None:
        try:
            getattr(x, name)
        except TreadleError as error:
            hints.append(error.hint or "")

    hints: list[str] = []
    traced(body)
    for hint in hints:
        if hint.startswith("t.ops."):
            assert hint == f"t.ops.{spelled_call(name, inspect.signature(getattr(t.ops, name)))}"
        else:
            follow(hint.partition("  #")[0])


def test_a_function_of_pytorch_is_not_taken_for_another_with_a_similar_name() -> None:
    """A name that PyTorch has is not misspelt: cumprod is not cumsum, and rrelu is not relu."""
    torch = pytest.importorskip("torch")
    names = {n for place in (torch.Tensor, torch.nn, torch.nn.functional) for n in dir(place) if n[0] != "_"}
    look_up = eval("lambda name: getattr(t, name)", {"t": t})  # without a source file, which each error would parse
    for name in names - {*OTHER_WORDS, *ENTRY_WORDS, *dir(t)}:
        with raises_freely(FrontendError) as caught:
            look_up(name)
        for near in re.findall(r"t\.(\w+)", str(caught.value.hint)):
            assert near.replace("_", "").lower() in name.replace("_", "").lower(), (name, near)


@pytest.mark.parametrize(
    "function",
    [
        lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda torch, x: torch.nn.GELU(approximate="tanh")(x),
        lambda torch, x: torch.nn.GELU()(x),
        lambda torch, x: torch.nn.functional.softplus(x, beta=2),
        lambda torch, x: torch.nn.functional.relu(x, inplace=False),
        lambda torch, x: torch.nn.functional.softmax(x, dim=1),
        lambda torch, x: torch.add(x, x, alpha=3),
        lambda torch, x: torch.div(x, x, rounding_mode="floor"),
        lambda torch, x: torch.round(x, decimals=1),
        lambda torch, x: torch.ones_like(x),
        lambda torch, x: torch.zeros_like(x),
        lambda torch, x: torch.full_like(x, 2.5),
        lambda torch, x: torch.tril(x),
        lambda torch, x: torch.triu(x, diagonal=1),
        lambda torch, x: torch.tile(x, (1, 1, 2)),
        lambda torch, x: torch.repeat_interleave(x, 2, dim=1),
        lambda torch, x: torch.transpose(x, 0, 1),
        lambda torch, x: torch.mean(x, dim=(0, 2), keepdim=True),
        lambda torch, x: torch.sum(x),
        lambda torch, x: torch.var(x, -1),
        lambda torch, x: torch.flatten(x, 1),
        lambda torch, x: torch.squeeze(x, 0),
        *[
            lambda torch, x, name=name: getattr(torch.nn.functional, name)(x)
            for name in [
                "elu",
                "selu",
                "celu",
                "relu6",
                "leaky_relu",
                "hardtanh",
                "hardsigmoid",
                "hardswish",
                "mish",
                "glu",
                "logsigmoid",
                "softsign",
            ]
        ],
        *[
            lambda torch, x, name=name: getattr(torch, name)(x)
            for name in [
                "log10",
                "exp2",
                "tan",
                "sinh",
                "cosh",
                "erfc",
                "trunc",
                "frac",
                "isnan",
                "square",
                "log2",
                "ceil",
            ]
        ],
        lambda torch, x: torch.nn.functional.elu(x, alpha=2.0),
        lambda torch, x: torch.nn.functional.celu(x, alpha=2.0),
        lambda torch, x: torch.nn.functional.leaky_relu(x, 0.3),
        lambda torch, x: torch.nn.functional.softmin(x, dim=-1),
        lambda torch, x: torch.logsumexp(x, -1),
        lambda torch, x: torch.argmin(x, -1),
        lambda torch, x: torch.sort(x).values,
        lambda torch, x: torch.argsort(x),
        lambda torch, x: torch.stack([x, x]),
        lambda torch, x: torch.stack([x, x], dim=-1),
        lambda torch, x: torch.cat([x, x], dim=-1),
        lambda torch, x: torch.cat([x, 2 * x], 1),
        lambda torch, x: torch.stack([x, 2 * x], 1),
        lambda torch, x: torch.norm(x, dim=1),
        lambda torch, x: torch.scatter_add(x, 1, x.argmax(1, keepdim=True), x[:, :1]),
        lambda torch, x: torch.index_add(x, 1, x[0, :2, 0].argmax(0, keepdim=True), x[:, :1]),
        lambda torch, x: torch.logsumexp(x, 1, keepdim=True),
        lambda torch, x: torch.sort(x, 1).values,
        lambda torch, x: torch.narrow(x, 1, 1, 2),
        lambda torch, x: torch.select(x, 1, -1),
        lambda torch, x: torch.movedim(x, 1, 2),
        lambda torch, x: torch.diff(x, dim=1),
        lambda torch, x: torch.nn.functional.glu(x, 1),
        lambda torch, x: torch.nn.functional.normalize(x, dim=1),
        lambda torch, x: torch.nn.functional.one_hot(x.argmax(-1, keepdim=True), num_classes=9),
        lambda torch, x: torch.lerp(x, 2 * x, 0.25),
        lambda torch, x: torch.nn.functional.normalize(x, dim=-1),
        lambda torch, x: torch.nn.functional.mse_loss(x, x),
        lambda torch, x: torch.nn.functional.l1_loss(x, x),
        lambda torch, x: torch.nn.functional.binary_cross_entropy_with_logits(x, x),
        lambda torch, x: torch.nn.functional.cosine_similarity(x, x, dim=-1),
        lambda torch, x: torch.nn.functional.one_hot(x.argmax(-1, keepdim=True), 8),
        lambda torch, x: torch.remainder(x, x),
        lambda torch, x: torch.flip(x, (0, 1)),
        lambda torch, x: torch.fliplr(x),
        lambda torch, x: torch.roll(x, 3, 1),
        lambda torch, x: torch.isinf(x),
        lambda torch, x: torch.isfinite(x),
        lambda torch, x: torch.nan_to_num(x),
        lambda torch, x: torch.count_nonzero(x),
        lambda torch, x: torch.diff(x),
        lambda torch, x: torch.fmod(x, x),
        lambda torch, x: torch.logit(x),
        lambda torch, x: torch.lerp(x, x, 0.5),
        lambda torch, x: torch.take(x, x.argmax(-1, keepdim=True)),
        lambda torch, x: torch.gather(x, -1, x.argmax(-1, keepdim=True)),
        lambda torch, x: torch.take_along_dim(x, x.argmax(-1, keepdim=True), -1),
    ],
)
def test_the_hint_for_a_function_of_pytorch_computes_what_it_computes(function: Any) -> None:
    torch = pytest.importorskip("torch")
    hint = (refusal(lambda x: function(torch, x), shape="1 4 8").hint or "").partition("  #")[0]
    a = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)

    def followed(x: t.Tensor) -> Any:
        return eval(hint, {"t": t, "x": x, "y": x, "positions": x.argmax(-1, keepdim=True), "value": 2.5})

    (y,) = compile(traced(followed, shape="1 4 8"), backend="numpy")(x=a).values()
    np.testing.assert_allclose(y, function(torch, torch.from_numpy(a)).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        *[
            getattr(np, name)
            for name in (
                *(
                    "tril",
                    "triu",
                    "ones_like",
                    "zeros_like",
                    "sort",
                    "argsort",
                    "ravel",
                    "isnan",
                    "ceil",
                    "trunc",
                    "rint",
                ),
                *("log10", "log2", "exp2", "sinh", "cosh", "tan", "square", "absolute", "negative"),
            )
        ],
        lambda x: np.flip(x, 1),
        lambda x: np.roll(x, 1, 1),
        lambda x: np.nan_to_num(x),
        lambda x: np.diff(x),
        lambda x: np.tile(x, (1, 1, 2)),
        lambda x: np.repeat(x, 2, axis=1),
        lambda x: np.argmin(x, axis=-1),
        lambda x: np.expand_dims(x, 1),
        lambda x: np.concatenate([x, x], 1),
        lambda x: np.stack([x, x], axis=-1),
        lambda x: np.transpose(x, (2, 0, 1)),
        lambda x: np.moveaxis(x, 0, -1),
        lambda x: np.max(x, axis=1),
        lambda x: np.mean(x, axis=(0, 1), keepdims=True),
        lambda x: np.std(x, axis=1),
        lambda x: np.linalg.norm(x, axis=1),
        lambda x: np.diff(x, axis=1),
        lambda x: np.repeat(x, 3, axis=0),
        lambda x: np.sort(x, 1),
    ],
    ids=lambda function: function.__name__,
)
def test_the_hint_for_a_function_of_numpy_computes_what_it_computes(function: Any) -> None:
    hint = (refusal(function, shape="1 4 8").hint or "").partition("  #")[0]
    a = np.random.default_rng(0).uniform(0.1, 2, (1, 4, 8)).astype(np.float32)
    (y,) = compile(traced(lambda x: eval(hint, {"t": t, "x": x}), shape="1 4 8"), backend="numpy")(x=a).values()
    np.testing.assert_allclose(y, function(a), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (4, 1), (3, 2), (4, 3)])
def test_padding_by_name_is_pytorchs(padding: str, kernel: int, dilation: int) -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    a, w = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 16), (4, 3, kernel)))

    def body(x: t.Tensor) -> t.Tensor:
        return t.convolution(x, 4, (kernel,), padding=padding, dilations=(dilation,), bias=False, name="f")  # type: ignore[arg-type]

    (y,) = compile(traced(body, shape="B 3 16"), backend="numpy", weights={"f.weight": w})(x=a).values()
    ours, theirs = map(torch.from_numpy, (a, w))
    expected = torch.nn.functional.conv1d(ours, theirs, padding=padding, dilation=dilation)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), [("B 4", (2, 4)), ("B 4 S", (2, 4, 5)), ("B 4 H W", (2, 4, 3, 5))])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_norm_is_pytorchs(shape: str, size: tuple[int, ...], groups: int) -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    a, weight, bias = (draw.standard_normal(each).astype(np.float32) for each in (size, (4,), (4,)))
    graph = traced(lambda x: t.group_norm(x, groups, eps=1e-3, name="f"), shape=shape)
    (y,) = compile(graph, backend="numpy", weights={"f.weight": weight, "f.bias": bias})(x=a).values()
    x, w, b = map(torch.from_numpy, (a, weight, bias))
    expected = torch.nn.functional.group_norm(x, groups, w, b, eps=1e-3)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 4, 0), (3, 2, 1)])
def test_a_group_norm_follows_a_strided_convolution(kernel: int, stride: int, padding: int) -> None:
    """Its axes are divided sizes, H//4 or (H + 1)//2."""
    torch = pytest.importorskip("torch")

    def body(x: t.Tensor) -> t.Tensor:
        each = (stride, stride)
        y = t.convolution(x, 8, (kernel, kernel), strides=each, padding=(padding, padding), name="c")
        return t.group_norm(y, 2, name="f")

    exe = compile(traced(body, shape="B 3 H W"), backend="numpy")
    a = np.random.default_rng(0).standard_normal((2, 3, 13, 18)).astype(np.float32)
    (y,) = exe(x=a).values()
    w = {name: torch.from_numpy(np.array(array)) for name, array in exe.weights.items()}
    x = torch.nn.functional.conv2d(torch.from_numpy(a), w["c.weight"], w["c.bias"], stride=stride, padding=padding)
    expected = torch.nn.functional.group_norm(x, 2, w["f.weight"], w["f.bias"])
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", ["max_pool1d", "avg_pool1d"])
def test_the_hint_for_a_pooling_has_pytorchs_strides(word: str) -> None:
    functional = pytest.importorskip("torch").nn.functional
    hint = (refusal(lambda x: getattr(t, word)(x, 2), shape="2 3 8").hint or "").partition("  #")[0]
    a = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    (y,) = compile(traced(lambda x: eval(hint, {"t": t, "signal": x}), shape="2 3 8"), backend="numpy")(x=a).values()
    np.testing.assert_allclose(y, getattr(functional, word)(functional.torch.from_numpy(a), 2).numpy(), rtol=1e-5)


def test_a_causal_convolution_is_padded_before() -> None:
    """The hint is followed: position i depends on positions up to i."""
    error = refusal(lambda x: t.convolution(x, 4, (3,), padding="causal", name="f"), shape="2 3 8")  # type: ignore[arg-type]
    (padded,) = re.findall(r"t\.pad\(.*?\)", error.hint or "")
    graph = traced(lambda x: t.convolution(eval(padded), 4, (3,), padding="valid", name="f"), shape="2 3 8")
    exe, a = compile(graph, backend="numpy"), np.ones((2, 3, 8), np.float32)
    (y,), (changed,) = exe(x=a).values(), exe(x=np.concatenate([a[..., :5], -a[..., 5:]], -1)).values()
    assert y.shape == (2, 4, 8)
    np.testing.assert_array_equal(y[..., :5], changed[..., :5])


def test_attention_without_heads_is_pytorchs_with_one_head() -> None:
    torch = pytest.importorskip("torch")
    hint = (refusal(lambda x: t.attention(x, x, x), shape="2 4 8").hint or "").partition("  #")[0]
    a = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    graph = traced(lambda x: eval(hint, {"t": t, "q": x, "k": x, "v": x}), shape="2 4 8")
    (y,) = compile(graph, backend="numpy")(x=a).values()
    x = torch.from_numpy(a)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_causal_mask_is_what_is_causal_means() -> None:
    torch = pytest.importorskip("torch")
    a = np.random.default_rng(0).standard_normal((1, 2, 4, 8)).astype(np.float32)
    (y,) = compile(traced(lambda x: t.attention(x, x, x, mask=t.causal), shape="1 2 4 8"), backend="numpy")(
        x=a
    ).values()
    x = torch.from_numpy(a)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-6)
