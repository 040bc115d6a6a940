"""The torch backend on a device: programs run on a stand-in, which counts waits, copies and allocations."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
import treadle as t
from tests.backend_checks import graph_of, message
from tests.many_cases import every_case
from tests.op_checks import TESTED
from tests.random_sessions import play
from treadle.backends.registry import find_backend
from treadle.ir.attention.masking import attend, causal, padding, window
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import BackendError, UsageError
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph

torch = pytest.importorskip("torch", minversion="2.9")

from tests.standin_checks import Foreign, check_model, check_op, model_cases
from tests.support.standin_device import DEVICE, HOST, MixedDevices, StandInDevice, StandInTensor, moved, standin
from treadle.backends.torch import attention_kernels, devices, kernels
from treadle.backends.torch.devices import TorchDevice
from treadle.files.mapped_files import give_back

Array = np.ndarray[Any, Any]

SMALL: dict[str, Any] = {"layers": 2, "dim": 64, "heads": 4, "vocab": 100}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "bert": {**SMALL, "hidden": 128},
    "llama": {**SMALL, "hidden": 128, "kv_heads": 2},
    "vit": {"layers": 2, "dim": 64, "heads": 4, "hidden": 128, "height": 32, "width": 32, "patch": 16},
    "t5": {**SMALL, "hidden": 128},
}
STEPPED = ("gpt2", "llama")
CUDA = Target("cuda")


def inputs_of(name: str, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    if name == "vit":
        return {"pixels": rng.standard_normal((2, 3, 32, 32)).astype(np.float32)}
    made = {"tokens": rng.integers(0, 100, (2, 17))}
    return {**made, "decoder_tokens": rng.integers(0, 100, (2, 7))} if name == "t5" else made


# -- the device ------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Any], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "a condition as index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "copy": lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
}


def test_a_read_in_a_program_is_counted_at_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, form = kernels.embedding, ""

    def reading(indices: Any, table: Any, **options: Any) -> Any:
        READS[form](indices)
        return embedding(indices, table, **options)

    monkeypatch.setattr(kernels, "embedding", reading)
    with standin() as counts, every_case() as each:
        exe = treadle.compile("gpt2", backend="torch", target="cuda", **SMALL)
        for form in READS:
            with each(form):
                counts.clear()
                exe(**inputs_of("gpt2"))
                lines = counts.lines("wait")
                assert lines.pop(HOST) == 1
                assert len(lines) == 2 and all("kernels.embedding(" in line for line in lines)


def test_devices_do_not_mix() -> None:
    x = torch.ones(3).to(DEVICE)
    assert (x + 1).device == DEVICE and torch.equal((x + torch.tensor(1.0)).inner, torch.full((3,), 2.0))
    with pytest.raises(MixedDevices):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="cannot be converted to NumPy"):
        x.numpy()


def test_views_share_memory_with_their_tensor() -> None:
    x = torch.zeros(4, device=DEVICE)
    x.view(2, 2)[1] = 1.0
    assert x.inner.tolist() == [0, 0, 1, 1]
    storages = {each.untyped_storage()._cdata for each in (x, x.view(2, 2), x[1:])}
    assert len(storages) == 1 and x.clone().untyped_storage()._cdata not in storages


# -- ops and models --------------------------------------------------------------------------------------------

DRAWN_OPS = ("append", "attention", "cached_attention", *random.Random(0).sample(TESTED, 3))
DRAWN_MODELS = random.Random(0).sample(list(model_cases()), 6)


@pytest.mark.parametrize("name", DRAWN_OPS)
def test_ops_keep_their_bounds(name: str) -> None:
    """A sample of tests/fuzz/standin.py."""
    check_op(name, thorough=False)


@pytest.mark.parametrize(("name", "form"), DRAWN_MODELS)
def test_models_equal_the_cpu_and_wait_once(name: str, form: str) -> None:
    """A sample of tests/fuzz/standin.py."""
    counts = check_model(name, form)
    assert (counts.waits, counts.copies_in) == (1, 1)


def test_tensors_on_the_device_stay_there() -> None:
    given = inputs_of("gpt2")
    wanted = treadle.compile("gpt2", backend="torch", **SMALL)(**given)["logits"]
    with standin() as counts:
        exe = treadle.compile("gpt2", backend="torch", target="cuda", **SMALL)
        tokens = torch.from_numpy(given["tokens"]).to(DEVICE)
        counts.clear()
        made = exe(tokens=tokens)["logits"]
    assert isinstance(made, StandInTensor) and counts.copies_in == 0 and counts.waits == 1
    np.testing.assert_allclose(made.inner.numpy(), wanted, atol=1e-5)


def test_arrays_of_other_libraries_are_used_without_a_copy() -> None:
    given = inputs_of("gpt2")["tokens"]
    wanted = treadle.compile("gpt2", backend="torch", **SMALL)(tokens=given)["logits"]
    with standin() as counts:
        exe = treadle.compile("gpt2", backend="torch", target="cuda", **SMALL)
        counts.clear()
        made = exe(tokens=Foreign(torch.from_numpy(given).to(DEVICE)))["logits"]
        assert counts.lines("copy in") == {HOST: 1}  # the test's own
    assert isinstance(made, StandInTensor)
    np.testing.assert_allclose(made.inner.numpy(), wanted, atol=1e-5)
    here: Any = treadle.compile("gpt2", backend="torch", **SMALL)
    tokens = torch.from_numpy(given)
    np.testing.assert_array_equal(here(tokens=Foreign(tokens))["logits"], wanted)
    (entry,) = here.executable.called.values()
    taken = entry._module.arrays.take(entry.inputs[0], Foreign(tokens))
    assert taken.data_ptr() == tokens.data_ptr()


def test_outputs_have_the_kind_of_the_inputs() -> None:
    graph = graph_of(lambda b: b.input("x", "bf16[B, 4]") * b.input("y", "bf16[B, 4]"))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with standin():
        exe = find_backend("torch").compile(graph, CUDA, {})
        (array,) = exe(x=x, y=x).values()
        tensors = [torch.from_numpy(x).bfloat16(), torch.from_numpy(x).bfloat16().to(DEVICE)]
        made = [*exe(x=tensors[0], y=tensors[1]).values(), *exe(x=tensors[1], y=tensors[1]).values()]
    np.testing.assert_array_equal(array, x * x)
    for each in made:
        assert isinstance(each, StandInTensor) and each.dtype == torch.bfloat16 and each.device == DEVICE
        np.testing.assert_array_equal(each.inner.float().numpy(), x * x)


def test_weights_of_a_file_are_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of each piece are released, and nothing of a weight stays on the host."""
    released: list[int] = []
    graph = graph_of(lambda b: b.linear(b.input("x", "f32[3, 40]"), b.parameter("w", "f32[1000, 40]")))
    weight = np.random.default_rng(0).standard_normal((1000, 40)).astype(np.float32)
    weight.tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", np.float32, "r", shape=(1000, 40))
    monkeypatch.setattr(devices, "PIECE", 16_000)
    monkeypatch.setattr(devices, "give_back", lambda array: released.append(array.nbytes) or give_back(array))
    x = np.ones((3, 40), np.float32)
    with standin() as counts:
        exe = find_backend("torch").compile(graph, CUDA, {"w": mapped})
        assert counts.copies_in == 10 and released == [16_000] * 10 and counts.nbytes == weight.nbytes
        np.testing.assert_allclose(exe(x=x)["y"], x @ weight.T, atol=1e-4)


def test_derived_weights_do_not_stay_on_the_host() -> None:
    """A derived weight may get the address of an earlier one, which is another weight."""
    names = [f"w{n}" for n in range(12)]

    def build(b: Any) -> Any:
        y = b.input("x", "f32[2, 8]")
        for name in names:
            weight = b.concat(b.parameter(name, "f32[4, 8]"), b.parameter(f"{name}_more", "f32[4, 8]"), axis=0)
            y = b.linear(y, weight)
        return y

    rng = np.random.default_rng(0)
    weights = {each: rng.standard_normal((4, 8)).astype(np.float32) for n in names for each in (n, f"{n}_more")}
    x = rng.standard_normal((2, 8)).astype(np.float32)
    wanted = find_backend("numpy").compile(graph_of(build), Target("cpu"), weights)(x=x)["y"]
    with standin():
        for target in (CUDA, Target("cpu")):
            made = find_backend("torch").compile(graph_of(build), target, weights)(x=x)["y"]
            np.testing.assert_allclose(made, wanted, rtol=1e-4)


def test_weights_that_do_not_fit_are_refused_before_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    hints = []
    for free in (2_000_000, 1_200_000, 1000):
        monkeypatch.setattr(StandInDevice, "free_bytes", lambda self, free=free: free)
        with standin() as counts, pytest.raises(BackendError, match="too little free memory") as caught:
            treadle.compile("gpt2", backend="torch", target="cuda", layers=8, dim=128, heads=4, vocab=100)
        assert counts.copies_in == 0 and f"{free:,} are free" in str(caught.value.received)
        hints.append(str(caught.value.hint))
    assert [hint.split(", or")[0] for hint in hints] == [
        'quantize="int8-weights"',
        'quantize="int4"',
        "a device with more memory",
    ], hints


def test_a_tensor_on_another_device_is_refused() -> None:
    exe = treadle.compile("gpt2", backend="torch", **SMALL)
    text = message(lambda: exe(tokens=torch.from_numpy(inputs_of("gpt2")["tokens"]).to(DEVICE)))
    assert text.startswith("input tokens is on another device") and 'tokens.to("cpu")' in text


# -- indices out of range ---------------------------------------------------------------------------------------

INDEXED: dict[str, tuple[Callable[[Any], Any], dict[str, Array]]] = {
    "embedding": (
        lambda b: b.embedding(b.input("x", "f32[5,4]"), b.input("i", "i64[2,3]")),
        {"i": np.ones((2, 3), int)},
    ),
    "gather": (
        lambda b: b.gather(b.input("x", "f32[5,4]"), b.input("i", "i32[2]"), axis=0),
        {"i": np.ones(2, np.int32)},
    ),
    "take_along_axis": (
        lambda b: b.take_along_axis(b.input("x", "f32[5,4]"), b.input("i", "i64[2,4]"), axis=0),
        {"i": np.ones((2, 4), int)},
    ),
    "scatter_add": (
        lambda b: b.scatter_add(
            b.input("x", "f32[5,4]"), b.input("i", "i64[2,4]"), b.constant(np.ones((2, 4), np.float32)), axis=0
        ),
        {"i": np.ones((2, 4), int)},
    ),
    "index_add": (
        lambda b: b.index_add(
            b.input("x", "f32[5,4]"), b.input("i", "i64[2]"), b.constant(np.ones((2, 4), np.float32)), axis=0
        ),
        {"i": np.ones(2, int)},
    ),
    "an index that is computed": (
        lambda b: b.gather(b.input("x", "f32[5,4]"), b.input("i", "i64[2]") * 2, axis=0),
        {"i": np.ones(2, int)},
    ),
}


@pytest.mark.parametrize("case", INDEXED)
@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_out_of_range_is_the_error_of_the_cpu(case: str, index: int) -> None:
    build, given = INDEXED[case]
    graph = graph_of(build)
    given = {**given, "x": np.arange(20, dtype=np.float32).reshape(5, 4)}
    wrong = {**given, "i": given["i"].copy()}
    wrong["i"].flat[1] = index
    backend = find_backend("torch")
    here = backend.compile(graph, Target("cpu"), {})
    with standin() as counts:
        there = backend.compile(graph, CUDA, {})
        counts.clear()
        assert message(lambda: there(**wrong)) == message(lambda: here(**wrong))
        assert counts.waits <= 1  # short vectors of indices are checked on the host
        for name, wanted in here(**given).items():  # the device is usable
            np.testing.assert_array_equal(there(**given)[name], wanted)


def test_the_first_failure_is_reported() -> None:
    def build(b: Any) -> Any:
        first = b.gather(b.input("x", "f32[5,4]"), b.input("i", "i64[2]"), axis=0)
        return first + b.gather(b.input("y", "f32[3,4]"), b.input("j", "i64[2]"), axis=0)

    graph = graph_of(build)
    x, i, j = np.ones((5, 4), np.float32), np.array([0, 9]), np.array([8, 0])
    with standin():
        there = find_backend("torch").compile(graph, CUDA, {})
        assert "index 9 is outside an axis of size 5" in message(lambda: there(x=x, y=x[:3], i=i, j=j))
        assert "index 8 is outside an axis of size 3" in message(lambda: there(x=x, y=x[:3], i=i * 0, j=j))


APPENDING = """graph appending {
  symbols B, R, C
  states {
    mem: f32[R, C, 4]
  }
  main(x: f32[B, 2, 4], rows: i64[B], start: i64[B]) -> (y: f32[B, 2, 4]) {
    %mem = append(%mem, x, rows, start, axis=1)
    return y = x
  }
}
"""


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(("rows", "start"), [([0, 9], [1, 1]), ([0, -1], [1, 1]), ([0, 2], [1, 3]), ([0, 2], [1, -1])])
def test_a_row_that_cannot_be_written_leaves_other_rows(rows: list[int], start: list[int], on_host: bool) -> None:
    """Rows and positions that the host knows are checked before anything is written. Otherwise nothing is written for
    the row, and the slots of other rows are unchanged.
    """
    graph, x = parse_graph(APPENDING), np.ones((2, 2, 4), np.float32)
    given = {"x": x, "rows": np.array(rows), "start": np.array(start)}
    here: Any = find_backend("torch").compile(graph, Target("cpu"), {})
    wanted = message(lambda: here.entry("main")(here.new_states(R=3, C=4), **given))
    with standin():
        there: Any = find_backend("torch").compile(graph, CUDA, {})
        states = there.new_states(R=3, C=4)
        called = given if on_host else {name: torch.from_numpy(array).to(DEVICE) for name, array in given.items()}
        assert message(lambda: there.entry("main")(states, **called)) == wanted
        held = moved(states)["mem"]
        assert not held[1:].any() and (not on_host or not held.any())
        there.entry("main")(states, **{**given, "rows": np.array([2, 0]), "start": np.array([2, 0])})
        held = moved(states)["mem"]
    assert held[2, 2:].all() and held[0, :2].all() and not held[2, :2].any() and not held[1].any()


# -- quantized weights ------------------------------------------------------------------------------------------


def test_quantized_weights_stay_quantized_on_the_device() -> None:
    """A fifth of the weights is the table, as in SmolLM2. It has 8 bits, and other matrices have 4.5."""
    sizes = {"layers": 2, "dim": 256, "hidden": 768, "heads": 4, "kv_heads": 2, "vocab": 1536, "tied": True}
    given = {"tokens": np.arange(12).reshape(1, 12)}
    with standin() as counts:
        exe = treadle.compile("llama", backend="torch", target="cuda", quantize="int4", seed=1, **sizes)
        held = counts.nbytes
        made = exe(**given)["logits"]
    wanted = treadle.compile("llama", backend="torch", quantize="int4", seed=1, **sizes)(**given)["logits"]
    np.testing.assert_allclose(made, wanted, atol=1e-5 * float(np.abs(wanted).max()))
    numbers = sum(v.type.decoded.bytes_at({}) // 4 for v in exe.graph.parameters.values())
    assert held <= 0.36 * 2 * numbers
    lines = [line for line in exe.source.splitlines() if "decode_" in line]
    assert sum("decode_int4_groups(" in line for line in lines) == 5  # in one block: q k v, out, gate, up, down
    assert sum("decode_int8_rows(" in line for line in lines) == 2  # the rows of tokens, and the table for the logits


SMOL = {"layers": 2, "dim": 256, "hidden": 768, "heads": 4, "kv_heads": 2, "vocab": 1536, "tied": True}


def test_products_of_bf16_read_groups_of_4_bits() -> None:
    """The stand-in multiplies the packed form as PyTorch documents it for GPUs."""
    given, options = {"tokens": np.arange(12).reshape(1, 12)}, {"quantize": "int4", "dtype": "bf16", "seed": 1, **SMOL}
    wanted = treadle.compile("llama", backend="torch", **options)(**given)["logits"]
    with standin():
        exe: Any = treadle.compile("llama", backend="torch", target="cuda", **options)
        made = exe(**given)["logits"]
    np.testing.assert_allclose(made, wanted, atol=0.02 * float(np.abs(wanted).max()))
    assert exe.source.count("kernels.group_linear(") == 5 and "decode_int4_groups" not in exe.source
    weights = [each for name, each in exe.executable.weights.items() if not name.endswith("*")]
    tensors = [x for each in weights for x in (each if isinstance(each, tuple) else (each,))]
    numbers = sum(v.type.decoded.bytes_at({}) // 4 for v in exe.graph.parameters.values())
    assert sum(x.nbytes for x in tensors) <= 0.36 * 2 * numbers
    notes = exe.optimized.lowered.log[-1].notes
    assert sum("a product of bf16 and 4-bit integers, torch._weight_int4pack_mm" in note for note in notes) == 5


def test_a_program_for_another_gpu_is_inspected_with_its_products() -> None:
    options = {"quantize": "int4", "dtype": "bf16", **SMOL}
    assert "group_linear" in treadle.compile("llama", backend="torch", target="h100", **options).source
    old = treadle.compile("llama", backend="torch", target="cuda", **options)
    assert "group_linear" not in old.source
    refusals = [refusal for record in old.optimized.lowered.log for refusal in record.refusals]
    assert any("needs compute capability 8.0, it is unknown" in str(each) for each in refusals)


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("scheme", ["int8_rows", "uint8_rows"])
def test_products_of_8_bit_integers_are_exact_on_a_device(rows: int, scheme: str) -> None:
    rng = np.random.default_rng(rows)
    weight = parse_encoding("int8_rows").encode(rng.standard_normal((24, 64)).astype(np.float32))
    x = parse_encoding(scheme).encode(rng.standard_normal((rows, 64)).astype(np.float32))
    wanted = kernels.encoded_linear(torch.from_numpy(x), torch.from_numpy(weight), None)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        product = torch._int_mm
        patch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.shape) or product(a, b))
        made = kernels.encoded_linear(torch.from_numpy(x).to(DEVICE), torch.from_numpy(weight).to(DEVICE), None)
    assert calls == [(max(rows, 17), 64)]
    if torch.cpu._is_vnni_supported():
        torch.testing.assert_close(made.inner, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_decoded_groups_of_4_bits_are_bitwise_those_of_numpy(group: int) -> None:
    encoding = parse_encoding(f"int4_groups({group})")
    x = encoding.encode(np.random.default_rng(group).standard_normal((3, 2, 256)).astype(np.float32))
    made = kernels.decode_int4_groups(torch.from_numpy(x), group)
    np.testing.assert_array_equal(made.numpy(), encoding.decode(x))


# -- sessions ---------------------------------------------------------------------------------------------------


def sessions(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a session on the CPU, and one on the stand-in."""
    sizes = {**MODELS[name], "layers": 1} if name == "llama" else MODELS[name]
    here, there = (t.compile(name, backend="torch", target=at, **sizes) for at in ("cpu", "cuda"))
    return here.session(**options), there.session(**options)


@pytest.mark.parametrize("name", STEPPED)
def test_a_step_waits_once(name: str) -> None:
    with standin() as counts:
        here, there = sessions(name, rows=4, capacity=200)
        rows = [(here.open(), there.open()) for _ in range(3)]
        assert all(a == b for a, b in rows)
        texts = {row: list(range(5 + 40 * row)) for row, _ in rows}
        texts = {row: [i % 100 for i in text] for row, text in texts.items()}
        counts.clear()
        wanted, made = here.prefill(texts), there.prefill(texts)
        assert counts.waits == counts.copies_in == 3  # rows of three widths
        for chosen in ([0, 1, 2], [0, 2], [1]):  # consecutive slots are read without a copy
            for row in texts:
                np.testing.assert_allclose(made[row], wanted[row], atol=1e-5)
            counts.clear()
            wanted |= here.step({row: 7 + row for row in chosen})
            made |= there.step({row: 7 + row for row in chosen})
            assert (counts.waits, counts.copies_in) == (1, 1), counts.lines("wait")


def test_200_steps_of_a_session_equal_the_cpu() -> None:
    """Rows open, grow, fill up and close at random. A token out of range and a full row raise the CPU's errors."""
    rng = np.random.default_rng(0)
    with standin():
        here, there = sessions("llama", rows=3, capacity=40)
        for number in range(200):
            if number == 137:
                _assert_same_error(here, there, lambda session: session.step({session.rows[0]: 100}))
            full = [row for row in here.rows if here.length(row) == 40]
            if full:
                _assert_same_error(here, there, lambda session, row=full[0]: session.step({row: 1}))
                here.close(full[0]), there.close(full[0])
            elif here.rows and rng.random() < 0.02:
                row = int(rng.choice(here.rows))
                here.close(row), there.close(row)
            if not here.rows or (here.free and rng.random() < 0.2):
                assert here.open() == there.open()
                text = {here.rows[-1]: rng.integers(0, 100, int(rng.integers(1, 9))).tolist()}
                _assert_near(here.prefill(text), there.prefill(text))
            some = rng.permutation(here.rows)[: int(rng.integers(1, len(here.rows) + 1))]
            tokens = {int(row): int(rng.integers(100)) for row in some if here.length(int(row)) < 40}
            _assert_near(here.step(tokens), there.step(tokens))


def _assert_near(here: Mapping[int, Array], there: Mapping[int, Array]) -> None:
    assert here.keys() == there.keys()
    for row, wanted in here.items():
        np.testing.assert_allclose(there[row], wanted, atol=1e-5)


def _assert_same_error(here: Any, there: Any, call: Callable[[Any], object]) -> None:
    texts = []
    for session in (here, there):
        with pytest.raises((UsageError, BackendError)) as caught:
            call(session)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# -- capture ----------------------------------------------------------------------------------------------------


def capture(entry: Any) -> None:
    """Let Dynamo capture an entry as one graph, which then runs in its place."""
    torch._dynamo.reset()
    entry.function = torch.compile(entry.function, fullgraph=True, backend="eager")


@pytest.fixture
def as_a_device() -> TorchDevice:
    """The CPU, for programs that read nothing back: Dynamo cannot trace the stand-in's tensors."""
    return TorchDevice(torch.device("cpu"), is_asynchronous=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_program_is_captured_as_one_graph(name: str, as_a_device: TorchDevice) -> None:
    given = inputs_of(name)
    with standin(as_a_device):
        exe: Any = treadle.compile(name, backend="torch", target="cuda", **MODELS[name])
        wanted = exe(**given)
        (entry,) = exe.executable.called.values()
        capture(entry)
        for output, made in exe(**given).items():
            np.testing.assert_allclose(made, wanted[output], atol=1e-6)
        if name != "vit":
            wrong = {each: x + 100 for each, x in given.items()}
            assert "is outside an axis of size 100" in message(lambda: exe(**wrong))


@pytest.mark.parametrize("name", STEPPED)
def test_a_step_is_captured_as_one_graph(name: str, as_a_device: TorchDevice) -> None:
    with standin(as_a_device):
        here, there = (
            t.compile(name, backend="torch", target="cuda", **MODELS[name]).session(rows=2, capacity=40) for _ in "ab"
        )
        text = {here.open(): [1, 2, 3], here.open(): [4, 5, 6, 7]}
        assert {there.open(), there.open()} == set(text)
        here.prefill(text), there.prefill(text)
        _assert_near(here.step({0: 8, 1: 9}), there.step({0: 8, 1: 9}))
        capture(there._step)
        for token in (1, 2):
            _assert_near(here.step({0: token, 1: 9}), there.step({0: token, 1: 9}))


@pytest.fixture
def eager_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile capture whole graphs without compiling them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend="eager"))
    torch._dynamo.reset()


@pytest.mark.usefixtures("eager_compile")
def test_torch_compile_is_an_option_of_the_cpu() -> None:
    given = inputs_of("gpt2")
    wanted = treadle.compile("gpt2", backend="torch", **SMALL)(**given)["logits"]
    exe = treadle.compile("gpt2", backend="torch", torch_compile=True, **SMALL)
    for _ in range(2):
        np.testing.assert_allclose(exe(**given)["logits"], wanted, atol=1e-5)
    wrong = {"tokens": given["tokens"] + 99}
    here = treadle.compile("gpt2", backend="torch", **SMALL)
    assert message(lambda: exe(**wrong)) == message(lambda: here(**wrong))
    with pytest.raises(UsageError, match="torch_compile applies to backend torch"):
        treadle.compile("gpt2", backend="numpy", torch_compile=True, **SMALL)


@pytest.mark.usefixtures("eager_compile")
def test_steps_of_a_session_are_compiled_once() -> None:
    here, there = (
        t.compile("gpt2", backend="torch", torch_compile=on, **SMALL).session(rows=2, capacity=64)
        for on in (False, True)
    )
    for session in (here, there):
        session.prefill({session.open(): [1, 2, 3], session.open(): [4, 5]})
    _assert_near(here.step({0: 5, 1: 6}), there.step({0: 5, 1: 6}))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for token in range(12):
        _assert_near(here.step({0: token, 1: 6}), there.step({0: token, 1: 6}))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


# -- attention --------------------------------------------------------------------------------------------------

LENGTH = 300
FORMS_OF_ATTENTION: dict[str, tuple[Any, dict[str, Array], bool, str]] = {
    "causal with padding": (
        lambda b: causal & padding(b.input("lengths", "i64[B]")),
        {"lengths": np.array([LENGTH, 0, 131])},
        False,
        "in blocks of queries, each with its own mask; flash attention does not support padding",
    ),
    "causal with a window": (
        lambda b: causal & window(40),
        {},
        True,
        "in blocks of queries, each with its own mask; flash attention does not support window(40)",
    ),
    "causal": (lambda b: causal, {}, True, "without a mask, which may use flash attention"),
    "padding": (
        lambda b: padding(b.input("lengths", "i64[B]")),
        {"lengths": np.array([LENGTH, 0, 131])},
        False,
        "with a mask; flash attention does not support padding",
    ),
}


@pytest.mark.parametrize("case", FORMS_OF_ATTENTION)
def test_no_attention_has_a_mask_of_all_pairs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, given, all_see, note = FORMS_OF_ATTENTION[case]
    rng = np.random.default_rng(0)
    given = {**given, **{n: rng.standard_normal((3, 2, LENGTH, 8)).astype(np.float32) for n in "qkv"}}

    def build(b: Any) -> Any:
        q, k, v = (b.input(n, "f32[B, 2, S, 8]") for n in "qkv")
        return attend(b, q, k, v, masks=masks(b))

    shapes, empty, whole = [], [], attention_kernels.F.scaled_dot_product_attention

    def watched(*operands: Any, attn_mask: Any = None, **options: Any) -> Any:
        shapes.append(() if attn_mask is None else tuple(attn_mask.shape[-2:]))
        return whole(*operands, attn_mask=attn_mask, **options)

    def watched_rows(mask: Any, all_see: bool | None) -> Any:
        empty.append(found := _empty_rows(mask, all_see))
        return found

    _empty_rows = attention_kernels._empty_rows
    wanted = treadle.compile(graph_of(build), backend="torch")(**given)
    with standin() as counts:
        exe = treadle.compile(graph_of(build), backend="torch", target="cuda")
        monkeypatch.setattr(attention_kernels.F, "scaled_dot_product_attention", watched)
        monkeypatch.setattr(attention_kernels, "_empty_rows", watched_rows)
        made = exe(**given)
        assert counts.waits == 1
    for output, expected in wanted.items():
        np.testing.assert_allclose(made[output], expected, atol=1e-5)
    assert shapes and all(math.prod(shape or (0,)) < LENGTH * LENGTH / 2 for shape in shapes), shapes
    assert all(found is None for found in empty) == all_see
    line, _ = exe.optimized.lowered.log[-1].notes
    assert note in line and "test_standin_device.py:" in line


def test_a_step_has_no_mask_of_all_pairs_and_no_rows_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, whole = [], attention_kernels.F.scaled_dot_product_attention

    def watched(*operands: Any, attn_mask: Any, **options: Any) -> Any:
        shapes.append(tuple(attn_mask.shape))
        return whole(*operands, attn_mask=attn_mask, **options)

    with standin():
        session = t.compile("gpt2", backend="torch", target="cuda", **SMALL).session(rows=2, capacity=400)
        session.prefill({session.open(): [1] * 20, session.open(): [2] * 140})
        monkeypatch.setattr(attention_kernels.F, "scaled_dot_product_attention", watched)
        session.step({0: 1, 1: 2})
        assert shapes == [(2, 1, 1, 256)] * 2  # the 141 live keys in a bucket


@pytest.mark.parametrize("seed", [1006])
def test_a_random_session_returns_the_logits_of_whole_texts(seed: int) -> None:
    """A sample of tests/fuzz/standin.py."""
    with standin(kind="cpu"):
        assert play(seed, "torch", moves=8).checked > 5
