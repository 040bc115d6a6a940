"""Rotary positions: rotation of pairs of a head's dimensions by position times frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic import trigonometry
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.reduction import converted
from treadle.ir.types import DTYPES, f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


@dataclass(frozen=True)
class Rotary(Kernel):
    """y = x with the first 2f elements of its last dimension rotated in pairs; see the op `rotary`

    interleaved  True if a pair is (2i, 2i + 1) instead of (i, i + f)
    lanes        number of pairs rotated at once, a divisor of f
    dtype        dtype of x and y, by name: f32, f16 or bf16. Computed in f32
    positions    dtype of the positions, by name

    An angle is computed once for all heads.

    Arguments: x, positions, frequencies, y; the sizes b, h, s, d, f; x's strides over b, h, s; the positions' two
    strides; y's three strides.
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
                angle = k.let(angle, "angle")
                sin, cos = (
                    k.let(trigonometry.sin(k, lanes, angle), "sin"),
                    k.let(trigonometry.cos(k, lanes, angle), "cos"),
                )
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
