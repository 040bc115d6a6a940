"""Many cases in one test: all of them are tried, and the test fails with each that fails.

    with every_case() as case:
        for op in ops:
            with case(op.name):
                assert ...

A case that pytest knows costs a millisecond or two, which is more than many a case takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@contextmanager
def every_case() -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """What is raised in a case is kept, and raised at the end with that of all others, under the cases' names.

    To try no case at all is a failure; a skip ends the test as it always does.
    """
    tried: list[str] = []
    failed: dict[str, BaseException] = {}

    @contextmanager
    def case(what: str) -> Iterator[None]:
        tried.append(what)
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            error.add_note(f"in case {what}")
            failed[f"{what} (case {len(tried)})" if what in failed else what] = error

    yield case
    assert tried, "no case was tried"
    if failed:
        raise BaseExceptionGroup(
            f"{len(failed)} of {len(tried)} cases fail: {', '.join(failed)}", list(failed.values())
        )
