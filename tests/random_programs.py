"""Random programs in which passes find something to do: functions decomposed as models write them, and near misses of
them.

Values have magnitudes of about one, so that the effect of a rewrite is visible; the dtype is float64 or any other float
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from treadle.ir.attention.attention_terms import BooleanMask
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph
from treadle.ir.types import DType, f64, i64

WIDTH = 6
FILLS = (-1e4, -1e9, -1e30, -3.4028234663852886e38, -math.inf)
"""Numbers by which models mask; in a narrow dtype, only the numbers that it can represent."""

Step = Callable[[Builder, Random, Expr], Expr]
"""A function from a value [B, S, 6] of a float dtype to another such value."""


def random_program(seed: int, dtype: DType = f64) -> Graph:
    """Return a chain of steps; in every third program, a block that is called twice comes first, and every 16th ends
    with a convolution. A seed yields one program.
    """
    r = Random(seed)
    graph = Graph("random")
    main = Builder(graph)
    x = main.input("x", f"{dtype}[B, S, {WIDTH}]")
    if seed % 3 == 0:
        block = Function("block")
        graph.add_function(block)
        inside = Builder(graph, block)
        inside.outputs(y=chain(inside, r, inside.input("x", x.type)))
        for i in range(2):
            weights = [main.parameter(f"h.{i}.{name}", v.type) for name, v in block.parameters.items()]
            (x,) = main.call(block, [x, *weights])
    y = chain(main, r, x)
    main.outputs(y=convolved(main, r, y) if seed % 16 == 15 else y)
    return graph


def chain(b: Builder, r: Random, x: Expr) -> Expr:
    """Add steps, each on the result of the preceding one. Some values are used again later, and must still be unchanged
    there.
    """
    made = [x]
    for _ in range(r.randint(3, 6)):
        made.append(r.choice(STEPS)(b, r, r.choice(made[-2:])))
    return made[-1] + r.choice(made) * 0.5


def parameter(b: Builder, dtype: DType, *shape: int) -> Expr:
    return b.parameter(f"w{len(b.function.parameters)}", dtype[shape])


# -- steps -----------------------------------------------------------------------------------------------------


def one_of(r: Random, *spellings: Callable[[], Expr]) -> Expr:
    """Build one of several variants; the others are not built."""
    return r.choice(spellings)()


def gelu(b: Builder, r: Random, x: Expr) -> Expr:
    inner = one_of(r, lambda: x * math.sqrt(0.5), lambda: x / math.sqrt(2), lambda: x * 0.7)
    gate = b.erf(inner) + 1
    return one_of(r, lambda: (x * 0.5) * gate, lambda: x * (gate / 2), lambda: (x * gate) * 0.5, lambda: gate * (x / 2))


def gelu_tanh(b: Builder, r: Random, x: Expr) -> Expr:
    factor = r.choice((0.044715, 0.044715, 0.04))
    cube = one_of(r, lambda: x**3 * factor, lambda: x * x * x * factor, lambda: x * factor * x * x)
    return x * 0.5 * (b.tanh((x + cube) * math.sqrt(2 / math.pi)) + 1)


def gated(b: Builder, r: Random, x: Expr) -> Expr:
    factor = r.choice((1.702, 1.702, 1.7))
    return one_of(r, lambda: x * b.sigmoid(x), lambda: x / (b.exp(-x) + 1), lambda: x * b.sigmoid(x * factor))


def layer_norm(b: Builder, r: Random, x: Expr) -> Expr:
    axes = r.choice(((-1,), (2,), (1,)))
    centered = x - b.reduce_mean(x, axes=axes, keep=True)
    square = one_of(r, lambda: centered * centered, lambda: centered**2)
    return scaled(b, r, centered, b.reduce_mean(square, axes=axes, keep=True))


def rms_norm(b: Builder, r: Random, x: Expr) -> Expr:
    return scaled(b, r, x, b.reduce_mean(x**2, axes=r.choice(((-1,), (1,))), keep=True))


def scaled(b: Builder, r: Random, x: Expr, square: Expr) -> Expr:
    """Add x / sqrt(square + eps), sometimes times a weight and plus a bias."""
    shifted = square + r.choice((1e-5, 1e-3))
    y = one_of(
        r,
        lambda: x * b.rsqrt(shifted),
        lambda: x / b.sqrt(shifted),
        lambda: x * b.reciprocal(b.sqrt(shifted)),
    )
    y = y * parameter(b, x.dtype, WIDTH) if r.random() < 0.7 else y
    return y + parameter(b, x.dtype, WIDTH) if r.random() < 0.5 else y


def softmax(b: Builder, r: Random, x: Expr) -> Expr:
    over_max, over_sum = r.choice((((-1,), (2,)), ((1,), (1,)), ((1,), (2,)), ((0, 1), (0, 1))))
    weights = b.exp(x - b.reduce_max(x, axes=over_max, keep=True))
    return weights / b.reduce_sum(weights, axes=over_sum, keep=True)


def attention(b: Builder, r: Random, x: Expr) -> Expr:
    """Add attention with two heads of three elements, with or without rotary positions, or a near miss of attention.

    If the query's own key is masked, the first row has no key.
    """
    heads = b.rearrange(x, pattern="b s (h=2 d) -> b h s d")
    q = turned(b, r, heads) if r.random() < 0.5 else heads
    scale = r.choice((3**-0.5, 3**-0.5, 0.5, 0.5, -0.5, 0.0))
    scores = b.matmul(q, b.rearrange(heads, pattern="b h t d -> b h d t")) * scale
    fill = r.choice([n for n in FILLS[: 5 if r.random() < 0.5 else 3] if x.dtype.holds(n)])
    j = b.iota(size="S")
    i = b.rearrange(j, pattern="s -> s 1")
    keep = j <= i + r.choice((0, 0, 0, 1, 0 if fill == -math.inf else -1))
    masked = one_of(
        r,
        lambda: scores,
        lambda: b.where(keep, scores, fill),
        lambda: b.where(i < j + 3, b.where(keep, scores, fill), fill),
        lambda: b.minimum(scores, 2.0),
    )
    weights = b.softmax(masked, axis=r.choice((-1, -1, -1, 2)))
    return b.rearrange(b.matmul(weights, heads), pattern="b h s d -> b s (h d)")


def attended(b: Builder, r: Random, x: Expr) -> Expr:
    """Add attention as one op, with a causal mask, with a sliced table for the longest context, or without a mask."""
    heads = b.rearrange(x, pattern="b s (h=2 d) -> b h s d")
    longest = r.choice((64, "S"))
    j = b.iota(size=longest)
    keep = j <= b.rearrange(j, pattern="s -> s 1") + r.choice((0, 0, 1))
    keep = b.slice(b.slice(keep, axis=0, stop="S"), axis=1, stop="S") if longest == 64 else keep
    y = b.attention(heads * r.choice((1.0, 0.5)), heads, heads, keep, terms=(BooleanMask("s t"),))
    return b.rearrange(y, pattern="b h s d -> b s (h d)")


def turned(b: Builder, r: Random, x: Expr) -> Expr:
    """Rotate the first two dimensions of each head by an angle proportional to the position, or by another angle."""
    angle = b.cast(b.rearrange(b.iota(size="S"), pattern="s -> 1 1 s 1"), to=x.dtype) * b.constant([0.3], x.dtype)
    first, second = b.slice(x, axis=3, stop=1), b.slice(x, axis=3, start=1, stop=2)
    cos, sin = b.cos(angle), b.sin(angle)
    one = first * cos - second * sin
    other = one_of(r, lambda: second * cos + first * sin, lambda: second * cos - first * sin)
    return b.concat(one, other, b.slice(x, axis=3, start=2), axis=3)


def inverted(b: Builder, r: Random, x: Expr) -> Expr:
    return 1.0 / (b.abs(x) + 1.0)


def convolved(b: Builder, r: Random, x: Expr) -> Expr:
    kernel = r.choice((1, 1, 3))
    weight, bias = parameter(b, x.dtype, WIDTH, WIDTH, kernel), r.choice((None, parameter(b, x.dtype, WIDTH)))
    turned = b.rearrange(x, pattern="b s d -> b d s")
    return b.rearrange(b.conv(turned, weight, bias, padding=(kernel // 2,) * 2), pattern="b d s -> b s d") * 0.3


def linear(b: Builder, r: Random, x: Expr) -> Expr:
    w = parameter(b, x.dtype, WIDTH, WIDTH)
    w = w + 0.1 if r.random() < 0.3 else w
    rows = r.random() < 0.3
    x = b.rearrange(x, pattern="b s d -> (b s) d") if rows else x
    y = one_of(r, lambda: b.linear(x, w), lambda: b.matmul(x, b.rearrange(w, pattern="o i -> i o")))
    y = y + parameter(b, x.dtype, WIDTH) if r.random() < 0.7 else y
    heads = rows and r.random() < 0.3
    y = b.rearrange(y, pattern="(b=B s) (h=2 d) -> b h s d") if heads else y
    y = b.rearrange(y, pattern="(b=B s) d -> b s d") if rows and not heads else y
    return b.rearrange(b.tanh(y), pattern="b h s d -> b s (h d)") if heads else b.tanh(y)


def feed_forward(b: Builder, r: Random, x: Expr) -> Expr:
    """Add a product that is activated, or gated by a product of the same value, by a product of another value, or by
    its own other half.
    """
    activate = r.choice((b.gelu, b.relu, b.silu, b.sigmoid, b.tanh))

    def product(x: Expr, width: int = WIDTH) -> Expr:
        if r.random() < 0.5:
            return b.linear(x, parameter(b, x.dtype, width, WIDTH))
        y = b.matmul(x, parameter(b, x.dtype, WIDTH, width))
        return y + parameter(b, x.dtype, width) if r.random() < 0.5 else y

    def halved() -> Expr:
        y = product(x, 2 * WIDTH)
        return activate(b.slice(y, axis=2, stop=WIDTH)) * b.slice(y, axis=2, start=WIDTH)

    def gated() -> Expr:
        gate = activate(product(x))
        return gate * product(r.choice((x, x, -x)))

    return b.tanh(one_of(r, lambda: activate(product(x)), gated, halved))


def residual(b: Builder, r: Random, x: Expr) -> Expr:
    """Add a norm of a sum; the sum may also be used elsewhere."""
    total = x + b.tanh(x)
    y = one_of(r, lambda: b.layer_norm(total, parameter(b, x.dtype, WIDTH)), lambda: b.rms_norm(total))
    return one_of(r, lambda: y, lambda: y + total)


def embedded(b: Builder, r: Random, x: Expr) -> Expr:
    one, other = (b.embedding(parameter(b, x.dtype, 3, WIDTH), b.constant(row)) for row in (0, 2))
    return one_of(
        r,
        lambda: x + (one + other),
        lambda: x + (one * 2.0 + other),
        lambda: x + b.slice(parameter(b, x.dtype, 64, WIDTH), axis=0, stop="S"),
    )


def projected(b: Builder, r: Random, x: Expr) -> Expr:
    """Add products of one value with two or three weights, with or without biases; some products have other uses
    too.
    """
    parts = []
    for _ in range(r.choice((2, 3))):
        w = parameter(b, x.dtype, WIDTH, WIDTH)
        y = b.linear(x, w) if r.random() < 0.7 else b.matmul(x, w)
        y = y + parameter(b, x.dtype, WIDTH) if r.random() < 0.5 else y
        parts.append(y + b.reduce_sum(w, axes=(0, 1), keep=False) * 0.01 if r.random() < 0.1 else y)
    total = parts[0] * parts[1]
    return b.sin(total + parts[2] if len(parts) > 2 else total)


def joined_weights(b: Builder, r: Random, x: Expr) -> Expr:
    """Add one product with two concatenated weights, whose columns are sliced, mostly at the edge between the
    weights.
    """
    parts = [parameter(b, x.dtype, WIDTH, WIDTH) for _ in range(2)]
    w = b.concat(*parts, axis=0)
    y = one_of(r, lambda: b.linear(x, w), lambda: b.matmul(x, b.rearrange(w, pattern="o i -> i o")))
    if r.random() < 0.5:
        y = y + b.concat(*[parameter(b, x.dtype, WIDTH) for _ in range(2)], axis=0)
    start = r.choice((WIDTH, WIDTH, WIDTH - 1))
    return b.sin(b.slice(y, axis=-1, stop=WIDTH) * b.slice(y, axis=-1, start=start, stop=start + WIDTH))


def scaled_product(b: Builder, r: Random, x: Expr) -> Expr:
    """Add a product that is wider or narrower than its operand, or a norm, and scale it by one number."""
    by, width = r.choice((0.125, -0.3, 2.0)), r.choice((2, 2 * WIDTH))
    weight, bias = parameter(b, x.dtype, WIDTH), parameter(b, x.dtype, WIDTH)
    normed = one_of(r, lambda: x, lambda: b.rms_norm(x, weight), lambda: b.layer_norm(x, weight, bias))
    there, back = parameter(b, x.dtype, width, WIDTH), parameter(b, x.dtype, WIDTH, width)
    y = one_of(
        r,
        lambda: b.linear(normed, there) * by,
        lambda: b.matmul(normed, parameter(b, x.dtype, WIDTH, width)) * by,
        lambda: b.linear(normed * by, there),
    )
    return b.sin(b.linear(y, back))


def unchanged(b: Builder, r: Random, x: Expr) -> Expr:
    return one_of(
        r,
        *(lambda: x + 0, lambda: x - 0, lambda: x * 1, lambda: x / 1, lambda: x**1, lambda: b.neg(-x)),
        *(lambda: b.cast(x, to=x.dtype), lambda: b.rearrange(x, pattern="b s d -> b s d")),
    )


def picked(b: Builder, r: Random, x: Expr) -> Expr:
    """Gather all rows by indices, guarded as exporters do against negative ones; reverse each sequence; or add the last
    row to all.
    """
    if r.random() < 0.2:
        last = b.size(value="S - 1") + b.constant([0], i64)
        return x + b.gather(x, last, axis=1)
    s = one_of(r, lambda: b.iota(size="S"), lambda: b.iota(size="S"), lambda: b.size(value="S - 1") - b.iota(size="S"))
    i = b.rearrange(b.iota(size="B"), pattern="b -> b 1") * b.size(value="S") + s
    i = one_of(r, lambda: i, lambda: b.where(i < 0, i + b.size(value="B * S"), i))
    return b.gather(b.rearrange(x, pattern="b s d -> (b s) d"), i)


def one_of_two(b: Builder, r: Random, x: Expr) -> Expr:
    start = r.choice((0, WIDTH, 1))
    return b.slice(b.concat(x, b.tanh(x), axis=2), axis=2, start=start, stop=start + WIDTH)


def powers(b: Builder, r: Random, x: Expr) -> Expr:
    return b.tanh(one_of(r, lambda: x / 4, lambda: x / 3, lambda: x**2, lambda: 2.0 * x))


def selected(b: Builder, r: Random, x: Expr) -> Expr:
    condition = one_of(
        r,
        lambda: b.constant(r.random() < 0.5),
        lambda: b.logical_not(b.logical_not(x > 0.0)),
        lambda: b.logical_and(x > 0.0, True),
        lambda: x > 0.0,
        lambda: b.rearrange(b.equal(b.iota(size="S") + 1, b.iota(size="S") + 1 + r.choice((0, 2))), pattern="s -> s 1"),
        lambda: b.where(x > 0.0, True, False),
        lambda: b.equal(b.cast(x > 0.0, to=x.dtype), 1),
    )
    other = one_of(r, lambda: x * 0.5, lambda: x * 0.5, lambda: x, lambda: b.where(condition, x * 3, x * 0.5))
    return b.where(condition, x, other)


def masked_twice(b: Builder, r: Random, x: Expr) -> Expr:
    """Subtract a number where two conditions hold, both as numbers."""
    number = b.where(x > r.choice((0.0, -0.5)), b.constant(-2.0, x.dtype), b.constant(0, x.dtype))
    return x + number * b.cast(x < 0.5, to=x.dtype)


def counted_by_sums(b: Builder, r: Random, x: Expr) -> Expr:
    """Add the position, as a running sum of ones, to rows after nothing."""
    ones = b.expand(b.constant(1, i64), shape=("B", "S"))
    positions = b.cumsum(ones, axis=1, exclusive=r.random() < 0.5)
    y = b.sin(x + b.cast(b.rearrange(positions, pattern="b s -> b s 1"), to=x.dtype))
    y = y + (b.expand(b.constant(0, x.dtype), shape=("B", 1, 1)) + parameter(b, x.dtype, WIDTH))
    nothing = b.expand(b.constant(0, x.dtype), shape=("B", 0, WIDTH))
    return one_of(r, lambda: b.concat(nothing, y, axis=1), lambda: b.concat(y, nothing, axis=1))


def counted(b: Builder, r: Random, x: Expr) -> Expr:
    return x * b.cast(b.cast(x > 0.0, to=r.choice(("i8", "bf16", "f32"))), to=x.dtype)


def moved(b: Builder, r: Random, x: Expr) -> Expr:
    y = b.rearrange(x, pattern="b s (h=2 d) -> b h s d")
    if r.random() < 0.3:
        y = b.rearrange(b.rearrange(y, pattern="b h s d -> b s d h"), pattern="b s d h -> b h s d")
    return b.rearrange(y, pattern="b h s d -> b s (h d)")


def reshaped(b: Builder, r: Random, x: Expr) -> Expr:
    return b.reshape(b.reshape(x, shape=r.choice((("B", "S", 2, 3), ("B", 2, "3*S")))), shape=("B", "S", WIDTH))


def expanded(b: Builder, r: Random, x: Expr) -> Expr:
    mean = b.reduce_mean(x, axes=(1, 2), keep=True)
    return x + b.expand(b.expand(mean, shape=("B", "S", 1)), shape=("B", "S", WIDTH))


def twice(b: Builder, r: Random, x: Expr) -> Expr:
    return b.tanh(x) * 0.5 + b.tanh(x)


def by_a_constant(b: Builder, r: Random, x: Expr) -> Expr:
    return x * (b.constant(2.0, x.dtype) * b.exp(b.constant(-r.random(), x.dtype)))


def idle(b: Builder, r: Random, x: Expr) -> Expr:
    """Add an op whose result is unused."""
    b.exp(x * parameter(b, x.dtype, WIDTH))
    return x


STEPS: tuple[Step, ...] = (
    *(
        gelu,
        gelu_tanh,
        gated,
        layer_norm,
        layer_norm,
        rms_norm,
        softmax,
        attention,
        attended,
        linear,
        unchanged,
        masked_twice,
        counted_by_sums,
        unchanged,
    ),
    *(feed_forward, residual, embedded, projected, joined_weights, scaled_product),
    *(picked, one_of_two, powers, selected, counted, moved, reshaped, expanded, twice, by_a_constant, idle, inverted),
)
