"""Chains of masks and biases, applied to scores one after the other, as equivalent terms of attention.

    where(keep, x, number)    a fill: the number replaces the result of all earlier steps
    x + addend                an addition

The last fill overrides earlier steps, and later addends are added to it. If a row keeps a key, the chain equals masks
and biases in any order. If every key of a row is masked, the row holds only the fill numbers, and the greatest of them
decides the result:

    where(b, where(a, s, M), M) = where(a & b, s, M), and not s + where(a, 0, M) + where(b, 0, M), which would be M + M

So if the order matters, the chain becomes one bias: the chain itself, applied to zeros instead of the scores. Added to
the scores, this bias equals the chain applied to the scores in two cases: every fill number absorbs the scores by
rounding, or the queries of a row in which every key is masked are zeros.
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
    """One step of a chain.

    term      the step in the graph; a part of an addend is a separate step
    unit      the factor from this step to the softmax, without its sign
    peak      the greatest value of that factor on the way
    filled    True if the step fills in a number, False if it adds
    mask      the condition and number of a mask; None for other addends
    kept      the keys that a mask keeps
    hazards   the kinds of numbers that an addend may hold, if it is not a mask
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
        """The masking number as the softmax reads it; 0 for a step that is not a mask."""
        return 0.0 if self.mask is None else self.mask.fill

    @property
    def is_finite(self) -> bool:
        """True if the step masks by a finite number."""
        return -math.inf < self.fill < 0

    @property
    def dtype(self) -> DType:
        return self.term.node.results[0].type.dtype

    @property
    def size(self) -> float:
        """The greatest magnitude of a finite number in this step, at its position in the graph."""
        if self.mask is not None:
            return abs(self.fill) / self.unit if self.is_finite else 0.0
        return self.dtype.greatest if self.hazards else LEAST_FILL

    @property
    def seen(self) -> Seen:
        """The condition or addend that determines which keys the mask keeps."""
        if isinstance(self.mask, Chosen):
            return Seen(self.mask.placed, self.mask.keep)
        assert isinstance(self.term, Added)
        return Seen(self.term.placed, factor=self.term.factor)


@dataclass(frozen=True)
class Seen:
    """A test for kept keys: a key is kept if a condition is `keep`, or if factor * an addend is not -inf."""

    placed: Placed
    keep: bool = True
    factor: float = 1.0


@dataclass
class ChainTerms:
    """The terms that are equivalent to a chain.

    emptied         masks; a query must be set to zero if all of these masks mask every key
    kept_nan        masks; a query must give NaN if all of these masks, and the biases if `biases_lose`, mask every key
    overflows_in    the dtype whose range sums of masks may exceed, if any
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
    """Return True if a mask by this number becomes a mask of attention, False if it becomes a bias.

    Only a step with a condition, or a step known by position, can be a mask; a table of numbers cannot. If attention's
    masks keep no key of a row, the row gives zeros. So the step becomes a mask in these cases:

      - zero_empty_rows: the caller wants zeros in such rows
      - row_keeps_a_key, whatever the masks hold, and the step fills in or is known by position: any other addend is a
        tensor already
      - its number is -inf, which gives zeros or NaN in such rows, and no later step fills in a number where it masks
        (`overridden`)
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
    """Return terms that change the scores as the chain does. Raises Mismatch if there are none.

    trained   True if gradients must be the same: no gradient flows to values that a fill replaces
    guarded   True if a row that is -inf throughout gives zeros, as in attention, not NaN
    beside    masks that attention already has
    rule      the name of the pass, for hints
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
    """Return the steps, in order. A sum becomes several addends, and where(c, x, -inf) as an addend becomes x and a
    mask.

    exactly   True: do not split the `where` if x may be as large as the masking number, to which it would be added
    trained   True: also do not split it if that number is finite, since x would get a gradient in a row in which every
              key is masked
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
                step = replace(step, mask=table, kept=Reading(table_terms(table)))
            else:
                step = replace(step, hazards=hazards_of(part.placed.value))
            steps.append(step)
    return [step for step in steps if step.mask is None or step.kept.terms]


def _expect_low(step: ChainStep, scores: Scores) -> None:
    """Raise Mismatch for a mask whose number is not low for scores of this scale, and for an addend that may be inf."""
    node = step.term.node
    if isinstance(step.mask, Chosen) and step.fill > -LEAST_FILL * max(1.0, abs(scores.scale)):
        reason = f"scores times {scores.scale:g} may be as low as the mask's {step.fill:g}"
        raise Mismatch(reason, node, scores.nodes, "-inf in place of that number")
    rising = "rising" in step.hazards or (isinstance(step.term, Added) and step.term.factor < 0)
    if "infinite" in step.hazards and rising:
        raise Mismatch("an addend of the scores may be inf", node, scores.nodes)


def _addend_notes(steps: Sequence[ChainStep], masks_outweigh: bool, rule: str) -> Iterator[Note]:
    """Yield a note for each mask by a large negative number that stays an addend, although -inf would make it a term.

    masks_outweigh   True if no other addend may be as large
    """
    why = "a row in which every key is masked is an average" if masks_outweigh else "another addend may outweigh it"
    hint = f"-inf in place of that number, or {rule}(zero_empty_rows=True)"
    for step in steps:
        if step.is_finite and (isinstance(step.mask, Chosen) or step.kept.structural):
            yield Note(f"stays an addend: it is {step.fill:g}, and {why}", step.term.node, hint)


# -- biases ------------------------------------------------------------------------------------------------------------


def _biases(roles: Roles, steps: Sequence[ChainStep], overflow: _Overflow | None, trained: bool) -> list[Fused]:
    """Return the steps that are not masks as biases: all steps up to the last fill as one bias, and each later step as
    a separate bias.

    An earlier step that all later fill numbers absorb may also be a separate bias, if its gradient does not matter.
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
    """Return the steps as a sum, masks first. The order changes only roundings."""
    ordered = sorted(steps, key=lambda step: not isinstance(step.mask, Chosen))
    return [f for step in ordered for f in _bias(roles, step)]


def _absorbs(step: ChainStep) -> bool:
    return step.fill <= -ABSORBING


def _bias(roles: Roles, step: ChainStep) -> list[Fused]:
    """Return one step as a bias."""
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
    """Return a mask's condition before it is rearranged or expanded. It may have fewer axes there than at its position
    in the graph.
    """
    assert isinstance(step.mask, Chosen)
    if len(step.kept.terms) == 1 and isinstance(step.kept.terms[0].term, BooleanMask):
        (operand,) = step.kept.terms[0].operands
        return operand
    axes = roles.held(step.mask.placed.layout) or "t"
    return PlacedOperand(step.mask.placed, axes, negated=not step.mask.keep)


def _put(roles: Roles, step: ChainStep) -> Put:
    """Return a step in the form in which it is applied to zeros."""
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
    """Return the masks of rows whose scores must be zero: a fill number does not absorb them, or they would get a
    gradient.

    Raises Mismatch if a row in which every key is masked also depends on other masks or addends.
    """
    small = [step for step in steps if step.filled and step.is_finite and (trained or not _absorbs(step))]
    if not small:
        return []
    if any(step.hazards or (step.is_finite and not step.filled) for step in steps):
        reason = f"a row in which every key is masked by {small[0].fill:g} depends on more than that mask"
        raise Mismatch(reason, small[0].term.node, scores.nodes, "-inf in place of that number")
    return [step.seen for step in steps if step.filled or step.fill == -math.inf]


@dataclass(frozen=True)
class _Overflow:
    """Sums of masks that may exceed the range of their dtype. Such a sum is -inf, though a wider dtype would hold a
    number.

    last     the last step at which they may overflow
    single   True if one mask suffices, together with the scores or a factor
    scaled   True if a factor is applied later, so that the sum of the biases itself does not overflow
    """

    dtype: DType
    last: int
    single: bool
    scaled: bool


def _overflow(steps: Sequence[ChainStep], scores: Scores) -> _Overflow | None:
    """Return the overflow that a chain's sums may have, judged by the magnitude of its numbers; None if they cannot
    overflow.

    Raises Mismatch if a factor overflows that a later factor cancels, since the bias would contain only their product.
    Also raises Mismatch if a factor overflows that may be applied after a cast to a wider dtype, in which nothing
    overflows.
    """
    dtypes = {v.type.dtype for node in scores.nodes for v in node.results if v.type.dtype.is_float}
    bound, last, single = LEAST_FILL, -1, False
    alone = LEAST_FILL  # the sum if at most one mask applies to a key
    for n, step in enumerate(steps):
        most, size = _past(step.dtype), step.size
        if not step.filled:
            size = max(size, LEAST_FILL)
            single = single or size + LEAST_FILL > most
        bound = max(bound, size) if step.filled else bound + size
        alone = max(alone, size)
        units = [*(later.unit for later in steps[n + 1 :]), 1.0]
        if bound * step.peak > most and step.peak > 1.01 * max(1.0, *(step.unit / unit for unit in units)):
            reason = f"the factors of masks exceed the range of {step.dtype} on the way to the softmax"
            raise Mismatch(reason, step.term.node, scores.nodes, "-inf in place of these numbers")
        factor = step.unit / units[0]
        grown = bound * max(1.0, factor)
        if grown > most >= bound and len(dtypes) > 1:
            reason = f"the factors of masks exceed the range of {step.dtype}, perhaps in a wider dtype"
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
    """Return the bound above which numbers may round to infinity: the dtype's greatest number plus half a spacing."""
    return dtype.greatest * (1 + dtype.spacing / 4) if dtype.bytes < 8 else dtype.greatest


def _may_lose_rows(roles: Roles, steps: Sequence[ChainStep], overflow: _Overflow | None) -> bool:
    """Return True if every key of a row may become -inf, by masks of -inf, by addends or by sums that overflow."""
    if any("infinite" in step.hazards for step in steps):
        return True
    lost = [f for step in steps if step.fill == -math.inf for f in step.kept.terms]
    large = [step for step in steps if step.is_finite or step.hazards] if overflow is not None else []
    anything = Fused(BooleanMask("t"))
    kept = [step.kept.terms or [anything] for step in large]
    # A key becomes -inf only if two of these masks apply to it. So a row is safe if all but one of the masks keep a key
    # of it.
    groups = [kept] if overflow is None or overflow.single else [kept[:n] + kept[n + 1 :] for n in range(len(kept))]
    return not any(never_empty([*lost, *(f for terms in group for f in terms)], roles) for group in groups)
