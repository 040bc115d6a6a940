"""Rotary positions: pairs of a head's dimensions turned by position times frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.kernels.kernel import Kernel
from treadle.backends.kernels.reduction import converted
from treadle.ir.types import DTYPES, f32, f64

if TYPE_CHECKING:
    from treadle.backends.kernels.emitter import Emitter, Expr

_HALF_PI_HIGH, _HALF_PI_LOW = 1.57079632673412561417e00, 6.07710050650619224932e-11
"""pi / 2 in two parts; the first has 33 bits, so its multiples are exact in float64 up to 2^20."""
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def sin_cos(k: Emitter, x: Expr, lanes: int) -> tuple[Expr, Expr]:
    """sin x and cos x of float32, to about one rounding for every x up to 2^30 (the polynomials are Cephes').

    A multiple of pi / 2 is taken off in float64, so that a large angle keeps all bits that it has.
    """
    wide = k.let(k.cast(x, f64, lanes), "wide")
    quarters = k.let(k.nearest(wide * k.number(0.6366197723675814, f64, lanes)), "quarters")
    rest = wide - quarters * k.number(_HALF_PI_HIGH, f64, lanes) - quarters * k.number(_HALF_PI_LOW, f64, lanes)
    turns = k.floor(quarters * k.number(0.25, f64, lanes)) * k.number(4.0, f64, lanes)
    quadrant = k.let(k.cast(quarters - turns, f32, lanes), "quadrant")
    r = k.let(k.cast(rest, f32, lanes), "r")
    z = k.let(r * r, "z")

    def number(value: float) -> Expr:
        return k.number(value, f32, lanes)

    def polynomial(coefficients: tuple[float, ...]) -> Expr:
        p = number(coefficients[0])
        for c in coefficients[1:]:
            p = p * z + number(c)
        return p

    sin = k.let(polynomial(_SIN) * z * r + r, "s")
    cos = k.let(polynomial(_COS) * (z * z) - z * number(0.5) + number(1.0), "c")
    first, second = quadrant < number(0.5), quadrant < number(1.5)
    third = quadrant < number(2.5)
    # By quadrant: sin is s, c, -s, -c; cos is c, -s, -c, s.
    zero = number(0.0)
    minus_sin, minus_cos = k.let(zero - sin), k.let(zero - cos)
    turned_sin = k.select(first, sin, k.select(second, cos, k.select(third, minus_sin, minus_cos)))
    turned_cos = k.select(first, cos, k.select(second, minus_sin, k.select(third, minus_cos, sin)))
    return k.let(turned_sin, "sin"), k.let(turned_cos, "cos")


@dataclass(frozen=True)
class Rotary(Kernel):
    """y = x with the first 2f of its last dimension's elements turned in pairs; see the op `rotary`

    interleaved  whether a pair is (2i, 2i + 1) rather than (i, i + f)
    lanes        how many pairs are turned at once, a divisor of f
    dtype        of x and y, by name: f32, f16 or bf16. All is computed in f32
    positions    their dtype, by name

    An angle is computed once for all heads.

    Passed: x, positions, frequencies, y; the sizes b, h, s, d, f; x's strides over b, h, s, the positions' two, y's
    three.
    """

    interleaved: bool
    lanes: int
    dtype: str
    positions: str

    @property
    def title(self) -> str:
        return f"rotary_{self.dtype}"

    def emit(self, k: Emitter) -> None:
        held = DTYPES[self.dtype]
        x, places = k.pointer("x", held), k.pointer("positions", DTYPES[self.positions])
        frequencies, y = k.pointer("frequencies", f32), k.pointer("y", held)
        b, h, s, d, f = (k.size(name) for name in "bhsdf")
        x_strides: list[Expr] = [k.size(f"x_{n}") for n in "bhs"] + [1]
        places_strides = [k.size(f"positions_{n}") for n in "bs"]
        y_strides: list[Expr] = [k.size(f"y_{n}") for n in "bhs"] + [1]
        x, y = k.view(x, [b, h, s, d], x_strides), k.view(y, [b, h, s, d], y_strides)
        places, frequencies = k.view(places, [b, s], places_strides), k.view(frequencies, [f])
        lanes = self.lanes
        with k.parallel(b * s, "task") as task:
            i, t = k.let(k.floor_divide(task, s), "i"), k.let(k.floor_mod(task, s), "t")
            position = k.let(k.cast(k.load(places, [i, t]), f32), "position")
            with k.loop(k.floor_divide(f, lanes), "v") as v:
                pair = k.let(v * lanes, "pair")
                angle = k.splat(position, lanes) * k.load(frequencies, [pair], lanes)
                sin, cos = sin_cos(k, k.let(angle, "angle"), lanes)
                with k.loop(h, "head") as head:
                    self._turn(k, x, y, [i, head, t], pair, f, sin, cos)
            rest = k.let(d - f * 2, "rest")
            with k.when(rest > k.index(0)), k.loop(h, "head") as head, k.loop(rest, "r") as r:
                k.store(y, [i, head, t, f * 2 + r], k.load(x, [i, head, t, f * 2 + r]))

    def _turn(self, k: Emitter, x: Any, y: Any, at: list[Expr], pair: Expr, f: Expr, sin: Expr, cos: Expr) -> None:
        lanes, held = self.lanes, x.dtype

        def load(place: Expr, count: int) -> Expr:
            return k.let(converted(k, k.load(x, [*at, place], count), held, f32, count))

        def store(place: Expr, value: Expr, count: int) -> None:
            k.store(y, [*at, place], converted(k, value, f32, held, count), count)

        if not self.interleaved:
            first, second = load(pair, lanes), load(f + pair, lanes)
        elif lanes == 1:
            first, second = load(pair * 2, 1), load(pair * 2 + 1, 1)
        else:
            both = load(pair * 2, 2 * lanes)
            first, second = (k.let(k.shuffle([both], range(n, 2 * lanes, 2))) for n in (0, 1))
        turned = k.let(first * cos - second * sin), k.let(second * cos + first * sin)
        if not self.interleaved:
            store(pair, turned[0], lanes)
            store(f + pair, turned[1], lanes)
        elif lanes == 1:
            store(pair * 2, turned[0], 1)
            store(pair * 2 + 1, turned[1], 1)
        else:
            order = [lane for j in range(lanes) for lane in (j, lanes + j)]
            store(pair * 2, k.shuffle(turned, order), 2 * lanes)
