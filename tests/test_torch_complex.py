"""Modules that compute with complex tensors, such as rotary positions in the form of Meta's Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.ir.errors import FrontendError

torch = pytest.importorskip("torch")

VOCAB, DIM, HEADS, LONGEST = 20, 16, 2, 12


class Rotated(torch.nn.Module):
    """A causal language model whose queries and keys are rotated as complex numbers; `freqs` is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.mixed = torch.nn.Embedding(VOCAB, DIM), torch.nn.Linear(DIM, 3 * DIM)
        self.head = torch.nn.Linear(DIM, VOCAB)
        half = DIM // HEADS // 2
        angles = torch.outer(torch.arange(LONGEST), 100.0 ** (-torch.arange(half) / half))
        self.freqs = torch.polar(torch.ones_like(angles), angles)

    def rotated(self, x: Any, freqs: Any) -> Any:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)

    def forward(self, ids: Any) -> Any:
        x, freqs = self.tokens(ids), self.freqs[: ids.shape[1]]
        q, k, v = (each.unflatten(2, (HEADS, -1)) for each in self.mixed(x).chunk(3, -1))
        q, k, v = (each.transpose(1, 2) for each in (self.rotated(q, freqs), self.rotated(k, freqs), v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": self.head(x + mixed.transpose(1, 2).flatten(2))}


def test_a_model_with_complex_rotations_runs_and_continues() -> None:
    module = Rotated().eval()
    exe = t.compile(
        t.from_torch(module, (torch.zeros(2, 5, dtype=torch.long),), dynamic={"ids": "B S"}), backend="numpy"
    )
    ids = torch.randint(0, VOCAB, (3, 8))
    with torch.no_grad():
        expected = module(ids)["logits"].numpy()
    np.testing.assert_allclose(exe(ids.numpy())["logits"], expected, rtol=0, atol=1e-5)
    session = exe.session(rows=1, capacity=LONGEST)
    row = session.open()
    session.prefill({row: ids[0, :5].tolist()})
    for at in range(5, 8):
        np.testing.assert_allclose(session.step({row: int(ids[0, at])})[row], expected[0, at], rtol=0, atol=1e-5)


class Applied(torch.nn.Module):
    """A module that applies a function to its argument."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.turn = torch.polar(torch.ones(3), torch.arange(3.0))

    def forward(self, x: Any) -> Any:
        return self.function(torch.view_as_complex(x), self.turn)  # type: ignore[call-arg]


REAL = torch.view_as_real
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "product": lambda z, turn: REAL(z * turn),
    "conjugate": lambda z, turn: REAL(z * turn.conj()),
    "by a real": lambda z, turn: REAL(z * turn.real),
    "by a number": lambda z, turn: REAL(z * 2.5),
    "sum": lambda z, turn: REAL(z + turn),
    "difference": lambda z, turn: REAL(z - turn),
    "sum with a real": lambda z, turn: REAL(z + z.real),
    "negative": lambda z, turn: REAL(-z),
    "parts": lambda z, turn: z.real * z.imag,
    "of parts": lambda z, turn: REAL(torch.complex(z.imag, z.real) * turn),
    "polar": lambda z, turn: REAL(torch.polar(z.real, z.imag)),
    "moved": lambda z, turn: REAL((z[:, None] * turn[None, None]).transpose(1, 2).flatten(1)[:, 1:]),
    "looked up": lambda z, turn: REAL(z * turn[torch.tensor([2, 0, 1])]),
    "joined": lambda z, turn: REAL(torch.cat([z, z * turn], 1)),
    "from a real": lambda z, turn: REAL(z.real.to(torch.complex64) * turn),
    "copied": lambda z, turn: REAL((z * turn).to(torch.complex64).clone().contiguous()),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_an_operator_of_complex_tensors_equals_pytorchs(function: Callable[[Any, Any], Any]) -> None:
    module, x = Applied(function).eval(), torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1))
    exe = t.compile(t.from_torch(module, (x,)), backend="numpy")
    (found,) = exe(x.numpy()).values()
    np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda z, turn: REAL(z.exp()), "the operator takes no complex tensors"),
        (lambda z, turn: REAL(z / turn), "the operator takes no complex tensors"),
        (lambda z, turn: z * turn, "the module returns a complex tensor"),
    ],
)
def test_other_operators_of_complex_tensors_are_refused(function: Callable[[Any, Any], Any], why: str) -> None:
    with pytest.raises(FrontendError, match=why):
        t.from_torch(Applied(function).eval(), (torch.zeros(2, 3, 2),))


def test_a_complex_argument_is_refused() -> None:
    class Parts(torch.nn.Module):
        def forward(self, z: Any) -> Any:
            return z.real

    with pytest.raises(FrontendError, match="dtype complex64 is not supported"):
        t.from_torch(Parts().eval(), (torch.zeros(2, dtype=torch.complex64),))


def test_all_rows_of_a_parameter_may_be_read() -> None:
    """Evaluating PyTorch's own guard S == min(12, S) compares S < 12, which is no condition of the module."""

    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = torch.nn.Parameter(torch.randn(1, LONGEST, DIM))
            self.mixed = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)

        def forward(self, x: Any) -> Any:
            size = x.shape[1]
            x = x + self.places[:, :size]
            later = torch.triu(torch.ones(size, size, dtype=torch.bool), 1)
            return self.mixed(x, x, x, attn_mask=later, need_weights=False)[0]

    module = Learned().eval()
    exe = t.compile(t.from_torch(module, (torch.zeros(2, 8, DIM),), dynamic={"x": "B S _"}), backend="numpy")
    x = torch.randn(2, LONGEST, DIM)
    with torch.no_grad():
        np.testing.assert_allclose(exe(x.numpy())["output"], module(x).numpy(), rtol=1e-4, atol=1e-5)
    assert exe.graph.symbols["S"].upper == LONGEST
