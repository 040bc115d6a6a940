"""Checks of programs on the stand-in device: ops against their bounds, and models against the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import treadle
from tests.many_cases import every_case
from tests.support.standin_device import HOST, Counts, standin
from tests.test_models import ZOO
from tests.test_op_suite import Held, forwards, gradients, hold, samples_of
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.errors import BackendError

Array = np.ndarray[Any, Any]

FORMS: dict[str, dict[str, Any]] = {
    "f32": {},
    "bf16": {"dtype": "bf16"},
    **{scheme: {"quantize": scheme} for scheme in ("int8-weights", "int4", "int8")},
}
"""The compile options of each form of the weights."""

_APART = {"f32": 1e-5, "int8-weights": 1e-5, "int4": 1e-5, "int8": 0.05, "bf16": 0.05}
"""The allowed difference from the CPU, relative to the largest result. Products in bf16 round at other places, as on
the CPU their bias and activation are fused, and a rounded activation may become another number of 8 bits.
"""


class Foreign:
    """An array of another library, which has only `__dlpack__`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def check_op(name: str, *, thorough: bool = True) -> None:
    """Compare an op with the bounds of the op suite: on every sample and dtype, forward and gradient, or only forward
    in the samples' own dtypes. No line of its program may wait for the device.
    """
    with standin(kind="cpu") as counts, every_case() as each:
        for held in [*forwards(name), *gradients(name)] if thorough else own_forwards(name):
            with each(held.what):
                counts.clear()
                try:
                    hold("torch", held)
                except BackendError as error:
                    if "PyTorch does not multiply matrices of integers on a GPU" not in str(error):
                        raise
                waits = counts.lines("wait")
                assert waits.keys() <= {HOST}, f"the program reads back from the device: {waits}"


def own_forwards(name: str) -> list[Held]:
    return [Held(what, case.forward_graph(), case.inputs) for what, case in samples_of(name)]


def check_model(name: str, form: str) -> Counts:
    """Compare a model of the zoo with the CPU at all small sizes. Return the events of one call."""
    graph, options = ZOO[name][0].graph(), FORMS[form]
    here = treadle.compile(graph, backend="torch", seed=1, **options)
    with standin() as counts:
        there = treadle.compile(graph, backend="torch", target="cuda", seed=1, **options)
        for number, sizes in enumerate(small_sizes(here.graph)):
            given = draw_inputs(here.graph, sizes, [number])
            wanted = here(**given)
            counts.clear()
            made = there(**given)
            assert made.keys() == wanted.keys()
            for output, expected in wanted.items():
                _assert_near(made[output], expected, _APART[form], f"{name} {form} {output} at {sizes}")
    return counts


def _assert_near(made: Array, wanted: Array, apart: float, what: str) -> None:
    assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape), what
    if wanted.dtype.kind != "f":
        np.testing.assert_array_equal(made, wanted, err_msg=what)
        return
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(made[~finite], wanted[~finite], err_msg=what)
    bound = apart * max(1.0, float(np.abs(wanted[finite]).max(initial=0)))
    np.testing.assert_allclose(made[finite], wanted[finite], rtol=0, atol=bound, err_msg=what)


def model_cases() -> Iterator[tuple[str, str]]:
    """Yield every model of the zoo in every form."""
    for name in ZOO:
        for form in FORMS:
            yield name, form
