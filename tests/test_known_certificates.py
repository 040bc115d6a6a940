"""Certificates that were tried before are looked up by their claim. Claims with a test's own meanings are not
stored.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.known_certificates import Store, is_ours, read, written
from tests.test_backend_ops import EveryOther, attention_graph
from treadle.ir.attention.attention_terms import Causal
from treadle.ir.op_registry import OPS
from treadle.passes.certificates.certificate import Certificate, Counterexample

FOUND = [
    Certificate("r", "0123", 3, 2, ((("B", 1), ("S", 2)), ()), 0.1 + 0.2, 1e-300, "a note", "refused", 4),
    Counterexample("masked", (("B", 1),), 0, "the results differ", "they may be what they were"),
]


@pytest.mark.parametrize("found", FOUND, ids=["certificate", "counterexample"])
def test_cached_texts_are_read_by_another_process(found: Certificate | Counterexample, tmp_path: Path) -> None:
    assert read(written(found)) == found
    one, another = Store(tmp_path / "s.sqlite"), Store(tmp_path / "s.sqlite")
    assert another.get("key") is None
    one.keep("key", found)
    assert another.get("key") == found
    assert another.get("other") is None


def test_a_damaged_store_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"no database" * 1000)
    store = Store(tmp_path / "s.sqlite")
    store.keep("key", FOUND[0])
    assert store.get("key") is None


def test_expectations_of_a_test_are_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, own = attention_graph(Causal()), attention_graph(EveryOther())
    assert is_ours((plain, plain))
    assert not is_ours((plain, own))
    monkeypatch.setattr(OPS["attention"], "reference", lambda op, *operands: operands[0])
    assert not is_ours((plain, plain))
