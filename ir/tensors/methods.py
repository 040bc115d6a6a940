"""PyTorch's methods of a tensor, for a model's tensors: `x.sum(-1)`, `x.transpose(1, 2)`, `x.reshape(B, -1)`.

Each builds ops of the IR, mostly one. Options have PyTorch's names, `dim` and `keepdim`. Shape changes become a
`rearrange`, so that every axis can be followed through them; a change that no rearrange expresses raises GraphError.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

from treadle.ir.sizing.sizes import ONE, Size, SizeLike, product
from treadle.ir.tensors.casts import CastMethods
from treadle.ir.types import Dim, DType, boolean, u8

if TYPE_CHECKING:
    from treadle.ir.expressions import Expr, ExprLike
    from treadle.ir.graph import Value
    from treadle.ir.tensors.indexing import Index

Axes: TypeAlias = "int | Sequence[int] | None"
"""One axis, several axes, or None for all. A negative axis counts from the end."""


class Extremum(NamedTuple):
    """The greatest or the least elements along an axis, and their positions (i64)."""

    values: Expr
    indices: Expr


class TensorMethods(CastMethods):
    """Base of `Expr` with PyTorch's methods."""

    __slots__ = ()

    if TYPE_CHECKING:
        value: Value

        @property
        def dtype(self) -> DType: ...
        @property
        def shape(self) -> tuple[Size, ...]: ...
        @property
        def rank(self) -> int: ...

    # -- indexing ----------------------------------------------------------------------------------------------

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Expr:
        """Return a part of the tensor: x[:, 0], x[..., 1:], x[:, -1], x[:, ::2], x[:, None], x[positions].

        On an axis of symbolic size, a slice is not clamped: a call in which it reaches past the end raises an error.
        """
        from treadle.ir.tensors.indexing import indexed

        return indexed(self._expr, index)

    def __iter__(self) -> Iterator[Expr]:
        """Iterate over the first axis. Raises GraphError if its size is symbolic."""
        return iter(self.unbind(0))

    def unbind(self, dim: int = 0) -> tuple[Expr, ...]:
        """Return the tensor at each position of an axis of constant size, without that axis."""
        axis = self._axis(dim)
        count = self.shape[axis].constant
        if count is None:
            raise self._refusal(
                f"a tensor cannot be iterated over along an axis whose size differs from call to call: "
                f"{self.shape[axis]}",
                f"ops work on all positions at once; x[{':, ' * axis}0] is one position",
            )
        return tuple(self._along(axis, i) for i in range(count))

    def split(self, split_size: int | Size | Sequence[int | Size], dim: int = 0) -> tuple[Expr, ...]:
        """Return consecutive parts of an axis: of one size, the last may be smaller, or of the sizes in a sequence."""
        axis = self._axis(dim)
        size = self.shape[axis]
        if not isinstance(split_size, Sequence):
            if size.constant is None or Size.of(split_size).constant is None:
                part = split_size if isinstance(split_size, int) else 2
                raise self._refusal(
                    f"the number of parts of {split_size} elements of an axis of {size} differs from call to call",
                    f"x.split([{part}, x.shape[{axis}] - {part}], dim={axis}) lists the sizes",
                )
            step = operator.index(split_size)
            if step < 1:
                raise self._refusal(f"parts must have 1 element or more, not {step}", None)
            sizes: list[int | Size] = [min(step, size.constant - i) for i in range(0, size.constant, step)]
        else:
            sizes = [*split_size]
            if sum(sizes, Size.of(0)) != size:
                raise self._refusal(f"the parts have {sum(sizes, Size.of(0))} elements, but the axis has {size}", None)
        parts, start = [], Size.of(0)
        for count in sizes:
            parts.append(self._along(axis, slice(start, start + count)))
            start = start + count
        return tuple(parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Expr, ...]:
        """Return an axis in a number of equal parts; on an axis of constant size, the last may be smaller."""
        size = self.shape[self._axis(dim)]
        if chunks < 1:
            raise self._refusal(f"the number of parts must be 1 or more, is {chunks}", None)
        if size.constant is not None:
            return self.split(max(-(-size.constant // chunks), 1), dim)
        part = size.divide(chunks)
        if part is None:
            raise self._refusal(f"an axis of {size} has no {chunks} equal parts for every {size}", None)
        return self.split([part for _ in range(chunks)], dim)

    # -- shapes ------------------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.rank

    def dim(self) -> int:
        """Return the number of axes."""
        return self.rank

    @overload
    def size(self, dim: None = None) -> tuple[Size, ...]: ...
    @overload
    def size(self, dim: int) -> Size: ...
    def size(self, dim: int | None = None) -> Size | tuple[Size, ...]:
        """Return the size of an axis, or without `dim` the tuple of all sizes."""
        return self.shape if dim is None else self.shape[self._axis(dim)]

    def numel(self) -> Size:
        """Return the number of elements."""
        return product(self.shape)

    def __len__(self) -> int:
        """Return the size of the first axis. Raises SizeError if it is symbolic."""
        return operator.index(self.size(0))

    @property
    def T(self) -> Expr:
        """The transposed matrix. Raises GraphError for more than two axes."""
        if self.rank > 2:
            order = ", ".join(map(str, reversed(range(self.rank))))
            raise self._refusal(
                f".T is for matrices, and the tensor has {self.rank} axes",
                f"x.mT  # exchanges the last two axes; x.permute({order}) reverses all",
            )
        return self.permute(*reversed(range(self.rank)))

    @property
    def mT(self) -> Expr:
        """The tensor with its last two axes exchanged."""
        return self.transpose(-2, -1)

    def transpose(self, dim0: int, dim1: int) -> Expr:
        """Return the tensor with two axes exchanged."""
        from treadle.ir.tensors.shapes import swapped

        return swapped(self.builder, self._expr, self._axis(dim0), self._axis(dim1))

    swapaxes = transpose

    def permute(self, *dims: int | Sequence[int]) -> Expr:
        """Return the tensor with its axes in another order: x.permute(0, 2, 1)."""
        from treadle.ir.tensors.shapes import permuted

        order = [self._axis(dim) for dim in _flat(dims)]
        if sorted(order) != list(range(self.rank)):
            raise self._refusal(
                f"permute needs each of the {self.rank} axes once, received {tuple(_flat(dims))}",
                f"x.permute({', '.join(map(str, reversed(range(self.rank))))})",
            )
        return permuted(self.builder, self._expr, order)

    def movedim(self, source: int | Sequence[int], destination: int | Sequence[int]) -> Expr:
        """Return the tensor with axes moved to other positions. The other axes keep their order."""
        from treadle.ir.tensors.shapes import permuted

        moved, places = ([self._axis(dim) for dim in _flat([dims])] for dims in (source, destination))
        if len({*moved}) != len(moved) or len({*places}) != len(places) or len(moved) != len(places):
            raise self._refusal(
                f"movedim needs a destination for each axis, received {source} and {destination}", "x.movedim(1, 0)"
            )
        order = [axis for axis in range(self.rank) if axis not in moved]
        for place, axis in sorted(zip(places, moved, strict=True)):
            order.insert(place, axis)
        return permuted(self.builder, self._expr, order)

    moveaxis = movedim

    def reshape(self, *shape: SizeLike | Sequence[SizeLike]) -> Expr:
        """Return the elements in row-major order in another shape, in which one size may be -1.

        Axes are split and joined by a `rearrange`. If the axes of the two shapes have no common parts, raises
        GraphError with the rearrange that may be meant.
        """
        from treadle.ir.tensors.shapes import matching_pattern, permuting_pattern

        sizes = self._sizes(_flat(shape))
        if sizes == self.shape:
            return self._expr
        pattern = matching_pattern(self.shape, sizes)
        if pattern is not None:
            return self.builder.rearrange(self._expr, pattern=pattern)
        moved = permuting_pattern(self.shape, sizes)
        before, after = (", ".join(map(str, s)) for s in (self.shape, sizes))
        spelled = "".join(f"{s}, " if s.constant is not None else f'"{s}", ' for s in sizes)
        raise self._refusal(
            f"[{before}] cannot be reshaped to [{after}]: the axes have no common parts",
            f't.rearrange(x, pattern="{moved}")  # splits the axes, and permutes them'
            if moved is not None
            else f"t.reshape(x, shape=({spelled.strip()}))  # in row-major order; no axis can be followed through it",
        )

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Expr:
        """Return the tensor with consecutive axes joined."""
        if not self.rank:
            return self.reshape(1)
        first, last = self._axis(start_dim), self._axis(end_dim)
        return self.reshape(*self.shape[:first], product(self.shape[first : last + 1]), *self.shape[last + 1 :])

    def unflatten(self, dim: int, sizes: Sequence[SizeLike]) -> Expr:
        """Return the tensor with an axis split into axes of these sizes, of which one may be -1."""
        axis = self._axis(dim)
        whole, known = self.shape[axis], [Size.of(s) for s in sizes if s != -1]
        rest = whole.divide(product(known)) if len(known) < len(sizes) else ONE
        if rest is None:
            raise self._refusal(f"an axis of {whole} is not a multiple of {product(known)}", None)
        return self.reshape(*self.shape[:axis], *[rest if s == -1 else s for s in sizes], *self.shape[axis + 1 :])

    def unsqueeze(self, dim: int) -> Expr:
        """Return the tensor with a new axis of size 1 at this position."""
        axis = self._axis(dim, self.rank + 1)
        return self._along(axis, None)

    def squeeze(self, dim: Axes = None) -> Expr:
        """Return the tensor without these axes if their size is 1; without `dim`, without all axes of size 1.

        A symbolic axis is kept, and raises GraphError if `dim` names it.
        """
        from treadle.ir.tensors.shapes import without_axes

        axes = range(self.rank) if dim is None else [self._axis(d) for d in _flat([dim])]
        for axis in () if dim is None else axes:
            if self.shape[axis].constant is None:
                raise self._refusal(
                    f"axis {axis} can only be dropped if its size is 1, and {self.shape[axis]} differs from call to "
                    "call",
                    f"x[{':, ' * axis}0]",
                )
        return without_axes(self.builder, self._expr, [axis for axis in axes if self.shape[axis] == ONE])

    def expand(self, *sizes: SizeLike | Sequence[SizeLike]) -> Expr:
        """Return the tensor repeated along axes of size 1 and new leading axes; -1 keeps an axis."""
        shape = [None if s == -1 else s for s in _flat(sizes)]
        return self.builder.expand(self._expr, shape=shape)

    def repeat_interleave(self, repeats: int | Size, dim: int) -> Expr:
        """Return the tensor with each position of an axis repeated: the key/value heads of grouped queries."""
        axis = self._axis(dim)
        before, after = self.shape[: axis + 1], self.shape[axis + 1 :]
        wide = self.unsqueeze(axis + 1).expand(*before, repeats, *after)
        return wide.reshape(*before[:-1], before[-1] * repeats, *after)

    def repeat(self, *repeats: int | Size | Sequence[int | Size]) -> Expr:
        """Return the tensor repeated along each axis, as NumPy's tile does; more repeats than axes add leading axes."""
        counts = [Size.of(count) for count in _flat(repeats)]
        new = len(counts) - self.rank
        if new < 0:
            raise self._refusal(
                f"repeat needs a number for each of the {self.rank} axes, received {tuple(_flat(repeats))}",
                f"x.repeat({', '.join(['1'] * (self.rank - 1))}, 2)",
            )
        x, shape = self._expr, (*[ONE] * new, *self.shape)
        for axis in range(len(shape)):
            x = x.unsqueeze(2 * axis) if axis >= new else x[(*[slice(None)] * 2 * axis, None, None)]
        wide = [size for pair in zip(counts, shape, strict=True) for size in pair]
        return x.expand(*wide).reshape(*[count * size for count, size in zip(counts, shape, strict=True)])

    def expand_as(self, other: Expr) -> Expr:
        """Return the tensor repeated to the shape of another tensor."""
        return self.expand(other.shape)

    def flip(self, *dims: int | Sequence[int]) -> Expr:
        """Return the tensor with the order of the elements along axes reversed."""
        x = self._expr
        for axis in map(self._axis, _flat(dims)):
            size = self.shape[axis]
            x = x.builder.gather(x, size - 1 - self.builder.iota(size=size), axis=axis)
        return x

    def roll(self, shifts: int | Sequence[int], dims: int | Sequence[int] | None = None) -> Expr:
        """Return the tensor with its elements moved along axes; those that leave at the end enter at the start.
        Without `dims`, they move in the flattened tensor.
        """
        if dims is None:
            return self.flatten().roll(shifts, 0).reshape(*self.shape)
        moves, axes = _flat([shifts]), _flat([dims])
        if len(moves) != len(axes):
            raise self._refusal(f"roll needs a shift for each axis, received {len(moves)} for {len(axes)}", None)
        x = self._expr
        for move, axis in zip(moves, map(self._axis, axes), strict=True):
            size = self.shape[axis]
            x = x.builder.gather(x, (self.builder.iota(size=size) - move) % size, axis=axis)
        return x

    def diff(self, n: int = 1, dim: int = -1) -> Expr:
        """Return the difference of each element and the one before it along an axis, `n` times."""
        x, axis = self._expr, self._axis(dim)
        for _ in range(n):
            x = x._along(axis, slice(1, None)) - x._along(axis, slice(None, -1))
        return x

    def new_zeros(self, *size: SizeLike | Sequence[SizeLike]) -> Expr:
        """Return zeros of this shape, of the dtype of the tensor."""
        return self.new_full(_flat(size), 0)

    def new_ones(self, *size: SizeLike | Sequence[SizeLike]) -> Expr:
        """Return ones of this shape, of the dtype of the tensor."""
        return self.new_full(_flat(size), 1)

    def new_full(self, size: Sequence[SizeLike], fill_value: float) -> Expr:
        """Return a tensor of this shape with equal elements, of the dtype of the tensor."""
        return self.builder.expand(self.builder.constant(fill_value, self.dtype), shape=[*size])

    def contiguous(self) -> Expr:
        """Return the tensor. The compiler decides where and how values are stored."""
        return self._expr

    def clone(self) -> Expr:
        """Return the tensor. Values never change, so that no copy is needed."""
        return self._expr

    def detach(self) -> Expr:
        """Return the tensor; no gradient flows through it."""
        return self.builder.stop_gradient(self._expr)

    # -- along axes --------------------------------------------------------------------------------------------

    def sum(self, dim: Axes = None, keepdim: bool = False) -> Expr:
        """Return the sum over axes, or over all. The sum of booleans is their number, in i64."""
        x = self.long() if self.dtype is boolean else self._expr
        return self.builder.reduce_sum(x, axes=self._axes(dim), keep=keepdim)

    def mean(self, dim: Axes = None, keepdim: bool = False) -> Expr:
        """Return the mean over axes, or over all."""
        return self.builder.reduce_mean(self._expr, axes=self._axes(dim), keep=keepdim)

    def var(
        self, dim: Axes = None, keepdim: bool = False, *, correction: int = 1, unbiased: bool | None = None
    ) -> Expr:
        """Return the variance over axes, or over all: the sum of squared distances from the mean, divided by n -
        correction. `unbiased=False` is `correction=0`.
        """
        axes = self._axes(dim)
        correction = correction if unbiased is None else int(unbiased)
        centered = self._expr - self.mean(axes, keepdim=True)
        squares = centered * centered
        if correction == 0:
            return squares.mean(axes, keepdim)
        return squares.sum(axes, keepdim) / (product(self.shape[a] for a in axes) - correction)

    def std(
        self, dim: Axes = None, keepdim: bool = False, *, correction: int = 1, unbiased: bool | None = None
    ) -> Expr:
        """Return the standard deviation over axes, or over all: the root of `var`."""
        return self.builder.sqrt(self.var(dim, keepdim, correction=correction, unbiased=unbiased))

    def amax(self, dim: Axes = None, keepdim: bool = False) -> Expr:
        """Return the greatest element over axes, or over all."""
        return self.builder.reduce_max(self._expr, axes=self._axes(dim), keep=keepdim)

    def amin(self, dim: Axes = None, keepdim: bool = False) -> Expr:
        """Return the least element over axes, or over all."""
        return self.builder.reduce_min(self._expr, axes=self._axes(dim), keep=keepdim)

    def any(self, dim: Axes = None, keepdim: bool = False) -> Expr:
        """Return True where an element over axes, or over all, is not 0."""
        return self.builder.reduce_max(self.bool().to(u8), axes=self._axes(dim), keep=keepdim).bool()

    def all(self, dim: Axes = None, keepdim: bool = False) -> Expr:
        """Return True where no element over axes, or over all, is 0."""
        return self.builder.reduce_min(self.bool().to(u8), axes=self._axes(dim), keep=keepdim).bool()

    @overload
    def max(self, dim: None = None) -> Expr: ...
    @overload
    def max(self, dim: int, keepdim: bool = False) -> Extremum: ...
    @overload
    def max(self, dim: Expr) -> Expr: ...
    def max(self, dim: int | Expr | None = None, keepdim: bool = False) -> Expr | Extremum:
        """Return the greatest element; with `dim`, the pair `(values, indices)` along that axis, as PyTorch does.

        If several elements are equal, the index is the first, and the gradient goes to it. `amax` returns the values
        alone. With a tensor in place of `dim`, the greater elements of both, as PyTorch does.
        """
        if dim is None:
            return self.amax()
        if isinstance(dim, TensorMethods):
            return self.builder.maximum(self._expr, dim)
        values = self.builder.reduce_max(self._expr, axes=(self._axis(dim),), keep=keepdim, ties="first")
        return Extremum(values, self.argmax(dim, keepdim))

    @overload
    def min(self, dim: None = None) -> Expr: ...
    @overload
    def min(self, dim: int, keepdim: bool = False) -> Extremum: ...
    @overload
    def min(self, dim: Expr) -> Expr: ...
    def min(self, dim: int | Expr | None = None, keepdim: bool = False) -> Expr | Extremum:
        """Return the least element; with `dim`, the pair `(values, indices)` along that axis. See `max`."""
        if dim is None:
            return self.amin()
        if isinstance(dim, TensorMethods):
            return self.builder.minimum(self._expr, dim)
        values = self.builder.reduce_min(self._expr, axes=(self._axis(dim),), keep=keepdim, ties="first")
        return Extremum(values, self.argmin(dim, keepdim))

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Expr:
        """Return the position of the greatest element along an axis, without `dim` in the flattened tensor."""
        x, axis = (self.flatten(), 0) if dim is None else (self._expr, self._axis(dim))
        return self.builder.argmax(x, axis=axis, keep=keepdim and dim is not None)

    def argmin(self, dim: int | None = None, keepdim: bool = False) -> Expr:
        """Return the position of the least element along an axis, without `dim` in the flattened tensor."""
        return reversed_order(self._expr).argmax(dim, keepdim)

    def cumsum(self, dim: int) -> Expr:
        """Return the running sums along an axis."""
        return self.builder.cumsum(self._expr, axis=self._axis(dim))

    def softmax(self, dim: int) -> Expr:
        """Return the softmax along an axis."""
        return self.builder.softmax(self._expr, axis=self._axis(dim))

    def log_softmax(self, dim: int) -> Expr:
        """Return the logarithm of the softmax along an axis."""
        return self.builder.log_softmax(self._expr, axis=self._axis(dim))

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Extremum:
        """Return the k greatest elements along an axis, greatest first, and their positions; or the k least elements.
        They are always sorted.
        """
        if largest:
            return Extremum(*self.builder.top_k(self._expr, k=k, axis=self._axis(dim)))
        values, indices = self.builder.top_k(reversed_order(self._expr), k=k, axis=self._axis(dim))
        return Extremum(reversed_order(values), indices)

    # -- elements ----------------------------------------------------------------------------------------------

    def gather(self, dim: int, index: Expr) -> Expr:
        """Return the elements at positions along an axis: y[i, j] = x[i, index[i, j]] for the last axis of a matrix.

        The result has the shape of index. Along other axes than `dim`, an index of a smaller size selects the first
        elements. The op `t.gather` is NumPy's take instead.
        """
        axis, x = self._axis(dim), self._expr
        if index.rank == self.rank:
            for other, size in enumerate(index.shape):
                if other != axis and size != self.shape[other]:
                    x = x._along(other, slice(None, size))
        return self.builder.take_along_axis(x, index, axis=axis)

    def tril(self, diagonal: int = 0) -> Expr:
        """Return the lower triangles of the last two axes; elements above the diagonal, moved by `diagonal`, are 0."""
        row, column = self._rows_and_columns(diagonal)
        return self.builder.where(column <= row, self._expr, self.builder.constant(0, self.dtype))

    def triu(self, diagonal: int = 0) -> Expr:
        """Return the upper triangles of the last two axes; elements below the diagonal, moved by `diagonal`, are 0."""
        row, column = self._rows_and_columns(diagonal)
        return self.builder.where(column >= row, self._expr, self.builder.constant(0, self.dtype))

    def masked_fill(self, mask: ExprLike, value: ExprLike) -> Expr:
        """Return the tensor with `value` where the mask is true."""
        return self.builder.where(mask, value, self._expr)

    def clamp(self, min: ExprLike | None = None, max: ExprLike | None = None) -> Expr:
        """Return the tensor with its elements limited to the range from `min` to `max`."""
        x = self._expr if min is None else self.builder.maximum(self._expr, min)
        return x if max is None else self.builder.minimum(x, max)

    clip = clamp

    def square(self) -> Expr:
        """Return the square of each element."""
        return self._expr * self._expr

    # -- arguments ---------------------------------------------------------------------------------------------

    @property
    def _expr(self) -> Expr:
        """This tensor, typed as the only class that has this base."""
        return self  # type: ignore[return-value]

    def _rows_and_columns(self, diagonal: int) -> tuple[Expr, Expr]:
        """Return for the last two axes the column of each row's element on the diagonal [rows, 1], and the columns."""
        if self.rank < 2:
            raise self._refusal(f"a triangle has two axes, and the tensor has {self.rank}", None)
        row = self.builder.iota(size=self.shape[-2]).unsqueeze(1)
        return row + diagonal if diagonal else row, self.builder.iota(size=self.shape[-1])

    def _along(self, axis: int, index: Index) -> Expr:
        """Return the tensor indexed along one axis."""
        whole: list[Index] = [slice(None)] * axis
        return self[(*whole, index)]

    def _axis(self, dim: Any, rank: int | None = None) -> int:
        """Return the position of an axis from the start, in a tensor of this rank. Raises GraphError."""
        rank = self.rank if rank is None else rank
        try:
            axis = operator.index(dim)
        except TypeError:
            raise self._refusal(f"an axis must be an integer, not {repr(dim)[:80]}", "axis -1 is the last") from None
        if not -rank <= axis < rank:
            raise self._refusal(f"there is no axis {axis} in a tensor of rank {rank}", None)
        return axis % rank

    def _axes(self, dim: Axes) -> tuple[int, ...]:
        """Return the positions of axes; of all for None and for an empty sequence."""
        return tuple(self._axis(d) for d in (() if dim is None else _flat([dim]))) or tuple(range(self.rank))

    def _sizes(self, shape: Sequence[Any]) -> tuple[Size, ...]:
        """Return the sizes of a shape in which one size may be -1. Raises GraphError if they do not fit."""
        try:
            sizes = [Size.of(s if isinstance(s, Size | str) else operator.index(s)) for s in shape]
        except TypeError:
            hint = next(
                (hint for s in shape if isinstance(s, Dim) and (hint := s.label_hint)), "x.reshape(-1, x.shape[-1])"
            )
            raise self._refusal(f"a shape consists of sizes, not {tuple(shape)!r:.80}", hint) from None
        free = [i for i, s in enumerate(sizes) if s.constant == -1]
        if any(s.constant is not None and s.constant < -1 for s in sizes) or len(free) > 1:
            raise self._refusal("one size of a shape may be -1", "x.reshape(-1, x.shape[-1])")
        whole, known = product(self.shape), product(s for s in sizes if s.constant != -1)
        if free:
            rest = whole.divide(known) if known.constant != 0 else None
            if rest is None:
                raise self._refusal(f"-1 cannot be inferred: {whole} elements are not a multiple of {known}", None)
            sizes[free[0]] = rest
        elif whole != known:
            raise self._refusal(f"the tensor has {whole} elements, but the shape has {known}", None)
        return tuple(sizes)


def reversed_order(x: Expr) -> Expr:
    """Return numbers whose order is the reverse of the order of x: -x, and for integers -1 - x, which does not
    overflow.
    """
    if x.dtype.is_float:
        return -x
    return x.builder.constant(255 if x.dtype is u8 else -1, x.dtype) - x


def _flat(items: Sequence[Any]) -> list[Any]:
    """Return the items of a call with separate arguments, f(1, 2), or with one sequence, f((1, 2))."""
    return (
        [*items[0]]
        if len(items) == 1 and isinstance(items[0], Sequence) and not isinstance(items[0], str)
        else [*items]
    )
