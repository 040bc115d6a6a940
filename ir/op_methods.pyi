"""Every op as a method, from its class: op_methods.py as type checkers see it. Written by `make golden`."""

from collections.abc import Sequence

from treadle.ir.attention.attention_terms import Term
from treadle.ir.builder import Expr, ExprLike
from treadle.ir.sizing.sizes import SizeLike
from treadle.ir.types import DType, i64

class OpMethods:
    def abs(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def activated_linear(
        self,
        x: ExprLike,
        weight: ExprLike,
        bias: ExprLike | None = None,
        /,
        *,
        activation: str = "gelu",
        weight_axes: str = "n k",
        to: DType | str | None = None,
        name: str | None = None,
    ) -> Expr: ...
    def add(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def add_layer_norm(
        self,
        x: ExprLike,
        residual: ExprLike,
        weight: ExprLike | None = None,
        bias: ExprLike | None = None,
        /,
        *,
        eps: float = 1e-05,
        name: str | None = None,
    ) -> tuple[Expr, Expr]: ...
    def add_rms_norm(
        self,
        x: ExprLike,
        residual: ExprLike,
        weight: ExprLike | None = None,
        /,
        *,
        eps: float = 1e-06,
        name: str | None = None,
    ) -> tuple[Expr, Expr]: ...
    def append(
        self,
        state: ExprLike,
        x: ExprLike,
        rows: ExprLike,
        start: ExprLike,
        /,
        *,
        axis: int,
        ring: bool = False,
        name: str | None = None,
    ) -> Expr: ...
    def argmax(self, x: ExprLike, /, *, axis: int, keep: bool = False, name: str | None = None) -> Expr: ...
    def attention(
        self,
        q: ExprLike,
        k: ExprLike,
        v: ExprLike,
        /,
        *operand: ExprLike | None,
        terms: Sequence[Term | str] = (),
        scale: float | None = None,
        softcap: float | None = None,
        start: SizeLike = 0,
        to: DType | str | None = None,
        name: str | None = None,
    ) -> Expr: ...
    def attention_parts(
        self,
        q: ExprLike,
        k: ExprLike,
        v: ExprLike,
        offset: ExprLike,
        /,
        *operand: ExprLike | None,
        terms: Sequence[Term | str] = (),
        scale: float | None = None,
        softcap: float | None = None,
        name: str | None = None,
    ) -> tuple[Expr, Expr, Expr]: ...
    def attention_with_probabilities(
        self,
        q: ExprLike,
        k: ExprLike,
        v: ExprLike,
        /,
        *operand: ExprLike | None,
        terms: Sequence[Term | str] = (),
        scale: float | None = None,
        softcap: float | None = None,
        start: SizeLike = 0,
        name: str | None = None,
    ) -> tuple[Expr, Expr]: ...
    def average_pool(
        self,
        x: ExprLike,
        /,
        *,
        kernel: Sequence[int],
        strides: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilations: Sequence[int] = (),
        name: str | None = None,
    ) -> Expr: ...
    def cached_attention(
        self,
        q: ExprLike,
        k: ExprLike,
        v: ExprLike,
        rows: ExprLike,
        start: ExprLike,
        /,
        *operand: ExprLike | None,
        terms: Sequence[Term | str] = (),
        scale: float | None = None,
        softcap: float | None = None,
        ring: bool = False,
        name: str | None = None,
    ) -> Expr: ...
    def cast(self, x: ExprLike, /, *, to: DType | str, name: str | None = None) -> Expr: ...
    def concat(self, *parts: ExprLike, axis: int = -1, name: str | None = None) -> Expr: ...
    def conv(
        self,
        x: ExprLike,
        weight: ExprLike,
        bias: ExprLike | None = None,
        /,
        *,
        strides: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilations: Sequence[int] = (),
        groups: int = 1,
        name: str | None = None,
    ) -> Expr: ...
    def cos(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def cross_entropy(
        self,
        x: ExprLike,
        target: ExprLike,
        /,
        *,
        ignored: int = -100,
        name: str | None = None,
    ) -> Expr: ...
    def cumsum(
        self,
        x: ExprLike,
        /,
        *,
        axis: int,
        exclusive: bool = False,
        reverse: bool = False,
        name: str | None = None,
    ) -> Expr: ...
    def div(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def divergence(
        self,
        x: ExprLike,
        teacher: ExprLike,
        /,
        *,
        temperature: float = 1.0,
        name: str | None = None,
    ) -> Expr: ...
    def einsum(self, *x: ExprLike, equation: str, name: str | None = None) -> Expr: ...
    def embedding(self, table: ExprLike, indices: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def embedding_sum(self, *operand: ExprLike, tables: int = 2, name: str | None = None) -> Expr: ...
    def equal(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def erf(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def exp(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def expand(self, x: ExprLike, /, *, shape: Sequence[SizeLike | None], name: str | None = None) -> Expr: ...
    def expm1(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def fake_quantize(
        self,
        x: ExprLike,
        scale: ExprLike,
        zero: ExprLike,
        /,
        *,
        least: int = -128,
        greatest: int = 127,
        name: str | None = None,
    ) -> Expr: ...
    def floor(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def floor_divide(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def fold_windows(
        self,
        x: ExprLike,
        /,
        *,
        axis: int,
        size: SizeLike,
        stride: int = 1,
        dilation: int = 1,
        name: str | None = None,
    ) -> Expr: ...
    def gated_linear(
        self,
        x: ExprLike,
        gate: ExprLike,
        up: ExprLike,
        gate_bias: ExprLike | None = None,
        up_bias: ExprLike | None = None,
        /,
        *,
        activation: str = "silu",
        weight_axes: str = "n k",
        to: DType | str | None = None,
        name: str | None = None,
    ) -> Expr: ...
    def gather(self, x: ExprLike, indices: ExprLike, /, *, axis: int = 0, name: str | None = None) -> Expr: ...
    def gelu(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def gelu_tanh(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def greater(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def greater_equal(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def index_add(
        self,
        target: ExprLike,
        indices: ExprLike,
        added: ExprLike,
        /,
        *,
        axis: int = 0,
        name: str | None = None,
    ) -> Expr: ...
    def iota(self, *, size: SizeLike, dtype: DType | str = i64, name: str | None = None) -> Expr: ...
    def layer_norm(
        self,
        x: ExprLike,
        weight: ExprLike | None = None,
        bias: ExprLike | None = None,
        /,
        *,
        eps: float = 1e-05,
        name: str | None = None,
    ) -> Expr: ...
    def less(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def less_equal(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def linear(
        self,
        x: ExprLike,
        weight: ExprLike,
        bias: ExprLike | None = None,
        /,
        *,
        to: DType | str | None = None,
        name: str | None = None,
    ) -> Expr: ...
    def log(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def log1p(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def log_softmax(self, x: ExprLike, /, *, axis: int = -1, name: str | None = None) -> Expr: ...
    def logical_and(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def logical_not(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def logical_or(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def masked_softmax(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def matmul(
        self,
        x: ExprLike,
        y: ExprLike,
        /,
        *,
        to: DType | str | None = None,
        name: str | None = None,
    ) -> Expr: ...
    def max_pool(
        self,
        x: ExprLike,
        /,
        *,
        kernel: Sequence[int],
        strides: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilations: Sequence[int] = (),
        name: str | None = None,
    ) -> Expr: ...
    def maximum(self, x: ExprLike, y: ExprLike, /, *, ties: str = "even", name: str | None = None) -> Expr: ...
    def merge_parts(
        self,
        out: ExprLike,
        max: ExprLike,
        sum: ExprLike,
        /,
        *,
        name: str | None = None,
    ) -> tuple[Expr, Expr, Expr]: ...
    def minimum(self, x: ExprLike, y: ExprLike, /, *, ties: str = "even", name: str | None = None) -> Expr: ...
    def mod(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def mul(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def neg(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def not_equal(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def pad(
        self,
        x: ExprLike,
        /,
        *,
        axis: int,
        before: SizeLike = 0,
        after: SizeLike = 0,
        value: float = 0.0,
        name: str | None = None,
    ) -> Expr: ...
    def positions(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def pow(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def projections(
        self,
        x: ExprLike,
        /,
        *operand: ExprLike | None,
        count: int = 2,
        weight_axes: str = "n k",
        to: DType | str | None = None,
        name: str | None = None,
    ) -> tuple[Expr, ...]: ...
    def quick_gelu(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def rearrange(self, x: ExprLike, /, *, pattern: str, name: str | None = None) -> Expr: ...
    def reciprocal(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def reduce_max(
        self,
        x: ExprLike,
        /,
        *,
        axes: Sequence[int],
        keep: bool = False,
        ties: str = "even",
        name: str | None = None,
    ) -> Expr: ...
    def reduce_mean(
        self,
        x: ExprLike,
        /,
        *,
        axes: Sequence[int],
        keep: bool = False,
        name: str | None = None,
    ) -> Expr: ...
    def reduce_min(
        self,
        x: ExprLike,
        /,
        *,
        axes: Sequence[int],
        keep: bool = False,
        ties: str = "even",
        name: str | None = None,
    ) -> Expr: ...
    def reduce_sum(
        self,
        x: ExprLike,
        /,
        *,
        axes: Sequence[int],
        keep: bool = False,
        name: str | None = None,
    ) -> Expr: ...
    def relu(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def reshape(self, x: ExprLike, /, *, shape: Sequence[SizeLike], name: str | None = None) -> Expr: ...
    def rms_norm(
        self,
        x: ExprLike,
        weight: ExprLike | None = None,
        /,
        *,
        eps: float = 1e-06,
        name: str | None = None,
    ) -> Expr: ...
    def rotary(
        self,
        x: ExprLike,
        positions: ExprLike,
        frequencies: ExprLike,
        /,
        *,
        layout: str = "half",
        name: str | None = None,
    ) -> Expr: ...
    def round(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def round_to(self, x: ExprLike, /, *, format: str, saturate: bool = False, name: str | None = None) -> Expr: ...
    def rsqrt(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def scatter_add(
        self,
        target: ExprLike,
        indices: ExprLike,
        added: ExprLike,
        /,
        *,
        axis: int = -1,
        name: str | None = None,
    ) -> Expr: ...
    def sigmoid(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def sign(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def silu(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def sin(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def size(self, *, value: SizeLike, dtype: DType | str = i64, name: str | None = None) -> Expr: ...
    def slice(
        self,
        x: ExprLike,
        /,
        *,
        axis: int,
        start: SizeLike = 0,
        stop: SizeLike | None = None,
        stride: int = 1,
        name: str | None = None,
    ) -> Expr: ...
    def softmax(self, x: ExprLike, /, *, axis: int = -1, name: str | None = None) -> Expr: ...
    def softplus(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def sqrt(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def stop_gradient(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def sub(self, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def sum_pool(
        self,
        x: ExprLike,
        /,
        *,
        kernel: Sequence[int],
        strides: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilations: Sequence[int] = (),
        name: str | None = None,
    ) -> Expr: ...
    def take_along_axis(
        self,
        x: ExprLike,
        indices: ExprLike,
        /,
        *,
        axis: int = -1,
        name: str | None = None,
    ) -> Expr: ...
    def tanh(self, x: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def top_k(self, x: ExprLike, /, *, k: int, axis: int = -1, name: str | None = None) -> tuple[Expr, Expr]: ...
    def where(self, condition: ExprLike, x: ExprLike, y: ExprLike, /, *, name: str | None = None) -> Expr: ...
    def windows(
        self,
        x: ExprLike,
        /,
        *,
        axis: int,
        size: SizeLike,
        stride: int = 1,
        dilation: int = 1,
        name: str | None = None,
    ) -> Expr: ...
