"""Selected outputs, whole or sliced: numbers equal NumPy's, unneeded values are not computed, and names that are not
outputs are refused.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pytest

import treadle
import treadle.frontends.language as t
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.chosen_outputs import UnknownOutputError
from treadle.program.flag_values import outputs_of

SMALL: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 2, "hidden": 32, "vocab": 50}
TOKENS = np.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def hidden() -> Any:
    return treadle.compile("bert", **SMALL)(tokens=TOKENS)["hidden"]


@pytest.mark.parametrize(
    "part", [":", ":, 0", ":,-1", "0", ":, 2:4", "1:, -3:-1, 5", "0,0,0", ": , :-6", "-2:, +1:-1", ":, :, -16:"]
)
def test_a_part_is_numpys(hidden: Any, part: str) -> None:
    exe = treadle.compile("bert", outputs=[f"hidden[{part}]"], **SMALL)
    wanted = eval(f"hidden[{part}]", {"hidden": hidden})
    np.testing.assert_allclose(exe(tokens=TOKENS)["hidden"], wanted, rtol=0, atol=1e-6)


def called(graph: Graph) -> list[str]:
    return [node.op.callee for node in graph.main.nodes if node.op.callee is not None]


def test_unneeded_values_are_not_computed() -> None:
    both = treadle.compile("bert", head="pooler", **SMALL)
    assert [p.name for p in both.outputs] == ["hidden", "pooled"]
    assert called(both.graph) == ["layer", "layer"]
    one = treadle.compile("bert", head="pooler", outputs=("pooled",), **SMALL)
    assert [p.name for p in one.outputs] == ["pooled"]
    assert called(one.graph) == ["layer", "layer_cut"]
    pooled = one(tokens=TOKENS)["pooled"]
    np.testing.assert_allclose(pooled, both(tokens=TOKENS)["pooled"], rtol=0, atol=1e-6)
    other = treadle.compile("bert", head="pooler", outputs=("hidden",), **SMALL)
    assert "pooler.weight" in both.weights
    assert "pooler.weight" not in other.weights


def test_in_the_order_in_which_they_are_named() -> None:
    exe = treadle.compile("bert", head="pooler", outputs=["pooled", "hidden[:, :2]"], **SMALL)
    assert [f"{p.name}: {p.type}" for p in exe.outputs] == ["pooled: f32[B, 16]", "hidden: f32[B, 2, 16]"]
    assert exe(tokens=TOKENS)["hidden"].shape == (2, 2, 16)


@t.model
def given_on(x: Annotated[t.Tensor, t.f32["B 4"]]) -> dict[str, t.Tensor]:
    return {"x": x, "y": x * 2.0}


def test_an_input_that_is_an_output() -> None:
    exe = treadle.compile(given_on, outputs=["x[:, 1]"])
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(exe(x=x)["x"], x[:, 1])


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (["hiden"], "bert has no output 'hiden'"),
    "text": ("hidden", "outputs= must be a list"),
    "none": ([], "outputs= must be a list with the names of one or more outputs"),
    "numbers": ([0], "outputs= must be a list"),
    "one-number": (5, "outputs= must be a list"),
    "an-array": (np.array(["hidden", "pooled"]), "outputs= must be a list"),
    "what-is-read-once": (iter(["hidden"]), "outputs= must be a list"),
    "twice": (["hidden", "hidden[:, 0]"], "output hidden is named twice"),
    "too-many-axes": (["hidden[:, :, :, 0]"], r"output hidden: f32\[B, S, 16\] has no part .*: the output has 3 axes"),
    "past-the-end": (["hidden[:, :, 16]"], "from 16 to 17 is outside an axis of size 16"),
    "before-the-start": (["hidden[:, :, -17:]"], "outside an axis of size 16"),
    "backwards": (["hidden[:, 5:2]"], "from 5 to 2 is outside an axis"),
    "letters": (["hidden[:, 1x]"], r"'hidden\[:, 1x\]' names no output"),
    "a-name-in-front": (["hidden[asked]"], "a name selects positions along the second axis, after `:`"),
    "a-name-behind": (["hidden[:, :, asked]"], "a name selects positions along the second axis"),
    "a-name-of-some-rows": (["hidden[1:, asked]"], "a name selects positions along the second axis"),
    "an-input's-name": (["hidden[:, tokens]"], "bert has an input tokens already, so positions cannot have that name"),
    "open": (["hidden[0"], r"'hidden\[0' names no output"),
    "empty": (["hidden[]"], r"'hidden\[\]' names no output"),
    "steps": (["hidden[::2]"], "names no output"),
    "two-numbers": (["hidden[1 2]"], "names no output"),
    "huge": (["hidden[:, 99999999999999999999]"], "names no output"),
    "one-past-what-text-holds": (["hidden[:, 999999999999999999]"], "names no output"),
    "digits-of-others": (["hidden[:, ९]"], "names no output"),
    "long": ([f"hidden[{' ' * 100_000}x x]"], "names no output"),
    "longer": ([f"{' ' * 100_000}]"], "names no output"),
}


@pytest.mark.parametrize(("axes", "parts"), [("B 8", 3), ("B", 2)])
def test_the_hint_for_a_malformed_part_names_an_output_of_the_model(axes: str, parts: int) -> None:
    def twice(x: Any) -> dict[str, t.Tensor]:
        return {"other": x + 1.0, "double.x": x * 2.0}

    twice.__annotations__["x"] = t.f32[axes]
    model = t.model(twice)
    with pytest.raises(UsageError, match="names no output") as caught:
        treadle.compile(model, outputs=["duble.x[:, 0"], backend="numpy")
    choices = str(caught.value.hint).split(" or ")
    assert len(choices) == parts
    for choice in choices:
        exe = treadle.compile(model, outputs=[eval(choice)], backend="numpy")
        assert [port.name for port in exe.outputs] == ["double.x"]


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_positions_of_each_row(backend: str) -> None:
    pytest.importorskip({"torch": "torch", "tvm": "tvm"}.get(backend, "numpy"))
    config = {**SMALL, "head": "masked_lm", "backend": backend}
    exe, whole = treadle.compile("bert", outputs=["logits[:, asked]"], **config), treadle.compile("bert", **config)
    assert [f"{p.name}: {p.type}" for p in exe.inputs] == ["tokens: i64[B, S]", "asked: i64[B, ASKED]"]
    assert called(exe.graph) == ["layer", "layer_cut"]
    asked = np.array([[0, 6, 3], [2, 2, 5]])
    wanted = np.take_along_axis(whole(tokens=TOKENS)["logits"], asked[:, :, None], 1)
    np.testing.assert_allclose(exe(tokens=TOKENS, asked=asked)["logits"], wanted, rtol=0, atol=1e-6)
    with pytest.raises(treadle.TreadleError, match="index 7 is outside an axis of size 7") as caught:
        exe(tokens=TOKENS, asked=np.array([[7], [0]]))
    assert "asked" in (caught.value.received or "")


@t.model
def three(
    x: Annotated[t.Tensor, t.f32["B S 4"]], z: Annotated[t.Tensor, t.f32["C 5"]], asked: Annotated[t.Tensor, t.i64["B"]]
) -> dict[str, t.Tensor]:
    return {"x": x * 2.0, "y": x - 1.0, "z": z * 3.0, "asked": asked}


def test_outputs_at_the_same_positions_share_an_input() -> None:
    exe = treadle.compile(three, outputs=["y[:, at]", "x[:, at, 1]", "z[:, other]"])
    assert [f"{p.name}: {p.type}" for p in exe.inputs if "asked" not in p.name] == [
        "x: f32[B, S, 4]",
        "z: f32[C, 5]",
        "at: i64[B, AT]",
        "other: i64[C, OTHER]",
    ]
    x, z = (np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in ((2, 3, 4), (3, 5)))
    at, other = np.array([[0, 2], [1, 1]]), np.array([[4], [0], [2]])
    found = exe(x=x, z=z, asked=np.array([1, 2]), at=at, other=other)
    np.testing.assert_array_equal(found["y"], np.take_along_axis(x - 1, at[:, :, None], 1))
    np.testing.assert_array_equal(found["x"], np.take_along_axis(x * 2, at[:, :, None], 1)[:, :, 1])
    np.testing.assert_array_equal(found["z"], np.take_along_axis(z * 3, other, 1))
    with pytest.raises(UsageError, match="at holds positions for B rows, but the output has C"):
        treadle.compile(three, outputs=["y[:, at]", "z[:, at]"])
    with pytest.raises(UsageError, match="three has an input asked already"):
        treadle.compile(three, outputs=["y[:, asked]", "x[:, asked]"])


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_outputs_are_refused(name: str) -> None:
    outputs, reason = REFUSED[name]
    with pytest.raises(UsageError, match=reason):
        treadle.compile("bert", outputs=outputs, **SMALL)


def test_an_unknown_output_is_an_error_of_its_own() -> None:
    with pytest.raises(UnknownOutputError) as caught:
        treadle.compile("bert", outputs=["logits"], **SMALL)
    assert caught.value.hint == "one of hidden"


def test_a_list_with_commas() -> None:
    assert outputs_of("pooled, hidden[:, 0] ,logits[1,2],") == ("pooled", "hidden[:, 0]", "logits[1,2]")


def test_a_part_that_is_longer_than_the_axis_at_a_call() -> None:
    exe = treadle.compile("bert", outputs=["hidden[:, 2:4]"], **SMALL)
    with pytest.raises(treadle.TreadleError, match="outside an axis"):
        exe(tokens=TOKENS[:, :3])
