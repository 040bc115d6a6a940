"""The results of ops in cases that random samples do not cover: ties, signs, special values, symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.op_checks import RUNNERS, runner
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret, interpret_body
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Composite
from treadle.ir.ops.error_function import erf
from treadle.ir.ops.pooling import padding_for_ceil
from treadle.ir.transforms.differentiate import backward
from treadle.ir.types import DTYPES

Array = np.ndarray[Any, Any]


def reference(name: str, *operands: Any, **attributes: Any) -> Any:
    with np.errstate(all="ignore"):
        return find_op(name)(**attributes).reference(*map(np.asarray, operands))


def gradients(build: Callable[..., Any], type: str, *operands: Any) -> list[Array]:
    """Return the gradients of the sum of `build`'s result by its operands, which all have one type."""
    b = Builder(Graph("gradients"))
    inputs = [b.input(f"x{n}", type) for n in range(len(operands))]
    result = build(b, *inputs)
    ones = b.expand(b.constant(1.0, result.dtype), shape=result.shape)
    found = backward(b, list(b.function.nodes), {result.value: ones})
    b.outputs(**{x.value.name: found[x.value] for x in inputs})
    made = interpret(b.graph, {f"x{n}": np.asarray(x, np.float64) for n, x in enumerate(operands)})
    return list(made.values())


def test_erf_is_right_to_the_last_bits_of_float64() -> None:
    rng = np.random.default_rng(0)
    tiny = rng.standard_normal(20_000) * 10.0 ** rng.uniform(-300, 0, 20_000)
    x = np.concatenate([rng.uniform(-7, 7, 100_000), tiny, [0.46875, 4.0, 6.0, 5e-324, np.inf, -np.inf]])
    exact = np.array([math.erf(v) for v in x])
    # a rational function of two dozen operations, whose errors mostly cancel: four half spacings remain
    assert np.all(np.abs(erf(x) - exact) <= 2 * 2.0**-52 * np.abs(exact))
    assert np.isnan(erf(np.array(np.nan)))
    assert math.copysign(1.0, float(erf(np.array(-0.0)))) == -1.0
    assert erf(np.float32([0.5])).dtype == np.float32


def test_floor_division_and_mod_of_integers_follow_python() -> None:
    pairs = [(x, y) for x in range(-7, 8) for y in (-3, -2, 2, 3)]
    x, y = np.array(pairs, np.int64).T
    assert reference("floor_divide", x, y).tolist() == [a // c for a, c in pairs]
    assert reference("mod", x, y).tolist() == [a % c for a, c in pairs]


def test_top_k_puts_the_first_of_equal_elements_first() -> None:
    values, indices = reference("top_k", [1.0, 3.0, 3.0, 0.0, 3.0, 1.0], k=5)
    assert values.tolist() == [3.0, 3.0, 3.0, 1.0, 1.0]
    assert indices.tolist() == [1, 2, 4, 0, 5]
    values, indices = reference("top_k", np.array([0, 255, 7, 255], np.uint8), k=3)
    assert (values.tolist(), indices.tolist()) == ([255, 255, 7], [1, 3, 2])
    assert reference("top_k", [1.0, np.nan, 2.0], k=2)[1].tolist() == [1, 2]


def test_argmax_takes_the_first_of_equal_elements() -> None:
    assert reference("argmax", [[1, 4, 4], [2, 2, 2]], axis=1).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["reduce_max", "reduce_min"])
def test_an_extremum_shares_its_gradient_among_ties(name: str) -> None:
    x = np.array([[1.0, 2.0, 2.0], [5.0, 5.0, 5.0]]) * (1 if name == "reduce_max" else -1)
    (grad,) = gradients(lambda b, x: b.apply(name, x, axes=(1,)), "f64[2, 3]", x)
    assert grad.tolist() == [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_equal_operands_of_an_extremum_get_half_each(name: str) -> None:
    x, y = gradients(lambda b, x, y: b.apply(name, x, y), "f64[1]", [2.0], [2.0])
    assert (x.tolist(), y.tolist()) == ([0.5], [0.5])


def test_gradients_at_special_points_are_finite() -> None:
    base, exponent = gradients(lambda b, x, y: x**y, "f64[4]", [0.0, 0.0, -2.0, 3.0], [0.0, 2.0, 2.0, 0.0])
    np.testing.assert_allclose(base, [0, 0, -4, 0])
    np.testing.assert_allclose(exponent, [0, 0, 0, math.log(3)])
    for name in ("relu", "abs"):
        assert gradients(lambda b, x, name=name: b.apply(name, x), "f64[1]", [0.0])[0].tolist() == [0.0]


def test_where_stops_the_gradient_of_the_other_operand() -> None:
    (grad,) = gradients(lambda b, x: b.where(x > 0.0, x, b.log(x)), "f64[2]", [2.0, 4.0])
    assert grad.tolist() == [1.0, 1.0]


def test_softmax_takes_scores_that_exp_alone_would_not() -> None:
    row = np.array([1e4, 1e4, -np.inf], np.float32)
    assert reference("softmax", row).tolist() == [0.5, 0.5, 0.0]
    half = -math.log(2)
    np.testing.assert_allclose(reference("log_softmax", row), [half, half, -np.inf], rtol=1e-6)


def test_a_mean_over_a_symbolic_axis_divides_by_its_size() -> None:
    b = Builder(Graph("mean"))
    x = b.input("x", "f32[B, S]")
    mean = b.reduce_mean(x, axes=(-1,))
    found = backward(b, list(b.function.nodes), {mean.value: mean})
    b.outputs(mean=mean, grad=found[x.value])
    for shape in ((2, 3), (1, 7)):
        value = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        made = interpret(b.graph, {"x": value})
        share = np.broadcast_to(value.mean(1)[:, None] / shape[1], shape)
        np.testing.assert_allclose(made["mean"], value.mean(1), rtol=1e-6)
        np.testing.assert_allclose(made["grad"], share, rtol=1e-6)


BIG = np.array([400, -400, 800, -800], np.float16)
"""Numbers whose squares overflow in f16."""


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_normalization_of_f16_takes_its_means_in_f32(name: str) -> None:
    """Reference, body and gradient differ from their f64 results by at most f16's own spacing."""
    op = find_op(name)()
    assert isinstance(op, Composite)
    others = [None] * (len(op.operands) - 1)
    exact = op.reference(BIG.astype(np.float64), *others)
    for made in (op.reference(BIG, *others), interpret_body(op, [BIG, *others])):
        assert made.dtype == np.float16
        np.testing.assert_allclose(made, exact, rtol=2.0**-10)

    def gradient(dtype: str) -> Array:
        b = Builder(Graph("gradient"))
        x, g = (b.input(n, f"{dtype}[4]") for n in ("x", "g"))
        made = b.apply(name, x)
        b.outputs(x=backward(b, list(b.function.nodes), {made.value: g})[x.value])
        given = {"x": BIG, "g": np.array([512, 256, -512, 1024])}
        return interpret(b.graph, {n: v.astype(DTYPES[dtype].numpy) for n, v in given.items()})["x"]

    np.testing.assert_allclose(gradient("f16"), gradient("f64"), rtol=2.0**-10)


def test_a_mean_of_f16_counts_further_than_f16_does() -> None:
    ones = np.ones(70_000, np.float16)
    op = find_op("reduce_mean")(axes=(0,))
    assert isinstance(op, Composite)
    for made in (op.reference(ones), interpret_body(op, [ones])):
        assert (made, made.dtype) == (1.0, np.float16)


def test_a_cast_to_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(10_000) * 10.0 ** rng.uniform(-30, 30, 10_000)).astype(np.float32)
    halfway = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, np.inf, -0.0, np.nan, 3.4e38], np.float32)
    x = np.concatenate([x, halfway])
    expected = torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(reference("cast", x, to="bf16"), expected)


def test_float64_interpretation_does_not_round_at_casts() -> None:
    b = Builder(Graph("casts"))
    x = b.input("x", "f32[1]")
    b.outputs(y=b.cast(b.cast(x, to="f16"), to="f32"))
    third = np.float32([1 / 3])
    assert interpret(b.graph, {"x": third}, float64=True)["y"].tolist() == third.tolist()
    assert interpret(b.graph, {"x": third})["y"].tolist() == np.float32(np.float16(third)).tolist()


def pool_forms(ceil: bool) -> list[tuple[int, int, int, int, int]]:
    """Return axis size, kernel, stride, padding and dilation of every small pooling that PyTorch accepts."""
    forms = [
        (n, k, stride, padding, dilation)
        for n in range(1, 9)
        for k in (1, 2, 3)
        for stride in (1, 2, 4)
        for padding in range(k // 2 + 1)
        for dilation in (1, 2)
    ]
    return [f for f in forms if f[0] + 2 * f[3] - (f[1] - 1) * f[4] - 1 + (f[2] - 1 if ceil else 0) >= 0]


@pytest.mark.parametrize("ceil", [False, True])
def test_pools_are_those_of_torch_also_with_the_number_of_windows_rounded_up(ceil: bool) -> None:
    torch = pytest.importorskip("torch")
    functions = torch.nn.functional
    for n, k, stride, padding, dilation in pool_forms(ceil):
        x = np.random.default_rng(n).standard_normal((1, 2, n))
        given, case = torch.from_numpy(x), f"{n} elements, padding {padding}, ceil {ceil}"
        after = padding_for_ceil(k, stride, dilation, padding) if ceil else padding
        form = {"kernel": (k,), "strides": (stride,), "padding": (padding, after), "dilations": (dilation,)}
        options = (k, stride, padding)
        theirs = functions.max_pool1d(given, *options, dilation, ceil_mode=ceil)
        np.testing.assert_array_equal(reference("max_pool", x, **form), theirs, err_msg=case)
        if dilation == 1:
            mean = torch.nn.functional.avg_pool1d(
                torch.from_numpy(x), *options, ceil_mode=ceil, count_include_pad=False
            )
            np.testing.assert_allclose(reference("average_pool", x, **form), mean, rtol=1e-15, err_msg=case)
            padded = np.pad(x, [(0, 0), (0, 0), (padding, padding)])
            counted = functions.avg_pool1d(given, *options, ceil_mode=ceil)
            form["padding"] = (0, after - padding)
            np.testing.assert_allclose(
                reference("average_pool", padded, **form), counted, rtol=1e-15, err_msg=str(form)
            )


def test_a_window_that_holds_no_element() -> None:
    form = {"kernel": (2,), "dilations": (4,), "padding": (3, 3)}
    assert reference("max_pool", [1.0, 2.0], **form).tolist() == [2.0, -np.inf, -np.inf, 1.0]
    assert reference("max_pool", [1, 2], **form).tolist() == [2, -(2**63), -(2**63), 1]
    assert reference("sum_pool", [1.0, 2.0], **form).tolist() == [2.0, 0.0, 0.0, 1.0]
    np.testing.assert_array_equal(reference("average_pool", [1.0, 2.0], **form), [2.0, np.nan, np.nan, 1.0])


@pytest.mark.parametrize("name", ["max_pool", "sum_pool", "average_pool"])
@pytest.mark.parametrize("backend", RUNNERS)
def test_pools_of_a_symbolic_axis(name: str, backend: str) -> None:
    b, form = Builder(Graph("pools")), {"kernel": (3, 20), "strides": (2, 3), "padding": (1, 4)}
    b.outputs(y=b.apply(name, b.input("x", "f32[B, H, W]"), **form))
    run = runner(backend)
    for shape in ((2, 5, 17), (1, 6, 31)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        np.testing.assert_allclose(run(b.graph, {"x": x})["y"], reference(name, x, **form), rtol=1e-5, atol=1e-5)
