"""ATen operators that move elements: views, permutations, slices, joins, repetitions.

A view's sizes are taken from PyTorch's result, so that -1 need not be resolved here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from treadle.frontends.recipes.positions import flipped
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.tensors.shapes import permuted, reshaped, selected, swapped

# -- views ---------------------------------------------------------------------------------------------------------


@operator("view.default", "reshape.default", "_unsafe_view.default", "view_copy.default", "_reshape_copy.default")
@operator("flatten.using_ints", "unflatten.int", "view_as.default", "reshape_as.default", "unsqueeze.default")
def _view(site: TorchSite) -> Made:
    x, shape = site.x("self"), site.shape()
    made, axes_match = reshaped(site.b, x, shape)
    if not axes_match and all(s.constant != 0 for s in x.shape):
        before, after = (", ".join(map(str, s)) for s in (x.shape, shape))
        site.importer.opaque.append(f"{site.node.name}: [{before}] to [{after}]")
    return made


@operator("squeeze.default", "squeeze.dim", "squeeze.dims")
def _squeeze(site: TorchSite) -> Made:
    """PyTorch dropped dimensions of size 1, but kept every symbolic dimension. So a symbolic size must not be 1."""
    x = site.x("self")
    asked = site.given("dim")
    axes = range(x.rank) if asked is None else [site.position(a, x.rank) for a in site.integers("dim")]
    for axis in axes if x.rank else ():
        size = x.shape[axis]
        if size.constant is None and site.bounds(size).lower <= 1:
            if size.as_symbol is None:
                site.refuse(f"a dimension of {size} may be 1")
            site.importer.at_least(size.as_symbol, 2)
    return reshaped(site.b, x, site.shape())[0]


@operator("permute.default", "permute_copy.default")
def _permute(site: TorchSite) -> Made:
    x = site.x("self")
    return permuted(site.b, x, [site.position(a, x.rank) for a in site.integers("dims")])


@operator("transpose.int", "swapaxes.default", "swapdims.default")
def _transpose(site: TorchSite) -> Made:
    x = site.x("self")
    names = [a.name for a in site.node.target._schema.arguments][1:3]
    return swapped(site.b, x, *(site.axis(name) for name in names))


@operator("t.default", "numpy_T.default", "mT.default", "matrix_H.default")
def _turned(site: TorchSite) -> Made:
    x = site.x("self")
    if x.rank < 2:
        return x
    whole = site.node.target._schema.name.endswith("numpy_T")
    return permuted(site.b, x, list(reversed(range(x.rank)))) if whole else swapped(site.b, x, x.rank - 2, x.rank - 1)


@operator("movedim.int", "movedim.intlist", "moveaxis.int")
def _movedim(site: TorchSite) -> Made:
    x = site.x("self")
    sources = [site.position(a, x.rank) for a in site.integers("source")]
    targets = [site.position(a, x.rank) for a in site.integers("destination")]
    rest = iter([i for i in range(x.rank) if i not in sources])
    return permuted(site.b, x, [sources[targets.index(i)] if i in targets else next(rest) for i in range(x.rank)])


@operator("expand.default", "expand_as.default", "expand_copy.default", "broadcast_to.default")
def _expand(site: TorchSite) -> Made:
    return expanded(site.b, site.x("self"), site.shape())


def expanded(b: Builder, x: Expr, shape: Sequence[Size]) -> Expr:
    """Return x broadcast to a shape."""
    return x if x.shape == tuple(shape) else b.expand(x, shape=tuple(shape))


# -- parts ---------------------------------------------------------------------------------------------------------


_FAR = 2**40
"""A position of at least this number stands for the end of any axis."""


def edge_of(site: TorchSite, edge: Size, size: Size) -> Size:
    """Return a slice's start or stop as PyTorch interprets it: counted from the end if it is negative, and clamped to
    the axis.

    If the position would be clamped for some sizes and not for others, the example's case is assumed. A call with sizes
    of the other case is refused, by the bounds of a symbol or by the slice itself.
    """
    symbols = site.importer.symbols
    if edge.constant is not None and edge.constant >= _FAR:
        return size
    negative = edge.constant is not None and edge.constant < 0
    if negative or not (symbols.suppose(edge, ZERO) or symbols.demand(edge, ZERO)):
        if not symbols.suppose(Size.of(-1), edge):
            _two_ways(site, f"a position of {edge}, which may be negative")
        edge = edge + size
    for limit, inside in ((ZERO, edge), (size, size - edge)):
        if symbols.is_at_least(ZERO, inside):
            return limit
        if not (symbols.suppose(inside, ZERO) or symbols.demand(inside, ZERO)):
            if not symbols.suppose(ZERO, inside):
                _two_ways(site, f"a position of {edge} on an axis of {size}, which may be past its end")
            return limit
    return edge


def _two_ways(site: TorchSite, what: str) -> NoReturn:
    site.refuse(
        f"{what}: the slice differs between these cases, and bounds of single dimensions cannot separate them",
        "an example in which it is within the axis",
    )


@operator("slice.Tensor", "slice_copy.Tensor")
def _slice(site: TorchSite) -> Made:
    b, x = site.b, site.x("self")
    axis, step = site.axis("dim"), site.integer("step")
    size, symbols = x.shape[axis], site.importer.symbols
    start = edge_of(site, site.size("start", 0), size)
    stop = edge_of(site, site.size("end", _FAR), size)
    if start == ZERO and stop == size and step == 1:
        return x
    if not symbols.suppose(stop, start) and not symbols.demand(stop, start):
        if not symbols.suppose(start, stop):
            _two_ways(site, f"from {start} to {stop}, which may be before it")
        stop = start
    made = b.slice(x, axis=axis, start=start, stop=None if stop == size else stop, stride=step)
    symbols.explain(site.vals[0].shape[axis], made.shape[axis])
    return made


@operator("narrow.default")
def _narrow(site: TorchSite) -> Made:
    x, axis = site.x("self"), site.axis("dim")
    start = edge_of(site, site.size("start"), x.shape[axis])
    return site.b.slice(x, axis=axis, start=start, stop=start + site.size("length"))


@operator("select.int", "select_copy.int")
def _select(site: TorchSite) -> Made:
    x, axis = site.x("self"), site.axis("dim")
    at = site.size("index")
    if at.constant is not None and at.constant < 0:
        at = at + x.shape[axis]
    return selected(site.b, x, axis, at)


@operator("split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "tensor_split.sections")
@operator("unsafe_split.Tensor", "unsafe_chunk.default")
def _split(site: TorchSite) -> Made:
    x, axis = site.x("self"), site.axis("dim")
    made, start = [], ZERO
    for output in range(len(site.vals)):
        stop = start + site.shape(output)[axis]
        made.append(x if len(site.vals) == 1 else site.b.slice(x, axis=axis, start=start, stop=stop))
        start = stop
    return made


@operator("unbind.int")
def _unbind(site: TorchSite) -> Made:
    x, axis = site.x("self"), site.axis("dim")
    return [selected(site.b, x, axis, Size.of(i)) for i in range(len(site.vals))]


@operator("cat.default", "concat.default", "concatenate.default")
def _cat(site: TorchSite) -> Made:
    """Build a concatenation. A part of shape [0] is ignored, whatever the rank of the other parts."""
    rank, dtype = len(site.shape()), site.dtype()
    parts = [x.cast(dtype) for x in site.tensors("tensors") if x.rank == rank]
    axis = site.axis("dim", rank)
    parts = [x for x in parts if x.shape[axis] != ZERO] or parts
    return parts[0] if len(parts) == 1 else site.b.concat(*parts, axis=axis)


@operator("stack.default")
def _stack(site: TorchSite) -> Made:
    rank, dtype = len(site.shape()), site.dtype()
    axis = site.axis("dim", rank)
    parts = [reshaped(site.b, x, [*x.shape[:axis], ONE, *x.shape[axis:]])[0] for x in site.tensors("tensors")]
    parts = [x.cast(dtype) for x in parts]
    return parts[0] if len(parts) == 1 else site.b.concat(*parts, axis=axis)


@operator("slice_scatter.default")
def _slice_scatter(site: TorchSite) -> Made:
    """self with a slice replaced."""
    b, x, source = site.b, site.x("self"), site.x("src")
    axis = site.axis("dim")
    size, count = x.shape[axis], source.shape[axis]
    if site.integer("step") != 1:
        site.refuse("slice_scatter with a step other than 1 is not supported")
    if count == size:
        return source.cast(x.dtype)
    return replaced(b, x, source.cast(x.dtype), axis, edge_of(site, site.size("start", 0), size))


@operator("select_scatter.default")
def _select_scatter(site: TorchSite) -> Made:
    b, x, source, axis = site.b, site.x("self"), site.x("src"), site.axis("dim")
    at = site.size("index")
    at = at + x.shape[axis] if at.constant is not None and at.constant < 0 else at
    row, _ = reshaped(b, source.cast(x.dtype), [*x.shape[:axis], ONE, *x.shape[axis + 1 :]])
    return replaced(b, x, row, axis, at)


def replaced(b: Builder, x: Expr, part: Expr, axis: int, start: Size) -> Expr:
    """Return x with `part` written to it along an axis, from a position on."""
    stop = start + part.shape[axis]
    parts = [part]
    if start != ZERO:
        parts.insert(0, b.slice(x, axis=axis, start=0, stop=start))
    if stop != x.shape[axis]:
        parts.append(b.slice(x, axis=axis, start=stop))
    return parts[0] if len(parts) == 1 else b.concat(*parts, axis=axis)


@operator("copy.default")
def _copy(site: TorchSite) -> Made:
    return expanded(site.b, site.x("src").cast(site.dtype()), site.shape())


@operator("diff.default")
def _diff(site: TorchSite) -> Made:
    """x[i + 1] - x[i], after prepending and appending; for bools, True where they differ."""
    b, x = site.b, site.x("self")
    axis = site.axis("dim")
    if site.integer("n") != 1:
        site.refuse("a higher order is not supported")
    parts = [p for p in (site.maybe("prepend"), x, site.maybe("append")) if p is not None]
    whole = b.concat(*parts, axis=axis) if len(parts) > 1 else x
    later, earlier = b.slice(whole, axis=axis, start=1), b.slice(whole, axis=axis, start=0, stop=whole.shape[axis] - 1)
    return b.not_equal(later, earlier) if x.dtype.kind == "bool" else later - earlier


# -- repetitions, padding ------------------------------------------------------------------------------------------


@operator("repeat.default", "tile.default")
def _repeat(site: TorchSite) -> Made:
    b, x = site.b, site.x("self")
    times = [Size.of(n) for n in site.given("repeats", site.given("dims", []))]
    times = [ONE] * (x.rank - len(times)) + times
    x, _ = reshaped(b, x, [ONE] * (len(times) - x.rank) + list(x.shape))
    for axis, count in enumerate(times):
        if count != ONE:
            x = _repeated(b, x, axis, count, whole=True)
    return x


@operator("repeat_interleave.self_int")
def _repeat_interleave(site: TorchSite) -> Made:
    b, x = site.b, site.x("self")
    if site.given("dim") is None:
        site.refuse("dim is required")
    return _repeated(b, x, site.axis("dim"), site.size("repeats"), whole=False)


def _repeated(b: Builder, x: Expr, axis: int, times: Size, *, whole: bool) -> Expr:
    """Repeat along an axis: the whole axis like `repeat`, or each element like `repeat_interleave`."""
    before, place = x.shape, axis if whole else axis + 1
    if before[axis] == ONE:
        return expanded(b, x, [times if i == axis else n for i, n in enumerate(before)])
    apart, _ = reshaped(b, x, [*before[:place], ONE, *before[place:]])
    again = expanded(b, apart, [*before[:place], times, *before[place:]])
    names = axis_letters(x.rank + 1)
    joined = [*names[:axis], f"({names[axis]} {names[axis + 1]})", *names[axis + 2 :]]
    return b.rearrange(again, pattern=f"{' '.join(names)} -> {' '.join(joined)}")


@operator("flip.default")
def _flip(site: TorchSite) -> Made:
    x = site.x("self")
    for axis in site.integers("dims"):
        x = flipped(site.b, x, site.position(axis, x.rank))
    return x


@operator("roll.default")
def _roll(site: TorchSite) -> Made:
    b, x = site.b, site.x("self")
    axes = [site.position(a, x.rank) for a in site.integers("dims")]
    if not axes:
        site.refuse("dims are required")
    for axis, shift in zip(axes, site.integers("shifts"), strict=True):
        size = x.shape[axis].constant
        if size is None:
            site.refuse("a symbolic axis is not supported")
        if size and shift % size:
            cut = size - shift % size
            x = b.concat(b.slice(x, axis=axis, start=cut), b.slice(x, axis=axis, start=0, stop=cut), axis=axis)
    return x


@operator("constant_pad_nd.default", "pad.default")
def _pad(site: TorchSite) -> Made:
    """Pairs of pad widths start at the last axis; a negative width removes elements."""
    b, x, mode = site.b, site.x("self"), site.text("mode") or "constant"
    pads = [Size.of(n) for n in site.given("pad")]
    value = site.real("value", 0.0)
    for k in range(len(pads) // 2):
        axis, (before, after) = x.rank - 1 - k, pads[2 * k : 2 * k + 2]
        if mode != "constant":
            x = _continued(site, x, axis, mode, before, after)
            continue
        cut = [-n.constant if n.constant is not None and n.constant < 0 else 0 for n in (before, after)]
        x = shortened(b, x, axis, *cut)
        before, after = (ZERO if c else n for c, n in zip(cut, (before, after), strict=True))
        if before != ZERO or after != ZERO:
            x = b.pad(x, axis=axis, before=before, after=after, value=value)
    return x


def _continued(site: TorchSite, x: Expr, axis: int, mode: str, before: Size, after: Size) -> Expr:
    """Return x with elements before and after an axis that continue it: copies of the elements at the edges
    (replicate), the elements in reversed order without the edge (reflect), or those from the other end (circular).
    """
    b, size = site.b, x.shape[axis]

    def edge(count: Size, first: Size, inner: Size, other: Size) -> Expr:
        """Return the elements at one side; the arguments are where elements of each mode begin."""
        if mode == "replicate":
            one = b.slice(x, axis=axis, start=first, stop=first + 1)
            return expanded(b, one, [count if i == axis else n for i, n in enumerate(x.shape)])
        if mode == "reflect":
            return flipped(b, b.slice(x, axis=axis, start=inner, stop=inner + count), axis)
        return b.slice(x, axis=axis, start=other, stop=other + count)

    if any(n.constant is None or n.constant < 0 for n in (before, after)):
        site.refuse(f"widths {before} and {after} of mode {mode} must be numbers of 0 or more")
    parts = [x]
    if before != ZERO:
        parts.insert(0, edge(before, ZERO, ONE, size - before))
    if after != ZERO:
        parts.append(edge(after, size - 1, size - 1 - after, ZERO))
    return b.concat(*parts, axis=axis) if len(parts) > 1 else x


def shortened(b: Builder, x: Expr, axis: int, before: int, after: int) -> Expr:
    """Return x without the first `before` and the last `after` elements of an axis. Negative numbers append zeros."""
    if min(before, after) < 0:
        x = b.pad(x, axis=axis, before=max(-before, 0), after=max(-after, 0))
    if max(before, after) > 0:
        x = b.slice(x, axis=axis, start=max(before, 0), stop=x.shape[axis] - max(after, 0))
    return x
