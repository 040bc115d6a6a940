"""Shape changes between known sizes: a rearrange if the axes can be matched, else an opaque reshape.

[B, S, 768] -> [B, S, 12, 64]     "a b (c=12 d) -> a b c d"
[B, S, 12, 64] -> [B, S, 768]     "a b c d -> a b (c d)"
[B, S, 1] -> [B, S]               "a b 1 -> a b"
[4, 6] -> [3, 8]                  reshape: no axis of one side consists of whole axes of the other
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.rules.axis_splitting import common_runs
from treadle.ir.sizing.sizes import Size


def reshaped(b: Builder, x: Expr, shape: Sequence[Size | int]) -> tuple[Expr, bool]:
    """Return x in another shape with the same number of elements, and True if its axes could be matched.

    Raises RuleError if the numbers of elements differ.
    """
    sizes = tuple(map(Size.of, shape))
    if x.shape == sizes:
        return x, True
    pattern = _pattern(x.shape, sizes)
    if pattern is None:
        return b.reshape(x, shape=sizes), False
    return b.rearrange(x, pattern=pattern), True


def _pattern(before: tuple[Size, ...], after: tuple[Size, ...]) -> str | None:
    runs = common_runs(before, after)
    if runs is None or any(len(olds) > 1 and len(news) > 1 for olds, news in runs):
        return None
    taken = {s for size in (*before, *after) for s in size.symbols}
    if len(before) + len(after) + len(taken) > 50:
        return None
    letters = iter(axis_letters(len(before) + len(after), taken))
    left = ["1"] * len(before)
    right = ["1"] * len(after)
    for olds, news in runs:
        if len(olds) == 1:
            names = [next(letters) for _ in news]
            sizes = [after[i] for i in news]
            # All factors but one have their sizes in the pattern. The factor without a size is the one whose size is
            # hardest to write, or the last one.
            free = max(range(len(news)), key=lambda k: (not _is_plain(sizes[k]), len(sizes[k].symbols), k))
            if any(not _is_plain(s) for k, s in enumerate(sizes) if k != free):
                return None
            parts = [n if k == free else f"{n}={sizes[k]}" for k, n in enumerate(names)]
            left[olds[0]] = parts[0] if len(parts) == 1 else f"({' '.join(parts)})"
            for i, n in zip(news, names, strict=True):
                right[i] = n
        else:
            names = [next(letters) for _ in olds]
            for i, n in zip(olds, names, strict=True):
                left[i] = n
            right[news[0]] = f"({' '.join(names)})"
    return f"{' '.join(left)} -> {' '.join(right)}"


def _is_plain(size: Size) -> bool:
    return size.constant is not None or size.as_symbol is not None
