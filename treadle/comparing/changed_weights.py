"""The weights of two builds: weights whose dtype, encoding or size differs, and weights that only one build has."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from treadle.comparing.builds import Build
from treadle.comparing.folded_names import few_names
from treadle.comparing.scope_alignment import ScopeAlignment
from treadle.ir.types import Type


@dataclass(frozen=True)
class WeightChange:
    """Weights that changed in the same way.

    names   their names in b, or in a if b lacks them
    a, b    dtype or encoding in a and in b; "" if a side lacks the weights
    bits    bits per element in a and in b, including the scales of blocks; 0 if a side lacks the weights
    bytes   total bytes in a and in b
    reason  the reason why b does not quantize them, if quantization was requested
    """

    names: tuple[str, ...]
    a: str
    b: str
    bits: tuple[Fraction, Fraction]
    bytes: tuple[int, int]
    reason: str

    @property
    def is_wider(self) -> bool:
        """True if both builds have the weights, and b takes more bits per element."""
        return bool(self.a) and self.bits[1] > self.bits[0]

    def as_dict(self) -> dict[str, Any]:
        """Return the change as JSON."""
        facts = {"names": list(self.names), "a": self.a or None, "b": self.b or None}
        return {**facts, "bits": [float(each) for each in self.bits], "bytes": list(self.bytes), "reason": self.reason}

    def __str__(self) -> str:
        names = few_names(self.names)
        why = f"; {self.reason}" if self.reason else ""
        if not self.a or not self.b:
            return f"{'added' if self.b else 'removed'} {names}: {self.b or self.a}, {sum(self.bytes):,} bytes"
        bits = " -> ".join(f"{float(each):.3g}" for each in self.bits)
        return f"{names}: {self.a} -> {self.b}, {bits} bits, {self.bytes[0]:,} -> {self.bytes[1]:,} bytes{why}"


def weight_changes(a: Build, b: Build, scopes: ScopeAlignment) -> tuple[WeightChange, ...]:
    """Return the weights whose dtype, encoding or size differs. Weights that take more bits in b come first."""
    ours, theirs = ({n: v.type for n, v in each.graph.parameters.items()} for each in (a, b))
    pairs: list[tuple[str, Type | None, Type | None]] = []
    seen = set()
    for name, type in theirs.items():
        before = scopes.in_a(name)
        seen.add(before)
        pairs.append((name, None if before is None else ours.get(before), type))
    pairs += [(name, type, None) for name, type in ours.items() if name not in seen]
    groups: dict[tuple[object, ...], list[tuple[str, Type | None, Type | None]]] = {}
    for name, old, new in pairs:
        if old is None or new is None or _facts(old) != _facts(new):
            reason = "" if old is None or new is None else b.encoding_reasons.get(name, "")
            key = (_text(old), _text(new), _bits(old), _bits(new), reason)
            groups.setdefault(key, []).append((name, old, new))
    changes = [_change(of, str(key[-1])) for key, of in groups.items()]
    return tuple(sorted(changes, key=lambda each: not each.is_wider))


def weight_bits(build: Build) -> Fraction:
    """Return the mean number of bits per element over all weights, including the scales of blocks; 0 if there are
    none.
    """
    types = [v.type for v in build.graph.parameters.values()]
    elements = sum(type.elements.evaluate({}) for type in types)
    return Fraction(8 * sum(type.bytes_at({}) for type in types), elements) if elements else Fraction(0)


def _change(of: list[tuple[str, Type | None, Type | None]], reason: str) -> WeightChange:
    _, before, after = of[0]
    bytes = [sum(0 if type is None else type.bytes_at({}) for type in side) for side in list(zip(*of, strict=True))[1:]]
    names = tuple([name for name, _, _ in of])
    bits = _bits(before), _bits(after)
    same_form = before is not None and after is not None and bits[0] == bits[1] and _text(before) == _text(after)
    a, b = (str(before), str(after)) if same_form else (_text(before), _text(after))
    return WeightChange(names, a, b, bits, (bytes[0], bytes[1]), reason if bits[1] >= bits[0] else "")


def _facts(type: Type) -> tuple[object, ...]:
    return _text(type), type.static_shape


def _text(type: Type | None) -> str:
    if type is None:
        return ""
    return str(type.dtype) if type.encoding is None else str(type.encoding)


def _bits(type: Type | None) -> Fraction:
    elements = 0 if type is None else type.elements.evaluate({})
    return Fraction(8 * type.bytes_at({}), elements) if type is not None and elements else Fraction(0)
