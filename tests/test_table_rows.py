"""The greatest number of positions of a model, from its tables of positions, also of imported models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle.ir.text.parser import parse_graph
from treadle.passes.stepping.table_rows import most_positions

torch = pytest.importorskip("torch")

ROWS, VOCAB, DIM = 12, 20, 8


class Learned(torch.nn.Module):
    """A causal language model with positions in a table, which begin at row `first`.

    form  the form in which modules read the table
    """

    def __init__(self, first: int = 0, form: str = "indices") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.form = first, form
        self.register_buffer("waves", torch.randn(1, ROWS, DIM))
        self.tokens, self.places = torch.nn.Embedding(VOCAB, DIM), torch.nn.Embedding(ROWS, DIM)
        self.mixed, self.head = torch.nn.Linear(DIM, 3 * DIM), torch.nn.Linear(DIM, VOCAB)

    def forward(self, ids: Any) -> Any:
        end = self.first + ids.shape[1]
        places = torch.arange(ids.shape[1]) + self.first
        if self.form == "indices of one row":  # as in transformers
            read = self.places(places.unsqueeze(0))
        elif self.form == "rows of a weight":
            read = self.places.weight[self.first : end]
        elif self.form == "a part of a buffer":  # as in PyTorch's tutorials
            read = self.waves[:, self.first : end]
        else:
            read = self.places(places)
        x = self.tokens(ids) + read
        q, k, v = self.mixed(x).chunk(3, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": self.head(x + mixed)}


FORMS = ("indices", "indices of one row", "rows of a weight", "a part of a buffer")


def imported(first: int, folder: Path, form: str = "indices") -> Any:
    return t.from_torch(Learned(first, form).eval(), (torch.zeros(2, 8, dtype=torch.long),), dynamic={"ids": "B S"})


def read_back(first: int, folder: Path) -> Any:
    """Return the same model, exported to ONNX and read again."""
    from treadle.backends.onnx.exporter import export_onnx

    made = t.compile(imported(first, folder), backend="numpy", passes=[])
    return str(export_onnx(made.graph, made.weights, folder / "learned.onnx").path)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("read", [*(partial(imported, form=form) for form in FORMS), read_back])
def test_a_session_has_as_many_positions_as_the_table(
    first: int, read: Callable[[int, Path], Any], tmp_path: Path
) -> None:
    """The session's last token is that of a run of all tokens, and one more is refused."""
    exe = t.compile(read(first, tmp_path), backend="numpy")
    session = exe.session(rows=1)
    assert session.capacity == exe.stepped.derived.context == ROWS - first
    with pytest.raises(t.UsageError, match=f"the model takes {ROWS - first} positions"):
        exe.session(rows=1, capacity=ROWS - first + 1)
    tokens = np.arange(ROWS - first) % VOCAB
    row = session.open()
    session.prefill({row: tokens[:-1].tolist()})
    last = session.step({row: int(tokens[-1])})[row]
    np.testing.assert_allclose(last, exe(ids=tokens[None])["logits"][0, -1], rtol=1e-4, atol=1e-5)


PLACES = """
graph g {
  symbols B, S
  parameters {
    table: f32[12, 8]
  }
  main(tokens: i64[B, S]) -> (y: f32[INDEXED, 8]) {
INDICES
    z = gather($table, i, axis=0)
    return y = z
  }
}
"""


@pytest.mark.parametrize(
    ("indices", "size", "most"),
    [
        ("i = iota(size=S)", "S", 12),
        ("a = iota(size=S)\n i = add(a, 3)", "S", 9),
        ('a = iota(size=S, dtype=i32)\n b = cast(a, to=i64)\n i = rearrange(b, pattern="s -> 1 s")', "1, S", 12),
        ("a = iota(size=S)\n i = minimum(a, 11)", "S", None),
        ("a = iota(size=S)\n i = slice(a, axis=0, stop=1)", "1", None),
        ("i = iota(size=B)", "B", None),
        ("i = iota(size=4)", "4", None),
    ],
)
def test_indices_that_reach_the_last_position(indices: str, size: str, most: int | None) -> None:
    """Indices that are clamped or cut, and indices along another axis, give no limit."""
    graph = parse_graph(PLACES.replace("INDEXED", size).replace("INDICES", indices))
    assert most_positions(graph, "S") == most
