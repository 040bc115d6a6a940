"""A test of many cases runs all of them and reports each failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.many_cases import every_case


def try_each(cases: dict[str, Callable[[], object]]) -> None:
    with every_case() as case:
        for name, run in cases.items():
            with case(name):
                run()


def fails() -> None:
    raise KeyError


def misses() -> None:
    with pytest.raises(ValueError, match="nobody"):
        pass


def test_cases_after_one_that_fails_are_tried_and_each_failure_is_told() -> None:
    tried: list[int] = []
    with pytest.raises(BaseExceptionGroup) as caught:
        try_each({"a": fails, "b": lambda: tried.append(1), "c": misses, "d": lambda: tried.append(2)})
    assert tried == [1, 2]
    assert "2 of 4 cases fail: a, c" in str(caught.value)
    assert [error.__notes__ for error in caught.value.exceptions] == [["in case a"], ["in case c"]]


def fail_twice_under_one_name() -> None:
    with every_case() as case:
        for _ in range(2):
            with case("a"):
                fails()


def test_two_failures_of_one_name_are_two() -> None:
    with pytest.raises(ExceptionGroup, match="2 of 2 cases fail"):
        fail_twice_under_one_name()


def test_no_case_at_all_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="no case was tried"):
        try_each({})


def test_a_skip_goes_through() -> None:
    with pytest.raises(pytest.skip.Exception):
        try_each({"a": lambda: pytest.skip("not here")})
