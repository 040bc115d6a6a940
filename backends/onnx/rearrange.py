"""ONNX code that rearranges elements: reshapes with little shape arithmetic, and rearranges with few nodes.

    b s (h d) -> b h s d      Reshape [0, 0, 12, 64], Transpose
    a b -> 1 a 1 b            Unsqueeze
    b h s d -> b s (h d)      Transpose, Reshape [0, 0, 768]

A Reshape may copy a size from the same position (0) and infer one size (-1). Other sizes are computed from the inputs'
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.backends.onnx.spelled_line import OnnxLine, Tensor
from treadle.backends.onnx.writer import OnnxWriter, newer_opset
from treadle.ir.sizing.sizes import Size, product


def reshaped(w: OnnxWriter, x: Tensor, have: Sequence[Size], want: Sequence[Size]) -> Tensor:
    """Reshape x from the sizes `have` to the sizes `want`; return x itself if they are equal.

    Raises BackendError if a size may be 0 and the opset's Reshape cannot express it.
    """
    if list(have) == list(want):
        return x
    added, removed = _ones_beside(want, have), _ones_beside(have, want)
    if added is not None:
        return w.add("Unsqueeze", x, w.integers(*added))
    if removed is not None:
        return w.add("Squeeze", x, w.integers(*removed))
    target = _short_target(w, have, want)
    if target is not None:
        return w.add("Reshape", x, w.integers(*target))
    if not any(map(w.may_be_empty, want)):
        return w.add("Reshape", x, w.vector(want))
    if w.opset < 14:
        shape = ", ".join(map(str, want))
        raise w.refusal(
            f"Reshape of opset {w.opset} does not support sizes that may be 0: [{shape}]",
            hint=newer_opset(14),
        )
    return w.add("Reshape", x, w.vector(want), allowzero=1)


def _ones_beside(longer: Sequence[Size], shorter: Sequence[Size]) -> list[int] | None:
    """Return the positions of the ones that `longer` has in addition to `shorter`, or None if the two differ
    otherwise.
    """
    ones, at = [], 0
    for place, size in enumerate(longer):
        if at < len(shorter) and shorter[at] == size:
            at += 1
        elif size.constant == 1:
            ones.append(place)
        else:
            return None
    return ones if at == len(shorter) else None


def _short_target(w: OnnxWriter, have: Sequence[Size], want: Sequence[Size]) -> list[int] | None:
    """Return the sizes of a Reshape as numbers, with 0 for a copied and -1 for an inferred size; None if a size must be
    computed.
    """
    target: list[int | None] = []
    for place, size in enumerate(want):
        copied = place < len(have) and have[place] == size
        constant = size.constant
        target.append(0 if copied and (constant is None or constant == 0) else constant or None)
    unknown = [place for place, number in enumerate(target) if number is None]
    if len(unknown) > 1:
        return None
    if unknown:
        # If another size is 0, the inferred size could be anything.
        others = [size for place, size in enumerate(want) if place != unknown[0]]
        if any(map(w.may_be_empty, others)) or want[unknown[0]].constant == 0:
            return None
    return [-1 if number is None else number for number in target]


def rearranged(line: OnnxLine) -> Tensor:
    """Emit a rearrange: split dimensions whose factors the permutation separates, permute, join dimensions, and add or
    drop ones.
    """
    application = line.op.apply([line.type("x")])
    (operand,), (result,) = application.operands, application.results
    sizes = {name: dim.size for name, dim in application.dims.items()}
    before, after = (
        [[name for name in dim.factors if sizes[name].constant != 1] for dim in side]
        for side in (operand or (), result)
    )
    place = {name: at for at, name in enumerate(name for dim in after for name in dim)}
    have, want = line.type("x").shape, line.result.shape
    runs = [_runs(dim, place) for dim in before]
    starts = [place[run[0]] for dim in runs for run in dim]
    if starts == sorted(starts):
        return reshaped(line.w, line.x, have, want)
    x = line.x
    if any(len(dim) > 1 for dim in runs):
        split = [run for dim in runs for run in dim]
        x = reshaped(line.w, x, have, [_size(run, sizes) for run in split])
    else:
        split = [dim[0] if dim else [] for dim in runs]
    order = _order(split, after, place)
    if order != list(range(len(split))):
        x = line.add("Transpose", x, perm=order)
    return reshaped(line.w, x, [_size(split[at], sizes) for at in order], want)


def _runs(dim: Sequence[str], place: dict[str, int]) -> list[list[str]]:
    """Split the factors of a dimension into runs that stay together, and return the runs."""
    runs: list[list[str]] = []
    for name in dim:
        if runs and place[runs[-1][-1]] + 1 == place[name]:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _order(split: Sequence[list[str]], after: Sequence[list[str]], place: dict[str, int]) -> list[int]:
    """Return the new position of each dimension. Factors are in the order of the result. A one is at the position of a
    one of the result, or else at the end.
    """
    ones = [at for at, run in enumerate(split) if not run]
    held = sorted((at for at, run in enumerate(split) if run), key=lambda at: place[split[at][0]])
    order: list[int] = []
    for dim in after:
        if not dim and ones:
            order.append(ones.pop(0))
        end = place[dim[-1]] if dim else -1
        while held and place[split[held[0]][0]] <= end:
            order.append(held.pop(0))
    return order + ones


def _size(names: Sequence[str], sizes: dict[str, Size]) -> Size:
    return product(sizes[name] for name in names)
