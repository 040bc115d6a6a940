"""Counts as text: `124 M`, `2 ops`, `118 GFLOP/s in f32`, `B=1, S=128`."""

from __future__ import annotations

from collections.abc import Mapping


def human(count: float, unit: str = "") -> str:
    """Return a count in three digits with its prefix: `124 M`, `497 MB`, `1.36 GFLOPs`."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale * 0.9995:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".strip()


def rate_text(rate: float, dtype: str) -> str:
    """Return operations per second on numbers of a dtype: `118 GFLOP/s in f32`, `471 GOP/s in int8`."""
    return f"{human(rate, 'OP' if dtype == 'int8' else 'FLOP')}/s in {dtype}"


def counted(count: int, what: str) -> str:
    """Return `1 op`, `2 ops`, `1,024 parameters`: the plural ends in s, or in es after an s as in `passes`."""
    ending = "" if count == 1 else "es" if what.endswith(("s", "sh", "ch", "x")) else "s"
    return f"{count:,} {what}{ending}"


def lasting(seconds: float) -> str:
    """Return a time in its two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    left = round(seconds)
    for size, unit, smaller, name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            return f"{left // size} {unit} {left % size // smaller} {name}"
    return f"{left} s"


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Return `B=1, S=128`."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
