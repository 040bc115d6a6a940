"""Stubs of ops, and their signatures: both say what the ops' classes say. `make golden` writes the stubs."""

from __future__ import annotations

import pytest

from tests.golden import Golden
from tests.op_stubs import stubs


@pytest.mark.parametrize("path", sorted(stubs()))
def test_stubs_say_what_the_ops_say(path: str, golden: Golden) -> None:
    golden(f"../../{path}", stubs()[path])
