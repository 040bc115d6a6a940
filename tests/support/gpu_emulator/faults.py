"""Faults that are planted in kernel texts, to test that the emulator finds them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.gpu_emulator.emulation import EmulatedKernel, EmulatorError
from tests.support.gpu_emulator.programs import program, runs

SEEDS = ((1, 1), (2, 3), (3, 7), (4, 2), (5, 5))
"""Orders of threads and numbers of blocks with which a program runs."""


@dataclass(frozen=True)
class Fault:
    """An edit of the text of a program's last kernel.

    name     program of `programs`
    old, new a pattern, and the text that replaces it
    at       number of the occurrence that is replaced; None: all
    """

    name: str
    old: str
    new: str
    at: int | None = 0

    def __str__(self) -> str:
        where = "everywhere" if self.at is None else f"occurrence {self.at}"
        return f"{self.name}: {self.old} -> {self.new or 'nothing'}, {where}"

    def planted(self, text: str) -> str:
        """Return the text with the fault. Raises ValueError if it does not have the pattern."""
        places = list(re.finditer(self.old, text))
        picked = places if self.at is None else places[self.at : self.at + 1]
        if not picked:
            raise ValueError(f"{self}: the text has {len(places)} such places")
        for place in reversed(picked):
            text = text[: place.start()] + place.expand(self.new) + text[place.end() :]
        return text


_BARRIER = r"TREADLE_BARRIER;"
_DIVERGENT = "if (lane < 16) { TREADLE_BARRIER; }"

FAULTS: tuple[Fault, ...] = (
    # a barrier is missing
    Fault("softmax", _BARRIER, "", 1),
    Fault("softmax", _BARRIER, "", None),
    Fault("layer_norm", _BARRIER, "", None),
    Fault("attention", _BARRIER, "", None),
    Fault("argmax", _BARRIER, "", None),
    Fault("linear", _BARRIER, "", None),
    Fault("division", _BARRIER, "", None),
    # a barrier that not all threads reach
    Fault("softmax", _BARRIER, _DIVERGENT, 0),
    Fault("attention", _BARRIER, _DIVERGENT, 1),
    Fault("argmax", _BARRIER, _DIVERGENT, 0),
    # an exchange that not all threads reach, or with a wrong thread
    Fault("softmax", r"(const float other_2 =) ([^;]*);", r"float other_2 = half_1; if (lane < 8) other_2 = \2;", 0),
    Fault("softmax", r"lane \+ 16", "lane + 15", 1),
    Fault("layer_norm", r"lane \+ 1\b", "lane + 2", 0),
    Fault("rows", r"lane \+ 1\b", "lane + 2", 0),
    # an index is off by one lane
    Fault("softmax", r"\+ lane\]", "+ lane + 1]", None),
    Fault("layer_norm", r"\+ lane\]", "+ lane + 1]", 1),
    Fault("linear", r"\+ lane\]", "+ lane + 1]", None),
    Fault("columns", r"\+ lane\b", "+ lane + 1", None),
    Fault("division", r"\+ lane\]", "+ lane + 1]", 0),
    # a bound is not checked
    Fault("softmax", r"\(\(lane < rest_0\) \? ([^:]*) : [^)]*\)\)", r"(\1)", 1),
    Fault("linear", r"if \(inside_(\d+) >= 32\)", "if (true)", None),
    Fault("columns", r"if \(count_0 == 128\)", "if (true)", 0),
    Fault("division", r"< rest_0", "< 32", 0),
    Fault("embedding", r"if \([^{]*\) \{", "if (false) {", 0),
    # an offset or a stride is ignored
    Fault("slice", r"(x\w*)\[\1_at \+ ", r"\1[", None),
    Fault("columns", r"\* x_stride3_0", "* 1", None),
    Fault("rotary", r"head_0 \* ", "0 * ", 0),
    # a wrong buffer
    Fault("division", r"x1_0\[x1_0_at", "x0_0[x0_0_at", 0),
    Fault("layer_norm", r"\bbias_0\[bias_0_at", "weight_0[weight_0_at", 0),
    Fault("attention", r"\bvalues_0\[values_0_at", "keys_0[keys_0_at", None),
    # a wrong register or loop
    Fault("rows", r"acc_0\[0\] = ", "acc_0[1] = ", 0),
    Fault("matmul", r"< k_0;", "< k_0 - 1;", None),
    Fault("running", r"(\w+) < (\w+); \1 \+= TREADLE_BLOCKS", r"\1 <= \2; \1 += TREADLE_BLOCKS", 0),
    # cannot be observed: see `UNOBSERVABLE`
    Fault("softmax", _BARRIER, "", 0),
    Fault("softmax", r"\+ lane\]", "+ lane + 1]", 0),
    Fault("rows", r"\(int\)\(0\)", "(int)(31)", 0),
)

_TASKS = r"(\w+) = TREADLE_BLOCK; (\w+ < \w+); \w+ \+= TREADLE_BLOCKS", r"\1 = 0; \2; ++\1"

HIDDEN: tuple[Fault, ...] = (
    # blocks share scratch memory
    *(
        Fault("attention", rf"({memory}_0\[{memory}_0_at \+ )slot_0 ", r"\g<1>0 ", None)
        for memory in ("packed_keys", "packed_values", "queries", "scores", "sums", "rows")
    ),
    # every block runs every task, whose result is at first in the output
    Fault("softmax", *_TASKS),
)
"""Races between blocks. If one block runs after another, results are right; if they run in turns, they are wrong."""

REPEATED: tuple[Fault, ...] = tuple(
    Fault(name, *_TASKS) for name in ("layer_norm", "matmul", "rows", "columns", "running", "argmax", "embedding")
)
"""Races between blocks that write the same values, since every block runs every task. No order shows them."""

UNOBSERVABLE = {
    FAULTS[
        -3
    ]: "a row with a tail waits at four more barriers after the last access to x_tail, others do not access it",
    FAULTS[-2]: "another maximum is subtracted: softmax does not depend on it",
    FAULTS[-1]: "after five exchanges every thread has the maximum of all",
}
"""The faults that change no result, with the reason."""


def observed(fault: Fault, *, together: int = 8, races: bool = True) -> str:
    """Return the effect of a fault: an error of the emulator, NaN, a wrong result, or bits that depend on the order. An
    empty text: none was observed.

    together  number of blocks that are alive at once, in every other run
    races     True if races between blocks are errors
    """
    runtime, run = runs(fault.name)
    _, _, wanted = program(fault.name)
    run()  # loads the kernels
    kernels = runtime.loads[-1].kernels
    name, before = list(kernels.items())[-1]
    kernels[name] = EmulatedKernel(before.kernel, fault.planted(before.text))
    bits: set[bytes] = set()
    runtime.races = races
    try:
        for number, (runtime.seed, runtime.blocks) in enumerate(SEEDS):
            runtime.together = together if number % 2 else 1
            with poisoning():  # else an output that is not written has the numbers of the last run
                made = run()
            for output, expected in wanted.items():
                effect = _difference(made[output], expected)
                if effect:
                    return effect
            bits.add(b"".join(made[name].tobytes() for name in wanted))
    except EmulatorError as error:
        return str(error)
    finally:
        kernels[name], runtime.together, runtime.races = before, 1, True
    return "" if len(bits) == 1 else "bits that depend on the order of threads"


def _difference(made: Any, expected: Any) -> str:
    """Return a description of a wrong result, or an empty text."""
    if made.dtype.kind != "f":
        return "" if np.array_equal(made, expected) else "another integer"
    if np.isnan(made).sum() != np.isnan(expected).sum():
        return f"{np.isnan(made).sum()} NaN"
    off = float(np.nanmax(np.abs(np.asarray(made, np.float64) - expected), initial=0))
    return "" if off <= 1e-4 * max(1.0, float(np.nanmax(np.abs(expected)))) else f"off by {off:.1e}"


@contextmanager
def poisoning() -> Iterator[None]:
    """Fill memory with NaN, in a run, where the plan has no values."""
    before = os.environ.get("TREADLE_POISON")
    os.environ["TREADLE_POISON"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TREADLE_POISON"]
        else:
            os.environ["TREADLE_POISON"] = before


def effects() -> Mapping[Fault, str]:
    """Return the effect of every fault."""
    return {fault: observed(fault) for fault in (*FAULTS, *HIDDEN, *REPEATED)}


if __name__ == "__main__":  # python -m tests.support.gpu_emulator.faults
    missed = 0
    for number, planted in enumerate((*FAULTS, *HIDDEN, *REPEATED), 1):
        result = observed(planted)
        missed += not result
        print(f"{number:2} {planted}: {result or UNOBSERVABLE.get(planted, 'NOT FOUND')}", flush=True)
    print(f"{number - missed} of {number} found")
