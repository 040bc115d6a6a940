"""ONNX import: axes become symbols, shape arithmetic leaves no ops, and inputs that determine shapes must be static."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from onnx import TensorProto, helper

from tests.onnx_models import answers, model, ops, runtime, same_as_runtime
from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded, UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.errors import FrontendError, Hint
from treadle.ir.sizing.sizes import Size

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape, np.float32)


# -- symbols -------------------------------------------------------------------------------------------------------


def test_an_axis_that_the_file_names_is_one_symbol() -> None:
    found = import_onnx(model("(float[batch,seq] x, float[batch,1] y) => (float[batch,seq] z)", "z = Add(x, y)"))
    assert list(found.graph.symbols) == ["batch", "seq"]
    assert str(found.graph.main.outputs["z"].type) == "f32[batch, seq]"


@pytest.mark.parametrize(
    ("dim", "size"),
    [("past + seq", "past+seq"), ("floor(S/2)", "floor_S_2"), ("4x", "n4x"), ("batch.size", "batch_size")],
)
def test_names_of_axes_become_sizes(dim: str, size: str) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [dim])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [dim])
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [x], [y])
    found = import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    assert found.graph.main.inputs[0].type.shape == (Size.of(size),)


def test_an_axis_without_a_name_gets_one() -> None:
    found = import_onnx(model("(float[?,3] x) => (float[?,3] y)", "y = Abs(x)"))
    assert str(found.graph.main.inputs[0].type) == "f32[x_0, 3]"


@pytest.mark.parametrize("unknown", [None, -1, "?", "", "*"])
def test_an_axis_of_which_the_file_says_nothing_is_called_by_its_place(unknown: Any) -> None:
    proto = model("(float[A,A] x) => (float y)", "y = Abs(x)")
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.ClearField("dim_param")
        if isinstance(unknown, str):
            dim.dim_param = unknown
        elif unknown is not None:
            dim.dim_value = unknown
    assert str(import_onnx(proto).graph.main.inputs[0].type) == "f32[x_0, x_1]"
    assert str(import_onnx(proto, dims={"x_1": 4}).graph.main.inputs[0].type) == "f32[x_0, 4]"
    assert import_onnx(proto, static={"x": np.zeros((2, 3), np.float32)}).graph.main.inputs == []
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto, dims={"n": 4})
    listed = "x_0, x_1" if not isinstance(unknown, str) or not unknown else f"x_0, {unknown}, x_1"
    assert caught.value.hint == f"one of its axes ({listed}) or of its inputs (x)"
    if unknown in ("?", "*"):  # the file names both of them
        assert str(import_onnx(proto, dims={unknown: 4, "x_1": 5}).graph.main.inputs[0].type) == "f32[4, 5]"


def test_every_axis_that_a_hint_lists_can_be_given() -> None:
    proto = model("(float[A,B,C,D,?] x) => (float y)", "y = Abs(x)")
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    for dim, name in zip(dims, ("Dynamic.0", "past + S", "batch size", "7"), strict=False):
        dim.dim_param = name
    plain = import_onnx(proto).graph.main.inputs[0].type
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto, dims={"Dynamic": 4})
    listed = re.fullmatch(r"one of its axes \((.*)\) or of its inputs \(x\)", str(caught.value.hint))
    assert listed is not None
    assert listed[1] == "Dynamic.0, past + S, S, past, batch size, 7, x_4"
    for name in listed[1].split(", "):
        report = import_onnx(proto, dims={name: 4}).graph.main.inputs[0].type
        assert report.shape != plain.shape, name
        assert Size.of(4) in report.shape or name in ("S", "past")


def test_an_axis_may_be_called_as_its_symbol_is() -> None:
    proto = model("(float[A,B] x) => (float y)", "y = Abs(x)")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch size"
    assert str(import_onnx(proto).graph.main.inputs[0].type) == "f32[batch_size, B]"
    assert str(import_onnx(proto, dims={"batch_size": 2}).graph.main.inputs[0].type) == "f32[2, B]"


def test_an_axis_is_resized_after_several_strides() -> None:
    """Its length is a quotient of a quotient, which the ops have in their rules."""
    attributes = "kernel_shape=[3], strides=[2], pads=[1, 1]"
    body = f"""a = MaxPool<{attributes}>(x)  b = AveragePool<{attributes}>(a)
        c = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(b, , scales)
        d = MaxPool<kernel_shape=[2], strides=[3]>(c)
        y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(d, , scales)"""
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [3], [1.0, 1.0, 2.0])
    made = model("(float[N,2,L] x) => (float[N,2,M] y)", body)
    made.graph.initializer.append(scales)
    assert str(import_onnx(made).graph.main.results[0].type) == "f32[N, 2, 2*((2*((L+3)//4)+1)//3)]"
    for length in (9, 10, 11, 12, 30):
        same_as_runtime(made, {"x": floats(2, 2, length)})


def test_a_negative_size_is_refused() -> None:
    proto = model("(float[2] x) => (float y)", "y = Abs(x)")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -2
    with pytest.raises(FrontendError, match="a dimension is impossible"):
        import_onnx(proto)


def test_long_names_and_long_lists_of_axes_are_cut() -> None:
    assert list(import_onnx(model(f"(float[{'a' * 70}] x) => (float[B] y)", "y = Exp(x)")).graph.symbols) == ["a" * 64]
    for count, end in ((8, "a7"), (9, "a7, ...")):
        sizes = ",".join(f"a{i}" for i in range(count))
        with pytest.raises(FrontendError, match="the file has no axis and no input z") as caught:
            import_onnx(model(f"(float[{sizes}] x) => (float[B] y)", "y = Exp(x)"), dims={"z": "long" * 30})
        assert f"one of its axes (a0, a1, a2, a3, a4, a5, a6, {end}) or of its inputs (x)" in str(caught.value.hint)
        assert caught.value.received == f"z={printable(repr('long' * 30), 60)}"


def test_an_expression_that_comes_before_its_axes_has_their_symbols() -> None:
    proto = model("(float[N] x, float[past] y, float[S] z) => (float[N] w)", "c = Concat<axis=0>(y, z) w = Add(x, c)")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "past + S"
    found = import_onnx(proto)
    assert [str(v.type) for v in found.graph.main.inputs] == ["f32[S+past]", "f32[past]", "f32[S]"]
    assert str(found.graph.main.outputs["w"].type) == "f32[S+past]"


def test_dims_make_two_names_one_or_give_a_size() -> None:
    proto = model("(float[A] x, float[B] y) => (float[A] z)", "z = Add(x, y)")
    with pytest.raises(FrontendError, match="sizes disagree") as caught:
        import_onnx(proto)
    assert "dims=" in str(caught.value)
    assert str(import_onnx(proto, dims={"B": "A"}).graph.main.outputs["z"].type) == "f32[A]"
    assert str(import_onnx(proto, dims={"A": 3, "B": np.int64(3)}).graph.main.outputs["z"].type) == "f32[3]"


def test_a_size_may_be_given_to_an_expression_its_parts_and_an_axis_without_a_name() -> None:
    proto = model("(float[?,N] x) => (float[?,N] y)", "y = Abs(x)")
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "past + S"
    for dims, wanted in (({"x_0": 2, "past": 3}, "f32[2, S+3]"), ({"past + S": 7}, "f32[x_0, 7]")):
        assert str(import_onnx(proto, dims=dims).graph.main.inputs[0].type) == wanted


@pytest.mark.parametrize(
    ("dims", "what", "hint"),
    [
        ({"batch": 2}, "the file has no axis and no input batch", "one of its axes (A, B) or of its inputs (x, y)"),
        ({"A": "C", "D": 2}, "the file has no axis and no input D", "one of its axes (A, B) or of its inputs (x, y)"),
        ({"A": 2.5}, "the size of axis A must be an integer, 0 or more", "leave A out for every size"),
        ({"A": -1}, "the size of axis A must be an integer, 0 or more", "leave A out for every size"),
        ({"A": "B", "B": 1.5}, "the size of axis B must be an integer, 0 or more", "leave B out for every size"),
        ({"A": True}, "the size of axis A must be an integer, 0 or more", "leave A out for every size"),
    ],
)
def test_dims_that_are_none_are_refused(dims: dict[str, Any], what: str, hint: str) -> None:
    proto = model("(float[A] x, float[B] y) => (float[A] z)", "z = Abs(x)")
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto, dims=dims)
    assert caught.value.what == what
    assert str(caught.value.hint).startswith(hint)


SPLIT_HEADS = """
    shape = Shape(x)
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    b = Gather(shape, zero)
    s = Gather(shape, one)
    axes = Constant<value_ints = [0]>()
    b1 = Unsqueeze(b, axes)
    s1 = Unsqueeze(s, axes)
    h = Constant<value_ints = [4]>()
    d = Constant<value_ints = [-1]>()
    wanted = Concat<axis = 0>(b1, s1, h, d)
    apart = Reshape(x, wanted)
    y = Transpose<perm = [0, 2, 1, 3]>(apart)
"""


def test_shape_arithmetic_leaves_nothing_in_the_graph() -> None:
    found = same_as_runtime(model("(float[B,S,24] x) => (float y)", SPLIT_HEADS), {"x": floats(2, 3, 24)})
    assert ops(found) == ["rearrange", "rearrange"]
    assert found.graph.main.outputs["y"].type.shape == tuple(map(Size.of, ("B", 4, "S", 6)))
    assert found.notes.folded["Concat"] == 1


@pytest.mark.parametrize(
    ("expression", "size"),
    [
        ("t = Mul(s, three)", "3*S"),
        ("t = Div(s, three)", "S//3"),
        ("t = Sub(s, s)", "0"),
        ("t = Mod(s, three)", "S-3*(S//3)"),
        ("u = Mul(s, three) t = Div(u, s)", "3"),
        ("u = Neg(s) t = Add(u, s)", "0"),
        ("u = Add(s, three) t = Max(u, s)", "S+3"),
        ("u = Add(s, three) t = Min(u, s)", "S"),
        ("m = Constant<value_ints = [-1]>() e = Equal(s, m) t = Where(e, three, s)", "S"),
        ("u = Concat<axis = 0>(s, three) t = ReduceProd<keepdims = 1>(u)", "3*S"),
        ("u = Concat<axis = 0>(s, three) t = ReduceSum<keepdims = 1>(u)", "S+3"),
        ("u = Cast<to = 6>(s) t = Cast<to = 7>(u)", "S"),
        ("u = Concat<axis = 0>(three, s) i = Constant<value_ints = [1]>() t = Gather(u, i)", "S"),
        ("u = Concat<axis = 0>(three, s, s) i = Constant<value_ints = [1]>() t = Slice(u, i, two)", "S"),
    ],
)
def test_integers_are_evaluated_over_symbols(expression: str, size: str) -> None:
    """`t` is the size of a tensor, so a wrong value shows in its type."""
    body = f"""
        s = Shape(x)
        two = Constant<value_ints = [2]>()
        three = Constant<value_ints = [3]>()
        {expression}
        y = ConstantOfShape(t)
    """
    found = import_onnx(model("(float[S] x) => (float y)", body))
    assert found.graph.main.outputs["y"].type.shape == (Size.of(size),)


def test_a_comparison_that_depends_on_the_size_is_left_to_the_call() -> None:
    body = """
        s = Shape(x)
        five = Constant<value_ints = [5]>()
        more = Greater(s, five)
        zero = Constant<value_float = 0.0>()
        y = Where(more, x, zero)
    """
    proto = model("(float[S] x) => (float[S] y)", body)
    for size in (4, 5, 6):
        same_as_runtime(proto, {"x": floats(size)})


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ([0], [1], [1], [1]),
        ([1], [2**63 - 1], [0], [1]),
        ([-2], [2**31 - 1], [1], [1]),
        ([0, 0], [-1, 100], [1, 0], [1, 2]),
        ([-1], [-(2**63) + 1], [1], [-1]),
        ([4], [0], [1], [-2]),
        ([3], [1], [1], [1]),
    ],
)
def test_slices_are_clamped(starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> None:
    proto = model(
        "(float[3,6] x, int64[?] s, int64[?] e, int64[?] a, int64[?] t) => (float y)", "y = Slice(x, s, e, a, t)"
    )
    given = {n: np.array(v, np.int64) for n, v in zip("seat", (starts, ends, axes, steps), strict=True)}
    x = floats(3, 6)
    (got, _) = answers(import_onnx(proto, static=given), {"x": x})
    np.testing.assert_array_equal(got["y"], runtime(proto, {"x": x, **given})["y"])


def test_a_cut_past_some_sizes_is_refused_where_the_size_is_known() -> None:
    body = """
        zero = Constant<value_ints = [0]>()
        four = Constant<value_ints = [4]>()
        y = Slice(x, zero, four)
    """
    found = import_onnx(model("(float[S] x) => (float y)", body))
    (got, _) = answers(found, {"x": floats(5)})
    assert got["y"].shape == (4,)
    with pytest.raises(Exception, match="outside an axis of size S"):
        answers(found, {"x": floats(3)})


def test_a_reshape_whose_axes_cannot_be_told_is_noted() -> None:
    proto = model("(float[4,6] x) => (float[3,8] y)", "s = Constant<value_ints = [3,8]>() y = Reshape(x, s)")
    found = same_as_runtime(proto, {"x": floats(4, 6)})
    assert ops(found) == ["reshape"]
    assert found.notes.opaque == ["node 1 making y (Reshape), opset 18, test: [4, 6] to [3, 8]"]


def test_a_reshape_that_cannot_be_solved_is_refused() -> None:
    proto = model("(float[S,6] x) => (float y)", "s = Constant<value_ints = [-1,4]>() y = Reshape(x, s)")
    with pytest.raises(UnsupportedOnnx, match="cannot infer -1") as caught:
        import_onnx(proto)
    assert (caught.value.op, caught.value.version) == ("Reshape", 14)


# -- static arguments ----------------------------------------------------------------------------------------------


def test_an_input_that_determines_a_shape_is_asked_for_by_name() -> None:
    proto = model("(float[6] x, int64[2] wanted) => (float y)", "y = Reshape(x, wanted)")
    with pytest.raises(StaticArgumentNeeded, match="wanted") as caught:
        import_onnx(proto)
    assert caught.value.argument == "wanted"
    assert "static={'wanted'" in str(caught.value)
    found = import_onnx(proto, static={"wanted": [2, 3]})
    assert [v.name for v in found.graph.main.inputs] == ["x"]
    assert str(found.graph.main.outputs["y"].type) == "f32[2, 3]"


def test_shapes_computed_from_an_input_request_its_value() -> None:
    body = "one = Constant<value_ints = [1]>() more = Add(k, one) values, places = TopK(x, more)"
    with pytest.raises(StaticArgumentNeeded) as caught:
        import_onnx(model("(float[6] x, int64[1] k) => (float values)", body))
    assert caught.value.argument == "k"


def test_a_static_argument_tells_its_axes() -> None:
    proto = model("(float[B,N] x, int64[N] axes) => (float y)", "y = ReduceSum(x, axes)")
    found = import_onnx(proto, static={"axes": np.array([0, 1])})
    assert str(found.graph.main.inputs[0].type) == "f32[B, 2]"
    with pytest.raises(FrontendError, match="rank 1, but has rank 2") as caught:
        import_onnx(proto, static={"axes": np.zeros((1, 1), np.int64)})
    assert caught.value.hint == "a value of INT64[N]"
    with pytest.raises(FrontendError, match="which is not an input"):
        import_onnx(proto, static={"axis": [0]})


@pytest.mark.parametrize(
    ("declared", "given", "what", "hint"),
    [
        ("int32[2]", [2**31 - 1, -(2**31)], None, ""),
        ("int32[2]", [2**31, 0], "must be of type INT32", "a value of INT32[2]"),
        ("int32[2]", [0, -(2**31) - 1], "must be of type INT32", "a value of INT32[2]"),
        ("uint8[2]", [0, 255], None, ""),
        ("uint8[2]", [0, 256], "must be of type UINT8", "a value of UINT8[2]"),
        ("uint8[2]", [-1, 0], "must be of type UINT8", "a value of UINT8[2]"),
        ("int64[2]", [1.0, 2.0], "must be of type INT64", "a value of INT64[2]"),
        ("int64[2]", [True, False], "must be of type INT64", "a value of INT64[2]"),
        ("int64[0]", [], None, ""),
        ("bool[2]", [True, False], None, ""),
        ("bool[2]", [1, 0], "must be of type BOOL", "a value of BOOL[2]"),
        ("float[2]", [1, 2.5], None, ""),
        ("float[2]", ["a", "b"], "is not a tensor", "a value of FLOAT[2]"),
        ("float[1,1]", 3, None, ""),
        ("float", 3, None, ""),
        ("float", [3], "must have rank 0, but has rank 1", "a value of FLOAT, a number"),
        ("float[1,2]", 3, "must have rank 2, but has rank 0", "a value of FLOAT[1, 2]"),
        ("float[2]", [1, 2, 3], "differs from the declared shape", "a value of FLOAT[2]"),
        ("float[N,N]", [[1, 2]], "differs from the declared shape", "a value of FLOAT[N, N]"),
    ],
)
def test_allowed_static_arguments(declared: str, given: Any, what: str | None, hint: str) -> None:
    proto = model(f"({declared} k, float[3] x) => (float[3] y)", "y = Exp(x)")
    if what is None:
        assert [v.name for v in import_onnx(proto, static={"k": given}).graph.main.inputs] == ["x"]
        return
    with pytest.raises(FrontendError, match=what) as caught:
        import_onnx(proto, static={"k": given})
    assert isinstance(caught.value.hint, Hint)
    assert caught.value.hint == hint
    assert caught.value.hint.command.startswith("--set k=[" if "[" in hint else "--set k=NUMBER")
    assert (caught.value.within or "").startswith("input k, ")


def test_the_k_of_top_k_may_be_zero_and_not_negative() -> None:
    proto = model("(float[2,6] x, int64[1] k) => (float v, int64 i)", "v, i = TopK(x, k)")
    assert str(import_onnx(proto, static={"k": [0]}).graph.main.outputs["v"].type) == "f32[2, 0]"
    with pytest.raises(FrontendError, match="TopK: k must be 0 or more, not -1"):
        import_onnx(proto, static={"k": [-1]})


def test_a_shape_that_depends_on_data_is_refused() -> None:
    body = "m = ArgMax<axis = 1, keepdims = 0>(x) y = Expand(x, m)"
    with pytest.raises(FrontendError, match="needs the elements of m, which depend on data"):
        import_onnx(model("(float[2,6] x) => (float y)", body))
