"""Runs on a device, on the emulator: memory, states, status words, collectives, limits and errors.

`python -m tests.fuzz.device_models` runs whole models, and `python -m tests.fuzz.device_limits` every model of the zoo
on a small device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.support.gpu_emulator.emulation import compiler
from tests.support.gpu_emulator.emulator_runtime import EmulatorRuntime, emulated, runtime_of
from tests.test_scheduler import Heard
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.profiling import time_calls
from treadle.backends.tvm.runtimes import runtime as runtimes
from treadle.backends.tvm.runtimes.device_arrays import DeviceAccess, DeviceArray
from treadle.backends.tvm.runtimes.device_memory import BufferPart, DeviceLostError, HostMemory
from treadle.backends.tvm.runtimes.launch_table import Argument, Launch, LaunchTable
from treadle.backends.tvm.spaces import Arena, Constant, Held, Input, MemoryForm, Output, State, Status
from treadle.compiled import Compiled
from treadle.entry_functions import compile
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.types import f32
from treadle.models.registry import find_family
from treadle.runtime.generation import Choosing
from treadle.runtime.scheduler import Scheduler, TextOrder
from treadle.runtime.session import Session

pytestmark = [needs_tvm, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]

Array = np.ndarray[Any, Any]
WEIGHT = np.linspace(-1, 1, 40 * 70, dtype=np.float32).reshape(40, 70)


def _mapped(b: Builder) -> Expr:
    """Rows of a table at indices, times a weight and a constant: every kind of memory but states."""
    rows = b.gather(b.input("table", "f32[T, 70]"), b.input("indices", "i64[N]"), axis=0)
    scaled = b.softmax(rows * b.constant(np.linspace(1, 2, 70, dtype=np.float32)))
    return b.softmax(b.linear(scaled, b.parameter("w", "f32[40, 70]")))


def mapped(target: str = "cuda") -> KernelExecutable:
    executable = find_backend("tvm").compile(graph_of(_mapped), Target(target), {"w": WEIGHT})
    assert isinstance(executable, KernelExecutable)
    return executable


def inputs_of(rows: int, table: int = 50, *, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "table": rng.standard_normal((table, 70)).astype(np.float32),
        "indices": rng.integers(0, table, rows),
    }


def expected(given: Mapping[str, Array]) -> Array:
    return interpret(graph_of(_mapped), given, {"w": WEIGHT})["y"]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_peak_is_the_figure_of_the_plans_and_calls_leave_memory_as_it_was() -> None:
    exe = emulated(mapped())
    memory = runtime_of(exe).memory
    table = exe.launch_table(N=9, T=50)
    np.testing.assert_allclose(exe(**inputs_of(9))["y"], expected(inputs_of(9)), atol=1e-6)
    assert memory.peak == memory.used == table.nbytes == exe.nbytes
    for call in range(200):
        exe(**inputs_of(1 + call % 2))
    assert memory.peak == memory.used == table.nbytes == exe.nbytes
    exe(**inputs_of(20))  # buffers that are too small are released first
    assert memory.peak == memory.used == exe.nbytes > table.nbytes
    assert memory.used == exe.launch_table(N=20, T=50).nbytes
    del exe
    assert memory.used == 0


def test_a_call_copies_each_input_and_waits_once() -> None:
    exe = emulated(mapped())
    exe(**inputs_of(4))
    memory, given = runtime_of(exe).memory, inputs_of(4)
    memory.forget_counts()
    exe(**given)
    status = exe.launch_table(N=4, T=50).spaces[Status()]
    assert (memory.copies_in, memory.bytes_in) == (2, sum(array.nbytes for array in given.values()))
    assert (memory.copies_out, memory.bytes_out, memory.waits) == (2, 4 * 40 * 4 + status, 1)


def test_weights_are_released_on_the_host_and_can_be_read_back() -> None:
    exe = emulated(mapped())
    before = {space: array.tobytes() for space, array in exe.stored_weights().items()}
    exe(**inputs_of(4))
    assert not exe.machine.program.weights
    after = exe.stored_weights()
    assert {space: after[space].tobytes()[: len(data)] for space, data in before.items()} == before


def test_two_threads_with_two_executables_on_one_device_give_the_bits_of_one_after_the_other() -> None:
    runtime = EmulatorRuntime()
    exes = [emulated(mapped(), runtime) for _ in range(2)]
    given = [[inputs_of(1 + n % 5, seed=n) for n in range(12)] for _ in exes]
    alone = [[exe(**each)["y"].tobytes() for each in inputs] for exe, inputs in zip(exes, given, strict=True)]
    together: list[list[bytes]] = [[], []]

    def run(number: int) -> None:
        together[number] += [exes[number](**each)["y"].tobytes() for each in given[number]]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert runtime.memory.used == sum(exe.nbytes for exe in exes)


def test_poison_mode_and_times_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    exe, given = emulated(mapped()), inputs_of(5)
    before = exe(**given)["y"]
    calls = time_calls(exe, given, rounds=1)
    assert [call.step for call in calls] == list(exe.program.main.walk())
    assert all(call.seconds > 0 for call in calls)
    storages = {
        (view.storage, at) for call in calls for view, at in zip(call.step.pointers, call.addresses, strict=True)
    }
    assert len(storages) == len({storage for storage, _ in storages})
    monkeypatch.setenv("TREADLE_POISON", "1")
    np.testing.assert_array_equal(exe(**given)["y"], before)


def test_an_input_that_no_kernel_reads_has_no_memory() -> None:
    exe = emulated(compile(graph_of(_partly), backend="tvm", target="cuda"))
    x = np.linspace(-1, 1, 12, dtype=np.float32)
    np.testing.assert_allclose(exe(x=x, unread=np.ones(5))["y"], np.exp(x), rtol=1e-6)
    assert set(exe.executable.launch_table(N=12, M=5).spaces) == {Input("x"), Output("y")}


def _partly(b: Builder) -> Expr:
    b.input("unread", "f32[M]")
    return b.exp(b.input("x", "f32[N]"))


def test_a_donated_input_receives_the_output() -> None:
    graph = graph_of(lambda b: b.exp(b.input("x", "f32[B, 40]")))
    exe = emulated(compile(graph, backend="tvm", target="cuda", donate=("x",)))
    x = np.linspace(-1, 1, 120, dtype=np.float32).reshape(3, 40)
    wanted = np.exp(x)
    assert exe(x=x)["y"] is x
    np.testing.assert_allclose(x, wanted, rtol=1e-6)


# -- errors of kernels -------------------------------------------------------------------------------------------------


def test_an_index_out_of_range_is_reported_once() -> None:
    exe, given = emulated(mapped()), inputs_of(5)
    wrong = {**given, "indices": np.array([0, 50, 1, 2, 3])}
    for _ in range(2):
        with pytest.raises(BackendError, match="index 50 is outside an axis of size 50"):
            exe(**wrong)
        np.testing.assert_allclose(exe(**given)["y"], expected(given), atol=1e-6)


# -- integers in 32 bits -----------------------------------------------------------------------------------------------


def _narrow(b: Builder) -> dict[str, Expr]:
    x, i = b.input("x", "f32[T, 70]"), b.input("i", "i64[N]")
    rows = b.gather(x, i, axis=0)
    return {"y": rows, "best": b.argmax(rows, axis=-1), "sum": b.add(i, b.constant(np.array([7], np.int64)))}


def test_a_device_without_64_bit_integers_stores_them_in_32_bits() -> None:
    graph = graph_of(_narrow)
    exe = find_backend("tvm").compile(graph, Target("cuda"), {})
    emulated(exe, EmulatorRuntime(index="i32"))
    given = {"x": np.random.default_rng(0).standard_normal((9, 70)).astype(np.float32), "i": np.array([3, 8, 0])}
    wanted = interpret(graph, given)
    for name, array in exe(**given).items():
        assert array.dtype == wanted[name].dtype
        np.testing.assert_array_equal(array, wanted[name])
    assert isinstance(exe, KernelExecutable)
    assert exe.launch_table(N=3, T=9).spaces[Input("i")] == 256
    with pytest.raises(BackendError, match="input i has a value that does not fit into 32 bits") as caught:
        exe(**{**given, "i": np.array([0, -(2**31) - 1, 2])})
    assert "-2,147,483,649" in str(caught.value)
    with pytest.raises(BackendError, match="index 9 is outside an axis of size 9"):
        exe(**{**given, "i": np.array([0, 9, 2])})


# -- collectives -------------------------------------------------------------------------------------------------------


def test_a_collective_runs_on_the_host_between_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(b: Builder) -> Expr:
        return b.exp(b.apply("all_reduce", b.exp(b.input("x", "f32[B, 40]")), over="tp", ways=1))

    exe: Any = emulated(find_backend("tvm").compile(graph_of(build), Target("cuda"), {}))
    x = np.linspace(-1, 1, 120, dtype=np.float32).reshape(3, 40)
    wanted = np.exp(np.exp(x))
    launches = exe.launch_table(B=3).launches
    assert [launch.blocks == 0 for launch in launches] == [False, True, False]
    for poison in "01":
        monkeypatch.setenv("TREADLE_POISON", poison)
        np.testing.assert_allclose(exe(x=x)["y"], wanted, rtol=1e-5)


# -- limits and failures -----------------------------------------------------------------------------------------------


def test_every_limit_is_listed_before_the_first_launch() -> None:
    exe = emulated(mapped(), EmulatorRuntime(size=30_000, buffers=2, largest=4096, allocation=8192))
    with pytest.raises(BackendError, match="example exceeds the limits of cuda") as caught:
        exe(**inputs_of(9))
    text = str(caught.value)
    assert "weight w.panels: a buffer of 17,920 bytes, the device allows 8,192" in text
    assert "linear: 17,920 bytes of weight w.panels are bound to matmul_64, the device binds 4,096" in text
    assert "gather: gather_rows is bound to 4 buffers, the device allows 2    (tests/test_device_runs.py:" in text
    assert "memory: 39,680 bytes required, 30,000 bytes free (the run uses: weights 18,432, arena 5,120, " in text
    assert runtime_of(exe).launches == runtime_of(exe).memory.used == 0


def test_a_kernel_that_needs_too_much_shared_memory_runs_in_the_slow_form() -> None:
    exe = emulated(mapped(), EmulatorRuntime(shared=64))
    np.testing.assert_allclose(exe(**inputs_of(3))["y"], expected(inputs_of(3)), atol=1e-6)
    assert "softmax_f32" in runtime_of(exe).slow


def test_an_allocation_that_fails_states_the_bytes() -> None:
    memory = HostMemory(1000)
    held = memory.allocate(600)
    with pytest.raises(BackendError, match="there is not enough memory on the device") as caught:
        memory.allocate(500)
    assert "500 bytes required, 400 bytes free" in str(caught.value)
    del held
    assert memory.allocate(1000).nbytes == memory.used == memory.peak == 1000


def test_a_lost_device_is_opened_again_for_new_executables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_RUNTIMES", {})
    monkeypatch.setattr(runtimes, "_OPEN", {})
    opened: list[EmulatorRuntime] = []

    def open_emulator(target: Target) -> EmulatorRuntime:
        opened.append(EmulatorRuntime())
        return opened[-1]

    runtimes.register_runtime("cuda", open_emulator)
    exe, given = mapped(), inputs_of(3)
    before = exe(**given)["y"]
    with monkeypatch.context() as patched:

        def lost(parts: Sequence[BufferPart]) -> list[Array]:
            raise DeviceLostError("the device was lost")

        patched.setattr(opened[0].memory, "read_parts", lost)
        with pytest.raises(DeviceLostError):
            exe(**given)
    with pytest.raises(DeviceLostError):
        exe(**given)
    assert opened[0].memory.used == 0
    np.testing.assert_array_equal(mapped()(**given)["y"], before)
    assert runtimes.find_runtime(Target("cuda")) is opened[1]


def test_without_a_device_a_program_can_be_inspected_and_a_call_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(target: Target) -> EmulatorRuntime:
        raise BackendError(f"{target} needs a driver", hint="install it")

    monkeypatch.setattr(runtimes, "_RUNTIMES", {})
    monkeypatch.setattr(runtimes, "_OPEN", {})
    runtimes.register_runtime("cuda", missing)
    exe = mapped()
    assert "TREADLE_KERNEL(32) softmax_f32(" in exe.source
    assert exe.launch_table(N=1, T=1).launches
    for call in (lambda: exe(**inputs_of(3)), lambda: stateful().new_states(R=2, C=8)):
        with pytest.raises(BackendError, match="cuda needs a driver"):
            call()


def stateful_graph() -> Graph:
    """Return a graph that appends to rows of a state, and returns the exponential of the whole state."""
    b = Builder(Graph("stateful"))
    state = b.state("cache", "f32[R, C, 4]")
    x, rows, start = b.input("x", "f32[B, 1, 4]"), b.input("rows", "i64[B]"), b.input("start", "i64[B]")
    b.outputs(y=b.exp(b.append(state, x, rows, start, axis=1)))
    return b.graph


def stateful(target: str = "cuda") -> Any:
    return find_backend("tvm").compile(stateful_graph(), Target(target), {})


def test_states_are_on_one_device_and_fit_into_it() -> None:
    exe, other = emulated(stateful()), emulated(stateful())
    states = exe.new_states(R=2, C=8)
    given = {"x": np.ones((1, 1, 4), np.float32), "rows": np.array([1]), "start": np.array([3])}
    wanted = np.ones((2, 8, 4), np.float32)
    wanted[1, 3] = np.exp(np.float32(1))
    np.testing.assert_allclose(exe.entry("main")(states, **given)["y"], wanted, rtol=1e-6)
    (copy,) = states.read([("cache", (1, slice(2, 5)))])
    np.testing.assert_array_equal(copy, np.array([0, 1, 0], np.float32)[:, None].repeat(4, 1))
    with pytest.raises(BackendError, match="the states are on another device than stateful"):
        other.entry("main")(states, **given)
    with pytest.raises(BackendError, match="there is not enough memory on the device"):
        emulated(stateful(), EmulatorRuntime(size=511)).new_states(R=4, C=8)
    with pytest.raises(BackendError, match="these are not states of stateful for the tvm backend"):
        stateful("cpu").entry("main")(states, **given)


def test_a_cpu_has_no_launches() -> None:
    with pytest.raises(BackendError, match="example is compiled for the CPU, which has no launches"):
        mapped("cpu").launch_table(N=1, T=1)
    with pytest.raises(BackendError, match="the launches of example need a size for T"):
        mapped().launch_table(N=1)


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> tuple[Compiled, Compiled]:
    """Return a GPT-2 of one layer for the CPU, and for a device whose steps run on the emulator."""
    from tests.fuzz.device_models import MODELS

    options = {**MODELS["gpt2"], "layers": 1, "dim": 32, "heads": 2, "vocab": 29}
    model = find_family("gpt2").model.configure(**options)
    here, there = (compile(model, backend="tvm", target=target, seed=3) for target in ("cpu", "cuda"))
    emulated(there.stepped)
    return here, there


def test_a_session_on_a_device_equals_one_on_the_cpu(models: tuple[Compiled, Compiled]) -> None:
    """Prefill, steps, `verify`, a forked row, a row resumed from another slot, and one from the host's prefix cache."""
    here, there = models
    runtime = runtime_of(there.stepped)
    text = [int(n) for n in np.random.default_rng(0).integers(0, 29, 40)]
    sessions = [exe.session(rows=2, capacity=48, chunk=16) for exe in (here, there)]
    device = sessions[1]
    results = [run_session(session, text) for session in sessions]
    for name, array in results[0].items():
        np.testing.assert_allclose(results[1][name], array, rtol=0, atol=1e-5, err_msg=name)
    machine = there.stepped.executable.machine  # type: ignore[attr-defined]
    states = sum(device.states[name].nbytes for name in device.states)
    assert runtime.memory.used == machine.nbytes + states
    (step,) = [plan for (entry, _), plan in machine.program.plans.items() if entry == "step"]
    runtime.memory.forget_counts()
    (row,) = device.rows
    logits = device.step({row: 1})[row]
    assert runtime.memory.waits == 1
    assert runtime.memory.bytes_out == logits.nbytes + step.table.spaces[Status()]
    del device, sessions
    assert runtime.memory.used == machine.nbytes


def run_session(session: Session, text: list[int]) -> dict[str, Array]:
    """Return logits of everything that a session does with the states of rows."""
    session.cache_prefixes(1 << 20)
    row = session.open()
    found = {"prefill": session.prefill({row: text[:20]})[row], "step": session.step({row: text[20]})[row]}
    found["verify"] = session.verify(row, text[21:24])
    session.accept(row, text[21:23])
    other = session.fork(row)
    found["fork"] = session.step({other: 3})[other]
    session.close(row, keep=True)
    session.close(other, keep=True)
    row = session.resume([*text[:20], 5, 6])
    assert session.length(row) == 20
    found["resume"] = session.prefill({row: [5, 6]})[row]
    session.close(row, keep=True)
    for _ in range(2):  # both slots lose their texts to the prefix cache
        session.reserve()
    for slot in session.rows:
        session.close(slot)
    assert session.cached_bytes
    row = session.resume([*text[:20], 9])
    assert session.length(row) == 16
    found["cached"] = session.prefill({row: [*text[16:20], 9]})[row]
    return found


def test_a_scheduler_serves_texts_from_states_on_a_device(models: tuple[Compiled, Compiled]) -> None:
    """Three requests in two rows: a text waits for a row, and the last one begins like the first."""
    prompts = [tuple(range(1, 19)), (3, 1, 4), (*range(1, 19), 5)]
    texts = []
    for model in models:
        scheduler, heard = Scheduler(model.session(rows=2, capacity=48, chunk=16)), [Heard() for _ in prompts]
        scheduler.start()
        orders = [TextOrder(prompt, Choosing(5)) for prompt in prompts]
        scheduler.submit(list(zip(orders, heard, strict=True)))
        texts.append([each.wait() for each in heard])
        scheduler.close()
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [5, 5, 5]


def test_a_device_that_chooses_tokens_returns_only_them(models: tuple[Compiled, Compiled]) -> None:
    chosen = []
    for model in models:
        stepped = model._stepped_with(None, "greedy")
        runtime = runtime_of(emulated(stepped)) if model is models[1] else None
        session = model.session(rows=1, capacity=48, chunk=16, device_sampling="greedy")
        row = session.open()
        tokens = [session.sample({row: [1, 2, 3]})[row]]
        if runtime is not None:
            runtime.memory.forget_counts()
        tokens.append(session.sample({row: [tokens[-1]]})[row])
        if runtime is not None:
            assert (runtime.memory.waits, runtime.memory.bytes_out) == (1, 4 + 256)  # a token, and the status words
        chosen.append(tokens)
    assert chosen[0] == chosen[1]


def test_parts_of_a_state_on_a_device_are_those_of_an_array() -> None:
    runtime, rng = EmulatorRuntime(), np.random.default_rng(0)
    for form, dtype in ((MemoryForm(256), np.float32), (MemoryForm(256, narrow=True), np.int64)):
        shape = (3, 2, 5, 4)
        array = rng.integers(-9, 9, shape).astype(dtype)
        buffer = runtime.memory.allocate(form.size(array.nbytes))
        state, access = DeviceArray(runtime, buffer, shape, array.dtype, form), DeviceAccess()
        access.write(state, (), array)
        for _ in range(60):
            bounds = [np.sort(rng.integers(0, n + 1, 2)) for n in shape[1:]]
            part = tuple([slice(int(a), int(b)) for a, b in bounds])
            source, to = rng.permutation(3)[:2].tolist()
            value = rng.integers(-9, 9, array[(source, *part)].shape)
            access.write(state, (source, *part), value.astype(dtype))
            array[(source, *part)] = value
            access.copy(state, (source, *part), (to, *part))
            array[(to, *part)] = array[(source, *part)]
            waits = runtime.memory.waits
            read = access.read([(state, (to, *part)), (state, (slice(None), 1))])
            assert runtime.memory.waits == waits + 1
            for copy, wanted in zip(read, (array[(to, *part)], array[:, 1]), strict=True):
                assert copy.dtype == array.dtype
                np.testing.assert_array_equal(copy, wanted)


# -- tables ------------------------------------------------------------------------------------------------------------

TABLE = LaunchTable(
    [
        Launch("softmax", 4, (Argument(Input("x"), 0, 1024), Argument(Arena(), 256, 512, 3)), (4, 64)),
        Launch("all_reduce", 0, (Argument(Held("h.0.w"), 0, 256), Argument(Constant(1), 0, 4)), ()),
        Launch(
            "append", 1, (Argument(State("k"), 0, 64), Argument(Output("y"), 0, 4), Argument(Status(), 0, 64, 4)), ()
        ),
    ],
    {
        **{Input("x"): 1024, Arena(): 768, Held("h.0.w"): 256, Constant(1): 256},
        **{State("k"): 256, Output("y"): 256, Status(): 256},
    },
)


def test_a_table_prints_and_reads_back() -> None:
    lines = TABLE.text().splitlines()
    assert lines[:2] == ["input x: 1,024 bytes", "arena: 768 bytes"]
    assert lines[-3:] == [
        "0  softmax        4 blocks  input x, arena+256[3] | 4 64",
        "1  all_reduce  on the host  weight h.0.w, constant 1",
        "2  append          1 block  state k, output y, status[4]",
    ]
    assert LaunchTable.of_dict(TABLE.as_dict()) == TABLE
    assert TABLE.nbytes == 1024 + 768 + 5 * 256


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("launches", 0, "arguments", 0, 0), 9),
        (("launches", 0, "arguments", 0, 2), 1025),
        (("launches", 0, "arguments", 1, 1), -256),
        (("launches", 0, "sizes", 0), 1.5),
        (("launches", 0, "blocks"), True),
        (("launches", 0, "kernel"), None),
        (("spaces", 0, "kind"), "ocean"),
        (("spaces", 0, "name"), 3),
        (("spaces", 0, "bytes"), "1024"),
        (("launches",), 3),
    ],
)
def test_values_that_are_no_table_are_refused(path: tuple[Any, ...], value: Any) -> None:
    values: Any = TABLE.as_dict()
    *parents, last = path
    place = values
    for key in parents:
        place = place[key]
    place[last] = value
    with pytest.raises(BackendError, match="these values are no launch table"):
        LaunchTable.of_dict(values)


@dataclass(frozen=True)
class Halves(Kernel):
    """y[i] = min(x[0], infinity) for i < n / 2, in two loops over tasks"""

    def emit(self, k: Emitter) -> None:
        x, y = (k.view(k.pointer(name, f32), [k.index(9)]) for name in "xy")
        half = k.let(k.floor_divide(k.size("n"), 2))
        with k.loop(2):
            least = k.let(k.least(k.load(x, [0]), k.number(float("inf"), f32)))
            with k.when(k.index(4) < half), k.parallel(half) as i:
                k.store(y, [i], least)


def test_tasks_are_counted_on_the_host() -> None:
    kernel = device_kernel(Halves(), DEVICES["cuda"]).group_kernel
    assert [kernel.blocks([n]) for n in (0, 1, 9, 1000)] == [1, 1, 4, 500]
    assert device_kernel(Halves(), DEVICES["cuda"].slow).group_kernel.blocks([1000]) == 8
    few = replace(DEVICES["cuda"], limits=replace(DEVICES["cuda"].limits, groups=7))
    assert device_kernel(Halves(), few).group_kernel.blocks([1000]) == 7


def test_blocks_follow_from_the_sizes_of_a_launch() -> None:
    """One block for each task of a group, and one for 64 tasks in the slow form, up to the largest grid."""
    kernels = mapped().device_kernels
    softmax = kernels["softmax_f32"].group_kernel
    launch = next(each for each in mapped().launch_table(N=9, T=50).launches if each.kernel == "softmax_f32")
    assert launch.blocks == softmax.blocks(launch.sizes) == 9
    small = EmulatorRuntime(DEVICES["cuda"], groups=4)
    exe = emulated(mapped(), small)
    exe(**inputs_of(9))
    assert {each.blocks <= 4 for each in exe.launch_table(N=9, T=50).launches} == {True}
