"""ONNX operators one node at a time: a run of the generator in tests/fuzz/onnx_nodes/, and separate cases."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.fuzz.onnx_nodes.cases import attributes, cases, drawn
from tests.fuzz.onnx_nodes.drawing import DRAWN
from tests.fuzz.onnx_nodes.judging import gradient_outcome, outcome
from tests.numeric_gradients import gradients
from tests.onnx_models import Array, answers, assert_as_runtime, model, prepared, same_as_runtime
from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.operators import OPERATORS, Made, OnnxSite
from treadle.frontends.onnx_import.specification import schema_of
from treadle.ir.errors import FrontendError, Hint, TreadleError
from treadle.ir.interpreter import interpret

RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape, np.float32)


# -- the generator -------------------------------------------------------------------------------------------------

NOT_DRAWN = {
    "Attention": {"qk_matmul_output_mode", "softmax_precision"},  # tests/test_attention_probabilities.py
    "BatchNormalization": {"spatial"},  # 0 is another operator, and refused
    "Constant": {"sparse_value", "value_string", "value_strings"},  # of refused types
}


def test_every_operator_and_attribute_is_drawn() -> None:
    known = {name for domain, name in OPERATORS if not domain}
    assert set(DRAWN) == known
    missing = {}
    for name in DRAWN:
        seen = {a.name for seed in range(60) for a in drawn(name, seed).proto.graph.node[0].attribute}
        if unseen := attributes(name) - seen - NOT_DRAWN.get(name, set()):
            missing[name] = unseen
    assert missing == {}


def test_an_attribute_that_is_left_out_is_what_its_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attribute that a handler reads has the schema's default, in the version of a drawn node's operator."""
    asked: dict[tuple[str, int, str], Any] = {}

    def noted(kind: str, otherwise: Any) -> None:
        asks = getattr(OnnxSite, kind)

        def noting(site: OnnxSite, name: str, default: Any = otherwise) -> Any:
            if not site.node.domain:
                asked[site.node.op_type, site.version, name] = default
            return asks(site, name, default)

        monkeypatch.setattr(OnnxSite, kind, noting)

    for kind, otherwise in (("int", None), ("float", None), ("text", "")):
        noted(kind, otherwise)
    for name, seed in itertools.product(DRAWN, range(8)):
        with contextlib.suppress(TreadleError):
            import_onnx(drawn(name, seed).proto)
    wrong = {}
    for (name, version, attribute), default in asked.items():
        schema = schema_of(name, version, "")  # None for an operator of ONNX Runtime's
        known = schema and schema.attributes.get(attribute)
        if known and known.default_value.name:
            wanted = helper.get_attribute_value(known.default_value)
            wanted = wanted.decode() if isinstance(wanted, bytes) else wanted
            if (np.float32(default) if isinstance(default, float) else default) != wanted:
                wrong[name, version, attribute] = default, wanted
    ends = {("Clip", 6, "min"), ("Clip", 6, "max")}  # the schema has float32's limits; here a missing bound is none
    assert wrong.keys() == ends
    assert len(asked) > 100


@pytest.mark.parametrize(("backend", "count"), [("numpy", 300), ("torch", 120)])
def test_drawn_nodes_give_what_onnx_runtime_gives(backend: str, count: int) -> None:
    verdicts: Counter[str] = Counter()
    step = 5  # so that a short run sees most operators
    for case in itertools.islice(cases(0), 0, count * step, step):
        found = outcome(case, backend)
        assert found.verdict != "wrong", f"{case}\n{found.why}"
        verdicts[found.verdict] += 1
    assert verdicts["same"] > 0.9 * count


@pytest.mark.parametrize("edges", [False, True])
def test_gradients_of_drawn_nodes_equal_difference_quotients(edges: bool) -> None:
    judged: Counter[str] = Counter()
    for name, seed in itertools.product(DRAWN, range(2)):
        case = drawn(name, seed)
        found = gradient_outcome(case, seed, edges=edges)
        assert found.verdict != "wrong", f"{case}\n{found.why}"
        judged[found.verdict] += 1
    assert judged["same"] > 100, judged


EPS = float(np.float32(1e-5))


@pytest.mark.parametrize(
    ("body", "x", "wanted"),
    [
        ("y = GlobalLpPool<p = 3>(x)", [0, 0], [0, 0]),
        ("y = LpPool<p = 3, kernel_shape = [2]>(x)", [0, 0], [0, 0]),
        ("s = ReduceSumSquare<keepdims = 0>(x) y = Sqrt(s)", [0, 0], [0, 0]),
        ("c = CastLike(one, x) y = Max(x, c)", [1, 2], [1, 1]),
        ("c = CastLike(one, x) y = Min(c, x)", [1, 2], [1, 0]),
        ("s = Sigmoid(x) y = Log(s)", [-800, 0], [1, 0.5]),
        ("p = Softmax(x) n = IsNaN(p) z = CastLike(zero, x) y = Where(n, z, p)", [-np.inf, -np.inf], [0, 0]),
        ("z = CastLike(zero, x) e = Equal(x, z) r = Sin(x) q = Div(r, x) y = Where(e, z, q)", [0, 0], [0, 0]),
        ("y = Selu(x)", [1, 2], [np.float32(1.050701)] * 2),
        ("g = CastLike(weight, x) y = LayerNormalization(x, g)", [0, 0], [-0.5 * EPS**-0.5, 0.5 * EPS**-0.5]),
    ],
)
def test_the_gradient_of_a_node_at_an_edge(body: str, x: list[float], wanted: list[float]) -> None:
    numbers = {"one": "float = 1.0", "zero": "float = 0.0", "weight": "floats = [1.0, 2.0]"}
    constants = " ".join(f"{name} = Constant<value_{held}>()" for name, held in numbers.items())
    graph, weights, _ = import_onnx(model("(double[1,1,2] x) => (double y)", f"{constants} {body}", opset=22))
    inputs = {"x": np.array(x, np.float64).reshape(1, 1, 2)}
    seeds = [np.ones(y.shape) for y in interpret(graph, inputs, weights).values()]
    found = gradients(graph, inputs, weights, seeds)["x"].reshape(-1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def test_a_wrong_number_and_a_crash_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(site: OnnxSite) -> Made:
        raise KeyError("x")

    case = next(case for seed in itertools.count() if (case := drawn("Neg", seed)).inputs)
    known = OPERATORS["", "Neg"]
    for handler, why in ((lambda site: site.x(0), "should be"), (crashes, "Neg cannot be read: KeyError")):
        monkeypatch.setitem(OPERATORS, ("", "Neg"), replace(known, handler=handler))
        found = outcome(case)
        assert (found.verdict, why in found.why) == ("wrong", True)


# -- reductions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["", ", no_axes"])
@pytest.mark.parametrize("kind", ["L1", "L2", "LogSum", "LogSumExp", "SumSquare", "Sum", "Mean", "Max", "Min", "Prod"])
def test_a_reduction_over_no_axes_does_what_remains_of_it(kind: str, axes: str) -> None:
    proto = model("(float[A,2] x) => (float y)", f"y = Reduce{kind}<noop_with_empty_axes = 1>(x{axes})", opset=20)
    if axes:
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.int64), "no_axes"))
    x = np.abs(floats(3, 2)) + np.float32(0.5) if kind == "LogSum" else floats(3, 2)
    found = same_as_runtime(proto, {"x": x})
    np.testing.assert_allclose(
        answers(found, {"x": x})[0]["y"], ReferenceEvaluator(proto).run(None, {"x": x})[0], rtol=1e-6
    )


def test_known_border_values_are_numbers() -> None:
    given = "p = Constant<value = int64[4] {0, 1, 1, 1}>() v = Constant<value_float = 1.5>()"
    text = str(import_onnx(model("(float[2,3] x) => (float[3,5] y)", f"{given} y = Pad(x, p, v)", opset=19)).graph)
    assert text.count("value=1.5") == text.count("pad(") == 2


# -- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["Conv", "ConvInteger", "MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("automatic", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 1), (3, 2), (2, 2), (1, 2), (2, 3), (5, 3), (3, 7)])
def test_automatic_padding_of_a_symbolic_axis(operator: str, automatic: str, kernel: int, stride: int) -> None:
    kind = "uint8" if operator == "ConvInteger" else "float"
    weight = f", {kind}[3,2,{kernel}] w" if operator.startswith("Conv") else ""
    options = f'kernel_shape = [{kernel}], strides = [{stride}], auto_pad = "{automatic}"'
    result = "int32" if operator == "ConvInteger" else "float"
    proto = model(
        f"({kind}[B,2,S] x{weight}) => ({result} y)",
        f"y = {operator}<{options}>(x{', w' if weight else ''})",
        opset=19,
    )
    found = import_onnx(proto)
    (length,) = found.graph.main.outputs["y"].type.shape[2:]
    run = prepared(found)
    for size in (max(kernel, stride), 8, 9, 10):
        shapes = {"x": (2, 2, size), **({"w": (3, 2, kernel)} if weight else {})}
        given = {n: floats(*s) if kind == "float" else RNG.integers(0, 255, s, np.uint8) for n, s in shapes.items()}
        assert length.evaluate({"S": size}) == -(-size // stride)
        made = run(given)
        if stride <= kernel:  # ONNX Runtime fails if a stride larger than the kernel drops elements
            assert_as_runtime(proto, given, made)
        report = answers(import_onnx(proto, dims={"S": size}), given)
        for got, wanted in zip(made, report, strict=True):
            np.testing.assert_allclose(got["y"], wanted["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["Conv", "ConvInteger"])
def test_automatic_padding_of_a_symbolic_kernel(operator: str) -> None:
    kind = "float" if operator == "Conv" else "uint8"
    proto = model(
        f"({kind}[1,2,9] x, {kind}[3,2,K] w) => ({'float' if operator == 'Conv' else 'int32'} y)",
        f'y = {operator}<auto_pad = "SAME_UPPER">(x, w)',
    )
    for k in (1, 2, 3, 4):
        given = {"x": RNG.integers(0, 255, (1, 2, 9)), "w": RNG.integers(0, 255, (3, 2, k))}
        found = same_as_runtime(proto, {n: x.astype("float32" if kind == "float" else kind) for n, x in given.items()})
    assert str(found.graph.main.outputs["y"].type).endswith("[1, 3, 9]")


def test_automatic_padding_that_sizes_do_not_tell_is_refused_with_what_to_say() -> None:
    proto = model(
        "(float[1,2,S] x, float[3,2,K] w) => (float y)", 'y = Conv<auto_pad = "SAME_UPPER", strides = [2]>(x, w)'
    )
    with pytest.raises(UnsupportedOnnx) as caught:
        import_onnx(proto)
    assert "auto_pad of windows with span K and stride 2, over an axis of size S" in caught.value.what
    assert "node 0 making y (Conv)" in str(caught.value)
    assert str(caught.value.hint).startswith("numbers: treadle.compile(..., K=8, S=8), or dims=")
    import_onnx(proto, dims={"K": 8, "S": 8})
    import_onnx(proto, dims={"K": 2})


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("kernel_shape = [3], ceil_mode = 1", None),
        ("kernel_shape = [3], pads = [3, 0]", "padding must be from 0 to 2"),
        ("kernel_shape = [0]", "kernel_shape must have positive sizes, but is [0]"),
        ("kernel_shape = [9]", "a window spans 9 elements"),
        ("kernel_shape = [2, 2]", "a kernel of 2 axes"),
        ("kernel_shape = [2], strides = [0]", "strides [0]"),
        ("kernel_shape = [2], pads = [0, 0, 0]", "pads [0, 0, 0]"),
        ('kernel_shape = [2], auto_pad = "BOTH"', "unknown auto_pad 'BOTH'"),
    ],
)
def test_windows_that_do_not_fit_are_refused_by_name(form: str, why: str | None) -> None:
    proto = model("(float[1,2,8] x) => (float y)", f"y = MaxPool<{form}>(x)")
    if why is None:
        import_onnx(proto)
        return
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto)
    assert why in caught.value.what
    assert "MaxPool" in str(caught.value)


def test_the_places_of_greatest_elements_are_refused() -> None:
    proto = model("(float[1,2,8] x) => (float y, int64 i)", "y, i = MaxPool<kernel_shape = [2]>(x)")
    with pytest.raises(UnsupportedOnnx, match="the indices of the maxima"):
        import_onnx(proto)


# -- resize --------------------------------------------------------------------------------------------------------

PLACES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_a_resize_to_sizes_of_another_input(mode: str, places: str) -> None:
    """The other axes are symbols, like the resized axis."""
    body = f"""
        end = Shape<start = 2>(like)
        start = Shape<end = 2>(x)
        sizes = Concat<axis = 0>(start, end)
        y = Resize<mode = "{mode}", coordinate_transformation_mode = "{places}">(x, , , sizes)
    """
    proto = model("(float[B,2,H,W] x, float[B,3,G,V] like) => (float y)", body, opset=19)
    shapes = (((5, 4), (3, 8)), ((1, 6), (4, 1)), ((3, 3), (7, 3)))
    given = [{"x": floats(2, 2, *shape), "like": floats(2, 3, *like)} for shape, like in shapes]
    found = same_as_runtime(proto, *given, tolerance=1e-5)
    assert str(found.graph.main.outputs["y"].type) == "f32[B, 2, G, V]"


@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
def test_a_resize_by_a_scale_of_a_symbolic_axis(scale: float, nearest: str) -> None:
    body = f"""
        scales = Constant<value_floats = [1.0, 1.0, {scale}]>()
        y = Resize<nearest_mode = "{nearest}", coordinate_transformation_mode = "asymmetric">(x, , scales)
        z = Resize<mode = "linear">(x, , scales)
    """
    proto = model("(float[B,2,W] x) => (float y, float z)", body, opset=18)
    same_as_runtime(proto, *({"x": floats(1, 2, width)} for width in (2, 5, 8)), tolerance=1e-5)


def test_a_resize_that_needs_sizes_says_so() -> None:
    body = 's = Constant<value_floats = [1.0, 1.0, 2.0]>() y = Resize<mode = "cubic">(x, , s)'
    proto = model("(float[B,2,W] x) => (float y)", body)
    with pytest.raises(UnsupportedOnnx) as caught:
        import_onnx(proto)
    assert caught.value.what == "Resize: mode cubic from an axis of size W to 2*W is not supported"
    assert isinstance(caught.value.hint, Hint)
    assert "--set W=8" in caught.value.hint.command
    assert "W=8" in caught.value.hint
    import_onnx(proto, dims={"W": 8})


# -- borders and slices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
def test_padding_of_a_symbolic_axis_with_its_own_elements(mode: str) -> None:
    body = f'p = Constant<value_ints = [0, 2, 0, 1]>() y = Pad<mode = "{mode}">(x, p)'
    proto = model("(float[B,S] x) => (float y)", body, opset=19)
    same_as_runtime(proto, *({"x": floats(2, size)} for size in (3, 4, 7)))


@pytest.mark.parametrize(
    "form",
    [
        "axes = [1, 2], starts = [1, -2], ends = [3, 2147483647]",
        "starts = [0, 1], ends = [9, -1]",
        "axes = [2], starts = [-9], ends = [2]",
    ],
)
def test_a_slice_whose_cuts_are_attributes(form: str) -> None:
    """Before opset 10, the bounds of Slice are attributes."""
    same_as_runtime(model("(float[2,4,5] x) => (float y)", f"y = Slice<{form}>(x)", opset=9), {"x": floats(2, 4, 5)})


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_elements_are_gathered_from_the_beginning_of_longer_axes(axis: int) -> None:
    proto = model("(float[3,4,5] x, int64[2,3,2] i) => (float y)", f"y = GatherElements<axis = {axis}>(x, i)")
    same_as_runtime(proto, {"x": floats(3, 4, 5), "i": RNG.integers(-3, 3, (2, 3, 2))})


@pytest.mark.parametrize("opset", [11, 12, 13, 18])
@pytest.mark.parametrize(
    "operator", ["Softmax", "LogSoftmax", "Hardmax", "ArgMax", "ArgMin", "Flatten", "LpNormalization"]
)
def test_an_axis_that_a_node_leaves_out(operator: str, opset: int) -> None:
    """The default of the operator's version: the last axis for Softmax and its kin from opset 13 on, else the second.

    No two of the sizes are equal, so that each axis gives a different result.
    """
    made = "int64 y" if operator.startswith("Arg") else "float y"
    same_as_runtime(model(f"(float[2,3,4] x) => ({made})", f"y = {operator}(x)", opset=opset), {"x": floats(2, 3, 4)})
