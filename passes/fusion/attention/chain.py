"""What masks and biases do to scores, one after the other, as terms of attention that do the same.

    where(keep, x, number)    fills in: the number stands in place of all that came before it
    x + addend                adds

The last fill wins, and what is added later is added to it. Where a row keeps a key, all this is masks and biases in any
order. A row in which every key is masked holds the numbers alone, and which of them is greatest decides what is left:

    where(b, where(a, s, M), M) = where(a & b, s, M), and not s + where(a, 0, M) + where(b, 0, M), in which M + M stands

So where the order counts, the chain becomes one bias: the chain itself, done to zeros in place of the scores. Added to
the scores this is the chain done to the scores, if they are lost in the rounding of every number that is filled in, or
if the queries of a row in which every key is masked are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from treadle.ir.attention.attention_terms import BooleanMask, TensorBias
from treadle.ir.types import DType
from treadle.passes.fusion.attention.biases import (
    ABSORBING,
    Table,
    addends_of,
    as_mask,
    hazards_of,
    read_bias,
    table_mask,
    table_terms,
)
from treadle.passes.fusion.attention.core import LEAST_FILL, Added, Chosen, Mismatch, Placed, Scores
from treadle.passes.fusion.attention.masks import read_condition
from treadle.passes.fusion.attention.roles import Fused, Note, PlacedOperand, Reading, Roles, never_empty
from treadle.passes.fusion.attention.zeros import OnZeros, Put


@dataclass(frozen=True, eq=False)
class ChainStep:
    """One step of a chain, as it was read.

    term      as it stands there; a part of an addend stands for itself
    unit      by how much everything is multiplied from here to the softmax, without its sign
    peak      the most that this is on the way
    filled    whether it is filled in, or else added
    mask      the condition and number of a mask; None for other addends
    kept      what a mask keeps
    hazards   what an addend may hold that is no mask
    """

    term: Added | Chosen
    unit: float
    peak: float
    filled: bool = False
    mask: Chosen | Table | None = None
    kept: Reading = field(default_factory=Reading)
    hazards: frozenset[str] = frozenset()

    @property
    def fill(self) -> float:
        """A mask's number as the softmax sees it; 0 for what is no mask."""
        return 0.0 if self.mask is None else self.mask.fill

    @property
    def is_finite(self) -> bool:
        """Whether it is a mask by a finite number."""
        return -math.inf < self.fill < 0

    @property
    def dtype(self) -> DType:
        return self.term.node.results[0].type.dtype

    @property
    def size(self) -> float:
        """How large a finite number it may hold, as it stands there."""
        if self.mask is not None:
            return abs(self.fill) / self.unit if self.is_finite else 0.0
        return self.dtype.greatest if self.hazards else LEAST_FILL

    @property
    def seen(self) -> Seen:
        """Where a mask keeps a key."""
        if isinstance(self.mask, Chosen):
            return Seen(self.mask.placed, self.mask.keep)
        assert isinstance(self.term, Added)
        return Seen(self.term.placed, factor=self.term.factor)


@dataclass(frozen=True)
class Seen:
    """What keeps a key: where a condition is `keep`, or factor * an addend is not -inf."""

    placed: Placed
    keep: bool = True
    factor: float = 1.0


@dataclass
class ChainTerms:
    """What a chain comes to.

    emptied         queries that see no key by all of these have to be zeros
    kept_nan        queries that see no key by all of these, nor by the biases where `biases_lose`, give NaN
    overflows_in    the dtype in which masks are added up past its range, if they may be
    """

    masks: list[Fused] = field(default_factory=list)
    biases: list[Fused] = field(default_factory=list)
    emptied: list[Seen] = field(default_factory=list)
    kept_nan: list[Seen] = field(default_factory=list)
    biases_lose: bool = False
    overflows_in: DType | None = None
    notes: list[Note] = field(default_factory=list)


def is_mask(
    fill: float,
    *,
    added: bool,
    by_position: bool,
    has_condition: bool,
    overridden: bool,
    row_keeps_a_key: bool,
    zero_empty_rows: bool,
) -> bool:
    """Whether a mask by this number is one of attention's, or else a bias.

    Only what has a condition, or is known by position, can be one: a table of numbers is neither. A row that
    attention's masks leave no key gives zeros. So it is a mask if

      - zero_empty_rows: zeros are what the caller wants there
      - row_keeps_a_key, whatever the masks hold, and it is filled in or known by position: any other addend is a tensor
        already
      - it is -inf, which gives zeros or NaN there, and no number is filled in later where it masks (`overridden`)
    """
    if not (has_condition or by_position):
        return False
    if zero_empty_rows:
        return True
    if row_keeps_a_key and (by_position or not added):
        return True
    return fill == -math.inf and not overridden


def terms_of_chain(
    roles: Roles,
    scores: Scores,
    zero_empty_rows: bool,
    guarded: bool,
    beside: Sequence[Fused] = (),
    rule: str = "FuseAttention",
    *,
    trained: bool = False,
) -> ChainTerms:
    """The terms that do to scores what the chain does. Raises Mismatch where there are none.

    trained   gradients must be the same as well: where a number is filled in, no gradient flows to what it replaces
    guarded   a row that is -inf throughout gives zeros, as attention gives, and not NaN
    beside    masks that attention has already
    rule      the pass that asks
    """
    found = ChainTerms()
    steps = _read(roles, scores, exactly=False)
    masks_outweigh = not any(step.hazards for step in steps)
    keeps_a_key = masks_outweigh and never_empty([*beside, *(f for step in steps for f in step.kept.terms)], roles)
    for step in steps:
        _expect_low(step, scores)
        found.notes += step.kept.notes
    if not (keeps_a_key or zero_empty_rows):
        found.notes += _addend_notes(steps, masks_outweigh, rule)
        steps = _read(roles, scores, exactly=True, trained=trained)
    masks: list[ChainStep] = []
    others: list[ChainStep] = []
    last_fill = max((n for n, step in enumerate(steps) if step.filled and step.is_finite), default=0)
    for n, step in enumerate(steps):
        masking = step.mask is not None and is_mask(
            step.fill,
            added=not step.filled,
            by_position=step.kept.structural,
            has_condition=isinstance(step.mask, Chosen),
            overridden=n < last_fill,
            row_keeps_a_key=keeps_a_key,
            zero_empty_rows=zero_empty_rows,
        )
        (masks if masking else others).append(step)
    found.masks = [f for step in masks for f in step.kept.terms]
    if keeps_a_key or zero_empty_rows:
        found.biases = _each(roles, others)
        return found
    overflow = _overflow(others, scores)
    found.emptied = _emptied(steps, scores, trained)
    found.biases = _biases(roles, others, overflow, trained)
    found.overflows_in = overflow.dtype if overflow else None
    if not guarded and _may_lose_rows(roles, steps, overflow):
        found.kept_nan = [step.seen for step in masks]
        infinite = any(step.fill == -math.inf or "infinite" in step.hazards for step in others)
        found.biases_lose = infinite or overflow is not None
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(roles: Roles, scores: Scores, exactly: bool, trained: bool = False) -> list[ChainStep]:
    """The steps, in order. A sum that is added is several, and so is where(c, x, -inf): x, and a mask.

    exactly   not where x may be as large as the number of the mask, to which it would be added
    trained   nor where that number is finite, so that x has a gradient in a row in which every key is masked
    """
    steps: list[ChainStep] = []
    for term in scores.terms:
        parts = [term] if isinstance(term, Chosen) else addends_of(roles.axes, term, exactly, trained)
        for part in parts:
            step = ChainStep(part, abs(term.factor), term.peak, filled=part is term and isinstance(term, Chosen))
            mask = part if isinstance(part, Chosen) else as_mask(roles.axes, part)
            if mask is not None:
                step = replace(step, mask=mask, kept=read_condition(roles, mask.placed, mask.keep))
            elif isinstance(part, Added) and (table := table_mask(roles, part)) is not None:
                step = replace(step, mask=table, kept=Reading(table_terms(roles, table)))
            else:
                step = replace(step, hazards=hazards_of(part.placed.value))
            steps.append(step)
    return [step for step in steps if step.mask is None or step.kept.terms]


def _expect_low(step: ChainStep, scores: Scores) -> None:
    """Raise Mismatch for a mask whose number is not low beside scores of this scale, and for what raises scores."""
    node = step.term.node
    if isinstance(step.mask, Chosen) and step.fill > -LEAST_FILL * max(1.0, abs(scores.scale)):
        reason = f"scores times {scores.scale:g} may be as low as {step.fill:g}, by which they are masked"
        raise Mismatch(reason, node, scores.nodes, "-inf in its place")
    rising = "rising" in step.hazards or (isinstance(step.term, Added) and step.term.factor < 0)
    if "infinite" in step.hazards and rising:
        raise Mismatch("what is added to the scores may be inf", node, scores.nodes)


def _addend_notes(steps: Sequence[ChainStep], masks_outweigh: bool, rule: str) -> Iterator[Note]:
    """Tell of masks by large negative numbers, which are added, where with -inf they would have been terms.

    masks_outweigh   whether no other addend may be as large as they are
    """
    why = "a row in which every key is masked is an average" if masks_outweigh else "another addend may outweigh it"
    hint = f"-inf in its place, or {rule}(zero_empty_rows=True)"
    for step in steps:
        if step.is_finite and (isinstance(step.mask, Chosen) or step.kept.structural):
            yield Note(f"stays an addend: it is {step.fill:g}, and {why}", step.term.node, hint)


# -- biases ------------------------------------------------------------------------------------------------------------


def _biases(roles: Roles, steps: Sequence[ChainStep], overflow: _Overflow | None, trained: bool) -> list[Fused]:
    """The steps that are no masks: up to the last fill as one, and each that comes later for itself.

    What comes earlier, but is lost in the rounding of all numbers that are filled in later, may be one for itself, if
    its gradient does not count.
    """
    fills = [n for n, step in enumerate(steps) if step.filled]
    end = max(fills, default=-1)
    if overflow is not None and overflow.scaled:
        end = max(end, overflow.last)
    joined: list[ChainStep] = []
    separate: list[ChainStep] = []
    for n, step in enumerate(steps):
        later = [steps[m] for m in fills if m > n]
        lost = not trained and step.mask is None and not step.hazards and all(_absorbs(each) for each in later)
        (separate if n > end or (lost and later) else joined).append(step)
    if len(joined) <= 1 and not (overflow is not None and overflow.scaled):
        return _each(roles, [*joined, *separate])
    puts = [_put(roles, step) for step in joined]
    held = {axis for put in puts for axis in put.operand.axes.split()}
    axes = " ".join(name for name in roles.groups if name in held) or "t"
    as_one = OnZeros(puts[-1].operand.placed, axes, puts=tuple(puts))
    return [Fused(TensorBias(axes), (as_one,)), *_each(roles, separate)]


def _each(roles: Roles, steps: Sequence[ChainStep]) -> list[Fused]:
    """The steps as a sum, of which masks come first: the order tells no more than roundings."""
    ordered = sorted(steps, key=lambda step: not isinstance(step.mask, Chosen))
    return [f for step in ordered for f in _bias(roles, step)]


def _absorbs(step: ChainStep) -> bool:
    return step.fill <= -ABSORBING


def _bias(roles: Roles, step: ChainStep) -> list[Fused]:
    """A step for itself, as what is added."""
    if not isinstance(step.mask, Chosen):
        assert isinstance(step.term, Added)
        return read_bias(roles, step.term)
    operand = _narrowest(roles, step)
    if isinstance(step.term, Added):
        same = roles.held(step.term.placed.layout) == operand.axes
        if same or not step.dtype.holds(step.fill):
            return read_bias(roles, step.term)
    return [Fused(TensorBias(operand.axes), (replace(operand, fill=step.fill),))]


def _narrowest(roles: Roles, step: ChainStep) -> PlacedOperand:
    """A mask's condition, which may have fewer axes beneath its moves than where it is read."""
    assert isinstance(step.mask, Chosen)
    if len(step.kept.terms) == 1 and isinstance(step.kept.terms[0].term, BooleanMask):
        (operand,) = step.kept.terms[0].operands
        return operand
    axes = roles.held(step.mask.placed.layout) or "t"
    return PlacedOperand(step.mask.placed, axes, negated=not step.mask.keep)


def _put(roles: Roles, step: ChainStep) -> Put:
    """A step as it is done again, to zeros."""
    if isinstance(step.term, Added):
        sign = step.term.factor / step.unit
        axes = roles.held(step.term.placed.layout) or "t"
        return Put(PlacedOperand(step.term.placed, axes, factor=sign), step.unit)
    operand = _narrowest(roles, step)
    number = step.fill / step.unit
    if not step.filled:
        return Put(replace(operand, fill=number), step.unit)
    return Put(operand, step.unit, number)


# -- rows without keys -------------------------------------------------------------------------------------------------


def _emptied(steps: Sequence[ChainStep], scores: Scores, trained: bool) -> list[Seen]:
    """The masks of rows whose scores must vanish, since they are not lost beside a number that is filled in for them,
    or since they would have a gradient.

    Raises Mismatch where a row in which every key is masked holds scores as well, beside such numbers.
    """
    small = [step for step in steps if step.filled and step.is_finite and (trained or not _absorbs(step))]
    if not small:
        return []
    if any(step.hazards or (step.is_finite and not step.filled) for step in steps):
        reason = f"a row in which every key is masked by {small[0].fill:g} depends on more than that mask"
        raise Mismatch(reason, small[0].term.node, scores.nodes, "-inf in its place")
    return [step.seen for step in steps if step.filled or step.fill == -math.inf]


@dataclass(frozen=True)
class _Overflow:
    """That sums of masks may be past the range of their dtype: -inf, where a wider one has a number.

    last     the last step at which they may
    single   whether one mask suffices, with the scores or what they are multiplied by
    scaled   whether anything is multiplied later, so that it is not the sum of the biases that overflows
    """

    dtype: DType
    last: int
    single: bool
    scaled: bool


def _overflow(steps: Sequence[ChainStep], scores: Scores) -> _Overflow | None:
    """Whether what a chain adds up may overflow, by how large its numbers may be.

    Raises Mismatch where it does so by a factor that another takes back, since the bias would have but their product.
    Also where it does so by one that may be applied after a cast to a wider dtype, in which nothing overflows.
    """
    dtypes = {v.type.dtype for node in scores.nodes for v in node.results if v.type.dtype.is_float}
    bound, last, single = LEAST_FILL, -1, False
    alone = LEAST_FILL  # where one mask takes a key, or none
    for n, step in enumerate(steps):
        most, size = _past(step.dtype), step.size
        if not step.filled:
            size = max(size, LEAST_FILL)
            single = single or size + LEAST_FILL > most
        bound = max(bound, size) if step.filled else bound + size
        alone = max(alone, size)
        units = [*(later.unit for later in steps[n + 1 :]), 1.0]
        if bound * step.peak > most and step.peak > 1.01 * max(1.0, *(step.unit / unit for unit in units)):
            reason = f"masks are multiplied past the range of {step.dtype} on the way"
            raise Mismatch(reason, step.term.node, scores.nodes, "-inf in their place")
        factor = step.unit / units[0]
        grown = bound * max(1.0, factor)
        if grown > most >= bound and len(dtypes) > 1:
            reason = f"masks are multiplied past the range of {step.dtype}, perhaps in a wider dtype"
            raise Mismatch(reason, step.term.node, scores.nodes, "cast the scores before they are masked")
        single = single or grown > most >= bound or alone * factor > most
        if grown > most:
            last = n
        bound *= factor
        alone *= factor
    if last < 0:
        return None
    return _Overflow(steps[last].dtype, last, single, any(step.unit != 1.0 for step in steps[: last + 1]))


def _past(dtype: DType) -> float:
    """What is above this may round to infinity: half a spacing past the greatest number."""
    return dtype.greatest * (1 + dtype.spacing / 4) if dtype.bytes < 8 else dtype.greatest


def _may_lose_rows(roles: Roles, steps: Sequence[ChainStep], overflow: _Overflow | None) -> bool:
    """Whether every key of a row may come to -inf, by masks of -inf, by addends or by sums that overflow."""
    if any("infinite" in step.hazards for step in steps):
        return True
    lost = [f for step in steps if step.fill == -math.inf for f in step.kept.terms]
    large = [step for step in steps if step.is_finite or step.hazards] if overflow is not None else []
    anything = Fused(BooleanMask("t"))
    kept = [step.kept.terms or [anything] for step in large]
    # A key is lost by two of them together, so that all but one take it already.
    groups = [kept] if overflow is None or overflow.single else [kept[:n] + kept[n + 1 :] for n in range(len(kept))]
    return not any(never_empty([*lost, *(f for terms in group for f in terms)], roles) for group in groups)
