"""Encounters: uses of an axis by an op other than mapping it, each of one of these kinds.

    Reduced        no result has the axis: its elements are combined
    Whole          a result may read all of the axis
    SelfAttention  it is the axis of both keys and queries of attention
    Scanned        a result reads the axis up to the result's own position
    Indexed        the axis is read, or written, at positions that another operand holds
    Generated      a result counts along the axis
    Resized        the result has another axis: it was sliced, padded, joined or strided, or only its length is used
    Reordered      the axis is divided, and its parts do not stay adjacent in their order
    Paired         a result has the axis in two dimensions, and so holds pairs of positions

The kind determines whether the axis may be stepped and packed at that op (`Encounter.steps`, `Encounter.packs`), and
how partial results are combined if the axis is split (`treadle.ir.analysis.following.Following.split`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, assert_never

from treadle.ir.graph import Node


@dataclass(frozen=True)
class _Kind:
    """factor   the factor of the op's rule that the axis is located in"""

    factor: str
    word: ClassVar[str]

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class Reduced(_Kind):
    """monoid   the reduction of the elements, for example a sum"""

    monoid: str
    word = "reduced"

    def __str__(self) -> str:
        return f"{self.word} by {self.monoid}"


@dataclass(frozen=True)
class Whole(_Kind):
    """causal   True if each position of the result reads only positions up to itself"""

    causal: bool = False
    word = "whole"

    def __str__(self) -> str:
        return f"{self.word} up to each position" if self.causal else self.word


@dataclass(frozen=True)
class SelfAttention(Whole):
    """aligned   True if the axis is all of the keys and all of the queries, so that a query's own position is known"""

    aligned: bool = False


@dataclass(frozen=True)
class Scanned(_Kind):
    word = "scanned"


@dataclass(frozen=True)
class Indexed(_Kind):
    """is_kept   True if the result has the axis too, as for a scatter along the axis; False for a lookup"""

    is_kept: bool = False
    word = "indexed"


@dataclass(frozen=True)
class Generated(_Kind):
    word = "generated"


@dataclass(frozen=True)
class Resized(_Kind):
    """factor   the factor that the op changes; "" if the axis is in no factor, or the op reads a part of its factor"""

    factor: str = ""
    word = "sliced, padded, joined or strided"


@dataclass(frozen=True)
class Reordered:
    word: ClassVar[str] = "reordered"

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class Paired:
    """in_output   True if the value with the pairs is an output of the graph, so that no later op reduces them"""

    in_output: bool = False
    word: ClassVar[str] = "paired with itself"

    def __str__(self) -> str:
        return f"{self.word} in an output" if self.in_output else self.word


Kind = Reduced | Whole | SelfAttention | Scanned | Indexed | Generated | Resized | Reordered | Paired


@dataclass(frozen=True)
class Encounter:
    """A use of the axis by an op other than mapping it.

    kind     one of the kinds above
    scope    the full scope of the first of `count` nodes with this encounter
    within   the composite whose body contains the op, if any
    """

    node: Node
    kind: Kind
    scope: str
    count: int = 1
    within: Node | None = None

    @property
    def steps(self) -> bool:
        """True if the op can compute a chunk of the axis from that chunk and a state: causal attention, or a scan or
        iota with a declared step. True also for pairs of positions inside the graph: the ops that read the pairs
        decide.
        """
        match self.kind:
            case Whole(causal=causal):  # self-attention, too
                return causal
            case Scanned() | Generated():
                return self.node.op.step is not None
            case Paired(in_output=in_output):
                return not in_output
            case Reduced() | Indexed() | Resized() | Reordered():
                return False
            case _:
                assert_never(self.kind)

    @property
    def packs(self) -> bool:
        """True if the op computes the same when rows of different lengths are stored end to end."""
        match self.kind:
            case Reduced() | Scanned() | Indexed():
                return True
            case Generated():
                return self.node.op.step is not None
            case Whole() | Resized() | Reordered() | Paired():
                return False
            case _:
                assert_never(self.kind)

    @property
    def line(self) -> str:
        """The user's line, `gpt2.py:41`, or an empty string."""
        return str((self.within or self.node).source or "")

    @property
    def op(self) -> str:
        """The op's name, and the name of the composite whose body contains it."""
        return self.node.op.name if self.within is None else f"{self.within.op.name} ({self.node.op.name} inside)"

    @property
    def place(self) -> str:
        """`  (gpt2.py:41, scope h.0.attn, 12 times)`, or the known part of it."""
        scope = f"scope {self.scope}" if self.scope else ""
        times = f"{self.count} times" if self.count > 1 else ""
        known = ", ".join(part for part in (self.line, scope, times) if part)
        return f"  ({known})" if known else ""

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        return f"{self.op}: the axis is {self.kind}{self.place}"


@dataclass(frozen=True)
class Combination:
    """An encounter at which the parts of a split axis must be combined, and the combination: a reduction or the scan of
    the preceding parts.
    """

    encounter: Encounter
    by: str

    def __str__(self) -> str:
        e = self.encounter
        return f"{e.op}: the axis is {e.kind.word} by {self.by}{e.place}"


@dataclass(frozen=True)
class Verdict:
    """The answer to whether an axis may be stepped, packed or split. It is true if no encounter forbids this.

    against  encounters that forbid it
    combine  encounters at which partial results must be combined (for `split`)
    """

    question: str
    axis: str
    against: tuple[Encounter, ...]
    combine: tuple[Combination, ...] = ()

    def __bool__(self) -> bool:
        return not self.against

    def __repr__(self) -> str:
        head, *reasons = str(self).splitlines()
        suffix = f": {len(reasons)} reason{'s' * (len(reasons) > 1)}, see print()" if reasons else ""
        return f"<{head}{suffix}>"

    def __str__(self) -> str:
        lines = [f"{self.axis} may {'' if self else 'not '}be {self.question}"]
        lines += [f"  {e}" for e in self.against]
        lines += [f"  combine by {c.by} at {c.encounter.op}{c.encounter.place}" for c in self.combine]
        return "\n".join(lines)
