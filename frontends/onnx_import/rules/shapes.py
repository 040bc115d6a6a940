"""ONNX operators that rearrange elements: Reshape, Transpose, Expand, Tile, DepthToSpace, ..."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.recipes.reshaping import reshaped
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product


@operator("Reshape", latest=25, first=5, moves=(0,))
def _reshape(site: OnnxSite) -> Made:
    _b, x = site.b, site.x(0)
    wanted, keep_zero = site.sizes(1), site.int("allowzero", 0)
    sizes: list[Size] = []
    free: int | None = None
    for i, size in enumerate(wanted):
        if size.constant == -1:
            if free is not None:
                site.malformed("more than one -1 in the shape")
            free = i
        elif size.constant == 0 and not keep_zero:
            if i >= x.rank:
                site.malformed(f"the shape has 0 at {i}, but the operand has rank {x.rank}")
            size = x.shape[i]
        elif size.constant is not None and size.constant < 0:
            site.malformed(f"the shape has a negative size: {size}")
        sizes.append(size)
    if free is not None:
        rest = product(s for i, s in enumerate(sizes) if i != free)
        whole = product(x.shape)
        if rest.constant == 0:
            sizes[free] = ZERO
        else:
            exact = whole.divide(rest)
            if exact is None:
                given = ", ".join(map(str, wanted))
                site.refuse(f"cannot infer -1 in [{given}], of {whole} elements")
            sizes[free] = exact
    return _shaped(site, x, sizes)


def _shaped(site: OnnxSite, x: Expr, sizes: Sequence[Size]) -> Expr:
    made, axes_match = reshaped(site.b, x, sizes)
    if not axes_match and all(s.constant != 0 for s in x.shape):
        before, after = (", ".join(map(str, shape)) for shape in (x.shape, sizes))
        site.importer.notes.opaque.append(f"{site.where}: [{before}] to [{after}]")
    return made


@operator("Flatten", latest=25, moves=(0,))
def _flatten(site: OnnxSite) -> Made:
    x, axis = site.x(0), site.int("axis", 1)
    if not -x.rank <= axis <= x.rank:
        site.malformed(f"there is no axis {axis} in a tensor of rank {x.rank}")
    axis = axis if axis >= 0 else axis + x.rank
    return _shaped(site, x, [product(x.shape[:axis]), product(x.shape[axis:])])


def _given_axes(site: OnnxSite, by_input: int = 13) -> tuple[int, ...] | None:
    if site.version < by_input:
        return site.ints("axes")
    return site.numbers(1) if site.has(1) else None


@operator("Squeeze", latest=25, moves=(0,))
def _squeeze(site: OnnxSite) -> Made:
    x, axes = site.x(0), _given_axes(site)
    if axes is None:
        dropped = {i for i, s in enumerate(x.shape) if s == ONE}
    else:
        dropped = {site.axis(axis, x.rank) for axis in axes}
    for i in sorted(dropped):
        if x.shape[i] != ONE:
            if x.shape[i].constant is not None:
                site.malformed(f"dimension {i} is {x.shape[i]}, not 1")
            site.refuse_symbolic(f"dimension {i} is {x.shape[i]}, and must be 1", x.shape[i])
    return reshaped(site.b, x, [s for i, s in enumerate(x.shape) if i not in dropped])[0]


@operator("Unsqueeze", latest=25, moves=(0,))
def _unsqueeze(site: OnnxSite) -> Made:
    x, axes = site.x(0), _given_axes(site)
    if axes is None:
        site.malformed("the axes are missing")
    rank = x.rank + len(axes)
    new = [site.axis(axis, rank) for axis in axes]
    if len(set(new)) < len(new):
        site.malformed(f"an axis is named twice in {axes}")
    old = iter(x.shape)
    return reshaped(site.b, x, [ONE if i in new else next(old) for i in range(rank)])[0]


@operator("Transpose", latest=25, moves=(0,))
def _transpose(site: OnnxSite) -> Made:
    x, order = site.x(0), site.ints("perm")
    order = tuple(reversed(range(x.rank))) if order is None else order
    if sorted(order) != list(range(x.rank)):
        site.malformed(f"perm {list(order)} is not a permutation of {x.rank} axes")
    if list(order) == list(range(x.rank)):
        return x
    names = axis_letters(x.rank)
    return site.b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(names[i] for i in order)}")


def expanded(b: Builder, x: Expr, sizes: Sequence[Size]) -> Expr:
    """Return x broadcast with a shape: if one side has size 1, the other side's size is used."""
    rank = max(x.rank, len(sizes))
    held = [ONE] * (rank - x.rank) + list(x.shape)
    wanted = [ONE] * (rank - len(sizes)) + list(sizes)
    shape = [h if w == ONE else w for h, w in zip(held, wanted, strict=True)]
    if len(shape) == x.rank and tuple(shape) == x.shape:
        return x
    return b.expand(x, shape=tuple(shape))


@operator("Expand", latest=13, moves=(0,))
def _expand(site: OnnxSite) -> Made:
    return expanded(site.b, site.x(0), site.sizes(1))


@operator("Tile", latest=13, first=6, moves=(0,))
def _tile(site: OnnxSite) -> Made:
    b, x, repeats = site.b, site.x(0), site.sizes(1)
    if len(repeats) != x.rank:
        site.malformed(f"{len(repeats)} repeats do not fit rank {x.rank}")
    for axis, times in enumerate(repeats):
        if times == ONE:
            continue
        if x.shape[axis] == ONE:
            x = b.expand(x, shape=tuple(times if i == axis else n for i, n in enumerate(x.shape)))
            continue
        before = x.shape
        with_axis, _ = reshaped(b, x, [*before[:axis], ONE, *before[axis:]])
        again = b.expand(with_axis, shape=(*before[:axis], times, *before[axis:]))
        names = axis_letters(x.rank + 1)
        joined = [*names[:axis], f"({names[axis]} {names[axis + 1]})", *names[axis + 2 :]]
        x = b.rearrange(again, pattern=f"{' '.join(names)} -> {' '.join(joined)}")
    return x


@operator("DepthToSpace", latest=13)
def _depth_to_space(site: OnnxSite) -> Made:
    b, x, block = site.b, site.x(0), site.int("blocksize", 1)
    columns = site.text("mode", "DCR") == "CRD"
    if x.rank != 4:
        site.decompose()
    left = f"b (c p={block} q={block}) h w" if columns else f"b (p={block} q={block} c) h w"
    return b.rearrange(x, pattern=f"{left} -> b c (h p) (w q)")


@operator("SpaceToDepth", latest=13)
def _space_to_depth(site: OnnxSite) -> Made:
    x, block = site.x(0), site.int("blocksize", 1)
    if x.rank != 4:
        site.decompose()
    return site.b.rearrange(x, pattern=f"b c (h p={block}) (w q={block}) -> b (p q c) h w")
