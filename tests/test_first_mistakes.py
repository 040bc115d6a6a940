"""Typical first code of someone new to the language: it works, or the error shows the right form.

Every hint that is code is run and compared with the same tensors.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.entry_functions import compile
from treadle.ir.errors import FrontendError, SizeError, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.source_lines import raising_line
from treadle.ir.types import Dim

Body = Callable[..., Any]


def traced(body: Body, dtype: str = "f32", shape: str = "B S 8") -> Graph:
    """Return the graph of a model with one input."""

    def model(x: Any) -> Any:
        made = body(x)
        return x if made is None else made

    model.__annotations__["x"] = getattr(t, dtype)[shape]
    return t.model(model).graph()


def refusal(body: Body, **options: str) -> TreadleError:
    """Return the error of tracing the model; it names a line of the test."""
    with pytest.raises(TreadleError) as caught:
        traced(body, **options)
    assert "cannot be traced" not in caught.value.what, "an error of Python's own"
    assert caught.value.source is not None
    assert caught.value.source.startswith(("tests/test_first_mistakes.py:", "tests/test_other_libraries.py:"))
    return caught.value


def follow(code: str) -> None:
    """Run the code that a hint suggests, in a model with the names that hints use."""

    def body(x: t.Tensor) -> None:
        tokens = t.positions(t.reduce_sum(x, axes=(-1,)))
        q = k = v = t.rearrange(x, pattern="b s d -> b 1 s d")
        signal, images = (t.expand(t.constant(0.0), shape=shape) for shape in [(1, 3, 4), (1, 3, 4, 4)])
        names = {"t": t, "x": x, "y": x, "q": q, "k": k, "v": v, "tokens": tokens, "positions": t.positions(x)}
        names["value"] = 2.5
        eval(code, names | {"condition": x > 0, "a": x, "b": x, "signal": signal, "images": images})

    traced(body)


# -- patterns and equations by position --------------------------------------------------------------------------------


def test_a_pattern_may_be_positional() -> None:
    """PyTorch writes the equation of einsum first, einops the pattern last. The op's own errors are the same."""
    equation, pattern = "b s d, b t d -> b s t", "b s d -> b d s"
    same: list[list[Body]] = [
        [
            lambda x: t.einsum(x, x, equation=equation),
            lambda x: t.einsum(equation, x, x),
            lambda x: t.einsum(x, x, equation),
        ],
        [lambda x: t.rearrange(x, pattern=pattern), lambda x: t.rearrange(x, pattern)],
        [lambda x: t.round_to(x, format="f8e4m3fn"), lambda x: t.round_to(x, "f8e4m3fn")],
    ]
    for keyword, *positional in same:
        for body in positional:
            assert traced(body).main.nodes[0].op == traced(keyword).main.nodes[0].op
    assert refusal(lambda x: t.einsum("bsd,btd->bst", x, x)).hint == 'equation="b s d, b t d -> b s t"'
    for body in (lambda x: t.einsum(x, x), lambda x: t.einsum(equation, x, x, pattern), lambda x: t.rearrange(x)):
        refusal(body)
    with pytest.raises(TreadleError, match="operand"):
        traced(lambda x: t.softmax(x, "last"))


# -- dtypes --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Body] = {
    "linear": lambda x: t.linear(x, 4, name="f"),
    "layer_norm": lambda x: t.layer_norm(x, name="f"),
    "rms_norm": lambda x: t.rms_norm(x, name="f"),
    "group_norm": lambda x: t.group_norm(x, 2, name="f"),
    "mlp": lambda x: t.mlp(x, 16),
    "gated_mlp": lambda x: t.gated_mlp(x, 16),
    "self_attention": lambda x: t.self_attention(x, 2, causal=True),
    "cross_attention": lambda x: t.cross_attention(x, x, 2),
    "unembed": lambda x: t.unembed(x, 16, bias=True),
    "convolution": lambda x: t.convolution(x, 4, (3,), name="f"),
    "embed": lambda x: x + t.embed(t.iota(size=4), 16, 8, dtype=x.dtype, name="wpe"),
    "sinusoidal_positions": lambda x: x + t.sinusoidal_positions(t.iota(size=4), 8, dtype=x.dtype),
}


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_have_the_dtype_of_what_they_meet(layer: str, dtype: str) -> None:
    graph = traced(LAYERS[layer], dtype=dtype, shape="1 4 8")
    assert {str(v.type.dtype) for v in graph.parameters.values()} <= {dtype}
    assert {str(v.type.dtype) for v in graph.main.outputs.values()} == {dtype}


def test_a_model_of_f16_runs() -> None:
    @t.model
    def model(x: t.f16["B S 8"]):
        return t.mlp(t.layer_norm(x, name="ln"), 16)

    exe = compile(model)
    (y,) = exe(x=np.ones((1, 2, 8), np.float16)).values()
    assert y.dtype == np.float16


@pytest.mark.parametrize(
    ("body", "dtype", "names"),
    [
        (lambda x: x + t.constant(np.ones(8, np.float32)), "f16", ("x", "y")),
        (lambda x: t.where(x, x, x), "f32", ("condition", "x", "y")),
        (lambda x: t.softmax(x), "i64", ("x",)),
        (lambda x: t.ops.embedding(x, x), "f32", ("table", "indices")),
    ],
    ids=["disagree", "named", "float", "integer"],
)
def test_a_cast_that_is_named_is_the_one_that_works(body: Body, dtype: str, names: tuple[str, ...]) -> None:
    error = refusal(body, dtype=dtype)
    hint = error.hint or ""
    cast = re.fullmatch(r"t\.cast\((\w+), to=t\.(\w+)\)", hint)
    assert cast is not None, hint
    assert cast[1] in names

    def followed(x: t.Tensor) -> None:
        made = eval(hint, {"t": t, **dict.fromkeys(names, x)})
        uses = {
            "f16": lambda: x + made,
            "f32": lambda: t.softmax(made),
            "i64": lambda: t.gather(x, made, axis=0),
            "boolean": lambda: t.where(made, x, x),
        }
        uses[cast[2]]()

    traced(followed, dtype=dtype)


@pytest.mark.parametrize("body", [lambda x: x + t.positions(x), lambda x: t.positions(x) + x, lambda x: (x > 0) + x])
def test_the_cast_goes_to_the_dtype_that_holds_both(body: Body) -> None:
    assert re.fullmatch(r"t\.cast\([xy], to=t\.f32\)", refusal(body).hint or "")


def test_keywords_stand_behind_a_star() -> None:
    assert refusal(lambda x: t.softmax(x, axs=1)).hint == "did you mean axis=? softmax(x, *, axis=-1, name=None)"
    assert refusal(lambda x: t.softmax(x, -1)).hint == "t.softmax(x, axis=-1)"
    sized = refusal(lambda x: t.rearrange(x, "b s (h d) -> b h s d", h=2)).hint or ""
    assert sized == 'a size is in the pattern, as "(h=2 d)": rearrange(x, pattern, *, name=None)'
    assert refusal(lambda x: t.concat()).hint == "concat(*parts, axis=-1, name=None)"
    with pytest.raises(FrontendError) as layer:
        traced(lambda x: t.linear(x, 4))
    assert layer.value.hint == "t.linear(x, out, *, bias=True, name)"
    with pytest.raises(FrontendError) as stack:
        traced(lambda x: list(t.stack("h")))  # type: ignore[call-arg]
    assert stack.value.hint == "t.stack(name, count, *, shared=False)", "the text is no tensor of PyTorch's stack"


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x + t.constant([1.0], "float16"),  # type: ignore[arg-type]
        lambda x: x + t.constant([1.0], dtype=np.float16),  # type: ignore[arg-type]
        lambda x: x + t.parameter("w", 8, dtype="f16"),  # type: ignore[arg-type]
        lambda x: t.embed(x.long(), 8, 8, dtype="f16", name="f"),  # type: ignore[arg-type]
    ],
)
def test_a_dtype_by_its_name_or_of_another_library(body: Body) -> None:
    assert (refusal(body).hint or "").removeprefix("dtype=") == "t.f16"


def test_a_constant_takes_the_name_of_a_dtype() -> None:
    traced(lambda x: x + t.constant([1], "f32"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda x: t.embed(100, 16, name="f"), "t.embed(ids, count=None, dim=None"),  # type: ignore[arg-type]
        (lambda x: t.linear(8, 4, name="f"), "t.linear(x, out, *"),  # type: ignore[arg-type]
        (lambda x: t.cross_attention(x, 2), "t.cross_attention(x, context, heads, *"),  # type: ignore[call-arg, arg-type]
        (lambda x: t.linear(np.ones(8), 4, name="f"), "t.constant(...) builds"),  # type: ignore[arg-type]
        (lambda x: t.reshape(x, shape=("B", -1)), "x.reshape('B', -1), whose -1 is the rest"),
        (lambda x: t.reshape(x, shape=(-1, 8)), "x.reshape(-1, 8), whose -1 is the rest"),
        (lambda x: t.f32("B 8"), 't.f32["B 8"]'),
        (lambda x: t.f32("B", 8), 't.f32["B", 8]'),
        (lambda x: t.f32((2, 8)), "t.f32[2, 8]"),
        (lambda x: t.f32(2.5), "t.constant(2.5, t.f32)"),
        (lambda x: t.boolean(x), "x.to(t.boolean)"),
        (lambda x: t.f16(x), "x.to(t.f16)"),
        (lambda x: t.f32[None, 8], 'a name such as "B"'),  # type: ignore[index]
        (lambda x: t.f32["? 8"], 'a name such as "B"'),
    ],
)
def test_a_hint_has_the_form_that_is_meant(body: Body, tried: str) -> None:
    with pytest.raises(TreadleError) as caught:
        traced(body)
    assert (caught.value.hint or "").startswith(tried)


def test_tensors_of_pytorch_are_positions() -> None:
    """The hint for a wrong index names positions, which may be PyTorch's."""
    torch = pytest.importorskip("torch")
    a = np.arange(24, dtype=np.float32).reshape(1, 3, 8)
    (y,) = compile(traced(lambda x: x[:, :, torch.tensor([0, 2])]), backend="numpy")(x=a).values()
    np.testing.assert_array_equal(y, a[:, :, [0, 2]])
    assert "x[:, positions]" in (refusal(lambda x: x[:, :, torch.tensor([0.5])]).hint or "")


def test_the_greater_of_two_tensors_as_in_pytorch() -> None:
    a = np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 3, 8)
    for body, expected in ((lambda x: x.max(-x), np.abs(a)), (lambda x: x.min(-x), -np.abs(a))):
        (y,) = compile(traced(body), backend="numpy")(x=a).values()
        np.testing.assert_array_equal(y, expected)


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: x / x.shape[-1], lambda a: a / 8),
        (lambda x: x * x.shape[1], lambda a: a * 3),
        (lambda x: x.shape[1] - x, lambda a: 3 - a),
        (lambda x: t.maximum(x, x.shape[1]), lambda a: np.maximum(a, 3)),
        (lambda x: x * x.shape[-1] ** -0.5, lambda a: a / math.sqrt(8)),
        (lambda x: x * (x.shape[-1] * 0.5), lambda a: a * 4),
        (lambda x: x * (1 / x.shape[-1]), lambda a: a / 8),
        (lambda x: x * (x.shape[-1] / x.shape[-1]), lambda a: a),
        (lambda x: x * math.sqrt(x.shape[-1]), lambda a: a * math.sqrt(8)),
        (lambda x: x * np.sqrt(x.shape[-1]), lambda a: a * math.sqrt(8)),
        (lambda x: x + np.arange(x.shape[-1]), lambda a: a + np.arange(8)),
        (lambda x: x + t.constant([x.shape[-1], 0.5] * 4), lambda a: a + [8, 0.5] * 4),
        (lambda x: x * (np.int64(2) * x.shape[1] + np.int64(1)), lambda a: a * 7),
        (lambda x: x * (x.shape[1] % 2 + 17 % x.shape[-1] + 17 // x.shape[-1]), lambda a: a * 4),
        (lambda x: x + t.constant(x.shape[1], t.f32), lambda a: a + 3),
        (lambda x: x / x.shape[1] ** 2, lambda a: a / 9),
        (lambda x: x * max(x.shape[-1], 3), lambda a: a * 8),
        (lambda x: x * (2 if x.shape[1] > 0 else 1), lambda a: a * 2),
        (lambda x: x * (2 if x.shape[1] < 2**63 else 1), lambda a: a * 2),
        (lambda x: x * (2 if x.shape[1] >= 10**400 else 1), lambda a: a),
        (lambda x: x * (2 if math.inf > x.shape[0] * x.shape[1] else 1), lambda a: a * 2),
        (lambda x: x * (2 if x.shape[1] + 1 > x.shape[1] else 1), lambda a: a * 2),
        (lambda x: x * len(range(x.shape[-1])), lambda a: a * 8),
        (lambda x: x * len([*t.stack("h", x.shape[-1])]), lambda a: a * 8),
        (lambda x: x * float(f"{x.shape[-1]:d}"), lambda a: a * 8),
    ],
)
def test_sizes_are_numbers_beside_tensors_and_numbers(body: Body, expected: Callable[[Any], Any]) -> None:
    a = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 3, 8)
    (y,) = compile(traced(body))(x=a).values()
    np.testing.assert_allclose(y, expected(a), rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: float(x.shape[1]),
        lambda x: range(x.shape[1]),
        lambda x: x.shape[1] ** 0.5,
        lambda x: x.shape[1] * 0.5,
        lambda x: 0.5 * x.shape[1],
        lambda x: np.float32(0.5) * x.shape[1],
        lambda x: 1 / x.shape[1],
        lambda x: math.sqrt(x.shape[1]),
        lambda x: np.sqrt(x.shape[1]),
        lambda x: np.ones(3) * x.shape[1],
    ],
)
def test_a_size_that_differs_from_call_to_call_is_no_number(body: Body) -> None:
    error = refusal(body)
    assert isinstance(error, SizeError)
    tensor, _ = (error.hint or "").split(" is a tensor of this value; ")
    follow(f"x / {tensor}")


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (lambda torch, x: np.arange(x.shape[1]), "t.iota(size=x.shape[1])"),
        (lambda torch, x: np.zeros(x.shape), "t.expand(t.constant(0.0"),
        (lambda torch, x: np.ones((x.shape[1], 4)), "t.expand(t.constant(1.0"),
        (lambda torch, x: torch.arange(x.shape[1]), "t.iota(size=x.shape[1])"),
        (lambda torch, x: torch.arange(0, x.shape[1]), "t.iota(size=x.shape[1])"),
        (lambda torch, x: torch.ones(x.shape[1], 4), "t.expand(t.constant(1.0"),
        (lambda torch, x: torch.ones(x.shape[1], x.shape[1]), "t.expand(t.constant(1.0"),
        (lambda torch, x: torch.ones((x.shape[1], 4)), "t.expand(t.constant(1.0"),
        (lambda torch, x: torch.zeros(x.shape), "t.expand(t.constant(0.0"),
        (lambda torch, x: torch.full((x.shape[1], 4), 2.5), "t.expand(t.constant(2.5"),
    ],
)
def test_an_array_of_a_size_that_differs_is_built_by_an_op(body: Any, tried: str) -> None:
    """The hint is the tensor that the function would return."""
    torch = pytest.importorskip("torch")
    with pytest.raises(TreadleError) as caught:
        traced(lambda x: body(torch, x))
    assert (caught.value.source or "").startswith(("tests/test_first_mistakes.py:", "tests/test_other_libraries.py:"))
    hint = (caught.value.hint or "").partition("  #")[0]
    assert hint.startswith(tried)
    names = {"t": t, "value": 2.5}
    (y,) = compile(traced(lambda x: eval(hint, names | {"x": x})), backend="numpy")(x=np.ones((2, 3, 8), "f4")).values()
    np.testing.assert_array_equal(np.unique(y), np.unique(np.asarray(body(torch, np.ones((2, 3, 8))))))


def test_functions_of_pytorch_take_sizes_that_are_numbers() -> None:
    torch = pytest.importorskip("torch")
    a = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 3, 8)

    def body(x: Any) -> Any:
        return x + torch.arange(x.shape[-1]) * torch.full((x.shape[-1],), 2.0) + torch.ones((1, x.shape[-1]))

    (y,) = compile(traced(body), backend="numpy")(x=a).values()
    np.testing.assert_allclose(y, a + np.arange(8) * 2.0 + 1, rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.shape[1] > 3,
        lambda x: max(x.shape[1], 3),
        lambda x: x.shape[1] <= 2.5,
        lambda x: x.shape[1] < 2**63 - 1,
        lambda x: x.shape[1] - 1 < 2 * x.shape[0],
    ],
)
def test_an_order_of_sizes_that_depends_on_the_call(body: Body) -> None:
    error = refusal(body)
    assert re.match(r"S\S* \S+ [\d.*B]+ is unknown while a model is traced", error.what)
    follow((error.hint or "").partition(", or ")[2])


def test_a_size_beside_a_number_that_no_tensor_holds() -> None:
    """The error then names no tensor."""
    error = refusal(lambda x: x.shape[0] * x.shape[1] < 2**63)
    assert error.what.startswith(f"B*S < {2**63} is unknown")
    assert error.hint == "declare the axis with a number"


# -- Python's operations on a tensor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said", "tried"),
    [
        (lambda x: np.tanh(x), "NumPy's tanh takes arrays", "t.tanh(x)"),
        (lambda x: np.mean(x, axis=-1), "NumPy's mean takes arrays", "x.mean(dim=-1)"),
        (lambda x: np.concatenate([x, x]), "NumPy's concatenate takes arrays", "t.concat(x, x, axis=0)"),
        (lambda x: np.add.reduce(x), "NumPy's reduce takes arrays", None),
        (lambda x: np.array([x, x]), "a tensor of a model is not an array", "t.concat(a, b, axis=1)"),
        (lambda x: t.mlp(x, 8, act=np.tanh), "NumPy's tanh takes arrays", "t.tanh(x)"),
        (lambda x: float(x), "a tensor of a model is not a Python number", "x.cast(t.f32)"),
        (lambda x: int(x), "a tensor of a model is not a Python number", "x.cast(t.f32)"),
        (lambda x: math.sqrt(x), "a tensor of a model is not a Python number", "t.sqrt(x)"),
        (lambda x: x * math.exp(x) + 1, "a tensor of a model is not a Python number", "t.exp(x)"),
        (lambda x: sqrt(x), "a tensor of a model is not a Python number", "t.sqrt(x)"),
        (lambda x: math.log2(x), "a tensor of a model is not a Python number", "t.log(x) / 0.69"),
        (lambda x: math.gamma(x), "a tensor of a model is not a Python number", "x.cast(t.f32)"),
        (lambda x: range(x), "a tensor of a model is not a Python number", "x.cast(t.f32)"),
        (lambda x: [1, 2][x], "a tensor of a model is not a Python number", "x.cast(t.f32)"),
        (lambda x: round(x), "a tensor of a model is not a Python number", "t.round(x)"),
        (lambda x: math.floor(x), "a tensor of a model is not a Python number", "t.floor(x)"),
        (lambda x: math.ceil(x), "a tensor of a model is not a Python number", "-t.floor(-x)"),
        (lambda x: divmod(x, 2), "a tensor of a model has no divmod()", "x // y"),
        (lambda x: x if x < 0 else -x, "no data-dependent branches", "t.where(condition, a, b)"),
        (lambda x: x and x, "no data-dependent branches", "t.where(condition, a, b)"),
        (lambda x: not x, "no data-dependent branches", "t.where(condition, a, b)"),
        (lambda x: max(x, x), "no data-dependent branches", "t.where(condition, a, b)"),
        (lambda x: sum(x), "a tensor cannot be iterated over along an axis whose size differs", None),
        (lambda x: [*x], "a tensor cannot be iterated over along an axis whose size differs", None),
        (lambda x: 1.0 in x, "`in` cannot look into a tensor", "x == y"),
    ],
)
def test_python_protocols_on_tensors(body: Body, said: str, tried: str | None) -> None:
    error = refusal(body)
    assert said in error.what
    assert (error.received or "").startswith(("f32[B, S, ", "bool[B, S, "))
    if tried is not None:
        assert re.match(re.escape(tried.replace("x == y", "x == value")), error.hint or ""), error.hint
        follow(tried)


@pytest.mark.parametrize(
    ("call", "function", "tried"),
    [
        (lambda torch, x: torch.relu(x), "relu", "t.relu(x)"),
        (lambda torch, x: torch.nn.functional.softmax(x, dim=-1), "softmax", "x.softmax(dim=-1)"),
        (lambda torch, x: torch.nn.functional.gelu(x), "gelu", "t.gelu(x)"),
        (lambda torch, x: torch.cat([x, x], dim=1), "cat", "t.concat(x, x, axis=1)"),
        (lambda torch, x: torch.matmul(x, x), "matmul", "x @ x"),
        (lambda torch, x: torch.ones(8).view_as(x), "view_as", "x.reshape(x.shape)"),
        (lambda torch, x: torch.nn.Linear(8, 8)(x), "linear", 't.linear(x, 64, name="f")'),
        (lambda torch, x: torch.nn.LayerNorm(8)(x), "layer_norm", 't.layer_norm(x, name="ln")'),
        (lambda torch, x: torch.einsum("bsd,btd->bst", x, x), "einsum", 't.einsum(x, x, equation="b s d, b t d'),
        (lambda torch, x: torch.where(x > 0, x, x), "where", "t.where(x, y, z)"),
        (lambda torch, x: torch.nn.functional.scaled_dot_product_attention(x, x, x), "scaled", "t.attention(q, k, v"),
        (lambda torch, x: torch.fft.fft(x), "fft_fft", None),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_function_of_pytorch_is_refused_at_the_users_line(call: Any, function: str, tried: str | None) -> None:
    torch = pytest.importorskip("torch")
    error = refusal(lambda x: call(torch, x))
    assert error.what.startswith(f"PyTorch's {function}")
    assert (error.hint is None) == (tried is None)
    assert (error.hint or "").startswith(tried or "")


def test_operators_beside_tensors_of_pytorch_are_ops() -> None:
    torch = pytest.importorskip("torch")
    a = torch.linspace(1, 2, 8)

    def body(x: Any, where: Callable[..., Any]) -> Any:
        return (
            (a + x)
            - (a - x) * a
            + (a[None] @ x.mT[..., :1]) / (a**x)
            + where(a < x, a, x)
            + a // x
            + a % x
            + a.add(x) / a
        )

    x = np.full((1, 1, 8), 1.5, np.float32)
    (y,) = compile(traced(lambda x: body(x, t.where)), backend="numpy")(x=x).values()
    np.testing.assert_allclose(y, body(torch.from_numpy(x), torch.where).numpy(), rtol=1e-6)


def test_operators_beside_arrays_and_numbers_of_numpy_are_ops() -> None:
    a = np.linspace(1, 2, 8, dtype=np.float32)

    def body(x: t.Tensor) -> Any:
        return (a + x) * np.float32(2) - np.float32(1) / x + sum([x, x]) + t.where(a < x, a - x, 0.0)

    (y,) = compile(traced(body))(x=np.full((1, 1, 8), 1.5, np.float32)).values()
    expected = (a + 1.5) * 2 - 1 / 1.5 + 3.0 + np.where(a < 1.5, a - 1.5, 0)
    np.testing.assert_allclose(y[0, 0], expected, rtol=1e-6)


def test_lines_of_numpy_are_not_the_users() -> None:
    def fails() -> Any:
        return np.mean(np.ones(3), axis=4)

    with pytest.raises(ValueError, match="axis 4") as caught:
        fails()
    assert str(raising_line(caught.value)).startswith(
        ("tests/test_first_mistakes.py:", "tests/test_other_libraries.py:")
    )


# -- arguments of layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said", "tried"),
    [
        (lambda x: t.mlp(x, 8, act="gelu"), "mlp: act must be a function of a tensor", "act=t.gelu"),
        (lambda x: t.gated_mlp(x, 8, act="Silu"), "gated_mlp: act must be a function of a tensor", "act=t.silu"),
        (lambda x: t.self_attention(x, 2, rotate=x), "self_attention: rotate must be a function of a tensor", None),
        (lambda x: t.self_attention(x, "2"), "self_attention: heads must be an integer", "heads=2"),
        (lambda x: t.self_attention(x, 2.0), "self_attention: heads must be an integer", "heads=2"),
        (lambda x: t.self_attention(x, True), "self_attention: heads must be an integer", "heads=1"),
        (lambda x: t.self_attention(x, 0), "heads must be 1 or more", None),
        (lambda x: t.self_attention(x, 2, kv_heads=0), "kv_heads must be 1 or more", None),
        (lambda x: t.self_attention(x, 2, scale="0.5"), "self_attention: scale must be a number", "scale=0.5"),
        (lambda x: t.self_attention(x, 2, causal="yes"), "self_attention: causal must be True or False", None),
        (lambda x: t.self_attention(x, 2, mask="causal"), "masks intersect with masks only", "mask=t.causal"),
        (lambda x: t.linear(x, 8 / 3, name="f"), "linear: out must be an integer", None),
        (lambda x: t.linear(x, 8, name=3), "linear: name must be text", 'name="3"'),
        (lambda x: t.linear(None, 8, name="f"), "linear: x must be a tensor", None),
        (lambda x: t.linear([x, x], 8, name="f"), "linear: x must be one tensor", None),
        (lambda x: t.linear(np.ones(8), 8, name="f"), "linear: x must be a tensor", None),
        (lambda x: t.cross_attention(x, 2, 2), "cross_attention: context must be a tensor", None),
        (lambda x: t.embed(x, 8, 8, dtype="f16", name="f"), "embed: dtype must be a dtype", None),
        (lambda x: t.convolution(x, 4, 3, name="f"), "convolution: kernel must be a tuple of integers", "kernel=(3,)"),
        (lambda x: t.convolution(x, 4, (3, 3), name="f"), "the kernel has 2 axes, and x has 1 after", "kernel=(3,)"),
        (lambda x: t.convolution(x, 4, (3,), name="f"), "axis 1 of x holds the channels", None),
        (
            lambda x: t.convolution(t.constant(np.ones((2, 8))), 4, (3,), name="f"),
            "the kernel has 1 axes, and x has 0 after its batch and channels",
            "x of shape [B, C, ...]",
        ),
        (
            lambda x: t.convolution(t.constant(np.ones((2, 8, 3, 4))), 4, (3,), name="f"),
            "the kernel has 1 axes, and x has 2 after its batch and channels",
            "such as kernel=(3, 3)",
        ),
        (lambda x: t.convolution(x, 4, (3,), strides=2, name="f"), "strides must be a tuple", "strides=(2,)"),
        (lambda x: t.convolution(x, 4, (3,), padding="full", name="f"), "padding must be a tuple", 'padding="same"'),
        (
            lambda x: t.convolution(x, 4, (3,), padding="same", strides=(2,), name="f"),
            'padding="same" keeps the sizes of axes, and strides divide them',
            "padding=(1,)",
        ),
        (lambda x: t.convolution(x, 4, (3,), groups=0, name="f"), "groups must be 1 or more", None),
        (lambda x: t.group_norm(x, 2, name="f"), "group_norm: axis 1 of x holds the channels", "b s c -> b c s"),
        (lambda x: t.group_norm(x[0, 0], 2, name="f"), "the channels, and x has no axis 1", "x of shape [B, C, ...]"),
        (lambda x: t.group_norm(x.mT, 3, name="f"), "8 channels do not make 3 equal groups", "a multiple of groups"),
        (lambda x: t.group_norm(x.mT, 0, name="f"), "groups must be 1 or more", None),
        (lambda x: t.max_pool(x, kernel=3), "max_pool: kernel must be a tuple of integers, is 3", "kernel=(3,)"),
        (lambda x: t.max_pool(x, kernel=3), "is 3", "kernel=(3,) for one axis, kernel=(3, 3) for two"),
        (lambda x: t.max_pool(x, kernel=(3, 3), padding=1), "max_pool: padding must be a tuple", "padding=(1, 1)"),
        (lambda x: t.max_pool(x, kernel=(3,), strides=2), "max_pool: strides must be a tuple", "strides=(2,)"),
        (lambda x: t.average_pool(x, kernel=(3, 3), strides=(2,)), "strides has 1 number for 2", "strides=(2, 2)"),
        (
            lambda x: t.convolution(x[:, None, :4], 4, (3, 3), padding=(1,), name="f"),
            "padding has 1 number for 2 spatial axes",
            "padding=(1, 1)",
        ),
        (lambda x: t.reduce_mean(x, axes=-1), "reduce_mean: axes must be a tuple of integers, is -1", "axes=(-1,)"),
    ],
)
def test_a_wrong_argument_is_told_by_its_name(body: Body, said: str, tried: str | None) -> None:
    error = refusal(body)
    assert said in error.what
    assert tried is None or tried in (error.hint or "")


def test_a_size_is_an_integer_to_a_layer() -> None:
    graph = traced(lambda x: t.mlp(t.self_attention(x, x.shape[-1]), 4 * x.shape[-1]))
    assert str(graph.parameters["mlp.up.weight"].type) == "f32[ffn=32, 8]"


# -- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 3), ((32, 3),), ([32, 3],), (np.int64(32), np.int64(3)), (Dim.of(32, "d"), 3)])
def test_a_shape_is_sizes_or_one_sequence_of_sizes(shape: tuple[Any, ...]) -> None:
    graph = traced(lambda x: t.parameter("w", *shape))
    assert graph.parameters["w"].type.static_shape == (32, 3)
    assert str(traced(lambda x: t.parameter("w", x.shape[-1:])).parameters["w"].type) == "f32[8]"


@pytest.mark.parametrize("size", [3.0, None, True, (4, 4), [4], object(), np.ones(2)])
def test_a_shape_of_anything_else_is_refused(size: Any) -> None:
    for shape in ((2, size), ((2, size),)):
        error = refusal(lambda x: t.parameter("w", *shape))  # noqa: B023
        assert error.what == "the shape of parameter w must consist of sizes"
        assert error.received == repr(size)
    assert refusal(lambda x: t.parameter("w", x)).what == error.what


@pytest.mark.parametrize("init", [0.02, 1, np.zeros, np.ones(8), None, True, ["normal"], "xavier"])
def test_an_initial_value_is_a_word_or_an_init(init: Any) -> None:
    error = refusal(lambda x: t.parameter("w", 8, init=init))
    assert error.what == f"parameter w: unknown initial value {init!r}"
    for code in re.findall(r"t\.Init\([^)]*\)", error.hint or ""):
        traced(lambda x: t.parameter("w", 8, init=eval(code)))  # noqa: B023
    assert "t.Init(" in (error.hint or "")


def test_the_kind_and_the_scale_of_an_init_are_checked_where_it_is_written() -> None:
    assert refusal(lambda x: t.Init("normall", 0.02)).what == "unknown initial value 'normall'"
    assert refusal(lambda x: t.Init(0.02)).what == "unknown initial value 0.02"  # type: ignore[arg-type]
    for scale in ("a", True, [1.0]):
        assert refusal(lambda x: t.Init("normal", scale)).received == repr(scale)  # type: ignore[arg-type]  # noqa: B023


def test_other_arguments_of_a_parameter_are_checked() -> None:
    torch = pytest.importorskip("torch")
    assert refusal(lambda x: t.parameter(8, 8)).what == "the name of a parameter is text"  # type: ignore[arg-type]
    for dtype in ("f32", np.float32, torch.float32):
        error = refusal(lambda x: t.parameter("w", 8, dtype=dtype))  # noqa: B023
        assert (error.what, error.received) == ("parameter w: dtype must be a dtype of Treadle", repr(dtype))


# -- masks and biases of arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_masks_and_biases_take_arrays(dtype: str) -> None:
    slopes, bias, keep = [0.5, 0.25], np.linspace(-1, 1, 32).reshape(2, 4, 4), np.tri(4, dtype=bool)

    def arrays(x: t.Tensor) -> Any:
        mask = t.boolean_mask(keep, "s t") & t.padding(np.array([3])) & t.segments(np.array([[0, 0, 0, 1]]))
        return t.self_attention(
            x, 2, mask=mask, bias=t.alibi(slopes) + t.alibi(np.array(slopes)) + t.tensor_bias(bias, "h s t")
        )

    def constants(x: t.Tensor) -> Any:
        mask = t.boolean_mask(t.constant(keep), "s t") & t.padding(t.constant([3]))
        mask &= t.segments(t.constant([[0, 0, 0, 1]]))
        one = t.constant(slopes, x.dtype)
        return t.self_attention(
            x, 2, mask=mask, bias=t.alibi(one) + t.alibi(one) + t.tensor_bias(t.constant(bias, x.dtype), "h s t")
        )

    assert traced(arrays, dtype, "1 4 8") == traced(constants, dtype, "1 4 8")


@pytest.mark.parametrize("make", [lambda x: np.tri(4, dtype=bool), lambda x: t.constant(np.tri(4, dtype=bool))])
def test_an_array_as_a_mask_or_a_bias_comes_with_the_function_that_takes_it(make: Callable[[Any], Any]) -> None:
    def attention(x: t.Tensor, **terms: Any) -> t.Tensor:
        return t.self_attention(x, 2, **terms)

    error = refusal(lambda x: attention(x, mask=make(x)), shape="1 4 8")
    mask, bias = re.findall(r"t\.\w+\((?:[^()]|\([^()]*\))*\)", error.hint or "")
    traced(lambda x: attention(x, mask=eval(mask, {"t": t, "x": make(x)})), shape="1 4 8")
    bias = bias.replace("(x,", "(x * 1.0,")  # of numbers, where x is an array
    traced(lambda x: attention(x, bias=eval(bias, {"t": t, "x": make(x)})), shape="1 4 8")
    assert refusal(lambda x: attention(x, mask=True)).hint == "mask=t.causal"
    assert refusal(lambda x: attention(x, mask=t.alibi([1.0, 2.0]))).hint == "attention takes both: mask=..., bias=..."


def test_a_weight_of_pytorch_is_no_constant() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.nn.Parameter(torch.ones(8)), torch.ones(8, dtype=torch.bfloat16)):
        error = refusal(lambda x: x * tensor)  # noqa: B023
        assert error.what == f"cannot build a constant from a {type(tensor).__name__}"
        weight, constant = re.findall(r"t\.parameter\([^)]*\)|w\.detach\(\)[^ ]*", error.hint or "")
        traced(lambda x: x * eval(weight) + eval(constant, {"w": tensor}))  # noqa: B023


def test_a_bias_must_be_a_tensor_or_an_array() -> None:
    error = refusal(lambda x: t.alibi(2))
    assert (error.what, error.hint) == (
        "slopes must be a tensor of the model, or an array",
        "[0.5, 0.25], the slope of each head, or a tensor",
    )


# -- patterns and equations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said", "mark", "tried"),
    [
        (
            lambda x: t.rearrange(x, pattern="b s (h=2 d -> b h s d"),
            "rearrange: '(' without ')'",
            "b s (h=2 d -> b h s d\n    ^",
            None,
        ),
        (
            lambda x: t.rearrange(x, pattern="b s h=2 d) -> b h s d"),
            "rearrange: ')' without '('",
            "b s h=2 d) -> b h s d\n         ^",
            None,
        ),
        (
            lambda x: t.rearrange(x, pattern="batch seq dim -> batch dim sea"),
            "rearrange: axis sea is after '->', and in no operand",
            "batch seq dim -> batch dim sea\n                           ^",
            "did you mean seq?",
        ),
        (
            lambda x: t.rearrange(x, pattern="b s d -> b s"),
            "rearrange: axis d is missing after '->'",
            "b s d -> b s\n    ^",
            None,
        ),
        (
            lambda x: t.rearrange(x, pattern="b s d -> b d d s"),
            "rearrange: axis d occurs twice on one side",
            "b s d -> b d d s\n             ^",
            None,
        ),
        (
            lambda x: t.rearrange(x, pattern="b, s, d -> b d s"),
            "rearrange: a pattern has no commas",
            "b, s, d -> b d s\n ^",
            'separate axes by spaces: "b s d -> b d s"',
        ),
        (lambda x: t.rearrange(x, pattern="b s d"), "rearrange: '->' is missing", "b s d\n     ^", '"b s d -> b d s"'),
        (
            lambda x: t.rearrange(x, pattern="b s (h=2 d)"),
            "rearrange: '->' is missing",
            "b s (h=2 d)\n           ^",
            '"b s (h=2 d) -> b (h d) s"',
        ),
        (
            lambda x: t.rearrange(x, pattern="b s (h d) -> b h s d"),
            "rearrange: cannot infer the sizes of h and d",
            "b s (h d) -> b h s d\n     ^",
            "sizes of all but one of them in the pattern: 'b s (h=2 d) -> b h s d'",
        ),
        (
            lambda x: t.einsum(x, x, equation="b s d, b t d -> b s u"),
            "einsum: axis u is after '->', and in no operand",
            "b s d, b t d -> b s u\n                    ^",
            None,
        ),
        (
            lambda x: t.einsum(x, x, equation="b s d b t d -> b s t"),
            "einsum: before '->' the equation has 1 operand, but 2 are passed",
            "b s d b t d -> b s t\n            ^",
            'separate operands by commas, and their axes by spaces: "b s d, b t d -> b s t"',
        ),
        (
            lambda x: t.einsum(x, x, equation="bsd,btd->bst"),
            "einsum: axes must be separated by spaces",
            "bsd,btd->bst\n ^",
            'equation="b s d, b t d -> b s t"',
        ),
        (
            lambda x: t.einsum(x, x, equation="b s d, b d d -> b s d"),
            "einsum: axis d occurs twice in one operand",
            "b s d, b d d -> b s d\n           ^",
            None,
        ),
        (
            lambda x: t.einsum(x, x, equation="b s d, b t $ -> b s t"),
            "einsum: cannot read '$'",
            "b s d, b t $ -> b s t\n           ^",
            None,
        ),
    ],
)
def test_a_typo_in_a_pattern_is_pointed_at(body: Body, said: str, mark: str, tried: str | None) -> None:
    error = refusal(body)
    assert (error.what, error.hint) == (said, tried)
    column, _, shown = (error.within or "").partition("\n")
    assert shown == mark
    assert column == f"column {len(mark.splitlines()[1])}"


def test_a_long_pattern_is_shown_around_its_typo() -> None:
    names = " ".join(f"n{i}" for i in range(400))
    error = refusal(lambda x: t.rearrange(x, pattern=f"{names} ) -> {names}"))
    column, shown, mark = (error.within or "").splitlines()
    assert column == f"column {len(names) + 2}"
    assert len(shown) <= 120
    assert shown[len(mark) - 1] == ")"


# -- names ---------------------------------------------------------------------------------------------------------


@t.model
def named(tokens: t.i64["B S"], lengths: t.i64["B"] | None = None, *, layers: int = 2):
    """Two blocks and a head."""
    x = t.embed(tokens, 16, 8, name="wte")
    for _ in t.stack("h", layers):
        x = x + t.mlp(t.layer_norm(x, name="ln"), 16)
    return t.unembed(x, tied="wte")


@pytest.mark.parametrize(
    ("use", "tried"),
    [
        (lambda: compile(named, layer=3), "did you mean layers?"),
        (lambda: compile(named, sed=3), "did you mean seed=, an option of compile?"),
        (lambda: compile(named, inputs=("length",)), "did you mean lengths?"),
        (lambda: compile(named, backend="nunpy"), "numpy"),
        (lambda: compile(named, weights={"wte.weigth": np.ones(1), "h.0.ln.biass": np.ones(1)}), None),
        (lambda: compile(named)(token=np.zeros((1, 2), np.int64)), "tokens=..."),
    ],
)
def test_a_misspelt_name_comes_with_its_neighbour(use: Callable[[], Any], tried: str | None) -> None:
    with pytest.raises(TreadleError) as caught:
        use()
    hint = caught.value.hint or ""
    if tried is None:
        assert hint == "h.0.ln.bias for h.0.ln.biass, wte.weight for wte.weigth?"
    else:
        assert tried in hint


def test_an_unrelated_name_of_a_weight_lists_the_names_of_the_model() -> None:
    """The most similar ones are first."""
    listed = "one of the model's parameters: h.1.mlp.up.weight, h.0.mlp.up.weight, h.1.mlp.down.weight, "
    with pytest.raises(TreadleError) as caught:
        compile(named, weights={"h.2.mlp.gate.weight": np.ones(1)})
    assert (caught.value.hint or "").startswith(listed)


@pytest.mark.parametrize("tied", ["wet", "wte.weight", "encoder.wte"])
def test_a_misspelt_table_is_told_as_tied_names_it(tied: str) -> None:
    for use in (lambda x: t.unembed(x, tied=tied), lambda x: t.embed(t.positions(x), tied=tied)):

        def body(x: t.Tensor) -> t.Tensor:
            t.embed(t.positions(x), 16, 8, name="wte")
            return use(x)  # noqa: B023  (called at once)

        assert refusal(body).hint == "tied='wte'"


def test_a_long_argument_is_cut() -> None:
    assert refusal(lambda x: t.mlp(x, 8, act="gelu" * 40)).received == ("'" + "gelu" * 40)[:80]

    def declared(x: t.f32["B"] = "default" * 40):
        return x

    with pytest.raises(FrontendError, match="has a default, which an input cannot have") as caught:
        t.model(declared).graph()
    assert caught.value.received == ("'" + "default" * 40)[:80]


def test_shared_modules_are_declared_before_use() -> None:
    """If no name is similar, the hint shows how to declare a parameter."""
    assert refusal(lambda x: x * t.shared_parameter("w")).hint == "declare it first"

    def several(x: t.Tensor) -> t.Tensor:
        for name in ("scale_a", "scale_b", "scale_c", "scale_d"):
            x = x * t.parameter(name, 8)
        return x * t.shared_parameter("scale")

    assert (refusal(several).hint or "").count(" or ") == 2
    error = refusal(lambda x: t.unembed(x, tied="wte"))
    assert error.what == "unembed: tied= does not name an embedding that is declared before"
    assert error.hint == 'the name= of an embedding above: t.embed(tokens, 100, 16, name="wte")'


def twice(x: t.Tensor) -> t.Tensor:
    return t.linear(t.linear(x, 8, name="f"), 8, name="f")


def same_line(x: t.Tensor) -> t.Tensor:
    for _ in range(2):
        x = t.linear(x, 8, name="f")
    return x


def two_stacks(x: t.Tensor) -> t.Tensor:
    for _ in t.stack("h", 2):
        x = t.linear(x, 8, name="f")
    for _ in t.stack("h", 2):
        x = t.linear(x, 8, name="f")
    return x


def twice_in_a_stack(x: t.Tensor) -> t.Tensor:
    for _ in t.stack("h", 2):
        x = t.layer_norm(x, name="f")
        x = t.linear(x, 8, name="f")
    return x


@pytest.mark.parametrize(
    ("body", "tried"),
    [
        (twice_in_a_stack, 'name="f_2" for one of the two, or with t.scope("second"): around it; '),
        (
            same_line,
            'for i in t.stack("layers", 2): around a block that repeats, or a separate name each time, name=f"f_{i}"; ',
        ),
        (
            twice,
            'for i in t.stack("layers", 2): around a block that repeats, or a separate name each time, name=f"f_{i}"; ',
        ),
        (two_stacks, 't.stack("h_2", ...): another name for one of the two stacks; '),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_two_parameters_of_one_name_are_told_apart(body: Body, tried: str) -> None:
    error = refusal(body)
    assert (error.hint or "").startswith(tried)
    assert "t.shared_parameter('" in (error.hint or "")


# -- copies --------------------------------------------------------------------------------------------------------


def test_a_model_is_copied_and_pickled_by_its_name() -> None:
    changed = named.configure(layers=3, inputs=("lengths",))
    assert copy.deepcopy({"m": changed})["m"] is copy.copy(changed) is changed
    again = pickle.loads(pickle.dumps(changed))
    assert (again.function, again.config, again.optional_inputs) == (named.function, {"layers": 3}, ("lengths",))
    assert again.graph() == changed.graph()


def test_a_model_that_no_module_holds_is_not_pickled() -> None:
    @t.model
    def inner(x: t.f32["B"]):
        return x

    with pytest.raises(FrontendError, match="model inner cannot be pickled") as caught:
        pickle.dumps(inner)
    assert caught.value.received == "<model inner()>"
    assert 't.compile(inner).save("model.treadle")' in (caught.value.hint or "")
    assert (caught.value.source or "").startswith("test_first_mistakes.py:")
