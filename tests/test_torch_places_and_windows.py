"""ATen operators that write at indices or read windows, imported by `from_torch`: they return PyTorch's numbers, or are
refused.

Attributes and shapes are drawn. Every import rule is checked on static sizes, and with open axes on sizes other than
the traced ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import treadle
from tests.torch_modules import Rule, assert_equal
from treadle.frontends.torch_export.writing import is_distinct
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.types import i32, i64

torch = pytest.importorskip("torch")
F: Any = pytest.importorskip("torch.nn.functional")

DRAWS = 4
Drawn = tuple[Callable[..., Any], Callable[[int, int], tuple[Any, ...]], str]
"""A function, its arguments for two sizes B and S, and the dimensions of the first argument."""


def some(*shape: int) -> Any:
    return torch.randn(*shape)


def indices(below: int, *shape: int) -> Any:
    return torch.randint(0, below, shape)


def _scatter(draw: random.Random) -> Drawn:
    count, kind = draw.randint(1, 5), draw.choice(["src", "value", "add"])
    whole = draw.random() < 0.5

    def rule(x: Any, index: Any, source: Any) -> Any:
        index = index if whole else index[:, :2]
        if kind == "src":
            return x.scatter(2, index, source), (x > 0).scatter(2, index, source > 0)
        return x.scatter(2, index, 1.5) if kind == "value" else x.scatter_add(2, index, source)

    return rule, lambda b, s: (some(b, 3, s), indices(s, b, 3, count), some(b, 3, count + 1)), "B _ S"


def _scatter_along(draw: random.Random) -> Drawn:
    axis = draw.randrange(3)
    shape = [2, 3, 4]
    shape[axis] = draw.randint(1, 6)
    index, source = indices([2, 3, 4][axis], *shape), some(*shape)
    return (
        lambda x: (x.scatter(axis, index, source), x.scatter(axis, index, -1)),
        lambda b, s: (some(2, 3, 4),),
        "_ _ _",
    )


def _scatter_reduce(draw: random.Random) -> Drawn:
    reduce, own, count = draw.choice(["sum", "mean"]), draw.random() < 0.5, draw.randint(1, 5)

    def rule(x: Any, index: Any, source: Any) -> Any:
        return x.scatter_reduce(1, index, source, reduce, include_self=own)

    return rule, lambda b, s: (some(b, s), indices(s, b, count), some(b, count)), "B S"


def _best(draw: random.Random) -> Drawn:
    """The output of an expert router: the weights of the k best experts, and zeros."""
    k = draw.randint(1, 3)

    def rule(x: Any) -> Any:
        best, places = x.topk(k)
        return torch.zeros_like(x).scatter(1, places, best.softmax(-1))

    return rule, lambda b, s: (some(b, 6),), "B _"


def _written(draw: random.Random) -> Drawn:
    """x[i, :, j] = v, with some negative and some repeated indices."""
    where = draw.choice(["one", "axis", "two", "apart", "grid", "rows", "scalar"])
    add = draw.random() < 0.5
    i, j, column = torch.tensor([1, -1, 1]), torch.tensor([2, 0, 2]), torch.tensor([[0], [-1]])

    def rule(x: Any) -> Any:
        y, v = x.clone(), x.flatten()
        index: Any
        match where:
            case "one":
                index, values = (i,), v[:12].reshape(3, 4, 1)
            case "axis":
                index, values = (slice(None), i), v[: 3 * 5].reshape(3, 5)
            case "two":
                index, values = (slice(None), i, j), v[:3]
            case "apart":
                index, values = (i, slice(None), j), v[:12].reshape(3, 4)
            case "grid":
                index, values = (slice(None), column, j), v[:6].reshape(2, 3)
            case "rows":
                index, values = (torch.arange(x.shape[0]), x.argmax(1)[:, 0]), v[:5]
            case _:
                index, values = (i, j), v[0]
        y[index] = y[index] + values if add else values
        return y

    return rule, lambda b, s: (some(b + 1, 4, 5),), "B _ _"


def _masked(draw: random.Random) -> Drawn:
    rank, first = draw.randint(1, 2), draw.randint(0, 1)

    def rule(x: Any, values: Any) -> Any:
        y, mask = x.clone(), (x[:, :, 0] if rank == 2 else x[:, 0, 0]) > 0
        if first:
            y[:, x[0, :, 0] > 0] = values
        y[mask] = values[0]
        return y

    return rule, lambda b, s: (some(b, 3, s), some(1, s)), "B _ S"


def _pool(draw: random.Random) -> Drawn:
    kernel, stride = (draw.randint(1, 3), draw.randint(1, 3)), (draw.randint(1, 3), draw.randint(1, 2))
    pads, up = tuple(draw.randint(0, k // 2) for k in kernel), draw.random() < 0.5
    spread = draw.randint(1, 2)

    def rule(x: Any) -> Any:
        return (
            F.max_pool2d(x, kernel, stride, pads, dilation=spread, ceil_mode=up),
            F.avg_pool2d(x, kernel, stride, pads, ceil_mode=up),
            F.avg_pool2d(x, kernel, stride, pads, ceil_mode=up, count_include_pad=False),
            F.avg_pool2d(x, kernel, None, pads, divisor_override=3),
        )

    return rule, lambda b, s: (some(b, 2, 8, 7),), "B _ _ _"


def _open_pool(draw: random.Random) -> Drawn:
    kernel, stride = draw.randint(2, 3), draw.randint(1, 3)
    return (
        lambda x: (F.max_pool2d(x, kernel, stride, 1), F.avg_pool2d(x, kernel, stride, 1)),
        lambda b, s: (some(b, 2, s, s + 1),),
        "B _ H W",
    )


def _pool_along_one(draw: random.Random) -> Drawn:
    kernel, stride, up = draw.randint(2, 4), draw.randint(1, 3), draw.random() < 0.5

    def rule(x: Any) -> Any:
        return (
            F.max_pool1d(x, kernel, stride, 1, ceil_mode=up),
            F.avg_pool1d(x[0], kernel, stride, 1, up, count_include_pad=up),
        )

    return rule, lambda b, s: (some(b, 3, 10),), "B _ _"


def _adaptive(draw: random.Random) -> Drawn:
    sizes = (draw.choice([1, 2, 3, 5, 9]), draw.choice([1, 2, 4, None]))
    return (
        lambda x: (F.adaptive_avg_pool2d(x, sizes), F.adaptive_avg_pool1d(x[:, 0], 3)),
        lambda b, s: (some(b, 2, 6, 8),),
        "B _ _ _",
    )


def _unfold(draw: random.Random) -> Drawn:
    size, step = draw.randint(1, 3), draw.randint(1, 3)
    return lambda x: (x.unfold(1, size, step), x.unfold(-1, size, 1)), lambda b, s: (some(b, s, 4),), "B S _"


def _columns(draw: random.Random) -> Drawn:
    kernel, spread = (draw.randint(1, 2), draw.randint(1, 3)), draw.randint(1, 2)
    pads, stride = (draw.randint(0, 1), draw.randint(0, 2)), (draw.randint(1, 2), draw.randint(1, 3))
    return (
        lambda x: (F.unfold(x, kernel, spread, pads, stride), F.unfold(x[0], kernel)),
        lambda b, s: (some(b, 2, s + 2, 7),),
        "B _ H _",
    )


def _instance_norm(draw: random.Random) -> Drawn:
    norm = torch.nn.InstanceNorm1d(3, affine=draw.random() < 0.5, track_running_stats=draw.random() < 0.5).eval()
    for weight in (*norm.parameters(), *norm.buffers()):
        if weight.is_floating_point():
            weight.detach().uniform_(0.5, 1.5)
    return lambda x: (norm(x), F.instance_norm(x[..., None] * 2, eps=1e-3)), lambda b, s: (some(b, 3, s),), "B _ S"


def _elu(draw: random.Random) -> Drawn:
    alpha = draw.choice([1.0, 0.5, 2.0])
    return (
        lambda x: (F.elu(x, alpha), F.celu(x, alpha), F.selu(x), torch.log1p(x.abs()), torch.expm1(x)),
        lambda b, s: (some(b, s) * 3,),
        "B S",
    )


def _interpolated(draw: random.Random) -> Drawn:
    mode = draw.choice(["nearest", "nearest-exact", "bilinear"])
    options: dict[str, Any] = {"align_corners": draw.random() < 0.5} if mode == "bilinear" else {}
    factor, height = draw.choice([2, 3.0, 0.5]), draw.randint(1, 9)

    def rule(x: Any) -> Any:
        return (
            F.interpolate(x, scale_factor=factor, mode=mode, **options),
            F.interpolate(x, size=(height, x.shape[3] + 1), mode=mode, **options),
            F.interpolate(x[..., 0], size=x.shape[2], mode="linear" if options else "nearest"),
        )

    return rule, lambda b, s: (some(b, 2, s, 6),), "B _ S _"


def _interpolated_with_known_sizes(draw: random.Random) -> Drawn:
    mode, sizes = draw.choice(["bilinear", "bicubic"]), (draw.randint(1, 9), draw.randint(1, 9))
    aligned = draw.random() < 0.5

    def rule(x: Any) -> Any:
        return (
            F.interpolate(x, size=sizes, mode=mode, antialias=True),
            F.interpolate(x, size=sizes, mode=mode, align_corners=aligned),
            *(F.interpolate(x, scale_factor=1.7, mode=name) for name in ("nearest", "nearest-exact", mode)),
            F.interpolate(x[:, None], size=(3, *sizes), mode="trilinear"),
        )

    return rule, lambda b, s: (some(b, 2, 5, 6),), "B _ _ _"


def _transposed(draw: random.Random) -> Drawn:
    stride, dilation, groups = draw.randint(1, 3), draw.randint(1, 2), draw.choice([1, 2])
    pad, beyond = draw.randint(0, 2), draw.randint(0, max(stride, dilation) - 1)
    weight, bias = some(4, 3, 4, 3), some(3 * groups)
    options = {"stride": stride, "padding": pad, "output_padding": beyond, "groups": groups, "dilation": dilation}

    def rule(x: Any) -> Any:
        flat = F.conv_transpose1d(x[..., 0], weight[..., 0], stride=stride)
        return F.conv_transpose2d(x, weight, bias, **options), F.conv_transpose2d(x[0], weight, **options), flat

    return rule, lambda b, s: (some(b, 4, s, 5),), "B _ S _"


def _continued(draw: random.Random) -> Drawn:
    mode, widths = draw.choice(["replicate", "reflect", "circular"]), [draw.randint(0, 2) for _ in range(4)]
    return (
        lambda x: (F.pad(x, widths, mode=mode), F.pad(x[..., 0], widths[:2], mode=mode)),
        lambda b, s: (some(b, 2, s, 5),),
        "B _ S _",
    )


def _bags(draw: random.Random) -> Drawn:
    mode, ignored = draw.choice(["sum", "mean", "max"]), draw.choice([None, 0, -1])
    table = some(5, 3)

    def rule(x: Any, factors: Any) -> Any:
        scaled = F.embedding_bag(x, table, mode="sum", per_sample_weights=factors)
        return F.embedding_bag(x, table, mode=mode, padding_idx=ignored), scaled

    return rule, lambda b, s: (indices(5, b, s), some(b, s)), "B S"


FAMILIES: dict[str, Callable[[random.Random], Drawn]] = {
    "scatter": _scatter,
    "scatter along": _scatter_along,
    "scatter_reduce": _scatter_reduce,
    "the best": _best,
    "index_put": _written,
    "masked": _masked,
    "pool": _pool,
    "pool of open axes": _open_pool,
    "pool along one": _pool_along_one,
    "adaptive": _adaptive,
    "unfold": _unfold,
    "columns": _columns,
    "instance_norm": _instance_norm,
    "interpolate": _interpolated,
    "interpolate to known sizes": _interpolated_with_known_sizes,
    "transposed convolution": _transposed,
    "pad with elements": _continued,
    "bags": _bags,
    "elu, log1p, expm1": _elu,
}


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_attributes_and_open_axes(family: str, seed: int) -> None:
    torch.manual_seed(seed)
    rule, example, named = FAMILIES[family](random.Random(f"{family} {seed}"))
    module = Rule(rule)
    given = example(4, 6)
    open_dims = [w for w in named.split() if w != "_"]
    dynamic = None
    if open_dims:
        dynamic = {"args_0": named}
        sizes = {word: int(given[0].shape[i]) for i, word in enumerate(named.split()) if word != "_"}
        for k, x in enumerate(given[1:], start=1):  # dimensions with equal sizes in that example are equal
            words = [next((w for w, n in sizes.items() if n == size), "_") for size in x.shape]
            words = ["_" if w in words[:i] else w for i, w in enumerate(words)]
            dynamic[f"args_{k}"] = " ".join(words)
    model = treadle.from_torch(module, given, dynamic=dynamic)
    assert set(model.graph.symbols) == set(open_dims)
    others = [example(7, 9), example(2, 5)] if dynamic else []
    assert_equal(model, module, given, *others)


# -- exactness -----------------------------------------------------------------------------------------------------


def test_log1p_and_expm1_lose_nothing_near_zero_and_at_the_ends() -> None:
    small = torch.logspace(-30, -0.01, 60)
    ends = torch.tensor([0.0, 1.0, -1.0, 30.0, -30.0, 88.0, 100.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([small, -small, ends])
    module = Rule(lambda x: (torch.log1p(x), torch.expm1(x), F.elu(x)))
    model = treadle.from_torch(module, (x,))
    for backend in ("numpy", "torch"):
        got = treadle.compile(model, backend=backend)(args_0=x.numpy())
        for ours, theirs in zip(got.values(), module(x), strict=True):
            # The tolerance is a few roundings of 2^-24 each, relative to the value's own size.
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=8 * 2.0**-24, atol=0)


@pytest.mark.parametrize("name", ["log2", "log10", "exp2", "tan", "sinh", "cosh"])
def test_functions_that_ops_spell(name: str) -> None:
    """The operands are floats, 16-bit floats, and integers, which PyTorch converts."""
    function = getattr(torch, name)
    x = torch.cat([torch.linspace(0.01, 9, 40), torch.tensor([1e-12, 1e-3, 0.0, torch.inf, torch.nan])])
    for given in (x, x.half(), torch.arange(1, 9)):
        module = Rule(lambda x: function(x))
        (wanted,) = (function(given).float().numpy(),)
        room = 2.0**-9 if given.dtype == torch.half else 64 * 2.0**-24
        for backend in ("numpy", "torch"):
            (got,) = treadle.compile(treadle.from_torch(module, (given,)), backend=backend)(
                args_0=given.numpy()
            ).values()
            np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=room, atol=room / 8)


def test_writes_have_the_bits_of_what_is_written() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    source = torch.tensor([[torch.nan, -torch.inf]])
    module = Rule(lambda x, i, s: x.scatter(1, i, s))
    index = torch.tensor([[2, 0]])
    model = treadle.from_torch(module, (x, index, source))
    got = treadle.compile(model)(**model.arguments((x, index, source)))["output"]
    np.testing.assert_array_equal(got, module(x, index, source).numpy())


def test_the_best_are_written_without_a_comparison_of_all_with_all() -> None:
    """top_k returns no index twice, so indices are not compared with each other."""
    rule = FAMILIES["the best"](random.Random(0))[0]
    model = treadle.from_torch(Rule(rule), (some(4, 6),))
    ops = [node.op.name for _, node in model.graph.walk()]
    assert "equal" not in ops
    assert ops.count("scatter_add") == 1
    rows = Rule(lambda x, at: x.index_put((torch.arange(4), at), x[:, 0]))
    ops = [node.op.name for _, node in treadle.from_torch(rows, (some(4, 6), indices(6, 4))).graph.walk()]
    assert "equal" not in ops


CAST_PLACES: dict[str, tuple[Any, bool]] = {
    # indices for the elements of a source, as PyTorch casts them, and True if they are known to be distinct
    "a count": (lambda s: torch.arange(s.shape[0]).int().long(), True),
    "the best": (lambda s: s.topk(300)[1].int().long(), True),
    "of 16 bits": (lambda s: torch.arange(s.shape[0]).to(torch.int16).long(), False),
    "of 8 bits": (lambda s: torch.arange(s.shape[0]).to(torch.uint8).long(), False),
    "of 8 bits, the best": (lambda s: s.topk(300)[1].to(torch.uint8).long(), False),
    "rounded": (lambda s: (torch.arange(s.shape[0]) * 0.5).long(), False),
}


@pytest.mark.parametrize("kind", CAST_PLACES)
def test_places_that_a_cast_may_make_one_are_compared(kind: str) -> None:
    """A cast of 300 indices to 8 bits makes the last 44 equal to the first 44; the last write to an element counts."""
    places, apart = CAST_PLACES[kind]
    rule = Rule(lambda x, s: x.scatter(0, places(s), s))
    example = torch.zeros(300), torch.randperm(300, generator=torch.Generator().manual_seed(0)).float()
    model = treadle.from_torch(rule, example, dynamic=None if "best" in kind else {"args_1": {0: "N"}})
    assert ("equal" not in {node.op.name for _, node in model.graph.walk()}) == apart
    assert_equal(model, rule, example)


def test_constants_that_a_cast_makes_one_are_not_apart() -> None:
    b = Builder(Graph("g"))
    places = b.constant(np.array([0, 2**32, 5]))
    assert is_distinct(places.value, 0) and is_distinct(places.cast(i64).value, 0)
    assert not is_distinct(places.cast(i32).cast(i64).value, 0)


# -- views by strides ----------------------------------------------------------------------------------------------


STRIDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, set[str]]] = {
    # sizes, strides and offset of a view of [4, 6], and the ops for it
    "as it is": ((4, 6), (6, 1), 0, {"rearrange"}),
    "turned": ((6, 4), (1, 6), 0, {"rearrange"}),
    "split": ((2, 3, 4), (12, 4, 1), 0, {"rearrange"}),
    "split and turned": ((3, 4, 2), (4, 1, 12), 0, {"rearrange"}),
    "a part": ((3, 2), (6, 1), 7, {"rearrange", "slice", "windows"}),
    "windows": ((5, 4), (1, 1), 2, {"rearrange", "slice", "windows"}),
    "windows of windows": ((2, 3, 2), (8, 3, 1), 1, {"rearrange", "slice", "windows"}),
    "repeated": ((3, 4), (0, 1), 0, {"expand", "rearrange", "slice"}),
    "the diagonal": ((4,), (7,), 0, {"rearrange", "slice", "windows"}),
    "one": ((), (), 5, {"rearrange", "slice"}),
    "ones": ((1, 1), (100, 7), 5, {"rearrange", "slice"}),
    "none": ((2, 0), (1, 1), 0, {"expand"}),
}


@pytest.mark.parametrize("name", STRIDED)
def test_views_that_strides_say(name: str) -> None:
    size, stride, offset, ops = STRIDED[name]
    module, x = Rule(lambda x: x.as_strided(size, stride, offset)), some(4, 6)
    model = treadle.from_torch(module, (x,))
    assert {node.op.name for _, node in model.graph.walk()} <= ops
    assert_equal(model, module, (x,))


def test_views_by_open_strides() -> None:
    turned = Rule(lambda x: x.as_strided((x.shape[1], x.shape[0]), (1, x.shape[1])))
    model = treadle.from_torch(turned, (some(4, 6),), dynamic={"args_0": "B S"})
    assert_equal(model, turned, (some(3, 5),), (some(2, 9),))
    views = (
        lambda x: x.t().as_strided((2, 2), (1, 2)),
        lambda x: x.as_strided((x.shape[0], 2), (x.shape[1], 3)),
    )
    for rule, words in zip(views, ("itself a view", "stride"), strict=True):
        with pytest.raises(treadle.TreadleError, match=words) as caught:
            treadle.from_torch(Rule(rule), (some(4, 6),), dynamic={"args_0": "B S"})
        assert "torch_modules.py:" in str(caught.value)
        assert "node as_strided" in str(caught.value)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda x: x.scatter_reduce(1, x.long().abs() * 0, x, "amax"), "reduce='amax' with dtype f32 is not supported"),
        (lambda x: torch.index_put(x, (x > 0,), x.flatten()[: int((x > 0).sum())]), "depends on data"),
        (lambda x: F.max_pool2d(x[None], 2, return_indices=True), "its result 1 is not supported"),
        (lambda x: F.adaptive_avg_pool1d(x, 3), "cannot be split into 3 parts"),
    ],
)
def test_rejected_inputs_are_named(rule: Any, words: str) -> None:
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(Rule(rule), (some(4, 6),), dynamic={"args_0": "B S"})
    assert ".py:" in str(caught.value)
