"""A rank's program on a backend: compiled code runs the kernels, and the process runs the collectives between them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.rank_threads import run_ranks
from tests.sharded_models import numbers, recognized
from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError, GraphError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.placement.meeting import meeting_at
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import taken_part
from treadle.ir.target import Target
from treadle.ir.transforms.encoded_weights import encode_weights
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_weights
from treadle.passes.sharding.recipes import shard
from treadle.program.weights import initial_weights
from treadle.sharding import rank_graph, shard_model

BACKENDS = ("numpy", "torch", "tvm")


def compiled(backend: str, graph: Graph, weights: dict[str, Any] | None = None) -> Any:
    chosen = find_backend(backend)
    if chosen.available() is not None:
        pytest.skip(chosen.available())
    return build(chosen, graph, Target("cpu"), weights or {})[0]


def apart(backend: str, family: str, plan: ShardingPlan) -> tuple[float, set[str]]:
    """Return the largest difference between the ranks' parts and the whole model's outputs, and the types of the
    exchanged values.
    """
    graph = recognized(family)
    drawn, inputs, wanted = numbers(family)
    weights = {n: a.astype(np.float32) for n, a in drawn.items()}
    calls = []
    for rank in range(plan.devices.ranks):
        exe = compiled(backend, rank_graph(plan, rank), rank_weights(plan, rank, weights))
        calls.append(lambda exe=exe: exe(**inputs))
    found, room = run_ranks(plan.devices, calls)
    sizes = {s: min(11, bounds.upper or 11) for s, bounds in graph.symbols.items()}
    far = 0.0
    for (name, value), placed in zip(graph.main.outputs.items(), plan.gives, strict=True):
        holding = [rank for rank in range(len(found)) if plan.holds_output(rank, name)]
        for rank in holding:
            own = found[rank]
            part = taken_part(wanted[name], value.type.shape, placed, plan.devices, rank, sizes)
            assert own[name].shape == part.shape
            far = max(far, float(np.max(np.abs(own[name] - part))))
    return far, room.kinds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("family", "mesh", "recipe"),
    [
        ("gpt2", "tp=2,dp=2", "megatron"),
        ("llama", "tp=4", "sequence"),
        ("t5", "tp=2", "megatron"),
        ("vit", "dp=2", "fsdp"),
        ("llama", "tp=2,cp=2", "context"),
        ("gpt2", "pp=2,tp=2,micro=3", "gpipe"),
    ],
)
def test_ranks_on_a_backend_compute_their_parts(backend: str, family: str, mesh: str, recipe: str) -> None:
    far, kinds = apart(backend, family, shard(recognized(family), mesh, recipe=recipe))
    assert far < 2e-4  # float32; outputs are near 1
    assert kinds == {"Tensor" if backend == "torch" else "ndarray"}


SMALL: dict[str, Any] = {"layers": 1, "dim": 64, "heads": 4, "vocab": 96, "context": 32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", ["int8-weights", "int8", "int4", "int4-int8"])
def test_blocks_that_ranks_gather_are_decoded_at_every_call(backend: str, quantize: str) -> None:
    """Backends that decode weights in blocks only once refuse this before anything is compiled."""
    plan = shard_model("gpt2", "tp=2,dp=2", recipe="megatron-fsdp", quantize=quantize, **SMALL)
    weights = encode_weights(plan.graph, initial_weights(plan.graph, 0))
    tokens = np.arange(64).reshape(8, 8)
    programs = [rank_graph(plan, rank) for rank in range(plan.devices.ranks)]

    def call(rank: int) -> Any:
        exe = compiled(backend, programs[rank], rank_weights(plan, rank, weights))
        return lambda: exe(tokens=tokens)["logits"]

    if "int4" in quantize and backend != "numpy":
        with pytest.raises(BackendError, match=f"the {backend} backend cannot run gpt2") as error:
            call(0)
        assert "decode: " in str(error.value.received)
        assert "int4_groups(32)" in str(error.value.received)
        return
    found, _ = run_ranks(plan.devices, [call(rank) for rank in range(plan.devices.ranks)])
    wanted = interpret(plan.graph, {"tokens": tokens}, weights, float64=True)["logits"]
    for rank, own in enumerate(found):
        part = taken_part(
            wanted, plan.graph.main.results[0].type.shape, plan.gives[0], plan.mesh, rank, {"B": 8, "S": 8}
        )
        assert np.max(np.abs(own - part)) < 1e-5  # float32; logits are below 1


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*product(BACKENDS, ["f32", "i64", "bool"]), ("torch", "bf16"), ("tvm", "bf16")],
)
def test_parts_of_any_dtype_and_of_uneven_sizes_meet(backend: str, dtype: str) -> None:
    """An all-to-all of strided operands whose sizes are expressions of a symbol."""
    mesh, rows = Mesh.of("tp=2"), 5
    whole = (np.arange(rows * 3).reshape(rows, 3) % (2 if dtype == "bool" else 99)).astype(
        {"f32": np.float32, "bf16": np.float32, "i64": np.int64, "bool": bool}[dtype]
    )
    calls = []
    for rank in range(2):
        b = Builder(Graph("parts"))
        x = b.input("x", f"{dtype}[B, 3]")
        size = x.shape[0]
        part = [size // 2, size - size // 2][rank]
        cut = b.slice(x, axis=1, start=[0, 1][rank], stop=[1, 3][rank])
        y = b.apply("all_to_all", cut, over="tp", ways=2, axis=0, size=part, onto=1, whole=3)
        b.outputs(y=y)
        exe = compiled(backend, b.graph)
        calls.append(lambda exe=exe: exe(x=whole)["y"])
    found, _ = run_ranks(mesh, calls)
    assert np.array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_that_runs_alone_is_told_so(backend: str) -> None:
    b = Builder(Graph("alone"))
    b.outputs(y=b.apply("all_reduce", b.input("x", "f32[B, 4]"), over="tp", ways=2))
    exe = compiled(backend, b.graph)
    with pytest.raises((GraphError, BackendError)) as error:
        exe(x=np.ones((2, 4), np.float32))
    assert "needs 2 ranks, but this program runs alone" in f"{error.value.what} {error.value.received}"


class Odd:
    """A collective that returns, or raises, a value that the test chooses."""

    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def exchange(self, op: Any, part: Any) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.mark.parametrize("gives", [ValueError("odd"), np.ones((1, 4), np.float32)], ids=["raises", "another shape"])
def test_a_meeting_that_fails_is_told_at_its_op(gives: Any) -> None:
    """No exception passes through compiled code. The next call starts afresh."""
    b = Builder(Graph("odd"))
    b.outputs(y=b.apply("all_reduce", b.input("x", "f32[B, 4]"), over="tp", ways=2) * 2.0)
    exe, x = compiled("tvm", b.graph), np.ones((2, 4), np.float32)
    with pytest.raises(BackendError) as error, meeting_at(Odd(gives)):
        exe(x=x)
    if isinstance(gives, Exception):
        assert (error.value.what, error.value.received) == ("all_reduce: failed while running", "ValueError: odd")
        assert "test_rank_executables.py:" in str(error.value.source)
    else:
        assert error.value.what == "all_reduce returned shape [1, 4], expected [2, 4]"
    with meeting_at(Odd(x)):
        assert np.array_equal(exe(x=x)["y"], 2 * x)


def test_a_listing_names_what_the_process_does_itself() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    weights = {n: a.astype(np.float32) for n, a in numbers("gpt2")[0].items()}
    exe = compiled("tvm", rank_graph(plan, 0), rank_weights(plan, 0, weights))
    assert " = all_reduce(" in exe.source
    with pytest.raises(BackendError, match="there is no kernel 'all_reduce'"):
        exe.assembly("all_reduce")
