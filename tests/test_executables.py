"""Executables: one executable serves every size, weights are not copied, results belong to the caller, and errors name
the user's line.
"""

from __future__ import annotations

import re
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import (
    assert_near,
    block_model,
    compiled,
    each_backend,
    graph_of,
    message,
    needs_torch,
    needs_tvm,
    python_backends,
)
from tests.error_texts import raises_freely
from tests.golden import Golden
from treadle.backends import bfloat16, signature
from treadle.backends.commented_lines import commented
from treadle.backends.registry import find_backend
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import BackendError, GraphError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.source_lines import SourceLine
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, bf16, f32
from treadle.passes.lowering.legalize import legalized


def test_an_executable_tells_its_signature() -> None:
    graph, weights = block_model()
    exe = compiled("numpy", graph, weights)
    (tokens,), (logits,) = exe.inputs, exe.outputs
    assert (tokens.name, str(tokens.dtype), tokens.axes) == ("tokens", "i64", ("B", "S"))
    assert str(logits) == "logits: f32[B, S, 11]"
    out = exe(tokens=[[1, 2]])
    assert list(out) == ["logits"]
    with pytest.raises(KeyError, match="no output 'logit'; there are logits"):
        out["logit"]
    with pytest.raises(AttributeError, match="no output 'logit'; there are logits"):
        _ = out.logit


@each_backend
def test_one_compilation_serves_every_size(backend: str) -> None:
    graph, weights = block_model()
    exe = compiled(backend, graph, weights)
    for rows, length in ((1, 1), (3, 5), (2, 17), (1, 1)):
        ids = np.arange(rows * length).reshape(rows, length) % 11
        expected = interpret(graph, {"tokens": ids}, weights, float64=True)
        assert_near(exe(tokens=ids).logits, expected["logits"])


@python_backends
def test_source_reads_well(backend: str, golden: Golden) -> None:
    graph, weights = block_model()
    golden(f"executables/{backend}_source.txt", compiled(backend, graph, weights).source)


def test_comments_line_up_to_column_72() -> None:
    lines = commented([("a" * 72, "1"), ("b", "2"), ("c" * 73, "3"), ("d" * 90, "")])
    assert lines == ["a" * 72 + "  # 1", f"{'b':72}  # 2", "c" * 73 + "  # 3", "d" * 90]


@needs_tvm
def test_the_listing_of_kernels_reads_well(golden: Golden) -> None:
    """The listing for one instruction set, which any machine can print. The kernels are left out, because their text is
    TVM's.
    """
    graph, weights = block_model()
    exe = find_backend("tvm").compile(graph, Target("x86-64-v3"), weights)
    golden("executables/tvm_listing.txt", exe.source.partition("@T.prim_func")[0])


@each_backend
def test_sizes_are_expressions_of_symbols(backend: str) -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[B, 2*S+1]")
        padded = b.pad(b.input("y", "f32[S]"), axis=0, before="S//2", after=1)
        strided = b.slice(x, axis=1, start="S", stride=2)
        return b.concat(strided, b.expand(padded, shape=("B", None)), axis=1)

    graph = graph_of(build)
    exe = compiled(backend, graph)
    for rows, size in ((1, 1), (2, 4), (3, 7)):
        given = {
            "x": np.arange(rows * (2 * size + 1), dtype=np.float32).reshape(rows, -1),
            "y": np.ones(size, np.float32),
        }
        np.testing.assert_array_equal(exe(**given).y, interpret(graph, given)["y"])


@each_backend
def test_a_block_is_passed_the_symbols_that_its_arguments_do_not_tell(backend: str) -> None:
    graph = Graph("example")
    h = Function("h")
    graph.add_function(h)
    b = Builder(graph, h)
    b.outputs(y=b.rearrange(b.input("x", "f32[2*S]"), pattern="(s=S two) -> s two") * 2.0)
    main = Builder(graph)
    x = main.input("x", "f32[S]")
    (y,) = main.call(h, [main.concat(x, x, axis=0)])
    main.outputs(y=y)
    exe = compiled(backend, graph)
    if backend != "tvm":  # TVM's sizes are numbers at this point
        assert "S=S" in exe.source
    x_value = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(exe(x=x_value).y, np.tile(x_value, 2).reshape(3, 2) * 2)


def test_replacements_have_the_position_of_the_op() -> None:
    b = Builder(Graph("g"))
    b.source = SourceLine("model.py", 3)
    x, weight = b.input("x", "f32[B, 8]"), b.parameter("w", "f32[8]")
    with b.scoped("h.0"):
        y = b.gelu(b.rms_norm(x, weight))
    b.outputs(y=b.silu(y))
    lowered = legalized(b.graph, lambda op, types: op.name == "gelu").main
    assert {node.scope for node in lowered.nodes} == {"h.0.rms_norm", "h.0.rms_norm.reduce_mean", "h.0", "silu"}
    assert {str(node.source) for node in lowered.nodes} == {"model.py:3"}


@each_backend
def test_a_symbol_that_no_input_tells_is_refused(backend: str) -> None:
    with pytest.raises(BackendError, match="needs the size of S, T, which no input's dimensions determine"):
        compiled(backend, graph_of(lambda b: b.rearrange(b.input("x", "f32[S*T]"), pattern="(s=S t) -> s t")))


@each_backend
def test_a_symbol_is_read_from_a_multiple_of_it(backend: str) -> None:
    def build(b: Builder) -> Expr:
        pairs = b.slice(b.input("x", "f32[2*S+1]"), axis=0, start=1)
        made: Expr = b.rearrange(pairs, pattern="(s=S two) -> s two")
        return b.expand(b.reduce_sum(made, axes=(0, 1)), shape=("S",))

    x = np.arange(7, dtype=np.float32)
    exe = compiled(backend, graph_of(build))
    if backend != "tvm":
        assert "S = (x.shape[0] - 1) // 2" in exe.source
    np.testing.assert_array_equal(exe(x=x).y, [21, 21, 21])


@each_backend
def test_names_clash_with_nothing(backend: str) -> None:
    """Inputs, outputs and symbols may have the names that the emitted text uses itself."""

    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("weights", "f32[np, F]")
        y = b.input("class", "f32[np, F]")
        return {"main": b.expand(b.reduce_sum(x + y, axes=(0, 1)), shape=("np+F",)), 'say "y"': x * y}

    graph = graph_of(build, "np")
    given = {"weights": np.full((2, 3), 2, np.float32), "class": np.ones((2, 3), np.float32)}
    out = compiled(backend, graph)(**given)
    np.testing.assert_array_equal(out.main, np.full(5, 18))
    np.testing.assert_array_equal(out['say "y"'], given["weights"])


@each_backend
def test_weights_that_no_scope_names_are_passed_one_by_one(backend: str) -> None:
    graph, _ = block_model(0)
    h = graph.functions["h"]
    main = Builder(graph)
    main.function.nodes.clear()
    x = main.input("x", "f32[B, S, 8]")
    main.function.inputs.pop(0)
    shared = [main.parameter(f"shared.{name}", v.type) for name, v in h.parameters.items()]
    for i in range(2):
        with main.scoped(f"h.{i}"):
            (x,) = main.call(h, [x, *shared])
    main.outputs(y=x)
    weights = {n: np.full(v.type.static_shape, 0.5, np.float32) for n, v in graph.parameters.items()}
    exe = compiled(backend, graph, weights)
    if backend != "tvm":  # TVM's blocks take weights by position
        assert 'weights["shared.ln.weight"], weights["shared.ln.bias"]' in exe.source
    given = {"x": np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)}
    assert_near(exe(**given).y, interpret(graph, given, weights, float64=True)["y"])


@python_backends
def test_memory_falls_as_the_program_runs(backend: str) -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[N]")
        for _ in range(12):
            x = b.exp(x)
        return x

    exe = compiled(backend, graph_of(build))
    assert exe.source.count("    del ") == 11
    if backend == "numpy":  # Python's memory trace sees NumPy's arrays
        x = np.full(1 << 18, -1e3, np.float32)
        tracemalloc.start()
        exe(x=x)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * x.nbytes  # one value, the next value, and little more; not twelve values


@each_backend
def test_weights_stay_where_they_are(backend: str, tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype=np.float32, shape=(4,))
    mapped[:] = 1
    read_only = np.lib.format.open_memmap(tmp_path / "w.npy", mode="r")
    graph = graph_of(lambda b: b.input("x", "f32[4]") * b.parameter("w", "f32[4]"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exe = compiled(backend, graph, {"w": read_only})
    mapped[:] = 3
    mapped.flush()
    np.testing.assert_array_equal(exe(x=np.ones(4, np.float32)).y, np.full(4, 3))


@each_backend
def test_results_are_the_callers_own(backend: str) -> None:
    """A result is never a view of an input, a weight or a constant, nor one element repeated with stride 0."""

    def build(b: Builder) -> dict[str, Expr]:
        x, w = b.input("x", "f32[2,3]"), b.parameter("w", "f32[2,3]")
        y = x + w
        return {
            "input": x,
            "weight": b.rearrange(w, pattern="a b -> b a"),
            "constant": b.constant([1.0, 2.0], DTYPES["f32"]),
            "expanded": b.expand(b.reduce_sum(x, axes=(0, 1)), shape=(4,)),
            "one": y,
            "part": b.slice(y, axis=0, stop=1),
        }

    weights = {"w": np.ones((2, 3), np.float32)}
    weights["w"].flags.writeable = False
    x = np.zeros((2, 3), np.float32)
    exe = compiled(backend, graph_of(build), weights)
    out = exe(x=x)
    before = {name: array.copy() for name, array in exe(x=x).items()}
    for array in out.values():
        array[0] += 7
        assert np.count_nonzero(array == array.flat[0]) <= array[0].size
    np.testing.assert_array_equal(x, np.zeros((2, 3)))
    for name, array in exe(x=x).items():
        np.testing.assert_array_equal(array, before[name])


@each_backend
def test_tensors_in_tensors_out(backend: str) -> None:
    torch = pytest.importorskip("torch")
    graph, weights = block_model()
    exe = compiled(backend, graph, weights)
    ids = torch.arange(6).reshape(2, 3)
    out = exe(tokens=ids).logits
    assert isinstance(out, torch.Tensor)
    assert isinstance(exe(tokens=ids.numpy()).logits, np.ndarray)
    np.testing.assert_array_equal(out.numpy(), exe(tokens=ids.numpy()).logits)


BF16_BACKENDS = ["torch", pytest.param("tvm", marks=needs_tvm)]  # NumPy has no bf16


@needs_torch
@pytest.mark.parametrize("given", ["arrays", "tensors"])
@pytest.mark.parametrize("backend", BF16_BACKENDS)
def test_bf16_holds_what_is_no_number(backend: str, given: str) -> None:
    import torch

    exe = compiled(backend, graph_of(lambda b: b.input("x", "bf16[2, 3]") * b.constant(2.0, bf16)))
    x = np.array([[np.nan, np.inf, -np.inf], [-0.0, 1.5, 3.0]], np.float32)
    y = exe(x=torch.from_numpy(x).bfloat16() if given == "tensors" else x).y
    assert isinstance(y, torch.Tensor) == (given == "tensors")
    np.testing.assert_array_equal(y.float().numpy() if given == "tensors" else y, 2 * x)
    turned = exe(x=torch.from_numpy(x.T.copy()).bfloat16().T if given == "tensors" else x.T.copy().T).y
    np.testing.assert_array_equal(np.asarray(turned.float() if given == "tensors" else turned), 2 * x)
    with pytest.raises(BackendError, match="a float32 that bf16 cannot represent"):
        exe(x=np.full((2, 3), 0.1, np.float32))


@needs_torch
def test_bf16_is_rounded_in_blocks_as_torch_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is to nearest, ties to even, and works in blocks; the last block is shorter. A NaN stays NaN at every
    place.
    """
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 45, dtype=np.uint32)
    bits[:4] = 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000001  # two ties, the largest number, the smallest
    bits[[17, 44]] = 0x7F800001, 0xFFFFFFFF
    monkeypatch.setattr(bfloat16, "_BLOCK", 8)
    numbers = bits.view(np.float32)
    made = bfloat16.rounded(numbers.reshape(9, 5))
    assert made.shape == (9, 5)
    wanted = torch.from_numpy(numbers).bfloat16().float().numpy()
    np.testing.assert_array_equal(bfloat16.widened(made).ravel(), wanted)
    np.testing.assert_array_equal(np.signbit(bfloat16.widened(made).ravel())[:4], np.signbit(wanted)[:4])


@each_backend
def test_of_many_sizes_the_last_are_remembered(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The placements of the most recent sizes are remembered; a forgotten placement is computed again."""
    module = "treadle.backends.tvm.host_machine" if backend == "tvm" else "treadle.backends.python.arena"
    monkeypatch.setattr(import_module(module), "PLANS", 2)
    graph = graph_of(lambda b: b.softmax(b.exp(b.input("x", f32["B", 4])) @ np.eye(4, dtype=np.float32)))
    exe: Any = compiled(backend, graph)

    def kept() -> list[int]:
        plans = exe.machine.plans if backend == "tvm" else exe.arena._memories
        return [dict(sizes)["B"] for _, sizes in plans]

    for rows in (1, 2, 1, 3, 4, 3):
        y = exe(x=np.zeros((rows, 4), np.float32)).y
        np.testing.assert_array_equal(y, np.full((rows, 4), 0.25))
        if rows == 3:
            assert kept()[-1] == 3
            assert kept() in ([1, 3], [4, 3])


@each_backend
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", 'a"\nb\\', "{x} %s", ""])
def test_any_name_is_harmless(name: str, backend: str) -> None:
    """Any text is allowed as the name of a graph, a function, a value, a weight, a scope or a file, also a text that
    ends C strings or lines.
    """
    graph = Graph(name)
    block = Function(f"{name}.block")
    graph.add_function(block)
    inside = Builder(graph, block)
    x, w = inside.input(name, "f32[B, 2]"), inside.parameter(f"{name}w", "f32[2, 2]")
    inside.outputs(**{name: inside.linear(x, w, None, name=name)})
    b = Builder(graph)
    b.source = SourceLine(name, 3)
    x, w = b.input(name, "f32[B, 2]"), b.parameter(f"{name}w", "f32[2, 2]")
    with b.scoped(name):
        (y,) = b.call(block, [x, w])
    b.outputs(**{name: b.softmax(y)})
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    exe = compiled(backend, graph, {f"{name}w": np.eye(2, dtype=np.float32)})
    found = exe(**{name: array})[name]
    np.testing.assert_allclose(found, np.exp(array) / np.exp(array).sum(1, keepdims=True), rtol=1e-6)
    assert "\0" not in exe.source


@needs_torch
def test_pytorch_has_the_targets_threads_while_a_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a call, also after a failed one, PyTorch has its own number of threads again. If the target has no number,
    nothing is set.
    """
    import torch

    graph = graph_of(lambda b: b.gather(b.input("x", "f32[4]"), b.input("i", "i64[2]"), axis=0))
    before, numbers = torch.get_num_threads(), list[int]()
    number, x = before + 1, np.arange(4, dtype=np.float32)
    with_threads, without = (find_backend("torch").compile(graph, Target("cpu", threads=n), {}) for n in (number, None))
    real = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (numbers.append(n), real(n)))
    without(x=x, i=[1, 2])
    assert numbers == []
    with_threads(x=x, i=[1, 2])
    with pytest.raises(BackendError, match="index 7 is outside"):
        with_threads(x=x, i=[1, 7])
    assert numbers == [number, before] * 2
    assert torch.get_num_threads() == before


@needs_torch
@pytest.mark.parametrize("shape", [(5, 64), (1, 64), (1, 1, 7), (2, 1, 9), (0, 64), (64,)], ids=str)
def test_rows_of_bytes_are_multiplied_to_the_same_bits_without_vnni(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from treadle.backends.torch import encoded_rows

    rows, steps = parse_encoding("int8_rows"), parse_encoding("uint8_rows")
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bias = np.arange(3, dtype=np.float32)
    for encoding, encode in ((rows, encoded_rows.encode_int8_rows), (steps, encoded_rows.encode_uint8_rows)):
        x = encoding.encode(values)
        np.testing.assert_array_equal(encode(torch.from_numpy(values)).numpy(), x)
        for columns in (3, 1):
            weight = rows.encode(np.random.default_rng(1).standard_normal((columns, shape[-1])).astype(np.float32))
            operands = [torch.from_numpy(each) for each in (x, weight, bias[:columns])]
            made = []
            for vnni in (True, False) if torch.cpu._is_vnni_supported() else (False,):
                monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
                made.append(encoded_rows.encoded_linear(*operands).numpy())
                monkeypatch.undo()
            exact = encoding.decode(x).astype(np.float64) @ rows.decode(weight).T + bias[:columns]
            np.testing.assert_allclose(made[0], exact, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(made[0], made[-1])


@needs_torch
@pytest.mark.parametrize("shape", [(3, 64), (1, 64), (0, 64), (64,)], ids=str)
def test_pytorch_holds_groups_as_their_encoding_does(shape: tuple[int, ...]) -> None:
    import torch

    from treadle.backends.torch import encoded_rows

    encoding = parse_encoding("int8_groups(32)")
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    held = encoded_rows.encode_groups(torch.from_numpy(values), 32)
    np.testing.assert_array_equal(held.numpy(), encoding.encode(values))
    np.testing.assert_array_equal(encoded_rows.decode_groups(held, 32).numpy(), encoding.decode(held.numpy()))


@needs_torch
def test_sums_of_16_bits_are_not_reduced_in_16_on_a_gpu() -> None:
    """The settings of PyTorch while a program runs on a GPU; tested here without a GPU."""
    import torch

    from treadle.backends.torch.devices import TorchDevice
    from treadle.backends.torch.torch_arrays import TorchArrays

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    with TorchArrays(TorchDevice(torch.device("cuda")), None).settings():
        assert not matmul.allow_fp16_reduced_precision_reduction
        assert not matmul.allow_bf16_reduced_precision_reduction
    assert (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction) == before


def test_bf16_runs_on_torch() -> None:
    """bf16 weights come from checkpoints as float32, since NumPy lacks bf16; results are converted in the same way."""
    torch = pytest.importorskip("torch")
    graph = graph_of(lambda b: b.input("x", "bf16[3]") * b.parameter("w", "bf16[3]"))
    exe = compiled("torch", graph, {"w": np.array([0.5, 1.0, 2.0], np.float32)})
    x = np.array([1.5, -2.0, 3.0], np.float32)
    assert exe(x=torch.from_numpy(x).bfloat16()).y.dtype == torch.bfloat16
    np.testing.assert_array_equal(exe(x=x).y, x * [0.5, 1.0, 2.0])
    with pytest.raises(BackendError, match="a float32 that bf16 cannot represent"):
        exe(x=np.full(3, 0.1, np.float32))


@each_backend
def test_an_array_may_be_laid_out_backwards(backend: str) -> None:
    """Strides may also be negative along an axis of one element, which NumPy calls contiguous whatever its stride."""
    exe = compiled(backend, graph_of(lambda b: b.input("x", "f32[B, 3]") * 2.0))
    for rows in (1, 2):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)[::-1]
        np.testing.assert_array_equal(exe(x=x).y, x * 2)


# -- refusals --------------------------------------------------------------------------------------------------------


@each_backend
def test_errors_of_calls_with_wrong_inputs(backend: str, golden: Golden) -> None:
    def build(b: Builder) -> Expr:
        graph = b.graph
        ids, mask = b.input("ids", "i64[B, S]"), b.input("mask", "f32[B, S]")
        pairs = b.input("pairs", "u8[2*S]")
        graph.symbols["S"] = replace(graph.symbols["S"], upper=8)
        with b.scoped("tail"):
            short = b.slice(mask, axis=1, start=0, stop="S-3")
        return (
            b.reduce_sum(short, axes=(0, 1))
            + b.cast(b.reduce_sum(ids, axes=(0, 1)), to="f32")
            + 0 * pairs_sum(b, pairs)
        )

    def pairs_sum(b: Builder, pairs: Expr) -> Expr:
        return b.cast(b.reduce_sum(pairs, axes=(0,)), to="f32")

    graph = graph_of(build, "scores")
    for node in graph.main.nodes:
        node.source = None
    good: dict[str, Any] = {
        "ids": np.ones((2, 4), np.int64),
        "mask": np.ones((2, 4), np.float32),
        "pairs": np.ones(8, np.uint8),
    }
    wrong: dict[str, dict[str, Any]] = {
        "an unknown name": good | {"idz": good["ids"]},
        "a near name": {"ids": good["ids"], "mask": good["mask"], "pair": good["pairs"]},
        "missing": {"ids": good["ids"]},
        "another kind of number": good | {"ids": good["mask"]},
        "a dtype that may not fit": good | {"pairs": np.ones(8, np.int64)},
        "a list of floats for integers": good | {"ids": [[1.5, 2, 3, 4]]},
        "a number that is too great": good | {"pairs": [1, 2, 3, 300, 5, 6, 7, 8]},
        "rows of several lengths": good | {"ids": [[1, 2], [3]]},
        "text": good | {"ids": [["a"]]},
        "another rank": good | {"ids": good["ids"][0]},
        "one symbol, two sizes": good | {"mask": np.ones((2, 5), np.float32)},
        "a size that follows from a symbol": good | {"pairs": np.ones(7, np.uint8)},
        "past a bound": {
            "ids": np.ones((1, 9), np.int64),
            "mask": np.ones((1, 9), np.float32),
            "pairs": np.ones(18, np.uint8),
        },
        "no row": {
            "ids": np.ones((0, 4), np.int64),
            "mask": np.ones((0, 4), np.float32),
            "pairs": np.ones(8, np.uint8),
        },
        "a negative size": {
            "ids": np.ones((1, 2), np.int64),
            "mask": np.ones((1, 2), np.float32),
            "pairs": np.ones(4, np.uint8),
        },
    }
    exe = compiled(backend, graph)
    assert exe(**good).y == 10.0
    texts = [f"{title}\n\n{message(partial(exe, **given))}\n" for title, given in wrong.items()]
    golden("executables/wrong_inputs.txt", "\n".join(texts))


TOO_SHORT: dict[str, tuple[Callable[[Builder, Expr], Expr], str]] = {
    "slice": (lambda b, x: b.slice(x, axis=1, start=1, stop=5), "from 1 to 5 is outside an axis of size S"),
    "slice, from the end": (
        lambda b, x: b.slice(x, axis=1, start=-5, stop=-4),
        "from S-5 to S-4 is outside an axis of size S",
    ),
    "top_k": (lambda b, x: b.top_k(x, k=5)[0], "k is 5, but axis -1 has S elements"),
    "windows": (
        lambda b, x: b.windows(x, axis=1, size=5),
        "a window spans 5 elements, the axis has S",
    ),
    "conv": (
        lambda b, x: b.conv(b.rearrange(x, pattern="b s -> b 1 s"), b.constant(np.ones((1, 1, 5), np.float32))),
        "the kernel spans 5 elements, the padded axis has S",
    ),
}
"""Ops that need five elements, and their errors for four."""


@pytest.mark.parametrize("name", TOO_SHORT)
@each_backend
def test_requirements_on_symbolic_axes_are_checked_in_each_call(name: str, backend: str) -> None:
    build, text = TOO_SHORT[name]
    graph = graph_of(lambda b: build(b, b.input("x", "f32[B, S]")))
    exe = compiled(backend, graph)
    enough, short = (np.arange(2 * n, dtype=np.float32).reshape(2, n) for n in (5, 4))
    assert_near(exe(x=enough).y, interpret(graph, {"x": enough})["y"])
    assert f"{text}, where S = 4" in message(lambda: exe(x=short))
    with pytest.raises(GraphError, match=re.escape(text)):
        interpret(graph, {"x": short})


@each_backend
def test_a_size_that_is_no_multiple_is_refused(backend: str) -> None:
    graph = graph_of(lambda b: b.input("x", "f32[B, 2*S+1]") * 2.0)
    exe = compiled(backend, graph)
    assert exe(x=np.ones((1, 5), np.float32)).y.shape == (1, 5)
    x = np.ones((1, 6), np.float32)
    assert "input x: dimension 1 must be 2*S+1, is 6" in message(lambda: exe(x=x))
    with pytest.raises(GraphError, match=r"dimension 1 must be 2\*S\+1, is 6"):
        interpret(graph, {"x": x})
    assert "input x: S must be at least 1, is 0" in message(lambda: exe(x=x[:, :1]))


@each_backend
def test_conversions(backend: str) -> None:
    exe = compiled(backend, graph_of(lambda b: b.input("x", "i64[N]").cast("f32") + b.input("y", "f32[N]")))
    y = np.array([0.5, 0.5], np.float32)
    for x in (np.array([1, 2], np.int32), np.array([1, 2], np.uint8), [1, 2], (1, 2), np.array([1, 2], ">i8")):
        for other in (y, y.astype(np.float16), [0.5, 0.5], y[::-1]):
            np.testing.assert_array_equal(exe(x=x, y=other).y, [1.5, 2.5])


@each_backend
def test_which_tensors_are_converted(backend: str) -> None:
    torch = pytest.importorskip("torch")
    exe = compiled(backend, graph_of(lambda b: b.input("x", "i64[N]").cast("f32") + b.input("y", "f32[N]")))
    tensors = {"x": torch.tensor([1, 2], dtype=torch.int16), "y": torch.tensor([0.5, 0.5], dtype=torch.float16)}
    np.testing.assert_array_equal(exe(**tensors).y, [1.5, 2.5])
    for x, cast in ((torch.ones(2), "x.to(torch.int64)"), (np.ones(2, np.float32), "x.astype('int64')")):
        with raises_freely(BackendError, match="x must be i64, is float32") as caught:
            exe(x=x, y=[0.5, 0.5])
        assert caught.value.hint == cast
        exe(x=eval(cast, {"x": x, "torch": torch}), y=[0.5, 0.5])


@each_backend
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_of_a_tensor_that_cannot_be_read_it_is_told_what_can(dtype: str, backend: str) -> None:
    """The suggestions of the error work. PyTorch accepts more arrays than NumPy."""
    torch = pytest.importorskip("torch")
    exe = compiled(backend, graph_of(lambda b: b.input("x", f"{dtype}[2, 2]") + b.input("y", f"{dtype}[2, 2]")))
    right = torch.eye(2, dtype={"f32": torch.float32, "f16": torch.float16}[dtype])
    given = {
        "trained": right.clone().requires_grad_(),
        "sparse": right.to_sparse(),
        "bf16": right.to(torch.bfloat16),
        "all": right.to(torch.bfloat16).to_sparse().requires_grad_(),
    }
    tried: dict[str, list[str | None]] = {name: [] for name in given}
    for name, x in given.items():
        made = None
        while made is None and len(tried[name]) < 3:
            try:
                made = exe(x=x, y=right).y
            except BackendError as error:
                tried[name].append(error.hint)
                x = eval(str(error.hint), {"x": x, "torch": torch})
        np.testing.assert_array_equal(made, [[2, 0], [0, 2]])
    if backend != "torch":
        with pytest.raises(BackendError, match="input x is not an array that NumPy can read"):
            exe(x=given["trained"], y=right)
    full = {"f32": "float32", "f16": "float16"}[dtype]
    if backend == "torch":
        narrower = [f"x.to(torch.{full})"] if dtype == "f16" else []
        assert tried == {
            "trained": [],
            "sparse": ["x.to_dense()"],
            "bf16": narrower,
            "all": ["x.to_dense()", *narrower],
        }
        return
    assert tried == {
        "trained": ["x.detach().cpu()"],
        "sparse": ["x.to_dense().detach().cpu()"],
        "bf16": [f"x.to(torch.{full}).detach().cpu()"],
        "all": [f"x.to_dense().to(torch.{full}).detach().cpu()"],
    }


@each_backend
def test_a_failing_node_names_its_line(backend: str) -> None:
    def build(b: Builder) -> Expr:
        with b.scoped("wte"):
            made: Expr = b.embedding(b.parameter("w", "f32[5,3]"), b.input("ids", "i64[N]"))
        return made

    graph = graph_of(build)
    exe = compiled(backend, graph, {"w": np.ones((5, 3), np.float32)})
    for index in (5, -1):
        text = message(lambda i=index: exe(ids=np.array([0, i])))
        lines = [line for line in text.splitlines() if not line.startswith("  from")]
        assert lines == [
            f"embedding: index {index} is outside an axis of size 5",
            f"  received  {index} in input ids",
            "  try       indices from 0 to 4",
        ]
        assert "test_executables.py:" in text
        assert "scope wte" in text


@each_backend
def test_an_index_is_followed_to_the_input_that_it_was_made_of(backend: str) -> None:
    """The index is followed through ops of one operand. A value computed from two values, or from weights alone, is
    reported under its own name.
    """

    def build(b: Builder) -> dict[str, Expr]:
        ids, table = b.input("ids", "i32[N]"), b.parameter("table", "f32[5, 3]")
        turned = b.cast(b.reshape(ids, shape=("N", 1)), to="i64", name="turned")
        both = b.add(ids, b.input("more", "i32[N]"), name="both")
        return {
            "one": b.embedding(table, turned),
            "two": b.gather(table, both, axis=0),
            "three": b.take_along_axis(table, b.cast(b.input("at", "i32[5, 1]"), to="i64", name="wide"), axis=1),
            "four": b.gather(b.input("x", "f32[N]"), b.parameter("fixed", "i64[2]"), axis=0),
        }

    graph, weights = graph_of(build), {"table": np.ones((5, 3), np.float32), "fixed": np.array([1, 2])}
    exe = compiled(backend, graph, weights)
    good = {"ids": np.int32([0, 1, 2]), "more": np.int32([2, 2, 2]), "at": np.zeros((5, 1), np.int32)}
    good["x"] = np.zeros(3, np.float32)
    exe(**good)
    for wrong, expected in (
        ({"ids": np.int32([5, 1, 4])}, "5 in turned, computed from input ids"),
        ({"more": np.int32([2, 7, 0])}, "8 in both"),
        ({"at": np.full((5, 1), 3, np.int32)}, "3 in wide, computed from input at"),
    ):
        assert f"  received  {expected}\n" in message(lambda w=wrong: exe(**good | w))
    late = compiled(backend, graph, weights | {"fixed": np.array([1, 6])})
    assert "  received  6 in fixed\n" in message(lambda: late(**good))


@each_backend
def test_missing_and_misshapen_weights(backend: str) -> None:
    graph, weights = block_model()
    text = message(lambda: compiled(backend, graph, {k: v for k, v in weights.items() if "ln" not in k}))
    assert "h.0.ln.weight: f32[8]" in text
    assert "h.1.ln.bias: f32[8]" in text
    name = "h.0.out.weight"
    for wrong in (weights[name][:4], weights[name].astype(np.float64)):
        assert f"weight {name} must be f32[8, 8]" in message(
            lambda w=wrong: compiled(backend, graph, weights | {name: w})
        )


@pytest.mark.parametrize(("count", "ends"), [(20, "w19: f32[2]"), (22, "w19: f32[2]\nand 2 more")])
def test_of_missing_weights_twenty_are_listed(count: int, ends: str) -> None:
    b = Builder(Graph("many"))
    b.outputs(**{f"y{n}": b.parameter(f"w{n}", "f32[2]") * b.input(f"x{n}", "f32[2]") for n in range(count)})
    with pytest.raises(BackendError, match="many lacks weights") as error:
        compiled("numpy", b.graph)
    assert str(error.value.within).startswith("w0: f32[2]\nw1: f32[2]\n")
    assert str(error.value.within).endswith(f"w18: f32[2]\n{ends}")


def test_shapes_that_fit_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "_REMEMBERED", 2)
    takes = signature.Signature(graph_of(lambda b: b.input("x", "f32[B]") * 2.0))
    held = []
    for size in (1, 1, 2, 3, 1):
        assert takes.sizes([(size,)]) == {"B": size}
        held.append(len(takes._fitting))
    assert held == [1, 1, 2, 1, 2]


@each_backend
def test_a_sparse_weight_is_refused(backend: str) -> None:
    torch = pytest.importorskip("torch")
    graph = graph_of(lambda b: b.input("x", f32[2, 2]) @ b.parameter("w", f32[2, 2]))
    weight = torch.eye(2)
    np.testing.assert_array_equal(compiled(backend, graph, {"w": weight})(x=np.eye(2, dtype=np.float32)).y, weight)
    text = message(lambda: compiled(backend, graph, {"w": weight.to_sparse()}))
    assert text == "weight w must be f32[2, 2]\n  received  w: float32[2, 2], sparse_coo"


@each_backend
def test_weights_may_be_tensors_that_are_trained(backend: str) -> None:
    torch = pytest.importorskip("torch")
    graph, weights = block_model()
    trained = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in weights.items()}
    tokens = np.arange(6).reshape(2, 3)
    expected = compiled(backend, graph, weights)(tokens=tokens).logits
    np.testing.assert_array_equal(compiled(backend, graph, trained)(tokens=tokens).logits, expected)
    name = "h.0.out.weight"
    wrong = trained | {name: trained[name].bfloat16()}
    assert f"weight {name} must be f32[8, 8]" in message(lambda: compiled(backend, graph, wrong))


@pytest.mark.parametrize(("axes", "order"), [("B 3 H W", "0, 3, 1, 2"), ("B H W 3", "0, 2, 3, 1"), ("B 7 H W", None)])
def test_an_array_with_the_channels_in_another_place_is_transposed(axes: str, order: str | None) -> None:
    graph = graph_of(lambda b: b.relu(b.input("images", f"f32[{', '.join(axes.split())}]")))
    given = np.ones((2, 8, 9, 3) if axes.startswith("B 3") else (2, 3, 8, 9), np.float32)
    exe = compiled("numpy", graph)
    with raises_freely(BackendError, match="must be") as caught:
        exe(images=given)
    if order is None:
        assert caught.value.hint is None
        return
    code, _, _ = str(caught.value.hint).partition(", if")
    assert code == f"images.transpose({order})"
    exe(images=eval(code, {"images": given}))
