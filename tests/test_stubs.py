"""The stubs of ops, their signatures, and the pages of ops and pipelines agree with the classes. `make golden` writes
them.
"""

from __future__ import annotations

import pytest

from tests.golden import Golden
from tests.op_index import op_index
from tests.op_stubs import stubs
from tests.pass_index import pass_index


@pytest.mark.parametrize("path", sorted(stubs()))
def test_stubs_say_what_the_ops_say(path: str, golden: Golden) -> None:
    golden(f"../../{path}", stubs()[path])


def test_the_page_of_ops_says_what_the_ops_say(golden: Golden) -> None:
    golden("../../docs/ops.md", op_index())


def test_the_page_of_pipelines_says_what_the_passes_say(golden: Golden) -> None:
    golden("../../docs/pipelines.md", pass_index())
