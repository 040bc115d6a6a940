"""The alignment of the layers of two builds, if one has more layers than the other.

    a:  h.0  h.1       h.2
    b:  h.0  h.1  h.2  h.3         if h.2 of b is unlike h.2 of a

A stack is a scope whose parts are numbers. Every layer of the shorter stack gets a partner, in order, such that the
number of equal partners is largest. Other scopes correspond if their names are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

from treadle.comparing.run_nodes import RunNode, parts_of
from treadle.ir.hashing import op_key

_MOST_PAIRS = 5_000_000  # limit on compared pairs of layers; above it, layers are paired in order


@dataclass(frozen=True, eq=False)
class ScopeTree:
    """A scope: its own ops, and its inner scopes by name, in order."""

    ops: list[str] = field(default_factory=list)
    parts: dict[str, ScopeTree] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Iterable[RunNode]) -> ScopeTree:
        """Return the root scope, which contains all nodes."""
        root = cls()
        for each in nodes:
            tree = root
            for part in parts_of(each.scope):
                tree = tree.parts.setdefault(part, cls())
            tree.ops.append(op_key(each.node.op))
        return root

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """A key that is equal for scopes with the same ops in the same order. Indices of layers are ignored."""
        inner = [("#" if name.isdigit() else name, tree.signature) for name, tree in self.parts.items()]
        return (tuple(self.ops), tuple(inner))

    @property
    def layers(self) -> list[str]:
        """The names of the inner scopes that are numbers, in order."""
        return [name for name in self.parts if name.isdigit()]


@dataclass(frozen=True, eq=False)
class ScopeAlignment:
    """For each scope of b, the corresponding scope of a; None for a layer that a lacks."""

    _known: Mapping[tuple[str, ...], tuple[str, ...] | None]
    _back: Mapping[tuple[str, ...], tuple[str, ...] | None]

    @classmethod
    def of(cls, a: Iterable[RunNode], b: Iterable[RunNode]) -> ScopeAlignment:
        """Align the scopes of two runs."""
        pairs = list(_aligned(ScopeTree.of(a), ScopeTree.of(b), (), ()))
        known = {theirs: ours for ours, theirs in pairs if theirs is not None}
        return cls(known, {ours: theirs for ours, theirs in pairs if ours is not None})

    def flipped(self) -> ScopeAlignment:
        """Return the same alignment with b as the first side."""
        return ScopeAlignment(self._back, self._known)

    def in_a(self, scope: str) -> str | None:
        """Return the scope of a that corresponds to a scope of b; by default the scope of the same name. None for a
        scope in a layer that a lacks.
        """
        parts = parts_of(scope)
        for length in range(len(parts), -1, -1):
            head = parts[:length]
            if head in self._known:
                found = self._known[head]
                return None if found is None else ".".join((*found, *parts[length:]))
        return scope


def _aligned(
    a: ScopeTree, b: ScopeTree, at: tuple[str, ...], within: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...] | None, tuple[str, ...] | None]]:
    """Yield the scopes of a below `at` with the corresponding scopes of b below `within`; None for a missing layer."""
    yield at, within
    for name, tree in b.parts.items():
        if name in a.parts and not name.isdigit():
            yield from _aligned(a.parts[name], tree, (*at, name), (*within, name))
    for one, other in _aligned_layers(a, b):
        if one is None or other is None:
            yield None if one is None else (*at, one), None if other is None else (*within, other)
        else:
            yield from _aligned(a.parts[one], b.parts[other], (*at, one), (*within, other))


def _aligned_layers(a: ScopeTree, b: ScopeTree) -> Iterator[tuple[str | None, str | None]]:
    """Yield pairs of layers in order, one for each layer of the shorter stack, with the largest number of equal pairs.
    If there are several such pairings, the one whose unpaired layers come last is chosen.
    """
    is_flipped = len(a.layers) > len(b.layers)
    short, long = (b, a) if is_flipped else (a, b)
    spare = len(long.layers) - len(short.layers)
    if spare * len(short.layers) > _MOST_PAIRS:
        yield from (_pair(name, other, is_flipped) for name, other in zip_longest(short.layers, long.layers))
        return
    ours, theirs = ([tree.parts[name].signature for name in tree.layers] for tree in (short, long))
    # best[at][skipped]: the largest number of equal pairs of ours[at:] with theirs[at + skipped:]
    best = [[0] * (spare + 1) for _ in range(len(ours) + 1)]
    for at in range(len(ours) - 1, -1, -1):
        for skipped in range(spare, -1, -1):
            paired = best[at + 1][skipped] + (ours[at] == theirs[at + skipped])
            best[at][skipped] = max(paired, best[at][skipped + 1] if skipped < spare else 0)
    skipped = 0
    for at, name in enumerate(short.layers):
        while (
            skipped < spare
            and best[at][skipped] == best[at][skipped + 1]
            and best[at][skipped] > (best[at + 1][skipped] + (ours[at] == theirs[at + skipped]))
        ):
            yield _pair(None, long.layers[at + skipped], is_flipped)
            skipped += 1
        yield _pair(name, long.layers[at + skipped], is_flipped)
    for name in long.layers[len(ours) + skipped :]:
        yield _pair(None, name, is_flipped)


def _pair(short: str | None, long: str | None, is_flipped: bool) -> tuple[str | None, str | None]:
    return (long, short) if is_flipped else (short, long)
