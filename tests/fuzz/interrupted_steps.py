"""Send SIGINT at random bytecodes of `Trainer.step`: `python tests/fuzz/interrupted_steps.py [--count 1000] [--seed
0]`.

An interrupted call must leave weights, moments and accumulated gradients bitwise as before it, or as after it. Training
must then continue: a second trainer, which takes the same batches uninterrupted, must have the same state after each of
them. The exceptions stay referenced with their tracebacks, as an interactive session keeps them.

Half of the signals arrive at any bytecode of `step` after which CPython calls signal handlers. The other half arrive at
such bytecodes where a step is committed: in `treadle/training`, and in the code that enters and exits its blocks.
"""

from __future__ import annotations

import argparse
import collections
import dis
import faulthandler
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FrameType
from typing import Any

import numpy as np

from treadle.backends.registry import backend_names, find_backend
from treadle.training.trainer import Trainer

Array = np.ndarray[Any, Any]

SMALL = {"layers": 1, "dim": 8, "heads": 2, "vocab": 11, "context": 6}
ACCUMULATE = 2
LONGEST = 120.0
"""Seconds after which a call counts as a deadlock: the process then prints its stacks and ends."""
_COMMITTING = ("treadle/training/", "contextlib.py")


class Interrupted:
    """Run a call, and raise SIGINT at one of the points at which CPython calls signal handlers.

    These points are the ends of calls, backward jumps and the beginnings of functions. An exception is raised in the
    block of that bytecode. So here handlers run when a profiler sees a C function return, or before the next bytecode
    if it is in the same block. No handler runs between the end of a `with` block and its exit.

    points      the number of such points
    committing  the points at which a step is committed
    error       the KeyboardInterrupt
    """

    def __init__(self, call: Callable[[], Any], at: int | None = None) -> None:
        self.points, self.committing = 0, list[int]()
        self.error: BaseException | None = None
        self._at, self._last = at, dict[FrameType, int]()
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            call()
        except KeyboardInterrupt as error:
            self.error = error
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            self._last.clear()

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "c_return" and frame.f_code.co_filename != __file__:
            self._point(frame)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_lasti
            if last is not None and handles_signals(frame.f_code, last, frame.f_lasti):
                self._point(frame)
        elif event == "return":
            self._last.pop(frame, None)
        return self._trace

    def _point(self, frame: FrameType) -> None:
        if any(each in frame.f_code.co_filename for each in _COMMITTING):
            self.committing.append(self.points)
        self.points += 1
        if self.points - 1 == self._at:
            signal.raise_signal(signal.SIGINT)


@cache
def handles_signals(code: CodeType, last: int, now: int) -> bool:
    """Return True if CPython calls signal handlers after a bytecode, and the next one is in the same block."""
    name = dis.opname[code.co_code[last]]
    blocks = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    around = [[(b.target, b.depth) for b in blocks if b.start <= at < b.end] for at in (last, now)]
    return (name.startswith(("RESUME", "CALL")) or "JUMP_BACKWARD" in name) and around[0] == around[1]


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Return a copy of everything that later steps depend on."""
    state = trainer.state
    arrays = {"weight": state.weights, "moment": state.moments, "gradient": state.gradients}
    copies = {f"{kind} {name}": array.copy() for kind, group in arrays.items() for name, array in group.items()}
    return copies | {"steps": state.steps, "counted": state.counted, "calls": state.calls}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two states are bitwise equal."""
    return one.keys() == other.keys() and all(
        np.array_equal(np.asarray(value).view(np.uint8), np.asarray(other[name]).view(np.uint8))
        if isinstance(value, np.ndarray)
        else value == other[name]
        for name, value in one.items()
    )


def interrupt_steps(backend: str, count: int, seed: int) -> collections.Counter[str]:
    """Interrupt `count` calls of `step`; return the numbers of calls that left the state before and after the call.

    Raises AssertionError if a call left another state, or if training then differs from uninterrupted training.
    """
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    trainer, other = (
        Trainer("gpt2", backend=backend, gradient_accumulation_steps=ACCUMULATE, learning_rate=0.01, seed=seed, **SMALL)
        for _ in range(2)
    )
    outcomes: collections.Counter[str] = collections.Counter()
    kept: BaseException | None = None

    def batch() -> dict[str, Array]:
        return {name: rng.integers(0, SMALL["vocab"], (2, 5)) for name in ("tokens", "targets")}

    for _ in range(ACCUMULATE):  # plans are built for the sizes of a batch
        arrays = batch()
        trainer.step(**arrays)
        other.step(**arrays)
    timing: list[Interrupted] = []
    for _ in range(ACCUMULATE):
        arrays = batch()
        timing.append(Interrupted(partial(trainer.step, **arrays)))
        other.step(**arrays)
    assert same(state_of(trainer), state_of(other)), "two trainers differ without any signal"
    for number in range(count):
        arrays, about = batch(), timing[number % ACCUMULATE]
        at = draw.choice(about.committing) if number // ACCUMULATE % 2 else draw.randrange(about.points)
        before = state_of(other)
        other.step(**arrays)
        after = state_of(other)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        run = Interrupted(partial(trainer.step, **arrays), at)
        kept = run.error
        found = state_of(trainer)
        where = f"{backend}: signal {number} at point {at} of {about.points}"
        if same(found, before):
            assert kept is not None, f"{where}: the step did nothing, and raised nothing"
            outcomes["before"] += 1
            trainer.step(**arrays)
        else:
            assert same(found, after), f"{where}: the state is neither the one before nor the one after"
            outcomes["after"] += 1
        outcomes["without KeyboardInterrupt"] += kept is None
        assert same(state_of(trainer), after), f"{where}: training does not continue as without the signal"
        faulthandler.cancel_dump_traceback_later()
    return outcomes


def main() -> int:
    """Run the campaign on each installed backend; return the command's exit status."""
    available = [name for name in backend_names() if find_backend(name).available() is None]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="signals for each backend (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=available, action="append", help="by default each that is installed")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with SIGINT ignored
    for backend in options.backend or available:
        started = time.perf_counter()
        outcomes = interrupt_steps(backend, options.count, options.seed)
        text = ", ".join(f"{many} {what}" for what, many in sorted(outcomes.items()))
        print(f"{backend}: {options.count} signals in {time.perf_counter() - started:.1f} s: {text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
