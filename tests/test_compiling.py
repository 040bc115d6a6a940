"""Arguments of `compile`, and errors for refused arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from tests.error_texts import raises_freely
from treadle.entry_functions import compile
from treadle.held_weights import HeldWeights
from treadle.ir.errors import TreadleError, UsageError
from treadle.passes.cleanup.canonicalize import Canonicalize

ONES = {"head.weight": np.ones((3, 4), np.float32), "head.bias": np.ones(3, np.float32)}


@t.model
def example(x: t.f32["B 4"], y: t.f32["B 4"] | None, z: t.f32["B 4"] | None):
    for given in (y, z):
        x = x if given is None else x + given
    return t.linear(x, 3, name="head")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown pass": (lambda: compile(example, passes="default"), "unknown pass 'default'"),
    "no passes": (lambda: compile(example, passes=3), "passes= must be a list or text"),  # type: ignore[arg-type]
    "a pass's class": (lambda: compile(example, passes=[Canonicalize]), "passes= must be a list of passes"),  # type: ignore[list-item]
    "negative seed": (lambda: compile(example, seed=-1), "a seed is 0 or more, not -1"),
    "letters": (lambda: compile(example, inputs="yz"), "inputs must be a list of strings"),
    "function": (lambda: compile(lambda x: x), "decorate the function with @t.model"),  # type: ignore[arg-type]
    "limits": (lambda: compile(example, limits={"nodes": 3}), "limits apply to a model"),
    "number": (lambda: compile(3), "a model must be a declaration, a graph, a name or a path"),  # type: ignore[arg-type]
    "a state dict": (lambda: compile(OrderedDict(ONES)), "arrays by name are weights of a declaration"),  # type: ignore[arg-type]
    "weights": (lambda: compile(example, weights={**ONES, "head.wieght": 0}), "head.weight for head.wieght?"),  # type: ignore[dict-item]
    "too few weights": (lambda: compile(example, weights={"head.bias": ONES["head.bias"]}), "weights= lacks 1 of 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_inputs_are_refused(case: str) -> None:
    use, said = REFUSED[case]
    with pytest.raises(TreadleError) as caught:
        use()
    assert said in str(caught.value)


def test_weights_of_a_compiled_model_are_those_of_its_declaration_unless_they_are_quantized() -> None:
    plain, quantized = compile(example), compile(example, quantize="int8")
    with pytest.raises(UsageError) as caught:
        compile(plain)  # type: ignore[arg-type]
    assert "with weights=exe.weights for its weights, if they are not quantized" in str(caught.value.hint)
    assert compile(example, weights=plain.weights).seed is None
    with pytest.raises(TreadleError, match="must be f32"):
        compile(example, weights=quantized.weights)


def test_arguments_mean_what_they_say() -> None:
    made = compile(example, inputs=["z"], passes=(Canonicalize(),), weights=ONES)
    assert [port.name for port in made.inputs] == ["x", "z"]
    assert [record.name for record in made.optimized.log] == ["canonicalize"]
    assert [record.name for record in made.log] == [
        "canonicalize",
        "open-block-products",
        "legalize",
        "decode-last",
        "multiply-blocks",
        "hoist-weights",
        "plan-storage",
    ]
    x = np.ones((2, 4), np.float32)
    assert made(x=x, z=x)["head"].tolist() == [[9.0] * 3] * 2


def test_weights_are_for_looking_at() -> None:
    given = {name: array.copy() for name, array in ONES.items()}
    made = compile(example, weights=given)
    weights: Any = made.weights
    assert dict(weights).keys() == given.keys()
    assert repr(weights) == "<2 weights, 60 bytes>"
    assert repr(HeldWeights({"one": np.zeros(300)})) == "<1 weight, 2,400 bytes>"
    assert not any(np.shares_memory(weights[name], given[name]) for name in given), "they may be written later"
    fixed = compile(example, weights=made.weights).weights
    assert all(np.shares_memory(weights[name], fixed[name]) for name in given), "read-only arrays are not copied"
    for change in (lambda: weights.__setitem__("head.bias", 0), lambda: weights.__delitem__("head.bias")):
        with pytest.raises(UsageError, match="cannot be changed") as caught:
            change()
        assert caught.value.hint == "treadle.compile(model, weights={**exe.weights, 'head.bias': array})"
    with raises_freely(UsageError, match="the model has no weight head") as caught:
        weights["head"]
    assert caught.value.hint == "one of head.weight, head.bias"
    assert weights.get("head") is None and "head" not in weights
    with pytest.raises(ValueError, match="read-only"):
        weights["head.bias"][0] = 5
    given["head.bias"] += 1  # the caller's arrays are the caller's
    # the change that the hint suggests
    other = compile(example, weights={**made.weights, "head.bias": np.zeros(3, np.float32)})
    x = np.ones((1, 4), np.float32)
    assert [each(x=x)["head"].tolist() for each in (made, other)] == [[[5.0] * 3], [[4.0] * 3]]
