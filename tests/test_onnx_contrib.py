"""Operators of ONNX Runtime's own domain, and ONNX's Attention, agree with ONNX Runtime and the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx
from onnx import helper, numpy_helper

from tests.fuzz.onnx_nodes.drawing import Case
from tests.fuzz.onnx_nodes.judging import gradient_outcome
from tests.onnx_models import answers, runtime
from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.notes import Imported

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(0)
B, S, N, D = 2, 5, 3, 4
"""Rows, positions, heads, and a head's size."""


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape, np.float32)


def below(limit: int, *shape: int, dtype: Any = np.int32) -> Array:
    return RNG.integers(0, limit, shape).astype(dtype)


def one_node(
    op: str,
    inputs: Sequence[Array | None],
    *,
    outputs: Sequence[str] = ("y",),
    stored: Sequence[int] = (),
    domain: str = "com.microsoft",
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return a model of one node, and its inputs; the inputs at the positions in `stored` are weights."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, list(outputs), name="n", domain=domain, **attributes)
    given = {n: x for i, (n, x) in enumerate(zip(names, inputs, strict=True)) if x is not None and i not in stored}
    weights = [
        numpy_helper.from_array(x, n)
        for n, x in zip(names, inputs, strict=True)
        if n and n not in given and x is not None
    ]
    taken = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given.items()
    ]
    made = [onnx.ValueInfoProto(name=o) for o in outputs if o]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", taken, made, weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), given


def check(
    proto: onnx.ModelProto, given: dict[str, Array], tolerance: float = 2e-6, *, gradients: bool = True
) -> Imported:
    """Compare both backends' results with ONNX Runtime's, relative to the largest number, and gradients with difference
    quotients.
    """
    wanted, found = runtime(proto, given), import_onnx(proto)
    for got in answers(found, given):
        for name, expected in wanted.items():
            scale = max(float(np.abs(expected).max(initial=0)), 1.0)
            assert got[name].shape == expected.shape
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)
    if gradients:
        judged = gradient_outcome(Case(proto.graph.node[0].op_type, proto, given), 0, edges=False)
        assert judged.verdict in ("same", "left"), judged.why
    return found


W = N * D
ANGLES = RNG.uniform(0, 3, (9, 2)).astype(np.float32)
PLAIN = [
    ("BiasGelu", [f(B, S, W), f(W)], {}),
    ("FastGelu", [f(B, S, W), f(W)], {}),
    ("FastGelu", [f(B, S, W)], {}),
    ("Gelu", [f(B, S, W)], {}),
    ("QuickGelu", [f(B, S, W)], {}),
    ("QuickGelu", [f(B, S, W)], {"alpha": 1.5}),
    ("SkipLayerNormalization", [f(B, S, W), f(B, S, W), f(W), f(W), f(W)], {"epsilon": 1e-5}),
    ("SkipLayerNormalization", [f(B, S, W), f(B, S, W), f(W)], {"outputs": ("y", "", "", "sum")}),
    ("SkipSimplifiedLayerNormalization", [f(B, S, W), f(B, S, W), f(W)], {"outputs": ("y", "", "", "sum")}),
    ("SimplifiedLayerNormalization", [f(B, S, W), f(W)], {"domain": ""}),
    (
        "EmbedLayerNormalization",
        [below(7, B, S), below(2, B, S), f(7, W), f(9, W), f(2, W), f(W), f(W), below(2, B, S)],
        {"outputs": ("y", "mask")},
    ),
    (
        "EmbedLayerNormalization",
        [below(7, B, S), below(2, B, S), f(7, W), f(9, W), f(2, W), f(W), f(W), None, below(9, B, S)],
        {"outputs": ("y", "mask")},
    ),
    ("EmbedLayerNormalization", [below(7, B, S), None, f(7, W), f(9, W), None, f(W), f(W)], {"outputs": ("y", "m")}),
    ("FusedMatMul", [f(2, 3, 4), f(2, 5, 4)], {"transB": 1, "alpha": 0.5}),
    ("FusedMatMul", [f(2, 4, 3), f(2, 4, 5)], {"transA": 1}),
    ("RotaryEmbedding", [f(B, S, W), below(9, B, S, dtype=np.int64), np.cos(ANGLES), np.sin(ANGLES)], {}),
    ("RotaryEmbedding", [f(B, N, S, D), np.array([2]), np.cos(ANGLES), np.sin(ANGLES)], {"interleaved": 1}),
    (
        "RotaryEmbedding",
        [f(B, S, N * 6), np.array([2]), np.cos(ANGLES), np.sin(ANGLES)],
        {"num_heads": N, "rotary_embedding_dim": 4},
    ),
    (
        "MatMulNBits",
        [f(3, 40), below(256, 8, 2, 16, dtype=np.uint8), f(16)],
        {"K": 40, "N": 8, "bits": 4, "block_size": 32},
    ),
    (
        "MatMulNBits",
        [f(3, 64), below(256, 8, 2, 16, dtype=np.uint8), f(16), below(256, 8, dtype=np.uint8)],
        {"K": 64, "N": 8, "bits": 4, "block_size": 32},
    ),
    (
        "MatMulNBits",
        [f(3, 40), below(256, 8, 2, 32, dtype=np.uint8), f(16), None, None, f(8)],
        {"K": 40, "N": 8, "bits": 8, "block_size": 32},
    ),
    (
        "MatMulNBits",
        [f(3, 64), below(256, 8, 2, 32, dtype=np.uint8), f(16), below(256, 8, 2, dtype=np.uint8)],
        {"K": 64, "N": 8, "bits": 8, "block_size": 32},
    ),
    (
        "MatMulNBits",
        [f(3, 64), below(256, 8, 2, 16, dtype=np.uint8), f(16), f(16)],
        {"K": 64, "N": 8, "bits": 4, "block_size": 32},
    ),
    (
        "DynamicQuantizeMatMul",
        [f(3, 6), below(256, 6, 5, dtype=np.uint8), np.array([0.02], np.float32), np.array([120], np.uint8), f(5)],
        {},
    ),
    (
        "MatMulIntegerToFloat",
        [
            below(256, 3, 6, dtype=np.uint8), below(256, 6, 5, dtype=np.uint8), np.array(0.02, np.float32),
            np.array(0.03, np.float32), np.array(7, np.uint8), np.array(120, np.uint8),
        ],
        {},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "attributes"), PLAIN, ids=[f"{i}-{op}" for i, (op, *_) in enumerate(PLAIN)])
def test_an_operator_of_the_runtime(op: str, inputs: list[Array | None], attributes: dict[str, Any]) -> None:
    proto, given = one_node(op, inputs, **attributes)
    check(proto, given)


MASKS = {
    "none": None,
    "keys": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
    "left, and a row without any": np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], np.int32),
    "lengths": np.array([5, 3], np.int32),
    "queries and keys": below(2, B, S, S),
}


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_of_one_weight(mask: str, causal: int) -> None:
    proto, given = one_node(
        "Attention", [f(B, S, 8), f(8, 3 * W), f(3 * W), MASKS[mask]], num_heads=N, unidirectional=causal
    )
    found = check(proto, given, gradients="row without" not in mask)  # next to -10000, quotients keep 8 digits
    assert "attention" in [node.op.name for node in found.graph.main.nodes]


def test_attention_with_a_past_and_a_bias() -> None:
    for causal in (0, 1):
        past = [f(B, S, 8), f(8, 3 * W), f(3 * W), np.ones((B, S + 2), np.int32), f(2, B, N, 2, D)]
        proto, given = one_node("Attention", past, outputs=("y", "present"), num_heads=N, unidirectional=causal)
        check(proto, given)
    proto, given = one_node(
        "Attention", [f(B, S, 8), f(8, 3 * W), f(3 * W), None, None, f(1, N, S, S)], num_heads=N, scale=0.3
    )
    check(proto, given)


MULTI_HEAD = {
    "self": [f(B, S, W), f(B, S, W), f(B, S, W)],
    "bias": [f(B, S, W), f(B, S, W), f(B, S, W), f(3 * W)],
    "keys": [f(B, S, W), f(B, S, W), f(B, S, W), None, MASKS["keys"]],
    "added": [f(B, S, W), f(B, S, W), f(B, S, W), None, None, f(B, N, S, S)],
    "cross": [f(B, S, W), f(B, 7, W), f(B, 7, W)],
    "cross, apart": [f(B, S, W), f(B, N, 7, D), f(B, N, 7, D)],
    "past": [f(B, 1, W), f(B, 1, W), f(B, 1, W), None, None, None, f(B, N, 4, D), f(B, N, 4, D)],
}


@pytest.mark.parametrize("kind", MULTI_HEAD)
def test_multi_head_attention(kind: str) -> None:
    outputs = ("y", "k", "v") if kind == "past" else ("y",)
    proto, given = one_node("MultiHeadAttention", MULTI_HEAD[kind], outputs=outputs, num_heads=N)
    check(proto, given)


@pytest.mark.parametrize("parts", [2, 3])
def test_packed_heads_are_those_that_stand_apart(parts: int) -> None:
    """ONNX Runtime runs these only on a GPU."""
    q, k, v = f(B, S, N, D), f(B, S, N, D), f(B, S, N, D)
    apart = [x.reshape(B, S, W) for x in (q, k, v)]
    packed = [apart[0], np.stack([k, v], axis=3), None] if parts == 2 else [np.stack([q, k, v], axis=3), None, None]
    bias = f(3 * W)
    proto, given = one_node("MultiHeadAttention", [*apart, bias], num_heads=N)
    wanted = runtime(proto, given)
    proto, given = one_node("MultiHeadAttention", [*packed, bias], num_heads=N)
    for got in answers(import_onnx(proto), given):
        np.testing.assert_allclose(got["y"], wanted["y"], rtol=0, atol=2e-6)


def grouped(
    queries: int,
    past: int,
    lengths: Sequence[int],
    packed: bool = False,
    positions: Array | None = None,
    bias: Array | None = None,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return grouped-query attention of 4 heads on 2, of size 16; lengths count the real tokens, the past included."""
    angles = RNG.uniform(0, 3, (12, 8)).astype(np.float32)
    cache: list[Array | None] = [f(2, 2, past, 16), f(2, 2, past, 16)] if past else [None, None]
    apart = [f(2, queries, 64), f(2, queries, 32), f(2, queries, 32)]
    inputs = [np.concatenate(apart, axis=2), None, None, *cache] if packed else [*apart, *cache]
    counts = [np.array(lengths, np.int32) - 1, np.array(queries + past, np.int32)]
    tables = [np.cos(angles), np.sin(angles)] if attributes.get("do_rotary") else [None, None]
    return one_node(
        "GroupQueryAttention",
        [*inputs, *counts, *tables, positions, bias],
        outputs=("y", "k", "v"),
        stored=(6,),
        num_heads=4,
        kv_num_heads=2,
        **attributes,
    )


@pytest.mark.parametrize(
    ("queries", "past", "attributes"),
    [
        (5, 0, {}),
        (5, 0, {"do_rotary": 1}),
        (5, 0, {"local_window_size": 2, "softcap": 2.0}),
        (1, 6, {"do_rotary": 1, "rotary_interleaved": 1}),
        (1, 6, {"do_rotary": 1, "scale": 0.5, "softcap": 3.0}),
        (1, 6, {"local_window_size": 3}),
        (5, 0, {"causal": 1}),
        (5, 0, {"causal": 0}),
        (1, 6, {"causal": 0, "do_rotary": 1}),
        (5, 0, {"packed": True}),
        (1, 6, {"packed": True, "do_rotary": 1}),
        (5, 0, {"do_rotary": 1, "positions": np.array([[3, 4, 5, 6, 7]] * 2)}),
        (5, 0, {"bias": f(2, 4, 5, 5)}),
        (1, 6, {"bias": f(1, 1, 1, 7)}),
    ],
)
def test_grouped_query_attention(queries: int, past: int, attributes: dict[str, Any]) -> None:
    proto, given = grouped(queries, past, [queries + past] * 2, **attributes)
    check(proto, given)


def test_grouped_query_attention_with_rows_of_their_own_lengths() -> None:
    """Cache contents past a row's end have no effect."""
    proto, given = grouped(1, 6, [7, 4], do_rotary=1)
    wanted = runtime(proto, given)
    for got in answers(import_onnx(proto), given):
        np.testing.assert_allclose(got["y"], wanted["y"], rtol=0, atol=2e-6)
        for name in ("k", "v"):
            for row, length in enumerate((7, 4)):
                np.testing.assert_allclose(got[name][row, :, :length], wanted[name][row, :, :length], rtol=0, atol=2e-6)


@pytest.mark.parametrize("causal", [0, 1])
def test_grouped_query_attention_looks_ahead_only_where_it_is_not_causal(causal: int) -> None:
    proto, given = grouped(5, 0, [5, 5], causal=causal)
    other = dict(given, x2=given["x2"].copy())
    other["x2"][:, -1] += 1
    for one, two in zip(answers(import_onnx(proto), given), answers(import_onnx(proto), other), strict=True):
        assert np.array_equal(one["y"][:, 0], two["y"][:, 0]) is bool(causal)


@pytest.mark.parametrize(
    ("position", "name"),
    [
        (11, "sink"),
        (12, "k_scale"),
        (13, "v_scale"),
        (14, "q_norm_weight"),
        (15, "k_norm_weight"),
        (16, "query_seqlens"),
    ],
)
def test_grouped_query_attention_refuses_inputs_that_it_does_not_take(position: int, name: str) -> None:
    proto, _ = grouped(5, 0, [5, 5])
    node = proto.graph.node[0]
    node.input.extend([""] * (position - len(node.input)))
    node.input.append("more")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(16, np.float32), "more"))
    with pytest.raises(UnsupportedOnnx, match=f"GroupQueryAttention.*{name}"):
        import_onnx(proto)


@pytest.mark.parametrize("attribute", ["smooth_softmax", "qk_output", "sliding_window_cache", "made_up"])
def test_grouped_query_attention_refuses_attributes_that_it_does_not_take(attribute: str) -> None:
    proto, _ = grouped(5, 0, [5, 5], **{attribute: 1})
    with pytest.raises(UnsupportedOnnx, match="GroupQueryAttention"):
        import_onnx(proto)


def test_the_length_of_a_cache_is_a_static_argument() -> None:
    proto, _ = grouped(1, 6, [7, 7])
    total = next(t for t in proto.graph.initializer if t.name == "x6")
    proto.graph.initializer.remove(total)
    proto.graph.input.append(helper.make_tensor_value_info("x6", onnx.TensorProto.INT32, []))
    with pytest.raises(Exception, match="the values of input x6 determine a shape"):
        import_onnx(proto)
    found = import_onnx(proto, static={"x6": 7})
    assert str(found.graph.main.outputs["k"].type) == "f32[2, 2, 7, 16]"


def test_a_past_that_may_be_longer_than_all_is_refused() -> None:
    proto, _ = grouped(1, 6, [7, 7])
    for name in ("x3", "x4"):
        cache = next(v for v in proto.graph.input if v.name == name)
        cache.type.tensor_type.shape.dim[2].dim_param = "P"
    with pytest.raises(UnsupportedOnnx, match="a past of P for 7 positions: it is unknown which is longer"):
        import_onnx(proto)


def test_cases_that_are_not_taken_are_refused() -> None:
    proto, _ = one_node("Attention", [f(B, S, 8), f(8, 3 * W), f(3 * W)], num_heads=N, do_rotary=1)
    with pytest.raises(UnsupportedOnnx, match="rotary positions") as caught:
        import_onnx(proto)
    assert caught.value.op == "com.microsoft.Attention"
    proto, _ = one_node("LongformerAttention", [f(B, S, 8)])
    with pytest.raises(UnsupportedOnnx, match="LongformerAttention"):
        import_onnx(proto)


# -- the Attention of ONNX's own opsets ----------------------------------------------------------------------------

CASES = [
    {},
    {"mask": f(S, S)},
    {"mask": f(B, 1, S, S)},
    {"mask": RNG.random((1, 4, S, S)) < 0.7},
    {"causal": 1},
    {"causal": 1, "mask": RNG.random((B, 1, 1, S)) < 0.7},
    {"past": 3, "causal": 1},
    {"past": 3, "mask": f(S, S + 3)},
    {"softcap": 2.0, "scale": 0.4},
    {"lengths": np.array([5, 2])},
    {"lengths": np.array([5, 3]), "causal": 1},
    {"mask": f(S, S - 2)},
    {"left": 2, "right": 1},
    {"left": 1, "causal": 1},
    {"left": 0, "right": 3, "causal": 1, "past": 3},
    {"right": 1, "lengths": np.array([5, 3])},
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("merged", [False, True])
def test_attention_is_what_its_function_body_says(case: int, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the fused form with the specification's own decomposition."""
    options = CASES[case]
    q, k = (f(B, S, 4 * D), f(B, S, 2 * D)) if merged else (f(B, 4, S, D), f(B, 2, S, D))
    past = options.get("past")
    cache = [f(B, 2, past, D), f(B, 2, past, D)] if past else [None, None]
    inputs = [q, k, f(*k.shape), options.get("mask"), *cache, options.get("lengths")]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {name: options[name] for name in ("softcap", "scale") if name in options}
    attributes |= {f"{side}_window_size": options[side] for side in ("left", "right") if side in options}
    attributes |= {"q_num_heads": 4, "kv_num_heads": 2} if merged else {}
    outputs = ("y", "k", "v") if past else ("y",)
    proto, given = one_node(
        "Attention", inputs, outputs=outputs, domain="", is_causal=options.get("causal", 0), **attributes
    )
    proto.opset_import[0].version = 25 if "left" in options or "right" in options else 24
    fused = import_onnx(proto)
    assert "attention" in [node.op.name for node in fused.graph.main.nodes]
    from treadle.frontends.onnx_import.operators import OPERATORS

    monkeypatch.delitem(OPERATORS, ("", "Attention"))
    apart = import_onnx(proto)
    assert "attention" not in [node.op.name for node in apart.graph.main.nodes]
    (wanted,) = answers(apart, given, ("numpy",))
    for got in answers(fused, given):
        for name, expected in wanted.items():
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=2e-6, err_msg=name)
