"""ONNX import: functions, branches, names, weights, and models that are refused independently of their operators."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_models import answers, model, ops, same_as_runtime
from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.errors import FrontendError
from treadle.ir.text.parser import parse_graph

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape, np.float32)


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
    with pytest.raises(FrontendError, match="an If has an incomplete else_branch"):
        import_onnx(proto)
    del node.attribute[1]
    with pytest.raises(FrontendError, match="an If has an incomplete else_branch"):
        import_onnx(proto)


def test_a_condition_is_one_number() -> None:
    for condition in ("c = Constant<value = bool[2] {1, 0}>()", "c = Shape(x)"):
        proto = model("(float[S] x) => (float[S] y)", BRANCHES.format(condition=condition))
        with pytest.raises(FrontendError, match="If: c must be a constant with one element"):
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
    report = "['', 'encoder', '{}']"
    for length, scope in ((9_999, "encoder.n"), (10_000, "n")):
        del proto.graph.node[0].metadata_props[:]
        entry = proto.graph.node[0].metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", report.format("m" * (length - len(report) + 2))
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
    """Return x + w, for a weight of that name."""
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
    """Return a model whose weight f32[20] is in another file, as these entries describe."""
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
        ({"location": "../outside.bin"}, "must be in the model's folder"),
        ({"location": "/etc/passwd"}, "must be in the model's folder"),
        ({"location": "a\\..\\..\\outside.bin"}, "must be in the model's folder"),
        ({"location": "link.bin"}, "must not be reached by a link"),
        ({"location": "inner.bin"}, "must not be reached by a link"),
        ({"location": "missing.bin"}, "the file does not exist"),
        ({"location": "."}, "must be in the model's folder"),
        ({}, "must be in the model's folder(.|\n)*no location"),
        ({"location": "a:b"}, "must be in the model's folder"),
        ({"location": "a\nb"}, "must be in the model's folder"),
        ({"location": "w.bin", "offset": "9" * 18}, "past the end of its file"),
        ({"location": "w.bin", "offset": "4"}, "past the end of its file"),
        ({"location": "w.bin", "offset": "-4"}, "not a number of bytes"),
        ({"location": "w.bin", "offset": "9" * 30}, "not a number of bytes"),
        ({"location": "w.bin", "length": "12"}, "does not match the tensor's shape"),
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


def test_small_weights_that_a_file_moves_stay_weights(tmp_path: Path) -> None:
    """A weight of 24 elements that the file reverses and concatenates with another: both keep their names."""
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
