"""Modules that `from_torch` does not support are refused. The error names the operator, the module's own line, and a
hint that works.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.torch_modules import Applied, Rule, assert_equal
from treadle.frontends.torch_export.operators import OPERATORS

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional

LINE = r"from +\S*torch_\w+\.py:\d+"
"""Pattern of a line of the module's code. For a function that `forward` calls, torch.export records the line of the
call.
"""


class DataBranch(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x
        return -x


class Counting(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x + self.calls


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (DataBranch(), "branches on data"),
        (Applied(lambda x: torch.linalg.svd(x)[1]), "svd"),
        (Applied(lambda x: x[x > 0]), "index.Tensor: a mask is not supported"),
        (Applied(torch.fft.rfft), "complex|fft"),
        (Applied(lambda x: torch.linalg.inv(x[:, :3])), "linalg_inv_ex.default: the operator is not supported"),
        (nn.Dropout(0.5), "dropout in training mode is not supported"),
        (Counting(), "changes an argument or a tensor"),
        (Applied(lambda x: x.undefined()), "cannot trace the module"),
    ],
    ids=["branch", "operator", "mask", "complex", "effects", "training", "buffer", "attribute"],
)
def test_unknown_arguments_are_refused(module: Any, words: str) -> None:
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(module, (torch.randn(3, 4),))
    if isinstance(module, Applied | DataBranch):
        assert re.search(LINE, str(caught.value))


@pytest.mark.parametrize(
    ("example", "dynamic", "words"),
    [
        ((torch.ones(2, 3), 1), None, "does not fit"),
        ({"y": torch.ones(2)}, None, "does not fit"),
        ([torch.ones(2)], None, "must be a tuple of arguments"),
        ((torch.ones(2, 3),), {"z": "B"}, "not a tensor of the example"),
        ((torch.ones(2, 3),), {"x": "B"}, "1 dimensions for x, but it has 2"),
        ((torch.ones(2, 3),), {"x": {5: "B"}}, "no dimension 5"),
        ((torch.ones(2, 3),), {"x": {0: "B", 1: "B"}}, "2 and 3 in the example"),
        ((torch.ones(2, 3),), {"x": {0: "2B"}}, "identifier"),
        ((torch.ones(2, 3),), {"x": "B 7"}, "dimension 1 of x is 3, dynamic= specifies 7"),
        ((torch.ones(2, 3),), {"x": ["B", "S"]}, "x is ['B', 'S']"),
        ((torch.ones(2, 3),), {"x": {-3: "B"}}, "no dimension -3"),
        ((torch.ones(2, 3),), {"x": {2: "B"}}, "no dimension 2"),
        ((torch.ones(2, 3),), {"x": {0.5: "B"}}, "no dimension 0.5"),
        ((torch.ones(2, 3),), "B S", "try       dynamic={'x': 'B S'}"),
        ((torch.ones(2, 3),), "B S _", "try       dynamic={'x': 'B _'}"),
        ((torch.ones(2, 3),), ["B", "S"], "try       dynamic={'x': 'B S'}"),
        ((torch.ones(2, 3),), ["x"], "try       dynamic={'x': 'B _'}"),
        ((torch.ones(2, 3),), True, "try       dynamic={'x': 'B _'}"),
        (torch.ones(2, 3), None, "try       a tuple of tensors, (x,) for one argument"),
        ((np.ones((2, 3)),), None, "try       torch.from_numpy(x)"),
    ],
)
def test_examples_and_names_that_do_not_fit(example: Any, dynamic: Any, words: str) -> None:
    with pytest.raises(treadle.TreadleError, match=re.escape(words)):
        treadle.from_torch(Applied(lambda x: x), example, dynamic=dynamic)


def test_dimensions_may_be_counted_from_the_end() -> None:
    model = treadle.from_torch(Applied(lambda x: x * 2), (torch.ones(2, 3),), dynamic={"x": {-2: "B", -1: "S"}})
    assert [str(v.type) for v in model.graph.main.inputs] == ["f32[B, S]"]


def test_long_texts_are_truncated() -> None:
    def fails(x: Any) -> Any:
        raise ValueError("long" * 99)

    with pytest.raises(treadle.TreadleError, match=r"torch\.export cannot trace the module") as caught:
        treadle.from_torch(Applied(fails), (torch.ones(2),))
    assert caught.value.received == ("ValueError: " + "long" * 99)[:300]
    with pytest.raises(treadle.TreadleError) as named:
        treadle.from_torch(Applied(lambda x: x), (torch.ones(2),), dynamic={"x": ["long"] * 99})
    assert named.value.what == f"dynamic= for x is {['long'] * 99!r}"[:120]


def test_a_string_that_names_too_few_dimensions_says_how_it_goes_on() -> None:
    module, x = Applied(lambda x: x * 2), torch.randn(2, 3, 4)
    with pytest.raises(treadle.TreadleError, match="it has 3") as caught:
        treadle.from_torch(module, (x,), dynamic={"x": "B S"})
    assert "{'x': 'B S _'}" in str(caught.value)
    model = treadle.from_torch(module, (x,), dynamic={"x": "B S _"})
    assert_equal(model, module, (torch.randn(5, 1, 4),))


def test_arguments_of_args_and_kwargs_have_open_dimensions() -> None:
    module = Rule(lambda *args, **kwargs: args[0] * kwargs["scale"] + args[1] if args else kwargs["x"] * kwargs["y"])
    before = dict(vars(module))
    named = {"x": torch.randn(2, 3), "y": torch.randn(2, 3)}
    model = treadle.from_torch(module, named, dynamic={"x": "B S", "y": "B S"})
    assert_equal(model, module, {"x": torch.randn(4, 1), "y": torch.randn(4, 1)})
    model = treadle.from_torch(module, named, dynamic={"y": "B S", "x": "B _"} | {"y": "B _"})
    assert [str(v.type) for v in model.graph.main.inputs] == ["f32[B, 3]", "f32[B, 3]"]
    assert vars(module) == before  # the module's own forward is restored
    with pytest.raises(treadle.TreadleError, match="names 'z', which is not a tensor of the example") as caught:
        treadle.from_torch(module, named, dynamic={"z": "B S"})
    assert "x, y" in str(caught.value)


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, n: x[:, : n.item()],
        lambda x, n: x[:, n:],
        lambda x, n: x[:, : int(n)],
        lambda x, n: torch.zeros(n.item()) + x[0, 0],
        lambda x, n: F.max_pool1d(x[None, :, : n.item()], 2),
        lambda x, n: x.repeat(1, n.item()),
    ],
    ids=["bound", "tensor", "int", "made", "operator", "times"],
)
def test_a_size_from_data_is_called_that_and_no_branch(rule: Any) -> None:
    module = Rule(rule)
    with pytest.raises(treadle.TreadleError, match="depends on data, and a graph has no such sizes") as caught:
        treadle.from_torch(module, (torch.randn(4, 8), torch.tensor(3)))
    assert "branches" not in str(caught.value)
    assert re.search(LINE, str(caught.value))
    assert "torch.arange(size) < n" in str(caught.value)


def test_the_hint_for_sizes_from_data_works() -> None:
    cut = Rule(lambda x, n: x[:, :n].sum(1))
    masked = Rule(lambda x, n: torch.where(torch.arange(x.shape[1]) < n, x, 0).sum(1))
    x = torch.randn(4, 8)
    assert_equal(treadle.from_torch(masked, (x, torch.tensor(3))), masked, (x, torch.tensor(5)))
    assert_equal(treadle.from_torch(cut, (x, 3)), cut, (x, 3))


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, n: x if n.item() > 2 else -x,
        lambda x, n: x if n > 2 else -x,
        lambda x, n: x if bool((x > 0).all()) else -x,
    ],
)
def test_a_branch_on_data_is_called_one(rule: Any) -> None:
    with pytest.raises(treadle.TreadleError, match="branches on data") as caught:
        treadle.from_torch(Rule(rule), (torch.randn(4, 8), torch.tensor(3)))
    assert "torch.where" in str(caught.value)


class Masked(torch.nn.Module):
    """A transformer of torch whose mask is computed in its call, with further arguments of the call."""

    def __init__(self, part: torch.nn.Module, mask: str, **options: bool) -> None:
        super().__init__()
        self.part, self.mask, self.options = part, mask, options

    def forward(self, *given: torch.Tensor) -> Any:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(given[-1].shape[1])
        return self.part(*given, **{self.mask: mask}, **self.options)


def transformers() -> dict[str, tuple[torch.nn.Module, str, int]]:
    """Return modules of torch that check a mask, with the argument of the mask and the number of inputs."""
    sizes: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 8, "batch_first": True}
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(**sizes), 1)
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**sizes), 1)
    both = torch.nn.Transformer(**sizes, num_encoder_layers=1, num_decoder_layers=1)
    return {
        "is_causal": (encoder, "mask", 1),
        "tgt_is_causal": (decoder, "tgt_mask", 2),
        "tgt_is_causal of both": (both, "tgt_mask", 2),
        "src_is_causal": (both, "src_mask", 2),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["is_causal", "tgt_is_causal", "tgt_is_causal of both", "src_is_causal"])
def test_the_hint_for_a_mask_that_torch_checks_works(name: str) -> None:
    part, mask, count = transformers()[name]
    part.eval()
    inputs, argument = (torch.randn(2, 5, 8),) * count, name.split()[0]
    with pytest.raises(treadle.TreadleError, match="branches on data") as caught:
        treadle.from_torch(Masked(part, mask), inputs)
    assert (caught.value.hint or "").startswith(f"{argument}=True in this call")
    for value in (True, False):
        assert_equal(treadle.from_torch(Masked(part, mask, **{argument: value}), inputs), Masked(part, mask), inputs)


@pytest.mark.parametrize("rule", [lambda x: x * (x.shape[0] / 2), lambda x: x + 1.5 * x.shape[0]])
def test_a_fraction_that_sizes_give_is_called_that_and_is_a_number_where_they_are_fixed(rule: Any) -> None:
    module, x = Applied(rule), torch.randn(3, 8)
    with pytest.raises(treadle.TreadleError, match="on sizes other than by integer arithmetic") as caught:
        treadle.from_torch(module, (x,), dynamic={"x": "B S"})
    assert "leave its dimensions out of dynamic=" in str(caught.value)
    assert_equal(treadle.from_torch(module, (x,), dynamic={"x": "_ S"}), module, (torch.randn(3, 5),))


def nested(layout: Any) -> Any:
    return torch.nested.nested_tensor([torch.eye(3), torch.ones(2, 3)], layout=layout)


ODD: dict[str, tuple[Any, str, str]] = {
    "meta": (lambda: torch.ones(3, 3, device="meta"), "it is on the meta device", ""),
    "sparse": (lambda: torch.eye(3).to_sparse(), "not a dense tensor", "sparse_coo"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "not a dense tensor", "sparse_csr"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "not a dense", "quantized"),
    "nested": (lambda: nested(torch.strided), "not a dense tensor", "nested"),
    "jagged": (lambda: nested(torch.jagged), "not a dense tensor", "nested"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["input", "keyword", "parameter", "buffer", "attribute"])
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_dense_are_refused_by_name(kind: str, place: str) -> None:
    make, words, received = ODD[kind]
    held, module, x = make(), nn.Module(), torch.eye(3)
    match place:
        case "input":
            module, example = Rule(lambda odd: odd * 2), {"odd": held}
        case "keyword":
            module, example = Rule(lambda x, odd: x + odd["odd"]), {"x": x, "odd": {"odd": held}}
        case _:
            module, example = Rule(lambda x: x + module.odd), {"x": x}
            if place == "parameter":
                if kind == "quantized":
                    pytest.skip("torch has no quantized parameters")
                module.odd = nn.Parameter(held)
            elif place == "buffer":
                module.register_buffer("odd", held)
            else:
                module.odd = held
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(module, example)
    assert type(caught.value.what) is str
    assert "odd" in str(caught.value)
    assert received in str(caught.value)


def test_a_meta_example_is_told_what_to_give_instead() -> None:
    module, x = Applied(lambda x: x * 2), torch.ones(2, 3, device="meta")
    with pytest.raises(treadle.TreadleError, match="meta device") as caught:
        treadle.from_torch(module, (x,))
    assert "torch.zeros(x.shape, dtype=x.dtype)" in str(caught.value)
    treadle.from_torch(module, (torch.zeros(x.shape, dtype=x.dtype),))


def test_a_dimension_that_the_module_fixes() -> None:
    with pytest.raises(treadle.TreadleError, match=r"torch\.export specialized dimension 1 of input to 4"):
        treadle.from_torch(nn.Linear(4, 2), (torch.randn(3, 4),), dynamic={"input": "N D"})


def test_a_dimension_that_the_code_fixes_is_found_at_its_line() -> None:
    def with_ones(x: Any) -> Any:
        return x + torch.ones(len(x), 1)

    with pytest.raises(treadle.TreadleError, match="specialized dimension 0") as caught:
        treadle.from_torch(Applied(with_ones), (torch.randn(3, 4),), dynamic={"x": "B _"})
    assert "test_torch_refusals.py:" in str(caught.value.source)
    assert "x.shape[0] for len(x)" in str(caught.value)
    treadle.from_torch(Applied(lambda x: x + torch.ones(x.shape[0], 1)), (torch.randn(3, 4),), dynamic={"x": "B _"})


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (lambda x: x, "an instance of a subclass of torch.nn.Module, whose forward calls the function"),
        (torch.nn.Linear, "an instance: Linear(...)"),
        ("net.pth", "a module of your class, with these weights: module.load_state_dict(...)"),
        (torch.nn.Linear(2, 2).state_dict(), "a module of your class, with these weights: module.load_state_dict(...)"),
        (torch.jit.trace(torch.nn.ReLU(), torch.ones(2)), "the module that was given to torch.jit.script or"),
    ],
)
@pytest.mark.parametrize("example", [(torch.ones(2),), {"input": torch.ones(2)}])
def test_it_takes_modules_alone(given: Any, hint: str, example: Any) -> None:
    with pytest.raises(treadle.TreadleError, match=r"takes a torch\.nn\.Module") as caught:
        treadle.from_torch(given, example)
    assert str(caught.value.hint).startswith(hint)


X, WHOLE, TRUE, PLACES = (
    torch.randn(3, 4),
    torch.ones(3, 4, dtype=torch.int64),
    torch.ones(3, 4) > 0,
    torch.tensor([0, 2]),
)
STATISTICS = torch.zeros(4), torch.ones(4)
FORMS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "linspace": (lambda x: torch.linspace(0, 9, 4, dtype=torch.int64) + x, (X,), "integers and infinite bounds"),
    "powers": (lambda x: torch.pow(2, x), (WHOLE,), "powers of integers are not supported"),
    "order": (lambda x: x < x.roll(1, 0), (TRUE,), "bools are not supported"),
    "dropout": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), (X,), "dropout is not supported"),
    "ranks": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (torch.randn(1, 1, 1, 3, 4),),
        "ranks 5, 5 and 5 are not supported",
    ),
    "variance": (lambda x: torch.var(x, 0, correction=0.5), (X,), "a correction of 0.5"),
    "norm": (lambda x: torch.linalg.vector_norm(x, 3, -1), (X,), "order 3 is not supported"),
    "argmax": (lambda x: torch.argmax(x, None, keepdim=True), (X,), "keepdim without dim is not supported"),
    "topk": (lambda x: torch.topk(x, 0)[0], (X,), "0 elements are not supported"),
    "median": (lambda x: torch.sort(x, 0)[0], (TRUE,), "bools are not supported"),
    "slice": (lambda x: torch.slice_scatter(x, x[::2], 0, 0, 3, 2), (X,), "a step other than 1 is not supported"),
    "differences": (lambda x: torch.diff(x, 2), (X,), "a higher order is not supported"),
    "repeats": (lambda x: torch.repeat_interleave(x, 2), (X,), "dim is required"),
    "roll": (lambda x: torch.roll(x, 1), (X,), "dims are required"),
    "bags": (
        lambda x: F.embedding_bag(x[0].long(), x, torch.tensor([0, 3])),
        (X.abs() * 0,),
        "bags of different sizes are not supported",
    ),
    "added truth": (lambda x: x.scatter_add(0, x.long(), x), (TRUE,), "bools are not supported"),
    "products": (
        lambda x: x.scatter_reduce(0, x.long(), x, "prod"),
        (X.abs() * 0,),
        "reduce='prod' with dtype f32 is not supported",
    ),
    "index_add": (lambda x: x.index_add(0, PLACES, x[:2]), (TRUE,), "bools are not supported"),
    "alpha": (lambda x: x.index_add(0, PLACES, x[:2], alpha=2.5), (X,), "alpha is not supported"),
    "put": (lambda x: x.index_put((PLACES,), x[0], accumulate=True), (TRUE,), "a sum of bools is not supported"),
    "native_dropout": (
        lambda x: torch.native_dropout(x, 0.5, True)[0],
        (X,),
        "dropout in training mode is not supported",
    ),
    "fifth power": (lambda x: x**5, (WHOLE,), "an integer to the power of 5"),
    "bits": (lambda x: x & 3, (WHOLE,), "integers are not supported"),
    "bits turned": (lambda x: ~x, (WHOLE,), "integers are not supported"),
    "linear": (lambda x: F.linear(x, x[0]), (X,), "a weight of rank 1"),
    "addmm": (
        lambda x: torch.addmm(x, x[:, :3], x, alpha=2),
        (WHOLE,),
        "integers with alpha or beta are not supported",
    ),
    "diagonal": (lambda x: torch.einsum("ii->i", x[:, :3]), (X,), "axis i occurs twice in one operand"),
    "mask": (
        lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3, x[:, :3][None, None, None]),
        (X,),
        "a mask",
    ),
    "scalar": (lambda x: x.sum().softmax(0), (X,), "a scalar is not supported"),
    "windows of a scalar": (lambda x: x.sum().unfold(0, 1, 1), (X,), "a scalar is not supported"),
    "sort": (lambda x: x[:, :0].sort(1)[0], (X,), "an empty axis is not supported"),
    "truths": (
        lambda x: x.index_put((x > 0,), x[0]),
        (X,),
        "their number depends on data",
    ),
    "nonzero": (lambda x: x.nonzero(), (X,), "its output shape depends on data"),
    "truths and places": (
        lambda x: x.index_put((x[:, 0] > 0, PLACES[0]), X[0, 0]),
        (X,),
        "together with another index is not supported",
    ),
    "training": (lambda x: F.batch_norm(x, *STATISTICS, training=True), (X,), "training mode is not supported"),
    "batch_norm": (nn.BatchNorm1d(4), (X,), "training mode is not supported"),
    "instance_norm": (nn.InstanceNorm1d(3, track_running_stats=True), (X[None],), "training mode is not supported"),
    "dtype": (lambda x: x.to(torch.uint16).float(), (X,), "dtype uint16 is not supported"),
    "subgraph": (lambda x: torch.cond(x.sum() > 2, torch.sin, torch.cos, (x,)), (X,), "a node of get_attr"),
}
"""Refused forms of operators that are supported in other forms."""


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_an_operator_is_refused_by_name(form: str) -> None:
    rule, example, words = FORMS[form]
    module = rule if isinstance(rule, nn.Module) else Applied(rule)
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(module, example)
    assert re.search(r"from +torch/" if rule is module else LINE, str(caught.value))
    assert "node " in str(caught.value)


OPEN: dict[str, tuple[Any, str]] = {
    # functions of x [B, S, T] with open B, S and T
    "sort": (lambda x: x.sort(1)[0], "a symbolic axis is not supported"),
    "roll": (lambda x: x.roll(1, 1), "a symbolic axis is not supported"),
    "topk": (lambda x: x.topk(x.shape[1], 1)[0], "k must be a number, not S"),
    "strides": (lambda x: F.conv1d(x, x, stride=x.shape[0]), "stride must be numbers"),
    "alpha": (lambda x: torch.add(x, x, alpha=x.shape[1]), "alpha must be a number"),
    "squeeze": (lambda x: x[:, 1:].squeeze(1), "a dimension of S-1 may be 1"),
    "past the end": (lambda x: x[:, :, : x.shape[1]], "a position of S on an axis of T, which may be past its end"),
    "parts": (lambda x: F.adaptive_avg_pool1d(x, 3), "T elements cannot be split into 3 parts"),
    "before the start": (lambda x: x[:, x.shape[0] - x.shape[2] :], "a position of B-T, which may be negative"),
    "pad": (lambda x: F.pad(x, (x.shape[2], 0), mode="circular"), "must be numbers of 0 or more"),
    "cubic": (lambda x: F.interpolate(x[None], (6, 7), mode="bicubic"), "cubic interpolation from S to 6 elements"),
    "backwards": (lambda x: x[:, x.shape[2] : x.shape[0]], "from T to B, which may be before it"),
}


@pytest.mark.parametrize("form", OPEN)
def test_undetermined_sizes_are_refused(form: str) -> None:
    rule, words = OPEN[form]
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(Applied(rule), (torch.randn(2, 8, 3),), dynamic={"x": "B S T"})
    assert re.search(LINE, str(caught.value))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda x, y: X[x.long()[:, 0, 0, 0], y.long()[:, 0, 0, 0]], "indices of N and M elements do not broadcast"),
        (lambda x, y: F.scaled_dot_product_attention(x, y, y), "N, M and M batches do not broadcast"),
    ],
)
def test_an_open_size_of_one_that_may_broadcast_is_refused(rule: Any, words: str) -> None:
    example = torch.zeros(2, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(Rule(rule), example, dynamic={"args_0": {0: "N"}, "args_1": {0: "M"}})
    assert re.search(LINE, str(caught.value))


def test_a_handler_that_makes_something_else_than_torch_found_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If our import of an operator has another type than PyTorch's result, an error with the operator and the line is
    raised instead of a wrong number.
    """

    def crashes(site: Any) -> Any:
        raise KeyError("none")

    wrong: dict[str, tuple[Any, str]] = {
        "aten.relu.default: its result is bool here, f32 in torch": (lambda s: s.x("self") > 0, ""),
        "its result is [B] here, [B, S] in torch": (lambda s: s.b.reduce_sum(s.x("self"), axes=(1,)), ""),
        "its result is [B, S-1] here, [B, S] in torch": (lambda s: s.b.slice(s.x("self"), axis=1, start=1), ""),
        "aten.relu.default: cannot be read": (crashes, "KeyError: 'none'"),
        "aten.relu.default: matmul: ": (lambda s: s.b.matmul(s.x("self"), s.x("self")), "f32[B, S]"),
    }
    for what, (handler, received) in wrong.items():
        monkeypatch.setitem(OPERATORS, "relu.default", handler)
        with pytest.raises(treadle.FrontendError) as caught:
            treadle.from_torch(Applied(lambda x: x.relu()), (torch.randn(2, 8),), dynamic={"x": "B S"})
        assert what in str(caught.value)
        assert received in str(caught.value)
        assert re.search(LINE, str(caught.value))


@pytest.mark.parametrize("result", [None, 3])
def test_a_module_that_gives_no_tensor(result: Any) -> None:
    with pytest.raises(treadle.FrontendError, match="the module returns no tensor"):
        treadle.from_torch(Applied(lambda x: result), (torch.ones(2),))


def test_a_module_that_calls_itself_for_ever() -> None:
    module = Applied(lambda x: module(x))
    with pytest.raises(treadle.FrontendError, match="nests too deep"):
        treadle.from_torch(module, (torch.ones(2),))


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(treadle.UsageError, match="from_torch needs PyTorch") as caught:
        treadle.from_torch(None, ())
    assert caught.value.hint == "pip install torch"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.6.0+cu124", False), ("2.11.1", False), ("2.12.0", True), ("3.0", True)]
)
def test_a_pytorch_that_is_too_old_is_named(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    if fits:
        treadle.from_torch(torch.nn.Linear(2, 2), (torch.randn(1, 2),))
        return
    with pytest.raises(treadle.UsageError, match=r"from_torch needs PyTorch 2\.12 or newer") as caught:
        treadle.from_torch(torch.nn.Linear(2, 2), (torch.randn(1, 2),))
    assert (caught.value.received, caught.value.hint) == (f"torch {version}", "pip install 'torch>=2.12'")
    assert "torch>=2.12;" in (Path(__file__).parents[1] / "pyproject.toml").read_text()
