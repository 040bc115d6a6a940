"""Nodes that violate their operator's specification, or are an unsupported case of it, are refused by name."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.onnx_models import model
from treadle.frontends.onnx_import.importer import UnsupportedOnnx, import_onnx
from treadle.ir.errors import FrontendError

X = "float[2,3,4] x"
MALFORMED: list[tuple[str, str, str]] = [  # inputs, body, the violation
    (X, "s = Constant<value_ints = [-1, -1]>() y = Reshape(x, s)", "more than one -1 in the shape"),
    (
        X,
        "s = Constant<value_ints = [2, 3, 4, 0]>() y = Reshape(x, s)",
        "the shape has 0 at 3, but the operand has rank 3",
    ),
    (X, "s = Constant<value_ints = [-2, 12]>() y = Reshape(x, s)", "a negative size: -2"),
    (X, "y = Flatten<axis = 4>(x)", "there is no axis 4 in a tensor of rank 3"),
    (X, "s = Constant<value_ints = [1]>() y = Squeeze(x, s)", "dimension 1 is 3, not 1"),
    (X, "s = Constant<value_ints = [3]>() y = Squeeze(x, s)", "there is no axis 3 in a tensor of rank 3"),
    (X, "s = Constant<value_ints = [1, -4]>() y = Unsqueeze(x, s)", "an axis is named twice in (1, -4)"),
    (X, "y = Transpose<perm = [0, 1, 1]>(x)", "perm [0, 1, 1] is not a permutation of 3 axes"),
    (X, "s = Constant<value_ints = [2, 2]>() y = Tile(x, s)", "2 repeats do not fit rank 3"),
    (X, "y, z = Split<num_outputs = 3>(x)", "3 parts do not fit 2 outputs"),
    (X, "s = Constant<value_ints = [1, 1]>() y = Split(x, s)", "2 parts do not fit 1 outputs"),
    (X, "s = Constant<value_ints = [1, 2]>() y, z = Split(x, s)", "parts with a sum of 3 do not fit an axis of size 2"),
    (X, "s = Constant<value_ints = [1, 0]>() y, z = Split(x, s)", "parts with a sum of 1 do not fit an axis of size 2"),
    (
        X,
        "s = Constant<value_ints = [0, 0]>() e = Constant<value_ints = [1]>() y = Slice(x, s, e)",
        "starts, ends, axes and steps differ in length",
    ),
    (
        X,
        "s = Constant<value_ints = [0]>() e = Constant<value_ints = [1]>() y = Slice(x, s, e, s, s)",
        "a step must not be 0",
    ),
    (X, "p = Constant<value_ints = [1, 1]>() y = Pad(x, p)", "2 pads do not fit 3 axes"),
    (X, 'p = Constant<value_ints = [0, 0, 1, 0, 0, 1]>() y = Pad<mode = "mirror">(x, p)', "unknown mode 'mirror'"),
    (X, "y = Gemm(x, x)", "the operands must have rank 2"),
    (X, 'y = Einsum<equation = "abc,abc->a">(x)', "the equation 'abc,abc->a' does not fit 1 operands"),
    ("float[2,3] x", 'y = Einsum<equation = "aa->a">(x)', "the axes of a diagonal differ in size"),
    ("float[4] x", "y = Trilu(x)", "the operand must have rank 2 or more"),
    ("float[3,3] x, int64[2] k", "y = Trilu(x, k)", "k must be a scalar"),
    ("float[3,3] x", "k = Constant<value_ints = [0, 1, 2]>() y = Trilu(x, k)", "k must be a scalar"),
    ("float[4] x", "y = GlobalMaxPool(x)", "x must be [b, c, ...], but has rank 1"),
    ("float[1,2,8] x", "y = LpPool<kernel_shape = [2], p = 0>(x)", "p is 0"),
    ("float[4] x", "y = EyeLike(x)", "the operand must have rank 2"),
    (X, "y = Concat<axis = 3>(x, x)", "there is no axis 3 in a tensor of rank 3"),
    (
        "float[2,3] x, uint8[3] z",
        "s = Constant<value_floats = [1.0, 2.0]>() y = QuantizeLinear(x, s)",
        "2 scales do not fit an axis of 3",
    ),
    (
        "float[2,4] x, float[2,1] s",
        "y = QuantizeLinear(x, s)",
        "scales of shape [2, 1] do not fit blocks of 0",
    ),
    (X, "s = Constant<value_ints = [2, 3]>() y = Resize(x, , , s)", "2 sizes do not fit 3 axes"),
    (X, "s = Constant<value_floats = [1.0, 2.0]>() y = Resize(x, , s)", "scales [1.0, 2.0] do not fit 3 axes"),
    (
        X,
        "s = Constant<value_floats = [1.0, 1.0, -2.0]>() y = Resize(x, , s)",
        "scales [1.0, 1.0, -2.0] do not fit 3 axes",
    ),
    (
        X,
        's = Constant<value_ints = [2, 3, 8]>() y = Resize<coordinate_transformation_mode = "whole">(x, , , s)',
        "unknown coordinate_transformation_mode 'whole'",
    ),
    (
        X,
        's = Constant<value_ints = [2, 3, 8]>() y = Resize<nearest_mode = "far">(x, , , s)',
        "unknown nearest_mode 'far'",
    ),
    (
        "float[2,N] x",
        's = Constant<value_floats = [1.0, 2.0]>() y = Resize<nearest_mode = "far">(x, , s)',
        "unknown nearest_mode 'far'",
    ),
    (
        "float[2,3,8] x, float[8,23] w",
        "y = com.microsoft.Attention<num_heads = 2>(x, w)",
        "widths [7, 7, 7] do not fit a weight of 23 columns",
    ),
    (
        X,
        "y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x)",
        "there is neither a value nor packed keys and values",
    ),
    (X, "y = com.microsoft.MultiHeadAttention<num_heads = 3>(x, x, x)", "a width of 4 does not split into 3 heads"),
    (X, "y = Constant<value_int = 1, value_float = 1.0>()", "must have one attribute, but has 2"),
    (
        X,
        "s = Constant<value_ints = [2]>() y = ConstantOfShape<value = int64[2] {1, 2}>(s)",
        "the value must be one element",
    ),
    (
        X,
        "a = Constant<value_float = 1.0>() c = Constant<value_float = 0.0>() y = Range(a, a, c)",
        "start, limit and delta must be finite, and delta not zero",
    ),
    ("float[2,3] x, int64[2,3] i", "y = GatherND(x, i)", "indices of 3 axes do not fit rank 2"),
    (
        "float[1,1,4,4] x, float[1,1,3,3] w",
        "y = Conv<kernel_shape = [2, 3]>(x, w)",
        "kernel_shape differs from the kernel shape of the weight",
    ),
    (
        "float[1,1,4,4] x, float[1,1,3,3] w",
        "y = ConvTranspose<output_padding = [1]>(x, w)",
        "output_padding or output_shape does not fit 2 axes",
    ),
    (
        "float[2,3,8] x, int64[2,3] i, float[9,0] c",
        "y = com.microsoft.RotaryEmbedding(x, i, c, c)",
        "the number of heads is unknown without num_heads or rotary_embedding_dim",
    ),
    (
        "float[2,3,8] x, int32[2] r",
        "n = Constant<value_int = 4>() m = Cast<to = 6>(n) "
        "y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(x, x, x, , , r, m)",
        "a past length needs a past",
    ),
    (
        "float[2,3,8] x, int32[2] r, int32 n",
        "y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2, causal = 2>(x, x, x, , , r, n)",
        "causal must be 1, or 0 without a window, but is 2 with a window of -1",
    ),
    (
        "float[2,3,0] x, int32[2] r, int32 n",
        "y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(x, , , , , r, n)",
        "the packed width does not split into heads",
    ),
]
NOT_TAKEN: list[tuple[str, str, str]] = [  # inputs, body, the case
    (
        "int64 x",
        "z = Constant<value_int = 0>() n = Constant<value_int = 9>() y = Range(z, n, z)",
        "a step of 0 is not supported",
    ),
    (
        "float[0,3] x",
        's = Constant<value_ints = [2, 3]>() y = Resize<keep_aspect_ratio_policy = "not_larger">(x, , , s)',
        "an axis of size 0 is not supported",
    ),
    (
        "float[2,3,8] x",
        "o, a, b, c = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x) y = Neg(c)",
        "the index of a cache, and scores as an output, are not supported",
    ),
    (
        "uint8[2,3] x, float[2,1] s, uint8 z, float t, uint8[3,2] w",
        "y = QLinearMatMul(x, s, z, w, t, z, t, z)",
        "scales of more than one axis are not supported",
    ),
    ("float[2,N] x", "s = Shape(x) y = Pad(x, s, , s)", "s must not depend on a symbolic size"),
    ("int64[2,3] x", "y = ReduceMean<keepdims = 0>(x)", "integers are not supported"),
    ("float[65] x", "y = ReduceProd(x)", "an axis of more than 64 elements is not supported"),
    ("float x", "y = Softmax(x)", "a scalar is not supported"),
    (X, "y = LpNormalization<p = 3>(x)", "order 3 is not supported"),
    ("int32[2,3] x, int32[3,2] z", "y = Gemm<alpha = 2.0>(x, z)", "integers with alpha or beta are not supported"),
    (X, 'y = Einsum<equation = "...a->a">(x)', "an equation that sums over `...` is not supported"),
    (
        "float[N,3] x",
        "s = Constant<value_ints = [4, -1]>() y = Reshape(x, s)",
        "cannot infer -1 in [4, -1], of 3*N elements",
    ),
    ("float[N,3] x", "s = Constant<value_ints = [0]>() y = Squeeze(x, s)", "dimension 0 is N, and must be 1"),
    ("float[N] x", "y, z = Split(x)", "an axis of size N cannot be split into 2 equal parts"),
    (
        "float[0,2] x",
        'p = Constant<value_ints = [1, 0, 0, 0]>() y = Pad<mode = "edge">(x, p)',
        "of an empty axis is not supported",
    ),
    (
        X,
        's = Constant<value_ints = [2, 3, 8]>() y = Resize<mode = "area">(x, , , s)',
        "mode area of f32 is not supported",
    ),
    (X, "s = Constant<value_ints = [2, 3, 0]>() y = Resize(x, , , s)", "an axis of 4 cannot be resized to 0"),
    (
        "float[2,N] x",
        "s = Constant<value_floats = [1.0, 0.6]>() y = Resize(x, , s)",
        "an axis of size N cannot be scaled by 0.6000000238418579",
    ),
    (X, "y = com.microsoft.FusedMatMul<transBatchA = 1>(x, x)", "transposed batch axes are not supported"),
    (
        "float[2,8] x, uint8[4,1,4] w, float[4] s",
        "y = com.microsoft.MatMulNBits<bits = 4, block_size = 8, K = 8, N = 4>(x, w, s)",
        "4-bit weights in blocks of 8 are not supported",
    ),
    (
        "float[2,32] x, uint8[4,1,16] w, float[4] s, uint8[4] z, int32[32] g",
        "y = com.microsoft.MatMulNBits<bits = 4, block_size = 32, K = 32, N = 4>(x, w, s, z, g)",
        "g_idx (a group index) is not supported",
    ),
    (
        "float[2,3,4] x, float[4] w",
        "n, m = com.microsoft.SkipLayerNormalization(x, x, w) y = Add(n, m)",
        "its statistics are not supported as outputs",
    ),
    (
        "float[2,3,4] x, float[4] w",
        "y = com.microsoft.SimplifiedLayerNormalization<axis = 1>(x, w)",
        "several axes, another precision, and its statistics as outputs are not supported",
    ),
    (
        "float[2,3,8] x, int64[2,3] i, float[9,2] c",
        "y = com.microsoft.RotaryEmbedding<num_heads = 2, scale = 0.5>(x, i, c, c)",
        "packed batches and a scale are not supported",
    ),
    (
        "float[2,3,8] x, int32[5] m",
        "y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x, , m)",
        "the starts and ends of packed sequences are not supported",
    ),
    (
        "float[2,3,8] x, int32[2,4] m",
        "y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x, , m)",
        "a mask of shape [2, 4] is not supported",
    ),
    ("uint64[3] x", "y = Pow(x, x)", "powers of uint64 are not supported"),
    (X, 's = Constant<value_strings = ["a"]>() y = Identity(s)', "value_strings is not supported"),
    (
        X,
        "r = Constant<value_float = 0.5>() m = Constant<value_int = 1>() t = Cast<to = 9>(m) y = Dropout(x, r, t)",
        "training mode is not supported: it draws random numbers",
    ),
    (
        X,
        "r = Constant<value_floats = [0.0, 1.0]>() s = Constant<value_ints = [2, 3, 8]>() "
        'y = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(x, r, , s)',
        "a region of interest is not supported",
    ),
    (
        "float[2,3,8] x, float[8,24] w",
        "y = com.microsoft.Attention<num_heads = 2, do_rotary = 1>(x, w)",
        "rotary positions, and past and present in one buffer, are not supported",
    ),
    (
        "float[2,3,8] x, int32[2] r, int32 n",
        'y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2, k_quant_type = "PER_TENSOR">'
        "(x, x, x, , , r, n)",
        "a quantized cache is not supported",
    ),
    (
        "float[2,3,8] x, int32[2] r, int32 n, float[2] h",
        "y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(x, x, x, , , r, n, , , , , h)",
        "a sink is not supported",
    ),
]


def refused(inputs: str, body: str) -> FrontendError:
    proto = model(f"({inputs}) => (float y)", body)
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto)
    return caught.value


@pytest.mark.parametrize(("inputs", "body", "why"), MALFORMED, ids=[body for _, body, _ in MALFORMED])
def test_a_node_that_breaks_its_specification(inputs: str, body: str, why: str) -> None:
    error = refused(inputs, body)
    assert not isinstance(error, UnsupportedOnnx)
    assert why in error.what
    assert ", opset " in (error.within or "")


@pytest.mark.parametrize(("inputs", "body", "why"), NOT_TAKEN, ids=[body for _, body, _ in NOT_TAKEN])
def test_a_case_that_is_not_taken(inputs: str, body: str, why: str) -> None:
    error = refused(inputs, body)
    assert isinstance(error, UnsupportedOnnx)
    assert error.what.endswith(why)
    assert error.op in body
    if " N" in why:
        assert "dims={'N': 8} of import_onnx" in str(error.hint)


OPSETS: list[tuple[int, str, str, str]] = [  # opset, inputs, body, the refusal
    (23, X, "y = Attention<q_num_heads = 2>(x, x, x)", "operands of rank 3 need q_num_heads and kv_num_heads"),
    (
        23,
        "float[1,2,3,4] x, bool[3,2] m",
        "y = Attention(x, x, x, m)",
        "a mask of 2 keys does not fit 3 keys",
    ),
    (
        23,
        "float[2,3,8] x, float[9,1] c, int64[2,3] i",
        "y = RotaryEmbedding<num_heads = 2>(x, c, c, i)",
        "caches of 1 and 1 columns do not fit 4 dimensions",
    ),
    (20, X, 'y = Gelu<approximate = "erf">(x)', "unknown approximate 'erf'"),
    (
        24,
        "float[2,3,4] x, float[1,3,4] u",
        "y = TensorScatter<axis = 0>(x, u)",
        "the batch axis cannot be written along",
    ),
    (
        21,
        "float[2,3] x, float s, uint8 z",
        "y = QuantizeLinear<output_dtype = 3>(x, s, z)",
        "output_dtype differs from the zero",
    ),
    (11, X, "y = Unsqueeze(x)", "the axes are missing"),
    (
        18,
        "float[1,1,8] x, float[1,1,K] w",
        "y = Conv<kernel_shape = [3]>(x, w)",
        "kernel_shape is [3], but the weight's kernel has shape [K]",
    ),
    (18, "float[N,3] x", "y = ReduceProd(x)", "the size of an axis is N, and must be a number"),
    (
        18,
        "float[1,1,N] x, float[1,1,3] w",
        "y = ConvTranspose<strides = [2], output_shape = [7]>(x, w)",
        "is negative for some sizes",
    ),
    (
        18,
        "float[2,N,8] x, int32[2] r",
        "n = Constant<value_int = 4>() m = Cast<to = 6>(n) "
        "y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(x, x, x, , , r, m)",
        "N queries of 4 positions: it is unknown if this is a prompt",
    ),
    (
        18,
        "float[2,3,8] x, int32[2] r",
        "n = Constant<value_ints = [3, 3]>() m = Cast<to = 6>(n) "
        "y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(x, x, x, , , r, m)",
        "input 6 must have one element",
    ),
]


@pytest.mark.parametrize(("opset", "inputs", "body", "why"), OPSETS, ids=[body for _, _, body, _ in OPSETS])
def test_refusals_of_an_opset(opset: int, inputs: str, body: str, why: str) -> None:
    proto = model(f"({inputs}) => (float y)", body, opset=opset)
    with pytest.raises(FrontendError) as caught:
        import_onnx(proto)
    assert why in caught.value.what


def test_an_attribute_must_come_from_the_function_that_it_refers_to() -> None:
    proto = model(f"({X}) => (float y)", "y = Softmax<axis = 1>(x)")
    proto.graph.node[0].attribute[0].ref_attr_name = "axis"
    with pytest.raises(FrontendError, match="attribute axis refers to a function's attribute that does not exist"):
        import_onnx(proto)


def test_a_function_is_called_with_no_more_inputs_than_it_has() -> None:
    more = '<domain: "here", opset_import: ["": 18]> f (x) => (y) { y = Exp(x) }'
    with pytest.raises(FrontendError, match="function f takes 1 inputs"):
        import_onnx(model(f"({X}) => (float y)", "y = here.f(x, x)", more=more))
