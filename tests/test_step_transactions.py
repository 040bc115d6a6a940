"""Steps that fail or are interrupted: the state is that of before or after the step, and training continues."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from tests.fuzz.interrupted_steps import SMALL, Interrupted, interrupt_steps, same, state_of
from treadle.backends.registry import backend_names, find_backend
from treadle.ir.errors import UsageError
from treadle.ir.target import Target
from treadle.training.interrupts import deferring_signals
from treadle.training.trainer import Trainer

Array = np.ndarray[Any, Any]

BACKENDS = [name for name in backend_names() if find_backend(name).available() is None]

pytestmark = pytest.mark.usefixtures("quickly_planned")


def batch_of(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, SMALL["vocab"], (2, 5)) for name in ("tokens", "targets")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_step_leaves_the_state_before_or_after_it(backend: str) -> None:
    """The short form of tests/fuzz/interrupted_steps.py."""
    outcomes = interrupt_steps(backend, 8, seed=1)
    assert outcomes["before"] + outcomes["after"] == 8
    assert outcomes["before"]


@t.model
def stretched(x: t.f32["B 4"]):
    y = t.softmax(t.exp(x) * 2.0)
    return t.softmax(y * x + y) + x


def settings_of(backend: str) -> list[Any]:
    """Return the settings of the process that a run changes."""
    if backend != "torch":
        return [np.geterr()]
    import torch

    return [torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_interrupted_anywhere_holds_no_lock(backend: str) -> None:
    """The lock is released even if the traceback is kept, as in an interactive session. Otherwise the next run would
    wait forever. The library's settings are restored, too. Otherwise PyTorch would compute no gradients in the rest
    of the process.
    """
    target = Target("cpu") if backend == "numpy" else Target("cpu", threads=1)
    exe: Any = t.compile(stretched, backend=backend, target=target)
    before = settings_of(backend)
    x = np.ones((2, 4), np.float32)
    wanted = next(iter(exe(x=x).values()))
    lock = exe.executable.machine._lock if backend == "tvm" else exe.executable.arena._lock
    kept = []
    for at in range(Interrupted(lambda: exe(x=x)).points):
        kept.append(Interrupted(lambda: exe(x=x), at).error)
        assert not lock.locked(), f"point {at}"
        assert settings_of(backend) == before, f"point {at}"
    assert sum(error is not None for error in kept) > 20
    np.testing.assert_array_equal(next(iter(exe(x=x).values())), wanted)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_error_between_gradient_and_update_changes_nothing(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, other = (Trainer("gpt2", gradient_accumulation_steps=accumulate, **SMALL) for _ in range(2))
    for seed in range(accumulate - 1):
        trainer.step(**batch_of(seed))
        other.step(**batch_of(seed))
    before = state_of(trainer)
    with monkeypatch.context() as patched:
        patched.setattr("treadle.training.trainer.np.vdot", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.step(**batch_of(7))
    assert same(state_of(trainer), before)
    assert trainer.step(**batch_of(8)).updated
    other.step(**batch_of(8))
    assert same(state_of(trainer), state_of(other))


def test_an_update_that_fails_midway_is_refused_until_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("gpt2", **SMALL)
    trainer.step(**batch_of(0))
    trainer.save_state(tmp_path / "state")
    before, update = state_of(trainer), trainer.update

    def half(**arrays: Array) -> None:
        arrays["wte.weight"][:] = 0
        raise MemoryError

    monkeypatch.setitem(vars(trainer), "update", half)
    with pytest.raises(MemoryError):
        trainer.step(**batch_of(1))
    monkeypatch.setitem(vars(trainer), "update", update)
    for call in (
        lambda: trainer.step(**batch_of(2)),
        lambda: trainer.evaluate(**batch_of(2)),
        lambda: trainer.save_state(tmp_path / "other"),
        lambda: trainer.compiled(),
        lambda: trainer.weights,
        lambda: trainer.zero_grad(),
    ):
        with pytest.raises(UsageError, match="update 2 failed midway: some weights are new, others are old"):
            call()
    assert not (tmp_path / "other").exists()
    assert "1 updates" in repr(trainer)
    trainer.restore(tmp_path / "state")
    assert same(state_of(trainer), before)
    assert trainer.step(**batch_of(1)).step == 2


def test_a_call_that_fails_keeps_the_gradients_of_the_calls_before_it() -> None:
    trainer, other = (Trainer("gpt2", gradient_accumulation_steps=2, **SMALL) for _ in range(2))
    trainer.step(**batch_of(0))
    other.step(**batch_of(0))
    before = state_of(trainer)
    with pytest.raises(UsageError, match="no position of the batch is counted"):
        trainer.step(**{**batch_of(1), "targets": np.full((2, 5), -100)})
    assert same(state_of(trainer), before)
    trainer.step(**batch_of(2))
    other.step(**batch_of(2))
    assert same(state_of(trainer), state_of(other))


def test_zero_grad_drops_the_calls_since_the_last_update(tmp_path: Path) -> None:
    trainer, other = (Trainer("gpt2", gradient_accumulation_steps=2, **SMALL) for _ in range(2))
    trainer.step(**batch_of(9))
    with pytest.raises(UsageError, match="a state can only be saved after an update") as caught:
        trainer.save_state(tmp_path / "state")
    assert "zero_grad" in str(caught.value)
    trainer.zero_grad()
    trainer.save_state(tmp_path / "state")
    for seed in range(2):
        trainer.step(**batch_of(seed))
        other.step(**batch_of(seed))
    assert same(state_of(trainer), state_of(other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_of_earlier_updates_are_not_referenced(backend: str) -> None:
    """Weights and moments stay the same arrays. Chains of views would grow by one in each step."""
    trainer = Trainer("gpt2", backend=backend, **SMALL)
    before = {**trainer.state.weights, **trainer.state.moments}
    trainer.step(**batch_of(0))
    after = {**trainer.state.weights, **trainer.state.moments}
    assert all(after[name] is array for name, array in before.items())


# -- deferred signals ----------------------------------------------------------------------------------------------


class Late(Exception):
    pass


@pytest.fixture
def raising() -> Any:
    """Install a handler by which SIGTERM raises Late, as handlers for timeouts or for a cluster's preemption do."""

    def handler(number: int, frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def test_signals_are_deferred_to_the_end_of_a_block(raising: Any) -> None:
    seen: list[str] = []

    def work() -> None:
        with deferring_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            seen.append("after both")

    with pytest.raises(Late):
        work()
    assert seen == ["after both"]
    assert signal.getsignal(signal.SIGTERM) is raising
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_is_deferred_past_an_error_of_the_block(raising: Any) -> None:
    def work() -> None:
        with deferring_signals():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("of the block")

    with pytest.raises(Late) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(signal.SIGTERM) is raising


def test_handlers_are_all_back_where_one_of_them_raises_meanwhile(
    raising: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT's handler is restored first. A Ctrl-C at that moment must not prevent the restoration of SIGTERM's
    handler.
    """
    original, pressed = signal.signal, False

    def install(number: int, handler: Any) -> Any:
        nonlocal pressed
        found = original(number, handler)
        if handler is signal.default_int_handler and not pressed:
            pressed = True
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(signal, "signal", install)
    with pytest.raises(KeyboardInterrupt), deferring_signals():
        pass
    assert pressed
    assert signal.getsignal(signal.SIGTERM) is raising


def test_in_another_thread_no_handler_is_touched(raising: Any) -> None:
    found: list[Any] = []

    def work() -> None:
        with deferring_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [raising]
