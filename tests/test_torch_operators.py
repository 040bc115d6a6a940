"""ATen operators imported by `from_torch` return PyTorch's own numbers."""

from __future__ import annotations

from typing import Any

import pytest

import treadle
from tests.torch_modules import Applied, Rule, assert_equal

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional


class Masked(nn.Module):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


@pytest.mark.parametrize("mask", ["none", "bool", "row", "float", "causal", "grouped", "one head"])
def test_attention_means_what_it_means_in_torch(mask: str) -> None:
    torch.manual_seed(0)
    heads = 2 if mask == "grouped" else 4
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 6)
    given, options = None, dict[str, Any](scale=0.3)
    match mask:
        case "bool":
            given = torch.rand(2, 1, 3, 5) > 0.4
            given[1, :, 1] = False  # a fully masked row: zeros
        case "row":
            given = torch.rand(1, 5) > 0.4
        case "float":
            given = torch.randn(4, 3, 5)
        case "causal":
            options = {"is_causal": True}
        case "grouped":
            options = {"enable_gqa": True}
        case "one head":
            q, k, v, given = q[:, 0], k[:, 0], v[:, 0], torch.rand(2, 3, 5) > 0.2
    module = Masked(**options)
    example = (q, k, v) if given is None else (q, k, v, given)
    assert_equal(treadle.from_torch(module, example), module, example)


OPERATORS: dict[str, Any] = {
    "integers": lambda x: ((x * 7).int() // 3, torch.div((x * 9).int(), 4, rounding_mode="trunc"), (x * 9).long() % -4),
    "quotients": lambda x: tuple(torch.div(x * 9, 4.0, rounding_mode=mode) for mode in (None, "floor", "trunc")),
    "remainders": lambda x: (
        *(rule(x * 9, y) for rule in (torch.fmod, torch.remainder) for y in (4.0, -2.5, x[:, :1] * 2)),
        *(rule((x * 9).int(), y) for rule in (torch.fmod, torch.remainder, torch.floor_divide) for y in (4, -3)),
        *(torch.fmod(x * 1e7, 0.3), torch.fmod(torch.full_like(x, -(2**31), dtype=torch.int32), 3)),
    ),
    "elements": lambda x: (
        *(x.floor(), x.int().floor(), x.square(), x.log().isnan(), x.int().logical_not(), x.clamp_max(0.3)),
        *(torch.clamp_max(x, -x), torch.clamp_min(x, -x), torch.maximum(x > 0, x > 1), torch.minimum(x > 0, x > 1)),
    ),
    "promotion": lambda x: (x.int() + 0.5, x.int() / 2, x > 0.1, x.int() == x, x.double() - x, 1 - x, 2.0**x),
    "choices": lambda x: (torch.where(x > 0, x, 1.5), x.clamp(-0.5, 0.5), x.clamp(min=0.1), torch.maximum(x, -x)),
    "functions": lambda x: (F.softplus(x), F.hardswish(x), F.leaky_relu(x), x.ceil(), x.trunc(), x.round(), F.mish(x)),
    "along": lambda x: (x.var(-1), x.std(0, correction=0), x.logsumexp(1), x.norm(dim=-1), x.amin((0, 2)), x.sum()),
    "extremes": lambda x: (*x.max(1), x.argmin(-1, keepdim=True), *x.topk(2, -1), *x.sort(1, descending=True)),
    "truths": lambda x: ((x > 0).any(-1), (x > -3).all(), (x > 0).sum(0), ~(x > 0) | (x < 1), (x > 0) ^ (x > 1)),
    "softmax": lambda x: (x.softmax(1), x.log_softmax(-1), F.softmax(x, -1, dtype=torch.float64)),
    "norms": lambda x: (F.layer_norm(x, x.shape[1:]), F.rms_norm(x, x.shape[-1:]), F.group_norm(x, 3), F.normalize(x)),
    "places": lambda x: (x[:, 1], x[..., ::2], x[:, [2, 0, -1]], x[[0, 1], :, [3, -2]], x.flip(1), x.roll(1, -1)),
    "picks": lambda x: (x.gather(1, x[:, :2].argsort(1)), x.index_select(-1, torch.tensor([3, 0])), x[None, 1:, -2:]),
    "computed places": lambda x: (
        *(x[:, torch.arange(3) - 2], x[:, -torch.arange(3)], x[:, (x[0, :, 0] * 0).int() - 1], x[:, torch.arange(3)]),
        x.index_select(1, x.argmax(1)[0]),
    ),
    "joins": lambda x: (torch.stack([x, -x], 1), torch.cat([x, x[:, :1].double()], 1), *x.chunk(2, -1), *x.unbind(1)),
    "repeats": lambda x: (x.repeat(1, 2, 1), x.repeat_interleave(3, dim=-1), x.tile(2)),
    "pads": lambda x: (F.pad(x, (1, 2, -1, 0), value=3), F.pad(x, (0, 1))),
    "views": lambda x: (x.reshape(4, -1), x.view(2, 3, 2, 2).transpose(1, 2).reshape(4, 6), x.mT, x.movedim(0, 2)),
    "cuts": lambda x: (x.reshape(2, 6, 2), x.reshape(6, 4).reshape(3, 8), x.flatten(), x.reshape(2, 2, 6)),
    "triangles": lambda x: (x.tril(), x.triu(1), torch.ones(3, 4).tril(-1) * x, torch.eye(4) + x[0, :1]),
    "made": lambda x: (torch.arange(4) + x, torch.arange(1, 3, 0.5) * x, torch.full_like(x, 2), x.new_zeros(2)),
    "differences": lambda x: (x.diff(dim=1), (x > 0).diff(prepend=x[..., :1] > 1)),
    "products": lambda x: (x @ x.mT, torch.einsum("bij,bkj->bik", x, x), x[0] @ x[1, 0]),
    "sums": lambda x: (
        *(torch.baddbmm(x @ x.mT, x, x.mT), torch.addmm(x[0, :, 0], x[0], x[1].mT, alpha=0.5, beta=2)),
        torch.addmm(torch.full((3,), torch.nan), x[0], x[1].mT, beta=0),  # rows that are not read may hold any values
    ),
    "convolutions": lambda x: (
        F.conv1d(x, x[:, :, :3]),
        F.conv1d(x, x[0, :, None, :2], padding="same", groups=3),
        F.conv1d(x[0], x[:, :, :2], padding=2, stride=2, dilation=2),
        F.conv_transpose1d(x, x[0].view(3, 2, 2), x[0, 0, :2]),
        F.conv_transpose1d(x[0], x[0].view(3, 2, 2), stride=3, padding=1, output_padding=2, groups=3),
        F.conv_transpose1d(x, x[0, :, None, :3], padding=2, dilation=2),
        F.conv_transpose2d(x[:, None], x[:1, None, :2, :2], stride=(2, 1), padding=(0, 1), output_padding=(1, 0)),
        F.conv2d(x[:, None], x[:1, None, :2, :2], x[0, 0, :1], padding=(1, 0)),
    ),
    "scalars": lambda x: (
        *(x[0, 0, 0].gather(0, torch.tensor(0)), x[0, 0].gather(0, torch.tensor(2)), x.sum().squeeze(0)),
        *(x[0, 0].index_select(0, torch.tensor(1)), x.sum().index_select(0, torch.tensor([0])), *x.sum().sort()),
        *(x[0].gather(0, torch.zeros(0, 4, dtype=torch.int64)), x.sum().scatter(0, torch.tensor(0), 2.0)),
        *(x.sum().index_add(0, torch.tensor(0), x[0, 0, 0]), x[0].index_add(1, torch.tensor(2), x[1, :, :1])),
    ),
    "filled": lambda x: (
        *(torch.full_like(x.int(), 2.5), x.int().scatter(1, x[:, :1].int().long() * 0, 2.5), x.int().isinf()),
        torch.add(x > 0, x > -1, alpha=False),
    ),
    "powers": lambda x: (
        *(x**exponent for exponent in (1, 2, 3, 4, -1, 0)),
        *(x.abs() ** exponent for exponent in (0.5, -0.5, 1.7, -2)),
        *((x * 5).int() ** 1, (x * 5).int() ** 3, 2 ** (x * 5).int().float()),
    ),
    "bytes": lambda x: (
        *((x + 3) * 30).to(torch.uint8).sort(1, descending=True),
        *((x + 3) * 30).to(torch.uint8).topk(2, 1),
        *((x + 3) * 30).to(torch.uint8).topk(2, 1, largest=False),
        *((x * 30).to(torch.int8).topk(2, 1, largest=False)),
        *((x * 30).int().sort(1, descending=True)),
        *(((x + 3) * 30).to(torch.uint8).argmin(1), (x * 30).int().argmin(-1), (x * 30).int().amin(-1)),
    ),
    "sorted": lambda x: (
        *x.round().sort(dim=1, stable=True),
        *x.round().sort(dim=2, descending=True, stable=True),
    ),
    "counted": lambda x: (
        *(torch.arange(0, 10, 3)[:, None] + x[0, 0], torch.arange(9, 0, -2), torch.arange(2, 8, 2.0), x + 1),
        *(torch.linspace(0, 1, 5), torch.linspace(-3, 7, 1), torch.linspace(3, -2, 4, dtype=torch.float64)),
        *(torch.scalar_tensor(2.5), torch.eye(3, 5), F.one_hot(x[0].int().abs().long(), 5), F.one_hot(x.argmax(), 24)),
    ),
    "statistics": lambda x: (
        *(*torch.var_mean(x, 1), *torch.var_mean(x, (0, 2), correction=0, keepdim=True), *torch.std_mean(x)),
        *(x.var(0, correction=2), x.var(0, correction=5), x.std(1, correction=3), x.norm(1, 1)),
        torch._safe_softmax(torch.where(x > x[:, :1], x, -torch.inf), -1),
    ),
    "wholes": lambda x: (
        *(x.argmax(), x.argmin(), x.sum().argmax(0), *x.sum().max(0), *(x > 0).max(1), x.sum().amax(), x.sum().sum()),
        *((x > 0).any().all(), x.sum().cumsum(0), x.sum().transpose(0, -1), x[0].T, x[0, 0].t(), x.sum(())),
    ),
    "parts": lambda x: (
        *(x.narrow(1, 1, 2), x.narrow(2, -3, 2), torch.zeros(2, 3, 4).copy_(x[:, :1]), x[:, :1].repeat(1, 3, 1)),
        *(x[:, :1].repeat_interleave(3, dim=1), x.movedim((0, 1), (2, 0)), x.roll((1, -6), (2, 1)), x[:, :1].squeeze()),
        torch.native_dropout(x, 0.5, False)[0],
    ),
    "chosen truths": lambda x: (torch.where(x > 0, True, x > 1), (x > 0).masked_fill(x > 1, True)),
    "fewer places": lambda x: (
        *(rule(2, x[:1, :, :2].argsort(-1)) for rule in (x.gather, lambda *at: x.scatter(*at, x * 2))),
        *(x.scatter_add(1, x[:, :2, :3].argsort(1), x), x.scatter(2, x.argmax(2, keepdim=True), x)),
        *(x.scatter(1, x[:, :0].long(), x), x[:, torch.arange(2) + 1], x[:, torch.arange(2) * 2]),
    ),
    "sums at places": lambda x: (
        x.index_put((x[:, 0, 0].long() * 0, x[:, 0].argmax(1) % 3), x[0, 0], accumulate=True),
        x.index_put((x[:, :, 0] > 0,), x[:1, 0], accumulate=True),
    ),
    "unsaid axes": lambda x: (
        *(torch.einsum("bij,bkj", x, x), torch.einsum("...ij,kj", x, x[0]), torch.einsum("Bij,bij", x, x)),
        *(
            F.conv1d(x, x[:, :, :3], padding="valid"),
            F.conv1d(x, x[0, :, None, :2], padding="same", dilation=3, groups=3),
        ),
        F.conv3d(x[None, None], x[None, None, :1, :2, :2], stride=(1, 1, 2)),
    ),
    "writes": lambda x: (torch.slice_scatter(x, x[:, :1] * 2, 1, 1, 2), x.select_scatter(x[:, 0], 1, -1)),
}


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("group", OPERATORS)
def test_operators(group: str) -> None:
    """Inputs differ by more than rounding, so that a wrong order shows."""
    values = torch.randperm(24, generator=torch.Generator().manual_seed(1)).float().reshape(2, 3, 4)
    x = (values - 11.3) / 5
    module = Applied(OPERATORS[group])
    assert_equal(treadle.from_torch(module, (x,)), module, (x,))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_batch_norm_goes_by_its_running_statistics(rank: int) -> None:
    norm = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(3).eval()
    for weight in (norm.running_mean, norm.running_var, *norm.parameters()):
        weight.data.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, *[4] * (rank - 2))
    assert_equal(treadle.from_torch(norm, (x,), dynamic={"input": {0: "B"}}), norm, (x,), (x[:1],))


def test_places_that_wrap_in_few_bits_count_from_the_end() -> None:
    """200 is -56 in 8 signed bits, and 200 in 8 unsigned ones."""
    module = Applied(lambda x: tuple(x[torch.arange(200).to(d).long()] for d in (torch.int8, torch.uint8)))
    x = torch.randn(256)
    model = treadle.from_torch(module, (x,))
    assert_equal(model, module, (x,))
    assert [n.op.name for _, n in model.graph.walk()].count("where") == 1


ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu, steep": lambda x: F.leaky_relu(x, 1.5),
    "hardtanh": F.hardtanh,
    "hardtanh, wide": lambda x: F.hardtanh(x, -2.5, 7.0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "softplus, bent": lambda x: F.softplus(x, beta=0.5, threshold=2.0),
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 2.0),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.5, -4.0),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "glu": lambda x: F.glu(x.reshape(1, -1)[:, 1:]),
}


def test_activations_on_both_sides_of_each_bend() -> None:
    """Arguments from -30 to 30 in steps of 0.5 include each bend: of relu6 at 6, of hardswish at -3 and 3, of softplus
    at 20.
    """
    module, x = Applied(lambda x: {name: rule(x) for name, rule in ACTIVATIONS.items()}), torch.arange(-60, 61) / 2
    assert_equal(treadle.from_torch(module, (x,)), module, (x,))


BROADCAST: dict[str, tuple[Any, tuple[tuple[int, ...], ...], list[str]]] = {
    # a function, the shapes of q, k and v, and the ops that result in addition to attention
    "one head": (F.scaled_dot_product_attention, ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6)), []),
    "one head, flagged": (
        lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True),
        ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6)),
        [],
    ),
    "one head of keys": (F.scaled_dot_product_attention, ((2, 4, 3, 8), (2, 1, 5, 8), (2, 4, 5, 6)), ["expand"]),
    "one head of queries": (F.scaled_dot_product_attention, ((2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)), ["expand"]),
    "one batch of keys": (F.scaled_dot_product_attention, ((2, 4, 3, 8), (1, 4, 5, 8), (1, 4, 5, 6)), ["expand"] * 2),
    "expanded": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)),
        ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6)),
        [],
    ),
    "repeated": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)),
        [],
    ),
    "repeated in another order": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)),
        ["rearrange", "expand", "rearrange"] * 2,
    ),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_heads_and_batches_of_one_broadcast_as_in_torch(name: str) -> None:
    """Fewer heads of keys and values are read without a copy, even if the module's code repeats them."""
    rule, shapes, ops = BROADCAST[name]
    torch.manual_seed(0)
    module, example = Rule(rule), tuple(torch.randn(s) for s in shapes)
    open_dims = {f"args_{i}": {2: "S" if i == 0 else "T"} for i in range(3)}
    model = treadle.from_torch(module, example, dynamic=open_dims)
    exe = assert_equal(
        model, module, example, tuple(torch.randn(*s[:2], 7 if i else 4, s[3]) for i, s in enumerate(shapes))
    )
    assert sorted(n.op.name for _, n in exe.graph.walk() if n.op.name != "attention") == sorted(ops)


def test_heads_that_do_not_fit_are_told_a_way_that_works() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    rule = Rule(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert_equal(treadle.from_torch(rule, (q, k, v)), rule, (q, k, v))
    deep = Rule(F.scaled_dot_product_attention)
    with pytest.raises(treadle.TreadleError, match="ranks 5, 5 and 5 are not supported") as caught:
        treadle.from_torch(deep, (q[None], k[None, :, :1], v[None, :, :1]))
    assert "reshape the leading axes" in str(caught.value)
