"""The graphs that `from_torch` builds, as text: one op in PyTorch is one op here, and no copies are added.

Unlike a comparison of numbers, the text shows a mask that is expanded, a cast that changes nothing, or a reshape whose
axes were lost. Lines of the modules are left out of the golden files; other tests check them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.golden import Golden

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional


def text(model: Any) -> str:
    """Return a graph's text without the locations in the modules' code."""
    return re.sub(r"[ \t]+\S+\.py:\d+.*$", "", str(model.graph), flags=re.MULTILINE)


class Casts(nn.Module):  # type: ignore[misc]
    """Half precision for attention only, with a mask that is expanded to all heads and queries."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        wide = mask[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)
        halves = (x.bfloat16() for x in (q, k, v))
        return F.scaled_dot_product_attention(*halves, attn_mask=wide).float()


class Kept(nn.Module):  # type: ignore[misc]
    """Casts to the same dtype, and a bias that is expanded."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        bias = (1 - mask.to(q.dtype))[:, None, None, :].to(q.dtype) * -1e9
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], -1)
        y = F.scaled_dot_product_attention(q.float(), k.to(q.dtype), v.type_as(q), attn_mask=bias)
        return y.float().transpose(1, 2).flatten(2)


class Partly(nn.Module):  # type: ignore[misc]
    """Masks of some axes: [s, t] for all batches and heads, [b, 1, s, t], and a mask of one row."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        both = causal & mask[:, None, None, :]
        second = F.scaled_dot_product_attention(q, k, v, attn_mask=both.expand(-1, q.shape[1], -1, -1))
        return first, second, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:1, None, None])


class Repeated(nn.Module):  # type: ignore[misc]
    """Keys and values that are repeated for the heads of queries, as eager code of grouped-query attention does."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        def each(x: Any) -> Any:
            b, g, t, d = x.shape
            return x[:, :, None].expand(b, g, q.shape[1] // g, t, d).reshape(b, q.shape[1], t, d)

        k, v = k[:, ::2], v[:, ::2]
        return F.scaled_dot_product_attention(q, each(k), each(v))


class Views(nn.Module):  # type: ignore[misc]
    """Dimensions that are split, merged and regrouped: each becomes one rearrange that names its axes."""

    def forward(self, x: Any) -> Any:
        s, b, _ = x.shape
        return {
            "across": x.view(s, b * 2, 8),
            "merged": x.reshape(-1, 16),
            "merged_across": x.reshape(s * b * 2, 8),
            "flat": x.flatten(1),
            "heads": x.view(s, b, 4, 4).transpose(1, 2).reshape(s * 4, b, 4),
            "apart": x.unflatten(2, (2, 8)).reshape(s, b * 2, 8),
            "back": x.view(s, b, 4, 4).view(s, b, 16),
            "lone": x.unsqueeze(1).squeeze(1)[:, :, None].reshape(s, b, 2, 8),
            "expanded": x[:, :1].expand_as(x),
            "same": x.view(x.shape).contiguous().float(),
        }


def attended() -> tuple[Any, ...]:
    return *(torch.randn(2, 4, n, 8) for n in (3, 5, 5)), torch.rand(2, 5) > 0.3


@pytest.mark.parametrize("module", [Casts, Kept, Partly, Repeated])
def test_attention_reads_masks_and_keys_before_they_were_expanded(module: Any, golden: Golden) -> None:
    names = {"q": {0: "B", 2: "S"}, "k": {0: "B", 2: "T"}, "v": {0: "B", 2: "T"}, "mask": "B T"}
    model = treadle.from_torch(module(), attended(), dynamic=names)
    golden(f"torch_export/{module.__name__.lower()}.txt", text(model))
    compiled = treadle.compile(model, backend="torch").graph
    found = [node.op.name for _, node in compiled.walk()]
    assert "expand" not in found, found


def test_views_say_which_axes_become_which(golden: Golden) -> None:
    model = treadle.from_torch(Views(), (torch.randn(4, 6, 16),), dynamic={"x": "S B _"})
    golden("torch_export/views.txt", text(model))
    assert not model.opaque
    assert "reshape" not in {node.op.name for _, node in model.graph.walk()}


# -- lines ---------------------------------------------------------------------------------------------------------


class Lines(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.rest = nn.Sequential(nn.Linear(5, 4), nn.GELU())

    def forward(self, x: Any) -> Any:
        x = self.first(x)  # line of first
        x = self.norm(x)  # line of norm
        return self.rest(x)  # line of rest


def test_layers_of_torch_have_the_line_of_the_users_forward() -> None:
    """The line is not in torch's own code, in which Linear calls F.linear."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    model = treadle.from_torch(Lines(), (torch.randn(2, 4),))
    found = [(node.op.name, node.scope, node.source) for node in model.graph.main.nodes]
    assert [(name, scope) for name, scope, _ in found] == [
        ("linear", "first"),
        ("layer_norm", "norm"),
        ("linear", "rest.0"),
        ("gelu", "rest.1"),
    ]
    for (_, scope, source), named in zip(found, ("first", "norm", "rest", "rest"), strict=True):
        assert source is not None, scope
        assert source.file.endswith("test_torch_graph_text.py")
        assert lines[source.line - 1].endswith(f"# line of {named}")


def test_a_refusal_within_a_layer_of_torch_names_the_users_line() -> None:
    class Refused(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Any) -> Any:
            return self.drop(x)  # line of drop

    with pytest.raises(treadle.TreadleError, match="dropout in training mode") as caught:
        treadle.from_torch(Refused(), (torch.randn(2, 4),))
    place = re.search(r"test_torch_graph_text\.py:(\d+)", str(caught.value))
    assert place is not None, str(caught.value)
    line = Path(__file__).read_text(encoding="utf-8").splitlines()[int(place[1]) - 1]
    assert line.endswith("# line of drop")


# -- bfloat16 ------------------------------------------------------------------------------------------------------


class Halves(nn.Module):  # type: ignore[misc]
    """Each operation rounds once, so every backend is bitwise identical to PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40).bfloat16())
        self.register_buffer("few", torch.tensor([1.5, -0.3]).bfloat16())

    def forward(self, x: Any) -> Any:
        return (x + self.weight) * self.few[1]


def test_bfloat16_tensors_go_into_each_backend_with_their_bits() -> None:
    torch.manual_seed(0)
    module, x = Halves(), torch.randn(3, 40).bfloat16()
    x[0, :2] = torch.tensor([2.0**100, -(2.0**-100)])  # other 16-bit float types cannot represent these
    module.weight.data[:2] = torch.tensor([0.0, 2.0**-99])
    model = treadle.from_torch(module, (x,), dynamic={"x": "B _"})
    assert str(next(iter(model.graph.main.outputs.values())).type) == "bf16[B, 40]"
    assert model.weights["weight"].dtype == np.float32
    wanted = module(x).detach()
    for backend in ("torch", "tvm"):
        if backend == "tvm":
            pytest.importorskip("tvm")
        exe = treadle.compile(model, backend=backend)
        tensor = exe(x=x)["output"]
        assert tensor.dtype is torch.bfloat16, backend
        assert torch.equal(tensor, wanted), backend
        array = exe(**model.arguments((x,)))["output"]
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted.float().numpy(), err_msg=backend)
        with pytest.raises(treadle.TreadleError, match="bf16"):
            exe(x=np.full((1, 40), 1 + 2.0**-12, np.float32))


def test_a_backend_without_bfloat16_says_so_with_the_line() -> None:
    model = treadle.from_torch(Halves(), (torch.randn(3, 40).bfloat16(),))
    with pytest.raises(treadle.TreadleError, match="numpy backend cannot run") as caught:
        treadle.compile(model, backend="numpy")
    assert "NumPy has no bf16" in str(caught.value)
    assert "test_torch_graph_text.py:" in str(caught.value)
