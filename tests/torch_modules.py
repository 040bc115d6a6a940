"""Modules for tests of `from_torch`, and a comparison of an import with PyTorch's own numbers.

Two implementations of a few layers in float32 round each operation to 2^-24, in sums of tens of terms. So 2e-5 of the
largest output is far above rounding, and far below the effect of a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import treadle
from tests.remembered_exports import remember_operators
from treadle.frontends.torch_export.model import TorchModel

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
remember_operators()

ROOM = 2e-5
BACKENDS = ("numpy", "torch")


def leaves(result: Any) -> list[Any]:
    """Return the tensors of a module's result, in order."""
    from torch.utils import _pytree as pytree

    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def assert_equal(model: TorchModel, module: Any, *examples: Any) -> treadle.Compiled:
    """Compare an imported module with the module in PyTorch, on every backend. Return the compiled module."""
    # One certificate is enough for the same passes on the same graph.
    executables = [
        treadle.compile(model, backend=name, certify=None if name == "numpy" else False) for name in BACKENDS
    ]
    for example in examples:
        with torch.no_grad():
            wanted = leaves(module(**example) if isinstance(example, Mapping) else module(*example))
        for exe in executables:
            got = exe(**model.arguments(example))
            assert len(got) == len(wanted)
            for (name, ours), theirs in zip(got.items(), wanted, strict=True):
                held = theirs.numpy()
                assert ours.dtype == held.dtype, name
                assert ours.shape == held.shape, name
                room = ROOM * max(float(np.abs(held).max(initial=0)), 1e-3) if held.dtype.kind == "f" else 0
                np.testing.assert_allclose(ours, held, rtol=0, atol=room, err_msg=name)
    return executables[0]


def drawn(module: Any) -> Any:
    """Draw every weight again, also norms and biases, so that swapped weights would show. Return the module."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.normal_(mean, 0.2, generator=generator)
    return module.eval()


class Applied(nn.Module):  # type: ignore[misc]
    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Any) -> Any:
        return self.rule(x)


class Rule(nn.Module):  # type: ignore[misc]
    """A function of any arguments as a module."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.rule(*args, **kwargs)
