"""Caches of 16 bits: keys and values are rounded once, when they are appended. All other values stay the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle as t
from tests.stepped_models import MODELS, optimized
from treadle.backends.registry import find_backend
from treadle.cli.application import app
from treadle.compiled import Compiled
from treadle.ir.errors import BackendError, UsageError
from treadle.passes.stepping.derivation import derive_step
from treadle.runtime.session import Session

Array = np.ndarray[Any, Any]
SMALL = {"vocab": 50, "dim": 64, "heads": 4, "layers": 2, "context": 64}
BACKENDS = [name for name in ("numpy", "torch", "tvm") if find_backend(name).available() is None]
SPACING = {"bf16": 2.0**-8, "f16": 2.0**-11}  # the largest relative change of a number by rounding
CASES = [(backend, cache) for backend in BACKENDS for cache in SPACING if (backend, cache) != ("numpy", "bf16")]


def compiled(backend: str) -> Compiled:
    return t.compile("gpt2", backend=backend, seed=3, **SMALL)


def logits(session: Session, texts: list[list[int]], first: list[int]) -> Array:
    """Return the logits after each of the last 8 tokens of every text. The tokens before them are prefilled."""
    rows = [session.open() for _ in texts]
    found = [[session.prefill({row: text[:n]})[row]] for row, text, n in zip(rows, texts, first, strict=True)]
    for at in range(8):
        given = {row: text[n + at] for row, text, n in zip(rows, texts, first, strict=True)}
        for row, made in session.step(given).items():
            found[rows.index(row)].append(np.asarray(made))
    return np.asarray(found)


@pytest.mark.parametrize(("backend", "cache"), CASES)
def test_logits_are_within_the_rounding_of_keys_and_values(backend: str, cache: str) -> None:
    """Two layers round keys and values.

    The effect of a rounding on a logit is proportional to the logit, and several effects add up.
    """
    exe, rng = compiled(backend), np.random.default_rng(0)
    texts = [rng.integers(0, 50, n + 8).tolist() for n in (3, 40, 1)]
    wide, narrow = (exe.session(rows=4, capacity=64, chunk=16, cache=c) for c in (None, cache))
    assert narrow.nbytes * 2 == wide.nbytes
    wanted, found = (logits(session, texts, [3, 40, 1]) for session in (wide, narrow))
    off = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 0 < off < 4 * SPACING[cache]


@pytest.mark.parametrize("cache", SPACING)
def test_bits_do_not_depend_on_chunks(cache: str) -> None:
    if "tvm" not in BACKENDS:
        pytest.skip("TVM is not installed")
    exe, tokens = compiled("tvm"), np.random.default_rng(1).integers(0, 50, 40).tolist()
    found = []
    for chunk, stepped in ((40, 0), (16, 0), (7, 9)):
        session = exe.session(rows=1, capacity=64, chunk=chunk, cache=cache)
        row = session.open()
        made = session.prefill({row: tokens[: len(tokens) - stepped]})[row]
        for token in tokens[len(tokens) - stepped :]:
            made = session.step({row: token})[row]
        found.append(np.asarray(made))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_alone_are_narrow(name: str) -> None:
    """Caches of other values (segments, lengths, sums) keep their dtypes. Values that the prologue stores keep theirs,
    too.
    """
    wide, narrow = (derive_step(optimized(MODELS[name]), cache=cache).graph for cache in (None, "bf16"))
    assert wide.states.keys() == narrow.states.keys()
    changed = {n for n, value in narrow.states.items() if value.type != wide.states[n].type}
    held = {n for n in narrow.states if n.rpartition(".")[2].rstrip("0123456789_") in ("k", "v")} & changed
    assert changed == held
    assert all(narrow.states[n].type.dtype.name == "bf16" for n in changed)
    assert [str(v.type) for v in narrow.functions["step"].outputs.values()] == [
        str(v.type) for v in wide.functions["step"].outputs.values()
    ]


def test_a_dtype_that_no_cache_has_and_one_that_numpy_has_not() -> None:
    exe = compiled("numpy")
    with pytest.raises(UsageError, match="a cache cannot store i8"):
        exe.session(cache="i8")
    with pytest.raises(BackendError, match="NumPy has no bf16") as refused:
        exe.session(cache="bf16")
    assert 'cache="f16"' in str(refused.value)


def test_the_step_is_told_with_the_dtype_of_its_caches() -> None:
    small = [x for name, value in SMALL.items() for x in ("--set", f"{name}={value}")]
    found = {}
    for cache in ([], ["--cache", "bf16"]):
        result = CliRunner().invoke(app, ["explain", "gpt2", "step", *small, *cache, "--json"])
        assert result.exit_code == 0, result.output
        found[len(cache)] = json.loads(result.output)
    assert found[2]["bytes_per_token"] * 2 == found[0]["bytes_per_token"] == 2 * 2 * 64 * 4
    assert [state["type"][:5] for state in found[2]["states"]] == ["bf16["] * 2
    refused = CliRunner().invoke(app, ["explain", "gpt2", "fusion", "--cache", "bf16"])
    assert refused.exit_code != 0
    assert "explain fusion does not take cache" in refused.output
