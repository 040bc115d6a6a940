"""Whole models on the TVM backend: bits of a row that depend only on that row, memory of any alignment, arrays as
inputs and outputs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from treadle.backends.tvm import backend as tvm_backend
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.compiled import Compiled
from treadle.entry_functions import compile
from treadle.ir.errors import BackendError
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.models.registry import find_family
from treadle.program.weights import initial_weights

Array = np.ndarray[Any, Any]

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
SMALL: Mapping[str, dict[str, Any]] = {
    "gpt2": {"vocab": 101, "context": 300, "dim": 48, "heads": 4, "layers": 2},
    "bert": {"vocab": 101, "context": 300, "dim": 48, "heads": 4, "hidden": 100, "layers": 2},
    "llama": {"vocab": 101, "dim": 48, "heads": 4, "kv_heads": 2, "hidden": 100, "layers": 2},
}


def small(family: str, backend: str = "tvm", target: Target | str = "cpu") -> Compiled:
    return compile(find_family(family).model.configure(**SMALL[family]), backend=backend, target=target, seed=3)


def drawn(rows: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 101, (rows, length))


def only(answers: Mapping[str, Any]) -> Any:
    (answer,) = answers.values()
    return answer


@pytest.mark.parametrize("family", SMALL)
def test_a_rows_bits_do_not_depend_on_the_batch(family: str) -> None:
    exe = small(family)
    ids = drawn(5, 37)
    together = only(exe(tokens=ids))
    for rows in ([0], [3], [4, 2, 0]):
        np.testing.assert_array_equal(only(exe(tokens=ids[rows])), together[rows])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_rows_bits_do_not_depend_on_what_follows(family: str) -> None:
    """A causal model computes the same bits for a prefix, whatever follows it. Chunked prefill relies on this."""
    exe = small(family)
    ids = drawn(2, 290)
    whole = only(exe(tokens=ids))
    for length in (1, 7, 128, 129, 200):
        np.testing.assert_array_equal(only(exe(tokens=ids[:, :length])), whole[:, :length])


@pytest.mark.parametrize("family", SMALL)
def test_bits_do_not_depend_on_the_threads(family: str) -> None:
    ids = drawn(2, 150)
    one, two = (only(small(family, target=Target("cpu", threads=n))(tokens=ids)) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("isa", [name for name, isa in ISAS.items() if runs_here(isa)])
@pytest.mark.parametrize("family", SMALL)
def test_every_instruction_set_gives_the_models_numbers(family: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_backend, "isa_of", lambda _: ISAS[isa])
    exe = small(family)
    graph = exe.graph
    weights = initial_weights(graph, 3)
    for shape in ((1, 1), (2, 37)):
        ids = drawn(*shape)
        expected = only(interpret(graph, {"tokens": ids}, weights, float64=True))
        worst = np.abs(only(exe(tokens=ids)) - expected).max() / np.abs(expected).max()
        assert worst < 2e-5


def test_another_machines_program_is_read_and_not_run() -> None:
    exe = small("gpt2", target="arm64")
    assert "for the tvm backend on arm64" in exe.source
    title = re.findall(r"^def (matmul\w*)\(", exe.source, re.MULTILINE)[-1]  # the name in the listing
    assert "fmla" in exe.executable.assembly(title)  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="do not run on this machine"):
        exe(tokens=drawn(1, 3))


def test_inputs_and_weights_of_any_alignment() -> None:
    graph = small("gpt2").graph
    weights = initial_weights(graph, 3)
    ids = drawn(2, 9)
    shifted = {name: misaligned(array) for name, array in weights.items()}
    exe = compile(graph, backend="tvm", weights=shifted)
    np.testing.assert_array_equal(only(exe(tokens=misaligned(ids))), only(small("gpt2")(tokens=ids)))


def misaligned(array: Array) -> Array:
    """Return a copy of the array, stored one element past a multiple of 64 bytes."""
    room = np.empty(array.nbytes + 128, np.uint8)
    start = -room.__array_interface__["data"][0] % 64 + array.itemsize
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def test_strided_inputs() -> None:
    exe = small("gpt2")
    ids = drawn(9, 4)
    np.testing.assert_array_equal(only(exe(tokens=ids.T[::2])), only(exe(tokens=ids.T[::2].copy())))


@needs_torch
def test_tensors_in_tensors_out() -> None:
    import torch

    exe = small("gpt2")
    ids = drawn(2, 5)
    made = only(exe(tokens=torch.from_numpy(ids)))
    assert isinstance(made, torch.Tensor)
    np.testing.assert_array_equal(made.numpy(), only(exe(tokens=ids)))


def test_results_are_the_callers_own() -> None:
    exe = small("gpt2")
    first = only(exe(tokens=drawn(2, 5)))
    kept = first.copy()
    only(exe(tokens=drawn(2, 5, seed=1)))
    np.testing.assert_array_equal(first, kept)


def test_calls_from_many_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    exe = small("gpt2")
    inputs = [drawn(1 + i % 3, 4 + i % 5, seed=i) for i in range(24)]
    expected = [only(exe(tokens=ids)) for ids in inputs]
    with ThreadPoolExecutor(max_workers=4) as pool:
        made = list(pool.map(lambda ids: only(exe(tokens=ids)), inputs))
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one, other)
