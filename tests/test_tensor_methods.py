"""Indexing and methods of a model's tensors: the same code on PyTorch's tensors gives the same numbers."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import treadle.frontends.language as t
from tests.test_first_mistakes import traced
from treadle.entry_functions import compile
from treadle.ir.errors import TreadleError
from treadle.ir.expressions import Expr
from treadle.ir.interpreter import interpret
from treadle.ir.tensors.methods import TensorMethods
from treadle.ir.transforms.gradients import gradient_graph

torch = pytest.importorskip("torch")

Body = Callable[[Any], Any]

INDEXED: dict[str, Body] = {
    "x[0]": lambda x: x[0],
    "x[:, 0]": lambda x: x[:, 0],
    "x[:, -1]": lambda x: x[:, -1],
    "x[..., 1:]": lambda x: x[..., 1:],
    "x[..., :-1]": lambda x: x[..., :-1],
    "x[:, -2:]": lambda x: x[:, -2:],
    "x[:, :-1, ::3]": lambda x: x[:, :-1, ::3],
    "x[:, 1::2]": lambda x: x[:, 1::2],
    "x[None]": lambda x: x[None],
    "x[:, None, :, 2]": lambda x: x[:, None, :, 2],
    "x[..., None]": lambda x: x[..., None],
    "x[1, ..., 3]": lambda x: x[1, ..., 3],
    "x[-1, -1, -1]": lambda x: x[-1, -1, -1],
    "x[:]": lambda x: x[:],
    "x[...]": lambda x: x[...],
    "x[()]": lambda x: x[()],
    "beyond the end": lambda x: x[..., 5:100],
    "before the start": lambda x: x[..., -100:3],
    "nothing": lambda x: x[..., 6:2],
    "nothing of a symbolic axis": lambda x: x[:, 2:1],
    "half": lambda x: x[..., x.shape[-1] // 2 :],
    "the last, by its size": lambda x: x[:, x.shape[1] - 1],
    "up to a size": lambda x: x[:, 1 : x.shape[1]],
    "a list": lambda x: x[..., [3, 0, -1]],
    "an array": lambda x: x[..., np.array([[1, 2], [0, 5]])],
    "positions of the largest": lambda x: x[0][x[0, :, :2].argmax(0)],
    "positions between": lambda x: x[1, :, x[0, :2].argmax(-1)],
    "one position": lambda x: x[0, 0, x[0, 0].argmax(0)],
}

SHAPED: dict[str, Body] = {
    "mT": lambda x: x.mT,
    "T": lambda x: x[0].T,
    "T of a vector": lambda x: x[0, 0].T,
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: x.swapaxes(0, -1),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute a sequence": lambda x: x.permute((0, 2, 1)),
    "movedim": lambda x: x.movedim(0, -1),
    "movedim of several axes": lambda x: x.movedim((0, 2), (1, 0)),
    "moveaxis": lambda x: x.moveaxis(-1, 0),
    "reshape to -1": lambda x: x.reshape(x.shape[0], -1),
    "reshape all": lambda x: x.reshape(-1),
    "view heads": lambda x: x.view(x.shape[0], x.shape[1], 2, 4),
    "view heads with -1": lambda x: x.view(*x.shape[:-1], -1, 4),
    "merge rows": lambda x: x.reshape(x.size(0) * x.size(1), 8),
    "heads and back": lambda x: (
        x.view(x.size(0), -1, 2, 4).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.size(0), -1, 8)
    ),
    "across axes": lambda x: x.transpose(0, 1).reshape(x.size(1), x.size(0) * 2, 4),
    "flatten": lambda x: x.flatten(),
    "flatten from": lambda x: x.flatten(1),
    "flatten between": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "unsqueeze at the end": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x[:, :1, None].squeeze(),
    "squeeze one": lambda x: x[:, None].squeeze(1),
    "squeeze none": lambda x: x.squeeze(-1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1),
    "repeat": lambda x: x.repeat(1, 2, 3),
    "repeat along a new axis": lambda x: x.repeat((2, 1, 1, 2)),
    "repeat a symbolic axis": lambda x: x.repeat(x.size(1), 1, 1)[:2],
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "flip": lambda x: x.flip(1),
    "flip of several axes": lambda x: x.flip((0, -1)).flip(0, 1),
    "roll": lambda x: x.roll(1, 1),
    "roll of several axes": lambda x: x.roll((-3, 2), dims=(1, -1)),
    "roll of all": lambda x: x.roll(5),
    "diff": lambda x: x.diff(),
    "diff along an axis": lambda x: x.diff(dim=1) + x.diff(1, 1),
    "diff of differences": lambda x: x.diff(2, dim=-1),
    "new tensors": lambda x: x.new_zeros(1, 8) + x.new_ones((8,)) - x.new_full([8], 2.5) + x,
    "chunk": lambda x: x.chunk(3, dim=-1)[2] + x.chunk(2, -1)[0][..., :2],
    "chunk of a tuple": lambda x: sum(x.chunk(2, dim=-1)),
    "split": lambda x: x.split(3, dim=-1)[-1],
    "split sizes": lambda x: x.split([1, 5, 2], dim=2)[1],
    "unbind": lambda x: x.unbind(-1)[3],
    "unpack": lambda x: [part * i for i, part in enumerate(x.permute(2, 0, 1))][5],
    "sizes": lambda x: x * x.size(-1) + x.ndim + x.dim() + len(x[0, 0]),
}

REDUCED: dict[str, Body] = {
    "sum": lambda x: x.sum(),
    "sum of one": lambda x: x.sum(-1),
    "sum of two": lambda x: x.sum((0, 2)),
    "sum of two, kept": lambda x: x.sum(dim=(1, -1), keepdim=True),
    "count": lambda x: (x > 0).sum(-1),
    "mean": lambda x: x.mean(),
    "mean of one": lambda x: x.mean(1, keepdim=True),
    "var": lambda x: x.var(-1),
    "var of all": lambda x: x.var(),
    "var of a symbolic axis": lambda x: x.var(1, unbiased=False, keepdim=True),
    "std": lambda x: x.std((1, 2)),
    "amax": lambda x: x.amax((0, 1)),
    "amin": lambda x: x.amin(),
    "any": lambda x: (x > 1).any(-1),
    "all": lambda x: (x > -1).all((0, 2), keepdim=True),
    "least": lambda x: x.topk(3, 1 if x.ndim > 3 else -1, largest=False, sorted=True).values,
    "max": lambda x: x.max(),
    "max values": lambda x: x.max(-1).values,
    "max indices": lambda x: x.max(-1)[1],
    "min values": lambda x: x.min(1, keepdim=True)[0],
    "min indices": lambda x: x.min(1).indices,
    "argmax": lambda x: x.argmax(),
    "argmax of one": lambda x: x.argmax(1, keepdim=True),
    "argmin of integers": lambda x: (x * 4).long().argmin(-1),
    "cumsum": lambda x: x.cumsum(1),
    "softmax": lambda x: x.softmax(-1),
    "softmax by name": lambda x: x.softmax(dim=1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "topk": lambda x: x.topk(3).values,
    "topk indices": lambda x: x.topk(2, dim=1)[1],
}

ELEMENTS: dict[str, Body] = {
    "functions": lambda x: x.abs().sqrt().exp().tanh().sigmoid().log().neg().relu(),
    "operands": lambda x: x.mul(2).add(x).sub(1).maximum(x).pow(2),
    "rounded": lambda x: x.floor() + x.round(),
    "square": lambda x: x.square(),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(max=0) + x.clip(min=0),
    "tril": lambda x: x.tril() + x.tril(1) + x.tril(diagonal=-1),
    "triu": lambda x: x.triu() + x.triu(1) + x.triu(diagonal=-1),
    "triangles of other dtypes": lambda x: x.long().tril() + (x > 0).triu().long(),
    "a triangle beside infinity": lambda x: (x / 0.0).tril().abs().amin(-1),
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "gather a part": lambda x: x.gather(1, x[:1, :2, :3].argmax(1, keepdim=True)),
    "gather a row": lambda x: x.gather(-1, x[:, :1].argmax(-1, keepdim=True)),
    "gather the first axis": lambda x: x.gather(dim=0, index=x.argmax(0, keepdim=True)),
    "masked_fill": lambda x: x.masked_fill(x > 0, -math.inf).softmax(-1),
    "casts": lambda x: x.half().float() + x.double().float() + (x * 3).int().float(),
    "truth": lambda x: x.long().bool(),
    "type_as": lambda x: x.int().type_as(x),
    "clone, detach": lambda x: x.clone() + x.detach(),
    "a norm by hand": lambda x: x * (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().type_as(x),
}


def refusal(body: Body, **options: str) -> TreadleError:
    """Return the error of tracing a model with this body. It names a line of this file."""
    with pytest.raises(TreadleError) as caught:
        traced(body, **options)
    assert (caught.value.source or "").startswith("tests/test_tensor_methods.py:")
    return caught.value


CASES = INDEXED | SHAPED | REDUCED | ELEMENTS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ["B S 8", "2 3 8"])
@pytest.mark.filterwarnings("ignore:The use of `x.T`:UserWarning")  # PyTorch's, of the transpose of a vector
def test_the_same_code_on_pytorchs_tensors_gives_the_same_numbers(case: str, shape: str) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    expected = CASES[case](torch.from_numpy(x)).numpy()
    (result,) = compile(traced(CASES[case], shape=shape), backend="numpy")(x=x).values()
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


EDGES = st.none() | st.integers(-9, 9)
ITEMS = st.one_of(
    st.integers(-3, 2),
    st.builds(slice, EDGES, EDGES, st.none() | st.integers(1, 4)),
    st.none(),
    st.just(Ellipsis),
    st.lists(st.integers(-2, 1), min_size=1, max_size=3),
)


@given(st.lists(ITEMS, max_size=5), st.sampled_from(["B S 4 3", "2 3 4 3", "2 S 4 3"]))
def test_any_index_selects_what_it_selects_in_pytorch(items: list[Any], shape: str) -> None:
    """Operations without a meaning in a graph are refused, also positions past the end of a symbolic axis."""
    x = np.arange(72.0, dtype=np.float32).reshape(2, 3, 4, 3)
    index = tuple(items)
    try:
        expected = torch.from_numpy(x)[index].numpy()
    except (IndexError, ValueError):
        with pytest.raises(TreadleError):
            interpret(traced(lambda t: t[index], shape=shape), {"x": x})
        return
    try:
        (result,) = interpret(traced(lambda t: t[index], shape=shape), {"x": x}).values()
    except TreadleError:
        several = sum(isinstance(item, list) for item in items) > 1 or items.count(Ellipsis) > 1
        assert several or shape != "2 3 4 3", "a constant shape, one index tensor, and one ellipsis"
        return
    np.testing.assert_array_equal(result, expected)


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4)


@given(SIZES, SIZES)
def test_any_reshape_keeps_the_order_of_the_elements_or_shows_the_rearrange(
    before: list[int], after: list[int]
) -> None:
    count = math.prod(before)
    after = [*after, -1] if count % math.prod(after) == 0 else after
    x = np.arange(count, dtype=np.float32).reshape(before)

    def reshapes(x: t.Tensor) -> t.Tensor:
        return x.reshape(*after)

    shape = " ".join(map(str, before))
    if -1 not in after:
        with pytest.raises(TreadleError, match="elements, but the shape has"):
            traced(reshapes, shape=shape)
        return
    try:
        (result,) = interpret(traced(reshapes, shape=shape), {"x": x}).values()
    except TreadleError as error:
        code = (error.hint or "").partition("  #")[0]
        (shown,) = interpret(traced(lambda x: eval(code, {"t": t, "x": x}), shape=shape), {"x": x}).values()
        assert shown.shape == x.reshape(after).shape, "the hint has the requested shape"
        return
    np.testing.assert_array_equal(result, x.reshape(after))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x[:, ::-1],
        lambda x: x[..., ::-3],
        lambda x: x[..., 6:1:-2],
        lambda x: x[..., -2::-1],
        lambda x: x[..., 1:6:-1] if isinstance(x, np.ndarray) else x[..., 0:0],
        lambda x: x[:, 2:0:-1],
        lambda x: x[:, 3::-2],
        lambda x: x[:, -1::-1, 0],
        lambda x: x[:, -1:-3:-1],
        lambda x: x[::-1, None, :-2],
    ],
)
def test_a_negative_step_is_numpys(body: Body) -> None:
    """PyTorch has none."""
    x = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
    (result,) = compile(traced(body), backend="numpy")(x=x).values()
    np.testing.assert_array_equal(result, body(x))


@pytest.mark.parametrize("case", [*INDEXED, *SHAPED])
def test_a_part_or_a_shape_has_no_opaque_op(case: str) -> None:
    """Every axis can be followed through it."""
    names = {node.op.name for node in traced(CASES[case]).main.nodes}
    assert "reshape" not in names


def test_a_position_is_one_slice_and_one_rearrange() -> None:
    nodes = traced(lambda x: x[:, 0, 1:]).main.nodes
    assert [node.op.name for node in nodes] == ["slice", "slice", "rearrange"]
    assert nodes[-1].op.attributes["pattern"] == "a 1 b -> a b"


def test_the_whole_tensor_adds_no_node() -> None:
    graph = traced(lambda x: x[:][...][:, 0:].contiguous().view(*x.shape).permute(0, 1, 2).float().squeeze())
    assert not graph.main.nodes


def test_heads_are_split_as_the_layer_splits_them() -> None:
    by_hand = traced(lambda x: x.view(*x.shape[:2], 2, 4).transpose(1, 2))
    assert [n.op.name for n in compile(by_hand, backend="numpy").graph.main.nodes] == ["rearrange"]


def test_what_pytorch_code_computes_by_hand_is_recognized() -> None:
    def body(x: t.Tensor) -> t.Tensor:
        q, k, v = (t.linear(x, 8, name=n).view(*x.shape[:2], 2, 4).transpose(1, 2) for n in ("q", "k", "v"))
        y = ((q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v).transpose(1, 2).reshape(*x.shape)
        return y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * t.parameter("norm", 8)

    names = [node.op.name for node in compile(traced(body), backend="numpy").graph.main.nodes]
    assert [name for name in names if name != "rearrange"] == ["projections", "attention", "rms_norm"]


HEADS = t.Dim.of(2, "heads")
LABELLED = 't.rearrange(x, "b s (heads=2 d) -> b heads s d")'


def test_the_hint_for_a_labelled_size_in_a_shape_works() -> None:
    (y,) = traced(lambda x: eval(LABELLED, {"t": t, "x": x})).main.outputs.values()
    assert str(y.type.dims[1]) == "heads=2"


@pytest.mark.parametrize(
    ("body", "said", "tried"),
    [
        (lambda x: x[0, 0, 0, 0], "the index has 4 items, but the tensor has 3 axes", None),
        (lambda x: x[..., 8], "from 8 to 9 is outside an axis of size 8", None),
        (lambda x: x[..., -9], "is outside an axis of size 8", None),
        (lambda x: x[..., 0, ...], "an index may have one `...`", None),
        (lambda x: x[0.5], "a tensor cannot be indexed by 0.5", None),
        (lambda x: x["b"], "a tensor cannot be indexed by 'b'", None),
        (lambda x: x[True], "a tensor cannot be indexed by True", None),
        (lambda x: x[[0.5]], "a tensor cannot be indexed by [0.5]", None),
        (lambda x: x[1:2.5], "a tensor cannot be indexed by 2.5", None),
        (lambda x: x[x > 0], "a condition cannot select elements", "t.where(condition, x, 0.0)"),
        (lambda x: x[(x > 0)[:, :, 0]], "a condition cannot select elements", "t.where(condition[..., None], x, 0.0)"),
        (lambda x: x[0, (x > 0)[0, :, 0]], "a condition cannot select elements", "t.where(condition[..., None], x"),
        (lambda x: x[..., (x > 0)[0, 0]], "a condition cannot select elements", "t.where(condition, x, 0.0)"),
        (lambda x: t.where((x > 0)[:, :, 0], x, 0.0), "sizes disagree: S in condition, 8 in x", "condition[..., None]"),
        (lambda x: x * x.mean(-1), "sizes disagree: 8 in x, S in y", "y[..., None], since axes are aligned at the"),
        (lambda x: x.mean((1, 2)) * x, "sizes disagree: B in x, 8 in y", "x[..., None, None], since"),
        (lambda x: x * x.mT, "sizes disagree", None),
        (lambda x: x[[True, False]], "a condition cannot select elements", "t.where(condition[..., None, None], x"),
        (lambda x: x[: x.sum().long()], "the bounds of a slice cannot be a tensor", "t.gather(x, positions, axis=0)"),
        (lambda x: x[:, 3:-1:-1], "a slice that ends at the last position and goes down has no elements", None),
        (lambda x: x.movedim((0, 1), 1), "movedim needs a destination for each axis", "x.movedim(1, 0)"),
        (lambda x: x.roll((1, 2), 1), "roll needs a shift for each axis, received 2 for 1", None),
        (lambda x: x.to(np.float16), ".to takes a dtype of Treadle, not \"<class 'numpy.float16'>\"", "x.to(t.f16)"),
        (lambda x: x.to(float), ".to takes a dtype of Treadle, not \"<class 'float'>\"", "x.to(t.f64)"),
        (lambda x: x.cast(torch.float16), "unknown dtype torch.float16", "t.f16"),
        (lambda x: x.cast([1]), "unknown dtype [1]", "one of f64"),
        (lambda x: t.parameter("w", 8, dtype=np.float16), "dtype must be a dtype of Treadle", "dtype=t.f16"),
        (lambda x: t.embed(x, 8, 8, dtype=np.float16, name="f"), "embed: dtype must be a dtype", "dtype=t.f16"),
        (lambda x: x.to(torch.device("cpu")), ".to takes a dtype of Treadle, not 'cpu'", "x  # leave it out"),
        (lambda x: x.type(t.f16), "cannot be traced: TypeError: 'Type' object is not callable", "x.to(t.f32)"),
        (lambda x: t.f16(x), "f16 is a dtype, and not called", "x.to(t.f16)"),
        (lambda x: x[..., ::0], "the step of a slice must be", "x[:, :, ::2]"),
        (lambda x: x[:, [-1]], "negative positions on an axis whose size differs from call to call: S", "x[:, -1]"),
        (lambda x: x[x.argmax(0), x.argmax(1)], "only one axis may be indexed by a tensor", None),
        (lambda x: x.sum(3), "there is no axis 3 in a tensor of rank 3", None),
        (lambda x: x.sum("s"), "an axis must be an integer, not 's'", None),
        (lambda x: x.T, ".T is for matrices, and the tensor has 3 axes", "x.mT"),
        (lambda x: x.permute(0, 1), "permute needs each of the 3 axes once", "x.permute(2, 1, 0)"),
        (lambda x: x.view(-1, 16), "-1 cannot be inferred: 8*B*S elements are not a multiple of 16", None),
        (lambda x: x.view(-1, -1), "one size of a shape may be -1", None),
        (lambda x: x.view(2.5), "a shape consists of sizes, not (2.5,)", None),
        (lambda x: x.view(*x.shape[:2], HEADS, 4), "a shape consists of sizes", LABELLED),
        (lambda x: x.unflatten(-1, (HEADS, 4)), "a size is an integer or an expression", LABELLED),
        (lambda x: x.split(HEADS, -1), "a size is an integer or an expression", LABELLED),
        (lambda x: t.reshape(x, shape=(*x.shape[:2], HEADS, 4)), "a size is an integer or an expression", LABELLED),
        (lambda x: t.split_heads(x, HEADS), "split_heads: heads must be an integer", LABELLED),
        (lambda x: x.view(t.Dim.of("B"), -1), "a shape consists of sizes", "x.reshape(-1, x.shape[-1])"),
        (lambda x: x.view(3, 8), "the tensor has 8*B*S elements, but the shape has 24", None),
        (
            lambda x: x.view(x.size(0), 2, -1, 4),
            "[B, S, 8] cannot be reshaped to [B, 2, S, 4]: the axes have no common parts",
            't.rearrange(x, pattern="a b (c=2 d) -> a c b d")',
        ),
        (
            lambda x: t.iota(size=36).reshape(4, 9).reshape(6, 6),
            "[4, 9] cannot be reshaped to [6, 6]",
            "t.reshape(x, shape=(6, 6,))",
        ),
        (lambda x: x.squeeze(1), "axis 1 can only be dropped if its size is 1, and S differs", "x[:, 0]"),
        (lambda x: x.unflatten(-1, (3, -1)), "an axis of 8 is not a multiple of 3", None),
        (
            lambda x: x.split(2, dim=1),
            "the number of parts of 2 elements of an axis of S differs",
            "x.split([2, x.shape[1]",
        ),
        (lambda x: x.split([1, 2], dim=2), "the parts have 3 elements, but the axis has 8", None),
        (lambda x: x.chunk(2, dim=1), "an axis of S has no 2 equal parts", None),
        (
            lambda x: x.unbind(1),
            "whose size differs from call to call: S",
            "ops work on all positions at once; x[:, 0]",
        ),
        (lambda x: list(x), "whose size differs from call to call: B", "ops work on all positions at once; x[0]"),
        (lambda x: x.repeat(2), "repeat needs a number for each of the 3 axes, received (2,)", "x.repeat(1, 1, 2)"),
        (lambda x: x[0, 0].tril(), "a triangle has two axes, and the tensor has 1", None),
        (lambda x: x.gather(3, x.long()), "there is no axis 3 in a tensor of rank 3", None),
        (lambda x: x.to("float16"), ".to takes a dtype of Treadle, not 'float16'", "x.to(t.f16)"),
        (lambda x: x.to(torch.bfloat16), ".to takes a dtype of Treadle, not 'torch.bfloat16'", "x.to(t.bf16)"),
        (lambda x: x.to("cuda"), ".to takes a dtype of Treadle, not 'cuda'", "x  # leave it out"),
        (lambda x: x.add_(1), "a tensor of a model has no .add_", "x = x.add(...)"),
        (lambda x: x.reshap(2, -1), "a tensor of a model has no .reshap", "x.reshape(...)"),
        (lambda x: x.layer_nrom(), "a tensor of a model has no .layer_nrom", 't.layer_norm(x, name="ln")'),
        (lambda x: x.eq(1), "a tensor of a model has no .eq", "x == 1"),
        (
            lambda x: x - x.max(-1, keepdim=True),
            "sub: an operand must be a tensor",
            "one of its tensors: .values, .ind",
        ),
        (lambda x: x.exp(axis=1), "exp got an unexpected keyword argument 'axis'", None),
    ],
)
def test_what_an_index_or_a_method_refuses(body: Body, said: str, tried: str | None) -> None:
    error = refusal(body)
    assert said in error.what
    assert tried is None or (error.hint or "").startswith(tried), error.hint


@pytest.mark.parametrize("shape", ["S", "B S", "B 2 S"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, _: x.unbind(-1),
        lambda x, _: x.split(2, -1),
        lambda x, axis: x[(*[slice(None)] * axis, slice(None, None, 0))],
        lambda x, axis: x[(*[slice(None)] * axis, [-1])],
        lambda x, _: x.reshape(-1, -1),
    ],
)
def test_the_hints_name_the_axis(wrong: Callable[[Any, int], Any], shape: str) -> None:
    """The hint works for an axis of any place, in a tensor of any rank."""
    axis = len(shape.split()) - 1
    hint = refusal(lambda x: wrong(x, axis), shape=shape).hint or ""
    (call,) = re.findall(r"x(?:\.\w+\(.*\)|\[[^\]]*\])", hint)
    results = []
    traced(lambda x: results.append(eval(call, {"x": x})), shape=shape)
    assert results


def test_an_assignment_is_refused() -> None:
    def assigns(x: t.Tensor) -> None:
        x[:, 0] = 1.0  # type: ignore[index]

    assert "a tensor of a model cannot be changed" in refusal(assigns).what


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda x: x.sum(axis=-1), "did you mean dim=? x.sum(dim=None, keepdim=False)"),
        (lambda x: x.mean(-1, keepdims=True), "did you mean keepdim=? x.mean(dim=None, keepdim=False)"),
        (lambda x: x.softmax(), "x.softmax(dim)"),
    ],
)
def test_a_wrong_option_of_a_method_comes_with_its_signature(body: Body, tried: str) -> None:
    assert refusal(body).hint == tried


@pytest.mark.parametrize("case", ["x[:, 0]", "x[:, -1]", "max values", "view heads", "var of a symbolic axis"])
def test_gradients_flow_through(case: str) -> None:
    """The gradients are PyTorch's; a maximum gives its gradient to the first of equal elements."""
    x = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    x[0, 0, :3] = 9.0
    leaf = torch.from_numpy(x).requires_grad_()
    made = CASES[case](leaf)
    (made * made).sum().backward()

    @t.model
    def model() -> dict[str, t.Tensor]:
        y = CASES[case](t.parameter("w", *x.shape))
        return {"loss": (y * y).sum()}

    gradients = compile(gradient_graph(model.graph(), "loss", ["w"]), backend="numpy")(w=x)
    np.testing.assert_allclose(gradients["gradient.w"], leaf.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_every_method_has_a_docstring() -> None:
    methods = [m for c in TensorMethods.__mro__ for n, m in vars(c).items() if not n.startswith("_") and callable(m)]
    assert len(methods) > 40
    assert all(inspect.getdoc(method) for method in methods)
    assert Expr.reshape.__doc__ == Expr.view.__doc__


def test_elementwise_ops_are_listed_and_described_as_methods() -> None:
    def body(x: t.Tensor) -> None:
        assert {"exp", "maximum", "relu", "sum", "shape"} <= set(dir(x))
        assert not {"linear", "where", "softplus_", "cached_attention"} & set(dir(x))
        assert x.exp.__doc__ == t.exp.__doc__
        assert hasattr(x, "relu") and not hasattr(x, "linear") and not hasattr(x, "__array_interface__")

    traced(body)
