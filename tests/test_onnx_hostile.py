"""Damaged and hostile ONNX files are refused with a typed error that names the node or tensor: no crash, no hang."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_models import model
from treadle.frontends.onnx_import.file import OnnxLimits
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.errors import CheckpointError, FrontendError, TreadleError

BODY = """
    a = MatMul(x, w)
    b = Add(a, c)
    n = LayerNormalization<axis = -1, epsilon = 0.00001>(b, s, t)
    d = Gelu(n)
    shape = Shape(d)
    one = Constant<value_ints = [1]>()
    zero = Constant<value_ints = [0]>()
    first = Slice(shape, zero, one, zero)
    rest = Constant<value_ints = [2, -1]>()
    wanted = Concat<axis = 0>(first, rest)
    y = Reshape(d, wanted)
"""


def small() -> onnx.ModelProto:
    """Return a model of a few nodes with weights and shape arithmetic, which is imported without error."""
    proto = model("(float[S,6] x) => (float y)", BODY, opset=20)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (6, 8)), ("c", (8,)), ("s", (8,)), ("t", (8,))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return proto


def test_the_model_that_is_damaged_here_imports_whole() -> None:
    assert str(import_onnx(small()).graph.main.outputs["y"].type) == "f32[S, 2, 4]"


# -- one thing wrong -----------------------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    """Set a field, named from the graph down: `node[0].input[1]`."""

    def change(proto: onnx.ModelProto) -> None:
        *steps, last = path.replace("[", ".").replace("]", "").split(".")
        at: Any = proto.graph
        for step in steps:
            at = at[int(step)] if step.isdigit() else getattr(at, step)
        if last.isdigit():
            at[int(last)] = value
        elif isinstance(value, list):
            del getattr(at, last)[:]
            getattr(at, last).extend(value)
        else:
            setattr(at, last, value)

    return change


def _unversioned(proto: onnx.ModelProto) -> None:
    """Remove the opsets: an operator is then read by its first version, and an unknown operator has none."""
    proto.ClearField("opset_import")
    proto.graph.node[0].op_type = "Nothing"


def _more(path: str, *values: str) -> Callable[[onnx.ModelProto], None]:
    """Append elements to a repeated field."""

    def change(proto: onnx.ModelProto) -> None:
        name, index, field = path.replace("[", ".").replace("]", "").split(".")
        getattr(getattr(proto.graph, name)[int(index)], field).extend(values)

    return change


def _reshaped(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        del proto.graph.initializer[0].dims[:]
        proto.graph.initializer[0].dims.extend(dims)

    return change


def _again(kind: str, index: int = 0) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        items = getattr(proto.graph, kind)
        items.add().CopyFrom(items[index])

    return change


def _without(kind: str) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: proto.graph.ClearField(kind)  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "a missing input": (_set("node[0].input[1]", "nowhere"), "no node computes the value nowhere"),
    "a missing output": (_set("output[0].name", "nowhere"), "no node computes the output nowhere"),
    "a cycle": (_set("node[0].input[0]", "d"), "the value d is used before it is computed"),
    "a node that reads itself": (_set("node[1].input[0]", "b"), "the value b is used before it is computed"),
    "two nodes that make one value": (_set("node[1].output[0]", "a"), "two nodes compute the value a"),
    "a tensor twice": (_again("initializer"), "two tensors are named w"),
    "an input twice": (_again("input"), "two inputs are named x"),
    "an output twice": (_again("output"), "two outputs are named y"),
    "too few bytes": (_set("initializer[0].raw_data", b"\0" * 7), "number of bytes does not match its shape"),
    "too many elements": (_reshaped(2**30, 2**20), "number of bytes does not match its shape|disagree"),
    "an absurd shape": (_reshaped(2**62, 2**62), "a tensor's shape is impossible"),
    "a shape at its limit": (_reshaped(2**28, 2**28), "a tensor's shape is impossible"),
    "a shape below its limit": (_reshaped(2**28, 2**28 - 1), "sizes disagree"),
    "a negative shape": (_reshaped(-6, 8), "a tensor's shape is impossible"),
    "a rank of 100": (_reshaped(*[1] * 100), "a tensor's shape is impossible"),
    "an unknown element type": (_set("initializer[0].data_type", 99), "element type 99 is not supported"),
    "an input of strings": (_set("input[0].type.tensor_type.elem_type", 8), "element type STRING is not supported"),
    "a dimension at its limit": (
        _set("input[0].type.tensor_type.shape.dim[1].dim_value", 2**40),
        "dimension is imposs",
    ),
    "a dimension below it": (_set("input[0].type.tensor_type.shape.dim[1].dim_value", 2**40 - 1), "disagree"),
    "a negative dimension": (_set("input[0].type.tensor_type.shape.dim[1].dim_value", -3), "a dimension is impossible"),
    "an output of another type": (_set("output[0].type.tensor_type.elem_type", 7), "differs from its declaration"),
    "an axis that is not there": (_set("node[9].attribute[0].i", 7), "there is no axis 7"),
    "an attribute of another kind": (_set("node[2].attribute[0].type", 3), "attribute axis has another type"),
    "an operator that is not there": (_set("node[3].op_type", "Nothing"), "there is no such operator"),
    "a domain that is not there": (_set("node[3].domain", "no.where"), "there is no such operator"),
    "a node with too many inputs": (
        _more("node[3].input", "a", "a"),
        "more inputs or outputs than its operator allows",
    ),
    "a node with too many outputs": (_more("node[3].output", "e"), "more inputs or outputs than its operator allows"),
    "a node with too few inputs": (_set("node[0].input", ["x"]), "fewer inputs than its operator requires"),
    "inputs of two types": (_set("initializer[1].data_type", 6), "Add: two inputs must have the same type"),
    "no opsets": (_unversioned, "the model imports no opset of ONNX's own"),
    "a tensor in segments": (_set("initializer[0].segment.begin", 0), "tensors in segments are not supported"),
    "no nodes": (_without("node"), "no node computes the output y"),
    "no output": (_without("output"), "no graph with an output"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str) -> None:
    proto = small()
    change, why = WRONG[what]
    change(proto)
    with pytest.raises(FrontendError, match=why) as caught:
        import_onnx(proto)
    assert caught.value.within, "the error says where"


def test_a_node_that_makes_a_weight_is_refused() -> None:
    proto = model("(float[4] x) => (float[4] w)", "w = Exp(x)")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    with pytest.raises(FrontendError, match="two values are named w"):
        import_onnx(proto)


def test_an_input_without_a_rank_is_refused() -> None:
    proto = small()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(FrontendError, match="an input's rank must be declared"):
        import_onnx(proto)


def test_two_opsets_of_one_domain_are_refused() -> None:
    proto = small()
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 12))
    with pytest.raises(FrontendError, match="two opsets"):
        import_onnx(proto)


ZERO_AND_ONE = """
<domain: "here", opset_import: ["": 18]>
zero_and_one () => (a, o) { a = Constant<value_int: int = 0>() o = Constant<value_int: int = 1>() }
"""


ABSURD = {  # body -> the output's type if its size can be computed, otherwise the reason for the refusal
    "z = ConstantOfShape(n) y = ReduceSum(z)": ("f32[1]", "size"),
    "y = Expand(x, n)": ("f32[{value}]", "size"),
    "y = Tile(x, n)": ("f32[{value}]", "size"),
    "a, o = here.zero_and_one() k = Squeeze(n) y = Range(a, k, o)": ("i64[{value}]", "size"),
    "y = OneHot(i0, n, v)": ("f32[1, {value}]", "size"),
    'z = Constant<value_ints = [0]>() p = Concat<axis = 0>(n, z) y = Pad<mode = "reflect">(x, p)': (None, "reflect"),
    "y, i = TopK(x, n)": (None, "k is {value}, but axis 0 has 1 elements"),
    "y = Split<num_outputs = {value}>(x)": (None, "{value} parts do not fit 1 outputs"),
}
MOST_BYTES = 1 << 20  # Python's and NumPy's peak during import: the models have some dozens of nodes


@pytest.mark.parametrize("value", [2**40, 2**62, 2**63 - 1])
@pytest.mark.parametrize("body", ABSURD)
def test_absurd_sizes_cost_nothing(body: str, value: int) -> None:
    """A large tensor may be described, but one that import would have to compute is refused.

    Neither takes memory.
    """
    described, why = ABSURD[body]
    text = f"n = Constant<value_ints = [{value}]>() " + body.replace("{value}", str(value))
    proto = model("(float[1] x, int64[1] i0, float[2] v) => (y)", text, more=ZERO_AND_ONE)
    tracemalloc.start()
    try:
        if described is None or value > 2**61:
            with pytest.raises(FrontendError, match=why.replace("{value}", str(value))) as caught:
                import_onnx(proto)
            assert caught.value.within, "the error says where"
        else:
            result = import_onnx(proto).graph.main.outputs["y"]
            assert str(result.type) == described.replace("{value}", str(value))
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("limit", "body", "needs"),
    [
        ("nodes", "a = Exp(x) b = Exp(a) y = Exp(b)", 3),
        ("rank", "y = Exp(x)", 2),
        ("nesting", "y = here.f(x)", 2),
    ],
)
def test_a_limit_is_the_most_that_is_read(limit: str, body: str, needs: int) -> None:
    head = '<domain: "here", opset_import: ["here": 1, "": 18]>'
    functions = f"{head} f (x) => (y) {{ y = here.g(x) }} {head} g (x) => (y) {{ y = Exp(x) }}"
    proto = model("(float[2, 3] x) => (float[2, 3] y)", body, more=functions)
    import_onnx(proto, limits=OnnxLimits(**{limit: needs}))
    with pytest.raises(FrontendError):
        import_onnx(proto, limits=OnnxLimits(**{limit: needs - 1}))


@pytest.mark.parametrize("inlined", [False, True])
def test_branches_in_branches_are_limited(inlined: bool) -> None:
    branch = (
        "If(c) <then_branch = t{0} () => (float a{0}) {{ a{0} = {1} }}, "
        "else_branch = e{0} () => (float b{0}) {{ b{0} = Neg(x) }}>"
    )
    body = "Exp(x)"
    for level in range(3):
        body = branch.format(level, body)
    body = f"c = Constant<value = bool {{1}}>() y = {body}"
    head = '<domain: "here", opset_import: ["here": 1, "": 18]>'
    more = f"{head} f (x) => (y) {{ {body} }}" if inlined else ""
    proto = model("(float[2] x) => (float[2] y)", "y = here.f(x)" if inlined else body, more=more)
    needs = 4 if inlined else 3
    import_onnx(proto, limits=OnnxLimits(nesting=needs))
    with pytest.raises(FrontendError, match="nest too deep"):
        import_onnx(proto, limits=OnnxLimits(nesting=needs - 1))


def test_what_a_file_may_ask_for_at_first() -> None:
    assert OnnxLimits() == OnnxLimits(bytes=2**31 - 1, nodes=200_000, nesting=32, rank=24)
    proto = model("(float[2] x) => (float[2] y)", "a = Exp(x) b = Exp(a) y = Exp(b)")
    with pytest.raises(FrontendError, match="more nodes than the limit") as caught:
        import_onnx(proto, limits={"nodes": 2})
    assert caught.value.received == "limit 2, functions inlined"
    assert caught.value.hint == "limits={'nodes': 8}, if you trust the file"


def test_functions_that_double_at_every_level_are_bounded() -> None:
    levels = 20
    head = '<domain: "here", opset_import: ["here": 1, "": 18]>'
    text = "".join(f"{head} f{i} (x) => (y) {{ a = here.f{i + 1}(x) y = here.f{i + 1}(a) }}" for i in range(levels))
    text += f'<domain: "here", opset_import: ["": 18]> f{levels} (x) => (y) {{ y = Exp(x) }}'
    proto = model("(float[4] x) => (float[4] y)", "y = here.f0(x)", more=text)
    with pytest.raises(FrontendError, match="more nodes than the limit"):
        import_onnx(proto, limits=OnnxLimits(nodes=2_000))


# -- bytes ---------------------------------------------------------------------------------------------------------


def _attempt(path: Path | onnx.ModelProto) -> bool:
    """Return True if the model is imported; any error other than ours fails the test."""
    try:
        import_onnx(path)
    except TreadleError:
        return False
    return True


def test_files_that_are_cut_anywhere_are_refused(tmp_path: Path) -> None:
    data = small().SerializeToString()
    path = tmp_path / "cut.onnx"
    whole = 0
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        whole += _attempt(path)
    assert whole <= 1, "a file without its opsets' bytes may still be whole"


def test_files_with_flipped_bits_do_not_crash(tmp_path: Path) -> None:
    data = small().SerializeToString()
    path = tmp_path / "flipped.onnx"
    rng = random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        _attempt(path)


def _spots(message: Any) -> Iterator[tuple[Any, Any, int | None]]:
    """Yield every scalar field of a message and of its submessages, with its index in a repeated field."""
    for field, value in message.ListFields():
        inner = field.message_type is not None
        if hasattr(value, "append") or hasattr(value, "add"):
            for i, item in enumerate(value):
                if inner:
                    yield from _spots(item)
                else:
                    yield message, field, i
        elif inner:
            yield from _spots(value)
        else:
            yield message, field, None


def test_fields_with_other_values_do_not_crash() -> None:
    base = small()
    numbers = (0, 1, 2, -1, 3, 7, 1000, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))
    rng = random.Random(0)
    texts = ["", "x", "y", "w", "d", "\x00\x1b[31m", "x" * 300, *(n.op_type for n in base.graph.node)]
    for _ in range(400):
        proto = onnx.ModelProto()
        proto.CopyFrom(base)
        message, field, place = rng.choice(list(_spots(proto)))
        old = getattr(message, field.name)
        kind = type(old if place is None else old[place])
        value: Any = rng.choice(numbers)
        if kind is bytes:
            value = rng.randbytes(rng.randrange(40))
        elif kind is str:
            value = rng.choice(texts)
        elif kind is float:
            value = rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        try:
            if place is None:
                setattr(message, field.name, value)
            else:
                old[place] = value
        except (ValueError, TypeError):  # which protobuf cannot represent
            continue
        _attempt(proto)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for data in (b"", b"\xff" * 50, b"PK\x03\x04" + bytes(30)):
        path.write_bytes(data)
        with pytest.raises(FrontendError, match=r"not an ONNX model|no graph with an output") as caught:
            import_onnx(path)
        assert caught.value.hint is not None
    with pytest.raises(CheckpointError, match="the file does not exist"):
        import_onnx(tmp_path / "nothing.onnx")
    with pytest.raises(CheckpointError, match=r"not a regular file|cannot be opened"):
        import_onnx(tmp_path)
    path.write_bytes(small().SerializeToString())
    with pytest.raises(CheckpointError, match="longer than the limit"):
        import_onnx(path, limits=OnnxLimits(bytes=100))


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(small().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel"))
    with pytest.raises(FrontendError, match=r"not UTF-8|not an ONNX model"):
        import_onnx(path)


def test_a_name_with_control_characters_is_shown_escaped() -> None:
    proto = small()
    proto.graph.node[0].name = "\x1b[31mred"
    proto.graph.node[0].op_type = "Nothing"
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto)
    assert "\x1b" not in str(caught.value)


def test_a_strings_tensor_is_refused_where_it_is_used() -> None:
    proto = small()
    proto.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"a"]))
    assert import_onnx(proto).graph.main.nodes, "nothing uses it"
    proto.graph.node[1].input[1] = "text"
    with pytest.raises(FrontendError, match="text: element type STRING is not supported"):
        import_onnx(proto)
