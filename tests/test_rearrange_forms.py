"""Forms of rearranges: two in a row that compose into one, and pairs that do not."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.ir.literals import Literal
from treadle.ir.op_registry import find_op
from treadle.passes.cleanup.rearrange_forms import composed, form_of

SPLITS = [
    "a b c -> a b c",
    "a b c -> c a b",
    "a b (c=2 d) -> c a b d",
    "a (b=3 e) (c=2 d) -> (e c) a (b d)",
    "a b c -> (a b) c",
]


@pytest.mark.parametrize("first", SPLITS)
@pytest.mark.parametrize("second", ["swap", "join", "split"])
def test_two_rearranges_are_the_one_that_they_compose_to(first: str, second: str) -> None:
    x = np.arange(4 * 6 * 8).reshape(4, 6, 8)
    rearrange = find_op("rearrange")
    middle = rearrange(pattern=first).reference(x)
    letters = "pqrs"[: middle.ndim]
    pattern = {
        "swap": f"{' '.join(letters)} -> {' '.join(reversed(letters))}",
        "join": f"{' '.join(letters)} -> ({' '.join(letters)})",
        "split": f"(m=2 {letters[0]}) {' '.join(letters[1:])} -> {' '.join(letters)} m",
    }[second]
    form = composed(first, pattern, Literal.of(x).type)
    assert form is not None
    np.testing.assert_array_equal(
        rearrange(pattern=form.pattern).reference(x), rearrange(pattern=pattern).reference(middle)
    )


def test_splits_that_do_not_divide_each_other_stay_two_rearranges() -> None:
    assert composed("a b -> (a b)", "(c=3 d) -> d c", Literal.of(np.zeros((2, 3))).type) is None


def test_a_form_keeps_names_and_given_sizes() -> None:
    form = composed("b s (heads=2 d) -> b s heads d", "b s h d -> b h s d", Literal.of(np.zeros((2, 3, 8))).type)
    assert form is not None
    assert form.pattern == "b s (heads=2 d) -> b heads s d"
    same = form_of("b s (h d=4) -> b s h d", Literal.of(np.zeros((2, 3, 8))).type)
    other = form_of("x y (g=2 z) -> x y g z", Literal.of(np.zeros((2, 3, 8))).type)
    # the forms are equal for any names of axes and any written sizes
    assert same == other and same.pattern != other.pattern
    assert form_of("a b -> b a", Literal.of(np.zeros((2, 3))).type).is_transposition
