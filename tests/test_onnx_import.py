"""ONNX import: shapes with symbols, static arguments, functions, branches, names, weights, and what is refused."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_cases import LISTED
from tests.onnx_models import answers, model, runtime, same_as_runtime
from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded, UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.operators import OPERATORS
from treadle.ir.errors import FrontendError
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.parser import parse_graph

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape, np.float32)


def ops(found: Any) -> list[str]:
    """The names of a graph's ops, in order."""
    return [node.op.name for node in found.graph.main.nodes]


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
    assert caught.value.hint == f"its axes are {listed}; its inputs x"
    if unknown in ("?", "*"):  # which the file does say, of both
        assert str(import_onnx(proto, dims={unknown: 4, "x_1": 5}).graph.main.inputs[0].type) == "f32[4, 5]"


def test_every_axis_that_a_hint_lists_can_be_given() -> None:
    proto = model("(float[A,B,C,D,?] x) => (float y)", "y = Abs(x)")
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    for dim, name in zip(dims, ("Dynamic.0", "past + S", "batch size", "7"), strict=False):
        dim.dim_param = name
    plain = import_onnx(proto).graph.main.inputs[0].type
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto, dims={"Dynamic": 4})
    listed = re.fullmatch("its axes are (.*); its inputs x", str(caught.value.hint))
    assert listed is not None
    assert listed[1] == "Dynamic.0, past + S, S, past, batch size, 7, x_4"
    for name in listed[1].split(", "):
        told = import_onnx(proto, dims={name: 4}).graph.main.inputs[0].type
        assert told.shape != plain.shape, name
        assert Size.of(4) in told.shape or name in ("S", "past")


def test_an_axis_may_be_called_as_its_symbol_is() -> None:
    proto = model("(float[A,B] x) => (float y)", "y = Abs(x)")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch size"
    assert str(import_onnx(proto).graph.main.inputs[0].type) == "f32[batch_size, B]"
    assert str(import_onnx(proto, dims={"batch_size": 2}).graph.main.inputs[0].type) == "f32[2, B]"


def test_a_negative_size_is_refused() -> None:
    proto = model("(float[2] x) => (float y)", "y = Abs(x)")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -2
    with pytest.raises(FrontendError, match="a dimension is impossible"):
        import_onnx(proto)


def test_long_names_and_long_lists_of_axes_are_cut() -> None:
    assert list(import_onnx(model(f"(float[{'a' * 70}] x) => (float[B] y)", "y = Exp(x)")).graph.symbols) == ["a" * 64]
    for count, end in ((8, "a7;"), (9, "a7, ...;")):
        sizes = ",".join(f"a{i}" for i in range(count))
        with pytest.raises(FrontendError, match="the file has no axis and no input z") as caught:
            import_onnx(model(f"(float[{sizes}] x) => (float[B] y)", "y = Exp(x)"), dims={"z": "long" * 30})
        assert f"its axes are a0, a1, a2, a3, a4, a5, a6, {end} its inputs x" in str(caught.value.hint)
        assert caught.value.received == f"z={printable(repr('long' * 30), 60)}"


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
        ({"batch": 2}, "the file has no axis and no input batch", "its axes are A, B; its inputs x, y"),
        ({"A": "C", "D": 2}, "the file has no axis and no input D", "its axes are A, B; its inputs x, y"),
        ({"A": 2.5}, "the size of axis A is a whole number, 0 or more", "leave A out for every size"),
        ({"A": -1}, "the size of axis A is a whole number, 0 or more", "leave A out for every size"),
        ({"A": "B", "B": 1.5}, "the size of axis B is a whole number, 0 or more", "leave B out for every size"),
        ({"A": True}, "the size of axis A is a whole number, 0 or more", "leave A out for every size"),
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
    """`t` is the size of a tensor that is made, so a wrong one shows in its type."""
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
    with pytest.raises(UnsupportedOnnx, match="cannot tell what -1 stands for") as caught:
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


def test_what_is_computed_from_an_input_asks_for_that_input() -> None:
    body = "one = Constant<value_ints = [1]>() more = Add(k, one) values, places = TopK(x, more)"
    with pytest.raises(StaticArgumentNeeded) as caught:
        import_onnx(model("(float[6] x, int64[1] k) => (float values)", body))
    assert caught.value.argument == "k"


def test_a_static_argument_tells_its_axes() -> None:
    proto = model("(float[B,N] x, int64[N] axes) => (float y)", "y = ReduceSum(x, axes)")
    found = import_onnx(proto, static={"axes": np.array([0, 1])})
    assert str(found.graph.main.inputs[0].type) == "f32[B, 2]"
    with pytest.raises(FrontendError, match="rank 1, has rank 2") as caught:
        import_onnx(proto, static={"axes": np.zeros((1, 1), np.int64)})
    assert caught.value.hint == "a value of INT64[N]"
    with pytest.raises(FrontendError, match="names no input"):
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
        ("float[2]", ["a", "b"], "is no tensor", "a value of FLOAT[2]"),
        ("float[1,1]", 3, None, ""),
        ("float", 3, None, ""),
        ("float", [3], "must have rank 0, has rank 1", "a value of FLOAT, a number"),
        ("float[1,2]", 3, "must have rank 2, has rank 0", "a value of FLOAT[1, 2]"),
        ("float[2]", [1, 2, 3], "is of another shape than declared", "a value of FLOAT[2]"),
        ("float[N,N]", [[1, 2]], "is of another shape than declared", "a value of FLOAT[N, N]"),
    ],
)
def test_what_a_static_argument_may_be(declared: str, given: Any, what: str | None, hint: str) -> None:
    proto = model(f"({declared} k, float[3] x) => (float[3] y)", "y = Exp(x)")
    if what is None:
        assert [v.name for v in import_onnx(proto, static={"k": given}).graph.main.inputs] == ["x"]
        return
    with pytest.raises(FrontendError, match=what) as caught:
        import_onnx(proto, static={"k": given})
    assert caught.value.hint == hint
    assert (caught.value.within or "").startswith("input k, ")


def test_the_k_of_top_k_may_be_zero_and_not_negative() -> None:
    proto = model("(float[2,6] x, int64[1] k) => (float v, int64 i)", "v, i = TopK(x, k)")
    assert str(import_onnx(proto, static={"k": [0]}).graph.main.outputs["v"].type) == "f32[2, 0]"
    with pytest.raises(FrontendError, match="TopK: k must be 0 or more, is -1"):
        import_onnx(proto, static={"k": [-1]})


def test_a_shape_that_depends_on_data_is_refused() -> None:
    body = "m = ArgMax<axis = 1, keepdims = 0>(x) y = Expand(x, m)"
    with pytest.raises(FrontendError, match="needs the elements of m, which depend on data"):
        import_onnx(model("(float[2,6] x) => (float y)", body))


# -- functions, branches, names ------------------------------------------------------------------------------------

FUNCTION = """
<domain: "here", opset_import: ["": 18]>
scaled <alpha: float = 2.0> (x, bias) => (y) {
    a = Constant<value_float: float = @alpha>()
    z = Mul(x, a)
    y = Add(z, bias)
}
"""


def test_functions_are_inlined_with_their_attributes() -> None:
    body = "a = here.scaled(x, x) y = here.scaled<alpha = 3.0>(a, x)"
    found = import_onnx(model("(float[4] x) => (float[4] y)", body, more=FUNCTION))
    x = floats(4)
    for got in answers(found, {"x": x}):
        np.testing.assert_allclose(got["y"], 10 * x, rtol=1e-6)
    assert {node.scope for node in found.graph.main.nodes} == {
        "scaled_0.Mul_1", "scaled_0.Add_2", "scaled_1.Mul_1", "scaled_1.Add_2",
    }  # fmt: skip


def test_a_function_that_calls_itself_is_refused() -> None:
    endless = '<domain: "here", opset_import: ["here": 1]> again (x) => (y) { y = here.again(x) }'
    with pytest.raises(FrontendError, match="nest too deep"):
        import_onnx(model("(float[4] x) => (float[4] y)", "y = here.again(x)", more=endless))


BRANCHES = """
    {condition}
    y = If(c) <
        then_branch = one () => (float[S] a) {{ a = Exp(x) }},
        else_branch = two () => (float[S] b) {{ b = Neg(x) }}
    >
"""


@pytest.mark.parametrize(
    ("condition", "op"),
    [
        ("c = Constant<value = bool {1}>()", "exp"),
        ("c = Constant<value = bool {0}>()", "neg"),
        ("s = Size(x) z = Constant<value_int = 0>() c = Greater(s, z)", "exp"),  # so for every size
    ],
)
def test_a_branch_is_chosen_at_import(condition: str, op: str) -> None:
    found = import_onnx(model("(float[S] x) => (float[S] y)", BRANCHES.format(condition=condition)))
    assert ops(found) == [op]


def test_a_branch_must_be_whole() -> None:
    proto = model("(float[S] x) => (float[S] y)", BRANCHES.format(condition="c = Constant<value = bool {0}>()"))
    node = proto.graph.node[1]
    node.attribute[1].g.ClearField("output")
    with pytest.raises(FrontendError, match="an If without a whole else_branch"):
        import_onnx(proto)
    del node.attribute[1]
    with pytest.raises(FrontendError, match="an If without a whole else_branch"):
        import_onnx(proto)


def test_a_condition_is_one_number() -> None:
    for condition in ("c = Constant<value = bool[2] {1, 0}>()", "c = Shape(x)"):
        proto = model("(float[S] x) => (float[S] y)", BRANCHES.format(condition=condition))
        with pytest.raises(FrontendError, match="If: c must be one number"):
            import_onnx(proto)


def test_a_branch_that_depends_on_data_is_refused() -> None:
    body = BRANCHES.format(condition="i = Constant<value_int = 0>() e = Gather(m, i) c = Gather(e, i)")
    with pytest.raises(FrontendError, match="depend on data"):
        import_onnx(model("(float[S] x, bool[S,S] m) => (float[S] y)", body))


def test_nodes_say_where_they_come_from() -> None:
    proto = model("(float[4] x) => (float[4] y)", "y = Exp(x)")
    proto.graph.node[0].name = "/encoder/layer.0/Exp"
    (node,) = import_onnx(proto).graph.main.nodes
    assert (node.scope, str(node.source)) == ("encoder.layer.0.Exp", "test:1")


def test_modules_that_an_exporter_names_are_in_the_scope() -> None:
    proto = model("(float[4] x) => (float[4] y)", "y = Exp(x)")
    proto.graph.node[0].name = "node_exp"
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'bert.encoder', 'exp']"
    (node,) = import_onnx(proto).graph.main.nodes
    assert node.scope == "bert.encoder.node_exp"


def test_long_names_of_nodes_are_cut() -> None:
    proto = model("(float[2] x) => (float[2] y)", "y = Exp(x)")
    proto.producer_name, proto.producer_version = "exporter" * 9, "2.0" * 9
    proto.graph.node[0].name = "n" * 500
    found = import_onnx(proto)
    assert found.notes.producer == ("exporter" * 9 + " " + "2.0" * 9)[:80]
    assert found.graph.main.nodes[0].scope == printable("n" * 500, 400)
    proto.graph.node[0].name = "n"
    told = "['', 'encoder', '{}']"
    for length, scope in ((9_999, "encoder.n"), (10_000, "n")):
        del proto.graph.node[0].metadata_props[:]
        entry = proto.graph.node[0].metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", told.format("m" * (length - len(told) + 2))
        assert import_onnx(proto).graph.main.nodes[0].scope == scope


def test_any_name_is_kept_and_can_be_written_down() -> None:
    x = helper.make_tensor_value_info("x:0", TensorProto.FLOAT, ["a b", 3])
    y = helper.make_tensor_value_info('y/"\u00e9"', TensorProto.FLOAT, None)
    node = helper.make_node("Add", ["x:0", "w::1"], ['y/"\u00e9"'], name='here/%"x')
    weight = numpy_helper.from_array(floats(20, 3), "w::1")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    found = import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), dims={"a b": 20}).graph
    assert [*found.main.outputs, *found.parameters] == ['y/"\u00e9"', "w::1"]
    again = parse_graph(str(found))
    assert again == found
    assert str(again) == str(found)


def test_nodes_that_no_output_needs_are_left_out() -> None:
    found = import_onnx(model("(float[4] x) => (float[4] y)", "y = Exp(x) z = NonZero(x)"))
    assert (ops(found), found.notes.dead) == (["exp"], 1)


# -- weights -------------------------------------------------------------------------------------------------------


def with_weight(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """x + w, for a weight of that name."""
    shape = list(tensor.dims)
    x = helper.make_tensor_value_info("x", tensor.data_type, shape)
    y = helper.make_tensor_value_info("y", tensor.data_type, shape)
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_weights_in_another_file_are_mapped(tmp_path: Path) -> None:
    values = floats(40, 50)
    proto = with_weight(numpy_helper.from_array(values, "w"))
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    found = import_onnx(tmp_path / "m.onnx")
    weight = found.weights["w"]
    np.testing.assert_array_equal(weight, values)
    base: Any = weight
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base.base, mmap.mmap)


def external(tmp_path: Path, **entries: str) -> Path:
    """A model whose weight f32[20] lies in another file, as these entries say."""
    proto = with_weight(numpy_helper.from_array(floats(20), "w"))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    (folder / "w.bin").write_bytes(bytes(range(80)))
    (tmp_path / "outside.bin").write_bytes(bytes(80))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "inner.bin").symlink_to(folder / "w.bin")
    return folder / "m.onnx"


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"location": "../outside.bin"}, "must lie in the model's folder"),
        ({"location": "/etc/passwd"}, "must lie in the model's folder"),
        ({"location": "a\\..\\..\\outside.bin"}, "must lie in the model's folder"),
        ({"location": "link.bin"}, "must not be reached by a link"),
        ({"location": "inner.bin"}, "must not be reached by a link"),
        ({"location": "missing.bin"}, "no such file"),
        ({"location": "."}, "must lie in the model's folder"),
        ({}, "must lie in the model's folder(.|\n)*no location"),
        ({"location": "a:b"}, "must lie in the model's folder"),
        ({"location": "a\nb"}, "must lie in the model's folder"),
        ({"location": "w.bin", "offset": "9" * 18}, "past the end of its file"),
        ({"location": "w.bin", "offset": "4"}, "past the end of its file"),
        ({"location": "w.bin", "offset": "-4"}, "no number of bytes"),
        ({"location": "w.bin", "offset": "9" * 30}, "no number of bytes"),
        ({"location": "w.bin", "length": "12"}, "not as long as the tensor's shape"),
    ],
)
def test_external_data_stays_in_its_folder_and_its_bounds(tmp_path: Path, entries: dict[str, str], why: str) -> None:
    with pytest.raises(FrontendError, match=why) as caught:
        import_onnx(external(tmp_path, **entries))
    assert "tensor w" in str(caught.value)


def test_external_data_of_a_model_in_memory_needs_a_folder(tmp_path: Path) -> None:
    path = external(tmp_path, location="w.bin", length="80", offset="0")
    proto = onnx.load(path, load_external_data=False)
    with pytest.raises(FrontendError, match="no folder"):
        import_onnx(proto)
    wanted = np.arange(80, dtype=np.uint8).view(np.float32)
    np.testing.assert_array_equal(import_onnx(proto, folder=path.parent).weights["w"], wanted)


def test_small_constants_stand_in_the_graph_and_larger_ones_are_weights() -> None:
    body = "a = Constant<value_floats = [1.0, 2.0, 3.0]>() z = Add(x, a) y = Add(z, w)"
    proto = model("(float[3] x) => (float[3] y)", body)
    proto.graph.initializer.append(numpy_helper.from_array(floats(1, 3), "w"))
    assert list(import_onnx(proto).weights) == []
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(floats(20, 3), "w"))
    assert list(import_onnx(proto).weights) == ["w"]
    for values, weights in ((floats(16), []), (floats(17), ["w"]), (np.arange(4096), []), (np.arange(4097), ["w"])):
        assert list(import_onnx(with_weight(numpy_helper.from_array(values, "w"))).weights) == weights


def test_so_many_numbers_and_sizes_are_computed_at_import() -> None:
    counts = (
        "a = Constant<value_int = 0>() o = Constant<value_int = 1>() n = Constant<value_int = {0}>() "
        "r = Range(a, n, o) y = Add(x, r)"
    )
    for count, made in ((4096, ["add"]), (4097, ["iota", "add"])):
        found = import_onnx(model(f"(int64[{count}] x) => (int64[{count}] y)", counts.format(count)))
        assert [op for op in ops(found) if op != "cast"] == made
    sizes = (
        "s = Shape(x) n = Constant<value_ints = [{0}]>() e = Expand(s, n) i = Constant<value_ints = [7]>() "
        "g = Gather(e, i) k = Constant<value_ints = [1]>() t = Concat<axis = 0>(g, k) y = Reshape(x, t)"
    )
    found = import_onnx(model("(float[S] x) => (float[S,1] y)", sizes.format(255)))
    assert str(found.graph.main.outputs["y"].type) == "f32[S, 1]"
    with pytest.raises(FrontendError, match="needs the elements of"):
        import_onnx(model("(float[S] x) => (float[S,1] y)", sizes.format(256)))


# -- refusals ------------------------------------------------------------------------------------------------------


def test_an_operator_that_is_not_taken_is_named_with_its_node_and_opset() -> None:
    proto = model("(float[4] x) => (int64 y)", "y = NonZero(x)")
    proto.graph.node[0].name = "where_it_is"
    with pytest.raises(UnsupportedOnnx) as caught:
        import_onnx(proto)
    assert str(caught.value) == (
        "NonZero: the operator (version 13) is not supported\n  in        node where_it_is (NonZero), opset 18, test"
    )
    assert (caught.value.op, caught.value.version) == ("NonZero", 13)


def test_an_attribute_that_is_not_taken_is_refused() -> None:
    proto = model("(float[4] x) => (float[4] y)", "y = Exp<speed = 3>(x)")
    with pytest.raises(UnsupportedOnnx, match="attribute speed is not supported"):
        import_onnx(proto)


def test_an_opset_that_is_too_new_is_refused() -> None:
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(UnsupportedOnnx, match=f"opset {newest + 1} is not supported"):
        import_onnx(model("(float[4] x) => (float[4] y)", "y = Exp(x)", opset=newest + 1))


def test_old_forms_of_operators_are_read_or_refused() -> None:
    """Add of opset 6 broadcasts by an attribute; Softmax of opset 11 goes over all axes from the given one on."""
    with pytest.raises(UnsupportedOnnx, match="version 6"):
        import_onnx(model("(float[4] x) => (float[4] y)", "y = Add(x, x)", opset=6))
    same_as_runtime(
        model("(float[2,3,4] x) => (float[2,3,4] y)", "y = Softmax<axis = 1>(x)", opset=11), {"x": floats(2, 3, 4)}
    )


def test_gather_counts_from_the_end_but_not_in_an_embedding() -> None:
    proto = model("(float[5,2] t, int64[3] i) => (float y)", "y = Gather(t, i)")
    same_as_runtime(proto, {"t": floats(5, 2), "i": np.array([0, -1, -5])})
    proto = model("(int64[3] i) => (float y)", "y = Gather(t, i)")
    proto.graph.initializer.append(numpy_helper.from_array(floats(30, 2), "t"))
    found = same_as_runtime(proto, {"i": np.array([0, 7, 29])})
    assert ops(found) == ["embedding"]


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64"])
def test_integers_without_sign_are_exact_to_their_ends(name: str) -> None:
    """Sums and products wrap; order, quotients and remainders are those of numbers without sign."""
    body = """
        sum = Add(x, y) difference = Sub(x, y) product = Mul(x, y) quotient = Div(x, y) rest = Mod(x, y)
        less = Less(x, y) largest = Max(x, y) float = Cast<to = 1>(x)
    """
    outputs = ", ".join(f"{name} {o}" for o in ("sum", "difference", "product", "quotient", "rest", "largest"))
    proto = model(f"({name}[N] x, {name}[N] y) => ({outputs}, bool less, float float)", body)
    top = int(np.iinfo(name).max)
    pairs = [
        (top, 1),
        (top, 2),
        (top, top),
        (top - 1, top),
        (1, top),
        (top // 2 + 1, 3),
        (7, 2),
        (0, 5),
        (top, top // 2 + 2),
    ]
    x, y = (np.array(side, name) for side in zip(*pairs, strict=True))
    for got in answers(import_onnx(proto), {"x": x, "y": y}):
        with np.errstate(over="ignore"):
            wanted = {"sum": x + y, "difference": x - y, "product": x * y, "quotient": x // y, "rest": x % y}
        wanted |= {"largest": np.maximum(x, y), "less": x < y, "float": x.astype(np.float32)}
        for key, expected in wanted.items():
            np.testing.assert_array_equal(got[key], expected, err_msg=key)


def test_small_weights_that_a_file_moves_stay_weights(tmp_path: Path) -> None:
    """A weight of 24 elements, turned round by the file and joined to another: both keep their names."""
    first, second = (np.arange(24, dtype=np.float32).reshape(6, 4) * scale for scale in (1, 0.5))
    proto = model(
        "(float[B,4] x) => (float[B,12] y)",
        "joined = Concat <axis = 0> (a, b) turned = Transpose <perm = [1, 0]> (joined) y = MatMul (x, turned)",
    )
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in (("a", first), ("b", second)))
    same_as_runtime(proto, {"x": np.ones((2, 4), np.float32)})
    found = import_onnx(proto)
    assert sorted(found.graph.parameters) == ["a", "b"]
    assert "{@0}" not in str(found.graph)


def test_operators_are_read_in_their_newest_form() -> None:
    """Each names the last version of its schema that it was written for; a later one may mean something else."""
    if not onnx.__version__.startswith(LISTED + "."):
        pytest.skip(f"the versions are those of onnx {LISTED}, this is {onnx.__version__}")
    newest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            newest[schema.name] = max(newest.get(schema.name, 0), schema.since_version)
    read = {name: each.latest for (domain, name), each in OPERATORS.items() if domain == "" and name in newest}
    behind = {"DepthToSpace", "ReverseSequence", "SpaceToDepth"}  # of opset 28, which are refused
    assert {name for name, latest in read.items() if latest != newest[name]} == behind


def test_quotients_of_integers_are_rounded_towards_zero() -> None:
    x, y = (v.reshape(-1) for v in np.meshgrid(np.arange(-7, 8), [-3, -2, -1, 1, 2, 3]))
    for dtype in (np.int32, np.int64):
        proto = model(f"({np.dtype(dtype)}[N] x, {np.dtype(dtype)}[N] y) => ({np.dtype(dtype)}[N] z)", "z = Div(x, y)")
        same_as_runtime(proto, {"x": x.astype(dtype), "y": y.astype(dtype)})


@pytest.mark.parametrize("mode", ["edge", "wrap", "reflect"])
@pytest.mark.parametrize("pads", [(2, 0), (0, 2), (1, 2)])
def test_what_a_border_repeats(mode: str, pads: tuple[int, int]) -> None:
    body = f'p = Constant<value_ints = [{pads[0]}, {pads[1]}]>() y = Pad<mode = "{mode}">(x, p)'
    for length in ("3", "N"):
        same_as_runtime(model(f"(float[{length}] x) => (float[M] y)", body), {"x": np.float32([3, 1, 2])})


@pytest.mark.parametrize("stored", ["y", "x", "neither", "rows of y"])
def test_integers_of_64_bits_to_a_power(stored: str) -> None:
    """By products where the file tells one exponent from 0 to 8, exact up to 2^63; else by f64, exact up to 2^53.

    f64 has no 3^34, nor the cube of 2^20 + 1. What is no exponent, be it stored or not, is not read as one.
    """
    large = [3**17, -(3**17), 0, 1, -1, 2**20 + 1]
    powers = range(9) if stored in ("y", "rows of y") else (3,)
    for power in powers:
        base = [n for n in large if abs(n) ** power < (2**63 if stored == "y" else 2**53)]
        x, y = np.array([2] if stored == "x" else base), np.array([power])
        if stored == "rows of y":
            y = np.array([power, 1])[:, None]
        given = {"x": x, "y": y}
        body = "z = Pow(x, y)"
        if stored != "neither":
            name = stored[-1]
            value = ", ".join(map(str, given[name].ravel()))
            shape = ", ".join(map(str, given[name].shape))
            body = f"s = Constant<value = int64[{shape}] {{{value}}}>() " + body.replace(name, "s")
            del given[name]
        inputs = ", ".join(f"int64[{','.join(map(str, v.shape))}] {n}" for n, v in given.items())
        found = import_onnx(model(f"({inputs}) => (int64[N] z)", body))
        assert ("pow" in {n.op.name for n in found.graph.main.nodes}) == (stored != "y")
        for answer in answers(found, given):
            np.testing.assert_array_equal(answer["z"], x**y)


UNUSUAL: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # signature, body, inputs and opset of forms that files seldom have
    "backwards": (
        "(float[N] x) => (float[N] y)",
        "s = Constant<value_ints = [-1]>() e = Constant<value_ints = [-9223372036854775807]>() "
        "a = Constant<value_ints = [0]>() y = Slice(x, s, e, a, s)",
        {"x": floats(5)},
        18,
    ),
    "old pads": (
        "(float[2,3] x) => (float[M,K] y)",
        "y = Pad<pads = [1, 0, 0, 2], value = 1.5>(x)",
        {"x": floats(2, 3)},
        10,
    ),
    "pads that cut": (
        "(float[4,5] x) => (float[M,K] y)",
        "p = Constant<value_ints = [-1, 1, 2, -2]>() y = Pad(x, p)",
        {"x": floats(4, 5)},
        18,
    ),
    "least of none": (
        "(int32[0,3] x) => (int32[3] y, int32[3] z)",
        "a = Constant<value_ints = [0]>() y = ReduceMax<keepdims = 0>(x, a) z = ReduceMin<keepdims = 0>(x, a)",
        {"x": np.zeros((0, 3), np.int32)},
        20,
    ),
    "no infinity": (
        "(float[3] x) => (bool[3] y)",
        "y = IsInf<detect_positive = 0, detect_negative = 0>(x)",
        {"x": np.float32([np.inf, np.nan, 1])},
        18,
    ),
    "sides": ("(uint64[3] x) => (uint64[3] y)", "y = Sign(x)", {"x": np.array([0, 3, 2**64 - 1], np.uint64)}, 18),
    "a double power": (
        "(float[3] x, double[3] e) => (float[3] y)",
        "y = Pow(x, e)",
        {"x": np.float32([1.5, 2, 3]), "e": np.array([0.5, 3, -1])},
        18,
    ),
    "half a norm": (
        "(float16[2,3,4] x, float[3] v, float[3] w) => (float16[2,3,4] y)",
        "y = BatchNormalization(x, v, w, w, v)",
        {"x": floats(2, 3, 4).astype(np.float16), "v": np.float32([1, 2, 3]), "w": np.float32([0.5, -1, 2])},
        15,
    ),
    "a block that is cut": (
        "(int8[2,3] x, float[2,2] s) => (float[2,3] y)",
        "y = DequantizeLinear<axis = 1, block_size = 2>(x, s)",
        {"x": np.int8([[1, -2, 3], [4, 5, -6]]), "s": np.float32([[0.5, 2], [3, 0.25]])},
        21,
    ),
    "a step down": (
        "(int64[4] x) => (int64[M] y)",
        "a = Constant<value_int = 9>() b = Constant<value_int = 0>() c = Constant<value_int = -4>() "
        "r = Range(a, b, c) z = ReduceMax<keepdims = 0>(x) y = Add(r, z)",
        {"x": np.arange(4)},
        18,
    ),
    "no steps": (
        "(float[4] x) => (float[M] y)",
        "a = Constant<value_float = 2.0>() b = Constant<value_float = 0.5>() r = Range(a, b, b) "
        "z = ReduceMax<keepdims = 0>(x) y = Add(r, z)",
        {"x": floats(4)},
        17,
    ),
    "sizes on two axes": (
        "(float[S,3] x, int64[2,1] k) => (int64[2,2] y)",
        "s = Shape(x) z = Constant<value_ints = [0]>() u = Unsqueeze(s, z) y = Mul(u, k)",
        {"x": floats(5, 3), "k": np.array([[1], [2]])},
        18,
    ),
    "a size by itself": (
        "(float[S,3] x, int64[2] k) => (int64[2] y)",
        "n = Size(x) y = Mul(n, k)",
        {"x": floats(5, 3), "k": np.array([1, 2])},
        18,
    ),
    "writes into none": (
        "(float[2,0] x, int64[0,1] i, float[0,0] u) => (float[2,0] y)",
        "y = ScatterND(x, i, u)",
        {"x": floats(2, 0), "i": np.zeros((0, 1), np.int64), "u": floats(0, 0)},
        18,
    ),
}


@pytest.mark.parametrize("form", UNUSUAL)
def test_forms_that_files_seldom_have(form: str) -> None:
    signature, body, inputs, opset = UNUSUAL[form]
    same_as_runtime(model(signature, body, opset=opset), inputs)


def test_floats_become_the_nearest_integers_without_sign_below_them() -> None:
    proto = model("(double[N] x) => (uint64[N] y)", "y = Cast<to = 13>(x)")
    x = np.array([0.0, 1.9, 2.0**53 + 2, 2.0**63 - 1024, 2.0**63, 2.0**63 + 2048, 2.0**64 - 2048])
    for answer in answers(import_onnx(proto), {"x": x}):
        np.testing.assert_array_equal(answer["y"], x.astype(np.uint64))


def test_a_mask_of_one_element_is_that_of_all() -> None:
    """One number that is added to every score changes none of the probabilities; False alone leaves no keys."""
    x = floats(2, 5, 12)
    body = "y = Attention<q_num_heads = 3, kv_num_heads = 3>(x, x, x{})"
    plain = runtime(model("(float[2,5,12] x) => (float[2,5,12] y)", body.format(""), opset=23), {"x": x})["y"]
    for kind, mask, wanted in (("bool", True, plain), ("float", 3.0, plain), ("bool", False, np.zeros_like(plain))):
        proto = model(f"(float[2,5,12] x, {kind}[1,1] m) => (float[2,5,12] y)", body.format(", m"), opset=23)
        given = {"x": x, "m": np.array([[mask]], "float32" if kind == "float" else kind)}
        for answer in answers(import_onnx(proto), given):
            np.testing.assert_allclose(answer["y"], wanted, rtol=0, atol=2e-6)
