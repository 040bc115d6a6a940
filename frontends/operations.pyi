"""Every op as a function, from its class: operations.py as type checkers see it. Written by `make golden`.

`from ... import *` leaves out the ops that have the name of a layer.
"""

from collections.abc import Sequence

from treadle.frontends.dsl import Tensor, TensorLike
from treadle.ir.attention.attention_terms import Term
from treadle.ir.sizing.sizes import SizeLike
from treadle.ir.types import DType, i64

__all__ = [
    "abs",
    "activated_linear",
    "add",
    "add_layer_norm",
    "add_rms_norm",
    "append",
    "argmax",
    "attention_parts",
    "attention_with_probabilities",
    "average_pool",
    "cached_attention",
    "cast",
    "concat",
    "conv",
    "cos",
    "cross_entropy",
    "cumsum",
    "div",
    "divergence",
    "einsum",
    "embedding",
    "embedding_sum",
    "equal",
    "erf",
    "exp",
    "expand",
    "expm1",
    "fake_quantize",
    "floor",
    "floor_divide",
    "fold_windows",
    "gated_linear",
    "gather",
    "gelu",
    "gelu_tanh",
    "greater",
    "greater_equal",
    "index_add",
    "iota",
    "less",
    "less_equal",
    "log",
    "log1p",
    "log_softmax",
    "logical_and",
    "logical_not",
    "logical_or",
    "masked_softmax",
    "matmul",
    "max_pool",
    "maximum",
    "merge_parts",
    "minimum",
    "mod",
    "mul",
    "neg",
    "not_equal",
    "pad",
    "positions",
    "pow",
    "projections",
    "quick_gelu",
    "rearrange",
    "reciprocal",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_sum",
    "relu",
    "reshape",
    "rotary",
    "round",
    "round_to",
    "rsqrt",
    "sample_token",
    "scatter_add",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "size",
    "slice",
    "softmax",
    "softplus",
    "sqrt",
    "stop_gradient",
    "sub",
    "sum_pool",
    "take_along_axis",
    "tanh",
    "top_k",
    "where",
    "windows",
]

def abs(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = |x|; the gradient at 0 is 0"""

def activated_linear(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    /,
    *,
    activation: str = "gelu",
    weight_axes: str = "n k",
    to: DType | str | None = None,
    name: str | None = None,
) -> Tensor:
    """y[..., n] = act(sum_k x[..., k] weight[n, k] + bias[n])

    The first half of a feed-forward network (Vaswani et al. 2017, 3.3), a pooler, the first layer of a head.

    activation   act: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "tanh" or "sigmoid", as the op of that name
    weight_axes  "n k", as the weight of linear, or "k n", as the weight of matmul and in most ONNX files
    to           the dtype of the result and the bias, in which products are summed; None: the dtype of x and the weight
    """

def add(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x + y"""

def add_layer_norm(
    x: TensorLike,
    residual: TensorLike,
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    /,
    *,
    eps: float = 1e-05,
    name: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual,   y = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias

    Results: y, then the sum. The op is `layer_norm` (Ba, Kiros & Hinton 2016) of a residual sum, as
    SkipLayerNormalization in ONNX Runtime. The sum is rounded to its dtype before it is normalized.
    """

def add_rms_norm(
    x: TensorLike,
    residual: TensorLike,
    weight: TensorLike | None = None,
    /,
    *,
    eps: float = 1e-06,
    name: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual,   y = sum / sqrt(mean(sum^2) + eps) * weight

    Results: y, then the sum. The op is `rms_norm` (Zhang & Sennrich 2019) of a residual sum, as fused_add_rms_norm in
    vLLM. The sum is rounded to its dtype before it is normalized.
    """

def append(
    state: TensorLike,
    x: TensorLike,
    rows: TensorLike,
    start: TensorLike,
    /,
    *,
    axis: int,
    ring: bool = False,
    name: str | None = None,
) -> Tensor:
    """y = state, then y[rows[b], ..., start[b] + i, ...] = x[b, ..., i, ...] for every row b and position i

    state has slots along its first axis and a capacity C along `axis`. x has rows along its first axis, s new positions
    along `axis`, and otherwise the sizes of state. rows[b] is the slot of row b, start[b] the position of its first new
    element. In a ring, positions count modulo C.

    Two rows of one call never write into one slot. Without a ring start[b] + s <= C, in a ring s <= C. The reference
    raises GraphError for other operands; a backend refuses positions outside the state.
    """

def argmax(x: TensorLike, /, *, axis: int, keep: bool = False, name: str | None = None) -> Tensor:
    """y = the position of the greatest element along `axis`; the first position if several elements are equal

    keep   keep the axis as a dimension of size 1
    """

def attention(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    /,
    *operand: TensorLike | None,
    terms: Sequence[Term | str] = (),
    scale: float | None = None,
    softcap: float | None = None,
    start: SizeLike = 0,
    to: DType | str | None = None,
    name: str | None = None,
) -> Tensor:
    """out[b, h, i] = sum_j p[b, h, i, j] v[b, h, j],   p = softmax over the keys j that i may see of
    softcap(scale q[b, h, i] · k[b, h, j]) + biases        (Vaswani et al. 2017)

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, h, s, e]

    Query heads share key/value heads in order: with h = g r, head n uses head n // r (Ainslie et al. 2023). If a query
    may see no key, its result and its gradient are zeros.

    terms    masks and biases, in any order; their operands follow v in the order of the terms
    scale    None: 1/sqrt(d)
    softcap  c: scores become c tanh(scores / c) before biases and masks (Gemma team 2024)
    start    the position of the first query, read by terms with positions: 0, unless the queries are a part of others
    to       the dtype of the result and the biases, in which scores and sums are computed; None: the dtype of q, k
             and v. If it is wider than v, weights may be rounded to v's dtype before they multiply v
    """

def attention_parts(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    offset: TensorLike,
    /,
    *operand: TensorLike | None,
    terms: Sequence[Term | str] = (),
    scale: float | None = None,
    softcap: float | None = None,
    name: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, max, sum = attention over some of a row's keys, and for each query the maximum m of its scores among them
    and the sum l of exp(score - m)        (Dao et al. 2022)

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e], offset i64[b] -> [b, h, s, e], [b, h, s], [b, h, s]

    Query i of a row has position i, key j of row b has position offset[b] + j, which may be below 0. Terms have the
    same meaning as in `attention`, at these positions; operands with an axis of keys have an element for each of these
    keys. For a query that may see none of the keys, out, max and sum are zeros, -inf and 0. If the keys are split in
    any way, `merge_parts` merges the parts to attention over all keys. Attributes are the same as in `attention`.
    """

def attention_with_probabilities(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    /,
    *operand: TensorLike | None,
    terms: Sequence[Term | str] = (),
    scale: float | None = None,
    softcap: float | None = None,
    start: SizeLike = 0,
    name: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out, p = attention(q, k, v), and its probabilities p, which are the weights of the values

    q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, h, s, e], [b, h, s, t]

    This op is for models that return the probabilities: p is stored as a whole, which `attention` never does. For a
    query that may see no key, the probabilities and the result are zeros. Operands and attributes are the same as in
    `attention`.
    """

def average_pool(
    x: TensorLike,
    /,
    *,
    kernel: Sequence[int],
    strides: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilations: Sequence[int] = (),
    name: str | None = None,
) -> Tensor:
    """y[..., i...] = the mean of the elements of x in the window at i

    Padding is not counted: a window without elements gives NaN. To count zeros around x (count_include_pad in
    frameworks), pad x with zeros. 16-bit floats are summed in f32.
    """

def cached_attention(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    rows: TensorLike,
    start: TensorLike,
    /,
    *operand: TensorLike | None,
    terms: Sequence[Term | str] = (),
    scale: float | None = None,
    softcap: float | None = None,
    ring: bool = False,
    name: str | None = None,
) -> Tensor:
    """out[b, h, i] = sum_j p[b, h, i, j] v[rows[b], h, j],   p = softmax over the keys j that i may see of
    softcap(scale q[b, h, i] · k[rows[b], h, j]) + biases: `attention` over a cache, in which each row has a slot

    q [b, h, s, d], k [R, g, C, d], v [R, g, C, e], rows i64[b], start i64[b] -> [b, h, s, e]

    Query i of row b has position start[b] + i, and key j of a slot has position j. With `ring`, key j has the position
    x that is congruent to j modulo C and among the last C positions that were written, start[b] + s - C <= x < start[b]
    + s, which include the queries' own; x < 0 is not a key. Terms have the same meaning as in `attention`, at these
    positions: padding keeps key positions below lengths[b]. Operands with an axis of keys (mask, bias, key_segments)
    have an element for each of a slot's C keys, by j.

    A slot is written up to the queries, or up to lengths[b]. Later positions are never seen, whatever they hold, so
    causal or padding must be among the terms. A query that may see no key gets zeros. Heads share keys as in
    `attention`. k and v may have another float dtype than q, for example 16 bits to halve the cache; they are cast when
    they are read. The gradient is the body's gradient.

    terms    masks and biases, in any order; their operands follow start in the order of the terms
    scale    None: 1/sqrt(d)
    softcap  c: scores become c tanh(scores / c) before biases and masks (Gemma team 2024)
    ring     True if slots are rings, which needs causal. A chunk of s queries sees all of a window(w) if
             w + s - 1 <= C; the chunk's earlier queries do not see a key whose position was overwritten
    """

def cast(x: TensorLike, /, *, to: DType | str, name: str | None = None) -> Tensor:
    """y = x in the dtype `to`

    Float to float rounds to nearest, ties to even. Float to integer drops the fraction; the result is undefined if the
    integer cannot hold it. A bool is 0 or 1, and a number is true unless it is 0. NumPy has no bf16: the reference
    rounds to bf16 and holds it in float32. A cast to a float dtype is linear up to rounding, so it may be applied to
    partial sums; a cast to an integer dtype may not.
    """

def concat(*parts: TensorLike, axis: int = -1, name: str | None = None) -> Tensor:
    """The parts concatenated along one axis. All parts have the same sizes along the other axes."""

def conv(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    /,
    *,
    strides: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilations: Sequence[int] = (),
    groups: int = 1,
    name: str | None = None,
) -> Tensor:
    """y[b, o, i...] = bias[o] + sum_{c, k...} x[b, c, i stride + k dilation - padding...] weight[o, c, k...]

    Cross-correlation over any number of spatial axes, which is called convolution in deep learning (Dumoulin & Visin
    2016). x is [b, c, *spatial], weight [o, c / groups, *kernel], y [b, o, *spatial].

    strides, dilations   one number per spatial axis; empty means 1
    padding              zeros before each spatial axis, then after each (ONNX's pads); half the number of values
                         pads both sides equally; empty means none. Causal: (dilation (k - 1), 0)
    groups               the number of groups; output group j reads input group j alone
    """

def cos(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = cos x, x in radians"""

def cross_entropy(x: TensorLike, target: TensorLike, /, *, ignored: int = -100, name: str | None = None) -> Tensor:
    """y = ln(sum of e^x over the last axis) - x[target], and 0 where the target is `ignored`

    This is the negative logarithm of the target's probability in softmax(x). 16-bit floats are computed in f32, and the
    result is rounded.
    """

def cumsum(
    x: TensorLike,
    /,
    *,
    axis: int,
    exclusive: bool = False,
    reverse: bool = False,
    name: str | None = None,
) -> Tensor:
    """y[i] = sum of x[j] over j <= i, along `axis`, for 16-bit floats accumulated in f32

    exclusive   sum over j < i: the result starts at 0
    reverse     sum over j >= i (or j > i): from the end. The result at i then reads elements after i, so the
                axis is whole and not scanned.
    """

def div(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x / y

    Floats only; for integers use `floor_divide`, or cast first.
    """

def divergence(x: TensorLike, teacher: TensorLike, /, *, temperature: float = 1.0, name: str | None = None) -> Tensor:
    """y = T^2 (sum of p (ln p - ln q) over the last axis), where p = softmax(teacher / T), q = softmax(x / T)

    The divergence of a student's distribution from its teacher's, at a temperature T (Hinton et al. 2015). With the
    factor T^2 its gradient is as large as the gradient of `cross_entropy` for any T. 16-bit floats are computed in f32,
    and the result is rounded.
    """

def einsum(*x: TensorLike | str, equation: str | None = None, name: str | None = None) -> Tensor:
    """z = the product of the operands, summed over all axes that the result does not name

    equation   "b h s d, b h t d -> b h s t": one name per axis, separated by spaces, as in einops (Rogozhnikov
               2022); `...` stands for leading dimensions that broadcast. A name occurs only once in an operand:
               diagonals are not supported.
    """

def embedding(table: TensorLike, indices: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y[..., d] = table[indices[...], d]"""

def embedding_sum(*operand: TensorLike, tables: int = 2, name: str | None = None) -> Tensor:
    """y[..., d] = sum_n table_n[indices_n[...], d]        (BERT, Devlin et al. 2019: token, position and segment)

    The operands are the tables [v_n, d], then the indices into each table, in the same order. Indices broadcast:
    positions have the shape [s], and tokens [b, s]. The sum is taken in the order of the tables.

    tables  the number of tables, 2 to 8
    """

def equal(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = (x = y); false where either is NaN"""

def erf(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = 2/sqrt(pi) * integral from 0 to x of e^(-t^2) dt        (see treadle.ir.ops.error_function)"""

def exp(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = e^x"""

def expand(x: TensorLike, /, *, shape: Sequence[SizeLike | None], name: str | None = None) -> Tensor:
    """y[..., i, ...] = x[..., 0, ...]: x repeated along dimensions of size 1 and new leading ones

    shape   the result's sizes. If a size is None or equals the size of x, the dimension is kept and its axis mapped.
            For any other size, the dimension of x must have size 1 or be missing; it becomes a generated axis.
    """

def expm1(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = e^x - 1, to full precision near 0, where e^x rounds to 1"""

def fake_quantize(
    x: TensorLike,
    scale: TensorLike,
    zero: TensorLike,
    /,
    *,
    least: int = -128,
    greatest: int = 127,
    name: str | None = None,
) -> Tensor:
    """y = scale (clip(round(x / scale) + zero, least, greatest) - zero), as QuantizeLinear and DequantizeLinear compute

    The result has one of greatest - least + 1 values, the steps of an integer type: quantization with a given scale and
    zero point, in the dtype of x. No gradient flows.

    scale, zero      the distance of two steps, and the integer that stands for 0
    least, greatest  the range of the integers
    """

def floor(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = the greatest integer that is not above x; no gradient flows"""

def floor_divide(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = floor(x / y)

    Rounds towards minus infinity, also for integers, as NumPy, Python and torch.floor_divide do (C truncates). An
    integer divided by zero is undefined. The result is piecewise constant, so no gradient flows.
    """

def fold_windows(
    x: TensorLike,
    /,
    *,
    axis: int,
    size: SizeLike,
    stride: int = 1,
    dilation: int = 1,
    name: str | None = None,
) -> Tensor:
    """y[..., i stride + k dilation, ...] += x[..., i, ..., k]: windows added at their positions

    The op is the transpose of `windows`. Overlapping windows of 16-bit floats are added in f32.

    size   the size of the axis that the windows were taken from
    """

def gated_linear(
    x: TensorLike,
    gate: TensorLike,
    up: TensorLike,
    gate_bias: TensorLike | None = None,
    up_bias: TensorLike | None = None,
    /,
    *,
    activation: str = "silu",
    weight_axes: str = "n k",
    to: DType | str | None = None,
    name: str | None = None,
) -> Tensor:
    """y[..., n] = act(sum_k x[..., k] gate[n, k] + gate_bias[n]) * (sum_k x[..., k] up[n, k] + up_bias[n])

    Gated linear units: with "sigmoid" GLU (Dauphin et al. 2017), with "relu", "gelu", "silu" and "none" (the identity)
    ReGLU, GEGLU, SwiGLU and the bilinear layer (Shazeer 2020).

    activation   act: an activation that activated_linear accepts, or "none"
    weight_axes  of both weights: "n k", as the weight of linear, or "k n", as the weight of matmul
    to           the dtype of the result and the biases, in which products are summed; None: the dtype of x and the
                 weights
    """

def gather(x: TensorLike, indices: TensorLike, /, *, axis: int = 0, name: str | None = None) -> Tensor:
    """y[..., i..., ...] = x[..., indices[i...], ...]: slices of x along one axis, at indices of any rank"""

def gelu(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x Phi(x) = x/2 (1 + erf(x / sqrt 2)), Phi the normal distribution        (Hendrycks & Gimpel 2016)

    dy/dx = Phi(x) + x phi(x), phi the normal density
    """

def gelu_tanh(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        (Hendrycks & Gimpel 2016)"""

def greater(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = (x > y); false where either is NaN"""

def greater_equal(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = (x >= y); false where either is NaN"""

def index_add(
    target: TensorLike,
    indices: TensorLike,
    added: TensorLike,
    /,
    *,
    axis: int = 0,
    name: str | None = None,
) -> Tensor:
    """y = target, then y[..., indices[i...], ...] += added[..., i..., ...] for every i

    The op is the transpose of `gather`. If indices repeat, all their elements are added, 16-bit floats in f32.
    """

def iota(*, size: SizeLike, dtype: DType | str = i64, name: str | None = None) -> Tensor:
    """y[n] = n: the numbers from 0 to size - 1

    dtype   the dtype of y, an integer or a float
    """

def layer_norm(
    x: TensorLike,
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    /,
    *,
    eps: float = 1e-05,
    name: str | None = None,
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba, Kiros & Hinton 2016)

    Mean and variance are over the last axis, the variance divided by its size; 16-bit floats are computed in f32, and
    the result is rounded. With n the normalized x, r = 1/sqrt(...) and h = weight * dL/dy: dL/dx = r (h - mean(h) - n
    mean(h n))
    """

def less(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = (x < y); false where either is NaN"""

def less_equal(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = (x <= y); false where either is NaN"""

def linear(
    x: TensorLike,
    weight: TensorLike,
    bias: TensorLike | None = None,
    /,
    *,
    to: DType | str | None = None,
    name: str | None = None,
) -> Tensor:
    """y[..., n] = sum_k x[..., k] weight[n, k] + bias[n]

    The weight is [out, in], as in PyTorch checkpoints (torch.nn.functional.linear).

    to   the dtype of the result and the bias, in which products are summed; None: the dtype of x and the weight
    """

def log(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = ln x; -inf at 0, NaN below"""

def log1p(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = ln(1 + x), to full precision near 0, where 1 + x rounds to 1; -inf at -1, NaN below"""

def log_softmax(x: TensorLike, /, *, axis: int = -1, name: str | None = None) -> Tensor:
    """y = x - m - ln(sum of e^(x - m) over `axis`), where m = max of x

    16-bit floats are computed in f32, and the result is rounded.
    """

def logical_and(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x and y"""

def logical_not(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = not x"""

def logical_or(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x or y"""

def masked_softmax(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """softmax over the last axis, and zeros for a row that is -inf throughout

    These are the probabilities of attention, in which a query may see no key. If attention is lowered by its body, this
    is one op for which a backend may have a kernel. 16-bit floats are computed in f32, and the result is rounded.
    """

def matmul(x: TensorLike, y: TensorLike, /, *, to: DType | str | None = None, name: str | None = None) -> Tensor:
    """z[..., m, n] = sum_k x[..., m, k] y[..., k, n]

    Leading dimensions broadcast. A vector needs an explicit second axis: use rearrange, or einsum.

    to   the result's dtype, in which floats are summed; None: the dtype of x and y
    """

def max_pool(
    x: TensorLike,
    /,
    *,
    kernel: Sequence[int],
    strides: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilations: Sequence[int] = (),
    name: str | None = None,
) -> Tensor:
    """y[..., i...] = max_{k...} x[..., i stride + k dilation - padding...]; a NaN gives NaN

    Padding is ignored: a window without elements gives -inf, or the least integer. The first of equal maxima in the
    window gets the gradient, as in torch.max_pool2d.
    """

def maximum(x: TensorLike, y: TensorLike, /, *, ties: str = "even", name: str | None = None) -> Tensor:
    """z = max(x, y); a NaN in either gives NaN

    Where x = y, each operand gets half of the gradient, as in torch.maximum; `ties` can give all of it to one operand.
    """

def merge_parts(
    out: TensorLike,
    max: TensorLike,
    sum: TensorLike,
    /,
    *,
    name: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, max, sum of attention over all keys, from out, max and sum of attention over p parts of the keys
            (Dao et al. 2022, 2023)

    m = max_p m_p,   l = sum_p l_p exp(m_p - m),   out = sum_p out_p l_p exp(m_p - m) / l

    out [p, ..., e], max [p, ...], sum [p, ...] -> [..., e], [...], [...]

    The parts are results of `attention_parts`. They may be merged in any grouping: the result is a part again. For a
    query that sees no key in any part, out, max and sum are zeros, -inf and 0. 16-bit floats are computed in f32, and
    the results are rounded.
    """

def minimum(x: TensorLike, y: TensorLike, /, *, ties: str = "even", name: str | None = None) -> Tensor:
    """z = min(x, y); a NaN in either gives NaN

    Where x = y, each operand gets half of the gradient, as in torch.minimum; `ties` can give all of it to one operand.
    """

def mod(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x - floor(x / y) y

    The remainder of `floor_divide`. It has the sign of y, as in NumPy, Python and torch.remainder; in C it has the sign
    of x. An integer modulo zero is undefined.
    """

def mul(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x * y"""

def neg(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = -x"""

def not_equal(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = (x != y); true where either is NaN"""

def pad(
    x: TensorLike,
    /,
    *,
    axis: int,
    before: SizeLike = 0,
    after: SizeLike = 0,
    value: float = 0.0,
    name: str | None = None,
) -> Tensor:
    """x with `before` elements of `value` before it along one axis, and `after` elements after it

    value   a number that x's dtype can hold
    """

def positions(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y[..., i] = i: the position of each element of x along the last axis

    A position is the number of preceding elements, so the axis is scanned; in a generation step, positions continue
    from the row's past length. The op reads no element of x.
    """

def pow(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x^y: NaN for a negative x unless y is an integer

    dz/dx = y x^(y-1), and 0 where y = 0. dz/dy = x^y ln x; where x <= 0, ln x has no real value, and dz/dy is 0.
    """

def projections(
    x: TensorLike,
    /,
    *operand: TensorLike | None,
    count: int = 2,
    weight_axes: str = "n k",
    to: DType | str | None = None,
    name: str | None = None,
) -> tuple[Tensor, ...]:
    """y_i[..., n_i] = sum_k x[..., k] weight_i[n_i, k] + bias_i[n_i], for each i

    Query, key and value of an attention (Vaswani et al. 2017, 3.2.2), for example. Operands: x, then the weights, then
    the bias of each product; the bias is absent if a product has none. Each weight keeps its name and its axes, so that
    heads can be split. At run time there is one product with all weights concatenated, which a backend concatenates
    once, and the result of the product is split.

    count        the number of products, 2 to 16
    weight_axes  "n k", as the weight of linear, or "k n", as the weight of matmul
    to           the dtype of results and biases, in which products are summed; None: the dtype of x and the weights
    """

def quick_gelu(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x sigmoid(1.702 x)        (Hendrycks & Gimpel 2016; the activation of CLIP, Radford et al. 2021)"""

def rearrange(x: TensorLike, /, pattern: str, *, name: str | None = None) -> Tensor:
    """Split, permute and join axes: "b s (heads=12 d) -> b heads s d"        (einops, Rogozhnikov 2022)

    pattern   the axis rule itself. Every name occurs once on each side; `(h d)` is one dimension, h
              outermost; `1` is a dimension of size 1, added or dropped; `...` any leading dimensions. If a
              dimension is split, all its factors but one have a size in the pattern.
    """

def reciprocal(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = 1 / x"""

def reduce_max(
    x: TensorLike,
    /,
    *,
    axes: Sequence[int],
    keep: bool = False,
    ties: str = "even",
    name: str | None = None,
) -> Tensor:
    """y = max of x over `axes`; a NaN gives NaN

    The gradient is divided evenly among equal maxima, as in torch.amax; `ties` can give it to the first.
    """

def reduce_mean(x: TensorLike, /, *, axes: Sequence[int], keep: bool = False, name: str | None = None) -> Tensor:
    """y = (sum of x over `axes`) / (number of its terms)

    The mean of two parts together cannot be computed from their two means alone, so the axes are whole. The body
    contains the sum, for 16-bit floats in f32.
    """

def reduce_min(
    x: TensorLike,
    /,
    *,
    axes: Sequence[int],
    keep: bool = False,
    ties: str = "even",
    name: str | None = None,
) -> Tensor:
    """y = min of x over `axes`; a NaN gives NaN

    The gradient is divided evenly among equal minima, as in torch.amin; `ties` can give it to the first.
    """

def reduce_sum(x: TensorLike, /, *, axes: Sequence[int], keep: bool = False, name: str | None = None) -> Tensor:
    """y = sum of x over `axes`, accumulated in x's dtype, for 16-bit floats in f32"""

def relu(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = max(x, 0); the gradient at 0 is 0        (Nair & Hinton 2010)"""

def reshape(x: TensorLike, /, *, shape: Sequence[SizeLike], name: str | None = None) -> Tensor:
    """The elements of x, in row-major order, in another shape.

    The op is meant for importers. It does not relate the axes of x and y, so no axis can be followed through it. If the
    relation is known, use `rearrange`.

    shape   the result's sizes. Their product must equal the number of elements of x for all values of the symbols
    """

def rms_norm(
    x: TensorLike,
    weight: TensorLike | None = None,
    /,
    *,
    eps: float = 1e-06,
    name: str | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight        (Zhang & Sennrich 2019)

    The mean is over the last axis; 16-bit floats are computed in f32, and the result is rounded. With n the
    normalized x, r = 1/sqrt(...) and h = weight * dL/dy:   dL/dx = r (h - n mean(h n))
    """

def rotary(
    x: TensorLike,
    positions: TensorLike,
    frequencies: TensorLike,
    /,
    *,
    layout: str = "half",
    name: str | None = None,
) -> Tensor:
    """y_i = x_i cos a_i - x_j sin a_i,   y_j = x_j cos a_i + x_i sin a_i,   a_i = positions[b, s] frequencies[i]

    RoPE (Su et al. 2021). x [b, h, s, d], positions [b, s], frequencies [f] in radians per position. The first 2f of
    the d dimensions are rotated, in f pairs (i, j); the others are unchanged. Products of rotated queries and keys
    depend only on the difference of their positions. Angles are computed in the frequencies' dtype, which should be f32
    or wider for any dtype of x.

    layout  the dimensions of a pair: "half" (i, i + f), as Hugging Face and GPT-NeoX store heads, or "interleaved"
            (2i, 2i + 1), as the paper, Llama's own code and GGUF do

    With g = dL/dy:   dL/dx is g rotated back,   dL/da_i = sum over h of g_j y_i - g_i y_j
    """

def round(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = the integer nearest to x, the even one if two integers are equally near; no gradient flows"""

def round_to(x: TensorLike, /, format: str, *, saturate: bool = False, name: str | None = None) -> Tensor:
    """y = the number of a narrower float format nearest to x, ties to the even one, in the dtype of x

    format     a name of `FORMATS`
    saturate   numbers above the format's largest, including infinity, become the largest; otherwise they become inf or
               NaN, whichever the format has. A NaN stays NaN; in a format without NaN it becomes 0.

    The op equals a cast to the format and back. The gradient passes unchanged, as through a cast.
    """

def rsqrt(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x^(-1/2); inf at 0, NaN below"""

def sample_token(
    x: TensorLike,
    temperature: TensorLike,
    top_k: TensorLike,
    top_p: TensorLike,
    min_p: TensorLike,
    draw: TensorLike,
    /,
    *,
    name: str | None = None,
) -> Tensor:
    """y = an id drawn from softmax(x / temperature), restricted to the `top_k` greatest elements, to the smallest set
    whose probability reaches `top_p` (Holtzman et al. 2020), and to probabilities of at least `min_p` times the
    greatest one (Nguyen et al. 2024)

    The candidates are ordered, greatest first, and of equal ones the lower id first. y is the first candidate at which
    the running sum of probabilities is greater than `draw` times their total, so `draw`, which is uniform in [0, 1),
    determines the result. Without a temperature above 0, y is the greatest element; `top_k` of 0 keeps all. y is -1 if
    x has a NaN, or if its greatest element is infinite. 16-bit floats are computed in f32.
    """

def scatter_add(
    target: TensorLike,
    indices: TensorLike,
    added: TensorLike,
    /,
    *,
    axis: int = -1,
    name: str | None = None,
) -> Tensor:
    """y = target, then y[..., indices[..., i, ...], ...] += added[..., i, ...] for every i

    The op is the transpose of `take_along_axis`, and equals PyTorch's scatter_add. indices and added have the same
    shape: the rank of target, and its sizes except along the axis. If indices repeat, all their elements are added,
    16-bit floats in f32.
    """

def sigmoid(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = 1 / (1 + e^(-x))"""

def sign(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = 1, 0 or -1 where x is positive, zero or negative; no gradient flows"""

def silu(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x sigmoid(x)        (Hendrycks & Gimpel 2016; as swish, Ramachandran, Zoph & Le 2017)"""

def sin(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = sin x, x in radians"""

def size(*, value: SizeLike, dtype: DType | str = i64, name: str | None = None) -> Tensor:
    """y = the value of a size expression, a scalar: for example the divisor of a mean over a symbolic axis

    dtype   the dtype of y
    """

def slice(
    x: TensorLike,
    /,
    *,
    axis: int,
    start: SizeLike = 0,
    stop: SizeLike | None = None,
    stride: int = 1,
    name: str | None = None,
) -> Tensor:
    """y[..., i, ...] = x[..., start + i stride, ...] while start + i stride < stop

    start, stop   positions within the axis; a negative constant counts from the end, and a stop of None is
                  the end. They are not clamped: positions outside raise RuleError.
    stride        1 or more
    """

def softmax(x: TensorLike, /, *, axis: int = -1, name: str | None = None) -> Tensor:
    """y = e^(x - m) / sum of e^(x - m) over `axis`, where m = max of x

    NaN for a row that is -inf throughout; attention, with its masks, gives zeros there. Such a row has gradient 0, so
    that the gradient is finite if a `where` replaces the row. 16-bit floats are computed in f32, and the result is
    rounded.
    """

def softplus(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = ln(1 + e^x)        (Dugas et al. 2001)

    Computed as max(x, 0) + ln(1 + e^-|x|), which does not overflow. dy/dx = sigmoid(x), at 0 as well.
    """

def sqrt(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x^(1/2); NaN below 0"""

def stop_gradient(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = x, and no gradient flows, as through tensor.detach() in PyTorch

    If a graph is not differentiated, the default passes remove the op.
    """

def sub(x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x - y"""

def sum_pool(
    x: TensorLike,
    /,
    *,
    kernel: Sequence[int],
    strides: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilations: Sequence[int] = (),
    name: str | None = None,
) -> Tensor:
    """y[..., i...] = sum_{k...} x[..., i stride + k dilation - padding...]

    Padding counts as zeros. 16-bit floats are summed in f32.
    """

def take_along_axis(x: TensorLike, indices: TensorLike, /, *, axis: int = -1, name: str | None = None) -> Tensor:
    """y[..., i, ...] = x[..., indices[..., i, ...], ...]: elements of x along one axis

    The op equals NumPy's take_along_axis and PyTorch's gather. indices has the rank of x, and the sizes of x except
    along the axis.
    """

def tanh(x: TensorLike, /, *, name: str | None = None) -> Tensor:
    """y = tanh x"""

def top_k(x: TensorLike, /, *, k: int, axis: int = -1, name: str | None = None) -> tuple[Tensor, Tensor]:
    """values, indices = the k greatest elements along `axis`, greatest first, and their positions

    Equal elements are ordered by index, lower first. A NaN counts as greater than any number.
    """

def where(condition: TensorLike, x: TensorLike, y: TensorLike, /, *, name: str | None = None) -> Tensor:
    """z = x where the condition is true, else y

    The operand that is not selected has gradient zero, even if it is NaN.
    """

def windows(
    x: TensorLike,
    /,
    *,
    axis: int,
    size: SizeLike,
    stride: int = 1,
    dilation: int = 1,
    name: str | None = None,
) -> Tensor:
    """y[..., i, ..., k] = x[..., i stride + k dilation, ...]: windows of `size` elements along one axis

    The axis becomes the axis of windows; the elements of each window are along a new last axis. Elements at the end
    that do not fill a window are dropped.
    """
