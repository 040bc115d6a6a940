"""The stubs of ops, their signatures and their page agree with the ops' classes. `make golden` writes them."""

from __future__ import annotations

import pytest

from tests.golden import Golden
from tests.op_index import op_index
from tests.op_stubs import stubs


@pytest.mark.parametrize("path", sorted(stubs()))
def test_stubs_say_what_the_ops_say(path: str, golden: Golden) -> None:
    golden(f"../../{path}", stubs()[path])


def test_the_page_of_ops_says_what_the_ops_say(golden: Golden) -> None:
    golden("../../docs/ops.md", op_index())
