"""Ops that rearrange the elements of one tensor: rearrange, expand and reshape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from treadle.ir.axes import Application, AxisDim, Role
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Op, Operand, Primitive
from treadle.ir.ops.arithmetic import unbroadcast
from treadle.ir.ops.axis_names import axis_letters, sized, symbols_in
from treadle.ir.samples import S
from treadle.ir.sizing.sizes import Size, SizeLike, product
from treadle.ir.stepping import Held, Kept, Stepping
from treadle.ir.storage.rearranged_views import Rearranged
from treadle.ir.storage.views import View
from treadle.ir.types import Type, f32
from treadle.ir.wording.marked_text import marked, marked_name


def _with_sizes(pattern: str, names: Sequence[str]) -> str:
    """Return a pattern in which these names have a size, as an example: "b (h=2 d)"."""
    for name in names:
        pattern = re.sub(rf"\b{name}\b", f"{name}=2", pattern, count=1)
    return pattern


def zeros(b: Builder, type: Type) -> Expr:
    """Build zeros of a type by expanding a scalar, so that the graph stores no large constant."""
    return b.expand(b.constant(0, type.dtype), shape=type.shape)


# -- rearrange -----------------------------------------------------------------------------------------------


@op("rearrange", dtypes="t -> t", linear="x", flops=0)
class Rearrange(Primitive):
    """Split, permute and join axes: "b s (heads=12 d) -> b heads s d"        (einops, Rogozhnikov 2022)

    pattern   the axis rule itself. Every name occurs once on each side; `(h d)` is one dimension, h
              outermost; `1` is a dimension of size 1, added or dropped; `...` any leading dimensions. If a
              dimension is split, all its factors but one have a size in the pattern.
    """

    moves_blocks = True
    x = Operand()
    pattern: str

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        left, _, right = self.pattern.partition("->")
        if not left.strip():
            return f"... -> ... {right}"  # a rule without a left side would have no operand
        return self.pattern

    def check(self, types: Sequence[Type | None]) -> None:
        if "->" not in self.pattern:
            parts = re.findall(r"\([^)]*\)|[^\s(),]+", self.pattern)
            swapped = re.sub(r"=[^\s)]*", "", " ".join([*parts[:-2], *parts[:-3:-1]]))  # the last two change places
            hint = f'"{" ".join(parts)} -> {swapped}"'
            raise RuleError("'->' is missing", within=marked(self.pattern, len(self.pattern)), hint=hint)
        if "," in self.pattern:
            raise RuleError(
                "a pattern has no commas",
                within=marked(self.pattern, self.pattern.index(",")),
                hint=f'separate axes by spaces: "{" ".join(self.pattern.replace(",", " ").split())}"',
            )
        rule = self.rule(())
        lost = [f.name for f in rule.factors.values() if f.role is Role.REDUCED]
        if lost:
            raise RuleError(f"axis {lost[0]} is missing after '->'", within=marked_name(self.pattern, lost[0]))
        left, right = (_dims(side) for side in (*rule.operands, *rule.results))
        moved = all(f.role is Role.MAPPED for f in rule.factors.values())
        if not moved or any(d.size is not None for d in right):
            raise RuleError("a pattern consists of names, sizes, 1, `...` and parentheses only", within=self.pattern)
        arrow = self.pattern.index("->")
        for names, after in ((_factors(left), 0), (_factors(right), arrow)):
            for name in names:
                if names.count(name) > 1:
                    raise RuleError(
                        f"axis {name} occurs twice on one side",
                        within=marked_name(self.pattern, name, of=1, after=after),
                    )
        for dim in left:
            unknown = [n for n in dim.factors if n not in rule.known_sizes]
            if len(unknown) > 1:
                raise RuleError(
                    f"cannot infer the sizes of {' and '.join(unknown)}",
                    within=marked_name(self.pattern, unknown[0]),
                    hint=f"sizes of all but one of them in the pattern: {_with_sizes(self.pattern, unknown[:-1])!r}",
                )

    def at(self, values: Mapping[str, int]) -> Op:
        rule = self.rule(())
        if not any(size.symbols for size in rule.known_sizes.values()):
            return self
        sizes = {name: Size.of(size.evaluate(values)) for name, size in rule.known_sizes.items()}
        return replace(self, pattern=f"{_side(rule.operands[0], sizes)} -> {_side(rule.results[0], {})}")

    def substitute(self, values: Mapping[str, SizeLike]) -> Op:
        rule = self.rule(())
        sizes = {name: size.substitute(values) for name, size in rule.known_sizes.items()}
        if all(sizes[name] == size for name, size in rule.known_sizes.items()):
            return self
        return replace(self, pattern=f"{_side(rule.operands[0], sizes)} -> {_side(rule.results[0], {})}")

    def resized(self, sizes: Mapping[str, Size], types: Sequence[Type | None]) -> Op | None:
        rule = self.rule(())
        given = {name: sizes.get(name, size) for name, size in rule.known_sizes.items()}
        return replace(self, pattern=f"{_side(rule.operands[0], given)} -> {_side(rule.results[0], {})}")

    def reference(self, x: Any) -> Any:
        application = self.apply([f32[x.shape]])
        before, after = _factors(application.operands[0] or ()), _factors(application.results[0])
        split = x.reshape([_number(application.dims[n].size) for n in before])
        return split.transpose([before.index(n) for n in after]).reshape(
            [_number(d.size) for d in application.shapes[0]]
        )

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        assert types[0] is not None
        return Rearranged.of(self, types[0]).view(x)

    def part_of(self, y: View, types: Sequence[Type | None], position: int) -> View | None:
        assert types[0] is not None
        return Rearranged.of(self, types[0]).before_it(y)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        rule = self.rule(())
        dims = self.apply([x.type]).dims
        sizes: dict[str, Size] = {}
        for joined in _dims(rule.results[0]):
            # The gradient splits this dimension again; one factor is inferred, if possible one with symbols.
            inferred = max(joined.factors, key=lambda n: len(dims[n].size.symbols), default=None)
            sizes |= {n: dims[n].size for n in joined.factors if n != inferred}
        return [b.rearrange(g, pattern=f"{_side(rule.results[0], sizes)} -> {_side(rule.operands[0], {})}")]

    samples = [
        S("f32[2,3,8]", pattern="b s (heads=4 d) -> b heads s d"),
        S("f32[2,4,3,2]", pattern="b h s d -> b s (h d)"),
        S("f32[2,3,4]", pattern="... a b -> ... b a"),
        S("f32[3,4]", pattern="a b -> 1 b 1 a"),
        S("f32[1,3,1]", pattern="1 a 1 -> a"),
        S("f32[6,6]", pattern="(a b=3) (c=3 d) -> (c a) d b"),
        S("f32[]", pattern="-> 1 1"),
        S("i64[2,3]", pattern="a b -> (b a)"),
    ]
    errors = [
        (S("f32[2,9]", pattern="a (b=2 c) -> a b c"), "not a multiple of 2"),
        (S("f32[2,8]", pattern="a (b c) -> a b c"), "cannot infer the sizes of b and c"),
        (S("f32[2,3]", pattern="a b -> a"), "axis b is missing after '->'"),
        (S("f32[2,3]", pattern="a b -> a b c"), "axis c is after '->', and in no operand"),
        (S("f32[2,3]", pattern="a b -> a b a"), "axis a occurs twice"),
        (S("f32[2,3]", pattern="a [b] -> a [b]"), "names, sizes, 1"),
        (S("f32[2,3]", pattern="1 b -> b"), "must be 1"),
    ]


def _dims(side: Sequence[object]) -> list[AxisDim]:
    return [d for d in side if isinstance(d, AxisDim)]


def _factors(dims: Sequence[AxisDim]) -> list[str]:
    return [name for d in dims for name in d.factors]


def _number(size: Size) -> int:
    return size.evaluate({})


def _side(dims: Sequence[object], sizes: Mapping[str, Size]) -> str:
    """Return one side of a pattern as text that contains these sizes."""
    texts = []
    for d in dims:
        if not isinstance(d, AxisDim):
            texts.append("...")
            continue
        names = [f"{n}={sizes[n]}" if n in sizes else n for n in d.factors]
        texts.append("1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})")
    return " ".join(texts)


# -- expand, reshape -----------------------------------------------------------------------------------------


@op("expand", dtypes="t -> t", linear="x", flops=0)
class Expand(Primitive):
    """y[..., i, ...] = x[..., 0, ...]: x repeated along dimensions of size 1 and new leading ones

    shape   the result's sizes. If a size is None or equals the size of x, the dimension is kept and its axis mapped.
            For any other size, the dimension of x must have size 1 or be missing; it becomes a generated axis.
    """

    step = "repeats its single element"
    x = Operand()
    shape: tuple[Size | None, ...]

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        """Return the rule for the case that every size in `shape` is generated. `apply` marks the kept dimensions
        first.
        """
        rank = ranks[0] or 0
        names = axis_letters(len(self.shape), symbols_in(self.shape))
        results = [n if size is None else f"^{n}={size}" for n, size in zip(names, self.shape, strict=True)]
        kept = zip(names[len(names) - rank :], self.shape[len(names) - rank :], strict=True)
        operand = [n if size is None else "1" for n, size in kept]
        if not rank:
            return f"... -> ... {' '.join(results)}"  # a rule without a left side would have no operand
        return f"{' '.join(operand)} -> {' '.join(results)}"

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        assert x is not None
        new = len(self.shape) - x.rank
        if new < 0:
            raise RuleError(f"x has rank {x.rank}, more than the {len(self.shape)} dimensions to expand to")
        if None in self.shape[:new]:
            raise RuleError("a new dimension needs a size")
        for position, (dim, size) in enumerate(zip(x.dims, self.shape[new:], strict=True)):
            if size is not None and size != dim.size and not dim.is_one:
                raise RuleError(f"dimension {position} of x is {dim.size}, and must be 1 to expand to {size}")

    def apply(self, types: Sequence[Type | None]) -> Application:
        return super(Expand, self._keeping(types)).apply(types)

    def _keeping(self, types: Sequence[Type | None]) -> Expand:
        """Return the same op with None in `shape` for each dimension that already has its size in x."""
        (x,) = types
        assert x is not None
        new = len(self.shape) - x.rank
        old = zip(x.dims, self.shape[new:], strict=True)
        return replace(self, shape=(*self.shape[:new], *[None if size == dim.size else size for dim, size in old]))

    def resized(self, sizes: Mapping[str, Size], types: Sequence[Type | None]) -> Op | None:
        """Return the op if only kept dimensions have other sizes; None if a generated dimension has another size."""
        made = self._keeping(types)
        names = axis_letters(len(made.shape), symbols_in(made.shape))
        generated = {n for n, size in zip(names, made.shape, strict=True) if size is not None}
        return None if generated & sizes.keys() else made

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
        """Build the same op for the tokens of the step."""
        (x,) = operands
        return step.b.expand(x, shape=self.shape) if isinstance(x, Expr) else None

    def reference(self, x: Any) -> Any:
        new = len(self.shape) - x.ndim
        here = (*[None] * new, *x.shape)
        shape = [n if size is None else _number(size) for n, size in zip(here, self.shape, strict=True)]
        return np.broadcast_to(x, shape)

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        (y,) = self.infer(types)
        return x.broadcast(y.shape)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        return [unbroadcast(b, g, x.type)]

    samples = [
        S("f32[2,1]", shape=(None, 3)),
        S("f32[1,4]", shape=(2, 3, None)),
        S("f32[3]", shape=(2, None)),
        S("f32[]", shape=(2, 3)),
        S("i64[1,1]", shape=(1, 2)),
        S("f32[3,1,4]", shape=(2, 3, 5, 4)),
    ]
    errors = [
        (S("f32[2,3]", shape=(2, 4)), "dimension 1 of x is 3, and must be 1"),
        (S("f32[2,3]", shape=(6,)), "x has rank 2"),
        (S("f32[3]", shape=(None, 3)), "a new dimension needs a size"),
    ]


@op("reshape", dtypes="t -> t", linear="x", flops=0)
class Reshape(Primitive):
    """The elements of x, in row-major order, in another shape.

    The op is meant for importers. It does not relate the axes of x and y, so no axis can be followed through it. If the
    relation is known, use `rearrange`.

    shape   the result's sizes. Their product must equal the number of elements of x for all values of the symbols
    """

    x = Operand()
    shape: tuple[Size, ...]

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        rank = ranks[0] or 0
        names = axis_letters(rank, symbols_in(self.shape))
        results = " ".join(sized(size) for size in self.shape)
        return f"{' '.join(f'[{n}]' for n in names)} -> {results}" if rank else f"... -> ... {results}"

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        assert x is not None
        if x.elements != product(self.shape):
            rest = [str(size) if size.constant is not None else repr(str(size)) for size in self.shape]
            raise RuleError(
                f"x has {x.elements} elements, but the shape has {product(self.shape)}",
                hint=f"x.reshape({', '.join(rest)}), whose -1 is the rest" if rest.count("-1") == 1 else None,
            )

    def reference(self, x: Any) -> Any:
        return x.reshape([_number(size) for size in self.shape])

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        return x.reshaped(self.shape)

    def part_of(self, y: View, types: Sequence[Type | None], position: int) -> View | None:
        (x,) = types
        assert x is not None
        return y.reshaped(x.shape)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        return [b.reshape(g, shape=x.shape)]

    samples = [
        S("f32[2,6]", shape=(3, 4)),
        S("f32[2,3,4]", shape=(24,)),
        S("f32[]", shape=(1, 1)),
        S("i64[1,1]", shape=()),
    ]
    errors = [(S("f32[2,3]", shape=(4, 2)), "x has 6 elements, but the shape has 8")]
