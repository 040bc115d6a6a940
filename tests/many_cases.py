"""Many cases in one test. Every case runs, and the test reports all failures together.

    with every_case() as case:
        for op in ops:
            with case(op.name):
                assert ...

A case that pytest itself collects costs a millisecond or two, which is longer than many cases run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@contextmanager
def every_case() -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """Collect the errors raised in cases, and raise all of them at the end with the names of their cases.

    A test without any case fails. A skip ends the test as usual.
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
